"""Samples for hundreds of captions, and their scores: what most experiments are built on.

N images, K captions, A attributes, F features; models is a sample.Models, args the flags. An index
i stands for one image: of caption i % K, from noise of its own, whatever the method.
"""
import hashlib
import math
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import guide
import sample
import tinyclip
import tinyddpm
import unclip
from experiments import metrics, second_judge, variants
from infra import checkpoint, cli
from judge import predict

HELD_OUT = 2000   # images of the validation split for experiments without samples
REAL = 4000       # held-out cars to render for each of --each: enough of every caption
POOL = 2000       # unguided images from which best_of chooses
METHODS = {**sample.METHODS, **variants.VARIANTS}
# The source code as it was imported: a file may be edited while an experiment runs.
SOURCE = [Path(module.__file__).read_bytes()
          for module in (data, guide, tinyclip, tinyddpm, unclip, variants)]


def normalized(texts):
    return [tinyclip.normalize_prompt(text) for text in texts]


def sampling_config(args, **changes):
    """The flags of an experiment -> sample.SamplingConfig"""
    names = "steps", "eta", "recurrence", "autoguidance", "seed", "batch", "interval"
    return sample.SamplingConfig(**{name: getattr(args, name) for name in names}, **changes)


def images_and_noise(models, seed):
    """Held-out images, evenly spaced because a folder is in order of its classes, and noise.

    -> the Dataset, caption_ids (N,), x_0 (N, 3, H, W), eps like x_0
    """
    device = models.alpha_bar.device
    dataset = data.load(models.data, models.unet.config.image_size, HELD_OUT, "validation")
    total = len(dataset.images)
    indices = np.linspace(0, total - 1, min(total, HELD_OUT)).astype(int)
    x_0 = data.to_float(dataset.images[indices]).to(device)
    generator = data.generator("evaluation", seed, device=device)
    eps = torch.randn(x_0.shape, generator=generator, device=device)
    return dataset, torch.from_numpy(dataset.caption_ids[indices]).to(device), x_0, eps


class Samples(NamedTuple):
    """N images and their cost."""
    images: np.ndarray      # (N, H, W, 3) uint8
    unet_evaluations: int   # forward passes of the U-Net for each image, not of a weak one
    unet_backwards: int     # backward passes
    seconds: float          # for all images, without loading the models

    def cost_per_success(self, prompt_accuracy):
        """U-Net evaluations for each image that is right; a backward pass costs about two"""
        if self.unet_evaluations is None:
            return None
        return (self.unet_evaluations + 2 * self.unet_backwards) / max(prompt_accuracy, 1e-3)


def build_denoiser(name, models, targets, scale, interval, autoguidance, generators):
    """sample.build_denoiser for METHODS."""
    if name in sample.METHODS:
        return sample.build_denoiser(name, models, targets, scale, interval, autoguidance,
                                     generators)
    log_p = METHODS[name].make_log_p(
        models.clip, models.text_features, targets, models.caption_labels)
    denoise = guide.autoguided(models.unet, models.weak, models.alpha_bar, autoguidance)
    return guide.guided(denoise, log_p, models.alpha_bar, scale, interval)


def sample_cached(method, indices, models, args, scale=None):
    """Samples with these indices (N,) by one of METHODS, with its own scale unless given.

    From the cache if they were made before, with their seconds: an interrupted experiment resumes.
    """
    given = {**vars(args), "scale": scale}
    own = {name: getattr(METHODS[method], name)
           for name in sample.METHOD_SETTINGS if given[name] is None}
    args = Namespace(**{**given, **own})
    guidance = method, args.scale, tuple(args.interval), args.autoguidance
    path = cache_path(guidance, indices, models, args)
    if not path.exists():
        samples = generate(guidance, indices, models, args)
        with checkpoint.write_atomic(path) as file:
            np.savez(file, **samples._asdict())
    content = np.load(path)
    return Samples(content["images"], *(content[key].item() for key in Samples._fields[1:]))


def cache_path(guidance, indices, models, args):
    """A file name that depends on all that determines the samples, source code included."""
    device = models.alpha_bar.device.type
    settings = (device, torch.is_autocast_enabled(device), torch.__version__, guidance, args.steps,
                args.eta, args.recurrence, args.seed, args.batch, indices.tolist(),
                models.captions, models.caption_labels.tolist(), models.templates, models.condition,
                SOURCE, *((m.config, checkpoint.weights_checksum(m))
                          for m in (models.clip, models.unet, models.weak, models.prior) if m))
    return data.CACHE / f"samples-{hashlib.sha256(repr(settings).encode()).hexdigest()[:16]}.npz"


