"""The experiments: metrics and variants by hand, every experiment at toy size, one as a command."""
import argparse
import dataclasses
import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cars
import data
import guide
import judge
import sample
import tinyclip
import tinyddpm
import toys
import train
import unclip
from experiments import __main__ as main
from experiments import (ablations, benchmark, clip, ddpm, english, evaluator, figures, guidance,
                         metrics, photographs, second_judge, variants, zeroshot)
from experiments import unclip as unclip_experiments
from infra import checkpoint, cli

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "clip": (tinyclip.CLIPConfig(width=32, layers=1, heads=2, text_width=32, text_layers=1,
                                 text_heads=2, embed_dim=16, image_size=16),
             train.TrainConfig(steps=10, batch=8, images=60)),
    "ddpm": (tinyddpm.UNetConfig(channels=16, multipliers=(1, 2), attention=(1,), image_size=16),
             train.TrainConfig(steps=10, batch=8, images=60)),
    "judge": (judge.JudgeConfig(width=8, image_size=16),
              train.TrainConfig(steps=2, batch=8, images=60)),
    "decoder": (tinyddpm.UNetConfig(channels=16, multipliers=(1, 2), attention=(1,), image_size=16,
                                    cond_dim=17), None),
    "prior": (unclip.PriorConfig(clip_dim=16, width=32, blocks=1), None),
    "upsampler": (unclip.UpsamplerConfig(32, 1, 64),
                  train.TrainConfig(steps=2, batch=4, images=8))}
CLASSES = {"decoder": tinyddpm.UNet, "prior": unclip.Prior, "upsampler": unclip.Upsampler}


def random_cars(name, size, count, split="train"):
    """Random pixels instead of rendered cars, and every caption in turn."""
    N, seed = min(count, 600), sorted(data.SPLITS).index(split)
    images = np.random.default_rng(seed).integers(256, size=(N, size, size, 3), dtype=np.uint8)
    texts, = cars.descriptions(1)
    return data.Dataset("cars", images, np.arange(N) % 294, cars.CAPTIONS,
                        [texts, [f"photo of {text}" for text in texts]], cars.PARTIAL_TRUE_OF,
                        cars.caption_labels(np.arange(294)), cars.ATTRIBUTES,
                        f"{split}: {N} random images")


def write_models(folder, dataset):
    """Write untrained models of toy size, random in every parameter, into runs/."""
    sizes = {name: len(values) for name, values in dataset.attributes.items()}
    clip_checksum = None
    for kind in ("clip", "ddpm", "judge", "judge-2", *CLASSES):
        config, options = TOY[kind.removesuffix("-2")]
        torch.manual_seed(0)
        if kind in CLASSES:
            model, content = CLASSES[kind](config), {"clip": clip_checksum}
        else:
            task = train.TASKS[kind.removesuffix("-2")][0](config, options, dataset, dataset,
                                                           torch.device("cpu"))
            model = second_judge.PlainNet(config, sizes) if kind == "judge-2" else task.model
            content = task.content
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        if kind == "clip":
            clip_checksum = checkpoint.weights_checksum(model)
        out = folder / ("upsampler.pt" if kind == "upsampler" else f"runs/{kind}/weights.pt")
        checkpoint.save(out, {
            "kind": kind.removesuffix("-2"), "config": dataclasses.asdict(config),
            "data": dataset.name, "captions": dataset.captions, "steps": 1,
            "weights": checkpoint.fp16_weights(model), **content})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models of the built-in cars in runs/."""
    folder = tmp_path_factory.mktemp("experiments")
    write_models(folder, random_cars("cars", 16, 60))
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """Run in that folder, with random images and small numbers of them."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(data, "load", random_cars)
    for module, name, small in (
            (evaluator, "HELD_OUT", 30), (evaluator, "POOL", 16), (evaluator, "REAL", 300),
            (clip, "TIMESTEPS", (0, 500)), (ddpm, "STEPS_IMAGES", 8), (ddpm, "STEPS", (1, 2)),
            (second_judge, "JUDGE_TEST", 40), (cli, "bf16_is_fast", lambda device: False),
            (guidance, "PROMPTS", {"all": slice(None), "even": slice(0, None, 16)})):
        monkeypatch.setattr(module, name, small)
    monkeypatch.setattr(train, "TASKS", {
        kind: (train.TASKS[kind][0], *toy) for kind, toy in TOY.items() if toy[1]})


@pytest.fixture
def models(folder):
    models = sample.load_models(folder / "runs/clip/weights.pt", folder / "runs/ddpm/weights.pt")
    templates = [evaluator.normalized(models.captions)]
    return models._replace(templates=templates, caption_labels=torch.arange(294)[:, None],
                           text_features=models.clip.encode_ensemble(templates))   # in float32


def run(command, steps=2):
    """-> the rows of an experiment's JSON, in which all numbers are finite"""
    main.main(f"{command} --steps {steps} --batch 252 --device cpu".split())
    rows = json.loads(Path(f"out/{command.split()[0]}.json").read_text())["rows"]
    numbers = [cell for row in rows for cell in row.values() if isinstance(cell, float)]
    assert rows and np.isfinite(numbers).all()
    return rows


# ---- metrics -------------------------------------------------------------------------------------

def test_calibration_by_hand():
    """Of three answers given with 95 % one is correct, and the one with 52 % is: three quarters of
    |1/3 - .95| and a quarter of |1 - .52|."""
    sure, unsure = [0.95, 0.05], [0.48, 0.52]
    probs, caption_ids = torch.tensor([sure, sure, sure, unsure]), torch.tensor([0, 1, 1, 1])
    error = metrics.calibration_error(probs, caption_ids, bins=10)
    assert error == pytest.approx(0.75 * (0.95 - 1 / 3) + 0.25 * 0.48, abs=1e-6)


def test_recall_by_hand():
    """Three images of captions 1, 0, 0; none of caption 2."""
    logits = torch.tensor([[0., 3., 1.], [2., 0., 1.], [0., 5., 1.]])
    recalls = metrics.recall(logits, torch.tensor([1, 0, 0]))
    assert recalls["captions@1"] == pytest.approx(2 / 3)   # the third is taken for caption 1
    assert recalls["captions@5"] == 1                      # of three
    assert recalls["images@1"] == 0.5   # caption 0 retrieves the second, caption 1 the third
    assert recalls["images@5"] == 1


def test_wilson_interval():
    """Textbook values."""
    assert metrics.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert metrics.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)


def test_kid_of_a_block_is_the_sum_over_pairs():
    torch.manual_seed(0)
    real, generated = torch.randn(100, 3) * 2 + 1, torch.randn(100, 3)
    x, y = ((a - real.mean(0)) / real.std(0) for a in (real, generated))
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    pairs = [(i, j) for i in range(25) for j in range(25) if i != j]
    expected = [
        sum(kernel(x[n + i], x[n + j]) + kernel(y[n + i], y[n + j]) - 2 * kernel(x[n + i], y[n + j])
            for i, j in pairs) / 600 for n in (0, 25, 50, 75)]
    value, error = metrics.kid(real, generated)
    assert value == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert error == pytest.approx(statistics.stdev(expected) / 2, rel=1e-4)
    assert metrics.kid(real[:99], generated[:99]) == (None, None)
    with pytest.raises(ValueError, match="as many"):
        metrics.kid(real, generated[:99])


def test_kid_is_unbiased_and_finds_differences():
    """Also where images share with their partners what the caption says, and nothing else."""
    torch.manual_seed(0)
    real, same, other = torch.randn(1600, 8), torch.randn(1600, 8), torch.randn(1600, 8) + 0.3
    caption = 3 * torch.randn(1600, 8)
    for x, y in ((real, same), (caption + real, caption + same)):
        value, error = metrics.kid(x, y)
        assert abs(value) < 4 * error
    value, error = metrics.kid(real, other)
    assert value > 4 * error > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert metrics.kid(real, other) == (value, error)


