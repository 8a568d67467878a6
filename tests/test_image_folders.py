"""Image folders: the four layouts, and every kind of image that people keep in them."""
import errno
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from infra import cli, image_folders


def write(path, colour=(200, 30, 40), size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def load(folder, split, size=8):
    """A split as data.py makes it: its images, and the caption of each."""
    found = image_folders.scan_folder(folder)
    indices = image_folders.split_indices(found, split)
    captions, templates, caption_ids = image_folders.captions_and_templates(found)
    images, numbers = image_folders.make_images([found.files[i] for i in indices], size)
    readable = np.flatnonzero(np.array(numbers) >= 0)
    return SimpleNamespace(
        images=images[readable], captions=captions, templates=templates,
        caption_ids=np.array([caption_ids[indices[i]] for i in readable]), classes=found.classes,
        report=image_folders.report(found, split, indices, readable, len(captions)))


def all_splits(folder, size=8):
    """Those splits that are not empty -> {split: what load returns}"""
    splits = {}
    for split in image_folders.SPLITS:
        try:
            splits[split] = load(folder, split, size)
        except cli.UserError:   # a small folder leaves some splits empty
            pass
    return splits


def pairs(splits):
    """What belongs together, over all splits -> {red of the image: caption}"""
    return {int(red): s.captions[k] for s in splits.values()
            for red, k in zip(s.images[:, 4, 4, 0], s.caption_ids)}


def test_class_folders(tmp_path):
    for i in range(40):
        write(tmp_path / "airplane" / f"{i}.png", (10 + i, 0, 0))
        write(tmp_path / "fire_truck" / f"{i}.JPG", (0, 10 + i, 0))
    write(tmp_path / "no class.png")
    splits = all_splits(tmp_path)
    assert sum(len(s.images) for s in splits.values()) == 80
    train = splits["train"]
    assert train.captions == ["a photo of an airplane", "a photo of a fire truck"]
    assert train.classes == ["airplane", "fire truck"]
    red = train.images[:, 4, 4, 0] > train.images[:, 4, 4, 1]
    assert (train.caption_ids == np.where(red, 0, 1)).all()
    assert "2 captions (class folders); first three: airplane/" in train.report
    assert ": 'a photo of an airplane'" in train.report
    assert "1 images of the folder have no caption" in train.report
    assert len(train.templates) == 6 and all(len(texts) == 2 for texts in train.templates)


def test_names_of_class_folders_may_be_untidy(tmp_path):
    """Spaces for underscores, one of each; and what differs in case alone is one class."""
    for name in ("polar__bear", "Cat_", "cat", "_", "Å"):
        write(tmp_path / name / "a.png")
    found = image_folders.scan_folder(tmp_path)
    assert found.classes == ["_", "cat", "polar bear", "å"]
    captions, templates, caption_ids = image_folders.captions_and_templates(found)
    assert len(captions) == 4 and all(len(texts) == 4 for texts in templates)
    assert [[captions[i]] for i in caption_ids] == found.texts


def two_classes(folder, count=30):
    for name, color in (("cat", (200, 0, 0)), ("dog", (0, 200, 0))):
        for i in range(count):
            write(folder / name / f"{i}.png", color)


@pytest.mark.parametrize("beside", ["__MACOSX/x/._a.png", "README.md", "LICENSE"])
def test_a_wrapper_may_have_something_beside_it(tmp_path, beside):
    """Texts and folders of a zip program make it no class; what is no zip program's is counted."""
    two_classes(tmp_path / "photos")
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).write_bytes(b"a text")
    found = image_folders.scan_folder(tmp_path)
    assert found.classes == ["cat", "dog"] and found.others == [beside] * ("/" not in beside)


def test_a_folder_beside_train_is_a_class_of_its_own(tmp_path):
    """The classes below train/ stay classes."""
    two_classes(tmp_path / "train")
    write(tmp_path / "cover" / "a.png")
    assert image_folders.scan_folder(tmp_path).classes == ["cat", "cover", "dog"]


