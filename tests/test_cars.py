"""The embedded data set: captions, reproducible images, and the ray cast against brute force."""
import random
import re

import numpy as np
import pytest

import cars
import conftest


def test_caption_index_and_caption_labels_are_inverse():
    index = np.arange(294)
    assert (cars.caption_index(cars.caption_labels(index)) == index).all()
    assert len(set(cars.CAPTIONS)) == 294


def test_order_of_colours_matters():
    red, white = cars.COLOURS.index("red"), cars.COLOURS.index("white")
    assert cars.caption(0, white, red) == "a white and red car"
    assert cars.caption(0, red, white) == "a red and white car"
    assert cars.caption(1, red, red) == "a red sports car"


# ---- English -------------------------------------------------------------------------------------

LABELS = [*cars.caption_labels(np.arange(294)).tolist(), *cars.PARTIAL]
RED, WHITE, BUS = cars.COLOURS.index("red"), cars.COLOURS.index("white"), cars.BODIES.index("bus")


@pytest.mark.parametrize("kind", cars.PHRASES)
def test_every_phrase_names_what_its_kind_names(kind):
    """With all of its braces filled in, whatever the articles, and no space too many."""
    phrases, colours = cars.PHRASES[kind], kind.removesuffix(" of something")
    assert len(set(phrases)) >= (24 if kind == "two colours" else 2)
    second = "red" if colours == "one colour" else "blue"
    named = {"two colours": {"red", "blue"}, "main": {"red"}, "second": {"blue"},
             "one colour": {"red"}, "neither": set()}[colours]
    for phrase in phrases:
        for seed in range(20):
            text = cars.fill(phrase, "bus", "red", second, random.Random(seed))
            assert re.fullmatch(r"[a-z]+((-|,? )[a-z]+)*", text), text
            words = set(re.findall(r"\w+", text))
            assert words & {"red", "blue", "None"} == named, text
            assert bool(words & {"bus", "buses"}) != kind.endswith(" of something")


def test_articles_and_plurals():
    """As English has them; a word that only begins or ends in an article keeps its form."""
    fill = lambda phrase, noun="van", main="red", seed=0: cars.fill(
        phrase, noun, main, "blue", random.Random(seed))
    for noun, plural in (("bus", "buses"), ("omnibus", "omnibuses"), ("coach", "coaches"),
                         ("lorry", "lorries"), ("4x4", "4x4s"), ("coupe", "coupes"),
                         ("people carrier", "people carriers"), ("van", "vans")):
        assert fill("{m} {N}", noun) == f"red {plural}"
    articles = {fill("{a} {m} {n}", "bus", "emerald", seed) for seed in range(20)}
    assert articles == {"an emerald bus", "the emerald bus", "this emerald bus", "emerald bus"}
    assert fill("a {n} in a {m} hue", "off-roader", "ivory") == "an off-roader in an ivory hue"
    assert fill("a {s}-roofed {n}") == "a blue-roofed van"
    assert fill("sea {m}", main="azure") == "sea azure"


def test_words_that_stand_apart_never_meet():
    """In 200 descriptions of each label that could bring them together; each is used by itself."""
    rng, noun_of, shade_of = random.Random(0), {}, {}
    for table, names in ((noun_of, cars.NOUNS), (shade_of, cars.SHADES)):
        table.update((word, name) for name in names for word in names[name].split(", "))
    for pair in cars.APART:
        (noun, shade), = [(a, b) for a in pair for b in pair if a in noun_of and b in shade_of]
        body, colour = cars.BODIES.index(noun_of[noun]), cars.COLOURS.index(shade_of[shade])
        texts = [cars.describe(*labels, rng) for labels in LABELS if labels[0] == body
                 and colour in labels[1:] for _ in range(200)]
        words = [set(re.findall(r"\w+", text)) for text in texts]
        assert len(texts) >= 200 * 13 and not any(pair <= each for each in words)
        assert all(sum(word in each for each in words) > 100 for word in pair)