def test_features_are_of_each_image_alone():
    torch.manual_seed(0)
    network = judge.Judge(judge.JudgeConfig(width=16, image_size=16), {"class": 2}).eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1   # resized
    features = metrics.judge_features(network, x)
    assert features.shape == (3, 2 * (32 + 64 + 64)) and torch.isfinite(features).all()
    assert torch.allclose(features[1:2], metrics.judge_features(network, x[1:2]), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-2)


def test_diversity_is_within_captions():
    features = torch.tensor([[0., 0.], [3., 4.], [100., 0.], [100., 1.]])
    assert metrics.diversity(features, torch.tensor([0, 0, 1, 1])) == pytest.approx(3)


def test_word_order_by_hand():
    """A white and red car, taken for a red and white one, and a red one, which has no order."""
    labels = torch.from_numpy(cars.caption_labels(np.arange(294)))
    white_red, red_white, red = (cars.CAPTIONS.index(f"a {c} car")
                                 for c in ("white and red", "red and white", "red"))
    for better, fraction in ((white_red, 1.), (red_white, 0.)):
        logits = torch.zeros(2, 294)
        logits[0, better] = 1
        assert clip.word_order(logits, torch.tensor([white_red, red]), labels) == fraction


def test_held_out_phrasings_are_new():
    """By hand, of two captions; neither a phrase nor keywords can write any of them."""
    white_red, red = (cars.CAPTIONS.index(f"a {c} car") for c in ("white and red", "red"))
    phrasings = clip.held_out_phrasings()
    assert phrasings[0][white_red] == "a red roof over the white body of a car"
    assert phrasings[-1][red] == "the car is painted red, with red on the roof"
    articles = ("a", "an", "the", "this", "{a}")
    bare = lambda text: " ".join(w for w in re.findall(r"[{\w}]+", text) if w not in articles)

    def expand(phrase):   # all choices of its parts
        part = re.search(r"\{(" + "|".join(cars.PARTS) + r")\}", phrase)
        choices = cars.PARTS[part[1]] if part else []
        return [text for choice in choices
                for text in expand(phrase.replace(part[0], choice, 1))] or [phrase]

    known = {bare(text) for phrases in cars.PHRASES.values() for phrase in phrases
             for text in expand(phrase)}
    assert len(known) > 500 and not known & set(map(bare, clip.HELD_OUT_PHRASINGS))
    small = "(?:(?:" + "|".join(cars.SMALL_WORDS) + ") ){0,2}"
    keywords = "{n}", "{m} {n}", "{m} body", "body {m}", "{s} roof", "roof {s}"
    groups = [small + re.escape(words).replace(r"\ ", " " + small) for words in keywords]
    is_keywords = re.compile("(" + "|".join(group + "( |$)" for group in groups) + ")+").fullmatch
    assert all(is_keywords(cars.keywords("two colours", random.Random(i))) for i in range(200))
    assert not any(is_keywords(" ".join(re.findall(r"[{\w}]+", text)))
                   for text in clip.HELD_OUT_PHRASINGS)


# ---- variants of log_p ---------------------------------------------------------------------------

def test_lookahead_with_other_parts(models):
    """At t_fraction = 1 it is CLIP on x_t itself."""
    torch.manual_seed(0)
    x, t, targets = torch.randn(2, 3, 16, 16), torch.tensor([300, 700]), torch.tensor([5, 77])
    with torch.no_grad():
        value = guide.lookahead(models.clip, models.text_features, targets,
                                torch.arange(294)[:, None], t_fraction=1., temperature=2.)(x, t, x)
        logits = models.clip.logits(models.clip.encode_image(x, t), models.text_features, t)
    expected = 2 * (logits / 2).log_softmax(1)[[0, 1], [5, 77]]
    assert torch.allclose(value, expected, atol=1e-4)


def test_joint_guidance_by_hand(models):
    """The caption's log-probability by the softened softmax, where lookahead applies CLIP."""
    torch.manual_seed(0)
    x, t, targets = torch.randn(1, 3, 16, 16), torch.tensor([300]), torch.tensor([77])
    with torch.no_grad():
        log_p = variants.joint(models.clip, models.text_features, targets,
                               torch.from_numpy(cars.caption_labels(np.arange(294))))
        value = log_p(x, t, torch.zeros_like(x))
        eps_hat = x / (1 - models.alpha_bar[300]).sqrt()   # for an x_0_hat that is zero
        x_225 = (1 - models.alpha_bar[225]).sqrt() * eps_hat
        t = torch.tensor([225])
        features = models.clip.encode_image(x_225, t)
        p = (models.clip.logits(features, models.text_features, t)[0] / 5).softmax(0)
    assert torch.allclose(value, 5 * p[77].log(), atol=1e-4)


def test_dot_product_by_hand(models):
    x, t, targets = torch.randn(2, 3, 16, 16), torch.tensor([300, 300]), torch.tensor([7, 100])
    models = models._replace(text_features=3 * models.text_features)   # not normalised
    with torch.no_grad():
        value = variants.dot_product(
            models.clip, models.text_features, targets, models.caption_labels)(x, t, None)
        expected = (models.clip.encode_image(x) * models.text_features[[7, 100]]).sum(dim=1)
    assert value.shape == (2,) and torch.allclose(value, expected, rtol=1e-4)


def test_each_variant_has_its_own_part(models):
    """Its name says which value of which part it is; all other parts are the default's."""
    x, t, targets = torch.randn(1, 3, 16, 16), torch.tensor([500]), torch.tensor([77])
    value = lambda make: make(models.clip, models.text_features, targets, models.caption_labels)(
        x, t, x).item()
    for part, values in variants.PARTS.items():
        for number in values:
            variant = variants.VARIANTS[f"{part} {number}"]
            other = functools.partial(guide.lookahead, **{part: number})
            assert variant.scale == guide.METHODS["lookahead"].scale
            assert value(variant.make_log_p) == value(other) != value(guide.lookahead)


# ---- images and the cache ------------------------------------------------------------------------

def test_held_out_images_have_noise_of_their_own(here, models):
    """Images of the validation split with their captions, and for each other noise, by the seed."""
    dataset, caption_ids, x_0, eps = evaluator.images_and_noise(models, 0)
    held_out = random_cars("cars", 16, evaluator.HELD_OUT, "validation")
    caption_of = {image.tobytes(): k for image, k in zip(held_out.images, held_out.caption_ids)}
    assert [caption_of[image.tobytes()] for image in data.to_uint8(x_0)] == caption_ids.tolist()
    assert len(x_0) == 30 == len(eps.flatten(1)[:, 0].unique())
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(eps, evaluator.images_and_noise(models, 0)[3])
    assert not torch.equal(eps, evaluator.images_and_noise(models, 1)[3])


@pytest.mark.parametrize("scale, interval, guidance", [
    (3., (2, 9), (3., (2, 9), 1.5)), (None, None, (32., (1, 950), 1.5))])