def test_one_text_of_many_lines_does_not_count_as_many(tmp_path):
    """A licence beside an image of one class is one text."""
    two_classes(tmp_path)
    (tmp_path / "cat" / "0.txt").write_text("a line\n" * 70)
    assert image_folders.scan_folder(tmp_path).classes == ["cat", "dog"]


@pytest.mark.parametrize("mode, color", [("LA", (100, 255)), ("L", 100)])
def test_gray_with_a_profile_is_gray(tmp_path, mode, color):
    """Transparent or not; a profile of sRGB changes nothing."""
    gray = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new(mode, (8, 8), color)
    image.paste((200, 0) if mode == "LA" else 100, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", icc_profile=gray)
    pixels = image_folders.read_image(tmp_path / "a.png", 8)
    assert abs(pixels[:, 4:].astype(int) - 100).max() <= 1
    assert (pixels[:, :4] == (255 if mode == "LA" else 100)).all()


@pytest.mark.parametrize("below", ["", "my photos", "my photos/train", "train"])
def test_class_folders_may_be_in_a_wrapper_or_in_parts(tmp_path, below):
    """A folder around them is entered; train, val and test are no classes."""
    two_classes(tmp_path / below)
    if "train" in below:
        two_classes(tmp_path / below.replace("train", "Test"), 5)
        write(tmp_path / below.removesuffix("train") / "preview.png")
    found = image_folders.scan_folder(tmp_path)
    assert found.classes == ["cat", "dog"] and len(found.files) == (70 if "train" in below else 60)
    (tmp_path / below / "truck").mkdir()
    write(tmp_path / below / "truck" / "0.png")
    assert "truck" in image_folders.scan_folder(tmp_path).classes


@pytest.mark.parametrize("layout", ["rows", "lines"])
def test_several_captions_of_an_image_are_ways_to_write_the_same(tmp_path, layout):
    """One a row or one a line: the first one is the caption, all are in its templates."""
    texts = {"a": ["a cat", "A  tabby", "an animal"], "b": ["a dog"], "c": ["A cat", "a kitten"]}
    for name in texts:
        write(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("\n \n".join(texts[name]) + "\n")
    if layout == "rows":
        rows = [f"{name}.png,{text}" for name in texts for text in texts[name]]
        (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    found = image_folders.scan_folder(tmp_path)
    captions, templates, caption_ids = image_folders.captions_and_templates(found)
    assert [path.stem for path in found.files] == ["a", "b", "c"] and found.left_out == 0
    assert captions == ["a cat", "a dog"] and caption_ids == [0, 1, 0]
    assert templates == [["a cat", "a dog"], ["a tabby", "a dog"], ["an animal", "a dog"],
                         ["a kitten", "a dog"]]


def test_train_may_be_a_class(tmp_path):
    """Where not all folders are parts of a data set."""
    for name in ("train", "bus"):
        write(tmp_path / name / "a.png")
    assert image_folders.scan_folder(tmp_path).classes == ["bus", "train"]


def test_a_few_text_files_do_not_count(tmp_path):
    """The class folders win, and the file is named, as a README is."""
    two_classes(tmp_path)
    for name in ("cat/0.txt", "README"):
        (tmp_path / name).write_text("a cat")
    found = image_folders.scan_folder(tmp_path)
    assert found.classes == ["cat", "dog"] and len(found.files) == 60
    assert found.others == ["README", "cat/0.txt"]
    line = image_folders.report(found, "train", [0], [0], 2)
    assert "other files: 2, such as README, cat/0.txt" in line


def test_images_that_a_table_does_not_name_are_counted(tmp_path):
    two_classes(tmp_path)
    (tmp_path / "captions.csv").write_text("image,caption\ncat/0.png,a cat\n..a.png,a dog")
    found = image_folders.scan_folder(tmp_path)
    assert found.layout == "captions.csv" and found.left_out == 59 and found.others == []


def test_only_part_of_srn_cars_is_used(tmp_path):
    """cars.txt has the captions of cars_train, however many other images there are."""
    for part, count in (("cars_train", 2), ("cars_test", 3)):
        for i in range(count):
            write(tmp_path / part / f"id{i}" / "rgb" / "0.png")
    (tmp_path / "cars.txt").write_text("a red car\na blue car")
    found = image_folders.scan_folder(tmp_path)
    assert found.layout == "SRN cars" and found.texts == [["a red car"], ["a blue car"]]
    assert found.left_out == 3


def test_links_are_followed(tmp_path):
    """To images, to folders, and into a circle only once; a table may name links too."""
    two_classes(tmp_path / "real")
    photos = tmp_path / "photos"
    (photos / "cat").mkdir(parents=True)
    (photos / "dog").symlink_to(tmp_path / "real" / "dog")
    (photos / "dog" / "circle").symlink_to(photos)
    for i in range(30):
        (photos / "cat" / f"{i}.png").symlink_to(tmp_path / "real" / "cat" / f"{i}.png")
    found = image_folders.scan_folder(photos)
    assert found.classes == ["cat", "dog"] and len(found.files) == 60
    (photos / "captions.csv").write_text(
        "image,caption\n" + "\n".join(f"cat/{i}.png,a cat {i % 2}" for i in range(30)))
    assert pairs(all_splits(photos)).keys() == {200}


def test_all_that_pillow_reads_is_read(tmp_path):
    """Endings that are less common; other files are counted and named."""
    for name in ("a.jfif", "b.jpe", "c.tga", "d.JPG"):
        write(tmp_path / "x" / "photo.jpg")
        (tmp_path / "x" / "photo.jpg").rename(tmp_path / "x" / name)
    (tmp_path / "x" / "e.mov").write_bytes(b"film")
    found = image_folders.scan_folder(tmp_path)
    assert [file.name for file in found.files] == ["a.jfif", "b.jpe", "c.tga", "d.JPG"]
    assert found.others == ["x/e.mov"]


def test_text_files(tmp_path):
    for i in range(30):
        write(tmp_path / "deep" / "er" / f"{i}.png", (8 * i, 0, 0))
        text = f"\ufeff  A thing\tnumber {i % 3} \n" if i % 2 else f"a  thing number {i % 3}"
        (tmp_path / "deep" / "er" / f"{i}.txt").write_text(text, "utf-8")
    write(tmp_path / "deep" / "without.png")
    write(tmp_path / ".hidden" / "a.png")
    (tmp_path / ".hidden" / "a.txt").write_text("unseen")
    splits = all_splits(tmp_path)
    assert splits["train"].captions == [f"a thing number {i}" for i in range(3)]
    assert pairs(splits) == {8 * i: f"a thing number {i % 3}" for i in range(30)}
    assert "1 images of the folder have no caption" in splits["train"].report
    (tmp_path / "deep" / "er" / "unused.txt").write_text("without an image")
    assert image_folders.scan_folder(tmp_path).others[0].endswith("unused.txt")


def test_captions_csv(tmp_path):
    rows = ["image, caption"]
    for i in range(30):
        write(tmp_path / "p" / f"{i}.png", (8 * i, 0, 0))
        rows.append(f'p/{i}.png, "one, two ""{i % 2}""\nthree"')
    rows += ["p/0.png,", ","]
    (tmp_path / "captions.csv").write_text("\n".join(rows), "utf-8-sig")
    assert pairs(all_splits(tmp_path)) == {8 * i: f'one, two "{i % 2}" three' for i in range(30)}
    write(tmp_path / "p" / "not named.png")
    assert image_folders.scan_folder(tmp_path).left_out == 1
    (tmp_path / "captions.csv").write_text("image,caption\n,of nothing\n")
    with pytest.raises(cli.UserError, match="captions.csv, line 2, names no image"):
        image_folders.scan_folder(tmp_path)


def test_objects_of_srn_cars_are_never_split(tmp_path):
    """A small copy of ShapeNet's layout: three views of each of 60 objects."""
    for i in range(60):
        for view in range(3):
            path = tmp_path / "cars_train" / f"id{i:03d}" / "rgb" / f"{view:06d}.png"
            write(path, (i, 80 * view, 0), (16, 16))
    captions = [f"a car of number {i}" for i in range(60)]
    (tmp_path / "cars.txt").write_text("\n".join(captions) + "\n")
    splits = all_splits(tmp_path, 16)
    ids = {split: s.images[:, 0, 0, 0] for split, s in splits.items()}
    for split, objects in ids.items():
        assert all((objects == i).sum() == 3 for i in set(objects.tolist()))
        for i, k in zip(objects.tolist(), splits[split].caption_ids):
            assert splits[split].captions[k] == captions[i]
    everything = [i for objects in ids.values() for i in set(objects.tolist())]
    assert sorted(everything) == list(range(60))
    n = len(set(ids["train"].tolist()))
    assert splits["train"].report.startswith(
        f"train: found {n} objects, {3 * n} images, 60 captions (SRN cars); first three: id0")


def test_reading(tmp_path):
    """Grey, palette, transparent, 16-bit, rotated and odd-sized images come out as viewers show
    them."""
    check = lambda name, colour, at=(4, 4): np.testing.assert_allclose(
        image_folders.read_image(tmp_path / name, 8)[at], colour, atol=3)
    write(tmp_path / "gray.png", 100, mode="L")
    check("gray.png", [100, 100, 100])
    Image.new("RGB", (9, 9), (255, 0, 0)).convert("P").save(tmp_path / "palette.png")
    check("palette.png", [255, 0, 0])
    write(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    check("clear.png", [255, 255, 255])
    Image.fromarray(np.full((9, 9), 51400, np.uint16)).save(tmp_path / "deep.png")
    check("deep.png", [200, 200, 200])
    (tmp_path / "deep.pgm").write_bytes(b"P5 9 9 65535 " + b"\xc8\xc8" * 81)
    check("deep.pgm", [200, 200, 200])
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("black", (0, 0, 20, 20))   # left half black
    exif = Image.Exif()
    exif[0x0112] = 6   # "turn me a quarter clockwise": the left half is then on top
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    check("turned.jpg", [0, 0, 0], (0, 4))
    check("turned.jpg", [255, 255, 255], (7, 4))
    write(tmp_path / "one.png", size=(1, 1))
    check("one.png", [200, 30, 40])
    write(tmp_path / "long.png", size=(20_000, 10))
    check("long.png", [200, 30, 40])


def test_ranges_of_values(tmp_path):
    """Floats from 0 to 1 are scaled; what has no known range is left out."""
    for name, value, kind in (("a", .8, np.float32), ("b", 50_000, np.float32),
                              ("c", np.nan, np.float32), ("d", 2 ** 30, np.int32)):
        Image.fromarray(np.full((9, 9), value, kind)).save(tmp_path / f"{name}.tif")
    images, numbers = image_folders.make_images([tmp_path / f"{c}.tif" for c in "abcd"], 8)
    assert numbers == [0, -1, -1, -1] and (images[0] == 204).all()


def test_colours_are_those_of_the_profile(tmp_path):
    """Those of a profile with red and green exchanged change; with sRGB's, or a damaged one, they
    stay."""
    image = Image.new("RGB", (8, 8), (0, 200, 50))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = srgb.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    for name, profile in (("srgb", srgb), ("damaged", b"profile"), ("swapped", other)):
        image.save(tmp_path / f"{name}.png", icc_profile=profile)
    pixel = lambda name: image_folders.read_image(tmp_path / f"{name}.png", 8)[4, 4].tolist()
    assert np.allclose(pixel("srgb"), (0, 200, 50), atol=2)
    assert pixel("damaged") == [0, 200, 50]
    image.convert("P").save(tmp_path / "palette.png", icc_profile=other)
    assert np.allclose(pixel("palette"), pixel("swapped"), atol=20)
    image.save(tmp_path / "clear.png", icc_profile=srgb, transparency=(0, 200, 50))
    assert pixel("clear") == [255, 255, 255]
    assert np.allclose(pixel("swapped"), (200, 0, 50), atol=2)   # red and green have changed places


def test_shrinking_averages(tmp_path):
    board = np.indices((16, 16)).sum(axis=0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    shrunk = image_folders.read_image(tmp_path / "board.png", 8)
    assert (abs(shrunk.astype(int) - 127.5) < 2).all()


def test_the_crop_is_the_center(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (10, 0, 30, 20))   # the middle square
    image.save(tmp_path / "a.png")
    assert (image_folders.read_image(tmp_path / "a.png", 8) == 0).all()


def test_broken_images_are_counted_and_named(tmp_path):
    for i in range(40):
        write(tmp_path / f"{i}.png", (6 * i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    found = image_folders.scan_folder(tmp_path)
    train = [found.files[i] for i in image_folders.split_indices(found, "train")]
    train[1].write_bytes(b"no image")
    train[2].write_bytes(train[2].read_bytes()[:60])
    splits = all_splits(tmp_path)
    good = [path for path in tmp_path.glob("*.png") if path not in train[1:3]]
    assert pairs(splits) == {6 * int(path.stem): f"number {path.stem}" for path in good}
    assert len(splits["train"].images) == len(train) - 2
    assert f"cannot be read: 2, such as {train[1]}, {train[2]}" in splits["train"].report


def test_a_large_photograph_is_read(tmp_path):
    """A JPEG of 92 million pixels, decoded at an eighth of its size, keeps its content."""
    image = Image.new("L", (9600, 9600))
    image.paste(255, (4800, 0, 9600, 9600))
    image.save(tmp_path / "a.jpg")
    pixels = image_folders.read_image(tmp_path / "a.jpg", 8)
    assert (pixels[:, :4] < 5).all() and (pixels[:, 4:] > 250).all()


def test_postscript_with_another_name_is_not_run(tmp_path):
    """Pillow would hand it to Ghostscript, if there is one."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(Image.UnidentifiedImageError):
        image_folders.read_image(tmp_path / "a.png", 8)


def test_an_image_bomb_is_left_out(tmp_path):
    """A small file that claims to be a huge image, and is no JPEG."""
    Image.new("1", (9500, 9500)).save(tmp_path / "bomb.png")
    write(tmp_path / "a.png", (200, 30, 40))
    images, numbers = image_folders.make_images([tmp_path / "bomb.png", tmp_path / "a.png"], 8)
    assert numbers == [-1, 0] and (images[1] == [200, 30, 40]).all()
    assert (tmp_path / "bomb.png").stat().st_size < 100_000


def test_the_fingerprint_follows_the_files(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    fingerprints = [image_folders.fingerprint(files)]   # of files that are missing
    for file, size in ((files[0], (20, 16)), (files[1], (20, 16)), (files[0], (9, 9))):
        write(file, size=size)
        fingerprints.append(image_folders.fingerprint(files))
    fingerprints.append(image_folders.fingerprint(files[:1]))
    assert len(set(fingerprints)) == 5
    assert image_folders.fingerprint(files) == fingerprints[3]


def test_splits_stay_when_files_are_added(tmp_path):
    for i in range(100):
        write(tmp_path / "a" / f"{i}.png", (2 * i, 0, 0))
    before = all_splits(tmp_path)
    for i in range(100, 180):
        write(tmp_path / "a" / f"{i}.png", (0, 0, i))
    write(tmp_path / "a" / "0.png", (250, 0, 0), size=(9, 9))
    after = all_splits(tmp_path)
    for split, dataset in before.items():
        old, new = (set(s.images[:, 4, 4, 0].tolist()) - {0} for s in (dataset, after[split]))
        assert old <= new <= old | {250}
    assert any(250 in s.images[:, 4, 4, 0] for s in after.values())


@pytest.mark.parametrize("count", [20, 25, 60])
def test_no_split_of_a_small_folder_is_empty(tmp_path, count):
    for i in range(count):
        write(tmp_path / "a" / f"bus{i}.png", (i + 1, 0, 0))   # by hashes alone one would be
    found = image_folders.scan_folder(tmp_path)
    splits = [image_folders.split_indices(found, split) for split in image_folders.SPLITS]
    assert all(splits) and sorted(sum(splits, [])) == list(range(count))


def test_a_missing_image_shifts_no_captions(tmp_path):
    """The table names a file that is not there: only its row is left out."""
    for i in range(40):
        write(tmp_path / f"{i}.png", (6 * i, 0, 0))
    rows = [f"{i}.png,number {i}" for i in range(40)]
    (tmp_path / "3.png").unlink()
    expected = {6 * i: f"number {i}" for i in range(40) if i != 3}
    for some in (rows, rows[:3] + rows[4:]):
        (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *some]))
        assert pairs(all_splits(tmp_path)) == expected


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_errors_of_the_machine_are_raised(tmp_path, monkeypatch, number):
    """What a lost disk or a missing permission keeps from being read is not marked as broken."""
    write(tmp_path / "a.png")

    def lost(path, size):
        raise OSError(number, "cannot be read now")

    monkeypatch.setattr(image_folders, "read_image", lost)
    with pytest.raises(OSError, match="cannot be read now"):
        image_folders.make_images([tmp_path / "a.png"], 8)


def test_damaged_metadata_do_not_lose_the_image(tmp_path):
    """EXIF that is no TIFF: the pixels as they stand."""
    image = Image.new("RGB", (8, 8), (10, 200, 30))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0junk")
    assert (image_folders.read_image(tmp_path / "a.png", 8) == (10, 200, 30)).all()


def test_an_object_without_a_caption_is_left_out(tmp_path):
    for i in range(40):
        write(tmp_path / f"id{i:02d}" / "rgb" / "0.png", (6 * i, 0, 0))
    lines = [f"number {i}" if i else " " for i in range(40)]
    (tmp_path / "cars.txt").write_text("\n".join(lines))
    found = image_folders.scan_folder(tmp_path)
    assert found.texts == [[line] for line in lines[1:]] and found.left_out == 1


def test_a_file_name_of_any_bytes_can_be_reported(tmp_path):
    write(tmp_path / "a" / "\udcff.png")
    found = image_folders.scan_folder(tmp_path)
    line = image_folders.report(found, "train", [0], [0], 1)
    assert "a/?.png" in line and line.encode()


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "there are no images"),
    (lambda p: write(p / "a" / "a.png"), "1 objects are too few: none of them belongs to the judge "
     "split; at least 20 are needed"),
    (lambda p: (p / "captions.csv").write_text("image,text\na.png,b"), "0 columns 'caption'"),
    (lambda p: (p / "captions.csv").write_text(""), "0 columns 'image'"),
    (lambda p: (p / "captions.csv").write_text("image,caption,caption"), "2 columns 'caption'"),
    (lambda p: (p / "a.heic").write_bytes(b""), "no images in it; other files: 1, such as a.heic"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n../../a.png,b"), "outside"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n/etc/passwd,b"), "outside"),
    (lambda p: (p / "captions.csv").write_text("image,caption\na.png,"), "has no captions"),
    (lambda p: (p / "captions.csv").write_bytes("image,caption\na.png,caf\xe9".encode("latin-1")),
     "not UTF-8"),
    (lambda p: (p / "captions.csv").write_text('image,caption\na.png,"b\nc.png,d'), "near line"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n\0,b"), "outside|near line"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n0.png,b\n1.png,a bus, red\n"),
     "line 3, has more than 2 fields; put captions with commas in quotes"),
    (lambda p: [write(p / name / "rgb" / "0.png") for name in ("a", "b")], "no cars.txt"),
    (lambda p: (write(p / "id" / "rgb" / "0.png"), (p / "cars.txt").write_text("a\nb")), "2 lines"),
    (lambda p: (write(p / "0.png"), (p / "0.txt").write_bytes(b"caf\xe9")), "not UTF-8")])
def test_folders_that_cannot_be_used_say_why(tmp_path, make, message):
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    with pytest.raises(cli.UserError, match=message):
        load(tmp_path / "photos", "judge")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(cli.UserError, match="no such folder"):
        image_folders.scan_folder(tmp_path / "nowhere")
