"""Chapter 5: was it obeyed? An independent network looks at the picture and names body, main and second colour.

Whoever guided a picture must not also grade it: gradient ascent on a network's opinion finds pictures that please that
network (adversarial examples), and they look like success. So the judge is of another kind than the CLIP that guides
(a plain convolutional classifier, no text, no time), and it learned from pictures that neither CLIP nor the diffusion
model has seen. A sample is right when all attributes are right.

Shapes: B batch, 3 x H x W picture, one head of logits per attribute.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class JudgeConfig:
    width: int = 32          # channels of the first stage; the later ones have 2, 4 and 6 times as many
    size: int = 32           # pictures of other sizes are area-averaged to this
    dropout: float = 0.1


class Judge(nn.Module):
    """A small ResNet (He et al. 2016) with GroupNorm, global average pooling and one linear head per attribute.

    attributes: name -> number of values, such as {"body": 6, "main": 7, "second": 7}.
    """

    def __init__(self, config, attributes):
        super().__init__()
        self.config, w = config, config.width
        self.stages = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1), Block(w, w), Block(w, 2 * w, stride=2), Block(2 * w, 2 * w),
            Block(2 * w, 4 * w, stride=2), Block(4 * w, 4 * w), Block(4 * w, 6 * w, stride=2), nn.GroupNorm(8, 6 * w), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(6 * w, values) for name, values in attributes.items()})

    def forward(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> {attribute: (B, values) logits}."""
        if x.shape[-1] != self.config.size:
            x = F.interpolate(x, (self.config.size, self.config.size), mode="area")
        features = F.dropout(self.stages(x).mean(dim=(2, 3)), self.config.dropout, self.training)   # (B, 6w)
        return {name: head(features) for name, head in self.heads.items()}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride) if (c_in, stride) != (c_out, 1) else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def from_checkpoint(content):
    """The content of a checkpoint of kind "judge" -> Judge in fp32."""
    judge = Judge(JudgeConfig(**content["config"]), {name: len(values) for name, values in content["attributes"].items()})
    judge.load_state_dict({name: p.float() for name, p in content["weights"].items()})
    return judge


def judge_loss(judge, x, labels):
    """Mean cross-entropy summed over the attributes; labels: (B, A) int, one column per attribute."""
    return sum(F.cross_entropy(logits.float(), labels[:, i]) for i, logits in enumerate(judge(x).values()))


@torch.no_grad()
def verdict(judge, x, batch=256):
    """x: (N, 3, H, W) in [-1, 1] -> (N, A) int, what the judge sees, one column per attribute."""
    return torch.cat([torch.stack([logits.argmax(1) for logits in judge(part).values()], 1) for part in x.split(batch)])


def wilson(right, n, z=1.96):
    """The 95 % interval of a proportion (Wilson 1927), honest near 0 and 1 too: right of n -> (low, high)."""
    p = right / n
    centre, half = p + z * z / (2 * n), z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
