"""Chapter 4: unCLIP: from words to images by way of CLIP's image embeddings.

    Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents"
        arxiv.org/abs/2204.06125
    Ho et al. 2022, "Cascaded Diffusion Models" (conditioning augmentation)
        arxiv.org/abs/2106.15282
    Shi et al. 2016, "Real-Time Single Image Super-Resolution ... Sub-Pixel ..." (PixelShuffle)
        arxiv.org/abs/1609.05158

The idea: CLIP's text feature says what an image shows; its image feature, here called an embedding,
says that and a little more. Three networks lead from a text feature to a large image:

    text feature --prior--> image embedding --decoder--> image --upsampler--> larger image

The prior is a diffusion model of embeddings, conditional on the text feature. The decoder is the
U-Net of tinyddpm.py, conditional on an embedding. CLIP stays as it is.

Shapes: B batch, E embedding width, D width of the prior. z is an image embedding; text features and
z are scaled to length sqrt(E) (guide.scale_features).
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guide import classifier_free, scale_features
from tinyddpm import T, q_sample, randn_per_image, sample, timestep_embedding, zero_init


# ---- the prior: from text feature to image embedding ---------------------------------------------

@dataclass
class PriorConfig:
    clip_dim: int = 128    # E, width of CLIP's features
    width: int = 256       # D
    blocks: int = 4

    def __post_init__(self):
        if self.width < 32 or self.width % 2 or self.blocks < 1:
            raise ValueError("width must be even and at least 32, blocks at least 1")


class Prior(nn.Module):
    """Residual MLP: predicts v from a noised image embedding and the text feature.

    z_t: (B, E, 1, 1), z noised to timestep t (in the paper z_t is the text embedding, here cond);
    t: (B,) int in 1..T, cond: (B, E), a scaled text feature, or None -> v_hat: (B, E, 1, 1)

    An embedding is an image of one pixel with E channels: ddpm_loss, denoiser and sample of
    tinyddpm.py serve both.
    differs from the paper: there a Transformer, which reads the words as well, predicts z_0. But
    the squared error of z_0 has little weight at small t (see ddpm_loss), where sampling chooses
    among the embeddings of a caption: in the demonstration below, with it, all draws were their
    mean (experiments/LOG.md).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, D = config.clip_dim, config.width
        self.z_proj = nn.Linear(E, D)
        self.text_proj = nn.Linear(E, D, bias=False)   # text = 0 is the same as no text
        self.time_proj = nn.Linear(D, D)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(D), nn.Linear(D, D), nn.SiLU(), zero_init(nn.Linear(D, D)))
            for _ in range(config.blocks))
        self.out = nn.Sequential(nn.LayerNorm(D), nn.SiLU(), zero_init(nn.Linear(D, E)))

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """Rebuild a trained prior from the dictionary in weights.pt, in eval mode."""
        prior = cls(PriorConfig(**checkpoint["config"]))
        prior.load_state_dict(checkpoint["weights"])
        return prior.eval().requires_grad_(False)

    def forward(self, z_t, t, cond=None):
        h = self.z_proj(z_t.flatten(1))                                       # (B, D)
        h = h + self.time_proj(timestep_embedding(t, h.shape[1]))
        if cond is not None:
            h = h + self.text_proj(cond)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)[:, :, None, None]                                  # (B, E, 1, 1)


def sample_prior(prior, text, generators, alpha_bar, steps=25, draws=2, scale=1):
    """Sample image embeddings for text features, the best of several draws -> z: (B, E)

    text: (B, E), scaled; the best has the largest dot product with it (Ramesh et al., sec. 2.2;
    here one draw is as good: experiments/UNCLIP.md). The length of z is only about sqrt(E):
    scale_features makes it exact. scale: of classifier-free guidance, for which training drops
    one text in ten.
    """
    denoise, candidates = classifier_free(prior, alpha_bar, text, scale), []
    for _ in range(draws):
        z_T = randn_per_image(generators, (text.shape[1], 1, 1), text.device)
        z = sample(denoise, z_T, generators, alpha_bar, steps, clamp=False)   # (B, E, 1, 1)
        candidates.append(z.flatten(1))
    z = torch.stack(candidates)                                               # (draws, B, E)
    best = (z * text).sum(dim=2).argmax(dim=0)                                # (B,)
    return z[best, torch.arange(len(text), device=text.device)]


# ---- the decoder: from image embedding to image --------------------------------------------------

