"""python sample.py "white and red car": pictures from words.

    python sample.py "a blue van" -n 4 --gif      four of them, and how they came to be
    python sample.py "red bus" "blue bus"         one file for each prompt, from the same noise
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

import bpe
import checkpoints
import data
import guide
import judge
import tinyddpm


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", nargs="*", metavar="prompt",
        help="what to draw, each in a file of its own; without one, sampling is unguided")
    add("-n", type=int, default=16, help="how many pictures")
    add("--method", default=guide.DEFAULT, choices=guide.METHODS)
    add("--scale", type=float, help="guidance scale; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guide only at these times, 1 to T; default: the method's own")
    add("--steps", type=int, default=25, help="denoising steps, 1 to 1000")
    add("--eta", type=float, default=1., help="0 is DDIM, deterministic with --recurrence 1; 1 is "
        "as noisy as DDPM")
    add("--recurrence", type=int, default=2, help="take every step so many times, with fresh noise")
    add("--seed", type=int, default=0)
    add("--out", help="the PNG to write, or the folder if there are several prompts; default out")
    add("--gif", action="store_true", help="also the way there, as a GIF: x_t above, x_0_hat below")
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--judge", help="a judge's weights.pt")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    add("--batch", type=int, default=64, help="pictures at a time")
    args = parser.parse_intermixed_args(arguments)   # prompts and flags in any order
    check(args)
    if not args.prompts:
        args.prompts, args.method = [None], "none"
    if args.scale is None or args.method == "none":
        args.scale = guide.METHODS[args.method].scale
    return args


def check(args):
    """Refuse what cannot be drawn."""
    data.check_drawing(args)
    data.check_range("-n", args.n, 1, 10_000)
    if args.scale is not None and not math.isfinite(args.scale):
        raise data.UserError(f"--scale must be a finite number, not {args.scale}")
    if not all(bpe.canonical(prompt) for prompt in args.prompts):
        raise data.UserError("the prompt is empty; leave it out to sample without guidance")


# ---- what is wanted ------------------------------------------------------------------------------

def find_target(prompt, models):
    """-> the models, with the prompt among their captions if it is a new one, and its index.

    Warns of words that CLIP has never read, and of those that it will not read.
    """
    target = checkpoints.find_caption(prompt, models)
    if target is not None:
        return models, target
    read = sorted({word for texts in models.spellings for text in texts
                   for word in bpe.canonical(text).split()})
    words = dict.fromkeys(bpe.canonical(prompt).split())
    strange = [word[:30] for word in words if word not in read]
    if strange:
        print(f"CLIP never read {first_of(map(repr, strange))}; it knows: {first_of(read, 50)}",
              file=sys.stderr)
    longest = models.clip.config.context_length - 2   # start and end
    if len(models.clip.tokenizer.encode(prompt)) > longest:
        print(f"the prompt is too long: CLIP reads its first {longest} tokens", file=sys.stderr)
    captions = [*models.captions, prompt]
    return checkpoints.with_captions(models, captions), len(models.captions)


def first_of(words, most=5):
    """"a, b, c and 7 more" """
    words = list(words)
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def understand(prompt, args, models):
    """As find_target; without a prompt the index is None. UserError if the method cannot do it."""
    if prompt is None:
        return models, None
    known = len(models.captions)
    models, target = find_target(prompt, models)
    if args.method == "classifier-free":
        checkpoints.check_told(models.unet)
        if target == known:
            raise data.UserError(f"{prompt!r} is none of the {known} captions that this DDPM is "
                                 "told, and only CLIP understands others; use another --method")
    return models, target


# ---- drawing -------------------------------------------------------------------------------------

def draw(args, models, target):
    """-> x_0 (n, 3, H, W) in [-1, 1], and the GIF's frames, none if no GIF is wanted."""
    unet, alpha_bar, device = models.unet, models.alpha_bar, models.alpha_bar.device
    size, pictures, frames = unet.config.image_size, [], []
    shown = min(8, args.n, args.batch)   # of the first batch: more would make a GIF of megabytes

    def watch(t, x_t, x_0_hat):
        frames.append(data.to_uint8(torch.cat([x_t[:shown], x_0_hat[:shown]])))

    for first in range(0, args.n, args.batch):
        indices = range(first, min(first + args.batch, args.n))
        denoise = tinyddpm.denoiser(unet, alpha_bar)
        if target is not None:
            targets = torch.full((len(indices),), target, device=device)
            denoise = guide.guided_by(args.method, models, targets, args.scale, args.interval)
        generators = [data.generator(args.seed, i) for i in indices]
        x_T = tinyddpm.noise(generators, (3, size, size), device)
        pictures.append(tinyddpm.sample(
            denoise, x_T, generators, alpha_bar, args.steps, args.eta,
            recurrence=args.recurrence, watch=watch if args.gif and first == 0 else None))
    return torch.cat(pictures), frames


