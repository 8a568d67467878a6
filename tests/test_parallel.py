"""Two processes with half a batch each, or one that goes piece by piece, learn what one would."""
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


def gradient(kind, cache, accumulate=1):
    """Of the first step of a toy run, in float32 -> name of parameter: gradient."""
    data.CACHE = Path(cache)
    _, config, options = train.parse(
        [kind, *TINY[kind].split(), "--accumulate", str(accumulate), "--pictures", "100"])
    size = config.size if kind == "judge" else config.image_size
    dataset = data.load("cars", size, 100)
    torch.manual_seed(0)
    job = jobs.JOBS[kind](config, options, dataset, dataset, torch.device("cpu"))
    for p in job.model.parameters():   # what starts at zero would hide what lies behind it
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    loss = parallel.with_mean_gradients(train.Loss(job))
    x_0, rows = data.batch(dataset, 0, 1, options.batch, share=parallel.own)
    loss(x_0, rows, data.generator(0, 1)).backward()
    return {name: p.grad for name, p in job.model.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradients that one process gets, and the folder of the data set."""
    cache = tmp_path_factory.mktemp("cache")
    return {kind: gradient(kind, cache) for kind in TINY}, cache


def close(ours, theirs):
    return set(ours) == set(theirs) and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6)
        and ours[name].isfinite().all() and ours[name].any() for name in theirs)


def test_two_processes_get_the_gradient_of_one(alone, tmp_path):
    """With every loss; CLIP's text-to-image term compares pictures of both halves, so half the
    batch is clean here."""
    expected, cache = alone
    arguments = ["--standalone", "--nproc_per_node", "2", __file__, str(cache), str(tmp_path)]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *arguments], check=True,
                   timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    for number in (0, 1):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert all(close(found[kind], expected[kind]) for kind in TINY)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("pieces", [2, 4])
def test_pieces_have_the_gradient_of_the_whole(alone, kind, pieces):
    expected, cache = alone
    assert close(gradient(kind, cache, pieces), expected[kind])


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
    torch.save({kind: gradient(kind, sys.argv[1]) for kind in TINY},
               Path(sys.argv[2]) / f"{parallel.rank()}.pt")
