"""Chapter 3: guidance. A guided denoiser is a denoiser.

    Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (classifier guidance)
        arxiv.org/abs/2105.05233
    Nichol et al. 2021, "GLIDE", sec. 2.4 (guidance by a noised CLIP)
        arxiv.org/abs/2112.10741
    Bansal et al. 2023, "Universal Guidance for Diffusion Models" (through x_0_hat)
        arxiv.org/abs/2302.07121
    Ho, Salimans 2022, "Classifier-Free Diffusion Guidance"
        arxiv.org/abs/2207.12598
    Karras et al. 2024, "Guiding a Diffusion Model with a Bad Version of Itself" (autoguidance)
        arxiv.org/abs/2406.02507
    Song et al. 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems" (r_t)
        openreview.net/forum?id=9_gsMA8MRKQ
    Wallace et al. 2023, "End-to-End Diffusion Latent Optimization Improves ..." (x_T)
        arxiv.org/abs/2303.13703
    Crowson 2021, notebooks for CLIP-guided diffusion (the spherical distance)

The diffusion model has learned p(x), what cars look like; CLIP has learned p(text | x). By Bayes'
rule p(x | text) is proportional to p(x) p(text | x). Scores, gradients of log-densities, add up:

    grad log p(x_t | text) = grad log p(x_t) + grad log p(text | x_t).                           (1)

Tweedie's formula turns a score into a denoised image and back:

    score = (sqrt(alpha_bar) x_0_hat - x_t) / (1 - alpha_bar).                                   (2)

(Why: for one x_0, log p(x_t | x_0) = -|x_t - sqrt(alpha_bar) x_0|^2 / (2 (1 - alpha_bar)) + const
has the gradient (sqrt(alpha_bar) x_0 - x_t) / (1 - alpha_bar). p(x_t) is the mean of such densities
over p(x_0), so its score, grad p(x_t) / p(x_t), is the integral of p(x_0) p(x_t | x_0) / p(x_t)
times these gradients: their mean over p(x_0 | x_t). And the mean of x_0 over p(x_0 | x_t) is what
the network was trained to predict: x_0_hat.)
(2) holds for p(x_t | text) too, with the mean of x_0 given x_t and the text. Insert both into (1):

    guided x_0_hat = x_0_hat + (1 - alpha_bar) / sqrt(alpha_bar) grad log p(text | x_t).         (3)

That is classifier guidance; the methods below differ in what stands for log p(text | x_t). `guided`
is formula (3) and returns a denoiser again, so it works with any sampler, eta and number of steps.

A method of guidance is a function log_p(x_t, t, x_0_hat) -> (B,): log p(text | x_t) up to a
constant, or what stands for it. Its gradient is added, never subtracted. The functions below make
a log_p from a CLIP and a target; METHODS at the end names them, with their scales.

Shapes: B images, K captions, E embedding width, A attributes; x_t, x_0_hat, grad (B, 3, H, W);
t (B,) int in 1..T, the same for the whole batch; text_features (K, E) of all captions; targets (B,)
int in 0..K-1, the caption that each image should have; labels (K, A) int, the attributes that each
caption names, such as body and colours, -1 for none (if none are known, A = 1: the caption's own
index).
"""
import functools
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tinyddpm import (cosine_alpha_bar, denoiser, extract, predict_eps, q_sample, randn_per_image,
                      sample)


