"""Two processes with half a batch each, or one that goes piece by piece, learn what one would."""
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import jobs
import parallel
import train

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "clip": "--batch 16 --clean 0.5 --width 32 --layers 1 --heads 2 --text-width 32 --text-layers 1"
            " --text-heads 2 --embed-dim 16 --image-size 16",
    "ddpm": "--batch 16 --channels 16 --multipliers 1 2 --attention 1 --image-size 16 --text",
    "judge": "--batch 16 --width 16 --size 16 --dropout 0",
}


def gradient(kind, cache, accumulate=1, context=contextlib.nullcontext()):
    """Of the first step of a toy run, in float32 -> name of parameter: gradient."""
    _, config, options = train.parse(
        [kind, *TINY[kind].split(), "--accumulate", str(accumulate), "--pictures", "100"])
    size = config.size if kind == "judge" else config.image_size
    before, data.CACHE = data.CACHE, Path(cache)
    dataset = data.load("cars", size, 100)
    data.CACHE = before
    torch.manual_seed(0)
    job = jobs.JOBS[kind](config, options, dataset, dataset, torch.device("cpu"))
    for p in job.model.parameters():   # what starts at zero would hide what lies behind it
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    loss = parallel.with_mean_gradients(job.loss, job.model)
    x_0, rows = data.batch(dataset, 0, 1, options.batch, share=parallel.own)
    with context:
        loss(x_0, rows, data.generator(0, 1)).backward()
    return {name: p.grad for name, p in job.model.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradients that one process gets, and the folder of the data set."""
    cache = tmp_path_factory.mktemp("cache")
    return {kind: gradient(kind, cache) for kind in TINY}, cache


def torchrun(*arguments, folder):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def close(ours, theirs):
    return set(ours) == set(theirs) and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
        and ours[name].isfinite().all() and ours[name].any() for name in theirs)


def test_two_processes_get_the_gradient_of_one(alone, tmp_path):
    """With every loss, each half in two pieces; CLIP's text-to-image term compares pictures of both
    halves, so half the batch is clean here."""
    expected, cache = alone
    torchrun(__file__, cache, tmp_path, folder=tmp_path)
    for number in (0, 1):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert all(close(found[kind], expected[kind]) for kind in TINY)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    """Two processes begin and stop; one of them speaks and writes. One process goes on, and ends
    where one that did the same alone ends."""
    monkeypatch.chdir(tmp_path)
    command = f"clip --steps 6 --pictures 64 --device cpu {TINY['clip']}"
    out = torchrun(ROOT / "train.py", *command.split(), "--out", "shared", "--minutes", "0.00001",
                   folder=tmp_path)
    assert out.count("stopped at step 1 of 6") == out.count("held-out") + 1 == 1
    train.main([*command.split(), "--out", "shared"])
    train.main([*command.split(), "--out", "alone", "--minutes", "0.00001"])
    weights = lambda saved: torch.cat([p.flatten() for p in saved["model"].values()])
    before = weights(torch.load("alone/checkpoint.pt", weights_only=True))   # after the first step
    train.main([*command.split(), "--out", "alone"])
    shared, alone = (torch.load(f"{out}/checkpoint.pt", weights_only=True)
                     for out in ("shared", "alone"))
    assert shared["step"] == alone["step"] == 6
    losses = [[loss for _, loss in saved["history"]] for saved in (shared, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    apart, moved = ((weights(alone) - other).norm() for other in (weights(shared), before))
    assert apart < 0.3 * moved   # rounding in bfloat16 makes it .13


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_have_the_gradient_of_the_whole(alone, kind, pieces):
    expected, cache = alone
    assert close(gradient(kind, cache, pieces), expected[kind])


@pytest.mark.parametrize("kind", TINY)
def test_training_needs_no_float64(alone, kind, no_float64):
    gradient(kind, alone[1], context=no_float64)


def test_the_share_of_a_process(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        shares.append(parallel.own(torch.arange(12)))
    assert [len(share) for share in shares] == [4, 4, 4]
    assert torch.equal(torch.cat(shares), torch.arange(12))


if __name__ == "__main__":   # one of the two processes
    parallel.start()
    torch.save({kind: gradient(kind, sys.argv[1], accumulate=2) for kind in TINY},
               Path(sys.argv[2]) / f"{parallel.rank()}.pt")
