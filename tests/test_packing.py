"""Packing: whole, in order, without what cannot be read, and not in vain when it is killed."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import packing

ROOT = Path(__file__).resolve().parent.parent


def paint(items, size):
    """A picture of nothing but the item's last digits; every seventh cannot be read."""
    pictures = np.zeros((len(items), size, size, 3), np.uint8) + np.array(items)[
        :, None, None, None].astype(np.uint8)
    return pictures, [-1 if i % 7 == 6 else 10 * i for i in items]


def paint_until_600(items, size):
    if items[0] >= 600:
        raise OSError(28, "No space left on device")
    return paint(items, size)


def paint_from_600(items, size):
    assert items[0] >= 600   # what the progress says is there is not made again
    return paint(items, size)


def die_at_400(items, size):
    if items[0] == 400:
        os._exit(9)   # as if the system had killed it, for want of memory
    return paint(items, size)


def slowly(items, size):
    time.sleep(0.2)
    return paint(items, size)


def packed(path, count, size):
    numbers = np.load(path.with_suffix(".npy"))
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.npy", "a.raw"]
    pictures = np.fromfile(path, np.uint8).reshape(-1, size, size, 3)
    kept = [i for i in range(count) if i % 7 != 6]
    assert numbers.tolist() == [-1 if i % 7 == 6 else 10 * i for i in range(count)]
    assert len(pictures) == len(kept)
    assert (pictures == np.array(kept).astype(np.uint8)[:, None, None, None]).all()
    return True


def test_in_order_and_without_what_cannot_be_read(tmp_path):
    packing.pack(range(1130), paint, 3, tmp_path / "a.raw")
    assert packed(tmp_path / "a.raw", 1130, 3)


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "a.raw"
    with pytest.raises(OSError, match="No space left"):
        packing.pack(range(1130), paint_until_600, 3, path)
    assert not path.exists()
    state = np.fromfile(path.with_suffix(".progress"), np.int64)
    assert (state[:600] > 0).all() and not state[600:].any()
    packing.pack(range(1130), paint_from_600, 3, path)
    assert packed(path, 1130, 3)


def test_a_process_that_dies_is_noticed(tmp_path):
    path = tmp_path / "a.raw"
    with pytest.raises(OSError, match="has died"):
        packing.pack(range(1130), die_at_400, 3, path)
    packing.pack(range(1130), paint, 3, path)
    assert packed(path, 1130, 3)


def test_progress_without_pictures_is_not_believed(tmp_path):
    """Somebody has thrown the large file away, and not the small one beside it."""
    path = tmp_path / "a.raw"
    with pytest.raises(OSError):
        packing.pack(range(1130), paint_until_600, 3, path)
    path.with_suffix(".part").unlink()
    packing.pack(range(1130), paint, 3, path)
    assert packed(path, 1130, 3)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_and_two_at_a_time(tmp_path):
    """One is killed on the way; then two commands make the rest at the same time."""
    path = tmp_path / "a.raw"
    script = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
              "import pathlib, packing, test_packing\n"
              "if __name__ == '__main__': packing.pack("
              f"range(3000), test_packing.slowly, 2, pathlib.Path({str(path)!r}))")
    (tmp_path / "script.py").write_text(script)
    start = lambda: subprocess.Popen([sys.executable, str(tmp_path / "script.py")],
                                     stderr=subprocess.PIPE, start_new_session=True)
    first, progress = start(), path.with_suffix(".progress")
    while not (progress.exists() and progress.stat().st_size):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.communicate(timeout=20)   # its workers have let go of stderr: they end with it
    assert 0 < np.count_nonzero(np.fromfile(progress, np.int64)) < 3000
    for running in (start(), start()):
        assert running.wait(60) == 0, running.stderr.read()
    (tmp_path / "script.py").unlink()
    assert packed(path, 3000, 2)
