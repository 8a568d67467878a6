"""Schedule, U-Net, loss, steps and sampling loops against formulas and closed answers."""
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import cars
import data
import tinyclip
import tinyddpm
from tinyddpm import UNet, UNetConfig, ddim_step, q_sample, randn_per_image, sample


def generators(n):
    return [data.generator("sampling", 0, i) for i in range(n)]


def gaussian_denoiser(alpha_bar, mean, var):
    """The exact denoiser of data that are N(mean, var) in every pixel."""
    def denoise(x_t, t):
        a = tinyddpm.extract(alpha_bar, t)
        return mean + a.sqrt() * var / (a * var + 1 - a) * (x_t - a.sqrt() * mean)
    return denoise


def nonlinear(x_t, t):
    """A denoiser that depends on x_t and on t."""
    return torch.tanh(2 * x_t) * (1 - t.view(-1, 1, 1, 1) / 100)


def noise_model(denoise, alpha_bar):
    """The same model, predicting eps: what Algorithm 2 asks for."""
    return lambda x_t, t: tinyddpm.predict_eps(
        x_t, denoise(x_t, t), tinyddpm.extract(alpha_bar, t))


# ---- the forward process -------------------------------------------------------------------------

def test_cosine_schedule(alpha_bar):
    """It is eq. 17 of the paper, from 1 down to almost 0, with beta clipped at 0.999."""
    assert alpha_bar.shape == (1001,) and alpha_bar[0] == 1 and 0 < alpha_bar[1000] < 1e-8
    assert (alpha_bar[1:] < alpha_bar[:-1]).all()
    f = lambda t: math.cos((t / 1000 + .008) / 1.008 * math.pi / 2) ** 2
    for t in (1, 10, 500, 900):
        assert alpha_bar[t].item() == pytest.approx(f(t) / f(0), rel=1e-5)
    assert 1 - alpha_bar[1000] / alpha_bar[999] == pytest.approx(0.999, abs=1e-4)


def test_both_chapters_have_the_same_number_of_timesteps():
    """The noise-aware CLIP and the diffusion model count t in the same units."""
    assert tinyddpm.T == tinyclip.T == len(tinyddpm.cosine_alpha_bar()) - 1 == 1000


def test_q_sample_keeps_unit_variance_and_t_0_is_clean(alpha_bar):
    """For data of variance 1, x_t has variance 1 at every t, and x_0 is the image itself."""
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 64, 3, 8, 12)
    assert torch.equal(q_sample(x_0, torch.zeros(64, dtype=torch.long), eps, alpha_bar), x_0)
    for t in (300, 600, 900):
        x_t = q_sample(x_0, torch.full((64,), t), eps, alpha_bar)
        assert x_t.std() == pytest.approx(1, abs=0.02)


