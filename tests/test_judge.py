"""The judge: an image classifier with one head per attribute."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import cars
import data
import judge

SIZES = {name: len(values) for name, values in cars.ATTRIBUTES.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return judge.Judge(judge.JudgeConfig(width=16), SIZES).eval()


def test_other_sizes_are_area_averaged(model):
    """An image of 64 x 96 has the logits of the 32 x 32 means of its blocks of 2 x 3 pixels."""
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    means = x.view(2, 3, 32, 2, 32, 3).mean(dim=(3, 5))
    with torch.no_grad():
        logits, expected = model(x), model(means)
        assert torch.allclose(model.resize(x), means, atol=1e-6) and model.resize(means) is means
    for name, values in SIZES.items():
        assert logits[name].shape == (2, values) and torch.isfinite(logits[name]).all()
        assert torch.allclose(logits[name], expected[name], atol=1e-4)
    assert (expected["body"][0] - expected["body"][1]).abs().max() > 1e-3


@pytest.mark.parametrize("c_in, stride", [(16, 1), (8, 2)])
def test_a_block_by_hand(c_in, stride):
    """Norm, SiLU, conv, twice, plus the input, or a convolution of it where the shape changes."""
    torch.manual_seed(0)
    block, x = judge.Block(c_in, 16, stride), torch.randn(2, c_in, 8, 12)
    h = block.conv2(F.silu(block.norm2(block.conv1(F.silu(block.norm1(x))))))
    expected = h + (block.skip(x) if stride == 2 else x)
    assert torch.allclose(block(x), expected, atol=1e-6)


def test_images_of_a_batch_do_not_interact(model):
    """An image has the same logits alone."""
    x = torch.rand(3, 3, 24, 40) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(model(x)["main"][1:2], model(x[1:2])["main"], atol=1e-5)


def test_loss_is_the_sum_of_the_heads(model):
    """Each attribute adds its cross-entropy; heads and columns of labels have the same order."""
    x, labels = torch.rand(4, 3, 32, 32), torch.tensor([[0, 1, 2], [5, 6, 3], [1, 0, 0], [2, 2, 6]])
    with torch.no_grad():
        logits = model(x)
        expected = sum(F.cross_entropy(logits[name], labels[:, i])
                       for i, name in enumerate(("body", "main", "second")))
        loss = judge.judge_loss(model, x, labels)
    assert torch.isfinite(loss) and torch.allclose(loss, expected)


def test_predictions_are_the_largest_logits_in_any_batch_size(model):
    """One column per attribute, in the order of the attributes, however many images at a time."""
    x = torch.rand(5, 3, 32, 32) * 2 - 1
    for head in model.heads.values():   # so that predictions differ from image to image
        torch.nn.init.normal_(head.weight, std=3.)
    predictions = judge.predict(model, x, batch=2)
    with torch.no_grad():
        expected = [logits.argmax(dim=1).tolist() for logits in model(x).values()]
    assert predictions.T.tolist() == expected and predictions.unique(dim=0).shape[0] > 1
    assert torch.equal(judge.predict(model, x), predictions)


def test_dropout_is_of_training_only():
    """In training mode two evaluations differ, in eval mode they do not."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 32, 32)
    model = judge.Judge(judge.JudgeConfig(width=16, dropout=0.5), SIZES)
    with torch.no_grad():
        assert not torch.equal(model(x)["body"], model(x)["body"])
        model.eval()
        assert torch.equal(model(x)["body"], model(x)["body"])


@pytest.mark.parametrize("options", [dict(width=24), dict(width=0), dict(image_size=4)])
def test_sizes_that_do_not_fit_are_refused(options):
    """Widths that GroupNorm cannot divide, and images too small to be halved three times."""
    with pytest.raises(ValueError, match=next(iter(options))):
        judge.JudgeConfig(**options)


def test_from_checkpoint_returns_the_same_judge(model):
    """Config, attributes and fp16 weights give back the network, in eval mode."""
    model.half().float()   # so that fp16 loses nothing
    content = {"config": dataclasses.asdict(model.config), "attributes": cars.ATTRIBUTES,
               "weights": {name: w.half() for name, w in model.state_dict().items()}}
    again, x = judge.Judge.from_checkpoint(content), torch.rand(2, 3, 24, 40)
    logits, expected = again(x), model(x)
    assert list(logits) == list(SIZES) and again.config == model.config and not again.training
    for name in SIZES:
        assert torch.isfinite(logits[name]).all() and not logits[name].requires_grad
        assert torch.allclose(logits[name], expected[name], atol=1e-5)


def test_learning():
    """Sixteen images of cars are learnt by heart in 40 steps."""
    torch.manual_seed(0)
    images, labels = cars.render(0, range(16), 16)
    x, labels = data.to_float(images), torch.from_numpy(labels)
    model = judge.Judge(judge.JudgeConfig(width=16, image_size=16), SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        judge.judge_loss(model, x, labels).backward()
        optimizer.step()
    assert (judge.predict(model.eval(), x) == labels).float().mean() > 0.9
