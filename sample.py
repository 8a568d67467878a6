"""python sample.py "white and red car": images from a prompt.

    python sample.py "a blue van" -n 4 --gif      four of them, and an animation from noise to image
    python sample.py "red bus" "blue bus"         one file for each prompt, from the same noise
    python sample.py "something red"              prompts are English, and may leave things open
    python sample.py "red bus" --clip ViT-B-32.pt         guided by a published CLIP
    python sample.py -n 64                        no prompt: unguided
    python sample.py "red bus" --method unclip    by way of an image embedding, from a prior
    python sample.py --variations car.png --vary 0.3           other cars like this one
    python sample.py --interpolate car.png bus.png             from one image to another
    python sample.py --interpolate "red car" "blue bus"        from one prompt to another
    python sample.py --diff car.png "a red car" "a blue car"   change it as the texts differ
    python sample.py --edit car.png "a blue car"               change it by optimising its noise

Uses runs/clip and runs/ddpm if both were trained (without a prompt runs/ddpm is enough; unclip,
--variations, --interpolate and --diff need runs/decoder instead), else the models in weights/.
Images are enlarged if there is an upsampler for them; unguided ones are better if there is a weak
DDPM. Writes a PNG for each prompt, with seed and settings in its metadata, prints how CLIP reads
the prompt, CLIP's probability of it and the judge's prompt accuracy. With another -n or --batch an
image may differ a little where bf16 is used: sums are rounded in another order.
From Python: load_models, then generate (see README.md).
"""
import argparse
import difflib
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
import unclip
from infra import checkpoint, cli, image_folders, published
from tinyclip import normalize_prompt

SHIPPED = Path(__file__).resolve().parent / "weights"
METHODS = {**guide.METHODS, "unclip": guide.Method(   # no gradient: its U-Net is a decoder
    None, 2., (1, 1000), steps=25, eta=0., recurrence=1)}
CONDITIONAL = "classifier-free", "unclip"   # methods whose U-Net has a condition: no autoguidance
METHOD_SETTINGS = "scale", "interval", "steps", "eta", "recurrence", "autoguidance"
NEED_NOISE_AWARE = "lookahead", "noise-aware", "spherical"   # these apply CLIP to noisy images
PUBLISHED_TEMPLATES = ("a photo of a {}.", "a rendering of a {}.", "a toy {}.")   # 3 of the 80


# ---- models --------------------------------------------------------------------------------------

class Models(NamedTuple):
    """A diffusion model and, unless it is to be unguided, a CLIP for its images."""
    unet: tinyddpm.UNet
    alpha_bar: torch.Tensor                 # (T + 1,)
    data: str                               # the name of the data set
    captions: list                          # K, and behind them those that a new prompt adds
    description: str                        # the files that were loaded
    clip: tinyclip.CLIP = None
    caption_labels: torch.Tensor = None     # (K, A) int, the attributes that each names, or -1
    templates: list = None                  # S lists of K + P texts: see data.Dataset
    partial: list = None                    # P partial captions, such as "a bus"
    partial_true_of: torch.Tensor = None    # (P, K) bool on the CPU, captions they are true of
    words: list = None                      # of CLIP's training texts
    text_features: torch.Tensor = None      # (K, E), of the captions, and of those that are added
    partial_features: torch.Tensor = None   # (P, E)
    condition: str = None                   # of the U-Net: this CLIP's "text" or "image" features,
                                            # None: no condition, or another CLIP's features
    prior: unclip.Prior = None
    upsampler: unclip.Upsampler = None
    weak: tinyddpm.UNet = None              # for autoguidance


def load_fitting(name, model_class, fits, path=None, device="cpu"):
    """Load a model that fits the others: as given, else that of runs/, else of weights/.

    fits: content -> bool. -> (model, content), (None, None) if there is none; UserError if the one
    that is given does not fit.
    """
    kind = "ddpm" if name == "weak" else name
    found = [p for p in (Path(f"runs/{name}/weights.pt"), SHIPPED / f"{name}.pt") if p.exists()]
    for candidate in [path] if path else found:
        model, content = checkpoint.load_model(candidate, model_class, kind)
        if fits(content):
            return model.to(device), {**content, "path": str(candidate)}
        if path:
            raise cli.UserError(f"--{name} {path} is for {content['data']} and does not fit the "
                                "other models; train all on the same images")
        if SHIPPED not in candidate.parents:
            print(f"{candidate} is not used: it does not fit the other models")
    return None, None


