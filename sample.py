"""python sample.py "white and red car": pictures from words.

    python sample.py "a blue van" -n 4 --gif      four of them, and how they came to be
    python sample.py -n 64                        no prompt: whatever the diffusion model draws

Uses runs/clip and runs/ddpm if both were trained, else the models that come with the source. Writes
one PNG with prompt, seed and settings in its metadata, and says how probable CLIP finds the prompt
in what came out, and what the independent judge sees there.
"""
import argparse
import math
import sys
import time
from pathlib import Path

import torch

import cars
import data
import guide
import judge
import tinyclip
import tinyddpm


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw; without it, sampling is unguided")
    add("-n", type=int, default=16, help="how many pictures")
    add("--method", default="contrastive", choices=[*guide.METHODS, "none"])
    add("--scale", type=float, help="guidance scale; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guide only at these times, 1 to 1000; default: the method's own")
    add("--steps", type=int, default=50, help="denoising steps, 1 to 1000")
    add("--eta", type=float, default=1., help="0 is deterministic DDIM, 1 as noisy as DDPM")
    add("--seed", type=int, default=0)
    add("--out", help="the PNG to write; default out/PROMPT.png")
    add("--gif", action="store_true", help="also the way there, as a GIF: x_t above, x_0_hat below")
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    add("--batch", type=int, default=64, help="pictures at a time")
    args = parser.parse_args(arguments)
    check(args)
    if args.prompt is None:
        args.method = "none"
    return args


def check(args):
    """Refuse what cannot be drawn."""
    for name, value, low, high in (
            ("-n", args.n, 1, 10_000), ("--steps", args.steps, 1, 1000), ("--eta", args.eta, 0, 1),
            ("--batch", args.batch, 1, 10_000), ("--seed", args.seed, 0, 2 ** 63)):
        if not low <= value <= high:   # NaN is refused too
            raise data.UserError(f"{name} must be from {low} to {high}, not {value}")
    if args.scale is not None and not math.isfinite(args.scale):
        raise data.UserError(f"--scale must be a finite number, not {args.scale}")
    if args.interval and not 1 <= args.interval[0] <= args.interval[1] <= 1000:
        raise data.UserError("--interval must be two times LO <= HI from 1 to 1000, not "
                             f"{args.interval[0]} {args.interval[1]}")
    if args.prompt is not None and not tinyclip.canonical(args.prompt):
        raise data.UserError("the prompt is empty; leave it out to sample without guidance")


# ---- what is wanted ------------------------------------------------------------------------------

def find_target(prompt, captions):
    """-> the captions, with the prompt added if it is a new one, and the index of the prompt.

    Warns of words that CLIP has never read.
    """
    known = [tinyclip.canonical(caption) for caption in captions]
    wanted = tinyclip.canonical(prompt)
    if wanted in known:
        return captions, known.index(wanted)
    read = {word for caption in known for word in caption.split()}
    strange = [word for word in wanted.split() if word not in read]
    if strange:
        print(f"CLIP never read {', '.join(map(repr, strange))}; it knows: "
              f"{' '.join(sorted(read))}", file=sys.stderr)
    return [*captions, prompt], len(captions)


def choose_guidance(args):
    """-> maker of log_p, scale and interval: the method's own, where flags do not say otherwise."""
    if args.method == "none":
        return None, 0., (1, 1000)
    maker, scale, interval = guide.METHODS[args.method]
    return maker, scale if args.scale is None else args.scale, tuple(args.interval or interval)


# ---- drawing -------------------------------------------------------------------------------------

def draw(args, unet, alpha_bar, log_p_for, scale, interval):
    """-> x_0 (n, 3, H, W) in [-1, 1], and the GIF's frames, an empty list if no GIF is wanted.

    log_p_for(B) -> the log_p that guides B pictures, or None for no guidance.
    """
    pictures, frames = [], []
    shown = min(8, args.n, args.batch)   # of the first batch: more would make a GIF of megabytes

    def watch(t, x_t, x_0_hat):
        frames.append(data.to_uint8(torch.cat([x_t[:shown], x_0_hat[:shown]])))

    for first in range(0, args.n, args.batch):
        indices = range(first, min(first + args.batch, args.n))
        generators = [data.generator(args.seed, i) for i in indices]
        pictures.append(guide.generate(
            unet, alpha_bar, generators, log_p_for(len(indices)), scale, interval,
            args.steps, args.eta, watch if args.gif and first == 0 else None))
    return torch.cat(pictures), frames


