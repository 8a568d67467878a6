"""Chapter 6: the built-in data set: images of cars, ray cast with numpy, with exact captions.

Nothing has to be downloaded, and every caption is correct, so a classifier trained on these images
can check whether a generated one shows what its prompt asks for. An image and its labels depend on
(seed, index, size) only. There are 6 bodies, each with a main and a second colour out of 7:
6 * 7 * 7 = 294 captions, all equally likely. The images resemble the ShapeNet cars of Scene
Representation Networks (Sitzmann et al. 2019, arXiv 1906.01618): one car on white, viewed from the
upper hemisphere.

World coordinates in metres: x forward, y to the left, z up, the ground at z = 0.
Shapes: N images, F faces and V vertices of a solid. Images are RGB, uint8 (N, size, size, 3).

The other chapters need the captions, what descriptions() returns, shown in data.Dataset, and
render(): indices in, images and labels out.
This file imports only numpy: copy it and it works. `python cars.py` prints a car.
Left out: shadows, reflections, curved surfaces, backgrounds.
"""
import itertools
import random
import re
from typing import NamedTuple

import numpy as np

BODIES = ["car", "sports car", "jeep", "bus", "van", "truck"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "gray"]
ATTRIBUTES = {"body": BODIES, "main": COLOURS, "second": COLOURS}

# The lowest index of each split. The ranges are disjoint, so no model is tested on training images.
TRAIN, VALIDATION, JUDGE_TRAIN, JUDGE_TEST = 0, 10_000_000, 20_000_000, 30_000_000
JUDGE_2_TRAIN = 40_000_000   # for an independent second judge


# ---- captions and labels -------------------------------------------------------------------------

def caption(body, main, second):
    """Write a caption: "a white and red car", or "a red car" if both colours are red.

    body: int, index into BODIES, main, second: int, indices into COLOURS -> str

    The order matters: main is the body shell, second the roof with its pillars, the stripe and the
    lower band. Buses, jeeps and vans have a panel in second on a roof in main; the pillars of a van
    are in main, too; trucks have a box in main, with a band and a panel in second.
    """
    return f"a {colour_words(main, second)} {BODIES[body]}"


def colour_words(main, second):
    """Name two colours, indices into COLOURS: "white and red", or "red" if both are"""
    return COLOURS[main] if main == second else f"{COLOURS[main]} and {COLOURS[second]}"


def caption_index(labels):
    """Index CAPTIONS: labels (..., 3) int, columns body, main, second -> (...) int in 0..293."""
    body, main, second = labels[..., 0], labels[..., 1], labels[..., 2]
    return (body * len(COLOURS) + main) * len(COLOURS) + second


