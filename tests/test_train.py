"""Objectives, learning, and runs that stop, resume or fail, as users start them."""
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import guide
import judge
import tinyclip
import tinyddpm
import toys
import train
import unclip
from infra import checkpoint, cli, distributed, muon

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CONFIGS = {
    "clip": tinyclip.CLIPConfig(width=32, layers=1, heads=2, text_width=32, text_layers=1,
                                text_heads=2, embed_dim=16, image_size=16),
    "ddpm": tinyddpm.UNetConfig(channels=16, multipliers=(1, 2), attention=(1,), image_size=16),
    "judge": judge.JudgeConfig(width=8, image_size=16)}


def command(kind, more=""):
    return f"{kind} {toys.FLAGS[kind]} {more}".split()


def load(path, part="model"):
    """-> a part of a checkpoint: name -> tensor"""
    return torch.load(path, weights_only=True)[part]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def here(folder, monkeypatch):
    """A folder that all these tests share: the images are rendered once."""
    monkeypatch.chdir(folder)
    return folder


# ---- objectives ----------------------------------------------------------------------------------

class RecordingCLIP:
    """Stands in for a CLIP; keeps what it is given, and returns random features."""

    def logits(self, image_features, text_features, t):
        self.t_of_logits = t
        return image_features @ text_features.T

    def encode_image(self, x_t, t):
        self.x_t, self.t, self.image_features = x_t, t, torch.randn(len(t), 4)
        return self.image_features

    def encode_text(self, tokens):
        self.tokens, self.text_features = tokens, torch.randn(len(tokens), 4)
        return self.text_features


# Five captions and three partial captions, each in two templates, as three tokens.
TOKENS = torch.arange(2 * 8 * 3).view(2, 8, 3)
PARTIAL_TRUE_OF = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 1]]).bool()


@pytest.mark.parametrize("fraction, clean", [(0.125, 4), (0.5, 16), (0., 0), (1., 32)])
def test_clip_objective_has_clean_and_noised_images(alpha_bar, fraction, clean):
    """As many images as asked for are clean; all others are noised up to a timestep in 1..T. Each
    is matched with its caption, and by itself, with less weight, with its partial captions."""
    x_0, caption_ids = torch.randn(32, 3, 4, 6), torch.arange(32) % 5
    clip, which, noised = RecordingCLIP(), [], []
    is_true = torch.cat([torch.eye(5).bool(), PARTIAL_TRUE_OF.T], dim=1)[caption_ids]
    for seed in range(80):
        torch.manual_seed(seed)
        loss = train.clip_objective(clip, x_0, caption_ids, TOKENS, PARTIAL_TRUE_OF, alpha_bar,
                                    data.generator("training", seed), fraction, perturbation=0.)
        is_clean = clip.t == 0
        assert is_clean.sum() == clean and clip.t.min() >= 0 and clip.t.max() <= tinyddpm.T
        assert torch.equal(clip.t_of_logits, clip.t)
        assert torch.equal(clip.x_t[is_clean], x_0[is_clean])
        noise = clip.x_t - alpha_bar[clip.t].sqrt().view(-1, 1, 1, 1) * x_0
        sigma = noise.square().mean(dim=(1, 2, 3)).sqrt()
        ratio = (sigma / (1 - alpha_bar[clip.t]).sqrt())[~is_clean]
        assert ((ratio > 0.5) & (ratio < 1.5)).all()
        logits = clip.image_features @ clip.text_features.T
        texts = clip.tokens[:, 0] // 3 % 8   # in the order in which they are compared
        of_captions, of_partial = (
            tinyclip.closed_set_loss(logits[:, part], is_true[:, texts[part]],
                                     is_clean.nonzero()[:, 0])
            for part in (slice(0, 5), slice(5, 8)))
        assert torch.allclose(loss, of_captions + train.PARTIAL_WEIGHT * of_partial)
        which.append(is_clean)
        noised += clip.t[~is_clean].tolist()
    if noised:   # evenly from 1..T
        assert np.allclose(np.histogram(noised, 10, (1, 1001))[0] / len(noised), 0.1, atol=0.02)
    if 0 < clean < 32:   # any image may be a clean one, not only the first ones
        assert torch.stack(which).any(dim=0).all() and not torch.stack(which).all(dim=0).any()


def test_clip_objective_draws_a_template_for_each_text(alpha_bar, monkeypatch):
    """All captions of a small closed set, and so many of the partial captions, each in a template
    of its own; all texts in all templates in turn."""
    monkeypatch.setattr(train, "PARTIAL_PER_STEP", 2)
    clip, drawn = RecordingCLIP(), []
    for seed in range(40):
        train.clip_objective(clip, torch.zeros(8, 3, 2, 2), torch.zeros(8, dtype=torch.long),
                             TOKENS, PARTIAL_TRUE_OF, alpha_bar, data.generator("training", seed),
                             perturbation=0.)
        rows = (clip.tokens == TOKENS[:, :, None]).all(dim=3).sum(dim=2)      # (S, K + P)
        assert rows.sum(dim=0)[:5].tolist() == [1] * 5
        assert sorted(rows.sum(dim=0)[5:].tolist()) == [0, 1, 1] and len(clip.tokens) == 7
        drawn.append(rows.bool())
    assert torch.stack(drawn).any(dim=0).all()
    first = torch.stack(drawn)[:, 0, :5]   # which captions are in the first template
    assert 0.4 < first.float().mean() < 0.6 and len(first.unique(dim=0)) > 15


class LinearCLIP:
    """Stands in for a CLIP: the image features are the means of three channels."""

    encode_image = staticmethod(lambda x, t: x.mean(dim=(2, 3)))
    logits = staticmethod(lambda image_features, text_features, t: image_features @ text_features.T)


def test_a_perturbation_by_hand(alpha_bar):
    """Straight uphill on the loss of the most probable text; longer, the more noise there is."""
    x_t, t = torch.randn(3, 3, 2, 4), torch.tensor([0, 500, 1000])
    features = torch.randn(5, 3)
    moved = train.perturb(LinearCLIP, x_t, t, features, alpha_bar, 0.5) - x_t
    p = (x_t.mean(dim=(2, 3)) @ features.T).softmax(dim=1)
    uphill = (p - torch.eye(5)[p.argmax(dim=1)]) @ features   # of the cross-entropy, by channel
    norm = torch.tensor([0.5, 0.5 + 1.5 * (1 - alpha_bar[500]).sqrt(), 2.]) * 8 ** 0.5 / 32
    assert torch.allclose(moved.flatten(1).norm(dim=1), norm, atol=1e-5)
    expected = uphill / uphill.norm(dim=1, keepdim=True) * norm[:, None] / 8 ** 0.5
    assert torch.allclose(moved, expected[:, :, None, None].expand_as(moved), atol=1e-5)


