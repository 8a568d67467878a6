"""What CLIP alone can do, on held-out images at rising noise levels.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
import torch

import cars
import tinyddpm
from experiments import evaluator, metrics

TIMESTEPS = (0, 50, *range(100, 1000, 100), 950)


def zero_shot(models, args):
    """CLIP by noise level: accuracy, calibration, retrieval, word order, paraphrases."""
    dataset, caption_ids, x_0, eps = evaluator.images_and_noise(models, args.seed)
    models = evaluator.with_captions(models, dataset.captions)
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
            other = evaluator.with_captions(models, list(map(paraphrase, labels.tolist())))
            row["paraphrase"] = metrics.mean(caption_logits(other, x_t, t).argmax(1) == caption_ids)
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


def paraphrase(labels):
    """(3,) indices of body, main and second -> a caption in words that CLIP was not trained on"""
    body, main, second = cars.BODIES[labels[0]], *(cars.COLOURS[i] for i in labels[1:])
    return f"a {body} that is {main}" + (f" with a {second} roof" if main != second else "")