def test_all_settings_are_passed_on_to_sampling(models, tmp_path, monkeypatch, scale, interval,
                                                guidance):
    """Method, captions, scale, interval and autoguidance to the denoiser, steps, eta and recurrence
    to the loop, the method's own unless given; from each image's own noise."""
    built, sampled = [], []
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(evaluator, "build_denoiser", lambda name, models, targets, *rest: (
        built.append((name, targets.tolist(), *rest))))
    monkeypatch.setattr(tinyddpm, "sample", lambda denoise, x_T, generators, alpha_bar, *a, **kw: (
        sampled.append((x_T, *a, kw)) or x_T.clamp(-1, 1)))
    args = argparse.Namespace(steps=None, eta=0.5, recurrence=3, autoguidance=1.5, seed=4, batch=2,
                              interval=interval)
    indices = torch.tensor([5, 300, 7])
    samples = evaluator.sample_cached("x0", indices, models, args, scale)
    assert [given[:-1] for given in built] == [("x0", [5, 6], *guidance), ("x0", [7], *guidance)]
    assert [len(given[-1]) for given in built] == [2, 1]   # generators
    x_T = tinyddpm.randn_per_image(
        [data.generator("sampling", 4, i) for i in (5, 300, 7)], (3, 16, 16))
    assert torch.equal(torch.cat([x for x, *_ in sampled]), x_T)
    assert all(rest == [25, 0.5, {"recurrence": 3}] for _, *rest in sampled)
    assert (samples.images == data.to_uint8(x_T)).all()


def test_unguided_samples_are_of_indices_that_nothing_else_uses(models, monkeypatch):
    """Not even 33 samples of each caption."""
    monkeypatch.setattr(evaluator, "sample_cached", lambda method, indices, *rest: (
        method, indices.tolist()))
    method, indices = evaluator.unguided(models, None, 5)
    assert method == "none" and len(set(indices)) == 5
    assert not set(indices) & set(range(33 * len(models.captions)))


def test_cost_per_success_by_hand():
    """Two backward passes cost four evaluations; images that nobody sampled cost nothing."""
    assert evaluator.Samples(None, 6, 2, 1.).cost_per_success(0.5) == 20
    assert evaluator.Samples(None, None, None, 0.).cost_per_success(1.) is None


def test_best_of_by_hand(models, monkeypatch):
    """For each caption the one of n images of the pool that CLIP finds most probable: of all of
    them, the one whose caption it is."""
    images = np.arange(8, dtype=np.uint8).repeat(2 * 2 * 3).reshape(8, 2, 2, 3)
    probs = 0.1 + 0.5 * torch.eye(8).roll(3, dims=0)   # image (k + 3) % 8 is that of caption k
    monkeypatch.setattr(evaluator, "POOL", 8)
    monkeypatch.setattr(evaluator, "unguided", lambda models, args, count: evaluator.Samples(
        images, 5, 0, 16.))
    monkeypatch.setattr(models.clip, "caption_probs", lambda x, text_features: probs)
    args, targets = argparse.Namespace(seed=0), torch.tensor([0, 2, 7])
    best = evaluator.best_of(8, targets, models, args)
    assert best.images[:, 0, 0, 0].tolist() == [3, 5, 2]
    assert (best.unet_evaluations, best.unet_backwards, best.seconds) == (40, 0, 48.)
    one = evaluator.best_of(1, torch.zeros(40, dtype=torch.long), models, args)
    assert len(set(one.images[:, 0, 0, 0])) > 4   # at random


class MeanJudge(torch.nn.Module):
    """Two attributes: whether an image is bright, and whether it is rather red than green; `wrong`:
    it takes bright red images for green ones."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        bright, red = x.mean(dim=(1, 2, 3)) > 0, x[:, 0].mean(dim=(1, 2)) > x[:, 1].mean(dim=(1, 2))
        red = red & ~(bright & self.wrong)
        return {name: torch.stack([~value, value], dim=1).float()
                for name, value in (("bright", bright), ("red", red))}


@pytest.fixture
def by_hand(models, monkeypatch):
    """-> eight images, models and an Evaluator of four captions: dark or bright, green or red"""
    levels = torch.tensor([[-.5, -.4], [-.4, -.5], [.4, .5], [.5, .4]])   # red and green channel
    x = levels[[0, 0, 1, 1, 2, 2, 3, 3]].repeat_interleave(4, dim=1).view(8, 2, 2, 2)
    images = data.to_uint8(torch.cat([x, x[:, 1:]], dim=1) + torch.arange(8).view(8, 1, 1, 1) / 50)
    monkeypatch.setattr(metrics, "judge_features", lambda judge, x: torch.cat(
        [x.mean(dim=(2, 3)), x.std(dim=(2, 3))], dim=1))
    monkeypatch.setattr(metrics, "kid", lambda real, generated: (
        real.tolist(), generated.tolist()))
    monkeypatch.setattr(models.clip, "caption_probs", lambda x, text_features: torch.cat(
        [torch.full((8, 1), .1), torch.linspace(0, .7, 8)[:, None], torch.full((8, 2), .05)], 1))
    labels = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    torch.manual_seed(0)
    scores = evaluator.Evaluator(
        MeanJudge(), MeanJudge(wrong=True), labels, {"bright": [0, 1], "red": [0, 1]},
        torch.randn(8, 6))
    return images, models, scores


def test_real_images_for_unguided_ones_are_random_held_out_ones(here, models, monkeypatch):
    """Not the first ones, which of a folder are of one class."""
    monkeypatch.setattr(metrics, "judge_features", lambda judge, x: x.flatten(1))
    real = evaluator.random_real(models, None, 12, seed=0)
    _, _, x_0, _ = evaluator.images_and_noise(models, 0)
    found = [int((x_0.flatten(1) == row).all(dim=1).nonzero()) for row in real]
    assert len(set(found)) == 12 and found != list(range(12))


def test_score_by_hand(by_hand):
    """The first judge's accuracy, the second's and where they disagree, CLIP's probability of each
    image's own caption, KID of rows in the same order, diversity relative to real images."""
    images, models, scores = by_hand
    targets = torch.tensor([0, 1, 1, 1, 2, 3, 3, 3])   # the second image and the sixth are wrong
    row = evaluator.score(images, targets, models, scores)
    assert row["samples"] == 8 and row["prompt_accuracy"] == 6 / 8
    assert (row["bright"], row["red"]) == (1., 6 / 8)
    assert row["second_judge"] == 4 / 8 and row["disagree"] == 2 / 8   # about the last two
    probs = [.1, .1, .2, .3, .05, .05, .05, .05]   # the second column rises from 0 to .7
    assert row["clip_prob"] == pytest.approx(sum(probs) / 8, abs=1e-6)
    features = metrics.judge_features(None, data.to_float(images))
    order = torch.randperm(8, generator=data.generator("evaluation", 0))
    assert row["kid"] == scores.real[order].tolist()
    assert row["kid_error"] == features[order].tolist()
    real = torch.randn(5, 6)   # fewer, and not of these captions
    row = evaluator.score(images, targets, models, scores, real)
    assert (row["kid"], row["kid_error"]) == (real.tolist(), features[order[:5]].tolist())
    std = scores.real.std(dim=0)
    spread, real = (torch.stack([torch.pdist((f / std)[i:i + 3]).mean() for i in (1, 5)]).mean()
                    for f in (features, scores.real))
    assert row["diversity"] == pytest.approx((spread / real).item(), rel=1e-4)
    alone = evaluator.score(images, targets, models, scores._replace(second_judge=None))
    assert alone["second_judge"] is None and alone["disagree"] is None


def test_an_evaluator_has_both_judges_and_the_labels_of_its_captions(here, models, monkeypatch):
    """Whatever the order in which the judge has the captions."""
    content = {"captions": models.captions[::-1], "attributes": cars.ATTRIBUTES,
               "caption_labels": cars.caption_labels(np.arange(294))[::-1].tolist()}
    first, second = (judge.Judge(judge.JudgeConfig(width=8, image_size=16), {"body": 6}).eval()
                     for _ in range(2))
    monkeypatch.setattr(second_judge, "load_judges", lambda models, args: (first, content, second))
    targets, args = torch.tensor([4, 100]), argparse.Namespace(each=1)
    scores = evaluator.make_evaluator(models, targets, args)
    assert scores.judge is first and scores.second_judge is second
    assert (scores.target_labels.numpy() == cars.caption_labels(np.arange(294))).all()
    real = data.to_float(evaluator.real_images(models, targets, args))
    assert torch.allclose(scores.real, metrics.judge_features(first, real))

