"""Prompts, sampling, files and reports; from class folders to an image; the shipped models."""
import os
import re
import shutil
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from experiments import clip, english
from infra import cli

ROOT = Path(__file__).resolve().parent.parent
FAST = "-n 1 --steps 2 --device cpu".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which toy models of every kind have been trained, and a conditional DDPM."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, flags in toys.FLAGS.items():   # an upsampler in runs/ would be used everywhere
            out = "upsampler" if kind == "upsampler" else f"runs/{kind}"
            train.main(f"{kind} --steps 4 {flags} --out {out}".split())
        train.main(f"ddpm --clip runs/clip/weights.pt --steps 4 {toys.FLAGS['ddpm']} "
                   "--out runs/conditional".split())
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """In the folder of the toy models, in float32."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "bf16_is_fast", lambda device: False)
    return folder


@pytest.fixture
def models(here):
    return sample.load_models()


@pytest.fixture
def all_new(monkeypatch):
    """No text means the same as another: what is not in a template is one more caption."""
    monkeypatch.setattr(sample, "MEANS_THE_SAME", 2.)


@pytest.fixture
def encoded(monkeypatch):
    """-> a list that gets the number of texts of every call of encode_text."""
    encode_text, rows = tinyclip.CLIP.encode_text, []

    def counted(clip, tokens):
        rows.append(len(tokens))
        return encode_text(clip, tokens)

    monkeypatch.setattr(tinyclip.CLIP, "encode_text", counted)
    return rows


# ---- models --------------------------------------------------------------------------------------

def test_the_weights_of_runs_come_before_those_that_ship(here, tmp_path, monkeypatch):
    """But only if both models were trained; what is given comes first."""
    files = lambda **given: re.findall(r"(?<!weak )(?:CLIP|DDPM) from (\S+)",
                                       sample.load_models(**given).description)
    trained = ["runs/clip/weights.pt", "runs/ddpm/weights.pt"]
    assert files() == trained
    description = sample.load_models(method="unclip", upsampler="upsampler/weights.pt").description
    assert "upsampler from upsampler/weights.pt, prior from runs/prior/weights.pt" in description
    shutil.copy(trained[0], "a.pt")
    assert files(clip="a.pt") == ["a.pt", trained[1]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/clip").mkdir(parents=True)
    (tmp_path / "runs/clip/weights.pt").write_text("one alone")
    assert files() == [str(ROOT / "weights/clip.pt"), str(ROOT / "weights/ddpm.pt")]


def test_a_model_of_runs_that_is_not_used_is_named(here, tmp_path, monkeypatch, capsys):
    """A prompt needs both; the shipped ones are used instead."""
    shutil.copytree("runs/ddpm", tmp_path / "runs" / "ddpm")
    monkeypatch.chdir(tmp_path)
    assert "weights/clip.pt" in sample.load_models().description.replace("\\", "/")
    assert "ddpm/weights.pt is not used: runs/clip and runs/ddpm are needed" in (
        capsys.readouterr().out.replace("\\", "/"))


def test_what_cannot_be_written_is_refused_before_sampling(here, monkeypatch, capsys):
    """A folder in the place of the image, a folder that is read-only; an image of that name that is
    there is replaced only with a word."""
    Path("d.png").mkdir()
    with pytest.raises(cli.UserError, match="cannot write d.png; choose another --out"):
        sample.main([*FAST, "--out", "d.png"])
    sample.main([*FAST, "--gif", "--out", "e.png"])
    assert "replaced" not in capsys.readouterr().out
    sample.main([*FAST, "--gif", "--out", "e.png"])
    out = capsys.readouterr().out
    assert "e.png will be replaced" in out and "e.gif will be replaced" in out
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(cli.UserError, match="cannot write"):
        sample.main(FAST)


def test_models_that_do_not_fit_are_refused(here, capsys):
    """CLIP and DDPM of different sizes or data sets, and a DDPM conditional on another CLIP."""
    small = toys.FLAGS["clip"].replace("--image-size 16", "--image-size 8")
    train.main(f"clip --steps 1 {small} --out small".split())
    with pytest.raises(cli.UserError, match="CLIP is for cars at 8 pixels, .* the DDPM for"):
        sample.load_models(clip="small/weights.pt")
    content = torch.load("runs/clip/weights.pt", weights_only=True)
    torch.save({**content, "data": "./photos", "captions": ["a cat"]}, "photos.pt")
    with pytest.raises(cli.UserError, match="for ./photos at 16 pixels, 1 captions, the DDPM for"):
        sample.load_models(clip="photos.pt")
    ddpm = torch.load("runs/ddpm/weights.pt", weights_only=True)
    torch.save({**ddpm, "captions": ddpm["captions"][:200]}, "fewer.pt")
    assert len(sample.load_models(ddpm="fewer.pt").captions) == 294   # one may know fewer
    torch.save({**content, "data": "./moved"}, "moved.pt")
    sample.load_models(clip="moved.pt")   # a data set is known by its captions, not by its path
    content["weights"]["log_scale"] += 1
    torch.save(content, "other.pt")
    conditional = {"clip": "other.pt", "ddpm": "runs/conditional/weights.pt"}
    sample.load_models()
    sample.load_models(ddpm="runs/conditional/weights.pt")
    assert "condition" not in capsys.readouterr().out
    sample.load_models(**conditional)   # without its condition it fits any CLIP of the same data
    assert "weights.pt is not used: it is another CLIP's" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="conditional/weights.pt is conditional on .* another"):
        sample.load_models(**conditional, method="classifier-free")
    with pytest.raises(cli.UserError, match="this DDPM knows no texts of this CLIP"):
        sample.generate(sample.load_models(**conditional), "red bus", method="classifier-free")


def test_the_judge_is_that_of_the_same_data(here, tmp_path, monkeypatch, capsys):
    """The one of runs/, else the shipped one, else none, with a word; a given one of other data is
    refused."""
    assert sample.load_judge(cars.CAPTIONS)[0].config.width == 8
    assert capsys.readouterr().out == "" and sample.load_judge(["a cat"]) == (None, None)
    assert "weights.pt is not used: it does not fit the other models" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="is for cars and does not fit"):
        sample.load_judge(["a cat"], "runs/judge/weights.pt")
    monkeypatch.chdir(tmp_path)
    assert sample.load_judge(cars.CAPTIONS)[0].config.width == 32


# ---- prompts -------------------------------------------------------------------------------------

def captions_of(models, targets):
    """(K,) bool -> the captions that it allows"""
    assert targets.shape == (len(models.captions),) == models.text_features.shape[:1]
    return [models.captions[k] for k in targets.nonzero()[:, 0]]


@pytest.mark.parametrize("prompt", [
    "a white and red car", "white and red car", "  White  and RED car ", "The white and red car",
    "A WHITE AND RED CAR", "&#119;hite and red car", '"White" & red car!', "white+red_car"])
def test_a_known_caption_is_found_in_any_template_and_case(models, encoded, capsys, prompt):
    """Nothing is encoded, and one line printed: how the prompt is read."""
    same, targets = sample.resolve_prompt(prompt, models)
    assert same is models and captions_of(models, targets) == ["a white and red car"]
    out = f"{' '.join(prompt.split())!r} is read as 'a white and red car'\n"
    assert encoded == [] and capsys.readouterr() == (out, "")


def test_a_prompt_that_says_less_allows_several_captions(models, encoded, capsys):
    """All of which it is true; nothing is encoded. What names nothing known allows any."""
    for prompt, reading, expected in (
            ("Something RED", "something red", [c for c in cars.CAPTIONS if c.startswith("a red")]),
            ("the bus", "a bus", [c for c in cars.CAPTIONS if c.endswith(" bus")]),
            ("zebra zoo", "anything", cars.CAPTIONS)):
        same, targets = sample.resolve_prompt(prompt, models)
        assert same is models and captions_of(models, targets) == expected and encoded == []
        assert capsys.readouterr().out.endswith(f"{prompt!r} is read as {reading!r}\n")


@pytest.mark.parametrize("prompt, readings", [
    ("red bus or blue van", ["a red bus", "a blue van"]),
    ("A red bus, or a blue van!", ["a red bus", "a blue van"]),
    ("blue van or blue van or jeep", ["a blue van", "a blue van", "a jeep"])])
def test_or_allows_what_either_part_allows(models, encoded, capsys, prompt, readings):
    """Each part is read by itself, its article and all."""
    same, targets = sample.resolve_prompt(prompt, models)
    parts = [captions_of(models, sample.resolve_prompt(text, models)[1]) for text in readings]
    assert same is models and set(captions_of(models, targets)) == set().union(*parts)
    assert encoded == []
    out = f"{prompt!r} is read as {' or '.join(map(repr, readings))}"
    assert capsys.readouterr().out.splitlines()[0] == out


@pytest.mark.parametrize("prompt, count", [
    ("zebra or tiger", 294), ("zebra", 294), ("red bus or zebra", 1),
    ("red bus or something", 294)])
def test_unknown_parts_of_a_prompt_say_nothing(models, prompt, count):
    """Unless all are unknown: then it allows anything, as "something" does."""
    _, targets = sample.resolve_prompt(prompt, models)
    assert targets.sum() == count
    config = sample.SamplingConfig(n=1, steps=1)
    caption_ids = sample.draw_captions(targets, config)
    assert len(sample.sample_images(models, caption_ids, config)) == 1


def test_a_new_prompt_is_encoded_alone(models, encoded, capsys, all_new):
    """It becomes one more caption, encoded in several wordings: the features of all others stay as
    they are. Words that no text of the training has are left out and named."""
    more, targets = sample.resolve_prompt("purple car of wood", models)
    assert encoded == [1] * 4 and captions_of(more, targets) == ["car of"]
    assert more.captions == [*models.captions, "car of"]
    assert more.caption_labels[294:].tolist() == [[294, -1, -1]]   # no other caption has these
    assert torch.equal(more.text_features[:294], models.text_features)
    wordings = ["car of", "a photo of car of", "a picture of car of", "an image of car of"]
    expected = F.normalize(models.clip.encode_captions(wordings), dim=1).mean(dim=0)
    assert torch.allclose(more.text_features[294:], expected, atol=1e-5)
    out = capsys.readouterr().out
    assert "left out: 'purple'" in out and "left out: 'wood'" in out and "'car'" not in out
    assert "nothing that CLIP was trained on means 'car of'" in out
    more, targets = sample.resolve_prompt("red red car or red red van or bus", models)
    assert captions_of(more, targets)[-2:] == more.captions[294:] == ["red red car", "red red van"]
    assert targets.sum() == 49 + 2 and "left out" not in capsys.readouterr().out


def test_a_prompt_that_clip_finds_equal_is_read_as_that(models, capsys):
    """The text whose feature has the same direction is found, however long others are: a caption,
    or a partial caption."""
    feature = models.clip.encode_ensemble(
        [[template.format("red of red")] for template in sample.WORDINGS])[0]
    for name, texts, expected in (
            ("text_features", models.captions, ["a white and red car"]),
            ("partial_features", models.partial,
             [c for c in cars.CAPTIONS if c.startswith("a red ")])):
        reading = "something red" if name == "partial_features" else "a white and red car"
        features = 9 * getattr(models, name)
        features[texts.index(reading)] = 2 * feature
        like = models._replace(**{name: features})
        same, targets = sample.resolve_prompt("red of red", like)
        assert same is like and captions_of(like, targets) == expected
        assert capsys.readouterr().out == f"'red of red' is read as {reading!r}\n"


def test_a_prompt_is_worded_with_words_that_clip_knows(models, encoded):
    sample.resolve_prompt("red of red", models._replace(words=["a", "of", "picture", "red"]))
    assert encoded == [1, 1]   # as it is, and "a picture of red of red"


@pytest.mark.parametrize("a, b, expected", [
    ("withe", "white", True), ("redish", "reddish", True), ("buss", "bus", True),
    ("jeap", "jeep", True), ("red", "bed", True), ("rotes", "red", False), ("tab", "bat", False),
    ("car", "cabin", False), ("van", "navy", False)])
def test_one_letter_apart(a, b, expected):
    """A letter is missing, superfluous, wrong, or in a wrong place, and no more than that."""
    assert sample.one_letter_apart(a, b) == sample.one_letter_apart(b, a) == expected


@pytest.mark.parametrize("text, read, printed", [
    ("white lorry", "white lorry", ""), ("", "", ""),
    ("withe lory", "white lorry", "'withe' is read as 'white'\n'lory' is read as 'lorry'\n"),
    ("gary", "gray", "'gary' is read as 'gray'\n"),   # not grey, though that is one letter apart
    ("jep", "", "left out: 'jep', a word that CLIP was not trained on (it knows 'jeep')\n"),
    ("bed bus", "bus", "left out: 'bed', a word that CLIP was not trained on\n"),
    ("whitened bus", "bus",
     "left out: 'whitened', a word that CLIP was not trained on (it knows 'white')\n"),
    ("z" * 99, "", f"left out: '{'z' * 30}', a word that CLIP was not trained on\n")])
def test_known_words(capsys, text, read, printed):
    """Known ones stay, those of four letters or more one letter away from them become them, others
    are left out; all but the first are named."""
    words = ["bus", "grey", "gray", "jeep", "lorry", "red", "white"]
    assert sample.known_words(text, words) == read
    assert capsys.readouterr().out == printed


def test_every_text_of_cars_is_resolved_to_its_captions(models):
    """Captions and partial captions: of each template every 37th text, of each another one."""
    assert len(models.templates) == train.ENSEMBLE
    for first, texts in enumerate(models.templates):
        assert len(texts) == 294 + len(models.partial)
        for i, text in list(enumerate(texts))[first::37]:
            expected = models.partial_true_of[i - 294] if i >= 294 else torch.arange(294) == i
            same, targets = sample.resolve_prompt(text, models)
            assert same is models and torch.equal(targets, expected), text


@pytest.mark.parametrize("cosine, index, printed", [
    (0.99, 3, ""), (0.95, 3, "not sure of 'red of red': a cosine of 0.95 with what it is"),
    (0.85, None, "nothing that CLIP was trained on means 'red of red'")])
def test_a_text_must_be_near_to_one_that_clip_knows(models, monkeypatch, capsys, cosine, index,
                                                    printed):
    """From a cosine of .97 on it is read as that, from .9 on with a warning, below it is new."""
    feature = torch.zeros(1, 16)
    feature[0, 3], feature[0, 15] = cosine, (1 - cosine ** 2) ** 0.5
    monkeypatch.setattr(models.clip, "encode_ensemble", lambda templates: feature)
    like = models._replace(text_features=torch.eye(16)[:8], partial_features=torch.eye(16)[8:12])
    found, new = sample.read_text("red of red", {}, like)
    assert found == index and (new is feature) == (index is None)
    assert capsys.readouterr().out.startswith(printed)


def test_features_of_captions_and_partial_captions_are_those_of_their_texts(models):
    """The mean over the templates of weights.pt, whose first one has the texts themselves."""
    assert [tinyclip.normalize_prompt(text) for text in models.captions + models.partial] == (
        models.templates[0])
    with torch.no_grad():
        features = models.clip.encode_ensemble(models.templates)
    assert torch.equal(models.text_features, features[:294])
    assert torch.equal(models.partial_features, features[294:])


def test_text_features_are_encoded_once(here, encoded):
    """All texts in each template when the models are loaded, a new prompt when it is resolved, none
    while sampling."""
    sample.main(["red bus", "a bus of bus", *FAST, "--out", "encoded"])
    assert encoded == [294 + len(cars.PARTIAL)] * train.ENSEMBLE + [1] * len(sample.WORDINGS)


def test_a_prompt_of_ten_thousand_characters(here, capsys):
    """Its first tokens are used, with a warning; an unknown word is named once; no line is long."""
    sample.main(["wheel car " * 910 + "x" * 900, *FAST, "--out", "long.png"])
    out, error = capsys.readouterr()
    assert "CLIP reads its first 30 tokens" in out and out.count("left out: 'wheel'") == 1
    assert max(map(len, (out + error).splitlines())) < 1000 and Path("long.png").exists()


# ---- generate, from Python -----------------------------------------------------------------------

def test_generate_is_a_function_of_prompt_seed_and_options(models):
    """n images in [-1, 1]; each has noise of its own, whatever the batch and the number of
    images."""
    options = {"n": 5, "steps": 3}
    x_0 = sample.generate(models, "a red bus", **options)
    assert x_0.shape == (5, 3, 16, 16) and x_0.abs().max() <= 1 and not x_0.requires_grad
    assert torch.equal(x_0, sample.generate(models, "Red  bus", **options))
    assert torch.allclose(x_0, sample.generate(models, "a red bus", batch=2, **options), atol=1e-4)
    first = sample.generate(models, "a red bus", **{**options, "n": 2})
    assert torch.allclose(x_0[:2], first, atol=1e-4)
    for prompt, other in (("a red bus", {"seed": 1}), ("a red bus", {"eta": 0.}),
                          ("a red bus", {"scale": 1.}), ("a red bus", {"recurrence": 1}),
                          ("a red bus", {"interval": (1, 500)}), ("a red bus", {"steps": 2}),
                          ("a blue van", {}), (None, {})):
        assert not torch.equal(x_0, sample.generate(models, prompt, **{**options, **other}))


def test_generate_without_a_prompt_is_unguided(models):
    """As with a scale of 0, or the method none, which samples without fresh noise."""
    options = dict(n=2, steps=3, eta=1., recurrence=2)
    unguided = sample.generate(models, **options)
    assert torch.equal(unguided, sample.generate(models, "red bus", scale=0., **options))
    assert torch.equal(unguided, sample.generate(models, "red bus", method="none", **options))
    options |= {"eta": 0., "recurrence": 1}
    assert torch.equal(sample.generate(models, **options), sample.generate(models, n=2, steps=3))


def test_generate_calls_back_in_the_first_batch(models):
    """Once a denoised image, from t = T down."""
    calls = []
    sample.generate(models, "red bus", n=3, batch=2, steps=3, recurrence=1,
                    callback=lambda t, x_t, x_0_hat: calls.append((t, x_t.shape, x_0_hat.shape)))
    assert [t for t, *_ in calls] == sorted((t for t, *_ in calls), reverse=True)
    assert len(calls) == 3 and calls[0] == (1000, (2, 3, 16, 16), (2, 3, 16, 16))


def test_generate_names_mistakes(models):
    """An option out of range, and one that does not exist; a prompt without a CLIP."""
    with pytest.raises(cli.UserError, match="-n must be from 1 to 10000, not 0"):
        sample.generate(models, n=0)
    with pytest.raises(TypeError, match="colour"):
        sample.generate(models, colour="red")
    with pytest.raises(cli.UserError, match="without a CLIP"):
        sample.generate(sample.load_models(method="none"), "red bus")


def test_probabilities_of_captions_are_those_of_clip(models):
    """In parts of 250 images, as in one; each row sums to 1."""
    x = torch.rand(300, 3, 16, 16) * 2 - 1
    t = torch.arange(300)
    with torch.no_grad():
        logits = models.clip.logits(models.clip.encode_image(x, t), models.text_features, t)
    probs = models.clip.caption_probs(x, models.text_features, t)
    assert torch.allclose(probs, logits.softmax(dim=1), atol=1e-5)
    assert torch.allclose(probs.sum(dim=1), torch.ones(300))
    clean = models.clip.caption_probs(x, models.text_features)
    zero = torch.zeros_like(t)
    assert torch.equal(clean, models.clip.caption_probs(x, models.text_features, zero))
    assert not torch.allclose(clean, probs, atol=1e-3)


# ---- the command ---------------------------------------------------------------------------------

def test_an_image_from_a_prompt(here, monkeypatch, capsys):
    """The PNG has prompt, seed and settings in its metadata; the GIF has x_t above, x_0_hat below;
    the report says how the prompt is read, the judge's accuracy and CLIP's probability."""
    frames, save_gif = [], data.save_gif
    monkeypatch.setattr(data, "save_gif", lambda path, shown, *options: (
        frames.extend(shown) or save_gif(path, shown, *options)))
    sample.main("white and RED car|-n|3|--steps|3|--gif|--device|cpu|--batch|2".split("|"))
    out = capsys.readouterr().out
    assert "CLIP from runs/clip/weights.pt" in out.replace("\\", "/")
    assert "'white and RED car' is read as 'a white and red car'" in out
    assert "CLIP's mean probability of it: " in out and "among 294 captions" in out
    assert "prompt accuracy by the judge: " in out and " of 3 (body " in out
    assert "runs/judge/weights.pt, 4 steps" in out.replace("\\", "/")
    assert "3 images in " in out
    assert "(3 x 2 steps, lookahead, scale 128, autoguidance 1) -> out" in out
    with Image.open("out/white-and-red-car.png") as image:
        metadata, pixels = image.text, np.asarray(image)
    assert metadata["prompt"] == "white and RED car" and metadata["seed"] == "0"
    assert (metadata["method"], metadata["scale"], metadata["steps"], metadata["n"]) == (
        "lookahead", "128.0", "3", "3")
    for name, path in (("CLIP", "runs/clip/weights.pt"), ("DDPM", "runs/ddpm/weights.pt")):
        weights = torch.load(path, weights_only=True)["weights"].values()
        checksum = zlib.crc32(b"".join(w.numpy().tobytes() for w in weights))
        assert metadata[f"{name} checksum"] == str(checksum)   # to draw it again
    assert metadata["torch"] == torch.__version__ and metadata["bf16"] in ("True", "False")
    assert not any(str(here) in text for text in metadata.values())   # no path of the user's disk
    images = data.to_uint8(sample.generate(sample.load_models(), "white and red car", n=3, steps=3,
                                           batch=2))
    expected = data.image_grid(images, columns=2, zoom=6)
    assert (pixels == np.asarray(expected)).all()
    # 2 of x_t (--batch), below them 2 of x_0_hat; 3 steps, all but the last taken twice
    with Image.open("out/white-and-red-car.gif") as gif:
        assert gif.n_frames == len(frames) == 5 and gif.width == gif.height
    x_T = torch.randn(3, 16, 16, generator=data.generator("sampling", 0, 0))
    assert (frames[0][0] == data.to_uint8(x_T[None])).all() and (frames[-1][2:] == images[:2]).all()


def test_without_a_prompt_a_ddpm_is_enough(here, tmp_path, monkeypatch, capsys):
    """That of runs/, though there is no CLIP and a judge that cannot be read; else the one that
    ships."""
    shutil.copytree("runs/ddpm", tmp_path / "runs" / "ddpm")
    monkeypatch.chdir(tmp_path)
    Path("runs/judge").mkdir()
    Path("runs/judge/weights.pt").write_text("no weights")
    sample.main("-n 1 --steps 2 --device cpu".split())
    assert "DDPM from runs/ddpm/weights.pt" in capsys.readouterr().out
    shutil.rmtree("runs")
    sample.main("-n 1 --steps 2 --device cpu".split())
    assert f"DDPM from {sample.SHIPPED / 'ddpm.pt'}" in capsys.readouterr().out


def test_no_prompt_is_unguided(here, capsys):
    """The file's name says so, and nothing is judged."""
    sample.main(FAST)
    out = capsys.readouterr().out
    assert "unguided" in out and "judge" not in out and "mean probability" not in out
    with Image.open("out/unguided.png") as image:
        assert "prompt" not in image.text and image.text["method"] == "none"


