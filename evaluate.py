"""python evaluate.py TABLE: what README.md and RESULTS.md claim.

    python evaluate.py clip            accuracy and calibration against t
    python evaluate.py ddpm            held-out loss against t
    python evaluate.py inversion       from pictures to noise and back
    python evaluate.py judge           the judge's own accuracy
    python evaluate.py guidance        all captions, one sample each, judged; a row per method
    python evaluate.py guidance --methods contrastive --scales 3 6 12 --prompts even --seed 1
                                       a sweep: the same, a row per scale, on half of the captions
    python evaluate.py figure          what guidance sees: the figure of the README

They are about the models that sample.py would use, and about the pictures these were trained on.
Tables are printed, and written as JSON with commit, seed and machine; pictures go beside them.
"""
import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import bpe
import cars
import data
import guide
import judge
import plot
import tinyclip
import tinyddpm


class Models(NamedTuple):
    clip: torch.nn.Module
    unet: torch.nn.Module
    alpha_bar: torch.Tensor       # (T + 1,)
    text_features: torch.Tensor   # (K, E)
    captions: list                # K, that CLIP knows
    log_prior: torch.Tensor       # (K,), see guide.contrastive
    data: str                     # the name of the data set


def load_models(args, device):
    pair = data.load_pair(tinyclip.from_checkpoint, tinyddpm.from_checkpoint, args.clip, args.ddpm,
                          device)
    print(pair.where)
    if pair.unet.config.T != 1000:
        raise data.UserError(f"these models have T = {pair.unet.config.T}; the tables are about "
                             "T = 1000")
    clip_counts = pair.ddpm_counts if args.no_prior else pair.clip_counts   # equal: a ratio of 1
    log_prior = guide.prior_ratio(pair.ddpm_counts, clip_counts).to(device)
    return Models(pair.clip, pair.unet, tinyddpm.cosine_alpha_bar().to(device),
                  pair.clip.encode_captions(pair.captions), pair.captions, log_prior, pair.data)


# ---- CLIP and the diffusion model, each by itself ------------------------------------------------

def held_out(models, count, args, device):
    """`count` pictures of the validation split, or all if there are fewer, and noise for them.

    -> their captions' indices (N,), the data set, x_0 (N, 3, H, W), eps like x_0
    """
    dataset = data.load(models.data, models.unet.config.image_size, 2000, "validation")
    N = len(dataset.pictures)
    rows = np.linspace(0, N - 1, min(count, N)).astype(int)   # evenly: a folder goes class by class
    caption_of = torch.tensor(dataset.caption_of[rows]).to(device)
    x_0 = data.to_float(torch.tensor(dataset.pictures[rows])).to(device)
    generator = data.generator(args.seed, device=device)
    return caption_of, dataset, x_0, torch.randn(x_0.shape, generator=generator, device=device)


def clip_logits(clip, x, times, text_features):
    """x: (N, 3, H, W), times: (N,) -> (N, K), a part at a time to save memory."""
    return torch.cat([clip.logits(clip.encode_image(x_part, t_part), text_features, t_part)
                      for x_part, t_part in zip(x.split(250), times.split(250))])


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


def clip_table(args, device):
    """Top-1 among all captions, per attribute, and calibration, at rising noise."""
    models, rows = load_models(args, device), []
    truth, dataset, x_0, eps = held_out(models, 2000, args, device)
    labels = torch.from_numpy(dataset.caption_labels).to(device)   # (K, A)
    for t in (0, 50, *range(100, 1000, 100), 950):
        times = torch.full((len(x_0),), t, device=device)
        x_t = tinyddpm.q_sample(x_0, times, eps, models.alpha_bar)
        logits = clip_logits(models.clip, x_t, times, models.text_features)
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


def ddpm_table(args, device):
    """The mean squared error of v_hat on held-out pictures, at rising noise."""
    models, rows = load_models(args, device), []
    _, _, x_0, eps = held_out(models, 2000, args, device)
    for t in (50, 150, 300, 500, 700, 900):
        times = torch.full((len(x_0),), t, device=device)
        error = tinyddpm.ddpm_loss(models.unet, x_0, times, eps, models.alpha_bar)
        rows.append({"t": t, "v_error": error.mean().item()})
    return rows


