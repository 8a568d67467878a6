"""Guidance: the methods side by side, where the default fails, one setting after another.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
from argparse import Namespace
from collections import Counter

import torch

import data
import guide
from experiments import evaluator, metrics, variants
from judge import predict

BEST_OF = {f"best-of-{n}": n for n in (4, 16, 64)}   # methods that are not in guide.py
PROMPTS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}   # captions
SWEEPS = [   # what is changed, its value, the method, its scale if not its own, flags
    *((f"scale of {name}", scale, name, scale, {})
      for name in ("noise-aware", "x0-fast", "lookahead")
      for scale in [guide.METHODS[name].scale * factor for factor in (.25, .5, 1., 2., 4.)]),
    *((part, value, f"{part} {value}", None, {})
      for part, values in variants.PARTS.items() for value in values),
    *(("interval", (low, high), guide.DEFAULT, None, {"interval": (low, high)})
      for low, high in ((1, 800), (1, 900), (1, 950), (200, 1000), (400, 1000))),
    *(("eta", eta, guide.DEFAULT, None, {"eta": eta}) for eta in (0., .5)),
    *(("autoguidance", scale, guide.DEFAULT, None, {"autoguidance": scale})
      for scale in (1.25, 1.5)),
    *(("steps, recurrence", (steps, n), guide.DEFAULT, None, {"steps": steps, "recurrence": n})
      for steps, n in ((50, 1), (13, 4), (100, 1), (50, 2), (25, 4), (13, 8)))]


def prepare(models, args):
    """--each indices of every caption of --prompts (N,), their captions (N,), the Evaluator"""
    K = len(models.captions)
    captions = torch.arange(K, device=models.alpha_bar.device)[PROMPTS[args.prompts]]
    indices = torch.cat([captions + K * i for i in range(args.each)])
    return indices, indices % K, evaluator.make_evaluator(models, indices % K, args)


def compare_methods(models, args):
    """Methods of guidance, and real images: scores and cost, relative to the first method's."""
    indices, targets, scores = prepare(models, args)
    scales = lambda name: [None] if name in ("none", *BEST_OF) else (
        args.scales or [evaluator.METHODS[name].scale])
    grid = [("real", None), *((name, scale) for name in args.methods for scale in scales(name))]
    first_seconds = None
    for name, scale in grid:
        unguided_real = None
        if name == "real":   # other images than those in the evaluator
            real = evaluator.real_images(models, targets, args, skip=args.each)
            samples = evaluator.Samples(real, None, None, 0.)
        elif name in BEST_OF:
            samples = evaluator.best_of(BEST_OF[name], targets, models, args)
        else:
            samples = evaluator.sample_cached(name, indices, models, args, scale)
            first_seconds = first_seconds or samples.seconds
        if name == "none":
            unguided_real = evaluator.random_real(models, scores.judge, len(targets), args.seed)
        label = name if scale is None else f"{name}-{scale:g}"
        preview = samples.images[::max(1, len(targets) // 48)][:48]   # evenly from all captions
        data.save_grid(args.out / f"guidance-{label}.png", preview, zoom=2)
        row = evaluator.score(samples.images, targets, models, scores, unguided_real)
        yield {"method": name, "scale": scale, **row,
               "cost_per_success": samples.cost_per_success(row["prompt_accuracy"]),
               "unet_evaluations": samples.unet_evaluations,
               "unet_backwards": samples.unet_backwards, "seconds": samples.seconds,
               "relative_time": samples.seconds / first_seconds if first_seconds else None}


def failures(models, args):
    """Prompt accuracy of the default method by attribute; what the judge predicts instead."""
    indices, targets, scores = prepare(models, args)
    images = evaluator.sample_cached(guide.DEFAULT, indices, models, args).images
    x, labels = data.to_float(images).to(indices.device), scores.target_labels[targets.cpu()]
    predicted = predict(scores.judge, x).cpu()                                # (N, A)
    correct = (predicted == labels).all(1)                                    # (N,)
    groups = {"all": torch.ones(len(x), dtype=torch.bool)}
    for i, (attribute, values) in enumerate(scores.attributes.items()):
        groups |= {f"{attribute} {value}": labels[:, i] == v for v, value in enumerate(values)}
    if models.data == "cars":
        one = labels[:, 1] == labels[:, 2]
        groups |= {"one colour": one, "two colours": ~one}

    def describe_error(i):   # such as "body truck, not van"
        return ", ".join(f"{name} {values[p]}, not {values[k]}" for (name, values), p, k in zip(
            scores.attributes.items(), predicted[i], labels[i]) if p != k)

    for name, group in groups.items():
        if group.any():
            errors = Counter(map(describe_error, (group & ~correct).nonzero()[:, 0].tolist()))
            error = "".join(f"{text} ({count})" for text, count in errors.most_common(1))
            yield {"prompt": name, **metrics.accuracy_row(correct[group]),
                   "most_common_error": error}


def sweep(models, args):
    """Scores with one setting of the default method changed, and of other methods by scale."""
    indices, targets, scores = prepare(models, args)
    for name, value, method, scale, flags in SWEEPS:
        changed = Namespace(**{**vars(args), **flags})
        samples = evaluator.sample_cached(method, indices, models, changed, scale)
        yield {"changed": name, "to": str(value),
               **evaluator.score(samples.images, targets, models, scores),
               "unet_evaluations": samples.unet_evaluations, "seconds": samples.seconds}
