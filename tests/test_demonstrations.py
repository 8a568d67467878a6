"""What each chapter prints when it is run."""
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from conftest import ROOT


def run(path, folder):
    """Run a file with Python in a folder -> the lines that it prints"""
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run([sys.executable, path], cwd=folder, env=environment, encoding="utf-8",
                            capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.rstrip("\n").splitlines()


def run_alone(chapter, folder):
    """Run a copy of a chapter in an empty folder, with nothing else of this project."""
    return run(shutil.copy(ROOT / f"{chapter}.py", folder), folder)


def final_comment(chapter):
    """The output to expect: the comment at the end of a file, less remarks in parentheses."""
    lines = (ROOT / f"{chapter}.py").read_text("utf-8").rstrip().splitlines()
    start = max(i for i, line in enumerate(lines) if not line.startswith("#")) + 1
    return [re.sub(r" \([^()]*\)$", "", line[2:]) for line in lines[start:]]


def assert_like(lines, expected, digits=3.5):
    """Assert that words and whole numbers are the same, and other numbers, to so many units of
    their last digit."""
    number = r"-?\d+\.\d+"
    words, expected_words = (
        re.sub(number, "", "\n".join(text)).split() for text in (lines, expected))
    assert words == expected_words and words
    values, expected_values = (re.findall(number, "\n".join(text)) for text in (lines, expected))
    for value, like in zip(values, expected_values, strict=True):
        unit = 10 ** -len(like.partition(".")[2])
        assert abs(float(value) - float(like)) <= digits * unit, (value, like)


def test_tinyddpm_alone_learns_the_spiral(tmp_path):
    """Copied into an empty folder, it trains, and prints distances that fall with the steps, and a
    plot of the spiral."""
    lines, expected = run_alone("tinyddpm", tmp_path), final_comment("tinyddpm")
    assert_like(lines[:4], expected[:4], digits=10)   # two of three digits: training amplifies
    plot = lines[4:]
    assert all(len(line) == 48 for line in plot[:-1]) and 20 <= len(plot) <= 22
    points = Counter("".join(plot))
    assert points["#"] > 60 and points[" "] > 700   # on a line, not all over the plane


def test_tinyclip_alone_tokenizes_and_learns(tmp_path):
    """Copied into an empty folder, it prints the merges, the ids, a falling loss, and the right
    caption."""
    lines, expected = run_alone("tinyclip", tmp_path), final_comment("tinyclip")
    assert lines[:6] == expected[:6]   # the tokenizer's
    assert_like(lines, expected, digits=35)   # 0.35: training amplifies rounding
    losses = [float(line.split()[-1]) for line in lines[6:9]]
    assert losses[0] > losses[1] > losses[2] > 1.38   # ln 4 = 1.39


def test_cars_alone_prints_a_car(tmp_path):
    """Copied into an empty folder, it prints its speed, a caption, and a car in these colours."""
    speed, caption, *image = run_alone("cars", tmp_path)
    assert re.fullmatch(r"\d+ images/s of 32 x 32", speed) and caption == "a blue and yellow truck"
    letters = Counter("".join(image))
    assert len(image) == 11 and {len(line) for line in image} == {40}
    assert set(letters) <= set("rgbywk. ")
    assert [letter for letter, _ in letters.most_common(3)] == [" ", "b", "y"]


def test_data_prints_a_batch_and_saves_it(tmp_path):
    """It makes 256 images, describes a batch of 16, and saves it as a grid of two rows."""
    line, = run(ROOT / "data.py", tmp_path)
    assert line.startswith("256 images, 294 captions; a batch is (16, 3, 32, 32) in [-")
    assert re.search(r", 1\.00\], its first image 'a [a-z ]+'$", line)
    with Image.open(tmp_path / "out/batch.png") as grid:
        assert grid.size == (2 * (2 + 8 * 34), 2 * (2 + 2 * 34))
        assert grid.convert("L").getextrema()[0] < 60   # not all white


@pytest.mark.parametrize("chapter", ["guide", "unclip", "judge"])
def test_a_chapter_prints_its_final_comment(chapter, tmp_path):
    """Where a file ends in the output to expect, it prints that, but for the last digits."""
    expected = final_comment(chapter)
    assert expected
    assert_like(run(ROOT / f"{chapter}.py", tmp_path), expected)
