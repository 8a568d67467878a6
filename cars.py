"""Chapter 0: a world to draw. Cars made of convex solids, ray cast exactly, each with a caption that is true.

Real data for a text-to-image model are millions of pictures with captions of doubtful truth. Here the world is small
enough that we know everything about it: six bodies, seven colours, a main and a second colour, and a renderer of about
a hundred lines. A picture is a function of (seed, index, size); its labels come with it, so that a third party can
check later whether a generated picture obeys its caption. The world looks like the ShapeNet cars that Sitzmann et al.
rendered for Scene Representation Networks (2019, arXiv 1906.01618): one object, white background, views from the upper
half-sphere.

World coordinates: x forward, y to the left, z up, the ground at z = 0; lengths in metres until `scene` scales them.
Shapes: N pictures, S solids, F faces, V vertices, H = W = size; pictures are uint8 (N, H, W, 3), as files store them.

Left out: shadows, reflections, curved surfaces, backgrounds.
"""
from typing import NamedTuple

import numpy as np

BODIES = ["car", "sports car", "jeep", "bus", "van", "truck"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "gray"]
ATTRIBUTES = {"body": BODIES, "main": COLOURS, "second": COLOURS}

# Which pictures are for what. The ranges never meet, so nobody is examined on what they learned from.
TRAIN, VALIDATION, JUDGE_TRAIN, JUDGE_TEST = 0, 10_000_000, 20_000_000, 30_000_000   # each one's first index


# ---- words --------------------------------------------------------------------------------------------------------

def caption(body, main, second):
    """Indices into BODIES, COLOURS, COLOURS -> "a red car", or "a white and red car" where the two colours differ.

    Order means something: MAIN is the shell, SECOND the roof, the pillars, the stripe and the lower band.
    """
    colours = COLOURS[main] if main == second else f"{COLOURS[main]} and {COLOURS[second]}"
    return f"a {colours} {BODIES[body]}"


def caption_index(labels):
    """labels: (..., 3) int, columns body, main, second -> (...) int, the position of their caption in CAPTIONS."""
    return (labels[..., 0] * len(COLOURS) + labels[..., 1]) * len(COLOURS) + labels[..., 2]


