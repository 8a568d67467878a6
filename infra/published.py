"""Files of published weights, read without running any code in them -> name: tensor.

Plain state dicts of torch.save, safetensors, and TorchScript archives such as OpenAI's ViT-B-32.pt.
"""
import contextlib
import json
import pickle
import zipfile
from pathlib import Path

import torch

from infra.cli import UserError

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = dict(zip(("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage",
                     "LongStorage", "IntStorage", "ByteStorage", "BoolStorage"), TYPES.values()))


def is_published(path):
    """Whether a file holds published weights and not one of our checkpoints."""
    if Path(path).suffix == ".safetensors" or _is_torchscript(path):
        return True
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return any(b"visual.proj" in archive.read(name) for name in archive.namelist()
                   if name.endswith("/data.pkl"))
    return False   # no such file, say: checkpoint.load will tell


def load_tensors(path):
    """Load all tensors of a file, in float32 if they are of another float; UserError if none."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            tensors = _read_safetensors(path.read_bytes())
        elif _is_torchscript(path):
            tensors = _read_torchscript(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:   # each format has a dozen for damaged or foreign files
        raise UserError(f"{path} is no readable file of weights ({type(error).__name__})") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise UserError(f"{path} is no state dict: names and tensors")
    return {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}


def _read_safetensors(content):
    """8 bytes: the length of a header in JSON; then the tensors' bytes."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), bytearray(content[8 + length:])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = torch.frombuffer(data[start:end], dtype=TYPES[entry["dtype"]]).reshape(
            entry["shape"])
    return tensors


def _is_torchscript(path):
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class _Object:
    """Stands for any object of the archive: it keeps its attributes and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.state = state


def _rebuild(storage, offset, size, stride, *_):
    return torch.as_strided(storage, size, stride, offset)


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors, and _Object for everything else; no other name is looked up."""

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        return STORAGES.get(name, _Object) if module == "torch" else _Object

    def persistent_load(self, key):
        _, dtype, name, _, _ = key
        data = self.archive.read(f"{self.folder}/data/{name}")
        return torch.frombuffer(bytearray(data), dtype=dtype)


def _read_torchscript(path):
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            unpickler = _Unpickler(file)
            unpickler.archive, unpickler.folder = archive, pickled.rpartition("/")[0]
            root = unpickler.load()
    tensors = {}

    def collect(module, prefix):
        for name, value in module.state.items():
            if torch.is_tensor(value):
                tensors[prefix + name] = value
            elif isinstance(getattr(value, "state", None), dict):
                collect(value, f"{prefix}{name}.")
    collect(root, "")
    return tensors