def test_q_sample_is_the_chain_of_small_steps():
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, t times, has the mean and the variance
    of one q_sample."""
    torch.manual_seed(0)
    alpha_bar = tinyddpm.cosine_alpha_bar(50)
    x = torch.full((16, 3, 32, 40), 0.7)
    for t in range(1, 21):
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn_like(x)
    assert x.mean() == pytest.approx(0.7 * alpha_bar[20].sqrt().item(), abs=0.01)
    assert x.var() == pytest.approx(1 - alpha_bar[20].item(), rel=0.02)


# ---- the U-Net -----------------------------------------------------------------------------------

def test_timestep_embedding_by_hand():
    """Sines, then cosines, of t times frequencies from 1 down to almost 1/10000."""
    embedding = tinyddpm.timestep_embedding(torch.tensor([0, 3, 1000]), 8)
    for row, t in zip(embedding, (0, 3, 1000)):
        angles = [t / 10000 ** (i / 4) for i in range(4)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-3)


def test_attention_of_the_unet_is_softmax_attention():
    """Its output is the input plus that of F.scaled_dot_product_attention over all positions."""
    torch.manual_seed(0)
    layer = tinyddpm.SelfAttention(64)
    torch.nn.init.normal_(layer.out.weight, std=.1)
    x = torch.randn(2, 64, 3, 5)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (part.view(2, 15, 2, 32).transpose(1, 2)
               for part in layer.qkv(tokens).chunk(3, dim=-1))
    values = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 15, 64)
    expected = x + layer.out(values).transpose(1, 2).view(2, 64, 3, 5)
    assert torch.allclose(layer(x), expected, atol=1e-5) and not torch.allclose(expected, x)


def test_residual_block_by_hand():
    """Norm, SiLU, conv, norm, scale and shift by the time embedding, SiLU, conv, plus the input."""
    torch.manual_seed(0)
    block = tinyddpm.ResBlock(16, 32, 8, 0.)
    torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, time = torch.randn(2, 16, 4, 6), torch.randn(2, 8)
    h = block.norm2(block.conv1(F.silu(block.norm1(x))))
    scale, shift = block.time_proj(time).view(2, 2, 32, 1, 1).unbind(dim=1)
    expected = block.skip(x) + block.conv2(F.silu(h * (1 + scale) + shift))
    assert torch.allclose(block(x, time), expected, atol=1e-6)
    assert torch.isfinite(expected).all()


def test_unet_at_start_predicts_zero_and_takes_any_shape_that_halves():
    """The last layer starts at zero, and H and W need only be even with two levels."""
    unet = UNet(UNetConfig(channels=16, multipliers=(1, 2), attention=(1,)))
    out = unet(torch.randn(2, 3, 16, 24), torch.tensor([1, 1000]))
    assert out.shape == (2, 3, 16, 24) and (out == 0).all()


def test_blocks_at_start_are_their_skip_connections():
    """Their last layers start at zero: what goes in comes out, if need be in other channels."""
    x, block = torch.randn(2, 32, 4, 6), tinyddpm.ResBlock(32, 64, 8, 0.)
    assert torch.equal(block(x, torch.randn(2, 8)), block.skip(x))
    assert torch.equal(tinyddpm.SelfAttention(32)(x), x)


def test_levels_with_attention_are_those_of_the_config():
    """And the middle of the U-Net always has it."""
    for attention in ((), (0,), (1, 2)):
        unet = UNet(UNetConfig(channels=32, attention=attention))
        count = lambda part: sum(isinstance(m, tinyddpm.SelfAttention) for m in part.modules())
        assert (count(unet.down), count(unet.mid)) == (len(attention), 1)
        assert count(unet.up) == 2 * len(attention)   # one block more than down


def test_dropout_is_of_training_only():
    """A U-Net with dropout gives different outputs in training mode, and the same in eval mode."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=16, multipliers=(2,), attention=(), dropout=0.5))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = torch.randn(1, 3, 4, 6), torch.tensor([5])
    assert not torch.equal(unet(x, t), unet(x, t))
    assert torch.equal(unet.eval()(x, t), unet(x, t))


def test_unet_depends_on_t_and_images_do_not_interact(unet):
    """An image's v_hat is the same alone and in a batch, and another at another timestep."""
    x, t = torch.randn(3, 3, 8, 12), torch.tensor([5, 500, 995])
    with torch.no_grad():
        together, alone = unet(x, t), unet(x[1:2], t[1:2])
        assert torch.isfinite(together).all() and torch.allclose(together[1:2], alone, atol=1e-5)
        assert not torch.allclose(unet(x[1:2], t[2:]), alone, atol=1e-3)


