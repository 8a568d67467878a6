"""What all commands share: errors in one line, signals, devices, autocast."""
import argparse
import contextlib
import functools
import io
import os
import signal
import sys
import time
import timeit
from pathlib import Path

import torch

OUT_OF_MEMORY = "out of memory", "allocate memory", "DefaultCPUAllocator"   # parts of error texts


class UserError(Exception):
    """An error that the user can fix: commands print it in one line and exit with code 2."""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are UserErrors."""

    def error(self, message):
        raise UserError(f"{message}; -h explains")


def check_ranges(options, **ranges):
    """Raise UserError unless each attribute is None or in its range (low, high), and not NaN."""
    for name, (low, high) in ranges.items():
        if (value := getattr(options, name)) is not None and not low <= value <= high:
            flag = ("-" if len(name) == 1 else "--") + name.replace("_", "-")
            raise UserError(f"{flag} must be from {low} to {high}, not {value}")


class Output(io.TextIOBase):   # whose flush does nothing
    """Standard output that is dropped once its reader has gone, as in `| head -1`."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")   # where a terminal cannot show a letter

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_command(main):
    """Run main(), print errors that the user can fix in one line, and set the exit code."""
    try:
        with contextlib.redirect_stdout(Output(sys.stdout or open(os.devnull, "w"))):
            main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:   # OSError: a full disk, ...
        text = str(error)
        if isinstance(error, MemoryError) or not isinstance(error, UserError) and any(
                part in text for part in OUT_OF_MEMORY):
            text = "memory is full; try a smaller --batch, or, in training, --accumulate 2"
        elif isinstance(error, RuntimeError):
            raise
        program = Path(sys.argv[0])
        name = program.parent.name if program.stem == "__main__" else program.name
        print(f"{name}: {text}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def catch_signals():
    """Collect SIGINT (Ctrl-C) and SIGTERM in a list, so that the current step can end and be saved;
    a second signal of the same kind raises KeyboardInterrupt at once."""
    received = []

    def on_signal(number, frame):
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(name="auto"):
    """Pick a torch.device by name; "auto" is the first available of cuda, mps, cpu."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        torch.empty(1, device=name)   # torch accepts names of devices that this machine lacks
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return torch.device(name)


def autocast(device, bf16=None):
    """Context: matrix products and convolutions in bfloat16; None: where it is faster. Never in
    float16: gradients and losses can exceed 65504."""
    bf16 = bf16_is_fast(device) if bf16 is None else bf16
    # cache_enabled would keep a copy of each tensor that requires a gradient, such as every x_t of
    # a guided trajectory, until the command ends; weights are cast once a step either way.
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


@functools.cache
def bf16_is_fast(device):
    """Whether the device computes faster in bfloat16 than in float32. On a CPU it is measured: of
    two CPUs with "AVX512-BF16" one multiplies matrices five times faster in it, the other
    slower."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    matrices = [torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    least, start = 2 * [float("inf")], time.monotonic()   # seconds a product
    for rounds in range(1, 41):   # in turns, and the minimum counts: other programs may be running
        least = [min(seconds, timeit.timeit(lambda: m @ m, number=1))
                 for seconds, m in zip(least, matrices)]
        ratio = least[1] / least[0]
        if rounds >= 5 and not 0.2 < ratio < 1.8 or time.monotonic() > start + 0.5:
            break   # the answer is clear by a factor of three, or it takes too long
    return ratio < 0.6   # convolutions gain less, and casting costs: a clear gain or none
