"""Real folders: the four layouts, and every kind of picture that people keep in them."""
import errno

import numpy as np
import pytest
from PIL import Image

import cars
import data
import folders


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")


def write(path, colour=(200, 30, 40), size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def all_splits(name, size=8):
    """The pictures of a data set, whatever split they are in -> {split: Dataset}."""
    found = {}
    for split in folders.PARTS:
        try:
            found[split] = data.load(str(name), size, 0, split)
        except data.UserError:   # a small folder leaves some splits empty
            pass
    return found


def test_class_folders(tmp_path):
    for i in range(40):
        write(tmp_path / "photos" / "airplane" / f"{i}.png", (10 + i, 0, 0))
        write(tmp_path / "photos" / "fire_truck" / f"{i}.JPG", (0, 10 + i, 0))
    sets = all_splits(tmp_path / "photos")
    assert sum(len(s.pictures) for s in sets.values()) == 80
    train = sets["train"]
    assert train.captions == ["a photo of an airplane", "a photo of a fire truck"]
    assert train.attributes == {"class": ["airplane", "fire truck"]}
    red = train.pictures[:, 4, 4, 0] > train.pictures[:, 4, 4, 1]
    assert (train.caption_of == np.where(red, 0, 1)).all()
    assert (train.labels[:, 0] == train.caption_of).all()
    assert "2 captions (class folders)" in train.report
    assert all(len(texts) == 2 for texts in train.spellings)


def test_names_of_class_folders_may_be_untidy(tmp_path):
    """Spaces for underscores, one of each; and what differs in case alone is one class."""
    for name in ("polar__bear", "Cat_", "cat", "_", "Å"):
        write(tmp_path / name / "a.png")
    listing = folders.find(tmp_path)
    assert listing.classes == ["_", "cat", "polar bear", "å"]
    texts, spellings, own = folders.captions(listing)
    assert len(texts) == 4 and all(len(some) == 4 for some in spellings)
    assert [texts[i] for i in own] == listing.texts


def pairs(sets):
    """What goes together, over all splits -> {red of the picture: caption}."""
    return {int(red): s.captions[k] for s in sets.values()
            for red, k in zip(s.pictures[:, 4, 4, 0], s.caption_of)}


def test_text_files(tmp_path):
    for i in range(30):
        write(tmp_path / "deep" / "er" / f"{i}.png", (8 * i, 0, 0))
        text = f"\ufeff  A thing\nnumber {i % 3} " if i % 2 else f"a  thing number {i % 3}"
        (tmp_path / "deep" / "er" / f"{i}.txt").write_text(text, "utf-8")
    write(tmp_path / "deep" / "without.png")
    write(tmp_path / ".hidden" / "a.png")
    (tmp_path / ".hidden" / "a.txt").write_text("unseen")
    sets = all_splits(tmp_path)
    assert sets["train"].captions == [f"a thing number {i}" for i in range(3)]
    assert pairs(sets) == {8 * i: f"a thing number {i % 3}" for i in range(30)}
    assert "1 pictures of the folder have no caption" in sets["train"].report


def test_captions_csv(tmp_path):
    rows = ["image, caption"]
    for i in range(30):
        write(tmp_path / "p" / f"{i}.png", (8 * i, 0, 0))
        rows.append(f'p/{i}.png, "one, two ""{i % 2}""\nthree"')
    rows += ["p/0.png,", ",of nothing"]
    (tmp_path / "captions.csv").write_text("\n".join(rows), "utf-8-sig")
    assert pairs(all_splits(tmp_path)) == {8 * i: f'one, two "{i % 2}" three' for i in range(30)}


def test_srn_cars_are_never_split(tmp_path):
    """A small copy of ShapeNet's layout, made with the car world."""
    captions = []
    for i in range(60):
        scene, labels = cars.scene(0, i)
        captions.append(cars.caption(*labels))
        for view in range(3):
            rgb = tmp_path / "cars_train" / f"id{i:03d}" / "rgb"
            rgb.mkdir(parents=True, exist_ok=True)
            picture = np.round(cars.ray_cast(scene, 16) * 255).astype(np.uint8)
            picture[0, 0] = i   # the background's corner remembers which object this is
            Image.fromarray(picture).save(rgb / f"{view:06d}.png")
    (tmp_path / "cars.txt").write_text("\n".join(captions) + "\n")
    sets = all_splits(tmp_path, 16)
    seen = {split: s.pictures[:, 0, 0, 0] for split, s in sets.items()}
    for split, objects in seen.items():
        assert all((objects == i).sum() == 3 for i in set(objects.tolist()))
        for i, row in zip(objects.tolist(), sets[split].caption_of):
            assert sets[split].captions[row] == captions[i]
    everything = [i for objects in seen.values() for i in set(objects.tolist())]
    assert sorted(everything) == list(range(60))


def test_reading(tmp_path):
    """Grey, palette, transparent, 16-bit, rotated and odd-sized pictures come out as seen."""
    check = lambda name, colour, at=(4, 4): np.testing.assert_allclose(
        folders.read(tmp_path / name, 8)[at], colour, atol=3)
    write(tmp_path / "gray.png", 100, mode="L")
    check("gray.png", [100, 100, 100])
    Image.new("RGB", (9, 9), (255, 0, 0)).convert("P").save(tmp_path / "palette.png")
    check("palette.png", [255, 0, 0])
    write(tmp_path / "clear.png", (0, 0, 0, 0), mode="RGBA")
    check("clear.png", [255, 255, 255])
    Image.fromarray(np.full((9, 9), 51400, np.uint16)).save(tmp_path / "deep.png")
    check("deep.png", [200, 200, 200])
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


def test_shrinking_averages(tmp_path):
    board = np.indices((16, 16)).sum(axis=0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    assert (abs(folders.read(tmp_path / "board.png", 8).astype(int) - 127.5) < 2).all()


def test_it_is_the_middle_that_is_seen(tmp_path):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("black", (10, 0, 30, 20))   # the middle square
    picture.save(tmp_path / "a.png")
    assert (folders.read(tmp_path / "a.png", 8) == 0).all()


def test_broken_pictures_are_counted_and_named(tmp_path):
    for i in range(40):
        write(tmp_path / f"{i}.png", (6 * i, 0, 0))
        (tmp_path / f"{i}.txt").write_text(f"number {i}")
    listing = folders.find(tmp_path)
    train = [listing.files[i] for i in folders.part_of(listing, "train")]
    train[1].write_bytes(b"no picture")
    train[2].write_bytes(train[2].read_bytes()[:60])
    sets = all_splits(tmp_path)
    good = [p for path in sorted(tmp_path.glob("*.png")) if (p := path) not in train[1:3]]
    assert pairs(sets) == {6 * int(p.stem): f"number {p.stem}" for p in good}
    assert len(sets["train"].pictures) == len(train) - 2
    assert f"cannot be read: 2, such as {train[1]}" in sets["train"].report


def test_a_picture_bomb_is_left_out(tmp_path):
    """A small file that claims to be a huge picture: Pillow warns from 90 million pixels on."""
    Image.new("1", (9500, 9500)).save(tmp_path / "bomb.png")
    write(tmp_path / "a.png", (200, 30, 40))
    pictures, numbers = folders.read_some([tmp_path / "bomb.png", tmp_path / "a.png"], 8)
    assert numbers == [-1, 0] and (pictures[1] == [200, 30, 40]).all()
    assert (tmp_path / "bomb.png").stat().st_size < 100_000


def test_the_cache_follows_the_folder_and_the_splits_stay(tmp_path):
    for i in range(40):
        write(tmp_path / "a" / f"{i}.png", (6 * i, 0, 0))
    before = all_splits(tmp_path)
    for i in range(40, 80):
        write(tmp_path / "a" / f"{i}.png", (0, 0, 3 * i))
    write(tmp_path / "a" / "0.png", (250, 0, 0), size=(9, 9))
    after = all_splits(tmp_path)
    for split, dataset in before.items():
        old, new = (set(s.pictures[:, 4, 4, 0].tolist()) - {0} for s in (dataset, after[split]))
        assert old <= new <= old | {250}
    assert any(250 in s.pictures[:, 4, 4, 0] for s in after.values())


def test_a_missing_picture_shifts_no_captions(tmp_path):
    """The table names a file that is not there; then its row goes, and all others keep theirs."""
    for i in range(40):
        write(tmp_path / f"{i}.png", (6 * i, 0, 0))
    rows = [f"{i}.png,number {i}" for i in range(40)]
    (tmp_path / "3.png").unlink()
    expected = {6 * i: f"number {i}" for i in range(40) if i != 3}
    for some in (rows, rows[:3] + rows[4:]):
        (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *some]))
        assert pairs(all_splits(tmp_path)) == expected


