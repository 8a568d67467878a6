"""Chapter 1: pictures and words on disk. Data sets, batches, grids, plots, GIFs and checkpoints.

Everything that touches a file is here, so that the other chapters are about mathematics alone.

Pictures are uint8 (N, H, W, 3) in storage and float (N, 3, H, W) in [-1, 1] everywhere else; `to_float` and `to_uint8`
are the only way across.
"""
import math
import multiprocessing
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import cars

CACHE = Path("cache")                                # rendered data sets, relative to where the command runs
SHIPPED = Path(__file__).resolve().parent / "weights"   # trained models that come with the source


class UserError(Exception):
    """Something that a user can mend: the commands print it in one line and exit with code 2."""


# ---- where to compute ---------------------------------------------------------------------------------------------

def pick_device(name="auto"):
    """"auto" is the first that exists of cuda, mps, cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def autocast(device):
    """bfloat16 for matrix products where the hardware has it, else float32; never float16, whose range losses overflow."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


# ---- pictures -----------------------------------------------------------------------------------------------------

def to_float(pictures):
    """(N, H, W, 3) uint8, numpy or torch -> (N, 3, H, W) float in [-1, 1], laid out channels-last as convolutions like it."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """(N, 3, H, W) float in [-1, 1] -> (N, H, W, 3) uint8 numpy; what lies outside is clipped."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def generator(*entropy, device="cpu"):
    """A torch.Generator that is a function of some integers, such as (seed, index of a picture) or (seed, step).

    Neighbouring integers give unrelated streams, which plain `manual_seed(seed + index)` does not promise.
    """
    state = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state)


# ---- data sets ----------------------------------------------------------------------------------------------------

class Dataset(NamedTuple):
    name: str
    pictures: np.ndarray     # (N, H, W, 3) uint8, memory-mapped: it may be larger than memory
    caption_of: np.ndarray   # (N,) int64, each picture's index into captions
    captions: list           # K different captions
    labels: np.ndarray       # (N, A) int64, the truth about each picture, one column per attribute
    attributes: dict         # name of attribute -> its possible values


SPLITS = {"train": cars.TRAIN, "validation": cars.VALIDATION, "judge": cars.JUDGE_TRAIN, "judge-test": cars.JUDGE_TEST}


def load(name, size, count, split="train"):
    """The first `count` pictures of a split at size x size, rendered on first use and cached -> Dataset."""
    if name != "cars":
        raise UserError(f"--data {name}: the only data set so far is 'cars'")
    source = zlib.crc32(Path(cars.__file__).read_bytes())   # a changed world is another world
    path = CACHE / f"cars-{source:08x}-{split}-{size}px-{count}.npy"
    if not path.exists():
        _render_all(path, SPLITS[split], size, count)
    pictures = np.load(path, mmap_mode="r")
    labels = np.load(path.with_suffix(".labels.npy"))
    return Dataset(name, pictures, cars.caption_index(labels), cars.CAPTIONS, labels, cars.ATTRIBUTES)


