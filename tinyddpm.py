"""Chapter 3b: a denoising diffusion model. Schedule, loss, one step, and the one sampling loop.

    Ho, Jain, Abbeel 2020, "Denoising Diffusion Probabilistic Models" (DDPM)
        arxiv.org/abs/2006.11239
    Nichol, Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models"
        arxiv.org/abs/2102.09672
    Song, Meng, Ermon 2021, "Denoising Diffusion Implicit Models" (DDIM)
        arxiv.org/abs/2010.02502
    Salimans, Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" (v)
        arxiv.org/abs/2202.00512
    Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models"
        arxiv.org/abs/2211.01095

The whole idea: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps mixes a picture with noise;
a network learns to tell them apart; a sampler starts at pure noise, asks "which picture is in
here?" (x_0_hat), and moves a little towards it.

Time is t = 1..T, T = 1000; alpha_bar has T + 1 entries and alpha_bar[0] = 1 is the clean picture.
Shapes: B batch, C channels, H x W pixels (the same for x_0, eps, x_t, v); pictures in [-1, 1]. A
hat marks every estimate.

Left out: learnt variances, other noise schedules.
"""
import math

import torch
from torch import nn

from unet import time_embedding


# ---- the forward process -------------------------------------------------------------------------

def cosine_alpha_bar(T=1000):
    """-> alpha_bar: (T + 1,) float32, from alpha_bar[0] = 1 down to almost 0.

    Nichol & Dhariwal 2021 eq. 17: alpha_bar_t = f(t) / f(0), with
    f(t) = cos((t/T + s) / (1 + s) * pi/2)^2 and s = 0.008, and beta_t = 1 - alpha_bar_t /
    alpha_bar_{t-1} clipped at 0.999, so that alpha_bar_T is 2e-9 and not 0.
    """
    s = 0.008
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1), torch.cumprod(1 - beta, 0).float()])


def at(alpha_bar, t):
    """alpha_bar: (T + 1,), t: (B,) int in 0..T -> alpha_bar_t: (B, 1, 1, 1), to scale pictures."""
    return alpha_bar[t].view(-1, 1, 1, 1)


