"""What guidance sees: the figure of the README. `python evaluate.py figure` draws it.

`models` is checkpoints.Models, `args` what the command line says.
"""
import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoints
import data
import guide
import tinyddpm

CELL, STEP = 128, 136   # pixels: the side of a picture, and from one picture to the next
LEFT, TOP = 60, 34      # margins, for the times and for the titles
BAR, GAP = 208, 16      # the length of a bar for 100 %; between a picture and the next column
OPINION = CELL + 6 + BAR + GAP   # the width of a gradient, the bars beside it and the gap


def figure(models, args):
    """x_t, x_0_hat, CLIP's gradient and its most probable captions, down one guided trajectory.

    CLIP twice: told how noisy x_t is, and told that x_t is clean. Both look at the same x_t, on a
    trajectory that the default method guides.
    """
    device = models.alpha_bar.device
    target = checkpoints.find_caption(args.prompt, models)
    if target is None:
        raise data.UserError(f"--prompt {args.prompt!r} is none of CLIP's {len(models.captions)} "
                             f"captions, such as {models.captions[0]!r}")
    moments = trajectory(models, target, args)
    denoise = tinyddpm.denoiser(models.unet, models.alpha_bar)
    font = ImageFont.load_default(13)
    columns = [LEFT, LEFT + STEP, LEFT + 2 * STEP + GAP, LEFT + 2 * STEP + GAP + OPINION]
    sheet = Image.new("RGB", (columns[-1] + OPINION + 2 * GAP, TOP + len(moments) * STEP), "white")
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
    return []   # no table


def trajectory(models, target, args):
    """One picture on its way -> {t: x_t (1, 3, H, W)} at five times from noise to picture."""
    unet, alpha_bar, visited = models.unet, models.alpha_bar, {}
    generators, size = [data.generator(args.seed, 0)], unet.config.image_size
    wanted = torch.tensor([target], device=alpha_bar.device)
    denoise = guide.guided_by(guide.DEFAULT, models, wanted)
    x_T = tinyddpm.noise(generators, (3, size, size), alpha_bar.device)
    tinyddpm.sample(denoise, x_T, generators, alpha_bar, args.steps, args.eta,
                    recurrence=args.recurrence,
                    watch=lambda t, x_t, x_0_hat: visited.update({t: x_t}))
    nearest = [min(visited, key=lambda t: abs(t - near)) for near in (900, 700, 500, 300, 100)]
    return {t: visited[t] for t in nearest}


def opinion(models, x_t, t, target):
    """CLIP on one x_t, told that it is at time t -> the gradient of guide.contrastive there, which
    is of the softened p, (1, 3, H, W); p as CLIP means it, (K,)."""
    log_p = guide.contrastive(models.clip, models.text_features, torch.tensor([target]),
                              models.log_prior)
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        grad, = torch.autograd.grad(log_p(x, t, None).sum(), x)
    return grad, checkpoints.beliefs(models, x_t, t)[0]


def enlarged(x):
    """(1, 3, H, W) in [-1, 1] -> an Image, CELL x CELL."""
    return Image.fromarray(data.to_uint8(x)[0]).resize((CELL, CELL), Image.Resampling.NEAREST)


def draw_bars(draw, x, y, probabilities, target, captions, font):
    """The target in red and the four most probable other captions, a bar for each, from (x, y)."""
    others = [i for i in probabilities.argsort(descending=True).tolist() if i != target]
    for i in (target, *others[:4]):
        p, colour = float(probabilities[i]), "#f4b9b2" if i == target else "#d5dbe3"
        draw.rectangle([x, y, x + int(p * BAR), y + 16], colour)
        draw.text((x + 3, y + 1), f"{p:.0%} {captions[i]}", "black", font)
        y += 24
