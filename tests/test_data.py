"""Data sets, batches, and images on disk."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cars
import data
import toys
from infra import cache, cli

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, with the cache in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- images --------------------------------------------------------------------------------------

@pytest.mark.parametrize("save", [
    data.save_grid, lambda path, images: data.save_gif(path, [images])], ids=["png", "gif"])
def test_a_full_disk_leaves_the_older_image(here, monkeypatch, save):
    def half(image, file, *args, **kwargs):
        file.write(b"half of it")
        raise OSError("No space left on device")

    Path("a.png").write_bytes(b"older")
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space"):
        save("a.png", np.zeros((1, 4, 4, 3), np.uint8))
    assert [path.name for path in here.iterdir()] == ["a.png"]
    assert Path("a.png").read_bytes() == b"older"


def test_to_uint8_is_the_inverse_of_to_float():
    """Every byte comes back; floats beyond [-1, 1] are clipped; channels stay last in memory."""
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    x = data.to_float(images)
    assert x.shape == (2, 3, 5, 7) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, data.to_float(torch.from_numpy(images)))
    assert (data.to_uint8(x) == images).all()
    assert data.to_float(np.array([[[[0, 255, 51]]]], np.uint8)).flatten().tolist() == (
        pytest.approx([-1, 1, -0.6]))
    assert (data.to_uint8(torch.full((1, 3, 2, 2), 7.)) == 255).all()
    assert (data.to_uint8(torch.full((1, 3, 2, 2), -7., dtype=torch.bfloat16)) == 0).all()


def test_generators_are_unrelated():
    """Neighbouring seeds and indices have streams without correlation, equal ones the same."""
    draw = lambda *entropy: torch.randn(1000, generator=data.generator(*entropy))
    one, *others = [draw("sampling", 0, 1), *(draw(purpose, *entropy) for purpose in data.PURPOSES
                    for entropy in ((0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 1, 1)))]
    assert torch.equal(others.pop(0), one)
    for other in others:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15


# ---- the built-in cars ---------------------------------------------------------------------------

def test_cars_have_the_captions_of_their_images(here, monkeypatch):
    """They are what cars.render makes of the split's indices, and are rendered once."""
    monkeypatch.setattr(data, "CACHE", Path("cache"))   # whatever $CLIP_DDPM_CACHE is
    dataset = data.load("cars", 16, 230, "validation")
    first = data.SPLITS["validation"]
    images, labels = cars.render(0, range(first, first + 230), 16)
    assert isinstance(dataset.images, np.memmap) and (dataset.images == images).all()
    assert (dataset.labels == labels).all()
    assert dataset.captions[dataset.caption_ids[3]] == cars.caption(*labels[3])
    assert dataset.captions == dataset.templates[0][:294] == cars.CAPTIONS
    K_and_P = len(cars.CAPTIONS) + len(dataset.partial_true_of)
    assert len(dataset.templates) == 16 and {*map(len, dataset.templates)} == {K_and_P}
    less = dict(zip(dataset.templates[0][294:], dataset.partial_true_of))
    assert [cars.CAPTIONS[k] for k in np.flatnonzero(less["a bus"])] == [
        caption for caption in cars.CAPTIONS if caption.endswith(" bus")]
    monkeypatch.setattr(cache, "pack", None)
    assert (data.load("cars", 16, 230, "validation").images == images).all()
    assert sorted(path.suffix for path in Path("cache").iterdir()) == [".npz", ".raw"]


def test_a_change_of_the_renderer_makes_other_files(here, monkeypatch):
    """Images of an older cars.py are not used again."""
    data.load("cars", 8, 3)
    render = cars.render
    monkeypatch.setattr(cars, "render", lambda *args: (255 - render(*args)[0], render(*args)[1]))
    dataset = data.load("cars", 8, 3)
    assert (dataset.images == 255 - render(0, range(3), 8)[0]).all()


def test_splits_of_the_cars_are_disjoint():
    """Ten million images of each split come before the next one begins."""
    assert sorted(data.SPLITS.values()) == [10_000_000 * i for i in range(5)]


def hashes(dataset):
    return {hash(image.tobytes()) for image in dataset.images}


