"""python evaluate.py clip | ddpm | guidance | figure: the numbers and pictures that README.md and RESULTS.md claim.

    python evaluate.py clip                                       accuracy and calibration against t
    python evaluate.py ddpm                                       held-out loss against t
    python evaluate.py guidance                                   all 294 prompts, one sample each, judged; a row per method
    python evaluate.py guidance --methods contrastive --scales 3 6 12 --prompts even --seed 1       a sweep
    python evaluate.py figure                                     what guidance sees: the figure of the README

Every table is also written as JSON, with commit, seed and machine.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import cars
import data
import guide
import judge
import tinyclip
import tinyddpm


def load_models(args, device):
    """-> CLIP, U-Net, alpha_bar, text_features (K, E), captions."""
    clip_path, ddpm_path = data.find_weights(args.clip, args.ddpm)
    print(f"CLIP from {clip_path}, DDPM from {ddpm_path}")
    clip, clip_content = data.load_model(clip_path, "clip", tinyclip.from_checkpoint)
    unet, ddpm_content = data.load_model(ddpm_path, "ddpm", tinyddpm.from_checkpoint)
    data.check_fit(clip_content, ddpm_content)
    clip, unet = (model.to(device, memory_format=torch.channels_last) for model in (clip, unet))
    captions = clip_content["captions"]
    text_features = clip.encode_text(clip.tokenizer.batch(captions, clip.config.context_length).to(device))
    return clip, unet, tinyddpm.cosine_alpha_bar(unet.config.T).to(device), text_features, captions


def calibration_error(probabilities, truth, bins=15):
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3): the mean gap between confidence and accuracy
    over `bins` equal ranges of confidence. probabilities: (N, K), truth: (N,) -> float"""
    confidence, answer = probabilities.max(dim=1)
    right = (answer == truth).float()
    which = (confidence * bins).long().clamp(max=bins - 1)
    return sum((right[which == b].mean() - confidence[which == b].mean()).abs().item() * (which == b).float().mean().item()
               for b in which.unique())


def clip_table(args, device):
    """Top-1 among all captions, per attribute, and calibration, at rising noise."""
    clip, unet, alpha_bar, text_features, captions = load_models(args, device)
    dataset, rows = data.load("cars", clip.config.image_size, 2000, "validation"), []
    x_0, truth = data.to_float(dataset.pictures).to(device), torch.from_numpy(dataset.caption_of).to(device)
    eps = torch.randn(x_0.shape, generator=data.generator(args.seed, device=device), device=device)
    for t in (0, 50, *range(100, 1000, 100), 950):
        times = torch.full((len(x_0),), t, device=device)
        x_t = tinyddpm.q_sample(x_0, times, eps, alpha_bar)
        logits = torch.cat([clip.logits(clip.encode_image(x, s), text_features, s) for x, s in zip(x_t.split(250), times.split(250))])
        answer = logits.argmax(1)
        parts = cars.caption_labels(answer.cpu().numpy()) == dataset.labels
        rows.append({"t": t, "joint": (answer == truth).float().mean().item(),
                     **{name: float(parts[:, i].mean()) for i, name in enumerate(dataset.attributes)},
                     "ece": calibration_error(logits.softmax(1), truth), "logit_scale": clip.logit_scale(times[:1]).item()})
    data.save_plot(args.out / "clip.png", {name: ([r["t"] for r in rows], [r[name] for r in rows]) for name in ("joint", *dataset.attributes)},
                   "t", "accuracy on held-out pictures")
    return rows


def ddpm_table(args, device):
    """The mean squared error of v_hat on held-out pictures, at rising noise."""
    _, unet, alpha_bar, _, _ = load_models(args, device)
    x_0, rows = data.to_float(data.load("cars", unet.config.image_size, 2000, "validation").pictures[:1000]).to(device), []
    eps = torch.randn(x_0.shape, generator=data.generator(args.seed, device=device), device=device)
    for t in (50, 150, 300, 500, 700, 900):
        times = torch.full((len(x_0),), t, device=device)
        rows.append({"t": t, "v_error": tinyddpm.ddpm_loss(unet, x_0, times, eps, alpha_bar).mean().item()})
    return rows


