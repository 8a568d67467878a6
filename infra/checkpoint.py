"""Checkpoints: written whole or not at all, loaded without running code, checked by kind."""
import contextlib
import os
import zlib
from pathlib import Path

import torch

from infra import distributed
from infra.cli import UserError


# What commands read of weights.pt besides what from_checkpoint does.
REQUIRED_KEYS = {
    "clip": ["caption_labels", "templates", "partial", "partial_true_of", "words"], "ddpm": [],
    "decoder": ["clip"], "prior": ["clip"], "upsampler": [], "judge": ["caption_labels"]}


@contextlib.contextmanager
def write_atomic(path):
    """Open a binary file under a temporary name; rename it once all of it is on the disk, so that
    a process killed at any moment, or a power cut, leaves the old file or the new one, whole."""
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")   # no two commands share it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(folder):
    """Context in which no other command trains in a folder; UserError if one does already."""
    if os.name != "posix" or distributed.rank():   # Windows has no flock; rank 0 locks for all
        yield
        return
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)   # ends with the process, if killed
        for left in Path(folder).glob("*.tmp"):   # by a run that was killed
            left.unlink()
        yield
    except BlockingIOError:
        raise UserError(f"another command trains in {folder}; choose another --out") from None
    finally:
        os.close(handle)


def save(path, content):
    """Save a dictionary of tensors and plain Python types; UserError if it cannot be written."""
    try:
        with write_atomic(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as a RuntimeError
        raise UserError(f"cannot write {path}: {error}") from None


def load(path, *kinds):
    """Load what `save` wrote, on the CPU; UserError unless its kind is one of these."""
    advice = ("delete it, and it is made again" if kinds[0] == "embeddings" else
              "train one with: python train.py " + kinds[0].replace(" run", " --fresh"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; {advice}") from None
    except Exception as error:   # torch raises a dozen types for damaged or foreign files
        name = type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint ({name}); {advice}") from None
    actual = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if actual not in kinds:
        raise UserError(f"{path} holds {actual!r}, but a checkpoint of kind {kinds[0]!r} is "
                        f"needed; {advice}")
    return content


def load_model(path, model_class, *kinds):
    """Load a model -> (model_class.from_checkpoint(content), content); UserError if it misfits."""
    content = load(path, *kinds)
    try:
        for key in ("data", "steps", "captions", *REQUIRED_KEYS[content["kind"]]):
            content[key]   # or KeyError
        return model_class.from_checkpoint(content), content
    except KeyError as error:
        raise UserError(f"{path} holds no {error}, it is of another version; train one with: "
                        f"python train.py {kinds[0]}") from None
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]   # torch: headline, then details
        raise UserError(f"{path} does not fit its own config: {lines[-1].strip()}") from None


def fp16_weights(model):
    """The weights in fp16, half the bytes -> name: tensor on the CPU."""
    return {name: p.detach().half().cpu().contiguous() for name, p in model.state_dict().items()}


def weights_checksum(model):
    """Checksum of a model's weights in fp16, as files that ship hold them -> int"""
    return zlib.crc32(b"".join(w.numpy().tobytes() for w in fp16_weights(model).values()))