def test_splits_of_the_cars_have_disjoint_images(here, monkeypatch):
    """By content: no model is tested, and no judge trained, on what another was trained on."""
    monkeypatch.setattr(cache, "load_packed", lambda items, make, size, path: make(items, size))
    found = [hashes(data.load("cars", 16, 12, split)) for split in data.SPLITS]
    assert len(found) == 5 and len(set.union(*found)) == sum(map(len, found)) == 60


def test_splits_of_a_folder_have_disjoint_images(here):
    """By content: each image of a folder is in one split."""
    rng = np.random.default_rng(0)
    for i in range(150):
        path = here / "many" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    found = [hashes(data.load("many", 8, 1, split)) for split in data.SPLITS if split != "judge-2"]
    assert len(set.union(*found)) == sum(map(len, found)) == 150
    assert len(found[0]) > 2 * len(found[2]) > 2 * len(found[1]) > 0   # train, validation, judge


def test_cars_where_workers_are_spawned(here):
    """As on Windows and macOS: rendering works from a script with the usual guard."""
    Path("script.py").write_text(f"""if __name__ == "__main__":
    import multiprocessing, sys
    sys.path.insert(0, {str(ROOT)!r})
    multiprocessing.set_start_method("spawn")
    import data
    print(len(data.load("cars", 8, 20).images))
""")
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert done.stdout == "20\n", done.stderr


# ---- folders -------------------------------------------------------------------------------------

def test_images_of_nearly_one_value_are_named(here):
    """All black, and 12 bits stored in 16: at most 15 of 255."""
    for i in range(40):
        Image.fromarray(np.full((16, 16), 4095 * (i % 2), np.uint16)).save(here / f"{i}.png")
    for i in range(40, 60):
        Image.new("RGB", (16, 16)).save(here / f"{i}.png")
    assert "all their values lie between 0 and 16 of 255: are the files right?" in (
        data.load(".", 8, 60).report)


def test_a_class_folder_is_a_data_set(here):
    """Each image has the caption of its class in all templates, and the class is its attribute;
    what cannot be read is left out."""
    toys.write_class_folders(here / "photos", 40)
    for i in range(0, 40, 3):
        (here / "photos" / "airplane" / f"{i}.png").write_bytes(b"damaged")
    dataset, other = (data.load("photos", 8, 5, split) for split in ("train", "judge"))
    assert "are the files right?" not in dataset.report
    assert dataset.name == "./photos" and len(dataset.images) > 30   # not 5
    assert dataset.captions == ["a photo of an airplane", "a photo of a fire truck"]
    assert dataset.templates[1] == ["an airplane", "a fire truck"]
    assert dataset.attributes == {"class": ["airplane", "fire truck"]}
    assert dataset.partial_true_of.shape == (0, 2) and dataset.partial_true_of.dtype == bool
    blue = dataset.images[..., 2] > dataset.images[..., 0]
    assert (blue.all(axis=(1, 2)) == (dataset.caption_ids == 0)).all()
    assert (dataset.labels == dataset.caption_ids[:, None]).all()
    assert "cannot be read" in dataset.report and dataset.report.startswith("train: found")
    images = lambda dataset: {image.tobytes() for image in dataset.images}
    assert not images(dataset) & images(other)


def test_captions_in_text_files_have_no_attributes(here):
    """So no judge can be trained; the only label of a caption is its own number."""
    for i in range(12):
        Image.new("RGB", (8, 8)).save(f"{i}.png")
        Path(f"{i}.txt").write_text(f"thing  {'AB'[i % 2]}")
    dataset = data.load(".", 8, 0)
    assert dataset.captions == ["thing a", "thing b"] and dataset.attributes == {}
    assert (dataset.labels[:, 0] == dataset.caption_ids).all() and len(dataset.images) > 0


@pytest.mark.parametrize("make, message", [
    (lambda: None, "--data photos: there is no such folder"),
    (lambda: Path("photos").mkdir(), "--data photos: "),
    (lambda: (Path("photos/a").mkdir(parents=True), Path("photos/a/1.png").write_bytes(b"")),
     "--data photos: (none of 1 images can be read|1 objects are too few)"),
    (lambda: (Path("photos/a").mkdir(parents=True),
              [Path(f"photos/a/{i}.png").write_bytes(b"") for i in range(50)]),
     r"--data photos: none of \d+ images can be read, such as .*\.png")])
