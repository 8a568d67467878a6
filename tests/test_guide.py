import dataclasses
import functools
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

import data
import guide
import tinyddpm
from tinyddpm import at, sample
from unet import UNet


def generators(n):
    return [data.generator(0, i) for i in range(n)]


def gaussian_denoiser(alpha_bar, mean, var):
    """The exact denoiser of data that are N(mean, var) in every pixel."""
    def denoise(x_t, t):
        a = at(alpha_bar, t)
        return mean + a.sqrt() * var / (a * var + 1 - a) * (x_t - a.sqrt() * mean)
    return denoise


METHODS = [name for name in guide.METHODS if name != "none"]


@pytest.fixture
def told_unet(unet):
    """One that listens to captions, as random as the other."""
    torch.manual_seed(0)
    told = UNet(dataclasses.replace(unet.config, text=True), captions=294).eval()
    told.load_state_dict(unet.state_dict(), strict=False)
    return told


def draw(name, clip, unet, text_features, alpha_bar, target, scale, eta=1., steps=5,
         interval=None):
    """Pictures guided by a method, a picture for each target."""
    models = SimpleNamespace(clip=clip, unet=unet, alpha_bar=alpha_bar, log_prior=0.,
                             text_features=text_features)
    denoise = guide.guided_by(name, models, torch.tensor(target), scale, interval)
    g = generators(len(target))
    return sample(denoise, tinyddpm.noise(g, (3, 16, 16)), g, alpha_bar, steps, eta)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_scale_0_is_bit_equal_to_no_guidance(name, eta, clip, told_unet, text_features, alpha_bar):
    plain, guided = (draw(method, clip, told_unet, text_features, alpha_bar, [5, 77], 0., eta)
                     for method in ("none", name))
    assert torch.isfinite(plain).all() and torch.equal(plain, guided)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_guidance_reaches_every_sampler_and_depends_on_the_target(
        name, eta, clip, told_unet, text_features, alpha_bar):
    run = lambda method, target: draw(method, clip, told_unet, text_features, alpha_bar, [target],
                                      5., eta)
    out = run(name, 5)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, run("none", 5), atol=1e-4)
    assert not torch.allclose(out, run(name, 77), atol=1e-4)


@pytest.mark.parametrize("t", [2, 400, 990])
def test_it_is_what_papers_write_as_a_step_of_the_reverse_process(alpha_bar, t):
    """x_{t-1} = 1/sqrt(alpha_t) (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_hat + scale beta_t grad)
    + sigma_t z, with the posterior's sigma_t: so guidance is written around the DDPM."""
    x_t, eps_hat, slope, z = torch.randn(4, 2, 3, 4, 6, dtype=torch.float64)
    alpha_bar, now, scale = alpha_bar.double(), torch.full((2,), t), 3.
    a, a_next = alpha_bar[t], alpha_bar[t - 1]
    alpha, beta = a / a_next, 1 - a / a_next
    sigma = ((1 - a_next) / (1 - a) * beta).sqrt()
    mean = (x_t - beta / (1 - a).sqrt() * eps_hat + scale * beta * slope) / alpha.sqrt()

    denoise = guide.guided(lambda x, t: (x - (1 - a).sqrt() * eps_hat) / a.sqrt(),
                           lambda x, t, x_0_hat: (slope * x).sum(dim=(1, 2, 3)), alpha_bar, scale)
    ours = tinyddpm.ddim_step(x_t, denoise(x_t, now), t, t - 1, alpha_bar, 1., z)
    assert torch.allclose(ours, mean + sigma * z, rtol=1e-9)


