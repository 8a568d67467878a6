"""Chapter 1: a denoising diffusion model: schedule, U-Net, loss, and one sampling loop.

    Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (DDPM)
        arxiv.org/abs/2006.11239
    Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (cosine schedule)
        arxiv.org/abs/2102.09672
    Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models" (DDIM)
        arxiv.org/abs/2010.02502
    Salimans, Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (v)
        arxiv.org/abs/2202.00512
    Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models"
        arxiv.org/abs/2211.01095

The idea: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps mixes an image with noise. A
network learns to separate the two. A sampler starts from pure noise, asks the network for its
estimate x_0_hat of the clean image, and moves a small step towards it, again and again.

Timesteps are t = 1..T, T = 1000; alpha_bar has T + 1 entries and alpha_bar[0] = 1 is the clean
image. Images are float in [-1, 1]. A hat marks every estimate.
Shapes: B batch, C channels, H x W pixels, D width of the time embedding.

This file imports only torch: copy it and it works. `python tinyddpm.py` learns a spiral.
Left out: learned variances, cross-attention to words.
"""
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

T = 1000   # number of diffusion timesteps


# ---- the forward process: from image to noise ----------------------------------------------------

def cosine_alpha_bar(T=T):
    """Compute the cosine noise schedule (Nichol & Dhariwal 2021 eq. 17).

    -> alpha_bar: (T + 1,) float32, falling from alpha_bar[0] = 1 to almost 0

    alpha_bar_t = f(t) / f(0), f(t) = cos((t/T + s) / (1 + s) * pi/2)^2; s = 0.008 keeps beta_t from
    being tiny near t = 0, where eps is hard to predict. beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
    is clipped at 0.999, so that alpha_bar_T is 2e-9, not 0. To try another schedule, change the
    body of this function and retrain both models (--fresh): all else calls it, and weights do not
    record the schedule.
    """
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1), torch.cumprod(1 - beta, 0).float()])


def extract(alpha_bar, t):
    """Look up alpha_bar for each image of a batch.

    alpha_bar: (T + 1,), t: (B,) int in 0..T -> (B, 1, 1, 1), to multiply images with
    """
    return alpha_bar[t].view(-1, 1, 1, 1)


def q_sample(x_0, t, eps, alpha_bar):
    """Noise images up to timestep t, in one go (Ho et al. 2020 eq. 4).

    x_0: (B, 3, H, W), t: (B,) int in 0..T, eps: standard normal like x_0 -> x_t: (B, 3, H, W)

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Why one go is enough: the chain is
    x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t. Insert the same for x_{t-1}, and so on down
    to x_0: its factor is sqrt((1 - beta_t) ... (1 - beta_1)) = sqrt(alpha_bar_t). Independent
    Gaussians add up to a Gaussian whose variance is the sum; if x_{t-1} has noise of variance
    1 - alpha_bar_{t-1}, then x_t has (1 - beta_t)(1 - alpha_bar_{t-1}) + beta_t = 1 - alpha_bar_t.
    """
    a = extract(alpha_bar, t)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


# ---- the U-Net -----------------------------------------------------------------------------------

@dataclass
class UNetConfig:
    channels: int = 32               # of the finest level
    multipliers: tuple = (1, 2, 4)   # of channels, one per level; half the resolution each time
    blocks: int = 1                  # residual blocks per level going down; coming up, one more
    attention: tuple = (2,)          # levels with self-attention; 0 is the finest
    dropout: float = 0.0             # in the residual blocks
    in_channels: int = 3             # more if another image is concatenated to x_t (upsampling)
    cond_dim: int = 0                # width of the condition, such as a text feature; 0: none
    image_size: int = 32             # pixels, H and W of the training images

    def __post_init__(self):
        widths = [self.channels * m for m in self.multipliers]
        if not set(self.attention) <= set(range(len(widths))):
            raise ValueError(f"attention {self.attention}: there are levels 0 to {len(widths) - 1}")
        attends = [widths[level] for level in (*self.attention, -1)]
        if any(width % 16 or width < 1 for width in widths) or any(width % 32 for width in attends):
            raise ValueError(f"channels x multipliers are {widths}; each must be a multiple of 16, "
                             "and of 32 where there is attention, as always at the last level")
        if self.image_size < 1 or self.image_size % 2 ** (len(widths) - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(widths) - 1} "
                             "times; use fewer multipliers")
        if self.blocks < 1 or not 0 <= self.dropout < 1:
            raise ValueError("blocks must be at least 1, dropout from 0 to less than 1")


