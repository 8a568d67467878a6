"""python sample.py "white and red car": images from a prompt.

    python sample.py "a blue van" -n 4 --gif      four of them, and an animation from noise to image
    python sample.py "red bus" "blue bus"         one file for each prompt, from the same noise
    python sample.py -n 64                        no prompt: unguided

Uses runs/clip and runs/ddpm if both were trained, else the models in weights/. Writes one PNG with
prompt, seed and settings in its metadata, and prints CLIP's probability of the prompt and the
judge's prompt accuracy. From Python: load_models, then generate (see README.md).
"""
import argparse
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch

import data
import guide
import judge
import tinyclip
import tinyddpm
from infra import checkpoint, cli
from tinyclip import normalize_prompt

SHIPPED = Path(__file__).resolve().parent / "weights"


# ---- models --------------------------------------------------------------------------------------

class Models(NamedTuple):
    """A matching CLIP and diffusion model."""
    clip: tinyclip.CLIP
    unet: tinyddpm.UNet
    alpha_bar: torch.Tensor       # (T + 1,)
    captions: list                # K, those that CLIP was trained on
    templates: list               # S lists of K texts: ways to write each caption
    text_features: torch.Tensor   # (K, E), of the captions
    data: str                     # the name of the data set
    description: str              # files and device


def find_weights(clip=None, ddpm=None):
    """Pick the two models' paths: as given, else both of runs/, else both of weights/."""
    trained = [Path("runs") / kind / "weights.pt" for kind in ("clip", "ddpm")]
    shipped = [SHIPPED / f"{kind}.pt" for kind in ("clip", "ddpm")]
    default = trained if all(path.exists() for path in trained) else shipped
    return Path(clip or default[0]), Path(ddpm or default[1])


@torch.no_grad()
def load_models(clip=None, ddpm=None, device="cpu"):
    """Load the two models that find_weights picks -> Models

    UserError if they do not fit: guidance is meaningless if CLIP was trained on other images.
    """
    device, (clip_path, ddpm_path) = torch.device(device), find_weights(clip, ddpm)
    clip, clip_content = checkpoint.load_model(clip_path, "clip", tinyclip.CLIP)
    unet, ddpm_content = checkpoint.load_model(ddpm_path, "ddpm", tinyddpm.UNet)
    for_clip, for_ddpm = (
        f"{content['data']} at {model.config.image_size} pixels"
        for model, content in ((clip, clip_content), (unet, ddpm_content)))
    if for_clip != for_ddpm:
        raise cli.UserError(f"these models do not fit together: CLIP is for {for_clip}, the DDPM "
                            f"for {for_ddpm}; train both alike")
    if ddpm_content.get("clip") not in (None, checkpoint.weights_checksum(clip)):
        raise cli.UserError(f"{ddpm_path} is conditional on the text features of another CLIP; "
                            "give that one with --clip")
    clip, unet = (m.to(device, memory_format=torch.channels_last) for m in (clip, unet))
    with cli.autocast(device):
        text_features = clip.encode_captions(clip_content["captions"])
    return Models(clip, unet, tinyddpm.cosine_alpha_bar().to(device), clip_content["captions"],
                  clip_content["templates"], text_features, clip_content["data"],
                  f"CLIP from {clip_path} ({clip_content['steps']:,} steps), DDPM from {ddpm_path} "
                  f"({ddpm_content['steps']:,} steps), on {device}")


def load_judge(data_name, path=None, device="cpu"):
    """Load the judge of a data set: the given one, else that of runs/, else that of weights/.

    -> (judge, content), (None, None) if there is none
    """
    found = [p for p in (Path("runs/judge/weights.pt"), SHIPPED / "judge.pt") if p.exists()]
    for candidate in [path] if path else found:
        model, content = checkpoint.load_model(candidate, "judge", judge.Judge)
        if content["data"] == data_name:
            return model.to(device), {**content, "path": str(candidate)}
    if path:
        raise cli.UserError(f"--judge {path} is for {content['data']}, the models for {data_name}")
    return None, None


# ---- prompts -------------------------------------------------------------------------------------

