"""The pages: commands parse, files and names exist, figures are those of the results files."""
import ast
import contextlib
import functools
import importlib
import io
import json
import operator
import re
import shlex
import shutil
from pathlib import Path

import pytest

import cars
import guide
import sample
import tinyclip
import tinyddpm
import toys
import train
import unclip
from experiments import __main__ as experiments
from experiments import clip

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MODULES = {path.stem for path in ROOT.glob("*.py")} | {"infra", "experiments"}


def read(name):
    return (ROOT / name).read_text("utf-8")


# ---- sizes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["README.md", "experiments/README.md", "experiments/UNCLIP.md",
                                  "experiments/LATENTS.md", "experiments/PHOTOGRAPHS.md",
                                  "experiments/LOG.md"])
def test_a_page_is_short(name):
    """At most 12 KB."""
    assert len(read(name).encode()) <= 12_288


def test_the_readme_can_be_skimmed():
    """At most 170 lines, and no paragraph of more than four."""
    lines = README.splitlines()
    assert len(lines) <= 170
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", README, flags=re.DOTALL)):
        prose = [line for line in block.strip("\n").splitlines()
                 if not line.startswith(("|", "- ", "#", "!", "    ", "<")) and line[:1].isalpha()]
        assert len(prose) <= 4, block


# ---- commands ------------------------------------------------------------------------------------

PAGES = ["README.md", "weights/README.md", "experiments/README.md", "experiments/UNCLIP.md",
         "experiments/LATENTS.md", "experiments/PHOTOGRAPHS.md"]
DOCSTRINGS = ["train.py", "sample.py", "infra/distributed.py", "experiments/__main__.py",
              "experiments/tables.py", "experiments/interruptions.py"]
PROGRAMS = "python", "torchrun", "pip"


def commands(text):
    """All commands in code blocks and backticks. What follows two spaces or " #" explains."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines += [" ".join(span.split()) for span in spans]   # a span may go over a line's end
    for line in lines:
        for command in re.split(r"&&|;|  | #", line):
            if command.strip().split(" ")[0] in PROGRAMS:
                yield command.strip()


def test_commands_are_found():
    """In blocks, fences and backticks, without what explains them."""
    text = ("Run `python\na.py -n 2`, or\n\n    pip install -r b.txt && python c.py \"x y\"\n"
            "    python d.py      a word\n\n```bash\ntorchrun --n 2 e.py  # two\n```\n")
    assert sorted(commands(text)) == [
        "pip install -r b.txt", "python a.py -n 2", 'python c.py "x y"', "python d.py",
        "torchrun --n 2 e.py"]


@functools.cache
def help_of(parse, *arguments):
    """-> what a command prints for -h"""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse([*arguments, "-h"])
    return out.getvalue()


def check(command):
    """Run the parser of a command, whatever it is; an error if it refuses the arguments."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert all(word.startswith("--nproc_per_node") or word.isdigit() for word in words[:script])
        words = words[script:]
    if program == "pip":
        assert words[:2] == ["install", "-r"] and (ROOT / words[2]).is_file()
    elif words[:2] == ["-m", "pytest"]:
        assert "pytest" in read("requirements-dev.txt") and len(words) == 2
    elif words[:2] == ["-m", "experiments"]:
        check_experiment(words[2:])
    elif words[0] in ("train.py", "sample.py"):
        parse = train.parse if words[0] == "train.py" else sample.parse
        if words[-1] == "-h":
            assert help_of(parse, *words[1:-1])
        else:
            parse(words[1:])
    else:
        assert (ROOT / words[0]).is_file() and len(words) == 1


def check_experiment(words):
    if "..." in words:   # values that are left out
        words = words[:words.index("...") - 1]
    name, *flags = words or ["NAME"]
    if name == "NAME":   # for any
        assert "--each" in help_of(experiments.parse_args)
    elif name in experiments.STANDALONE:
        known = help_of(experiments.STANDALONE[name]) if flags else ""
        assert all(flag in known for flag in flags if flag.startswith("--"))
    else:
        experiments.parse_args(words)


@pytest.mark.parametrize("command", sorted({c for page in PAGES for c in commands(read(page))}))
def test_a_command_of_a_page_parses(command):
    """By the parser that it would meet."""
    check(command)


@pytest.mark.parametrize("command", sorted({
    c for file in DOCSTRINGS for c in commands(ast.get_docstring(ast.parse(read(file))) or "")}))
