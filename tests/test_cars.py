"""The embedded data set: captions, reproducible images, and the ray cast against brute force."""
import math

import numpy as np
import pytest

import cars


def test_caption_index_and_caption_labels_are_inverse():
    index = np.arange(294)
    assert (cars.caption_index(cars.caption_labels(index)) == index).all()
    assert len(set(cars.CAPTIONS)) == 294


def test_order_of_colours_matters():
    red, white = cars.COLOURS.index("red"), cars.COLOURS.index("white")
    assert cars.caption(0, white, red) == "a white and red car"
    assert cars.caption(0, red, white) == "a red and white car"
    assert cars.caption(1, red, red) == "a red sports car"


def test_image_is_a_function_of_seed_and_index():
    images, labels = cars.render(3, [5, 900, 7], 24)
    again, labels_again = cars.render(3, [7], 24)
    assert (images[2] == again[0]).all() and (labels[2] == labels_again[0]).all()
    assert (cars.render(4, [7], 24)[0] != again).any()


def test_images_are_those_the_weights_were_trained_on():
    """Labels and mean colours of four images: a random number more or less changes them."""
    images, labels = cars.render(0, range(4), 32)
    assert labels.tolist() == [[5, 4, 3], [3, 6, 6], [5, 0, 2], [3, 6, 6]]
    mean_colour = [[237.6, 231.6, 207.6], [208.6, 210.7, 211.3],
                  [222.4, 207.0, 214.6], [210.6, 213.7, 215.1]]
    assert images.mean(axis=(1, 2)) == pytest.approx(np.array(mean_colour), abs=.5)


def test_labels_are_uniform():
    labels = np.array([cars.draw_labels(np.random.default_rng(i)) for i in range(1200)])
    for column, values in zip(labels.T, (6, 7, 7)):
        fraction = np.bincount(column, minlength=values) / len(labels)
        assert abs(fraction - 1 / values).max() < 0.04


def test_scene_of_given_labels():
    """build_scene takes any labels; the same random numbers give the same car in another colour."""
    red, blue = cars.COLOURS.index("red"), cars.COLOURS.index("blue")
    a, b = (cars.build_scene(3, main, 4, np.random.default_rng(1)) for main in (red, blue))
    assert all((x.vertices == y.vertices).all() for x, y in zip(a.solids, b.solids, strict=True))
    assert (a.eye == b.eye).all() and (a.paints["second"] == b.paints["second"]).all()
    assert a.paints["main"].argmax() == 0 and b.paints["main"].argmax() == 2


def test_camera_heights_are_uniform_on_the_hemisphere():
    scenes = [cars.scene(0, i)[0] for i in range(300)]
    sines = np.array([math.sin(math.radians(cars.camera_height(scene))) for scene in scenes])
    assert sines.min() > .059 and sines.max() < .941 and abs(sines.mean() - .5) < .05
    assert all(scene.eye[2] > 0 for scene in scenes)


def brute_force(scene, size):
    """Render one ray per pixel: no bounding box, no 1/depth, every ray against every plane.

    -> (size, size, 3) float in [0, 1]
    """
    image = np.ones((size, size, 3))
    for row in range(size):
        for column in range(size):
            u, v = (column + .5) * 2 / size - 1, 1 - (row + .5) * 2 / size
            ray, nearest = scene.forward + u * scene.right + v * scene.up, np.inf
            for solid in scene.solids:
                slope, gap = solid.normals @ ray, solid.offsets - solid.normals @ scene.eye
                entry, exit = -np.inf, np.inf
                for s, g, n in zip(slope, gap, solid.normals):
                    if s < 0 and g / s > entry:
                        entry, light = g / s, .60 + .40 * (.5 + .5 * n @ cars.LIGHT)
                    if s > 0:
                        exit = min(exit, g / s)
                if 0 < entry < min(exit, nearest):
                    nearest, image[row, column] = entry, scene.paints[solid.paint] * light
    return image


@pytest.mark.parametrize("index", [0, 1, 2])
def test_ray_cast_against_brute_force(index):
    scene, _ = cars.scene(0, index)
    image = cars.ray_cast(scene, 20, samples=1)
    assert np.isfinite(image).all()
    wrong = np.abs(image - brute_force(scene, 20)).max(axis=2) > 1e-3
    assert wrong.mean() < 0.01      # a ray along an edge may go either way in single precision


def test_solids_are_closed_and_contain_their_vertices():
    for body in cars.BODIES:
        for solid in cars.build_car(body, np.random.default_rng(0)):
            assert (solid.vertices @ solid.normals.T <= solid.offsets + 1e-9).all()
            assert np.allclose(np.linalg.norm(solid.normals, axis=1), 1)
            # normals point to all sides
            assert np.linalg.norm(solid.normals.sum(axis=0)) < len(solid.normals)


def test_car_is_inside_the_image():
    images, _ = cars.render(0, range(60), 32)
    edges = images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]
    border = np.concatenate(edges, axis=1)
    assert (border.min(axis=(1, 2)) > 250).mean() > 0.9
    assert (images.min(axis=(1, 2, 3)) < 200).all()


def test_image_has_the_colours_of_its_caption():
    """A red and blue car has red and blue pixels, and next to no green ones."""
    red, blue = cars.COLOURS.index("red"), cars.COLOURS.index("blue")
    for i in range(24):
        scene = cars.build_scene(i % len(cars.BODIES), red, blue, np.random.default_rng(i))
        pixels = cars.ray_cast(scene, 32).reshape(-1, 3)
        channel = pixels.argmax(axis=1)[pixels.max(axis=1) - pixels.min(axis=1) > .3]
        fraction = np.bincount(channel, minlength=3) / len(channel)
        assert fraction[0] > .1 and fraction[2] > .05 and fraction[1] < .02