def find_paths(clip, ddpm, method):
    """Find files of CLIP and DDPM: as given, else all of runs/, else all of weights/."""
    kind = "decoder" if method == "unclip" else "ddpm"
    paths = [Path("runs/clip/weights.pt"), Path(f"runs/{kind}/weights.pt")]
    needed = [path for path, given in zip(paths, (clip or method == "none", ddpm)) if not given]
    if not all(path.exists() for path in needed):
        for path in needed:
            if path.exists():
                print(f"{path} is not used: {paths[0].parent} and {paths[1].parent} are needed")
        paths = [SHIPPED / "clip.pt", SHIPPED / f"{kind}.pt"]
    return Path(clip or paths[0]), Path(ddpm or paths[1])


def load_weak(ddpm_content, method, path, device):
    """Load a weak DDPM for autoguidance, of the same data -> unet, content, or None, None

    One that is found must have had fewer steps than the DDPM, whose training may just have begun.
    """
    if method in CONDITIONAL:
        if path:
            raise cli.UserError(f"--weak is of no use with --method {method}")
        return None, None
    unet, content = load_fitting("weak", tinyddpm.UNet, lambda content: (
        content["captions"] == ddpm_content["captions"]
        and content["config"]["image_size"] == ddpm_content["config"]["image_size"]
        and (path or content["steps"] < ddpm_content["steps"])), path, device)
    return unet and unet.to(memory_format=torch.channels_last), content


def class_name(caption):
    """Normalise a caption, and shorten one of class folders: "a photo of a cat" is "cat"."""
    return re.sub("^photo of an? ", "", normalize_prompt(caption))


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
    names = [class_name(text) for text in captions]
    return tinyclip.accept_pixels(clip), {
        "captions": captions, "caption_labels": [[i] for i in range(len(captions))],
        "partial": [], "words": [],
        "templates": [[template.format(name) for name in names]
                      for template in PUBLISHED_TEMPLATES],
        "partial_true_of": torch.zeros(0, len(captions), dtype=torch.bool)}


def load_clip(path, ddpm_content):
    """Load our CLIP or a published one -> clip, content; UserError if it is for other images."""
    if published.is_published(path):
        return load_published(path, ddpm_content)
    clip, content = checkpoint.load_model(path, tinyclip.CLIP, "clip")
    sizes = [c["config"]["image_size"] for c in (content, ddpm_content)]
    known, trained = (set(c["captions"]) for c in (content, ddpm_content))   # by CLIP, the DDPM
    if sizes[0] != sizes[1] or not (known <= trained or trained <= known):   # one may have fewer
        raise cli.UserError(
            f"these models do not fit together: CLIP is for {content['data']} at {sizes[0]} "
            f"pixels, {len(known):,} captions, the DDPM for {ddpm_content['data']} at {sizes[1]}, "
            f"{len(trained):,}; train both alike")
    return clip, content


@torch.no_grad()
def load_models(clip=None, ddpm=None, weak=None, prior=None, upsampler=None, device="cpu",
                method=guide.DEFAULT):
    """Load what a method needs: as given, else all of runs/, else all of weights/ -> Models

    Arguments are files; clip may be one of published weights. Method "none" needs a DDPM alone,
    "unclip" a decoder in its place. Weak DDPM, upsampler and, with a decoder, prior are loaded if
    there are any that fit. UserError if what is given does not fit together.
    """
    device, (clip_path, ddpm_path) = torch.device(device), find_paths(clip, ddpm, method)
    kinds = ("decoder",) if method == "unclip" else ("ddpm", "decoder")
    unet, ddpm_content = checkpoint.load_model(ddpm_path, tinyddpm.UNet, *kinds)
    weak, weak_content = load_weak(ddpm_content, method, weak, device)
    upsampler, up_content = load_fitting("upsampler", unclip.Upsampler, lambda content: (
        set(ddpm_content["captions"]) <= set(content["captions"])
        and content["config"]["image_size"] == 4 * unet.config.image_size), upsampler, device)
    models = Models(
        unet=unet.to(device, memory_format=torch.channels_last), weak=weak, upsampler=upsampler,
        alpha_bar=tinyddpm.cosine_alpha_bar().to(device), data=ddpm_content["data"],
        captions=ddpm_content["captions"],
        description=f"DDPM from {ddpm_path} ({ddpm_content['steps']:,} steps)"
        + (f", weak DDPM from {weak_content['path']}" if weak else "")
        + (f", upsampler from {up_content['path']}" if upsampler else ""))
    if method == "none":
        return models
    clip, content = load_clip(clip_path, ddpm_content)
    checksum = checkpoint.weights_checksum(clip)
    if method in CONDITIONAL and ddpm_content.get("clip", checksum) != checksum:
        raise cli.UserError(f"{ddpm_path} is conditional on the features of another CLIP; give "
                            "that one with --clip")
    condition = None if ddpm_content.get("clip") != checksum else (
        "image" if ddpm_content["kind"] == "decoder" else "text")
    if condition is None and "clip" in ddpm_content:
        print(f"the condition of {ddpm_path} is not used: it is another CLIP's")
    if condition == "image":
        prior, prior_content = load_fitting(
            "prior", unclip.Prior, lambda content: content["clip"] == checksum, prior, device)
        models = models._replace(prior=prior, description=models.description + (
            f", prior from {prior_content['path']}" if prior else ""))
    clip = clip.to(device, memory_format=torch.channels_last)
    with cli.autocast(device):
        features = clip.encode_ensemble(content["templates"])                 # (K + P, E)
    K = len(content["captions"])
    steps = f" ({content['steps']:,} steps)" if "steps" in content else ""   # not if published
    return models._replace(
        clip=clip, condition=condition,
        caption_labels=torch.tensor(content["caption_labels"], device=device),
        **{key: content[key] for key in (
            "captions", "templates", "partial", "partial_true_of", "words")},
        text_features=features[:K], partial_features=features[K:],
        description=f"CLIP from {clip_path}{steps}, {models.description}")