def q_sample(x_0, t, eps, alpha_bar):
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020 eq. 4).

    x_0: (B, 3, H, W), t: (B,) int in 0..T, eps: standard normal like x_0 -> x_t: (B, 3, H, W)
    """
    a = at(alpha_bar, t)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


# ---- training ------------------------------------------------------------------------------------

def random_times(batch, T, generator):
    """-> (B,) int in 1..T, ascending, one from each of B equal stretches of 1..T.

    So every batch is spread evenly over all times, and its loss is less noisy than with
    independent ones. They stand in order, so the rows of a batch must be pictures in random order.
    """
    u = torch.rand(batch, generator=generator, device=generator.device)       # in [0, 1)
    stretch = torch.arange(batch, device=generator.device)
    return ((stretch + u) * (T / batch)).long().clamp(max=T - 1) + 1


def ddpm_loss(unet, x_0, t, eps, alpha_bar):
    """Mean squared error of v_hat.

    x_0: (B, 3, H, W), t: (B,) int in 1..T, eps: standard normal like x_0 -> (B,), one per picture

    differs from the paper (Ho et al. 2020 eq. 14): the network predicts not eps but
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, sec. 4). That is eps
    where there is little noise and -x_0 where there is much, so that the network is asked for what
    it cannot copy from its input.
    """
    a = at(alpha_bar, t)
    v = a.sqrt() * eps - (1 - a).sqrt() * x_0
    v_hat = unet(q_sample(x_0, t, eps, alpha_bar), t)
    return (v_hat.float() - v).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def ema_update(ema, model, step):
    """Move the averaged parameters a little towards the model's, in place.

    step = 1, 2, ... counts updates; the first one copies.

    Power-function EMA (Karras et al. 2024, arXiv 2312.02696, eq. 2):
    decay = (1 - 1/step)^(gamma + 1). Its memory is a fixed fraction of the training so far, 10 %
    with gamma = 6.94, so a run of any length forgets its beginning.
    """
    decay = (1 - 1 / step) ** (6.94 + 1)
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---- sampling ------------------------------------------------------------------------------------

def denoiser(unet, alpha_bar):
    """A U-Net that predicts v -> denoise(x_t, t) = x_0_hat, its guess at the clean picture.

    x_0_hat = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v_hat
    x_t: (B, 3, H, W), t: (B,) int in 1..T -> x_0_hat: (B, 3, H, W), not clamped
    """
    def denoise(x_t, t):
        a = at(alpha_bar, t)
        return a.sqrt() * x_t - (1 - a).sqrt() * unet(x_t, t).float()
    return denoise


def noise_in(x_t, x_0_hat, a):
    """eps_hat, what x_t is made of beside x_0_hat: q_sample solved for eps. a: alpha_bar_t"""
    return (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt()


def ddim_step(x_t, x_0_hat, t, t_next, alpha_bar, eta, z):
    """One step from time t to t_next < t -> x at t_next (Song et al. 2021 eq. 12).

    x_t, x_0_hat, z: the same shape, z standard normal; with eta = 0, z does not matter and 0. will
    do.
    t, t_next: int, the same for the batch.
    eta in [0, 1] scales sigma (their eq. 16): eta = 0 is deterministic DDIM; eta = 1 between
    neighbouring times is the DDPM posterior (Ho et al. 2020 eq. 7).
    """
    a, a_next = alpha_bar[t], alpha_bar[t_next]
    eps_hat = noise_in(x_t, x_0_hat, a)
    sigma = eta * ((1 - a_next) / (1 - a)).sqrt() * (1 - a / a_next).sqrt()
    towards_x_t = (1 - a_next - sigma ** 2).clamp(min=0).sqrt() * eps_hat
    return a_next.sqrt() * x_0_hat + towards_x_t + sigma * z


def extrapolated(x_0_hat, x_0_hat_before, t_before, t, t_next, alpha_bar):
    """x_0_hat half a step ahead, if it goes on changing as it did in the step before.

    -> x_0_hat + 1/2 h / h_before (x_0_hat - x_0_hat_before), where h = lambda_t_next - lambda_t is
    the step ahead and h_before = lambda_t - lambda_t_before the one before, on the scale of
    lambda_t = log(sqrt(alpha_bar_t) / sqrt(1 - alpha_bar_t)), on which x_0_hat is taken to change
    at a constant rate (Lu et al. 2022, Alg. 2).
    t_before > t > t_next > 0: at t = 0 lambda is infinite.

    A step that aims at x_0_hat as it was at the step's beginning lags behind; half a step ahead is
    the mean over the step, to second order. It costs no further call of the network.
    """
    before, now, ahead = alpha_bar[[t_before, t, t_next]].logit() / 2         # lambda
    half_a_step = 0.5 * (ahead - now) / (now - before)
    return x_0_hat + half_a_step * (x_0_hat - x_0_hat_before)


def sampling_times(T, steps):
    """The steps + 1 times that a sampler visits, from T down to 0; steps in 1..T."""
    return torch.linspace(T, 0, steps + 1).round().long().tolist()


def moves(times, recurrence=1):
    """The steps (t, t_next) of a sampler that visits these times, each one `recurrence` times.

    [1000, 500, 0], 2 -> (1000, 500), (500, 1000), (1000, 500), (500, 0)

    Between two equal steps fresh noise leads back from t_next to t (Bansal et al. 2023, "Universal
    Guidance", eq. 10), so that what guidance broke has another chance to heal, at as many times the
    cost. The last step is taken once: it ends at t = 0.
    """
    for t, t_next in zip(times[:-1], times[1:]):
        yield t, t_next
        for _ in range(recurrence - 1 if t_next > 0 else 0):
            yield t_next, t
            yield t, t_next


def noise(generators, shape, device="cpu"):
    """One draw from each picture's own CPU generator -> (B, *shape), standard normal.

    So a picture's noise is the same whatever else is in its batch.
    """
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def sample(denoise, x_T, generators, alpha_bar, steps=50, eta=1.0, clamp=True, recurrence=1,
           watch=None):
    """The one loop: denoise, clamp, extrapolate, step. -> x_0: (B, C, H, W)

    denoise(x_t, t): (B, C, H, W), (B,) int -> x_0_hat: (B, C, H, W). Guidance is a denoiser too
    (guide.py), so this loop knows nothing of it.
    x_T: (B, C, H, W) standard normal.
    generators: B torch.Generators on the CPU, for the noise that eta > 0 and recurrence > 1 add;
    else None will do.
    clamp keeps x_0_hat in [-1, 1], where pictures live; the extrapolated one may lie a little
    outside. Either way ddim_step takes eps_hat from the x_0_hat that it is given, so that the two
    add up to x_t.
    recurrence: how often every step but the last is taken, see moves.
    watch(t, x_t, x_0_hat), if given, is called at every step with t an int.

    differs from the paper (Song et al. 2021): every step but the first, the last and those taken
    again aims at the extrapolated x_0_hat. That makes DPM-Solver++(2M) of DDIM (eta = 0) and
    SDE-DPM-Solver++(2M) of DDPM (eta = 1), whose 50 steps are better than 100 plain ones
    (RESULTS.md).
    """
    x_t, t_before, x_0_hat_before = x_T, None, None
    for t, t_next in moves(sampling_times(len(alpha_bar) - 1, steps), recurrence):
        z = noise(generators, x_t.shape[1:], x_t.device) if eta > 0 or t_next > t else 0.
        if t_next > t:   # back into the noise, where nothing that was known before holds
            kept = alpha_bar[t_next] / alpha_bar[t]
            x_t, t_before = kept.sqrt() * x_t + (1 - kept).sqrt() * z, None
            continue
        x_0_hat = denoise(x_t, torch.full((len(x_t),), t, device=x_t.device))
        if clamp:
            x_0_hat = x_0_hat.clamp(-1, 1)
        if watch:
            watch(t, x_t, x_0_hat)
        aim = x_0_hat
        if t_before is not None and t_next > 0:
            aim = extrapolated(x_0_hat, x_0_hat_before, t_before, t, t_next, alpha_bar)
        x_t = ddim_step(x_t, aim, t, t_next, alpha_bar, eta, z)
        t_before, x_0_hat_before = t, x_0_hat
    return x_t


@torch.no_grad()
def invert(denoise, x_0, alpha_bar, steps=50):
    """The noise from which deterministic sampling would draw these pictures: DDIM, run backwards.

    -> x_T like x_0, (B, C, H, W); sample(..., eta=0, clamp=False) then returns to about x_0.

    The ordinary differential equation behind DDIM (Song et al. 2021 eq. 14) says that
    x_t / sqrt(alpha_bar) moves by eps_hat times the change of sqrt((1 - alpha_bar) / alpha_bar).

    differs from the paper: to undo a step we need eps_hat where that step began, which is where we
    are going. So the network is told the time of the end, though it sees the x_t of the beginning;
    at t = 0, where there is no noise to be found, the beginning's would not do. The error falls
    with the number of steps.
    """
    times = sampling_times(len(alpha_bar) - 1, steps)[::-1]
    x_t = x_0
    for t, t_next in zip(times[:-1], times[1:]):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        x_0_hat = denoise(x_t, torch.full((len(x_t),), t_next, device=x_t.device))
        eps_hat = noise_in(x_t, x_0_hat, a_next)
        change = (1 - a_next).sqrt() - (a_next * (1 - a) / a).sqrt()   # times sqrt(alpha_bar_next)
        x_t = (a_next / a).sqrt() * x_t + change * eps_hat
    return x_t


# ---- the same in the plane -----------------------------------------------------------------------

def swiss_roll(n, generator):
    """-> (n, 2, 1, 1): "pictures" of two numbers each, on a spiral within [-1, 1]."""
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    points = torch.stack([angle * angle.cos(), angle * angle.sin()], dim=1) / 15
    return (points + 0.01 * torch.randn(n, 2, generator=generator))[:, :, None, None]


class PlaneNet(nn.Module):
    """What the U-Net is to pictures: x_t (B, 2, 1, 1), t (B,) int -> v_hat (B, 2, 1, 1)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 12 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
            nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x_t, t):
        x = x_t.flatten(1)                                                    # (B, 2)
        waves = torch.cat([math.pi * x, 2 * math.pi * x, 4 * math.pi * x], dim=1)
        known = [x, waves.sin(), waves.cos(), time_embedding(t, 32)]
        return self.layers(torch.cat(known, dim=1)).view_as(x_t)


