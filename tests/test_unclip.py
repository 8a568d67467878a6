"""unCLIP: the prior, the decoder's condition, embeddings in between, the upsampler."""
import math

import pytest
import torch
import torch.nn.functional as F

import data
import guide
import tinyddpm
import toys
import train
import unclip
from infra import checkpoint

E = 6
CPU = torch.device("cpu")


def generators(n, seed=0):
    return [data.generator("sampling", seed, i) for i in range(n)]


def unit(x):
    return F.normalize(x, dim=-1)


# ---- the prior -----------------------------------------------------------------------------------

def test_no_text_is_text_zero():
    """And at first, whatever its input, a prior predicts zero."""
    prior = unclip.Prior(unclip.PriorConfig(E, 32, 2))
    z_t, t, text = torch.randn(3, E, 1, 1), torch.tensor([1, 500, 1000]), torch.randn(3, E)
    assert (prior(z_t, t, text) == 0).all() and prior(z_t, t).shape == z_t.shape
    for p in prior.parameters():
        torch.nn.init.normal_(p, std=0.2)
    assert torch.equal(prior(z_t, t), prior(z_t, t, 0 * text))
    out = prior(z_t, t, text)
    for other in (prior(z_t + 1, t, text), prior(z_t, t.flip(0), text), prior(z_t, t, text + 1)):
        assert not torch.allclose(out, other, atol=1e-3)


def test_the_best_of_several_draws_is_nearest_to_the_text(alpha_bar):
    """One that depends on its noise alone: of two draws that with the larger dot product."""
    prior = lambda z_t, t, cond: z_t.sign()
    text = torch.randn(8, E)
    noise = generators(8)
    draws = [unclip.sample_prior(prior, text, noise, alpha_bar, steps=3, draws=1) for _ in range(2)]
    best = unclip.sample_prior(prior, text, generators(8), alpha_bar, steps=3, draws=2)
    dots = torch.stack([(z * text).sum(dim=1) for z in draws])                # (2, 8)
    assert torch.equal(best, torch.where(dots.argmax(dim=0)[:, None] == 0, *draws))
    assert 0 < dots.argmax(dim=0).sum() < 8


def test_embeddings_are_not_clamped(alpha_bar):
    """Their entries are often beyond 1."""
    def prior(z_t, t, cond):   # v of z_0 = 3, for any noise
        a = tinyddpm.extract(alpha_bar, t)
        return (a.sqrt() * z_t - 3) / (1 - a).sqrt()

    z = unclip.sample_prior(prior, torch.ones(2, E), generators(2), alpha_bar, steps=4)
    assert torch.allclose(z, torch.full((2, E), 3.), atol=1e-4)


def test_a_prior_learns_means_and_spread(alpha_bar):
    """Embeddings of two captions are normal, each with its own mean and spread: so are the draws;
    without a text they are of both captions."""
    torch.manual_seed(0)
    means, stds = torch.tensor([[1., 1.], [-1., 1.]]), torch.tensor([.5, .1])
    texts = torch.stack([means, means + .1])                            # (S, K, E)
    prior = unclip.Prior(unclip.PriorConfig(2, 64, 2))
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 600)
        generator = data.generator("training", step)
        ids = torch.randint(2, (256,), generator=generator)
        z = means[ids] + stds[ids, None] * torch.randn(256, 2, generator=generator)
        optimizer.zero_grad()
        train.prior_objective(prior, z, ids, texts, alpha_bar, generator).backward()
        optimizer.step()
    with torch.no_grad():
        for k in range(2):
            text = texts[:, k].mean(dim=0).expand(500, -1)
            z = unclip.sample_prior(prior, text, generators(500), alpha_bar, draws=1)
            assert torch.allclose(z.mean(dim=0), means[k], atol=0.15)
            assert torch.allclose(z.std(dim=0), stds[k].expand(2), rtol=0.3)
        z = unclip.sample_prior(prior, 0 * text, generators(500), alpha_bar, draws=1)
        assert 0.3 < (z[:, 0] > 0).float().mean() < 0.7


