"""Chapter 7: an independent classifier: does the image show what the caption says?

The network that guided an image must not also judge it. Gradient ascent on a network's output finds
images that satisfy that network alone (adversarial examples), and they look like success. So the
judge is a different kind of network from the CLIP that guides, a convolutional classifier without
text and without t, trained on images that neither CLIP nor the diffusion model was trained on. An
image is right when all attributes of its caption are: kind of body, main and second colour for the
built-in cars, the class for class folders. The fraction of images that are right is the prompt
accuracy.

Shapes: B images (N where there may be many), A attributes; images (B, 3, H, W) in [-1, 1], H = W.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class JudgeConfig:
    width: int = 32        # channels of the first stage; the later ones have 2 and 4 times that
    image_size: int = 32   # pixels, H and W; images of other sizes are area-averaged to this
    dropout: float = 0.1   # of the features, before the heads

    def __post_init__(self):
        fits = self.width == 8 or (self.width > 0 and self.width % 16 == 0)   # see group_norm
        if not fits or self.image_size < 8:
            raise ValueError("width must be 8 or a multiple of 16, and image_size at least 8")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be from 0 to less than 1")


def group_norm(channels):
    """Normalise groups of 16 channels, or all of them if there are fewer."""
    return nn.GroupNorm(max(1, channels // 16), channels)


class Block(nn.Module):
    """Residual block of two 3 x 3 convolutions.

    x: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)
    """

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1)
        self.norm2 = group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        same_shape = (c_in, stride) == (c_out, 1)
        self.skip = nn.Identity() if same_shape else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Judge(nn.Module):
    """A small ResNet (He et al. 2016) with GroupNorm, and one linear head per attribute.

    attributes: name -> number of values, such as {"body": 6, "main": 7, "second": 7}; their order
    is that of the columns of labels and predictions.
    """

    def __init__(self, config, attributes):
        super().__init__()
        self.config, w = config, config.width
        self.stages = nn.Sequential(
            nn.Conv2d(3, w, 3, padding=1),
            Block(w, w),                                                      # (B, w, H, W)
            Block(w, 2 * w, stride=2),
            Block(2 * w, 2 * w),                                              # (B, 2w, H/2, W/2)
            Block(2 * w, 4 * w, stride=2),                                    # (B, 4w, H/4, W/4)
            Block(4 * w, 4 * w, stride=2),                                    # (B, 4w, H/8, W/8)
            group_norm(4 * w), nn.SiLU(), nn.AdaptiveAvgPool2d(1))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(4 * w, values) for name, values in attributes.items()})

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """Rebuild a trained judge from the dictionary in weights.pt, in eval mode."""
        attributes = {name: len(values) for name, values in checkpoint["attributes"].items()}
        judge = cls(JudgeConfig(**checkpoint["config"]), attributes)
        judge.load_state_dict(checkpoint["weights"])   # fp16, copied into float32
        return judge.eval().requires_grad_(False)

    def resize(self, x):
        """x: (B, 3, H, W) -> (B, 3, image_size, image_size), area-averaged if need be"""
        size = self.config.image_size
        return x if x.shape[-2:] == (size, size) else F.interpolate(x, (size, size), mode="area")

    def forward(self, x):
        """x: (B, 3, H, W) in [-1, 1] -> {attribute: (B, values) logits}"""
        h = self.stages(self.resize(x)).flatten(1)                            # (B, 4w)
        h = F.dropout(h, self.config.dropout, self.training)
        return {name: head(h) for name, head in self.heads.items()}


def judge_loss(judge, x, labels):
    """Compute the cross-entropy, summed over the attributes -> scalar

    x: (B, 3, H, W) in [-1, 1], labels: (B, A) int, one column per attribute
    """
    return sum(F.cross_entropy(logits.float(), labels[:, i])
               for i, logits in enumerate(judge(x).values()))


@torch.no_grad()
def predict(judge, x, batch=256):
    """Predict all attributes -> (N, A) int, one column per attribute; call judge.eval() first.

    x: (N, 3, H, W) in [-1, 1], evaluated `batch` images at a time to save memory
    """
    predictions = [torch.stack([logits.argmax(dim=1) for logits in judge(images).values()], dim=1)
                   for images in x.split(batch)]                              # (<= batch, A) each
    return torch.cat(predictions)


if __name__ == "__main__":   # learn to tell bright from dark and left from right, in seconds
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(width=16, image_size=16), {"brightness": 2, "side": 2})
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    x = 0.5 * torch.randn(256, 3, 16, 16)
    labels = torch.randint(2, (256, 2))
    for image, (bright, right) in zip(x, labels.tolist()):
        image[:, 4:12, 8 * right:8 * right + 8] += 2 * bright - 1
    for step in range(30):
        optimizer.zero_grad()
        judge_loss(judge, x[:192], labels[:192]).backward()
        optimizer.step()
    correct = predict(judge.eval(), x[192:]) == labels[192:]
    print(f"held-out accuracy of {', '.join(judge.heads)}:", correct.float().mean(0).tolist())

# held-out accuracy of brightness, side: [1.0, 1.0]
