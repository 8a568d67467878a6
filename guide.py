"""Chapter 4: guidance. A guided denoiser is a denoiser.

    Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (classifier guidance)
        arxiv.org/abs/2105.05233
    Nichol et al. 2021, "GLIDE", sec. 2.4 (with a noised CLIP)
        arxiv.org/abs/2112.10741
    Bansal et al. 2023, "Universal Guidance for Diffusion Models" (through x_0_hat)
        arxiv.org/abs/2302.07121
    Ho, Salimans 2022, "Classifier-Free Diffusion Guidance"
        arxiv.org/abs/2207.12598
    Crowson 2021, notebooks for CLIP-guided diffusion (the spherical distance)

The diffusion model knows what cars look like, p(x); CLIP knows how well words fit a picture,
p(text | x). Bayes' rule says p(x | text) ~ p(x) p(text | x), so the score of the one we want, the
gradient of its logarithm, is the sum of two:

    grad log p(x_t | text) = grad log p(x_t) + grad log p(text | x_t)

and a score is an opinion about the clean picture:

    x_0_hat = (x_t + (1 - alpha_bar) score) / sqrt(alpha_bar)

So all that guidance does is move x_0_hat by (1 - alpha_bar) / sqrt(alpha_bar) times CLIP's
gradient. `guided` does that and returns a denoiser again: the sampler never knows, and guidance
composes with any sampler, any eta and any number of steps.

contrastive, clean, spherical, x0, ahead and x0_fast return log_p(x_t, t, x_0_hat) -> (B,):
log p(text | x_t) up to a constant, or something that rises with it. Its gradient always points
uphill: moving x_t along it raises log_p.

Shapes: B pictures, K captions, E embedding width; x_t, x_0_hat, grad (B, 3, H, W); t (B,) int in
1..T; text_features (K, E), of every caption that CLIP knows; target (B,) int in 0..K-1, the caption
that each picture shall have; log_prior (K,), see contrastive.
"""
import functools
import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from tinyddpm import at, cosine_alpha_bar, denoiser, noise_in, q_sample


def guided(denoise, log_p, alpha_bar, scale, interval=(1, math.inf), through_unet=False):
    """-> a denoiser: x_0_hat + scale (1 - alpha_bar)/sqrt(alpha_bar) grad,
    with grad = d sum(log_p) / d x_t.

    The same statement as eps_hat - scale sqrt(1 - alpha_bar) grad (Dhariwal & Nichol 2021,
    Alg. 2), in the form that stays well-conditioned near t = T.

    denoise(x_t, t) -> x_0_hat, log_p(x_t, t, x_0_hat) -> (B,), alpha_bar: (T + 1,).
    scale: 0 is no guidance, 1 is Bayes' rule if log_p is calibrated, and more is about
    p(x) p(text | x)^scale, where only the most typical pictures of that text are left.
    interval: the times (lo, hi), both included, at which to guide. Near T the factor explodes (6
    at t = 900, 13 at 950, 20,000 at 1000) while CLIP can see next to nothing. All pictures of a
    batch must be at the same time.
    through_unet: whether the gradient goes through denoise as well, by way of the x_0_hat that
    log_p looks at. It costs the U-Net's backward pass. A denoiser that is guided already lets no
    gradient through: where guidances are stacked, this one goes inside.

    The batch may be summed before the derivative, because pictures do not interact: nothing
    normalises across the batch.
    """
    def guided_denoise(x_t, t):
        if not interval[0] <= int(t[0]) <= interval[1]:
            return denoise(x_t, t)
        with torch.enable_grad():   # sample() has switched it off
            x = x_t.detach().requires_grad_()
            with torch.set_grad_enabled(through_unet):
                x_0_hat = denoise(x, t)
            grad, = torch.autograd.grad(log_p(x, t, x_0_hat).sum(), x)
        a = at(alpha_bar, t)
        return x_0_hat.detach() + scale * (1 - a) / a.sqrt() * grad
    return guided_denoise


# ---- log p(text | x_t), in six ways --------------------------------------------------------------

