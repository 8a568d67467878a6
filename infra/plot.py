"""Line plots as PNG, drawn with Pillow."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infra.checkpoint import write_atomic

PALETTE = ["#c0392b", "#2c6fbb", "#2e8b57", "#8e44ad", "#d68910", "#555555"]   # then from the start
GRID = "#e6e6e6"


def ticks(low, high):
    """About five round numbers from low to high: multiples of 1, 2 or 5 x a power of 10."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def line_plot(path, curves, x_label, y_label, width=600, height=340):
    """Draw curves: name -> (xs, ys), finite numbers. The axes span the data."""
    image, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(image)
    legend = max(int(font.getlength(name)) for name in curves)   # right of the frame
    left, right, top, bottom = 56, width - legend - 20, 26, height - 42   # pixels
    xs, ys = (np.concatenate(series) for series in zip(*curves.values()))
    x_low, y_low = xs.min(), ys.min()
    x_high, y_high = (v.max() if np.ptp(v) else v.max() + 1 for v in (xs, ys))   # never a length 0
    to_x = lambda x: left + (x - x_low) / (x_high - x_low) * (right - left)   # data -> pixels
    to_y = lambda y: bottom - (y - y_low) / (y_high - y_low) * (bottom - top)
    # A text's anchor is two letters: left, middle or right, then ascender (top), middle, descender.
    for x in ticks(x_low, x_high):
        draw.line([(to_x(x), top), (to_x(x), bottom)], GRID)
        draw.text((to_x(x), bottom + 5), f"{x:.4g}", "black", font, "ma")
    for y in ticks(y_low, y_high):
        draw.line([(left, to_y(y)), (right, to_y(y))], GRID)
        draw.text((left - 5, to_y(y)), f"{y:.4g}", "black", font, "rm")
    draw.text(((left + right) / 2, height - 4), x_label, "black", font, "md")
    draw.text((6, 4), y_label, "black", font)
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        points = [(to_x(x), to_y(y)) for x, y in zip(xs, ys)]
        draw.line(points, colour, 2)
        for x, y in points if len(points) <= 20 else ():   # mark the points if they are few
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], colour)
        draw.text((right + 10, top + 16 * i), name, colour, font)
    with write_atomic(path) as file:
        image.save(file, "PNG")