def guided(denoise, log_p, alpha_bar, scale, interval=(1, math.inf), through_unet=False):
    """Guide a denoiser by the gradient of log_p -> a denoiser

    x_0_hat + scale (1 - alpha_bar)/sqrt(alpha_bar) grad, grad = d sum(log_p) / d x_t: formula (3).
    The same as eps_hat - scale sqrt(1 - alpha_bar) grad (Dhariwal & Nichol 2021, Alg. 2); minus,
    because eps_hat is -sqrt(1 - alpha_bar) times the score.

    scale: 0 is unguided; 1 is Bayes' rule if log_p is log p(text | x_t), as in the demonstration at
    the end. More sharpens the distribution: roughly to p(x) p(text | x)^scale, in practice somewhat
    further (see the demonstration). See METHODS for why the defaults are far larger.
    interval: (lo, hi), timesteps at which to guide, both included; t must be the same for the whole
    batch. Near T the factor explodes (6 at t = 900, 13 at 950, 2e4 at 1000) and multiplies the
    errors of the gradient. (Kynkaanniemi et al. 2024, arXiv 2404.07724, on guiding in an interval.)
    through_unet: back-propagate through denoise too, where log_p depends on x_0_hat. denoise must
    then not be one of this function, which are detached.
    Summing over the batch before the derivative is safe: no layer mixes images of a batch.
    """
    def guided_denoise(x_t, t):
        if not interval[0] <= int(t[0]) <= interval[1]:
            return denoise(x_t, t)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            with torch.set_grad_enabled(through_unet):
                x_0_hat = denoise(x, t)
            grad, = torch.autograd.grad(log_p(x, t, x_0_hat).sum(), x)
        a = extract(alpha_bar, t)
        return x_0_hat.detach() + scale * (1 - a) / a.sqrt() * grad
    return guided_denoise


# ---- log p(text | x_t), in six ways --------------------------------------------------------------

# CLIP's logits are divided by it, which softens the softmax that guidance follows. Tuned; from 5 to
# 20 it matters little: experiments/LOG.md. (CLIPConfig.max_logit_scale limits how certain CLIP may
# become in training.)
TEMPERATURE = 5.


def noise_aware(clip, text_features, targets, labels, temperature=TEMPERATURE):
    """Make log_p from CLIP's softmax over all captions, at the noise level of x_t.

    log_p = sum over attributes of log p(value | x_t), such as log p(body is a car) +
    log p(main colour is white) + log p(second colour is red): p(value | x_t) is
    the sum of p over the captions that have the target's value.
    With A = 1 this is log p(caption | x_t), whose gradient is that of the target's logit minus the
    mean of all logits' gradients, weighted by p: what counts is what distinguishes the target from
    similar captions. With more, every attribute that is still wrong has a gradient of its own. (As
    if attributes were independent given x_t: so Liu et al. 2022, arXiv 2206.01714, add concepts.)

    p = softmax(logits / temperature). At temperature 1 and A = 1 this is log p(text | x_t), and
    scale 1 is Bayes' rule. But CLIP is confident before the image is good, and the gradient
    vanishes with 1 - p. With a softened p it does not; multiplying log_p by temperature makes up
    for dividing the logits, which shrinks the gradient. (GLIDE takes the target's logit alone,
    without a softmax: nearly as good with lookahead.)
    """
    values = labels[targets][:, None]                                         # (B, 1, A)
    # Where the target names nothing (-1), no caption differs: the sum of all p is 1, its log 0.
    differs = (labels != values) & (values >= 0)                              # (B, K, A)

    def log_p(x_t, t, x_0_hat):
        logits = clip.logits(clip.encode_image(x_t, t), text_features, t)     # (B, K)
        log_softmax = (logits / temperature).log_softmax(dim=1)[:, :, None]
        log_value = log_softmax.masked_fill(differs, -torch.inf).logsumexp(dim=1)   # (B, A)
        return temperature * log_value.sum(dim=1)                             # (B,)
    return log_p


def noise_unaware(clip, text_features, targets, labels):
    """Make log_p from CLIP applied to x_t as if it were clean; for comparison.

    At large t the input is far from clean images, and CLIP is confidently wrong.
    """
    log_p = noise_aware(clip, text_features, targets, labels)
    return lambda x_t, t, x_0_hat: log_p(x_t, torch.zeros_like(t), x_0_hat)


def spherical(clip, text_features, targets, labels):
    """Make log_p = -logit_scale(t) theta^2 / 2, theta the angle between image and text features.

    Crowson 2021, where theta^2 / 2 is written 2 arcsin(distance / 2)^2. No other caption counts,
    and no labels.
    Near theta = 0 it is the target's logit, up to a constant: cos(theta) is about 1 - theta^2 / 2.
    The gradient of cos(theta) is proportional to sin(theta) instead, which vanishes near pi.
    """
    text = F.normalize(text_features.float(), dim=-1)[targets]                # (B, E)

    def log_p(x_t, t, x_0_hat):
        image = F.normalize(clip.encode_image(x_t, t).float(), dim=-1)        # (B, E)
        theta = 2 * ((image - text).norm(dim=1) / 2).asin()                   # (B,)
        return -clip.logit_scale(t)[:, 0] * theta ** 2 / 2
    return log_p


