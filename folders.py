"""Chapter 1a: pictures of your own. A folder, in one of four layouts, becomes one packed array.

    SRN cars        cars_train/ID/rgb/*.png and cars.txt, its line i the caption of the i-th ID in
                    sorted order (an assumption: the file itself does not say)
    captions.csv    a table with the columns image (a path from the folder) and caption
    text files      picture.png with its caption beside it in picture.txt, at any depth
    class folders   CLASS/*.png at any depth, captioned "a photo of a CLASS"

Folders of the world hold anything: grey, palette, transparent, 16-bit, rotated, odd-sized and
broken files. `read` makes a square RGB picture of what can be read; what cannot is left out.

Left out: archives, video, downloading.
"""
import csv
import errno
import io
import os
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
TEMPLATES = ("a photo of {}", "{}", "a picture of {}", "a blurry photo of {}",
             "a close-up photo of {}", "a small photo of {}")   # of class names; the first is shown


class Unusable(Exception):
    """A folder that holds no captioned pictures; its text says why."""


class Listing(NamedTuple):
    """What a folder holds: N files, K captions."""
    layout: str
    files: list      # N paths
    texts: list      # N captions, one for each file
    objects: list    # N names of what is seen: the pictures of one object are never split
    classes: list    # the K names of the classes, sorted, if these are class folders; else empty
    left_out: int    # pictures without a caption


# ---- the four layouts ----------------------------------------------------------------------------

def find(folder):
    """-> the Listing of a folder; Unusable if it is in none of the layouts."""
    if not folder.is_dir():
        raise Unusable("there is no such folder")
    for layout in (srn_cars, captions_csv, text_files, class_folders):
        listing = layout(folder)
        if listing:
            return listing
    if pictures_in(folder):
        raise Unusable("there are pictures but no captions; put each class in a folder of its own, "
                       "or write captions.csv with the columns image and caption")
    raise Unusable("there are no pictures in it")


