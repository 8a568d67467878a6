import numpy as np
import pytest
import torch
from PIL import Image

import cars
import checkpoints
import data
import judge
import packing


def test_uint8_and_float_are_inverse():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    x = data.to_float(pictures)
    assert x.shape == (2, 3, 5, 7) and x.min() >= -1 and x.max() <= 1
    assert (data.to_uint8(x) == pictures).all()
    assert (data.to_uint8(torch.full((1, 3, 2, 2), 7.)) == 255).all()


def test_a_data_set_is_rendered_once_and_says_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    dataset = data.load("cars", 16, 230, "validation")
    pictures, labels = cars.render(
        0, range(data.SPLITS["validation"], data.SPLITS["validation"] + 230), 16)
    assert (isinstance(dataset.pictures, np.memmap) and (dataset.pictures == pictures).all()
            and (dataset.labels == labels).all())
    assert dataset.captions[dataset.caption_of[3]] == cars.caption(*labels[3])
    monkeypatch.setattr(packing, "pack", None)
    again = data.load("cars", 16, 230, "validation")
    assert (again.pictures == pictures).all()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_batch_is_a_function_of_seed_and_step(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    dataset = data.load("cars", 8, 100)
    x, rows = data.batch(dataset, 0, 7, 12)
    again, rows_again = data.batch(dataset, 0, 7, 12)
    assert torch.equal(x, again) and (rows == rows_again).all()
    assert ((data.batch(dataset, 0, 8, 12)[1] != rows).any()
            and (data.batch(dataset, 1, 7, 12)[1] != rows).any())
    assert (data.to_uint8(x) == dataset.pictures[rows]).all()


def test_generators_are_unrelated():
    draw = lambda *entropy: torch.randn(1000, generator=data.generator(*entropy))
    assert torch.equal(draw(0, 1), draw(0, 1))
    for other in ((1, 0), (0, 2), (1, 1), (2, 0)):
        assert abs(torch.corrcoef(torch.stack([draw(0, 1), draw(*other)]))[0, 1]) < 0.15


def test_grid_png_and_gif(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    data.save_grid(tmp_path / "a" / "grid.png", pictures, columns=3,
                   prompt="white and red car", seed=3)
    image = Image.open(tmp_path / "a" / "grid.png")
    assert image.text["prompt"] == "white and red car" and image.text["seed"] == "3"
    assert image.size == (3 * 8 + 2, 2 * 6 + 2)
    assert (np.asarray(image)[8:12, 2:8] == pictures[3]).all()
    data.save_gif(tmp_path / "a.gif", [pictures, pictures[::-1]], columns=3)
    assert Image.open(tmp_path / "a.gif").n_frames == 2


def test_checkpoints_are_plain_and_checked(tmp_path):
    path = tmp_path / "x.pt"
    data.save_checkpoint(path, {"kind": "clip", "w": torch.arange(3.), "note": ["a", 1, 2.5, None]})
    assert torch.equal(data.load_checkpoint(path, "clip")["w"], torch.arange(3.))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    for damage, message in ((None, "clip"), (path.read_bytes()[:200], "readable"),
                            (b"", "readable"), (np.random.default_rng(0).bytes(999), "readable")):
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(data.UserError, match=message):
            data.load_checkpoint(path, "ddpm" if damage is None else "clip")
    with pytest.raises(data.UserError, match="train.py ddpm"):
        data.load_checkpoint(tmp_path / "none.pt", "ddpm")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    data.save_checkpoint(path, {"kind": "clip"})
    before = path.read_bytes()
    with pytest.raises(Exception):
        data.save_checkpoint(path, {"kind": "clip", "bad": lambda: 0})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_models_that_do_not_fit_are_refused_by_name():
    clip = {"data": "cars", "schedule": "cosine", "config": {"image_size": 32, "T": 1000},
            "captions": ["a", "b"]}
    checkpoints.check_fit(clip, dict(clip))
    checkpoints.check_fit(clip, {**clip, "captions": ["b"]})   # one was held out: no harm
    for key, value in (("data", "photos"), ("schedule", "linear"),
                       ("config", {"image_size": 64, "T": 1000}), ("captions", ["a", "c"])):
        with pytest.raises(data.UserError, match="image_size|data|schedule|captions"):
            checkpoints.check_fit(clip, {**clip, key: value})


@pytest.fixture
def small_judge():
    """A judge, and the content of its checkpoint."""
    torch.manual_seed(0)
    config, attributes = judge.JudgeConfig(width=8), {"body": list("abcdef"), "main": list("xyz")}
    model = judge.Judge(config, {name: len(v) for name, v in attributes.items()}).eval()
    return model, {"kind": "judge", "config": vars(config), "data": "cars", "captions": ["a"],
                   "caption_labels": [[0, 0]], "attributes": attributes,
                   "weights": data.fp16(model)}


def test_fp16_weights_come_back(tmp_path, small_judge):
    model, content = small_judge
    data.save_checkpoint(tmp_path / "judge.pt", content)
    back, _ = checkpoints.load_model(tmp_path / "judge.pt", "judge")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(back(x)["main"], model(x)["main"], atol=1e-2)


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c["weights"].pop("heads.main.bias"), "heads.main.bias"),
    (lambda c: c["weights"].update(more=torch.zeros(1)), "more"),
    (lambda c: c["weights"].update({"heads.main.bias": torch.zeros(4)}), "heads.main.bias"),
    (lambda c: c["config"].update(colour=1), "colour"),
    (lambda c: c.pop("captions"), "holds no 'captions'"),
    (lambda c: c.update(weights=None), "does not fit")])
def test_weights_that_do_not_fit_are_named(tmp_path, small_judge, spoil, message):
    """A missing, an extra and a misshapen tensor, and what else can be wrong inside."""
    _, content = small_judge
    spoil(content)
    data.save_checkpoint(tmp_path / "judge.pt", content)
    with pytest.raises(data.UserError, match=message) as error:
        checkpoints.load_model(tmp_path / "judge.pt", "judge")
    assert "\n" not in str(error.value)


class Evil:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return open, ("was-here", "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "clip", "note": Evil()}, tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="not a readable checkpoint"):
        data.load_checkpoint(tmp_path / "x.pt", "clip")
    assert not (tmp_path / "was-here").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    data.save_checkpoint(path, {"kind": "clip"})
    before = path.read_bytes()

    def full(content, to):
        to.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.UserError, match="cannot write .*No space left"):
        data.save_checkpoint(path, {"kind": "clip"})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]