TEMPERATURE = 5.   # found by a sweep, and with it scale 16: RESULTS.md


def contrastive(clip, text_features, target, log_prior=0., temperature=TEMPERATURE):
    """-> log_p: CLIP's softmax over all captions, CLIP being told how noisy x_t is.

    log_p = temperature * log softmax(logits / temperature)[target], whose gradient is that of the
    target's logit less the mean of all captions' logits, weighted by how probable each is.

    All captions, so that what distinguishes the target from its nearest rivals is what counts.
    Where noise leaves nothing visible, CLIP's logits are flat and the gradient vanishes.

    At temperature 1 this is log p(text | x_t), Bayes' rule. But CLIP is sure of itself long before
    the picture is good, and then that gradient vanishes too, with 1 - p. A softer opinion goes on
    pulling, away from all rivals and not only from the last one left; RESULTS.md has what it
    gains.

    log_prior: log(pi_ddpm / pi_clip), how much more often the diffusion model has met each caption
    than CLIP. p(text | x) is proportional to p(x | text) p(text), and CLIP knows its own p(text).
    """
    def log_p(x_t, t, x_0_hat):
        logits = clip.logits(clip.encode_image(x_t, t), text_features, t) + log_prior     # (B, K)
        log_softmax = (logits / temperature).log_softmax(dim=1)               # (B, K)
        return temperature * log_softmax[torch.arange(len(x_t)), target]      # (B,)
    return log_p


def clean(clip, text_features, target, log_prior=0.):
    """-> log_p: the same CLIP, told that the noisy x_t is a clean picture. Here for contrast.

    That is what many a first attempt does. Its gradient is that of a network far outside of what
    it was trained on: mostly noise, and large.
    """
    told_time = contrastive(clip, text_features, target, log_prior)
    return lambda x_t, t, x_0_hat: told_time(x_t, torch.zeros_like(t), x_0_hat)


def spherical(clip, text_features, target, log_prior=0.):
    """-> log_p = -logit_scale(t) theta^2 / 2, theta the angle between picture and target.

    Crowson 2021 (the notebooks that made CLIP-guided diffusion known), where theta^2 / 2 is written
    2 arcsin(chord / 2)^2. The target alone counts, no rival caption and no prior. With cos(theta)
    instead the gradient would be as sin(theta), and fade at large angles.
    """
    wanted = F.normalize(text_features.float(), dim=-1)[target]               # (B, E)

    def log_p(x_t, t, x_0_hat):
        seen = F.normalize(clip.encode_image(x_t, t).float(), dim=-1)         # (B, E)
        theta = 2 * ((seen - wanted).norm(dim=1) / 2).asin()                  # (B,), from the chord
        return -clip.logit_scale(t)[:, 0] * theta ** 2 / 2
    return log_p


def x0(clip, text_features, target, log_prior=0.):
    """-> log_p: CLIP, told that it is clean, looks at x_0_hat; the gradient is through the U-Net.

    Bansal et al. 2023 eq. 6. By Tweedie's formula the U-Net's Jacobian d x_0_hat / d x_t is
    sqrt(alpha_bar) / (1 - alpha_bar) times the covariance of x_0 given x_t, so the push in x_0_hat
    is scale Cov(x_0 | x_t) d log_p / d x_0_hat: it goes where pictures can vary.
    """
    of_picture = contrastive(clip, text_features, target, log_prior)
    return lambda x_t, t, x_0_hat: of_picture(x_0_hat, torch.zeros_like(t), x_0_hat)


