"""Two ranks train one model; one rank goes on with it; and no rank needs float64.

Run by torchrun, this file is one of the two ranks.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import conftest   # noqa: E402, F401 (ranks get the same texts)
import data   # noqa: E402
import toys   # noqa: E402
import train   # noqa: E402
from infra import distributed   # noqa: E402

STEPS = 6
COMMANDS = {kind: f"{kind} --steps {STEPS} {toys.FLAGS[kind]} --save-every 1000".split()
            for kind in ("clip", "ddpm", "judge")}


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def as_one_rank(folder):
    """Train every kind for one step; save this rank's images, gradients and weights."""
    results, average_gradients = {}, distributed.average_gradients
    batch, init = data.batch, train.Run.__init__

    def recorded_average(model):
        found["own gradient"] = flat_gradient(model)
        average_gradients(model)
        found["mean gradient"] = flat_gradient(model)

    def recorded_batch(*args, **kwargs):
        x_0, indices = batch(*args, **kwargs)
        found.setdefault("indices", []).append(torch.from_numpy(indices))
        return x_0, indices

    def recorded_init(run, *args):
        found["run"] = run
        init(run, *args)

    distributed.average_gradients, data.batch = recorded_average, recorded_batch
    train.Run.__init__ = recorded_init
    for kind, command in COMMANDS.items():
        found = {}
        train.main([*command, "--minutes", "0.00001"])
        distributed.init = lambda: None   # a process can join the others once only
        run = found.pop("run")
        found["weights"], found["ema"] = (
            torch.cat([p.detach().flatten() for p in model.parameters()])
            for model in (run.model, run.ema))
        found["indices"] = next(i for i in found["indices"] if len(i) == 4)   # not the preview's
        results[kind] = found
    torch.save(results, folder / f"rank{distributed.rank()}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> the folder where two ranks have begun three runs, what they printed, what each saved"""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, folder], cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return folder, done.stdout, ranks


@pytest.mark.parametrize("kind", COMMANDS)
def test_two_ranks_end_with_equal_weights(two_ranks, kind):
    """Each computes the gradient of other images; both step along the mean of the two."""
    first, second = (rank[kind] for rank in two_ranks[2])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ema"], second["ema"]) and first["weights"].isfinite().all()
    assert not torch.equal(first["indices"], second["indices"])
    assert not torch.equal(first["own gradient"], second["own gradient"])
    mean = (first["own gradient"] + second["own gradient"]) / 2
    for rank in (first, second):
        assert torch.allclose(rank["mean gradient"], mean, rtol=1e-5, atol=1e-7)
    assert mean.any()


def test_one_rank_prints_and_writes(two_ranks):
    """Every line comes once, and the checkpoint is that of both ranks."""
    folder, out, ranks = two_ranks
    assert out.count(f"stopped at step 1 of {STEPS}; the same command resumes") == len(COMMANDS)
    assert out.count("million parameters") == len(COMMANDS)
    for kind in COMMANDS:
        saved = torch.load(folder / "runs" / kind / "checkpoint.pt", weights_only=True)
        weights = torch.cat([p.flatten() for p in saved["model"].values()])   # there are no buffers
        assert saved["step"] == 1 and torch.equal(weights, ranks[0][kind]["weights"])


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_run_resumes_with_another_number_of_ranks(two_ranks, monkeypatch, capsys, kind):
    """One rank goes on where two have stopped, on whole batches, and learns no worse."""
    monkeypatch.chdir(two_ranks[0])
    train.main(COMMANDS[kind])
    out = capsys.readouterr().out
    assert f"resuming runs/{kind} at step 2 of {STEPS}" in out and "finished" in out
    train.main([*COMMANDS[kind], "--out", f"alone/{kind}"])
    resumed, alone = (torch.load(f"{out}/{kind}/checkpoint.pt", weights_only=True)
                      for out in ("runs", "alone"))
    assert resumed["step"] == alone["step"] == STEPS
    assert all(p.isfinite().all() for p in resumed["model"].values())
    losses = [saved["history"][-1][1] for saved in (resumed, alone)]
    assert losses[0] < 1.1 * losses[1]


def test_a_batch_that_ranks_cannot_divide_is_refused(monkeypatch):
    """Each rank takes the same number of micro-batches of the same size."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(train.cli.UserError, match="--batch 128 is not a multiple of 3 ranks x 1"):
        train.parse(["clip"])
    train.parse(["clip", "--batch", "126", "--accumulate", "2"])


@pytest.mark.parametrize("kind", COMMANDS)
def test_training_needs_no_float64(tmp_path, no_float64, kind):
    """A step of each kind, its record and preview; only the schedule is made in float64, on the
    CPU."""
    dataset, options = toys.squares(20, seed=0), train.TrainConfig(batch=8, steps=2)
    _, config, _ = train.parse(COMMANDS[kind])
    task = train.TASKS[kind][0](config, options, dataset, dataset, torch.device("cpu"))
    with no_float64:
        run = train.Run(task, options, dataset, tmp_path, 0, torch.device("cpu"))
        train.record(run, [train.train_step(run, 1)])
        task.preview(run.ema, tmp_path)
    assert run.history[0][1] > 0


if __name__ == "__main__":
    as_one_rank(Path(sys.argv[1]))