def resolve_prompt(prompt, models):
    """Find a prompt among the captions -> (models, its index)

    Whatever its template, a known caption is found. Another prompt becomes one more caption, and
    only its feature is computed; words that CLIP was not trained on are named, and so is a prompt
    that exceeds the context length. UserError if it is empty.
    """
    prompt = normalize_prompt(prompt)
    if not prompt:
        raise cli.UserError("the prompt is empty; leave it out to sample without guidance")
    index_of = {normalize_prompt(text): i for texts in models.templates
                for i, text in enumerate(texts)}
    if prompt in index_of:
        return models, index_of[prompt]
    known = sorted({word for text in index_of for word in text.split()})
    unknown = [repr(word[:30]) for word in dict.fromkeys(prompt.split()) if word not in known]
    if unknown:
        unknown, known = (shorten(", ".join(words), 300) for words in (unknown, known))
        print(f"CLIP was not trained on {unknown}; its words: {known}", file=sys.stderr)
    longest = models.clip.config.context_length - 2   # start and end
    if len(models.clip.tokenizer.encode(prompt)) > longest:
        print(f"the prompt is too long: CLIP reads its first {longest} tokens", file=sys.stderr)
    text_features = torch.cat([models.text_features, models.clip.encode_captions([prompt])])
    return models._replace(captions=[*models.captions, prompt], text_features=text_features), \
        len(models.captions)


# ---- sampling ------------------------------------------------------------------------------------

@dataclass
class SamplingConfig:
    n: int = 16                   # images
    method: str = guide.DEFAULT   # one of guide.METHODS
    scale: float = None           # guidance scale; None becomes the method's own
    interval: tuple = None        # timesteps (lo, hi) at which to guide; None: the method's own
    steps: int = 25
    eta: float = 1.               # 0 is deterministic as DDIM, 1 as noisy as DDPM
    recurrence: int = 2           # times that each step but the last is taken
    seed: int = 0
    batch: int = 64               # images at a time

    def __post_init__(self):
        if self.method not in guide.METHODS:
            raise cli.UserError(f"method must be one of {', '.join(guide.METHODS)}, not "
                                f"{self.method!r}")
        if self.scale is None:
            self.scale = guide.METHODS[self.method].scale
        for name, low, high in (("n", 1, 10_000), ("steps", 1, tinyddpm.T), ("eta", 0, 1),
                                ("recurrence", 1, 100), ("batch", 1, 10_000),
                                ("seed", 0, 2 ** 63 - 1)):
            cli.check_range("-n" if name == "n" else f"--{name}", getattr(self, name), low, high)
        lo, hi = self.interval or (1, tinyddpm.T)
        if not 1 <= lo <= hi <= tinyddpm.T:
            raise cli.UserError(f"--interval must be LO <= HI in 1 to {tinyddpm.T}, not {lo} {hi}")
        if not math.isfinite(self.scale):
            raise cli.UserError(f"--scale must be a finite number, not {self.scale}")
        if self.method == "none":
            self.scale = 0.


def generate(models, prompt=None, callback=None, **options):
    """Sample images for a prompt, or unguided without one -> x_0: (n, 3, H, W) in [-1, 1]

    options: fields of SamplingConfig; callback: see tinyddpm.sample, of the first batch
    """
    target = None
    with torch.no_grad(), cli.autocast(models.alpha_bar.device):
        if prompt is not None:
            models, target = resolve_prompt(prompt, models)
        return sample_images(models, target, SamplingConfig(**options), callback)


def sample_images(models, target, config, callback=None):
    """Sample config.n images of the caption with index target, None: unguided."""
    size, device, images = models.unet.config.image_size, models.alpha_bar.device, []
    method = config.method if target is not None else "none"
    if method == "classifier-free" and not models.unet.config.cond_dim:
        raise cli.UserError("this DDPM is unconditional; train a conditional one with: python "
                            "train.py ddpm --clip FILE --out runs/conditional")
    for start in range(0, config.n, config.batch):
        indices = range(start, min(start + config.batch, config.n))
        targets = torch.full((len(indices),), target or 0, device=device)   # unused if unguided
        denoise = guide.build_denoiser(method, models, targets, config.scale, config.interval)
        generators = [data.generator(config.seed, i) for i in indices]   # one per image
        x_T = tinyddpm.randn_per_image(generators, (3, size, size), device)
        images.append(tinyddpm.sample(
            denoise, x_T, generators, models.alpha_bar, config.steps, config.eta,
            recurrence=config.recurrence, callback=callback if start == 0 else None))
    return torch.cat(images)


# ---- reporting -----------------------------------------------------------------------------------

