"""Models and data sets small enough for tests."""
import numpy as np
from PIL import Image

import data

FLAGS = {   # of train.py
    "clip": "--images 64 --batch 8 --width 32 --layers 1 --heads 2 --text-width 32 "
            "--text-layers 1 --text-heads 2 --embed-dim 16 --image-size 16 --device cpu",
    "ddpm": "--images 64 --batch 8 --channels 16 --multipliers 1 2 --attention 1 --image-size 16 "
            "--device cpu",
    "decoder": "--images 64 --batch 8 --channels 16 --multipliers 1 2 --attention 1 "
               "--image-size 16 --device cpu --clip runs/clip/weights.pt",
    "prior": "--images 64 --batch 8 --width 32 --blocks 1 --device cpu "
             "--clip runs/clip/weights.pt",
    "upsampler": "--images 64 --batch 8 --channels 32 --blocks 1 --image-size 64 --device cpu "
                 "--ddpm runs/ddpm/weights.pt",
    "judge": "--images 64 --batch 8 --width 8 --image-size 16 --device cpu",
}
COLOURS, SIDES = ["red", "green", "blue"], ["left", "right"]


def squares(n, seed, size=16):
    """A data set of n black images with one coloured square: six captions, three texts that say
    less (each true of two captions), two attributes."""
    rng = np.random.default_rng(seed)
    labels = np.array([(colour, side) for colour in range(3) for side in range(2)])
    caption_ids, images = rng.integers(6, size=n), np.zeros((n, size, size, 3), np.uint8)
    for image, (colour, side) in zip(images, labels[caption_ids]):
        left = side * size // 2 + rng.integers(2)
        image[size // 4:3 * size // 4, left:left + size // 3, colour] = 255
    captions = [f"a {COLOURS[colour]} square on the {SIDES[side]}" for colour, side in labels]
    texts = captions + [f"a {colour} square" for colour in COLOURS]
    partial_true_of = labels[:, 0] == np.arange(3)[:, None]                      # (P = 3, K = 6)
    return data.Dataset("squares", images, caption_ids, captions,
                        [texts, [text.removeprefix("a ") for text in texts]], partial_true_of,
                        labels,
                        {"colour": COLOURS, "side": SIDES}, f"{n} squares, seed {seed}")


def write_class_folders(folder, count):
    """Write `count` images of each of two classes that their colours tell apart."""
    for name, colour in (("fire_truck", (200, 0, 0)), ("airplane", (0, 0, 200))):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (20, 16), tuple(min(255, c + i) for c in colour))
            image.save(folder / name / f"{i}.png")
