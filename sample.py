"""python sample.py "white and red car": images from a prompt.

    python sample.py "a blue van" -n 4 --gif      four of them, and an animation from noise to image
    python sample.py "red bus" "blue bus"         one file for each prompt, from the same noise
    python sample.py "something red"              prompts are English, and may leave things open
    python sample.py "red bus" --clip ViT-B-32.pt         guided by a published CLIP
    python sample.py -n 64                        no prompt: unguided

Uses runs/clip and runs/ddpm if both were trained (without a prompt runs/ddpm is enough), else the
models in weights/. Writes a PNG for each prompt, with seed and settings in its metadata, prints how
CLIP reads the prompt, CLIP's probability of it and the judge's prompt accuracy. With another -n or
--batch an image may differ a little on a CPU that computes in bf16, where sums are rounded in
another order. From Python: load_models, then generate (see README.md).
"""
import argparse
import difflib
import math
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
import torch.nn.functional as F

import data
import guide
import judge
import tinyclip
import tinyddpm
from infra import checkpoint, cli, published
from tinyclip import normalize_prompt

SHIPPED = Path(__file__).resolve().parent / "weights"
PUBLISHED_TEMPLATES = ("a photo of a {}.", "a rendering of a {}.", "a toy {}.")   # 3 of the 80


# ---- models --------------------------------------------------------------------------------------

class Models(NamedTuple):
    """A diffusion model and, unless it is to be unguided, a CLIP for its images."""
    unet: tinyddpm.UNet
    alpha_bar: torch.Tensor                 # (T + 1,)
    data: str                               # the name of the data set
    captions: list                          # K, and behind them those that a new prompt adds
    description: str                        # files and device
    clip: tinyclip.CLIP = None
    caption_labels: torch.Tensor = None     # (K, A) int, the attributes that each names, or -1
    templates: list = None                  # S lists of K + P texts: see data.Dataset
    partial: list = None                    # P partial captions, such as "a bus"
    partial_true_of: torch.Tensor = None    # (P, K) bool, the captions that they are true of
    words: list = None                      # all words of the training
    text_features: torch.Tensor = None      # (K, E), of the captions, and of those that are added
    partial_features: torch.Tensor = None   # (P, E)


@torch.no_grad()
def load_models(clip=None, ddpm=None, device="cpu", guided=True):
    """Load CLIP and DDPM: as given, else both of runs/, else both of weights/ -> Models

    clip may be a file of published weights. guided=False: the DDPM alone. UserError if CLIP was
    trained on images of another size or other captions.
    """
    device = torch.device(device)
    paths = [Path("runs/clip/weights.pt"), Path("runs/ddpm/weights.pt")]
    if not all(path.exists() for path in (paths if guided else paths[1:])):
        for path in paths if guided and not (clip and ddpm) else ():
            if path.exists():
                print(f"{path} is not used: a prompt needs runs/clip and runs/ddpm")
        paths = [SHIPPED / "clip.pt", SHIPPED / "ddpm.pt"]
    clip_path, ddpm_path = Path(clip or paths[0]), Path(ddpm or paths[1])
    unet, ddpm_content = checkpoint.load_model(ddpm_path, "ddpm", tinyddpm.UNet)
    models = Models(
        unet=unet.to(device, memory_format=torch.channels_last),
        alpha_bar=tinyddpm.cosine_alpha_bar().to(device), data=ddpm_content["data"],
        captions=ddpm_content["captions"],
        description=f"DDPM from {ddpm_path} ({ddpm_content['steps']:,} steps), on {device}")
    if not guided:
        return models
    if published.is_published(clip_path):
        clip, content = load_published(clip_path, ddpm_content)
    else:
        clip, content = checkpoint.load_model(clip_path, "clip", tinyclip.CLIP)
        sizes = [model.config.image_size for model in (clip, unet)]
        known, drawn = set(content["captions"]), set(models.captions)
        if sizes[0] != sizes[1] or not (known <= drawn or drawn <= known):   # one may know fewer
            raise cli.UserError(
                f"these models do not fit together: CLIP is for {content['data']} at {sizes[0]} "
                f"pixels, {len(content['captions']):,} captions, the DDPM for {models.data} at "
                f"{sizes[1]}, {len(models.captions):,}; train both alike")
    if "clip" in ddpm_content and ddpm_content["clip"] != checkpoint.weights_checksum(clip):
        raise cli.UserError(f"{ddpm_path} is conditional on the text features of another CLIP; "
                            "give that one with --clip")
    clip = clip.to(device, memory_format=torch.channels_last)
    with cli.autocast(device):
        features = clip.encode_ensemble(content["templates"])                 # (K + P, E)
    K = len(content["captions"])
    return models._replace(
        clip=clip, caption_labels=torch.tensor(content["caption_labels"], device=device),
        **{key: content[key] for key in (
            "captions", "templates", "partial", "partial_true_of", "words")},
        text_features=features[:K], partial_features=features[K:],
        description=f"CLIP from {clip_path} ({content['steps']:,} steps), {models.description}")


