"""Chapter 1b: a hundred thousand pictures in one file, made by all cores, and not in vain if it is
interrupted.

A packed file holds raw bytes, size x size x 3 for each picture, so that it can be memory-mapped and
may be larger than memory. While it is being made it is called NAME.part, and NAME.progress says
which of its pictures are there, so that whoever comes after a Ctrl-C or a crash goes on.

Nothing here knows where pictures come from: rendered (data.py) or read from a folder (folders.py).
"""
import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

CHUNK = 200   # pictures that one process makes at a time
# What NAME.progress says of a picture: nothing yet, or its number + KNOWN, so that -1, for one that
# cannot be read, is UNREADABLE.
NOT_YET, UNREADABLE, KNOWN = 0, 1, 2


def pack(items, make, size, path):
    """Make a picture of each of N items, by all cores, into `path`, and a number for each, in .npy
    beside it: (N,) int64, -1 for those that cannot be read and are left out.

    make(some items, size) -> pictures (n, size, size, 3) uint8, (n,) numbers of at least -1, whose
    meaning is the caller's. It is sent to other processes by its name, so it must be defined at the
    top level of a module.
    """
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not part.exists():
        progress.unlink(missing_ok=True)
    for file in (part, progress):
        file.open("ab").close()   # now it exists; what was in it stays
    state, before = np.zeros(len(items), np.int64), np.fromfile(progress, np.int64)
    state[:len(before)] = before
    try:
        _make_missing(items, make, size, part, progress, state)
        _finish(part, path, progress, state, size)
    except FileNotFoundError:   # another command has made the same one at the same time
        if not path.exists():
            raise


def _make_missing(items, make, size, part, progress, state):
    """What is NOT_YET there, a chunk at a time; into part, progress and state."""
    chunks = [slice(first, first + CHUNK) for first in range(0, len(items), CHUNK)]
    todo = [chunk for chunk in chunks if not state[chunk].all()]
    tasks = [(make, items[chunk], size, part, chunk.start) for chunk in todo]
    bar = tqdm(total=len(items), initial=int((state != NOT_YET).sum()), unit="picture",
               desc=f"packing {part.stem}")
    with bar, progress.open("r+b") as file, workers() as pool:
        try:
            for chunk, numbers in zip(todo, pool.map(_make_some, tasks)):
                state[chunk] = numbers + KNOWN
                file.seek(8 * chunk.start)
                file.write(state[chunk].tobytes())
                file.flush()
                bar.update(len(numbers))
        except BrokenProcessPool:
            raise OSError("a process that makes pictures has died, perhaps for want of memory; the "
                          "same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)   # after Ctrl-C, do not make all the rest


def _make_some(task):
    """One chunk, written to its place in the file -> its pictures' numbers."""
    make, items, size, part, first = task
    pictures, numbers = make(items, size)
    with to_the_disk(part.open("r+b")) as file:   # before the progress says that it is there
        file.seek(first * size * size * 3)
        file.write(np.ascontiguousarray(pictures).data)
    return np.asarray(numbers)


def _finish(part, path, progress, state, size):
    """Leave out what cannot be read, and give the file its name, now that it is whole."""
    if part.stat().st_size != len(state) * size * size * 3:   # another command has taken it away
        part.unlink()
        raise FileNotFoundError(part)
    temporary, readable, whole = path.with_suffix(f".{os.getpid()}.tmp"), state != UNREADABLE, part
    try:
        with to_the_disk(temporary.open("wb")) as file:
            np.save(file, state - KNOWN)
        os.replace(temporary, path.with_suffix(".npy"))
        if not readable.all():
            pictures = np.memmap(part, np.uint8, "r", shape=(len(state), size, size, 3))
            with to_the_disk(temporary.open("wb")) as file:
                for first in range(0, len(state), CHUNK):
                    chunk = slice(first, first + CHUNK)
                    file.write(pictures[chunk][readable[chunk]].data)
            del pictures   # Windows neither renames nor deletes what is mapped
            whole = temporary
        progress.unlink(missing_ok=True)   # before its pictures go, or it would tell of others
        os.replace(whole, path)
    finally:
        temporary.unlink(missing_ok=True)
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def to_the_disk(file):
    """A context with a file that is being written: at its end all of it is on the disk, not only on
    its way there."""
    with file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def workers():
    """-> a process for each core; use it with `with`. Ctrl-C is left to the process that calls."""
    return ProcessPoolExecutor(initializer=_begin_to_work)


def _begin_to_work():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()


def _end_with_the_caller():
    """If the process that calls is killed, its workers would wait for its next word for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