def paths(args):
    """-> the PNG of each prompt, all different; their folders are made, or refused, now."""
    chosen = []
    for prompt in args.prompts:
        out = Path(args.out or "out")
        if not args.out or len(args.prompts) > 1:
            out = out / f"{file_name(prompt)}.png"
        if out.suffix.lower() != ".png":
            raise data.UserError(f"--out {out}: the pictures are written as PNG; end it in .png")
        stem, number = out.stem, 2
        while out in chosen:   # "red bus" and "a red bus"
            out, number = out.with_stem(f"{stem}-{number}"), number + 1
        out.parent.mkdir(parents=True, exist_ok=True)
        chosen.append(out)
    return chosen


def save(args, where, prompt, out, pictures, frames):
    """The PNG, with all that it takes to draw it again in its metadata, and the GIF."""
    about = {key: value for key, value in vars(args).items()
             if value is not None and key not in ("prompts", "out", "device", "gif")}
    about["models"] = where
    if prompt is not None:
        about["prompt"] = prompt
    columns = max(1, min(8, round(args.n ** 0.5)))
    zoom = max(1, 96 // pictures.shape[1])   # small pictures get up to 96 pixels on the screen
    data.save_grid(out, pictures, columns, zoom, **about)
    if frames:   # one row of x_t, below it one of x_0_hat
        data.save_gif(out.with_suffix(".gif"), frames, columns=len(frames[0]) // 2, zoom=zoom)


def file_name(prompt):
    """"A white and red car!" -> "white-and-red-car"."""
    if prompt is None:
        return "unguided"
    name = "-".join(bpe.canonical(prompt).split())[:80]
    return "".join(c for c in name if c.isalnum() or c == "-") or "prompt"


# ---- reporting -----------------------------------------------------------------------------------

def report_belief(models, target, x_0):
    """What the CLIP that guided thinks, which is not what to grade it by."""
    belief = checkpoints.beliefs(models, x_0)[:, target].mean()
    caption = models.captions[target]
    caption = caption if len(caption) < 80 else caption[:80] + "..."
    print(f"CLIP gives {caption!r} a probability of {belief:.0%} on average, among "
          f"{len(models.captions)} captions")


def report_verdict(grader, content, x_0, caption):
    """What the judge sees, if its attributes can say the caption.

    content: of the judge's checkpoint, which says what each caption promises.
    """
    if caption not in content["captions"]:
        return
    promise = torch.tensor(content["caption_labels"][content["captions"].index(caption)])   # (A,)
    right = judge.verdict(grader, x_0).cpu() == promise                                  # (N, A)
    shares = zip(content["attributes"], right.float().mean(0))
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares)
    print(f"the judge finds all of it right in {int(right.all(1).sum())} of {len(x_0)} pictures "
          f"({parts})")


@torch.no_grad()
def main(arguments=None):
    args = parse(arguments)
    device, out = data.pick_device(args.device), paths(args)
    with data.autocast(device):
        models = checkpoints.load_pair(args.clip, args.ddpm, device)
        print(models.where)
        T = models.unet.config.T
        if args.steps > T:
            raise data.UserError(f"--steps {args.steps}: this DDPM has {T} times")
        grader, content = checkpoints.load_judge(models.data, args.judge, device)

        wishes = [understand(prompt, args, models) for prompt in args.prompts]
        for prompt, (models, target), path in zip(args.prompts, wishes, out):
            start = time.perf_counter()
            x_0, frames = draw(args, models, target)
            pictures = data.to_uint8(x_0)   # (n, H, W, 3); waits for the device: the time is true
            seconds = time.perf_counter() - start
            save(args, models.where, prompt, path, pictures, frames)
            if prompt is not None:
                report_belief(models, target, x_0)
            if prompt is not None and grader:
                report_verdict(grader, content, x_0, models.captions[target])
            print(f"{args.n} pictures in {seconds:.1f} s "
                  f"({args.steps} x {args.recurrence} steps, {args.method}, scale "
                  f"{args.scale:g}) -> {path}")


if __name__ == "__main__":
    data.command(main)
