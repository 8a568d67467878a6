"""Chapter 5: was it obeyed, and is it good? An independent network looks and names body, main and
second colour; what it notices on the way measures how far drawn pictures are from real ones.

Whoever guided a picture must not also grade it: gradient ascent on a network's opinion finds
pictures that please that network (adversarial examples), and they look like success. So the judge
is of another kind than the CLIP that guides (a plain convolutional classifier, no text, no time),
and it learned from pictures that neither CLIP nor the diffusion model has seen. A sample is right
when all attributes are right.

    Binkowski et al. 2018, "Demystifying MMD GANs" (KID)
        arxiv.org/abs/1801.01401

Shapes: B pictures (N of them where there may be many), A attributes, F features; pictures
(B, 3, H, W) in [-1, 1] with H = W.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class JudgeConfig:
    net: str = "resnet"    # or "plain", for a second opinion
    width: int = 32        # channels of the first stage; the later ones have 2 and 4 times that
    size: int = 32         # pixels, H and W; pictures of other sizes are area-averaged to this
    dropout: float = 0.1   # of the features, before the heads

    def __post_init__(self):
        if self.net not in ("resnet", "plain"):
            raise ValueError(f"net must be resnet or plain, not {self.net!r}")
        fits = self.width == 8 or (self.width > 0 and self.width % 16 == 0)   # see norm
        if not fits or self.size < 8:
            raise ValueError("width must be 8 or a multiple of 16, and size at least 8")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to less than 1, not {self.dropout}")


def norm(channels):
    """GroupNorm over groups of 16 channels, or over all of them if there are fewer."""
    return nn.GroupNorm(max(1, channels // 16), channels)


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    x: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)
    """

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.norm2 = norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        same_shape = (c_in, stride) == (c_out, 1)
        self.skip = nn.Identity() if same_shape else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def resnet(w):
    """A small ResNet (He et al. 2016) with GroupNorm and global average pooling.

    x: (B, 3, H, W) -> (B, 4w, 1, 1)
    """
    return nn.Sequential(
        nn.Conv2d(3, w, 3, padding=1),
        Block(w, w),                                                          # (B, w, H, W)
        Block(w, 2 * w, stride=2),
        Block(2 * w, 2 * w),                                                  # (B, 2w, H/2, W/2)
        Block(2 * w, 4 * w, stride=2),                                        # (B, 4w, H/4, W/4)
        Block(4 * w, 4 * w, stride=2),                                        # (B, 4w, H/8, W/8)
        norm(4 * w), nn.SiLU(), nn.AdaptiveAvgPool2d(1))


def plain(w):
    """A stack of larger convolutions, without shortcuts (after Simonyan & Zisserman 2015).

    x: (B, 3, H, W) -> (B, 4w, 2, 2): its heads know in which quarter of the picture something is
    """
    return nn.Sequential(
        nn.Conv2d(3, w, 5, padding=2), norm(w), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(w, 2 * w, 5, padding=2), norm(2 * w), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * w, 4 * w, 5, padding=2), norm(4 * w), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4 * w, 4 * w, 3, padding=1), norm(4 * w), nn.ReLU(), nn.AdaptiveMaxPool2d(2))