def test_class_names_are_captions_to_a_published_clip(models, monkeypatch):
    """As in a prompt: "a cat" is the caption "a photo of a cat"."""
    monkeypatch.setattr(models.clip.config, "noise_aware", False)
    captions = ["a photo of a dog", "a photo of a cat"]
    _, allowed = sample.resolve_prompt("a cat", models._replace(
        captions=captions, templates=[["a toy dog", "a toy cat"]],
        partial_true_of=torch.zeros(0, 2, dtype=torch.bool)))
    assert allowed.tolist() == [False, True]


def test_a_new_prompt_is_one_more_caption(here, capsys, all_new):
    """It is not judged, as the judge does not know it, and no probability is printed."""
    sample.main(["a purple car of red", *FAST, "--out", "purple.png"])
    out = capsys.readouterr().out
    assert "left out: 'purple'" in out and "is read as 'car of red'" in out
    assert "not judged: the caption is new" in out
    assert "prompt accuracy" not in out and "mean probability" not in out


@pytest.mark.parametrize("prompt, accuracy", [
    ("a red bus", "1 of 4 (body 50%, main 50%, second 25%)"),
    ("something red", "2 of 4 (main 50%)"), ("a bus", "2 of 4 (body 50%)"),
    ("red bus or blue van", "2 of 4 (body 100%, main 100%, second 75%)")])