def x0(clip, text_features, targets, labels):
    """Make log_p from CLIP applied to x_0_hat at t = 0; for `guided` with through_unet=True.

    Universal guidance (Bansal et al. 2023 eq. 6). The gradient then has the factor
    d x_0_hat / d x_t, the U-Net's Jacobian. What that is: p(x_0 | x_t) is proportional to
    p(x_0) exp(-|x_t - sqrt(alpha_bar) x_0|^2 / (2 (1 - alpha_bar))). Expand the square, collect in
    h(x_0) what depends on x_0 alone, and it is proportional to h(x_0) exp(x_0 . y) with
    y = x_t sqrt(alpha_bar) / (1 - alpha_bar). The mean of this is x_0_hat, the integral of
    x_0 h exp(x_0 . y) over that of h exp(x_0 . y). By the quotient rule d x_0_hat / d y =
    E[x_0 x_0^T] - E[x_0] E[x_0]^T, the covariance Cov(x_0 | x_t). The factor d y / d x_t cancels
    that in `guided`, and x_0_hat changes by scale Cov(x_0 | x_t) d log_p / d x_0_hat: it moves in
    the directions in which images vary.
    """
    log_p = noise_aware(clip, text_features, targets, labels)
    return lambda x_t, t, x_0_hat: log_p(x_0_hat, torch.zeros_like(t), x_0_hat)


PIXEL_STD = 0.5   # s below


def lookahead_log_p(log_p, alpha_bar, t_fraction):
    """Apply log_p not to x_t but to the point that DDIM would reach at timestep t_fraction * t.

    As far as we know this is new. That point is x_0_hat, noised again by eps_hat, but less:
    t_fraction = 0 is x_0_hat itself, as in x0; 1 is x_t. In between CLIP is more accurate than on
    x_t, and the noise that is left drowns faint patterns by which a gradient can fool CLIP
    (adversarial examples).

    The gradient does not go through the U-Net: Cov(x_0 | x_t) in x0 is replaced by a scalar,
        r_t^2 = s^2 (1 - alpha_bar) / (1 - alpha_bar + s^2 alpha_bar),
    its value if pixels were independent and normal with standard deviation s: then
        1 / r_t^2 = 1 / s^2 + alpha_bar / (1 - alpha_bar),
    the precision of the prior and that of the likelihood. (They are not, and the default scale
    makes up for it: see METHODS. Song et al. 2023 choose r_t so, with s = 1. Pixels of the cars
    have a standard deviation of .61 about their mean, .34 about the mean image: about .5.) Then
    x_0_hat changes by scale r_t^2 times the gradient of log_p with respect to x_0_hat, eps_hat held
    constant. r_t^2 never exceeds s^2, whereas the factor in `guided` explodes, so guidance can
    start at t = T.
    """
    def log_p_ahead(x_t, t, x_0_hat):
        a, t_ahead = extract(alpha_bar, t), (t_fraction * t).long()
        s2 = PIXEL_STD ** 2
        r2 = s2 * (1 - a) / (1 - a + s2 * a)
        # The scalar that stands for d x_0_hat / d x_t. `guided` will multiply the gradient by
        # (1 - a) / sqrt(a), so that r2 remains.
        jacobian = r2 * a.sqrt() / (1 - a)
        # subtle: its value is x_0_hat, its derivative with respect to x_t is the jacobian.
        x_0_linear = x_0_hat.detach() + jacobian * (x_t - x_t.detach())
        eps_hat = predict_eps(x_t, x_0_hat, a).detach()
        return log_p(q_sample(x_0_linear, t_ahead, eps_hat, alpha_bar), t_ahead, x_0_hat)
    return log_p_ahead


T_FRACTION = 0.75   # found by a sweep: experiments/LOG.md


def lookahead(clip, text_features, targets, labels, t_fraction=T_FRACTION, temperature=TEMPERATURE):
    """Make log_p from noise-aware CLIP, applied at timestep t_fraction * t. The default method."""
    log_p = noise_aware(clip, text_features, targets, labels, temperature)
    return lookahead_log_p(log_p, cosine_alpha_bar().to(text_features.device), t_fraction)


