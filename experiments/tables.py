"""The tables of record: experiments/results/*.json, printed into the pages of this folder.

    python -m experiments tables      after a change of a JSON file

A JSON file holds one table: title, command, commit, machine, seed, note, and rows, a list of
dictionaries. Fractions are in 0..1, and printed as percent.
"""
import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from infra import cli

HERE = Path(__file__).parent
PAGES = "README.md", "UNCLIP.md", "LATENTS.md", "PHOTOGRAPHS.md"
SECTION = re.compile(r"(<!-- table (\w+)(?: (\w+)=(.+?))? -->\n).*?(<!-- end -->)", re.DOTALL)

FRACTIONS = {"prompt_accuracy", "low", "body", "main", "second", "second_judge", "disagree",
             "clip_prob", "top-1", "swapped", "all", "different", "order", "paraphrase",
             "captions@1", "captions@5", "captions@10", "images@1", "images@5", "images@10",
             "as the word", "changed", "others kept", *(f"t = {t}" for t in range(0, 1000, 50))}
PAIRS = {"low": ("high", " to "), "kid": ("kid_error", " ± "),   # printed in one column
         "pixel_kid": ("pixel_kid_error", " ± "),
         "unet_evaluations": ("unet_backwards", " + ")}
HEADINGS = {"low": "95 % interval", "kid": "KID", "pixel_kid": "KID of pixels", "ece": "ECE",
            "clip_prob": "CLIP's probability",
            "unet_evaluations": "U-Net evaluations", "parameters_m": "M parameters",
            "peer_parameters_m": "peer's", "ratio_to_default": "ratio to the peer's default"}


def format_number(key, value):
    """Format a value: three digits, such as .017; fractions as percent; KID with three decimals."""
    if value is None or isinstance(value, str):
        return value or ""
    if key in FRACTIONS:
        return f"{100 * value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}" if "kid" in key else f"{value:.3g}")


def format_cell(key, row):
    """Format row[key], with its partner from PAIRS behind it; "" where there is none."""
    partner, between = PAIRS.get(key, (None, ""))
    numbers = [format_number(key, row.get(k)) for k in (key, partner) if k]
    return between.join(filter(None, numbers))


def markdown_table(rows):
    """Format dictionaries as a Markdown table; columns are the keys in order of appearance."""
    partners = {partner for partner, _ in PAIRS.values()}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in partners]
    fractions = {key for key in FRACTIONS if not any(isinstance(row.get(key), str) for row in rows)}
    names = [HEADINGS.get(key, key.replace("_", " ")) + " (%)" * (key in fractions) for key in keys]
    lines = [" | ".join(names), "|".join(["---"] * len(keys)),
             *(" | ".join(format_cell(key, row) for key in keys) for row in rows)]
    return "".join(f"| {line} |\n" for line in lines)


def markdown_section(name, key=None, value=None):
    """Format results/NAME.json: title, origin, table, note; only rows with row[key] == value."""
    table = json.loads((HERE / f"results/{name}.json").read_text("utf-8"))
    rows = [row for row in table["rows"] if key is None or str(row[key]) == value]
    origin = f"`{table['command']}` (commit {table['commit']}, seed {table['seed']})"
    origin += f", {value}" if value else ""
    same, counts = {key}, {row.get("samples") for row in rows}   # columns equal in every row
    if len(counts) == 1 and None not in counts:
        origin += f", {counts.pop():,} images a row"
        same.add("samples")
    rows = [{k: v for k, v in row.items() if k not in same} for row in rows]
    return f"### {table['title']}\n\n{origin}\n\n{markdown_table(rows)}\n{table['note']}\n"


def write_tables(arguments=None):
    """Renew the sections of PAGES, <!-- table NAME [key=value] --> to <!-- end -->."""
    cli.Parser("python -m experiments tables", description=__doc__).parse_args(arguments)
    for path in (HERE / page for page in PAGES):
        text, count = SECTION.subn(lambda m: m[1] + markdown_section(m[2], m[3], m[4]) + m[5],
                                   path.read_text("utf-8"))
        path.write_text(text, "utf-8")
        print(f"{count} tables in {path}")


def provenance(args, device):
    """The commit, the machine and the flags that a table is from."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=HERE).stdout \
        if shutil.which("git") else ""
    return {"commit": commit.strip(), "seed": args.seed,
            "machine": f"{platform.machine()} {device}, {torch.get_num_threads()} threads",
            "arguments": {name: str(value) for name, value in vars(args).items()}}


def record(rows, name, args, device):
    """Print rows as they come, as a Markdown table; write them and provenance to --out/NAME.json"""
    done = []
    for row in rows:
        header, line, cells = markdown_table([row]).splitlines()
        if not done or row.keys() != done[-1].keys():
            print(f"\n{header}\n{line}")
        print(cells, flush=True)
        done.append(row)
    content = {**provenance(args, device), "rows": done}
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1), "utf-8")
