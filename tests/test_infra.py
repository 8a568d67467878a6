"""Commands, checkpoints, ranks, the optimizer and plots."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from infra import checkpoint, cli, distributed, muon, plot

ROOT = Path(__file__).resolve().parent.parent


# ---- commands ------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no broken pipes")
def test_a_reader_that_has_read_enough_is_no_error():
    """As `| head -1`: the command goes on in silence, and its exit code is 0."""
    for flags in ("-c", "-uc"):   # with a buffer and without
        running = subprocess.Popen(
            [sys.executable, flags, "import sys, time\nfrom infra import cli\n"
             "cli.run_command(lambda: (time.sleep(0.3), [print('line') for _ in range(9)], "
             "print('the end', file=sys.stderr)))"], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        running.stdout.close()
        assert running.stderr.read() == b"the end\n" and running.wait() == 0


def test_a_terminal_that_cannot_show_a_letter_gets_its_number():
    program = "from infra import cli; cli.run_command(lambda: print('red bus \\U0001f68c'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stdout.strip() == b"red bus \\U0001f68c", done.stderr


def fail_with(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, code, message", [
    (cli.UserError("no such thing"), 2, "no such thing"),
    (OSError(28, "No space left on device"), 2, "No space left"),
    (MemoryError(), 2, "smaller --batch, or, in training, --accumulate 2"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), 2, "--accumulate 2"),
    (RuntimeError("MPS backend out of memory"), 2, "--accumulate 2"),
    (OSError(12, "Cannot allocate memory"), 2, "--accumulate 2"),
    (cli.UserError("--device cuda cannot be used: out of memory"), 2, "cuda cannot be used: out")])
def test_an_error_is_one_line_and_code_2(monkeypatch, capsys, error, code, message):
    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit, match=str(code)):
        cli.run_command(fail_with(error))
    text = capsys.readouterr().err
    assert text.startswith("train.py: ") and message in text and len(text.splitlines()) == 1


def test_a_full_cpu_memory_is_one_line(capsys):
    """torch's allocator raises a plain RuntimeError."""
    with pytest.raises(SystemExit, match="2"):
        cli.run_command(lambda: torch.empty(2 ** 58))
    assert "--accumulate 2" in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        cli.run_command(fail_with(RuntimeError("shapes differ")))
    with pytest.raises(SystemExit, match="130"):
        cli.run_command(fail_with(KeyboardInterrupt()))


def test_numbers_and_flags_are_checked():
    options = lambda n, eta: SimpleNamespace(n=n, eta=eta, save_every=1)
    check = lambda options: cli.check_ranges(options, n=(1, 9), eta=(0, 1), save_every=(0, 1))
    check(options(1, 1))
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(cli.UserError, match="^--eta must be from 0 to 1"):
            check(options(9, value))
    with pytest.raises(cli.UserError, match="^-n must be from 1 to 9, not 10"):
        check(options(10, 1))
    with pytest.raises(cli.UserError, match="unrecognized arguments: --colour; -h explains"):
        cli.Parser().parse_args(["--colour"])


def test_devices_by_name():
    assert cli.pick_device("cpu") == torch.device("cpu")
    assert cli.pick_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("gpu7", "xpu:9"):
        with pytest.raises(cli.UserError, match=f"--device {name} cannot be used") as error:
            cli.pick_device(name)
        assert "\n" not in str(error.value)


def test_autocast_is_bfloat16_or_nothing(monkeypatch):
    x, cpu = torch.ones(4, 4, requires_grad=True), torch.device("cpu")
    for measured in (True, False):
        monkeypatch.setattr(cli, "bf16_is_fast", lambda device: measured)
        for bf16 in (None, True, False):
            with cli.autocast(cpu, bf16):
                expected = torch.bfloat16 if (measured if bf16 is None else bf16) else torch.float32
                assert (x @ x).dtype == expected and not torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("fp32, bf16, fast, most_rounds", [
    (5e-3, 1e-3, True, 5), (5e-3, 0.2, False, 5), (5e-3, 2.8e-3, True, 40),
    (5e-3, 3.2e-3, False, 40), (0.5, 0.4, False, 5)])