def test_a_report_of_several_targets_by_hand(models, monkeypatch, capsys, prompt, accuracy):
    """Images with all attributes of one target count, and each attribute that is not left open; the
    probability is the sum over targets."""
    red, blue, white = (cars.COLOURS.index(name) for name in ("red", "blue", "white"))
    bus, van = cars.BODIES.index("bus"), cars.BODIES.index("van")
    labels = [[bus, red, red], [van, blue, blue], [bus, blue, white], [van, red, blue]]
    monkeypatch.setattr(judge, "predict", lambda model, x_0: torch.tensor(labels))
    x_0, (models, targets) = torch.rand(4, 3, 16, 16), sample.resolve_prompt(prompt, models)
    capsys.readouterr()
    sample.report(models, targets, x_0, *sample.load_judge(cars.CAPTIONS))
    by_judge, by_clip = capsys.readouterr().out.splitlines()
    assert by_judge.startswith(f"prompt accuracy by the judge: {accuracy}; ")
    p = models.clip.caption_probs(x_0, models.text_features)[:, targets].sum() / 4
    assert by_clip == f"CLIP's mean probability of it: {p:.0%}, among 294 captions"


def test_each_image_gets_one_of_the_captions_that_a_prompt_allows(models, monkeypatch):
    """At random, whatever the batch; of one caption each gets that."""
    drawn, build = [], guide.build_denoiser
    monkeypatch.setattr(guide, "build_denoiser", lambda name, models, targets, *args: (
        drawn.extend(targets.tolist()) or build(name, models, targets, *args)))
    targets = torch.zeros(294, dtype=torch.bool)
    targets[[3, 50, 200]] = True
    for batch in (64, 4):
        config = sample.SamplingConfig(n=12, steps=1, batch=batch)
        sample.sample_images(models, sample.draw_captions(targets, config), config)
    assert drawn[:12] == drawn[12:] and set(drawn) == {3, 50, 200}
    sample.generate(models, "a red bus", n=2, steps=1)
    assert drawn[24:] == [cars.CAPTIONS.index("a red bus")] * 2


