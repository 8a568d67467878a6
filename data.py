"""Chapter 1c: pictures and words on disk. Data sets, batches, grids, GIFs, checkpoints, and what
all commands share: errors and devices.

Files and devices are dealt with here, so that the chapters after this one are about mathematics
alone. Pictures are uint8 (N, H, W, 3) in storage and float (N, 3, H, W) in [-1, 1] everywhere else;
`to_float` and `to_uint8` are the only way across.
"""
import argparse
import functools
import math
import os
import sys
import timeit
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import cars
import folders
import packing

CACHE = Path("cache")   # rendered data sets, in the folder where the command runs


class UserError(Exception):
    """Something that a user can mend: the commands print it in one line and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, with errors like all others: in one line."""

    def error(self, message):
        raise UserError(f"{message}; -h explains")


def check_range(name, value, low, high):
    """UserError unless low <= value <= high; NaN is refused too."""
    if not low <= value <= high:
        raise UserError(f"{name} must be from {low} to {high}, not {value}")


def check_drawing(args):
    """UserError unless pictures can be drawn with these --steps, --eta and so on."""
    for name, low, high in (("steps", 1, 1000), ("eta", 0, 1), ("recurrence", 1, 100),
                            ("batch", 1, 10_000), ("seed", 0, 2 ** 63 - 1)):
        check_range(f"--{name}", getattr(args, name), low, high)
    if args.interval and not 1 <= args.interval[0] <= args.interval[1] <= 1000:
        raise UserError("--interval must be two times LO <= HI from 1 to 1000, not "
                        f"{args.interval[0]} {args.interval[1]}")


def command(main):
    """Run main() as the file at hand is run by a user, and leave Python as shells expect it."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (UserError, OSError) as error:   # OSError: a full disk, a folder that is not ours
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except (torch.OutOfMemoryError, MemoryError):
        print(f"{name}: memory is full; try a smaller --batch, or, in training, "
              "--accumulate 2", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# ---- where to compute ----------------------------------------------------------------------------

def pick_device(name="auto"):
    """A name, or "auto" for the first that exists of cuda, mps, cpu -> torch.device."""
    if name == "auto":
        exists = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                  "cpu": True}
        name = next(kind for kind in exists if exists[kind])
    try:
        torch.empty(1, device=name)   # torch knows more names than this machine has devices
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def bf16_is_fast(device):
    """Whether this device computes faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_is_fast_in_bf16()


def autocast(device, bf16=None):
    """A context: bfloat16 for matrix products and convolutions, or float32.

    bf16: None is for bfloat16 where it is faster. Never float16: its largest number is 65504, which
    gradients and losses can exceed.
    """
    bf16 = bf16_is_fast(device) if bf16 is None else bf16
    # cache_enabled would keep a copy of whatever is differentiated by, such as each x_t of a guided
    # trajectory, until the command ends; weights are cast once a step either way.
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


@functools.cache
def cpu_is_fast_in_bf16():
    """Measured, because names mislead: among CPUs that say "AVX512-BF16" one multiplies matrices
    five times faster in it than in float32, and another one slower (RESULTS.md)."""
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    # In turns and often, and the least counts: what else is running must not change the answer.
    rounds = [[timeit.timeit(lambda: m @ m, number=1) for m in matrices] for _ in range(40)]
    single, half = map(min, zip(*rounds))
    # Convolutions gain less than matrix products, and casting costs: a clear gain or none.
    return half < 0.6 * single


# ---- pictures ------------------------------------------------------------------------------------