@pytest.mark.parametrize("blocks, multipliers", [(1, (1,)), (2, (1, 2)), (1, (1, 2, 2))])
def test_every_skip_connection_is_used(blocks, multipliers):
    """Whatever the depth, each parameter of a random U-Net has a gradient, also where a skip
    connection enters a block."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=16, multipliers=(*multipliers, 2), blocks=blocks,
                           attention=(len(multipliers),), cond_dim=5))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = unet(torch.randn(2, 3, 8, 16), torch.tensor([5, 500]), torch.randn(2, 5))
    out.square().mean().backward()
    assert torch.isfinite(out).all() and all(p.grad.any() for p in unet.parameters())
    blocks_up = [layer[0] for layer in unet.up if isinstance(layer, torch.nn.ModuleList)]
    assert blocks_up and all(block.norm1.weight.grad.all() for block in blocks_up)


def test_no_condition_is_condition_zero_and_each_condition_has_its_own_output(unet):
    """cond = None equals cond = 0 exactly; a cond other than 0 changes v_hat, each differently."""
    x, t = torch.randn(1, 3, 4, 6).expand(3, -1, -1, -1), torch.full((3,), 300)
    cond = torch.stack([torch.zeros(16), torch.ones(16), torch.arange(16.) / 8])
    with torch.no_grad():
        out, unconditional = unet(x, t, cond), unet(x, t)
        assert torch.equal(unet(x, t, torch.zeros(3, 16)), unconditional)
    assert torch.isfinite(out).all() and torch.allclose(out[0], unconditional[0], atol=1e-5)
    for i, j in itertools.combinations(range(3), 2):
        assert (out[i] - out[j]).abs().max() > 1e-3


def test_condition_starts_without_effect_and_is_learnt(unet):
    """A new cond_proj is zero, so any cond equals none at first; its gradient is not zero."""
    fresh = UNet(unet.config)
    weights = {name: w for name, w in unet.state_dict().items() if not name.startswith("cond")}
    fresh.load_state_dict(weights, strict=False)
    x, t, cond = torch.randn(2, 3, 4, 6), torch.tensor([30, 300]), torch.randn(2, 16)
    out = fresh(x, t, cond)
    assert torch.equal(out, fresh(x, t)) and out.abs().max() > 1e-3
    out.square().sum().backward()
    assert fresh.cond_proj.weight.grad.any()


def test_six_channels_in_three_out():
    """With in_channels = 6 another image is concatenated to x_t, and v_hat depends on it."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(channels=16, multipliers=(1, 2), attention=(1,), in_channels=6))
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x_t, other, t = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.tensor([20, 900])
    with torch.no_grad():
        out, changed = (unet(torch.cat([x_t, image], dim=1), t) for image in (other, -other))
    assert out.shape == (2, 3, 8, 12) and torch.isfinite(out).all()
    assert (out - changed).abs().max() > 1e-3


@pytest.mark.parametrize("options", [
    dict(channels=24), dict(channels=16, multipliers=(1,), attention=(0,)), dict(channels=0),
    dict(image_size=30), dict(attention=(3,))])
def test_sizes_that_do_not_fit_are_refused(options):
    """Channels that GroupNorm or attention cannot divide, sizes that cannot be halved."""
    with pytest.raises(ValueError, match=next(iter(options))):
        UNetConfig(**options)


def test_from_checkpoint_returns_the_same_unet(unet):
    """Config and fp16 weights give back the network in float32, in eval mode, without gradients."""
    unet.half().float()   # so that fp16 loses nothing
    content = {"config": dataclasses.asdict(unet.config),
               "weights": {name: w.half() for name, w in unet.state_dict().items()}}
    again = UNet.from_checkpoint(content)
    x, t, cond = torch.randn(2, 3, 4, 6), torch.tensor([30, 300]), torch.randn(2, 16)
    out = again(x, t, cond)
    assert torch.isfinite(out).all() and torch.allclose(out, unet(x, t, cond), atol=1e-6)
    assert again.config == unet.config and not again.training and not out.requires_grad


# ---- training ------------------------------------------------------------------------------------