def test_bfloat16_is_chosen_by_the_least_times_and_soon(monkeypatch, fp32, bf16, fast, most_rounds):
    """Four of five products take ten times as long, as on a busy machine."""
    clock, calls, rng = [0.], [0], np.random.default_rng(0)

    def timeit(product, number):
        i = calls[0]
        calls[0] += 1
        seconds = (fp32, bf16)[i % 2] * (1 if (i // 2) % 5 == i % 2 else rng.uniform(1, 10))
        clock[0] += seconds
        return seconds

    monkeypatch.setattr(cli.timeit, "timeit", timeit)
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    assert cli.bf16_is_fast.__wrapped__(torch.device("cpu")) == fast
    assert calls[0] <= 2 * most_rounds


def test_signals_are_collected_and_the_second_one_raises():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with cli.catch_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# ---- checkpoints ---------------------------------------------------------------------------------

def test_a_checkpoint_comes_back_and_is_checked(tmp_path):
    path = tmp_path / "folder" / "x.pt"
    checkpoint.save(path, {"kind": "clip", "w": torch.arange(3.), "note": ["a", 1, 2.5, None]})
    assert torch.equal(checkpoint.load(path, "clip")["w"], torch.arange(3.))
    assert [p.name for p in path.parent.iterdir()] == ["x.pt"]
    with pytest.raises(cli.UserError, match="x.pt holds 'clip', but a .* of kind 'ddpm' is needed"):
        checkpoint.load(path, "ddpm")
    for damage in (path.read_bytes()[:200], b"", np.random.default_rng(0).bytes(999)):
        path.write_bytes(damage)
        with pytest.raises(cli.UserError, match="x.pt is not a readable checkpoint") as error:
            checkpoint.load(path, "clip")
        assert "\n" not in str(error.value)
    with pytest.raises(cli.UserError, match="there is no file .*none.pt; train one with: "
                                            "python train.py ddpm --fresh"):
        checkpoint.load(tmp_path / "none.pt", "ddpm run")
    with pytest.raises(cli.UserError, match="train one with: python train.py ddpm$"):
        checkpoint.load(tmp_path / "none.pt", "ddpm", "decoder")   # nothing is started over


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"kind": "clip"})
    before = path.read_bytes()
    with pytest.raises(Exception):
        checkpoint.save(path, {"kind": "clip", "bad": lambda: 0})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path):
    import resource
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"kind": "clip"})
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))   # bytes per file
    try:
        with pytest.raises(cli.UserError, match="cannot write .*x.pt: ") as error:
            checkpoint.save(path, {"kind": "clip", "w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_file_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    path, events = tmp_path / "x.bin", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with checkpoint.write_atomic(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and events == ["fsync", "rename"]


class Evil:
    """Unpickled, it would create a file."""

    def __reduce__(self):
        return open, ("was-here", "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "clip", "note": Evil()}, "x.pt")
    with pytest.raises(cli.UserError, match="not a readable checkpoint"):
        checkpoint.load("x.pt", "clip")
    assert not Path("was-here").exists()


class Linear(torch.nn.Linear):
    """The smallest model that has a config."""

    @classmethod
    def from_checkpoint(cls, content):
        model = cls(**content["config"])
        model.load_state_dict({name: p.float() for name, p in content["weights"].items()})
        return model.eval().requires_grad_(False)


@pytest.fixture
def content():
    torch.manual_seed(0)
    weights = checkpoint.fp16_weights(torch.nn.Linear(3, 2))
    return {"kind": "judge", "config": {"in_features": 3, "out_features": 2}, "weights": weights,
            "data": "cars", "steps": 1, "captions": [], "caption_labels": []}


def test_fp16_weights_come_back(tmp_path, content):
    assert all(p.dtype == torch.float16 for p in content["weights"].values())
    checkpoint.save(tmp_path / "x.pt", content)
    model, again = checkpoint.load_model(tmp_path / "x.pt", Linear, "judge")
    assert again["config"] == content["config"]
    assert torch.equal(model.weight, content["weights"]["weight"].float())


def test_the_checksum_is_of_every_weight(content):
    """A change of any tensor changes it; equal weights have the same."""
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    checksums = [checkpoint.weights_checksum(model)]
    assert checkpoint.weights_checksum(other) == checksums[0]
    for p in other.parameters():
        p.data[-1] += 1
        checksums.append(checkpoint.weights_checksum(other))
    assert len(set(checksums)) == 3


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c["weights"].pop("bias"), "bias"),
    (lambda c: c["weights"].update(more=torch.zeros(1)), "more"),
    (lambda c: c["weights"].update(bias=torch.zeros(4)), "bias"),
    (lambda c: c["config"].update(depth=1), "depth"),
    (lambda c: c.pop("config"), "holds no 'config'.* train.py judge$"),
    (lambda c: c.update(weights=None), "does not fit")])
