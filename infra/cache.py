"""Images made once by all cores, cached in one file, resumed after an interruption.

It holds raw bytes and may be larger than memory. Chunks are made in parallel, each a file in
NAME.chunks/, and concatenated at the end; the next command makes those that are missing.
"""
import mmap
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tqdm import tqdm

from infra.checkpoint import write_atomic
from infra.cli import UserError

CHUNK = 200   # images that one process makes at a time


def load_packed(items, make, size, path):
    """Load the images of the items, made by `pack` now or earlier -> images: (N, size, size, 3)
    uint8, memory-mapped; numbers: (len(items),), as `make` gave them, N of them >= 0"""
    try:
        images, numbers, checksum = _open_packed(size, path)
        if len(numbers) == len(items) and zlib.crc32(images) == checksum:
            if hasattr(images.base, "madvise"):   # else the system reads an image's neighbours too,
                images.base.madvise(mmap.MADV_RANDOM)   # slow if the file is larger than memory
            return images, numbers
        del images   # some systems cannot delete what is mapped
    except Exception as error:   # numpy raises a dozen types for damaged files
        if isinstance(error, PermissionError):
            raise
    if path.exists():
        print(f"{path} is not whole, and is made again")
    for stale in (path, path.with_suffix(".npz")):   # else pack takes the .npz for a new one
        stale.unlink(missing_ok=True)
    pack(items, make, size, path)
    return _open_packed(size, path)[:2]


def _open_packed(size, path):
    with np.load(path.with_suffix(".npz")) as made:
        numbers, checksum = made["numbers"], int(made["checksum"])
    shape = (int((numbers >= 0).sum()), size, size, 3)
    if not shape[0]:   # an empty file cannot be mapped
        return np.empty(shape, np.uint8), numbers, checksum
    return np.memmap(path, np.uint8, "r", shape=shape), numbers, checksum


def pack(items, make, size, path):
    """Make an image of each item, all into `path`; a number for each and a checksum into its .npz.

    make(some items, size), a function at the top level of a module, -> images: (n, size, size, 3)
    uint8; numbers: (n,) int, such as the index of a caption, -1 for an item that cannot be read and
    is left out"""
    folder = path.with_suffix(".chunks")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path.parent} ({error.strerror}); set CLIP_DDPM_CACHE to "
                        "another folder") from None
    tasks = [(make, items[start:start + CHUNK], size, folder / f"{start // CHUNK:05}.npz")
             for start in range(0, len(items), CHUNK)]
    try:
        _make_chunks([task for task in tasks if not task[-1].exists()], path.stem)
        numbers, checksum = [], 0
        with write_atomic(path) as out:
            for *_, file in tasks:
                try:
                    with np.load(file) as chunk:
                        images, of_images = chunk["images"], chunk["numbers"]
                except (ValueError, EOFError, KeyError, zipfile.BadZipFile):
                    file.unlink()
                    raise UserError(f"{file} was damaged and is removed; run this again") from None
                numbers.append(of_images)
                out.write(images.data)
                checksum = zlib.crc32(images, checksum)
        with write_atomic(path.with_suffix(".npz")) as out:   # last: where it is, all is done
            np.savez(out, numbers=np.concatenate(numbers), checksum=checksum)
    except OSError:   # another command has made the same file meanwhile and removed the chunks
        if not path.with_suffix(".npz").exists():
            raise
    shutil.rmtree(folder, ignore_errors=True)


def _make_chunks(tasks, name):
    with ProcessPoolExecutor(initializer=_start_worker) as pool:
        try:
            list(tqdm(pool.map(_make_chunk, tasks), f"packing {name}", len(tasks), unit="chunk"))
        except BrokenProcessPool:
            raise OSError("a process that makes images has died, perhaps for lack of memory; the "
                          "same command resumes") from None
        finally:
            pool.shutdown(cancel_futures=True)   # after Ctrl-C, do not make all the rest


def _make_chunk(task):
    make, items, size, file = task
    images, numbers = make(items, size)
    with write_atomic(file) as chunk:
        np.savez(chunk, images=images[np.asarray(numbers) >= 0], numbers=numbers)


def _start_worker():
    """Leave Ctrl-C to the parent process, and end when it ends: if it is killed, too."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
