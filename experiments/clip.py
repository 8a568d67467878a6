"""What CLIP alone can do, on held-out images at rising noise levels.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
import numpy as np
import torch

import cars
import sample
import tinyddpm
from experiments import evaluator, metrics

TIMESTEPS = (0, 50, *range(100, 1000, 100), 950)


def zero_shot(models, args):
    """CLIP by noise level: accuracy, calibration, retrieval, word order, paraphrases."""
    dataset, caption_ids, x_0, eps = evaluator.images_and_noise(models, args.seed)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)          # (K, A)
    phrasings = [{"phrasing": phrasing} for phrasing in HELD_OUT_PHRASINGS]
    if models.data == "cars":
        reworded = models._replace(text_features=sample.encode_in_wordings(
            evaluator.normalized(sum(held_out_phrasings(), [])), models))
    for timestep in TIMESTEPS:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        x_t = tinyddpm.q_sample(x_0, t, eps, models.alpha_bar)
        logits = caption_logits(models, x_t, t)                               # (N, K)
        best = logits.argmax(dim=1)
        row = {"t": timestep, "top-1": metrics.mean(best == caption_ids),
               **{name: metrics.mean(labels[best, i] == labels[caption_ids, i])
                  for i, name in enumerate(dataset.attributes)},
               "ece": metrics.calibration_error(logits.softmax(dim=1), caption_ids),
               "logit_scale": models.clip.logit_scale(t[:1]).item(),
               **metrics.recall(logits, caption_ids)}
        if models.data == "cars":
            row["order"] = word_order(logits, caption_ids, labels)
            logits = caption_logits(reworded, x_t, t).unflatten(1, (len(phrasings), -1))
            correct = logits.argmax(dim=2) == caption_ids[:, None]            # (N, phrasings)
            for phrasing, fraction in zip(phrasings, correct.float().mean(dim=0).tolist()):
                phrasing[f"t = {timestep}"] = fraction
        yield row
    if models.data == "cars":
        yield {"phrasing": "mean", **{key: sum(row[key] for row in phrasings) / len(phrasings)
                                      for key in phrasings[0] if key != "phrasing"}}
        yield from phrasings


def caption_logits(models, x_t, t):
    """Logits of noised images, N of them, and all captions -> (N, K)"""
    features = [models.clip.encode_image(*part) for part in zip(x_t.split(250), t.split(250))]
    return models.clip.logits(torch.cat(features), models.text_features, t)


def word_order(logits, caption_ids, labels):
    """How often the caption of an image of two colours beats the one with its colours swapped."""
    two = labels[caption_ids, 1] != labels[caption_ids, 2]                    # (N,)
    logits, caption_ids = logits[two], caption_ids[two]
    swapped = cars.caption_index(labels[caption_ids][:, [0, 2, 1]].cpu().numpy())
    i = torch.arange(len(logits))
    return metrics.mean(logits[i, caption_ids] > logits[i, torch.as_tensor(swapped)])


# Ways to name body and roof that cars.py cannot write: 20 of 40 by a writer who had not seen it.
# They were chosen before any was measured, and are used for nothing else.
HELD_OUT_PHRASINGS = [
    "a {s} roof over the {m} body of a {n}",
    "a {n} with a roof painted {s} over a {m} body",
    "a {m}-coloured {n} that has its roof painted {s}",
    "the {m} {n} has a roof that is painted {s}",
    "a {n} whose {m} body has a {s} roof", "a {n} that has a {s} roof on a {m} body",
    "a {m} body under a {s} roof, this is a {n}", "a {n}, {m} in colour, whose roof is {s}",
    "it is a {n} with a {m} body, and its roof is {s}",
    "while its roof is {s}, the {n} has a {m} body",
    "the colour of the {n} is {m}, but the roof is {s}",
    "the roof of this {n} is {s} and the body {m}",
    "the roof is {s}, the body is {m}, it is a {n}",
    "a {n} in which the body is {m} and the roof {s}",
    "the {n} which has a {s} roof is {m} in body colour",
    "with its {s} roof and {m} body, this is a {n}", "painted {m} with a {s} roof, this {n}",
    "under the {s} roof, the body of this {n} is {m}",
    "{s} is the roof colour and {m} the body colour of this {n}",
    "the {n} is painted {m}, with {s} on the roof"]


def held_out_phrasings():
    """Write all captions in each of HELD_OUT_PHRASINGS -> lists of K texts"""
    labels = cars.caption_labels(np.arange(len(cars.CAPTIONS))).tolist()
    return [[cars.fill(phrase, cars.BODIES[b], cars.COLOURS[m], cars.COLOURS[s], None)
             for b, m, s in labels] for phrase in HELD_OUT_PHRASINGS]
