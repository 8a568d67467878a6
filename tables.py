"""The tables of evaluate.py. Each is a function (models, args) -> rows, dictionaries with the same
keys; plots and pictures go into args.out.

models: checkpoints.Models, args: what the command line says.
"""
import math

import torch

import cars
import checkpoints
import data
import guide
import judge
import measure
import plot
import tinyddpm

BEST_OF = {f"best-of-{n}": n for n in (4, 16, 64)}   # methods that are none of guide.py's
HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}   # of captions
EXAM = 5000   # pictures by which a judge is judged


# ---- CLIP, the diffusion model and the judge, each by itself -------------------------------------

def calibration_error(probabilities, truth, bins=15):
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3): the mean gap between
    confidence and accuracy over `bins` equal ranges of confidence, each weighted by its share.

    probabilities: (N, K), truth: (N,) int -> float
    """
    confidence, answer = probabilities.max(dim=1)
    right = (answer == truth).float()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    error = 0.
    for b in bin_of.unique():
        inside = bin_of == b
        gap = (right[inside].mean() - confidence[inside].mean()).abs()
        error += gap.item() * inside.float().mean().item()
    return error


def clip_table(models, args):
    """Top-1 among all captions, per attribute, and calibration, at rising noise."""
    rows = []
    truth, dataset, x_0, eps = measure.held_out(models, args.seed)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)   # (K, A)
    for t in (0, 50, *range(100, 1000, 100), 950):
        times = torch.full((len(x_0),), t, device=x_0.device)
        x_t = tinyddpm.q_sample(x_0, times, eps, models.alpha_bar)
        logits = measure.clip_logits(models.clip, x_t, times, models.text_features)
        answer = logits.argmax(1)
        right = (labels[answer] == labels[truth]).float()         # (N, A)
        rows.append({"t": t, "joint": (answer == truth).float().mean().item(),
                     **dict(zip(dataset.attributes, right.mean(0).tolist())),
                     "ece": calibration_error(logits.softmax(1), truth),
                     "logit_scale": models.clip.logit_scale(times[:1]).item()})
    curves = {name: ([row["t"] for row in rows], [row[name] for row in rows])
              for name in ("joint", *dataset.attributes)}
    plot.lines(args.out / "clip.png", curves, "t", "accuracy on held-out pictures")
    return rows


def ddpm_table(models, args):
    """The mean squared error of v_hat on held-out pictures, at rising noise."""
    rows = []
    _, _, x_0, eps = measure.held_out(models, args.seed)
    for t in (50, 150, 300, 500, 700, 900):
        times = torch.full((len(x_0),), t, device=x_0.device)
        error = tinyddpm.ddpm_loss(models.unet, x_0, times, eps, models.alpha_bar)
        rows.append({"t": t, "v_error": error.mean().item()})
    return rows


def inversion_table(models, args):
    """What becomes of held-out pictures on the way to noise and back, by the number of steps."""
    rows = []
    _, _, x_0, _ = measure.held_out(models, args.seed, 64)
    alpha_bar, denoise = models.alpha_bar, tinyddpm.denoiser(models.unet, models.alpha_bar)
    for steps in (10, 25, 50, 100, 250):
        x_T = tinyddpm.invert(denoise, x_0, alpha_bar, steps)
        back = tinyddpm.sample(denoise, x_T, None, alpha_bar, steps, eta=0., clamp=False)
        rows.append({"steps": steps, "rms_error": (back - x_0).square().mean().sqrt().item(),
                     "x_T_mean": x_T.mean().item(), "x_T_std": x_T.std().item()})
        some = torch.cat([x_0[:8], back[:8]])   # as they were, as they came back
        data.save_grid(args.out / f"inversion-{steps}.png", data.to_uint8(some), 8, 2)
    return rows


def judge_table(models, args):
    """The judge's own accuracy on held-out pictures; for cars, also by how high the camera is."""
    device = models.alpha_bar.device
    grader, content = checkpoints.load_judge(None, args.judge, device)
    dataset = data.load(content["data"], grader.config.size, EXAM, "judge-test")
    x = data.to_float(torch.tensor(dataset.pictures)).to(device)
    right = judge.verdict(grader, x).cpu() == torch.from_numpy(dataset.labels)        # (N, A)
    groups = {"all": torch.ones(len(right), dtype=torch.bool)}
    if content["data"] == "cars":
        first = data.SPLITS["judge-test"]
        sines = [-cars.scene(0, first + i)[0].forward[2] for i in range(len(right))]  # 0 to 1
        degrees = torch.tensor(sines).asin().rad2deg()
        groups |= {f"camera at {low} to {high} degrees": (degrees >= low) & (degrees < high)
                   for low, high in ((0, 15), (15, 30), (30, 45), (45, 60), (60, 90))}
    return [{"pictures": name, "number": int(some.sum()),
             "joint": right[some].all(1).float().mean().item(),
             **dict(zip(content["attributes"], right[some].float().mean(0).tolist()))}
            for name, some in groups.items()]


# ---- guidance: is it obeyed? ---------------------------------------------------------------------

def guidance_table(models, args):
    """--each samples of each caption, judged and measured; and what they cost.

    Yields a row for each method and scale as it comes, because the whole takes long. The first is
    of real pictures; the times are compared with those of the first method, unguided unless
    --methods says otherwise.
    """
    K, first_seconds = len(models.captions), None
    of_one = torch.arange(K, device=models.alpha_bar.device)[HALVES[args.prompts]]
    indices = torch.cat([of_one + K * i for i in range(args.each)])   # of a caption: i, i + K, ...
    targets = indices % K
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
               "unet": drawing.unet, "unet_backward": drawing.unet_backward,
               "seconds": drawing.seconds,
               "times_first": drawing.seconds / (first_seconds or math.inf)}


def ways(args):
    """The methods, each at all the scales that are asked for, or at its own."""
    for method in args.methods:
        own = [guide.METHODS[method].scale] if method in guide.METHODS else [0.]
        for scale in args.scales if args.scales and own != [0.] else own:
            yield method, scale
