"""What CLIP alone can do, on held-out images at rising noise levels.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
import numpy as np
import torch

import cars
import tinyddpm
from experiments import evaluator, metrics

TIMESTEPS = (0, 50, *range(100, 1000, 100), 950)


def zero_shot(models, args):
    """CLIP by noise level: accuracy, calibration, retrieval, word order, paraphrases."""
    dataset, caption_ids, x_0, eps = evaluator.images_and_noise(models, args.seed)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)          # (K, A)
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
            for i, texts in enumerate(held_out_phrasings()):
                other = evaluator.with_captions(models, texts)
                found = caption_logits(other, x_t, t).argmax(1)
                row[f"phrasing {i + 1}"] = metrics.mean(found == caption_ids)
        yield row


def caption_logits(models, x_t, t):
    """-> (N, K) in float32, because near-ties matter"""
    parts = zip(x_t.split(250), t.split(250))
    features = torch.cat([models.clip.encode_image(*part) for part in parts]).float()
    with torch.autocast(x_t.device.type, enabled=False):
        return models.clip.logits(features, models.text_features.float(), t)


def word_order(logits, caption_ids, labels):
    """How often the caption of an image of two colours beats the one with its colours swapped."""
    two = labels[caption_ids, 1] != labels[caption_ids, 2]                    # (N,)
    logits, caption_ids = logits[two], caption_ids[two]
    swapped = cars.caption_index(labels[caption_ids][:, [0, 2, 1]].cpu().numpy())
    i = torch.arange(len(logits))
    return metrics.mean(logits[i, caption_ids] > logits[i, torch.as_tensor(swapped)])


# Ways to write captions that are not in cars.PHRASES: for two colours, and for one.
HELD_OUT_PHRASINGS = [
    ("a {n} which is {m} and {s}", "a {n} which is {c}"),
    ("a {n} in {m} whose roof is {s}", "a {n} in {c} whose roof is {c}"),
    ("a {m} {n} whose roof is {s}", "a {c} {n} whose roof is {c}"),
    ("a {n}, {m} with a {s} roof", "a {n}, {c} with a {c} roof"),
    ("a {n} of {m} and {s} colour", "a {n} of {c} colour"),
    ("a {m} body and a {s} roof on a {n}", "a {c} body and a {c} roof on a {n}"),
    ("a {s} roof, a {m} body, a {n}", "a {c} roof, a {c} body, a {n}"),
    ("the {n} has a {m} body and its roof is {s}", "the {n} has a {c} body and roof"),
    ("a {n} with a roof in {s} and a body in {m}", "a {n} with a roof and a body in {c}")]


def held_out_phrasings():
    """Write all captions in each of HELD_OUT_PHRASINGS -> lists of K texts"""
    labels = cars.caption_labels(np.arange(len(cars.CAPTIONS))).tolist()
    return [[cars.fill(one if m == s else two, cars.BODIES[b], cars.COLOURS[m], cars.COLOURS[s],
                       None) for b, m, s in labels] for two, one in HELD_OUT_PHRASINGS]
