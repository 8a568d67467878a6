"""Photographs in class folders: the table of a poster, and prompt accuracy against KID.

A poster of a university course compared, on CIFAR-10's airplanes, unconditional sampling, the
spherical distance to one caption, and the softmax over the captions of all classes (contrastive).
N images, K captions, F features; models is a sample.Models, args the flags.
"""
import math
from argparse import Namespace

import torch
import torch.nn.functional as F

import data
import sample
from experiments import evaluator, figures, metrics
from infra import cli, plot
from judge import predict

CLASS = "airplane"                # the poster's
SIZES = 100, 2000                 # images of a row
# Of all rows but "latent". Photographs lose their texture if steps are repeated.
SAMPLER = {"steps": 50, "eta": 1., "recurrence": 1, "autoguidance": 1.}
ROWS = {   # -> method, the scale of its lowest KID in the curve, flags other than its own
    "unconditional": ("none", None, SAMPLER), "spherical": ("spherical", 2., SAMPLER),
    "contrastive": ("contrastive", 4., SAMPLER), "lookahead": ("lookahead", 24., SAMPLER),
    "latent": ("latent", None, {}), "classifier-free": ("classifier-free", 1.5, SAMPLER),
    "conditional lookahead": ("lookahead", 8., SAMPLER)}
CONDITIONAL = "classifier-free", "conditional lookahead"   # the other rows: no condition
CURVES = {   # one of ROWS -> scales
    "unconditional": (None,),
    "spherical": (2, 4, 8, 16, 32, 64), "contrastive": (1, 2, 4, 8, 16, 32),
    "lookahead": (6, 12, 24, 48, 96, 192),
    "classifier-free": (1, 1.5, 2, 3, 5, 8), "conditional lookahead": (2, 4, 8, 16, 32, 64)}


def pixel_features(x):
    """Mean and standard deviation of each 4 x 4 block of each channel; (N, 3, H, W) -> (N, F)"""
    mean = F.avg_pool2d(x, 4)
    std = (F.avg_pool2d(x.square(), 4) - mean.square()).clamp(min=0).sqrt()
    return torch.cat([mean, std], dim=1).flatten(1)


class Photographs:
    """Training images, with which generated ones are compared, and a judge of their classes."""

    def __init__(self, models, args):
        self.judge, content = sample.load_judge(models.captions, args.judge)
        if self.judge is None or len(content["attributes"]) != 1:
            raise cli.UserError("this compares the classes of class folders; give --clip, --ddpm "
                                "and --judge that were trained on such")
        self.dataset = data.load(models.data, models.unet.config.image_size, 0, "train")
        label_of = dict(zip(content["captions"], content["caption_labels"]))
        self.labels = torch.tensor([label_of[text][0] for text in models.captions])     # (K,)
        generator = data.generator("evaluation", args.seed)
        self.order = torch.randperm(len(self.dataset.images), generator=generator).numpy()
        ids = self.dataset.caption_ids[self.order]
        self.indices = [self.order[ids == self.dataset.captions.index(text)]
                        for text in models.captions]

    def of(self, targets, skip=0):
        """Random images of captions targets (N,), all different, without the first `skip` of each

        -> (N, 3, H, W)
        """
        remaining = [iter(indices[skip:]) for indices in self.indices]
        try:
            chosen = [next(remaining[k]) for k in targets.tolist()]
        except StopIteration:
            raise cli.UserError(f"{self.dataset.name}: too few training images; it needs as many "
                                "of each class as are generated") from None
        return data.to_float(self.dataset.images[chosen])

    def random(self, count):
        """Random images of any caption -> (count, 3, H, W)"""
        return data.to_float(self.dataset.images[self.order[:count]])

    def score(self, x, targets, real):
        """x, real: (N, 3, H, W), targets: (N,) -> a row: the judge's accuracy, KID in two ways"""
        correct = predict(self.judge, x)[:, 0] == self.labels[targets]
        row, order = metrics.accuracy_row(correct), torch.randperm(
            len(x), generator=data.generator("evaluation", 0))   # they may be in order of captions
        for name, features in (("kid", lambda x: metrics.judge_features(self.judge, x)),
                               ("pixel_kid", pixel_features)):
            row[name], row[f"{name}_error"] = metrics.kid(features(real)[order], features(x)[order])
        return row


