"""The image cache: whole, in order, without what cannot be read, resumed after a kill."""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra import cache
from infra.cli import UserError

ROOT = Path(__file__).resolve().parent.parent


def paint(items, size):
    """Images of the item's last digits; every seventh item cannot be read."""
    colours = np.array(items)[:, None, None, None].astype(np.uint8)
    images = np.zeros((len(items), size, size, 3), np.uint8) + colours
    return images, [-1 if i % 7 == 6 else 10 * i for i in items]


def paint_until_600(items, size):
    if items[0] >= 600:
        raise OSError(28, "No space left on device")
    return paint(items, size)


def paint_from_600(items, size):
    assert items[0] >= 600   # a chunk that exists is not made again
    return paint(items, size)


def die_at_400(items, size):
    if items[0] == 400:
        os._exit(9)   # as if the system had killed it, for lack of memory
    return paint(items, size)


def paint_nothing(items, size):
    return np.zeros((len(items), size, size, 3), np.uint8), [-1] * len(items)


def slowly(items, size):
    time.sleep(0.2)
    return paint(items, size)


def check_packed(path, count, size):
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.npz", "a.raw"]
    images, numbers = cache.load_packed(range(count), None, size, path)
    readable = [i for i in range(count) if i % 7 != 6]
    assert numbers.tolist() == [-1 if i % 7 == 6 else 10 * i for i in range(count)]
    assert path.stat().st_size == images.nbytes and len(images) == len(readable)
    assert (images == np.array(readable).astype(np.uint8)[:, None, None, None]).all()


def test_in_order_and_without_what_cannot_be_read(tmp_path):
    path = tmp_path / "new" / "a.raw"
    images, numbers = cache.load_packed(range(1130), paint, 3, path)
    assert isinstance(images, np.memmap) and len(numbers) == 1130
    check_packed(path, 1130, 3)


def test_a_full_disk_is_not_taken_for_another_commands_success(tmp_path):
    """Where the images are gone and only their .npz is left; finished chunks are kept."""
    path = tmp_path / "a.raw"
    cache.load_packed(range(1000), paint, 3, path)
    path.unlink()
    with pytest.raises(OSError, match="No space left on device"):
        cache.load_packed(range(1000), paint_until_600, 3, path)
    images, _ = cache.load_packed(range(1000), paint_from_600, 3, path)
    check_packed(path, 1000, 3)


@pytest.mark.parametrize("name, content", [
    ("a.raw", b""), ("a.raw", b"x" * 100), ("a.raw", "flipped"), ("a.npz", b""),
    ("a.npz", b"nonsense"), ("a.npz", None)])