def generate(guidance, indices, models, args):
    """What sample_cached stores; guidance: method, scale, interval, autoguidance."""
    unet, size, device = models.unet, models.unet.config.image_size, models.alpha_bar.device
    calls, images, start = Counter(), [], time.perf_counter()
    hooks = [unet.register_forward_hook(lambda *_: calls.update(["forward"])),
             unet.conv_out.register_full_backward_hook(lambda *_: calls.update(["backward"]))]
    method, *settings = guidance
    for part in tqdm(indices.split(args.batch), desc=method, leave=False):
        generators = [data.generator("sampling", args.seed, i) for i in part.tolist()]
        x_T = tinyddpm.randn_per_image(generators, (3, size, size), device)
        denoise = build_denoiser(method, models, part % len(models.captions), *settings,
                                 generators)
        if method == "latent":
            log_p = guide.METHODS[method].make_log_p(
                models.clip, models.text_features, part % len(models.captions),
                models.caption_labels)
            x_T = guide.optimize_x_T(denoise, log_p, x_T, generators, models.alpha_bar,
                                      args.steps, sample.SamplingConfig.iterations)
        images.append(data.to_uint8(tinyddpm.sample(   # waits for the device: the time is correct
            denoise, x_T, generators, models.alpha_bar, args.steps, args.eta,
            recurrence=args.recurrence)))
    for hook in hooks:
        hook.remove()
    return Samples(np.concatenate(images), calls["forward"] // len(images),
                   calls["backward"] // len(images), time.perf_counter() - start)


def unguided(models, args, count):
    """Samples without guidance, of indices that nothing else uses while --each is below 34."""
    start = 10_000 // len(models.captions) * len(models.captions)
    indices = torch.arange(start, start + count, device=models.alpha_bar.device)
    return sample_cached("none", indices, models, args)


def best_of(n, targets, models, args):
    """For each target the one of n unguided images with the highest probability by CLIP; the n are
    random ones of one pool, the cost is that of n new ones."""
    pool, best = unguided(models, args, POOL), []
    x = data.to_float(pool.images).to(models.alpha_bar.device)
    probs = models.clip.caption_probs(x, models.text_features).cpu()        # (POOL, K)
    for i, k in enumerate(targets.tolist()):
        subset = torch.randperm(POOL, generator=data.generator("evaluation", args.seed, n, i))[:n]
        best.append(subset[probs[subset, k].argmax()].item())
    seconds = n * len(targets) * pool.seconds / POOL
    return Samples(pool.images[best], n * pool.unet_evaluations, 0, seconds)


class Evaluator(NamedTuple):
    """Judges, and real images to compare with."""
    judge: torch.nn.Module
    second_judge: torch.nn.Module   # None if there is none
    target_labels: torch.Tensor     # (K, A) int, the attributes of an image of each caption
    attributes: dict                # A names -> values
    real: torch.Tensor              # (N, F), the judge's features of real images of the captions


def make_evaluator(models, targets, args):
    """Evaluator for images of these captions, targets (N,); UserError if there is no judge."""
    judge, content, second = second_judge.load_judges(models, args)
    labels = dict(zip(content["captions"], content["caption_labels"]))
    real = data.to_float(real_images(models, targets, args)).to(models.alpha_bar.device)
    return Evaluator(judge, second, torch.tensor([labels[text] for text in models.captions]),
                     content["attributes"], metrics.judge_features(judge, real))


def random_real(models, judge, count, seed):
    """The judge's features of random held-out images, to compare unguided ones with (<= count, F)
    """
    _, _, x_0, _ = images_and_noise(models, seed)
    order = torch.randperm(len(x_0), generator=data.generator("evaluation", 0))
    return metrics.judge_features(judge, x_0[order[:count].to(x_0.device)])


def real_images(models, targets, args, skip=0):
    """Held-out images of these captions, targets (N,) -> (N, H, W, 3) uint8; all different while
    there are enough of a caption, without the first `skip` of each."""
    dataset = data.load(models.data, models.unet.config.image_size, REAL * args.each, "validation")
    used, indices = Counter(), []
    for caption in [models.captions[k] for k in targets.tolist()]:
        of_caption = np.flatnonzero(dataset.caption_ids == dataset.captions.index(caption))
        if not len(of_caption):
            raise cli.UserError(f"no held-out image of {caption!r}")
        indices.append(of_caption[(skip + used[caption]) % len(of_caption)])
        used[caption] += 1
    return dataset.images[indices]


def swapped_colours(predicted, labels, attributes):
    """How many of the cars of two colours have them in the other order -> {"swapped": fraction}

    predicted, labels: (N, A)
    """
    if not {"main", "second"} <= set(attributes):
        return {}
    main, second = (list(attributes).index(name) for name in ("main", "second"))
    two = labels[:, main] != labels[:, second]
    other = (predicted[:, [main, second]] == labels[:, [second, main]]).all(dim=1)
    return {"swapped": metrics.mean(other[two]) if two.any() else None}


def score(images, targets, models, evaluator, unguided_real=None):
    """Scores of images (N, H, W, 3) uint8 of captions targets (N,) -> a row of a table

    prompt_accuracy: the judge predicts all attributes of the caption; second_judge: the other one
    does; disagree: one of the two does. clip_prob: CLIP's mean probability of the caption
    (optimistic: it guided). kid: from real images of the same captions, or for unguided images from
    unguided_real, (n, F) of random_real. diversity: within a caption, relative to real images.
    """
    x = data.to_float(images).to(models.alpha_bar.device)
    labels, second = evaluator.target_labels[targets.cpu()], (None, None)                 # (N, A)
    predicted = predict(evaluator.judge, x).cpu()                                         # (N, A)
    correct = predicted == labels
    if evaluator.second_judge:
        also = (predict(evaluator.second_judge, x).cpu() == labels).all(1)
        second = metrics.mean(also), metrics.mean(also != correct.all(1))
    probs = models.clip.caption_probs(x, models.text_features)[torch.arange(len(x)), targets]
    features, real = metrics.judge_features(evaluator.judge, x), evaluator.real
    order = torch.randperm(   # both are in the order of captions
        len(x), generator=data.generator("evaluation", 0))
    others = real[order] if unguided_real is None else unguided_real
    kid, error = metrics.kid(others, features[order[:len(others)]])
    std = real.std(dim=0) + 1e-6
    spread, real_spread = (metrics.diversity(f / std, targets) for f in (features, real))
    return {**metrics.accuracy_row(correct.all(1)),
            **dict(zip(evaluator.attributes, correct.float().mean(0).tolist())),
            **swapped_colours(predicted, labels, evaluator.attributes),
            "second_judge": second[0], "disagree": second[1], "clip_prob": metrics.mean(probs),
            "kid": kid, "kid_error": error,
            "diversity": None if math.isnan(spread) else spread / real_spread}