def test_a_fraction_of_clips_images_is_perturbed(alpha_bar, monkeypatch):
    """Random ones, each with its own timestep; the others stay as they are."""
    clip, x_0, caption_ids = RecordingCLIP(), torch.randn(32, 3, 4, 6), torch.arange(32) % 5
    calls, moved = [], []
    monkeypatch.setattr(train, "PERTURBED_FRACTION", 0.25)
    monkeypatch.setattr(train, "perturb", lambda clip, x_t, t, texts, alpha_bar, norm: (
        calls.append((x_t, t, texts, norm)) or x_t + 100))
    objective = lambda seed, **options: torch.manual_seed(0) and train.clip_objective(
        clip, x_0, caption_ids, TOKENS, PARTIAL_TRUE_OF, alpha_bar,
        data.generator("training", seed), **options)
    for seed in (1, 2):
        objective(seed, perturbation=0.)
        plain, t = clip.x_t, clip.t
        objective(seed, perturbation=3.)
        which = (clip.x_t - plain).flatten(1).mean(dim=1) > 50
        assert which.sum() == 8 and torch.equal(clip.x_t[~which], plain[~which])
        x_t, t_given, texts, norm = calls[-1]
        order = (plain - x_t[:, None]).abs().amax(dim=(2, 3, 4)).argmin(dim=1)
        assert torch.equal(t_given, t[order])
        assert torch.equal(texts, clip.text_features[:5]) and norm == 3
        moved.append(which)
    assert not torch.equal(*moved)


def test_clip_objective_is_the_papers_loss_if_captions_are_many(alpha_bar):
    """Beyond CLOSED_SET captions each image is compared with the captions of its batch only, and
    with no partial caption."""
    K = train.CLOSED_SET + 1
    tokens, clip = torch.arange(2 * (K + 1)).view(2, K + 1, 1), RecordingCLIP()
    partial_true_of = torch.ones(1, K, dtype=torch.bool)
    caption_ids = torch.tensor([3, K - 1, 3, 0])
    loss = train.clip_objective(clip, torch.randn(4, 3, 2, 2), caption_ids, tokens, partial_true_of,
                                alpha_bar, data.generator("training", 0), perturbation=0.)
    assert torch.equal(clip.tokens[:, 0] % (K + 1), caption_ids)
    logits = clip.image_features @ clip.text_features.T
    assert loss == tinyclip.contrastive_loss(logits, caption_ids)
    train.clip_objective(clip, torch.randn(4, 3, 2, 2), caption_ids % 1000, tokens[:, 1:],
                         partial_true_of[:, 1:], alpha_bar, data.generator("training", 0),
                         perturbation=0.)
    assert len(clip.tokens) == train.CLOSED_SET + 1


def test_what_clip_is_trained_on():
    """The task's objective: each image with its own caption, an eighth of the images clean, all
    texts in all templates; partial captions have a quarter of the weight, not none."""
    dataset, read = toys.squares(64, seed=0), set()
    dataset = dataset._replace(templates=[
        [f"{prefix} {text}" for text in dataset.templates[1]] for prefix in ("one", "this", "my")])
    task = train.clip_task(CONFIGS["clip"], train.TrainConfig(batch=32, perturbation=0.), dataset,
                           dataset, CPU)
    clip, x_0, indices = RecordingCLIP(), torch.randn(32, 3, 8, 8), torch.arange(32) + 7
    for seed in range(20):
        loss = task.objective(clip, x_0, indices, data.generator("training", seed))
        assert (clip.t == 0).sum() == 4 and torch.equal(clip.x_t[clip.t == 0], x_0[clip.t == 0])
        texts = [task.model.tokenizer.decode(ids[1:].tolist()).rstrip("! ") for ids in clip.tokens]
        logits = clip.image_features @ clip.text_features.T
        is_true = torch.tensor([   # "red square" is part of "a red square on the ..."
            [text.split(" ", 1)[1] in dataset.captions[k] for text in texts]
            for k in dataset.caption_ids[indices]])
        of_captions, of_partial = (
            tinyclip.closed_set_loss(logits[:, part], is_true[:, part], clip.t == 0)
            for part in (slice(0, 6), slice(6, 9)))
        assert loss.item() == pytest.approx((of_captions + 0.25 * of_partial).item(), rel=1e-5)
        read |= set(texts)
    assert read == set(sum(dataset.templates, []))


class TableCLIP(torch.nn.Module):
    """Knows an image by its sign and a text by its first token: a table of logits."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2, 6))

    def encode_image(self, x_t, t):
        return F.one_hot((x_t.mean(dim=(1, 2, 3)) > 0).long(), 2).float()

    def encode_text(self, tokens):
        return self.table.T[tokens[:, 0]]

    def logits(self, image_features, text_features, t):
        return image_features @ text_features.T


@pytest.mark.parametrize("shift, least", [(0, math.log(2)), (1, math.log(4) + 0.25 * math.log(2))])
def test_clip_learns_as_much_as_there_is_to_know(shift, least):
    """Two kinds of images, each with two captions at random, and a partial caption: the loss falls
    to ln 2. With the captions of other images it stays at that of uniform softmaxes."""
    clip, rng = TableCLIP(), torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(clip.parameters(), 0.1), []
    partial_true_of = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    for step in range(150):
        caption_ids = torch.randint(4, (64,), generator=rng)
        x_0 = (caption_ids // 2 * 2. - 1).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        loss = train.clip_objective(
            clip, x_0, caption_ids.roll(shift), torch.arange(6).view(1, 6, 1), partial_true_of,
            torch.ones(tinyddpm.T + 1), data.generator("training", step), clean_fraction=0.,
            perturbation=0.)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-50:]) == pytest.approx(least, abs=0.05)


def test_chance_of_a_clip_is_the_loss_of_equal_logits(alpha_bar):
    """Whose softmax is uniform: among captions, clean images and partial captions."""
    dataset, clip = toys.squares(64, seed=0), RecordingCLIP()
    task = train.clip_task(CONFIGS["clip"], train.TrainConfig(batch=32, perturbation=0.), dataset,
                           dataset, CPU)
    clip.logits = lambda image_features, text_features, t: torch.zeros(32, 9)
    loss = task.objective(clip, torch.zeros(32, 3, 8, 8), torch.arange(32) % 6,
                          data.generator("training", 0))
    of_clean_among_partial = 0.25 * 0.1 * math.log(4)   # too little to be counted
    assert task.chance == pytest.approx(loss.item() - of_clean_among_partial, abs=1e-4)


def test_captions_that_are_alike_are_counted(capsys):
    """To CLIP, "A car!" and "the car" are one text."""
    dataset = toys.squares(40, seed=1)
    K = len(dataset.captions)
    texts = ["A car!", "the car", *dataset.templates[0][2:]]
    train.clip_task(CONFIGS["clip"], train.TrainConfig(batch=8), dataset._replace(
        templates=[texts]), dataset, CPU)
    assert f"1 of {K} captions are the same as another to CLIP" in capsys.readouterr().out
    train.clip_task(CONFIGS["clip"], train.TrainConfig(batch=8), dataset, dataset, CPU)
    assert "are the same" not in capsys.readouterr().out


def test_one_condition_in_ten_is_dropped():
    """It becomes zero; the others stay, and the caller's tensor as it was."""
    cond = torch.rand(4000, 3) + 1
    before = cond.clone()
    given = train.drop_text(cond, data.generator("training", 0))
    dropped = (given == 0).all(dim=1)
    assert torch.equal(given[~dropped], cond[~dropped]) and torch.equal(cond, before)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_embeddings_are_clean_hidden_or_in_between():
    """Three in ten conditions are the embedding itself, four are none, the others have all levels
    between; each is of its own image."""
    z = torch.randn(6000, 64, generator=data.generator("evaluation", 0))
    cond = train.noise_embeddings(z, data.generator("training", 0))
    level = 1 - cond[:, -1]
    assert (cond[level == 1] == 0).all() and torch.equal(cond[level == 0, :-1], z[level == 0])
    between = (level > 0) & (level < 1)
    for part, share in ((level == 0, .3), (level == 1, .4), (between & (level < .5), .15)):
        assert part.float().mean().item() == pytest.approx(share, abs=0.02)
    # The mean of z given the noised z, times the variance of that: signal^2.
    slope = (cond[:, :-1] * z).mean(dim=1)[between]
    assert (slope - (1 - level[between] ** 2)).mean().abs() < 0.02


