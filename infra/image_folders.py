"""Image folders with captions, in one of four layouts.

    SRN cars        cars_train/ID/rgb/*.png and cars.txt, its line i the caption of the i-th ID in
                    sorted order (an assumption: the file itself does not say)
    captions.csv    a table with the columns image (a path from the folder) and caption
    text files      image.png with its caption beside it in image.txt, at any depth
    class folders   CLASS/**/*.png, captioned "a photo of a CLASS"; also below train/, val/ and
                    test/, whose images are all put together and split anew

Several captions of an image, one per line or row, are alternative wordings. The layouts are tried
in this order; text files need captions for at least half as many images as lie in folders. A folder
is entered that stands alone, beside no image and no table, and holds folders or a table.
Any image that can be read becomes square RGB; what cannot be read is left out and reported.
"""
import contextlib
import csv
import errno
import io
import os
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from infra.cli import UserError

UNREADABLE = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}   # which Pillow alone cannot read
FORMATS = sorted({*Image.registered_extensions().values()} & {*Image.OPEN} - UNREADABLE)
EXTENSIONS = {extension for extension, kind in Image.registered_extensions().items()
              if kind in FORMATS}
MAX_PIXELS = 90_000_000   # to hold in memory at a time; of a JPEG, after it is made smaller
SPLIT_FOLDERS = "train training val valid validation dev eval test testing".split()   # no classes
TEMPLATES = ("a photo of {}", "{}", "a picture of {}", "a blurry photo of {}",
             "a close-up photo of {}", "a small photo of {}")   # of class names
SPLITS = {"train": range(8, 20), "validation": [0], "judge": range(2, 8), "judge-test": [1]}
# Errors of the machine's or the owner's: what cannot be read today may be readable tomorrow.
TRANSIENT = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}


class ImageFolder(NamedTuple):
    """N image files with captions."""
    layout: str
    files: list      # N paths
    texts: list      # for each file a list of its captions
    objects: list    # N names of what is shown: images of one object all go into one split
    classes: list    # the names of the classes, sorted, if the layout is class folders; else empty
    left_out: int    # number of images without a caption
    others: list     # names of files that are not images, nor captions of this layout


def scan_folder(folder):
    """Find the images and captions in a folder -> ImageFolder; UserError if there are none."""
    if not folder.is_dir():
        raise UserError("there is no such folder")
    inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
    folders = [path for path in inside if path.is_dir()]
    is_table = lambda path: path.name in ("captions.csv", "cars.txt")
    own = any(path.suffix.lower() in EXTENSIONS or is_table(path) for path in inside)
    if len(folders) == 1 and not own and any(   # a wrapper, not a single class
            path.is_dir() or is_table(path) for path in folders[0].iterdir()):
        inner = scan_folder(folders[0])
        beside = [path.name for path in inside if path.is_file()]
        return inner._replace(others=inner.others + beside)
    files = _files_in(folder)
    images = [(file, name) for file, name in files if file.suffix.lower() in EXTENSIONS]
    for layout, scan in LAYOUTS.items():   # the last one takes any image
        captioned = [image for image in scan(folder, images) if image[1]]
        in_folders = sum("/" in name for _, name in images)   # class folders would caption these
        found = len({file for file, *_ in captioned})
        if captioned and (layout != "text files" or found >= in_folders / 2):
            break
    else:
        layout = "images without captions"   # a DDPM needs none
        captioned = [(file, "", name) for file, name in images]
    if not captioned:
        others = f"; other files: {len(files):,}, such as {files[0][1]}" if files else ""
        raise UserError(f"there are no images in it{others}")
    texts, object_of = {}, {}
    for file, text, name in captioned:
        texts.setdefault(file, []).append(text)
        object_of[file] = name
    paths, texts, objects = list(texts), list(texts.values()), list(object_of.values())
    classes = sorted({name for name, in texts}) if layout == "class folders" else []
    texts = [[_fill(TEMPLATES[0], name)] for name, in texts] if classes else texts
    used = {"SRN cars": {folder / "cars.txt", folder / "cars_train" / "cars.txt"},
            "captions.csv": {folder / "captions.csv"},
            "text files": {file.with_suffix(".txt") for file, _ in images}}.get(layout, ())
    others = [name for file, name in files
              if file.suffix.lower() not in EXTENSIONS and file not in used]
    left_out = len({file for file, _ in images} - set(paths))
    return ImageFolder(layout, paths, texts, objects, classes, left_out, others)


