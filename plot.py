"""An aside: lines and bars as PNG, all that we need of a plotting library, in Pillow."""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PALETTE = ["#c0392b", "#2c6fbb", "#2e8b57", "#8e44ad", "#d68910", "#555555"]   # then from the start


def ticks(low, high):
    """About five round numbers between low and high: multiples of 1, 2 or 5 x a power of 10."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def span(series):
    """The least and the greatest of all numbers; a constant gets room above it, for an axis."""
    values = np.concatenate([np.asarray(numbers, float) for numbers in series])
    low, high = float(values.min()), float(values.max())
    return low, high if high > low else low + 1


def lines(path, curves, x_label, y_label, width=600, height=340):
    """curves: name -> (xs, ys), finite numbers -> a line plot as PNG. Axes span the data."""
    image, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(image)
    legend = max(int(font.getlength(name)) for name in curves)   # it stands right of the frame
    left, right, top, bottom = 56, width - legend - 20, 26, height - 42   # in pixels

    x_low, x_high = span(xs for xs, _ in curves.values())
    y_low, y_high = span(ys for _, ys in curves.values())
    across = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)   # data -> pixels
    up = lambda y: bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    # A text's anchor is two letters: left, middle or right, then ascender (top), middle, descender.
    for x in ticks(x_low, x_high):
        draw.line([(across(x), top), (across(x), bottom)], "#e6e6e6")
        draw.text((across(x), bottom + 5), f"{x:.4g}", "black", font, "ma")
    for y in ticks(y_low, y_high):
        draw.line([(left, up(y)), (right, up(y))], "#e6e6e6")
        draw.text((left - 5, up(y)), f"{y:.4g}", "black", font, "rm")
    draw.text(((left + right) / 2, height - 4), x_label, "black", font, "md")
    draw.text((6, 4), y_label, "black", font)

    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        points = [(across(x), up(y)) for x, y in zip(xs, ys)]
        draw.line(points, colour, 2)
        if len(points) <= 20:   # few enough to be told apart
            for x, y in points:
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((right + 10, top + 16 * i), name, colour, font)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def bars(path, shares, label, width=640):
    """shares: name -> (share, low, high), in [0, 1] -> a bar for each as PNG, with its interval."""
    font = ImageFont.load_default(13)
    longest = max(font.getlength(name) for name in (*shares, label))
    left, top, row = 24 + int(longest), 26, 20   # pixels
    image = Image.new("RGB", (max(width, left + 200), top + row * len(shares) + 8), "white")
    draw = ImageDraw.Draw(image)
    across = lambda share: left + share * (image.width - 16 - left)
    draw.text((6, 4), label, "black", font)
    for share in (0, .25, .5, .75, 1):
        draw.line([(across(share), top), (across(share), image.height)], "#e6e6e6")
        draw.text((across(share), 4), f"{share:.0%}", "black", font, "ma" if share < 1 else "ra")
    for i, (name, (share, low, high)) in enumerate(shares.items()):
        y = top + i * row
        draw.text((left - 6, y + row // 2), name, "black", font, "rm")
        draw.rectangle([left, y + 3, across(share), y + row - 3], PALETTE[1])
        draw.line([(across(low), y + row // 2), (across(high), y + row // 2)], "black", 2)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":   # out/plot.png, out/bars.png: what they look like
    xs = np.linspace(0, 10, 200)
    lines("out/plot.png", {"sine": (xs, np.sin(xs)), "x / 10": (xs, xs / 10)}, "x", "y")
    bars("out/bars.png", {"half": (.5, .4, .6), "nearly all": (.95, .9, .98)}, "share")