def test_ddpm_objective_is_the_mean_over_all_timesteps(alpha_bar):
    """The conditions stay at their images."""
    cond, seen = torch.rand(4000, 3), []

    def unet(x_t, t, cond):
        seen.append((x_t, t, cond))
        return torch.zeros_like(x_t)

    x_0 = torch.zeros(4000, 3, 2, 2)
    loss = train.ddpm_objective(unet, x_0, cond, alpha_bar, data.generator("training", 0))
    (x_t, t, given), = seen
    assert given is cond and t.min() >= 1 and t.max() <= tinyddpm.T and x_t.shape == x_0.shape
    # Of x_0 = 0 and v_hat = 0 the loss is the mean of alpha_bar eps^2.
    assert loss.item() == pytest.approx(alpha_bar[1:].mean().item(), rel=0.03)


def test_ddpm_objective_without_a_condition(alpha_bar):
    """An unconditional U-Net is called without one."""
    unet = lambda x_t, t, cond: torch.zeros_like(x_t)
    assert train.ddpm_objective(unet, torch.zeros(8, 3, 2, 2), None, alpha_bar,
                                data.generator("training", 0)).isfinite()


def test_a_conditional_ddpm_gets_the_text_features_of_each_image(monkeypatch):
    """The condition is scale_features of the image's own caption, averaged over its templates, as
    sample.py uses it."""
    dataset, conds, calls = toys.squares(20, seed=0), [], []
    photos = [f"photo of {text}" for text in dataset.templates[0]]
    dataset = dataset._replace(templates=[dataset.templates[0], photos])
    clip = tinyclip.CLIP(CONFIGS["clip"], tinyclip.Tokenizer.train(dataset.captions, 512))
    clip.requires_grad_(False)
    task = train.ddpm_task(CONFIGS["ddpm"], train.TrainConfig(), dataset, dataset, CPU, clip)
    assert task.model.config.cond_dim == 16 and CONFIGS["ddpm"].cond_dim == 0
    assert task.content == {"clip": checkpoint.weights_checksum(clip)}
    monkeypatch.setattr(train, "ddpm_objective", lambda model, x_0, cond, *rest: conds.append(cond))
    monkeypatch.setattr(train, "drop_text", lambda cond, generator: calls.append(cond) or cond)
    x_0, indices = data.batch(dataset, 0, 1, 8)
    task.objective(task.model, x_0, torch.from_numpy(indices), data.generator("training", 0))
    features = [F.normalize(clip.encode_captions(texts), dim=1)[dataset.caption_ids[indices]]
                for texts in train.normalized_templates(dataset)]
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    expected = guide.scale_features((features[0] + features[1]) / 2)
    assert torch.allclose(conds[0], expected, atol=1e-5) and calls == [conds[0]]


@pytest.fixture
def clip():
    torch.manual_seed(0)
    texts = sum(toys.squares(1, seed=0).templates, [])
    model = tinyclip.CLIP(CONFIGS["clip"], tinyclip.Tokenizer.train(texts, 512))
    return model.eval().requires_grad_(False)


def test_embeddings_are_made_once(tmp_path, monkeypatch, clip):
    """Of each image, scaled; the second time they are read, for another CLIP or other images made
    anew."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(cli, "bf16_is_fast", lambda device: False)
    dataset, called, encode = toys.squares(601, seed=0), [], tinyclip.CLIP.encode_image
    monkeypatch.setattr(tinyclip.CLIP, "encode_image", lambda clip, x: (
        called.append(len(x)) or encode(clip, x)))
    z = train.embed_images(clip, dataset, CPU)
    expected = guide.scale_features(encode(clip, data.to_float(dataset.images)))
    assert torch.allclose(z, expected, atol=0.01) and called == [500, 101]
    assert torch.equal(train.embed_images(clip, dataset, CPU), z) and called == [500, 101]
    other = toys.squares(601, seed=1)
    assert not torch.equal(train.embed_images(clip, other, CPU), z)
    clip.log_scale.data += 1
    train.embed_images(clip, dataset, CPU)
    assert called == 3 * [500, 101]


def test_a_decoder_gets_the_embedding_of_each_image(tmp_path, monkeypatch, clip):
    """Noised at random, as noise_embeddings does; any U-Net's objective, and the width to fit."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    dataset, seen = toys.squares(40, seed=0), []
    task = train.decoder_task(CONFIGS["ddpm"], train.TrainConfig(), dataset, dataset, CPU, clip)
    assert task.kind == "decoder" and task.model.config.cond_dim == 16 + 1
    assert task.content == {"clip": checkpoint.weights_checksum(clip)}
    monkeypatch.setattr(train, "noise_embeddings", lambda z, generator: seen.append(z) or z)
    monkeypatch.setattr(train, "ddpm_objective", lambda model, x_0, cond, *rest: seen.append(cond))
    x_0, indices = data.batch(dataset, 0, 1, 8)
    task.objective(task.model, x_0, torch.from_numpy(indices), data.generator("training", 0))
    expected = guide.scale_features(clip.encode_image(x_0))
    assert torch.allclose(seen[0], expected, atol=0.1) and seen[1] is seen[0]
    assert not torch.allclose(seen[0], expected.roll(1, 0), atol=0.1)


