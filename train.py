"""python train.py clip | ddpm | judge: train one model. The same command again goes on where it stopped.

    python train.py clip                    the tiny preset: 32 px, two CPU cores, minutes
    python train.py ddpm --minutes 10       stop cleanly after ten minutes, go on later
    python train.py ddpm --channels 48      every field of a config is a flag

A run's folder (runs/clip, ...) gets checkpoint.pt, to go on from; weights.pt, what sample.py reads; loss.png and previews.
Step n draws its pictures, times and noise from (seed, n), so a step is a function of them, and an interrupted run ends
with the same weights as one that ran through.
"""
import argparse
import copy
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

import data
import judge
import tinyclip
import tinyddpm


@dataclass
class TrainConfig:
    steps: int = 1000            # the length of the whole run; the learning rate falls to zero by its end
    batch: int = 128             # pictures per step
    lr: float = 1e-3             # the highest learning rate
    warmup: float = 0.03         # of the run, in which the learning rate climbs from zero
    weight_decay: float = 0.05   # on matrices and kernels, not on biases and norms
    pictures: int = 50_000       # size of the training set
    clean: float = 0.125         # clip: the share of a batch that carries no noise


# What each preset changes, for each kind: in the model's config, and in TrainConfig.
PRESETS = {
    "tiny": {
        "clip": (tinyclip.CLIPConfig(), TrainConfig(steps=4000, lr=5e-4)),
        "ddpm": (tinyddpm.UNetConfig(blocks=1), TrainConfig(steps=12_000, batch=32, weight_decay=0.01)),
        "judge": (judge.JudgeConfig(), TrainConfig(steps=1500)),
    },
}


class Job(NamedTuple):
    """What train() has to know about one kind of model."""
    model: torch.nn.Module
    loss: Callable       # (model, x_0, rows of the data set, generator) -> scalar
    preview: Callable    # (averaged model, folder) -> a line for the log; draws into the folder
    content: dict        # what weights.pt holds beside the weights
    note: str            # printed before the first step


# ---- the three jobs -------------------------------------------------------------------------------------------------

def clip_job(config, options, dataset, validation, device):
    tokenizer = tinyclip.Tokenizer.train(dataset.captions, vocab_size=4096)
    alpha_bar = tinyddpm.cosine_alpha_bar(config.T).to(device)
    caption_of = torch.from_numpy(dataset.caption_of).to(device)
    shortened = [c.removeprefix("a ") for c in dataset.captions]        # users leave the article out, so half the time we do
    tokens = torch.stack([tokenizer.batch(texts, config.context_length) for texts in (dataset.captions, shortened)]).to(device)
    K, B = len(dataset.captions), options.batch

    def loss(model, x_0, rows, generator):
        t = tinyddpm.random_times(B, config.T, generator)
        t[torch.randperm(B, generator=generator, device=device)[:round(options.clean * B)]] = 0
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        spelling = torch.randint(2, (K,), generator=generator, device=device)
        image_features = model.encode_image(tinyddpm.q_sample(x_0, t, eps, alpha_bar), t)
        text_features = model.encode_text(tokens[spelling, torch.arange(K, device=device)])
        return tinyclip.clip_loss(model.logits(image_features, text_features, t), caption_of[rows], t == 0)

    def preview(model, folder):
        x_0, rows = data.batch(validation, 0, 0, 500, device)
        truth = torch.from_numpy(validation.caption_of[rows]).to(device)
        eps = torch.randn(x_0.shape, generator=data.generator(0, 0, device=device), device=device)
        text_features, accuracy = model.encode_text(tokens[0]), {}
        for t in [0, *range(100, config.T, 100)]:
            times = torch.full((len(x_0),), t, device=device)
            image_features = model.encode_image(tinyddpm.q_sample(x_0, times, eps, alpha_bar), times)
            accuracy[t] = (model.logits(image_features, text_features, times).argmax(1) == truth).float().mean().item()
        data.save_plot(folder / "accuracy.png", {"top-1": (list(accuracy), list(accuracy.values()))}, "t", f"accuracy among {K} captions")
        return "top-1 on held-out pictures: " + ", ".join(f"{a:.1%} at t = {t}" for t, a in accuracy.items() if t in (0, 300, 500, 700))

    counts = torch.bincount(caption_of, minlength=K).tolist()
    content = {"captions": dataset.captions, "counts": counts, "merges": tokenizer.merges}
    return Job(tinyclip.CLIP(config, tokenizer), loss, preview, content, f"chance is a loss of ln({K}) = {math.log(K):.2f}")