def test_a_file_is_not_blamed_for_the_machine(tmp_path, monkeypatch):
    """What a full table of files or a lost disk keeps from being read is not broken for ever."""
    write(tmp_path / "a.png")

    def lost(path, size):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(folders, "read", lost)
    with pytest.raises(OSError, match="Input/output"):
        folders.read_some([tmp_path / "a.png"], 8)


def test_an_object_without_a_caption_is_left_out(tmp_path):
    for i in range(40):
        write(tmp_path / f"id{i:02d}" / "rgb" / "0.png", (6 * i, 0, 0))
    lines = [f"number {i}" if i else " " for i in range(40)]
    (tmp_path / "cars.txt").write_text("\n".join(lines))
    listing = folders.find(tmp_path)
    assert listing.texts == lines[1:] and listing.left_out == 1


@pytest.mark.parametrize("make, message", [
    (lambda p: None, "there are no pictures"),
    (lambda p: write(p / "a.png"), "no captions"),
    (lambda p: (p / "captions.csv").write_text("image,text\na.png,b"), "no column 'caption'"),
    (lambda p: (p / "captions.csv").write_text(""), "no column 'image'"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n../../a.png,b"), "outside"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n/etc/passwd,b"), "outside"),
    (lambda p: ((p / "a.png").symlink_to("/etc/passwd"),
                (p / "captions.csv").write_text("image,caption\na.png,b")), "outside"),
    (lambda p: (p / "captions.csv").write_text("image,caption\na.png,"), "has no captions"),
    (lambda p: (p / "captions.csv").write_bytes("image,caption\na.png,caf\xe9".encode("latin-1")),
     "not UTF-8"),
    (lambda p: (p / "captions.csv").write_text('image,caption\na.png,"b\nc.png,d'), "near line"),
    (lambda p: (p / "captions.csv").write_text("image,caption\n\0,b"), "outside|near line"),
    (lambda p: write(p / "id" / "rgb" / "0.png"), "no cars.txt"),
    (lambda p: (write(p / "id" / "rgb" / "0.png"), (p / "cars.txt").write_text("a\nb")), "2 lines"),
    (lambda p: (write(p / "0.png"), (p / "0.txt").write_bytes(b"caf\xe9")), "not UTF-8"),
    (lambda p: [(p / "a").mkdir(), *((p / "a" / f"{i}.png").write_bytes(b"x") for i in range(40))],
     "can be read")])
def test_unusable_folders_say_why(tmp_path, make, message):
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    with pytest.raises(data.UserError, match=message):
        data.load(str(tmp_path / "photos"), 8, 0, "train")


def test_a_folder_that_is_not_there():
    with pytest.raises(data.UserError, match="no such folder"):
        data.load("nowhere", 8, 0)
