import pytest
import torch
import torch.nn.functional as F

import cars
import data
import judge

SIZES = {name: len(values) for name, values in cars.ATTRIBUTES.items()}


def test_other_sizes_are_area_averaged():
    torch.manual_seed(0)
    model = judge.Judge(judge.JudgeConfig(width=8), SIZES).eval()
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


def test_learning():
    torch.manual_seed(0)
    pictures, labels = cars.render(0, range(16), 16)
    x, labels = data.to_float(pictures), torch.from_numpy(labels)
    model = judge.Judge(judge.JudgeConfig(width=16, size=16), SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        judge.judge_loss(model, x, labels).backward()
        optimizer.step()
    assert (judge.verdict(model.eval(), x) == labels).float().mean() > 0.9
