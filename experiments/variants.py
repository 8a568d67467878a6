"""Other functions log_p to guide by, made as in guide.py.

B images, K captions, A attributes; text_features: (K, E), targets: (B,) int, labels: (K, A) int.
"""
import functools

import torch

import guide


def joint(clip, text_features, targets, labels):
    """guide.lookahead by log p(caption | x_t) in place of the sum over its attributes."""
    its_own = torch.arange(len(labels), device=labels.device)[:, None]
    return guide.lookahead(clip, text_features, targets, its_own)


def dot_product(clip, text_features, targets, labels):
    """Dot product with image features that are not normalised, CLIP at t = 0: a common attempt."""
    def log_p(x_t, t, x_0_hat):
        image_features = clip.encode_image(x_t, torch.zeros_like(t))          # (B, E)
        return (image_features * text_features[targets]).sum(dim=1).float()
    return log_p


PARTS = {"t_fraction": [0., .25, .5, .9, 1.], "temperature": [1., 2., 10., 20.]}   # to try
LIKE_DEFAULT = guide.METHODS[guide.DEFAULT]
VARIANTS = {   # name -> guide.Method
    "joint": LIKE_DEFAULT._replace(make_log_p=joint),
    "contrastive": guide.Method(   # log p(caption | x_t) as it is
        functools.partial(guide.noise_aware, temperature=1.), 8., (1, 950)),
    "dot product, scale 0.1": guide.Method(dot_product, 0.1, (1, 950)),
    **{f"{part} {value}": LIKE_DEFAULT._replace(
        make_log_p=functools.partial(guide.lookahead, **{part: value}))
       for part, values in PARTS.items() for value in values}}