def test_several_prompts_start_from_the_same_noise(here):
    """One file each, under names that differ; with scale 0 the images are the same."""
    sample.main("red bus|A blue van|-n|2|--steps|2|--scale|0|--device|cpu|--out|zero".split("|"))
    images = [Image.open(f"zero/{name}.png") for name in ("red-bus", "a-blue-van")]
    assert [image.text["prompt"] for image in images] == ["red bus", "A blue van"]
    assert images[0].tobytes() == images[1].tobytes()
    sample.main("red bus|RED bus|blue van|-n|1|--steps|3|--device|cpu|--out|three".split("|"))
    images = [Image.open(f"three/{name}.png").tobytes()
              for name in ("red-bus", "red-bus-2", "blue-van")]
    assert images[0] == images[1] != images[2]


@pytest.mark.parametrize("arguments, paths", [
    ("a red bus", ["out/a-red-bus.png"]), ("", ["out/unguided.png"]),
    ("../../etc/passwd", ["out/etc-passwd.png"]), ("🚗", ["out/prompt.png"]),
    ("bus|--out|a/b.png", ["a/b.png"]), ("bus|van|--out|a", ["a/bus.png", "a/van.png"]),
    ("bus 2|bus|Bus|bus!", [f"out/bus{end}.png" for end in ("-2", "", "-3", "-4")]),
    ("x" * 300, [f"out/{'x' * 80}.png"])])
def test_names_of_files(tmp_path, monkeypatch, arguments, paths):
    """All different, short, and inside of the folder."""
    monkeypatch.chdir(tmp_path)
    args, _ = sample.parse([argument for argument in arguments.split("|") if argument])
    found = [path.as_posix() for path in sample.output_paths(args)]
    assert found == paths


def test_no_image_is_replaced(tmp_path, monkeypatch):
    """Without --out, the next one of the same prompt gets another name."""
    monkeypatch.chdir(tmp_path)
    for expected in ("red-bus.png", "red-bus-2.png", "red-bus-3.png"):
        path, = sample.output_paths(sample.parse(["red bus"])[0])
        assert path.name == expected
        path.write_bytes(b"an image")


