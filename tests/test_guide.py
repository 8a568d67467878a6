"""Guidance against closed answers, finite differences and other papers' formulas."""
import itertools
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cars
import data
import guide
import tinyddpm
from infra import cli
from tinyddpm import extract, randn_per_image, sample

SHAPE = (3, 8, 32)   # H != W, and as many patches as the clip fixture's 16 x 16
LABELS = torch.from_numpy(cars.caption_labels(np.arange(294)))                # (294, 3)
METHODS = [name for name in guide.METHODS if name not in ("none", "latent")]


def generators(n):
    return [data.generator("sampling", 0, i) for i in range(n)]


def gaussian_denoiser(alpha_bar, mean, var):
    """The exact denoiser of data that are N(mean, var) in every pixel."""
    def denoise(x_t, t):
        a = extract(alpha_bar, t)
        return mean + a.sqrt() * var / (a * var + 1 - a) * (x_t - a.sqrt() * mean)
    return denoise


@pytest.fixture
def models(clip, unet, text_features, alpha_bar):
    return SimpleNamespace(clip=clip, unet=unet, weak=None, alpha_bar=alpha_bar,
                           text_features=text_features, caption_labels=LABELS, condition=None)


@pytest.fixture
def weak():
    """A smaller U-Net."""
    torch.manual_seed(5)
    return tinyddpm.UNet(tinyddpm.UNetConfig(channels=32, multipliers=(1,), attention=()))


def build(name, models, targets, scale=None, interval=None, autoguidance=1.):
    """guide.build_denoiser, with the scale and interval of METHODS unless given."""
    own = guide.METHODS[name]
    if name == "classifier-free":
        models = SimpleNamespace(**{**vars(models), "condition": "text"})
    return guide.build_denoiser(name, models, targets, own.scale if scale is None else scale,
                                interval or own.interval, autoguidance)


def generate(name, models, targets, scale, eta=1., steps=5, interval=None):
    """Sample images with a method of guidance, one for each target."""
    denoise = build(name, models, torch.tensor(targets), scale, interval)
    g = generators(len(targets))
    return sample(denoise, randn_per_image(g, SHAPE), g, models.alpha_bar, steps, eta).detach()


# ---- a guided denoiser ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_scale_0_is_bit_equal_to_no_guidance(name, eta, models):
    """Whatever the method, scale 0 gives exactly the unguided samples."""
    unguided, guided = (generate(method, models, [5, 77], 0., eta) for method in ("none", name))
    assert torch.isfinite(unguided).all() and torch.equal(unguided, guided)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("eta", [0., 1.])
def test_guidance_changes_the_sample_and_depends_on_the_target(name, eta, models):
    """With any eta, samples differ from the unguided one, and from one target to another."""
    run = lambda method, target: generate(method, models, [target], 5., eta)
    out = run(name, 5)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, run("none", 5), atol=1e-4)
    assert not torch.allclose(out, run(name, 77), atol=1e-4)