def test_loss_of_the_true_v_is_zero_and_the_denoiser_inverts_it(alpha_bar):
    """v, x_0_hat and q_sample are one consistent set: the true v has loss 0, and its denoiser
    returns x_0."""
    torch.manual_seed(0)
    x_0, eps = torch.randn(2, 4, 3, 8, 12)
    t = torch.tensor([1, 100, 500, 990])
    a = alpha_bar[t].view(-1, 1, 1, 1)
    v = a.sqrt() * eps - (1 - a).sqrt() * x_0
    exact, off_by_one = lambda x_t, t, cond: v, lambda x_t, t, cond: v + torch.ones(4, 1, 1, 1)
    assert (tinyddpm.ddpm_loss(exact, x_0, t, eps, alpha_bar) == 0).all()
    assert torch.allclose(tinyddpm.ddpm_loss(off_by_one, x_0, t, eps, alpha_bar), torch.ones(4))
    x_0_hat = tinyddpm.denoiser(exact, alpha_bar)(q_sample(x_0, t, eps, alpha_bar), t)
    assert torch.allclose(x_0_hat, x_0, atol=1e-4)
    eps_hat = tinyddpm.predict_eps(q_sample(x_0, t, eps, alpha_bar), x_0, a)
    assert torch.allclose(eps_hat[1:], eps[1:], atol=1e-4)


def test_loss_and_denoiser_pass_the_condition_on(unet, alpha_bar):
    """With a cond they are those of the network that has it as an argument."""
    x_0, eps, cond = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.randn(2, 16)
    t, fixed = torch.tensor([40, 400]), lambda x_t, t, _: unet(x_t, t, cond)
    with torch.no_grad():
        loss = tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar, cond)
        assert torch.equal(loss, tinyddpm.ddpm_loss(fixed, x_0, t, eps, alpha_bar))
        assert not torch.allclose(loss, tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar))
        x_0_hat = tinyddpm.denoiser(unet, alpha_bar, cond)(x_0, t)
        assert torch.equal(x_0_hat, tinyddpm.denoiser(fixed, alpha_bar)(x_0, t))


