"""Chapter 4: guidance. A guided denoiser is a denoiser.

    Dhariwal, Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis" (classifier guidance)
        arxiv.org/abs/2105.05233
    Nichol et al. 2021, "GLIDE", sec. 2.4 (with a noised CLIP)
        arxiv.org/abs/2112.10741

The diffusion model knows what cars look like, p(x); CLIP knows how well words fit a picture,
p(text | x). Bayes' rule says p(x | text) ~ p(x) p(text | x), so the score of the one we want, the
gradient of its logarithm, is the sum of two:

    grad log p(x_t | text) = grad log p(x_t) + grad log p(text | x_t)

and a score is an opinion about the clean picture:

    x_0_hat = (x_t + (1 - alpha_bar) score) / sqrt(alpha_bar)

So all that guidance does is move x_0_hat by (1 - alpha_bar) / sqrt(alpha_bar) times CLIP's
gradient. `guided` does that and returns a denoiser again: the sampler never knows, and guidance
composes with any sampler, any eta and any number of steps.

The makers below return log_p(x_t, t, x_0_hat) -> (B,): log p(text | x_t) up to a constant. Its
gradient always points uphill: moving x_t along it raises log_p.

Shapes: B pictures, K captions, E embedding width; x_t, x_0_hat, grad (B, 3, H, W); t (B,) int in
1..T; target (B,) int in 0..K-1, the caption that each picture shall have.

Left out: guidance through x_0_hat, classifier-free guidance.
"""
import math

import torch

from tinyddpm import at, denoiser, noise, sample


def guided(denoise, log_p, alpha_bar, scale, interval=(1, math.inf)):
    """-> a denoiser: x_0_hat + scale (1 - alpha_bar)/sqrt(alpha_bar) grad,
    with grad = d sum(log_p) / d x_t.

    The same statement as eps_hat - scale sqrt(1 - alpha_bar) grad (Dhariwal & Nichol 2021,
    Alg. 2), in the form that stays well-conditioned near t = T.

    denoise(x_t, t) -> x_0_hat, log_p(x_t, t, x_0_hat) -> (B,), alpha_bar: (T + 1,).
    scale: 0 is no guidance, 1 is Bayes' rule if log_p is calibrated, and more samples from
    p(x) p(text | x)^scale, where only the most typical pictures of that text are left.
    interval: the times (lo, hi), both included, at which to guide. Near T the factor explodes (6
    at t = 900, 13 at 950, 20,000 at 1000) while CLIP can see next to nothing. All pictures of a
    batch must be at the same time.

    The batch may be summed before the derivative, because pictures do not interact: nothing
    normalises across the batch.
    """
    def guided_denoise(x_t, t):
        x_0_hat = denoise(x_t, t)
        if not interval[0] <= int(t[0]) <= interval[1]:
            return x_0_hat
        with torch.enable_grad():   # sample() has switched it off
            x = x_t.detach().requires_grad_()
            grad, = torch.autograd.grad(log_p(x, t, x_0_hat).sum(), x)
        a = at(alpha_bar, t)
        return x_0_hat + scale * (1 - a) / a.sqrt() * grad
    return guided_denoise


def contrastive(clip, text_features, target, temperature=5.):
    """-> log_p: CLIP's softmax over all captions, CLIP being told how noisy x_t is. The default.

    log_p = temperature * log softmax(logits / temperature)[target], whose gradient is that of the
    target's logit less the mean of all captions' logits, weighted by how probable each is.

    text_features: (K, E), every caption that CLIP knows, so that what distinguishes the target
    from its nearest rivals is what counts. Where noise leaves nothing visible, CLIP's logits are
    flat and the gradient vanishes.

    At temperature 1 this is log p(text | x_t), Bayes' rule. But CLIP is sure of itself long before
    the picture is good, and then that gradient vanishes too, with 1 - p. A softer opinion goes on
    pulling, away from all rivals and not only from the last one left; RESULTS.md has what it
    gains.
    """
    def log_p(x_t, t, x_0_hat):
        logits = clip.logits(clip.encode_image(x_t, t), text_features, t)     # (B, K)
        log_softmax = (logits / temperature).log_softmax(dim=1)               # (B, K)
        return temperature * log_softmax[torch.arange(len(x_t)), target]      # (B,)
    return log_p


def clean(clip, text_features, target):
    """-> log_p: the same CLIP, told that the noisy x_t is a clean picture. Here for contrast.

    That is what many a first attempt does. Its gradient is that of a network far outside of what
    it was trained on: mostly noise, and large.
    """
    noise_aware = contrastive(clip, text_features, target)
    return lambda x_t, t, x_0_hat: noise_aware(x_t, torch.zeros_like(t), x_0_hat)


METHODS = {   # name -> maker of log_p, its scale, its interval: found by sweeps, RESULTS.md
    "contrastive": (contrastive, 16., (1, 950)),
    "clean": (clean, 16., (1, 950)),
}


def generate(unet, alpha_bar, generators, log_p=None, scale=1., interval=(1, math.inf), steps=50,
             eta=1., watch=None):
    """Pictures from noise, guided by log_p if there is one -> x_0: (B, 3, H, W) in [-1, 1]

    generators: B torch.Generators on the CPU, one for each picture, which depends on its own alone.
    scale, interval: see guided. steps, eta, watch: see tinyddpm.sample.
    """
    denoise = denoiser(unet, alpha_bar)
    if log_p is not None:
        denoise = guided(denoise, log_p, alpha_bar, scale, interval)
    size = unet.config.image_size
    x_T = noise(generators, (3, size, size), alpha_bar.device)
    return sample(denoise, x_T, generators, alpha_bar, steps, eta, watch=watch)