def test_weights_that_do_not_fit_are_named(tmp_path, content, spoil, message):
    """A missing, an extra and a misshapen tensor, and what else can be wrong inside."""
    spoil(content)
    checkpoint.save(tmp_path / "x.pt", content)
    with pytest.raises(cli.UserError, match=message) as error:
        checkpoint.load_model(tmp_path / "x.pt", Linear, "judge")
    assert "\n" not in str(error.value)


# ---- ranks ---------------------------------------------------------------------------------------

RANK = """
import sys, time, torch
from infra import distributed as d
d.init()
rank, model = d.rank(), torch.nn.Linear(2, 2).to(memory_format=torch.channels_last)
assert (d.world_size(), d.local_rank(), d.pick_device("cpu").type) == (2, rank, "cpu")
model.weight.grad = torch.tensor([[1., 2.], [3., 4.]]) * (1 + 2 * rank)   # the bias has none
d.average_gradients(model)
assert model.weight.grad.tolist() == [[2., 4.], [6., 8.]] and model.bias.grad is None
assert d.any_rank(rank == 1, False, True) == [True, False, True]
made = []
assert d.broadcast(lambda: made.append(rank) or f"from {rank}") == "from 0"
assert made == [0][rank:]
assert d.mean_over_ranks(torch.tensor([1., rank])).tolist() == [1., 0.5]
with d.local_rank_0_first():
    time.sleep(0 if rank else 0.5)
    entered = time.time()
first = d.broadcast(lambda: entered)
assert rank == 0 or entered >= first
print("done", rank)
"""


def test_two_ranks_agree():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [subprocess.Popen(
        [sys.executable, "-c", RANK], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        for rank in range(2)]
    outputs = [running.communicate(timeout=100) for running in ranks]
    assert [running.returncode for running in ranks] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["done 0\n", ""]   # rank 0 alone prints


def test_without_torchrun_nothing_changes():
    distributed.init()
    assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
    model = torch.nn.Linear(2, 2)
    model(torch.ones(2)).sum().backward()
    before = model.weight.grad.clone()
    distributed.average_gradients(model)
    assert torch.equal(model.weight.grad, before)
    assert distributed.any_rank(True, False) == [True, False]
    assert distributed.broadcast(lambda: 7) == 7 and distributed.pick_device("cpu").type == "cpu"
    assert distributed.mean_over_ranks(torch.tensor(3.)) == 3
    with distributed.local_rank_0_first():
        pass


# ---- Muon ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(24, 80), (80, 24), (32, 32)])
def test_orthogonalize_keeps_directions_and_equalises_their_lengths(shape):
    """U S V^T becomes U S' V^T with S' near 1, whatever S was, from 1 down to 0.05."""
    torch.manual_seed(0)
    U, _, Vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = U * torch.logspace(0, -1.3, len(Vt)) @ Vt
    inside = U.T @ muon.orthogonalize(5. * matrix) @ Vt.T        # S', if the directions are kept
    assert torch.allclose(inside, inside.diag().diag(), atol=1e-4)
    assert inside.diag().min() > 0.67 and inside.diag().max() < 1.15


def test_newton_schulz_is_five_steps_of_the_printed_iteration():
    torch.manual_seed(0)
    expected = X = torch.nn.functional.normalize(torch.randn(5, 9, dtype=torch.float64), dim=None)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        A = expected @ expected.T
        expected = a * expected + (b * A + c * A @ A) @ expected
    assert torch.allclose(muon.newton_schulz(X), expected, atol=1e-10)


def test_parameters_do_not_mix():
    """Many in one optimizer take the steps that each would take alone; a kernel of a convolution
    takes those of its matrix."""
    torch.manual_seed(0)
    shapes = [(32, 48), (32, 48), (48, 32), (32, 16, 3, 3), (32, 48)]
    together = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = [torch.nn.Parameter(weight.detach().flatten(1).clone()) for weight in together]
    optimizers = [muon.Muon([weight], 0.1, 0.1) for weight in alone] + [
        muon.Muon(together, 0.1, 0.1)]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.allclose(a.flatten(1), b, atol=1e-5) for a, b in zip(together, alone))


def test_a_saved_optimizer_resumes_with_the_same_bits():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(32, 4, 3, 3).to(memory_format=torch.channels_last))]
    copies = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    first, second = muon.Muon(weights, 0.1, 0.1), muon.Muon(copies, 0.1, 0.1)
    for i in range(4):
        weights[0].grad = torch.randn(32, 4, 3, 3)
        copies[0].grad = weights[0].grad.clone()
        for optimizer in (first, second):
            optimizer.step()
        state, second = second.state_dict(), muon.Muon(copies, 0.1, 0.1)
        second.load_state_dict(state)
    assert torch.equal(weights[0], copies[0]) and weights[0].isfinite().all()


