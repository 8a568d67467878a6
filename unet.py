"""Chapter 3a: the U-Net, a network from a picture to a picture of the same size. It predicts v.

    Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image
        Segmentation", arxiv.org/abs/1505.04597
    Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models", app. B
        arxiv.org/abs/2006.11239

Down the levels, each at half the resolution of the one before, across the bottom, and up again,
with a shortcut from each step down. Residual blocks know the time t; where the resolution is low,
every position also looks at every other one.

x_t is a picture noised up to time t, 1..T, and v what is to be predicted of it; both are explained
in tinyddpm.py, the network does not care. Shapes: B batch, C channels, H x W pixels, D width of
what the network knows of t.

Left out: attention over words, other ways to halve and double the resolution.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class UNetConfig:
    channels: int = 32               # of the finest level
    multipliers: tuple = (1, 2, 4)   # one level each, every next one at half the resolution
    blocks: int = 1                  # residual blocks per level going down; coming up, one more
    attention: tuple = (2,)          # the levels with self-attention, 0 the finest
    dropout: float = 0.0             # in the residual blocks
    text: bool = False               # whether it is told captions; no CLIP needs it, see guide.py
    image_size: int = 32             # pixels, H and W of what it is trained on
    T: int = 1000                    # how many times there are; kept here with the weights

    def __post_init__(self):
        widths = [self.channels * m for m in self.multipliers]
        heads = [widths[level] for level in self.attention if level < len(widths)] + widths[-1:]
        if any(width % 16 or not width for width in widths) or any(width % 32 for width in heads):
            raise ValueError(f"channels x multipliers are {widths}; each must be a multiple of 16, "
                             "and of 32 where there is attention, as always at the last level")
        if self.image_size % 2 ** (len(widths) - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(widths) - 1} "
                             "times; use fewer multipliers")
        if not set(self.attention) <= set(range(len(widths))):
            raise ValueError(f"attention {self.attention}: there are the levels 0 to "
                             f"{len(widths) - 1}")
        if not 0 <= self.dropout < 1 or self.T < 10:
            raise ValueError("dropout must be from 0 to less than 1, and T at least 10")


def time_embedding(t, dim):
    """t: (B,) int -> (B, dim): sines and cosines of t at dim/2 frequencies.

    They fall from 1 to just above 1/10000, evenly in their logarithm (Ho et al. 2020, sec. 4).
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * frequency                                    # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def norm(channels):
    """GroupNorm over groups of 16 channels.

    With fewer in a group, bf16 on a CPU falls off its fast path (4 to 8 times slower).
    """
    return nn.GroupNorm(channels // 16, channels)


def zero(layer):
    """Start a layer at zero: the branch it ends does nothing at first, only the shortcut counts."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """norm, SiLU, conv, norm, scale and shift by time, SiLU, conv, plus the input.

    x: (B, c_in, H, W), time: (B, D) -> (B, c_out, H, W)
    """

    def __init__(self, c_in, c_out, time_dim, dropout):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))                                 # (B, c_out, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)      # (B, c_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Every position looks at every other one, plus the input. Heads of 32 channels.

    x: (B, C, H, W) -> (B, C, H, W)

    softmax(q k^T / sqrt(32)) v, as in tinyclip.Attention. With so few positions, 64 at level 2, the
    plain formula trains faster on a CPU than F.scaled_dot_product_attention, whose backward pass
    costs eight times its forward.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)        # (B, HW, C)
        qkv = self.qkv(tokens).view(B, H * W, 3, C // 32, 32)                 # 32 channels a head
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # (B, heads, HW, 32)
        mixed = (q @ k.transpose(-2, -1) * 32 ** -0.5).softmax(dim=-1) @ v    # (B, heads, HW, 32)
        mixed = mixed.transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(mixed).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """Down the levels, across the bottom, and up again with a shortcut from each step down.

    What it predicts is v, see tinyddpm.ddpm_loss.
    """

    def __init__(self, config, captions=0):
        """captions: K, how many there are, for config.text."""
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]   # channels of each level
        D = 4 * config.channels

        def block_and_attention(c_in, level):
            block = ResBlock(c_in, widths[level], D, config.dropout)
            attends = level in config.attention
            attention = SelfAttention(widths[level]) if attends else nn.Identity()
            return nn.ModuleList([block, attention])

        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        if config.text:   # row 0, "it may be anything", adds nothing and learns nothing
            self.caption = nn.Embedding(captions + 1, D, padding_idx=0)
        self.first = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        c = widths[0]   # channels of h as it flows through forward()
        kept = [c]      # channels of everything that forward() keeps for the way up

        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(block_and_attention(c, level))
                c = width
                kept.append(c)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                kept.append(c)

        self.middle = nn.ModuleList([
            ResBlock(c, c, D, config.dropout), SelfAttention(c), ResBlock(c, c, D, config.dropout)])

        for level, width in reversed(list(enumerate(widths))):
            # One block more than down: the h with which this level began was kept as well.
            for _ in range(config.blocks + 1):
                self.up.append(block_and_attention(c + kept.pop(), level))
                c = width
            if level > 0:
                self.up.append(nn.Conv2d(c, widths[level - 1], 3, padding=1))
                c = widths[level - 1]

        out = zero(nn.Conv2d(c, 3, 3, padding=1))
        self.last = nn.Sequential(norm(c), nn.SiLU(), out)

    def forward(self, x_t, t, caption=None):
        """x_t: (B, 3, H, W), t: (B,) int in 1..T -> v_hat: (B, 3, H, W).

        caption: (B,) int in 1..K, or 0, like None, for "it may be anything".
        H and W must be divisible by 2^(levels - 1).
        """
        time = self.time(time_embedding(t, self.time[0].in_features))         # (B, D)
        if caption is not None:
            time = time + self.caption(caption)
        h = self.first(x_t)                                                   # (B, C, H, W)
        kept = [h]
        for layer in self.down:
            if isinstance(layer, nn.ModuleList):
                block, attention = layer
                h = attention(block(h, time))
            else:
                h = layer(h)                                                  # to (B, C, H/2, W/2)
            kept.append(h)

        block1, attention, block2 = self.middle
        h = block2(attention(block1(h, time)), time)

        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                block, attention = layer
                h = attention(block(torch.cat([h, kept.pop()], dim=1), time))
            else:
                h = F.interpolate(layer(h), scale_factor=2.0)                 # to (B, C, 2H, 2W)
        return self.last(h)                                                   # (B, 3, H, W)


if __name__ == "__main__":   # the way of one picture through the network
    unet = UNet(UNetConfig())

    def show(module, inputs, output):
        parameters = sum(p.numel() for p in module.parameters())
        shape = str(tuple(output.shape))
        print(f"{type(module).__name__:13} {shape:18} {parameters:7,} parameters")

    for module in unet.modules():
        if isinstance(module, (ResBlock, SelfAttention)) or module in (
                unet.first, *unet.down, *unet.up, unet.last):
            module.register_forward_hook(show)
    unet(torch.randn(1, 3, 32, 32), torch.tensor([500]))
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters in all")
