"""python sample.py "white and red car": pictures from words.

    python sample.py "a blue van" -n 4 --gif      four of them, and how they came to be
    python sample.py -n 64                        no prompt: whatever the diffusion model likes to draw

Uses runs/clip and runs/ddpm if both were trained, else the models that come with the source. Writes one PNG with prompt,
seed and settings in its metadata, and says how probable CLIP and the independent judge find what came out.
"""
import argparse
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


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="what to draw; without it, sampling is unguided")
    parser.add_argument("-n", type=int, default=16, help="how many pictures")
    parser.add_argument("--method", default="contrastive", choices=[*guide.METHODS, "none"])
    parser.add_argument("--scale", type=float, help="guidance scale; default: the method's own")
    parser.add_argument("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="guide at these times alone, 1 to 1000")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps, 1 to 1000")
    parser.add_argument("--eta", type=float, default=1., help="0 is deterministic DDIM, 1 as noisy as DDPM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the PNG to write; default out/PROMPT.png")
    parser.add_argument("--gif", action="store_true", help="also the way there, as a GIF")
    parser.add_argument("--clip", help="a CLIP's weights.pt")
    parser.add_argument("--ddpm", help="a DDPM's weights.pt")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=64, help="pictures at a time")
    args = parser.parse_args(arguments)
    for name, value, low, high in (("-n", args.n, 1, 10_000), ("--steps", args.steps, 1, 1000), ("--eta", args.eta, 0, 1),
                                   ("--batch", args.batch, 1, 10_000), ("--seed", args.seed, 0, 2 ** 63)):
        if not low <= value <= high:
            raise data.UserError(f"{name} must be from {low} to {high}, not {value}")
    if args.prompt is None:
        args.method = "none"
    elif not tinyclip.canonical(args.prompt):
        raise data.UserError("the prompt is empty; leave it out to sample without guidance")
    return args


def find_target(prompt, captions, tokenizer):
    """-> captions, with the prompt added if it is a new one, and its index. Warns of words that CLIP has never read."""
    known = [tinyclip.canonical(caption) for caption in captions]
    wanted = tinyclip.canonical(prompt)
    if wanted in known:
        return captions, known.index(wanted)
    read = {word for caption in known for word in caption.split()}
    strange = [word for word in wanted.split() if word not in read]
    if strange:
        print(f"CLIP never read {', '.join(map(repr, strange))}; it knows: {' '.join(sorted(read))}", file=sys.stderr)
    return [*captions, prompt], len(captions)


def main(arguments=None):
    args = parse(arguments)
    device = data.pick_device(args.device)
    clip_path, ddpm_path = data.find_weights(args.clip, args.ddpm)
    clip, clip_content = data.load_model(clip_path, "clip", tinyclip.from_checkpoint)
    unet, ddpm_content = data.load_model(ddpm_path, "ddpm", tinyddpm.from_checkpoint)
    data.check_fit(clip_content, ddpm_content)
    clip, unet = (model.to(device, memory_format=torch.channels_last) for model in (clip, unet))
    alpha_bar = tinyddpm.cosine_alpha_bar(unet.config.T).to(device)
    print(f"CLIP from {clip_path}, DDPM from {ddpm_path}, on {device}")

    start, frames, pictures = time.perf_counter(), [], []
    maker, scale, interval = guide.METHODS.get(args.method, (None, 0., (1, unet.config.T)))
    scale, interval = scale if args.scale is None else args.scale, args.interval or interval
    with data.autocast(device), torch.no_grad():
        if args.prompt:
            captions, target = find_target(args.prompt, clip_content["captions"], clip.tokenizer)
            text_features = clip.encode_text(clip.tokenizer.batch(captions, clip.config.context_length).to(device))
        for first in range(0, args.n, args.batch):
            indices = range(first, min(first + args.batch, args.n))
            log_p = maker and maker(clip, text_features, torch.full((len(indices),), target, device=device))
            watch = (lambda t, x_t, x_0_hat: frames.append(data.to_uint8(torch.cat([x_t, x_0_hat])))) if args.gif and first == 0 else None
            pictures.append(guide.generate(unet, alpha_bar, [data.generator(args.seed, i) for i in indices], log_p,
                                           scale, interval, args.steps, args.eta, watch))
        x_0 = torch.cat(pictures)
        seconds = time.perf_counter() - start
        if args.prompt:
            belief = clip.logits(clip.encode_image(x_0), text_features).softmax(1)[:, target]
            print(f"CLIP gives {captions[target]!r} a probability of {belief.mean():.0%} on average, among {len(captions)} captions")
            report_verdict(x_0, captions[target], device)

    name = "-".join(tinyclip.canonical(args.prompt).split())[:80] if args.prompt else "unguided"
    out = Path(args.out or f"out/{''.join(c for c in name if c.isalnum() or c == '-')}.png")
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "device", "gif")}
    columns, zoom = max(1, min(8, round(args.n ** 0.5))), max(1, 96 // unet.config.image_size)
    data.save_grid(out, data.to_uint8(x_0), columns, zoom, **{**settings, "scale": scale, "interval": tuple(interval)})
    if args.gif:
        data.save_gif(out.with_suffix(".gif"), frames, columns=min(args.n, args.batch), zoom=zoom)
    print(f"{args.n} pictures in {seconds:.1f} s ({args.steps} steps, {args.method}, scale {scale:g}) -> {out}")


def report_verdict(x_0, caption, device):
    """What the judge thinks, if there is one and it knows the caption."""
    if not (data.SHIPPED / "judge.pt").exists() or caption not in cars.CAPTIONS:
        return
    third, content = data.load_model(data.SHIPPED / "judge.pt", "judge", judge.from_checkpoint)
    truth = torch.from_numpy(cars.caption_labels(torch.tensor(cars.CAPTIONS.index(caption)).numpy()))
    right = judge.verdict(third.to(device), x_0).cpu() == truth
    parts = ", ".join(f"{name} {right[:, i].float().mean():.0%}" for i, name in enumerate(content["attributes"]))
    print(f"the judge finds all of it right in {int(right.all(1).sum())} of {len(x_0)} pictures ({parts})")


if __name__ == "__main__":
    try:
        main()
    except data.UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
