"""Prompts in English: how they are read, and what the judge finds in the images.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
import contextlib
import io

import torch

import cars
import sample
from experiments import clip, evaluator, metrics, second_judge
from judge import predict

PROMPTS = {   # -> body, main, second, None where the prompt leaves it open
    "grey car": ("car", "gray", "gray"), "red buses": ("bus", "red", "red"),
    "withe and red car": ("car", "white", "red"), "a redish van": ("van", "red", "red"),
    "Red Bus!": ("bus", "red", "red"), "red bus.": ("bus", "red", "red"),
    '"red bus"': ("bus", "red", "red"), "(red bus)": ("bus", "red", "red"),
    "white/red car": ("car", "white", "red"), "white-and-red car": ("car", "white", "red"),
    "red_bus": ("bus", "red", "red"), "white & red car": ("car", "white", "red"),
    "a bus that is red": ("bus", "red", "red"), "photo of a blue van": ("van", "blue", "blue"),
    "green car with white roof": ("car", "green", "white"),
    "a lorry, yellow": ("truck", "yellow", "yellow"), "grey van": ("van", "gray", "gray"),
    "a bus": ("bus", None, None), "something red": (None, "red", None),
    "a car with a yellow roof": ("car", None, "yellow")}


def english(models, args):
    """Prompts as people write them, and all captions in phrasings that CLIP never met."""
    judge, _, _ = second_judge.load_judges(models, args)
    for prompt, names in PROMPTS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            read, targets = sample.resolve_prompt(prompt, models)
        config = evaluator.sampling_config(args, n=32 if None in names else 16)
        x_0 = sample.sample_images(read, sample.draw_captions(targets, config), config)
        predicted = predict(judge, x_0).cpu()                                 # (N, A)
        wanted = [values.index(name) if name else None
                  for name, values in zip(names, cars.ATTRIBUTES.values())]
        correct = torch.stack([predicted[:, a] == value for a, value in enumerate(wanted)
                               if value is not None], dim=1)
        values = [len(predicted[:, a].unique()) for a, value in enumerate(wanted) if value is None]
        yield {"prompt": prompt, "read as": out.getvalue().splitlines()[-1].split(" read as ")[1],
               **metrics.accuracy_row(correct.all(dim=1)),
               "values left open": ", ".join(map(str, values))}
    yield from held_out(models, args, judge)


def held_out(models, args, judge):
    """Guidance by held-out phrasings, one of them for each caption, beside the plain captions."""
    phrasings, K = clip.held_out_phrasings(), len(models.captions)
    plain, read = torch.arange(K), []
    for k in range(K):
        with contextlib.redirect_stdout(io.StringIO()):
            _, targets = sample.resolve_prompt(phrasings[k % len(phrasings)][k], models)
        first = targets[:K].nonzero()[:1, 0].tolist()   # none if it became a new caption,
        read += first or [(k + 1) % K]                  # which counts as wrong
    config = evaluator.sampling_config(args, n=K)
    labels = torch.from_numpy(cars.caption_labels(plain.numpy()))
    for name, targets in (("all captions, plain", plain),
                          ("all captions, in held-out phrasings", torch.tensor(read))):
        predicted = predict(judge, sample.sample_images(models, targets, config)).cpu()
        yield {"prompt": name, **metrics.accuracy_row((predicted == labels).all(1))}

