"""python train.py clip | ddpm | judge: train one model.

    python train.py clip                    the tiny preset: 32 px, two CPU cores, minutes
    python train.py ddpm --minutes 10       stop cleanly after ten minutes (so does Ctrl-C)
    python train.py ddpm                    the same run again: it goes on where it stopped
    torchrun --nproc_per_node 2 train.py ddpm       by two processes, on two GPUs or two cores
    python train.py ddpm -h                 every field of a config is a flag, such as --channels 48

A run's folder (runs/clip, ...) gets checkpoint.pt, to go on from; weights.pt, what sample.py reads;
loss.png and previews. Step n draws its pictures, times and noise from (seed, n): it is a function
of them and of the step before, so on one machine a run that was interrupted, or killed, ends with
the same weights as one that ran through.
"""
import argparse
import contextlib
import copy
import dataclasses
import math
import signal
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cars
import data
import jobs
import judge
import muon
import parallel
import plot
import tinyclip
import tinyddpm
from unet import UNetConfig


@dataclass
class TrainConfig:
    steps: int = 1000            # the length of the whole run; the learning rate reaches zero there
    batch: int = 128             # pictures per step, of all processes together
    accumulate: int = 1          # pieces that a batch is dealt with in: less memory, more time
    lr: float = 1e-3             # the highest learning rate, of both optimizers
    warmup: float = 0.03         # of the run, in which the learning rate climbs from zero
    weight_decay: float = 0.05   # of Muon's matrices; what AdamW trains does not decay
    pictures: int = 50_000       # how many of the car world are rendered; a folder gives all it has
    labels: str = "balanced"     # how often which car occurs: "balanced", or as in "shapenet"
    hold_out: str = ""           # pairs of colours never shown, such as "white+red,blue+yellow"
    shuffle: bool = False        # deal the captions out at random, to see what that mistake does


@dataclass
class CLIPTrainConfig(TrainConfig):
    clean: float = 0.125         # the share of a batch that carries no noise
    most_captions: int = 1024    # that one step compares a picture with


# What a preset means for each kind of model: the model's config, and that of its training.
PRESETS = {
    "tiny": {   # 32 x 32 pixels, two CPU cores
        "clip": (tinyclip.CLIPConfig(), CLIPTrainConfig(steps=1500, lr=2e-3)),
        "ddpm": (UNetConfig(), TrainConfig(steps=4500, batch=32, lr=4e-3, weight_decay=0.01)),
        "judge": (judge.JudgeConfig(), TrainConfig(steps=800)),
    },
    "small": {   # 64 x 64 pixels, a GPU
        "clip": (tinyclip.CLIPConfig(image_size=64, patch=8, width=192, heads=6),
                 CLIPTrainConfig(steps=3000, lr=2e-3)),
        "ddpm": (UNetConfig(image_size=64, channels=64, multipliers=(1, 2, 2, 4),
                            attention=(2, 3)),
                 TrainConfig(steps=20_000, batch=64, lr=2e-3, weight_decay=0.01)),
        "judge": (judge.JudgeConfig(size=64), TrainConfig(steps=800)),
    },
    "base": {   # 128 x 128 pixels, the size of ShapeNet's pictures, a GPU
        "clip": (tinyclip.CLIPConfig(image_size=128, patch=16, width=256, heads=8, layers=4),
                 CLIPTrainConfig(steps=5000, lr=1e-3)),
        "ddpm": (UNetConfig(image_size=128, channels=64, multipliers=(1, 1, 2, 2, 4), blocks=2,
                            attention=(3, 4)),
                 TrainConfig(steps=50_000, batch=64, lr=1e-3, weight_decay=0.01)),
        "judge": (judge.JudgeConfig(size=128), TrainConfig(steps=800)),
    },
}


# ---- a run: begin, go on, save -------------------------------------------------------------------

class Run(NamedTuple):
    """One run on its way. What training changes are the last four, all in place."""
    job: jobs.Job
    folder: Path
    settings: dict           # all that must be the same when a run goes on
    device: torch.device
    bf16: bool               # whether to compute in bfloat16; a run that goes on does as before
    loss: Callable           # the job's, of the model: (own x_0, rows, generator) -> scalar
    model: torch.nn.Module   # the job's, on the device
    ema: torch.nn.Module     # its moving average: what previews show and weights.pt holds
    optimizers: tuple        # one for weight matrices, one for everything else
    history: list            # of (step, mean loss of the steps since the entry before)