def load_judge(captions, path=None, device="cpu"):
    """Load a judge that knows these captions -> (judge, content), (None, None) if there is none"""
    return load_fitting("judge", judge.Judge,
                        lambda content: set(captions) <= set(content["captions"]), path, device)


# ---- prompts -------------------------------------------------------------------------------------

# Cosines of text features, as measured for the cars: texts that mean the same have nearly 1, the
# next caption about .8.
MEANS_THE_SAME, SURE = 0.9, 0.97
# Prompt ensembling: a prompt is read in each of these. With the last three 98.5 % of phrasings that
# CLIP never met are read right, without them 94.8 %.
WORDINGS = "{}", "a photo of {}", "a picture of {}", "an image of {}"


def one_letter_apart(a, b):
    """Whether two words differ by a letter that is missing, extra, wrong or in a wrong place (a
    little more than Damerau-Levenshtein distance 1): "withe" and "white" are equal without "h"."""
    without_one = lambda word: {word} | {word[:i] + word[i + 1:] for i in range(len(word))}
    return bool(without_one(a) & without_one(b))


def known_words(text, words):
    """Reduce a normalised text to words that CLIP was trained on, and print what it does not know

    A word of four letters or more that is one letter away from a known one is read as that, the
    longest of several, of equally long ones an anagram: "withe" is "white", not "with".
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


def encode_in_wordings(texts, models):
    """Encode N normalised texts, each in all WORDINGS whose words CLIP knows -> (N, E)"""
    known = [template for template in WORDINGS
             if {*template.format("").split()} <= {*models.words}]
    return models.clip.encode_ensemble(
        [[template.format(text) for text in texts] for template in known])


def read_text(text, index_of, models):
    """Find the training text that means the same to CLIP as a normalised prompt

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
    feature = encode_in_wordings([text], models)
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
    if models.clip is None:
        raise cli.UserError("these models were loaded for unguided sampling, without a CLIP")
    text = normalize_prompt(prompt)
    if not text:
        raise cli.UserError(f"the prompt {prompt!r} has no letters or digits; leave it out to "
                            "sample without guidance")
    names = [list(map(normalize, models.captions)) for normalize in (class_name, normalize_prompt)]
    index_of = {known: i for texts in [*models.templates, *names] for i, known in enumerate(texts)}
    parts = [text] if text in index_of else map(normalize_prompt, text.split(" or "))
    if models.clip.config.noise_aware:
        parts = [known_words(part, models.words) for part in parts]
    allowed, new, readings = models.partial_true_of.new_zeros(K), {}, []
    for part in filter(None, parts):   # what has no known word says nothing
        index, feature = read_text(part, index_of, models)
        if index is None:
            new[part] = feature
        elif index < K:
            allowed[index] = True
        else:
            allowed |= models.partial_true_of[index - K]
        readings.append(part if index is None else [*models.captions, *models.partial][index])
    if not readings:
        allowed[:] = True
        readings = ["anything"]
    print(f"{shorten(prompt, 80)!r} is read as {shorten(' or '.join(map(repr, readings)), 300)}")
    if new:
        labels = models.caption_labels.new_full((len(new), models.caption_labels.shape[1]), -1)
        labels[:, 0] = K + torch.arange(len(new))   # a value that no other caption has
        models = models._replace(captions=[*models.captions, *new],
                                 caption_labels=torch.cat([models.caption_labels, labels]),
                                 text_features=torch.cat([models.text_features, *new.values()]))
    return models, torch.cat([allowed, allowed.new_ones(len(new))])