def test_a_damaged_cache_is_made_again(tmp_path, capsys, name, content):
    path = tmp_path / "a.raw"
    cache.pack(range(230), paint, 3, path)
    if content == "flipped":
        content = bytearray(path.read_bytes())
        content[100] ^= 1
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    images, numbers = cache.load_packed(range(230), paint, 3, path)
    assert "a.raw is not whole, and is made again" in capsys.readouterr().out
    check_packed(path, 230, 3)


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "a.raw"
    with pytest.raises(OSError, match="No space left"):
        cache.pack(range(1130), paint_until_600, 3, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.chunks"]
    assert len(list(tmp_path.glob("a.chunks/*"))) == 3   # of 200 images each
    cache.pack(range(1130), paint_from_600, 3, path)
    check_packed(path, 1130, 3)


def test_a_worker_that_dies_is_one_line(tmp_path):
    path = tmp_path / "a.raw"
    with pytest.raises(OSError, match="has died"):
        cache.pack(range(1130), die_at_400, 3, path)
    cache.pack(range(1130), paint, 3, path)
    check_packed(path, 1130, 3)


def test_part_of_a_chunk_is_not_used(tmp_path):
    """A killed worker leaves a file with a temporary name."""
    path = tmp_path / "a.raw"
    (tmp_path / "a.chunks").mkdir()
    (tmp_path / "a.chunks" / "00000.123.tmp").write_bytes(b"half")
    cache.pack(range(1130), paint, 3, path)
    check_packed(path, 1130, 3)


def test_a_damaged_chunk_is_removed(tmp_path):
    """The command says so in a line; the next one makes it again."""
    path = tmp_path / "a.raw"
    (tmp_path / "a.chunks").mkdir()
    (tmp_path / "a.chunks" / "00000.npz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="00000.npz was damaged and is removed; run this again"):
        cache.pack(range(230), paint, 3, path)
    cache.load_packed(range(230), paint, 3, path)
    check_packed(path, 230, 3)


def out_of_memory(items, size):
    if items[0] >= 600:
        raise MemoryError
    return paint(items, size)


def test_full_memory_loses_nothing(tmp_path):
    """What a worker raises is no damaged chunk; those that are made stay."""
    with pytest.raises(MemoryError):
        cache.pack(range(1130), out_of_memory, 3, tmp_path / "a.raw")
    assert len(list(tmp_path.glob("a.chunks/*"))) == 3
    cache.pack(range(1130), paint_from_600, 3, tmp_path / "a.raw")
    check_packed(tmp_path / "a.raw", 1130, 3)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="set CLIP_DDPM_CACHE to another folder"):
        cache.pack(range(3), paint, 3, tmp_path / "file" / "a.raw")


def test_interrupted_while_concatenating(tmp_path, monkeypatch):
    """The chunks stay until both files have their names, and none is made again."""
    path = tmp_path / "a.raw"
    with monkeypatch.context() as patch:
        def interrupted(a, b):
            if Path(b) == path.with_suffix(".npz"):
                raise KeyboardInterrupt
            os.rename(a, b)
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.pack(range(600), paint, 3, path)
    assert path.exists() and not path.with_suffix(".npz").exists()
    cache.load_packed(range(600), paint_from_600, 3, path)
    check_packed(path, 600, 3)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_another_command_finishes_first(tmp_path, monkeypatch, moment):
    """Before this one makes its chunks, or before it concatenates them: they are gone, and the
    file is there."""
    path, make_chunks = tmp_path / "a.raw", cache._make_chunks

    def disturbed(tasks, name):
        monkeypatch.setattr(cache, "_make_chunks", make_chunks)
        if moment == "before":
            cache.pack(range(600), paint, 3, path)
        make_chunks(tasks, name)
        if moment == "after":
            cache.pack(range(600), paint, 3, path)

    monkeypatch.setattr(cache, "_make_chunks", disturbed)
    cache.pack(range(600), paint, 3, path)
    check_packed(path, 600, 3)


def test_nothing_can_be_read(tmp_path):
    images, numbers = cache.load_packed(range(3), paint_nothing, 2, tmp_path / "a.raw")
    assert images.shape == (0, 2, 2, 3) and numbers.tolist() == [-1] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_and_two_at_a_time(tmp_path):
    """One is killed on the way; then two commands make the rest at the same time."""
    path = tmp_path / "a.raw"
    script = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
              "import pathlib, test_cache\nfrom infra import cache\n"
              "if __name__ == '__main__': cache.pack("
              f"range(3000), test_cache.slowly, 2, pathlib.Path({str(path)!r}))")
    (tmp_path / "script.py").write_text(script)
    start = lambda: subprocess.Popen([sys.executable, str(tmp_path / "script.py")],
                                     stderr=subprocess.PIPE, start_new_session=True)
    first = start()
    while not (chunks := list(tmp_path.glob("a.chunks/*.npz"))):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate(timeout=20)   # its workers have let go of stderr: they end with it
    assert 0 < len(chunks) < 15 and not path.exists()
    for running in (start(), start()):
        assert running.wait(60) == 0, running.stderr.read()
    (tmp_path / "script.py").unlink()
    check_packed(path, 3000, 2)


def test_where_workers_are_spawned(tmp_path):
    """As on Windows and macOS: packing works from a script with the usual guard."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "script.py").write_text(f"""if __name__ == "__main__":
    import multiprocessing, pathlib, sys
    sys.path.insert(0, {str(ROOT)!r})
    multiprocessing.set_start_method("spawn")
    from infra import cache, image_folders
    files = [pathlib.Path("a.png"), pathlib.Path("none.png")]
    images, numbers = cache.load_packed(files, image_folders.make_images, 8, pathlib.Path("p.raw"))
    print(images.nbytes, numbers)
""")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout == "192 [ 0 -1]\n", done.stderr