def begin(job, folder, settings, options, device, saved=None):
    """-> a Run before its first step, or where a saved one was."""
    model = job.model.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    matrices, others = muon.split(model)
    optimizers = (
        muon.Muon(matrices, options.lr, options.weight_decay),
        torch.optim.AdamW(others, options.lr, betas=(0.9, 0.99), weight_decay=0., fused=True))
    bf16, = parallel.in_any(data.bf16_is_fast(device))
    history = []
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        history = saved["history"]
        if saved["device"] == device.type:
            bf16 = saved["bf16"]
    loss = parallel.with_mean_gradients(job.loss, model)
    return Run(job, folder, settings, device, bf16, loss, model, ema, optimizers, history)


def load(folder, kind, settings):
    """-> what checkpoint.pt in the folder holds, None if there is none. UserError if it is of
    another run."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    saved = data.load_checkpoint(path, f"{kind} run")
    if "bf16" not in saved:
        raise data.UserError(f"{path} is of an older version; start over with --fresh")
    for key, now in settings.items():
        old = saved["settings"].get(key)
        if old != now:
            raise data.UserError(f"{folder} holds a run with another {key} ({old}, now {now}): "
                                 "choose another --out, or start over with --fresh")
    return saved


def save(run, step):
    """weights.pt, to use; checkpoint.pt, to go on from; loss.png, to look at.

    checkpoint.pt comes after weights.pt: if it says that the run is finished, so are the weights.
    """
    data.save_checkpoint(run.folder / "weights.pt", {
        "kind": run.job.kind, "config": dataclasses.asdict(run.model.config),
        "data": run.settings["data"], "schedule": "cosine", "steps": step,
        "weights": data.fp16(run.ema), **run.job.content})
    data.save_checkpoint(run.folder / "checkpoint.pt", {
        "kind": f"{run.job.kind} run", "settings": run.settings, "step": step,
        "device": run.device.type, "bf16": run.bf16,
        "history": run.history, "model": run.model.state_dict(), "ema": run.ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers]})
    curve = tuple(zip(*run.history))   # all steps, all losses
    plot.lines(run.folder / "loss.png", {"loss": curve}, "step", "training loss")


# ---- the loop ------------------------------------------------------------------------------------

def learning_rate(step, options):
    """Linear warm-up, then half a cosine down to zero. step counts from 1."""
    warmup = max(1, round(options.warmup * options.steps))
    if step <= warmup:
        return options.lr * step / warmup
    progress = (step - warmup) / (options.steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(run, step, dataset, options):
    """One update of the model and of its average -> the loss and the gradient's norm, (2,)."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
    seed, device = run.settings["seed"], run.device
    x_0, rows = data.batch(dataset, seed, step, options.batch, device, parallel.own)
    # Dropout draws from torch's own generator, in every process something else; 1 +, because to
    # data.generator a 0 at the end would be nothing.
    torch.manual_seed(data.generator(seed, step, 1 + parallel.rank()).initial_seed())
    with data.autocast(device, run.bf16):
        loss = run.loss(x_0, rows, data.generator(seed, step, device=device))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    tinyddpm.ema_update(run.ema, run.model, step)
    return torch.stack([loss.detach(), norm])


@contextlib.contextmanager
def watch_for_signals():
    """A context with a list that gets the number of every Ctrl-C and of every request to terminate,
    so that the step at hand can end and be saved.

    Python's own way would break off anywhere, even between the model and its average. A second
    Ctrl-C does just that.
    """
    received = []

    def on_signal(number, frame):
        if number in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def record(run, step, measured):
    """Add the mean of the losses since the last entry to the history -> that mean.

    measured: what train_step returned, of the steps up to this one. UserError if any of it is not
    finite, so that nothing of it gets into a checkpoint.
    """
    measured = parallel.mean(torch.stack(measured)).cpu()   # (steps, 2): loss, gradient norm
    finite = measured.isfinite().all(dim=1)
    if not finite.all():
        first = step - len(measured) + 1 + int((~finite).nonzero()[0])
        raise data.UserError(
            f"the loss or its gradient is not finite at step {first:,}; {run.folder} keeps what it "
            "held before; try --fresh with half the --lr, or look for what is odd in the data")
    run.history.append((step, measured[:, 0].mean().item()))
    return run.history[-1][1]