def test_stratified_timesteps_cover_1_to_T_evenly():
    """A batch of T has each timestep once; small batches have a draw from each equal part."""
    t = tinyddpm.stratified_timesteps(1000, torch.Generator().manual_seed(0))
    assert torch.equal(t, torch.arange(1, 1001))
    t = torch.stack([tinyddpm.stratified_timesteps(8, torch.Generator().manual_seed(i))
                     for i in range(500)])
    assert t.min() >= 1 and t.max() <= 1000 and t.float().mean() == pytest.approx(500.5, abs=5)
    assert torch.equal((t - 1) // 125, torch.arange(8).expand(500, 8))
    assert ((t - 1) % 125).unique().tolist() == list(range(125))   # anywhere in its part


def test_ema_of_a_constant_is_the_constant_and_the_first_update_copies():
    """At step 1 nothing of the random start is left."""
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    tinyddpm.ema_update(a, b, 1)
    assert torch.equal(a.weight, b.weight)
    tinyddpm.ema_update(a, b, 2)
    assert torch.allclose(a.weight, b.weight)


def test_ema_averages_over_a_tenth_of_the_run():
    """Its weights over past steps have a standard deviation of sigma_rel = 0.1 times the run's
    length, the definition of sigma_rel."""
    steps, gamma = 2000, 6.94
    decay = [(1 - 1 / s) ** (gamma + 1) for s in range(1, steps + 1)]
    weight, weights = 1., torch.zeros(steps)
    for s in reversed(range(steps)):
        weights[s], weight = weight * (1 - decay[s]), weight * decay[s]
    step = torch.arange(1, steps + 1).float()
    mean = (weights * step).sum()
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    std = (weights * (step - mean) ** 2).sum().sqrt() / steps
    assert std.item() == pytest.approx(0.10, abs=0.003)

    ema, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    expected = 0.   # and ema_update has these weights
    for s in range(1, 51):
        torch.nn.init.constant_(model.weight, float(s))
        tinyddpm.ema_update(ema, model, s)
        expected = decay[s - 1] * expected + (1 - decay[s - 1]) * s
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


def test_learning(alpha_bar):
    """Eight images are learnt by heart: the loss falls to a fraction of what it starts from."""
    torch.manual_seed(0)
    x_0 = data.to_float(cars.render(0, range(8), 16)[0])
    unet = UNet(UNetConfig(channels=32, multipliers=(1, 2), attention=(1,), image_size=16))
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    losses = []
    for step in range(60):
        g = data.generator("sampling", 0, step)
        t, eps = tinyddpm.stratified_timesteps(8, g), torch.randn(x_0.shape, generator=g)
        loss = tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.35 * losses[0]


# ---- one step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [2, 400, 999])
def test_eta_1_is_the_ddpm_posterior(alpha_bar, t):
    """Mean and variance of a step to t - 1 are those of Ho et al. 2020 eq. 7."""
    torch.manual_seed(0)
    x_0_hat, x_t, z = torch.randn(3, 1, 3, 4, 6, dtype=torch.double)
    alpha_bar = alpha_bar.double()
    a, a_next = alpha_bar[t], alpha_bar[t - 1]
    beta = 1 - a / a_next
    mean = (a_next.sqrt() * beta / (1 - a) * x_0_hat
            + (1 - beta).sqrt() * (1 - a_next) / (1 - a) * x_t)
    sigma = (beta * (1 - a_next) / (1 - a)).sqrt()
    out = ddim_step(x_t, x_0_hat, t, t - 1, alpha_bar, 1., z)
    assert torch.allclose(out, mean + sigma * z, atol=1e-9)


@pytest.mark.parametrize("eta", [0., 0.3, 1.])
@pytest.mark.parametrize("t, t_next", [(1000, 900), (500, 250), (7, 6)])
def test_a_step_has_the_right_variance(alpha_bar, eta, t, t_next):
    """Whatever eta, a step from q_sample(x_0, t) with the true x_0 is distributed as
    q_sample(x_0, t_next)."""
    torch.manual_seed(0)
    x_0, (eps, z) = torch.full((16, 3, 32, 40), 0.7), torch.randn(2, 16, 3, 32, 40)
    x_t = q_sample(x_0, torch.full((16,), t), eps, alpha_bar)
    x_next = ddim_step(x_t, x_0, t, t_next, alpha_bar, eta, z)
    std = (1 - alpha_bar[t_next]).sqrt().item()
    mean = 0.7 * alpha_bar[t_next].sqrt().item()
    assert x_next.mean() == pytest.approx(mean, abs=0.02 * std)
    assert x_next.std() == pytest.approx(std, rel=0.02)


def test_multistep_is_exact_where_x_0_hat_changes_evenly(alpha_bar):
    """For x_0_hat = c + d lambda, half a step ahead is its value in the middle of the step."""
    torch.manual_seed(0)
    c, d = torch.randn(2, 1, 3, 4, 6)
    lam = lambda t: (alpha_bar[t].sqrt() / (1 - alpha_bar[t]).sqrt()).log()
    x_0_hat = lambda lam: c + d * lam
    out = tinyddpm.multistep_x_0(
        x_0_hat(lam(700)), x_0_hat(lam(800)), 800, 700, 500, alpha_bar)
    assert torch.allclose(out, x_0_hat((lam(700) + lam(500)) / 2), atol=1e-5)


# ---- the sampling loops --------------------------------------------------------------------------

def test_ddim_timesteps():
    """They run evenly from T to 0, both included, and with T steps visit every timestep."""
    assert tinyddpm.ddim_timesteps(1000, 4) == [1000, 750, 500, 250, 0]
    assert tinyddpm.ddim_timesteps(50, 50) == list(range(50, -1, -1))
    for steps in (3, 7, 333):
        t = tinyddpm.ddim_timesteps(1000, steps)
        assert len(t) == steps + 1 and t[0] == 1000 and t[-1] == 0
        gaps = [a - b for a, b in itertools.pairwise(t)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("eta", [0., 0.5, 1.])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_given_the_true_x_0_every_sampler_returns_it(alpha_bar, eta, steps):
    """If the denoiser returns x_0, any number of steps and any eta end at it: no index is off by
    one."""
    torch.manual_seed(0)
    x_0, timesteps = torch.rand(2, 3, 4, 6) * 2 - 1, []
    out = sample(lambda x_t, t: x_0, torch.randn(2, 3, 4, 6), generators(2), alpha_bar, steps, eta,
                 callback=lambda t, x_t, x_0_hat: timesteps.append(t))
    assert torch.allclose(out, x_0, atol=1e-6)
    assert len(timesteps) == steps and timesteps[0] == 1000 and 0 not in timesteps


def test_algorithm_2_is_sample_with_T_steps_and_eta_1():
    """With a denoiser that returns a constant x_0, where extrapolation changes nothing, both loops
    pass through the same x_t at every timestep."""
    torch.manual_seed(0)
    alpha_bar = tinyddpm.cosine_alpha_bar(50).double()
    x_0, x_T = torch.randn(2, 2, 3, 4, 6, dtype=torch.double)
    trajectory, trajectory_2 = [], []
    eps_model = noise_model(lambda x_t, t: x_0, alpha_bar)

    def record(x_t, t):
        trajectory_2.append((int(t[0]), x_t))
        return eps_model(x_t, t)

    out = sample(lambda x_t, t: x_0, x_T, generators(2), alpha_bar, steps=50, eta=1., clamp=False,
                 callback=lambda t, x_t, _: trajectory.append((t, x_t)))
    out_2 = tinyddpm.ddpm_sample(record, x_T, generators(2), alpha_bar)
    assert torch.allclose(out, x_0, atol=1e-6) and torch.allclose(out_2, out, atol=1e-6)
    assert len(trajectory) == len(trajectory_2) == 50
    for (t, x_t), (t_2, x_t_2) in zip(trajectory, trajectory_2):
        assert t == t_2 and torch.isfinite(x_t).all() and torch.allclose(x_t, x_t_2, atol=1e-6)


def test_algorithm_2_is_a_loop_of_ddim_steps_with_eta_1():
    """Also for a denoiser that is nonlinear in x_t and depends on t."""
    torch.manual_seed(0)
    alpha_bar, shape = tinyddpm.cosine_alpha_bar(50).double(), (3, 4, 6)
    x_t = x_T = torch.randn(2, *shape).double()
    noise = generators(2)
    for t in range(50, 0, -1):
        x_0_hat = nonlinear(x_t, torch.full((2,), t))
        z = randn_per_image(noise, shape) if t > 1 else 0.
        x_t = ddim_step(x_t, x_0_hat, t, t - 1, alpha_bar, 1., z)
    out = tinyddpm.ddpm_sample(noise_model(nonlinear, alpha_bar), x_T, generators(2), alpha_bar)
    assert torch.isfinite(out).all() and torch.allclose(out, x_t, atol=1e-6)
    assert not torch.allclose(out, nonlinear(x_T, torch.full((2,), 50)), atol=0.1)


def test_sample_is_the_multistep_loop_written_out():
    """With a nonlinear denoiser, every step but the first and the last goes towards the
    extrapolated x_0_hat."""
    torch.manual_seed(0)
    alpha_bar = tinyddpm.cosine_alpha_bar().double()
    x_t = x_T = torch.randn(2, 3, 4, 6).double()
    t_prev = x_0_prev = None
    for t, t_next in [(1000, 750), (750, 500), (500, 250), (250, 0)]:
        x_0_hat = torch.tanh(2 * x_t)
        x_0 = (x_0_hat if t in (1000, 250) else tinyddpm.multistep_x_0(
            x_0_hat, x_0_prev, t_prev, t, t_next, alpha_bar))
        x_t = ddim_step(x_t, x_0, t, t_next, alpha_bar, 0., 0.)
        t_prev, x_0_prev = t, x_0_hat
    out = sample(lambda x, t: torch.tanh(2 * x), x_T, None, alpha_bar, steps=4, eta=0.)
    assert torch.isfinite(out).all() and torch.allclose(out, x_t, atol=1e-9)


def test_deterministic_steps_stay_on_the_straight_path(alpha_bar):
    """With the true x_0, DDIM with eta 0 passes through q_sample(x_0, t, eps) at each timestep."""
    torch.manual_seed(0)
    x_0, eps, path = torch.rand(1, 3, 4, 6) * 2 - 1, torch.randn(1, 3, 4, 6), {}
    x_T = q_sample(x_0, torch.tensor([1000]), eps, alpha_bar)
    sample(lambda x_t, t: x_0, x_T, generators(1), alpha_bar, 10, eta=0.,
           callback=lambda t, x_t, _: path.update({t: x_t}))
    assert sorted(path) == list(range(100, 1001, 100))
    for t, x_t in path.items():
        # At T the image is 5e-5 of x_T: single precision cannot separate the two.
        if t < 1000:
            assert torch.allclose(x_t, q_sample(x_0, torch.tensor([t]), eps, alpha_bar), atol=2e-3)


@pytest.mark.parametrize("eta", [0., 1.])
def test_gaussian_data_are_sampled_exactly(alpha_bar, eta):
    """If pixels are N(0.3, 0.2^2), the best denoiser is known; the samples have that mean and that
    standard deviation."""
    out = sample(gaussian_denoiser(alpha_bar, 0.3, 0.04), randn_per_image(generators(16),
                 (3, 16, 20)), generators(16), alpha_bar, 50, eta, clamp=False)
    assert out.mean() == pytest.approx(0.3, abs=0.01)
    assert out.std() == pytest.approx(0.2, rel=0.03)   # without extrapolation 7 and 13 % too small


def test_clamp_keeps_x_0_hat_in_the_range_of_images(alpha_bar):
    """x_0_hat is clamped to [-1, 1] before it is used and before the callback gets it."""
    estimates = []
    for options, largest in (({}, 1.), ({"clamp": False}, 2.)):
        out = sample(lambda x_t, t: 2 * torch.ones_like(x_t), torch.randn(1, 3, 4, 6),
                     generators(1), alpha_bar, 5, **options,
                     callback=lambda t, x_t, x_0_hat: estimates.append(x_0_hat))
        assert torch.allclose(out, torch.full_like(out, largest), atol=1e-6)
    assert [estimate.max().item() for estimate in estimates] == [1.] * 5 + [2.] * 5


def test_recurrence_returns_to_the_same_noise_level(alpha_bar):
    """With the true x_0, every x_t has mean sqrt(alpha_bar_t) x_0 and variance 1 - alpha_bar_t,
    the first time as the third; the last step is taken once."""
    x_0, g, trajectory = 0.7, generators(8), []
    x_T = math.sqrt(alpha_bar[-1]) * x_0 + randn_per_image(g, (3, 32, 40))
    out = sample(lambda x_t, t: torch.full_like(x_t, x_0), x_T, g, alpha_bar, 5, recurrence=3,
                 callback=lambda t, x_t, _: trajectory.append((t, x_t)))
    timesteps = [t for t, _ in trajectory]
    assert timesteps == [t for t in (1000, 800, 600, 400) for _ in range(3)] + [200]
    for t, x_t in trajectory:
        assert x_t.mean() == pytest.approx(math.sqrt(alpha_bar[t]) * x_0, abs=0.02)
        assert x_t.var() == pytest.approx(1 - alpha_bar[t].item(), rel=0.03)
    assert torch.allclose(out, torch.full_like(out, x_0), atol=1e-5)


def test_recurrence_forgets_the_multistep_history(alpha_bar):
    """After re-noising, x_0_hat is used as it is: a repeated step is a single DDIM step."""
    torch.manual_seed(0)
    x_T, trajectory = torch.randn(1, 3, 4, 6), []
    denoise = lambda x_t, t: torch.tanh(2 * x_t)
    sample(denoise, x_T, generators(1), alpha_bar, 4, eta=0., recurrence=2,
           callback=lambda t, x_t, x_0_hat: trajectory.append((t, x_t, x_0_hat)))
    assert [t for t, *_ in trajectory] == [1000, 1000, 750, 750, 500, 500, 250]
    for (t, x_t, x_0_hat), (t_next, x_next, _) in itertools.pairwise(trajectory):
        if t_next < t:   # the second time at t
            single = ddim_step(x_t, x_0_hat, t, t_next, alpha_bar, 0., 0.)
            assert torch.allclose(x_next, single, atol=1e-5)


def test_inversion_finds_the_noise(alpha_bar):
    """For Gaussian data x_T is known: the standardised x_t does not change on its way. Inversion
    leads to it, with an error of second order in the step, and sampling returns."""
    mean, std = 0.3, 0.5
    denoise = gaussian_denoiser(alpha_bar, mean, std ** 2)
    torch.manual_seed(0)
    x_0, eps = mean + std * torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    a = alpha_bar[tinyddpm.T_INVERT]
    noised = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    true = (noised - a.sqrt() * mean) / (a * std ** 2 + 1 - a).sqrt()
    errors = [(tinyddpm.invert(denoise, x_0, eps, alpha_bar, steps) - true).abs().max().item()
              for steps in (5, 10, 20, 40)]
    assert all(3 < coarse / fine < 6 for coarse, fine in itertools.pairwise(errors))
    assert errors[-1] < 2e-3
    x_T = tinyddpm.invert(denoise, x_0, eps, alpha_bar)
    again = sample(denoise, x_T, None, alpha_bar, 250, eta=0., clamp=False)
    assert (again - x_0).abs().max() < 0.2 and (again - x_0).std() < 0.05   # eps at t = 20
    assert 0.9 < x_T.std() < 1.1


def test_noise_of_an_image_does_not_depend_on_its_batch():
    """It comes from the image's own generator."""
    many = randn_per_image(generators(5), (3, 4, 6))
    one = randn_per_image([data.generator("sampling", 0, 3)], (3, 4, 6))
    assert torch.equal(many[3:4], one) and not torch.equal(many[2], many[3])


def test_sample_leaves_gradients_to_the_caller(alpha_bar):
    """x_T can be optimised through the loop: its gradient is that of finite differences."""
    torch.manual_seed(0)
    alpha_bar = alpha_bar.double()
    x_T, direction = torch.randn(2, 1, 3, 4, 6, dtype=torch.double)
    run = lambda x: sample(lambda x_t, t: torch.tanh(x_t), x, None, alpha_bar, 5, eta=0.).sum()
    x = x_T.clone().requires_grad_()
    grad, = torch.autograd.grad(run(x), x)
    h = 1e-5
    slope = (run(x_T + h * direction) - run(x_T - h * direction)) / (2 * h)
    along = (grad * direction).sum()
    assert abs(along) > 1e-4 and along.item() == pytest.approx(slope.item(), rel=1e-5)


# ---- the score -----------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [1, 300, 700, 999])
def test_tweedies_formula(alpha_bar, t):
    """For Gaussian data the gradient of log p(x_t) is (sqrt(a) x_0_hat - x_t) / (1 - a), which is
    -eps_hat / sqrt(1 - a)."""
    torch.manual_seed(0)
    mean, var, alpha_bar = 0.3, 0.04, alpha_bar.double()
    a = alpha_bar[t]
    x_t = torch.randn(2, 3, 4, 6).double().requires_grad_()
    p = torch.distributions.Normal(a.sqrt() * mean, (a * var + 1 - a).sqrt())
    score, = torch.autograd.grad(p.log_prob(x_t).sum(), x_t)
    x_0_hat = gaussian_denoiser(alpha_bar, mean, var)(x_t, torch.tensor([t, t]))
    assert torch.isfinite(score).all() and score.abs().max() > 0.1
    assert torch.allclose(score, (a.sqrt() * x_0_hat - x_t) / (1 - a), rtol=1e-6)
    eps_hat = tinyddpm.predict_eps(x_t, x_0_hat, a)
    assert torch.allclose(score, -eps_hat / (1 - a).sqrt(), rtol=1e-6)