def test_flags_and_prompts_in_any_order():
    """Prompts may stand behind flags; those that are not given keep their defaults."""
    args, config = sample.parse(["--steps", "7", "red bus", "-n", "2", "blue van"])
    assert args.prompts == ["red bus", "blue van"]
    assert config == sample.SamplingConfig(n=2, steps=7)
    assert sample.parse(["red bus", "--interval", "5", "900"])[1].interval in ((5, 900), [5, 900])


def with_clip(noise_aware):
    """Stands in for models of 16 x 16 pixels."""
    config = SimpleNamespace(noise_aware=noise_aware, image_size=16)
    return SimpleNamespace(upsampler=None, clip=SimpleNamespace(config=config), weak="a U-Net",
                           unet=SimpleNamespace(config=config))


def test_a_method_has_its_own_settings_unless_given():
    """Those of METHODS; no scale of guidance is zero."""
    for name, method in sample.METHODS.items():
        config = sample.fill_in(sample.SamplingConfig(method=name, steps=5), with_clip(True))
        assert config == sample.SamplingConfig(
            method=name, steps=5, scale=method.scale, interval=method.interval, size=16,
            eta=method.eta, recurrence=method.recurrence, autoguidance=method.autoguidance)
        assert (method.scale > 0) == (name not in ("none", "latent"))
        given = sample.SamplingConfig(method=name, scale=0., interval=(3, 7), size=16, steps=3,
                                      eta=0.5, recurrence=9, autoguidance=1.)
        if name == "latent":   # its x_T is optimised for deterministic sampling
            with pytest.raises(cli.UserError, match="with eta 0 and recurrence 1"):
                sample.fill_in(given, with_clip(True))
        else:
            assert sample.fill_in(given, with_clip(True)) == given


def test_a_clip_of_clean_images_guides_through_x_0_hat():
    """Methods that need a noise-aware CLIP become x0-fast, with its own scale unless one was given,
    but latent, which is refused; all others stay, as all do with a noise-aware CLIP."""
    with pytest.raises(cli.UserError, match="latent and --edit need a CLIP that was trained"):
        sample.fill_in(sample.SamplingConfig(method="latent"), with_clip(False))
    for name in set(sample.METHODS) - {"latent"}:
        for scale in (None, 7.):
            other = "x0-fast" if name in sample.NEED_NOISE_AWARE else name
            config, like = (sample.SamplingConfig(method=method, scale=scale, steps=5)
                            for method in (name, other))
            assert sample.fill_in(config, with_clip(True)).method == name
            assert (sample.fill_in(config, with_clip(False))
                    == sample.fill_in(like, with_clip(True)))


@pytest.fixture
def weak(here):
    """-> the path of a weak DDPM that is trained, of the same data"""
    path = Path("weak/weights.pt")
    if not path.exists():
        train.main(f"ddpm --steps 2 {toys.FLAGS['ddpm']} --seed 1 --out weak".split())
    return str(path)


def test_autoguidance_by_a_weak_ddpm(weak, capsys):
    """With and without a prompt, 1 is none; named, and in the metadata; not of decoders."""
    options, images = ["--steps", "3", "-n", "2", "--device", "cpu", "--weak", weak], {}
    for prompt in ([], ["red bus"]):
        for scale in ("1", "2", "3"):
            path = f"auto-{len(prompt)}-{scale}.png"
            sample.main([*prompt, *options, "--autoguidance", scale, "--out", path])
            assert f", weak DDPM from {weak}" in capsys.readouterr().out
            with Image.open(path) as image:
                assert image.text["autoguidance"] == f"{scale}.0"
                assert image.text["weak DDPM checksum"] != image.text["DDPM checksum"]
                images[len(prompt), scale] = image.tobytes()
        sample.main([*prompt, *options[:-2], "--out", "plain.png"])
        with Image.open("plain.png") as image:
            assert image.text["autoguidance"] == "1.0" and "weak DDPM checksum" not in image.text
            assert image.tobytes() == images[len(prompt), "1"]
    assert len(set(images.values())) == 6
    sample.main([*options, "--out", "own.png"])
    with Image.open("own.png") as image:
        assert float(image.text["autoguidance"]) == guide.METHODS["none"].autoguidance > 1
    with pytest.raises(cli.UserError, match="--weak is of no use with --method lookahead"):
        sample.main(["red bus", *options])   # whose own scale is 1
    sample.main(["red bus", *options, "--autoguidance", "0"])   # the weak one alone
    with pytest.raises(cli.UserError, match="--autoguidance is of no use with --method class"):
        sample.generate(sample.load_models(weak=weak), "red bus", method="classifier-free",
                        autoguidance=2.)
    for flags in (["--weak", weak], ["--autoguidance", "2"]):
        for mode in (["red bus", "--method", "unclip"], ["--variations", "car.png"]):
            with pytest.raises(cli.UserError, match=f"{flags[0]} is of no use (with|to) --"):
                sample.main([*mode, *FAST, *flags])
    with pytest.raises(cli.UserError, match="train.py ddpm --channels 16 --steps 2000 --out runs/"):
        sample.main(["red bus", *FAST, "--autoguidance", "2"])


def test_the_weak_ddpm_is_weaker_and_of_the_same_data(weak, tmp_path, monkeypatch, capsys):
    """The one of runs/ or the shipped one, if it was trained for fewer steps, on the same captions;
    a given one has only to be of the same data."""
    for folder in ("clip", "ddpm"):
        shutil.copytree(f"runs/{folder}", tmp_path / "runs" / folder)
    content = torch.load(weak, weights_only=True)
    monkeypatch.chdir(tmp_path)
    Path("runs/weak").mkdir()
    for steps, captions, used in ((2, 294, True), (4, 294, False), (2, 200, False)):
        torch.save({**content, "steps": steps, "captions": content["captions"][:captions]},
                   "runs/weak/weights.pt")
        models = sample.load_models()
        assert bool(models.weak) == used == ("weak DDPM from runs/weak" in models.description)
        assert used != ("runs/weak/weights.pt is not used" in capsys.readouterr().out)
        if captions == 294:
            assert sample.load_models(weak="runs/weak/weights.pt").weak
    with pytest.raises(cli.UserError, match="--weak runs/weak/weights.pt is for cars and does not"):
        sample.load_models(weak="runs/weak/weights.pt")
    assert sample.load_models(ddpm="runs/ddpm/weights.pt", method="none").weak is None


def test_classifier_free_needs_a_conditional_ddpm(here, capsys, all_new):
    """Which takes any prompt, also one of a new caption."""
    flags = [*FAST, "--method", "classifier-free", "--out", "free.png"]
    with pytest.raises(cli.UserError, match="knows no texts of this .* train.py ddpm --clip FILE"):
        sample.main(["red bus", *flags])
    flags += ["--ddpm", "runs/conditional/weights.pt"]
    for prompt in ("red bus", "a bus of bus"):
        sample.main([prompt, *flags])
        assert "classifier-free, scale 2" in capsys.readouterr().out


