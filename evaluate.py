"""python evaluate.py TABLE: what README.md and RESULTS.md claim.

    python evaluate.py clip            accuracy and calibration against t
    python evaluate.py ddpm            held-out loss against t
    python evaluate.py inversion       from pictures to noise and back
    python evaluate.py judge           the judge's own accuracy
    python evaluate.py guidance        all captions, one sample each, judged; a row per method
    python evaluate.py guidance --methods contrastive --scales 3 6 12 --prompts even --seed 1
                                       a sweep: the same, a row per scale, on half of the captions
    python evaluate.py figure          what guidance sees: the figure of the README

They are about the models that sample.py would use, and about the pictures these were trained on.
Tables are printed, and written as JSON with commit, seed and machine; pictures go beside them.
"""
import argparse
import json
import os
import platform
import subprocess
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import alone
import data
import figure
import guide
import judge
import tinyclip
import tinyddpm


class Models(NamedTuple):
    clip: torch.nn.Module
    unet: torch.nn.Module
    alpha_bar: torch.Tensor       # (T + 1,)
    text_features: torch.Tensor   # (K, E)
    captions: list                # K, that CLIP knows
    log_prior: torch.Tensor       # (K,), see guide.contrastive
    data: str                     # the name of the data set


def load_models(args, device):
    pair = data.load_pair(tinyclip.from_checkpoint, tinyddpm.from_checkpoint, args.clip, args.ddpm,
                          device)
    print(pair.where)
    if pair.unet.config.T != 1000:
        raise data.UserError(f"these models have T = {pair.unet.config.T}; the tables are about "
                             "T = 1000")
    clip_counts = pair.ddpm_counts if args.no_prior else pair.clip_counts   # equal: a ratio of 1
    log_prior = guide.prior_ratio(pair.ddpm_counts, clip_counts).to(device)
    return Models(pair.clip, pair.unet, tinyddpm.cosine_alpha_bar().to(device),
                  pair.clip.encode_captions(pair.captions), pair.captions, log_prior, pair.data)


# ---- drawing, and remembering what was drawn -----------------------------------------------------

class Drawing(NamedTuple):
    """N pictures for N captions, and what they cost."""
    pictures: np.ndarray   # (N, H, W, 3) uint8
    unet: int              # evaluations of the U-Net for each of them,
    unet_backward: int     # and back-propagations through it
    seconds: float         # for all of them, without the loading


def drawn(name, scale, indices, models, args):
    """The pictures with these indices, N ints -> Drawing. Picture i is of caption i % K, from noise
    of its own, whatever the method.

    They are kept in cache/, by all that decides what they look like, so that a table which was
    interrupted goes on where it was.
    """
    interval = tuple(args.interval or guide.METHODS[name].interval)
    decides = (fingerprint(models), name, scale, interval, args.steps, args.eta, args.recurrence,
               args.no_prior, args.seed, indices.tolist())
    path = data.CACHE / f"drawn-{zlib.crc32(repr(decides).encode()):08x}.npz"
    if not path.exists():
        drawing = draw(name, scale, interval, indices, models, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".tmp"), "wb") as file:
            np.savez(file, **drawing._asdict())
        os.replace(path.with_suffix(".tmp"), path)
    kept = np.load(path)
    return Drawing(kept["pictures"], *(kept[key].item() for key in Drawing._fields[1:]))


def fingerprint(models):
    """A number that changes with the weights of CLIP or of the U-Net, and with the code that guides
    and samples."""
    code = zlib.crc32(b"".join(Path(module.__file__).read_bytes() for module in (guide, tinyddpm)))
    for model in (models.clip, models.unet):
        for p in model.parameters():
            code = zlib.crc32(p.cpu().numpy().tobytes(), code)
    return code


