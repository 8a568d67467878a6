"""python evaluate.py clip | ddpm | judge | guidance | figure: what README.md and RESULTS.md claim.

    python evaluate.py clip            accuracy and calibration against t
    python evaluate.py ddpm            held-out loss against t
    python evaluate.py judge           the judge's own accuracy, by the height of the camera
    python evaluate.py guidance        all 294 prompts, one sample each, judged; a row per method
    python evaluate.py guidance --methods contrastive --scales 3 6 12 --prompts even --seed 1
                                       a sweep: the same, a row per scale, on half of the prompts
    python evaluate.py figure          what guidance sees: the figure of the README

Tables are printed, and written as JSON with commit, seed and machine; pictures go beside them.
"""
import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import cars
import data
import guide
import judge
import tinyclip
import tinyddpm


def load_models(args, device):
    """-> CLIP, U-Net, alpha_bar (T + 1,), text_features (K, E), the K captions that CLIP knows."""
    clip, unet, captions, where = data.load_pair(
        tinyclip.from_checkpoint, tinyddpm.from_checkpoint, args.clip, args.ddpm, device)
    print(where)
    alpha_bar = tinyddpm.cosine_alpha_bar(unet.config.T).to(device)
    tokens = clip.tokenizer.batch(captions, clip.config.context_length).to(device)
    return clip, unet, alpha_bar, clip.encode_text(tokens), captions


# ---- CLIP and the diffusion model, each by itself ------------------------------------------------

def held_out(args, size, count, device):
    """The first pictures of the validation split and noise for them.

    -> data set, x_0 (count, 3, size, size), eps like x_0
    """
    dataset = data.load("cars", size, 2000, "validation")
    x_0 = data.to_float(torch.tensor(dataset.pictures[:count])).to(device)
    generator = data.generator(args.seed, device=device)
    return dataset, x_0, torch.randn(x_0.shape, generator=generator, device=device)


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
    clip, _, alpha_bar, text_features, _ = load_models(args, device)
    dataset, x_0, eps = held_out(args, clip.config.image_size, 2000, device)
    truth, rows = torch.from_numpy(dataset.caption_of).to(device), []
    for t in (0, 50, *range(100, 1000, 100), 950):
        times = torch.full((len(x_0),), t, device=device)
        x_t = tinyddpm.q_sample(x_0, times, eps, alpha_bar)
        logits = clip_logits(clip, x_t, times, text_features)
        answer = logits.argmax(1)
        right = cars.caption_labels(answer.cpu().numpy()) == dataset.labels   # (N, A)
        rows.append({"t": t, "joint": (answer == truth).float().mean().item(),
                     **dict(zip(dataset.attributes, right.mean(0).tolist())),
                     "ece": calibration_error(logits.softmax(1), truth),
                     "logit_scale": clip.logit_scale(times[:1]).item()})
    curves = {name: ([row["t"] for row in rows], [row[name] for row in rows])
              for name in ("joint", *dataset.attributes)}
    data.save_plot(args.out / "clip.png", curves, "t", "accuracy on held-out pictures")
    return rows


def ddpm_table(args, device):
    """The mean squared error of v_hat on held-out pictures, at rising noise."""
    _, unet, alpha_bar, _, _ = load_models(args, device)
    _, x_0, eps = held_out(args, unet.config.image_size, 1000, device)
    rows = []
    for t in (50, 150, 300, 500, 700, 900):
        times = torch.full((len(x_0),), t, device=device)
        error = tinyddpm.ddpm_loss(unet, x_0, times, eps, alpha_bar).mean().item()
        rows.append({"t": t, "v_error": error})
    return rows


def judge_table(args, device):
    """The judge's own accuracy on its held-out pictures, by how high the camera stands."""
    grader, content = load_judge(args, device)
    dataset = data.load("cars", grader.config.size, 5000, "judge-test")
    x = data.to_float(torch.tensor(dataset.pictures)).to(device)
    right = judge.verdict(grader, x).cpu() == torch.from_numpy(dataset.labels)        # (N, A)
    first = data.SPLITS["judge-test"]
    sines = [-cars.scene(0, first + i)[0].forward[2] for i in range(len(right))]      # 0 to 1
    degrees, rows = torch.tensor(sines).asin().rad2deg(), []
    for low, high in ((0, 90), (0, 15), (15, 30), (30, 45), (45, 60), (60, 90)):
        some = right[(degrees >= low) & (degrees < high)]
        rows.append({"camera, degrees": f"{low} to {high}", "pictures": len(some),
                     "joint": some.all(1).float().mean().item(),
                     **dict(zip(content["attributes"], some.float().mean(0).tolist()))})
    return rows