def test_real_images_are_of_their_captions_and_distinct(here, monkeypatch):
    monkeypatch.setattr(evaluator, "REAL", 600)   # every caption twice, some three times
    dataset = random_cars("cars", 16, 600, "validation")
    config = argparse.Namespace(image_size=16)
    models = argparse.Namespace(data="cars", captions=cars.CAPTIONS[::-1],
                                unet=argparse.Namespace(config=config))
    targets, args = torch.arange(0, 294, 10), argparse.Namespace(each=1)
    images = [*evaluator.real_images(models, targets, args),
              *evaluator.real_images(models, targets, args, skip=1)]
    caption_of = {image.tobytes(): cars.CAPTIONS[k]
                  for image, k in zip(dataset.images, dataset.caption_ids)}
    assert [caption_of[image.tobytes()] for image in images] == 2 * [
        models.captions[k] for k in targets]
    assert len({image.tobytes() for image in images}) == 60


def test_unguided_images_are_compared_with_random_ones(here, models, monkeypatch):
    """Others are compared with real images of the same captions."""
    compared = []
    monkeypatch.setattr(metrics, "kid", lambda real, generated: (
        compared.append((real, generated)) or (0., 0.)))
    targets = torch.arange(20)   # of 30 held-out images
    scores = evaluator.make_evaluator(models, targets, argparse.Namespace(each=1, seed=0, judge=""))
    images = random_cars("cars", 16, 20).images
    random_real = evaluator.random_real(models, scores.judge, 15, seed=0)   # fewer than targets
    for real in (None, random_real):
        evaluator.score(images, targets, models, scores, real)
    (same, _), (others, generated) = compared
    assert others is random_real and len(others) == len(generated) == 15
    rows = lambda features: sorted(features.sum(dim=1).tolist())
    assert rows(same) == rows(scores.real) and not set(rows(others)) <= set(rows(same))


def test_the_cache_key_contains_all_that_determines_the_samples(models, monkeypatch):
    args = argparse.Namespace(steps=2, eta=1., recurrence=1, seed=0, batch=4)
    indices, guidance = torch.arange(3), ("x0", 32., (1, 950))
    path = lambda models=models, guidance=guidance, indices=indices, **flags: evaluator.cache_path(
        guidance, indices, models, argparse.Namespace(**{**vars(args), **flags}))
    paths = [path(), path(steps=3), path(eta=0.), path(recurrence=2), path(seed=1),
             path(indices=indices + 1), path(guidance=("x0", 3., (1, 950))),
             path(models._replace(captions=models.captions[::-1])),
             path(models._replace(caption_labels=models.caption_labels.flip(0))), path(batch=8),
             path(models._replace(templates=2 * models.templates))]
    with torch.autocast("cpu", torch.bfloat16):
        paths.append(path())
    assert path() == paths[0]
    for p in (models.clip.log_scale, next(models.unet.conv_out.parameters())):
        p.data += 1
        paths.append(path())
    paths.append(path(models._replace(weak=models.unet)))
    monkeypatch.setattr(evaluator, "SOURCE", evaluator.SOURCE[:-1])
    paths.append(path())
    assert len(set(paths)) == len(paths) == 16


def test_plain_net_learns():
    torch.manual_seed(0)
    images, labels = cars.render(0, range(16), 16)
    x, labels = data.to_float(images), torch.from_numpy(labels)
    sizes = {name: len(values) for name, values in cars.ATTRIBUTES.items()}
    network = second_judge.PlainNet(judge.JudgeConfig(width=16, image_size=16), sizes)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        judge.judge_loss(network, x, labels).backward()
        optimizer.step()
    assert (judge.predict(network.eval(), x) == labels).float().mean() > 0.9


@pytest.mark.skipif(not (ROOT / "weights/judge-2.pt").exists(), reason="no weights")
def test_the_second_judge_in_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = second_judge.load_second_judge("cars")
    images, labels = cars.render(0, range(cars.JUDGE_TEST, cars.JUDGE_TEST + 16), 32)
    predicted = judge.predict(network, data.to_float(images))
    assert (predicted.numpy() == labels).all(1).sum() >= 15
    assert second_judge.load_second_judge("photos") is None


# ---- the benchmark -------------------------------------------------------------------------------

def test_the_benchmark_skips_what_is_missing_or_slow(monkeypatch, capsys):
    """And names it; what is fast gets all its rounds, what reaches the limit later gets one."""
    clock, calls = [0.], []

    def sleeping(seconds):   # -> what makes a function to time and its model
        sleep = lambda: (calls.append(seconds), clock.__setitem__(0, clock[0] + seconds))
        return lambda bf16: (sleep, torch.nn.Linear(1, 1))

    def missing(bf16):
        raise ModuleNotFoundError("no peer")

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cli, "bf16_is_fast", lambda device: False)
    monkeypatch.setattr(benchmark, "COMPARISONS", [
        ("missing", "ddpm", missing, sleeping(1)), ("endless", "clip", sleeping(500), sleeping(1)),
        ("slow", "clip", sleeping(50), sleeping(5)), ("fast", "clip", sleeping(2), sleeping(1))])
    slow, fast = benchmark.benchmark()
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in errors] == [
        "skipped bf16", "skipped ddpm beside missing", "skipped clip beside endless"]
    assert slow["fp32_ratio"] == 10 and fast["fp32_ratio"] == 2
    assert [calls.count(seconds) for seconds in (500, 50, 2)] == [1, 3, 21]


# ---- changed data sets ---------------------------------------------------------------------------

def test_held_out_pairs():
    """Twelve captions for each pair leave, and partial captions of such a pair; every image keeps
    its caption, every text its templates and what it is true of."""
    dataset = random_cars("cars", 16, 600)
    less = ablations.hold_out_pairs(dataset)
    assert len(less.captions) == 294 - 36 == len(less.caption_labels)
    assert "a red and white bus" not in less.captions and "a red bus" in less.captions
    caption_of = {image.tobytes(): dataset.captions[k]
                  for image, k in zip(dataset.images, dataset.caption_ids)}
    assert [caption_of[image.tobytes()] for image in less.images] == [
        less.captions[k] for k in less.caption_ids]
    assert all(other == f"photo of {text}" for text, other in zip(*less.templates, strict=True))
    assert less.templates[0][:258] == less.captions and len(less.templates[0]) == 258 + 154 - 6
    true_of = {text: {less.captions[k] for k in np.flatnonzero(row)}
               for text, row in zip(less.templates[0][258:], less.partial_true_of, strict=True)}
    assert "a white and red vehicle" not in true_of and len(true_of["a bus"]) == 43
    assert true_of["something red"] == {c for c in less.captions if c.startswith("a red ")}
    assert true_of["a bus with a red roof"] == {"a red bus"} | {
        f"a {c} and red bus" for c in ("green", "blue", "yellow", "black", "gray")}
    groups = ablations.unseen_and_seen(2)
    names = {name: {cars.CAPTIONS[k % 294] for k in ids} for name, ids in groups.items()}
    assert len(groups["seen"]) == len(groups["unseen"]) == 72 == len(set(groups["seen"].tolist()))
    assert names["unseen"] == set(cars.CAPTIONS) - set(less.captions)
    assert not names["seen"] & names["unseen"] and all(" and " in name for name in names["seen"])


# ---- every experiment ----------------------------------------------------------------------------