def ddpm_job(config, options, dataset, validation, device):
    alpha_bar = tinyddpm.cosine_alpha_bar(config.T).to(device)

    def loss(model, x_0, rows, generator):
        t = tinyddpm.random_times(options.batch, config.T, generator)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        return tinyddpm.ddpm_loss(model, x_0, t, eps, alpha_bar).mean()

    def preview(model, folder):
        x_0, _ = data.batch(validation, 0, 0, 500, device)
        g = data.generator(0, 0, device=device)
        held_out = tinyddpm.ddpm_loss(model, x_0, tinyddpm.random_times(500, config.T, g),
                                      torch.randn(x_0.shape, generator=g, device=device), alpha_bar).mean()
        generators = [data.generator(0, i) for i in range(16)]
        x_T = tinyddpm.noise(generators, (3, config.image_size, config.image_size), device)
        x_0 = tinyddpm.sample(tinyddpm.denoiser(model, alpha_bar), x_T, generators, alpha_bar)
        data.save_grid(folder / "samples.png", data.to_uint8(x_0), zoom=2)
        return f"loss on held-out pictures {held_out:.4f}, 16 samples in samples.png"

    return Job(tinyddpm.UNet(config), loss, preview, {}, "a network that says v = 0 has a loss of about 0.9")


def judge_job(config, options, dataset, validation, device):
    labels = torch.from_numpy(dataset.labels).to(device)

    def loss(model, x_0, rows, generator):
        return judge.judge_loss(model, x_0, labels[rows])

    def preview(model, folder):
        right = judge.verdict(model, data.to_float(validation.pictures).to(device)).cpu() == torch.from_numpy(validation.labels)
        parts = ", ".join(f"{name} {right[:, i].float().mean():.2%}" for i, name in enumerate(dataset.attributes))
        return f"on {len(right)} held-out pictures: joint {right.all(1).float().mean():.2%}, {parts}"

    sizes = {name: len(values) for name, values in dataset.attributes.items()}
    chance = sum(math.log(n) for n in sizes.values())
    return Job(judge.Judge(config, sizes), loss, preview, {"attributes": dataset.attributes}, f"chance is a loss of {chance:.2f}")


# ---- the loop -------------------------------------------------------------------------------------------------------

def learning_rate(step, options):
    """Linear warm-up, then half a cosine down to zero. step counts from 1."""
    warmup = max(1, round(options.warmup * options.steps))
    if step <= warmup:
        return options.lr * step / warmup
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (options.steps - warmup)))


