"""python train.py clip | ddpm | judge: train one model.

    python train.py clip                    the tiny preset: 32 px, two CPU cores, minutes
    python train.py ddpm --minutes 10       stop cleanly after ten minutes (so does Ctrl-C)
    python train.py ddpm                    the same run again: it goes on where it stopped
    python train.py ddpm -h                 every field of a config is a flag, such as --channels 48

A run's folder (runs/clip, ...) gets checkpoint.pt, to go on from; weights.pt, what sample.py reads;
loss.png and previews. Step n draws its pictures, times and noise from (seed, n): it is a function
of them and of the step before, so on one machine an interrupted run ends with the same weights as
one that ran through.
"""
import argparse
import copy
import dataclasses
import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cars
import data
import jobs
import judge
import muon
import plot
import tinyclip
import tinyddpm
from unet import UNetConfig


@dataclass
class TrainConfig:
    steps: int = 1000            # the length of the whole run; the learning rate reaches zero there
    batch: int = 128             # pictures per step
    lr: float = 1e-3             # the highest learning rate, of both optimizers
    warmup: float = 0.03         # of the run, in which the learning rate climbs from zero
    weight_decay: float = 0.05   # of Muon's matrices; what AdamW trains does not decay
    pictures: int = 50_000       # how many of the car world are rendered; a folder gives all it has
    labels: str = "balanced"     # how often which car occurs: "balanced", or as in "shapenet"
    hold_out: str = ""           # pairs of colours never shown, such as "white+red,blue+yellow"
    shuffle: bool = False        # deal the captions out at random, to see what that mistake does


@dataclass
class CLIPTrainConfig(TrainConfig):
    clean: float = 0.125         # the share of a batch that carries no noise
    most_captions: int = 1024    # that one step compares a picture with


# What a preset means for each kind of model: the model's config, and that of its training.
PRESETS = {
    "tiny": {
        "clip": (tinyclip.CLIPConfig(), CLIPTrainConfig(steps=1500, lr=2e-3)),
        "ddpm": (UNetConfig(), TrainConfig(steps=4500, batch=32, lr=4e-3, weight_decay=0.01)),
        "judge": (judge.JudgeConfig(), TrainConfig(steps=800)),
    },
}


# ---- a run: begin, go on, save -------------------------------------------------------------------

class Run(NamedTuple):
    """One run on its way. What training changes are the last four, all in place."""
    job: jobs.Job
    folder: Path
    settings: dict           # all that must be the same when a run goes on
    device: torch.device
    model: torch.nn.Module   # the job's, on the device
    ema: torch.nn.Module     # its moving average: what previews show and weights.pt holds
    optimizers: tuple        # one for weight matrices, one for everything else
    history: list            # of (step, mean loss of the steps since the entry before)


def begin(job, folder, settings, options, device):
    """-> a Run before its first step."""
    model = job.model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    matrices, others = muon.split(model)
    optimizers = (
        muon.Muon(matrices, options.lr, options.weight_decay),
        torch.optim.AdamW(others, options.lr, betas=(0.9, 0.99), weight_decay=0., fused=True))
    return Run(job, folder, settings, device, model, ema, optimizers, history=[])


def resume(run):
    """Put what checkpoint.pt holds, if there is one, into the run -> how many steps it has done."""
    path = run.folder / "checkpoint.pt"
    if not path.exists():
        return 0
    saved = data.load_checkpoint(path, f"{run.job.kind} run")
    for key, now in run.settings.items():
        old = saved["settings"].get(key)
        if old != now:
            raise data.UserError(f"{run.folder} holds a run with another {key} ({old}, now {now}): "
                                 "choose another --out, or start over with --fresh")
    run.model.load_state_dict(saved["model"])
    run.ema.load_state_dict(saved["ema"])
    for optimizer, state in zip(run.optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    run.history.extend(saved["history"])
    return saved["step"]


def save(run, step):
    """checkpoint.pt, to go on from; weights.pt, to use; loss.png, to look at."""
    data.save_checkpoint(run.folder / "checkpoint.pt", {
        "kind": f"{run.job.kind} run", "settings": run.settings, "step": step,
        "history": run.history, "model": run.model.state_dict(), "ema": run.ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]})
    data.save_checkpoint(run.folder / "weights.pt", {
        "kind": run.job.kind, "config": dataclasses.asdict(run.model.config),
        "data": run.settings["data"], "schedule": "cosine", "steps": step,
        "weights": data.fp16(run.ema), **run.job.content})
    curve = tuple(zip(*run.history))   # all steps, all losses
    plot.lines(run.folder / "loss.png", {"loss": curve}, "step",
               "training loss, mean of 50 steps")