def test_the_condition_changes_the_image(here):
    """Of a conditional DDPM whose zero-initialised layers are random; scale 0 is unconditional."""
    models = sample.load_models(ddpm="runs/conditional/weights.pt")
    torch.manual_seed(0)
    for p in models.unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    options = {"n": 1, "steps": 2, "method": "classifier-free", "eta": 0., "recurrence": 1}
    red, blue, unconditional, none = (
        sample.generate(models, prompt, **options, **more)
        for prompt, more in (("red bus", {}), ("blue bus", {}), ("red bus", {"scale": 0.}),
                             (None, {})))
    assert not torch.equal(red, blue) and not torch.equal(red, none)
    assert torch.equal(unconditional, none)


# ---- unCLIP --------------------------------------------------------------------------------------

UNCLIP = [*"--upsampler upsampler/weights.pt --device cpu --out drawn.png".split()]


def render(path, index, size=32):
    Image.fromarray(cars.render(0, [index], size)[0][0]).save(path)


def test_an_image_by_way_of_its_embedding(here, capsys):
    """With the decoder of runs/, by the prior; 64 x 64 pixels, as that is the upsampler's size."""
    sample.main(["a red bus", "-n", "2", "--steps", "2", "--method", "unclip", *UNCLIP])
    assert "DDPM from runs/decoder/weights.pt" in capsys.readouterr().out
    with Image.open("drawn.png") as image:
        assert image.size == (2 + 66, 2 + 2 * 66) and image.text["method"] == "unclip"
        assert {"prior checksum", "upsampler checksum"} <= set(image.text)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_images_are_as_large_as_asked_for(here, size):
    """Upsampled as images that were sampled."""
    models = sample.load_models(upsampler="upsampler/weights.pt")
    options = dict(n=2, steps=2, recurrence=1)
    small = sample.generate(models, "red bus", size=16, **options)
    large = sample.generate(models, "red bus", size=size, **options)
    assert large.shape == (2, 3, size, size) and large.abs().max() <= 1
    with torch.no_grad():
        enlarged = small if size == 16 else unclip.upsample(
            models.upsampler, small, size, aug_level=unclip.SAMPLED_AUG_LEVEL)
    assert torch.equal(large, enlarged)
    assert sample.fill_in(sample.SamplingConfig(), models).size == 64
    with pytest.raises(cli.UserError, match="must be one of 16, 32, 64 with these models"):
        sample.generate(models, "red bus", size=48, **options)


def test_unclip_decodes_what_the_prior_draws(here, monkeypatch):
    """The condition is the best of two draws for the caption's text feature, at level 0."""
    models = sample.load_models(method="unclip")
    models.unet.cond_proj.weight.data.normal_()
    conds, forward = [], models.unet.forward
    monkeypatch.setattr(models.unet, "forward", lambda x, t, cond: (
        conds.append(cond) or forward(x, t, cond)))
    images = sample.generate(models, "red bus", method="unclip", n=3, steps=2, scale=1.)
    assert len(conds) == 2   # at guidance scale 1 the U-Net is evaluated once a step
    generators = [data.generator("sampling", 0, i) for i in range(3)]
    x_T = torch.stack([torch.randn(3, 16, 16, generator=g) for g in generators])
    k = models.captions.index("a red bus")
    text = guide.scale_features(models.text_features[[k] * 3])
    z = guide.scale_features(
        unclip.sample_prior(models.prior, text, generators, models.alpha_bar))
    assert torch.allclose(conds[0], torch.cat([z, torch.ones(3, 1)], dim=1), atol=1e-4)
    x_0 = tinyddpm.sample(tinyddpm.denoiser(models.unet, models.alpha_bar, conds[0]), x_T,
                          generators, models.alpha_bar, steps=2, eta=0.)
    assert torch.allclose(images, x_0, atol=1e-4)


def test_variations_hide_as_much_as_asked_for(here, monkeypatch):
    """Of the embedding of the image; all of it is no condition."""
    models = sample.load_models(method="unclip")
    conds, forward = [], models.unet.forward
    monkeypatch.setattr(models.unet, "forward", lambda x, t, cond: (
        conds.extend([] if cond is None else [cond]) or forward(x, t, cond)))
    x_0 = torch.rand(1, 3, 16, 16)
    config = sample.fill_in(sample.SamplingConfig(n=3, steps=1, method="unclip"), models)
    z = guide.scale_features(models.clip.encode_image(x_0))
    for vary in (0., .5, 1.):
        assert len(sample.variations(models, x_0, replace(config, vary=vary))) == 3
        cond = conds.pop()
        assert torch.allclose(cond[:, -1], torch.tensor(1 - vary))
        if vary == .5:   # sqrt(1 - s^2) times as much as of noise, each image with its own
            left = cond[:, :-1] - .75 * z
            assert 0.3 < left.std().item() / (.75 ** .5 * .5) < 3 and (left[0] != left[1]).all()
        else:
            assert torch.allclose(cond[:, :-1], (1 - vary) * z.expand(3, -1), atol=1e-4)


def test_images_are_decoded_by_the_settings_of_unclip(here):
    """Also if the config is that of another method."""
    models, x_0 = sample.load_models(method="unclip"), torch.rand(1, 3, 16, 16)
    images = [sample.variations(models, x_0, sample.SamplingConfig(n=2, steps=2, method=method))
              for method in ("unclip", "lookahead")]
    assert torch.equal(*images)


def test_batches_start_from_the_given_noise(models):
    """Each image from its own."""
    x_T = torch.randn(3, 3, 16, 16)
    config = sample.fill_in(sample.SamplingConfig(n=3, batch=2, method="none"), models)
    denoise = lambda x_t, t: 0.5 * x_t
    images = sample.sample_batches(models, lambda part, generators: denoise, config, x_T=x_T)
    assert torch.allclose(images, tinyddpm.sample(
        denoise, x_T, None, models.alpha_bar, config.steps, eta=0.), atol=1e-5)
    assert not torch.allclose(images[0], images[1], atol=0.1)


def test_ways_between_images_begin_and_end_at_them(here, monkeypatch):
    """Embeddings and noise of the first and the last image are those of the given ones; a text diff
    begins with the image's own embedding, and keeps its noise."""
    models, seen = sample.load_models(method="unclip"), []
    x_0 = torch.rand(2, 3, 16, 16)
    config = sample.fill_in(sample.SamplingConfig(n=5, method="unclip"), models)
    z = sample.embed(models, x_0)
    x_T = sample.invert(models, x_0, z)
    monkeypatch.setattr(sample, "invert", lambda models, x, its_z: x_T[:len(x)])
    monkeypatch.setattr(sample, "sample_batches", lambda models, make, config, x_T: seen.append(
        (make(slice(0, config.n), [torch.Generator()] * config.n), x_T)))
    monkeypatch.setattr(sample.unclip, "decoder_denoiser", lambda unet, ab, z, *others: z)
    sample.interpolate(models, x_0, config)
    sample.diff(models, x_0[:1], "a red bus", "a blue bus", config)
    (between, noise), (changed, same) = seen
    for given, path in ((z, between), (x_T, noise)):
        assert torch.allclose(path[[0, -1]], given, atol=1e-4)
    assert torch.allclose(changed[0], z[0], atol=1e-4)
    assert torch.allclose(same, x_T[:1].expand_as(same), atol=1e-6)
    red, blue = (models.text_features[models.captions.index(f"a {c} bus")][None]
                 for c in ("red", "blue"))
    assert torch.allclose(changed[-1:], unclip.text_diff(z[:1], red, blue, 0.5), atol=1e-4)