def load_judge(args, device):
    """-> the judge on the device, and the content of its checkpoint."""
    path = args.judge or data.SHIPPED / "judge.pt"
    grader, content = data.load_model(path, "judge", judge.from_checkpoint)
    return grader.to(device), content


# ---- guidance: is it obeyed? ---------------------------------------------------------------------

HALVES = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


def guidance_table(args, device):
    """One sample for each prompt, judged; beside it what the guiding CLIP believes, and the cost.

    A row for each method and scale; printed as it comes, because the whole takes long. The first
    row is unguided unless --methods says otherwise, and the others' times are compared with it.
    """
    models, rows = load_models(args, device), []
    captions = models[-1]
    targets = torch.arange(len(captions), device=device)[HALVES[args.prompts]]
    grader, content = load_judge(args, device)
    for name in args.methods:
        for scale in scales_of(name, args):
            start = time.perf_counter()
            x_0 = sample_all(name, scale, targets, models, args)
            pictures = data.to_uint8(x_0)   # waits for the device, so the time is true
            seconds = time.perf_counter() - start
            rows.append({"method": name, "scale": scale,
                         **grade(grader, content["attributes"], x_0, targets),
                         "clip_belief": belief(models, x_0, targets),
                         "unet_calls": args.steps, "seconds": seconds,
                         "times_first_row": seconds / (rows[0]["seconds"] if rows else seconds)})
            some = pictures[::max(1, len(pictures) // 48)][:48]   # evenly from all prompts
            data.save_grid(args.out / f"guidance-{name}-{scale:g}.png", some, zoom=2)
            show(rows[-1:], header=len(rows) == 1)
    return rows


def scales_of(name, args):
    """The scales at which a method is to be tried."""
    if name == "none":
        return [0.]
    _, usual, _ = guide.METHODS[name]
    return args.scales or [usual]


def sample_all(name, scale, targets, models, args):
    """One picture for each target, from noise that is its own -> x_0 (N, 3, H, W)."""
    clip, unet, alpha_bar, text_features, _ = models
    maker, _, interval = guide.METHODS.get(name, (None, None, (1, 1000)))
    pictures = []
    for part in tqdm(targets.split(args.batch), desc=f"{name} {scale:g}", leave=False):
        generators = [data.generator(args.seed, i) for i in part.tolist()]
        log_p = maker(clip, text_features, part) if maker else None
        pictures.append(guide.generate(unet, alpha_bar, generators, log_p, scale,
                                       args.interval or interval, args.steps, args.eta))
    return torch.cat(pictures)


def grade(grader, attributes, x_0, targets):
    """What the judge finds -> shares of pictures; joint: all attributes right, low..high: 95 %."""
    truth = torch.from_numpy(cars.caption_labels(targets.cpu().numpy()))   # (N, A)
    right = judge.verdict(grader, x_0).cpu() == truth                      # (N, A)
    low, high = judge.wilson(int(right.all(1).sum()), len(right))
    return {"prompts": len(right), "joint": right.all(1).float().mean().item(), "low": low,
            "high": high, **dict(zip(attributes, right.float().mean(0).tolist()))}


def belief(models, x_0, targets):
    """The probability that CLIP gives the caption each picture was made for, on average."""
    clip, _, _, text_features, _ = models
    logits = clip_logits(clip, x_0, torch.zeros_like(targets), text_features)
    return logits.softmax(1)[torch.arange(len(x_0)), targets].mean().item()


# ---- the figure: what guidance sees --------------------------------------------------------------

CELL, STEP = 128, 136   # pixels: the side of a picture, and from one picture to the next
LEFT, TOP = 60, 34      # margins, for the times and for the titles
OPINION = 358           # the width of a gradient, the bars beside it and the gap after them


def figure(args, device):
    """x_t, x_0_hat, CLIP's gradient and its most probable captions, down one guided trajectory.

    CLIP twice: told how noisy x_t is, and told that x_t is clean. Both look at the same x_t.
    """
    clip, unet, alpha_bar, text_features, captions = load_models(args, device)
    target = find_caption(args.prompt, captions)
    moments = trajectory(clip, unet, alpha_bar, text_features, target, args)
    denoise, font = tinyddpm.denoiser(unet, alpha_bar), ImageFont.load_default(13)
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
            grad, probabilities = opinion(clip, x_t, told, text_features, target)
            sheet.paste(enlarged(grad / (3 * grad.std() + 1e-12)), (x, y))
            draw_bars(draw, x + CELL + 6, y + 6, probabilities, target, captions, font)
    sheet.save(args.out / "figure.png")
    return []


def find_caption(prompt, captions):
    """-> the index of the prompt among CLIP's captions."""
    known = [tinyclip.canonical(caption) for caption in captions]
    if tinyclip.canonical(prompt) not in known:
        raise data.UserError(f"--prompt {prompt!r} is none of CLIP's {len(captions)} captions, "
                             f"such as {captions[0]!r}")
    return known.index(tinyclip.canonical(prompt))


def trajectory(clip, unet, alpha_bar, text_features, target, args):
    """One picture on its way -> {t: x_t (1, 3, H, W)} at five times from noise to picture."""
    maker, scale, interval = guide.METHODS["contrastive"]
    log_p = maker(clip, text_features, torch.tensor([target], device=alpha_bar.device))
    visited = {}
    guide.generate(unet, alpha_bar, [data.generator(args.seed, 0)], log_p, scale, interval,
                   args.steps, args.eta, watch=lambda t, x_t, x_0_hat: visited.update({t: x_t}))
    nearest = [min(visited, key=lambda t: abs(t - wanted)) for wanted in (900, 700, 500, 300, 100)]
    return {t: visited[t] for t in nearest}


def opinion(clip, x_t, t, text_features, target):
    """CLIP on one x_t, told that it is at time t -> the gradient that would guide, p (K,)."""
    log_p = guide.contrastive(clip, text_features, torch.tensor([target]))
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        grad, = torch.autograd.grad(log_p(x, t, None).sum(), x)
    logits = clip.logits(clip.encode_image(x_t, t), text_features, t)
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

TABLES = {"clip": clip_table, "ddpm": ddpm_table, "judge": judge_table,
          "guidance": guidance_table, "figure": figure}


def show(rows, header=True):
    """Print rows, dictionaries with the same keys, as a Markdown table."""
    if header and rows:
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--methods", nargs="+", default=["none", "clean", "contrastive"],
        choices=["none", *guide.METHODS], help="guidance: a row for each")
    add("--scales", type=float, nargs="+",
        help="guidance: a row for each; default: the method's own")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"),
        help="guidance: only at these times; default: the method's own")
    add("--prompts", default="all", choices=list(HALVES),
        help="guidance: tune on one half, report on all")
    add("--judge", help="guidance: a judge's weights.pt; default: the one with the source")
    add("--batch", type=int, default=49, help="guidance: pictures at a time")
    add("--prompt", default="a white and red car", help="figure: the caption to draw")
    add("--steps", type=int, default=50, help="guidance, figure: denoising steps")
    add("--eta", type=float, default=1., help="guidance, figure: 0 is DDIM, 1 as noisy as DDPM")
    add("--seed", type=int, default=0)
    add("--clip", help="a CLIP's weights.pt")
    add("--ddpm", help="a DDPM's weights.pt")
    add("--out", type=Path, default="out", help="folder for what is written")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_args(arguments)
    for name, low, high in (("steps", 1, 1000), ("eta", 0, 1), ("batch", 1, 10_000),
                            ("seed", 0, 2 ** 63)):
        if not low <= getattr(args, name) <= high:   # NaN is refused too
            raise data.UserError(
                f"--{name} must be from {low} to {high}, not {getattr(args, name)}")
    return args


def origin(args, device):
    """Where a table comes from: commit, machine and arguments."""
    git = ["git", "rev-parse", "--short", "HEAD"]
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
    try:
        main()
    except data.UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
