"""A training run that is killed again and again loses nothing."""
import sys

import pytest

from experiments import interruptions


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Three kills, each while the run saves a checkpoint in every step."""
    done, advances = interruptions.survive(tmp_path, kills=3, steps=60, patience=lambda: 60)
    assert advances == 3 and done >= 3
