"""What each chapter shows when it is run."""
import runpy

import pytest

from conftest import ROOT


def expected(chapter):
    """The comment at the end of a file."""
    lines = (ROOT / f"{chapter}.py").read_text("utf-8").rstrip().splitlines()
    first = max(i for i, line in enumerate(lines) if not line.startswith("#")) + 1
    return [line[2:] for line in lines[first:]]


@pytest.mark.parametrize("chapter", [
    "cars", "folders", "data", "plot", "bpe", "tinyclip", "unet", "guide", "judge", "muon"])
def test_a_chapter_shows_itself_at_work(chapter, tmp_path, monkeypatch, capsys):
    """Where its file ends in the output to expect, that is what it prints, up to rounding."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / f"{chapter}.py"), run_name="__main__")
    out = capsys.readouterr().out.rstrip().splitlines()
    assert out or list(tmp_path.rglob("*.png"))
    if expected(chapter):
        assert [line[:12] for line in out] == [line[:12] for line in expected(chapter)]
    if chapter == "bpe":   # nothing to round
        assert out == expected(chapter)