def decoder_condition(z, noise_level, noise):
    """Make the decoder's condition of image embeddings, some hidden by noise -> (B, E + 1)

    z: (B, E), scaled; noise_level: (B, 1), from 0, which shows all of z, to 1, nothing; noise:
    standard normal like z

    With s for the level, z_s = sqrt(1 - s^2) z + s noise is multiplied by sqrt(1 - s^2), which
    makes it the mean of z given z_s, if z is standard normal; 1 - s, appended, tells the decoder
    how much to rely on it.
    So at s = 1 the condition is zero, as without one: classifier-free guidance is possible.
    differs from the paper: there the embedding has no noise (Ho et al. 2022 noise their condition).
    """
    signal = (1 - noise_level ** 2).sqrt()
    return torch.cat([signal * (signal * z + noise_level * noise), 1 - noise_level], dim=1)


def decoder_denoiser(unet, alpha_bar, z, scale, interval=(1, T), noise_level=0., noise=0.):
    """Build a denoiser conditional on image embeddings

    z: (B, E), scaled; noise_level: from 0 to 1, and noise: see decoder_condition; scale, interval:
    see classifier_free
    """
    cond = decoder_condition(z, z.new_full((len(z), 1), noise_level), noise)
    return classifier_free(unet, alpha_bar, cond, scale, interval)


# ---- the upsampler: from a small image to a large one --------------------------------------------

@dataclass
class UpsamplerConfig:
    channels: int = 64
    blocks: int = 8
    image_size: int = 128   # pixels of the large images; the small ones have a quarter of that

    def __post_init__(self):
        if self.channels < 32 or self.blocks < 1 or self.image_size < 4 or self.image_size % 4:
            raise ValueError("channels must be at least 32, blocks at least 1, image_size a "
                             "multiple of 4")


class UpsamplerBlock(nn.Module):
    """Residual block: conv, scale and shift by the condition (FiLM: Perez et al. 2018), SiLU, conv;
    no normalisation, which would lose the absolute colours (Lim et al. 2017, arXiv 1707.02921).

    x: (B, C, H, W), cond: (B, 2) -> (B, C, H, W)
    """

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.cond_proj = zero_init(nn.Linear(2, 2 * channels))
        self.conv2 = zero_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, cond):
        scale, shift = self.cond_proj(cond)[:, :, None, None].chunk(2, dim=1)
        return x + self.conv2(F.silu(self.conv1(x) * (1 + scale) + shift))


class Upsampler(nn.Module):
    """Residual network: doubles the size of images, and is applied twice.

    It predicts what bicubic interpolation lacks. All layers work at the small size; the last makes
    12 channels of it, which PixelShuffle lays out as 2 x 2 pixels of 3 (Shi et al. 2016).
    differs from unCLIP: regression in one pass, no diffusion, which takes four or more, has a lower
    PSNR (27.7, not 29.7 dB) and speckles (experiments/UNCLIP.md).
    """

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.channels
        self.conv_in = nn.Conv2d(3, C, 3, padding=1)
        self.blocks = nn.ModuleList(UpsamplerBlock(C) for _ in range(config.blocks))
        self.conv_out = zero_init(nn.Conv2d(C, 12, 3, padding=1))

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """Rebuild a trained upsampler from the dictionary in weights.pt, in eval mode."""
        upsampler = cls(UpsamplerConfig(**checkpoint["config"]))
        upsampler.load_state_dict(checkpoint["weights"])
        return upsampler.eval().requires_grad_(False)

    def forward(self, low, aug_level, second):
        """low: (B, 3, H, W); aug_level: (B,), t / T if low was redrawn from timestep t, 0 if it is
        real; second: whether this is the second doubling -> (B, 3, 2H, 2W)"""
        cond = torch.stack([aug_level, torch.full_like(aug_level, second)], dim=1)   # (B, 2)
        h = self.conv_in(low)                                                 # (B, C, H, W)
        for block in self.blocks:
            h = block(h, cond)
        residual = F.pixel_shuffle(self.conv_out(h), 2).float()               # (B, 3, 2H, 2W)
        return enlarge(low) + residual


def enlarge(low):
    """Double the size by bicubic interpolation: (B, 3, H, W) -> (B, 3, 2H, 2W)"""
    return F.interpolate(low, scale_factor=2, mode="bicubic")