def available(models, names):
    """Leave out CONDITIONAL if this DDPM is not conditional on texts"""
    return [name for name in names if name not in CONDITIONAL or models.condition == "text"]


def draw(name, indices, models, args, scale=None):
    """Samples by one of ROWS, from the cache if they were made before -> evaluator.Samples"""
    method, own_scale, flags = ROWS[name]
    models = models._replace(condition=models.condition if name in CONDITIONAL else None)
    return evaluator.sample_cached(method, indices, models, Namespace(**{**vars(args), **flags}),
                                   own_scale if scale is None else scale)


def save_by_class(path, x, targets, names):
    """Save images (N, 3, H, W) of captions targets (N,), a row of ten for each caption"""
    rows = [x[targets == k][:10] for k in range(len(names))]
    figures.labelled_grid([[figures.to_image(image, 64) for image in row] for row in rows],
                          names).save(path)


def poster(models, args):
    """A poster's table: airplanes and all classes, 100 and 2,000 images, prompt accuracy, KID.

    All rows are compared with training images, as the validation split has too few; real: other
    ones of these. relative_time: unconditional = 1. All rows are of one U-Net.
    """
    photographs, K = Photographs(models, args), len(models.captions)
    classes, numbers = list(map(sample.class_name, models.captions)), torch.arange(SIZES[-1])
    groups = {CLASS: classes.index(CLASS) + K * numbers} if CLASS in classes else {}
    for group, indices in {**groups, "all": numbers}.items():
        for n in SIZES:
            targets = indices[:n] % K
            real, unguided_seconds = photographs.of(targets), None
            subset = targets[:500]   # CIFAR-10's training split has 2,969 airplanes
            others = photographs.of(subset, skip=int(targets.bincount().max()))
            yield {"captions": group, "n": len(subset), "method": "real",
                   **photographs.score(others, subset, real[:len(subset)])}
            for name in available(models, ROWS):
                samples = draw(name, indices[:n], models, args)
                unguided_seconds = unguided_seconds or samples.seconds
                x = data.to_float(samples.images)
                if group == "all" and n == SIZES[0]:
                    save_by_class(args.out / f"photographs-{name}.png", x, targets, classes)
                any_caption = name == "unconditional" and group == "all"
                row = photographs.score(x, targets, photographs.random(n) if any_caption else real)
                yield {"captions": group, "n": n, "method": name, **row,
                       "cost_per_success": samples.cost_per_success(row["prompt_accuracy"]),
                       "unet_evaluations": samples.unet_evaluations, "seconds": samples.seconds,
                       "relative_time": samples.seconds / unguided_seconds}


def curve(models, args):
    """Prompt accuracy against KID by guidance scale, --each images of each class."""
    photographs, K = Photographs(models, args), len(models.captions)
    if K * args.each < 100:
        raise cli.UserError(f"KID needs 100 images: --each {math.ceil(100 / K)} or more")
    indices, curves = torch.arange(K * args.each), {}
    real = photographs.of(indices % K)
    for name in available(models, CURVES):
        for scale in CURVES[name]:
            samples = draw(name, indices, models, args, scale)
            row = photographs.score(data.to_float(samples.images), indices % K, real)
            curves.setdefault(name, []).append((row["prompt_accuracy"], row["kid"]))
            yield {"method": name, "scale": scale, **row}
    plot.line_plot(args.out / "accuracy_kid.png", {
        name: tuple(zip(*points)) for name, points in curves.items()}, "prompt accuracy", "KID")