# ---- the loop ------------------------------------------------------------------------------------

def learning_rate(step, options):
    """Linear warm-up, then half a cosine down to zero. step counts from 1."""
    warmup = max(1, round(options.warmup * options.steps))
    if step <= warmup:
        return options.lr * step / warmup
    progress = (step - warmup) / (options.steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(run, step, dataset, options):
    """One update of the model and of its average -> the loss, a scalar tensor."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
    seed, device = run.settings["seed"], run.device
    x_0, rows = data.batch(dataset, seed, step, options.batch, device)
    with data.autocast(device):
        generator = data.generator(seed, step, device=device)
        torch.manual_seed(generator.initial_seed())   # dropout draws from torch's own generator
        loss = run.job.loss(run.model, x_0, rows, generator)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    tinyddpm.ema_update(run.ema, run.model, step)
    return loss.detach()


def watch_for_ctrl_c():
    """-> an event that the first Ctrl-C sets, so that the step at hand can end and be saved.

    Python's own way would break off anywhere, even between the model and its average. A second
    Ctrl-C does just that.
    """
    pressed = threading.Event()

    def on_ctrl_c(signal_number, frame):
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, on_ctrl_c)
    return pressed


def record(run, step, losses):
    """Add the mean of the losses since the last entry to the history -> that mean."""
    mean = torch.stack(losses).mean().item()
    if not math.isfinite(mean):   # and nothing of it gets into a checkpoint
        raise data.UserError(f"the loss is not finite at step {step:,}; {run.folder} keeps what it "
                             "held before; start over with --fresh and a lower --lr")
    run.history.append((step, mean))
    return mean


def train(run, done, dataset, options, args):
    """From step done + 1 to the last one, or to where --minutes or Ctrl-C stops it."""
    last, preview_every = options.steps, max(1, options.steps // 10)
    deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    ctrl_c = watch_for_ctrl_c()
    losses, saved_at = [], time.monotonic()
    bar = tqdm(total=last * options.batch, initial=done * options.batch,
               desc=run.job.kind, unit="picture", unit_scale=True)
    for step in range(done + 1, last + 1):
        losses.append(train_step(run, step, dataset, options))
        bar.update(options.batch)
        stop = step == last or ctrl_c.is_set() or time.monotonic() > deadline

        if step % 50 == 0 or stop:   # not at every step: .item() waits for the device
            bar.set_postfix_str(f"loss {record(run, step, losses):.3f}")
            losses = []
        if step % preview_every == 0 or step == last:
            with torch.no_grad(), data.autocast(run.device):
                bar.write(f"step {step:,}: {run.job.preview(run.ema, run.folder)}")
        if stop or (step % 50 == 0 and time.monotonic() - saved_at > 120):
            save(run, step)
            saved_at = time.monotonic()
        if stop:
            break
    bar.close()

    if step == last:
        print(f"finished: {run.folder}/weights.pt")
        return
    again = "the same command without --fresh" if args.fresh else "the same command"
    print(f"stopped at step {step:,} of {last:,}; {again} goes on")
    if ctrl_c.is_set():
        raise KeyboardInterrupt   # all is saved; the caller shall know why it ended


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    """-> args, the model's config and the training's: those of the preset, changed by flags."""
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in jobs.JOBS:
        add_flags(kinds.add_parser(kind, help=f"python train.py {kind} -h lists its flags"), kind)
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{args.kind}"
    try:
        config, options = (changed(config, args) for config in PRESETS[args.preset][args.kind])
    except ValueError as error:   # a config refuses what cannot be built
        raise data.UserError(str(error)) from None
    check(args, options)
    return args, config, options


def add_flags(parser, kind):
    parser.add_argument("--data", default="cars",
                        help="cars, the built-in world, or a folder with pictures and captions")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on later")
    parser.add_argument("--out", help=f"the run's folder; default runs/{kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    parser.add_argument("--fresh", action="store_true", help="start over, even if there is a run")
    # A default lives once, in its dataclass or its preset: a flag that is not given sets nothing.
    for config in PRESETS["tiny"][kind]:
        for name, value in dataclasses.asdict(config).items():
            several = isinstance(value, tuple)
            how = {"action": "store_true"} if value is False else {
                "nargs": "+" if several else None, "type": type(value[0] if several else value)}
            parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=f"tiny: {value}", **how)


def changed(config, args):
    """-> the config with the values of those of its fields that were given as flags."""
    given = {name: type(value)(getattr(args, name))   # type: argparse makes lists of our tuples
             for name, value in dataclasses.asdict(config).items() if name in args}
    return dataclasses.replace(config, **given)


def check(args, options):
    """Refuse numbers with which nothing could be trained."""
    for name in ("steps", "batch", "pictures"):
        if getattr(options, name) < 1:
            raise data.UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    for name, value in (("lr", options.lr), ("minutes", args.minutes)):
        if value is not None and not value > 0:   # so that NaN is refused too
            raise data.UserError(f"--{name} must be more than 0, not {value}")
    for name in ("warmup", "clean", "weight-decay"):
        data.check_range(f"--{name}", getattr(options, name.replace("-", "_"), 0), 0, 1)
    if options.labels not in cars.FREQUENCIES:
        raise data.UserError(f"--labels must be one of {', '.join(cars.FREQUENCIES)}, not "
                             f"{options.labels}")
    data.check_range("--seed", args.seed, 0, 2 ** 63 - 1)


def without(dataset, pairs):
    """The cars that are not of two colours that pairs names, in either order, and their captions.

    pairs: such as "white+red,blue+yellow". UserError if it is nothing of the kind.
    """
    try:
        pairs = [{cars.COLOURS.index(colour.strip()) for colour in pair.split("+")}
                 for pair in pairs.split(",")]
    except ValueError as error:
        raise data.UserError(f"--hold-out: {error}; write white+red,blue+yellow") from None
    if dataset.name != "cars" or any(len(pair) != 2 for pair in pairs):
        raise data.UserError("--hold-out is about the car world, and each of its pairs about two "
                             "colours, such as white+red,blue+yellow")
    kept = np.array([set(map(int, labels[1:])) not in pairs for labels in dataset.caption_labels])
    rows, place = kept[dataset.caption_of].nonzero()[0], kept.cumsum() - 1
    some = lambda texts: [text for text, keep in zip(texts, kept) if keep]
    return dataset._replace(
        pictures=dataset.pictures[rows], caption_of=place[dataset.caption_of[rows]],
        captions=some(dataset.captions), spellings=[some(texts) for texts in dataset.spellings],
        caption_labels=dataset.caption_labels[kept],
        report=f"{dataset.report}; {len(rows):,} and {kept.sum()} are not held out")


def main(arguments=None):
    args, config, options = parse(arguments)
    device, folder = data.pick_device(args.device), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)   # or refuse now, not after the first save
    if args.kind == "judge":   # which must see other pictures than those it is going to judge by
        other = config.net == "plain" and args.data == "cars"   # where there is no end of pictures
        size, held_out = config.size, min(5000, options.pictures)
        splits = ("judge-2" if other else "judge"), "judge-test"
    else:
        size, held_out = config.image_size, min(2000, options.pictures)
        splits = "train", "validation"
    dataset, validation = (data.load(args.data, size, count, split, options.labels)
                           for split, count in zip(splits, (options.pictures, held_out)))
    if options.hold_out:
        dataset, validation = (without(part, options.hold_out) for part in (dataset, validation))
    if options.shuffle:
        dealt = np.random.default_rng(args.seed).permutation(dataset.caption_of)
        dataset = dataset._replace(caption_of=dealt)
    print(dataset.report, validation.report, sep="\n")
    torch.manual_seed(args.seed)   # for the initial weights
    job = jobs.JOBS[args.kind](config, options, dataset, validation, device)
    settings = {"data": dataset.name, "data set": dataset.report, "seed": args.seed,
                **dataclasses.asdict(config), **dataclasses.asdict(options)}
    run = begin(job, folder, settings, options, device)

    done = 0 if args.fresh else resume(run)
    if done == options.steps:
        print(f"{run.folder} is finished ({done:,} steps); --fresh starts over")
        return
    if done:
        print(f"going on in {run.folder} at step {done + 1:,} of {options.steps:,}")
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{millions:.2f} million parameters on {device}; {job.note}")
    train(run, done, dataset, options, args)


if __name__ == "__main__":
    data.command(main)
