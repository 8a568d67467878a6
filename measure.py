"""Drawing hundreds of pictures and measuring them: what the tables of evaluate.py are made with.

`args` is what evaluate.py's command line says. N pictures, K captions, A attributes, F features.
"""
import argparse
import functools
import math
import os
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoints
import data
import guide
import judge
import tinyclip
import tinyddpm
import unet
import variants

HELD_OUT = 2000   # pictures of the validation split, for tables without drawings
REAL = 4000       # of cars: drawn for each sample of a caption, to find real ones of it among them
POOL = 2000   # unguided pictures, from which best_of chooses for all captions


def load_models(args, device):
    """-> checkpoints.Models, all that the tables are about."""
    models = checkpoints.load_pair(args.clip, args.ddpm, device)
    print(models.where)
    if models.unet.config.T != 1000:
        raise data.UserError(f"these models have T = {models.unet.config.T}; the tables are about "
                             "T = 1000")
    if args.no_prior:
        models = models._replace(log_prior=torch.zeros_like(models.log_prior))
    return models


def held_out(models, seed, most=None):
    """Pictures of the validation split, HELD_OUT of them unless most says otherwise, and noise.

    -> their captions' indices (N,), the data set, x_0 (N, 3, H, W), eps like x_0
    """
    most = most or HELD_OUT
    dataset = data.load(models.data, models.unet.config.image_size, HELD_OUT, "validation")
    N, device = len(dataset.pictures), models.alpha_bar.device
    rows = np.linspace(0, N - 1, min(N, most)).astype(int)   # evenly: a folder goes class by class
    caption_of = torch.tensor(dataset.caption_of[rows]).to(device)
    x_0 = data.to_float(torch.tensor(dataset.pictures[rows])).to(device)
    generator = data.generator(seed, device=device)
    return caption_of, dataset, x_0, torch.randn(x_0.shape, generator=generator, device=device)


def altered(args, **changes):
    """The command line, as if it said something else."""
    return argparse.Namespace(**{**vars(args), **changes})


# ---- drawing, and remembering what was drawn -----------------------------------------------------

class Drawing(NamedTuple):
    """N pictures for N captions, and what they cost."""
    pictures: np.ndarray   # (N, H, W, 3) uint8
    unet_calls: int        # evaluations of the U-Net for each of them,
    unet_backwards: int    # and back-propagations through it
    seconds: float         # for all of them, without the loading


class Recipe(NamedTuple):
    """A way to draw."""
    name: tuple          # all that distinguishes it from other ways, but for models and args
    denoiser: Callable   # targets (B,) int, the captions wanted -> denoise


def recipe(method, scale, models, args):
    """One of guide.METHODS, with its own scale if that is None -> Recipe."""
    scale = guide.METHODS[method].scale if scale is None else scale
    interval = tuple(args.interval or guide.METHODS[method].interval)
    return Recipe((method, scale, interval),
                  lambda targets: guide.guided_by(method, models, targets, scale, interval))


def recipe_of(name, log_p_of, models, args, like=guide.DEFAULT, scale=None):
    """Another log_p, with the interval, and unless it has its own the scale, of the method that it
    is like -> Recipe. name: a tuple, log_p_of: targets (B,) int -> log_p."""
    scale = guide.METHODS[like].scale if scale is None else scale
    interval = tuple(args.interval or guide.METHODS[like].interval)
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    return Recipe((*name, scale, interval), lambda targets: guide.guided(
        denoise, log_p_of(targets), models.alpha_bar, scale, interval))


def drawn(how, indices, models, args):
    """The pictures with these indices, N ints, by a Recipe -> Drawing. Picture i is of caption
    i % K, from noise of its own, whatever the recipe.

    They are kept in cache/, by all that decides what they look like, so that a table which was
    interrupted goes on where it was; the seconds are those of the first time.
    """
    in_bf16 = torch.is_autocast_enabled(models.alpha_bar.device.type)   # not on every machine
    decides = (fingerprint(models), in_bf16, how.name, args.steps, args.eta, args.recurrence,
               args.seed, indices.tolist())
    path = data.CACHE / f"drawn-{zlib.crc32(repr(decides).encode()):08x}.npz"
    if not path.exists():
        drawing = draw(how, indices, models, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, **drawing._asdict())
        os.replace(temporary, path)
    kept = np.load(path)
    return Drawing(kept["pictures"], *(kept[key].item() for key in Drawing._fields[1:]))


