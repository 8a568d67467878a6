import csv
from pathlib import Path

import numpy as np
import pytest

import cars


def test_caption_index_and_labels_are_inverse():
    index = np.arange(294)
    assert (cars.caption_index(cars.caption_labels(index)) == index).all()
    assert len(set(cars.CAPTIONS)) == 294


def test_order_of_colours_means_something():
    red, white = cars.COLOURS.index("red"), cars.COLOURS.index("white")
    assert cars.caption(0, white, red) == "a white and red car"
    assert cars.caption(0, red, white) == "a red and white car"
    assert cars.caption(1, red, red) == "a red sports car"


def test_a_picture_depends_on_its_seed_and_index_alone():
    pictures, labels = cars.render(3, [5, 900, 7], 24)
    again, labels_again = cars.render(3, [7], 24)
    assert (pictures[2] == again[0]).all() and (labels[2] == labels_again[0]).all()
    assert (cars.render(4, [7], 24)[0] != again).any()


def test_labels_are_balanced():
    labels = np.array([cars.scene(0, i)[1] for i in range(1200)])
    for column, values in zip(labels.T, (6, 7, 7)):
        share = np.bincount(column, minlength=values) / len(labels)
        assert abs(share - 1 / values).max() < 0.04


def brute_force(scene, size):
    """The same picture with no culling and no reciprocal depths: every ray against every plane,
    one after the other."""
    picture = np.ones((size, size, 3))
    for row in range(size):
        for column in range(size):
            u, v = (column + .5) * 2 / size - 1, 1 - (row + .5) * 2 / size
            ray, nearest = scene.forward + u * scene.right + v * scene.up, np.inf
            for solid in scene.solids:
                slope, gap = solid.normals @ ray, solid.offsets - solid.normals @ scene.eye
                entry, exit = -np.inf, np.inf
                for s, g, n in zip(slope, gap, solid.normals):
                    if s < 0 and g / s > entry:
                        entry, shade = g / s, .60 + .40 * (.5 + .5 * n @ cars.LIGHT)
                    if s > 0:
                        exit = min(exit, g / s)
                if 0 < entry < min(exit, nearest):
                    nearest, picture[row, column] = entry, scene.paints[solid.paint] * shade
    return picture


@pytest.mark.parametrize("index", [0, 1, 2])
def test_ray_cast_against_brute_force(index):
    scene, _ = cars.scene(0, index)
    fast = cars.ray_cast(scene, 20, samples=1)
    assert np.isfinite(fast).all()
    wrong = np.abs(fast - brute_force(scene, 20)).max(axis=2) > 1e-3
    assert wrong.mean() < 0.01      # a ray along an edge may go either way in single precision


def test_every_solid_is_closed_and_holds_its_vertices():
    for body in cars.BODIES:
        for solid in cars.build(body, np.random.default_rng(0)):
            assert (solid.vertices @ solid.normals.T <= solid.offsets + 1e-9).all()
            assert np.allclose(np.linalg.norm(solid.normals, axis=1), 1)
            # normals point to all sides
            assert np.linalg.norm(solid.normals.sum(axis=0)) < len(solid.normals)


def test_the_car_is_inside_the_picture():
    pictures, _ = cars.render(0, range(60), 32)
    border = np.concatenate([pictures[:, 0], pictures[:, -1],
                             pictures[:, :, 0], pictures[:, :, -1]], axis=1)
    assert (border.min(axis=(1, 2)) > 250).mean() > 0.9
    assert (pictures.min(axis=(1, 2, 3)) < 200).all()


def test_colours_are_where_the_caption_says():
    """In red and blue pictures there is red and blue, and next to nothing of green."""
    red, blue = cars.COLOURS.index("red"), cars.COLOURS.index("blue")
    found = 0
    for index in range(1500):
        scene, (body, main, second) = cars.scene(0, index)
        if (main, second) == (red, blue):
            picture = cars.ray_cast(scene, 32).reshape(-1, 3)
            strongest = picture.argmax(axis=1)[picture.max(axis=1) - picture.min(axis=1) > .3]
            share = np.bincount(strongest, minlength=3) / len(strongest)
            assert share[0] > .1 and share[2] > .05 and share[1] < .02
            found += 1
    assert found > 20


def test_shapenet_frequencies():
    """More than half are white cars; what counts as jeep or bus is half of each."""
    p = cars.FREQUENCIES["shapenet"]
    of = dict(zip(cars.CAPTIONS, p * 2151))
    assert p.sum() == pytest.approx(1) and (p > 0).sum() == 57
    assert of["a white car"] == pytest.approx(1117) and of["a black car"] == pytest.approx(3)
    assert of["a white jeep"] == of["a white bus"] == pytest.approx(147)
    labels = np.array([cars.scene(0, i, "shapenet")[1] for i in range(600)])
    white = cars.caption_index(labels) == cars.CAPTIONS.index("a white car")
    assert 0.46 < white.mean() < 0.58


def test_shapenet_counts_are_those_of_the_file():
    path = Path(cars.__file__).resolve().parent.parent / "shared/labels/shapenet_cars.csv"
    if not path.exists():
        pytest.skip(f"ShapeNet's captions are not here: {path}")
    with open(path, newline="", encoding="utf-8") as file:
        counts = {row["caption"]: int(row["objects"]) for row in csv.DictReader(file)}
    entries = (entry.split(" ", 1) for entry in " ".join(cars.SHAPENET.split()).split(", "))
    assert {f"a {name}": int(count) for count, name in entries} == counts
