"""What each chapter shows when it is run."""
import re
import runpy

import pytest

from conftest import ROOT


def expected(chapter):
    """The comment at the end of a file."""
    lines = (ROOT / f"{chapter}.py").read_text("utf-8").rstrip().splitlines()
    first = max(i for i, line in enumerate(lines) if not line.startswith("#")) + 1
    return [line[2:] for line in lines[first:]]


def parts(lines):
    """-> the words without their digits, and the numbers as they are written."""
    text, number = "\n".join(lines), r"-?\d+\.?\d*"
    return re.sub(number, "", text).split(), re.findall(number, text)


@pytest.mark.parametrize("chapter", [
    "cars", "folders", "data", "plot", "bpe", "tinyclip", "unet", "guide", "judge", "muon"])
def test_a_chapter_shows_itself_at_work(chapter, tmp_path, monkeypatch, capsys):
    """Where its file ends in the output to expect, that is what it prints, but for the last digits
    of its numbers."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / f"{chapter}.py"), run_name="__main__")
    out = capsys.readouterr().out.rstrip().splitlines()
    assert out or list(tmp_path.rglob("*.png"))
    if expected(chapter):
        (words, numbers), (same_words, like_numbers) = parts(out), parts(expected(chapter))
        assert words == same_words
        for number, like in zip(numbers, like_numbers, strict=True):
            unit = 10 ** -len(like.partition(".")[2])   # of its last digit
            assert abs(float(number) - float(like)) < 3.5 * unit
    if chapter == "bpe":   # nothing to round
        assert out == expected(chapter)