# ---- sampling ------------------------------------------------------------------------------------

# A prompt becomes images by resolve_prompt, draw_captions and sample_images, which calls
# build_denoiser and sample_batches.

@dataclass
class SamplingConfig:
    n: int = 16                   # images
    method: str = guide.DEFAULT   # one of METHODS
    # None in the next six: the method's own, in METHODS.
    scale: float = None           # of guidance
    interval: tuple = None        # timesteps (lo, hi) at which to guide
    steps: int = None
    eta: float = None             # 0 is deterministic as DDIM, 1 as noisy as DDPM
    recurrence: int = None        # times that each step but the last is taken
    autoguidance: float = None    # its scale, 1 is none
    seed: int = 0
    batch: int = 64               # images at a time
    size: int = None              # pixels, H and W; None: as large as there is an upsampler for
    vary: float = 0.              # noise level of embeddings to decode: unclip.decoder_condition
    iterations: int = 50          # gradient steps on x_T, of method "latent"

    def __post_init__(self):
        if self.method not in METHODS:
            raise cli.UserError(f"method must be one of {', '.join(METHODS)}, not "
                                f"{self.method!r}")
        cli.check_ranges(
            self, n=(1, 10_000), scale=(-1e6, 1e6), steps=(1, tinyddpm.T), eta=(0, 1),
            recurrence=(1, 100), autoguidance=(-1e6, 1e6), batch=(1, 10_000),
            seed=(0, 2 ** 63 - 1), vary=(0, 1), iterations=(1, 10_000))
        lo, hi = self.interval or (1, tinyddpm.T)
        if not 1 <= lo <= hi <= tinyddpm.T:
            raise cli.UserError(f"--interval must be LO <= HI in 1 to {tinyddpm.T}, not {lo} {hi}")