# ---- the decoder's condition, and embeddings in between ------------------------------------------

def test_the_level_hides_the_embedding():
    """At 0 the condition is the embedding, at 1 it is zero, as without one; in between it is the
    best guess of the embedding, by regression, for standard normal ones."""
    z, noise = torch.randn(4000, E), torch.randn(4000, E)
    level = lambda s: torch.full((4000, 1), s)
    assert torch.equal(unclip.decoder_condition(z, level(0.), noise)[:, :E], z)
    assert (unclip.decoder_condition(z, level(1.), noise) == 0).all()
    cond = unclip.decoder_condition(z, level(.6), noise)
    assert torch.allclose(cond[:, E], torch.tensor(.4))
    slope = (cond[:, :E] * z).mean() / cond[:, :E].square().mean()   # of z on the condition
    assert slope.item() == pytest.approx(1, abs=0.03)


def test_slerp_walks_on_the_arc():
    """A third of a right angle is 30 degrees; ends are ends; images are vectors, too; equal and
    parallel vectors give no NaN; lengths change linearly."""
    a, b = torch.tensor([[1., 0.]]), torch.tensor([[0., 2.]])
    between = unclip.slerp(a, b, 1 / 3)
    assert torch.allclose(between, 4 / 3 * torch.tensor([[math.cos(math.pi / 6), 0.5]]))
    x, y = torch.randn(2, 3, 3, 4, 5)
    assert torch.allclose(unclip.slerp(x, y, 0.), x, atol=1e-5)
    assert torch.allclose(unclip.slerp(x, y, 1.), y, atol=1e-5)
    assert torch.allclose(unclip.slerp(x, x, 0.3), x, atol=1e-3)
    assert torch.allclose(unclip.slerp(x, 2 * x, 0.5), 1.5 * x, atol=1e-3)


def test_text_diff_turns_towards_the_difference():
    """Fraction 0 is the embedding; more of it is nearer to the second text, and the part at right
    angles to the texts shrinks alone."""
    z, text_from, text_to = guide.scale_features(torch.randn(3, 5, 64))
    assert torch.allclose(unclip.text_diff(z, text_from, text_to, 0.), z, atol=1e-5)
    direction = unit(text_to - text_from)
    along = [(unit(unclip.text_diff(z, text_from, text_to, f)) * direction).sum(dim=1)
             for f in (0., .25, .5, 1.)]
    assert all((b > a).all() for a, b in zip(along, along[1:]))
    assert torch.allclose(along[-1], torch.ones(5), atol=1e-4)
    longer = unclip.text_diff(z, 2 * text_from, text_to, .4)   # only directions of texts count
    assert torch.allclose(longer, unclip.text_diff(z, text_from, text_to, .4), atol=1e-5)
    assert torch.allclose(unclip.text_diff(z, text_from, text_to, .4).norm(dim=1),
                          torch.full((5,), 8.), atol=1e-3)   # sqrt(64), as all scaled features


# ---- the upsampler -------------------------------------------------------------------------------

def make_upsampler(size=16):
    torch.manual_seed(0)
    return unclip.Upsampler(unclip.UpsamplerConfig(32, 1, size))


def test_an_untrained_upsampler_is_bicubic():
    """It predicts what bicubic interpolation lacks, at first nothing; H and W may differ."""
    low = torch.rand(2, 3, 6, 5)
    high = make_upsampler()(low, torch.zeros(2), second=False)
    assert torch.equal(high, F.interpolate(low, scale_factor=2, mode="bicubic"))