def timestep_embedding(t, dim):
    """Embed timesteps as sines and cosines of dim/2 frequencies (Ho et al. 2020, sec. 4).

    t: (B,) int -> (B, dim); the frequencies fall from 1 to about 1/10000, evenly in their logarithm
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * frequency                                    # (B, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(channels):
    """Normalise groups of 16 channels (Wu & He 2018); smaller groups are slow in bf16 on a CPU."""
    return nn.GroupNorm(channels // 16, channels)


def zero_init(layer):
    """Set a layer to zero, so that at first a block is its skip connection, and v_hat is 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Residual block: norm, SiLU, conv, norm, scale and shift by the time embedding, SiLU, conv.

    x: (B, c_in, H, W), time: (B, D) -> (B, c_out, H, W)

    Scale and shift are adaptive group normalisation (Dhariwal & Nichol 2021); Ho et al. 2020 add
    the embedding.
    """

    def __init__(self, c_in, c_out, time_dim, dropout):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, 2 * c_out)
        self.norm2 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))                                 # (B, c_out, H, W)
        scale, shift = self.time_proj(time)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Self-attention over all positions, heads of 32 channels, plus the input.

    x: (B, C, H, W) -> (B, C, H, W)

    softmax(q k^T / sqrt(32)) v (Vaswani et al. 2017 eq. 1), written out: at 8 x 8 positions on a
    CPU it trains faster than F.scaled_dot_product_attention.
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        B, C, H, W = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)        # (B, HW, C)
        qkv = self.qkv(tokens).view(B, H * W, 3, C // 32, 32)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # (B, heads, HW, 32)
        weights = (q @ k.transpose(-2, -1) * 32 ** -0.5).softmax(dim=-1)      # (B, heads, HW, HW)
        values = (weights @ v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(values).permute(0, 3, 1, 2)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015; Ho et al. 2020, app. B): predicts v from x_t and t.

    Down through levels of falling resolution and back up: with the default config 32 channels of 32
    x 32, 64 of 16 x 16, 128 of 8 x 8 and back. Skip connections: each layer's output on the way
    down is concatenated to the input of its counterpart on the way up.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]   # channels of each level
        D = 4 * config.channels

        def block_and_attention(c_in, level):
            return nn.ModuleList([
                ResBlock(c_in, widths[level], D, config.dropout),
                SelfAttention(widths[level]) if level in config.attention else nn.Identity()])

        self.time_mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        if config.cond_dim:   # without a bias: cond = 0 is the same as no condition
            self.cond_proj = zero_init(nn.Linear(config.cond_dim, D, bias=False))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c = widths[0]    # channels of h as it flows through forward()
        skip_channels = [c]

        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(block_and_attention(c, level))
                c = width
                skip_channels.append(c)
            if level < len(widths) - 1:   # downsample
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skip_channels.append(c)

        self.mid = nn.ModuleList([
            ResBlock(c, c, D, config.dropout), SelfAttention(c), ResBlock(c, c, D, config.dropout)])

        for level, width in reversed(list(enumerate(widths))):
            # One block more than down, for the skip connection of the layer that entered the level.
            for _ in range(config.blocks + 1):
                self.up.append(block_and_attention(c + skip_channels.pop(), level))
                c = width
            if level > 0:   # fewer channels before upsampling, not after: less computation
                self.up.append(nn.Conv2d(c, widths[level - 1], 3, padding=1))
                c = widths[level - 1]

        self.conv_out = nn.Sequential(
            group_norm(c), nn.SiLU(), zero_init(nn.Conv2d(c, 3, 3, padding=1)))

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """Rebuild a trained U-Net from the dictionary in weights.pt, in eval mode."""
        unet = cls(UNetConfig(**checkpoint["config"]))
        unet.load_state_dict(checkpoint["weights"])   # fp16, copied into float32
        return unet.eval().requires_grad_(False)

    def forward(self, x_t, t, cond=None):
        """Predict v.

        x_t: (B, in_channels, H, W), t: (B,) int in 1..T, cond: (B, cond_dim) or None for
        unconditional -> v_hat: (B, 3, H, W). H and W must be divisible by 2^(levels - 1).
        """
        time = self.time_mlp(timestep_embedding(t, self.time_mlp[0].in_features))   # (B, D)
        if cond is not None:
            time = time + self.cond_proj(cond)
        h = self.conv_in(x_t)                                                 # (B, C, H, W)
        skips = [h]
        for layer in self.down:
            if isinstance(layer, nn.ModuleList):
                block, attention = layer
                h = attention(block(h, time))
            else:
                h = layer(h)                                                  # (B, C, H/2, W/2)
            skips.append(h)

        block1, attention, block2 = self.mid
        h = block2(attention(block1(h, time)), time)

        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                block, attention = layer
                h = attention(block(torch.cat([h, skips.pop()], dim=1), time))
            else:
                h = F.interpolate(layer(h), scale_factor=2.0)                 # (B, C, 2H, 2W)
        return self.conv_out(h)                                               # (B, 3, H, W)


# ---- training ------------------------------------------------------------------------------------

def stratified_timesteps(batch, generator):
    """Draw one timestep from each of B equal parts of 1..T -> t: (B,) int in 1..T, ascending

    The loss has a lower variance than with B independent draws (compare the low-discrepancy sampler
    of Kingma et al. 2021, arXiv 2107.00630). The images of a batch must be in random order.
    """
    u = torch.rand(batch, generator=generator, device=generator.device)       # in [0, 1)
    part = torch.arange(batch, device=generator.device)
    return ((part + u) * (T / batch)).long().clamp(max=T - 1) + 1   # rounding can give T


def ddpm_loss(unet, x_0, t, eps, alpha_bar, cond=None):
    """Compute the mean squared error of v_hat per image (L_simple, Ho et al. 2020 eq. 14, with v).

    x_0: (B, 3, H, W), t: (B,) int in 1..T, eps: standard normal like x_0, cond: see UNet -> (B,)

    Where it comes from: the variational bound on -log p(x_0) is a sum over t of KL divergences
    (Ho et al. eq. 5) between two Gaussians of equal variance: the posterior q(x_{t-1} | x_t, x_0),
    and the model, which is the same with x_0_hat for x_0. Each KL is the squared distance between
    their means over twice the variance (eq. 8): with both as ddim_step below derives them,
        w |x_0 - x_0_hat|^2,   w = (SNR_{t-1} - SNR_t) / 2,   SNR = alpha_bar / (1 - alpha_bar).
    Training replaces w: by SNR if the loss is |eps - eps_hat|^2, because q_sample gives
    eps - eps_hat = sqrt(SNR) (x_0_hat - x_0); by SNR + 1 if it is |v - v_hat|^2, likewise; by 1 if
    it is |x_0 - x_0_hat|^2. That is no longer a bound, but for each t the minimum is the same:
    v_hat = E[v | x_t], so x_0_hat = E[x_0 | x_t], an average, hence blurred where t is large.

    differs from the paper: the network predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    (Salimans & Ho 2022, sec. 4). Write c = sqrt(alpha_bar), s = sqrt(1 - alpha_bar): x_t = c x_0 +
    s eps and v = c eps - s x_0 are (x_0, eps) rotated, as c^2 + s^2 = 1. Rotated back, x_0 = c x_t
    - s v. From eps it would be x_0 = (x_t - s eps) / c, and 1 / c = 2e4 at T multiplies every
    error. A loss on x_0 weighs all t alike, and so neglects small t, where w is largest and details
    are made.
    """
    a = extract(alpha_bar, t)
    v = a.sqrt() * eps - (1 - a).sqrt() * x_0
    x_t = q_sample(x_0, t, eps, alpha_bar)
    v_hat = unet(x_t, t, cond)
    return (v_hat.float() - v).square().mean(dim=(1, 2, 3))   # v_hat may be bf16


@torch.no_grad()
def ema_update(ema, model, step):
    """Update the moving average (EMA) of the parameters, in place; step = 1, 2, ...

    Power-function EMA (Karras et al. 2024, arXiv 2312.02696, eq. 2): decay =
    (1 - 1/step)^(gamma + 1), so step s has a weight proportional to s^gamma. Those weights spread
    over a fixed fraction of the training so far, and the beginning is forgotten. Their standard
    deviation is sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2) of the training so far: 10 % with
    gamma = 6.94.
    """
    decay = (1 - 1 / step) ** (6.94 + 1)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- one step of sampling ------------------------------------------------------------------------

def denoiser(unet, alpha_bar, cond=None):
    """Turn a U-Net that predicts v into a denoiser.

    -> denoise(x_t, t) = x_0_hat = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v_hat
    x_t: (B, 3, H, W), t: (B,) int in 1..T, cond: see UNet -> x_0_hat: (B, 3, H, W), not clamped
    """
    def denoise(x_t, t):
        a = extract(alpha_bar, t)
        return a.sqrt() * x_t - (1 - a).sqrt() * unet(x_t, t, cond).float()
    return denoise


def predict_eps(x_t, x_0_hat, a):
    """Solve q_sample for the noise: eps_hat = (x_t - sqrt(a) x_0_hat) / sqrt(1 - a), a: alpha_bar_t
    """
    return (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt()


def ddim_step(x_t, x_0_hat, t, t_next, alpha_bar, eta, z):
    """Step from t to t_next < t (DDIM, Song et al. 2021 eq. 12) -> x at t_next.

    x_t, x_0_hat, z: (B, C, H, W), z standard normal (0. will do for eta = 0); t, t_next: int
    eta in [0, 1] scales sigma (eq. 16): 0 is deterministic; 1 is the DDPM if t_next = t - 1.

    x at t_next must be sqrt(a_next) x_0 plus noise of variance 1 - a_next. That noise is the sum of
    two: fresh noise sigma z, and eps_hat, scaled to the remaining variance 1 - a_next - sigma^2.
    The sum has the right variance for every sigma. The DDPM takes the posterior q(x_{t-1} | x_t,
    x_0), the normalised product of the two Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x_0) (Ho et
    al. 2020 eq. 7): with alpha = 1 - beta = a / a_next
        mean      (sqrt(a_next) beta x_0 + sqrt(alpha) (1 - a_next) x_t) / (1 - a)
        variance  beta (1 - a_next) / (1 - a),
    which is this step with eta = 1: sigma^2 is that variance, and 1 - a_next - sigma^2 = alpha (1 -
    a_next)^2 / (1 - a). Insert eps_hat = (x_t - sqrt(a) x_0) / sqrt(1 - a), and the other two terms
    add up to that mean. In the last step a_next = 1, so sigma = 0, and x_0_hat is returned. With
    alpha_bar[0] < 1 the sampler would end at an image with noise left in it.
    """
    a, a_next = alpha_bar[t], alpha_bar[t_next]
    eps_hat = predict_eps(x_t, x_0_hat, a)
    sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
    direction = (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * eps_hat   # to x_t
    return a_next.sqrt() * x_0_hat + direction + sigma * z


def multistep_x_0(x_0_hat, x_0_prev, t_prev, t, t_next, alpha_bar):
    """Extrapolate x_0_hat half a step ahead (DPM-Solver++ 2M, Lu et al. 2022, Alg. 2).

    x_0_hat: at t, x_0_prev: at t_prev, (B, C, H, W); t_prev > t > t_next > 0: int
    -> x_0_hat + 1/2 (h / h_prev) (x_0_hat - x_0_prev), h = lambda_{t_next} - lambda_t, h_prev
    likewise, lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)) = logit(alpha_bar_t) / 2,
    half the log-SNR.

    "2M": of second order, multistep: it reuses the step before, and costs no further evaluation.
    Why lambda is the clock: e^lambda = sqrt(a) / sqrt(1 - a). Write eps_hat in ddim_step (eta = 0)
    as (x_t - sqrt(a) x_0_hat) / sqrt(1 - a), divide by sqrt(1 - a_next), and it reads
        x_next / sqrt(1 - a_next) = x_t / sqrt(1 - a) + x_0_hat (e^lambda_next - e^lambda_t).
    The last term is the integral of e^lambda x_0_hat from lambda_t to lambda_next if x_0_hat is
    constant (first order). If it is linear in lambda, the constant that gives the same integral is
    its value half a step ahead, up to a third-order error: hence h / 2 times its slope. For eta =
    1, the default, multiply both sides by e^lambda_next as well; ddim_step then reads
        x_next e^lambda_next / sqrt(1 - a_next) = x_t e^lambda_t / sqrt(1 - a)
            + x_0_hat (e^(2 lambda_next) - e^(2 lambda_t)) + noise,
    an integral of 2 e^(2 lambda) x_0_hat, and half a step ahead is right again (SDE-DPM-Solver++).
    For eta in between it is a heuristic.
    """
    lambda_prev, lambda_t, lambda_next = alpha_bar[[t_prev, t, t_next]].logit() / 2
    half_ratio = 0.5 * (lambda_next - lambda_t) / (lambda_t - lambda_prev)
    return x_0_hat + half_ratio * (x_0_hat - x_0_prev)


# ---- the sampling loops --------------------------------------------------------------------------

def randn_per_image(generators, shape, device="cpu"):
    """Draw standard normal noise from each image's own CPU generator.

    -> (B, *shape); an image's noise does not depend on what else is in its batch
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def ddpm_sample(eps_model, x_T, generators, alpha_bar):
    """Sample as Algorithm 2 of Ho et al. 2020 is printed, T steps; sigma_t^2 is the posterior's.

    eps_model(x_t, t) -> eps_hat, such as predict_eps(x_t, denoise(x_t, t), extract(alpha_bar, t));
    x_T: (B, C, H, W); B generators -> x_0. For reading: `sample` below generalises it to any number
    of steps, with clamping and extrapolation.
    """
    x_t = x_T
    for t in range(len(alpha_bar) - 1, 0, -1):
        z = randn_per_image(generators, x_t.shape[1:], x_t.device) if t > 1 else 0.
        alpha = alpha_bar[t] / alpha_bar[t - 1]
        sigma = ((1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * (1 - alpha)).sqrt()
        eps_hat = eps_model(x_t, torch.full((len(x_t),), t, device=x_t.device))
        x_t = (x_t - (1 - alpha) / (1 - alpha_bar[t]).sqrt() * eps_hat) / alpha.sqrt() + sigma * z
    return x_t


def ddim_timesteps(T, steps):
    """List the steps + 1 timesteps that a sampler visits, evenly from T down to 0."""
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


def sample(denoise, x_T, generators, alpha_bar, steps=50, eta=1.0, clamp=True, recurrence=1,
           callback=None):
    """Sample images: denoise, clamp, extrapolate, step. All commands use this loop.

    denoise(x_t, t): (B, C, H, W), (B,) int -> x_0_hat: (B, C, H, W); a guided denoiser is one too
    x_T: (B, C, H, W) standard normal; generators: B CPU generators, for the noise that eta > 0 and
    recurrence > 1 add (else None) -> x_0: (B, C, H, W)
    clamp: keep x_0_hat in [-1, 1], the range of images; it comes after guidance, so an overshooting
    gradient saturates pixels and does not diverge. recurrence: how often each step but the last is
    taken (Bansal et al. 2023 eq. 10). callback(t, x_t, x_0_hat): called in every step.

    differs from the papers: a step uses multistep_x_0 in place of x_0_hat, unless it is the first,
    the last or a repeat. So eta = 0 is DPM-Solver++(2M) in place of DDIM, eta = 1 its SDE form in
    place of DDPM: 50 steps are as good as 100 plain ones (experiments/LOG.md). (With recurrence 2
    that leaves the first pass of each step, whose result is then noised again.)
    eta = 1 is the default because fresh noise in every step overwrites earlier errors, those of
    guidance above all; so does recurrence. Deterministic sampling (eta = 0) carries them along.
    Gradients are not switched off here: use torch.no_grad() unless you want them.
    """
    x_t, t_prev, x_0_prev = x_T, None, None
    for t, t_next in itertools.pairwise(ddim_timesteps(len(alpha_bar) - 1, steps)):
        for repeat in range(recurrence if t_next > 0 else 1):   # the last step ends at t = 0
            if repeat:   # re-noise from t_next to t; the multistep history is no longer valid
                alpha = alpha_bar[t] / alpha_bar[t_next]
                z = randn_per_image(generators, x_t.shape[1:], x_t.device)
                x_t, t_prev = alpha.sqrt() * x_t + (1 - alpha).sqrt() * z, None

            x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
            if clamp:
                x_0_hat = x_0_hat.clamp(-1, 1)
            if callback:
                callback(t, x_t, x_0_hat)

            x_0_target = x_0_hat   # extrapolated, it may leave [-1, 1] a little
            if t_prev is not None and t_next > 0:   # at t = 0 lambda is infinite
                x_0_target = multistep_x_0(x_0_hat, x_0_prev, t_prev, t, t_next, alpha_bar)
            z = randn_per_image(generators, x_t.shape[1:], x_t.device) if eta > 0 else 0.
            x_t = ddim_step(x_t, x_0_target, t, t_next, alpha_bar, eta, z)
            t_prev, x_0_prev = t, x_0_hat
    return x_t


# ---- inversion (skip at first) -------------------------------------------------------------------

T_INVERT = 20   # where inversion starts; the noise of x_t has a standard deviation of .04


def invert(denoise, x_0, eps, alpha_bar, steps=25):
    """Find the noise from which deterministic sampling draws these images -> x_T: (B, C, H, W)

    x_0, eps: (B, C, H, W), eps standard normal (or zero, see below); sample(..., eta=0) leads back
    to about x_0

    As x_t = cos(phi) x_0 + sin(phi) eps with cos(phi) = sqrt(alpha_bar), an image turns into noise
    by a rotation, whose velocity is what the network predicts (Salimans & Ho 2022, app. D):
        dx_t / dphi = cos(phi) eps - sin(phi) x_0 = v = (cos(phi) x_t - x_0) / sin(phi).
    With x_0_hat for x_0, that is the ODE behind DDIM (Song et al. 2021 eq. 14). Heun's method
    follows it with the mean of v before and after each step, so a step evaluates denoise twice.
    Inversion begins at t = 20, with the image noised by eps. Every x_t of training is noisy, and
    x_0 is not: from x_0 itself, or with eps = 0, a flat background stays flat, and x_T has a
    standard deviation of about .5, not 1. Most of eps is found again in x_T, and the image in the
    rest.
    """
    phi = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())

    def velocity(x_t, t):
        x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        return (phi[t].cos() * x_t - x_0_hat) / phi[t].sin()

    x_t = q_sample(x_0, torch.full((len(x_0),), T_INVERT, device=x_0.device), eps, alpha_bar)
    timesteps = torch.linspace(T_INVERT, len(alpha_bar) - 1, steps + 1).round().long().tolist()
    for t, t_next in itertools.pairwise(timesteps):
        step, v = phi[t_next] - phi[t], velocity(x_t, t)
        x_t = x_t + step * (v + velocity(x_t + step * v, t_next)) / 2
    return x_t


