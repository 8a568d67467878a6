"""What CLIP alone can do, on held-out images at rising noise levels.

N images, K captions, A attributes; models is a sample.Models, args the flags.
"""
import torch

import cars
import sample
import tinyddpm
from experiments import evaluator, metrics
from judge import predict

TIMESTEPS = (0, 50, *range(100, 1000, 100), 950)


def zero_shot(models, args):
    """CLIP by noise level: accuracy, calibration, retrieval, word order, paraphrases.

    paraphrase: top-1 with captions like "a car that is white with a red roof". judge: top-1 of the
    judge, which is not trained on noise.
    """
    dataset, caption_ids, x_0, eps = evaluator.images_and_noise(models, args.seed)
    models = evaluator.with_captions(models, dataset.captions)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)          # (K, A)
    judge, _ = sample.load_judge(models.data, args.judge, x_0.device)
    for timestep in TIMESTEPS:
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        x_t = tinyddpm.q_sample(x_0, t, eps, models.alpha_bar)
        probs = sample.caption_probs(models, x_t, t)                          # (N, K)
        best = probs.argmax(dim=1)
        row = {"t": timestep, "top-1": metrics.mean(best == caption_ids),
               **{name: metrics.mean(labels[best, i] == labels[caption_ids, i])
                  for i, name in enumerate(dataset.attributes)},
               "ece": metrics.calibration_error(probs, caption_ids),
               "logit_scale": models.clip.logit_scale(t[:1]).item(),
               **metrics.recall(probs, caption_ids)}
        if models.data == "cars":
            row["order"] = word_order(probs, caption_ids, labels)
            other = evaluator.with_captions(models, list(map(paraphrase, labels.tolist())))
            best = sample.caption_probs(other, x_t, t).argmax(dim=1)
            row["paraphrase"] = metrics.mean(best == caption_ids)
        if judge:
            row["judge"] = metrics.mean((predict(judge, x_t) == labels[caption_ids]).all(1))
        yield row


def word_order(probs, caption_ids, labels):
    """How often the caption of an image of two colours beats the one with its colours swapped."""
    two = labels[caption_ids, 1] != labels[caption_ids, 2]                    # (N,)
    probs, caption_ids = probs[two], caption_ids[two]
    swapped = cars.caption_index(labels[caption_ids][:, [0, 2, 1]].cpu().numpy())
    i = torch.arange(len(probs))
    return metrics.mean(probs[i, caption_ids] > probs[i, torch.as_tensor(swapped)])


def paraphrase(labels):
    """(3,) indices of body, main and second -> a caption in words that CLIP was not trained on"""
    body, main, second = cars.BODIES[labels[0]], *(cars.COLOURS[i] for i in labels[1:])
    return f"a {body} that is {main}" + (f" with a {second} roof" if main != second else "")
