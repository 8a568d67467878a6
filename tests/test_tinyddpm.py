import math

import pytest
import torch

import cars
import data
import tinyddpm
from tinyddpm import ddim_step, q_sample, sample
from unet import UNet, UNetConfig


def generators(n):
    return [data.generator(0, i) for i in range(n)]


def test_cosine_schedule(alpha_bar):
    assert alpha_bar.shape == (1001,) and alpha_bar[0] == 1 and 0 < alpha_bar[1000] < 1e-8
    assert (alpha_bar[1:] < alpha_bar[:-1]).all()
    f = lambda t: math.cos((t / 1000 + .008) / 1.008 * math.pi / 2) ** 2
    for t in (1, 10, 500, 900):
        assert alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-5)
    assert 1 - alpha_bar[1000] / alpha_bar[999] == pytest.approx(0.999, abs=1e-4)    # the clip


def test_q_sample_keeps_unit_variance_and_t_0_is_clean(alpha_bar):
    x_0, eps = torch.randn(2, 64, 3, 8, 12)
    assert torch.equal(q_sample(x_0, torch.zeros(64, dtype=torch.long), eps, alpha_bar), x_0)
    x_t = q_sample(x_0, torch.full((64,), 600), eps, alpha_bar)
    assert x_t.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("eta", [0., 0.5, 1.])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_given_the_true_eps_every_sampler_returns_x_0(alpha_bar, eta, steps):
    """If the denoiser knows the picture, any number of steps and any eta end at it: no index is
    off by one."""
    x_0 = torch.rand(2, 3, 4, 6) * 2 - 1
    visited = []
    out = sample(lambda x_t, t: x_0, torch.randn(2, 3, 4, 6), generators(2), alpha_bar, steps, eta,
                 watch=lambda t, x_t, x_0_hat: visited.append(t))
    assert torch.allclose(out, x_0, atol=1e-6)
    assert len(visited) == steps and visited[0] == 1000 and 0 not in visited


def test_deterministic_steps_stay_on_the_straight_path(alpha_bar):
    """With the true eps, DDIM with eta 0 passes exactly through q_sample(x_0, t, eps) at each
    time."""
    x_0, eps = torch.rand(1, 3, 4, 6) * 2 - 1, torch.randn(1, 3, 4, 6)
    path = {}
    x_T = q_sample(x_0, torch.tensor([1000]), eps, alpha_bar)
    sample(lambda x_t, t: x_0, x_T, generators(1), alpha_bar, 10, eta=0.,
           watch=lambda t, x_t, _: path.update({t: x_t}))
    for t, x_t in path.items():
        # at T the picture is 5e-5 of x_T: single precision cannot tell the two noises apart
        if t < 1000:
            assert torch.allclose(x_t, q_sample(x_0, torch.tensor([t]), eps, alpha_bar), atol=2e-3)