def test_models_by_themselves(here):
    rows = run("clip")
    rows, mean, phrasings = rows[:2], rows[2], rows[3:]
    assert mean["phrasing"] == "mean" and mean["t = 0"] == pytest.approx(
        np.mean([row["t = 0"] for row in phrasings]))
    assert [row["t"] for row in rows] == [0, 500]
    assert {"top-1", "ece", "images@5", "order"} <= set(rows[0])
    assert [row["phrasing"] for row in phrasings] == clip.HELD_OUT_PHRASINGS
    assert all(0 <= row[f"t = {t}"] <= 1 for row in phrasings for t in (0, 500))
    rows = run("ddpm")   # by t, then eta x steps
    assert len(rows) == 6 + 4 and rows[5]["t"] == 900 and rows[-1]["steps"] == 2
    rows = run("judges")
    assert rows[0]["samples"] == 40 == sum(row["samples"] for row in rows[1:])


def test_accuracy_by_noise_level_by_hand(models, monkeypatch):
    """A CLIP whose logits are the first pixels: right for three of four clean images, for none
    where noise that names another caption drowns them; with the attributes of the captions."""
    dataset = toys.squares(4, 0)   # six captions: three colours on two sides
    caption_ids, read = torch.tensor([0, 1, 2, 5]), torch.tensor([0, 1, 2, 4])
    image = lambda k: F.one_hot(k, 6 * 6 * 3).float().view(4, 3, 6, 6)
    x_0, eps, seen = image(read), image((caption_ids + 2) % 6), []

    class PixelCLIP:
        encode_image = staticmethod(lambda x, t: x.flatten(1)[:, :6])
        logit_scale = staticmethod(lambda t: torch.ones(1))

        @staticmethod
        def logits(features, text_features, t):
            seen.append(t.tolist())
            return 100 * features

    monkeypatch.setattr(clip, "TIMESTEPS", (0, 900))
    monkeypatch.setattr(evaluator, "images_and_noise", lambda models, seed: (
        dataset, caption_ids, x_0, eps))
    rows = clip.zero_shot(models._replace(clip=PixelCLIP(), data="squares"),
                          argparse.Namespace(seed=0))
    clean, noised = rows
    assert seen == [[0] * 4, [900] * 4]
    assert (clean["top-1"], clean["colour"], clean["side"]) == (0.75, 1., 0.75)
    assert (noised["top-1"], noised["colour"], noised["side"]) == (0., 0., 1.)
    assert clean["captions@1"] == 0.75 and clean["ece"] == pytest.approx(0.25, abs=1e-3)


def test_the_ddpm_is_sampled_with_each_number_of_steps_and_eta(here, models, monkeypatch):
    """And its samples are compared with real images."""
    monkeypatch.setattr(metrics, "kid", lambda real, generated: (
        (real - generated).square().mean().item(), 0.))
    called, unguided = [], evaluator.unguided
    monkeypatch.setattr(evaluator, "unguided", lambda models, args, count: called.append(
        (args.eta, args.steps, args.recurrence, count)) or unguided(models, args, count))
    args = argparse.Namespace(steps=9, eta=0.5, recurrence=2, seed=0, batch=8, judge=None,
                              interval=None, autoguidance=None)
    with torch.no_grad():
        rows = list(ddpm.unguided_quality(models, args))[-4:]
    assert called == [(eta, steps, 1, 8) for eta in (0., 1.) for steps in (1, 2)]
    assert len({row["kid"] for row in rows}) == 3   # of one step, eta changes nothing


def test_swapped_colours_by_hand():
    """Of three cars of two colours one has them in the other order; body and one colour do not
    count."""
    labels = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 3, 4], [1, 5, 5]])
    predicted = torch.tensor([[3, 2, 1], [0, 1, 2], [1, 4, 4], [1, 5, 5]])
    attributes = {"body": "abcd", "main": "abcdef", "second": "abcdef"}
    swapped = evaluator.swapped_colours(predicted, labels, attributes)["swapped"]
    assert swapped == pytest.approx(1 / 3)
    assert evaluator.swapped_colours(predicted[3:], labels[3:], attributes)["swapped"] is None
    assert evaluator.swapped_colours(predicted, labels, {"class": "ab"}) == {}


def test_ways_from_text_to_image_embedding(here, monkeypatch):
    """All of them, each beside true embeddings, whose spread and directions are 1."""
    monkeypatch.setattr(unclip_experiments, "POOL", 600)
    rows = run("prior --prompts even")
    assert [row["way"] for row in rows][:2] == ["true, of held-out images", "text feature"]
    assert len(rows) == 10 and rows[0]["spread"] == 1 == pytest.approx(rows[0]["directions"])
    assert all(abs(row["cosine"]) <= 1 for row in rows)
    varied = {row["way"] for row in rows if row["spread"] > 0.01}
    assert varied == {"true, of held-out images", "training image of the caption", "prior, 1 draw",
                      "prior, best of 2", "prior, best of 2, guidance 2"}


def test_what_is_decoded(here, monkeypatch):
    """Variations, text diffs, interpolations and words on cars; what a probe reads."""
    for name, small in (("IMAGES", 4), ("EACH", 2), ("PATHS", 2), ("ON_THE_WAY", 3),
                        ("FRACTIONS", (.5,)), ("PROBED", 300)):
        monkeypatch.setattr(unclip_experiments, name, small)
    rows = run("decoder")
    assert {row["task"] for row in rows} >= {"variations", "text diff", "interpolation",
                                             "words on cars"}
    assert {row["features"] for row in run("embeddings")} == {"CLIP's embedding",
                                                              "the judge's features"}


def test_ways_to_enlarge(here, monkeypatch):
    """Of true images and of guided ones: bicubic, by regression, by diffusion."""
    monkeypatch.setattr(unclip_experiments, "LARGE", 16)
    rows = run("upsampler --upsampler upsampler.pt")
    assert [row["images"] for row in rows] == 8 * ["true"] + 9 * ["guided"]
    assert rows[0]["way"] == "bicubic" and rows[0]["edges"] < 1 and rows[0]["psnr"] > 0
    assert all("prompt_accuracy" in row for row in rows[8:])


@pytest.mark.parametrize("name", ["unclip_parts", "variations", "interpolations", "text_diffs"])
def test_figures_of_unclip(here, tmp_path, name):
    """Drawn, in several colours."""
    models = sample.load_models(upsampler="upsampler.pt", method="unclip")
    with torch.no_grad():
        getattr(figures, name)(models, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(2 ** 24)) > 20


def test_guidance(here, monkeypatch):
    command = "guidance --methods none x0 best-of-4 --prompts even --recurrence 1"
    rows = run(command)
    assert [row["method"] for row in rows] == ["real", "none", "x0", "best-of-4"]
    assert all(row["samples"] == 19 and row["second_judge"] is not None for row in rows)
    assert [(row["unet_evaluations"], row["unet_backwards"]) for row in rows] == [
        (None, None), (2, 0), (2, 1), (8, 0)]
    content = json.loads(Path("out/guidance.json").read_text())
    assert {"commit", "machine", "seed", "arguments"} <= set(content)
    assert Path("out/guidance-x0-32.png").exists()
    monkeypatch.setattr(evaluator, "generate", None)   # the second time, all is in the cache
    assert run(command) == rows


def test_english(here, monkeypatch):
    """Prompts say how they are read; all captions in held-out phrasings end the table."""
    prompts = {name: english.PROMPTS[name] for name in ("grey car", "something red")}
    monkeypatch.setattr(english, "PROMPTS", prompts)
    monkeypatch.setattr(sample, "MEANS_THE_SAME", -1.)   # an untrained CLIP reads anything
    rows = run("english", steps=1)
    assert [row["prompt"] for row in rows] == [
        *prompts, "all captions, plain", "all captions, in held-out phrasings"]
    assert rows[1]["read as"] == "'something red'" and rows[1]["samples"] == 32
    assert rows[1]["values left open"].count(",") == 1
    assert rows[3]["samples"] == 294