# ---- guidance by a second denoiser ---------------------------------------------------------------

def scale_features(features):
    """Scale CLIP's features to length sqrt(E), entries of unit size, as networks need their inputs.

    features: (K, E) of texts or images -> (K, E)
    """
    return F.normalize(features.float(), dim=-1) * features.shape[-1] ** 0.5


def extrapolate(worse, better, scale, interval=(1, math.inf)):
    """Guide by the difference of two denoisers: x_0_hat_worse + scale (x_0_hat - x_0_hat_worse)

    -> a denoiser; interval: see guided. Outside of it, and at scale 1, it is the better one alone.
    """
    def denoise(x_t, t):
        x_0_hat = better(x_t, t)
        if scale == 1 or not interval[0] <= int(t[0]) <= interval[1]:
            return x_0_hat
        x_0_hat_worse = worse(x_t, t)
        return x_0_hat_worse + scale * (x_0_hat - x_0_hat_worse)
    return denoise


def classifier_free(unet, alpha_bar, cond, scale, interval=(1, math.inf)):
    """Guide by the difference that the condition makes; cond: (B, cond_dim) -> a denoiser

    Ho & Salimans 2022 eq. 6 with scale = 1 + w: 0 is unconditional, 1 conditional. By (2) and (1)
    the difference is (1 - alpha_bar)/sqrt(alpha_bar) grad log p(cond | x_t): formula (3), with an
    implicit classifier.
    """
    return extrapolate(denoiser(unet, alpha_bar), denoiser(unet, alpha_bar, cond), scale, interval)


def autoguided(unet, weak, alpha_bar, scale, cond=None):
    """Autoguidance: extrapolate from a weak U-Net past a better one -> a denoiser

    weak: a smaller U-Net that was trained for a shorter time on the same images, or None: unet
    alone; scale: 1 is unet alone; cond: (B, cond_dim) for unet, None: unconditional

    Karras et al. 2024, sec. 4, where scale is w. The density that a U-Net has learned is too wide:
    it finds blends of images likely, and a weaker one does so more. By (2) the difference of the
    two is (1 - alpha_bar)/sqrt(alpha_bar) grad log(p_unet(x_t) / p_weak(x_t)): it points away from
    what the weak one alone finds likely.
    """
    denoise = denoiser(unet, alpha_bar, cond)
    return denoise if weak is None else extrapolate(denoiser(weak, alpha_bar), denoise, scale)


# ---- optimising the noise ------------------------------------------------------------------------

LIMIT = 3.                  # of Fourier coefficients: in white noise 1 in 8,000 is larger
T_LATENT, COPIES = 700, 4   # log_p is averaged over COPIES of x_0, noised to timestep T_LATENT
LR, LR_EDIT = 0.1, 0.05     # from random noise; from inverted images, to keep more of their shape
DECAY = 0.1                 # weight decay, towards the noise at the start


