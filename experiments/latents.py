"""x_T, the noise from which an image is sampled: optimised, inverted, shared, interpolated.

N images; models is a sample.Models, args the flags.
"""
import multiprocessing
import os
import resource
import time
from contextlib import nullcontext
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import cars
import data
import guide
import sample
import tinyddpm
import unclip
from experiments import evaluator, figures, guidance, metrics
from experiments.unclip import held_out_cars, overlap
from judge import predict

STEPS, ITERATIONS = 10, 50
EDITED = 100               # held-out images
SHARED, BRANCHES = 50, 4   # trajectories, and images that each of them branches into
PATHS, ON_THE_WAY = 50, 9  # interpolations, and images on each
REBUILT_STEPS = 50         # with which an inverted image is drawn again


def start_noise(models, indices, args):
    """-> generators and x_T (N, 3, H, W) of images with these indices"""
    size, device = models.unet.config.image_size, models.alpha_bar.device
    generators = [data.generator("sampling", args.seed, i) for i in indices.tolist()]
    return generators, tinyddpm.randn_per_image(generators, (3, size, size), device)


def through_the_last_step(denoise, timesteps):
    """Make a denoiser whose graph is built in the last step only, a shortcut"""
    def denoise_last(x_t, t):
        with torch.set_grad_enabled(int(t[0]) == timesteps[-2]):
            return denoise(x_t, t)
    return denoise_last


# ---- optimised -----------------------------------------------------------------------------------

WAYS = {   # way -> constants of guide.py to change, arguments of optimize_x_T
    "not optimised": ({}, {"iterations": 1}),
    "default": ({}, {}),
    "default, 50 steps": ({}, {"steps": 50}),
    "without weight decay": ({"DECAY": 0.}, {"lr": .05}),
    "without decay and projection": (
        {"DECAY": 0., "project_to_white_noise": lambda x: x}, {"lr": .05}),
    "norm of x_T kept only": ({"DECAY": 0., "LIMIT": 1e6}, {"lr": .05}),
    "CLIP on clean images": ({"T_LATENT": 0, "COPIES": 1}, {}),
    "through the last step": ({}, {"through_unet": "last"}),
    "through all steps": ({"DECAY": .02}, {"through_unet": True, "lr": .02}),
    "through all steps, lr .1": ({}, {"through_unet": True})}


def run_way(way, models, targets, generators, x_start):
    """Optimise x_T in one of WAYS -> x_T, images (N, 3, H, W), seconds"""
    constants, options = WAYS[way]
    options = {"steps": STEPS, "iterations": ITERATIONS, **options}
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    log_p = guide.noise_aware(models.clip, models.text_features, targets, models.caption_labels)
    optimised = denoise
    if options.get("through_unet") == "last":
        timesteps = tinyddpm.ddim_timesteps(tinyddpm.T, options["steps"])
        optimised = through_the_last_step(denoise, timesteps)
        options["through_unet"] = True
    start = time.perf_counter()
    with mock.patch.multiple(guide, **constants) if constants else nullcontext():
        x_T = guide.optimize_x_T(optimised, log_p, x_start, generators, models.alpha_bar, **options)
    seconds = time.perf_counter() - start
    return x_T, tinyddpm.sample(denoise, x_T, None, models.alpha_bar, options["steps"],
                                eta=0.), seconds