def test_a_prior_gets_each_images_texts(tmp_path, monkeypatch, clip):
    """The scaled text features of its caption, from all templates in turn, and its embedding."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    dataset, seen = toys.squares(60, seed=0), []
    photos = [f"photo of {text}" for text in dataset.templates[0]]
    dataset = dataset._replace(templates=[dataset.templates[0], photos])
    task = train.prior_task(unclip.PriorConfig(width=32), train.TrainConfig(), dataset, dataset,
                            CPU, clip)
    monkeypatch.setattr(train, "drop_text", lambda text, generator: seen.append(text) or text)
    monkeypatch.setattr(tinyddpm, "ddpm_loss", lambda prior, z, t, eps, alpha_bar, text: (
        seen.append(z[:, :, 0, 0]) or z.mean()))
    x_0, indices = data.batch(dataset, 0, 1, 8)
    texts = torch.stack([guide.scale_features(clip.encode_captions(texts))[dataset.caption_ids]
                         for texts in train.normalized_templates(dataset)])   # (S, N, E)
    used = set()
    for seed in range(10):
        task.objective(task.model, x_0, torch.from_numpy(indices), data.generator("training", seed))
        text, z = seen[-2:]
        assert torch.allclose(z, guide.scale_features(clip.encode_image(x_0)), atol=0.1)
        distance = (texts[:, indices] - text).abs().amax(dim=2)               # (S, B)
        assert (distance.amin(dim=0) < 0.1).all()
        used |= set(distance.argmin(dim=0).tolist())
    assert used == {0, 1}
    line = task.preview(task.model.eval(), tmp_path)
    assert line.startswith("cosine of drawn and true embeddings of held-out images: ")


def test_what_cannot_be_trained_is_named():
    """A CLIP of one caption, and a judge of captions without attributes."""
    dataset = toys.squares(20, seed=0)
    one = dataset._replace(captions=["a car"], templates=[["a car"]],
                           partial_true_of=np.empty((0, 1), bool))
    with pytest.raises(cli.UserError, match="compared with 1 caption; CLIP learns from diff"):
        train.clip_task(CONFIGS["clip"], train.TrainConfig(), one, one, CPU)
    none = dataset._replace(attributes={}, caption_labels=dataset.caption_labels[:, :0])
    with pytest.raises(cli.UserError, match="name no attributes"):
        train.judge_task(CONFIGS["judge"], train.TrainConfig(), none, none, CPU)


def test_long_texts_are_reported(capsys):
    """By hand, for three tokens between start and end: of eleven texts, seven have more; of the six
    captions, both sides of each colour become alike. No text is too long for the context length
    that would do."""
    dataset = toys.squares(20, seed=0)   # "red square on the left", "red square", ...
    second = ["left side of it: red square", *dataset.templates[0][1:-1], "a red square on"]
    dataset = dataset._replace(templates=[dataset.templates[0], second])
    for context_length, report in (
            (5, "7 of 11 texts are longer than 5 tokens and are truncated; --context-length 8 "
                "is enough\n3 of 6 captions are the same as another to CLIP, which ignores case, "
                "signs, a first article and what is truncated\n"), (8, "")):
        config = dataclasses.replace(CONFIGS["clip"], context_length=context_length)
        train.clip_task(config, train.TrainConfig(), dataset, dataset, CPU)
        assert capsys.readouterr().out == report


def test_weights_of_a_clip_hold_the_texts_of_its_training():
    """In weights.pt: the first templates, normalised; which captions a partial caption is true
    of; all words, also those of later templates."""
    dataset = toys.squares(20, seed=0)
    later = [f"Late/{i} square" for i in range(9)]
    dataset = dataset._replace(templates=[dataset.templates[0]] * train.ENSEMBLE + [later])
    content = train.clip_task(CONFIGS["clip"], train.TrainConfig(), dataset, dataset, CPU).content
    assert len(content["templates"]) == train.ENSEMBLE
    assert content["templates"][0] == [
        text.removeprefix("a ") for text in dataset.templates[0]]
    assert (content["partial_true_of"].numpy() == dataset.partial_true_of).all()
    assert content["partial"] == ["a red square", "a green square", "a blue square"]
    assert content["words"] == sorted(
        "red green blue square on the left right late".split() + list("012345678"))


# ---- learning ------------------------------------------------------------------------------------

def learn(kind, folder, **options):
    """Train a toy on squares through train.train -> its task, the averaged model of weights.pt"""
    dataset, held_out = toys.squares(400, seed=1), toys.squares(200, seed=2)
    options = train.TrainConfig(**options)
    torch.manual_seed(0)
    task = train.TASKS[kind][0](CONFIGS[kind], options, dataset, held_out, CPU)
    train.train(task, options, dataset, folder, device=CPU)
    cls = {"clip": tinyclip.CLIP, "ddpm": tinyddpm.UNet, "judge": judge.Judge}[kind]
    return task, checkpoint.load_model(folder / "weights.pt", cls, kind)[0]


def test_clip_learns(tmp_path, alpha_bar, capsys):
    """Held-out images find their captions among six: nearly all clean ones, few in much noise."""
    task, clip = learn("clip", tmp_path, steps=160, batch=32, lr=2e-3)
    held_out = toys.squares(200, seed=2)
    captions = train.normalized_templates(held_out)[0][:6]
    x_0, caption_ids = data.to_float(held_out.images), torch.from_numpy(held_out.caption_ids)
    text_features, accuracy = clip.encode_captions(captions), {}
    for timestep in (0, 200, 300, 900):
        t = torch.full((len(x_0),), timestep)
        eps = torch.randn(x_0.shape, generator=data.generator("training", 0))
        x_t = tinyddpm.q_sample(x_0, t, eps, alpha_bar)
        predicted = clip.caption_probs(x_t, text_features, t).argmax(dim=1)
        accuracy[timestep] = (predicted == caption_ids).float().mean().item()
    assert accuracy[0] > 0.9 and accuracy[200] > 0.8 and 0.1 < accuracy[900] < 0.8
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("step 160: top-1 of 6 captions on held-out images: ")
    preview = task.preview(clip, tmp_path)   # of 500 draws among these 200 images
    printed, shown = ({int(t): float(p) / 100 for p, t in re.findall(
        r"([\d.]+)% at t = (\d+)", line)} for line in (last, preview))
    assert printed == pytest.approx(shown, abs=0.02)   # weights.pt is rounded
    assert list(shown) == [0, 300, 500, 700]
    assert all(shown[t] == pytest.approx(accuracy[t], abs=0.1) for t in (0, 300))


def test_ddpm_learns(tmp_path, alpha_bar):
    """On held-out images the error of v is far below that of v_hat = 0."""
    task, unet = learn("ddpm", tmp_path, steps=80, batch=16, lr=4e-3, weight_decay=0.)
    x_0, _ = data.batch(toys.squares(200, seed=2), 0, 0, 200)
    zero = lambda x_t, t, cond: torch.zeros_like(x_t)
    with torch.no_grad():
        loss, loss_of_zero = (
            train.ddpm_objective(model, x_0, None, alpha_bar, data.generator("training", 0)).item()
            for model in (unet, zero))
    assert loss < 0.35 * loss_of_zero
    assert task.chance == pytest.approx(loss_of_zero, rel=0.05)


def test_the_judge_learns(tmp_path):
    """Both attributes of held-out images are predicted."""
    _, model = learn("judge", tmp_path, steps=60, batch=32, lr=4e-3)
    held_out = toys.squares(200, seed=2)
    predictions = judge.predict(model, data.to_float(held_out.images))
    accuracy = (predictions == torch.from_numpy(held_out.labels)).float().mean(dim=0)
    assert (accuracy > 0.95).all()


def test_weights_are_the_moving_average(tmp_path, monkeypatch):
    """weights.pt holds the averaged model in fp16, checkpoint.pt that and the last one; the
    averaged model makes the previews."""
    shown, make_task = [], train.judge_task
    monkeypatch.setitem(train.TASKS, "judge", (lambda *args: make_task(*args)._replace(
        preview=lambda model, folder: shown.append(model.state_dict())),))
    learn("judge", tmp_path, steps=20, batch=8)
    content = torch.load(tmp_path / "weights.pt", weights_only=True)
    ema, model = (load(tmp_path / "checkpoint.pt", part) for part in ("ema", "model"))
    assert len(shown) == 1 and equal(shown[0], ema)
    assert equal(content["weights"], {name: p.half() for name, p in ema.items()})
    assert not equal(ema, model) and ema.keys() == model.keys()
    assert content["kind"] == "judge" and content["data"] == "squares" and content["steps"] == 20
    assert content["config"] == dataclasses.asdict(CONFIGS["judge"])


@pytest.mark.parametrize("kind", CONFIGS)
def test_previews_are_of_held_out_images(tmp_path, monkeypatch, alpha_bar, kind):
    """Loss and accuracy that a preview prints are those of the validation split."""
    dataset, held_out, seen = toys.squares(40, seed=1), toys.squares(50, seed=2), []
    task = train.TASKS[kind][0](CONFIGS[kind], train.TrainConfig(), dataset, held_out, CPU)
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda source, *args: (
        seen.append(source) or batch(source, *args)))
    monkeypatch.setattr(judge, "predict", lambda model, x: (
        seen.append(held_out) or torch.from_numpy(held_out.labels)))   # all correct
    probs, caption_probs = [], tinyclip.CLIP.caption_probs
    monkeypatch.setattr(tinyclip.CLIP, "caption_probs", lambda clip, x, texts, t: (
        probs.append((x, t)) or caption_probs(clip, x, texts, t)))
    line = task.preview(task.model.eval(), tmp_path)
    assert len(seen) == 1 and seen[0] is held_out
    for x, t in probs:   # noised up to the timesteps that it names
        noise = x - alpha_bar[t[0]].sqrt() * probs[0][0]
        assert noise.var().item() == pytest.approx(1 - alpha_bar[t[0]].item(), rel=0.02)
    assert [int(t[0]) for _, t in probs] == ([0, 300, 500, 700] if kind == "clip" else [])
    if kind == "judge":
        assert line == "on 50 held-out images: all 100.00%, colour 100.00%, side 100.00%"


class Stop(Exception):
    """Ends a command where the test has seen enough."""


@pytest.mark.parametrize("kind, splits", [
    ("clip", ["train", "validation"]), ("ddpm", ["train", "validation"]),
    ("judge", ["judge", "judge-test"])])
def test_models_are_trained_on_their_splits(tmp_path, monkeypatch, kind, splits):
    """The judge on other images than CLIP and the diffusion model; each is tested on a split that
    none is trained on. The initial weights follow the seed."""
    monkeypatch.chdir(tmp_path)
    given, loaded = [], {split: toys.squares(20, seed=i) for i, split in enumerate(splits)}

    def stop(task, options, dataset, folder, seed, *rest):
        given.append((dataset, task.model.state_dict(), seed))
        raise Stop

    make_task, *configs = train.TASKS[kind]
    monkeypatch.setattr(data, "load", lambda name, size, count, split: loaded[split])
    monkeypatch.setattr(train, "train", stop)
    monkeypatch.setitem(train.TASKS, kind, (lambda *args: (
        given.append(args[2:4]) or make_task(*args)), *configs))
    for seed in (0, 1):
        with pytest.raises(Stop):
            train.main(command(kind, f"--seed {seed}"))
    (train_split, held_out), (dataset, weights, seed), _, (_, others, other_seed) = given
    assert train_split is dataset is loaded[splits[0]] and held_out is loaded[splits[1]]
    assert not equal(weights, others) and (seed, other_seed) == (0, 1)


# ---- steps ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("step, expected", [(1, 0.1), (10, 1.), (55, 0.5), (100, 0.)])
def test_learning_rate_climbs_and_falls_to_zero(step, expected):
    """Linearly up, then half a cosine."""
    options = train.TrainConfig(steps=100, lr=1., warmup=0.1)
    assert train.learning_rate(step, options) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps, warmup", [(1, 0.03), (1, 1.), (4, 1.), (4, 0.)])
def test_learning_rate_of_odd_runs(steps, warmup):
    """A run of one step, or one that only warms up, is no division by zero."""
    options = train.TrainConfig(steps=steps, lr=1., warmup=warmup)
    rates = [train.learning_rate(step, options) for step in range(1, steps + 1)]
    assert all(0 <= rate <= 1 for rate in rates) and max(rates) > 0


def start(kind, task=None, size=16, **options):
    """-> a Run of a toy before its first step, on squares, in float32, without dropout"""
    dataset, options = toys.squares(64, seed=0, size=size), train.TrainConfig(**options)
    torch.manual_seed(0)
    config = CONFIGS[kind]
    if hasattr(config, "dropout"):
        config = dataclasses.replace(config, dropout=0.)
    task = task or train.TASKS[kind][0](config, options, dataset, dataset, CPU)
    for p in task.model.parameters():   # what starts at zero would hide what lies behind it
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    run = train.Run(task, options, dataset, Path("unused"), 0, CPU)
    run.bf16 = False
    return run


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_parameter_has_one_optimizer(kind):
    """Muon the wide matrices, AdamW all others: the U-Net's first and last layer have 3 channels on
    one side, and are left to AdamW."""
    run = start(kind)
    in_muon, in_adamw = (
        {id(p) for group in optimizer.param_groups for p in group["params"]}
        for optimizer in run.optimizers)
    assert isinstance(run.optimizers[0], muon.Muon)
    assert not in_muon & in_adamw
    assert in_muon | in_adamw == {id(p) for p in run.model.parameters()}
    assert all(p.ndim > 1 for p in run.model.parameters() if id(p) in in_muon) and in_muon
    if kind == "ddpm":
        ends = [run.model.conv_in.weight, *(p for p in run.model.conv_out.parameters())]
        assert {id(p) for p in ends} <= in_adamw
    if kind == "clip":
        assert id(run.model.log_scale) in in_adamw


def gradient(monkeypatch, run, steps=1):
    """-> the mean gradient of so many steps at a learning rate of zero, the mean loss"""
    grads, losses = [], []
    monkeypatch.setattr(distributed, "average_gradients", lambda model: grads.append(
        torch.cat([p.grad.flatten() for p in model.parameters()])))
    monkeypatch.setattr(train, "learning_rate", lambda step, options: 0.)
    for step in range(1, steps + 1):
        losses.append(train.train_step(run, step)[0])
    return torch.stack(grads).mean(dim=0), torch.stack(losses).mean()


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_follow_the_gradients_of_their_batches(monkeypatch, steps):
    """The gradient and loss of a step are those of its batch, which (seed, step) determines; it
    keeps nothing of the steps before."""
    run = start("judge", batch=8)
    grad, loss = gradient(monkeypatch, run, steps)
    batches = [data.batch(run.dataset, 0, step, 8) for step in range(1, steps + 1)]
    expected = sum(judge.judge_loss(run.model, x_0, torch.from_numpy(run.dataset.labels[indices]))
                   for x_0, indices in batches) / steps
    grads = torch.autograd.grad(expected, list(run.model.parameters()))
    assert torch.allclose(grad, torch.cat([g.flatten() for g in grads]), atol=1e-6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and grad.any()


def test_a_run_holds_only_settings_of_its_kind():
    """Else a new setting of one kind would keep runs of all kinds from resuming."""
    judge = start("judge").settings
    assert "cutout" in judge and "perturbation" not in judge and "accumulate" not in judge


def test_training_images_are_augmented(monkeypatch):
    """As the options say, with random numbers of the step."""
    calls = []
    monkeypatch.setattr(data, "augment", lambda x, *rest: calls.append(rest) or x)
    train.train_step(start("judge", flips=0.1, shift=2, cutout=3), 1)
    (*options, generator), = calls
    assert options == [0.1, 2, 3]
    expected = data.generator("training", 0, 1, 0).initial_seed()
    assert generator.initial_seed() == expected


def test_some_images_are_mirrored(monkeypatch):
    """A step's own choice of them; all others are as they were."""
    run, seen = start("judge", batch=64, flips=0.25), []
    monkeypatch.setattr(judge, "judge_loss", lambda model, x, labels: seen.append(x) or sum(
        p.sum() for p in model.parameters()))
    for step in (1, 2, 1):
        train.train_step(run, step)
    mirrored = []
    for step, x in zip((1, 2), seen):
        x_0, _ = data.batch(run.dataset, 0, step, 64)
        same, other = (((x - given).abs().amax(dim=(1, 2, 3)) < 1e-6)
                       for given in (x_0, x_0.flip(3)))
        assert (same | other).all() and 4 < other.sum() < 32
        mirrored.append(other)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(*mirrored)