def to_float(pictures):
    """(N, H, W, 3) uint8, numpy or torch -> (N, 3, H, W) float in [-1, 1].

    Only the axes' names change places: in memory the channels stay last, as convolutions like it.
    """
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """(N, 3, H, W) float in [-1, 1] -> (N, H, W, 3) uint8 numpy; what lies outside is clipped."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def generator(*entropy, device="cpu"):
    """A torch.Generator that is a function of some integers, such as (seed, index) or (seed, step).

    Neighbours have unrelated streams, which `manual_seed(seed + index)` does not promise: there
    picture 1 of seed 0 would even be picture 0 of seed 1. Zeros at the end do not count.
    """
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)


# ---- data sets -----------------------------------------------------------------------------------

class Dataset(NamedTuple):
    """N pictures with K different captions, each of which has A attributes, such as its colours."""
    name: str
    pictures: np.ndarray         # (N, H, W, 3) uint8, or the memory map of a file of just these
    caption_of: np.ndarray       # (N,) int64, each picture's index into captions
    captions: list               # K different captions
    spellings: list              # S lists of K texts: the ways to write each caption
    caption_labels: np.ndarray   # (K, A) int64, the truth behind each caption, by attribute
    attributes: dict             # name of attribute -> its possible values; empty if none is known
    report: str                  # a line: what was found

    @property
    def labels(self):
        """(N, A) int64, the truth about each picture."""
        return self.caption_labels[self.caption_of]


SPLITS = {"train": cars.TRAIN, "validation": cars.VALIDATION,
          "judge": cars.JUDGE_TRAIN, "judge-2": cars.JUDGE_2_TRAIN,
          "judge-test": cars.JUDGE_TEST}


def load(name, size, count, split="train", labels="balanced"):
    """A split of a data set, size x size pixels -> Dataset. Made once, then cached.

    name: "cars", of which it is the first `count` pictures, or a folder in one of the layouts of
    folders.py, of which it is all. labels: how often which car occurs, see cars.FREQUENCIES.
    UserError if the folder cannot be used.

    All cores take part; where they start by spawning (Windows, macOS), a script that calls this
    needs the usual `if __name__ == "__main__":`.
    """
    return _car_world(size, count, split, labels) if name == "cars" else _folder(name, size, split)


def _car_world(size, count, split, labels):
    world = zlib.crc32(cars.render(0, range(12), 24, labels)[0].tobytes())   # changed: a new name
    path = CACHE / f"cars-{world:08x}-{split}-{size}px-{count}.raw"
    first = SPLITS[split]
    draw = functools.partial(_render_some, labels=labels)
    pictures, caption_of = _packed(range(first, first + count), draw, size, path)
    shorter = [caption.removeprefix("a ") for caption in cars.CAPTIONS]   # as users write
    caption_labels = cars.caption_labels(np.arange(len(cars.CAPTIONS)))
    report = f"{split}: {count:,} pictures of the car world, {len(cars.CAPTIONS)} captions"
    return Dataset("cars", pictures, caption_of, cars.CAPTIONS, [cars.CAPTIONS, shorter],
                   caption_labels, cars.ATTRIBUTES, report)


def _render_some(indices, size, labels):
    """-> pictures, the indices of their captions. For packing.pack."""
    pictures, truth = cars.render(0, indices, size, labels)
    return pictures, cars.caption_index(truth)


def _packed(items, make, size, path):
    """What packing.pack makes, now or earlier -> pictures (N, size, size, 3), memory-mapped, and a
    number for each of the items, of which N are at least 0."""
    if not path.exists():
        packing.pack(items, make, size, path)
    numbers = np.load(path.with_suffix(".npy"))
    shape = (int((numbers >= 0).sum()), size, size, 3)
    if not shape[0]:   # an empty file cannot be mapped
        return np.empty(shape, np.uint8), numbers
    return np.memmap(path, np.uint8, "r", shape=shape), numbers


def _folder(name, size, split):
    folder = Path(name).resolve()
    try:
        listing = folders.find(folder)
        rows = folders.part_of(listing, split)
    except folders.Unusable as problem:
        raise UserError(f"--data {name}: {problem}") from None
    files = [listing.files[i] for i in rows]
    path = CACHE / f"pictures-{folders.fingerprint(files):08x}-{split}-{size}px.raw"
    pictures, numbers = _packed(files, folders.read_some, size, path)
    good = np.flatnonzero(numbers >= 0)   # which of the files are among the pictures
    if not len(good):
        raise UserError(f"--data {name}: none of {len(files):,} pictures can be read, such as "
                        f"{files[0]}")
    captions, spellings, caption_of_file = folders.captions(listing)
    caption_of = np.array([caption_of_file[rows[i]] for i in good], np.int64)
    attributes = {"class": listing.classes} if listing.classes else {}
    classes = np.arange(len(captions), dtype=np.int64)[:, None]
    caption_labels = classes[:, :len(attributes)]   # (K, 1), or (K, 0) if no classes are known
    return Dataset(folder.as_posix(), pictures, caption_of, captions, spellings, caption_labels,
                   attributes, folders.report(listing, split, rows, good, len(captions)))


def without(dataset, pairs):
    """The cars that are not of two colours that pairs names, in either order, and their captions.

    pairs: such as "white+red,blue+yellow". UserError if it is nothing of the kind.
    """
    try:
        pairs = [{cars.COLOURS.index(colour.strip()) for colour in pair.split("+")}
                 for pair in pairs.split(",")]
    except ValueError as error:
        raise UserError(f"--hold-out: {error}; write white+red,blue+yellow") from None
    if dataset.name != "cars" or any(len(pair) != 2 for pair in pairs):
        raise UserError("--hold-out is about the car world, and each of its pairs about two "
                        "colours, such as white+red,blue+yellow")
    kept = np.array([set(map(int, labels[1:])) not in pairs for labels in dataset.caption_labels])
    rows, new_index = kept[dataset.caption_of].nonzero()[0], kept.cumsum() - 1
    some = lambda texts: [text for text, keep in zip(texts, kept) if keep]
    return dataset._replace(
        pictures=dataset.pictures[rows], caption_of=new_index[dataset.caption_of[rows]],
        captions=some(dataset.captions), spellings=[some(texts) for texts in dataset.spellings],
        caption_labels=dataset.caption_labels[kept],
        report=f"{dataset.report}; left by --hold-out: {len(rows):,}, {kept.sum()} captions")


def batch(dataset, seed, step, size, device="cpu", share=lambda rows: rows):
    """`size` random pictures, a function of (seed, step), drawn with replacement.

    -> x_0 (B, 3, H, W) in [-1, 1] on the device, their rows in the data set (B,) int64 numpy.
    share(rows) -> those of them that x_0 shall be of, where several processes share the batch.
    """
    rows = np.random.default_rng([seed, step]).integers(len(dataset.pictures), size=size)
    some = torch.from_numpy(_read(dataset.pictures, share(rows))).to(device)   # while still bytes
    return to_float(some), rows


def _read(pictures, rows):
    """pictures[rows]; those that are in a file are read from it, not through the memory map.

    Through the map each would come with its neighbours, twenty times as slowly if they are not in
    memory yet (RESULTS.md), and would count as memory of this process ever after.
    """
    in_file = isinstance(pictures, np.memmap)
    if not in_file or pictures.nbytes != os.path.getsize(pictures.filename):   # or in a part of one
        return pictures[rows]
    some = np.empty((len(rows), *pictures.shape[1:]), np.uint8)
    with open(pictures.filename, "rb", buffering=0) as file:
        for picture, row in zip(some, rows):
            file.seek(row * picture.nbytes)
            if file.readinto(picture) < picture.nbytes:
                raise OSError(f"{pictures.filename} has become shorter")
    return some


# ---- grids and GIFs ------------------------------------------------------------------------------

def grid(pictures, columns=8, gap=2, zoom=1):
    """(N, H, W, 3) uint8 -> one Image, row by row, on white, `gap` pixels apart before the zoom."""
    N, H, W, _ = pictures.shape
    rows = math.ceil(N / columns)
    sheet = np.full((gap + rows * (H + gap), gap + columns * (W + gap), 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = picture
    image = Image.fromarray(sheet)
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def save_grid(path, pictures, columns=8, zoom=1, **about):
    """Write a grid as PNG; `about` (prompt, seed, ...) goes into the file's own text fields."""
    info = PngImagePlugin.PngInfo()
    for key, value in about.items():
        info.add_itxt(key, str(value))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid(pictures, columns, zoom=zoom).save(path, pnginfo=info)