# Each layout has a function: folder, its images (file, name) -> (file, text or "", object).
def _srn_cars(folder, images):
    root = folder / "cars_train" if (folder / "cars_train").is_dir() else folder
    objects = sorted(path.parent.name for path in root.glob("*/rgb"))
    if not objects:
        return []
    lines = (_text_of(folder / "cars.txt") or _text_of(root / "cars.txt")).splitlines()
    if not lines:
        raise UserError("there are objects as in SRN cars, but no cars.txt with their captions")
    if len(lines) != len(objects):
        raise UserError(f"cars.txt has {len(lines):,} lines for {len(objects):,} objects")
    text_of = {root / name / "rgb": (line.strip(), name) for name, line in zip(objects, lines)}
    return [(file, *text_of[file.parent]) for file, _ in images if file.parent in text_of]


def _captions_csv(folder, images):
    table = folder / "captions.csv"
    if not table.is_file():
        return []
    lines = io.StringIO(_text_of(table), newline="")
    reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
    try:
        columns = reader.fieldnames or ()
        for column in ("image", "caption"):
            if columns.count(column) != 1:
                raise UserError(f"captions.csv has {columns.count(column)} columns {column!r}; its "
                                f"first line has {', '.join(columns) or 'nothing'}")
        rows = []
        for row in reader:
            if any(row.get(None, ())):
                raise UserError(f"captions.csv, line {reader.line_num}, has more than "
                                f"{len(columns)} fields; put captions with commas in quotes")
            if row["image"]:
                rows.append((row["image"], (row["caption"] or "").strip()))
            elif row["caption"]:
                raise UserError(f"captions.csv, line {reader.line_num}, names no image")
    except csv.Error as error:
        raise UserError(f"captions.csv, near line {reader.line_num}: {error}") from None
    for name, _ in rows:
        if "\0" in name or os.path.normpath(name).split(os.sep)[0] in ("..", ""):
            raise UserError(f"captions.csv names {name!r}, which is outside of the folder")
    if not any(text for _, text in rows):
        raise UserError("captions.csv has no captions")
    return [(folder / name, text, name) for name, text in rows]


def _text_files(folder, images):
    lines = lambda file: filter(str.strip, _text_of(file.with_suffix(".txt")).splitlines())
    return [(file, line, name) for file, name in images for line in [*lines(file)] or [""]]


def _class_folders(folder, images):
    found, paths = [], [name.split("/")[:-1] for _, name in images]
    in_parts = all(path[0].lower() in SPLIT_FOLDERS for path in paths if path)
    for (file, name), path in zip(images, paths):
        if path and path[0].lower() in SPLIT_FOLDERS and (in_parts or len(path) > 1):
            path = path[1:]   # train/cat/1.png is a cat
        directory = next(iter(path), "")
        words = " ".join(directory.replace("_", " ").lower().split())   # "Polar__bear"
        found.append((file, words or directory.strip(), name))
    return found


LAYOUTS = {"SRN cars": _srn_cars, "captions.csv": _captions_csv, "text files": _text_files,
           "class folders": _class_folders}


def _files_in(folder):
    """-> (path, its name in the folder) of all files at any depth, sorted; not .name/ or .name

    Links are followed, but into each directory once: they may form a circle.
    """
    def fail(error):
        raise UserError(f"{error.filename} cannot be read: {error.strerror}")

    files, entered = [], set()
    for root, directories, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(root)) in entered:
            names = directories[:] = []
        entered.add(real)
        directories[:] = sorted((name for name in directories if not name.startswith(".")),
                                key=lambda name: (os.path.islink(Path(root, name)), name))
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return [(file, file.relative_to(folder).as_posix()) for file in sorted(files)]


def _text_of(path):   # "" if there is no such file
    try:
        return path.read_text("utf-8-sig") if path.is_file() else ""   # sig: editors may write it
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from None


def _fill(template, name):   # "a photo of {}", "airplane" -> "a photo of an airplane"
    return template.format(f"{'an' if name[0] in 'aeiou' else 'a'} {name}")


def captions_and_templates(image_folder):
    """-> captions: K texts, each image's first one, without duplicates (case and white space do not
    count); templates: S lists of K texts, all ways to write them; caption_ids: N of captions"""
    ways, firsts = {}, []
    for texts in image_folder.texts:
        first, *more = [" ".join(text.lower().split()) for text in texts]
        ways.setdefault(first, {first: 0}).update(dict.fromkeys(more))   # a set in order
        firsts.append(first)
    templates = [[_fill(template, name) for name in image_folder.classes] for template in TEMPLATES]
    if not image_folder.classes:
        ways = [list(ways[first]) for first in sorted(ways)]
        templates = [[w[s % len(w)] for w in ways] for s in range(max(map(len, ways)))]
    index_of = {text: i for i, text in enumerate(templates[0])}
    return templates[0], templates, [index_of[first] for first in firsts]


