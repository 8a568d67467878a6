"""Chapter 0: a world to draw. Cars made of convex solids, ray cast exactly, with true captions.

Real data for a text-to-image model are millions of pictures with captions of doubtful truth. Here
the world is small enough that we know everything about it: six bodies, a main and a second colour
out of seven, and a renderer of about a hundred lines. A picture is a function of (seed, index,
size); its labels come with it, so that a third party can check later whether a generated picture
obeys its caption. The look is that of the ShapeNet cars in Scene Representation Networks (Sitzmann
et al. 2019, arXiv 1906.01618): one object, white background, views from the upper half-sphere.

World coordinates: x forward, y to the left, z up, the ground at z = 0, all in metres.
Shapes: N pictures, F faces, V vertices; pictures are uint8 (N, size, size, 3), as files store them.

Left out: shadows, reflections, curved surfaces, backgrounds.
"""
import math
from typing import NamedTuple

import numpy as np

BODIES = ["car", "sports car", "jeep", "bus", "van", "truck"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "gray"]
ATTRIBUTES = {"body": BODIES, "main": COLOURS, "second": COLOURS}

# Which pictures are for what: the first index of each. The ranges never meet, so that nobody is
# examined on what they learned from.
TRAIN, VALIDATION, JUDGE_TRAIN, JUDGE_TEST = 0, 10_000_000, 20_000_000, 30_000_000
JUDGE_2_TRAIN = 40_000_000   # of the judge that gives a second opinion


# ---- words ---------------------------------------------------------------------------------------

def caption(body, main, second):
    """Indices into BODIES, COLOURS, COLOURS -> "a white and red car", "a red car" if both are red.

    The order means something: main is the shell, second the roof, pillars, stripe and lower band.
    """
    colours = COLOURS[main] if main == second else f"{COLOURS[main]} and {COLOURS[second]}"
    return f"a {colours} {BODIES[body]}"


def caption_index(labels):
    """labels: (..., 3) int, columns body, main, second -> (...) int, its place in CAPTIONS."""
    body, main, second = labels[..., 0], labels[..., 1], labels[..., 2]
    return (body * len(COLOURS) + main) * len(COLOURS) + second