def test_a_muon_step_is_as_large_as_one_of_adamw_usually_is():
    """The root mean square of an update is about 0.2 lr, for any shape and any gradient's size."""
    torch.manual_seed(0)
    for shape in ((64, 32, 3, 3), (96, 32), (32, 128)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = 1e-6 * torch.randn(shape)
        muon.Muon([weight], lr=0.1, weight_decay=0.).step()
        assert weight.detach().square().mean().sqrt() == pytest.approx(0.02, rel=0.25)
        assert (weight * weight.grad).sum() < 0                   # downhill


def test_steps_of_muon_by_hand():
    """Three of them, as its docstring writes them, with Nesterov's momentum and a kernel as a
    matrix."""
    torch.manual_seed(0)
    start, grads = torch.randn(32, 4, 3, 3), torch.randn(3, 32, 4, 3, 3)
    weight = torch.nn.Parameter(start.clone())
    optimizer = muon.Muon([weight], lr=0.1, weight_decay=0.5)
    W, M = start.view(32, 36), torch.zeros(32, 36)
    for grad in grads:
        weight.grad, G = grad, grad.view(32, 36)
        optimizer.step()
        M = 0.95 * M + 0.05 * G
        update = muon.orthogonalize(0.95 * M + 0.05 * G)
        W = (1 - 0.1 * 0.5) * W - 0.1 * 0.2 * 36 ** 0.5 * update
        assert torch.allclose(weight.view(32, 36), W, atol=1e-5)


def test_muon_has_momentum():
    """When gradients turn round and are small, the next step still goes the old way; after 100
    steps it has turned too."""
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optimizer, path = muon.Muon([weight], lr=0.1, weight_decay=0.), []
    for gradient in [1.] * 20 + [-0.01] * 100:
        weight.grad = gradient * torch.eye(32)
        optimizer.step()
        path.append(weight.detach().diag().clone())
    assert (path[20] < path[19]).all() and (path[-1] > path[-2]).all()


def test_muon_of_a_narrow_network_has_nothing_to_do():
    optimizer = muon.Muon(muon.split(torch.nn.Linear(16, 16))[0], lr=0.1, weight_decay=0.)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["params"] == []


def test_every_parameter_has_one_optimizer_and_only_wide_matrices_have_muon():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 64, 3), torch.nn.GroupNorm(4, 64),
        torch.nn.Embedding(40, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 3))
    matrices, others = muon.split(model)
    assert [id(p) for p in matrices] == [id(model[1].weight), id(model[4].weight)]
    assert sorted(map(id, matrices + others)) == sorted(map(id, model.parameters()))


# ---- plots ---------------------------------------------------------------------------------------

def test_ticks_are_round_numbers_inside_the_range():
    assert plot.ticks(0, 950).tolist() == [0, 200, 400, 600, 800]
    assert np.allclose(plot.ticks(0.013, 0.99), [.2, .4, .6, .8])
    assert np.allclose(plot.ticks(3, 4), [3, 3.2, 3.4, 3.6, 3.8, 4])


def test_a_curve_is_drawn_where_its_numbers_are(tmp_path):
    """From the lower left corner of the frame to the upper right one, in the first colour."""
    path = tmp_path / "plot.png"
    plot.line_plot(path, {"loss": ([1, 5], [0., 2.])}, "step", "loss", 300, 200)
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (200, 300, 3)
    rows, columns = np.nonzero((pixels[26:160, 56:200] == (192, 57, 43)).all(axis=2))
    assert rows[columns.argmin()] > 120 and rows[columns.argmax()] < 60


@pytest.mark.parametrize("curves", [
    {"loss": ([1, 2, 3], [3., 3., 3.])}, {"a": ([1], [3.]), "b": ([2, 3], [1, 1])},
    {"loss": ([50], [2.])}])
def test_a_constant_and_a_single_point_have_axes_too(tmp_path, curves):
    """And are drawn, inside of the frame."""
    plot.line_plot(tmp_path / "a.png", curves, "step", "loss", 300, 200)
    inside = np.asarray(Image.open(tmp_path / "a.png"))[20:170, 50:230]
    for i in range(len(curves)):
        colour = [int(plot.PALETTE[i][j:j + 2], 16) for j in (1, 3, 5)]
        assert (inside == colour).all(axis=2).any()
