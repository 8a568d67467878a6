"""The optimizer and the run, in-process; test_commands.py has the command."""
import numpy as np
import pytest
import torch

import data
import jobs
import muon
import train
from unet import UNet


@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32)])
def test_orthogonalized_keeps_directions_and_equalises_their_lengths(shape):
    """U S V^T becomes U S' V^T with S' near 1, whatever S was, from 1 down to 0.05."""
    torch.manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = U * torch.logspace(0, -1.3, len(Vt)) @ Vt
    stack = torch.stack([torch.randn(shape), 5. * matrix])
    inside = U.T @ muon.orthogonalized(stack)[1] @ Vt.T          # S', if the directions are kept
    assert torch.allclose(inside, inside.diag().diag(), atol=1e-4)
    assert inside.diag().min() > 0.67 and inside.diag().max() < 1.15


def test_matrices_of_one_shape_do_not_mix():
    """A stack of them takes the steps that each would take alone, as kernels or as matrices."""
    torch.manual_seed(0)
    shapes = [(32, 48), (32, 48), (48, 32), (32, 16, 3, 3), (32, 48)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in together]
    optimizers = [muon.Muon([weight], 0.1, 0.1) for weight in alone] + [
        muon.Muon(together, 0.1, 0.1)]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone))


def test_a_muon_step_is_as_large_as_one_of_adamw_usually_is():
    """The root mean square of an update is about 0.2 lr, for any shape and any gradient's size."""
    torch.manual_seed(0)
    for shape in ((64, 32, 3, 3), (96, 32), (32, 128)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = 1e-6 * torch.randn(shape)
        muon.Muon([weight], lr=0.1, weight_decay=0.).step()
        assert weight.detach().square().mean().sqrt() == pytest.approx(0.02, rel=0.25)
        assert (weight * weight.grad).sum() < 0                   # downhill


def test_muon_remembers_gradients_for_a_while():
    """When gradients turn round and are small, the next step still goes the old way; after 100
    steps it has turned too."""
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer, path = muon.Muon([weight], lr=0.1, weight_decay=0.), []
    for gradient in [1.] * 20 + [-0.01] * 100:
        weight.grad = gradient * torch.eye(32)
        optimizer.step()
        path.append(weight.detach().diag().clone())
    assert (path[20] < path[19]).all() and (path[-1] > path[-2]).all()


def test_muon_decays_weights():
    weight = torch.nn.Parameter(torch.eye(32))
    weight.grad = torch.zeros(32, 32)
    muon.Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, 0.95 * torch.eye(32))           # 1 - lr * decay


def test_every_parameter_has_one_optimizer_and_only_wide_matrices_have_muon():
    """The U-Net begins and ends in colours: its first and last layer are left to AdamW."""
    unet = UNet(train.PRESETS["tiny"]["ddpm"][0])
    job = jobs.Job("ddpm", unet, lambda model: None, None, {}, "")
    run = train.begin(job, None, {}, train.TrainConfig(), torch.device("cpu"))
    matrices, others = ([id(p) for group in optimizer.param_groups for p in group["params"]]
                        for optimizer in run.optimizers)
    parameters = {id(p): p for p in unet.parameters()}
    assert len(matrices + others) == len(parameters)
    assert set(matrices + others) == set(parameters)
    assert all(parameters[i].ndim > 1 for i in matrices)
    wide = [parameters[i] for i in others if parameters[i].ndim > 1]
    assert [id(p) for p in wide] == [id(unet.first.weight), id(unet.last[2].weight)]


@pytest.mark.parametrize("K, most, batch", [(5, 9, 4), (50, 20, 8), (50, 20, 200), (50, 2, 8)])
def test_some_captions_stand_for_all(K, most, batch):
    """The batch's own are always among them, and the weighted sum over them is, on average, the
    sum over all."""
    needed = torch.from_numpy(np.random.default_rng(0).integers(K, size=batch))
    values, sums = torch.arange(1., K + 1), []
    for seed in range(300):
        chosen, weight = jobs.some_captions(K, needed, most, torch.Generator().manual_seed(seed))
        own = torch.searchsorted(chosen, needed)
        assert (chosen[own] == needed).all() and (weight[own] == 1).all()
        assert len(set(chosen.tolist())) == len(chosen) <= max(most, len(needed))
        sums.append((weight * values[chosen]).sum())
    if most > batch:   # otherwise there may be no others to stand for the rest
        assert torch.stack(sums).mean() == pytest.approx(values.sum().item(), rel=0.02)


def test_what_is_held_out_is_gone_in_all_spellings(monkeypatch, tmp_path):
    """Its pictures, its captions in both orders and for all bodies; all others keep their own."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    whole = data.load("cars", 8, 300)
    some = data.without(whole, "white+red, blue+yellow")
    assert len(some.captions) == 294 - 2 * 2 * 6 and len(some.pictures) < 300
    assert not any("white and red" in text or "red and white" in text or "yellow and blue" in text
                   for texts in some.spellings for text in texts)
    assert "a white car" in some.captions and "a white and blue car" in some.captions
    truth = {picture.tobytes(): whole.captions[k]
             for picture, k in zip(whole.pictures, whole.caption_of)}
    assert [truth[picture.tobytes()] for picture in some.pictures] == [
        some.captions[k] for k in some.caption_of]
    for mistake in ("white", "white+pink", "white+white", ""):
        with pytest.raises(data.UserError, match="--hold-out"):
            data.without(whole, mistake)


@pytest.mark.parametrize("step, expected", [(1, 0.1), (10, 1.), (55, 0.5), (100, 0.)])
def test_learning_rate_climbs_and_falls_to_zero(step, expected):
    options = train.TrainConfig(steps=100, lr=1., warmup=0.1)
    assert train.learning_rate(step, options) == pytest.approx(expected, abs=1e-6)