def test_zero_shot(here, models, monkeypatch):
    """Every task has its row, and the figure of words on cars is drawn. Linear probes learn from
    images of the training; where pairs of colours are held out, they learn from none of those, and
    only those are counted."""
    for name, small in (("TEST_IMAGES", 300), ("SEEN", 40), ("SIDE_VIEWS", 12), ("WITH_WORDS", 8),
                        ("PAIRS_OF_CARS", 20)):
        monkeypatch.setattr(zeroshot, name, small)
    train_changed = ablations.train_changed
    monkeypatch.setattr(ablations, "train_changed", lambda kind, change, *rest: (
        train_changed(kind, change, *rest) if rest[1:] else Path(f"runs/{kind}/weights.pt")))
    fitted, linear_probe = [], zeroshot.linear_probe
    monkeypatch.setattr(zeroshot, "linear_probe", lambda features, labels: (
        fitted.append((features, labels)) or linear_probe(features, labels, steps=20)))
    rows = run("zeroshot")
    tasks = [row["task"] for row in rows]
    assert tasks.count("class folders, by body") == 2 and tasks.count("all attributes") == 4
    assert tasks.count("pairs that CLIP never met") == 3 and len(rows) == 9 + 4 + 3
    assert checkpoint.load("runs/ablations/clip-words/weights.pt", "clip")["steps"] == 10
    assert Path("out/typographic.png").exists()

    seen, tested = (random_cars("cars", 16, count, split) for count, split in (
        (40, "train"), (300, "validation")))
    known, unseen = (torch.tensor([(ablations.colours(row) in ablations.PAIRS) == held_out
                                   for row in dataset.labels])
                     for dataset, held_out in ((seen, False), (tested, True)))
    with torch.no_grad():
        features = zeroshot.image_features(models, data.to_float(seen.images))
    for (fitted_features, labels), part in zip(fitted, (known | True, known), strict=True):
        assert torch.equal(labels, torch.from_numpy(seen.labels)[part])
        assert torch.allclose(fitted_features, features[part], atol=1e-5)
    assert known.sum() < 40 and {row["samples"] for row in rows if row["task"].startswith(
        "pairs")} == {int(unseen.sum())}


def test_a_clip_that_reads_words_is_counted(here, models, monkeypatch):
    """One that finds the body that the word names is never right where it names another one."""
    words = [list(zeroshot.WORDS)[i % 4] for i in range(12)]
    named = torch.tensor([zeroshot.WORDS[word] for word in words])
    monkeypatch.setattr(zeroshot, "SIDE_VIEWS", 12)
    monkeypatch.setattr(ablations, "train_changed", lambda *args: None)
    monkeypatch.setattr(zeroshot, "draw_attack", lambda *args: None)
    monkeypatch.setattr(models.clip, "caption_probs", lambda x, features: (
        F.one_hot(named, len(features)).float()))
    models = models._replace(partial_features=torch.ones(len(cars.PARTIAL), 16))
    monkeypatch.setattr(sample, "load_models", lambda *args, device: models)
    rows = list(zeroshot.typographic(models, argparse.Namespace(ddpm=None, out=Path("."))))
    assert [(row["prompt_accuracy"], row["as the word"]) for row in rows] == [(0, 1)] * 4
    assert all(row["samples"] > 0 for row in rows)


def test_a_linear_probe_by_separable_features():
    """It finds two attributes of features that tell them apart."""
    labels = torch.tensor([[a, b] for a in range(3) for b in range(2)] * 5)
    features = F.normalize(torch.cat([F.one_hot(labels[:, 0], 3), labels[:, 1:]], 1).float(), dim=1)
    assert torch.equal(zeroshot.linear_probe(features, labels)(features), labels)


def test_training_with_words_is_clip_objective(here, monkeypatch):
    """On the given device, with a caption of its own for each of 16 images that has a word: what it
    shows and says; partial captions are true of it as without the word."""
    labels = np.array([[0, 0, 1], [3, 2, 2], [5, 6, 0]])
    device, trained, words = torch.device("cpu", 0), [], []
    images = np.full((3, 16, 16, 3), np.arange(3)[:, None, None, None], np.uint8)
    monkeypatch.setattr(zeroshot, "WITH_WORDS", 3)
    monkeypatch.setattr(zeroshot, "render_with_words", lambda indices, some, size: (
        words.extend(some) or (images, labels)))
    monkeypatch.setattr(train, "train", lambda task, *_, device: trained.append((task, device)))
    ablations.train_changed("clip", "words", device, zeroshot.words_objective)
    (task, used), = trained
    assert used is device
    monkeypatch.setattr(train, "clip_objective", lambda *arguments: arguments)
    plain = torch.full((16, 3, 16, 16), 9.)
    _, x_0, ids, tokens, true_of, _, _ = task.objective(
        task.model, plain, torch.arange(16), torch.Generator().manual_seed(0))
    assert torch.equal(x_0[4:], plain[4:]) and ids.tolist() == [294, 295, 296, 297, *range(4, 16)]
    assert tokens.shape[1] == 294 + 4 + 154 == sum(true_of.shape)
    names = [tinyclip.normalize_prompt(caption) for caption in cars.CAPTIONS]
    shown = data.to_uint8(x_0[:4])[:, 0, 0, 0].tolist()   # which image each one is
    assert len(set(shown)) > 1
    for i, row, column in zip(shown, tokens[0, 294:298], true_of.T[294:]):
        k = cars.caption_index(labels[i])
        text = task.model.tokenizer.decode(row.tolist()).rstrip(" !")   # "!" is the padding
        assert text == f"{names[k]} that says {words[i].lower()}"
        assert torch.equal(column, true_of[:, k])


def test_a_word_is_painted_on_both_sides():
    """In letters that stand out."""
    scene = cars.scene(0, zeroshot.from_the_side(1, 0)[0])[0]
    plain, word = (cars.ray_cast(s, 64) for s in (scene, zeroshot.paint_word(scene, "BUS")))
    changed = np.abs(plain - word).max(axis=2) > 0.2
    assert 0.02 < changed.mean() < 0.3
    other_side = scene._replace(eye=scene.eye * [1, -1, 1], forward=scene.forward * [1, -1, 1],
                                right=-scene.right * [1, -1, 1], up=scene.up * [1, -1, 1])
    plain, word = (cars.ray_cast(s, 64) for s in (
        other_side, zeroshot.paint_word(other_side, "BUS")))
    assert (np.abs(plain - word).max(axis=2) > 0.2).mean() > 0.02


def test_predict_prints_probabilities(here, capsys):
    """Of the given texts, the most probable one first."""
    data.save_grid("image.png", np.zeros((1, 16, 16, 3), np.uint8))
    main.main(["predict", "image.png", "a red car", "a blue bus"])
    lines = capsys.readouterr().out.splitlines()[-2:]
    percent = [float(line.split("%")[0]) for line in lines]
    assert percent[0] >= percent[1] and sum(percent) == pytest.approx(100, abs=0.2)
    assert {line.split("%")[1].strip() for line in lines} == {"a red car", "a blue bus"}


def test_predict_counts_a_class_folder(here, capsys):
    """Of 40 cars in folders of their bodies, as many as the same CLIP gets right by hand; a file
    that is no image is not counted."""
    images, labels = cars.render(0, range(40), 16)
    for i, (image, label) in enumerate(zip(images, labels)):
        folder = Path("bodies", cars.BODIES[label[0]])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    main.main(["predict", "bodies"])
    report, one, several = capsys.readouterr().out.splitlines()[-3:]
    assert "cannot be read: 1, such as" in report and "broken.png" in report
    clip = sample.load_models().clip
    names = sorted(cars.BODIES)
    features = clip.encode_captions([f"photo of a {name}" for name in names])
    predicted = clip.caption_probs(data.to_float(images), features).argmax(dim=1)
    correct = [names[p] == cars.BODIES[label[0]] for p, label in zip(predicted, labels)]
    assert one == f"zero-shot, one prompt: {sum(correct) / 40:.1%} of 40 images"
    assert re.fullmatch(r"zero-shot, 6 prompts: [0-9.]+% of 40 images", several)