def save_gif(path, frames, columns=4, zoom=2, milliseconds=80):
    """frames: a list of (N, H, W, 3) uint8 -> an endless GIF of grids, two seconds on its last."""
    images = [grid(frame, columns, zoom=zoom) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


# ---- checkpoints ---------------------------------------------------------------------------------

def save_checkpoint(path, content):
    """One file of tensors and plain Python types. UserError if it cannot be written.

    It is written under another name, all the way to the disk, and then renamed, so that there is
    never half a checkpoint, whatever is killed or unplugged.
    """
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with packing.to_the_disk(temporary.open("wb")) as file:
            torch.save(content, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, kind):
    """-> the dictionary that save_checkpoint wrote, on the CPU.

    kind: "clip", "ddpm" or "judge", or "clip run" and so on for what a run goes on from.
    UserError if there is no such file, or it is of another kind.
    """
    advice = f"train one with: python train.py {kind.split()[0]} --fresh"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; {advice}") from None
    except Exception as error:   # torch raises a dozen types for damaged or foreign files
        reason = f"is not a readable checkpoint ({type(error).__name__})"
        raise UserError(f"{path} {reason}; {advice}") from None
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if found != kind:
        raise UserError(f"{path} holds {found!r}, but a checkpoint of kind {kind!r} is needed")
    return content


def fp16(model):
    """name -> parameter as a plain fp16 tensor, half the bytes: what a file that ships holds."""
    weights = model.state_dict()
    return {name: p.detach().half().cpu().contiguous() for name, p in weights.items()}


if __name__ == "__main__":   # what a batch is
    dataset = load("cars", size=32, count=256, split="validation")
    x_0, rows = batch(dataset, seed=0, step=0, size=16)
    first = dataset.captions[dataset.caption_of[rows[0]]]
    print(f"{len(dataset.pictures)} pictures, {len(dataset.captions)} captions; a batch is "
          f"{tuple(x_0.shape)} in [{x_0.min():.2f}, {x_0.max():.2f}], its first picture {first!r}")
    save_grid("out/batch.png", to_uint8(x_0), zoom=2)