def test_images_from_images(here, capsys):
    """The given images come first, of an interpolation also last; any mode and size is read."""
    render("a.png", 1)
    render("b.png", 2, size=50)
    Image.open("a.png").convert("L").save("gray.png")
    for number, *mode in ((5, "--variations", "gray.png"), (6, "--interpolate", "a.png", "b.png"),
                          (5, "--diff", "a.png", "a red bus", "a blue bus"),
                          (5, "--edit", "a.png", "a blue bus", "--iterations", "2")):
        sample.main([*mode, "-n", "4", *UNCLIP])
        with Image.open("drawn.png") as image:
            pixels = np.asarray(image)
            assert image.size == (2 + 66 * number, 2 + 66)
            assert image.text[mode[0][2:]] == ", ".join(mode[1:]).partition(", --")[0]
        given = data.read_images(mode[1:2], 16)
        assert (pixels[2:66:4, 2:66:4] == data.to_uint8(given)[0]).all()
    assert "'a red bus' is read as" in capsys.readouterr().out


def test_the_way_from_one_prompt_to_another(here, monkeypatch):
    """Begins and ends at embeddings that the prior draws from the same noise; one x_T for all."""
    models, seen = sample.load_models(method="unclip"), []
    config = sample.SamplingConfig(n=5, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "decode", lambda models, z, x_T, config: seen.append((z, x_T)))
        sample.interpolate_texts(models, ["a red bus", "the blue bus"], config)
    (z, x_T), = seen
    k = [models.captions.index(f"a {colour} bus") for colour in ("red", "blue")]
    generators = [data.generator("sampling", 3, 0) for _ in k]
    ends = unclip.sample_prior(models.prior, guide.scale_features(models.text_features[k]),
                               generators, models.alpha_bar)
    assert torch.allclose(z[[0, -1]], guide.scale_features(ends), atol=1e-4)
    assert not torch.allclose(z[0], z[1], atol=1e-2)
    assert x_T.shape == (5, 3, 16, 16) and (x_T == x_T[0]).all() and 0.9 < x_T[0].std() < 1.1
    sample.main(["--interpolate", "a red bus", "a blue bus", "-n", "4", *UNCLIP])
    with Image.open("drawn.png") as image:
        assert image.size == (2 + 4 * 66, 2 + 66)
        assert image.text["interpolate"] == "a red bus, a blue bus"


def test_the_report_of_latent_has_its_iterations(here, capsys):
    sample.main("red bus|--method|latent|-n|1|--steps|2|--iterations|3|--device|cpu".split("|"))
    assert "(2 x 3 steps, latent, autoguidance 1) -> " in capsys.readouterr().out


def test_an_edit_begins_with_the_inverted_image(here, monkeypatch):
    """Of the unguided U-Net, noised in as many ways as there are images; so does no other method
    than latent, which is optimised for the prompt's caption and sampled with its own steps."""
    models, seen = sample.load_models(), []
    x_0 = torch.rand(1, 3, 16, 16)

    def optimize_x_T(denoise, log_p, x_start, generators, alpha_bar, steps, iterations, lr):
        seen.append((x_start, steps, iterations, lr))
        t = torch.ones(len(x_start), dtype=torch.long)
        assert torch.equal(denoise(x_0, t[:1]), plain(x_0, t[:1]))
        assert log_p(x_start, t, x_start).shape == (len(x_start),)
        return x_start + 1
    monkeypatch.setattr(guide, "optimize_x_T", optimize_x_T)
    plain = tinyddpm.denoiser(models.unet, models.alpha_bar)
    config = sample.SamplingConfig(n=3, batch=2, iterations=7)
    images = sample.edit(models, x_0, "a blue bus", config)
    x_T = torch.cat([x_start for x_start, *_ in seen])
    assert [(len(x), *others) for x, *others in seen] == [
        (2, 10, 7, guide.LR_EDIT), (1, 10, 7, guide.LR_EDIT)]
    for i in range(3):
        eps = torch.randn(1, 3, 16, 16, generator=data.generator("sampling", 0, i, 1))
        inverted = tinyddpm.invert(plain, x_0, eps, models.alpha_bar)
        assert torch.allclose(x_T[i:i + 1], inverted, atol=1e-3)
    drawn = tinyddpm.sample(plain, x_T + 1, None, models.alpha_bar, 10, eta=0.)
    assert torch.allclose(images, drawn, atol=1e-3)
    models.clip.config.noise_aware = False
    with pytest.raises(cli.UserError, match="--edit need a CLIP that was trained on noisy"):
        sample.edit(models, x_0, "a blue bus", config)


@pytest.mark.parametrize("arguments, message", [
    (["--variations", "nothing.png"], "nothing.png is no image that can be read: no such file"),
    (["--variations", "text.png"], "text.png is no image that can be read"),
    (["--diff", "car.png", "a red bus"], "expected 3 arguments"),
    (["--interpolate", "car.png"], "expected 2 arguments"),
    (["--diff", "car.png", "a red bus", "?!"], "has no letters or digits"),
    (["--variations", "car.png", "--vary", "2"], "--vary must be from 0 to 1, not 2.0"),
    (["red bus", "--variations", "car.png"], "exclude each other"),
    (["--diff", "car.png", "a red bus", "the red bus"], "are the same to CLIP; what should change"),
    (["--diff", "car.png", "a bus", "a van", "--eta", "1"], "--eta is of no use to --diff"),
    (["--diff", "car.png", "a bus", "a van", "-n", "1"], "--diff needs -n 2 or more"),
    (["--interpolate", "a bus", "a van", "-n", "1"], "--interpolate needs -n 2 or more"),
    (["--interpolate", "a St. Bernard", "?!"], "has no letters or digits"),
    (["red bus", "--vary", "0.5"], "--vary is of no use with --method lookahead"),
    (["--method", "lookahead"], "--method lookahead is of no use without a prompt"),
    (["red bus", "--method", "none"], "--method none is of no use to a prompt"),
    (["--scale", "3"], "--scale is of no use without a prompt"),
    (["red bus", "--prior", "none.pt"], "--prior is of no use with --method lookahead"),
    (["--diff", "car.png", "a bus", "a van", "--seed", "1"], "--seed is of no use to --diff"),
    (["--edit", "car.png", "a bus", "--scale", "1"], "--scale is of no use to --edit"),
    (["--edit", "car.png", "a bus", "--method", "x0"], "--method x0 is of no use to --edit"),
    (["red bus", "--method", "latent", "--eta", "1"], "--eta is of no use with --method latent"),
    (["red bus", "--iterations", "9"], "--iterations is of no use with --method lookahead"),
    (["--interpolate", "red bus", "car.png"], "red bus is no image that can be read: no such file"),
    (["--interpolate", "red bus", "?!"], "has no letters or digits"),
    (["red bus", "--method", "latent", "--iterations", "0"], "--iterations must be from 1"),
    (["--variations", "car.png", "--method", "x0"], "--method x0 is of no use to --variations"),
    (["--variations", "car.png", "--gif"], "--gif is of no use to --variations"),
    (["red bus", "--size", "17"], "--size must be one of 16 with these models, not 17"),
    (["--variations", "car.png", "--ddpm", "runs/ddpm/weights.pt"],
     "holds 'ddpm', but a checkpoint of kind 'decoder' is needed; train one"),
    (["--variations", "car.png", "--ddpm", "foreign.pt"], "the features of another CLIP"),
    (["red bus", "--method", "unclip", "--prior", "prior.pt"], "does not fit the other models"),
    (["red bus", "--upsampler", "large.pt"], "does not fit the other models"),
    (["red bus", "--method", "classifier-free", "--ddpm", "runs/decoder/weights.pt"],
     "this DDPM knows no texts")])