def looking_ahead(log_p, alpha_bar, share, sigma_data=0.5):
    """-> log_p that looks not at x_t but ahead, at where DDIM would be at the time share * t.

    That is x_0_hat with the noise eps_hat put back, only less of it. At share = 0 it is x_0_hat
    itself, as in x0; at share = 1 it is x_t. Between the two CLIP sees more than in x_t, and there
    still is noise, in which it cannot be pleased by patterns that nobody else sees: RESULTS.md.

    The gradient does not go through the U-Net. The covariance in x0 is taken to be a number, so
    that the push in x_0_hat is scale r_t^2 times its own derivative of log_p, with

        r_t^2 = s^2 (1 - alpha_bar) / (1 - alpha_bar + s^2 alpha_bar),

    what that covariance would be if pixels were independent and normal with standard deviation
    s = sigma_data. (Song et al. 2023, "Pseudoinverse-Guided Diffusion Models", choose their r_t so,
    with s = 1.) It stays below s^2 where the factor in `guided` explodes, so that guidance may
    begin at t = T, before any colour is settled.
    """
    def look(x_t, t, x_0_hat):
        a, sooner = at(alpha_bar, t), (share * t).long()
        r2 = sigma_data ** 2 * (1 - a) / (1 - a + sigma_data ** 2 * a)
        jacobian = r2 * a.sqrt() / (1 - a)
        # subtle: the value is x_0_hat; the derivative with respect to x_t is the jacobian.
        moving = x_0_hat.detach() + jacobian * (x_t - x_t.detach())
        eps_hat = noise_in(x_t, x_0_hat, a).detach()
        return log_p(q_sample(moving, sooner, eps_hat, alpha_bar), sooner, x_0_hat)
    return look


AHEAD = 0.75   # found by a sweep: RESULTS.md


def ahead(clip, text_features, target, log_prior=0., share=AHEAD):
    """-> log_p: CLIP looks a quarter of the time ahead, and knows how noisy it is there. The
    default."""
    told_time = contrastive(clip, text_features, target, log_prior)
    alpha_bar = cosine_alpha_bar(clip.config.T).to(text_features.device)
    return looking_ahead(told_time, alpha_bar, share)


def x0_fast(clip, text_features, target, log_prior=0.):
    """-> log_p: CLIP looks all the way ahead, at x_0_hat: x0 without the U-Net's derivative."""
    return ahead(clip, text_features, target, log_prior, share=0.)


# ---- guidance without a CLIP ---------------------------------------------------------------------

def classifier_free(unet, alpha_bar, target, scale, interval=(1, math.inf)):
    """-> a denoiser: x_0_hat + scale (x_0_hat told the caption - x_0_hat told nothing).

    Ho & Salimans 2022 eq. 6, with scale = 1 + w: 0 is unguided, 1 is simply told the caption. By
    Bayes' rule the difference is (1 - alpha_bar)/sqrt(alpha_bar) times the gradient of
    log p(caption | x_t), the very push of `guided`, by a classifier that nobody had to train.
    unet: one that is told captions (UNetConfig.text); it is evaluated twice a step.
    """
    anything = denoiser(unet, alpha_bar)
    told = denoiser(functools.partial(unet, caption=target + 1), alpha_bar)   # 0: told nothing

    def denoise(x_t, t):
        x_0_hat = anything(x_t, t)
        if not interval[0] <= int(t[0]) <= interval[1]:
            return x_0_hat
        return x_0_hat + scale * (told(x_t, t) - x_0_hat)
    return denoise


# ---- the methods by name -------------------------------------------------------------------------

class Method(NamedTuple):
    log_p: Callable              # its maker; None if there is none
    scale: float                 # found by a sweep: RESULTS.md
    interval: tuple              # likewise, for T = 1000
    through_unet: bool = False   # see guided


METHODS = {
    "contrastive": Method(contrastive, 16., (1, 950)),
    "spherical": Method(spherical, 8., (1, 950)),
    "clean": Method(clean, 16., (1, 950)),
    "x0": Method(x0, 32., (1, 950), through_unet=True),
    "ahead": Method(ahead, 128., (1, 1000)),
    "x0-fast": Method(x0_fast, 128., (1, 1000)),
    "classifier-free": Method(None, 2., (1, 1000)),
    "none": Method(None, 0., (1, 1000)),
}
DEFAULT = "ahead"   # see RESULTS.md