def train(kind, job, options, dataset, args, settings, device):
    """Run, or go on with, one job. settings: everything that must not change between a run and its continuation."""
    folder = Path(args.out)
    model = job.model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    matrices, rest = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.}],
                                  lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay, fused=True)
    first, history = 1, []
    if (folder / "checkpoint.pt").exists() and not args.fresh:
        saved = data.load_checkpoint(folder / "checkpoint.pt", f"{kind} run")
        changed = [k for k, v in settings.items() if saved["settings"].get(k) != v]
        if changed:
            raise data.UserError(f"{folder} holds a run with another {changed[0]} ({saved['settings'].get(changed[0])}, now "
                                 f"{settings[changed[0]]}): choose another --out, or start over with --fresh")
        model.load_state_dict(saved["model"]), ema.load_state_dict(saved["ema"]), optimizer.load_state_dict(saved["optimizer"])
        first, history = saved["step"] + 1, saved["history"]
        if first > options.steps:
            print(f"{folder} is finished ({options.steps:,} steps); --fresh starts over")
            return
        print(f"going on in {folder} at step {first:,} of {options.steps:,}")

    def save(step):
        data.save_checkpoint(folder / "checkpoint.pt", {
            "kind": f"{kind} run", "settings": settings, "step": step, "history": history,
            "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict()})
        data.save_checkpoint(folder / "weights.pt", {
            "kind": kind, "config": dataclasses.asdict(job.model.config), "data": args.data, "schedule": "cosine",
            "steps": step, "weights": data.fp16(ema), **job.content})
        data.save_plot(folder / "loss.png", {"loss": tuple(zip(*history))}, "step", "training loss, mean of 50 steps")

    deadline = time.monotonic() + (args.minutes or math.inf) * 60
    every = max(1, options.steps // 10)
    recent, last_saved, stopped = [], time.monotonic(), False
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters on {device}; {job.note}")
    bar = tqdm(total=options.steps * options.batch, initial=(first - 1) * options.batch, desc=kind, unit="picture", unit_scale=True)
    for step in range(first, options.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        x_0, rows = data.batch(dataset, args.seed, step, options.batch, device)
        with data.autocast(device):
            loss = job.loss(model, x_0, rows, data.generator(args.seed, step, device=device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tinyddpm.ema_update(ema, model, step)

        recent.append(loss.detach())
        bar.update(options.batch)
        if step % 50 == 0 or step == options.steps:
            mean, recent = torch.stack(recent).mean().item(), []
            if not math.isfinite(mean):
                raise data.UserError(f"the loss is not finite at step {step}; {folder} keeps the last good checkpoint; try a lower --lr")
            history.append((step, mean))
            bar.set_postfix_str(f"loss {mean:.3f}")
        stopped = time.monotonic() > deadline
        if step % every == 0 or step == options.steps:
            with torch.no_grad(), data.autocast(device):
                bar.write(f"step {step:,}: {job.preview(ema, folder)}")
        if stopped or step == options.steps or time.monotonic() - last_saved > 120:
            save(step)
            last_saved = time.monotonic()
        if stopped and step < options.steps:
            break
    bar.close()
    print(f"stopped at step {step:,} of {options.steps:,}; the same command goes on" if step < options.steps else f"finished: {folder}/weights.pt")


# ---- the command line -----------------------------------------------------------------------------------------------

def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["clip", "ddpm", "judge"])
    parser.add_argument("--data", default="cars")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on later")
    parser.add_argument("--out", help="the run's folder; default runs/KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fresh", action="store_true", help="start over, even if the folder holds a run")
    known, _ = parser.parse_known_args(arguments)
    for config in PRESETS[known.preset][known.kind]:      # a default lives once, in its dataclass or its preset
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            several = isinstance(value, tuple)
            parser.add_argument("--" + field.name.replace("_", "-"), type=type(value[0] if several else value),
                                nargs="+" if several else None, default=value, help=f"default {value}")
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{args.kind}"
    filled = [dataclasses.replace(config, **{f.name: tuple(v) if isinstance(v := getattr(args, f.name), list) else v
                                             for f in dataclasses.fields(config)})
              for config in PRESETS[args.preset][args.kind]]
    return args, *filled


def main(arguments=None):
    args, config, options = parse(arguments)
    device = data.pick_device(args.device)
    size = config.size if args.kind == "judge" else config.image_size
    splits = ("judge", "judge-test") if args.kind == "judge" else ("train", "validation")
    dataset = data.load(args.data, size, options.pictures, splits[0])
    validation = data.load(args.data, size, 5000 if args.kind == "judge" else 2000, splits[1])
    torch.manual_seed(args.seed)                          # the initial weights
    job = {"clip": clip_job, "ddpm": ddpm_job, "judge": judge_job}[args.kind](config, options, dataset, validation, device)
    settings = {"data": args.data, "seed": args.seed, **dataclasses.asdict(config), **dataclasses.asdict(options)}
    train(args.kind, job, options, dataset, args, settings, device)


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