def project_to_white_noise(x):
    """Bring x_T back to what white noise looks like; x: (B, C, H, W) -> the same shape

    In white noise all frequencies are equally strong: its Fourier coefficients have a mean square
    of 1. Here they are limited to about LIMIT, and the mean square of an image becomes 1. Fixing
    that alone would not do: the mean of a channel, hence the colour, is one of 1024 coefficients,
    so optimisation can drive it far out of the distribution while the norm hardly changes.
    """
    coefficients = torch.fft.fft2(x, norm="ortho")                            # (B, C, H, W)
    coefficients = coefficients * (LIMIT / coefficients.abs().clamp(min=LIMIT))
    x = torch.fft.ifft2(coefficients, norm="ortho").real
    return x / x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def optimize_x_T(denoise, log_p, x_start, generators, alpha_bar, steps, iterations, lr=LR,
                 through_unet=False, callback=None):
    """Optimise the noise from which deterministic sampling draws images -> x_T: (B, 3, H, W)

    x_start: (B, 3, H, W) standard normal, or inverted images; generators: B CPU generators; steps:
    of sampling, eta = 0; iterations: gradient steps on x_T; lr: of Adam, about how far a pixel of
    x_T moves in an iteration, before it goes a fraction DECAY of the way back to x_start and is
    projected to white noise; callback(x_0, value): called in each iteration, value: (B,) is log_p

    Guidance changes every x_t on its way to the image. Here the way is that of the unguided
    denoiser, and only its start changes. log_p is averaged over noisy copies of x_0, by which CLIP
    is harder to fool. The x_T with the highest average is returned.

    through_unet: back-propagate through all steps, as the paper does (Wallace et al. 2023). Each is
    evaluated again on the way back (torch.utils.checkpoint), so that memory grows by no more than
    one x_t a step.
    differs from the paper: by default the identity stands for d x_0 / d x_T, as a number does in
    lookahead: what should be redder in x_0 becomes redder in x_T. Sampling multiplies differences,
    so the exact gradient holds for tiny changes of x_T only (experiments/LATENTS.md).
    """
    x_T = x_start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x_T], lr, maximize=True)
    best, highest = x_start, x_T.new_full((len(x_T),), -torch.inf)
    t = torch.full((len(x_T),), T_LATENT, device=x_T.device)

    def log_p_of_copy(x_0):
        eps = randn_per_image(generators, x_0.shape[1:], x_0.device)
        return log_p(q_sample(x_0, t, eps, alpha_bar), t, x_0)                # (B,)

    run = functools.partial(checkpoint, denoise, use_reentrant=False) if through_unet else denoise
    for _ in range(iterations):
        with torch.set_grad_enabled(through_unet):
            x_0 = sample(run, x_T, None, alpha_bar, steps, eta=0.)
        with torch.enable_grad():
            if not through_unet:   # subtle: its value is x_0, d x_0 / d x_T becomes the identity
                x_0 = x_0 + (x_T - x_T.detach())
            value = sum(log_p_of_copy(x_0) for _ in range(COPIES)) / COPIES   # (B,)
            x_T.grad, = torch.autograd.grad(value.sum(), x_T)
        with torch.no_grad():
            better = (value > highest)[:, None, None, None]
            best, highest = torch.where(better, x_T, best), torch.maximum(value, highest)
            if callback:
                callback(x_0.detach(), value)
            optimizer.step()
            x_T.copy_(project_to_white_noise(x_T.lerp(x_start, DECAY)))
    return best


# ---- the methods by name -------------------------------------------------------------------------

# Why CLIP's scales are far above 1: p(text | x)^scale asks for images that show the caption beyond
# doubt, whereas Bayes' rule accepts whatever CLIP finds probable. For lookahead and x0-fast also:
# r_t^2 is the variance of one pixel, but hundreds of pixels of a car vary together, and along that
# direction Cov(x_0 | x_t) is far larger.
# To add a method, write its function and a line below: sample.py takes --method from METHODS.

class Method(NamedTuple):
    make_log_p: Callable         # (clip, text_features, targets, labels) -> log_p, or None
    scale: float                 # default, found by a sweep: experiments/LOG.md
    interval: tuple              # default, from the same sweep
    through_unet: bool = False   # see guided
    steps: int = 25              # default of this and the next two: see tinyddpm.sample
    eta: float = 1.
    recurrence: int = 2
    autoguidance: float = 1.     # default scale of autoguided, 1 is none


METHODS = {
    "lookahead": Method(lookahead, 128., (1, 1000)),
    "noise-aware": Method(noise_aware, 16., (1, 950)),
    "noise-unaware": Method(noise_unaware, 16., (1, 950)),
    "spherical": Method(spherical, 8., (1, 950)),
    "x0": Method(x0, 32., (1, 950), through_unet=True),
    # CLIP applied to x_0_hat, as in x0, with r_t^2 in place of the U-Net's Jacobian
    "x0-fast": Method(functools.partial(lookahead, t_fraction=0.), 128., (1, 1000)),
    "classifier-free": Method(None, 2., (1, 1000)),
    "latent": Method(noise_aware, 0., (1, 1000), steps=10, eta=0., recurrence=1),   # optimize_x_T
    # Without CLIP's gradient there are no errors of it for fresh noise to overwrite. Guided images
    # gain nothing by autoguidance: experiments/LOG.md.
    "none": Method(None, 0., (1, 1000), steps=50, eta=0., recurrence=1, autoguidance=1.5),
}
DEFAULT = "lookahead"