# Read now: a file that is edited while a table runs is not what the table runs.
SOURCES = [Path(chapter.__file__).read_bytes()
           for chapter in (guide, tinyclip, tinyddpm, unet, variants)]


def fingerprint(models):
    """A number that changes with the weights, the captions and the prior, and with the files that
    say how to draw."""
    tensors = (*models.clip.parameters(), *models.unet.parameters(), models.log_prior)
    parts = SOURCES + [repr((models.clip.config, models.unet.config)).encode()]
    parts += [repr(models.captions).encode()]
    parts += [p.detach().cpu().numpy().tobytes() for p in tensors]
    return functools.reduce(lambda code, part: zlib.crc32(part, code), parts, 0)


def draw(how, indices, models, args):
    """What drawn() remembers."""
    net, alpha_bar, K = models.unet, models.alpha_bar, len(models.captions)
    size, calls, pictures = net.config.image_size, Counter(), []
    hooks = [net.register_forward_hook(lambda *_: calls.update(["forward"])),
             net.last.register_full_backward_hook(lambda *_: calls.update(["backward"]))]
    parts, start = indices.split(args.batch), time.perf_counter()
    for part in tqdm(parts, desc=" ".join(map(str, how.name[:2])), leave=False):
        generators = [data.generator(args.seed, i) for i in part.tolist()]
        x_T = tinyddpm.noise(generators, (3, size, size), alpha_bar.device)
        pictures.append(data.to_uint8(   # waits for the device, so the time is true
            tinyddpm.sample(how.denoiser(part % K), x_T, generators, alpha_bar, args.steps,
                            args.eta, recurrence=args.recurrence)))
    for hook in hooks:
        hook.remove()
    return Drawing(np.concatenate(pictures), calls["forward"] // len(parts),
                   calls["backward"] // len(parts), time.perf_counter() - start)


def unguided(models, args, number):
    """-> Drawing of so many unguided pictures, of other indices than the tables' (unless --each is
    more than 34 and the captions are the 294 of cars)."""
    first = len(models.captions) * (10_000 // len(models.captions))
    indices = torch.arange(first, first + number, device=models.alpha_bar.device)
    return drawn(recipe("none", 0., models, args), indices, models, args)


def best_of(n, targets, models, args):
    """For each caption the best of n unguided pictures in CLIP's opinion -> Drawing, with what it
    would have cost to draw n for each.

    All choose from the same pool, each from n random ones of its own.
    """
    pool = unguided(models, args, POOL)
    x = data.to_float(pool.pictures).to(models.alpha_bar.device)
    fits = checkpoints.beliefs(models, x).cpu()                               # (POOL, K)
    chosen = []
    for i, k in enumerate(targets.tolist()):
        some = torch.randperm(POOL, generator=data.generator(args.seed, n, i))[:n]
        chosen.append(some[fits[some, k].argmax()].item())
    each = pool.seconds / POOL
    return Drawing(pool.pictures[chosen], n * pool.unet_calls, 0, n * each * len(targets))


# ---- measuring what was drawn --------------------------------------------------------------------

class Court(NamedTuple):
    """Who judges the pictures, and what they are compared with."""
    judge: torch.nn.Module
    second: torch.nn.Module    # the second judge, or None
    promise: dict              # caption -> the labels that a picture of it must have, (A,)
    attributes: dict           # A names -> what values each can have
    real: torch.Tensor         # (N, F), what the judge notices in real pictures of these captions


def convene(models, targets, args):
    """-> the Court for pictures of these captions, N indices. UserError if there is no judge."""
    device = models.alpha_bar.device
    grader, content = checkpoints.load_judge(models.data, args.judge, device)
    if not grader or not set(models.captions) <= set(content["captions"]):
        raise data.UserError(f"there is no judge for {models.data}; of cars and of class folders "
                             f"one can be trained: python train.py judge --data {models.data}")
    if grader.config.net != "resnet":
        raise data.UserError(f"--judge {args.judge}: a judge that measures must be of the kind "
                             f"resnet, not {grader.config.net}")
    second, _ = checkpoints.load_judge(models.data, None, device, "judge-2")
    real = data.to_float(real_pictures(models, targets, args)).to(device)
    promise = dict(zip(content["captions"], content["caption_labels"]))
    return Court(grader, second, promise, content["attributes"], judge.features(grader, real))


def promised(targets, models, court):
    """targets: (N,) the captions wanted -> the labels that their pictures must have, (N, A)"""
    return torch.tensor([court.promise[models.captions[k]] for k in targets.tolist()])


def real_pictures(models, targets, args, skip=0):
    """Held-out pictures of these captions, N indices -> (N, H, W, 3) uint8.

    No picture twice, as long as there are enough of its caption; the first `skip` of each caption
    are left out. Of cars there are enough for 2 x args.each of each caption.
    """
    dataset = data.load(models.data, models.unet.config.image_size, REAL * args.each, "validation")
    place = {caption: i for i, caption in enumerate(dataset.captions)}
    rows_of = {k: np.flatnonzero(dataset.caption_of == place.get(models.captions[k], -1))
               for k in set(targets.tolist())}
    taken, rows = {k: skip for k in rows_of}, []
    for k in targets.tolist():
        if not len(rows_of[k]):
            raise data.UserError(f"no held-out picture of {models.captions[k]!r}")
        rows.append(rows_of[k][taken[k] % len(rows_of[k])])
        taken[k] += 1
    return dataset.pictures[rows]


HEIGHTS = {"camera below 15 degrees": (-math.inf, 15), "camera at 15 to 30 degrees": (15, 30),
           "camera at 30 to 45 degrees": (30, 45), "camera at 45 to 60 degrees": (45, 60),
           "camera above 60 degrees": (60, math.inf)}


def by_height(degrees):
    """degrees: (N,) -> {name: (N,) bool}, one for each of HEIGHTS"""
    return {name: (degrees >= low) & (degrees < high) for name, (low, high) in HEIGHTS.items()}


def score(pictures, targets, models, court):
    """-> shares of the pictures in which the judge finds all (joint; low to high: 95 %) or one of
    the attributes right; in which the second judge finds all right, and in which one of the two
    does and the other does not; the probability that CLIP gives the captions, KID and its error,
    and the diversity within a caption in terms of that of real pictures.

    pictures: (N, H, W, 3) uint8, targets: (N,) the captions that they were drawn for.
    """
    x = data.to_float(pictures).to(models.alpha_bar.device)
    truth = promised(targets, models, court)                                              # (N, A)
    right = judge.verdict(court.judge, x).cpu() == truth                                  # (N, A)
    opinion = {"second_judge": None, "disagree": None}
    if court.second:
        agrees = (judge.verdict(court.second, x).cpu() == truth).all(1)                   # (N,)
        opinion = {"second_judge": agrees.float().mean().item(),
                   "disagree": (agrees != right.all(1)).float().mean().item()}
    low, high = judge.wilson(int(right.all(1).sum()), len(right))
    belief = checkpoints.beliefs(models, x)[torch.arange(len(x)), targets].mean().item()

    noticed = judge.features(court.judge, x)
    mixed = torch.randperm(len(x), generator=data.generator(0))   # both go caption by caption
    kid, error = judge.kid(court.real[mixed], noticed[mixed])
    spread = court.real.std(dim=0) + 1e-6
    variety = [judge.diversity(f / spread, targets) for f in (noticed, court.real)]
    return {"samples": len(right), "joint": right.all(1).float().mean().item(), "low": low,
            "high": high, **dict(zip(court.attributes, right.float().mean(0).tolist())), **opinion,
            "clip_belief": belief, "kid": kid, "kid_error": error,
            "diversity": None if math.isnan(variety[0]) else variety[0] / variety[1]}