def guided_by(name, models, target, scale=None, interval=None):
    """-> the denoiser of one of METHODS, with the method's own scale and interval unless given.

    models: clip, unet, alpha_bar, text_features and log_prior, see checkpoints.Models.
    """
    method, unet, alpha_bar = METHODS[name], models.unet, models.alpha_bar
    scale = method.scale if scale is None else scale
    T = len(alpha_bar) - 1
    interval = interval or tuple(round(t * T / 1000) for t in method.interval)
    if name == "none":
        return denoiser(unet, alpha_bar)
    if name == "classifier-free":
        return classifier_free(unet, alpha_bar, target, scale, interval)
    log_p = method.log_p(models.clip, models.text_features, target, models.log_prior)
    return guided(denoiser(unet, alpha_bar), log_p, alpha_bar, scale, interval, method.through_unet)


def prior_ratio(ddpm_counts, clip_counts):
    """How often each caption occurred in the two trainings -> log(pi_ddpm / pi_clip): (K,).

    One is added to each count, so that what never occurred is improbable and not impossible.
    """
    ddpm, clip = (torch.tensor(counts) + 1. for counts in (ddpm_counts, clip_counts))
    return (ddpm / ddpm.sum()).log() - (clip / clip.sum()).log()


if __name__ == "__main__":   # two overlapping blobs in the plane: a world whose answer is known
    from tinyddpm import noise, sample

    alpha_bar, means, var = cosine_alpha_bar(), torch.tensor([[-.4, 0.], [.4, 0.]]), 0.1

    def fit(x_t, t):
        """How well each blob explains x_t (B, 2, 1, 1): log density up to a constant, (B, 2)."""
        a = alpha_bar[t][:, None]
        distance2 = (x_t.view(-1, 1, 2) - a[:, :, None].sqrt() * means).square().sum(dim=2)
        return -distance2 / (2 * (a * var + 1 - a))

    def denoise(x_t, t):
        """The exact x_0_hat: each blob's own, weighted by how probable the blob is."""
        a = alpha_bar[t].view(-1, 1, 1)
        own = means + a.sqrt() * var / (a * var + 1 - a) * (x_t.view(-1, 1, 2) - a.sqrt() * means)
        return (fit(x_t, t).softmax(1)[:, :, None] * own).sum(dim=1).view_as(x_t)

    def log_p(x_t, t, x_0_hat):
        """log p(left blob | x_t), exactly."""
        return fit(x_t, t).log_softmax(dim=1)[:, 0]

    # Scale 1 is Bayes' rule. Beyond, p(x_t) p(left | x_t)^scale holds at every t, but is not what
    # noise makes of p(x) p(left | x)^scale: the samples overshoot.
    across = torch.linspace(-3, 3, 2001)   # where the exact answer can be summed
    line = torch.stack([across, torch.zeros(2001)], dim=1).view(-1, 2, 1, 1)
    blobs = fit(line, torch.zeros(2001, dtype=torch.long))
    print("x of the left blob:   mean, standard deviation")
    for scale in (0., 1., 4.):
        generators = [torch.Generator().manual_seed(i) for i in range(500)]
        x = sample(guided(denoise, log_p, alpha_bar, scale), noise(generators, (2, 1, 1)),
                   generators, alpha_bar, 100, clamp=False)[:, 0, 0, 0]
        weight = (blobs.logsumexp(1) + scale * blobs.log_softmax(1)[:, 0]).softmax(0)
        mean = (weight * across).sum()
        std = (weight * (across - mean) ** 2).sum().sqrt()
        print(f"scale {scale:g}   sampled {x.mean():5.2f}, {x.std():.2f}   "
              f"p(x) p(left | x)^scale: {mean:5.2f}, {std:.2f}")

# x of the left blob:   mean, standard deviation
# scale 0   sampled -0.02, 0.52   p(x) p(left | x)^scale:  0.00, 0.51
# scale 1   sampled -0.42, 0.33   p(x) p(left | x)^scale: -0.40, 0.32
# scale 4   sampled -0.68, 0.26   p(x) p(left | x)^scale: -0.53, 0.25