def caption_labels(index):
    """The inverse of caption_index: (...) int in 0..293 -> (..., 3) int."""
    return np.stack([index // 49, index // 7 % 7, index % 7], axis=-1)


CAPTIONS = [caption(*caption_labels(np.array(i))) for i in range(len(BODIES) * len(COLOURS) ** 2)]


# ---- solids -------------------------------------------------------------------------------------------------------

class Solid(NamedTuple):
    """A convex solid: the points x with normals @ x <= offsets, in one paint."""
    normals: np.ndarray    # (F, 3) outward, unit length
    offsets: np.ndarray    # (F,)
    vertices: np.ndarray   # (V, 3), only to know where the solid lies in the picture
    paint: str             # a key of PAINT, or "main" or "second"


PAINT = {"red": (.83, .08, .08), "green": (.10, .58, .18), "blue": (.10, .22, .85), "yellow": (.97, .82, .08),
         "white": (.96, .96, .96), "black": (.07, .07, .08), "gray": (.48, .48, .50),
         "glass": (.30, .42, .52), "tyre": (.13, .13, .13), "rim": (.72, .72, .75), "trim": (.22, .22, .24),
         "headlight": (1., .97, .80), "taillight": (.62, .04, .06)}


def prism(paint, profile, right, left, lean=0.):
    """A side view pulled out sideways: a Solid from a convex outline and two sides that may lean inwards.

    profile: (n, 2) corners (x, z), counter-clockwise with x to the right and z up. At height z the solid reaches from
    y = right + lean * z to y = left - lean * z, so that parts of one cabin share their sides whatever their height.
    """
    p = np.asarray(profile, float)
    edge = np.roll(p, -1, axis=0) - p
    normals = np.zeros((len(p) + 2, 3))
    normals[:-2, 0], normals[:-2, 2] = edge[:, 1], -edge[:, 0]   # a quarter turn clockwise points outwards
    normals[-2], normals[-1] = (0, -1, lean), (0, 1, lean)
    offsets = np.append((normals[:-2, 0] * p[:, 0] + normals[:-2, 2] * p[:, 1]), (-right, left))
    length = np.sqrt((normals ** 2).sum(1))
    sides = [np.stack([p[:, 0], right + lean * p[:, 1], p[:, 1]], 1), np.stack([p[:, 0], left - lean * p[:, 1], p[:, 1]], 1)]
    return Solid(normals / length[:, None], offsets / length, np.concatenate(sides), paint)


def box(paint, x0, x1, right, left, z0, z1):
    return prism(paint, [(x0, z0), (x1, z0), (x1, z1), (x0, z1)], right, left)


def disc(paint, x, z, radius, right, left, sides=12):
    """A wheel: a prism whose outline is a regular polygon."""
    angle = 2 * np.pi * (np.arange(sides) + .5) / sides
    return prism(paint, np.stack([x + radius * np.cos(angle), z + radius * np.sin(angle)], 1), right, left)


def facing_back(solid):
    """The same solid with x and y exchanged: what pointed sideways now points along the car."""
    swap = [1, 0, 2]
    return solid._replace(normals=solid.normals[:, swap], vertices=solid.vertices[:, swap])


# ---- cars ---------------------------------------------------------------------------------------------------------

class Shape(NamedTuple):
    """Proportions of a body. Places along the car are fractions of its length, 0 at the nose and 1 at the tail."""
    length: float
    width: float
    height: float
    clearance: float        # height of the underside
    belt: float             # height of the window sill
    nose: float             # height of the front edge of the bonnet
    wheel: float            # radius
    axles: tuple            # where the wheels are
    cowl: float             # where the windscreen begins
    roof: tuple             # where the roof begins and ends
    deck: float             # where the rear window ends
    windows: tuple          # each side window from where to where, as fractions of the roof line's span
    lean: float             # how far the cabin's sides lean inwards, metres per metre


SHAPES = {   # length, width, height, clearance, belt, nose, wheel, axles, cowl, roof, deck, windows, lean
    "car":        Shape(4.5, 1.80, 1.48, .22, .90, .72, .34, (.19, .80), .26, (.42, .70), .88, ((.02, .47), (.53, .98)), .25),
    "sports car": Shape(4.5, 2.05, 1.10, .13, .72, .50, .31, (.18, .80), .36, (.54, .66), .94, ((.10, .90),), .35),
    "jeep":       Shape(3.7, 1.80, 1.95, .48, 1.15, 1.08, .46, (.19, .80), .31, (.36, .97), .98, ((.03, .35), (.42, .66), (.73, .97)), .06),
    "bus":        Shape(8.4, 2.35, 2.90, .38, 1.45, 1.30, .48, (.17, .77), .005, (.035, .985), .995,
                        ((.02, .15), (.18, .31), (.34, .48), (.51, .65), (.68, .82), (.85, .98)), .03),
    "van":        Shape(4.7, 1.90, 2.15, .26, 1.15, .88, .36, (.17, .80), .13, (.31, .97), .99, ((-.06, .30),), .08),
    "truck":      Shape(6.2, 2.15, 2.15, .55, 1.30, 1.12, .50, (.15, .66, .84), .02, (.07, .28), .30, ((.05, .75),), .06),
}
HAIR = .015   # decals lie this far above what they are painted on, metres


def build(body, rng):
    """The solids of one car, its proportions drawn from rng within a few percent of its row in SHAPES."""
    s = SHAPES[body]
    length, width, height = (s.length, s.width, s.height) * rng.uniform(.94, 1.06, 3)
    clearance, belt, nose = np.array((s.clearance, s.belt, s.nose)) * (height / s.height) * rng.uniform(.95, 1.05)
    cowl, front, rear, deck, *axles = np.array((s.cowl, *s.roof, s.deck, *s.axles)) + rng.uniform(-.012, .012, 4 + len(s.axles))
    cowl, deck = max(cowl, .002), min(deck, .998)
    front, rear, wheel = max(front, cowl + .03), min(rear, deck - .003), s.wheel * rng.uniform(.93, 1.07)
    half, at = width / 2, lambda fraction: length * (.5 - fraction)   # metres from the middle, forward positive

    # The shell below the window sill, the lower band around it and the stripe over bonnet and boot.
    tail = .33 if body == "truck" else 1.
    hull = [(at(tail), clearance), (at(0), clearance), (at(0), nose), (at(cowl), belt), (at(tail), belt * .985)]
    band = clearance + .30 * (belt - clearance)
    solids = [prism("main", hull, -half, half),
              box("second", at(tail) - HAIR, at(0) + HAIR, -half - HAIR, half + HAIR, clearance - HAIR, band),
              prism("second", [(x + (HAIR if x > 0 else -HAIR), z + HAIR) for x, z in hull], -.17 * width, .17 * width)]

    # The cabin is a block of the second colour; what its glass leaves uncovered are roof and pillars. (A van's sides are
    # mostly sheet metal, and that is shell.)
    sill = half * .97 + s.lean * belt                            # the half-width that the leaning sides have at z = 0
    cabin = [(at(deck), belt - HAIR), (at(cowl), belt - HAIR), (at(front), height), (at(rear), height)]
    solids.append(prism("main" if body == "van" else "second", cabin, -sill, sill, s.lean))
    low, high = belt + .10 * (height - belt), belt + .84 * (height - belt)
    slide = lambda x_belt, x_roof, z: x_belt + (x_roof - x_belt) * (z - belt) / (height - belt)   # along a pillar
    glass = [(slide(at(deck), at(rear), low) - HAIR, low), (slide(at(cowl), at(front), low) + HAIR, low),
             (slide(at(cowl), at(front), high) + HAIR, high), (slide(at(deck), at(rear), high) - HAIR, high)]
    solids.append(prism("glass", glass, -sill + .09 * width, sill - .09 * width, s.lean))
    for start, end in s.windows:
        pane = [(slide(at(cowl), at(front), z) * (1 - f) + slide(at(deck), at(rear), z) * f, z)
                for f, z in ((end, low), (start, low), (start, high), (end, high))]
        middle = sum(x for x, _ in pane) / 4                     # a little post between pane and windscreen
        solids.append(prism("glass", [(middle + .94 * (x - middle), z) for x, z in pane], -sill - HAIR, sill + HAIR, s.lean))

    solids += details(body, width, height, clearance, belt, nose, at, rear, sill - s.lean * height)
    for x in axles:
        for outer in (-half, half):
            inner = outer - np.sign(outer) * .28
            low_y, high_y = sorted((inner, outer + np.sign(outer) * .04))
            solids.append(disc("tyre", at(x), wheel, wheel, low_y, high_y))
            solids.append(disc("rim", at(x), wheel, .55 * wheel, low_y - HAIR, high_y + HAIR, sides=10))
    return solids


def details(body, width, height, clearance, belt, nose, at, rear, roof_half):
    """What tells the bodies apart, and front from back: lights, grille, spoiler, spare wheel, cargo box, roof panels."""
    half, out = width / 2, 2 * HAIR
    lamp_z = clearance + .62 * (nose - clearance)
    lamp_h, back_z = .13 * (nose - clearance) + .03, clearance + .62 * (belt - clearance)
    solids = [box("trim", at(0), at(0) + out, -.42 * half, .42 * half, lamp_z - 1.2 * lamp_h, lamp_z + .8 * lamp_h)]
    for y in (-.74 * half, .74 * half):
        solids.append(box("headlight", at(.03), at(0) + out, y - .18 * half, y + .18 * half, lamp_z - lamp_h, lamp_z + lamp_h))
        solids.append(box("taillight", at(1) - out, at(.97), y - .16 * half, y + .16 * half, back_z - .10, back_z + .10))
    if body == "sports car":
        solids += [box("main", at(.99), at(.90), -.92 * half, .92 * half, belt + .24, belt + .30),
                   box("trim", at(.97), at(.92), -.70 * half, -.62 * half, belt - .1, belt + .24),
                   box("trim", at(.97), at(.92), .62 * half, .70 * half, belt - .1, belt + .24)]
    if body == "jeep":
        spare = [disc("tyre", 0, belt, .42, -.20, .02), disc("rim", 0, belt, .20, -.20 - HAIR, .02)]
        solids += [s._replace(vertices=s.vertices + (at(1), 0, 0), offsets=s.offsets + s.normals[:, 0] * at(1))
                   for s in map(facing_back, spare)]
    if body in ("bus", "van", "jeep"):   # a long roof would hide the shell from above: main, with a panel of second on it
        start, panel = {"bus": .05, "van": .34, "jeep": .38}[body], .66 * roof_half
        solids += [box("main", at(rear), at(start), -roof_half, roof_half, height - .05, height + HAIR),
                   box("second", at(rear - .05), at(start + .05), -panel, panel, height, height + .08)]
    if body == "truck":
        top, z0 = height * 1.22, clearance + .10
        solids += [box("trim", at(1), at(.2), -.6 * half, .6 * half, clearance - .1, clearance + .2),
                   box("main", at(1), at(.34), -half, half, z0, top),
                   box("second", at(1) - HAIR, at(.34) + HAIR, -half - HAIR, half + HAIR, z0 - HAIR, z0 + .28 * (top - z0)),
                   box("second", at(.95), at(.39), -.62 * half, .62 * half, top - .1, top + .05)]
    return solids


# ---- the camera and the ray cast ----------------------------------------------------------------------------------

LIGHT = np.array((.35, .50, .79))   # a unit vector towards the sun


class Scene(NamedTuple):
    solids: list
    paints: dict           # name -> (3,) in [0, 1]
    eye: np.ndarray        # (3,) camera position
    forward: np.ndarray    # (3,) unit, into the picture
    right: np.ndarray      # (3,) per unit of horizontal picture coordinate, which runs from -1 to 1
    up: np.ndarray         # (3,) likewise, vertical


def scene(seed, index):
    """Everything about picture `index`, and its labels: Scene, (body, main, second)."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    body, main, second = (int(rng.integers(n)) for n in (len(BODIES), len(COLOURS), len(COLOURS)))
    solids = build(BODIES[body], rng)
    paints = {name: np.array(PAINT[name]) for name in PAINT}
    for role, colour in (("main", main), ("second", second)):
        paints[role] = np.clip(paints[COLOURS[colour]] + rng.uniform(-.04, .04, 3) * (.5 if colour > 3 else 1), 0, 1)
    if main == second:
        paints["second"] = paints["main"]

    low, high = (f(np.concatenate([s.vertices for s in solids]), axis=0) for f in (np.min, np.max))
    centre, radius = (low + high) / 2, np.linalg.norm(high - low) / 2 * rng.uniform(1., 1.1)
    turn, sin_height = rng.uniform(0, 2 * np.pi), rng.uniform(.06, .94)   # uniform on the half-sphere, less its edges
    cos_height = np.sqrt(1 - sin_height ** 2)
    back = np.array((cos_height * np.cos(turn), cos_height * np.sin(turn), sin_height))
    right = np.array((-np.sin(turn), np.cos(turn), 0.))
    distance = 3.2                                                        # in units of the car's radius
    view = .96 / np.sqrt(1 - 1 / distance ** 2) / distance               # tangent of half the angle of view
    return Scene(solids, paints, centre + distance * radius * back, -back, view * right, view * np.cross(back, right)), (body, main, second)


def ray_cast(scene, size, samples=2):
    """Scene -> (size, size, 3) float in [0, 1], one exact ray per sample, samples x samples of them in a pixel.

    A ray is eye + depth * (forward + u * right + v * up) with u, v in [-1, 1]: left unnormalised, so that
    1/depth at which it meets a plane is affine in (u, v). With s = 1/depth, one convex solid is entered at the smallest s
    of the planes in front of which the eye stands, and left at the largest s of the others; the ray hits it where
    entry > max(exit, 0), and the largest entry wins. So there is no division per pixel, and only pixels inside each
    solid's projected box are looked at.
    """
    n = size * samples
    grid = (np.arange(n, dtype=np.float32) + .5) * (2 / n) - 1
    u, v = grid[None, :], -grid[:, None]                                  # rows run from the top down
    axes = np.stack([scene.forward, scene.right, scene.up], axis=1)       # (3, 3)
    nearest = np.zeros((n, n), np.float32)                                # s of the nearest hit so far, 0 is infinitely far
    face = np.zeros((n, n), np.int32)                                     # which face it is, 0 is the background
    shades = [np.ones((1, 3))]
    count = 1
    for solid in scene.solids:
        gap = solid.offsets - solid.normals @ scene.eye                   # (F,) negative where the eye stands in front
        gap = np.where(np.abs(gap) < 1e-6, 1e-6, gap)
        a, b, c = (solid.normals @ axes / gap[:, None]).T.astype(np.float32)[:, :, None, None]   # s = a + b u + c v
        light = .60 + .40 * (.5 + .5 * solid.normals @ LIGHT)             # (F,) Lambert's cosine, softened
        shades.append(scene.paints[solid.paint] * light[:, None])

        seen = (solid.vertices - scene.eye) @ axes                        # (V, 3) depth, then u and v times depth, scaled
        scale = np.array((1., (scene.right ** 2).sum(), (scene.up ** 2).sum()))
        pu, pv = (seen[:, 1:] / scale[1:] / seen[:, :1]).T
        x0, x1 = np.clip(((np.array((pu.min(), pu.max())) + 1) * n / 2 + (0, 1)).astype(int), 0, n)
        y0, y1 = np.clip(((1 - np.array((pv.max(), pv.min()))) * n / 2 + (0, 1)).astype(int), 0, n)
        if x0 < x1 and y0 < y1:
            front = np.flatnonzero(gap < 0)
            s_front = a[front] + b[front] * u[:, x0:x1] + c[front] * v[y0:y1]          # (faces in front, h, w)
            back = gap > 0
            s_exit = (a[back] + b[back] * u[:, x0:x1] + c[back] * v[y0:y1]).max(axis=0)
            s_entry = s_front.min(axis=0)
            hit = s_entry > np.maximum(s_exit, nearest[y0:y1, x0:x1])
            nearest[y0:y1, x0:x1][hit] = s_entry[hit]
            face[y0:y1, x0:x1][hit] = count + front[s_front.argmin(axis=0)[hit]]
        count += len(gap)
    colour = np.concatenate(shades).astype(np.float32)[face]              # (n, n, 3)
    return colour.reshape(size, samples, size, samples, 3).mean(axis=(1, 3))


def render(seed, indices, size):
    """Pictures and labels, each a function of (seed, index, size) alone.

    -> pictures (N, size, size, 3) uint8, labels (N, 3) int64 with columns body, main, second. The labels are the same on
    every machine, the pixels up to rounding.
    """
    pictures, labels = np.empty((len(indices), size, size, 3), np.uint8), np.empty((len(indices), 3), np.int64)
    for i, index in enumerate(indices):
        view, labels[i] = scene(seed, index)
        pictures[i] = np.round(ray_cast(view, size) * 255)
    return pictures, labels


if __name__ == "__main__":   # a grid of 48 cars
    import time
    import data
    start = time.perf_counter()
    pictures, labels = render(seed=0, indices=range(48), size=128)
    print(f"48 pictures of 128 x 128 at {48 / (time.perf_counter() - start):.0f} pictures/s on one core -> cars.png")
    for i in range(4):
        print("   ", caption(*labels[i]))
    data.save_grid("cars.png", pictures, columns=8)