@pytest.mark.parametrize("t", [1, 400, 990])
def test_guidance_is_dhariwal_and_nichols(alpha_bar, t):
    """x_0_hat + scale (1 - a)/sqrt(a) grad is eps_hat - scale sqrt(1 - a) grad, and an ascent."""
    torch.manual_seed(0)
    alpha_bar, t = alpha_bar.double(), torch.tensor([t, t])
    x_t, x_0_hat, grad = torch.randn(3, 2, 3, 4, 6, dtype=torch.double)
    log_p = lambda x, t, _: (grad * x).sum(dim=(1, 2, 3))
    guided = guide.guided(lambda x, t: x_0_hat, log_p, alpha_bar, scale=3.)(x_t, t)
    a = extract(alpha_bar, t)
    eps_hat = (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt() - 3. * (1 - a).sqrt() * grad
    assert torch.allclose(guided, (x_t - (1 - a).sqrt() * eps_hat) / a.sqrt(), rtol=1e-9)
    assert (log_p(guided, t, None) > log_p(x_0_hat, t, None)).all()


@pytest.mark.parametrize("t", [1, 400, 990])
def test_guidance_adds_to_the_score(alpha_bar, t):
    """By Tweedie's formula, the score of the guided x_0_hat is that of Gaussian data by autograd of
    its log density, plus scale times the gradient of log_p."""
    torch.manual_seed(0)
    mean, var, alpha_bar, t = 0.3, 0.04, alpha_bar.double(), torch.tensor([t, t])
    a = extract(alpha_bar, t)
    x_t = torch.randn(2, 3, 4, 6).double().requires_grad_()
    log_p = lambda x, t, _: x.sin().sum(dim=(1, 2, 3))
    p = torch.distributions.Normal(a.sqrt() * mean, (a * var + 1 - a).sqrt())
    expected, = torch.autograd.grad(p.log_prob(x_t).sum() + 3 * log_p(x_t, t, None).sum(), x_t)
    guided = guide.guided(gaussian_denoiser(alpha_bar, mean, var), log_p, alpha_bar, scale=3.)
    score = (a.sqrt() * guided(x_t.detach(), t) - x_t) / (1 - a)
    assert torch.isfinite(score).all() and torch.allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("t", [2, 400, 990])
def test_a_step_is_what_other_papers_write(alpha_bar, t):
    """x_{t-1} = 1/sqrt(alpha_t) (x_t - beta_t/sqrt(1 - alpha_bar_t) eps_hat + scale beta_t grad)
    + sigma_t z, with the posterior's sigma_t: guidance written around the DDPM."""
    torch.manual_seed(0)
    x_t, eps_hat, grad, z = torch.randn(4, 2, 3, 4, 6, dtype=torch.double)
    alpha_bar, timesteps, scale = alpha_bar.double(), torch.full((2,), t), 3.
    a, a_next = alpha_bar[t], alpha_bar[t - 1]
    alpha, beta = a / a_next, 1 - a / a_next
    sigma = ((1 - a_next) / (1 - a) * beta).sqrt()
    mean = (x_t - beta / (1 - a).sqrt() * eps_hat + scale * beta * grad) / alpha.sqrt()

    denoise = guide.guided(lambda x, t: (x - (1 - a).sqrt() * eps_hat) / a.sqrt(),
                           lambda x, t, x_0_hat: (grad * x).sum(dim=(1, 2, 3)), alpha_bar, scale)
    out = tinyddpm.ddim_step(x_t, denoise(x_t, timesteps), t, t - 1, alpha_bar, 1., z)
    assert torch.allclose(out, mean + sigma * z, rtol=1e-9)


@pytest.mark.parametrize("eta", [0., 1.])
@pytest.mark.parametrize("scale", [1., 3.])
def test_gaussian_data_with_a_closed_answer(alpha_bar, eta, scale):
    """Data N(0, 1), measured as y = x_0 + noise of variance s2: guided by the exact p(y | x_t),
    scale 1 samples the posterior N(y / (1 + s2), s2 / (1 + s2)); a larger scale is sharper, not
    exact."""
    y, s2 = 0.8, 0.5

    def log_p(x_t, t, x_0_hat):
        a = extract(alpha_bar, t)
        return -((y - a.sqrt() * x_t) ** 2 / (2 * (s2 + 1 - a))).sum(dim=(1, 2, 3))

    guided = guide.guided(gaussian_denoiser(alpha_bar, 0., 1.), log_p, alpha_bar, scale)
    out = sample(guided, randn_per_image(generators(16), (3, 24, 40)), generators(16), alpha_bar,
                 250, eta, clamp=False)
    assert torch.isfinite(out).all()
    if scale == 1:
        assert out.mean() == pytest.approx(y / (1 + s2), abs=0.01)
        assert out.std() == pytest.approx(math.sqrt(s2 / (1 + s2)), rel=0.04)
    else:
        assert out.mean() > y / (1 + s2) + 0.05 and out.std() < math.sqrt(s2 / (1 + s2)) * 0.9


def test_guidance_needs_no_gradients_around_it(models):
    """Under torch.no_grad(), as in the commands, the guided estimate is the same, and without a
    graph behind it."""
    x, t = torch.randn(1, *SHAPE), torch.tensor([400])
    for name in ("lookahead", "x0"):
        guided = build(name, models, torch.tensor([5]))
        expected = guided(x, t)
        with torch.no_grad():
            out = guided(x, t)
        assert torch.isfinite(out).all() and torch.allclose(out, expected, atol=1e-5)
        assert not expected.requires_grad


def test_interval_is_when_to_guide(alpha_bar):
    """log_p is evaluated at the timesteps from lo to hi, both included, and at no others."""
    timesteps = []
    guided = guide.guided(
        lambda x, t: x, lambda x, t, _: timesteps.append(int(t[0])) or x.sum(dim=(1, 2, 3)),
        alpha_bar, 1., (200, 700))
    sample(guided, torch.randn(1, 3, 4, 6), generators(1), alpha_bar, 10)
    assert timesteps == [700, 600, 500, 400, 300, 200]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_own_interval_unless_given(name, models):
    """Guided and unguided estimates differ inside a method's interval only; what is unguided of
    classifier-free guidance is the conditional estimate."""
    unguided = build("none", models, None)
    if name == "classifier-free":
        unguided = build(name, models, torch.tensor([5]), scale=1.)
    x = torch.randn(1, *SHAPE)
    for interval in (None, (300, 400)):
        guided = build(name, models, torch.tensor([5]), interval=interval)
        lo, hi = interval or guide.METHODS[name].interval
        for t in {1, max(lo - 1, 1), lo, hi, min(hi + 1, 1000), 1000}:
            t = torch.tensor([t])
            same = torch.equal(guided(x, t), unguided(x, t))
            assert same == (not lo <= int(t) <= hi)


def test_a_log_p_is_made_of_all_that_belongs_to_its_targets(models, monkeypatch):
    """build_denoiser gives a method CLIP, text features and labels of all captions, and the
    targets."""
    given, method = [], guide.METHODS["noise-aware"]
    monkeypatch.setitem(guide.METHODS, "noise-aware", method._replace(
        make_log_p=lambda *args: given.extend(args)))
    targets = torch.tensor([5, 77])
    build("noise-aware", models, targets)
    expected = models.clip, models.text_features, targets, models.caption_labels
    assert given[0] is expected[0] and all(map(torch.equal, given[1:], expected[1:]))


# ---- log_p ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", [torch.arange(294)[:, None], LABELS], ids=["caption", "three"])
def test_what_each_log_p_is(labels, clip, text_features, alpha_bar):
    """Values, written a second time: signs, timesteps and temperatures; with the caption as the
    only attribute it is the log-probability of the target."""
    torch.manual_seed(0)
    x, x_0_hat, t = torch.randn(2, *SHAPE), torch.randn(2, *SHAPE), torch.tensor([300, 700])
    targets, zero = torch.tensor([5, 77]), torch.zeros(2, dtype=torch.long)
    value = lambda name, x_0_hat: guide.METHODS[name].make_log_p(
        clip, text_features, targets, labels)(x, t, x_0_hat)
    with torch.no_grad():
        def softmax(images, t, temperature=5.):
            logits = clip.logits(clip.encode_image(images, t), text_features, t)
            p = (logits / temperature).exp() / (logits / temperature).exp().sum(1, keepdim=True)
            if labels is not LABELS:
                return temperature * p[[0, 1], targets].log()
            p_values = [[p[i, labels[:, a] == labels[target, a]].sum() for a in range(3)]
                        for i, target in enumerate(targets)]
            return temperature * torch.tensor(p_values).log().sum(dim=1)

        assert torch.isfinite(softmax(x, t)).all()
        assert torch.allclose(value("noise-aware", None), softmax(x, t), atol=1e-4)
        assert torch.allclose(value("noise-unaware", None), softmax(x, zero), atol=1e-4)
        assert torch.allclose(value("x0", x_0_hat), softmax(x_0_hat, zero), atol=1e-4)
        assert torch.allclose(value("x0-fast", x_0_hat), softmax(x_0_hat, zero), atol=1e-4)
        x_s = torch.stack([
            tinyddpm.ddim_step(x[i], x_0_hat[i], t_i, t_i * 3 // 4, alpha_bar, 0., 0.)
            for i, t_i in enumerate((300, 700))])
        assert torch.allclose(value("lookahead", x_0_hat), softmax(x_s, t * 3 // 4), atol=1e-4)
        once = guide.noise_aware(clip, text_features, targets, labels, temperature=1.)(x, t, None)
        assert torch.allclose(once, softmax(x, t, 1.), atol=1e-4)
        cos = torch.cosine_similarity(clip.encode_image(x, t), text_features[targets])
        expected = -clip.logit_scale(t)[:, 0] * cos.acos() ** 2 / 2
        assert torch.allclose(value("spherical", None), expected, rtol=1e-3)


def test_what_a_caption_does_not_name_adds_nothing(clip, text_features):
    """A caption with its own number and two times -1: its log-probability."""
    x, t, targets = torch.randn(1, *SHAPE), torch.tensor([300]), torch.tensor([293])
    labels = LABELS.clone()
    labels[293] = torch.tensor([294, -1, -1])
    value, expected = (guide.noise_aware(clip, text_features, targets, labels)(x, t, None)
                       for labels in (labels, torch.arange(294)[:, None]))
    assert torch.allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["noise-aware", "noise-unaware", "spherical", "x0"])
def test_gradient_against_finite_differences(name, clip, text_features, monkeypatch):
    """In float64, and for x0 through an x_0_hat that depends on x_t."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)   # stay in float64 inside
    clip, text_features = clip.double(), text_features.double()
    method = guide.METHODS[name]
    log_p = method.make_log_p(clip, text_features, torch.tensor([5, 77]), LABELS)
    value = lambda x: log_p(x, torch.tensor([300, 700]), x / 2 if method.through_unet else None)
    torch.manual_seed(0)
    x, direction = torch.randn(2, 2, *SHAPE, dtype=torch.double)
    x.requires_grad_()
    grad, = torch.autograd.grad(value(x).sum(), x)
    along, h = (grad * direction).sum(dim=(1, 2, 3)), 1e-5
    with torch.no_grad():
        slope = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert (along.abs() > 1e-4).all() and torch.allclose(along, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("t_fraction, t_next", [
    (0., [0, 0]), (0.75, [225, 525]), (1., [300, 700])])
def test_lookahead_is_a_ddim_step_and_its_gradient_a_scaled_one(t_fraction, t_next, alpha_bar):
    """log_p is applied where DDIM would be at t_fraction * t, at that timestep; the gradient is
    log_p's there, with eps_hat constant, times the number that replaces the U-Net's Jacobian."""
    torch.manual_seed(0)
    x, x_0_hat, slope = torch.randn(3, 2, 3, 4, 6)
    t, calls = torch.tensor([300, 700]), []

    def log_p(x_s, s, x_0_hat):
        calls.append((x_s.detach(), s.tolist()))
        return (slope * x_s).sum(dim=(1, 2, 3))

    x_t = x.clone().requires_grad_()
    value = guide.lookahead_log_p(log_p, alpha_bar, t_fraction)(x_t, t, x_0_hat)
    grad, = torch.autograd.grad(value.sum(), x_t)
    (x_s, s), = calls
    assert s == t_next
    for i, (start, end) in enumerate(zip(t.tolist(), t_next)):
        a = alpha_bar[start]
        r2 = 0.25 * (1 - a) / (1 - a + 0.25 * a)
        expected_grad = slope[i] * alpha_bar[end].sqrt() * r2 * a.sqrt() / (1 - a)
        expected = (x[i] if end == start else
                    tinyddpm.ddim_step(x[i], x_0_hat[i], start, end, alpha_bar, 0., 0.))
        assert torch.allclose(x_s[i], expected, atol=1e-4)
        assert torch.allclose(grad[i], expected_grad, rtol=1e-4)


def test_x0_fast_is_x0_where_its_assumption_holds(clip, text_features, alpha_bar):
    """For independent normal pixels of standard deviation 0.5 the number that replaces the U-Net's
    Jacobian is that Jacobian."""
    torch.manual_seed(0)
    x, t, targets = torch.randn(2, *SHAPE), torch.tensor([400, 400]), torch.tensor([5, 77])
    denoise, change = gaussian_denoiser(alpha_bar, 0., 0.25), {}
    for name in ("x0", "x0-fast"):
        method = guide.METHODS[name]
        log_p = method.make_log_p(clip, text_features, targets, LABELS)
        guided = guide.guided(denoise, log_p, alpha_bar, 20., through_unet=method.through_unet)
        change[name] = guided(x, t) - denoise(x, t)
    assert change["x0"].abs().max() > 1e-3
    assert torch.allclose(change["x0"], change["x0-fast"], atol=1e-5)


# ---- guidance without a CLIP ---------------------------------------------------------------------

def test_classifier_free_is_a_line_through_two_estimates(unet, alpha_bar):
    """Scale 0 is the unconditional estimate, 1 the conditional one, other scales lie on the same
    line."""
    torch.manual_seed(0)
    x, t, cond = torch.randn(2, *SHAPE), torch.tensor([400, 400]), torch.randn(2, 16)
    with torch.no_grad():
        unconditional = tinyddpm.denoiser(unet, alpha_bar)(x, t)
        conditional = tinyddpm.denoiser(lambda x, t, _: unet(x, t, cond), alpha_bar)(x, t)
        out = {scale: guide.classifier_free(unet, alpha_bar, cond, scale)(x, t)
               for scale in (0., 1., 3.)}
    assert torch.equal(out[0.], unconditional)
    assert torch.allclose(out[1.], conditional, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-3
    expected = unconditional + 3 * (conditional - unconditional)
    assert torch.allclose(out[3.], expected, atol=1e-5)


def test_the_condition_is_the_targets_text_feature(models):
    """Of length sqrt(E), whatever it was; in guidance by CLIP too, if the U-Net takes it."""
    models.condition, models.text_features = "text", 7 * models.text_features
    cond = guide.scale_features(models.text_features)
    assert torch.allclose(cond.norm(dim=1), torch.full((294,), 4.))           # sqrt(16)
    assert torch.allclose(cond / 4, models.text_features / models.text_features.norm(
        dim=1, keepdim=True), atol=1e-6)
    x, t, targets = torch.randn(2, *SHAPE), torch.tensor([400, 400]), torch.tensor([3, 100])
    with torch.no_grad():
        expected = tinyddpm.denoiser(models.unet, models.alpha_bar, cond[[3, 100]])(x, t)
        unconditional = tinyddpm.denoiser(models.unet, models.alpha_bar)(x, t)
        assert not torch.allclose(unconditional, expected, atol=1e-3)
        for name, scale in (("classifier-free", 1.), ("lookahead", 0.)):
            out = build(name, models, targets, scale=scale)(x, t)
            assert torch.isfinite(out).all() and torch.allclose(out, expected, atol=1e-5)
        for name in ("none", "latent"):
            assert torch.equal(build(name, models, targets)(x, t), unconditional)
        models.condition = None
        assert torch.equal(build("lookahead", models, targets, 0.)(x, t), unconditional)


@pytest.mark.parametrize("t", [1, 400, 990])
def test_extrapolated_scores_are_those_of_a_quotient_of_densities(alpha_bar, t):
    """Of two Gaussians p and q of the data: the score is that of p(x_t)^w q(x_t)^(1 - w)."""
    alpha_bar, t, w = alpha_bar.double(), torch.tensor([t, t]), 2.5
    a, (p, q) = extract(alpha_bar, t), ((0.3, 0.04), (0.1, 0.2))
    x_t = torch.randn(2, 3, 4, 6).double().requires_grad_()
    log_prob = lambda mean, var: torch.distributions.Normal(
        a.sqrt() * mean, (a * var + 1 - a).sqrt()).log_prob(x_t).sum()
    expected, = torch.autograd.grad(w * log_prob(*p) + (1 - w) * log_prob(*q), x_t)
    denoise = guide.extrapolate(*(gaussian_denoiser(alpha_bar, *of) for of in (q, p)), scale=w)
    score = (a.sqrt() * denoise(x_t.detach(), t) - x_t) / (1 - a)
    assert torch.isfinite(score).all() and torch.allclose(score, expected, rtol=1e-6)


@pytest.mark.parametrize("name", [*METHODS, "none"])
def test_autoguidance_is_a_line_through_two_unets(name, models, weak):
    """What a method guides is the weak U-Net at 0, the U-Net itself at 1 and without a weak one,
    and beyond it at 2; classifier-free guidance has a line of its own."""
    x, t, targets = torch.randn(2, *SHAPE), torch.tensor([400, 400]), torch.tensor([5, 77])
    out = {autoguidance: build(name, models, targets, 0., autoguidance=autoguidance)(x, t)
           for autoguidance in (0., 1., 2.)}
    assert torch.equal(out[0.], out[1.]) and torch.equal(out[1.], out[2.])   # there is no weak one
    models.weak, strong = weak, tinyddpm.denoiser(models.unet, models.alpha_bar)(x, t)
    for autoguidance in (0., 1., 2.):
        used = 1. if name == "classifier-free" else autoguidance
        with torch.no_grad():
            weaker = tinyddpm.denoiser(weak, models.alpha_bar)(x, t)
        expected = strong + (used - 1) * (strong - weaker)
        out = build(name, models, targets, 0., autoguidance=autoguidance)(x, t)
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.allclose(out, strong, atol=1e-3) == (used == 1)


def test_the_gradient_through_the_unet_goes_through_the_weak_one(models, weak):
    """x0 differentiates the x_0_hat that it sees."""
    models.weak, x, t = weak, torch.randn(1, *SHAPE), torch.tensor([400])
    log_p = guide.x0(models.clip, models.text_features, torch.tensor([5]), LABELS)
    strong, weaker = (tinyddpm.denoiser(unet, models.alpha_bar) for unet in (models.unet, weak))
    unguided = lambda x, t: 2 * strong(x, t) - weaker(x, t)
    out = build("x0", models, torch.tensor([5]), 100., autoguidance=2.)
    x_in = x.clone().requires_grad_()
    grad, = torch.autograd.grad(log_p(x_in, t, unguided(x_in, t)).sum(), x_in)
    a = extract(models.alpha_bar, t)
    expected = 100 * (1 - a) / a.sqrt() * grad
    assert expected.abs().max() > 0.1
    assert torch.allclose(out(x, t) - unguided(x, t), expected, atol=1e-3)


# ---- optimising the noise ------------------------------------------------------------------------

def test_white_noise_stays_what_it_is_and_a_colour_does_not():
    """Real noise hardly changes; the coefficient of a mean is cut to LIMIT, the power kept at 1."""
    torch.manual_seed(0)
    noise = torch.randn(4, 3, 32, 16)
    projected = guide.project_to_white_noise(noise)
    assert (projected * noise.std(dim=(1, 2, 3), keepdim=True) - noise).abs().max() < 0.1
    tinted = guide.project_to_white_noise(noise + torch.tensor([1., 0, -1])[:, None, None])
    for x in (projected, tinted, guide.project_to_white_noise(30 * noise)):
        assert torch.allclose(x.square().mean(dim=(1, 2, 3)), torch.ones(4), atol=1e-5)
        assert torch.fft.fft2(x, norm="ortho").abs().max() < 1.1 * guide.LIMIT
    assert tinted.mean(dim=(2, 3)).abs().max() < 1.1 * guide.LIMIT / (32 * 16) ** 0.5


def optimize(alpha_bar, denoise, log_p, x_start, **options):
    """guide.optimize_x_T with 5 steps of sampling -> x_T and the images it leads to"""
    x_T = guide.optimize_x_T(denoise, log_p, x_start, generators(len(x_start)), alpha_bar, 5,
                             **{"iterations": 50, **options})
    return x_T, sample(denoise, x_T, None, alpha_bar, 5, eta=0.)


@pytest.mark.parametrize("through_unet", [False, True])
def test_optimising_the_noise_raises_log_p(through_unet, alpha_bar, monkeypatch):
    """The image comes nearer to the target; the best of all iterations is returned; weight decay
    keeps x_T near its start."""
    torch.manual_seed(0)
    x_start, target = torch.randn(2, *SHAPE), 0.5 * torch.randn(2, *SHAPE).clamp(-1, 1)
    denoise, seen = gaussian_denoiser(alpha_bar, 0., 0.25), []
    log_p = lambda x_t, t, x_0: -(x_0 - target).square().sum(dim=(1, 2, 3))
    run = lambda **options: optimize(alpha_bar, denoise, log_p, x_start, through_unet=through_unet,
                                     **options)
    _, before = run(iterations=1)
    with monkeypatch.context() as patch:
        patch.setattr(guide, "DECAY", 0.)
        x_T, after = run(callback=lambda x_0, value: seen.append(value))
    assert torch.equal(before, sample(denoise, x_start, None, alpha_bar, 5, eta=0.))
    value = log_p(None, None, after)
    assert (value > 0.4 * log_p(None, None, before)).all() and len(seen) == 50
    assert torch.allclose(value, torch.stack(seen).amax(dim=0), atol=1e-3)
    kept, _ = run()
    assert 0.1 < (kept - x_start).norm() / (x_T - x_start).norm() < 0.8


def test_only_through_the_unet_is_the_gradient_that_of_x_T(alpha_bar):
    """Where an image is the negative of its noise, the identity in place of d x_0 / d x_T leads
    away; back-propagation, which evaluates each step twice, does not. The best is returned."""
    torch.manual_seed(0)
    x_start, values, calls = torch.randn(1, *SHAPE), [], []
    denoise = lambda x_t, t: calls.append(t) or -0.5 * x_t.tanh()
    log_p = lambda x_t, t, x_0: x_0.sum(dim=(1, 2, 3))
    for through_unet, sign in ((False, -1), (True, 1)):
        values.clear(), calls.clear()
        x_T = guide.optimize_x_T(denoise, log_p, x_start, generators(1), alpha_bar, 1, 3,
                                 through_unet=through_unet,
                                 callback=lambda x_0, value: values.append(value.item()))
        assert (np.diff(values) * sign > 0).all() and len(calls) == 3 * (1 + through_unet)
        assert torch.equal(x_T, x_start) != through_unet


# ---- cost and independence -----------------------------------------------------------------------

@pytest.mark.parametrize("name, unet_calls, unet_backward, encoder", [
    ("noise-aware", 7, 0, 7), ("noise-unaware", 7, 0, 7), ("spherical", 7, 0, 7),
    ("x0-fast", 7, 0, 7), ("lookahead", 7, 0, 7), ("x0", 7, 7, 7), ("classifier-free", 14, 0, 0),
    ("none", 7, 0, 0)])
def test_cost_of_a_method(name, unet_calls, unet_backward, encoder, models):
    """Counted over 7 steps; the default takes one U-Net forward, one encoder forward and one
    encoder backward a step, and no U-Net backward, for which no graph is built either."""
    assert guide.DEFAULT == "lookahead"
    counts = dict.fromkeys(
        ["unet", "unet graph", "unet backward", "encoder", "encoder backward"], 0)

    def count(key, condition=lambda out: True):
        def hook(module, x, out):
            counts[key] += condition(out)
        return hook
    models.unet.requires_grad_(False)
    models.unet.register_forward_hook(count("unet"))
    models.unet.register_forward_hook(count("unet graph", lambda out: out.requires_grad))
    models.unet.conv_out.register_full_backward_hook(count("unet backward"))
    models.clip.image_encoder.register_forward_hook(count("encoder"))
    models.clip.image_encoder.projection.register_full_backward_hook(count("encoder backward"))
    generate(name, models, [5, 77], 2., steps=7, interval=(1, 1000))
    assert counts == {"unet": unet_calls, "unet graph": unet_backward,
                      "unet backward": unet_backward, "encoder": encoder,
                      "encoder backward": encoder}


@pytest.mark.parametrize("name", ["noise-aware", "lookahead"])
def test_a_guided_image_depends_on_its_own_seed_alone(name, models):
    """An image is the same alone and among others with other targets."""
    many, one = (generate(name, models, targets, 2.) for targets in ([5, 77, 3, 9], [5]))
    assert torch.isfinite(many).all() and torch.allclose(many[:1], one, atol=1e-3)
    assert not torch.allclose(many[1], many[2], atol=1e-2)


def test_the_number_of_threads_does_not_matter(models):
    """One thread samples what two sample, to rounding."""
    out = {}
    for threads in (2, 1):
        torch.set_num_threads(threads)
        out[threads] = generate("lookahead", models, [5, 77], 2., steps=2)
    assert torch.isfinite(out[1]).all() and torch.allclose(out[1], out[2], atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_needs_float64(name, models, no_float64, monkeypatch):
    """MPS has no float64: no operation of guided sampling has a result in it."""
    monkeypatch.setattr(guide, "cosine_alpha_bar", lambda: models.alpha_bar)   # computed on the CPU
    with no_float64:
        out = generate(name, models, [5, 77], 2.)
    assert torch.isfinite(out).all()


def test_a_trajectory_leaves_nothing_in_memory(models, monkeypatch):
    """Under autocast, no x_t that was differentiated by outlives its step."""
    inputs, encode = [], models.clip.encode_image

    def record(x, t=None):
        inputs.append(weakref.ref(x))
        return encode(x, t)
    models.clip.encode_image = record
    guided = build("noise-aware", models, torch.tensor([5]), scale=1.)
    monkeypatch.setattr(cli, "bf16_is_fast", lambda device: True)
    with cli.autocast(torch.device("cpu")):
        for t in (900, 500, 100):
            assert torch.isfinite(guided(torch.randn(1, *SHAPE), torch.tensor([t]))).all()
        assert [reference() for reference in inputs] == [None] * 3


def test_methods_differ_from_each_other(models):
    """No two names stand for the same method."""
    out = [generate(name, models, [5], 5., steps=2, interval=(1, 1000)) for name in METHODS]
    for a, b in itertools.combinations(out, 2):
        assert not torch.allclose(a, b, atol=1e-5)