def test_a_command_of_a_docstring_parses(command):
    """By the parser that it would meet."""
    check(command)


def test_the_readme_commands_run(tmp_path, monkeypatch, capsys):
    """Those of train.py and sample.py at toy size, one after the other; "weights/" is there."""
    monkeypatch.chdir(tmp_path)
    toys.write_class_folders(tmp_path / "photos", 120)
    for name in ("car.png", "bus.png"):
        shutil.copy(tmp_path / "photos/airplane/0.png", name)
    count = 0
    for command in dict.fromkeys(commands(README)):
        program, script, *words = shlex.split(command)
        if program == "python" and script == "train.py":
            train.main([*words, *toys.FLAGS[words[0]].split(), "--steps", "2", "--fresh"])
            assert "finished: " in capsys.readouterr().out
            if words == ["clip"]:
                Path("weights").mkdir()
                shutil.copy("runs/clip/weights.pt", "weights/clip.pt")
        elif "--clip" in words:   # a published one: tests/test_published.py
            sample.parse(words)
        elif program == "python" and script == "sample.py" and words != ["-h"]:
            sample.main([*words, "-n", "1", "--steps", "2", "--device", "cpu"])
            assert re.search("[123] images (in|->) ", capsys.readouterr().out)
        count += script in ("train.py", "sample.py")
    assert count >= 12


@pytest.mark.parametrize("command", [
    "python train.py ddpm --preset small", "python train.py all", "python sample.py --colour red",
    "python nothing.py", "python -m experiments nothing", "pip install -r nothing.txt",
    "torchrun --nproc_per_node 2 train.py nothing", "python -m experiments guidance --methods a"])
def test_a_wrong_command_would_be_found(command):
    """So the tests above can fail."""
    with pytest.raises((Exception, AssertionError)):
        check(command)


def test_every_flag_exists():
    """Also those that stand alone, such as `--gif`."""
    known = " ".join([help_of(sample.parse), help_of(experiments.parse_args), "--nproc_per_node",
                      *(help_of(train.parse, kind) for kind in train.TASKS)])
    for page in PAGES:
        flags = {flag for span in re.findall(r"`([^`\n]+)`", read(page))
                 for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", span)}
        assert flags <= set(re.findall(r"--[a-z][\w-]+", known)), page
    for name in ("clip", "ddpm"):   # the first lines that a reader types
        assert f"python train.py {name}" in README


# ---- files and names -----------------------------------------------------------------------------

MADE = ("out/", "runs/", "cache/")   # by commands
EXAMPLES = {"captions.csv", "NAME.png", "NAME.txt", "vans.png", "photos/CLASS/*.png", "cars.txt",
            "car.png", "bus.png",
            "checkpoint.pt", "weights.pt", "loss.png",   # of the user, or in a run's folder
            "ViT-B-32.pt", "bpe_simple_vocab_16e6.txt"}   # published


@pytest.mark.parametrize("page", [*PAGES, "NOTATION.md", "experiments/LOG.md"])
def test_every_link_leads_to_a_file(page):
    """Images too; of links inside of the project."""
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page)):
        assert target.startswith("http") or (folder / target).exists(), target


@pytest.mark.parametrize("page", [*PAGES, "NOTATION.md"])
def test_every_file_that_is_named_exists(page):
    """In backticks; what commands make, and the user's own files, are known by name."""
    folders = ROOT, (ROOT / page).parent
    for span in re.findall(r"`([^`\n]+)`", read(page)):
        if span.startswith(PROGRAMS):
            continue
        for name in re.findall(r"[\w.*/-]+\.(?:py|md|json|pt|png|gif|txt|csv)\b|^\w+/$", span):
            if not name.startswith(MADE) and name not in EXAMPLES:
                assert any([*folder.glob(name)] for folder in folders), name


def test_every_chapter_is_listed():
    """In the README's table of files."""
    for path in [*ROOT.glob("*.py"), ROOT / "infra", ROOT / "experiments"]:
        name = path.name + "/" * path.is_dir()
        assert f"`{name}`" in README, name


@pytest.mark.parametrize("page", ["README.md", "NOTATION.md"])
def test_every_name_that_is_explained_exists(page):
    """Dotted names of ours in backticks, such as `tinyddpm.q_sample`."""
    found = [name for name in re.findall(r"`(\w+\.[\w.]+)`", read(page))
             if name.split(".")[0] in MODULES and not name.endswith(".py")]
    assert len(found) >= 4
    for name in found:
        parts = name.split(".")
        depth = 2 if parts[0] in ("infra", "experiments") else 1
        module = importlib.import_module(".".join(parts[:depth]))
        assert operator.attrgetter(".".join(parts[depth:]))(module) is not None, name