def split_indices(image_folder, split):
    """The indices of a split's files; UserError if there are none. A hash of the object's name
    picks one of 20 buckets: all its images go into one split, also when others join. Of fewer than
    100 objects some bucket could be empty: the hash's rank picks, and changes when others join."""
    hash_of = {name: zlib.crc32(os.fsencode(name)) for name in image_folder.objects}
    bucket = {name: number % 20 for name, number in hash_of.items()}
    if len(bucket) < 100:
        ranked = sorted(hash_of, key=lambda name: (hash_of[name], name))
        bucket = {name: rank * 20 // len(ranked) for rank, name in enumerate(ranked)}
    indices = [i for i, name in enumerate(image_folder.objects) if bucket[name] in SPLITS[split]]
    if not indices:
        raise UserError(f"{len(bucket):,} objects are too few: none of them belongs to the "
                        f"{split} split; at least 20 are needed")
    return indices


def report(image_folder, split, indices, readable, K):
    """Describe a split in one line; indices of its files, and which of these can be read."""
    text_of = {image_folder.objects[i]: image_folder.texts[i][0] for i in indices}
    first = ", ".join(f"{name}: {text!r}" for name, text in list(text_of.items())[:3])
    line = (f"{split}: found {len(text_of):,} objects, {len(readable):,} images, "
            f"{K:,} captions ({image_folder.layout}); first three: {first}")
    if image_folder.left_out:
        line += f"; {image_folder.left_out:,} images of the folder have no caption and are left out"
    if others := image_folder.others:
        line += f"; other files: {len(others):,}, such as {', '.join(others[:3])}"
    broken = [str(image_folder.files[i]) for i in np.delete(indices, readable)]
    if broken:
        names = ", ".join(broken[:3])
        line += f"; left out because they cannot be read: {len(broken):,}, such as {names}"
    return line.encode("utf-8", "replace").decode("utf-8")   # file names can hold any bytes


READER_VERSION = 4   # counts the changes of read_image, after which images have to be packed again


def fingerprint(files):
    """A number that changes with the files' names, sizes and times of change, and READER_VERSION"""
    stats = [path.stat() if os.path.exists(path) else None for path in files]
    return zlib.crc32(repr([READER_VERSION, *((str(path), stat and (stat.st_size, stat.st_mtime_ns))
                                      for path, stat in zip(files, stats))]).encode())


def read_image(path, size):
    """Read an image file: upright, on white, centre crop, area-averaged -> (size, size, 3) uint8"""
    with Image.open(path, formats=FORMATS) as image:
        kind = image.format
        image.draft(None, (4 * size, 4 * size))   # a JPEG may be decoded at 1/2, 1/4 or 1/8
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("the image is too large")
        with contextlib.suppress(Exception):   # damaged metadata, whatever Pillow raises for it
            image = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
        if image.mode[0] in "IF":   # 16 bits, or 0 to 1; convert() would clip these, not scale them
            levels, top = np.asarray(image, np.float32), 1 if image.mode == "F" else 65535
            if not 0 <= levels.min() <= levels.max() <= top or (
                    image.mode == "I" and kind not in ("PNG", "PPM")):   # these state it
                raise ValueError("the range of its values is unknown")
            image = Image.fromarray((levels * (255 / top)).round().astype(np.uint8))
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        if profile:
            mode = {"P": "RGB", "RGBA": "RGB", "LA": "L"}.get(image.mode, image.mode)
            with contextlib.suppress(Exception):   # a damaged profile, or of another mode
                image = ImageCms.profileToProfile(
                    image.convert(mode), io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                    outputMode="RGB")
        image = image.convert("RGB")
        if alpha:
            image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    method = Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.fit(image, (size, size), method))


def make_images(files, size):
    """Read files for cache.pack -> images: (n, size, size, 3) uint8; numbers: n times 0 or -1"""
    warnings.simplefilter("ignore")   # Pillow's, about files that it can read all the same
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = 10 * MAX_PIXELS   # where it warns, before a JPEG is made smaller
    images, numbers = np.zeros((len(files), size, size, 3), np.uint8), [0] * len(files)
    for i, file in enumerate(files):
        try:
            images[i] = read_image(file, size)
        except Exception as error:   # Pillow raises a dozen types for damaged files
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in TRANSIENT:
                raise
            numbers[i] = -1   # not readable
    return images, numbers