def report(models, target, x_0, judge_model, content):
    """Print CLIP's mean probability of the caption and the judge's prompt accuracy.

    The probability is optimistic if CLIP guided. judge_model, content: see load_judge; a judge can
    only judge captions whose attributes it was trained on.
    """
    caption = models.captions[target]
    p = models.clip.caption_probs(x_0, models.text_features)[:, target].mean()
    print(f"CLIP's mean probability of {shorten(caption, 80)!r}: {p:.0%}, among "
          f"{len(models.captions)} captions")
    if judge_model is None or caption not in content["captions"]:
        return
    labels = torch.tensor(content["caption_labels"][content["captions"].index(caption)])   # (A,)
    correct = judge.predict(judge_model, x_0).cpu() == labels                              # (N, A)
    each = ", ".join(f"{name} {fraction:.0%}" for name, fraction in
                     zip(content["attributes"], correct.float().mean(dim=0)))
    print(f"prompt accuracy by the judge: {int(correct.all(dim=1).sum())} of {len(x_0)} ({each}); "
          f"{content['path']}, {content['steps']:,} steps")


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    """-> args, whose prompts are [None] if there are none; SamplingConfig"""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, SamplingConfig()
    add("prompts", nargs="*", metavar="prompt", help="one file each; without a prompt: unguided")
    add("-n", type=int, default=default.n, help="how many images")
    add("--method", default=default.method, choices=guide.METHODS)
    add("--scale", type=float, help="guidance scale; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guide only at these timesteps, 1 to 1000; default: the method's own")
    add("--steps", type=int, default=default.steps, help="sampling steps, 1 to 1000")
    add("--eta", type=float, default=default.eta,
        help="fresh noise in each step: 0 is none (DDIM), 1 as much as in DDPM")
    add("--recurrence", type=int, default=default.recurrence,
        help="take each step but the last this many times, with fresh noise in between")
    add("--seed", type=int, default=default.seed)
    add("--batch", type=int, default=default.batch, help="images at a time")
    add("--out", help="the PNG to write, or the folder if there are several prompts; default out")
    add("--gif", action="store_true", help="also an animation: x_t above, x_0_hat below")
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--judge", help="a judge's weights.pt")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_intermixed_args(arguments)   # prompts and flags in any order
    if not args.prompts:
        args.prompts, args.method = [None], "none"
    return args, SamplingConfig(**{name: getattr(args, name) for name in vars(default)})


def output_paths(args):
    """Choose the PNG of each prompt, all different, and make their folders."""
    names = []
    for prompt in args.prompts:
        name = "-".join(re.findall(r"\w+", prompt.lower()))[:80] if prompt else "unguided"
        while name in names:   # "red bus" and "Red bus!"
            name += "-2"
        names.append(name or "prompt")
    paths = [Path(args.out or "out") / f"{name}.png" for name in names]
    if args.out and len(names) == 1:
        paths = [Path(args.out)]
    if paths[0].suffix.lower() != ".png":
        raise cli.UserError(f"--out {args.out}: images are written as PNG; end it in .png")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    return paths


@torch.no_grad()
def main(arguments=None):
    args, config = parse(arguments)
    device, paths = cli.pick_device(args.device), output_paths(args)
    models = load_models(args.clip, args.ddpm, device)
    judge_model, content = load_judge(models.data, args.judge, device)
    print(models.description)
    with cli.autocast(device):
        resolved = [resolve_prompt(prompt, models) if prompt is not None else (models, None)
                    for prompt in args.prompts]
        for prompt, (extended, target), path in zip(args.prompts, resolved, paths):
            frames, start = [], time.perf_counter()
            shown = min(8, config.n, config.batch)   # in the GIF

            def keep_frame(t, x_t, x_0_hat):
                frames.append(data.to_uint8(torch.cat([x_t[:shown], x_0_hat[:shown]])))

            x_0 = sample_images(extended, target, config, keep_frame if args.gif else None)
            images = data.to_uint8(x_0)   # waits for the device, so the time is right
            seconds = time.perf_counter() - start
            zoom = max(1, 96 // images.shape[1])   # small images get up to 96 pixels on the screen
            metadata = {"prompt": prompt, "models": models.description, **vars(config)}
            data.save_grid(path, images, max(1, min(8, round(config.n ** 0.5))), zoom,
                           **{key: value for key, value in metadata.items() if value is not None})
            if frames:   # one row of x_t, one of x_0_hat
                data.save_gif(path.with_suffix(".gif"), frames, columns=shown, zoom=zoom)
            if target is not None:
                report(extended, target, x_0, judge_model, content)
            print(f"{config.n} images in {seconds:.1f} s ({config.steps} x {config.recurrence} "
                  f"steps, {config.method}, scale {config.scale:g}) -> {path}")


if __name__ == "__main__":
    cli.run_command(main)