def save(args, pictures, frames, scale, interval):
    """The PNG, with all that it takes to draw it again in its metadata, and the GIF -> the path."""
    out = Path(args.out or f"out/{file_name(args.prompt)}.png")
    about = {key: value for key, value in vars(args).items()
             if value is not None and key not in ("out", "device", "gif")}
    about.update(scale=scale, interval=interval)
    columns = max(1, min(8, round(args.n ** 0.5)))
    zoom = max(1, 96 // pictures.shape[1])   # small pictures get up to 96 pixels on the screen
    data.save_grid(out, pictures, columns, zoom, **about)
    if frames:   # one row of x_t, below it one of x_0_hat
        data.save_gif(out.with_suffix(".gif"), frames, columns=len(frames[0]) // 2, zoom=zoom)
    return out


def file_name(prompt):
    """"A white and red car!" -> "white-and-red-car"."""
    if prompt is None:
        return "unguided"
    name = "-".join(tinyclip.canonical(prompt).split())[:80]
    return "".join(c for c in name if c.isalnum() or c == "-") or "prompt"


# ---- reporting -----------------------------------------------------------------------------------

def report_belief(clip, x_0, text_features, captions, target):
    """What the CLIP that guided thinks, which is not what to grade it by."""
    image_features = torch.cat([clip.encode_image(part) for part in x_0.split(250)])
    belief = clip.logits(image_features, text_features).softmax(1)[:, target].mean()
    print(f"CLIP gives {captions[target]!r} a probability of {belief:.0%} on average, "
          f"among {len(captions)} captions")


def report_verdict(x_0, caption):
    """What the judge sees, if it is there and its attributes can say the caption."""
    if not (data.SHIPPED / "judge.pt").exists() or caption not in cars.CAPTIONS:
        return
    grader, content = data.load_model(data.SHIPPED / "judge.pt", "judge", judge.from_checkpoint)
    truth = torch.from_numpy(cars.caption_labels(cars.CAPTIONS.index(caption)))   # (A,)
    right = judge.verdict(grader.to(x_0.device), x_0).cpu() == truth              # (N, A)
    shares = zip(content["attributes"], right.float().mean(0))
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    print(f"the judge finds all of it right in {int(right.all(1).sum())} of {len(x_0)} pictures "
          f"({parts})")


@torch.no_grad()
def main(arguments=None):
    args = parse(arguments)
    device = data.pick_device(args.device)
    clip, unet, captions, where = data.load_pair(
        tinyclip.from_checkpoint, tinyddpm.from_checkpoint, args.clip, args.ddpm, device)
    print(where)
    alpha_bar = tinyddpm.cosine_alpha_bar(unet.config.T).to(device)
    maker, scale, interval = choose_guidance(args)

    with data.autocast(device):
        start = time.perf_counter()
        if args.prompt:
            captions, target = find_target(args.prompt, captions)
            tokens = clip.tokenizer.batch(captions, clip.config.context_length).to(device)
            text_features = clip.encode_text(tokens)   # (K, E)

        def log_p_for(B):
            if maker is None:
                return None
            return maker(clip, text_features, torch.full((B,), target, device=device))

        x_0, frames = draw(args, unet, alpha_bar, log_p_for, scale, interval)
        pictures = data.to_uint8(x_0)   # (n, H, W, 3); waits for the device, so the time is true
        seconds = time.perf_counter() - start
        if args.prompt:
            report_belief(clip, x_0, text_features, captions, target)
            report_verdict(x_0, captions[target])

    out = save(args, pictures, frames, scale, interval)
    print(f"{args.n} pictures in {seconds:.1f} s "
          f"({args.steps} steps, {args.method}, scale {scale:g}) -> {out}")


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
