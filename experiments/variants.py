"""Other functions log_p to guide by, made as in guide.py: (clip, text_features, targets) -> log_p.

B images, K captions, A attributes; text_features: (K, E), targets: (B,) int.
"""
import functools

import numpy as np
import torch

import cars
import guide
from guide import TEMPERATURE, T_FRACTION
from tinyddpm import cosine_alpha_bar


def lookahead_with(clip, text_features, targets, temperature=TEMPERATURE, t_fraction=T_FRACTION):
    """guide.lookahead with another temperature or t_fraction."""
    log_p = guide.noise_aware(clip, text_features, targets, temperature)
    return guide.lookahead_log_p(log_p, cosine_alpha_bar().to(targets.device), t_fraction)


def factored(clip, text_features, targets):
    """Lookahead guidance by log p(body) + log p(main) + log p(second), for cars.

    p of a value is the sum of p over all captions that have it, softened as in guide.noise_aware.
    """
    labels = torch.tensor(cars.caption_labels(np.arange(len(cars.CAPTIONS)))).to(targets.device)
    same = labels == labels[targets, None]                                    # (B, K, A)

    def log_p(x_t, t, x_0_hat):
        logits = clip.logits(clip.encode_image(x_t, t), text_features, t)
        log_softmax = (logits / TEMPERATURE).log_softmax(dim=1)
        log_value = log_softmax[:, :, None].masked_fill(~same, -torch.inf).logsumexp(dim=1)
        return TEMPERATURE * log_value.sum(dim=1)                             # (B, A) -> (B,)
    return guide.lookahead_log_p(log_p, cosine_alpha_bar().to(targets.device), T_FRACTION)


def dot_product(clip, text_features, targets):
    """Dot product of features that are not normalised, CLIP at t = 0: a common first attempt."""
    def log_p(x_t, t, x_0_hat):
        image_features = clip.encode_image(x_t, torch.zeros_like(t))          # (B, E)
        return (image_features * text_features[targets]).sum(dim=1).float()
    return log_p


PARTS = {"t_fraction": [0., .25, .5, .9, 1.], "temperature": [1., 2., 10., 20.]}   # to try
LIKE_DEFAULT = guide.METHODS[guide.DEFAULT]
VARIANTS = {   # name -> guide.Method
    "factored": LIKE_DEFAULT._replace(make_log_p=factored),
    "dot product, scale 0.1": guide.Method(dot_product, 0.1, (1, 950)),
    **{f"{part} {value}": LIKE_DEFAULT._replace(
        make_log_p=functools.partial(lookahead_with, **{part: value}))
       for part, values in PARTS.items() for value in values}}