def optimised(models, args):
    """From pure noise to an image of a caption, by ways to compute and to bound the gradient.

    mean, neighbours: of x_T, the mean size of a channel's mean (white noise: .025) and the
    correlation of neighbouring pixels (0); moved: root mean square change of a pixel of x_T.
    """
    indices, targets, scores = guidance.prepare(models, args)
    for way in WAYS:
        parts, seconds = [], 0.
        for part in indices.split(args.batch):
            generators, x_start = start_noise(models, part, args)
            x_T, x_0, took = run_way(way, models, part % len(models.captions), generators, x_start)
            parts.append((x_T, x_0, x_start))
            seconds += took
        x_T, x_0, x_start = map(torch.cat, zip(*parts))
        row = evaluator.score(data.to_uint8(x_0), targets, models, scores)
        data.save_grid(args.out / f"latent-{way.replace(' ', '-')}.png",
                       data.to_uint8(x_0[:: max(1, len(x_0) // 48)][:48]), zoom=2)
        keys = ("samples", "prompt_accuracy", "low", "high", "second_judge", "clip_prob", "kid",
                "kid_error", "diversity")
        yield {"way": way, **{key: row[key] for key in keys if key in row},
               "mean": x_T.mean(dim=(2, 3)).abs().mean().item(),
               "neighbours": (x_T[..., 1:] * x_T[..., :-1]).mean().item(),
               "moved": (x_T - x_start).square().mean().sqrt().item(),
               "seconds": seconds / len(x_T)}


def gradients(models, args):
    """How far a gradient holds: what steps of x_T along it add to log p.

    step: its length relative to that of x_T; log p: on noisy copies, as optimize_x_T takes it.
    """
    targets, device = torch.arange(0, len(models.captions), 18), models.alpha_bar.device
    generators, x_T = start_noise(models, targets // 18, args)
    t = torch.full((len(targets),), guide.T_LATENT, device=device)
    noise = [tinyddpm.randn_per_image(generators, x_T.shape[1:], device) for _ in range(8)]
    log_p = guide.noise_aware(models.clip, models.text_features, targets, models.caption_labels)
    value = lambda x_0: sum(log_p(tinyddpm.q_sample(x_0, t, eps, models.alpha_bar), t, x_0)
                            for eps in noise) / len(noise)
    draw = lambda x: tinyddpm.sample(tinyddpm.denoiser(models.unet, models.alpha_bar), x, None,
                                     models.alpha_bar, STEPS, eta=0.)
    before = value(draw(x_T))
    for way in ("of x_T, through all steps", "of x_0"):
        with torch.enable_grad():
            x = (x_T if way.startswith("of x_T") else draw(x_T)).detach().requires_grad_()
            grad, = torch.autograd.grad(
                value(draw(x) if way.startswith("of x_T") else x).sum(), x)
        step = grad / grad.flatten(1).norm(dim=1)[:, None, None, None] * x[0].numel() ** 0.5
        moved = {f"step {share:.0%}": x_T + share * step for share in (.01, .03, .1, .2, .4)}
        norm = lambda x: x / x.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        yield {"gradient": way, **{name: (value(draw(norm(x))) - before).mean().item()
                                   for name, x in moved.items()}}


# ---- memory --------------------------------------------------------------------------------------

def peak_memory(steps, checkpointed):
    """The memory of this process in GB after one iteration for 16 images, back-propagated"""
    models = sample.load_models()
    targets = torch.arange(16)
    generators = [data.generator("sampling", 0, i) for i in range(16)]
    x_T = tinyddpm.randn_per_image(generators, (3, 32, 32))
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    log_p = guide.noise_aware(models.clip, models.text_features, targets, models.caption_labels)
    keep_all = mock.patch.object(guide, "checkpoint", lambda f, *x, use_reentrant: f(*x))
    with nullcontext() if checkpointed else keep_all, torch.no_grad():
        guide.optimize_x_T(denoise, log_p, x_T, generators, models.alpha_bar, steps, 1,
                           through_unet=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def memory(models, args):
    """Peak memory of back-propagation through all steps, each measured in a process of its own."""
    # By this glibc gives freed memory back; else what it keeps for later would be counted.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for checkpointed in (True, False):
        for steps in (5, 50):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                yield {"steps": steps, "kept": "x_t of each step" if checkpointed else "all",
                       "GB": pool.apply(peak_memory, (steps, checkpointed))}


# ---- edited --------------------------------------------------------------------------------------

def other_main_colour(labels):
    """Change the main colour; of cars of one colour both -> wanted labels (N, 3)"""
    rng, wanted = np.random.default_rng(0), labels.clone()
    shift = torch.from_numpy(rng.integers(1, len(cars.COLOURS), size=len(labels)))
    wanted[:, 1] = (labels[:, 1] + shift) % len(cars.COLOURS)
    one = labels[:, 1] == labels[:, 2]
    wanted[one, 2] = wanted[one, 1]
    return wanted


def edited(models, args):
    """Held-out cars, inverted, then optimised for a caption with another main colour.

    changed: the judge finds the new colour; overlap: of the silhouettes.
    """
    judge, _ = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    x_0, labels = held_out_cars(models, EDITED)
    wanted = other_main_colour(labels)
    captions = torch.from_numpy(cars.caption_index(wanted.numpy()))
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    generators, eps = start_noise(models, torch.arange(EDITED), args)
    x_T = tinyddpm.invert(denoise, x_0, eps, models.alpha_bar)
    log_p = guide.noise_aware(models.clip, models.text_features, captions, models.caption_labels)

    def optimise(iterations, lr=guide.LR_EDIT):
        best = guide.optimize_x_T(denoise, log_p, x_T, generators, models.alpha_bar, STEPS,
                                  iterations, lr)
        return tinyddpm.sample(denoise, best, None, models.alpha_bar, STEPS, eta=0.)

    def without_decay():
        with mock.patch.object(guide, "DECAY", 0.):
            return optimise(50)

    def guide_from(t):   # SDEdit (Meng et al. 2022), guided: noised to t, then sampled
        x_t = tinyddpm.q_sample(x_0, torch.full((EDITED,), t), eps, models.alpha_bar)
        method = guide.METHODS[guide.DEFAULT]
        guided = guide.build_denoiser(guide.DEFAULT, models, captions, method.scale,
                                      method.interval, 1.)
        return tinyddpm.sample(guided, x_t, generators, models.alpha_bar[:t + 1], 25,
                               recurrence=2)
    for way, draw in {
            "inverted and drawn again": lambda: optimise(1),
            **{f"optimised, {n} iterations": partial(optimise, n) for n in (10, 25, 50)},
            "lr .1": partial(optimise, 50, guide.LR),
            "without weight decay": without_decay,
            **{f"noised to {t} and guided": partial(guide_from, t) for t in (500, 700, 900)}
            }.items():
        x = draw()
        same = predict(judge, x).cpu() == wanted
        pairs = data.to_uint8(torch.stack([x_0[:24], x[:24]], dim=1).flatten(0, 1))
        data.save_grid(args.out / f"edit-{way.replace(' ', '-')}.png", pairs, zoom=2)
        yield {"task": "edit", "way": way, "changed": metrics.mean(same[:, 1]),
               "body": metrics.mean(same[:, 0]), "second": metrics.mean(same[:, 2]),
               "all": metrics.mean(same.all(dim=1)), "overlap": overlap(x, x_0).mean().item()}


# ---- inverted ------------------------------------------------------------------------------------

def inverted(models, args):
    """Inversion of held-out cars: the noise that it finds, and what is drawn from it again."""
    x_0, _ = held_out_cars(models, EDITED)
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    _, eps = start_noise(models, torch.arange(EDITED), args)
    for begin, steps in ((1, 25), (5, 25), (20, 5), (20, 10), (20, 25), (20, 50)):
        with mock.patch.object(tinyddpm, "T_INVERT", begin):
            x_T = tinyddpm.invert(denoise, x_0, eps * (begin > 1), models.alpha_bar, steps)
        again = tinyddpm.sample(denoise, x_T, None, models.alpha_bar, REBUILT_STEPS, eta=0.)
        yield {"task": "inversion", "from": f"t = {begin}" if begin > 1 else "the image itself",
               "steps": steps, "rms_error": (again - x_0).square().mean().sqrt().item(),
               "mean": x_T.mean().item(), "std": x_T.std().item(),
               "cosine with eps": F.cosine_similarity(x_T.flatten(1), eps.flatten(1)).mean().item()}


# ---- shared --------------------------------------------------------------------------------------

def shared(models, args):
    """Images that share x_t and go on with noise of their own: the later they part, the more alike.

    same body, main, second: of two that share x_t, by the judge; overlap: of their silhouettes.
    """
    judge, _ = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    denoise = guide.autoguided(models.unet, models.weak, models.alpha_bar, 1.5)
    visited, (generators, x_T) = {}, start_noise(models, torch.arange(SHARED), args)
    tinyddpm.sample(denoise, x_T, generators, models.alpha_bar, 50,
                    callback=lambda t, x_t, x_0_hat: visited.update({t: x_t}))
    for t in (1000, 900, 700, 500, 300, 100):
        branches = []
        for b in range(BRANCHES):
            own = [data.generator("sampling", args.seed, i, 1 + b) for i in range(SHARED)]
            x_t = visited[t] if t < tinyddpm.T else x_T
            branches.append(tinyddpm.sample(denoise, x_t, own, models.alpha_bar[:t + 1],
                                            max(1, t // 20)))
        found = torch.stack([predict(judge, x).cpu() for x in branches])      # (BRANCHES, N, 3)
        pairs = [(a, b) for a in range(BRANCHES) for b in range(a)]
        alike = torch.stack([found[a] == found[b] for a, b in pairs]).float().mean(dim=(0, 1))
        iou = torch.stack([overlap(branches[a], branches[b]) for a, b in pairs]).mean()
        data.save_grid(args.out / f"shared-{t}.png",
                       data.to_uint8(torch.stack(branches, 1)[:12].flatten(0, 1)), zoom=2)
        yield {"task": "shared", "from t": t, **{f"same {name}": value for name, value in zip(
            ("body", "main", "second"), alike.tolist())}, "overlap": iou.item()}


# ---- interpolated --------------------------------------------------------------------------------

def on_paths(x):
    """Interpolate from each even image to the next; x: (2 PATHS, ...) -> ON_THE_WAY x (PATHS, ...)
    """
    return [torch.cat([unclip.slerp(x[i:i + 1], x[i + 1:i + 2], f) for i in range(0, len(x), 2)])
            for f in torch.linspace(0, 1, ON_THE_WAY).tolist()]


def interpolated(models, args):
    """Slerp between two x_T, random or inverted, with and without a caption in common.

    largest step: the largest distance of two successive images, relative to that of the ends; body
    of an end: how many of the images between have the body of one end or of the other.
    """
    judge, _ = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    plain = guide.autoguided(models.unet, models.weak, models.alpha_bar, 1.)
    caption = torch.full((PATHS,), cars.CAPTIONS.index("a white and red car"))
    method = guide.METHODS[guide.DEFAULT]
    guided = guide.build_denoiser(guide.DEFAULT, models, caption, method.scale, method.interval, 1.)
    x_0, _ = held_out_cars(models, 2 * PATHS)
    _, eps = start_noise(models, torch.arange(2 * PATHS), args)
    invert = lambda eps: tinyddpm.invert(plain, x_0, eps, models.alpha_bar)
    for way, x_T in (("random", eps), ("inverted, noise of its own each", invert(eps)),
                     ("inverted, the same noise", invert(eps[:1].expand_as(eps)))):
        for common, denoise in (("", plain), (", guided by one caption", guided)):
            images = torch.stack([tinyddpm.sample(denoise, x, None, models.alpha_bar, 50, eta=0.)
                                  for x in on_paths(x_T)])            # (ON_THE_WAY, PATHS, 3, H, W)
            distance = lambda a, b: (a - b).square().mean(dim=(-3, -2, -1)).sqrt()
            steps = distance(images[1:], images[:-1])                 # (ON_THE_WAY - 1, PATHS)
            ends = distance(images[0], images[-1]).clamp(min=1e-3)
            found = torch.stack([predict(judge, x).cpu() for x in images])
            of_an_end = (found == found[:1]) | (found == found[-1:])  # (ON_THE_WAY, PATHS, 3)
            data.save_grid(args.out / f"slerp-{(way + common).replace(' ', '-')}.png",
                           data.to_uint8(images[:, :6].transpose(0, 1).flatten(0, 1)), 9, zoom=2)
            yield {"task": "slerp", "way": way + common,
                   "largest step": (steps.amax(dim=0) / ends).mean().item(),
                   **{f"{name} of an end": metrics.mean(of_an_end[1:-1, :, i])
                      for i, name in enumerate(("body", "main", "second"))}}


# ---- figures -------------------------------------------------------------------------------------

def upsampled(models, x_0):
    if not models.upsampler:
        return x_0
    return unclip.upsample(models.upsampler, x_0, 128, unclip.SAMPLED_AUG_LEVEL)


def draw_optimised(models, path):
    """Four x_T, and the images they lead to while they are optimised for a caption."""
    columns, captions = (0, 3, 6, 12, 25, 49), ("red bus", "white and red car", "green jeep",
                                                "yellow and blue truck")
    targets = torch.tensor([models.captions.index(f"a {text}") for text in captions])
    generators = [data.generator("sampling", 1, i) for i in range(len(targets))]
    x_T = tinyddpm.randn_per_image(generators, (3, 32, 32))
    log_p, seen = guide.noise_aware(
        models.clip, models.text_features, targets, models.caption_labels), []
    best = guide.optimize_x_T(
        tinyddpm.denoiser(models.unet, models.alpha_bar), log_p, x_T, generators, models.alpha_bar,
        STEPS, ITERATIONS, callback=lambda x_0, value: seen.append(x_0))
    shown = [x_T, *(upsampled(models, seen[i]) for i in columns), best]
    rows = [[figures.to_image(x[i], 112, Image.LANCZOS) for x in shown]
            for i in range(len(targets))]
    figures.labelled_grid(
        rows, [f'"{text}"' for text in captions],
        ["x_T", *(f"iteration {i}" for i in columns), "x_T optimised"]).save(path)


def draw_edited(models, path):
    """Held-out cars, each edited from seven different noises."""
    x_0, labels = figures.render_held_out(32, 3)
    large, _ = figures.render_held_out(128, 3)
    images, titles = [], []
    for x, given, row, changed in zip(x_0, large, labels, other_main_colour(
            torch.from_numpy(labels)).tolist()):
        prompt = cars.caption(*changed)
        config = sample.SamplingConfig(n=7)
        images.append([given, *sample.edit(models, x[None], prompt, config)])
        titles.append(f'{cars.caption(*row)} (left), edited to "{prompt}"')
    figures.strips(images, titles, path)


def draw_inverted(models, path):
    """A held-out car turned into noise by inversion, and drawn again from that noise."""
    x_0, _ = figures.render_held_out(32, 20)
    x_0, denoise, inverted_at = x_0[19:], tinyddpm.denoiser(models.unet, models.alpha_bar), {}

    def record(x_t, t):
        inverted_at[int(t[0])] = x_t
        return denoise(x_t, t)
    eps = torch.randn(x_0.shape, generator=data.generator("sampling", 0, 0))
    x_T = tinyddpm.invert(record, x_0, eps, models.alpha_bar, steps=49)   # every 20 timesteps
    inverted_at = {0: x_0, **inverted_at, tinyddpm.T: x_T}
    drawn = figures.trajectory(lambda callback: tinyddpm.sample(
        denoise, x_T, None, models.alpha_bar, 50, eta=0., callback=callback))
    timesteps = range(0, 1001, 100)
    rows = ([inverted_at[t][0] for t in timesteps], *zip(*(
        [x[0] for x in drawn[t]] for t in timesteps)))
    figures.labelled_grid([[figures.to_image(x, 80) for x in row] for row in rows],
                          ["inverted: x_t >>>", "drawn again: x_t <<<", "x_0_hat <<<"],
                          [f"t = {t}" for t in timesteps]).save(path)


def draw_shared(models, path):
    """Seven images that go on from one x_t; below, one x_T with several numbers of steps."""
    denoise, visited = guide.autoguided(models.unet, models.weak, models.alpha_bar, 1.5), {}
    draw = lambda x_t, t, steps, seeds, eta: upsampled(models, tinyddpm.sample(
        denoise, x_t, [data.generator("sampling", 0, 0, 1 + s) for s in seeds],
        models.alpha_bar[:t + 1], steps, eta))
    noise = tinyddpm.randn_per_image([data.generator("sampling", 0, i) for i in range(7)],
                                     (3, 32, 32))
    tinyddpm.sample(denoise, noise[:1], [data.generator("sampling", 0, 0)], models.alpha_bar, 50,
                    callback=lambda t, x_t, x_0_hat: visited.update({t: x_t}))
    by_rows = {f"from t = {t}": draw(visited[t].expand(7, -1, -1, -1), t, t // 20, range(7), 1.)
               for t in (1000, 900, 700, 500, 300)}
    by_columns = {f"{n} steps": draw(noise, 1000, n, range(7), 0.) for n in (5, 10, 25, 100)}
    grids = [figures.labelled_grid([[figures.to_image(x, 96, Image.LANCZOS) for x in row]
                                    for row in rows.values()], list(rows), title=title)
             for title, rows in (("each row goes on from one x_t", by_rows),
                                 ("each column starts at one x_T", by_columns))]
    figures.labelled_grid([[grid] for grid in grids], gap=0).save(path)


def draw_interpolated(models, path):
    """Between two random x_T, and between two inverted cars, with and without a common caption."""
    n, denoise = 9, guide.autoguided(models.unet, models.weak, models.alpha_bar, 1.5)
    caption = torch.full((n,), models.captions.index("a white and red car"))
    method, plain = guide.METHODS[guide.DEFAULT], tinyddpm.denoiser(models.unet, models.alpha_bar)
    guided = guide.build_denoiser(guide.DEFAULT, models, caption, method.scale, method.interval, 1.)
    noise = tinyddpm.randn_per_image([data.generator("sampling", 0, i) for i in (1, 2)],
                                     (3, 32, 32))
    x_0, _ = figures.render_held_out(32, 2)
    ends = {"two random x_T, autoguidance 1.5": (noise, denoise),
            'two random x_T, "white and red car"': (noise, guided),
            "two cars inverted": (tinyddpm.invert(plain, x_0, noise, models.alpha_bar), plain),
            "inverted by the same noise": (tinyddpm.invert(
                plain, x_0, noise[:1].expand_as(noise), models.alpha_bar), plain)}
    rows = [upsampled(models, tinyddpm.sample(denoise, unclip.slerp_path(x_T, n), None,
                                              models.alpha_bar, 50, eta=0.))
            for x_T, denoise in ends.values()]
    figures.labelled_grid([[figures.to_image(x, 96, Image.LANCZOS) for x in row] for row in rows],
                          list(ends)).save(path)


def draw_figures(models, args):
    """Draw the figures of LATENTS.md -> a row for each: name, path"""
    for draw in (draw_optimised, draw_edited, draw_inverted, draw_shared,
                 draw_interpolated):
        path = args.out / f"{draw.__name__.removeprefix('draw_')}.png"
        draw(models, path)
        yield {"figure": draw.__doc__.splitlines()[0], "path": str(path)}


def latents(models, args):
    """x_T optimised by CLIP, held-out cars edited; inverted, shared and interpolated latents."""
    for task in (draw_figures, gradients, inverted, shared, interpolated, edited, memory,
                 optimised):
        yield from task(models, args)
