"""The experiments: metrics and variants by hand, every experiment at toy size, one as a command."""
import argparse
import dataclasses
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
import judge
import sample
import tinyclip
import tinyddpm
import toys
import train
from experiments import __main__ as main
from experiments import (ablations, benchmark, clip, ddpm, english, evaluator, guidance, metrics,
                         second_judge, variants, zeroshot)
from infra import checkpoint, cli

ROOT = Path(__file__).resolve().parent.parent
TOY = {
    "clip": (tinyclip.CLIPConfig(width=32, layers=1, heads=2, text_width=32, text_layers=1,
                                 text_heads=2, embed_dim=16, image_size=16),
             train.TrainConfig(steps=10, batch=8, images=60)),
    "ddpm": (tinyddpm.UNetConfig(channels=16, multipliers=(1, 2), attention=(1,), image_size=16),
             train.TrainConfig(steps=10, batch=8, images=60)),
    "judge": (judge.JudgeConfig(width=8, image_size=16),
              train.TrainConfig(steps=2, batch=8, images=60))}


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
    for kind in ("clip", "ddpm", "judge", "judge-2"):
        config, options = TOY[kind.removesuffix("-2")]
        torch.manual_seed(0)
        task = train.TASKS[kind.removesuffix("-2")][0](config, options, dataset, dataset,
                                                       torch.device("cpu"))
        model = second_judge.PlainNet(config, sizes) if kind == "judge-2" else task.model
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        checkpoint.save(folder / f"runs/{kind}/weights.pt", {
            "kind": task.kind, "config": dataclasses.asdict(config), "data": dataset.name,
            "steps": 1, "weights": checkpoint.fp16_weights(model), **task.content})


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
        kind: (make_task, *TOY[kind]) for kind, (make_task, *_) in train.TASKS.items()})


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
    """Of two answers given with 95 % one is correct, of two with 52 % both are: half of |.5 - .95|
    and half of |1 - .52|."""
    sure, unsure = [0.95, 0.05], [0.48, 0.52]
    probs, caption_ids = torch.tensor([sure, sure, unsure, unsure]), torch.tensor([0, 1, 1, 1])
    error = metrics.calibration_error(probs, caption_ids, bins=10)
    assert error == pytest.approx((0.45 + 0.48) / 2, abs=1e-6)


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
        value = variants.lookahead_with(models.clip, models.text_features, targets,
                                        torch.arange(294)[:, None], 2., 1.)(x, t, x)
        logits = models.clip.logits(models.clip.encode_image(x, t), models.text_features, t)
    expected = 2 * (logits / 2).log_softmax(1)[[0, 1], [5, 77]]
    assert torch.allclose(value, expected, atol=1e-4)


def test_joint_guidance_by_hand(models):
    """The caption's log-probability by the softened softmax, where lookahead applies CLIP."""
    torch.manual_seed(0)
    x, t, targets = torch.randn(1, 3, 16, 16), torch.tensor([300]), torch.tensor([77])
    with torch.no_grad():
        log_p = variants.joint(models.clip, models.text_features, targets, models.caption_labels)
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


# ---- images and the cache ------------------------------------------------------------------------

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
    monkeypatch.setattr(evaluator, "SOURCE", evaluator.SOURCE[:-1])
    paths.append(path())
    assert len(set(paths)) == len(paths) == 15


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


def test_zero_shot(here, monkeypatch):
    """Every task has its row, and the figure of words on cars is drawn."""
    for name, small in (("TEST_IMAGES", 300), ("SEEN", 40), ("SIDE_VIEWS", 12), ("WITH_WORDS", 8),
                        ("PAIRS_OF_CARS", 20)):
        monkeypatch.setattr(zeroshot, name, small)
    train_changed = ablations.train_changed
    monkeypatch.setattr(ablations, "train_changed", lambda kind, change, *rest: (
        train_changed(kind, change, *rest) if rest[1:] else Path(f"runs/{kind}/weights.pt")))
    rows = run("zeroshot")
    tasks = [row["task"] for row in rows]
    assert tasks.count("class folders, by body") == 2 and tasks.count("all attributes") == 4
    assert tasks.count("pairs that CLIP never met") == 3 and len(rows) == 9 + 4 + 3
    assert checkpoint.load("runs/ablations/clip-words/weights.pt", "clip")["steps"] == 10
    assert Path("out/typographic.png").exists()