def test_the_first_and_the_second_doubling_differ():
    """The level and the step are inputs; each image has its own level."""
    upsampler, low = make_upsampler(), torch.rand(2, 3, 4, 4)
    for p in upsampler.parameters():
        torch.nn.init.normal_(p, std=0.2)
    out = upsampler(low, torch.zeros(2), second=False)
    assert not torch.allclose(out, upsampler(low, torch.zeros(2), second=True), atol=1e-3)
    other = upsampler(low, torch.tensor([0., 1.]), second=False)
    assert torch.equal(out[0], other[0]) and not torch.allclose(out[1], other[1], atol=1e-3)
    projection = upsampler.blocks[0].cond_proj
    for half in (slice(0, 32), slice(32, 64)):   # the scale alone, then the shift alone
        for p in (projection.weight, projection.bias):
            torch.nn.init.normal_(p, std=0.2)
            p.data[half] = 0.
        out, other = (upsampler(low, torch.full((2,), s), second=False) for s in (0., 1.))
        assert not torch.allclose(out, other, atol=1e-3)


def test_pixels_of_a_block_are_its_own():
    """PixelShuffle: a change of one small pixel changes the large ones around it, H and W not
    exchanged."""
    upsampler, low = make_upsampler(), torch.zeros(1, 3, 12, 20)
    torch.nn.init.normal_(upsampler.conv_out.weight)
    changed = low.clone()
    changed[0, :, 2, 15] = 1.
    difference = (upsampler(changed, torch.zeros(1), False) - upsampler(low, torch.zeros(1), False))
    rows, columns = difference.abs().amax(dim=(0, 1)).nonzero().T
    assert 2 * 2 - 8 <= rows.min() and rows.max() <= 2 * 2 + 9 and rows.float().mean() < 12
    assert columns.float().mean().item() == pytest.approx(30.5, abs=2)