def inversion_table(args, device):
    """What becomes of held-out pictures on the way to noise and back, by the number of steps."""
    models, rows = load_models(args, device), []
    _, _, x_0, _ = held_out(models, 64, args, device)
    alpha_bar, denoise = models.alpha_bar, tinyddpm.denoiser(models.unet, models.alpha_bar)
    for steps in (10, 25, 50, 100, 250):
        x_T = tinyddpm.invert(denoise, x_0, alpha_bar, steps)
        back = tinyddpm.sample(denoise, x_T, None, alpha_bar, steps, eta=0., clamp=False)
        rows.append({"steps": steps, "rms_error": (back - x_0).square().mean().sqrt().item(),
                     "x_T_mean": x_T.mean().item(), "x_T_std": x_T.std().item()})
        some = torch.cat([x_0[:8], back[:8]])   # as they were, as they came back
        data.save_grid(args.out / f"inversion-{steps}.png", data.to_uint8(some), 8, 2)
    return rows


def judge_table(args, device):
    """The judge's own accuracy on held-out pictures; for cars, also by how high the camera is."""
    grader, content = data.load_judge(None, args.judge, judge.from_checkpoint, device)
    dataset = data.load(content["data"], grader.config.size, 5000, "judge-test")
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

HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def guidance_table(args, device):
    """--each samples of each caption, judged; beside it what CLIP, which guided, believes, and the
    cost.

    A row for each method and scale; printed as it comes, because the whole takes long. The first
    row is unguided unless --methods says otherwise, and the others' times are compared with it.
    """
    models, rows = load_models(args, device), []
    K = len(models.captions)
    of_one = torch.arange(K, device=device)[HALVES[args.prompts]]
    indices = torch.cat([of_one + K * i for i in range(args.each)])   # of a caption: i, i + K, ...
    targets = indices % K
    grader, content = data.load_judge(models.data, args.judge, judge.from_checkpoint, device)
    if not grader or not set(models.captions) <= set(content["captions"]):
        raise data.UserError(f"there is no judge for {models.data}; train one with: python "
                             f"train.py judge --data {models.data}")
    if "classifier-free" in args.methods:
        data.check_told(models.unet)
    for name in args.methods:
        for scale in args.scales or [guide.METHODS[name].scale]:
            start = time.perf_counter()
            x_0, calls = sample_all(name, scale, indices, models, args)
            pictures = data.to_uint8(x_0)   # waits for the device, so the time is true
            seconds = time.perf_counter() - start
            rows.append({"method": name, "scale": scale,
                         **grade(grader, content, x_0, [models.captions[i] for i in targets]),
                         "clip_belief": belief(models, x_0, targets), **calls, "seconds": seconds,
                         "times_first_row": seconds / (rows[0]["seconds"] if rows else seconds)})
            some = pictures[::max(1, len(pictures) // 48)][:48]   # evenly from all prompts
            data.save_grid(args.out / f"guidance-{name}-{scale:g}.png", some, zoom=2)
            show(rows[-1:], header=len(rows) == 1)
    return rows


def sample_all(name, scale, indices, models, args):
    """The pictures with these indices, N ints: picture i is of caption i % K, from noise of its own
    -> x_0 (N, 3, H, W), and how often the U-Net was evaluated for one, forward and backward."""
    unet, alpha_bar, K = models.unet, models.alpha_bar, len(models.captions)
    size, calls, pictures = unet.config.image_size, {"unet": 0, "unet_backward": 0}, []
    hooks = [unet.register_forward_hook(lambda *_: calls.update(unet=calls["unet"] + 1)),
             unet.last.register_full_backward_hook(
                 lambda *_: calls.update(unet_backward=calls["unet_backward"] + 1))]
    parts = indices.split(args.batch)
    for part in tqdm(parts, desc=f"{name} {scale:g}", leave=False):
        generators = [data.generator(args.seed, i) for i in part.tolist()]
        denoise = guide.guided_by(name, models.clip, unet, alpha_bar, models.text_features,
                                  part % K, scale, args.interval, models.log_prior)
        x_T = tinyddpm.noise(generators, (3, size, size), alpha_bar.device)
        pictures.append(tinyddpm.sample(denoise, x_T, generators, alpha_bar, args.steps, args.eta,
                                        recurrence=args.recurrence))
    for hook in hooks:
        hook.remove()
    return torch.cat(pictures), {key: count // len(parts) for key, count in calls.items()}


def grade(grader, content, x_0, wanted):
    """What the judge finds -> shares of pictures; joint: all attributes right, low..high: 95 %.

    content: of the judge's checkpoint, which says what each caption promises; wanted: N captions.
    """
    promise = dict(zip(content["captions"], content["caption_labels"]))
    truth = torch.tensor([promise[caption] for caption in wanted])         # (N, A)
    right = judge.verdict(grader, x_0).cpu() == truth                      # (N, A)
    low, high = judge.wilson(int(right.all(1).sum()), len(right))
    return {"prompts": len(right), "joint": right.all(1).float().mean().item(), "low": low,
            "high": high, **dict(zip(content["attributes"], right.float().mean(0).tolist()))}


def belief(models, x_0, targets):
    """The probability that CLIP gives the caption each picture was made for, on average."""
    logits = clip_logits(models.clip, x_0, torch.zeros_like(targets), models.text_features)
    return logits.softmax(1)[torch.arange(len(x_0)), targets].mean().item()


# ---- the figure: what guidance sees --------------------------------------------------------------

CELL, STEP = 128, 136   # pixels: the side of a picture, and from one picture to the next
LEFT, TOP = 60, 34      # margins, for the times and for the titles
OPINION = 358           # the width of a gradient, the bars beside it and the gap after them


def figure(args, device):
    """x_t, x_0_hat, CLIP's gradient and its most probable captions, down one guided trajectory.

    CLIP twice: told how noisy x_t is, and told that x_t is clean. Both look at the same x_t.
    """
    models = load_models(args, device)
    target = find_caption(args.prompt, models.captions)
    moments = trajectory(models, target, args)
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    font = ImageFont.load_default(13)
    columns = [LEFT, LEFT + STEP, LEFT + 2 * STEP + 16, LEFT + 2 * STEP + 16 + OPINION]
    sheet = Image.new("RGB", (columns[-1] + OPINION + 28, TOP + len(moments) * STEP), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(columns, ("x_t", "x_0_hat", "noise-aware CLIP: gradient, posterior",
                                  "clean CLIP: gradient, posterior")):
        draw.text((x, 10), title, "black", font)
    for row, (t, x_t) in enumerate(moments.items()):
        y, now = TOP + row * STEP, torch.tensor([t], device=device)
        draw.text((8, y + CELL // 2), f"{t}", "black", font)
        sheet.paste(enlarged(x_t / x_t.abs().max()), (columns[0], y))
        sheet.paste(enlarged(denoise(x_t, now)), (columns[1], y))
        for x, told in zip(columns[2:], (now, torch.zeros_like(now))):
            grad, probabilities = opinion(models, x_t, told, target)
            sheet.paste(enlarged(grad / (3 * grad.std() + 1e-12)), (x, y))
            draw_bars(draw, x + CELL + 6, y + 6, probabilities, target, models.captions, font)
    sheet.save(args.out / "figure.png")
    return []


def find_caption(prompt, captions):
    """-> the index of the prompt among CLIP's captions."""
    known = [bpe.canonical(caption) for caption in captions]
    if bpe.canonical(prompt) not in known:
        raise data.UserError(f"--prompt {prompt!r} is none of CLIP's {len(captions)} captions, "
                             f"such as {captions[0]!r}")
    return known.index(bpe.canonical(prompt))


def trajectory(models, target, args):
    """One picture on its way -> {t: x_t (1, 3, H, W)} at five times from noise to picture."""
    unet, alpha_bar, visited = models.unet, models.alpha_bar, {}
    generators, size = [data.generator(args.seed, 0)], unet.config.image_size
    wanted = torch.tensor([target], device=alpha_bar.device)
    denoise = guide.guided_by("contrastive", models.clip, unet, alpha_bar, models.text_features,
                              wanted, log_prior=models.log_prior)
    x_T = tinyddpm.noise(generators, (3, size, size), alpha_bar.device)
    tinyddpm.sample(denoise, x_T, generators, alpha_bar, args.steps, args.eta,
                    watch=lambda t, x_t, x_0_hat: visited.update({t: x_t}))
    nearest = [min(visited, key=lambda t: abs(t - wanted)) for wanted in (900, 700, 500, 300, 100)]
    return {t: visited[t] for t in nearest}


def opinion(models, x_t, t, target):
    """CLIP on one x_t, told that it is at time t -> the gradient that would guide, p (K,)."""
    clip, text_features = models.clip, models.text_features
    log_p = guide.contrastive(clip, text_features, torch.tensor([target]), models.log_prior)
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        grad, = torch.autograd.grad(log_p(x, t, None).sum(), x)
    logits = clip.logits(clip.encode_image(x_t, t), text_features, t) + models.log_prior
    return grad, logits.softmax(1)[0]


def enlarged(x):
    """(1, 3, H, W) in [-1, 1] -> an Image, CELL x CELL."""
    return Image.fromarray(data.to_uint8(x)[0]).resize((CELL, CELL), Image.Resampling.NEAREST)


def draw_bars(draw, x, y, probabilities, target, captions, font):
    """The target in red and the four most probable other captions, a bar for each, from (x, y)."""
    others = [i for i in probabilities.argsort(descending=True).tolist() if i != target]
    for i in (target, *others[:4]):
        p, colour = float(probabilities[i]), "#f4b9b2" if i == target else "#d5dbe3"
        draw.rectangle([x, y, x + int(p * 208), y + 16], colour)
        draw.text((x + 3, y + 1), f"{p:.0%} {captions[i]}", "black", font)
        y += 24


# ---- the command line ----------------------------------------------------------------------------

TABLES = {"clip": clip_table, "ddpm": ddpm_table, "inversion": inversion_table,
          "judge": judge_table, "guidance": guidance_table, "figure": figure}


def show(rows, header=True):
    """Print rows, dictionaries with the same keys, as a Markdown table."""
    if header and rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def parse(arguments):
    parser = data.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--methods", nargs="+", default=["none", "clean", "contrastive"],
        choices=guide.METHODS, help="guidance: a row for each")
    add("--scales", type=float, nargs="+",
        help="guidance: a row for each; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guidance: only at these times; default: the method's own")
    add("--prompts", default="all", choices=list(HALVES),
        help="guidance: tune on one half of the captions, report on all")
    add("--each", type=int, default=1, help="guidance: samples of each caption")
    add("--judge", help="judge, guidance: a judge's weights.pt; default: as sample.py")
    add("--batch", type=int, default=49, help="guidance: pictures at a time")
    add("--prompt", default="a white and red car", help="figure: the caption to draw")
    add("--steps", type=int, default=50, help="guidance, figure: denoising steps")
    add("--eta", type=float, default=1., help="guidance, figure: 0 is DDIM, 1 as noisy as DDPM")
    add("--recurrence", type=int, default=1, help="guidance: how often each step is taken")
    add("--no-prior", action="store_true",
        help="guidance: as if CLIP had met each caption as often as the DDPM")
    add("--seed", type=int, default=0)
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--out", type=Path, default="out", help="folder for what is written")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_args(arguments)
    for name, low, high in (("steps", 1, 1000), ("eta", 0, 1), ("batch", 1, 10_000),
                            ("recurrence", 1, 100), ("each", 1, 1000), ("seed", 0, 2 ** 63 - 1)):
        if not low <= getattr(args, name) <= high:   # NaN is refused too
            raise data.UserError(
                f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    return args


def origin(args, device):
    """Where a table comes from: commit, machine and arguments."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = done.stdout.strip()
    except OSError:   # no git here
        commit = ""
    machine = f"{platform.machine()} {device}, {torch.get_num_threads()} threads"
    arguments = {key: str(value) for key, value in vars(args).items()}
    return {"commit": commit, "machine": machine, "arguments": arguments}


def main(arguments=None):
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = data.pick_device(args.device)
    with torch.no_grad(), data.autocast(device):
        rows = TABLES[args.table](args, device)
    if args.table != "guidance":   # which shows each row as it comes
        show(rows)
    content = {**origin(args, device), "rows": rows}
    (args.out / f"{args.table}.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    data.command(main)