def test_a_linear_probe_by_separable_features():
    """It finds two attributes of features that tell them apart."""
    labels = torch.tensor([[a, b] for a in range(3) for b in range(2)] * 5)
    features = F.normalize(torch.cat([F.one_hot(labels[:, 0], 3), labels[:, 1:]], 1).float(), dim=1)
    assert torch.equal(zeroshot.linear_probe(features, labels)(features), labels)


def test_training_with_words_is_clip_objective(here, monkeypatch):
    """On the given device, with a caption of its own for each of eight images that has a word."""
    monkeypatch.setattr(zeroshot, "WITH_WORDS", 3)
    device, trained = torch.device("cpu", 0), []
    monkeypatch.setattr(train, "train", lambda task, *_, device: trained.append((task, device)))
    ablations.train_changed("clip", "words", device, zeroshot.words_objective)
    (task, used), = trained
    assert used is device
    monkeypatch.setattr(train, "clip_objective", lambda *arguments: arguments)
    plain = torch.full((8, 3, 16, 16), 9.)
    _, x_0, ids, tokens, true_of, _, _ = task.objective(
        task.model, plain, torch.arange(8), torch.Generator().manual_seed(0))
    assert (x_0[:2] <= 1).all() and torch.equal(x_0[2:], plain[2:])
    assert ids.tolist() == [294, 295, 2, 3, 4, 5, 6, 7]
    assert tokens.shape[1] == 294 + 2 + 154 == sum(true_of.shape)
    says = [task.model.tokenizer.decode(row.tolist()) for row in tokens[0, 294:296]]
    names = [tinyclip.normalize_prompt(caption) for caption in cars.CAPTIONS]
    for text, column in zip(says, true_of.T[294:]):
        caption, word = text.split(" that says ")
        assert word.rstrip(" !").upper() in zeroshot.WORDS   # "!" is token 0, the padding
        assert torch.equal(column, true_of[:, names.index(caption)])


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
    monkeypatch.setattr(ablations, "train_changed", lambda kind, change, device: (
        Path(f"runs/{kind}/weights.pt")))
    rows = run("composition", steps=1)
    assert [(row["held_out_of"], row["pairs"], row["guidance"]) for row in rows] == [
        (name, pairs, method) for name in ("neither", "DDPM", "CLIP", "both")
        for pairs in ("unseen", "seen") for method in ("lookahead", "joint")]
    assert all(row["samples"] == 36 for row in rows)


def test_clean_objective_has_no_noise(here, monkeypatch):
    seen = []
    model = train.TASKS["clip"][0](*TOY["clip"], random_cars("cars", 16, 60),
                                   random_cars("cars", 16, 60), torch.device("cpu")).model
    monkeypatch.setattr(model, "encode_image", lambda x, t: seen.append((x, t)) or torch.ones(
        len(x), 16))
    objective = ablations.clean_objective(model, random_cars("cars", 16, 60), torch.device("cpu"))
    x_0 = torch.randn(8, 3, 16, 16)
    objective(model, x_0, torch.arange(8), torch.Generator().manual_seed(0))
    (x_t, t), = seen
    assert torch.equal(x_t, x_0) and not t.any()


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


def test_the_second_judge_is_trained(here, tmp_path, monkeypatch):
    monkeypatch.setattr(second_judge, "FOLDER", tmp_path / "judge-2")
    main.main(["second_judge", "--device", "cpu"])
    network = second_judge.load_second_judge("cars")
    assert network.config.width == 8 and isinstance(network, second_judge.PlainNet)


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
            ("guidance --methods classifier-free --prompts even", "ddpm --clip")):
        with pytest.raises(cli.UserError, match=message):
            main.main(arguments.split())