def fill_in(config, models):
    """Fill in a config for these models -> SamplingConfig without None

    Replaces a method that needs a noise-aware CLIP if this one, like the published ones, was
    trained on clean images only. UserError for what these models lack.
    """
    clip, native = models.clip, models.unet.config.image_size
    sizes = [native] + [2 * native, 4 * native] * bool(models.upsampler)
    if config.size not in (None, *sizes):
        raise cli.UserError(f"--size must be one of {', '.join(map(str, sizes))} with these "
                            f"models, not {config.size}")
    if clip and not clip.config.noise_aware:
        if config.method == "latent":
            raise cli.UserError(
                "method latent and --edit need a CLIP that was trained on noisy images")
        if config.method in NEED_NOISE_AWARE:
            print("this CLIP was trained on clean images: method x0-fast instead of "
                  f"{config.method}")
            config = replace(config, method="x0-fast")
    if not models.weak or config.method in CONDITIONAL:
        if config.autoguidance not in (None, 1):
            raise cli.UserError(
                f"--autoguidance is of no use with --method {config.method}"
                if config.method in CONDITIONAL else
                "--autoguidance needs a weak DDPM; train a smaller one on the same images, for "
                "fewer steps: python train.py ddpm --channels 16 --steps 2000 --out runs/weak")
        config = replace(config, autoguidance=1.)
    if config.method == "latent" and (config.eta or config.recurrence not in (None, 1)):
        raise cli.UserError("method latent optimises x_T for sampling with eta 0 and recurrence 1")
    own = {name: getattr(METHODS[config.method], name)
           for name in METHOD_SETTINGS if getattr(config, name) is None}
    return replace(config, size=config.size or sizes[-1], **own)


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

    Why: p(x | text) is the sum over captions of p(caption | text) p(x | caption). (Guidance by the
    summed probability of all allowed captions works too, but ends at the easiest one: "a car with a
    yellow roof" gives yellow cars.)
    """
    indices = allowed.nonzero()[:, 0]
    generators = [data.generator("captions", config.seed, i) for i in range(config.n)]
    drawn = [torch.randint(len(indices), (), generator=generator) for generator in generators]
    return indices[torch.stack(drawn)]


def sample_images(models, caption_ids, config, callback=None, x_T=None):
    """Sample an image of each caption, (n,) int64 -> (n, 3, size, size) in [-1, 1]

    method "none" ignores the captions. callback: see tinyddpm.sample; x_T: (n, 3, H, W), None:
    random
    """
    config = replace(fill_in(config, models), n=len(caption_ids))
    caption_ids = caption_ids.to(models.alpha_bar.device)
    make_denoise = lambda indices, generators: build_denoiser(
        config.method, models, caption_ids[indices], config.scale, config.interval,
        config.autoguidance, generators)
    make_log_p = None if config.method != "latent" else (
        lambda indices: METHODS["latent"].make_log_p(
            models.clip, models.text_features, caption_ids[indices], models.caption_labels))
    return sample_batches(models, make_denoise, config, callback, x_T, make_log_p)


def build_denoiser(method, models, targets, scale, interval, autoguidance, generators):
    """guide.build_denoiser, and "unclip": decode what the prior draws for the captions.

    targets: (B,) int64; B generators, for the prior's noise. UserError without what it needs
    """
    if method == "classifier-free" and models.condition != "text":
        raise cli.UserError("this DDPM knows no texts of this CLIP; train a conditional one with: "
                            "python train.py ddpm --clip FILE --out runs/conditional")
    if method != "unclip":
        return guide.build_denoiser(method, models, targets, scale, interval, autoguidance)
    z = sample_embeddings(models, models.text_features[targets], generators)  # (B, E)
    return unclip.decoder_denoiser(models.unet, models.alpha_bar, z, scale, interval)


def sample_embeddings(models, text_features, generators):
    """Sample image embeddings of texts, (B, E), from the prior -> z: (B, E), scaled

    UserError if there is no prior
    """
    if not models.prior:
        raise cli.UserError("there is no prior for this CLIP; train one with: python train.py "
                            "prior --clip FILE" if models.condition == "image" else
                            'these models are not for unclip: load_models(method="unclip")')
    text = guide.scale_features(text_features)
    return guide.scale_features(
        unclip.sample_prior(models.prior, text, generators, models.alpha_bar))


def sample_batches(models, make_denoise, config, callback=None, x_T=None, make_log_p=None):
    """Sample n images, a batch at a time, and enlarge them -> (n, 3, size, size) in [-1, 1]

    make_denoise: (indices, their generators) -> denoise; x_T: (n, 3, H, W), None: random;
    make_log_p: indices -> log_p, by which x_T is optimised first, a given one in smaller steps
    """
    images, native, device = [], models.unet.config.image_size, models.alpha_bar.device
    for indices in torch.arange(config.n).split(config.batch):
        generators = [data.generator("sampling", config.seed, i) for i in indices.tolist()]
        x_start = (x_T[indices] if x_T is not None else
                   tinyddpm.randn_per_image(generators, (3, native, native), device))
        denoise = make_denoise(indices, generators)
        if make_log_p:
            x_start = guide.optimize_x_T(
                denoise, make_log_p(indices), x_start, generators, models.alpha_bar, config.steps,
                config.iterations, lr=guide.LR if x_T is None else guide.LR_EDIT)
        x_0 = tinyddpm.sample(
            denoise, x_start, generators, models.alpha_bar, config.steps, config.eta,
            recurrence=config.recurrence, callback=None if images else callback)
        if config.size > native:
            x_0 = unclip.upsample(models.upsampler, x_0, config.size, unclip.SAMPLED_AUG_LEVEL)
        images.append(x_0)
    return torch.cat(images)


# ---- from images to images -----------------------------------------------------------------------

def edit(models, x_0, prompt, config):
    """Change an image, by optimising its noise, to what a prompt says -> (n, 3, size, size)

    x_0: (1, 3, H, W), inverted with n different noises
    """
    config = fill_in(replace(config, method="latent"), models)
    models, allowed = resolve_prompt(prompt, models)
    denoise = guide.autoguided(models.unet, models.weak, models.alpha_bar, config.autoguidance)
    generators = [data.generator("sampling", config.seed, i, 1) for i in range(config.n)]
    eps = tinyddpm.randn_per_image(generators, x_0.shape[1:], x_0.device)
    x_T = torch.cat([tinyddpm.invert(denoise, x_0.expand_as(part), part, models.alpha_bar)
                     for part in eps.split(config.batch)])
    return sample_images(models, draw_captions(allowed, config), config, x_T=x_T)


# ---- from images to images by unCLIP -------------------------------------------------------------

def embed(models, x_0):
    """Embed images x_0: (B, 3, H, W) in [-1, 1] -> z: (B, E), scaled"""
    return guide.scale_features(models.clip.encode_image(x_0))


def invert(models, x_0, z):
    """Find the x_T from which the decoder, given z, draws x_0 at scale 1 -> (N, 3, H, W)

    eps = 0: x_T is no white noise then, but has more of the image in it.
    """
    denoise = unclip.decoder_denoiser(models.unet, models.alpha_bar, z, scale=1)
    return tinyddpm.invert(denoise, x_0, torch.zeros_like(x_0), models.alpha_bar)


def decode(models, z, x_T, config):
    """Decode n embeddings -> (n, 3, size, size)

    z: (n, E), scaled; x_T: (n, 3, H, W), None: random; config: SamplingConfig, whose method is
    "unclip" whatever it says, and whose vary hides some of z
    """
    config = fill_in(replace(config, method="unclip", n=len(z)), models)

    def make_denoise(indices, generators):
        noise = tinyddpm.randn_per_image(generators, z.shape[1:], z.device)
        return unclip.decoder_denoiser(models.unet, models.alpha_bar, z[indices], config.scale,
                                       config.interval, config.vary, noise)
    return sample_batches(models, make_denoise, config, x_T=x_T)


def variations(models, x_0, config):
    """Decode the embeddings of images again, from other noise -> (n, 3, size, size)

    x_0: (N, 3, H, W), all repeated n / N times, a whole number
    """
    return decode(models, embed(models, x_0).repeat(config.n // len(x_0), 1), None, config)


def interpolate(models, x_0, config):
    """Decode embeddings on the way from one image to another -> (n, 3, size, size)

    x_0: (2, 3, H, W). x_T is on the way between their inversions, which are of scale 1: with
    another config.scale the ends are not the given images (so for `diff`).
    """
    z = embed(models, x_0)
    x_T = unclip.slerp_path(invert(models, x_0, z), config.n)
    return decode(models, unclip.slerp_path(z, config.n), x_T, config)


def interpolate_texts(models, texts, config):
    """Decode embeddings on the way between those that the prior draws for two texts

    -> (n, 3, size, size), all from one x_T
    """
    resolved = [resolve_prompt(text, models) for text in texts]
    features = torch.cat([extended.text_features[draw_captions(allowed, replace(config, n=1))]
                          for extended, allowed in resolved])                 # (2, E)
    generators = [data.generator("sampling", config.seed, 0) for _ in range(2)]
    z = sample_embeddings(models, features, generators)
    native = models.unet.config.image_size
    x_T = tinyddpm.randn_per_image(generators[:1], (3, native, native), z.device)
    return decode(models, unclip.slerp_path(z, config.n), x_T.expand(config.n, -1, -1, -1), config)


def diff(models, x_0, text_from, text_to, config):
    """Change an image as one text differs from another -> (n, 3, size, size), little to much

    x_0: (1, 3, H, W). x_T stays the same, and with it what the texts do not mention.
    """
    resolved = [resolve_prompt(text, models) for text in (text_from, text_to)]
    features = [extended.text_features[allowed].mean(dim=0, keepdim=True)
                for extended, allowed in resolved]
    if torch.equal(*features):
        raise cli.UserError(f"{text_from!r} and {text_to!r} are the same to CLIP; what should "
                            "change?")
    z = embed(models, x_0)
    x_T = invert(models, x_0, z).expand(config.n, -1, -1, -1)
    z = torch.cat([unclip.text_diff(z, *features, fraction)
                   for fraction in torch.linspace(0, 0.5, config.n).tolist()])
    return decode(models, z, x_T, config)


MODES = {"variations": variations, "interpolate": interpolate, "diff": diff, "edit": edit}


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    """Parse the flags -> args, whose prompts are [None] if there are none; SamplingConfig"""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, SamplingConfig()
    add("prompts", nargs="*", metavar="prompt", help="one file each; without a prompt: unguided")
    add("-n", type=int, default=default.n, help="how many images")
    add("--method", choices=METHODS, help=f"default with a prompt: {default.method}")
    add("--scale", type=float, help="guidance scale; this and the next five: by default the "
        "method's own (scale 1, that of the inversion, from images by --interpolate and --diff)")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guide only at these timesteps, 1 to 1000")
    add("--steps", type=int, help="sampling steps, 1 to 1000")
    add("--eta", type=float,
        help="fresh noise in each step: 0 is none (DDIM), 1 as much as in DDPM")
    add("--recurrence", type=int,
        help="take each step but the last this many times, with fresh noise in between")
    add("--autoguidance", type=float, help="scale of the guidance by a weak DDPM, 1 is none")
    add("--iterations", type=int, default=default.iterations, help="gradient steps on x_T, of "
        f"--method latent and --edit; default {default.iterations}")
    add("--seed", type=int, default=default.seed)
    add("--batch", type=int, default=default.batch, help="images at a time")
    add("--out", help="the PNG to write, or the folder if there are several prompts; default out")
    add("--gif", action="store_true", help="also an animation: x_t above, x_0_hat below")
    add("--size", type=int, help="pixels, such as 32, 64 or 128; default: as large as possible")
    add("--variations", nargs=1, metavar="IMAGE", help="other images of what this one shows")
    add("--vary", type=float, default=default.vary,
        help="noise level of the image's embedding, 0 to 1")
    add("--interpolate", nargs=2, metavar=("FROM", "TO"), help="two images, or two prompts")
    add("--diff", nargs=3, metavar=("IMAGE", "TEXT1", "TEXT2"),
        help="change an image as TEXT2 differs from TEXT1")
    add("--edit", nargs=2, metavar=("IMAGE", "TEXT"), help="change an image to what TEXT says")
    other = {"clip": "clip (or OpenAI's weights beside their vocabulary)",
             "ddpm": "ddpm (or decoder)", "weak": "ddpm, for autoguidance"}
    for name in ("clip", "ddpm", "weak", "prior", "upsampler", "judge"):
        add(f"--{name}", help=f"weights.pt of train.py {other.get(name, name)}")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_intermixed_args(arguments)   # prompts and flags in any order
    resolve_mode(args, parser)
    return args, SamplingConfig(**{name: getattr(args, name) for name in vars(default)})


def resolve_mode(args, parser):
    """Set mode, files, texts, method, scale, prompts ([None] if there are none); UserError for a
    flag that would change nothing"""
    modes = [name for name in MODES if getattr(args, name)]
    if len(modes) + bool(args.prompts) > 1:
        raise cli.UserError("a prompt, --variations, --interpolate, --diff and --edit exclude each "
                            "other")
    args.mode, given = (modes[0], getattr(args, modes[0])) if modes else (None, [])
    args.files, args.texts = given[:1], given[1:]
    if args.mode == "interpolate":
        files = any(Path(name).exists() or Path(name).suffix.lower() in image_folders.EXTENSIONS
                    for name in given)
        args.files, args.texts = (given, []) if files else ([], given)
    default = (guide.DEFAULT if args.prompts else "latent" if args.mode == "edit" else
               "unclip" if modes else "none")
    args.method = args.method or default   # without a prompt the only one that fits
    fits = args.method != "none" if args.prompts else args.method == default
    where = (f"to --{args.mode}" if modes else "without a prompt" if not args.prompts else
             f"with --method {args.method}" if fits else "to a prompt")
    latent = args.method == "latent"
    x_T_is_random = args.mode not in ("interpolate", "diff") or not args.files   # else inverted
    guides = (args.prompts or modes) and not latent
    for flag, used in ((f"method {args.method}", fits), ("scale", guides), ("interval", guides),
                       ("clip", args.prompts or modes),
                       ("prior", args.method == "unclip" and not args.files),
                       ("autoguidance", args.method not in CONDITIONAL),
                       ("weak", args.autoguidance is not None
                        or METHODS[args.method].autoguidance != 1),
                       ("judge", args.prompts), ("seed", x_T_is_random),
                       ("eta", x_T_is_random and not latent),
                       ("recurrence", x_T_is_random and not latent), ("gif", not modes),
                       ("vary", args.mode == "variations"), ("iterations", latent)):
        name = flag.split()[0]
        if getattr(args, name) != parser.get_default(name) and not used:
            raise cli.UserError(f"--{flag} is of no use {where}")
    if args.mode in ("interpolate", "diff") and args.n == 1:
        raise cli.UserError(f"--{args.mode} needs -n 2 or more, both ends included")
    if not x_T_is_random and args.scale is None:
        args.scale = 1.   # that of the inversion: at others they would not begin with the image
    args.prompts = args.prompts or [None]


def output_paths(args):
    """Choose the PNG of each prompt, all different, and make their folders."""
    paths = []
    for prompt in args.prompts:
        words = re.findall(r"\w+", prompt.lower()) if prompt else [args.mode or "unguided"]
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
    for path in paths[:1] + [path.with_suffix(".gif") for path in paths] * args.gif:
        if path.exists():   # a PNG only if --out names it
            print(f"{path} will be replaced")
    return paths


def report(models, allowed, x_0, judge_model, judge_content):
    """Print the judge's prompt accuracy and CLIP's mean probability, optimistic if CLIP guided.

    An image is right if the judge's labels are those of an allowed caption. allowed: (K,) bool
    """
    if allowed.all() or len(allowed) > models.partial_true_of.shape[1]:
        print("not judged: " + ("it names nothing" if allowed.all() else "the caption is new"))
        return   # CLIP's probability of it means little
    if judge_model is None:
        print("not judged: there is no judge of these captions")
    else:
        label_of = dict(zip(judge_content["captions"], judge_content["caption_labels"]))
        labels = torch.tensor([label_of[text] for text in models.captions])[allowed]   # (n, A)
        predicted = judge.predict(judge_model, x_0).cpu()                     # (N, A)
        correct = (predicted[:, None] == labels).all(dim=2).any(dim=1)        # (N,)
        each = ", ".join(
            f"{name} {torch.isin(predicted[:, a], labels[:, a]).float().mean():.0%}"
            for a, (name, values) in enumerate(judge_content["attributes"].items())
            if len(labels[:, a].unique()) < len(values))
        print(f"prompt accuracy by the judge: {int(correct.sum())} of {len(x_0)} ({each}); "
              f"{judge_content['path']}, {judge_content['steps']:,} steps")
    size = models.unet.config.image_size
    x_0 = F.interpolate(x_0, (size, size), mode="area")
    p = models.clip.caption_probs(x_0, models.text_features)[:, allowed].sum(dim=1).mean()
    print(f"CLIP's mean probability of it: {p:.0%}, among {len(models.captions)} captions")


def draw_from_images(models, args, config):
    """Run --variations, ..., --edit -> (N, 3, size, size), the given images included"""
    if not args.files:
        return interpolate_texts(models, args.texts, config)
    x_0 = data.read_images(args.files, models.unet.config.image_size).to(models.alpha_bar.device)
    drawn = MODES[args.mode](models, x_0, *args.texts, config)
    given = F.interpolate(x_0, drawn.shape[-2:])
    return torch.cat([given[:1], drawn, given[1:]])


@torch.no_grad()
def main(arguments=None):
    args, config = parse(arguments)
    device, paths = cli.pick_device(args.device), output_paths(args)
    models = load_models(args.clip, args.ddpm, args.weak, args.prior, args.upsampler, device,
                         config.method)
    config = fill_in(config, models)   # for the metadata and the report
    judge_model, judge_content = (None, None) if args.prompts == [None] else load_judge(
        models.captions, args.judge, device)
    print(f"{models.description}, on {device}")
    loaded = {"CLIP": models.clip, "DDPM": models.unet, "weak DDPM": models.weak,
              "prior": models.prior, "upsampler": models.upsampler}
    metadata = {**{f"{name} checksum": checkpoint.weights_checksum(model)
                   for name, model in loaded.items() if model}, **vars(config),
                "torch": torch.__version__, "bf16": cli.bf16_is_fast(device)}
    zoom = lambda pixels: max(1, 96 // pixels)   # small images get up to 96 on the screen
    with cli.autocast(device):
        if args.mode:
            images = data.to_uint8(draw_from_images(models, args, config))
            given = ", ".join([Path(path).name for path in args.files] + args.texts)
            data.save_grid(paths[0], images, min(10, len(images)), zoom(config.size), **metadata,
                           **{args.mode: given})
            print(f"{len(images)} images -> {paths[0]}")
            return
        resolved = [resolve_prompt(prompt, models) for prompt in args.prompts]
        for prompt, (extended, allowed), path in zip(args.prompts, resolved, paths):
            frames, start = [], time.perf_counter()
            keep_frame = lambda t, x_t, x_0_hat: frames.append(
                data.to_uint8(torch.cat([x_t[:8], x_0_hat[:8]])))   # one row of each
            x_0 = sample_images(extended, draw_captions(allowed, config), config,
                                keep_frame if args.gif else None)
            images = data.to_uint8(x_0)   # waits for the device, so the time is right
            seconds = time.perf_counter() - start
            data.save_grid(path, images, min(8, round(config.n ** 0.5)), zoom(config.size),
                           **metadata, **({"prompt": prompt} if prompt else {}))
            if frames:
                data.save_gif(path.with_suffix(".gif"), frames, len(frames[0]) // 2,
                              zoom(frames[0].shape[1]))
            if prompt is not None:
                report(extended, allowed, x_0, judge_model, judge_content)
            how = (f"{config.recurrence} steps, {config.method}, scale {config.scale:g}"
                   if config.method != "latent" else f"{config.iterations} steps, latent")
            print(f"{config.n} images in {seconds:.1f} s ({config.steps} x {how}, autoguidance "
                  f"{config.autoguidance:g}) -> {path}")


if __name__ == "__main__":
    cli.run_command(main)