def caption_labels(index):
    """The inverse of caption_index: (...) int in 0..293 -> (..., 3) int."""
    n = len(COLOURS)
    return np.stack([index // n ** 2, index // n % n, index % n], axis=-1)


CAPTIONS = [caption(*caption_labels(np.array(i))) for i in range(len(BODIES) * len(COLOURS) ** 2)]

# How many of the 2,151 ShapeNet cars were given which caption: more than half are white cars.
SHAPENET = """
1117 white car, 294 white jeep/bus, 213 red car, 149 yellow car, 80 blue car, 68 white van, 44
yellow jeep/bus, 29 red jeep/bus, 25 green jeep/bus, 25 green car, 13 gray car, 10 blue
jeep/bus, 9 white and red car, 8 white truck, 7 white and yellow jeep/bus, 5 white and blue
car, 5 red and green car, 5 gray jeep/bus, 4 red and blue car, 3 yellow van, 3 white and
yellow car, 3 white and red jeep/bus, 3 gray and green car, 3 blue and red car, 2 yellow and
green car, 2 white and green jeep/bus, 2 white and green car, 2 green and yellow car, 2 green
and red jeep/bus, 2 gray and black car, 2 black car, 1 yellow and red car, 1 white sports car,
1 white and gray van, 1 white and gray jeep/bus, 1 white and gray car, 1 white and blue
jeep/bus, 1 red and blue jeep/bus, 1 green and yellow jeep/bus, 1 green and gray car, 1 blue
and red jeep/bus, 1 black open car, 1 black and gray car"""


def shapenet_frequencies():
    """-> (294,) how often each of CAPTIONS occurs among ShapeNet's cars, adding up to 1.

    "jeep/bus" counts half for each of the two, and an open car is a car.
    """
    counts = np.zeros(len(CAPTIONS))
    for entry in " ".join(SHAPENET.replace("open car", "car").split()).split(", "):
        count, name = entry.split(" ", 1)
        for body in ("jeep", "bus"):   # where neither is meant, both halves go to the same caption
            counts[CAPTIONS.index(f"a {name.replace('jeep/bus', body)}")] += int(count) / 2
    return counts / counts.sum()


FREQUENCIES = {"balanced": None, "shapenet": shapenet_frequencies()}   # None: all alike


# ---- solids --------------------------------------------------------------------------------------

class Solid(NamedTuple):
    """A convex solid: the points p with normals @ p <= offsets, in one paint."""
    normals: np.ndarray    # (F, 3) outward, unit length
    offsets: np.ndarray    # (F,) metres
    vertices: np.ndarray   # (V, 3) metres, only to know where the solid lies in the picture
    paint: str             # a key of PAINT, or "main" or "second"


PAINT = {   # red, green and blue, each in [0, 1]
    "red": (.83, .08, .08), "green": (.10, .58, .18), "blue": (.10, .22, .85),
    "yellow": (.97, .82, .08), "white": (.96, .96, .96), "black": (.07, .07, .08),
    "gray": (.48, .48, .50), "glass": (.30, .42, .52), "tyre": (.13, .13, .13),
    "rim": (.72, .72, .75), "trim": (.22, .22, .24),
    "headlight": (1., .97, .80), "taillight": (.62, .04, .06)}


def prism(paint, profile, right, left, lean=0.):
    """A side view pulled out sideways: a Solid from a convex outline and two sides.

    profile: (n, 2) corners (x, z), counter-clockwise with x to the right and z up. At height z the
    solid reaches from y = right + lean * z to y = left - lean * z: leaning sides are given by
    where they would meet the ground, so that all parts of one cabin share them.
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
    """The simplest prism: x0 < x1, right < left, z0 < z1."""
    return prism(paint, [(x0, z0), (x1, z0), (x1, z1), (x0, z1)], right, left)


def disc(paint, x, z, radius, right, left, sides=12):
    """A wheel: a prism whose outline is a regular polygon around (x, z)."""
    angle = 2 * np.pi * (np.arange(sides) + .5) / sides
    circle = np.array([x + radius * np.cos(angle), z + radius * np.sin(angle)]).T
    return prism(paint, circle, right, left)


def facing_back(solid, x):
    """The same solid with its x and y exchanged, then moved x metres forward."""
    normals, vertices = solid.normals[:, [1, 0, 2]], solid.vertices[:, [1, 0, 2]]
    return solid._replace(normals=normals, offsets=solid.offsets + normals[:, 0] * x,
                          vertices=vertices + (x, 0, 0))


# ---- proportions ---------------------------------------------------------------------------------

class Shape(NamedTuple):
    """The proportions of a body. Places along it are fractions, 0 at the nose and 1 at the tail."""
    length: float           # metres, like all down to wheel
    width: float
    height: float
    clearance: float        # height of the underside
    belt: float             # height of the window sill
    nose: float             # height of the bonnet's front edge
    wheel: float            # radius
    lean: float             # how far the cabin's sides lean inwards, metres per metre of height
    axles: tuple            # places of the wheels
    cowl: float             # place where the windscreen begins
    roof: tuple             # places where the roof begins and ends
    deck: float             # place where the rear window ends
    windows: tuple          # each side window from where to where: 0 windscreen, 1 rear window
    tail: float = 1.        # place where the shell ends
    panel: float = None     # place where the panel on a long roof begins
    cabin: str = "second"   # paint of the roof and pillars

    def at(self, place):
        """A fraction of the length -> x in metres, 0 in the middle of the car."""
        return self.length * (.5 - place)

    def cabin_half(self, z):
        """Half the cabin's width at height z, metres: at the sill 97 % of the shell's."""
        return self.width / 2 * .97 + self.lean * self.belt - self.lean * z


# length, width, height, clearance, belt, nose, wheel, lean, | axles, cowl, roof, deck, windows
SHAPES = {
    "car":        Shape(4.5, 1.80, 1.48, .22, .90, .72, .34, .25,
                        (.19, .80), .26, (.42, .70), .88, ((.02, .47), (.53, .98))),
    "sports car": Shape(4.5, 2.05, 1.10, .13, .72, .50, .31, .35,
                        (.18, .80), .36, (.54, .66), .94, ((.10, .90),)),
    "jeep":       Shape(3.7, 1.80, 1.95, .48, 1.15, 1.08, .46, .06,
                        (.19, .80), .31, (.36, .97), .98, ((.03, .35), (.42, .66), (.73, .97)),
                        panel=.38),
    "bus":        Shape(8.4, 2.35, 2.90, .38, 1.45, 1.30, .48, .03,
                        (.17, .77), .005, (.035, .985), .995,
                        ((.02, .15), (.18, .31), (.34, .48), (.51, .65), (.68, .82), (.85, .98)),
                        panel=.05),
    "van":        Shape(4.7, 1.90, 2.15, .26, 1.15, .88, .36, .08,   # its sides are sheet metal
                        (.17, .80), .13, (.31, .97), .99, ((-.06, .30),), panel=.34, cabin="main"),
    "truck":      Shape(6.2, 2.15, 2.15, .55, 1.30, 1.12, .50, .06,
                        (.15, .66, .84), .02, (.07, .28), .30, ((.05, .75),), tail=.33),
}


def vary(shape, rng):
    """One car of its kind: sizes within about a tenth of those in SHAPES, places within .012."""
    length, width, height = np.array(shape[:3]) * rng.uniform(.94, 1.06, 3)
    heights = np.array((shape.clearance, shape.belt, shape.nose)) * (height / shape.height)
    clearance, belt, nose = heights * rng.uniform(.95, 1.05)
    places = np.array((shape.cowl, *shape.roof, shape.deck, *shape.axles))
    cowl, front, rear, deck, *axles = places + rng.uniform(-.012, .012, len(places))
    wheel = shape.wheel * rng.uniform(.93, 1.07)
    cowl, deck = max(cowl, .002), min(deck, .998)           # the cabin stays on the car,
    roof = max(front, cowl + .03), min(rear, deck - .003)   # and its ends lean inwards
    return shape._replace(length=length, width=width, height=height, clearance=clearance, belt=belt,
                          nose=nose, wheel=wheel, axles=axles, cowl=cowl, roof=roof, deck=deck)


# ---- cars: every part is a function, Shape of this one car -> list of solids ---------------------

HAIR = .015   # decals stand this far out of what they are painted on, metres


def shell(s):
    """All below the window sill: the hull, the band around it, the stripe from nose to tail."""
    nose, tail, half = s.at(0), s.at(s.tail), s.width / 2
    hull = [(tail, s.clearance), (nose, s.clearance), (nose, s.nose), (s.at(s.cowl), s.belt),
            (tail, s.belt * .985)]   # the boot falls a little
    stripe = [(x + HAIR if x > 0 else x - HAIR, z + HAIR) for x, z in hull]
    band = s.clearance + .30 * (s.belt - s.clearance)   # covers the lowest 30 % of the sides
    return [prism("main", hull, -half, half),
            box("second", tail - HAIR, nose + HAIR, -half - HAIR, half + HAIR,
                s.clearance - HAIR, band),
            prism("second", stripe, -.17 * s.width, .17 * s.width)]   # a third of the width


def cabin(s):
    """A block of the second colour; what its glass leaves free are the roof and the pillars."""
    side, sill = s.cabin_half(0), s.belt - HAIR
    block = [(s.at(s.deck), sill), (s.at(s.cowl), sill),
             (s.at(s.roof[0]), s.height), (s.at(s.roof[1]), s.height)]
    # Windscreen and rear window are the ends of one block of glass: longer than the cabin by two
    # hairs, narrower by two pillars, each 9 % of the car's width.
    ends = [(x + out, z) for (x, z), out in zip(pane(s, 0, 1), (-HAIR, HAIR, HAIR, -HAIR))]
    inset = .09 * s.width
    solids = [prism(s.cabin, block, -side, side, s.lean),
              prism("glass", ends, -side + inset, side - inset, s.lean)]
    for start, end in s.windows:
        corners = pane(s, start, end)
        middle = sum(x for x, _ in corners) / 4
        narrower = [(middle + .94 * (x - middle), z) for x, z in corners]   # 6 % less: thin posts
        solids.append(prism("glass", narrower, -side - HAIR, side + HAIR, s.lean))
    return solids


def pane(s, start, end):
    """A window's outline (x, z) between two fractions, 0 the windscreen and 1 the rear window."""
    def slide(foot, top, z):   # from a place on the sill to one on the roof: x at height z
        foot, top = s.at(foot), s.at(top)
        return foot + (top - foot) * (z - s.belt) / (s.height - s.belt)

    low, high = (s.belt + f * (s.height - s.belt) for f in (.10, .84))   # less a sill and a frame
    corners = ((end, low), (start, low), (start, high), (end, high))
    return [(slide(s.cowl, s.roof[0], z) * (1 - f) + slide(s.deck, s.roof[1], z) * f, z)
            for f, z in corners]


def lights(s):
    """What tells front from back: a dark grille between pale headlights, and red taillights.

    They sit 62 % of the way up the nose and the tail; their widths are fractions of the car's half.
    """
    half, out = s.width / 2, 2 * HAIR   # out: clear of the band, which is itself a hair outside
    front, back = (s.clearance + .62 * (top - s.clearance) for top in (s.nose, s.belt))
    lamp = .13 * (s.nose - s.clearance) + .03   # half the height of a headlight
    solids = [box("trim", s.at(0), s.at(0) + out, -.42 * half, .42 * half,
                  front - 1.2 * lamp, front + .8 * lamp)]
    for y in (-.74 * half, .74 * half):   # both reach round the corner, 3 % of the length
        solids += [box("headlight", s.at(.03), s.at(0) + out, y - .18 * half, y + .18 * half,
                       front - lamp, front + lamp),
                   box("taillight", s.at(1) - out, s.at(.97), y - .16 * half, y + .16 * half,
                       back - .10, back + .10)]
    return solids


def spoiler(s):
    """A wing 24 cm above the boot, 6 cm thick, on two posts that stand 10 cm deep in the boot."""
    half, foot, low, high = s.width / 2, s.belt - .10, s.belt + .24, s.belt + .30
    return [box("main", s.at(.99), s.at(.90), -.92 * half, .92 * half, low, high),
            box("trim", s.at(.97), s.at(.92), -.70 * half, -.62 * half, foot, low),
            box("trim", s.at(.97), s.at(.92), .62 * half, .70 * half, foot, low)]


def spare_wheel(s):
    """A wheel of 42 cm radius on the back: made like the others, then turned and moved there."""
    wheel = [disc("tyre", 0, s.belt, .42, -.20, .02),
             disc("rim", 0, s.belt, .20, -.20 - HAIR, .02)]
    return [facing_back(solid, s.at(1)) for solid in wheel]


def roof_panel(s):
    """A long roof would hide the shell from above: so it is main, with a panel of second on it."""
    half, rear = s.cabin_half(s.height), s.roof[1]
    panel = .66 * half   # two thirds as wide, 5 % of the car shorter at both ends, 8 cm thick
    return [box("main", s.at(rear), s.at(s.panel), -half, half, s.height - .05, s.height + HAIR),
            box("second", s.at(rear - .05), s.at(s.panel + .05), -panel, panel,
                s.height, s.height + .08)]


def cargo_box(s):
    """Behind a truck's cabin, 22 % higher: dark chassis, a box in main, its band and roof panel."""
    half, low, high = s.width / 2, s.clearance + .10, s.height * 1.22
    front, back, band = s.at(.34), s.at(1), low + .28 * (high - low)
    return [box("trim", back, s.at(.20), -.6 * half, .6 * half, s.clearance - .1, s.clearance + .2),
            box("main", back, front, -half, half, low, high),
            box("second", back - HAIR, front + HAIR, -half - HAIR, half + HAIR, low - HAIR, band),
            box("second", s.at(.95), s.at(.39), -.62 * half, .62 * half, high - .10, high + .05)]


def wheels(s):
    """Tyres that stand 4 cm out of the shell and reach 28 cm into it, with rims a hair thicker."""
    half, solids = s.width / 2, []
    for place in s.axles:
        x, z = s.at(place), s.wheel   # a wheel as high as its radius stands on the ground
        for right, left in ((-half - .04, -half + .28), (half - .28, half + .04)):
            solids += [disc("tyre", x, z, s.wheel, right, left),
                       disc("rim", x, z, .55 * s.wheel, right - HAIR, left + HAIR, sides=10)]
    return solids


EXTRAS = {"car": [], "sports car": [spoiler], "jeep": [spare_wheel, roof_panel],
          "bus": [roof_panel], "van": [roof_panel], "truck": [cargo_box]}


def build(body, rng):
    """The solids of one car: the same parts for every body, and the extras that mark it."""
    s = vary(SHAPES[body], rng)
    parts = [shell, cabin, lights, *EXTRAS[body], wheels]
    return [solid for part in parts for solid in part(s)]


# ---- the scene -----------------------------------------------------------------------------------

class Scene(NamedTuple):
    solids: list
    paints: dict           # name -> (3,) in [0, 1]
    eye: np.ndarray        # (3,) camera position, metres
    forward: np.ndarray    # (3,) unit, into the picture
    right: np.ndarray      # (3,) per unit of horizontal picture coordinate u, which is in [-1, 1]
    up: np.ndarray         # (3,) likewise per unit of v, vertical


def scene(seed, index, labels="balanced"):
    """Everything about picture `index`: Scene, (body, main, second).

    labels: a key of FREQUENCIES, how often each caption occurs.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    body, main, second = (int(rng.integers(len(values))) for values in ATTRIBUTES.values())
    if labels != "balanced":
        body, main, second = caption_labels(rng.choice(len(CAPTIONS), p=FREQUENCIES[labels]))
    solids = build(BODIES[body], rng)
    paints = mix_paints(COLOURS[main], COLOURS[second], rng)
    return Scene(solids, paints, *camera(solids, rng)), (body, main, second)


def camera_height(seed, index):
    """How high above the ground the camera of picture `index` stands, in degrees."""
    return math.degrees(math.asin(-scene(seed, index)[0].forward[2]))


def mix_paints(main, second, rng):
    """Two names of colours -> PAINT with "main" and "second"; no two cans are quite alike."""
    paints = {name: np.array(rgb) for name, rgb in PAINT.items()}
    for role, colour in (("main", main), ("second", second)):
        spread = .02 if colour in ("white", "black", "gray") else .04   # more would give them a hue
        paints[role] = np.clip(paints[colour] + rng.uniform(-spread, spread, 3), 0, 1)
    if main == second:   # a car of one colour is from one can
        paints["second"] = paints["main"]
    return paints


def camera(solids, rng):
    """A view from above that holds the whole car -> eye, forward, right, up, as in Scene."""
    vertices = np.concatenate([solid.vertices for solid in solids])
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    centre, radius = (low + high) / 2, np.linalg.norm(high - low) / 2 * rng.uniform(1., 1.1)

    # A uniform sine of the elevation is uniform on the half-sphere; rim and pole are left out.
    turn, sine = rng.uniform(0, 2 * np.pi), rng.uniform(.06, .94)
    cosine = np.sqrt(1 - sine ** 2)
    back = np.array((cosine * np.cos(turn), cosine * np.sin(turn), sine))   # towards the eye
    right = np.array((-np.sin(turn), np.cos(turn), 0.))

    distance = 3.2   # in radii of the sphere around the car
    # The sphere's outline is seen at the tangent 1 / sqrt(distance^2 - 1) from the middle; the
    # picture's edge is at .96 of that, because no car fills its sphere.
    view = .96 / np.sqrt(1 - 1 / distance ** 2) / distance
    return centre + distance * radius * back, -back, view * right, view * np.cross(back, right)


# ---- the ray cast --------------------------------------------------------------------------------
#
# A ray is eye + depth * (forward + u * right + v * up) with u, v in [-1, 1], left unnormalised so
# that s = 1/depth at which it meets a plane is affine in (u, v). It enters a convex solid at the
# smallest s of the planes that face the eye, and leaves it at the largest s of the others. It hits
# where s_entry > max(s_exit, 0); of all solids the largest s_entry wins. So no pixel needs a
# division, and only those inside each solid's projected box are looked at.

LIGHT = np.array((.35, .50, .79))   # towards the sun, of length 1 within half a percent


def planes(solid, scene):
    """-> (a, b, c), each (F, 1, 1), with s = a + b u + c v, and (F,) bool, does it face the eye?

    On the plane normal . p = offset it is s = normal . (forward + u right + v up) / gap, where
    gap = offset - normal . eye is negative if the eye stands in front of the plane.
    """
    gap = solid.offsets - solid.normals @ scene.eye
    gap = np.where(np.abs(gap) < 1e-6, 1e-6, gap)   # an eye in the plane: never divide by 0
    axes = np.array([scene.forward, scene.right, scene.up]).T   # (3, 3)
    a, b, c = (solid.normals @ axes / gap[:, None]).T.astype(np.float32)[:, :, None, None]
    return (a, b, c), gap < 0


def footprint(solid, scene, n):
    """Where in an n x n picture the solid lies -> two slices, of rows and of columns."""
    def pixels(u):   # coordinates in [-1, 1] -> a slice that holds them all
        ends = (u.min() + 1) * n / 2, (u.max() + 1) * n / 2 + 1
        return slice(*(int(min(max(end, 0), n)) for end in ends))
    seen = solid.vertices - scene.eye
    depth = seen @ scene.forward
    u, v = (seen @ axis / (axis @ axis) / depth for axis in (scene.right, scene.up))
    return pixels(-v), pixels(u)   # rows run from the top down


def ray_cast(scene, size, samples=2):
    """Scene -> (size, size, 3) float in [0, 1]: the mean of samples x samples rays a pixel."""
    n = size * samples
    u = (np.arange(n, dtype=np.float32) + .5)[None, :] * (2 / n) - 1   # (1, n)
    v = -u.T                                                           # (n, 1)
    nearest = np.zeros((n, n), np.float32)   # s of the nearest hit, 0 is infinitely far
    face = np.zeros((n, n), np.int32)        # which face was hit, 0 is the background
    shades = [np.ones(3)]                    # the colour of each face, the background is white
    for solid in scene.solids:
        (a, b, c), facing = planes(solid, scene)
        rows, columns = footprint(solid, scene, n)
        front, back = np.flatnonzero(facing), np.flatnonzero(~facing)
        s_front = a[front] + b[front] * u[:, columns] + c[front] * v[rows]   # (F_front, h, w)
        s_back = a[back] + b[back] * u[:, columns] + c[back] * v[rows]       # (F_back, h, w)
        s_entry, s_exit = s_front.min(axis=0), s_back.max(axis=0)            # (h, w)
        hit = s_entry > np.maximum(s_exit, nearest[rows, columns])
        nearest[rows, columns][hit] = s_entry[hit]
        face[rows, columns][hit] = len(shades) + front[s_front[:, hit].argmin(axis=0)]
        light = .60 + .40 * (.5 + .5 * solid.normals @ LIGHT)   # (F,) Lambert's cosine, softened
        shades.extend(scene.paints[solid.paint] * light[:, None])
    colour = np.array(shades, np.float32).take(face, axis=0)    # (n, n, 3)
    # The mean of each pixel's rays, down and then across: numpy is slower at both in one go.
    down = colour.reshape(size, samples, n * 3).sum(axis=1)
    return down.reshape(size, size, samples, 3).sum(axis=2) / samples ** 2


def render(seed, indices, size, labels="balanced"):
    """Pictures and the truth about them, each a function of (seed, index, size, labels) alone.

    -> pictures (N, size, size, 3) uint8, truth (N, 3) int64 with columns body, main, second. The
    truth is the same on every machine, the pixels up to rounding. labels: see scene.
    """
    pictures = np.empty((len(indices), size, size, 3), np.uint8)
    truth = np.empty((len(indices), 3), np.int64)
    for i, index in enumerate(indices):
        view, truth[i] = scene(seed, index, labels)
        pictures[i] = np.round(ray_cast(view, size) * 255)
    return pictures, truth


if __name__ == "__main__":   # a grid of 48 cars
    import time
    import data
    start = time.perf_counter()
    pictures, labels = render(seed=0, indices=range(48), size=128)
    speed = len(pictures) / (time.perf_counter() - start)
    print(f"48 pictures of 128 x 128 at {speed:.0f} pictures/s on one core -> out/cars.png")
    for i in range(4):
        print("   ", caption(*labels[i]))
    data.save_grid("out/cars.png", pictures, columns=8)