def _render_all(path, first, size, count, chunk=100):
    """All cores render, this process writes; the file takes its name only once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pictures = np.lib.format.open_memmap(temporary, "w+", np.uint8, (count, size, size, 3))
    labels = np.empty((count, 3), np.int64)
    starts = range(0, count, chunk)
    jobs = [(range(first + i, first + min(i + chunk, count)), size) for i in starts]
    with multiprocessing.Pool() as pool, tqdm(total=count, desc=f"rendering {path.stem}", unit="picture") as bar:
        for i, (some, truth) in zip(starts, pool.imap(_render_some, jobs)):
            pictures[i:i + chunk], labels[i:i + chunk] = some, truth
            bar.update(len(some))
    pictures.flush()
    np.save(path.with_suffix(".labels.npy"), labels)
    os.replace(temporary, path)


def _render_some(job):
    indices, size = job
    return cars.render(0, indices, size)


def batch(dataset, seed, step, size, device="cpu"):
    """`size` random pictures, a function of (seed, step) -> x_0 (B, 3, H, W) in [-1, 1], their rows in the data set (B,)."""
    rows = np.random.default_rng([seed, step]).integers(len(dataset.pictures), size=size)
    return to_float(torch.from_numpy(dataset.pictures[rows]).to(device)), rows


# ---- grids, GIFs and plots ----------------------------------------------------------------------------------------

def grid(pictures, columns=8, gap=2, zoom=1):
    """(N, H, W, 3) uint8 -> one Image, row by row, on white."""
    n, h, w, _ = pictures.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[y:y + h, x:x + w] = picture
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
    """frames: a list of (N, H, W, 3) uint8 -> an endless GIF of grids that rests on its last frame."""
    images = [grid(frame, columns, zoom=zoom) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def save_plot(path, curves, x_label, y_label, width=560, height=340):
    """curves: name -> (xs, ys), finite numbers -> a line plot as PNG. Axes span the data."""
    image, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    draw, (left, right, top, bottom) = ImageDraw.Draw(image), (56, width - 16, 26, height - 42)
    xs, ys = (np.concatenate([np.asarray(c[k], float) for c in curves.values()]) for k in (0, 1))
    spans = [(float(v.min()), float(v.max()) if v.max() > v.min() else float(v.min()) + 1) for v in (xs, ys)]
    at = lambda x, y: (left + (x - spans[0][0]) / (spans[0][1] - spans[0][0]) * (right - left),
                       bottom - (y - spans[1][0]) / (spans[1][1] - spans[1][0]) * (bottom - top))
    for f in np.linspace(0, 1, 5):
        x, y = (s[0] + f * (s[1] - s[0]) for s in spans)
        draw.line([at(x, spans[1][0]), at(x, spans[1][1])], "#e6e6e6")
        draw.line([at(spans[0][0], y), at(spans[0][1], y)], "#e6e6e6")
        draw.text((at(x, 0)[0], bottom + 5), f"{x:.4g}", "black", font, "ma")
        draw.text((left - 5, at(0, y)[1]), f"{y:.3g}", "black", font, "rm")
    draw.text(((left + right) / 2, height - 4), x_label, "black", font, "md")
    draw.text((6, 4), y_label, "black", font)
    palette = ["#c0392b", "#2c6fbb", "#2e8b57", "#8e44ad", "#d68910", "#555555"]
    for (name, (x, y)), colour, row in zip(curves.items(), palette * 9, range(99)):
        draw.line([at(a, b) for a, b in zip(x, y)], colour, 2)
        draw.text((right - 6, top + 6 + 16 * row), name, colour, font, "ra")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# ---- checkpoints --------------------------------------------------------------------------------------------------

def save_checkpoint(path, content):
    """One file of tensors and plain Python types, written beside its name and renamed: there is never half a checkpoint."""
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, kind):
    """-> the dictionary that save_checkpoint wrote, on the CPU. UserError if there is none, or it is not of this kind."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; train one with: python train.py {kind}") from None
    except Exception as error:   # torch raises a dozen types for damaged or foreign files
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}); train one with: python train.py {kind}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds {found!r}, but a checkpoint of kind {kind!r} is needed")
    return content


def fp16(model):
    """Parameters as plain fp16 tensors, half the bytes: what a file that ships holds."""
    return {name: p.detach().half().cpu().contiguous() for name, p in model.state_dict().items()}


def load_model(path, kind, build):
    """-> (model, content). build(content), such as tinyclip.from_checkpoint, makes the model; every name and shape must match."""
    content = load_checkpoint(path, kind)
    try:
        return build(content).eval().requires_grad_(False), content
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit its own config: {str(error).splitlines()[-1].strip()}") from None


def find_weights(clip=None, ddpm=None):
    """Where the two models are: as given, else both from runs/ if a CLIP and a DDPM were trained there, else the shipped ones."""
    trained = [Path("runs") / kind / "weights.pt" for kind in ("clip", "ddpm")]
    shipped = [SHIPPED / f"{kind}.pt" for kind in ("clip", "ddpm")]
    usual = trained if all(path.exists() for path in trained) else shipped
    return Path(clip or usual[0]), Path(ddpm or usual[1])


def check_fit(clip, ddpm):
    """Both contents of checkpoints. Guidance is meaningless if CLIP knows other pictures or other noise than the DDPM."""
    for name, a, b in (("data", clip["data"], ddpm["data"]), ("schedule", clip["schedule"], ddpm["schedule"]),
                       *((key, clip["config"][key], ddpm["config"][key]) for key in ("image_size", "T"))):
        if a != b:
            raise UserError(f"these CLIP and DDPM do not fit together: {name} is {a} for CLIP and {b} for the DDPM; train both alike")


if __name__ == "__main__":   # what a batch is
    dataset = load("cars", size=32, count=256, split="validation")
    x_0, rows = batch(dataset, seed=0, step=0, size=16)
    print(f"{len(dataset.pictures)} pictures, {len(dataset.captions)} captions; a batch is {tuple(x_0.shape)} "
          f"in [{x_0.min():.2f}, {x_0.max():.2f}], its first picture {dataset.captions[dataset.caption_of[rows[0]]]!r}")
    save_grid("batch.png", to_uint8(x_0), zoom=2)
