"""Metrics of generated images and of classifiers. N images, K captions, F features.

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference"
    Guo et al. 2017, "On Calibration of Modern Neural Networks", arxiv.org/abs/1706.04599
    Binkowski et al. 2018, "Demystifying MMD GANs" (KID), arxiv.org/abs/1801.01401
"""
import torch

FEATURE_LAYERS = 2, 4, 7   # of Judge.stages: two blocks, and what is average-pooled for the heads


def judge_features(judge, x, batch=256, resize=True):
    """Mean and standard deviation of every channel of the judge's FEATURE_LAYERS.

    judge: judge.Judge in eval mode, x: (N, 3, H, W) in [-1, 1] -> (N, F)
    """
    if len(x) > batch:
        return torch.cat([judge_features(judge, part, batch, resize) for part in x.split(batch)])
    h, statistics = judge.resize(x) if resize else x, []
    for i, stage in enumerate(judge.stages):
        h = stage(h)
        if i in FEATURE_LAYERS:
            statistics += [h.float().mean(dim=(2, 3)), h.float().std(dim=(2, 3))]
    return torch.cat(statistics, dim=1)


def kid(real, generated, block=200):
    """Kernel Inception Distance -> (KID, its standard error); (None, None) if N < 100.

    real, generated: (N, F) in random order; either row i of both is of the same caption, or both
    are drawn without regard to captions. (Against a fixed number of real images of each caption,
    images drawn at random would get a KID that is .004 too low for 294 x 4, .016 for 294 x 1.)
    Binkowski et al. 2018, sec. 4: the mean of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j) over all
    i != j, with k(x, y) = (x . y / F + 1)^3, in disjoint blocks, whose spread gives the error.
    Unbiased for matched captions too (Gretton et al. 2012, lemma 6); it may be negative.
    differs from the paper: the judge's features, not Inception's, standardised by the real ones',
    which adds a bias to KID where there are few: .02 for 40 images of 16 features, .1 for 16.
    """
    if len(real) != len(generated):
        raise ValueError("KID needs as many generated images as real ones")
    if len(real) < 100:
        return None, None
    block = min(block, len(real) // 4)   # at least four blocks
    # float64, because large sums are subtracted; on the CPU, because MPS has no float64
    real, generated = real.cpu().double(), generated.cpu().double()
    mean, std = real.mean(dim=0), real.std(dim=0) + 1e-6
    real, generated = ((x - mean) / std for x in (real, generated))

    def mean_kernel(a, b):   # over i != j
        k = (a @ b.T / a.shape[1] + 1) ** 3
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    values = torch.stack([mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
                          for x, y in zip(real.split(block), generated.split(block))
                          if len(x) == block])
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def diversity(features, caption_ids):
    """Mean distance of two images of a caption, features (N, F); NaN if there is no pair."""
    features, caption_ids = features.cpu(), caption_ids.cpu()   # MPS has no pdist
    means = [torch.pdist(features[caption_ids == k]).mean() for k in caption_ids.unique()]
    return torch.stack(means).nanmean().item()


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion, correct of n > 0 (Wilson 1927) -> (low, high)"""
    p = correct / n
    center = p + z * z / (2 * n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    low, high = (center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n)
    return max(0., low), min(1., high)   # rounding may exceed the range


def mean(x):
    """The mean of a tensor of any type -> float"""
    return x.float().mean().item()


def accuracy_row(correct):
    """correct: (N,) bool -> samples, prompt accuracy and its 95 % interval"""
    low, high = wilson(int(correct.sum()), len(correct))
    return {"samples": len(correct), "prompt_accuracy": mean(correct), "low": low, "high": high}


def calibration_error(probs, caption_ids, bins=15):
    """Expected calibration error (Guo et al. 2017 eq. 3), over bins of equal width.

    probs: (N, K), caption_ids: (N,) int, the correct ones -> float
    """
    confidence, predicted = probs.max(dim=1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    excess = torch.bincount(bin_of, confidence - (predicted == caption_ids).float())   # (bins,)
    return excess.abs().sum().item() / len(probs)


def recall(logits, caption_ids):
    """Recall at 1, 5, 10 of an image's caption, and of any image of a caption that has one.

    logits: (N, K), caption_ids: (N,) int, the correct ones -> {name: float}
    """
    used = caption_ids.unique()
    captions = logits.argsort(dim=1, descending=True) == caption_ids[:, None]             # (N, K)
    images = caption_ids[logits[:, used].argsort(dim=0, descending=True)] == used   # (N, used)
    return {**{f"captions@{k}": mean(captions[:, :k].any(1)) for k in (1, 5, 10)},
            **{f"images@{k}": mean(images[:k].any(0)) for k in (1, 5, 10)}}
