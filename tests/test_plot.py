import numpy as np
from PIL import Image

import plot


def test_ticks_are_round_numbers_inside_the_span():
    assert plot.ticks(0, 950).tolist() == [0, 200, 400, 600, 800]
    assert np.allclose(plot.ticks(0.013, 0.99), [.2, .4, .6, .8])
    assert np.allclose(plot.ticks(3, 4), [3, 3.2, 3.4, 3.6, 3.8, 4])


def test_a_curve_is_drawn_where_its_numbers_are(tmp_path):
    """From the lower left corner of the frame to the upper right one, in the first colour."""
    plot.lines(tmp_path / "a" / "plot.png", {"loss": ([1, 5], [0., 2.])}, "step", "loss", 300, 200)
    pixels = np.asarray(Image.open(tmp_path / "a" / "plot.png"))
    assert pixels.shape == (200, 300, 3)
    rows, columns = np.nonzero((pixels[26:160, 56:200] == (192, 57, 43)).all(axis=2))
    assert rows[columns.argmin()] > 120 and rows[columns.argmax()] < 60


def test_a_constant_has_an_axis_too(tmp_path):
    plot.lines(tmp_path / "plot.png", {"loss": ([1, 2, 3], [3., 3., 3.])}, "step", "loss")
    assert (tmp_path / "plot.png").exists()


def test_bars_are_as_long_as_their_shares(tmp_path):
    plot.bars(tmp_path / "bars.png", {"half": (.5, .4, .6), "all": (1., .9, 1.)}, "share")
    pixels = np.asarray(Image.open(tmp_path / "bars.png"))
    blue = (pixels == (44, 111, 187)).all(axis=2)
    lengths = blue[[26 + 5, 26 + 20 + 5]].sum(axis=1)   # near the top of each bar
    assert lengths[1] > 300 and abs(lengths[0] / lengths[1] - 0.5) < 0.01
