import math

import pytest
import torch

import data
import guide
import tinyddpm
from tinyddpm import at, sample


def generators(n):
    return [data.generator(0, i) for i in range(n)]


def gaussian_denoiser(alpha_bar, mean, var):
    """The exact denoiser of data that are N(mean, var) in every pixel."""
    def denoise(x_t, t):
        a = at(alpha_bar, t)
        return mean + a.sqrt() * var / (a * var + 1 - a) * (x_t - a.sqrt() * mean)
    return denoise


@pytest.mark.parametrize("method", guide.METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_scale_0_is_bit_equal_to_no_guidance(method, eta, clip, unet, text_features, alpha_bar):
    log_p = guide.METHODS[method][0](clip, text_features, torch.tensor([5, 77]))
    plain = guide.generate(unet, alpha_bar, generators(2), steps=5, eta=eta)
    guided = guide.generate(unet, alpha_bar, generators(2), log_p, scale=0., steps=5, eta=eta)
    assert torch.isfinite(plain).all() and torch.equal(plain, guided)


@pytest.mark.parametrize("method", guide.METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_guidance_reaches_every_sampler_and_depends_on_the_target(
        method, eta, clip, unet, text_features, alpha_bar):
    maker = guide.METHODS[method][0]
    run = lambda target: guide.generate(
        unet, alpha_bar, generators(1), maker(clip, text_features, torch.tensor([target])),
        5., (1, 900), 5, eta)
    plain = guide.generate(unet, alpha_bar, generators(1), steps=5, eta=eta)
    assert (not torch.allclose(run(5), plain, atol=1e-4)
            and not torch.allclose(run(5), run(77), atol=1e-4))


@pytest.mark.parametrize("method", guide.METHODS)
def test_gradient_against_finite_differences(method, clip, text_features):
    clip, text_features = clip.double(), text_features.double()
    clip.time_features = lambda t, f=clip.time: f(t[:, None].double() * (4 / clip.config.T))
    clip.logits = lambda image, text, t=None: (
        clip.logit_scale(torch.zeros(len(image), dtype=torch.long) if t is None else t)
        * torch.nn.functional.normalize(image, dim=-1)
        @ torch.nn.functional.normalize(text, dim=-1).T)
    log_p = guide.METHODS[method][0](clip, text_features, torch.tensor([5, 77]))
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16).double().requires_grad_(), torch.tensor([300, 700])
    direction = torch.randn(2, 3, 16, 16).double()
    grad, = torch.autograd.grad(log_p(x, t, None).sum(), x)
    h = 1e-5
    slope = (log_p(x + h * direction, t, None) - log_p(x - h * direction, t, None)) / (2 * h)
    assert torch.allclose((grad * direction).sum(dim=(1, 2, 3)), slope, rtol=1e-3, atol=1e-6)


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


def test_one_unet_evaluation_and_one_encoder_pass_a_step(clip, unet, text_features, alpha_bar):
    """The cost of guidance, counted: per step one U-Net forward, one encoder forward, one encoder
    backward, and no U-Net backward."""
    counts = {"unet": 0, "encoder": 0, "encoder backward": 0, "unet backward": 0}
    count = lambda key: lambda *_: counts.__setitem__(key, counts[key] + 1)
    unet.register_forward_hook(count("unet"))
    unet.register_full_backward_hook(count("unet backward"))
    clip.image.register_forward_hook(count("encoder"))
    clip.image.register_full_backward_hook(count("encoder backward"))
    log_p = guide.contrastive(clip, text_features, torch.tensor([5, 77]))
    guide.generate(unet, alpha_bar, generators(2), log_p, scale=2., steps=7)
    assert counts == {"unet": 7, "encoder": 7, "encoder backward": 7, "unet backward": 0}


def test_a_picture_depends_on_its_own_seed_alone(clip, unet, text_features, alpha_bar):
    maker = lambda n: guide.contrastive(clip, text_features, torch.full((n,), 5))
    many = guide.generate(unet, alpha_bar, generators(4), maker(4), 2., (1, 900), 5)
    one = guide.generate(unet, alpha_bar, generators(1), maker(1), 2., (1, 900), 5)
    assert torch.allclose(many[:1], one, atol=1e-3)