def test_each_step_has_the_learning_rate_of_the_schedule():
    """Both optimizers, in every step."""
    run = start("judge", batch=4, steps=10, warmup=0.3)
    for step in (1, 3, 7):
        train.train_step(run, step)
        assert all(group["lr"] == train.learning_rate(step, run.options)
                   for optimizer in run.optimizers for group in optimizer.param_groups)


def test_weight_decay_is_of_muons_matrices():
    """Without a gradient they shrink by lr times the flag, and AdamW's parameters stay."""
    run = start("judge", batch=4, steps=1, lr=0.1, warmup=1., weight_decay=0.5)
    run.task = run.task._replace(objective=lambda model, x_0, caption_ids, generator: (
        0. * sum(logits.sum() for logits in model(x_0).values())))
    before = {p: p.detach().clone() for p in run.model.parameters()}
    train.train_step(run, 1)
    matrices, others = muon.split(run.model)
    assert matrices and all(torch.allclose(p, 0.95 * before[p], atol=1e-7) for p in matrices)
    assert all(torch.equal(p, before[p]) for p in others)


def test_the_history_has_the_mean_loss_since_its_last_entry():
    """With the step at which it was made."""
    run = start("judge", batch=4)
    run.step = 7
    train.record(run, [torch.tensor([loss, 1.]) for loss in (1., 2., 6.)])
    assert run.history == [(7, 3.)]


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_have_the_gradient_of_the_whole_batch(monkeypatch, accumulate):
    """Exactly, for the judge, whose loss is a mean over images without random numbers."""
    whole, parts = (gradient(monkeypatch, start("judge", batch=8, accumulate=n))
                    for n in (1, accumulate))
    assert torch.allclose(whole[0], parts[0], rtol=1e-4, atol=1e-6) and whole[0].any()
    assert whole[1].item() == pytest.approx(parts[1].item(), rel=1e-5)