@pytest.mark.parametrize("name", ["contrastive", "clean", "spherical", "x0"])
def test_gradient_against_finite_differences(name, clip, text_features):
    """In float64, and through an x_0_hat that depends on x_t."""
    clip, text_features = clip.double(), text_features.double()
    clip.time_features = lambda t, f=clip.time: f(t[:, None].double() * (4 / clip.config.T))
    clip.logits = lambda image, text, t=None: (
        clip.logit_scale(torch.zeros(len(image), dtype=torch.long) if t is None else t)
        * torch.nn.functional.normalize(image, dim=-1)
        @ torch.nn.functional.normalize(text, dim=-1).T)
    torch.Tensor.float, kept = torch.Tensor.double, torch.Tensor.float   # stay precise inside
    try:
        log_p = guide.METHODS[name].log_p(clip, text_features, torch.tensor([5, 77]))
        torch.manual_seed(0)
        x, t = torch.randn(2, 3, 16, 16).double().requires_grad_(), torch.tensor([300, 700])
        direction = torch.randn(2, 3, 16, 16).double()
        half = lambda x: x / 2 if guide.METHODS[name].through_unet else None
        grad, = torch.autograd.grad(log_p(x, t, half(x)).sum(), x)
        h = 1e-5
        slope = (log_p(x + h * direction, t, half(x + h * direction))
                 - log_p(x - h * direction, t, half(x - h * direction))) / (2 * h)
    finally:
        torch.Tensor.float = kept
    slope, along = slope.detach(), (grad * direction).sum(dim=(1, 2, 3))
    assert (along.abs() > 1e-4).all() and torch.allclose(along, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("share, there", [(0., [0, 0]), (0.75, [225, 525]), (1., [300, 700])])
def test_looking_ahead(share, there, alpha_bar):
    """What is looked at is where DDIM would go, and the time is right; the gradient is that of the
    looked-at function with the noise held fixed, times the number that stands for the U-Net."""
    torch.manual_seed(0)
    x, h, slope = torch.randn(3, 2, 3, 4, 6)
    t, seen = torch.tensor([300, 700]), []

    def log_p(x_s, s, x_0_hat):
        seen.append((x_s.detach(), s.tolist()))
        return (slope * x_s).sum(dim=(1, 2, 3))

    x_t = x.clone().requires_grad_()
    value = guide.looking_ahead(log_p, alpha_bar, share)(x_t, t, h)
    grad, = torch.autograd.grad(value.sum(), x_t)
    for i, (now, then) in enumerate(zip(t.tolist(), there)):
        at_s = tinyddpm.ddim_step(x[i], h[i], now, then, alpha_bar, 0., 0.) if share < 1 else x[i]
        a = alpha_bar[now]
        r2 = 0.25 * (1 - a) / (1 - a + 0.25 * a)
        expected = slope[i] * alpha_bar[then].sqrt() * r2 * a.sqrt() / (1 - a)
        assert torch.allclose(seen[0][0][i], at_s, atol=1e-4) and seen[0][1] == there
        assert torch.allclose(grad[i], expected, rtol=1e-4)


def test_a_methods_interval_goes_with_T(clip, unet, text_features):
    """At T = 100 guidance begins at t = 95, as it does at 950 of 1000."""
    models = SimpleNamespace(clip=clip, unet=unet, alpha_bar=tinyddpm.cosine_alpha_bar(100),
                             text_features=text_features, log_prior=0.)
    plain, steered = (guide.guided_by(name, models, torch.tensor([5]))
                      for name in ("none", "contrastive"))
    x = torch.randn(1, 3, 16, 16)
    same = [torch.equal(plain(x, torch.tensor([t])), steered(x, torch.tensor([t])))
            for t in (96, 95, 1)]
    assert same == [True, False, False]


def test_a_trajectory_leaves_nothing_behind(clip, unet, text_features, alpha_bar, monkeypatch):
    """Autocast once kept a copy of every x_t that was differentiated by."""
    kept, encode = [], clip.encode_image

    def watched(x, t=None):
        kept.append(weakref.ref(x))
        return encode(x, t)
    clip.encode_image = watched
    log_p = guide.contrastive(clip, text_features, torch.tensor([5]))
    guided = guide.guided(tinyddpm.denoiser(unet, alpha_bar), log_p, alpha_bar, 1.)
    monkeypatch.setattr(data, "cpu_is_fast_in_bf16", lambda: True)
    with data.autocast(torch.device("cpu")):
        for t in (900, 500, 100):
            guided(torch.randn(1, 3, 16, 16), torch.tensor([t]))
        assert [reference() for reference in kept] == [None] * 3


def test_the_push_is_dhariwal_and_nichols(alpha_bar):
    """x_0_hat + scale (1 - a)/sqrt(a) grad is eps_hat - scale sqrt(1 - a) grad, and it goes
    uphill."""
    torch.manual_seed(0)
    x_t, x_0_hat, grad = torch.randn(3, 2, 3, 4, 6)
    t = torch.tensor([400, 400])
    guided = guide.guided(lambda x, t: x_0_hat, lambda x, t, _: (grad * x).sum(dim=(1, 2, 3)),
                          alpha_bar, scale=3.)
    a = at(alpha_bar, t)
    eps_hat = (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt() - 3. * (1 - a).sqrt() * grad
    assert torch.allclose(guided(x_t, t), (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt(), atol=1e-5)


@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("scale", [1., 3.])
def test_gaussian_toy_with_a_closed_answer(alpha_bar, eta, scale):
    """Data N(0, 1), measured as y = x_0 + noise of variance s2: p(y | x_t) is Gaussian, and
    guidance with its exact log-density and scale 1 must sample the posterior
    N(y / (1 + s2), s2 / (1 + s2)). A larger scale is sharper, not exact."""
    y, s2 = 0.8, 0.5

    def log_p(x_t, t, x_0_hat):
        a = at(alpha_bar, t)
        return -((y - a.sqrt() * x_t) ** 2 / (2 * (s2 + 1 - a))).sum(dim=(1, 2, 3))

    guided = guide.guided(gaussian_denoiser(alpha_bar, 0., 1.), log_p, alpha_bar, scale)
    out = sample(guided, tinyddpm.noise(generators(16), (3, 32, 40)), generators(16),
                 alpha_bar, 250, eta, clamp=False)
    if scale == 1:
        assert out.mean() == pytest.approx(y / (1 + s2), abs=0.01)
        assert out.std() == pytest.approx(math.sqrt(s2 / (1 + s2)), rel=0.04)
    else:
        assert out.mean() > y / (1 + s2) + 0.05 and out.std() < math.sqrt(s2 / (1 + s2)) * 0.9


def test_interval_says_when_to_guide(alpha_bar):
    asked = []
    guided = guide.guided(
        lambda x, t: x, lambda x, t, _: asked.append(int(t[0])) or x.sum(dim=(1, 2, 3)),
        alpha_bar, 1., (200, 700))
    sample(guided, torch.randn(1, 3, 4, 6), generators(1), alpha_bar, 10)
    assert asked == [700, 600, 500, 400, 300, 200]


@pytest.mark.parametrize("name, unet_calls, unet_backward, encoder", [
    ("contrastive", 7, 0, 7), ("clean", 7, 0, 7), ("spherical", 7, 0, 7), ("x0-fast", 7, 0, 7),
    ("ahead", 7, 0, 7), ("x0", 7, 7, 7), ("classifier-free", 14, 0, 0)])
def test_what_a_method_costs(name, unet_calls, unet_backward, encoder, clip, told_unet,
                             text_features, alpha_bar):
    """Counted over 7 steps. The default: one U-Net forward a step, one encoder forward, one
    encoder backward, and no U-Net backward."""
    counts = {"unet": 0, "encoder": 0, "encoder backward": 0, "unet backward": 0}
    count = lambda key: lambda *_: counts.__setitem__(key, counts[key] + 1)
    told_unet.register_forward_hook(count("unet"))
    told_unet.last.register_full_backward_hook(count("unet backward"))
    clip.image.register_forward_hook(count("encoder"))
    clip.image.projection.register_full_backward_hook(count("encoder backward"))
    draw(name, clip, told_unet, text_features, alpha_bar, [5, 77], 2., steps=7, interval=(1, 1000))
    assert counts == {"unet": unet_calls, "encoder": encoder, "encoder backward": encoder,
                      "unet backward": unet_backward}


def test_a_picture_depends_on_its_own_seed_alone(clip, unet, text_features, alpha_bar):
    many, one = (draw("contrastive", clip, unet, text_features, alpha_bar, target, 2.)
                 for target in ([5, 77, 3, 9], [5]))
    assert torch.allclose(many[:1], one, atol=1e-3)


def test_one_thread_draws_what_two_draw(clip, unet, text_features, alpha_bar):
    pictures = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        pictures[threads] = draw("ahead", clip, unet, text_features, alpha_bar, [5, 77], 2.)
    assert torch.allclose(pictures[1], pictures[2], atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_needs_float64(name, clip, told_unet, text_features, alpha_bar, no_float64,
                                 monkeypatch):
    monkeypatch.setattr(guide, "cosine_alpha_bar", lambda T: alpha_bar)   # that is of the CPU
    with no_float64:
        draw(name, clip, told_unet, text_features, alpha_bar, [5, 77], 2.)


def test_classifier_free_is_a_line_through_two_opinions(told_unet, alpha_bar):
    """Scale 1 is the U-Net that is told the caption; other scales lie on the same line."""
    x, t, target = torch.randn(2, 3, 16, 16), torch.tensor([400, 400]), torch.tensor([3, 0])
    with torch.no_grad():
        nothing = tinyddpm.denoiser(told_unet, alpha_bar)(x, t)
        told = tinyddpm.denoiser(
            functools.partial(told_unet, caption=target + 1), alpha_bar)(x, t)
        out = {s: guide.classifier_free(told_unet, alpha_bar, target, s)(x, t) for s in (1., 3.)}
    assert torch.allclose(out[1.], told, atol=1e-5) and (told - nothing).abs().max() > 1e-3
    assert torch.allclose(out[3.], nothing + 3 * (told - nothing), atol=1e-5)


def test_the_prior_corrects_for_what_was_seen_more_often():
    """Two worlds that differ in how common the captions are: with the prior, CLIP's posterior
    becomes the diffusion model's."""
    prior = guide.prior_ratio([899, 99], [499, 499])
    posterior = (torch.tensor([0.5, 0.5]).log() + prior).softmax(0)
    assert posterior.tolist() == pytest.approx([0.9, 0.1], abs=1e-5)
    assert (guide.prior_ratio([5, 0, 7], [5, 0, 7]) == 0).all()
    assert torch.isfinite(guide.prior_ratio([0, 9], [9, 0])).all()


def test_recurrence_goes_back_to_the_same_noise_level(alpha_bar):
    """With the true x_0 as denoiser, every x_t that is visited has mean sqrt(alpha_bar_t) x_0 and
    variance 1 - alpha_bar_t, the first time as the third."""
    x_0, g, seen = 0.7, generators(8), []
    out = sample(lambda x_t, t: torch.full_like(x_t, x_0),
                 math.sqrt(alpha_bar[-1]) * x_0 + tinyddpm.noise(g, (3, 32, 40)), g, alpha_bar, 5,
                 recurrence=3, watch=lambda t, x_t, _: seen.append((t, x_t)))
    assert [t for t, _ in seen] == [t for t in (1000, 800, 600, 400) for _ in range(3)] + [200]
    for t, x_t in seen:
        assert x_t.mean() == pytest.approx(math.sqrt(alpha_bar[t]) * x_0, abs=0.02)
        assert x_t.var() == pytest.approx(1 - alpha_bar[t].item(), rel=0.03)
    assert torch.allclose(out, torch.full_like(out, x_0), atol=1e-5)


def test_what_each_log_p_is(clip, text_features, alpha_bar):
    """Values, written a second time: signs, times, temperatures and priors."""
    torch.manual_seed(0)
    x, h, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([300, 700])
    target, prior, zero = torch.tensor([5, 77]), torch.randn(294), torch.zeros(2, dtype=torch.long)
    of = lambda name, x_t, x_0_hat: guide.METHODS[name].log_p(
        clip, text_features, target, prior)(x_t, t, x_0_hat)
    with torch.no_grad():
        def softmax(pictures, times, temperature=5.):
            logits = clip.logits(clip.encode_image(pictures, times), text_features, times) + prior
            p = (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)
            return temperature * p[[0, 1], target].log()

        assert torch.allclose(of("contrastive", x, None), softmax(x, t), atol=1e-4)
        assert torch.allclose(of("clean", x, None), softmax(x, zero), atol=1e-4)
        assert torch.allclose(of("x0", x, h), softmax(h, zero), atol=1e-4)
        assert torch.allclose(of("x0-fast", x, h), softmax(h, zero), atol=1e-4)
        x_s = torch.stack([tinyddpm.ddim_step(x[i], h[i], now, now * 3 // 4, alpha_bar, 0., 0.)
                           for i, now in enumerate((300, 700))])
        assert torch.allclose(of("ahead", x, h), softmax(x_s, t * 3 // 4), atol=1e-4)
        once = guide.contrastive(clip, text_features, target, prior, temperature=1.)(x, t, None)
        assert torch.allclose(once, softmax(x, t, 1.), atol=1e-4)
        cos = torch.cosine_similarity(clip.encode_image(x, t), text_features[target])
        expected = -clip.logit_scale(t)[:, 0] * cos.acos() ** 2 / 2
        assert torch.allclose(of("spherical", x, None), expected, rtol=1e-3)


def test_x0_fast_is_x0_where_its_assumption_holds(clip, text_features, alpha_bar):
    """For independent normal pixels of standard deviation 0.5 the number that stands for the
    U-Net's Jacobian is that Jacobian."""
    torch.manual_seed(0)
    x, t, target = torch.randn(2, 3, 16, 16), torch.tensor([400, 400]), torch.tensor([5, 77])
    denoise = gaussian_denoiser(alpha_bar, 0., 0.25)
    pushed = {}
    for name in ("x0", "x0-fast"):
        method = guide.METHODS[name]
        log_p = method.log_p(clip, text_features, target)
        pushed[name] = guide.guided(denoise, log_p, alpha_bar, 20., through_unet=method.through_unet
                                    )(x, t) - denoise(x, t)
    assert pushed["x0"].abs().max() > 1e-3
    assert torch.allclose(pushed["x0"], pushed["x0-fast"], atol=1e-5)
