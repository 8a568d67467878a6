"""The order of the house: which files there are, what they import, how long they are, and which
words they use."""
import ast
import functools
import graphlib
import re
import sys
from pathlib import Path

import pytest

import mutate

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {"tinyddpm", "tinyclip", "guide", "unclip", "data", "cars", "judge"}
COMMANDS = {"train", "sample"}
FOLDERS = {"infra", "experiments", "tests", "weights", "assets", ".ci"}
PAGES = {"README.md", "NOTATION.md", "LICENSE", ".gitignore", ".pytest.ini", "requirements.txt",
         "requirements-dev.txt", "requirements-benchmark.txt"}
GENERATED = {".git", "__pycache__", ".pytest_cache", ".venv", "cache", "runs", "out"}   # not ours

SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("infra/*.py"), *ROOT.glob("experiments/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
TEXTS = [ROOT / "README.md", ROOT / "NOTATION.md", ROOT / "weights/README.md",
         *sorted(ROOT.glob("experiments/*.md"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


# ---- files ---------------------------------------------------------------------------------------

def test_the_top_level_has_these_files_and_no_others():
    """Chapters, commands, pages and six folders."""
    found = {path.name for path in ROOT.iterdir()} - GENERATED
    assert found == {f"{name}.py" for name in CHAPTERS | COMMANDS} | FOLDERS | PAGES


def test_what_is_generated_is_ignored_by_git():
    """Caches, runs and outputs never get into a commit."""
    lines = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert {"/cache/", "/runs/", "/out/", "__pycache__/", ".pytest_cache/", "*.tmp"} <= set(lines)


# ---- imports -------------------------------------------------------------------------------------

OURS = CHAPTERS | COMMANDS | {"infra", "experiments", "tests"}
ALLOWED = {   # what each file may import of ours, wherever in the file; infra: see below
    "tinyddpm": set(), "tinyclip": set(), "cars": set(), "judge": set(), "guide": {"tinyddpm"},
    "unclip": {"guide", "tinyddpm"}, "data": {"cars", "infra"},
    "train": CHAPTERS | {"infra"}, "sample": CHAPTERS | {"infra"}}
ALONE = {   # the packages from outside that are enough for a file
    "tinyddpm": {"torch"}, "tinyclip": {"torch", "ftfy", "regex"}, "guide": {"torch"},
    "unclip": {"torch"},
    "judge": {"torch"}}


def imports(path):
    """All that a file imports, also in functions and under `__main__` -> dotted names"""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: import from the top level"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_only_go_down(path):
    """A file imports only what lies below it; nothing imports experiments but experiments."""
    ours, folder = tops(path) & OURS, path.parent.name
    if folder == "infra":
        assert ours <= {"infra"}
    elif folder == "experiments":
        assert ours <= OURS - {"tests"}
    else:
        assert ours <= ALLOWED[path.stem]


@pytest.mark.parametrize("name, packages", ALONE.items())
def test_a_chapter_can_be_copied(name, packages):
    """It needs these packages and the standard library."""
    assert tops(ROOT / f"{name}.py") - OURS - set(sys.stdlib_module_names) <= packages


def test_every_package_is_required():
    """What the source imports is listed in requirements.txt, and no more is."""
    third_party = set().union(*(tops(path) for path in SOURCES if path.stem != "benchmark"))
    third_party -= OURS | set(sys.stdlib_module_names)
    lines = (ROOT / "requirements.txt").read_text("utf-8").split()
    required = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert {"pillow" if name == "PIL" else name for name in third_party} == required


def test_imports_have_no_cycles():
    """Of modules, those of infra and experiments one by one."""
    modules = {name_of(path)[:-3].replace("/", "."): path for path in SOURCES}
    graph = {name: set() for name in modules}
    for name, path in modules.items():
        for imported in imports(path):   # "infra.cli", or "infra.cli.UserError"
            parts = imported.split(".")
            graph[name] |= {".".join(parts[:n]) for n in (1, 2)} & modules.keys()
    graphlib.TopologicalSorter(graph).prepare()


# ---- sizes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name_of)
def test_no_line_is_longer_than_100_columns(path):
    """And none ends in white space."""
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        assert len(line) <= 100 and line == line.rstrip(), f"{name_of(path)}:{number}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_function_is_longer_than_50_lines(path):
    """Nor has more than ten parameters."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = f"{name_of(path)}:{node.lineno} {node.name}"
            assert node.end_lineno - node.lineno < 50, where
            arguments = node.args
            assert len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs) <= 10, where


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_module_says_what_it_is(path):
    """In the first paragraph of its docstring, a sentence or two."""
    docstring = ast.get_docstring(tree(path))
    assert docstring and docstring.split("\n\n")[0][-1] in ".:?", name_of(path)


# ---- words ---------------------------------------------------------------------------------------

# Names of an earlier version, for which the field has words: image, extract, ddim_timesteps,
# predict_eps, multistep_x_0, build_denoiser, lookahead, targets, caption_probs, predict,
# contrastive_loss, any_rank, broadcast, templates, indices, DatasetError, bytes_to_unicode, ...
OLD_NAMES = set("""
    picture pictures random_times sampling_times noise_in extrapolated told told_as guided_by
    looking_ahead understand wishes find_target beliefs report_belief verdict promise grader Court
    convene NOTICED Job clip_job ddpm_job judge_job some_captions luck in_pieces in_any from_first
    one_at_first caption_of spellings Unusable Listing part_of byte_symbols canonical bracket Recipe
    Drawing Suspect log_prior prior_ratio hold_out""".split())
OLD_WORDS = """picture pictures told believes beliefs wishes court noticed lest understands
    spellings""".split()
OLD_WORD = re.compile(rf"\b({'|'.join(OLD_WORDS)})\b", re.IGNORECASE)
DATA = {"a picture of {}", "a picture of "}   # in templates: infra/image_folders.py, cars.py


def identifiers(path):
    """-> all names that a file defines or uses"""
    for node in ast.walk(tree(path)):
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_identifiers_are_the_words_of_the_field(path):
    """None is a name that only this project used."""
    assert not OLD_NAMES & set(identifiers(path))


@pytest.mark.parametrize("path", SOURCES + TEXTS, ids=name_of)
def test_prose_is_in_the_words_of_the_field(path):
    """No metaphors in docstrings, comments, messages and pages: a network is not told a thing, and
    believes nothing."""
    text = path.read_text("utf-8")
    for exception in DATA:
        text = text.replace(exception, "")
    found = [f"{name_of(path)}:{number}: {line.strip()}" for number, line in
             enumerate(text.splitlines(), 1) if OLD_WORD.search(line)]
    assert found == []


# ---- leftovers -----------------------------------------------------------------------------------

def defined(path):
    """-> the names that a module defines at its top level, but for dunder names"""
    for node in tree(path).body:
        targets = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            name.id for target in getattr(node, "targets", []) for name in ast.walk(target)
            if isinstance(name, ast.Name)]
        yield from (name for name in targets if not name.startswith("__"))


def test_no_name_is_defined_twice_or_imported_twice():
    """In one module, at its top level."""
    for path in SOURCES:
        names = [*defined(path)]
        for node in tree(path).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names += [alias.asname or alias.name for alias in node.names]
        assert len(names) == len(set(names)), (name_of(path), sorted(names))


def test_every_import_is_used():
    """In the file that has it."""
    for path in SOURCES:
        used = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
                assert names <= used, (name_of(path), names - used)


def test_every_name_is_used():
    """By another line of the source, or as a function that a page explains."""
    used = set()
    for path in SOURCES:
        used |= {node.id for node in ast.walk(tree(path))
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        used |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        used |= {alias.name for node in ast.walk(tree(path))
                 if isinstance(node, ast.ImportFrom) for alias in node.names}
        used |= {node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant)}
    pages = set(re.findall(r"\w+", " ".join(path.read_text("utf-8") for path in TEXTS)))
    unused = {f"{name_of(path)}: {name}" for path in SOURCES for name in defined(path)
              if name not in used | pages}
    assert unused == set()


# ---- mutants -------------------------------------------------------------------------------------

def test_every_mutant_has_its_place_and_its_tests():
    """Each text that tests/mutate.py replaces stands in its file exactly once, each word of its
    tests in the name of one; every chapter has mutants, and there are at least 80."""
    mutants = mutate.find_all()   # or SystemExit
    assert len(mutants) >= 80 and {f"{name}.py" for name in CHAPTERS | COMMANDS} <= {
        file for file, *_ in mutants}
    for name, words in [part for *_, tests in mutants for part in tests]:
        names = " ".join(defined(ROOT / f"tests/test_{name}.py"))
        assert words and all(word and word in names for word in words), (name, words)