def caption_labels(index):
    """Invert caption_index: (...) int in 0..293 -> (..., 3) int, columns body, main, second."""
    n = len(COLOURS)
    return np.stack([index // n ** 2, index // n % n, index % n], axis=-1)


CAPTIONS = [caption(*caption_labels(np.array(i))) for i in range(len(BODIES) * len(COLOURS) ** 2)]


# ---- English (skip at first) ---------------------------------------------------------------------

# Other names of the bodies and colours. Without a body it is a vehicle.
NOUNS = {"car": "auto, automobile, sedan, motorcar", "sports car": "coupe, racing car",
         "jeep": "SUV, 4x4, off-roader", "bus": "coach, omnibus", "van": "minivan, people carrier",
         "truck": "lorry, pickup", "vehicle": "motor vehicle"}
SHADES = {"red": "crimson, scarlet, reddish", "green": "emerald, greenish",
          "blue": "navy, azure, bluish", "yellow": "lemon, yellowish", "white": "ivory, whitish",
          "black": "ebony, blackish", "gray": "grey, silver, greyish"}
# These never stand in one text, to test whether CLIP combines words that it met apart.
APART = [{"crimson", "lorry"}, {"navy", "coach"}, {"silver", "minivan"}, {"emerald", "pickup"},
         {"ivory", "sedan"}]

# Ways to say it, by what is named. {n}: noun, {N}: its plural, {m}, {s}: main and second colour,
# {a}: "a", "the", "this" or nothing. {painted}, {body}, ... are replaced by one of their PARTS:
#     "{painted} {with} {roof}"                 of PHRASES["two colours"]
#     "{a} {n} in {m} {with} {roof}"            one of the PARTS "painted"
#     "{a} {n} in {m} that has {a} {s} roof"    two more of "with" and "roof"
#     "the coach in red that has an azure roof"
# What stands twice is drawn twice as often. CLIP reads an order of words that it never met with the
# colours swapped, so what names body and roof stands here in both orders.
split = lambda text: re.split(r" \| |\n +", text.strip())
PAINTED = """
    {a} {m} {n} | {a} {m} {n} | {a} {n} in {m} | {a} {n} painted {m} | {a} {n} that is {m}
    {a} {n}, {m} | {a} {n}, which is {m} | {a} {n} coloured {m} | {a} {m}-coloured {n}
    {a} {m}-painted {n} | {a} {n} of {m} colour"""
PARTS = {name: split(text) for name, text in {
    "painted": PAINTED, "body": PAINTED.replace("{n}", "body"),
    "roof": PAINTED.replace("{n}", "roof").replace("{m}", "{s}"),
    "whose_roof": "whose roof is {s} | the roof of which is {s} | its roof is {s} | its roof {s}",
    "whose_body": "whose body is {m} | the body of which is {m} | its body is {m} | its body {m}",
    "its_roof": "its roof is {s} | the roof is {s} | it has {roof}",
    "its_body": "its body is {m} | the body is {m} | it has {body}",
    "n_body": "{a} {n} is {m} | {a} {n} has {body} | the body of {a} {n} is {m}",
    "n_roof": "{a} {n} has {roof} | the roof of {a} {n} is {s}",
    "with": "with | , | that has | which has | having | and | under", "on": "on | over | , | and",
    "and": "and | , | but", "while": "and | , | but | while"}.items()}
PHRASES = {kind: split(text) for kind, text in {
    "two colours": """
        {a} {m} and {s} {n} | {m} {s} {n} | {m} and {s} {N} | {a} two-tone {m} and {s} {n}
        {a} {n}, {m} and {s} | {a} {n} in {m} and {s} | {a} two-tone {n} in {m} and {s}
        {a} {n} painted {m} and {s} | {a} {n} coloured {m} and {s} | {a} {n} that is {m} and {s}
        {a} {n} is {m} and {s} | {painted} with {s} trim | {m} {N} with {s} roofs
        {painted} {with} {roof} | {painted} {with} {roof} | {painted} {with} {roof}
        {roof} {on} {painted} | {roof} {on} {painted} | {painted}, {whose_roof}
        {a} {s}-roofed {m} {n} | {a} {m}-bodied {n} {with} {roof} | {a} {m}-bodied, {s}-roofed {n}
        {a} {n} {with} {body} {and} {roof} | {a} {n} {with} {roof} {and} {body}
        {body} {and} {roof} on {a} {n} | {roof} {on} {body} on {a} {n}
        {a} {n} with {roof} on {body}
        {a} {n}, {whose_body} {and} {whose_roof} | {a} {n}, {whose_roof} {and} {whose_body}
        {a} {n} that is {m} {and} has {roof} | {a} {n} that has {roof} {and} is {m}
        {a} {n} is {m} {and} has {roof} | {a} {n} has {roof} {and} is {m}
        {n_body} {while} {its_roof} | {its_roof} {while} {n_body} | {n_roof} {while} {its_body}
        {its_body} {while} {n_roof} | the roof of {a} {m} {n} is {s}
        {a} {n} under {roof} is {m}""",
    "one colour": """
        {painted} | {painted} | {painted} | {m} {N} | {a} {n} in {m} all over | an all {m} {n}
        {a} completely {m} {n} | {a} {n} is {m} | {a} {n} is {m} all over
        {a} {n} which is {m} all over | {a} {n} with {a} {m} body and roof
        {a} {n} whose body and roof are {m}""",
    "main": """
        {a} {n} with {body} | {a} {m}-bodied {n} | {a} {n} that has {body} | {a} mostly {m} {n}
        {a} {n} whose body is {m} | the body of {a} {n} is {m}""",
    "second": """
        {a} {n} with {roof} | {n} with {s} roof | {a} {s}-roofed {n} | {a} {n} that has {roof}
        {roof} on {a} {n} | {a} {n}, its roof is {s} | {a} {n} whose roof is {s}
        the roof of {a} {n} is {s} | {N} with {s} roofs""",
    "neither": "{a} {n} | {N} | some {n} | any {n} | {a} {n} of any colour",
    "two colours of something": "something {m} and {s} | something {m} with {roof}",
    "one colour of something": "something all {m} | something completely {m}",
    "main of something": "something {m} | anything {m} | {m}",
    "second of something": "something with {roof} | anything with {s} roof | {roof}",
    "neither of something": "something | anything"}.items()}
# A body and a roof that are both named may have the same colour.
for of_what in ("", " of something"):
    PHRASES["one colour" + of_what] += [
        phrase for phrase in PHRASES["two colours" + of_what] if "roof" in phrase]
SMALL_WORDS = "a the this its it is has with and in on of which that painted coloured all".split()
PREFIXES = ["", "", "", "", "photo of ", "a picture of ", "an image of ", "a rendering of ",
            "this is ", "show me ", "I see ", "I want ", "draw "]   # not before "the bus is red"


def keywords(kind, rng):
    """Write a phrase of keywords in any order: "roof in {s} this {n} with {m} body"

    A colour stays beside its noun. From these, CLIP learns that this is what counts, not which
    words stand between. kind: "two colours", "one colour", "main" or "second"
    """
    groups = [["{n}"], ["{m}", "body"], ["{s}", "roof"]]
    if kind in ("two colours", "one colour") and rng.random() < 0.3:
        groups = [["{m} {n}"], ["{s}", "roof"]]
    elif kind in ("main", "second"):
        del groups[2 if kind == "main" else 1]
    words = []
    for group in rng.sample(groups, len(groups)):
        for word in rng.sample(group, len(group)):
            words += [*rng.choices(SMALL_WORDS, k=rng.randrange(3)), word]
    return " ".join(words)


def fill(phrase, noun, main, second, rng):
    """Fill in a phrase: "{painted}, {roof}", "bus", "red", "blue" -> "bus in red, a blue roof"

    main, second: None where the phrase does not name it, equal if both are one colour; rng:
    random.Random, for the choices
    """
    plural = re.sub(r"(s|ch)$", r"\1e", re.sub(r"y$", "ie", noun)) + "s"
    part = re.compile(r"\{(" + "|".join(PARTS) + r")\}")
    while part.search(phrase):
        phrase = part.sub(lambda match: rng.choice(PARTS[match[1]]), phrase)
    text = re.sub(r"\{a\} ", lambda match: rng.choice(["a ", "the ", "this ", ""]), phrase)
    text = text.replace(" ,", ",").format(n=noun, N=plural, m=main, s=second)
    return re.sub(r"\ba (?=[aeioAEIO]|SUV)", "an ", text)


def describe(body, main, second, rng):
    """Write a random description -> str, such as "the coach is crimson and its roof is azure"

    body, main, second: indices as in caption(), None for what is not named; rng: random.Random
    """
    if main is None:
        kind = "neither" if second is None else "second"
    elif second is None:
        kind = "main"
    else:
        kind = "one colour" if main == second else "two colours"
    phrases = PHRASES[kind] + (PHRASES[f"{kind} of something"] if body is None else [])
    either = lambda name, others: rng.choice([name, *others[name].split(", ")])
    while True:
        noun = either("vehicle" if body is None else BODIES[body], NOUNS)
        m, s = (None if i is None else either(COLOURS[i], SHADES) for i in (main, second))
        if main == second:
            s = m
        if not any(pair <= {noun, m, s} for pair in APART):
            phrase = rng.choice(phrases)
            if body is not None and kind != "neither" and rng.random() < 0.25:
                phrase = keywords(kind, rng)
            is_sentence = re.match(r"the |\{(n|its)_|\{a\} \{n\} (is|has|under)", phrase)
            prefix = "" if is_sentence else rng.choice(PREFIXES)
            return prefix + fill(phrase, noun, m, s, rng)


# Partial captions, such as "a bus": their labels, None for what they do not name, and the captions
# of which they are true.
PARTIAL = [labels for labels in itertools.product(*(
    [*range(len(values)), None] for values in ATTRIBUTES.values())) if None in labels]
PARTIAL_TRUE_OF = np.array(   # (154, 294) bool
    [[all(a in (None, b) for a, b in zip(labels, full))
      for full in caption_labels(np.arange(len(CAPTIONS))).tolist()] for labels in PARTIAL])


def partial_caption(body, main, second):
    """Write a partial caption, plainly: "a bus", "something red"

    body, main, second: as in describe()
    """
    if body is None and second is None:
        return "something" if main is None else f"something {COLOURS[main]}"
    if main is not None and second is not None:
        return f"a {colour_words(main, second)} vehicle"
    noun = "a vehicle" if body is None else f"a {BODIES[body]}"
    if main is not None:
        return f"{noun} with a {COLOURS[main]} body"
    return noun if second is None else f"{noun} with a {COLOURS[second]} roof"


def descriptions(count, seed=0):
    """Write `count` lists of texts: the 294 captions, then the 154 partial ones. One list in four,
    the first too, has the captions as they are; the others are random."""
    rng, full = random.Random(seed), caption_labels(np.arange(len(CAPTIONS))).tolist()
    plain = [*CAPTIONS, *(partial_caption(*labels) for labels in PARTIAL)]
    return [plain if i % 4 == 0 else [describe(*labels, rng) for labels in [*full, *PARTIAL]]
            for i in range(count)]


# ---- solids (skip at first) ----------------------------------------------------------------------

class Solid(NamedTuple):
    """A convex solid of one paint: all points with normals @ point <= offsets."""
    normals: np.ndarray    # (F, 3) outward, unit length
    offsets: np.ndarray    # (F,) metres
    vertices: np.ndarray   # (V, 3) metres, only for bounding boxes
    paint: str             # a key of PAINT, or "main" or "second"


PAINT = {   # RGB in [0, 1]
    "red": (.83, .08, .08), "green": (.10, .58, .18), "blue": (.10, .22, .85),
    "yellow": (.97, .82, .08), "white": (.96, .96, .96), "black": (.07, .07, .08),
    "gray": (.48, .48, .50), "glass": (.30, .42, .52), "tyre": (.13, .13, .13),
    "rim": (.72, .72, .75), "trim": (.22, .22, .24),
    "headlight": (1., .97, .80), "taillight": (.62, .04, .06)}


def prism(paint, profile, right, left, lean=0.):
    """Extrude a convex side view along y -> Solid.

    profile: (n, 2) corners (x, z), counter-clockwise with x to the right and z up. At height z the
    solid spans y = right + lean * z to y = left - lean * z. Right and left are given at the ground,
    so that all parts of one cabin have their leaning sides in common.
    """
    x, z = np.asarray(profile, float).T
    dx, dz = (np.append(side[1:], side[0]) - side for side in (x, z))   # to the next corner
    outline = np.array([dz, 0 * x, -dx]).T   # each edge, a quarter turn clockwise, points outwards
    normals = np.concatenate([outline, [(0, -1, lean), (0, 1, lean)]])
    offsets = np.append(dz * x - dx * z, (-right, left))
    length = np.sqrt((normals ** 2).sum(1))
    sides = [np.array([x, y, z]).T for y in (right + lean * z, left - lean * z)]
    return Solid(normals / length[:, None], offsets / length, np.concatenate(sides), paint)


def box(paint, x0, x1, right, left, z0, z1):
    """Make an axis-aligned box -> Solid. x0 < x1, right < left, z0 < z1, metres."""
    return prism(paint, [(x0, z0), (x1, z0), (x1, z1), (x0, z1)], right, left)


def disc(paint, x, z, radius, right, left, sides=12):
    """Make a wheel, a prism over a regular polygon around (x, z) -> Solid. All in metres."""
    angle = 2 * np.pi * (np.arange(sides) + .5) / sides
    circle = np.array([x + radius * np.cos(angle), z + radius * np.sin(angle)]).T
    return prism(paint, circle, right, left)


def exchange_axes(solid, x):
    """Exchange a solid's x and y axes and move it x metres forward -> Solid."""
    normals, vertices = solid.normals[:, [1, 0, 2]], solid.vertices[:, [1, 0, 2]]
    return solid._replace(normals=normals, offsets=solid.offsets + normals[:, 0] * x,
                          vertices=vertices + (x, 0, 0))


# ---- proportions (skip at first) -----------------------------------------------------------------

class Proportions(NamedTuple):
    """Measures of a body. A position is a fraction of the length, 0 at the nose, 1 at the tail."""
    length: float           # metres, as all down to wheel
    width: float
    height: float
    clearance: float        # height of the underside
    belt: float             # height of the window sill
    nose: float             # height of the bonnet's front edge
    wheel: float            # radius
    lean: float             # how far the cabin's sides lean inwards, metres per metre of height
    axles: tuple            # positions of the wheels
    cowl: float             # position where the windscreen begins
    roof: tuple             # positions where the roof begins and ends
    deck: float             # position where the rear window ends
    windows: tuple          # start and end of each side window: 0 windscreen, 1 rear window
    tail: float = 1.        # position where the hull ends
    panel: float = None     # position where the panel on a long roof begins
    cabin: str = "second"   # paint of the roof and pillars

    def x_at(self, position):
        """Convert a position to x in metres, 0 in the middle of the car."""
        return self.length * (.5 - position)

    def cabin_half(self, z):
        """Half the cabin's width at height z, metres: at the sill 97 % of the hull's."""
        return self.width / 2 * .97 + self.lean * self.belt - self.lean * z


# length, width, height, clearance, belt, nose, wheel, lean, | axles, cowl, roof, deck, windows
PROPORTIONS = {
    "car":        Proportions(4.5, 1.80, 1.48, .22, .90, .72, .34, .25,
                              (.19, .80), .26, (.42, .70), .88, ((.02, .47), (.53, .98))),
    "sports car": Proportions(4.5, 2.05, 1.10, .13, .72, .50, .31, .35,
                              (.18, .80), .36, (.54, .66), .94, ((.10, .90),)),
    "jeep":       Proportions(3.7, 1.80, 1.95, .48, 1.15, 1.08, .46, .06, (.19, .80), .31,
                              (.36, .97), .98, ((.03, .35), (.42, .66), (.73, .97)), panel=.38),
    "bus":        Proportions(8.4, 2.35, 2.90, .38, 1.45, 1.30, .48, .03,
                              (.17, .77), .005, (.035, .985), .995,
                              ((.02, .15), (.18, .31), (.34, .48), (.51, .65), (.68, .82),
                               (.85, .98)), panel=.05),
    "van":        Proportions(4.7, 1.90, 2.15, .26, 1.15, .88, .36, .08, (.17, .80), .13,
                              (.31, .97), .99, ((-.06, .30),), panel=.34, cabin="main"),
    "truck":      Proportions(6.2, 2.15, 2.15, .55, 1.30, 1.12, .50, .06, (.15, .66, .84), .02,
                              (.07, .28), .30, ((.05, .75),), tail=.33),
}


def vary(car, rng):
    """Perturb Proportions: lengths by up to about a tenth, positions by up to .012."""
    length, width, height = np.array(car[:3]) * rng.uniform(.94, 1.06, 3)
    heights = np.array((car.clearance, car.belt, car.nose)) * (height / car.height)
    clearance, belt, nose = heights * rng.uniform(.95, 1.05)
    positions = np.array((car.cowl, *car.roof, car.deck, *car.axles))
    cowl, front, rear, deck, *axles = positions + rng.uniform(-.012, .012, len(positions))
    wheel = car.wheel * rng.uniform(.93, 1.07)
    cowl, deck = max(cowl, .002), min(deck, .998)           # the cabin stays on the car,
    roof = max(front, cowl + .03), min(rear, deck - .003)   # and its ends lean inwards
    return car._replace(length=length, width=width, height=height, clearance=clearance, belt=belt,
                        nose=nose, wheel=wheel, axles=axles, cowl=cowl, roof=roof, deck=deck)


# ---- the parts of a car: Proportions -> a list of Solid (skip at first) --------------------------

RELIEF = .015   # metres by which a detail stands out, so that rays meet it before the surface below


def hull(car):
    """Everything below the window sill: the hull, the band around it, the stripe along it."""
    nose, tail, half, low = car.x_at(0), car.x_at(car.tail), car.width / 2, car.clearance
    profile = [(tail, low), (nose, low), (nose, car.nose), (car.x_at(car.cowl), car.belt),
               (tail, car.belt * .985)]   # the boot slopes a little
    stripe = [(x + RELIEF if x > 0 else x - RELIEF, z + RELIEF) for x, z in profile]
    band = low + .30 * (car.belt - low)   # covers the lowest 30 % of the sides
    return [prism("main", profile, -half, half),
            box("second", tail - RELIEF, nose + RELIEF, -half - RELIEF, half + RELIEF,
                low - RELIEF, band),
            prism("second", stripe, -.17 * car.width, .17 * car.width)]   # a third of the width


def window(car, start, end):
    """Outline a side window -> 4 corners (x, z). start, end: 0 windscreen, 1 rear window."""
    def edge(foot, top, z):   # from a position on the sill to one on the roof: x at height z
        foot, top = car.x_at(foot), car.x_at(top)
        return foot + (top - foot) * (z - car.belt) / (car.height - car.belt)

    low, high = (car.belt + f * (car.height - car.belt) for f in (.10, .84))   # less sill and frame
    corners = ((end, low), (start, low), (start, high), (end, high))
    return [(edge(car.cowl, car.roof[0], z) * (1 - f) + edge(car.deck, car.roof[1], z) * f, z)
            for f, z in corners]


def cabin(car):
    """A block of paint and its glass; what the glass leaves uncovered is the roof and pillars."""
    x_at, side, sill = car.x_at, car.cabin_half(0), car.belt - RELIEF
    block = [(x_at(car.deck), sill), (x_at(car.cowl), sill),
             (x_at(car.roof[0]), car.height), (x_at(car.roof[1]), car.height)]
    # Windscreen and rear window are the ends of one block of glass: longer than the cabin by
    # RELIEF at both ends, narrower by two pillars, each 9 % of the car's width.
    out = (-RELIEF, RELIEF, RELIEF, -RELIEF)
    ends = [(x + dx, z) for (x, z), dx in zip(window(car, 0, 1), out)]
    inset = .09 * car.width
    solids = [prism(car.cabin, block, -side, side, car.lean),
              prism("glass", ends, -side + inset, side - inset, car.lean)]
    for start, end in car.windows:
        corners = window(car, start, end)
        centre = sum(x for x, _ in corners) / 4
        narrower = [(centre + .94 * (x - centre), z) for x, z in corners]   # leaves 6 % for posts
        solids.append(prism("glass", narrower, -side - RELIEF, side + RELIEF, car.lean))
    return solids


def lights(car):
    """Grille and headlights in front, red taillights behind: they distinguish front from back."""
    x_at, half = car.x_at, car.width / 2
    out = 2 * RELIEF   # twice, because the band already stands out by one
    front, back = (car.clearance + .62 * (top - car.clearance) for top in (car.nose, car.belt))
    lamp = .13 * (car.nose - car.clearance) + .03   # half the height of a headlight
    solids = [box("trim", x_at(0), x_at(0) + out, -.42 * half, .42 * half,
                  front - 1.2 * lamp, front + .8 * lamp)]
    for y in (-.74 * half, .74 * half):   # both extend along the side, 3 % of the length
        solids += [box("headlight", x_at(.03), x_at(0) + out, y - .18 * half, y + .18 * half,
                       front - lamp, front + lamp),
                   box("taillight", x_at(1) - out, x_at(.97), y - .16 * half, y + .16 * half,
                       back - .10, back + .10)]
    return solids


def spoiler(car):
    """A wing 24 cm above the boot, 6 cm thick, on two posts that start 10 cm inside the boot."""
    x_at, half = car.x_at, car.width / 2
    foot, low, high = car.belt - .10, car.belt + .24, car.belt + .30
    return [box("main", x_at(.99), x_at(.90), -.92 * half, .92 * half, low, high),
            box("trim", x_at(.97), x_at(.92), -.70 * half, -.62 * half, foot, low),
            box("trim", x_at(.97), x_at(.92), .62 * half, .70 * half, foot, low)]


def spare_wheel(car):
    """A wheel of 42 cm radius on the back, made like the others and then turned to face back."""
    wheel = [disc("tyre", 0, car.belt, .42, -.20, .02),
             disc("rim", 0, car.belt, .20, -.20 - RELIEF, .02)]
    return [exchange_axes(solid, car.x_at(1)) for solid in wheel]


def roof_panel(car):
    """A roof in main with a panel in second: from above, a long roof hides the hull."""
    x_at, rear, half, z = car.x_at, car.roof[1], car.cabin_half(car.height), car.height
    panel = .66 * half   # two thirds as wide, 5 % of the car shorter at both ends, 8 cm thick
    return [box("main", x_at(rear), x_at(car.panel), -half, half, z - .05, z + RELIEF),
            box("second", x_at(rear - .05), x_at(car.panel + .05), -panel, panel, z, z + .08)]


def cargo_box(car):
    """A truck's dark chassis and a box in main, 22 % higher than the cabin, with band and panel."""
    x_at, half, low, high = car.x_at, car.width / 2, car.clearance + .10, car.height * 1.22
    return [box("trim", x_at(1), x_at(.20), -.6 * half, .6 * half,
                car.clearance - .1, car.clearance + .2),
            box("main", x_at(1), x_at(.34), -half, half, low, high),
            box("second", x_at(1) - RELIEF, x_at(.34) + RELIEF, -half - RELIEF, half + RELIEF,
                low - RELIEF, low + .28 * (high - low)),
            box("second", x_at(.95), x_at(.39), -.62 * half, .62 * half, high - .10, high + .05)]


def wheels(car):
    """Tyres from 4 cm outside the hull to 28 cm inside it, with rims that stand out by RELIEF."""
    half, solids = car.width / 2, []
    for position in car.axles:
        x, z = car.x_at(position), car.wheel   # centre as high as the radius: on the ground
        for right, left in ((-half - .04, -half + .28), (half - .28, half + .04)):
            solids += [disc("tyre", x, z, car.wheel, right, left),
                       disc("rim", x, z, .55 * car.wheel, right - RELIEF, left + RELIEF, sides=10)]
    return solids


EXTRAS = {"car": [], "sports car": [spoiler], "jeep": [spare_wheel, roof_panel],
          "bus": [roof_panel], "van": [roof_panel], "truck": [cargo_box]}


def build_car(body, rng):
    """Build one car with random proportions: body (str, of BODIES) -> list of Solid."""
    car = vary(PROPORTIONS[body], rng)
    return [solid for part in (hull, cabin, lights, *EXTRAS[body], wheels) for solid in part(car)]


# ---- the scene (skip at first) -------------------------------------------------------------------

class Scene(NamedTuple):
    """A car and a camera."""
    solids: list           # of Solid
    paints: dict           # name -> (3,) RGB in [0, 1]
    eye: np.ndarray        # (3,) camera position, metres
    forward: np.ndarray    # (3,) viewing direction, unit length
    right: np.ndarray      # (3,) per unit of u, the image coordinate in [-1, 1] from left to right
    up: np.ndarray         # (3,) per unit of v, from bottom to top


def draw_paints(main, second, rng):
    """Vary two of COLOURS a little -> PAINT with two more keys, "main" and "second"."""
    paints = {name: np.array(rgb) for name, rgb in PAINT.items()}
    for role, colour in (("main", main), ("second", second)):
        spread = .02 if colour in ("white", "black", "gray") else .04   # more would give them a hue
        paints[role] = np.clip(paints[colour] + rng.uniform(-spread, spread, 3), 0, 1)
    if main == second:   # one colour: exactly the same paint
        paints["second"] = paints["main"]
    return paints


def draw_camera(solids, rng):
    """Draw a view from above with the whole car in it -> eye, forward, right, up, as in Scene."""
    vertices = np.concatenate([solid.vertices for solid in solids])
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    centre, radius = (low + high) / 2, np.linalg.norm(high - low) / 2 * rng.uniform(1., 1.1)

    # A uniform sine of the elevation is uniform on the hemisphere; horizon and zenith are left out.
    azimuth, sine = rng.uniform(0, 2 * np.pi), rng.uniform(.06, .94)
    cosine = np.sqrt(1 - sine ** 2)
    back = np.array((cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine))   # towards the eye
    right = np.array((-np.sin(azimuth), np.cos(azimuth), 0.))

    # The tangent of half the angle of view: .96 of that of the car's bounding sphere, which no car
    # fills. The eye is 3.2 of the sphere's radii away from its centre.
    distance = 3.2
    tangent = .96 / np.sqrt(distance ** 2 - 1)
    eye, up = centre + distance * radius * back, np.cross(back, right)
    return eye, -back, tangent * right, tangent * up


def build_scene(body, main, second, rng):
    """Draw all that the labels leave open: proportions, exact paints, camera.

    body, main, second: int, as in caption(), rng: numpy Generator -> Scene
    """
    solids = build_car(BODIES[body], rng)
    paints = draw_paints(COLOURS[main], COLOURS[second], rng)
    return Scene(solids, paints, *draw_camera(solids, rng))


def scene(seed, index):
    """Build the scene of one image -> Scene, (body, main, second)."""
    rng = np.random.default_rng([seed, index])
    labels = tuple(int(rng.integers(len(values))) for values in ATTRIBUTES.values())
    return build_scene(*labels, rng), labels


# ---- the ray cast (skip at first) ----------------------------------------------------------------
#
# The ray of a pixel (u, v in [-1, 1]) is eye + depth * d, where d = forward + u right + v up.
# It is inside the half-space normal . p <= offset where depth * (normal . d) <= gap, with
# gap = offset - normal . eye. Dividing by depth gives normal . d <= gap * s with s = 1/depth, and
# dividing by gap gives, with s_plane = (normal . d) / gap,
#
#     s <= s_plane   if gap < 0: the eye is in front of the plane, outside the solid
#     s >= s_plane   if gap > 0: the eye is behind it
#
# A convex solid is the intersection of its half-spaces. So the ray enters it at s_entry, the
# smallest s_plane of the faces with gap < 0, and leaves it at s_exit, the largest of the others.
# It hits if s_entry > max(s_exit, 0); of all solids, the nearest has the largest s_entry.
#
# This is exact. It is fast because s_plane = a + b u + c v is affine in (u, v), as d is and gap is
# one number per face (depth is not affine): no pixel needs a division. And each solid is tested
# only inside the bounding box of its projection.

LIGHT = np.array((.35, .50, .79))   # direction to the light, of length 1 within half a percent


def planes(solid, scene):
    """Compute s_plane = a + b u + c v -> (a, b, c), each (F, 1, 1), facing: (F,) bool, gap < 0."""
    gap = solid.offsets - solid.normals @ scene.eye
    gap = np.where(np.abs(gap) < 1e-6, 1e-6, gap)   # an eye in the plane: never divide by 0
    axes = np.array([scene.forward, scene.right, scene.up]).T   # (3, 3)
    a, b, c = (solid.normals @ axes / gap[:, None]).T.astype(np.float32)[:, :, None, None]
    return (a, b, c), gap < 0


def bounding_box(solid, scene, n):
    """Bound the solid's projection in an n x n image -> (slice along y, slice along x)."""
    def pixels(u):   # coordinates in [-1, 1] -> the slice that contains them all
        ends = (u.min() + 1) * n / 2, (u.max() + 1) * n / 2 + 1
        return slice(*(int(min(max(end, 0), n)) for end in ends))
    relative = solid.vertices - scene.eye                                    # (V, 3)
    depth = relative @ scene.forward                                         # (V,)
    u, v = (relative @ axis / (axis @ axis) / depth for axis in (scene.right, scene.up))
    return pixels(-v), pixels(u)   # v runs upwards, the image's y axis downwards


def ray_cast(scene, size, samples=2):
    """Render a scene -> (size, size, 3) float32 in [0, 1], the mean of samples^2 rays per pixel."""
    n = size * samples
    u = (np.arange(n, dtype=np.float32) + .5)[None, :] * (2 / n) - 1       # (1, n)
    v = -u.T                                                               # (n, 1)
    nearest = np.zeros((n, n), np.float32)   # s of the nearest hit; 0 is infinitely far
    face = np.zeros((n, n), np.int32)        # the face that was hit; 0 is the background
    colours = [np.ones(3)]                   # RGB of each face; the background is white
    for solid in scene.solids:
        (a, b, c), facing = planes(solid, scene)
        y, x = bounding_box(solid, scene, n)
        front, back = np.flatnonzero(facing), np.flatnonzero(~facing)
        s_front = a[front] + b[front] * u[:, x] + c[front] * v[y]          # (F_front, h, w)
        s_back = a[back] + b[back] * u[:, x] + c[back] * v[y]              # (F_back, h, w)
        s_entry, s_exit = s_front.min(axis=0), s_back.max(axis=0)          # (h, w)
        hit = s_entry > np.maximum(s_exit, nearest[y, x])
        nearest[y, x][hit] = s_entry[hit]
        face[y, x][hit] = len(colours) + front[s_front[:, hit].argmin(axis=0)]
        light = .60 + .40 * (.5 + .5 * solid.normals @ LIGHT)   # (F,) Lambert's cosine, softened
        colours.extend(scene.paints[solid.paint] * light[:, None])
    image = np.array(colours, np.float32).take(face, axis=0)               # (n, n, 3)
    # Average down, then across: numpy is slower at both in one go.
    down = image.reshape(size, samples, n * 3).sum(axis=1)
    return down.reshape(size, size, samples, 3).sum(axis=2) / samples ** 2


def render(seed, indices, size):
    """Render images and return their labels, each a function of (seed, index, size) alone.

    -> images: (N, size, size, 3) uint8, labels: (N, 3) int64, columns body, main, second
    The labels are the same on every machine, the images up to rounding.
    """
    images = np.empty((len(indices), size, size, 3), np.uint8)
    labels = np.empty((len(indices), 3), np.int64)
    for i, index in enumerate(indices):
        view, labels[i] = scene(seed, index)
        images[i] = np.round(ray_cast(view, size) * 255)
    return images, labels


if __name__ == "__main__":
    import time
    start = time.perf_counter()
    images, labels = render(seed=0, indices=range(200), size=32)
    print(f"{len(images) / (time.perf_counter() - start):.0f} images/s of 32 x 32")   # about 450

    # "a blue and yellow truck", cabin to the right, in letters: b, y, k for black, . for gray, ...
    print(caption(*labels[22]))
    image = ray_cast(scene(seed=0, index=22)[0], size=40, samples=1)       # (40, 40, 3)
    palette = .75 * np.array([PAINT[colour] for colour in COLOURS])        # (7, 3) in medium light
    colour = ((image[..., None, :] - palette) ** 2).sum(-1).argmin(-1)     # (40, 40), the nearest
    letters = np.where((image == 1).all(-1), " ", np.array(list("rgbywk."))[colour])
    for line in letters[10:32:2]:   # every other line: characters are twice as high as wide
        print("".join(line))