def build_denoiser(name, models, targets, scale, interval, autoguidance):
    """Build the denoiser of one of METHODS.

    models: a sample.Models, or anything with clip, unet, weak, alpha_bar, text_features,
    caption_labels, condition; targets: (B,) int, unused by "none", and by "latent", which changes
    x_T instead; scale, interval: see guided; autoguidance: the scale of autoguided, not of
    "classifier-free"

    A U-Net that is conditional on texts takes the targets' as its condition, and CLIP guides it.
    """
    unet, weak, alpha_bar = models.unet, models.weak, models.alpha_bar
    if name in ("none", "latent"):
        return autoguided(unet, weak, alpha_bar, autoguidance)
    cond = scale_features(models.text_features)[targets] if models.condition == "text" else None
    if name == "classifier-free":
        return classifier_free(unet, alpha_bar, cond, scale, interval)
    method = METHODS[name]
    denoise = autoguided(unet, weak, alpha_bar, autoguidance, cond)
    log_p = method.make_log_p(models.clip, models.text_features, targets, models.caption_labels)
    return guided(denoise, log_p, alpha_bar, scale, interval, method.through_unet)


if __name__ == "__main__":   # a mixture of two Gaussians in the plane, where p(x | left) is known
    alpha_bar, means, var = cosine_alpha_bar(), torch.tensor([[-.4, 0.], [.4, 0.]]), 0.1

    def component_log_density(x_t, t):
        """x_t: (B, 2, 1, 1) -> log density under each component, up to a constant: (B, 2)"""
        a = alpha_bar[t][:, None]
        distance2 = (x_t.view(-1, 1, 2) - a[:, :, None].sqrt() * means).square().sum(dim=2)
        return -distance2 / (2 * (a * var + 1 - a))

    def denoise(x_t, t):
        """The exact x_0_hat: each component's posterior mean, weighted by its probability."""
        a = alpha_bar[t].view(-1, 1, 1)
        gain = a.sqrt() * var / (a * var + 1 - a)
        posterior_mean = means + gain * (x_t.view(-1, 1, 2) - a.sqrt() * means)
        p = component_log_density(x_t, t).softmax(dim=1)[:, :, None]
        return (p * posterior_mean).sum(dim=1).view_as(x_t)

    def log_p(x_t, t, x_0_hat):
        """The exact log p(left component | x_t)."""
        return component_log_density(x_t, t).log_softmax(dim=1)[:, 0]

    # Scale 1 is Bayes' rule. With more, the score used at t is that of p(x_t) p(left | x_t)^scale,
    # which is not the noised p(x) p(left | x)^scale: the samples overshoot.
    grid = torch.linspace(-3, 3, 2001)   # along x, to sum the exact answer
    line = torch.stack([grid, torch.zeros(2001)], dim=1).view(-1, 2, 1, 1)
    components = component_log_density(line, torch.zeros(2001, dtype=torch.long))
    print("x of the samples, and of the exact answer:   mean, standard deviation")
    for scale in (0., 1., 4.):
        generators = [torch.Generator().manual_seed(i) for i in range(500)]
        x = sample(guided(denoise, log_p, alpha_bar, scale), randn_per_image(generators, (2, 1, 1)),
                   generators, alpha_bar, 100, clamp=False)[:, 0, 0, 0]
        weight = (components.logsumexp(1) + scale * components.log_softmax(1)[:, 0]).softmax(0)
        mean = (weight * grid).sum()
        std = (weight * (grid - mean) ** 2).sum().sqrt()
        print(f"scale {scale:g}   sampled {x.mean():5.2f}, {x.std():.2f}   "
              f"p(x) p(left | x)^scale: {mean:5.2f}, {std:.2f}")

# x of the samples, and of the exact answer:   mean, standard deviation
# scale 0   sampled -0.02, 0.52   p(x) p(left | x)^scale:  0.00, 0.51
# scale 1   sampled -0.42, 0.33   p(x) p(left | x)^scale: -0.40, 0.32
# scale 4   sampled -0.68, 0.26   p(x) p(left | x)^scale: -0.53, 0.25