@pytest.mark.parametrize("t", [2, 400, 999])
def test_eta_1_is_the_ddpm_posterior(alpha_bar, t):
    """Mean and variance of one step against Ho et al. 2020 eq. 7, written out here once more."""
    x_0_hat, x_t, z = torch.randn(3, 1, 3, 4, 6, dtype=torch.double)
    a, before = alpha_bar[t].double(), alpha_bar[t - 1].double()
    beta = 1 - a / before
    mean = (before.sqrt() * beta / (1 - a) * x_0_hat
            + (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t)
    sigma = (beta * (1 - before) / (1 - a)).sqrt()
    assert torch.allclose(ddim_step(x_t, x_0_hat, t, t - 1, alpha_bar, 1., z),
                          mean + sigma * z, atol=1e-3)


@pytest.mark.parametrize("eta", [0., 1.])
def test_gaussian_data_are_sampled_exactly(alpha_bar, eta):
    """If pictures are N(0.3, 0.2^2), the best denoiser is known; the sampler must give that mean
    and that deviation."""
    mean, var = 0.3, 0.04

    def denoise(x_t, t):
        a = tinyddpm.at(alpha_bar, t)
        return mean + a.sqrt() * var / (a * var + 1 - a) * (x_t - a.sqrt() * mean)

    out = sample(denoise, tinyddpm.noise(generators(16), (3, 16, 20)), generators(16),
                 alpha_bar, 50, eta, clamp=False)
    assert out.mean() == pytest.approx(mean, abs=0.01)
    assert out.std() == pytest.approx(0.2, rel=0.03)   # unless extrapolated: 7 and 13 % too small


def test_extrapolation_is_exact_where_x_0_hat_changes_evenly(alpha_bar):
    """x_0_hat = c + d lambda: half a step ahead is its value in the middle of the step."""
    c, d = torch.randn(2, 1, 3, 4, 6)
    lam = lambda t: (alpha_bar[t].sqrt() / (1 - alpha_bar[t]).sqrt()).log()
    x_0_hat = lambda lam: c + d * lam
    ahead = tinyddpm.extrapolated(
        x_0_hat(lam(700)), x_0_hat(lam(800)), 800, 700, 500, alpha_bar)
    assert torch.allclose(ahead, x_0_hat((lam(700) + lam(500)) / 2), atol=1e-5)


def test_inversion_finds_the_noise(alpha_bar):
    """For Gaussian data the way from noise to picture is known: x_0 = mean + std x_T. Inversion
    goes it backwards, and sampling returns; both get better with the number of steps."""
    mean, std = 0.3, 0.5

    def denoise(x_t, t):
        a = tinyddpm.at(alpha_bar, t)
        return mean + a.sqrt() * std ** 2 / (a * std ** 2 + 1 - a) * (x_t - a.sqrt() * mean)

    torch.manual_seed(0)
    x_0, errors, returns = mean + std * torch.randn(2, 3, 4, 6), [], []
    for steps in (10, 50, 250):
        x_T = tinyddpm.invert(denoise, x_0, alpha_bar, steps)
        errors.append((x_T - (x_0 - mean) / std).abs().max().item())
        back = tinyddpm.sample(denoise, x_T, None, alpha_bar, steps, eta=0., clamp=False)
        returns.append((back - x_0).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05
    assert returns[0] > returns[1] > returns[2] and returns[2] < 0.05


def test_moves_go_back_into_the_noise():
    assert list(tinyddpm.moves([9, 5, 0])) == [(9, 5), (5, 0)]
    assert list(tinyddpm.moves([9, 5, 0], 2)) == [(9, 5), (5, 9), (9, 5), (5, 0)]


def test_the_loss_of_the_true_v_is_zero_and_the_denoiser_inverts_it(alpha_bar):
    """v, x_0_hat and q_sample are one consistent set: a network that knows v has loss 0, and its
    denoiser returns x_0."""
    x_0, eps = torch.randn(2, 4, 3, 8, 12)
    t = torch.tensor([1, 100, 500, 990])
    a = alpha_bar[t].view(-1, 1, 1, 1)
    truth = lambda x_t, t: a.sqrt() * eps - (1 - a).sqrt() * x_0
    assert (tinyddpm.ddpm_loss(truth, x_0, t, eps, alpha_bar) == 0).all()
    x_0_hat = tinyddpm.denoiser(truth, alpha_bar)(q_sample(x_0, t, eps, alpha_bar), t)
    assert torch.allclose(x_0_hat, x_0, atol=1e-4)


def test_random_times_cover_1_to_T_evenly():
    t = tinyddpm.random_times(1000, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t, torch.arange(1, 1001))
    t = torch.cat([tinyddpm.random_times(8, 1000, torch.Generator().manual_seed(i))
                   for i in range(500)])
    assert t.min() >= 1 and t.max() <= 1000 and t.float().mean() == pytest.approx(500.5, abs=5)


def test_ema_of_a_constant_is_the_constant_and_first_update_copies():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    tinyddpm.ema_update(a, b, 1)
    assert torch.equal(a.weight, b.weight)
    tinyddpm.ema_update(a, b, 2)
    assert torch.allclose(a.weight, b.weight)


def test_ema_remembers_a_tenth_of_the_run():
    """Its weights over past steps have a deviation of sigma_rel times the run's length (the
    definition of sigma_rel)."""
    steps, gamma = 2000, 6.94
    decay = [(1 - 1 / s) ** (gamma + 1) for s in range(1, steps + 1)]
    ema, weight = torch.nn.Linear(1, 1, bias=False), 1.
    weights = torch.zeros(steps)
    for s in reversed(range(steps)):
        weights[s], weight = weight * (1 - decay[s]), weight * decay[s]
    where = torch.arange(1, steps + 1).float()
    mean = (weights * where).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    assert (((weights * (where - mean) ** 2).sum().sqrt() / steps).item()
            == pytest.approx(0.10, abs=0.003))
    model = torch.nn.Linear(1, 1, bias=False)                     # and ema_update has these weights
    torch.nn.init.zeros_(ema.weight)
    for s in range(1, 51):
        torch.nn.init.constant_(model.weight, float(s))
        tinyddpm.ema_update(ema, model, s)
    expected, average = 0., 0.
    for s in range(1, 51):
        average = decay[s - 1] * average + (1 - decay[s - 1]) * s
    assert ema.weight.item() == pytest.approx(average, rel=1e-5)


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    many = tinyddpm.noise(generators(5), (3, 4, 6))
    one = tinyddpm.noise([data.generator(0, 3)], (3, 4, 6))
    assert torch.equal(many[3:4], one) and not torch.equal(many[2], many[3])


def test_learning(alpha_bar):
    """Eight pictures are learnt by heart: the loss falls to a fraction of what it starts from."""
    torch.manual_seed(0)
    x_0 = data.to_float(cars.render(0, range(8), 16)[0])
    unet = UNet(UNetConfig(channels=32, multipliers=(1, 2), blocks=1, attention=(1,),
                           image_size=16))
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    losses = []
    for step in range(100):
        g = data.generator(0, step)
        t = tinyddpm.random_times(8, 1000, g)
        loss = tinyddpm.ddpm_loss(
            unet, x_0, t, torch.randn(x_0.shape, generator=g), alpha_bar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 * losses[0]