def redraw(denoise, low, t, eps, alpha_bar):
    """Noise images up to timestep t and denoise them, so that they show a sampler's artefacts

    low: (B, 3, H, W), t: int, eps: standard normal like low -> (B, 3, H, W). (SDEdit: Meng et al.
    2021, arXiv 2108.01073.) From pairs of redrawn and real images the upsampler learns to
    remove these.
    """
    x_t = q_sample(low, torch.full((len(low),), t, device=low.device), eps, alpha_bar)
    # `sample` starts at the last entry of alpha_bar, here t; its steps span at most 50 timesteps.
    return sample(denoise, x_t, None, alpha_bar[:t + 1], steps=1 + t // 50, eta=0.)


def match_average(high, low):
    """Shift each block of pixels of a large image so that its average is the small one's pixel.

    high: (B, 3, kH, kW), low: (B, 3, H, W) -> like high
    """
    difference = low - F.interpolate(high, low.shape[-2:], mode="area")
    return high + F.interpolate(difference, high.shape[-2:])


# aug_level for sampled images: at .05 torn edges become smooth; more blurs (experiments/UNCLIP.md)
SAMPLED_AUG_LEVEL = 0.05


def upsample(upsampler, low, size, aug_level=0.):
    """Double images until they have size x size pixels -> (B, 3, size, size) in [-1, 1]

    low: (B, 3, H, H) in [-1, 1]; size: H, 2H or 4H; aug_level: see Upsampler. At 0, for real
    images, the average of each block becomes the pixel of low, as far as [-1, 1] allows.
    """
    high, levels = low, low.new_full((len(low),), aug_level)
    while high.shape[-1] < size:
        high = upsampler(high, levels, second=high.shape[-1] > low.shape[-1])
    return (high if aug_level else match_average(high, low)).clamp(-1, 1)


# ---- interpolation and text diffs ----------------------------------------------------------------

def slerp(a, b, fraction):
    """Interpolate on the arc between vectors (Shoemake 1985) -> like a; fraction 0 is a, 1 is b

    a, b: (B, ...), each flattened to one vector; the length changes linearly.
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = F.cosine_similarity(flat_a, flat_b).clamp(-1, 1)[:, None]        # (B, 1)
    angle = cosine.acos().clamp(1e-4, math.pi - 1e-4)   # so that its sine is not 0
    length_a, length_b = (x.norm(dim=1, keepdim=True) for x in (flat_a, flat_b))
    direction = (torch.sin((1 - fraction) * angle) * flat_a / length_a
                 + torch.sin(fraction * angle) * flat_b / length_b) / angle.sin()
    return (((1 - fraction) * length_a + fraction * length_b) * direction).view_as(a)


def slerp_path(x, n):
    """Interpolate in n even steps; x: (2, ...) -> n from x[0] to x[1], (n, ...)"""
    return torch.cat([slerp(x[:1], x[1:], f) for f in torch.linspace(0, 1, n).tolist()])


def text_diff(z, text_from, text_to, fraction):
    """Move an image embedding in the direction from one text to another (Ramesh et al., 3.3)

    z: (B, E), scaled; text_from, text_to: (B, E), different text features; fraction: 0 is z, at .5
    most images have changed -> (B, E)
    """
    difference = scale_features(text_to) - scale_features(text_from)
    return slerp(z, scale_features(difference), fraction)


if __name__ == "__main__":   # a prior of two captions, whose embeddings have two numbers
    from tinyddpm import cosine_alpha_bar, ddpm_loss, stratified_timesteps

    torch.manual_seed(0)
    alpha_bar = cosine_alpha_bar()
    means, stds = torch.tensor([[1., 1.], [-1., 1.]]), torch.tensor([[.5], [.1]])
    texts = means + .1   # text features are near the mean image embeddings
    prior = Prior(PriorConfig(clip_dim=2, width=64, blocks=2))
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for step in range(500):
        ids = torch.randint(2, (256,))
        z = means[ids] + stds[ids] * torch.randn(256, 2)
        t = stratified_timesteps(256, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ddpm_loss(prior, z[:, :, None, None], t, torch.randn(256, 2, 1, 1), alpha_bar,
                  texts[ids]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        for text, mean, std in zip(texts, means.tolist(), stds):
            generators = [torch.Generator().manual_seed(i) for i in range(500)]
            z = sample_prior(prior, text.expand(500, 2), generators, alpha_bar, draws=1)
            print(f"drawn: mean {z[:, 0].mean():5.2f}, {z[:, 1].mean():.2f}, standard deviation "
                  f"{z.std(dim=0).mean():.2f}; true: mean {mean[0]:5.2f}, {mean[1]:.2f}, "
                  f"standard deviation {std.item():.2f}")

# drawn: mean  0.98, 1.01, standard deviation 0.50; true: mean  1.00, 1.00, standard deviation 0.50
# drawn: mean -0.98, 1.01, standard deviation 0.07; true: mean -1.00, 1.00, standard deviation 0.10
