import statistics

import pytest
import torch
import torch.nn.functional as F

import cars
import data
import judge

SIZES = {name: len(values) for name, values in cars.ATTRIBUTES.items()}


@pytest.mark.parametrize("net", ["resnet", "plain"])
def test_other_sizes_are_area_averaged(net):
    torch.manual_seed(0)
    model = judge.Judge(judge.JudgeConfig(net=net, width=8), SIZES).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    with torch.no_grad():
        assert torch.allclose(model(doubled)["body"], model(x)["body"], atol=1e-5)
        assert torch.allclose(model(x)["body"][:1], model(x[:1])["body"], atol=1e-5)


def test_loss_is_the_sum_of_the_heads():
    torch.manual_seed(0)
    model = judge.Judge(judge.JudgeConfig(width=8), SIZES).eval()
    x, labels = torch.rand(4, 3, 32, 32), torch.tensor([[0, 1, 2]] * 4)
    expected = sum(F.cross_entropy(logits, labels[:, i])
                   for i, logits in enumerate(model(x).values()))
    assert torch.allclose(judge.judge_loss(model, x, labels), expected)


def test_wilson_interval():
    low, high = judge.wilson(50, 100)
    # textbook values
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert (judge.wilson(0, 10)[0] == pytest.approx(0)
            and judge.wilson(0, 10)[1] == pytest.approx(0.2775, abs=1e-3))


def test_only_a_resnet_measures():
    with pytest.raises(ValueError, match="resnet"):
        judge.features(judge.Judge(judge.JudgeConfig(net="plain"), {"class": 2}), None)


def test_kid_of_a_block_is_the_sum_over_pairs():
    torch.manual_seed(0)
    real, drawn = torch.randn(24, 3) * 2 + 1, torch.randn(24, 3)
    centre, spread = real.mean(0), real.std(0)
    x, y = ((a - centre) / spread for a in (real, drawn))
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = [
        sum(kernel(x[n + i], x[n + j]) + kernel(y[n + i], y[n + j]) - 2 * kernel(x[n + i], y[n + j])
            for i, j in pairs) / 30 for n in (0, 6, 12, 18)]
    mean, error = judge.kid(real, drawn)
    assert mean == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert error == pytest.approx(statistics.stdev(expected) / 2, rel=1e-4)


def test_kid_of_matched_captions_is_unbiased():
    """Pictures that agree with their partners in what the caption says, and in nothing else."""
    torch.manual_seed(0)
    caption = 3 * torch.randn(2000, 8)
    value, error = judge.kid(caption + torch.randn(2000, 8), caption + torch.randn(2000, 8))
    assert abs(value) < 4 * error


def test_kid_is_as_precise_under_autocast():
    torch.manual_seed(0)
    real, drawn = torch.randn(400, 8), torch.randn(400, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = judge.kid(real, drawn)
    assert rounded == judge.kid(real, drawn)


def test_kid_of_a_handful_is_not_told():
    assert judge.kid(torch.randn(7, 3), torch.randn(7, 3)) == (None, None)


def test_kid_tells_others_from_its_own():
    torch.manual_seed(0)
    real, own, other = torch.randn(2000, 8), torch.randn(2000, 8), torch.randn(2000, 8) + 0.2
    value, error = judge.kid(real, own)
    assert abs(value) < 4 * error
    value, error = judge.kid(real, other)
    assert value > 4 * error > 0


def test_features_are_of_each_picture_alone():
    torch.manual_seed(0)
    model = judge.Judge(judge.JudgeConfig(width=16, size=16), SIZES).eval()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    noticed = judge.features(model, x)
    assert noticed.shape == (3, 2 * (32 + 64 + 64)) and torch.isfinite(noticed).all()
    assert torch.allclose(noticed[1:2], judge.features(model, x[1:2]), atol=1e-5)
    assert not torch.allclose(noticed[0], noticed[1], atol=1e-2)


def test_diversity_is_within_captions():
    noticed = torch.tensor([[0., 0.], [3., 4.], [100., 0.], [100., 1.]])
    assert judge.diversity(noticed, torch.tensor([0, 0, 1, 1])) == pytest.approx(3)


def test_copies_are_found():
    torch.manual_seed(0)
    training = torch.randn(50, 10)
    drawn = torch.stack([training[7] + 0.01, torch.randn(10), (training[1] + training[2]) / 2])
    assert judge.copies(drawn, training, batch=2).tolist() == [True, False, False]


@pytest.mark.parametrize("net", ["resnet", "plain"])
def test_learning(net):
    torch.manual_seed(0)
    pictures, labels = cars.render(0, range(16), 16)
    x, labels = data.to_float(pictures), torch.from_numpy(labels)
    model = judge.Judge(judge.JudgeConfig(net=net, width=16, size=16), SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        judge.judge_loss(model, x, labels).backward()
        optimizer.step()
    assert (judge.verdict(model.eval(), x) == labels).float().mean() > 0.9