def test_python_examples_use_what_exists():
    """They compile, and each `module.name` of ours is there."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in MODULES:
                    assert hasattr(importlib.import_module(node.value.id), node.attr), node.attr


# ---- figures -------------------------------------------------------------------------------------

def fraction(value):
    return f"{100 * value:.1f} %"


def interval(low, high):
    return f"{100 * low:.1f} to {100 * high:.1f}"


def short(value):
    """.261, as statisticians write it"""
    return f"{value:.3f}".lstrip("0")


def one(value):
    return f"{value:.1f}"


def of_method(near, name, accuracy, bounds, second, kid, time):
    """A row of the table of methods."""
    for text, keys, form in (
            (accuracy, "prompt_accuracy", fraction), (bounds, "low high", interval),
            (second, "second_judge", fraction), (kid, "kid", short), (time, "relative_time", one)):
        yield near, text, "guidance", {"method": name}, keys, form


NUMBERS = [   # near this text, the README has this figure; results file, row, keys, format
    *of_method("| unguided", "none", "0.4 %", "0.2 to 1.0", "0.3 %", ".017", "1.0"),
    *of_method("| best of 64", "best-of-64", "17.6 %", "15.5 to 19.9", "17.0 %", ".022", "64.0"),
    *of_method("| `noise-unaware`", "noise-unaware", "54.4 %", "51.6 to 57.2", "50.9 %", ".215",
               "1.1"),
    *of_method("| `noise-aware`", "noise-aware", "97.7 %", "96.7 to 98.4", "97.0 %", ".056",
               "1.1"),
    *of_method("| `x0`", "x0", "91.5 %", "89.8 to 93.0", "90.4 %", ".129", "1.9"),
    *of_method("| `classifier-free`", "classifier-free", "99.3 %", "98.7 to 99.7", "98.5 %", ".022",
               "0.9"),
    *of_method("| `lookahead --scale 64`", "lookahead, conditional", "99.6 %", "99.0 to 99.8",
               "99.3 %", ".013", "0.8"),
    *of_method("| `unclip`", "unclip", "99.2 %", "98.4 to 99.5", "98.7 %", ".002", "0.6"),
    *of_method("| **`lookahead`", "lookahead", "99.4 %", "98.8 to 99.7", "98.7 %", ".016", "1.1"),
    ("top-1", "99.8 %", "clip_accuracy", {"t": 0}, "top-1", fraction),
    ("at t = 500", "93.9 %", "clip_accuracy", {"t": 500}, "top-1", fraction),
    ("The judge", "99.8 %", "judge", {"camera": "all"}, "prompt_accuracy", fraction),
    *(("then trucks", text, "failures", {"target": target}, "prompt_accuracy", fraction)
      for text, target in (("98.0 %", "body truck"), ("96.4 %", "main white"))),
    *(("Perturb CLIP", text, file, row, key, form)
      for file, row, texts in (
          ("perturbations", {"direction": "not perturbed"}, ("98.5 %", ".035")),
          ("guidance", {"method": "lookahead"}, ("99.4 %", ".016")))
      for text, key, form in zip(texts, ("prompt_accuracy", "kid"), (fraction, short))),
    *(("are wrong", text, "failures", {"target": "all"}, key, "{:,}".format) for text, key in (
        ("1,176", "samples"), ("7", "wrong"), ("4", "second_judge_accepts"),
        ("4", "clip_prob_above_94_percent"))),
    ("English is", "99.2 %", "phrasings", {"phrasing": "mean"}, "t = 0", fraction),
    *(("held out of CLIP", text, "composition",
       {"held_out_from": held_out, "pairs": "held out", "guidance": "lookahead"},
       "prompt_accuracy", fraction) for text, held_out in (("72.2 %", "both"),
                                                           ("95.4 %", "neither"))),
    *(("English is", text, "zeroshot", {"task": task, "way": way}, "prompt_accuracy", fraction)
      for text, task, way in (
          ("99.8 %", "all attributes", "zero-shot, 294 captions"),
          ("99.3 %", "all attributes", "linear probe, 10,000 images"),
          ("85.2 %", "pairs that CLIP never met", "zero-shot, 294 captions"),
          ("50.7 %", "two cars: left and right", "zero-shot, of two texts"),
          ("49.3 %", "one car or two", "zero-shot, of two texts"))),
    ("on one core) ", "85.0 %", "photographs_models", {"model": "judge"}, "accuracy", fraction),
    ("on one core) ", "98.0 %", "photographs_curve",
     {"method": "conditional lookahead", "scale": 16}, "prompt_accuracy", fraction),
    *(("`python train.py clip`", text, "training_loss", {"model": "clip"}, step, "{:.2f}".format)
      for text, step in (("6.75 at step 50", "50"), ("4.39 at 200", "200"), ("2.07", "2,100"))),
    *(("Without a prompt, guide", text, "guidance", {"method": method}, "kid", short)
      for text, method in ((".017", "none"), (".124", "none, without autoguidance"))),
    *(("--out runs/weak", text, "training_loss", {"model": "weak"}, step, form)
      for text, step, form in (("2", "minutes", str), (".642 at step 50", "50", short),
                               (".162 at 200", "200", short), (".095", "2,000", short))),
    *(("`python train.py ddpm`", text, "training_loss", {"model": "ddpm"}, step, short)
      for text, step in ((".641 at step 50", "50"), (".129 at 200", "200"), (".094", "1,000"),
                         (".074", "4,500"))),
    *((f"`python train.py {kind} ", text, "training_loss", {"model": kind}, step, short)
      for kind, text, step in (
          ("decoder", ".634 at step 50", "50"), ("decoder", ".128 at 200", "200"),
          ("decoder", ".069", "4,500"), ("prior", ".971 at step 50", "50"),
          ("prior", ".400 at 200", "200"), ("prior", ".154", "3,000"),
          ("upsampler", ".141 at step 50", "50"), ("upsampler", ".101 at 200", "200"),
          ("upsampler", ".063", "1,500"))),
    *(("`python train.py upsampler", text, "model_card", {"file": "upsampler.pt"}, key, one)
      for text, key in (("29.8", "psnr"), ("23.4", "psnr_bicubic"))),
    *(("`python train.py judge`", text, "training_loss", {"model": "judge"}, step, form)
      for text, step, form in (("4.80 at step 50", "50", "{:.2f}".format),
                               (".70 at 200", "200", lambda value: short(value)[:-1]),
                               (".015 at 800", "800", short))),
    ("`python train.py judge`", "99.8 %", "judge", {"camera": "all"}, "prompt_accuracy", fraction),
    *((f"| `python train.py {kind}", minutes, "training_loss", {"model": kind}, "minutes", str)
      for kind, minutes in (("clip", "16"), ("judge", "5"), ("ddpm", "26"), ("decoder", "30"),
                            ("prior", "4"), ("upsampler", "12"))),
    ("held out of CLIP", "26-minute", "training_loss", {"model": "ddpm"}, "minutes",
     "{}-minute".format)]


def units(text):
    """Rows of tables, items of lists, and paragraphs, each in one line."""
    found = [""]
    for line in text.splitlines():
        if not line.strip() or line.startswith(("|", "- ")) or re.match(r"\d+\. ", line):
            found.append("")
        found[-1] += line.strip() + " "
    return found


@pytest.mark.parametrize("near, text, file, selector, keys, form", NUMBERS,
                         ids=[f"{near.strip('|` *')}, {text}" for near, text, *_ in NUMBERS])
def test_a_figure_is_in_the_readme_and_in_its_results_file(near, text, file, selector, keys, form):
    """Both have it, in the same digits."""
    rows = [row for row in json.loads(read(f"experiments/results/{file}.json"))["rows"]
            if selector.items() <= row.items()]
    assert len(rows) == 1, rows
    values = [rows[0][key] for key in (keys.split() if keys not in rows[0] else [keys])]
    assert form(*values) in (text, re.split(r" at | minutes", text)[0])
    pattern = re.compile(rf"(?<![\d.]){re.escape(text)}(?!\d)")
    assert any(pattern.search(unit) for unit in units(README) if near in unit), "not in README.md"


def minutes(*rows):
    """The sum of the minutes of rows: (results file, key, value)."""
    return sum(row["minutes"] for file, key, value in rows
               for row in json.loads(read(f"experiments/results/{file}.json"))["rows"]
               if row.get(key) == value)


def scales():
    return [method.scale for method in guide.METHODS.values() if method.make_log_p and method.scale]


CONSTANTS = [   # near this text, the README has this figure; what it has to be, by the code
    ("made the sixteen images", "32 x 32", lambda: (
        f"{tinyclip.CLIPConfig().image_size} x {tinyddpm.UNetConfig().image_size}")),
    *((near, "128 x 128", lambda: "{0} x {0}".format(unclip.UpsamplerConfig().image_size))
      for near in ("made the sixteen images", "`python train.py upsampler")),
    ("An unconditional diffusion model", "42 minutes", lambda: "{} minutes".format(minutes(
        ("training_loss", "model", "clip"), ("training_loss", "model", "ddpm")))),
    ("An unconditional diffusion model", "74", lambda: str(minutes(
        ("model_card", "file", "ddpm.pt")))),
    ("The trained models come in", "(43 MB)", lambda: "({:.0f} MB)".format(
        sum(path.stat().st_size for path in (ROOT / "weights").rglob("*.pt")) / 1e6)),
    ("Nothing has to be downloaded", "50,000", lambda: f"{train.TrainConfig().images:,}"),
    ("top-1 among", "294 captions", lambda: f"{len(cars.CAPTIONS)} captions"),
    ("From t = 0", "0 to 1000", lambda: f"0 to {tinyddpm.T}"),
    ("the defaults,", "8 to 128", lambda: f"{min(scales()):g} to {max(scales()):g}"),
    ("must not grade", "294 captions", lambda: f"{len(cars.CAPTIONS)} captions"),
    ("must not grade", "1 in 294", lambda: f"1 in {len(cars.CAPTIONS)}"),
    ("must not grade", "25 steps", lambda: f"{guide.METHODS[guide.DEFAULT].steps} steps"),
    ("(`python -m experiments guidance", "25 steps once",
     lambda: f"{sample.METHODS['unclip'].steps} steps once"),
    ("(`python -m experiments guidance", "50 steps",
     lambda: f"{sample.METHODS['none'].steps} steps"),
    ("stays below", "1/4", lambda: "1/{:g}".format(1 / 0.5 ** 2)),   # sigma_data^2
    ("rather than take more", "25 steps", lambda: f"{guide.METHODS[guide.DEFAULT].steps} steps"),
    ("English is", "20 phrasings", lambda: f"{len(clip.HELD_OUT_PHRASINGS)} phrasings"),
    ("on one core) ", "536 minutes", lambda: "{} minutes".format(minutes(
        *(("photographs_models", "model", model) for model in ("CLIP", "DDPM, conditional"))))),
    ("Python 3.10", "3.10", lambda: "3.10")]   # pathlib.Path.with_stem, zip(strict=True)


@pytest.mark.parametrize("near, text, actual", CONSTANTS,
                         ids=[f"{near}, {text}" for near, text, _ in CONSTANTS])
def test_a_figure_in_the_readme_is_that_of_the_code(near, text, actual):
    """Numbers that the code fixes, and sums of measured ones."""
    assert text == actual()
    assert any(near in unit and text in unit for unit in units(README))


def test_repeated_steps_beat_more_steps():
    """As one of the README's lessons says: 25 steps taken twice, against 50 taken once."""
    rows = json.loads(read("experiments/results/steps_recurrence.json"))["rows"]
    assert "25 steps taken twice beat 50" in README
    for method in ("noise-aware", "x0-fast"):
        twice, once = (max(row["prompt_accuracy"] for row in rows if size.items() <= row.items())
                       for size in ({"method": method, "steps": 25, "recurrence": 2},
                                    {"method": method, "steps": 50, "recurrence": 1}))
        assert twice > once


NOT_MEASURED = re.compile(   # numbers that name something
    r"CIFAR-10|[Ss]cale 1\b|temperature (of )?1\b|equation 4|\(95 % interval\)|"
    r"Time: unguided = 1|best of 64|taken twice beat 50|above 60 degrees|^\d\. |\*\*\d\.|"
    r"\| \d: |then 0, 32 and 128|x_0|at step \d+|at t = \d+|t = 720|chance is 6\.83")


def test_every_number_is_held():
    """In prose and tables of the README; whoever writes one adds it above."""
    for unit in units(re.sub(r"^(    .*|```.*?```)$", "", README, flags=re.DOTALL | re.MULTILINE)):
        text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", unit)
        for near, known, *_ in sorted([*NUMBERS, *CONSTANTS], key=lambda row: -len(row[1])):
            if near in unit:
                text = text.replace(known, "")
        assert not re.search(r"\d", NOT_MEASURED.sub("", text)), (text, unit)
