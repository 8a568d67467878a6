"""The tables of evaluate.py about guidance: the methods side by side, and one setting after
another.

models: checkpoints.Models, args: what the command line says. B pictures, K captions.
"""
from collections import Counter

import torch

import cars
import checkpoints
import data
import guide
import judge
import measure
import plot
import variants

BEST_OF = {f"best-of-{n}": n for n in (4, 16, 64)}   # methods that are none of guide.py's
HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}   # of captions


# ---- the methods side by side --------------------------------------------------------------------

def guidance_table(models, args):
    """--each samples of each caption, judged and measured; and what they cost.

    Yields a row for each method and scale as it comes, because the whole takes long. The first is
    of real pictures; the times are compared with those of the first method, unguided unless
    --methods says otherwise.
    """
    first_seconds = None
    indices = wanted(models, args)
    targets = indices % len(models.captions)
    if "classifier-free" in args.methods:
        checkpoints.check_told(models.unet)
    court = measure.convene(models, targets, args)
    for method, scale in [("real", 0.), *ways(args)]:
        if method == "real":   # others than those that all are compared with
            real = measure.real_pictures(models, targets, args, skip=args.each)
            drawing = measure.Drawing(real, 0, 0, 0.)
        elif method in BEST_OF:
            drawing = measure.best_of(BEST_OF[method], targets, models, args)
        else:
            how = measure.recipe(method, scale, models, args)
            drawing = measure.drawn(how, indices, models, args)
            first_seconds = first_seconds or drawing.seconds
        some = drawing.pictures[::max(1, len(targets) // 48)][:48]   # evenly from all captions
        data.save_grid(args.out / f"guidance-{method}-{scale:g}.png", some, zoom=2)
        yield {"method": method, "scale": scale,
               **measure.score(drawing.pictures, targets, models, court),
               "unet_calls": drawing.unet_calls, "unet_backwards": drawing.unet_backwards,
               "seconds": drawing.seconds,
               "times_first": drawing.seconds / first_seconds if first_seconds else None}


def wanted(models, args):
    """Which pictures: --each of every caption, or of every other one -> (N,) int, index i is of
    caption i % K."""
    K = len(models.captions)
    of_one = torch.arange(K, device=models.alpha_bar.device)[HALVES[args.prompts]]
    return torch.cat([of_one + K * i for i in range(args.each)])


def ways(args):
    """The methods, each at all the scales that are asked for, or at its own."""
    for method in args.methods:
        own = [guide.METHODS[method].scale] if method in guide.METHODS else [0.]
        for scale in args.scales if args.scales and own != [0.] else own:
            yield method, scale


# ---- who does not obey ---------------------------------------------------------------------------

def failures_table(models, args):
    """Where the default method fails: by what was wanted, and, of cars, by how high the camera is.

    mistaken for: what the judge saw most often instead, and how often.
    """
    indices = wanted(models, args)
    targets = indices % len(models.captions)
    court = measure.convene(models, targets, args)
    how = measure.recipe(guide.DEFAULT, None, models, args)
    x = data.to_float(measure.drawn(how, indices, models, args).pictures).to(targets.device)
    saw = judge.verdict(court.judge, x).cpu()                                 # (N, A)
    truth = measure.promised(targets, models, court)                          # (N, A)
    right = (saw == truth).all(1)                                             # (N,)
    for name, some in {**by_attribute(truth, court), **by_look(models, truth, court, x)}.items():
        if not some.any():
            continue
        low, high = judge.wilson(int(right[some].sum()), int(some.sum()))
        failed = (some & ~right).nonzero()[:, 0]
        often = Counter(describe(saw[i], truth[i], court) for i in failed).most_common(1)
        yield {"wanted": name, "samples": int(some.sum()),
               "joint": right[some].float().mean().item(), "low": low, "high": high,
               "mistaken for": f"{often[0][0]} ({often[0][1]})" if often else ""}


def describe(saw, truth, court):
    """saw, truth: (A,) -> what is wrong, such as "body truck, not van"."""
    return ", ".join(f"{name} {values[s]}, not {values[t]}" for (name, values), s, t in zip(
        court.attributes.items(), saw.tolist(), truth.tolist()) if s != t)


def by_attribute(truth, court):
    """truth: (N, A) -> {what is wanted: (N,) bool}"""
    groups = {"all": torch.ones(len(truth), dtype=torch.bool)}
    for i, (attribute, values) in enumerate(court.attributes.items()):
        groups |= {f"{attribute} {value}": truth[:, i] == v for v, value in enumerate(values)}
    return groups


def by_look(models, truth, court, x):
    """Cars of one and of two colours, and by how high the camera is -> {name: (N,) bool}"""
    if models.data != "cars":
        return {}
    one = truth[:, 1] == truth[:, 2]
    heights = measure.by_height(camera_heights(models, court, x))
    return {"one colour": one, "two colours": ~one, **heights}


def camera_heights(models, court, x):
    """From how high pictures of cars are seen, in degrees, by a linear regression on what the judge
    notices, learnt from real pictures -> (N,)

    On held-out pictures it is off by 7 degrees (root of the mean square).
    """
    real = data.load("cars", models.unet.config.image_size, measure.REAL, "validation").pictures
    first = data.SPLITS["validation"]
    degrees = torch.tensor([[cars.camera_height(0, first + i)] for i in range(len(real))])
    known = judge.features(court.judge, data.to_float(torch.tensor(real)).to(x.device)).cpu()
    centre, spread = known.mean(0), known.std(0) + 1e-6
    design = lambda f: torch.cat([(f - centre) / spread, torch.ones(len(f), 1)], dim=1)
    weights = torch.linalg.lstsq(design(known), degrees).solution             # (F + 1, 1)
    return (design(judge.features(court.judge, x).cpu()) @ weights)[:, 0]


# ---- one setting after another -------------------------------------------------------------------

FACTORS = (.25, .5, 1., 2., 4.)
SWEEPS = {   # what is changed -> the values that it gets; all else as "ahead" has it
    **{f"scale of {method}": [guide.METHODS[method].scale * factor for factor in FACTORS]
       for method in ("contrastive", "x0-fast", "ahead")},
    "share": [0., .25, .5, .9, 1.],
    "temperature": [1., 2., 10., 20.],
    "rivals": [9, 1, 0],
    "tau2": [1., .5, .2],
    "interval": [(1, 800), (1, 900), (1, 950), (200, 1000), (400, 1000)],
    "eta": [0., .5],
    "steps, recurrence": [(50, 1), (13, 4), (100, 1), (50, 2), (25, 4), (13, 8)]}


def sweep_table(models, args):
    """One setting of "ahead" changed, and all else left alone (the row of its own scale is the
    default); beside it two other methods by scale. A plot of what the scale trades likeness for."""
    indices, trade = wanted(models, args), {}
    targets = indices % len(models.captions)
    court = measure.convene(models, targets, args)
    for name, values in SWEEPS.items():
        for value in values:
            how, changed = setting(name, value, models, args)
            drawing = measure.drawn(how, indices, models, changed)
            row = {"changed": name, "to": str(value),
                   **measure.score(drawing.pictures, targets, models, court),
                   "unet_calls": drawing.unet_calls, "seconds": drawing.seconds}
            if name.startswith("scale of ") and row["kid"] is not None:
                method = name.removeprefix("scale of ")
                trade.setdefault(method, []).append((row["joint"], row["kid"]))
            yield row
    curves = {method: tuple(zip(*points)) for method, points in trade.items()}
    if curves:
        plot.lines(args.out / "trade-off.png", curves, "right by the judge",
                   "KID from real pictures")


def setting(name, value, models, args):
    """-> a Recipe, and the command line that goes with it."""
    if name.startswith("scale of "):
        return measure.recipe(name.removeprefix("scale of "), value, models, args), args
    if name == "steps, recurrence":
        args = measure.altered(args, steps=value[0], recurrence=value[1])
    elif name in ("interval", "eta"):
        args = measure.altered(args, **{name: value})
    else:
        return measure.recipe_of((name, value), lambda targets: variants.ahead_with(
            models, targets, **{name: value}), models, args), args
    return measure.recipe("ahead", None, models, args), args