def test_micro_batches_of_the_ddpm_have_the_same_gradient_on_average(monkeypatch):
    """Each draws its own timesteps and noise; over many steps the mean gradients and losses
    agree."""
    whole, parts = (gradient(monkeypatch, start("ddpm", size=8, batch=16, accumulate=n), steps=30)
                    for n in (1, 4))
    assert (whole[0] - parts[0]).norm() < 0.2 * whole[0].norm()   # 0.06 here
    assert whole[1].item() == pytest.approx(parts[1].item(), rel=0.02)


def test_a_large_gradient_is_clipped(monkeypatch):
    """The optimizers get one of norm 1 at most; the norm before is what is measured."""
    run, norms = start("judge", batch=4), []
    run.task = run.task._replace(objective=lambda model, x_0, caption_ids, generator: (
        1e6 * sum(logits.square().sum() for logits in model(x_0).values())))
    monkeypatch.setattr(run.optimizers[0], "step", lambda: norms.append(torch.cat(
        [p.grad.flatten() for p in run.model.parameters()]).norm().item()))
    loss, norm = train.train_step(run, 1)
    assert norms == [pytest.approx(1., rel=1e-3)] and norm > 1e3 and loss.isfinite()


# ---- runs ----------------------------------------------------------------------------------------

def test_a_run_leaves_its_files(here, capsys, recwarn):
    """Curves, previews, weights and a checkpoint; the same command again says that it is
    finished. Nothing warns."""
    torch.set_warn_always(True)   # not only the first time
    for kind, files in (("clip", ["loss.png"]), ("judge", ["loss.png"]),
                        ("ddpm", ["loss.png", "samples.png"])):
        train.main(command(kind, "--steps 3"))
        assert "finished: " in capsys.readouterr().out
        run = Path("runs") / kind
        assert sorted(path.name for path in run.iterdir()) == sorted(
            ["checkpoint.pt", "weights.pt", *files])
        for file in files:
            with Image.open(run / file) as image:
                assert image.width > 100
        before = (run / "checkpoint.pt").read_bytes()
        train.main(command(kind, "--steps 3"))
        assert "is finished (3 steps); --fresh starts over" in capsys.readouterr().out
        assert (run / "checkpoint.pt").read_bytes() == before
    torch.set_warn_always(False)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("kind, more", [
    ("clip", ""), ("ddpm", "--dropout 0.2"), ("judge", "--dropout 0.5")])