@pytest.mark.parametrize("size", [8, 16])
def test_the_average_of_each_block_is_the_small_pixel(size):
    """Whatever the network says, but where pixels are clipped to the range of images."""
    upsampler, low = make_upsampler(), 0.4 * torch.rand(2, 3, 4, 4) - 0.2
    torch.nn.init.normal_(upsampler.conv_out.weight, std=0.01)
    steps, forward = [], upsampler.forward
    upsampler.forward = lambda x, level, second: steps.append(second) or forward(x, level, second)
    high = unclip.upsample(upsampler, low, size)
    assert steps == [False, True][:size // 8]
    assert high.shape == (2, 3, size, size)
    assert torch.allclose(F.avg_pool2d(high, size // 4), low, atol=1e-5)
    assert not torch.allclose(high, F.interpolate(low, (size, size)), atol=0.01)
    assert unclip.upsample(upsampler, 5 * low, size).abs().max() <= 1


def test_redrawn_images_may_be_mended(alpha_bar):
    """Where the small images are not to be trusted, the average of a block may be another."""
    upsampler, low = make_upsampler(), 0.4 * torch.rand(2, 3, 4, 4) - 0.2
    torch.nn.init.normal_(upsampler.conv_out.weight, std=0.01)
    levels, forward = [], upsampler.forward
    upsampler.forward = lambda x, level, second: levels.append(level) or forward(x, level, second)
    high = unclip.upsample(upsampler, low, 16, aug_level=0.1)
    assert not torch.allclose(F.avg_pool2d(high, 4), low, atol=1e-3)
    assert torch.equal(torch.stack(levels), torch.full((2, 2), 0.1))


def test_redrawn_images_are_noised_up_to_t_and_denoised(alpha_bar):
    """From t, not from T, and without fresh noise; by a perfect denoiser they come back."""
    low, eps, seen = 0.9 * torch.rand(2, 3, 4, 6), torch.randn(2, 3, 4, 6), []

    def denoise(x_t, t):
        seen.append((x_t, t[0].item()))
        return low

    drawn = unclip.redraw(denoise, low, 200, eps, alpha_bar)
    assert torch.allclose(drawn, low, atol=1e-5) and [t for _, t in seen] == [200, 160, 120, 80, 40]
    a = alpha_bar[200]
    assert torch.allclose(seen[0][0], a.sqrt() * low + (1 - a).sqrt() * eps, atol=1e-5)


def test_half_of_the_small_images_are_redrawn(monkeypatch):
    """By the given U-Net, at timesteps 50 to 300, which are the level; the others are real."""
    dataset, seen = toys.squares(40, seed=0), []
    monkeypatch.setattr(train, "upsampler_objective", lambda model, *given: seen.append(given))
    monkeypatch.setattr(unclip, "redraw", lambda denoise, low, t, eps, alpha_bar: 0 * low + t)
    x_0, ddpm = torch.rand(8, 3, 16, 16), torch.nn.Linear(1, 1)
    task = train.upsampler_task(unclip.UpsamplerConfig(32, 1, 16), train.TrainConfig(), dataset,
                                dataset, CPU, ddpm)
    assert task.content == {"ddpm": checkpoint.weights_checksum(ddpm)}
    for seed in range(30):
        task.objective(task.model, x_0, None, data.generator("training", seed))
    for given, low, aug_level, _ in seen:
        assert torch.equal(given, x_0) and (aug_level[4:] == 0).all()
        assert torch.equal(low[4:], F.avg_pool2d(x_0, 4)[4:])
        assert torch.allclose(low[:4], (1000 * aug_level[:4])[:, None, None, None], atol=1e-3)
    first = [aug_level[0].item() for _, _, aug_level, _ in seen]
    assert 0.05 <= min(first) < 0.1 and 0.25 < max(first) < 0.301


def test_upsampler_objective_is_the_error_of_both_doublings():
    """By hand, for a network that repeats pixels; the second gets what the first has made, of the
    region of the large image that it is compared with."""
    x_0 = torch.randn(3, 3, 16, 16)
    low, level, seen = F.avg_pool2d(x_0, 4), torch.rand(3), []

    def repeat(x, level, second):
        seen.append((x, level, second))
        return F.interpolate(x, scale_factor=2)

    middle = F.interpolate(low, scale_factor=2)
    crops = set()
    for seed in range(30):
        loss = train.upsampler_objective(repeat, x_0, low, level, data.generator("training", seed))
        (first, given, no), (part, also, yes) = seen[-2:]
        assert first is low and given is level and also is level and (no, yes) == (False, True)
        places = [(i, j) for i in range(5) for j in range(5)
                  if torch.equal(middle[:, :, i:i + 4, j:j + 4], part)]
        errors = [(F.interpolate(part, scale_factor=2)
                   - x_0[:, :, 2 * i:2 * i + 8, 2 * j:2 * j + 8]).abs().mean() for i, j in places]
        of_middle = (middle - F.avg_pool2d(x_0, 2)).abs().mean()
        assert any(torch.isclose(loss, of_middle + error) for error in errors)
        crops.add(places[0])
    assert len(crops) > 9


def test_the_upsampler_learns_edges(tmp_path):
    """Coloured squares that it never saw: 3 dB better than bicubic."""
    dataset, held_out = toys.squares(200, seed=1), toys.squares(100, seed=2)
    options = train.TrainConfig(steps=200, batch=16, lr=4e-3)
    torch.manual_seed(0)
    unet = tinyddpm.UNet(tinyddpm.UNetConfig(16, (1, 2), attention=(1,), image_size=4))
    task = train.upsampler_task(unclip.UpsamplerConfig(32, 2, 16), options, dataset, held_out, CPU,
                                unet)
    train.train(task, options, dataset, tmp_path)
    x_0 = data.to_float(held_out.images)
    low = F.avg_pool2d(x_0, 4)
    upsampler = unclip.Upsampler.from_checkpoint(torch.load(tmp_path / "weights.pt"))
    error = lambda x: (x - x_0).square().mean()
    bicubic = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(-1, 1)
    assert error(unclip.upsample(upsampler, low, 16)) < 0.5 * error(bicubic)