def train(run, done, dataset, options, args):
    """From step done + 1 to the last one, or to where --minutes or a signal stops it."""
    last, preview_every = options.steps, max(50, options.steps // 10)   # a preview takes a while
    deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    measured, saved_at = [], time.monotonic()
    first_process = parallel.rank() == 0
    bar = tqdm(total=last * options.batch, initial=done * options.batch, desc=run.job.kind,
               unit="picture", unit_scale=True, disable=not first_process)
    with watch_for_signals() as received, bar:
        for step in range(done + 1, last + 1):
            measured.append(train_step(run, step, dataset, options))
            bar.update(options.batch)
            now = time.monotonic()
            stop, due = parallel.in_any(step == last or bool(received) or now > deadline,
                                        now > saved_at + args.save_every)

            if step % 50 == 0 or stop or due:   # not at every step: it waits for the device
                loss, measured = record(run, step, measured), []
                bar.set_postfix_str(f"loss {loss:.3f}")
            if stop or due:
                saved_at = now
                if first_process:
                    save(run, step)
            if first_process and (step % preview_every == 0 or step == last):
                with torch.no_grad(), data.autocast(run.device, run.bf16):
                    bar.write(f"step {step:,}: {run.job.preview(run.ema, run.folder)}")
            if stop:
                break

    if step == last:
        print(f"finished: {run.folder}/weights.pt")
        return
    again = "the same command without --fresh" if args.fresh else "the same command"
    print(f"stopped at step {step:,} of {last:,}; {again} goes on")
    if received:   # all is saved; the caller shall know why it ended
        raise SystemExit(128 + received[0])


# ---- the command line ----------------------------------------------------------------------------

def parse(arguments):
    """-> args, the model's config and the training's: those of the preset, changed by flags."""
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in jobs.JOBS:
        add_flags(kinds.add_parser(kind, help=f"python train.py {kind} -h lists its flags"), kind)
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{args.kind}"
    try:
        config, options = (changed(config, args) for config in PRESETS[args.preset][args.kind])
    except ValueError as error:   # a config refuses what cannot be built
        raise data.UserError(str(error)) from None
    check(args, options)
    return args, config, options


def add_flags(parser, kind):
    parser.add_argument("--data", default="cars",
                        help="cars, the built-in world, or a folder with pictures and captions")
    parser.add_argument("--preset", default="tiny", choices=list(PRESETS))
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on later")
    parser.add_argument("--save-every", type=float, default=120., metavar="SECONDS",
                        help="between checkpoints; default 120")
    parser.add_argument("--out", help=f"the run's folder; default runs/{kind}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    parser.add_argument("--fresh", action="store_true", help="start over, even if there is a run")
    # A default lives once, in its dataclass or its preset: a flag that is not given sets nothing.
    for config in PRESETS["tiny"][kind]:
        for name, value in dataclasses.asdict(config).items():
            several = isinstance(value, tuple)
            how = {"action": "store_true"} if value is False else {
                "nargs": "+" if several else None, "type": type(value[0] if several else value)}
            parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                                help=f"tiny: {value}", **how)


def changed(config, args):
    """-> the config with the values of those of its fields that were given as flags."""
    given = {name: type(value)(getattr(args, name))   # type: argparse makes lists of our tuples
             for name, value in dataclasses.asdict(config).items() if name in args}
    return dataclasses.replace(config, **given)


def check(args, options):
    """Refuse numbers with which nothing could be trained."""
    for name in ("steps", "batch", "accumulate", "pictures"):
        if getattr(options, name) < 1:
            raise data.UserError(f"--{name} must be at least 1, not {getattr(options, name)}")
    for name, value in (("lr", options.lr), ("minutes", args.minutes)):
        if value is not None and not value > 0:   # so that NaN is refused too
            raise data.UserError(f"--{name} must be more than 0, not {value}")
    parts = parallel.processes() * options.accumulate
    if options.batch % parts:
        raise data.UserError(f"--batch {options.batch} cannot be divided evenly among "
                             f"{parallel.processes()} processes x {options.accumulate} pieces")
    data.check_range("--save-every", args.save_every, 0, math.inf)
    for name in ("warmup", "clean", "weight-decay"):
        data.check_range(f"--{name}", getattr(options, name.replace("-", "_"), 0), 0, 1)
    if options.labels not in cars.FREQUENCIES:
        raise data.UserError(f"--labels must be one of {', '.join(cars.FREQUENCIES)}, not "
                             f"{options.labels}")
    data.check_range("--seed", args.seed, 0, 2 ** 63 - 1)


def pick_device(name):
    """data.pick_device; of several GPUs, each process has its own."""
    several, gpus = parallel.processes() > 1, torch.cuda.device_count()
    if several and gpus and name in ("auto", "cuda"):
        if parallel.local_rank() >= gpus:
            raise data.UserError(f"there are {gpus} GPUs; start no more processes a machine, or "
                                 "use --device cpu")
        torch.cuda.set_device(parallel.local_rank())   # from here on it is what "cuda" means
    device = data.pick_device(name)
    if several and (device.type == "mps" or device.index is not None):
        raise data.UserError("several processes cannot share one GPU; use --device cpu")
    return device


def load_data(args, config, options):
    """-> the data sets to learn from and to look at on the way."""
    if args.kind == "judge":   # which never meets what CLIP and the diffusion model learn from
        second = config.net == "plain" and args.data == "cars"   # no folder has enough for two
        size, held_out = config.size, min(5000, options.pictures)
        splits = ("judge-2" if second else "judge"), "judge-test"
    else:
        size, held_out = config.image_size, min(2000, options.pictures)
        splits = "train", "validation"
    dataset, validation = (data.load(args.data, size, count, split, options.labels)
                           for split, count in zip(splits, (options.pictures, held_out)))
    if options.hold_out:
        dataset, validation = (data.without(part, options.hold_out)
                               for part in (dataset, validation))
    if options.shuffle:
        dealt = np.random.default_rng(args.seed).permutation(dataset.caption_of)
        dataset = dataset._replace(caption_of=dealt)
    return dataset, validation


def main(arguments=None):
    parallel.start()
    args, config, options = parse(arguments)
    device, folder = pick_device(args.device), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)   # or refuse now, not after the first save
    with parallel.one_at_first():
        dataset, validation = load_data(args, config, options)
    print(dataset.report, validation.report, sep="\n")
    torch.manual_seed(args.seed)   # for the initial weights
    job = jobs.JOBS[args.kind](config, options, dataset, validation, device)
    checksum = zlib.crc32(repr(dataset.spellings).encode() + dataset.caption_of.tobytes())
    settings = {"data": dataset.name, "data set": dataset.report, "captions' checksum": checksum,
                "seed": args.seed, **dataclasses.asdict(config), **dataclasses.asdict(options)}
    del settings["accumulate"]   # it is a matter of memory
    saved = None if args.fresh else parallel.from_first(
        lambda: load(folder, args.kind, settings))
    run = begin(job, folder, settings, options, device, saved)

    done = saved["step"] if saved else 0
    if done == options.steps:
        print(f"{folder} is finished ({done:,} steps); --fresh starts over")
        return
    if done:
        print(f"going on in {folder} at step {done + 1:,} of {options.steps:,}")
    if parallel.rank() == 0:
        # What a run leaves that is killed while it saves.
        for file in [*folder.glob("weights.*.tmp"), *folder.glob("checkpoint.*.tmp")]:
            file.unlink()
        if args.fresh:   # lest the next command goes on with what this one replaces
            (folder / "checkpoint.pt").unlink(missing_ok=True)
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{millions:.2f} million parameters on {device}; {job.note}")
    train(run, done, dataset, options, args)


if __name__ == "__main__":
    data.command(main)