def draw(name, scale, interval, indices, models, args):
    unet, alpha_bar, K = models.unet, models.alpha_bar, len(models.captions)
    size, calls, pictures = unet.config.image_size, {"unet": 0, "unet_backward": 0}, []
    hooks = [unet.register_forward_hook(lambda *_: calls.update(unet=calls["unet"] + 1)),
             unet.last.register_full_backward_hook(
                 lambda *_: calls.update(unet_backward=calls["unet_backward"] + 1))]
    parts, start = indices.split(args.batch), time.perf_counter()
    for part in tqdm(parts, desc=f"{name} {scale:g}", leave=False):
        generators = [data.generator(args.seed, i) for i in part.tolist()]
        denoise = guide.guided_by(name, models.clip, unet, alpha_bar, models.text_features,
                                  part % K, scale, interval, models.log_prior)
        x_T = tinyddpm.noise(generators, (3, size, size), alpha_bar.device)
        pictures.append(data.to_uint8(   # waits for the device, so the time is true
            tinyddpm.sample(denoise, x_T, generators, alpha_bar, args.steps, args.eta,
                            recurrence=args.recurrence)))
    for hook in hooks:
        hook.remove()
    return Drawing(np.concatenate(pictures), *(count // len(parts) for count in calls.values()),
                   time.perf_counter() - start)


POOL = 2048   # unguided pictures, from which best_of chooses for all captions


def best_of(n, targets, models, args):
    """For each caption the best of n unguided pictures in CLIP's opinion -> Drawing, with what it
    would have cost to draw n for each.

    All choose from the same pool, each from n random ones of its own.
    """
    K = len(models.captions)
    first = K * (10_000 // K)   # a pool of its own: other rows draw pictures 0, 1, ...
    pool = drawn("none", 0., torch.arange(first, first + POOL), models, args)
    x = data.to_float(pool.pictures).to(models.alpha_bar.device)
    clean = torch.zeros(POOL, dtype=torch.long, device=x.device)
    fits = alone.clip_logits(models.clip, x, clean, models.text_features).softmax(1)   # (POOL, K)
    chosen = []
    for i, k in enumerate(targets.tolist()):
        some = torch.randperm(POOL, generator=data.generator(args.seed, n, i))[:n]
        chosen.append(some[fits[some, k].argmax()].item())
    each = pool.seconds / POOL
    return Drawing(pool.pictures[chosen], n * pool.unet, 0, n * each * len(targets))


# ---- measuring what was drawn --------------------------------------------------------------------

class Court(NamedTuple):
    """Who judges the pictures, and what they are compared with."""
    judge: torch.nn.Module
    promise: dict              # caption -> the labels that a picture of it must have, (A,)
    attributes: list           # A names
    real: torch.Tensor         # (N, F), what the judge notices in real pictures of these captions


def convene(models, targets, args):
    """-> the Court for pictures of these captions, N indices. UserError if there is no judge."""
    device = models.alpha_bar.device
    grader, content = data.load_judge(models.data, args.judge, judge.from_checkpoint, device)
    if not grader or not set(models.captions) <= set(content["captions"]):
        raise data.UserError(f"there is no judge for {models.data}; train one with: python "
                             f"train.py judge --data {models.data}")
    real = judge.features(grader, data.to_float(real_pictures(models, targets)).to(device))
    promise = dict(zip(content["captions"], content["caption_labels"]))
    return Court(grader, promise, list(content["attributes"]), real)


def real_pictures(models, targets, skip=0):
    """Held-out pictures of these captions, N indices -> (N, H, W, 3) uint8.

    No picture twice, as long as there are enough of its caption; the first `skip` of each caption
    are left out.
    """
    dataset = data.load(models.data, models.unet.config.image_size, 10_000, "validation")
    rows_of = {k: np.flatnonzero(dataset.caption_of == k) for k in set(targets.tolist())}
    taken, rows = {k: skip for k in rows_of}, []
    for k in targets.tolist():
        if not len(rows_of[k]):
            raise data.UserError(f"no held-out picture of {models.captions[k]!r}")
        rows.append(rows_of[k][taken[k] % len(rows_of[k])])
        taken[k] += 1
    return dataset.pictures[rows]


def measure(pictures, targets, models, court):
    """-> shares of the pictures in which the judge finds all (joint; low to high: 95 %) or one of
    the attributes right, the probability that CLIP gives the captions, KID and its error, and the
    diversity within a caption in terms of that of real pictures.

    pictures: (N, H, W, 3) uint8, targets: (N,) the captions that they were drawn for.
    """
    x = data.to_float(pictures).to(models.alpha_bar.device)
    truth = torch.tensor([court.promise[models.captions[k]] for k in targets.tolist()])   # (N, A)
    right = judge.verdict(court.judge, x).cpu() == truth                                  # (N, A)
    low, high = judge.wilson(int(right.all(1).sum()), len(right))
    logits = alone.clip_logits(models.clip, x, torch.zeros_like(targets), models.text_features)
    belief = logits.softmax(1)[torch.arange(len(x)), targets].mean().item()

    noticed = judge.features(court.judge, x)
    mixed = torch.randperm(len(x), generator=data.generator(0))   # both go caption by caption
    kid, error = judge.kid(court.real[mixed], noticed[mixed], block=min(200, len(x) // 4))
    spread = court.real.std(dim=0) + 1e-6
    variety = [judge.diversity(f / spread, targets) for f in (noticed, court.real)]
    return {"samples": len(right), "joint": right.all(1).float().mean().item(), "low": low,
            "high": high, **dict(zip(court.attributes, right.float().mean(0).tolist())),
            "clip_belief": belief, "kid": kid, "kid_error": error,
            "diversity": variety[0] / variety[1]}


# ---- guidance: is it obeyed? ---------------------------------------------------------------------

BEST_OF = {f"best-of-{n}": n for n in (4, 16, 64)}   # methods that are none of guide.py's
HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def guidance_table(models, args):
    """--each samples of each caption, judged and measured; and what they cost.

    A row for each method and scale; printed as it comes, because the whole takes long. The first
    is of real pictures; the times are compared with those of the first method, unguided unless
    --methods says otherwise.
    """
    K, rows = len(models.captions), []
    of_one = torch.arange(K, device=models.alpha_bar.device)[HALVES[args.prompts]]
    indices = torch.cat([of_one + K * i for i in range(args.each)])   # of a caption: i, i + K, ...
    targets = indices % K
    if "classifier-free" in args.methods:
        data.check_told(models.unet)
    court = convene(models, targets, args)

    def add(name, scale, drawing):
        row = {"method": name, "scale": scale, **measure(drawing.pictures, targets, models, court),
               "unet": drawing.unet, "unet_backward": drawing.unet_backward,
               "seconds": drawing.seconds}
        unguided = rows[1]["seconds"] if len(rows) > 1 else drawing.seconds
        row["times_first_row"] = drawing.seconds / unguided if unguided else 0.
        rows.append(row)
        some = drawing.pictures[::max(1, len(drawing.pictures) // 48)][:48]   # from all prompts
        data.save_grid(args.out / f"guidance-{name}-{scale:g}.png", some, zoom=2)
        show([row], header=len(rows) == 1)

    add("real", 0., Drawing(real_pictures(models, targets, skip=args.each), 0, 0, 0.))
    for name in args.methods:
        if name in BEST_OF:
            add(name, 0., best_of(BEST_OF[name], targets, models, args))
            continue
        for scale in (args.scales if name != "none" else None) or [guide.METHODS[name].scale]:
            add(name, scale, drawn(name, scale, indices, models, args))
    return rows


# ---- the command line ----------------------------------------------------------------------------

TABLES = {"clip": alone.clip_table, "ddpm": alone.ddpm_table, "inversion": alone.inversion_table,
          "judge": alone.judge_table, "guidance": guidance_table, "figure": figure.figure}


def show(rows, header=True):
    """Print rows, dictionaries with the same keys, as a Markdown table."""
    if header and rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def parse(arguments):
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--methods", nargs="+", default=["none", "clean", "contrastive"],
        choices=[*guide.METHODS, *BEST_OF], help="guidance: a row for each")
    add("--scales", type=float, nargs="+",
        help="guidance: a row for each; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guidance: only at these times; default: the method's own")
    add("--prompts", default="all", choices=list(HALVES),
        help="guidance: tune on one half of the captions, report on all")
    add("--each", type=int, default=1, help="guidance: samples of each caption")
    add("--judge", help="judge, guidance: a judge's weights.pt; default: as sample.py")
    add("--batch", type=int, default=49, help="guidance: pictures at a time")
    add("--prompt", default="a white and red car", help="figure: the caption to draw")
    add("--steps", type=int, default=50, help="guidance, figure: denoising steps")
    add("--eta", type=float, default=1., help="guidance, figure: 0 is DDIM, 1 as noisy as DDPM")
    add("--recurrence", type=int, default=1, help="guidance: how often each step is taken")
    add("--no-prior", action="store_true",
        help="guidance: as if CLIP had met each caption as often as the DDPM")
    add("--seed", type=int, default=0)
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--out", type=Path, default="out", help="folder for what is written")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_args(arguments)
    for name, low, high in (("steps", 1, 1000), ("eta", 0, 1), ("batch", 1, 10_000),
                            ("recurrence", 1, 100), ("each", 1, 1000), ("seed", 0, 2 ** 63 - 1)):
        if not low <= getattr(args, name) <= high:   # NaN is refused too
            raise data.UserError(
                f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    return args


def origin(args, device):
    """Where a table comes from: commit, machine and arguments."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = done.stdout.strip()
    except OSError:   # no git here
        commit = ""
    machine = f"{platform.machine()} {device}, {torch.get_num_threads()} threads"
    arguments = {key: str(value) for key, value in vars(args).items()}
    return {"commit": commit, "machine": machine, "arguments": arguments}


def main(arguments=None):
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    with torch.no_grad(), data.autocast(device):
        about = device if args.table == "judge" else load_models(args, device)
        rows = TABLES[args.table](about, args)
    if args.table != "guidance":   # which shows each row as it comes
        show(rows)
    content = {**origin(args, device), "rows": rows}
    (args.out / f"{args.table}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    data.command(main)