# ---- demonstration: the same in the plane --------------------------------------------------------

def swiss_roll(n, generator):
    """Draw points of a spiral as "images" of two channels and one pixel -> (n, 2, 1, 1) in [-1, 1]
    """
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 15
    return (points + 0.01 * torch.randn(n, 2, generator=generator))[:, :, None, None]


class PointMLP(nn.Module):
    """An MLP of Fourier features in the U-Net's place: x_t (B, 2, 1, 1), t (B,) int -> v_hat"""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 12 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x_t, t, cond=None):
        x = x_t.flatten(1)                                                    # (B, 2)
        waves = torch.cat([math.pi * x, 2 * math.pi * x, 4 * math.pi * x], dim=1)
        features = [x, waves.sin(), waves.cos(), timestep_embedding(t, 32)]
        return self.layers(torch.cat(features, dim=1)).view_as(x_t)


def train_on_swiss_roll(steps=4000):
    """Train a PointMLP on the spiral, ten seconds on a CPU -> the network"""
    torch.manual_seed(0)
    generator, alpha_bar, net = torch.Generator().manual_seed(0), cosine_alpha_bar(), PointMLP()
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(steps):
        x_0, t = swiss_roll(256, generator), stratified_timesteps(256, generator)
        eps = torch.randn(x_0.shape, generator=generator)
        loss = ddpm_loss(net, x_0, t, eps, alpha_bar).mean()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)


