"""A training run that is killed many times ends with the weights of an undisturbed one.

    python -m experiments interruptions --kills 100     some minutes; the test suite does three
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from infra import cli

ROOT = Path(__file__).resolve().parent.parent
TINY = ("ddpm --images 64 --batch 4 --channels 16 --multipliers 1 2 --attention 1 "
        "--image-size 16 --device cpu --seed 3 --save-every 0")   # a checkpoint at every step


def start(folder, out, steps):
    """Start a run in a process of its own; its output goes to OUT.log."""
    command = f"{TINY} --steps {steps} --out {out}".split()
    with open(folder / f"{out}.log", "w") as log:
        return subprocess.Popen([sys.executable, ROOT / "train.py", *command], cwd=folder,
                                stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})   # two at a time


def wait_for_checkpoint(path, seconds):
    """Wait for a new checkpoint, at most so many seconds, and up to a fifth of a second more."""
    modified = lambda: path.exists() and path.stat().st_mtime_ns
    before, deadline = modified(), time.monotonic() + seconds
    while modified() == before and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.2))


def survive(folder, kills, steps, patience):
    """Kill a run many times, let it finish, and compare it bit by bit with an undisturbed one.

    patience() -> seconds that the next kill waits for a checkpoint. AssertionError if anything is
    lost. -> the last step that was saved before the final start, the kills after new steps
    """
    undisturbed = start(folder, "undisturbed", steps)
    path, done, advances = folder / "killed/checkpoint.pt", 0, 0
    for _ in range(kills):
        process = start(folder, "killed", steps)
        wait_for_checkpoint(path, patience())
        process.send_signal(signal.SIGKILL)
        code, output = process.wait(), (folder / "killed.log").read_text()
        assert code == -signal.SIGKILL, output
        assert "resuming" not in output or f"at step {done + 1:,} of" in output
        if path.exists():   # whatever it was doing, its checkpoint can be read
            step = torch.load(path, weights_only=True)["step"]
            assert done <= step < steps
            advances, done = advances + (step > done), step
    for process, out in ((start(folder, "killed", steps), "killed"), (undisturbed, "undisturbed")):
        code, output = process.wait(), (folder / f"{out}.log").read_text()
        assert code == 0 and "finished" in output, output
    killed, whole = (torch.load(folder / out / path.name, weights_only=True)
                     for out in ("killed", "undisturbed"))
    assert killed["bf16"] == whole["bf16"]   # measured by each run, unless it resumes one
    for part in ("model", "ema"):
        assert all(torch.equal(killed[part][name], tensor) and tensor.isfinite().all()
                   for name, tensor in whole[part].items())
    assert not list(folder.glob("killed/*.tmp"))
    return done, advances


def main(arguments=None):
    parser = cli.Parser(prog="python -m experiments interruptions", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    kills = parser.parse_args(arguments).kills
    with tempfile.TemporaryDirectory() as folder:
        done, advances = survive(Path(folder), kills, 30 * kills, lambda: random.uniform(0, 5))
    print(f"killed {kills} times, {advances} times after new steps were saved, at step {done} of "
          f"{30 * kills} at last; finished with the bits of an undisturbed run")