if __name__ == "__main__":   # learn to draw a spiral, in ten seconds or so; out/swiss-roll.png
    import data

    torch.manual_seed(0)
    generator, alpha_bar, net = torch.Generator().manual_seed(0), cosine_alpha_bar(), PlaneNet()
    optimizer = torch.optim.AdamW(net.parameters())
    for step in range(4000):
        x_0, t = swiss_roll(256, generator), random_times(256, 1000, generator)
        eps = torch.randn(x_0.shape, generator=generator)
        loss = ddpm_loss(net, x_0, t, eps, alpha_bar).mean()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 4000)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    roll = swiss_roll(2000, generator)
    generators = [torch.Generator().manual_seed(i) for i in range(1000)]
    x_T = noise(generators, (2, 1, 1))

    def show(points, title):   # one panel of the picture, one line of print
        far = torch.cdist(points.flatten(1), roll.flatten(1)).min(dim=1).values.mean()
        print(f"{title}   {far:.3f} from the spiral, on average")
        place = ((points.flatten(1).clamp(-2, 2) + 2) * 31.75).long()
        panel = torch.full((128, 128, 3), 255, dtype=torch.uint8)
        panel[127 - place[:, 1], place[:, 0]] = 0
        return panel

    panels = [show(q_sample(roll, torch.full((2000,), t), torch.randn(roll.shape), alpha_bar),
                   f"noised up to t = {t:4}") for t in (0, 100, 300, 600, 1000)]
    path = {}
    sample(denoiser(net, alpha_bar), x_T, generators, alpha_bar, 100, 0., watch=lambda t, x, _:
           path.update({t: x}))
    panels += [show(path[t], f"on the way back, {t:4}") for t in (1000, 600, 300, 100, 10)]
    panels += [show(sample(denoiser(net, alpha_bar), x_T, generators, alpha_bar, steps, 0.),
                    f"drawn in {steps:4} steps") for steps in (2, 5, 10, 100, 1000)]
    data.save_grid("out/swiss-roll.png", torch.stack(panels).numpy(), columns=5)

# noised up to t =    0   0.000 from the spiral, on average
# noised up to t =  100   0.104 from the spiral, on average
# ...
# drawn in    2 steps   0.164 from the spiral, on average
# drawn in    5 steps   0.108 from the spiral, on average
# drawn in   10 steps   0.046 from the spiral, on average
# drawn in  100 steps   0.007 from the spiral, on average
# drawn in 1000 steps   0.008 from the spiral, on average
