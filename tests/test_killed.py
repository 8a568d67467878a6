"""A run that is killed again and again ends with the bits of one that was left alone.

    python tests/test_killed.py 100      so many kills, a few minutes; the suite does three
"""
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ("ddpm --pictures 64 --batch 4 --channels 16 --multipliers 1 2 --attention 1 "
        "--image-size 16 --device cpu --seed 3")


def start(folder, out, steps):
    """A run that saves at every step; what it says goes to OUT.log."""
    command = f"{TINY} --steps {steps} --save-every 0 --out {out}"
    with open(folder / f"{out}.log", "w") as log:
        return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *command.split()],
                                cwd=folder, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})   # two at a time


def end(running, folder, out):
    """Wait for its end -> its exit code, what it said."""
    return running.wait(600), (folder / f"{out}.log").read_text()


def survive(folder, kills, steps, moment):
    """Start a run, wait for the moment, kill it, so many times. Let it end. Compare it with one
    that nobody disturbed. -> how many of its steps had been saved, and in how many of its lives."""
    undisturbed = start(folder, "undisturbed", steps)
    path, done, advances = folder / "killed/checkpoint.pt", 0, 0
    for _ in range(kills):
        running = start(folder, "killed", steps)
        moment(path)
        running.send_signal(signal.SIGKILL)
        code, said = end(running, folder, "killed")
        assert code == -signal.SIGKILL, said
        assert "going on" not in said or f"at step {done + 1:,} of" in said
        if path.exists():   # whatever it was doing, what it left behind can be read
            step = torch.load(path, weights_only=True)["step"]
            assert done <= step < steps
            advances, done = advances + (step > done), step
    for running, out in ((start(folder, "killed", steps), "killed"), (undisturbed, "undisturbed")):
        code, said = end(running, folder, out)
        assert code == 0 and "finished" in said, said
    killed, whole = (torch.load(folder / out / "checkpoint.pt", weights_only=True)
                     for out in ("killed", "undisturbed"))
    assert killed["bf16"] == whole["bf16"]   # or the machine's speed has misled data.bf16_is_fast
    for part in ("model", "ema"):
        assert all(torch.equal(killed[part][name], tensor) and tensor.isfinite().all()
                   for name, tensor in whole[part].items())
    assert not list(folder.glob("killed/*.tmp"))
    return done, advances


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    dice = random.Random(0)

    def while_it_saves(path):
        """Up to a fifth of a second after the run's first checkpoint."""
        before, deadline = path.exists() and path.stat().st_mtime_ns, time.monotonic() + 60
        while not (path.exists() and path.stat().st_mtime_ns != before):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.2))

    assert survive(tmp_path, kills=3, steps=60, moment=while_it_saves)[1] == 3


if __name__ == "__main__":
    kills, began = int(sys.argv[1]), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done, advances = survive(Path(folder), kills, 30 * kills,
                                 lambda path: time.sleep(random.uniform(0, 8)))
        print(f"killed {kills} times, {advances} times after steps that were saved, {done} of "
              f"{30 * kills} in all; then it ended with the bits of an undisturbed run; "
              f"{time.monotonic() - began:.0f} s")