def pictures_in(folder):
    """All picture files below a folder, sorted, but for those that are hidden: .name/ or .name"""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    return sorted(path for path in paths
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def text_of(path):
    """The text of a file, with white space as it is."""
    try:
        return path.read_text("utf-8-sig")   # sig: editors and spreadsheets may begin with it
    except UnicodeDecodeError:
        raise Unusable(f"{path} is not UTF-8; save it as UTF-8") from None


def srn_cars(folder):
    root = folder / "cars_train" if (folder / "cars_train").is_dir() else folder
    objects = sorted(path.parent for path in root.glob("*/rgb"))
    if not objects:
        return None
    texts = [path for path in (folder / "cars.txt", root / "cars.txt") if path.is_file()]
    if not texts:
        raise Unusable("there are objects as in SRN cars, but no cars.txt with their captions")
    lines = text_of(texts[0]).splitlines()
    if len(lines) != len(objects):
        raise Unusable(f"cars.txt has {len(lines):,} lines for {len(objects):,} objects")
    every = [(path, line.strip(), seen.name) for seen, line in zip(objects, lines)
             for path in pictures_in(seen / "rgb")]
    views = [view for view in every if view[1]]
    if not views:
        return None
    return Listing("SRN cars", *map(list, zip(*views)), [], len(every) - len(views))


def captions_csv(folder):
    table = folder / "captions.csv"
    if not table.is_file():
        return None
    reader = csv.DictReader(io.StringIO(text_of(table), newline=""), strict=True,
                            skipinitialspace=True)
    try:
        for column in ("image", "caption"):
            if column not in (reader.fieldnames or ()):
                has = ", ".join(reader.fieldnames or ()) or "nothing"
                raise Unusable(f"captions.csv has no column {column!r}; its first line has {has}")
        rows = [(row["image"], (row["caption"] or "").strip()) for row in reader if row["image"]]
    except csv.Error as error:
        raise Unusable(f"captions.csv, near line {reader.line_num}: {error}") from None
    for image, _ in rows:
        if "\0" in image or not (folder / image).resolve().is_relative_to(folder):
            raise Unusable(f"captions.csv names {image!r}, which is outside of the folder")
    captioned = [row for row in rows if row[1]]
    if not captioned:
        raise Unusable("captions.csv has no captions")
    images, texts = map(list, zip(*captioned))
    return Listing("captions.csv", [folder / image for image in images], texts, images, [],
                   len(rows) - len(captioned))


def text_files(folder):
    every = pictures_in(folder)
    paths = [path for path in every if path.with_suffix(".txt").is_file()]
    texts = [" ".join(text_of(path.with_suffix(".txt")).split()) for path in paths]
    found = [(path, text, path.relative_to(folder).as_posix())
             for path, text in zip(paths, texts) if text]
    if not found:
        return None
    return Listing("text files", *map(list, zip(*found)), [], len(every) - len(found))


def class_folders(folder):
    every = pictures_in(folder)
    files = [path for path in every if path.parent != folder]
    if not files:
        return None
    names = [path.relative_to(folder).as_posix() for path in files]
    classes = [class_of(name.split("/")[0]) for name in names]
    return Listing("class folders", files, [photo_of(name) for name in classes], names,
                   sorted(set(classes)), len(every) - len(files))


def class_of(directory):
    """"Polar__bear" -> "polar bear" """
    return " ".join(directory.replace("_", " ").lower().split()) or directory


def photo_of(name, template=TEMPLATES[0]):
    """"airplane" -> "a photo of an airplane" """
    return template.format(f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


def captions(listing):
    """-> K different captions; the ways to write them, S lists of K texts; each file's own, N
    indices. Captions that differ in case or white space alone are one.
    """
    plain = [" ".join(text.lower().split()) for text in listing.texts]
    if listing.classes:
        spellings = [[photo_of(name, how) for name in listing.classes] for how in TEMPLATES]
    else:
        spellings = [sorted(set(plain))]
    index_of = {text: i for i, text in enumerate(spellings[0])}
    return spellings[0], spellings, [index_of[text] for text in plain]


# ---- who sees which pictures ---------------------------------------------------------------------

# Which of 20 equal parts of the objects belong to which split.
PARTS = {"train": range(5, 20), "validation": [0], "judge": range(2, 5), "judge-test": [1]}


def part_of(listing, split):
    """-> the rows of the listing that belong to a split; Unusable if none does.

    The object's name decides, so that all its views go the same way, today and when others join.
    """
    rows = [i for i, name in enumerate(listing.objects)
            if zlib.crc32(os.fsencode(name)) % 20 in PARTS[split]]
    if not rows:
        raise Unusable(f"{len(listing.files):,} pictures are too few: none of them falls to the "
                       f"{split} split")
    return rows


def report(listing, split, rows, good, K):
    """One line on a split. rows: of the listing; good: which of those can be read; K: how many
    different captions there are."""
    text_of_object = {}   # that of its first picture
    for i in rows:
        text_of_object.setdefault(listing.objects[i], listing.texts[i])
    first = ", ".join(f"{name}: {text!r}" for name, text in list(text_of_object.items())[:3])
    line = (f"{split}: found {len(text_of_object):,} objects, {len(good):,} pictures, "
            f"{K:,} captions ({listing.layout}); first three: {first}")
    if listing.left_out:
        line += f"; {listing.left_out:,} pictures of the folder have no caption and are left out"
    broken = sorted(set(range(len(rows))) - set(good.tolist()))
    if broken:
        names = ", ".join(str(listing.files[rows[i]]) for i in broken[:3])
        line += f"; left out because they cannot be read: {len(broken):,}, such as {names}"
    return line.encode("utf-8", "replace").decode("utf-8")   # names of files can be any bytes


def fingerprint(files):
    """A number that changes with the files: their names, sizes and times, missing ones too."""
    stats = (path.stat() if path.exists() else None for path in files)
    known = [(str(path), s and (s.st_size, s.st_mtime_ns)) for path, s in zip(files, stats)]
    return zlib.crc32(repr(known).encode())


# ---- reading -------------------------------------------------------------------------------------

def read(path, size):
    """A picture file -> (size, size, 3) uint8: upright, on white, its middle square, area-averaged.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):   # 16 bits; convert() would clip them, not scale them
            levels = np.asarray(image, np.float32).clip(0, 65535) / 257
            image = Image.fromarray(levels.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    shrinks = min(image.size) >= size
    how = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(image, (size, size), how))


# The machine's troubles, not the file's: what is read a minute later may be read well.
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def read_some(files, size):
    """-> pictures (n, size, size, 3) uint8; for each 0, or -1 if the file cannot be read."""
    warnings.simplefilter("ignore")   # Pillow's, on what it can read all the same,
    warnings.simplefilter("error", Image.DecompressionBombWarning)   # but of 90 million pixels
    pictures, numbers = np.zeros((len(files), size, size, 3), np.uint8), [0] * len(files)
    for i, file in enumerate(files):
        try:
            pictures[i] = read(file, size)
        except Exception as error:   # Pillow raises a dozen types for damaged files
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING:
                raise
            numbers[i] = -1
    return pictures, numbers


if __name__ == "__main__":   # a small folder of photographs, one of them broken, and what is found
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for i in range(60):
            path = Path(folder) / ("cat", "polar_bear")[i % 2] / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (40 + i, 30), (4 * i, 0, 0)).save(path)
        (Path(folder) / "cat" / "0.png").write_bytes(b"no picture")
        listing = find(Path(folder))
        for split in PARTS:
            rows = part_of(listing, split)
            _, numbers = read_some([listing.files[i] for i in rows], 32)
            good = np.flatnonzero(np.array(numbers) == 0)
            print(report(listing, split, rows, good, len(captions(listing)[0])))