def test_a_folder_that_cannot_be_used_is_one_line(here, make, message):
    """The flag is named, and what is wrong."""
    make()
    with pytest.raises(cli.UserError, match=message) as error:
        data.load("photos", 8, 0)
    assert "\n" not in str(error.value)


# ---- batches -------------------------------------------------------------------------------------

def test_a_batch_is_a_function_of_seed_step_and_rank(here):
    """Equal ones give the same images, any other seed, step or rank gives others."""
    dataset = data.load("cars", 8, 100)
    x_0, indices = data.batch(dataset, 0, 7, 12)
    again, indices_again = data.batch(dataset, 0, 7, 12)
    assert torch.equal(x_0, again) and (indices == indices_again).all()
    for seed, step, rank in ((1, 7, 0), (0, 8, 0), (0, 7, 1), (1, 6, 0), (0, 6, 1), (7, 0, 0)):
        assert (data.batch(dataset, seed, step, 12, rank=rank)[1] != indices).any()
    assert (data.to_uint8(x_0) == dataset.images[indices]).all()


def test_every_image_is_drawn_equally_often():
    """Of eight images each gets its eighth of 8,000 draws, within five standard errors."""
    dataset = toys.squares(8, seed=0)
    counts = np.bincount(data.batch(dataset, 0, 1, 8000)[1], minlength=8)
    assert len(counts) == 8 and abs(counts - 1000).max() < 5 * 30


def test_augmented_images_are_shifted_and_have_a_hole():
    """Each by its own shift, of at most as much as was asked for, in both directions; the hole is a
    square, which the edges may cut. Without either nothing changes."""
    augment = lambda x, *options: data.augment(x, *options, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    x = torch.rand(64, 3, 10, 14) + 1
    assert torch.equal(augment(x, 0., 0, 0), x)
    padded, found = F.pad(x, (2, 2, 2, 2), mode="reflect"), []
    for image, shifted in zip(padded, augment(x, 0., 2, 0)):
        fits = [(i, j) for i in range(5) for j in range(5)
                if torch.equal(image[:, i:i + 10, j:j + 14], shifted)]
        assert len(fits) == 1
        found += fits
    assert {i for i, _ in found} == {j for _, j in found} == set(range(5))
    hidden = augment(x, 0., 0, 4) == 0
    assert torch.equal(hidden.all(dim=1), hidden.any(dim=1))   # in all channels
    rows, columns = hidden[:, 0].any(dim=2).sum(dim=1), hidden[:, 0].any(dim=1).sum(dim=1)
    assert torch.equal(hidden[:, 0].sum(dim=(1, 2)), rows * columns)
    assert {int(n) for n in rows} == {int(n) for n in columns} == {2, 3, 4}
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in hidden[:, 0]}) > 32


# ---- grids and GIFs ------------------------------------------------------------------------------

def test_a_grid_has_every_image_at_its_place(tmp_path):
    """Row by row on white, and the metadata comes back from the file, in any script."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    path = tmp_path / "a" / "grid.png"
    data.save_grid(path, images, columns=3, prompt="white and red car, 赤い車", seed=3)
    with Image.open(path) as image:
        assert image.text["prompt"] == "white and red car, 赤い車" and image.text["seed"] == "3"
        assert image.size == (3 * 8 + 2, 2 * 6 + 2)
        pixels = np.asarray(image)
    assert (pixels[8:12, 2:8] == images[3]).all() and (pixels[2:6, 18:24] == images[2]).all()
    assert (pixels[8:, 18:] == 255).all() and (pixels[:2] == 255).all()
    large = np.asarray(data.image_grid(images, columns=3, zoom=2))
    assert (large == pixels.repeat(2, axis=0).repeat(2, axis=1)).all()


def test_a_gif_has_a_grid_for_every_frame(tmp_path):
    """It is endless, and rests on the last frame."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    data.save_gif(tmp_path / "a.gif", [images, images[::-1]], columns=3, zoom=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 2 and gif.size == (2 * 26, 2 * 14) and gif.info["loop"] == 0
        gif.seek(1)
        assert gif.info["duration"] == 2000