def ascii_plot(points, width=48, height=22):
    """Format points (n, 2, 1, 1) in [-1, 1] as lines of text."""
    columns, rows = (((p + 1) / 2).clamp(0, 0.999) for p in points.flatten(1).unbind(dim=1))
    counts = torch.zeros(height, width)
    cells = (height * (0.999 - rows)).long(), (width * columns).long()
    counts.index_put_(cells, torch.ones(len(points)), accumulate=True)
    return "\n".join("".join(" .:#"[min(3, int(n))] for n in row) for row in counts)


if __name__ == "__main__":
    alpha_bar, net = cosine_alpha_bar(), train_on_swiss_roll()
    generators = [torch.Generator().manual_seed(i) for i in range(1000)]
    x_T = randn_per_image(generators, (2, 1, 1))
    spiral = swiss_roll(2000, torch.Generator().manual_seed(1))
    for steps in (2, 5, 10, 100):
        x_0 = sample(denoiser(net, alpha_bar), x_T, generators, alpha_bar, steps, eta=0.)
        distance = torch.cdist(x_0.flatten(1), spiral.flatten(1)).min(dim=1).values.mean()
        print(f"{steps:4} steps: {distance:.3f} from the spiral, on average")
    print(ascii_plot(x_0))

#    2 steps: 0.162 from the spiral, on average
#    5 steps: 0.108 from the spiral, on average
#   10 steps: 0.046 from the spiral, on average
#  100 steps: 0.007 from the spiral, on average
# and the spiral itself, drawn with dots
