"""python evaluate.py TABLE: what README.md and RESULTS.md claim.

    python evaluate.py clip            accuracy, calibration against t; retrieval, word order, ...
    python evaluate.py ddpm            held-out loss against t; distance from real pictures
    python evaluate.py inversion       from pictures to noise and back
    python evaluate.py judge           the judges' own accuracy
    python evaluate.py guidance        all captions, one sample each, judged; a row per method
    python evaluate.py guidance --methods contrastive --scales 3 6 12 --prompts even --seed 1
                                       a sweep: the same, a row per scale, on half of the captions
    python evaluate.py sweep           one setting of the default method after another
    python evaluate.py failures        what is obeyed least: bodies, colours, camera heights
    python evaluate.py suspects        what makes pictures disobey: a row for each thing changed
    python evaluate.py composition     captions with pairs of colours that were never seen
    python evaluate.py figure          what guidance sees: the figure of the README

They are about the models that sample.py would use, and about the pictures these were trained on.
Tables are printed, and written as JSON with commit, seed and machine; pictures go beside them.
"""
import argparse
import json
import math
import platform
import subprocess
from pathlib import Path

import torch

import data
import figure
import guide
import measure
import plot
import suspects
import sweeps
import tables

TABLES = {
    "clip": tables.clip_table, "ddpm": tables.ddpm_table, "inversion": tables.inversion_table,
    "judge": tables.judge_table, "guidance": sweeps.guidance_table, "sweep": sweeps.sweep_table,
    "failures": sweeps.failures_table, "suspects": suspects.suspects_table,
    "composition": suspects.composition_table, "figure": figure.figure}


def show(row, header):
    """Print a row, a dictionary, as a line of a Markdown table."""
    if header:
        print("\n| " + " | ".join(row) + " |\n|" + "---|" * len(row))
    cells = [f"{cell:.3f}" if isinstance(cell, float) else "" if cell is None else str(cell)
             for cell in row.values()]
    print("| " + " | ".join(cells) + " |", flush=True)


def parse(arguments):
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--methods", nargs="+", default=["none", "clean", "contrastive", guide.DEFAULT],
        choices=[*guide.METHODS, *sweeps.BEST_OF], help="guidance: a row for each")
    add("--scales", type=float, nargs="+",
        help="guidance: a row for each; default: the method's own")
    add("--prompts", default="all", choices=list(sweeps.HALVES),
        help="guidance, sweep, failures: tune on one half of the captions, report on all")
    add("--each", type=int, default=1,
        help="guidance, sweep, failures, composition: samples of each caption")
    add("--prompt", default="a white and red car", help="figure: the caption to draw")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guide only at these times; default: the method's own")
    add("--steps", type=int, default=25, help="denoising steps")
    add("--eta", type=float, default=1., help="0 is DDIM, 1 as noisy as DDPM")
    add("--recurrence", type=int, default=2, help="take every step so many times")
    add("--no-prior", action="store_true",
        help="guide as if CLIP had met each caption as often as the DDPM")
    add("--batch", type=int, default=49, help="pictures at a time")
    add("--seed", type=int, default=0)
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--judge", help="a judge's weights.pt; default: as sample.py")
    add("--out", type=Path, default="out", help="folder for what is written")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_args(arguments)
    data.check_drawing(args)
    data.check_range("--each", args.each, 1, 1000)
    if not all(map(math.isfinite, args.scales or [])):
        raise data.UserError(f"--scales must be finite numbers, not {args.scales}")
    return args


def plot_shares(rows, path):
    """The shares that obey, if the rows are about such, by what stands before them."""
    shares = {}
    for row in rows:
        if "joint" in row and "low" in row:
            name = ", ".join(str(row[key]) for key in list(row)[:list(row).index("samples")])
            shares[name] = row["joint"], row["low"], row["high"]
    if shares:
        plot.bars(path, shares, "right by the judge")


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
    device, rows = data.pick_device(args.device), []
    with torch.no_grad(), data.autocast(device):
        for row in TABLES[args.table](measure.load_models(args, device), args):
            new_table = not rows or row.keys() != rows[-1].keys()
            show(row, header=new_table)   # as it comes: some take minutes
            rows.append(row)
    content = {**origin(args, device), "rows": rows}
    (args.out / f"{args.table}.json").write_text(json.dumps(content, indent=1))
    plot_shares(rows, args.out / f"{args.table}.png")


if __name__ == "__main__":
    data.command(main)
