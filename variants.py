"""An aside: other things to guide by, which the tables of evaluate.py compare with guide.py's.

Each takes models, a checkpoints.Models, and target (B,) int, and returns log_p as in guide.py. B
pictures, K captions, E embedding width, A attributes.
"""
import numpy as np
import torch
import torch.nn.functional as F

import cars
import guide


def ahead_with(models, target, temperature=guide.TEMPERATURE, share=guide.AHEAD, rivals=None,
               tau2=None):
    """guide.ahead with one of its parts exchanged.

    rivals: how many other captions the target competes with, those nearest to it in CLIP's
    opinion, instead of all; with none it is the logit alone, as in GLIDE (Nichol et al. 2021,
    sec. 2.4).
    tau2: logit - log sum exp(tau2 logits) instead of the softmax (Ma et al. 2023, arXiv
    2310.11311), which goes on pulling when CLIP is sure.
    """
    if rivals is not None:
        seen = among_rivals(models, target, rivals)
    elif tau2 is not None:
        seen = two_temperatures(models, target, tau2)
    else:
        seen = guide.contrastive(models.clip, models.text_features, target, models.log_prior,
                                 temperature)
    return guide.looking_ahead(seen, models.alpha_bar, share)


def among_rivals(models, target, rivals):
    """guide.contrastive with the softmax over the target and so many other captions."""
    texts = F.normalize(models.text_features.float(), dim=1)                  # (K, E)
    nearest = (texts[target] @ texts.T).argsort(dim=1, descending=True)       # (B, K)
    compared = nearest[:, :1 + rivals]   # the target is nearest to itself: it comes first

    def log_p(x_t, t, x_0_hat):
        logits = logits_of(models, x_t, t).gather(1, compared)                # (B, 1 + rivals)
        if rivals == 0:
            return logits[:, 0]
        return guide.TEMPERATURE * (logits / guide.TEMPERATURE).log_softmax(dim=1)[:, 0]
    return log_p


def two_temperatures(models, target, tau2):
    """logit - log sum exp(tau2 logits), see ahead_with."""
    def log_p(x_t, t, x_0_hat):
        logits = logits_of(models, x_t, t)
        return logits[torch.arange(len(x_t)), target] - (tau2 * logits).logsumexp(dim=1)
    return log_p


def logits_of(models, x_t, t):
    """CLIP's opinion, with the prior -> (B, K)"""
    image_features = models.clip.encode_image(x_t, t)
    return models.clip.logits(image_features, models.text_features, t) + models.log_prior


def factored(models, target):
    """Attribute by attribute, of cars: the sum of log_p for the body, the main and the second
    colour, each the probability of any caption that has it, softened as in guide.contrastive. CLIP
    looks ahead."""
    labels = torch.tensor(cars.caption_labels(np.arange(len(cars.CAPTIONS))))
    labels = labels.to(target.device)                                         # (K, A)
    right = labels == labels[target, None]                                    # (B, K, A)

    def log_p(x_t, t, x_0_hat):
        log_softmax = (logits_of(models, x_t, t) / guide.TEMPERATURE).log_softmax(dim=1)
        log_any = log_softmax[:, :, None].masked_fill(~right, -torch.inf).logsumexp(dim=1)
        return guide.TEMPERATURE * log_any.sum(dim=1)                         # (B, A) -> (B,)
    return guide.looking_ahead(log_p, models.alpha_bar, guide.AHEAD)


def dot_product(models, target):
    """As in many a first attempt: CLIP is told that x_t is clean, and what counts is the dot
    product of features as they are, not normalised."""
    def log_p(x_t, t, x_0_hat):
        image_features = models.clip.encode_image(x_t, torch.zeros_like(t))   # (B, E)
        return (image_features * models.text_features[target]).sum(dim=1).float()
    return log_p