def test_each_setting_of_the_sweep_is_passed_on(here, models, monkeypatch):
    """Method, scale, interval, eta, autoguidance, steps and recurrence of each row; all else as the
    flags say."""
    given = []
    monkeypatch.setattr(guidance, "prepare", lambda models, args: (None, None, None))
    monkeypatch.setattr(evaluator, "score", lambda *args: {})
    monkeypatch.setattr(evaluator, "sample_cached", lambda method, indices, models, args, scale: (
        given.append((method, scale, args)) or evaluator.Samples(None, 0, 0, 0.)))
    args = argparse.Namespace(steps=25, eta=1., recurrence=2, interval=None, autoguidance=None)
    rows = list(guidance.sweep(models, args))
    assert len(rows) == len(given) == len(guidance.SWEEPS) > 30
    for (name, value, *_), (method, scale, changed) in zip(guidance.SWEEPS, given):
        steps, n = value if name == "steps, recurrence" else (25, 2)
        assert changed == argparse.Namespace(
            steps=steps, recurrence=n, eta=value if name == "eta" else 1.,
            interval=value if name == "interval" else None,
            autoguidance=value if name == "autoguidance" else None)
        assert scale == (value if name.startswith("scale of ") else None)
        if name in variants.PARTS:
            assert method == f"{name} {value}"
        else:
            assert method == name.removeprefix("scale of ") if scale else method == "lookahead"


def test_methods_are_compared_on_the_same_captions(here, models, monkeypatch):
    """Each of --each samples of a caption has an index of its own, the real images are others than
    those in the evaluator, and every method gets its scale."""
    given, real_images = [], evaluator.real_images
    monkeypatch.setattr(evaluator, "real_images", lambda models, targets, args, skip=0: (
        given.append(("real", skip, targets)) or real_images(models, targets, args, skip)))
    images = np.zeros((2 * 19, 16, 16, 3), np.uint8)
    monkeypatch.setattr(evaluator, "sample_cached", lambda method, indices, models, args, scale: (
        given.append((method, scale, indices)) or evaluator.Samples(images, 0, 0, 1.)))
    args = argparse.Namespace(each=2, prompts="even", methods=["none", "x0"], scales=[4., 8.],
                              judge=None, out=Path("."), seed=0)
    list(guidance.compare_methods(models, args))
    assert [one[:2] for one in given] == [
        ("real", 0), ("real", 2), ("none", None), ("x0", 4.), ("x0", 8.)]
    even = list(range(0, 294, 16))
    assert all(targets.tolist() == even + even for _, _, targets in given[:2])
    assert all(indices.tolist() == even + [k + 294 for k in even] for _, _, indices in given[2:])


def test_sweep_and_failures(here, monkeypatch):
    first = {sweep[0]: sweep for sweep in reversed(guidance.SWEEPS)}   # one of each kind
    monkeypatch.setattr(guidance, "SWEEPS", list(first.values()))
    rows = {row["changed"]: row for row in run("sweep --prompts even")}
    assert rows.keys() == first.keys()
    assert [rows[name]["unet_evaluations"] for name in ("scale of x0-fast", "eta")] == [3, 3]
    assert rows["steps, recurrence"]["unet_evaluations"] == 50
    rows = run("failures --prompts even")
    assert rows[0]["samples"] == 19 == sum(
        row["samples"] for row in rows if row["prompt"].startswith("body"))


def test_ablations_train_what_is_missing(here, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ABLATIONS", [
        ablations.ABLATIONS[0], ablations.ABLATIONS[1], ablations.ABLATIONS[-1]])
    rows = run("ablations", steps=1)
    assert len(rows) == 3 and all(row["samples"] == 252 for row in rows)
    steps = [checkpoint.load(f"runs/ablations/clip-{name}/weights.pt", "clip")["steps"]
             for name in ("tenth", "clean")]
    assert steps == [1, 10]
    run("ablations", steps=1)
    assert "is finished" in capsys.readouterr().out


def test_composition(here, monkeypatch):
    """One row for each model, group of pairs and method; "swapped" is where the judge finds the
    colours of the caption exchanged."""
    sampled, sample_cached = [], evaluator.sample_cached
    monkeypatch.setattr(evaluator, "sample_cached", lambda method, indices, *rest: (
        sampled.append(indices % 294) or sample_cached(method, indices, *rest)))
    labels = torch.from_numpy(cars.caption_labels(np.arange(294)))
    monkeypatch.setattr(ablations, "predict", lambda model, x: labels[sampled[-1]][:, [0, 2, 1]])
    monkeypatch.setattr(ablations, "train_changed", lambda kind, change, device: (
        Path(f"runs/{kind}/weights.pt")))
    rows = run("composition", steps=1)
    assert [(row["held_out_of"], row["pairs"], row["guidance"]) for row in rows] == [
        (name, pairs, method) for name in ("neither", "DDPM", "CLIP", "both")
        for pairs in ("unseen", "seen") for method in ("lookahead", "joint")]
    assert all(row["samples"] == 36 and row["swapped"] == 1 for row in rows)


@pytest.mark.parametrize("change", ["tenth", "shuffled", "pairs", "clean"])
def test_each_ablation_changes_one_thing(here, monkeypatch, change):
    """A tenth of the steps; captions of other images; no image of some pairs, neither in training
    nor in validation; clean images only. All else is as it was."""
    clip_task, made, trained = train.clip_task, [], []
    monkeypatch.setitem(train.TASKS, "clip", (
        lambda *args: made.append(args) or clip_task(*args), *TOY["clip"]))
    monkeypatch.setattr(train, "train", lambda *args, **options: trained.append(args))
    path = ablations.train_changed("clip", change, torch.device("cpu"))
    (_, _, dataset, validation, _), = made
    (task, options, trained_on, folder), = trained
    plain, held_out = (random_cars("cars", 16, count, split) for count, split in (
        (60, "train"), (evaluator.HELD_OUT, "validation")))
    changed = path.parent == folder, trained_on is dataset
    assert changed == (True, True) and folder.name == f"clip-{change}"
    assert options.steps == (1 if change == "tenth" else 10)
    if change == "pairs":
        assert len(dataset.captions) == len(validation.captions) == 258
        plain, held_out = map(ablations.hold_out_pairs, (plain, held_out))
    assert (dataset.images == plain.images).all() and (validation.images == held_out.images).all()
    assert sorted(dataset.caption_ids) == sorted(plain.caption_ids)
    moved = (dataset.caption_ids != plain.caption_ids).mean()
    assert moved > 0.9 if change == "shuffled" else moved == 0
    assert (validation.caption_ids == held_out.caption_ids).all()
    seen, encode_image = [], task.model.encode_image
    monkeypatch.setattr(task.model, "encode_image", lambda x, t: (
        seen.append(t) or encode_image(x, t)))
    task.objective(task.model, torch.randn(8, 3, 16, 16), torch.arange(8),
                   data.generator("training", 0))
    assert (seen[-1] == 0).sum() == (8 if change == "clean" else 1)


def test_changed_models_are_those_that_were_trained(here, models, monkeypatch):
    """Each kind with its own weights, the other as given."""
    loaded = []
    monkeypatch.setattr(ablations, "train_changed", lambda kind, change, device: (
        f"{kind}-{change}.pt"))
    monkeypatch.setattr(sample, "load_models", lambda clip, ddpm, device: (
        loaded.append((clip, ddpm)) or models))
    args = argparse.Namespace(clip="my-clip.pt", ddpm=None)
    for kinds in ((), ("clip",), ("ddpm",), ("clip", "ddpm")):
        changed = ablations.changed_models("pairs", kinds, models, args)
        assert torch.equal(changed.caption_labels, models.caption_labels)
    assert loaded == [("my-clip.pt", None), ("clip-pairs.pt", None),
                      ("my-clip.pt", "ddpm-pairs.pt"), ("clip-pairs.pt", "ddpm-pairs.pt")]