def load_published(path, ddpm_content):
    """Load a published CLIP for guidance -> clip, content like that of our weights.pt

    Its rivals for a prompt are the captions of the diffusion model's data, in PUBLISHED_TEMPLATES.
    """
    vocabulary = Path(path).parent / "bpe_simple_vocab_16e6.txt.gz"
    if not vocabulary.exists():
        raise cli.UserError(f"{path} needs the published vocabulary beside it: {vocabulary}")
    captions = ddpm_content["captions"]
    tokenizer = tinyclip.Tokenizer.from_openai(vocabulary)
    try:
        clip = tinyclip.CLIP.from_openai(published.load_tensors(path), tokenizer)
    except (ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise cli.UserError(f"{path} does not fit the published layout: {reason}") from None
    names = [re.sub("^photo of an? ", "", normalize_prompt(text)) for text in captions]
    return tinyclip.from_pixels(clip), {
        "captions": captions, "caption_labels": [[i] for i in range(len(captions))],
        "partial": [], "words": [],
        "steps": 0,
        "templates": [[template.format(name) for name in names]
                      for template in PUBLISHED_TEMPLATES],
        "partial_true_of": torch.zeros(0, len(captions), dtype=torch.bool)}


def load_judge(captions, path=None, device="cpu"):
    """Load a judge that knows these captions: as given, else that of runs/, else of weights/.

    -> (judge, content), (None, None) if there is none
    """
    found = [p for p in (Path("runs/judge/weights.pt"), SHIPPED / "judge.pt") if p.exists()]
    for candidate in [path] if path else found:
        model, content = checkpoint.load_model(candidate, "judge", judge.Judge)
        if set(captions) <= set(content["captions"]):
            return model.to(device), {**content, "path": str(candidate)}
    if path:
        raise cli.UserError(f"--judge {path} is for {content['data']}, whose captions are not "
                            "those of the models")
    return None, None


# ---- prompts -------------------------------------------------------------------------------------

# Cosines of text features, as measured for the cars: texts that mean the same have nearly 1, the
# next caption about .8.
MEANS_THE_SAME, SURE = 0.9, 0.97


def one_letter_apart(a, b):
    """Whether two words differ by a letter that is missing, extra, wrong or in a wrong place:
    "withe" and "white" are the same without their "h"."""
    without_one = lambda word: {word} | {word[:i] + word[i + 1:] for i in range(len(word))}
    return bool(without_one(a) & without_one(b))


def known_words(text, words):
    """Reduce a normalised text to words that CLIP was trained on, and print what it does not know

    A word of four letters or more that is one letter away from a known one is read as that, the
    longest of several, or one of the same letters: "withe" is "white", not "with".
    """
    read = {}
    for word in dict.fromkeys(text.split()):   # each once
        nearest = difflib.get_close_matches(word, words, cutoff=0.75)
        intended = [near for near in nearest if one_letter_apart(word, near)]
        if word in words:
            read[word] = word
        elif intended and len(word) > 3:   # a typo
            read[word] = max(intended, key=lambda w: (len(w), sorted(w) == sorted(word)))
            print(f"{word!r} is read as {read[word]!r}")
        else:
            hint = f" (it knows {nearest[0]!r})" if nearest else ""
            print(f"left out: {word[:30]!r}, a word that CLIP was not trained on{hint}")
    return " ".join(read[word] for word in text.split() if word in read)


def read_text(text, index_of, models):
    """Find the text of the training that means the same to CLIP as a normalised one

    -> index: a caption's, or K + that of a partial caption, and None; or None if no text means the
    same, as with a published CLIP, and the feature of this one: (1, E)
    """
    longest = models.clip.config.context_length - 2   # start and end
    if len(models.clip.tokenizer.encode(text)) > longest:
        print(f"the prompt is too long: CLIP reads its first {longest} tokens")
    if text in index_of:
        return index_of[text], None
    if not models.clip.config.noise_aware:
        return None, models.clip.encode_ensemble([[t.format(text)] for t in PUBLISHED_TEMPLATES])
    feature = models.clip.encode_ensemble([[text]])
    known = torch.cat([models.text_features, models.partial_features])        # (K + P, E)
    cosine, index = F.cosine_similarity(feature, known).max(dim=0)
    if cosine < MEANS_THE_SAME:
        print(f"nothing that CLIP was trained on means {shorten(text, 80)!r}")
        return None, feature
    if cosine < SURE:
        print(f"not sure of {shorten(text, 80)!r}: a cosine of {cosine:.2f} with what it is "
              "read as")
    return int(index), None


def resolve_prompt(prompt, models):
    """Read a prompt -> models, allowed: (K + new,) bool, which of their captions it allows

    models: as load_models gives them, without captions of other prompts.
    "red bus or blue van" allows what either does; "something red" means all captions whose main
    colour is red. A text that is new to CLIP becomes one more caption of the models that are
    returned. Prints how the prompt was read. UserError if it is empty. None, no prompt, allows all.
    """
    K = len(models.captions)
    if prompt is None:
        return models, torch.ones(K, dtype=torch.bool)
    text = normalize_prompt(prompt)
    if not text:
        raise cli.UserError(f"the prompt {prompt!r} has no letters or digits; leave it out to "
                            "sample without guidance")
    names = [normalize_prompt(caption) for caption in models.captions]
    index_of = {known: i for texts in [*models.templates, names] for i, known in enumerate(texts)}
    parts = [text] if text in index_of else map(normalize_prompt, text.split(" or "))
    if models.clip.config.noise_aware:
        parts = [known_words(part, models.words) for part in parts]
    allowed, new, readings = models.partial_true_of.new_zeros(K), {}, []
    for part in filter(None, parts):   # what has no known word says nothing
        index, feature = read_text(part, index_of, models)
        if index is None:
            new[part] = feature
            readings.append(part)
        elif index < K:
            allowed[index] = True
            readings.append(models.captions[index])
        else:
            allowed |= models.partial_true_of[index - K]
            readings.append(models.partial[index - K])
    if not readings:
        allowed[:], readings = True, ["anything"]
    print(f"{shorten(prompt, 80)!r} is read as {shorten(' or '.join(map(repr, readings)), 300)}")
    if new:
        labels = models.caption_labels.new_full((len(new), models.caption_labels.shape[1]), -1)
        labels[:, 0] = K + torch.arange(len(new))   # a value that no other caption has
        models = models._replace(captions=[*models.captions, *new],
                                 caption_labels=torch.cat([models.caption_labels, labels]),
                                 text_features=torch.cat([models.text_features, *new.values()]))
    return models, torch.cat([allowed, allowed.new_ones(len(new))])


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
        cli.check_ranges(self, n=(1, 10_000), steps=(1, tinyddpm.T), eta=(0, 1),
                         recurrence=(1, 100), batch=(1, 10_000), seed=(0, 2 ** 63 - 1))
        lo, hi = self.interval or (1, tinyddpm.T)
        if not 1 <= lo <= hi <= tinyddpm.T:
            raise cli.UserError(f"--interval must be LO <= HI in 1 to {tinyddpm.T}, not {lo} {hi}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise cli.UserError(f"--scale must be a finite number, not {self.scale}")


def fill_in(config, clip=None):
    """Fill in the scale and interval that are left open; replace a method that needs noise-aware
    CLIP if this one, like the published ones, was trained on clean images only -> config"""
    if clip and not clip.config.noise_aware and config.method in (
            "lookahead", "noise-aware", "spherical"):
        print(f"this CLIP was trained on clean images: method x0-fast instead of {config.method}")
        config = replace(config, method="x0-fast")
    own = guide.METHODS[config.method]
    return replace(config, interval=config.interval or own.interval,
                   scale=own.scale if config.scale is None else config.scale)


def generate(models, prompt=None, callback=None, **options):
    """Sample images for a prompt, or unguided without one -> x_0: (n, 3, H, W) in [-1, 1]

    options: fields of SamplingConfig; callback: see tinyddpm.sample, of the first batch
    """
    config = SamplingConfig(**options)
    if prompt is None:
        config = replace(config, method="none")
    with torch.no_grad(), cli.autocast(models.alpha_bar.device):
        models, allowed = resolve_prompt(prompt, models)
        return sample_images(models, draw_captions(allowed, config), config, callback)


def draw_captions(allowed, config):
    """Draw a caption for each image from those that allowed, (K,) bool, marks -> (n,) int64

    For p(x | text) is the sum over captions of p(caption | text) p(x | caption). (Guidance by the
    summed probability of all allowed captions works too, but ends at the easiest one: "a car with a
    yellow roof" gives yellow cars.)
    """
    indices = allowed.nonzero()[:, 0]
    generators = [data.generator("captions", config.seed, i) for i in range(config.n)]
    drawn = [torch.randint(len(indices), (), generator=generator) for generator in generators]
    return indices[torch.stack(drawn)]


def sample_images(models, caption_ids, config, callback=None):
    """Sample an image of each caption, (n,) int64 -> x_0: (n, 3, H, W) in [-1, 1]

    method "none" ignores the captions. callback: see tinyddpm.sample
    """
    if config.method == "classifier-free" and not models.unet.config.cond_dim:
        raise cli.UserError("this DDPM is unconditional; train a conditional one with: python "
                            "train.py ddpm --clip FILE --out runs/conditional")
    config, images = fill_in(config, models.clip), []
    size, device = models.unet.config.image_size, models.alpha_bar.device
    for start in range(0, len(caption_ids), config.batch):
        targets = caption_ids[start:start + config.batch].to(device)          # (B,)
        denoise = guide.build_denoiser(config.method, models, targets, config.scale,
                                       config.interval)
        generators = [data.generator("sampling", config.seed, start + i)
                      for i in range(len(targets))]
        x_T = tinyddpm.randn_per_image(generators, (3, size, size), device)
        images.append(tinyddpm.sample(
            denoise, x_T, generators, models.alpha_bar, config.steps, config.eta,
            recurrence=config.recurrence, callback=callback if start == 0 else None))
    return torch.cat(images)


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
    add("--clip", help="a CLIP's weights.pt, or OpenAI's weights beside their vocabulary")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--judge", help="a judge's weights.pt")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_intermixed_args(arguments)   # prompts and flags in any order
    if not args.prompts:
        args.prompts, args.method = [None], "none"
    return args, SamplingConfig(**{name: getattr(args, name) for name in vars(default)})


def output_paths(args):
    """Choose the PNG of each prompt, all different, and make their folders."""
    paths = []
    for prompt in args.prompts:
        words = re.findall(r"\w+", prompt.lower()) if prompt else ["unguided"]
        name = "-".join(words).encode()[:80].decode(errors="ignore") or "prompt"
        path, number = Path(args.out or "out") / f"{name}.png", 2
        while path in paths or path.exists():   # "red bus" and "Red bus!"; nothing is replaced
            path, number = path.with_stem(f"{name}-{number}"), number + 1
        paths.append(path)
    if args.out and len(paths) == 1:
        paths = [Path(args.out)]
    if paths[0].suffix.lower() != ".png":
        raise cli.UserError(f"--out {args.out}: images are written as PNG; end it in .png")
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    if paths[0].is_dir() or not os.access(paths[0].parent, os.W_OK):
        raise cli.UserError(f"cannot write {paths[0]}; choose another --out")
    if paths[0].exists():   # only if --out names it
        print(f"{paths[0]} will be replaced")
    return paths


def report(models, allowed, x_0, judge_model, content):
    """Print the judge's prompt accuracy and CLIP's mean probability, optimistic if CLIP guided.

    An image is right if the judge's labels are those of one of the captions allowed, (K,) bool.
    """
    if allowed.all() or len(allowed) > models.partial_true_of.shape[1]:
        print("not judged: " + ("it names nothing" if allowed.all() else "the caption is new"))
        return   # CLIP's probability of it means little
    if judge_model is None:
        print("not judged: there is no judge of these captions")
    else:
        label_of = dict(zip(content["captions"], content["caption_labels"]))
        labels = torch.tensor([label_of[text] for text in models.captions])[allowed]   # (n, A)
        predicted = judge.predict(judge_model, x_0).cpu()                     # (N, A)
        correct = (predicted[:, None] == labels).all(dim=2).any(dim=1)        # (N,)
        each = ", ".join(
            f"{name} {torch.isin(predicted[:, a], labels[:, a]).float().mean():.0%}"
            for a, (name, values) in enumerate(content["attributes"].items())
            if len(labels[:, a].unique()) < len(values))
        print(f"prompt accuracy by the judge: {int(correct.sum())} of {len(x_0)} ({each}); "
              f"{content['path']}, {content['steps']:,} steps")
    p = models.clip.caption_probs(x_0, models.text_features)[:, allowed].sum(dim=1).mean()
    print(f"CLIP's mean probability of it: {p:.0%}, among {len(models.captions)} captions")


@torch.no_grad()
def main(arguments=None):
    args, config = parse(arguments)
    device, paths = cli.pick_device(args.device), output_paths(args)
    models = load_models(args.clip, args.ddpm, device, args.prompts != [None] or args.clip)
    config = fill_in(config, models.clip)   # for the metadata and the report
    judge_model, content = load_judge(models.captions, args.judge, device)
    print(models.description)
    checksums = {f"{name} checksum": checkpoint.weights_checksum(model)
                 for name, model in (("CLIP", models.clip), ("DDPM", models.unet)) if model}
    with cli.autocast(device):
        resolved = [resolve_prompt(prompt, models) for prompt in args.prompts]
        for prompt, (extended, allowed), path in zip(args.prompts, resolved, paths):
            frames, start = [], time.perf_counter()
            keep_frame = lambda t, x_t, x_0_hat: frames.append(
                data.to_uint8(torch.cat([x_t[:8], x_0_hat[:8]])))   # one row of each
            x_0 = sample_images(extended, draw_captions(allowed, config), config,
                                keep_frame if args.gif else None)
            images = data.to_uint8(x_0)   # waits for the device, so the time is right
            seconds = time.perf_counter() - start
            zoom = max(1, 96 // images.shape[1])   # small images get up to 96 pixels on the screen
            metadata = {**checksums, **vars(config), "torch": torch.__version__,
                        "bf16": cli.bf16_is_fast(device)}
            if prompt is not None:
                metadata["prompt"] = prompt
            data.save_grid(path, images, min(8, round(config.n ** 0.5)), zoom, **metadata)
            if frames:
                data.save_gif(path.with_suffix(".gif"), frames, len(frames[0]) // 2, zoom)
            if prompt is not None:
                report(extended, allowed, x_0, judge_model, content)
            print(f"{config.n} images in {seconds:.1f} s ({config.steps} x {config.recurrence} "
                  f"steps, {config.method}, scale {config.scale:g}) -> {path}")


if __name__ == "__main__":
    cli.run_command(main)