class Judge(nn.Module):
    """One of these networks, and one linear head per attribute.

    attributes: name -> number of values, such as {"body": 6, "main": 7, "second": 7}. Their order
    is that of the columns of labels and verdicts.
    """

    def __init__(self, config, attributes):
        super().__init__()
        self.config = config
        self.stages = {"resnet": resnet, "plain": plain}[config.net](config.width)
        found = 4 * config.width * {"resnet": 1, "plain": 4}[config.net]   # numbers in its output
        self.heads = nn.ModuleDict(
            {name: nn.Linear(found, values) for name, values in attributes.items()})

    def resized(self, x):
        """x: (B, 3, H, W) -> the same, or area-averaged to the size that this judge knows."""
        size = self.config.size
        return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="area")

    def forward(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> {attribute: (B, values) logits}"""
        found = self.stages(self.resized(x)).flatten(1)                       # (B, 4w or 16w)
        found = F.dropout(found, self.config.dropout, self.training)
        return {name: head(found) for name, head in self.heads.items()}


def judge_loss(judge, x, labels):
    """Cross-entropy, mean over the batch, summed over the attributes.

    x: (B, 3, H, W) in [-1, 1], labels: (B, A) int, one column per attribute -> scalar
    """
    heads = judge(x).values()
    return sum(F.cross_entropy(logits.float(), labels[:, i]) for i, logits in enumerate(heads))


@torch.no_grad()
def verdict(judge, x, batch=256):
    """What the judge sees, `batch` pictures at a time; call judge.eval() first.

    x: (N, 3, H, W) in [-1, 1] -> (N, A) int, one column per attribute
    """
    verdicts = []
    for part in x.split(batch):
        seen = [logits.argmax(dim=1) for logits in judge(part).values()]
        verdicts.append(torch.stack(seen, dim=1))                             # (<= batch, A)
    return torch.cat(verdicts)


def wilson(right, n, z=1.96):
    """The 95 % interval of a proportion (Wilson 1927), honest near 0 and 1 too.

    right: how many of n > 0 were right, z: standard deviations on either side -> (low, high)
    """
    p = right / n
    centre = p + z * z / (2 * n)
    half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0., low), min(1., high)   # rounding may leave them a hair outside


NOTICED = 2, 4, 7   # of resnet's layers: its second block, its fourth, and what the heads average


@torch.no_grad()
def features(judge, x, batch=256):
    """What a judge of the kind "resnet" notices: the mean and the deviation of every channel of
    NOTICED; call judge.eval() first. ValueError if it is of another kind.

    x: (N, 3, H, W) in [-1, 1] -> (N, F)
    """
    if judge.config.net != "resnet":
        raise ValueError("KID and diversity are measured by a judge of the kind resnet, not "
                         f"{judge.config.net}")
    noticed = []
    for part in x.split(batch):
        h, statistics = judge.resized(part), []
        for i, stage in enumerate(judge.stages):
            h = stage(h)
            if i in NOTICED:
                statistics += [h.float().mean(dim=(2, 3)), h.float().std(dim=(2, 3))]
        noticed.append(torch.cat(statistics, dim=1))
    return torch.cat(noticed)


def kid(real, drawn, block=200):
    """Kernel distance between two sets of pictures -> (KID, its standard error).

    real, drawn: (N, F), features; row i of the one may be of the same caption as row i of the
    other, but the order of the rows must be random. (None, None) if N < 8.

    Binkowski et al. 2018, sec. 4, with the judge's features instead of Inception's, standardised by
    the real ones: the mean of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j) over all pairs i != j, with
    k(x, y) = (x . y / F + 1)^3 (Gretton et al. 2012, lemma 6, for sets of equal size). Leaving out
    i = j everywhere, it is unbiased for matched captions too; it may fall below 0 where there is no
    difference. The mean over disjoint blocks of pictures, whose spread gives the error; of few
    blocks, at least four, that is itself a rough guess.
    """
    if len(real) < 8:
        return None, None
    block = min(block, len(real) // 4)
    # In float64, because small differences of large sums are left, and autocast lets it alone; and
    # on the CPU, because not every device knows float64.
    real, drawn = real.cpu().double(), drawn.cpu().double()
    centre, spread = real.mean(dim=0), real.std(dim=0) + 1e-6
    real, drawn = ((x - centre) / spread for x in (real, drawn))

    def between(a, b):   # the mean of k(a_i, b_j) over i != j
        k = (a @ b.T / a.shape[1] + 1) ** 3
        return (k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1))

    values = torch.stack([between(x, x) + between(y, y) - 2 * between(x, y)
                          for x, y in zip(real.split(block), drawn.split(block))
                          if len(x) == block])
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def diversity(noticed, caption_of):
    """The mean distance between two pictures of the same caption: 0 if all of them are alike.

    noticed: (N, F), features, standardised, caption_of: (N,) int -> float, NaN if there is no pair
    """
    means = [torch.pdist(noticed[caption_of == k]).mean() for k in caption_of.unique()]
    return torch.stack(means).nanmean().item()


def copies(x, training, batch=64):
    """Which pictures are copies of a training picture: much nearer to one than to all others.

    x: (N, P), training: (M, P), any description of pictures -> (N,) bool, d1 / d2 < 1/3 for the
    distances to the nearest two, as in Gu et al. 2023, arXiv 2310.02664.
    """
    found = []
    for part in x.split(batch):
        d1, d2 = torch.cdist(part, training).topk(2, largest=False).values.unbind(dim=1)
        found.append(d1 < d2 / 3)
    return torch.cat(found)


if __name__ == "__main__":   # the shipped judge looks at 200 cars that nobody learned from
    import cars
    import checkpoints
    import data

    judge, content = checkpoints.load_model(checkpoints.SHIPPED / "judge.pt", "judge")
    first = cars.JUDGE_TEST + 5000   # behind those that evaluate.py takes
    pictures, labels = cars.render(seed=0, indices=range(first, first + 200), size=32)
    seen = verdict(judge, data.to_float(pictures)).numpy()
    right = (seen == labels).all(axis=1)
    for i in (*range(3), *(~right).nonzero()[0][:2]):
        print(f"{cars.caption(*labels[i])}: the judge sees {cars.caption(*seen[i])}")
    low, high = wilson(right.sum(), 200)
    print(f"all right in {right.sum()} of 200, 95 % interval {low:.1%} to {high:.1%}")

# a yellow and gray car: the judge sees a yellow and gray car
# a yellow and black van: the judge sees a yellow and black van
# a black and red jeep: the judge sees a black and red jeep
# all right in 200 of 200, 95 % interval 98.1% to 100.0%