def test_other_data_sets(here, tmp_path, monkeypatch):
    """With attributes, but without the captions of the cars."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, size, count, split="train": toys.squares(
        min(count, 60), sorted(data.SPLITS).index(split), size))
    write_models(tmp_path, toys.squares(60, 0))
    assert "colour" in run("clip")[-1] and "order" not in run("clip")[-1]
    for command in ("ddpm", "judges", "guidance --methods none best-of-4", "failures --each 2"):
        run(command)
    with pytest.raises(cli.UserError, match="built-in cars"):
        run("ablations")


def test_the_poster_is_about_class_folders(here, models):
    with pytest.raises(cli.UserError, match="classes of class folders"):
        run("poster")


@pytest.fixture
def class_folders(tmp_path, monkeypatch):
    """Run in a folder with models of two classes in runs/."""
    monkeypatch.chdir(tmp_path)
    toys.write_class_folders(tmp_path / "classes", 100)
    write_models(tmp_path, data.load("classes", 16, 0))
    monkeypatch.setattr(photographs, "SIZES", (3, 6))
    monkeypatch.setitem(photographs.SAMPLER, "steps", 2)
    monkeypatch.setattr(photographs, "CURVES", {
        "unconditional": (None,), "lookahead": (1., 2.), "classifier-free": (1.,)})


def test_the_poster_has_its_class_and_all_classes(class_folders):
    """Each n has a row of real images and one of each way that this DDPM allows."""
    rows = run("poster", steps=1)
    ways = ["real", *(way for way in photographs.ROWS if way not in photographs.CONDITIONAL)]
    assert [(row["captions"], row["n"], row["method"]) for row in rows] == [
        (captions, n, way) for captions in ("airplane", "all") for n in (3, 6) for way in ways]
    assert [row["relative_time"] for row in rows if row["method"] == "unconditional"] == [1.] * 4
    for way in ways[1:]:
        with Image.open(f"out/photographs-{way}.png") as image:
            assert image.height > 2 * 64   # a row for each class


def test_only_some_rows_take_the_condition(monkeypatch):
    """All rows are of one U-Net; the curve's scale is used, else a row's own."""
    monkeypatch.setattr(evaluator, "sample_cached", lambda *arguments: arguments)
    models = sample.Models(*[None] * 5)._replace(condition="text")
    draw = lambda name, scale=None: photographs.draw(
        name, None, models, argparse.Namespace(steps=9), scale)
    for name, (method, scale, flags) in photographs.ROWS.items():
        drawn = draw(name)
        assert drawn[0] == method and drawn[4] == scale
        assert drawn[2].condition == ("text" if name in photographs.CONDITIONAL else None)
        assert drawn[3].steps == flags.get("steps", 9)
    assert draw("lookahead", 3.)[4] == 3.
    none = models._replace(condition=None)
    assert photographs.available(models, photographs.ROWS) == list(photographs.ROWS)
    assert not set(photographs.available(none, photographs.ROWS)) & set(photographs.CONDITIONAL)


def test_a_curve_has_a_row_for_each_scale(class_folders):
    with pytest.raises(cli.UserError, match="--each 50"):
        run("curve --each 49")
    assert [(row["method"], row["scale"]) for row in run("curve --each 50", steps=1)] == [
        ("unconditional", None), ("lookahead", 1.), ("lookahead", 2.)]
    assert Path("out/accuracy_kid.png").exists()


def test_photographs_to_compare_with_are_of_their_class_and_distinct(class_folders):
    args = argparse.Namespace(seed=0, judge=None)
    real = photographs.Photographs(sample.load_models(), args)
    targets = torch.tensor([0, 1, 1, 0, 1])
    x, others = (real.of(targets, skip) for skip in (0, 3))
    assert ((x[:, 2] < x[:, 0]).flatten(1).all(1) == targets).all()   # airplanes, 0, are blue
    assert len(torch.cat([x, others]).unique(dim=0)) == 10
    assert len(real.random(20).unique(dim=0)) == 20


def test_too_few_photographs_to_compare_with_are_one_line(class_folders):
    real = photographs.Photographs(sample.load_models(), argparse.Namespace(seed=0, judge=None))
    count = len(real.indices[0])
    assert len(real.of(torch.zeros(count, dtype=torch.long))) == count
    with pytest.raises(cli.UserError, match="too few training images"):
        real.of(torch.zeros(count - 2, dtype=torch.long), skip=3)


def test_pixel_features_by_hand():
    x = torch.zeros(1, 3, 4, 4)
    x[0, 1, :2] = 1.   # half of the block
    assert photographs.pixel_features(x).tolist() == [[0, .5, 0, 0, .5, 0]]


def test_the_second_judge_is_trained(here, tmp_path, monkeypatch):
    """On a split that no other model is trained on; tested on that of the first judge."""
    loaded = []
    monkeypatch.setattr(data, "load", lambda *args: loaded.append(args[3]) or random_cars(*args))
    monkeypatch.setattr(second_judge, "FOLDER", tmp_path / "judge-2")
    main.main(["second_judge", "--device", "cpu"])
    network = second_judge.load_second_judge("cars")
    assert network.config.width == 8 and isinstance(network, second_judge.PlainNet)
    assert loaded == ["judge-2", "judge-test"]


def test_two_judges_by_hand(here, models, monkeypatch):
    """The first is right, the second never: it differs from the first for every image."""
    labels = torch.from_numpy(random_cars("cars", 16, 40, "judge-test").labels)
    monkeypatch.setattr(second_judge, "predict", lambda network, x: (
        labels + isinstance(network, second_judge.PlainNet)))
    rows = list(second_judge.judges(models, argparse.Namespace(judge=None)))
    assert all((row["prompt_accuracy"], row["second_judge"], row["different"]) == (1, 0, 1)
               for row in rows)


def test_an_experiment_is_a_command(folder):
    """In a process of its own, with the data sets that it finds in cache/."""
    checksum = zlib.crc32(cars.render(0, range(12), 24)[0].tobytes())
    path = folder / f"cache/cars-{checksum:08x}-validation-16px-4000.raw"
    path.parent.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(256, size=(4000, 16, 16, 3), dtype=np.uint8)
    images.tofile(path)
    np.savez(path.with_suffix(".npz"), numbers=np.arange(4000) % 294, checksum=zlib.crc32(images))
    command = "guidance --methods none --prompts odd --steps 1 --recurrence 1 --device cpu --out o"
    done = subprocess.run([sys.executable, "-m", "experiments", *command.split()],
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| method | scale | samples |" in done.stdout
    assert json.loads((folder / "o/guidance.json").read_text())["rows"][1]["samples"] == 147


def test_mistakes_are_answered_in_one_line(here):
    for arguments, message in (
            ("nothing", "invalid choice: 'nothing'"), ("", "required"),
            ("clip --steps 0", "--steps must be"), ("clip --clip none.pt", "none.pt"),
            ("guidance --methods classifier-free --prompts even", "ddpm --clip"),
            ("upsampler", "upsampler needs a trained one: python train.py upsampler -h"),
            ("guidance --methods lookahead unclip", "a U-Net of its own"),
            ("guidance --autoguidance 2", "--autoguidance needs a weak DDPM"),
            ("decoder --weak weak.pt", "--weak is of no use with --method unclip")):
        with pytest.raises(cli.UserError, match=message):
            main.main(arguments.split())