def guidance_table(args, device):
    """Prompts, one sample each, by the independent judge; beside it what the guiding CLIP believes, and the cost."""
    clip, unet, alpha_bar, text_features, captions = load_models(args, device)
    third, content = data.load_model(args.judge, "judge", judge.from_checkpoint)
    third, rows = third.to(device), []
    targets = torch.arange(len(captions), device=device)[{"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[args.prompts]]
    truth = torch.from_numpy(cars.caption_labels(targets.cpu().numpy()))
    jobs = [(name, scale) for name in args.methods
            for scale in ([0.] if name == "none" else args.scales or [guide.METHODS[name][1]])]
    for name, scale in jobs:
        maker, _, interval = guide.METHODS.get(name, (None, 0., (1, unet.config.T)))
        interval, pictures, start = args.interval or interval, [], time.perf_counter()
        for some in tqdm(targets.split(args.batch), desc=f"{name} {scale:g}", leave=False):
            generators = [data.generator(args.seed, int(i)) for i in some]
            log_p = maker and maker(clip, text_features, some)
            pictures.append(guide.generate(unet, alpha_bar, generators, log_p, scale, interval, args.steps, args.eta))
        seconds, x_0 = time.perf_counter() - start, torch.cat(pictures)
        right = judge.verdict(third, x_0).cpu() == truth
        logits = clip.logits(clip.encode_image(x_0), text_features)
        low, high = judge.wilson(int(right.all(1).sum()), len(right))
        rows.append({"method": name, "scale": scale, "prompts": len(right), "joint": right.all(1).float().mean().item(),
                     "low": low, "high": high, **{key: right[:, i].float().mean().item() for i, key in enumerate(content["attributes"])},
                     "clip_belief": logits.softmax(1)[torch.arange(len(x_0)), targets].mean().item(),
                     "unet_calls": args.steps, "seconds": seconds})
        data.save_grid(args.out / f"guidance-{name}-{scale:g}.png", data.to_uint8(x_0[::max(1, len(x_0) // 48)][:48]), zoom=2)
        show(rows[-1:], header=len(rows) == 1)
    return rows


def figure(args, device):
    """The figure that explains guidance: x_t, x_0_hat, CLIP's gradient and its five most probable captions, down one trajectory."""
    clip, unet, alpha_bar, text_features, captions = load_models(args, device)
    target, size, cell = captions.index(args.prompt), unet.config.image_size, 128
    times, moments = [900, 700, 500, 300, 100], {}
    keep = lambda t, x_t, x_0_hat: moments.update({t: (x_t, x_0_hat)})
    aim = torch.tensor([target], device=device)
    maker, scale, interval = guide.METHODS["contrastive"]
    guide.generate(unet, alpha_bar, [data.generator(args.seed, 0)], maker(clip, text_features, aim), scale, interval, args.steps, args.eta, keep)
    denoise, picture = tinyddpm.denoiser(unet, alpha_bar), lambda x: Image.fromarray(data.to_uint8(x)[0]).resize((cell, cell), Image.Resampling.NEAREST)
    sheet, font = Image.new("RGB", (120 + 2 * cell + 2 * (cell + 230), 34 + len(times) * (cell + 8)), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    columns = [60, 60 + cell + 8, 60 + 2 * (cell + 8) + 16, 60 + 3 * (cell + 8) + 16 + 222]
    for x, title in zip(columns, ("x_t", "x_0_hat", "noise-aware CLIP: gradient, posterior", "clean CLIP: gradient, posterior")):
        draw.text((x, 10), title, "black", font)
    for row, t in enumerate(times):
        y = 34 + row * (cell + 8)
        x_t, now = moments[t][0], torch.tensor([t], device=device)
        draw.text((8, y + cell // 2), f"{t}", "black", font)
        sheet.paste(picture(x_t / x_t.abs().max()), (columns[0], y))
        sheet.paste(picture(denoise(x_t, now)), (columns[1], y))
        for x, told in zip(columns[2:], (now, torch.zeros_like(now))):
            with torch.enable_grad():
                seen = x_t.detach().requires_grad_()
                logits = clip.logits(clip.encode_image(seen, told), text_features, told)
                grad, = torch.autograd.grad(logits.log_softmax(1)[0, target], seen)
            sheet.paste(picture(grad / (3 * grad.std() + 1e-12)), (x, y))
            p = logits.softmax(1)[0]
            top = [target, *[i for i in p.argsort(descending=True).tolist() if i != target][:4]]
            for line, i in enumerate(top):
                bar = int(p[i] * 208)
                draw.rectangle([x + cell + 6, y + 6 + 24 * line, x + cell + 6 + bar, y + 22 + 24 * line], "#f4b9b2" if i == target else "#d5dbe3")
                draw.text((x + cell + 9, y + 7 + 24 * line), f"{p[i]:.0%} {captions[i]}", "black", font)
    sheet.save(args.out / "figure.png")
    return []


def show(rows, header=True):
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else str(value)
    if header and rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(text(value) for value in row.values()) + " |", flush=True)


TABLES = {"clip": clip_table, "ddpm": ddpm_table, "guidance": guidance_table, "figure": figure}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--methods", nargs="+", default=["none", "clean", "contrastive"], choices=["none", *guide.METHODS])
    parser.add_argument("--scales", type=float, nargs="+", help="default: each method's own")
    parser.add_argument("--interval", type=int, nargs=2, metavar=("LO", "HI"))
    parser.add_argument("--prompts", default="all", choices=["all", "even", "odd"], help="tune on one half, report on all")
    parser.add_argument("--prompt", default="a white and red car", help="of the figure")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--eta", type=float, default=1.)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=49)
    parser.add_argument("--clip"), parser.add_argument("--ddpm")
    parser.add_argument("--judge", default=data.SHIPPED / "judge.pt")
    parser.add_argument("--out", type=Path, default="out")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    with torch.no_grad(), data.autocast(device):
        rows = TABLES[args.table](args, device)
    if args.table != "guidance":
        show(rows)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    about = {"commit": commit, "machine": f"{platform.machine()} {device}, {torch.get_num_threads()} threads", "arguments": {k: str(v) for k, v in vars(args).items()}}
    (args.out / f"{args.table}.json").write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
