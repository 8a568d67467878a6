"""Chapter 5: data sets, batches, and images on disk.

Images are uint8 (N, H, W, 3) in storage and float (N, 3, H, W) in [-1, 1] everywhere else;
`to_float` and `to_uint8` are the only way between the two. A data set is the built-in "cars"
(cars.py) or a folder of your own images, which infra/image_folders.py reads.

Shapes: N images (B in a batch), K captions, S templates, P partial captions, A attributes.
"""
import functools
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin

import cars
from infra import cache, checkpoint, cli, image_folders

CACHE = Path(os.environ.get("CLIP_DDPM_CACHE") or "cache").expanduser()   # of images and embeddings


# ---- images --------------------------------------------------------------------------------------

def to_float(images):
    """Convert stored images, (N, H, W, 3) uint8 numpy or torch -> (N, 3, H, W) float in [-1, 1]

    Only the order of the axes changes: in memory the channels stay last, which is faster.
    """
    if not torch.is_tensor(images):
        images = torch.from_numpy(np.array(images))   # a copy, as a memory map is read-only
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Convert (N, 3, H, W) float, clipped to [-1, 1] -> (N, H, W, 3) uint8 numpy"""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


PURPOSES = "sampling", "captions", "training", "dropout", "evaluation"


def generator(purpose, *entropy, device="cpu"):
    """Make a torch.Generator from a purpose, one of PURPOSES, and integers, such as "sampling",
    seed, index of the image. As many others, below 2^32, give unrelated random numbers, which
    `manual_seed(seed + index)` does not promise: image 1 of seed 0 would be image 0 of seed 1."""
    key = PURPOSES.index(purpose)
    sequence = np.random.SeedSequence(entropy, spawn_key=(key,) if key else ())
    return torch.Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


# ---- data sets -----------------------------------------------------------------------------------

class Dataset(NamedTuple):
    """N images with K different captions, each with A attributes, such as its colours.

    A caption names all attributes, a partial caption leaves some open. Each of S lists in templates
    writes all K captions, followed by P partial captions, in one way; in each step training draws
    one of the S ways for each. Two of the cars' 192 lists:
        "a red car", "a red and green car", ..., "a car with a red body", ..., "something"
        "an auto in red", "a red sedan, its roof is green", ..., "a red-bodied car", ..., "anything"
    and for a folder of classes "a photo of a cat", ...; "a cat", ...; "a picture of a cat", ...
    """
    name: str                     # "cars", or "./" and the folder's name
    images: np.ndarray            # (N, H, W, 3) uint8, perhaps memory-mapped
    caption_ids: np.ndarray       # (N,) int64, each image's index into captions
    captions: list                # K different captions
    templates: list               # S lists of K + P texts
    partial_true_of: np.ndarray   # (P, K) bool, the captions that each is true of; folders: P = 0
    caption_labels: np.ndarray    # (K, A) int64, the attributes that each caption names; its own
                                  # index, A = 1, if none is known
    attributes: dict              # name of attribute -> its values; empty if none is known
    report: str                   # one line: what was found

    @property
    def labels(self):
        """(N, A) int64, the attributes of each image"""
        return self.caption_labels[self.caption_ids]


# The first index of each split's cars. In a folder a hash of an object's name picks its split.
SPLITS = {"train": cars.TRAIN, "validation": cars.VALIDATION, "judge": cars.JUDGE_TRAIN,
          "judge-2": cars.JUDGE_2_TRAIN, "judge-test": cars.JUDGE_TEST}


def load(name, size, count, split="train"):
    """Load a split of a data set at size x size pixels -> Dataset; made once, then cached.

    name: "cars", of which the first `count` images are rendered, or a folder, of which all are
    read. UserError if the folder cannot be used. Uses all cores; where processes are spawned
    (Windows, macOS), a calling script needs the usual `if __name__ == "__main__":`.
    """
    if name != "cars":
        return _load_folder(name, size, split)
    if Path(name).is_dir():
        print("cars are the built-in ones; for the folder of this name write ./cars")
    return _load_cars(size, count, split)


def _load_cars(size, count, split):
    checksum = zlib.crc32(cars.render(0, range(12), 24)[0].tobytes())   # another if these change
    path = CACHE / f"cars-{checksum:08x}-{split}-{size}px-{count}.raw"
    indices = range(SPLITS[split], SPLITS[split] + count)
    images, caption_ids = cache.load_packed(indices, _render_cars, size, path)
    K = len(cars.CAPTIONS)
    # 192: with 64, CLIP reads fewer of the phrasings that it never met (experiments/LOG.md).
    return Dataset(
        "cars", images, caption_ids, cars.CAPTIONS, cars.descriptions(192), cars.PARTIAL_TRUE_OF,
        cars.caption_labels(np.arange(K)), cars.ATTRIBUTES,
        f"{split}: {count:,} images of the built-in cars, {K} captions")


def _render_cars(indices, size):
    images, labels = cars.render(0, indices, size)
    return images, cars.caption_index(labels)


def _load_folder(name, size, split):
    folder = Path(os.path.realpath(name))
    try:
        scan = image_folders.scan_folder(folder)
        indices = image_folders.split_indices(scan, split)
    except cli.UserError as error:
        raise cli.UserError(f"--data {name}: {error}") from None
    files = [scan.files[i] for i in indices]
    path = CACHE / f"images-{image_folders.fingerprint(files):08x}-{split}-{size}px.raw"
    images, numbers = cache.load_packed(files, image_folders.make_images, size, path)
    readable = np.flatnonzero(numbers >= 0)   # -1: cannot be read
    if not len(readable):
        raise cli.UserError(f"--data {name}: none of {len(files):,} images can be read, such as "
                            f"{files[0]}")
    captions, templates, caption_of_file = image_folders.captions_and_templates(scan)
    caption_ids = np.array([caption_of_file[indices[i]] for i in readable], np.int64)
    attributes = {"class": scan.classes} if scan.classes else {}
    labels = np.arange(len(captions), dtype=np.int64)[:, None]                # (K, A = 1)
    report = image_folders.report(scan, split, indices, readable, len(captions))
    low, high = images.min(), images.max()
    if high - low < 32:   # all black, or 12 bits in 16
        report += f"; all their values lie between {low} and {high} of 255: are the files right?"
    return Dataset(f"./{folder.name}", images, caption_ids, captions, templates,
                   np.empty((0, len(captions)), bool), labels, attributes, report)


def batch(dataset, seed, step, n, device="cpu", rank=0):
    """Draw n random images with replacement, a function of (seed, step, rank).

    -> x_0: (n, 3, H, W) in [-1, 1] on the device, indices: (n,) int64 numpy
    """
    indices = np.random.default_rng([seed, step, rank]).integers(len(dataset.images), size=n)
    return to_float(torch.from_numpy(dataset.images[indices]).to(device)), indices


def augment(x, flips, shift, cutout, generator):
    """Augment training images at random, against overfitting; x: (B, 3, H, W) -> the same shape

    flips: probability that an image is mirrored left to right; shift: pixels by which it is moved
    at most, to all sides, what is missing is mirrored in; cutout: side of a square that becomes
    gray, 0 (DeVries & Taylor 2017, arXiv 1708.04552); generator: on the device of x
    """
    B, _, H, W = x.shape
    if flips:
        mirrored = torch.rand(B, 1, 1, 1, generator=generator, device=x.device) < flips
        x = torch.where(mirrored, x.flip(3), x)
    randint = functools.partial(torch.randint, generator=generator, device=x.device)
    i, j, image = (torch.arange(n, device=x.device) for n in (H, W, B))
    if shift:
        padded = F.pad(x, (shift,) * 4, mode="reflect").permute(0, 2, 3, 1)   # (B, H', W', 3)
        corner = randint(2 * shift + 1, (2, B, 1, 1))
        x = padded[image[:, None, None], corner[0] + i[:, None], corner[1] + j].permute(0, 3, 1, 2)
    if cutout:
        rows, columns = (a - randint(len(a), (B, 1)) + cutout // 2 for a in (i, j))   # (B, H or W)
        inside = lambda offset: (0 <= offset) & (offset < cutout)
        x = x.masked_fill(inside(rows)[:, None, :, None] & inside(columns)[:, None, None], 0.)
    return x


# ---- image files ---------------------------------------------------------------------------------

def read_images(paths, size):
    """Read image files of any size and mode, cropped and area-averaged -> (N, 3, size, size)"""
    images = []
    for path in paths:
        try:
            images.append(image_folders.read_image(Path(path), size))
        except Exception as error:   # Pillow raises a dozen types
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise cli.UserError(f"{path} is no image that can be read: {reason}") from None
    return to_float(np.stack(images))


def image_grid(images, columns=8, gap=2, zoom=1):
    """Arrange (N, H, W, 3) uint8 in rows on white -> PIL Image; gap in pixels before the zoom"""
    N, H, W, _ = images.shape
    rows = math.ceil(N / columns)
    sheet = np.full((gap + rows * (H + gap), gap + columns * (W + gap), 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = image
    grid = Image.fromarray(sheet)
    return grid.resize((grid.width * zoom, grid.height * zoom), Image.Resampling.NEAREST)


def save_grid(path, images, columns=8, zoom=1, **metadata):
    """Write a grid as PNG; the metadata (prompt, seed, ...) becomes text fields of the file."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value).encode("utf-8", "replace").decode())
    with checkpoint.write_atomic(path) as file:
        image_grid(images, columns, zoom=zoom).save(file, "PNG", pnginfo=info)


def save_gif(path, frames, columns=4, zoom=2):
    """Write a list of (N, H, W, 3) uint8 as an endless GIF of grids, two seconds on the last."""
    images = [image_grid(frame, columns, zoom=zoom) for frame in frames]
    durations = [80] * (len(images) - 1) + [2000]   # milliseconds
    with checkpoint.write_atomic(path) as file:
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations,
                       loop=0)


if __name__ == "__main__":
    dataset = load("cars", size=32, count=256, split="validation")
    x_0, indices = batch(dataset, seed=0, step=0, n=16)
    caption = dataset.captions[dataset.caption_ids[indices[0]]]
    print(f"{len(dataset.images)} images, {len(dataset.captions)} captions; a batch is "
          f"{tuple(x_0.shape)} in [{x_0.min():.2f}, {x_0.max():.2f}], its first image {caption!r}")
    save_grid("out/batch.png", to_uint8(x_0), zoom=2)

# 256 images, 294 captions; a batch is (16, 3, 32, 32) in [-0.95, 1.00], its first image 'a blue and
# yellow jeep'