def test_mistakes_with_images_are_named(here, monkeypatch, capsys, arguments, message):
    """In one line."""
    render("car.png", 1)
    Path("text.png").write_text("no image")
    for source, name, change in (("runs/decoder", "foreign.pt", {"clip": 1}),
                                 ("runs/prior", "prior.pt", {"clip": 1}),
                                 ("upsampler", "large.pt", {"captions": ["a cat"]})):
        content = torch.load(f"{source}/weights.pt", weights_only=True)
        torch.save({**content, **change}, name)
    monkeypatch.setattr(sys, "argv", ["sample.py", *FAST, "-n", "2", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.run_command(sample.main)
    assert error.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments, message", [
    ("-n|0", "-n must be from 1 to"), ("-n|-3", "-n must be"), ("-n|x", "invalid int"),
    ("--steps|0", "--steps must be"), ("--steps|1001", "--steps must be"),
    ("--eta|2", "--eta must be"), ("--eta|nan", "--eta must be"),
    ("--recurrence|0", "--recurrence must be"), ("--batch|0", "--batch must be"),
    ("--seed|-1", "--seed must be"), ("a car|--interval|900|100", "--interval must be"),
    ("a car|--interval|0|100", "--interval must"), ("a car|--scale|nan", "--scale must be"),
    (" ", "no letters or"), ("\t&nbsp; ", "no letters or"), ("?!", "no letters or digits"),
    ("a car|--out|a.jpg", "end it in .png"), ("a car|--method|magic", "invalid choice: 'magic'"),
    ("a car|--colour", "unrecognized"), ("a car|--scale", "expected one argument"),
    ("a car|--clip|none.pt", "no file none.pt"), ("a car|--judge|none.pt", "no file none.pt"),
    ("a car|--clip|runs/ddpm/weights.pt", "holds 'ddpm'"),
    ("a car|--device|gpu7", "--device gpu7"), ("a car|--out|file/a.png", "file")])
def test_mistakes_are_named(here, monkeypatch, capsys, arguments, message):
    """In one line, with exit code 2."""
    Path("file").write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments.split("|")])
    with pytest.raises(SystemExit, match="2"):
        cli.run_command(sample.main)
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and message in error
    assert len(error.strip().splitlines()) == 1


# ---- class folders, end to end -------------------------------------------------------------------

def test_from_class_folders_to_an_image(tmp_path, monkeypatch, capsys):
    """They train all three models as they come; a prompt finds its class, and the judge of the same
    images is the one that is asked."""
    toys.write_class_folders(tmp_path / "photos", 120)
    monkeypatch.chdir(tmp_path)
    for kind, flags in toys.FLAGS.items():
        train.main(f"{kind} --data photos/ --steps 3 {flags}".split())
        out = capsys.readouterr().out
        assert out.startswith("judge: found" if kind == "judge" else "train: found")
        assert "2 captions (class folders); first three: " in out and "finished" in out
    sample.main("airplane -n 2 --steps 2 --device cpu".split())
    out, error = capsys.readouterr()
    assert "'a photo of an airplane'" in out and "among 2 captions" in out and not error
    assert "prompt accuracy by the judge: " in out and " of 2 (class " in out
    assert sample.load_models().captions == ["a photo of an airplane", "a photo of a fire truck"]


# ---- the shipped models --------------------------------------------------------------------------

@pytest.fixture
def shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # no runs/ here
    return sample.load_models()


def test_the_shipped_models_follow_the_prompt(shipped):
    """Of 16 images of "a white and red car" at least 14 are right by the judge, of 16 unguided ones
    at most 3."""
    judge_model, _ = sample.load_judge(cars.CAPTIONS)
    caption = "a white and red car"
    labels = torch.from_numpy(cars.caption_labels(cars.CAPTIONS.index(caption)))
    count = lambda x_0: int((judge.predict(judge_model, x_0) == labels).all(dim=1).sum())
    assert count(sample.generate(shipped, caption)) >= 14
    assert count(sample.generate(shipped, steps=25)) <= 3


def test_the_shipped_judge_recognises_rendered_cars(shipped):
    """And the shipped CLIP gives the captions of clean ones nearly all of its probability."""
    judge_model, content = sample.load_judge(cars.CAPTIONS)
    images, labels = cars.render(0, range(data.SPLITS["judge-test"],
                                          data.SPLITS["judge-test"] + 64), 32)
    x = data.to_float(images)
    assert (judge.predict(judge_model, x).numpy() == labels).all(axis=1).mean() > 0.95
    assert content["captions"] == shipped.captions == cars.CAPTIONS
    probs = shipped.clip.caption_probs(x, shipped.text_features)
    assert probs[range(64), cars.caption_index(labels)].mean() > 0.9


def test_the_shipped_clip_reads_english(shipped):
    """Prompts as people write them, pairs of words that never met in training, and all captions in
    phrasings that it never met."""
    prompts = {**english.PROMPTS, "a crimson lorry": ("truck", "red", "red"),
               "a navy coach": ("bus", "blue", "blue"), "silver minivan": ("van", "gray", "gray"),
               "emerald pickup": ("truck", "green", "green"),
               "ivory sedan": ("car", "white", "white")}
    labels = [[values[i] for values, i in zip(cars.ATTRIBUTES.values(), row)]
              for row in cars.caption_labels(np.arange(294))]
    for prompt, names in prompts.items():
        _, targets = sample.resolve_prompt(prompt, shipped)
        assert targets.tolist() == [all(name in (None, value) for name, value in zip(names, row))
                                    for row in labels], prompt
    known = torch.cat([shipped.text_features, shipped.partial_features])
    texts = list(map(tinyclip.normalize_prompt, sum(clip.held_out_phrasings(), [])))
    features = sample.encode_in_wordings(texts, shipped)                      # (20 * 294, E)
    found = (F.normalize(features, dim=1) @ F.normalize(known, dim=1).T).argmax(dim=1)
    correct = (found.view(-1, 294) == torch.arange(294)).float().mean(dim=1)  # (20,)
    assert correct.mean() > 0.95


def test_the_shipped_models_of_photographs(tmp_path, monkeypatch):
    """CLIP recognises what the U-Net draws for a class, with its text as the condition; they
    name no folder of the machine that trained them."""
    monkeypatch.chdir(tmp_path)
    paths = [sample.SHIPPED / f"photos/{name}.pt" for name in ("clip", "ddpm")]
    models = sample.load_models(*paths)
    assert models.condition == "text" and models.data == "./photos"
    x_0 = sample.generate(models, "horse", n=8, method="classifier-free", scale=2., steps=10)
    horse = models.captions.index("a photo of a horse")
    assert models.clip.caption_probs(x_0, models.text_features)[:, horse].mean() > 0.5