def test_less_true_of_by_hand():
    """"a bus" is true of the 49 buses, "something red" of what has red as its main colour, "a white
    and red vehicle" of one caption of each body, "something" of all."""
    true_of = lambda *labels: {cars.CAPTIONS[k] for k in np.flatnonzero(
        cars.PARTIAL_TRUE_OF[cars.PARTIAL.index(labels)])}
    assert cars.PARTIAL_TRUE_OF.shape == (154, 294) == (len(cars.PARTIAL), 294)
    assert true_of(BUS, None, None) == {text for text in cars.CAPTIONS if text.endswith(" bus")}
    assert true_of(None, RED, None) == {text for text in cars.CAPTIONS if text.startswith("a red ")}
    assert true_of(None, WHITE, RED) == {f"a white and red {body}" for body in cars.BODIES}
    assert true_of(BUS, None, RED) == {"a red bus"} | {
        f"a {colour} and red bus" for colour in cars.COLOURS if colour != "red"}
    assert len(true_of(None, None, None)) == 294


def test_what_says_less_has_a_plain_text():
    """One that is different from those of all other labels, and of all captions."""
    for labels, text in (((BUS, None, None), "a bus"), ((None, RED, None), "something red"),
                         ((0, None, RED), "a car with a red roof"),
                         ((BUS, RED, None), "a bus with a red body"),
                         ((None, None, RED), "a vehicle with a red roof"),
                         ((None, WHITE, RED), "a white and red vehicle"),
                         ((None, RED, RED), "a red vehicle"), ((None, None, None), "something")):
        assert cars.partial_caption(*labels) == text
    texts = {cars.partial_caption(*labels) for labels in cars.PARTIAL}
    assert len(texts) == 154 and not texts & set(cars.CAPTIONS)


def test_descriptions_are_of_their_labels():
    """Each text names the body and colours that its label has, in any of their words, and no other
    colour; one list in four is plain; the same seed gives the same lists."""
    lists = cars.descriptions(9, seed=3)
    assert lists == cars.descriptions(9, seed=3) != cars.descriptions(9, seed=4)
    assert lists[0] == lists[4] == lists[8] == [
        *cars.CAPTIONS, *(cars.partial_caption(*labels) for labels in cars.PARTIAL)]
    assert len({tuple(texts) for texts in lists}) == 7
    word_of = {word: i for i, name in enumerate(cars.COLOURS)
               for word in [name, *cars.SHADES[name].split(", ")]}
    for (body, *colours), *texts in zip(LABELS, *lists, strict=True):
        nouns = [] if body is None else [name := cars.BODIES[body], *cars.NOUNS[name].split(", ")]
        for text in texts:
            named = {word_of[word] for word in re.findall(r"\w+", text) if word in word_of}
            assert named == set(colours) - {None}, text
            assert body is None or any(noun.rstrip("y") in text for noun in nouns), text


def test_no_text_has_two_meanings():
    """In all 192 lists, without punctuation and the first article, no text is of two labels."""
    label_of = {}
    for texts in conftest.ALL_DESCRIPTIONS(192):
        for label, text in zip(map(tuple, LABELS), texts):
            words = re.sub(r"^(a|an|the) ", "", " ".join(re.findall(r"\w+", text)))
            assert label_of.setdefault(words, label) == label, text
    assert len(label_of) > 50_000


# ---- images --------------------------------------------------------------------------------------

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
    labels = np.array([cars.scene(0, i)[1] for i in range(1200)])
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
    sines = np.array([-scene.forward[2] for scene in scenes])
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


def test_one_colour_is_exactly_the_same_paint():
    """A red car's roof has the red of its body; a red and blue car's has another paint."""
    for second, same in (("red", True), ("blue", False)):
        paints = cars.draw_paints("red", second, np.random.default_rng(0))
        assert (paints["main"] == paints["second"]).all() == same
        assert np.abs(paints["main"] - cars.PAINT["red"]).max() < .05