def test_a_resumed_run_has_the_same_bits(here, capsys, kind, more):
    """Stopped by --minutes after its first and its second step and started again, a run ends where
    one that ran through ends: model, average, optimizers; with dropout too."""
    arguments = command(kind, f"--steps 4 {more} --out")
    train.main([*arguments, f"{kind}/whole"])
    train.main([*arguments, f"{kind}/parts", "--minutes", "0.00001"])
    assert "stopped at step 1 of 4; the same command resumes" in capsys.readouterr().out
    train.main([*arguments, f"{kind}/parts", "--minutes", "0.00001"])
    assert f"resuming {kind}/parts at step 2 of 4" in capsys.readouterr().out
    train.main([*arguments, f"{kind}/parts"])
    whole, parts = (torch.load(f"{kind}/{out}/checkpoint.pt", weights_only=True)
                    for out in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for part in ("model", "ema"):
        assert equal(whole[part], parts[part])
        assert all(p.isfinite().all() for p in whole[part].values())
    for ours, theirs in zip(whole["optimizers"], parts["optimizers"]):
        assert all(equal(state, theirs["state"][i]) for i, state in ours["state"].items())
    assert equal(load(f"{kind}/whole/weights.pt", "weights"),
                 load(f"{kind}/parts/weights.pt", "weights"))
    train.main([*arguments, f"{kind}/other", "--seed", "1"])
    assert not equal(load(f"{kind}/other/checkpoint.pt"), whole["model"])


def test_other_settings_are_another_run(here, capsys):
    """They are refused, by name, unless --fresh starts over; --accumulate is none of them."""
    train.main(command("judge", "--steps 4 --out settings --minutes 0.00001"))
    for flags, message in (("--steps 4 --batch 16", r"another batch \(8, now 16\)"),
                           ("--steps 5", r"another steps \(4, now 5\)"),
                           ("--steps 4 --seed 1", "another seed"),
                           ("--steps 4 --width 16", "another width"),
                           ("--steps 4 --images 50", "another number of images")):
        with pytest.raises(cli.UserError, match=f"{message}.*must end as if it had never stopped"
                           ".*another --out.*--fresh") as error:
            train.main(command("judge", f"--out settings {flags}"))
        assert "\n" not in str(error.value)
    with pytest.raises(cli.UserError, match="of kind 'ddpm run' is needed"):
        train.main(command("ddpm", "--out settings"))
    train.main(command("judge", "--steps 4 --out settings --accumulate 2"))
    assert "resuming settings at step 2" in capsys.readouterr().out
    train.main(command("judge", "--steps 5 --out settings --fresh --minutes 0.00001"))
    out = capsys.readouterr().out   # the same command would start over again
    assert "stopped at step 1 of 5; the same command" in out and "without --fresh" in out


def test_another_clip_is_another_run(here):
    """A conditional DDPM cannot go on with the text features of another CLIP."""
    for seed in (0, 1):
        train.main(command("clip", f"--steps 1 --seed {seed} --out clip{seed}"))
    train.main(command("ddpm", "--steps 4 --clip clip0/weights.pt --out cond --minutes 0.00001"))
    with pytest.raises(cli.UserError, match="another"):
        train.main(command("ddpm", "--steps 4 --clip clip1/weights.pt --out cond"))
    with pytest.raises(cli.UserError, match=r"another CLIP \(\d+, now None\)"):
        train.main(command("ddpm", "--steps 4 --out cond"))
    train.main(command("ddpm", "--steps 4 --clip clip0/weights.pt --out cond"))


def test_a_clip_of_other_images_is_refused(here):
    """Before the training, not by sample.py after it: other data, or another size."""
    small = toys.FLAGS["clip"].replace("--image-size 16", "--image-size 8")
    train.main(f"clip --steps 1 {small} --out small".split())
    content = torch.load("small/weights.pt", weights_only=True)
    checkpoint.save("photos.pt", {**content, "data": "./photos", "captions": ["a cat"]})
    for clip in ("photos.pt", "small/weights.pt"):
        with pytest.raises(cli.UserError, match="./photos|at 8 pixels"):
            train.main(command("ddpm", f"--steps 1 --clip {clip} --out misfit"))
    train.main(command("ddpm", "--steps 1 --out native"))   # 16 pixels
    with pytest.raises(cli.UserError, match="at 16 pixels, but cars at 8 is needed"):
        train.main(command("upsampler", "--steps 1 --image-size 32 --ddpm native/weights.pt "
                           "--out misfit"))


def test_other_captions_are_another_run(tmp_path, monkeypatch):
    """Even if there are as many of them, and the first ones are the same."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(60):
        Image.new("RGB", (16, 16)).save(f"photos/{i:02d}.png")
        Path(f"photos/{i:02d}.txt").write_text(f"a thing of number {i}")
    train.main(command("clip", "--data photos --steps 2"))
    Path("photos").rename("moved")   # a data set is known by what it holds
    train.main(command("clip", "--data moved --steps 2"))
    Path("moved/59.txt").write_text("what is this?")
    with pytest.raises(cli.UserError, match="another captions' checksum"):
        train.main(command("clip", "--data moved --steps 2"))
    for i in range(60):   # the same captions, of other images
        Path(f"moved/{i:02d}.txt").write_text(f"a thing of number {59 - i}")
    with pytest.raises(cli.UserError, match="another captions' checksum"):
        train.main(command("clip", "--data moved --steps 2"))
    for i in range(60):   # any of them may be in the split
        Path(f"moved/{i:02d}.txt").write_text(f"a thing of number {i}")
        Image.new("RGB", (16, 16), "red").save(f"moved/{i:02d}.png")
    with pytest.raises(cli.UserError, match="another images' checksum"):
        train.main(command("clip", "--data moved --steps 2"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_two_commands_do_not_train_in_one_folder(here):
    """The second is refused while the first runs, and is let in after it, even if it was killed;
    what that left half written is removed."""
    Path("shared").mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import pathlib, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
         "from infra import checkpoint\nwith checkpoint.lock(pathlib.Path('shared')):\n"
         "    print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(cli.UserError, match="another command trains in shared; choose another --o"):
        train.main(command("judge", "--steps 1 --out shared"))
    Path("shared/checkpoint.1.tmp").write_bytes(b"half")
    holder.kill()
    holder.communicate()
    train.main(command("judge", "--steps 1 --out shared"))
    assert not list(Path("shared").glob("*.tmp"))


def interrupt_step(monkeypatch, number, *signals):
    """Send these signals in the middle of that step."""
    train_step = train.train_step

    def interrupted(run, step):
        for one in signals if step == number else ():
            signal.raise_signal(one)
        return train_step(run, step)

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_current_step(here, monkeypatch, capsys, number, code):
    """The step is finished and saved, the exit code is the signal's, and its handler is as
    before."""
    interrupt_step(monkeypatch, 3, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(code)):
        train.main(command("judge", f"--steps 9 --out {number.name}"))
    assert "stopped at step 3 of 9; the same command resumes" in capsys.readouterr().out
    assert load(f"{number.name}/checkpoint.pt", "step") == 3
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once(here, monkeypatch):
    """Without waiting for the step, and without a checkpoint of half of it."""
    interrupt_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.main(command("judge", "--steps 9 --out twice"))
    assert not Path("twice/checkpoint.pt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_a_terminated_command_says_how_to_resume(here):
    """After its first preview: the signal's exit code, one line, and a checkpoint of its last
    step."""
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command("clip", "--steps 500 --out terminated")],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
    while "step 50:" not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    running.terminate()
    out, error = running.communicate(timeout=100)
    step = load("terminated/checkpoint.pt", "step")
    assert running.returncode == 143 and 50 <= step < 500 and "Traceback" not in error
    assert out.strip() == f"stopped at step {step} of 500; the same command resumes"


@pytest.mark.parametrize("save_every, kept", [(0, 5), (1000, None)])
@pytest.mark.parametrize("measured", [(math.nan, 1.), (0.5, math.inf)])
def test_a_loss_that_is_not_finite_ends_the_run(here, monkeypatch, save_every, kept, measured):
    """The step is named, for a bad loss and a bad gradient; what was saved before stays."""
    train_step = train.train_step

    def diverging(run, step):
        result = train_step(run, step)
        return torch.tensor(measured) if step == 6 else result

    monkeypatch.setattr(train, "train_step", diverging)
    out = Path(f"diverging-{save_every}-{measured[1]}")
    with pytest.raises(cli.UserError, match="not finite at step 6; diverging.* half the --lr"):
        train.main(command("judge", f"--steps 9 --out {out} --save-every {save_every}"))
    path = out / "checkpoint.pt"
    assert (load(path, "step") if path.exists() else None) == kept


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_ends_the_run(here, monkeypatch, capsys):
    """One line; what was saved before is whole, and the run resumes from it."""
    import resource
    train.main(command("judge", "--steps 9 --out full --minutes 0.00001"))
    before, save = Path("full/checkpoint.pt").read_bytes(), train.Run.save

    def on_a_full_disk(run):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))   # bytes per file
        try:
            save(run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "save", on_a_full_disk)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(cli.UserError, match="cannot write full/") as error:
            train.main(command("judge", "--steps 9 --out full"))
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    assert Path("full/checkpoint.pt").read_bytes() == before
    assert not list(Path("full").glob("*.tmp"))
    train.main(command("judge", "--steps 9 --out full"))
    assert "resuming full at step 2" in capsys.readouterr().out


def test_a_cut_off_checkpoint_is_one_line(here):
    """It is named, with a way out."""
    train.main(command("judge", "--steps 2 --out cut"))
    path = Path("cut/checkpoint.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(cli.UserError, match="cut/checkpoint.pt is not a readable .*judge --fresh"):
        train.main(command("judge", "--steps 2 --out cut"))


def test_a_ddpm_needs_no_captions(tmp_path, monkeypatch, capsys):
    """It trains on images alone; CLIP says what it needs."""
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for i in range(30):
        Image.new("RGB", (16, 16), (8 * i, 0, 0)).save(f"photos/{i}.png")
    train.main(f"ddpm --data photos --steps 2 {toys.FLAGS['ddpm']}".split())
    out = capsys.readouterr().out
    assert "(images without captions)" in out and "finished" in out
    with pytest.raises(cli.UserError, match="there are images but no captions; put each class"):
        train.main(f"clip --data photos --steps 2 {toys.FLAGS['clip']}".split())


@pytest.mark.parametrize("key", ["ema", "model"])
def test_a_checkpoint_of_another_version_is_refused(here, key):
    train.main(command("judge", "--steps 4 --out version --minutes 0.00001 --fresh"))
    saved = torch.load("version/checkpoint.pt", weights_only=True)
    saved[key] = {f"old.{name}": tensor for name, tensor in saved[key].items()}
    torch.save(saved, "version/checkpoint.pt")
    with pytest.raises(cli.UserError, match="version/checkpoint.pt is of another version; .*fresh"):
        train.main(command("judge", "--steps 4 --out version"))


# ---- the command line ----------------------------------------------------------------------------

def test_flags_change_the_defaults(capsys):
    """Given flags replace their fields and no others; -h lists the fields of both configs."""
    args, config, options = train.parse(
        "ddpm --channels 48 --multipliers 1 2 --attention 1 --lr 0.002".split())
    _, default_config, default_options = train.TASKS["ddpm"]
    assert config == dataclasses.replace(default_config, channels=48, multipliers=(1, 2),
                                         attention=(1,))
    assert options == dataclasses.replace(default_options, lr=0.002)
    assert (args.out, args.data, args.seed) == ("runs/ddpm", "cars", 0)
    assert train.parse(["clip"])[1:] == train.TASKS["clip"][1:]
    with pytest.raises(SystemExit, match="0"):
        train.parse(["ddpm", "-h"])
    out = capsys.readouterr().out
    for name in ("--channels", "--weight-decay", "--images", "--clip"):
        assert name in out
    assert "--cond-dim" not in out and "--in-channels" not in out   # they follow from others


@pytest.mark.parametrize("kind", train.PRESETS["photos"])
def test_a_preset_is_other_defaults(kind):
    """Given flags replace them, too."""
    preset = train.PRESETS["photos"][kind]
    _, *default = train.TASKS[kind]
    _, config, options = train.parse(f"{kind} --preset photos --steps 7 --batch 5".split())
    for made, before in ((config, default[0]), (options, default[1])):
        for name, value in vars(before).items():
            assert getattr(made, name) == {**preset, "steps": 7, "batch": 5}.get(name, value)


@pytest.mark.parametrize("flags, message", [
    ("clip --minutes -1", "--minutes must be from 0 to inf, not -1.0"),
    ("clip --minutes nan", "--minutes must be"), ("clip --save-every -1", "--save-every must"),
    ("clip --steps 0", "--steps must be"),
    ("clip --batch 0", "--batch must be"), ("clip --images -5", "--images must be"),
    ("clip --accumulate 0", "--accumulate must be"),
    ("clip --batch 9 --accumulate 2", "--batch 9 is not a multiple of 1 ranks x 2 micro-batches"),
    ("clip --lr nan", "--lr must be"), ("clip --lr inf", "--lr must be"),
    ("clip --seed -1", "--seed must be"), ("clip --images 20000000", "--images must be"),
    ("clip --max-logit-scale inf", "finite"), ("clip --max-logit-scale nan", "finite"),
    ("clip --preset small", "--preset"), ("prior --clip c.pt --preset photos", "--preset"),
    ("clip --flips 2", "--flips must be from 0 to 1"), ("decoder --clip c.pt --flips 1", "--flips"),
    ("judge --shift 32", "--shift must be"), ("ddpm --shift 1", "--shift"),
    ("upsampler --ddpm d.pt --cutout 1", "--cutout"), ("clip --steps many", "'many'"),
    ("clip --hold-out white", "--hold-out"), ("clip --clip clip.pt", "--clip"),
    ("clip --stem foo", "stem must be"), ("clip --heads 3", "multiple of heads"),
    ("clip --heads 0", "at least 1"), ("clip --image-size 30", "not a multiple of patch"),
    ("clip --patch 3 --image-size 33", "power of two"),
    ("ddpm --channels 40", "multiple of 16"), ("ddpm --channels -32", "multiple of 16"),
    ("ddpm --attention 7", "levels 0 to 2"),
    ("ddpm --image-size 30", "cannot be halved 2 times"),
    ("ddpm --channels 16 --multipliers 1 --attention 0", "of 32 where there is attention"),
    ("judge --width 56", "multiple of 16"), ("judge --width 0", "multiple of 16"),
    ("nothing", "invalid choice: 'nothing'"), ("", "kind")])
def test_mistakes_are_named_before_anything_is_done(flags, message):
    """In one line, by the parser."""
    with pytest.raises(cli.UserError, match=message) as error:
        train.parse(flags.split())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ("ddpm --clip none.pt", "there is no file none.pt"),
    ("ddpm --clip runs/judge/weights.pt", "holds 'judge'"),
    ("ddpm --out file/a", "file"), ("clip --device gpu7", "--device gpu7"),
    ("clip --data nowhere", "--data nowhere: there is no such folder")])
def test_other_mistakes_are_named_too(here, monkeypatch, capsys, flags, message):
    """In one line, with exit code 2, as run_command prints it."""
    Path("file").write_text("no folder")
    if not Path("runs/judge/weights.pt").exists():
        train.main(command("judge", "--steps 2"))
    kind, *rest = flags.split()
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *command(kind), *rest])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.run_command(train.main)
    *progress, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("train.py: ") and message in last and "Traceback" not in str(progress)


def test_the_command_answers_in_one_line(tmp_path):
    """A mistake leaves nothing behind: no folder, no cache, no traceback."""
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "ddpm", "--minutes", "nan"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == "train.py: --minutes must be from 0 to inf, not nan\n"
