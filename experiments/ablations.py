"""One thing changed in the training of CLIP or of the diffusion model; pairs of colours held out.

The changed models are trained where they are missing, in runs/ablations/. Compare with models of
train.py's defaults (--ddpm runs/ddpm/weights.pt), or two things change.
"""
import dataclasses
from pathlib import Path

import numpy as np
import torch

import cars
import data
import guide
import sample
import tinyddpm
import train
from experiments import evaluator, metrics
from infra import cli
from judge import predict

PAIRS = {"white", "red"}, {"blue", "yellow"}, {"green", "black"}   # held out for composition


def colours(labels):
    """(body, main, second) -> set of one or two names"""
    return {cars.COLOURS[i] for i in labels[1:]}


def hold_out_pairs(dataset):
    """The data set of cars without the captions of PAIRS of colours, in either order."""
    keep = np.array([colours(labels) not in PAIRS for labels in dataset.caption_labels])  # (K,)
    indices, new_ids = np.flatnonzero(keep[dataset.caption_ids]), keep.cumsum() - 1
    partial = dataset.partial_true_of[:, keep]
    kept = np.append(keep, partial.any(axis=1))   # no partial caption without a caption either
    subset = lambda texts: [text for text, flag in zip(texts, kept) if flag]
    return dataset._replace(
        images=dataset.images[indices], caption_ids=new_ids[dataset.caption_ids[indices]],
        captions=subset(dataset.captions), templates=list(map(subset, dataset.templates)),
        partial_true_of=partial[partial.any(axis=1)], caption_labels=dataset.caption_labels[keep],
        report=f"{dataset.report}; {len(indices):,} and {keep.sum()} without the held-out pairs")


def clip_inputs(clip, dataset, device):
    """What train.clip_objective takes besides a batch -> (tokens, partial_true_of, alpha_bar),
    caption_ids: (N,) of the images"""
    tokens = torch.stack([clip.tokenizer.batch(texts, clip.config.context_length)
                          for texts in train.normalized_templates(dataset)]).to(device)
    inputs = (tokens, torch.from_numpy(dataset.partial_true_of).to(device),
              tinyddpm.cosine_alpha_bar().to(device))
    return inputs, torch.from_numpy(dataset.caption_ids).to(device)


def clean_objective(clip, dataset, device):
    """train.clip_objective with clean images only, as a Task has it."""
    inputs, caption_ids = clip_inputs(clip, dataset, device)
    return lambda model, x_0, indices, generator: train.clip_objective(
        model, x_0, caption_ids[indices], *inputs, generator, clean_fraction=1.)


def train_changed(kind, change, device, make_objective=None):
    """Train a "clip" or "ddpm" with a change, unless it is there -> the path of its weights

    make_objective: (model, dataset, device) -> an objective for a Task, other than train.py's
    """
    make_task, config, options = train.TASKS[kind]
    dataset = data.load("cars", config.image_size, options.images)
    validation = data.load("cars", config.image_size, evaluator.HELD_OUT, "validation")
    path = Path(f"runs/ablations/{kind}-{change}/weights.pt")
    if change == "tenth":
        options = dataclasses.replace(options, steps=options.steps // 10)
    if change == "shuffled":
        caption_ids = np.random.default_rng(0).permutation(dataset.caption_ids)
        dataset = dataset._replace(caption_ids=caption_ids)
    if change == "pairs":
        dataset, validation = hold_out_pairs(dataset), hold_out_pairs(validation)
    torch.manual_seed(0)   # for the initial weights
    task = make_task(config, options, dataset, validation, device)
    if change == "clean":
        make_objective = clean_objective
    if make_objective:
        task = task._replace(objective=make_objective(task.model, dataset, device))
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        train.train(task, options, dataset, path.parent, device=device)
    return path


ABLATIONS = [   # name, change, the models that are trained with it, method of guidance
    ("nothing", None, (), guide.DEFAULT),
    ("CLIP trained for a tenth of the steps", "tenth", ("clip",), guide.DEFAULT),
    ("DDPM trained for a tenth of the steps", "tenth", ("ddpm",), guide.DEFAULT),
    ("captions shuffled in CLIP's training", "shuffled", ("clip",), guide.DEFAULT),
    *((f"CLIP trained on clean images only: {method}", "clean", ("clip",), method)
      for method in (guide.DEFAULT, "noise-unaware", "x0-fast", "dot product, scale 0.1"))]


def changed_models(change, kinds, models, args):
    """Models of which those of these kinds are trained with a change."""
    if models.captions != cars.CAPTIONS:
        raise cli.UserError("this experiment needs models of the built-in cars, of all captions")
    device, paths = models.alpha_bar.device, {"clip": args.clip, "ddpm": args.ddpm}
    paths |= {kind: train_changed(kind, change, device) for kind in kinds}
    changed = sample.load_models(**paths, device=device)
    templates = [evaluator.normalized(texts[:len(cars.CAPTIONS)])
                 for texts in cars.descriptions(train.ENSEMBLE)]
    return changed._replace(
        captions=cars.CAPTIONS, caption_labels=models.caption_labels, templates=templates,
        text_features=changed.clip.encode_ensemble(templates))


def ablations(models, args):
    """Ablations: prompt accuracy on all captions of two colours with one thing changed."""
    two = [k for k, caption in enumerate(models.captions) if " and " in caption]
    targets = torch.tensor(two, device=models.alpha_bar.device)
    for name, change, kinds, method in ABLATIONS:
        changed = changed_models(change, kinds, models, args)
        images = evaluator.sample_cached(method, targets, changed, args).images
        scores = evaluator.make_evaluator(changed, targets, args)
        yield {"changed": name, **evaluator.score(images, targets, changed, scores)}


def composition(models, args):
    """Composition: pairs of colours held out of the training, and others; swapped colours."""
    device = models.alpha_bar.device
    for name, kinds in (("neither", ()), ("DDPM", ("ddpm",)), ("CLIP", ("clip",)),
                        ("both", ("clip", "ddpm"))):
        changed = changed_models("pairs", kinds, models, args)
        for pairs, indices in unseen_and_seen(args.each, device).items():
            targets = indices % len(cars.CAPTIONS)
            scores = evaluator.make_evaluator(changed, targets, args)
            for method in (guide.DEFAULT, "joint"):
                images = evaluator.sample_cached(method, indices, changed, args).images
                predicted = predict(scores.judge, data.to_float(images).to(device)).cpu()
                swapped = scores.target_labels[targets.cpu()][:, [0, 2, 1]]
                yield {"held_out_of": name, "pairs": pairs, "guidance": method,
                       **evaluator.score(images, targets, changed, scores),
                       "swapped": metrics.mean((predicted == swapped).all(1))}


def unseen_and_seen(each, device="cpu"):
    """`each` indices (N,) of every caption of PAIRS, and as many of random other pairs."""
    pairs = [colours(labels) for labels in cars.caption_labels(np.arange(294))]
    unseen = [k for k, pair in enumerate(pairs) if pair in PAIRS]
    seen = [k for k, pair in enumerate(pairs) if len(pair) == 2 and pair not in PAIRS]
    seen, N = np.random.default_rng(0).permutation(seen), each * len(unseen)
    nth = lambda ids: torch.tensor(np.resize(ids, N) + 294 * (np.arange(N) // len(ids))).to(device)
    return {"unseen": nth(unseen), "seen": nth(seen)}
