"""The figures of README.md and UNCLIP.md, with Pillow alone: `python -m experiments figures`."""
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import Identity, ModuleList

import cars
import data
import guide
import sample
import tinyddpm
import unclip
from infra import plot

CAPTION = "a white and red car"
FONT, LARGE = ImageFont.load_default(15), ImageFont.load_default(20)
RED, GRAY, BLUE = "#c0392b", "#8a94a0", "#2c6fbb"


def to_image(x, size, resample=Image.NEAREST):
    """Enlarge (3, H, W) -> Image, size x size pixels; scaled into [-1, 1] if it is noisy"""
    x = x / x.abs().max().clamp(min=1)
    return Image.fromarray(data.to_uint8(x[None])[0]).resize((size, size), resample)


def canvas(width, height, color="white"):
    """-> an empty Image, its ImageDraw"""
    image = Image.new("RGB", (width, height), color)
    return image, ImageDraw.Draw(image)


def labelled_grid(rows, row_labels=(), column_labels=(), title="", gap=8):
    """Arrange rows of Images, with a label left of each row and one above each column."""
    widths = [max(cell.width for cell in column) for column in zip(*rows)]
    left = gap + max((int(FONT.getlength(label)) + gap for label in row_labels), default=0)
    top, step = 8 + 26 * bool(title) + 24 * bool(column_labels), rows[0][0].height + gap
    image, draw = canvas(left + sum(widths) + gap * len(widths), top + len(rows) * step)
    draw.text((gap, 8), title, "black", FONT)
    xs = [left + sum(widths[:j]) + gap * j for j in range(len(widths))]
    for x, width, label in zip(xs, widths, column_labels):
        draw.text((x + width / 2, top - 6), label, "black", FONT, "md")
    for i, label in enumerate(row_labels):
        draw.text((left - gap, top + (i + .5) * step), label, "black", FONT, "rm")
    for i, row in enumerate(rows):
        for x, cell in zip(xs, row):
            image.paste(cell, (x, top + i * step))
    return image


def sample_grid(models, prompt, n, columns, **options):
    """Sample n images -> one Image"""
    x_0 = sample.generate(models, prompt, n=n, **options)
    return data.image_grid(data.to_uint8(x_0), columns)


def trajectory(run):
    """Run a sampler, run(callback=...) -> {t: (x_t, x_0_hat)}, T..0; both are x_0 at t = 0"""
    visited = {}   # the last of each t, where recurrence repeats it
    x_0 = run(callback=lambda t, x_t, x_0_hat: visited.update({t: (x_t, x_0_hat)}))
    return {**visited, 0: (x_0, x_0)}


def hero(models, path):
    """A car with its two colours named, and 16 samples for "white and red car"."""
    (image, draw), labels = canvas(1000, 580), cars.caption_labels(cars.CAPTIONS.index(CAPTION))
    scene = cars.build_scene(*labels, np.random.default_rng(4))   # a view that shows all parts
    car = torch.from_numpy(cars.ray_cast(scene, 420, samples=4)).permute(2, 0, 1)
    image.paste(to_image(2 * car - 1, 420), (4, 94))
    draw.text((36, 136), "second colour: red (roof, pillars, stripe, lower band)", RED, FONT)
    draw.text((36, 480), "main colour: white (body shell)", "black", FONT)
    for x, start, end in ((109, 160, 332), (230, 160, 260), (268, 160, 296), (374, 160, 328),
                          (110, 476, 370), (215, 476, 358)):   # in pixels, by eye
        draw.line([(x, start), (x, end)], "black")
        draw.ellipse([x - 4, end - 4, x + 4, end + 4], "white", "black")
    draw.text((36, 12), "what the words mean", "black", LARGE)
    draw.text((36, 40), "a car of the data set, in high resolution", GRAY, FONT)
    draw.text((460, 12), 'python sample.py "white and red car"', "black", LARGE)
    draw.text((460, 40), "16 images, 128 x 128 pixels", GRAY, FONT)
    for i, x in enumerate(sample.generate(models, "white and red car", n=16)):
        image.paste(to_image(x, 128), (460 + i % 4 * 134, 64 + i // 4 * 128))
    image.save(path)


def forward(models, path):
    """Signal and noise against t, the cosine schedule beside the linear one (Ho et al. 2020)."""
    linear, curves = torch.cumprod(1 - torch.linspace(1e-4, 0.02, tinyddpm.T), 0), {}
    for name, alpha_bar in (("cosine", tinyddpm.cosine_alpha_bar()[1:]), ("linear", linear)):
        curves[f"sqrt(alpha_bar), {name}"] = range(1, 1001), alpha_bar.sqrt().tolist()
        curves[f"sqrt(1 - alpha_bar), {name}"] = range(1, 1001), (1 - alpha_bar).sqrt().tolist()
    plot.line_plot(path, curves, "timestep t", "factor of the image, and of the noise", 760, 340)


def noising(models, path):
    """One car at t = 0, 200, ..., 1000, and a guided sample at the same timesteps."""
    images, labels = cars.render(0, [cars.VALIDATION + 19], 32)
    caption, timesteps = cars.caption(*labels[0]), range(0, 1001, 200)   # a red jeep
    x_0 = data.to_float(images)
    eps = torch.randn(1, 3, 32, 32, generator=data.generator("evaluation", 0))
    noised = [tinyddpm.q_sample(x_0, torch.tensor([t]), eps, tinyddpm.cosine_alpha_bar())
              for t in timesteps]
    visited = trajectory(partial(sample.generate, models, caption, n=1, size=32))
    rows = noised, *zip(*(visited[t] for t in timesteps))
    labelled_grid([[to_image(x[0], 128) for x in row] for row in rows],
                  ["noised: x_t  >>>", "guided: x_t  <<<", "guided: x_0_hat  <<<"],
                  [f"t = {t}" for t in timesteps],
                  f'A car noised; from other noise one sampled, guided by "{caption}"').save(path)


def unet(models, path):
    """The U-Net: a box for every layer, with the shape of its output, and the skip connections."""
    net, shapes = tinyddpm.UNet(models.unet.config), {}   # a new one, for its hooks end with it
    for layer in (net.conv_in, *net.down, net.mid, *net.up, net.conv_out):   # a list's last part
        (layer[-1] if isinstance(layer, ModuleList) else layer).register_forward_hook(
            lambda module, inputs, output, layer=layer: shapes.update({layer: output.shape[1:]}))
    net(torch.zeros(1, 3, net.config.image_size, net.config.image_size), torch.tensor([1]))
    image, draw = canvas(800, 48 * (len(net.up) + 2) + 48)
    bottom, sources = image.height - 30, [net.conv_in, *net.down]
    draw.line([(150, 32), (150, bottom), (650, bottom), (650, 32)], "black", 2)

    def box(layer, x, row, note="", scale=1):   # scale: of the upsampling that follows
        parts = [part for part in layer.children() if not isinstance(part, Identity)]
        name, y = " + ".join(type(part).__name__ for part in parts or [layer]), 48 + 48 * row
        color = "#e8eef5" if isinstance(layer, ModuleList) else "#f3ead9"
        draw.rectangle([x - 130, y, x + 130, y + 37], color, GRAY)
        draw.text((x, y + 10), name + note, "black", FONT, "mm")
        channels, height, width = shapes[layer]
        draw.text((x, y + 27), f"{channels} x {scale * height} x {scale * width}", BLUE, FONT, "mm")

    box(net.conv_out, 650, 0)
    for row, layer in enumerate(reversed(net.up), 1):   # from the top of the figure
        if not isinstance(layer, ModuleList):
            box(layer, 650, row, ", then upsample", scale=2)
        else:   # left of it the source of its skip connection
            box(layer, 650, row)
            y, source = 48 * row + 66, sources.pop(0)
            draw.line([(280, y), (512, y)], RED, 2)
            draw.polygon([(519, y), (509, y - 6), (509, y + 6)], RED)
            box(source, 150, row, ", stride 2" if getattr(source, "stride", 1) == (2, 2) else "")
    box(net.mid, 400, len(net.up) + 1)
    draw.text((150, 20), "x_t", "black", FONT, "mm")
    draw.text((650, 20), "v_hat", "black", FONT, "mm")
    draw.text((400, 20), "output: channels x height x width", BLUE, FONT, "mm")
    draw.text((400, 52), "t is embedded, for every ResBlock", "black", FONT, "mm")
    draw.text((400, 98), "skip connections", RED, FONT, "mm")
    image.save(path)


def similarity(models, path):
    """Cosines of CLIP's image and text features: ten held-out cars and their captions."""
    images, labels = cars.render(0, range(cars.VALIDATION, cars.VALIDATION + 10), 32)
    x_0, captions = data.to_float(images), [cars.caption(*row) for row in labels]
    image_features = models.clip.encode_image(x_0).float()
    text_features = models.text_features[cars.caption_index(labels)].float()
    cosines = torch.cosine_similarity(text_features[:, None], image_features, dim=2).tolist()

    def tile(cosine):   # white up to 0, BLUE at 1
        strength, text = max(0., cosine), f"{round(cosine, 2) + 0.:.2f}"   # + 0. makes 0 of -0
        image, draw = canvas(64, 64, tuple(int(255 - strength * d) for d in (211, 144, 68)))
        draw.text((32, 32), text, "white" if strength > .6 else "black", FONT, "mm")
        return image

    rows = [[to_image(x, 64) for x in x_0], *(list(map(tile, row)) for row in cosines)]
    labelled_grid(rows, ["cosine", *captions], gap=4).save(path)


def scatter(points, label, size=150):
    """Draw points (n, 2, 1, 1) of the square from -1.6 to 1.6 -> Image"""
    image, draw = canvas(size, size)
    for x, y in ((points.flatten(1) / 3.2 + .5) * size).tolist():
        draw.ellipse([x - 1, size - y - 1, x + 1, size - y + 1], BLUE)
    draw.rectangle([0, 0, size - 1, size - 1], outline=GRAY)
    draw.text((6, 4), label, "black", FONT, stroke_width=2, stroke_fill="white")
    return image


def swiss_roll(models, path):
    """A spiral of points: noised, on the way back, and sampled in few or many steps of DDIM."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        net = tinyddpm.train_on_swiss_roll()
    alpha_bar, timesteps = tinyddpm.cosine_alpha_bar(), (0, 100, 300, 600, 1000)
    x_0, x_T = tinyddpm.swiss_roll(1000, data.generator("evaluation", 0)), torch.randn(
        1000, 2, 1, 1, generator=data.generator("evaluation", 1))
    run = partial(tinyddpm.sample, tinyddpm.denoiser(net, alpha_bar), x_T, None, alpha_bar, eta=0.)
    runs = {steps: trajectory(partial(run, steps=steps)) for steps in (2, 5, 10, 100, 1000)}
    noised = [tinyddpm.q_sample(x_0, torch.full((1000,), t), x_T, alpha_bar) for t in timesteps]
    labelled_grid([
        [scatter(x_t, f"t = {t}") for t, x_t in zip(timesteps, noised)],
        [scatter(runs[100][t][0], f"t = {t}") for t in timesteps[::-1]],
        [scatter(runs[steps][0][0], f"{steps} steps") for steps in runs]],
        ["noised: x_t", "sampled: x_t", "sampled: x_0"]).save(path)


def scales(models, path):
    """The same three x_T at guidance scale 0, 32, 128 and 512."""
    row = [sample_grid(models, "a red bus", 3, 1, scale=s) for s in (0, 32, 128, 512)]
    labelled_grid([row], (), [f"scale {s}" for s in (0, 32, 128, 512)],
                  '"a red bus", each row from the same x_T').save(path)


def eta_recurrence(models, path):
    """eta and recurrence side by side: samples from the same four x_T."""
    labelled_grid([[sample_grid(models, CAPTION, 4, 2, eta=eta, recurrence=recurrence)
                    for recurrence in (1, 2, 4)] for eta in (0., .5, 1.)],
                  ["eta = 0", "eta = 0.5", "eta = 1"], [f"recurrence {r}" for r in (1, 2, 4)],
                  f'"{CAPTION}", always from the same four x_T').save(path)


def guidance(models, path):
    """What guidance adds at five timesteps: lookahead, and CLIP on x_t with t or t = 0."""
    visited = trajectory(partial(sample.generate, models, CAPTION, n=1))
    denoise, rows = tinyddpm.denoiser(models.unet, models.alpha_bar), {}
    for t in (920, 720, 520, 320, 120):
        x_t, now = visited[t][0], torch.tensor([t])
        x_0_hat, points = denoise(x_t, now).clamp(-1, 1), [(x_t, now), (x_t, 0 * now)]
        guide.lookahead_log_p(   # where it applies CLIP; its gradient is proportional to that there
            lambda x, t_ahead, _: points.insert(0, (x, t_ahead)), models.alpha_bar,
            guide.T_FRACTION)(x_t, now, x_0_hat)
        rows[f"t = {t}"] = [*(to_image(x[0], 128) for x in (x_t, x_0_hat)), *(
            gradient_and_posterior(models, x, t_clip) for x, t_clip in points)]
    labelled_grid(list(rows.values()), rows, [
        "x_t", "x_0_hat, unguided", *(f"{name}: gradient, posterior" for name in (
            "lookahead", "noise-aware", "noise-unaware"))]).save(path)


def gradient_and_posterior(models, x_t, t):
    """Draw CLIP's gradient of log p(CAPTION | x_t), and its probabilities of five captions."""
    target = models.captions.index(CAPTION)
    log_p = guide.noise_aware(models.clip, models.text_features, torch.tensor([target]),
                              models.caption_labels)
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        grad, = torch.autograd.grad(log_p(x, t, None).sum(), x)
    image, draw = canvas(360, 128)
    image.paste(to_image((grad[0] / (3 * grad.std() + 1e-12)).clamp(-1, 1), 128), (0, 0))
    probs = models.clip.caption_probs(x_t, models.text_features, t)[0]
    others = [i for i in probs.argsort(descending=True).tolist() if i != target]
    for row, i in enumerate((target, *others[:4])):
        y, color = 4 + 24 * row, "#f4b9b2" if i == target else "#d5dbe3"
        draw.rectangle([136, y, 136 + int(probs[i] * 220), y + 19], color)
        draw.text((139, y + 1), f"{probs[i]:.0%} {models.captions[i]}", "black", FONT)
    return image


def prompts(models, path):
    """16 samples without a prompt and for three prompts, from the same noise."""
    names = None, "blue van", "yellow and black sports car", "red bus"
    cells = [labelled_grid([[sample_grid(models, name, 16, 4)]], (),
                           [f'"{name}"' if name else "no prompt"]) for name in names]
    labelled_grid([cells[:2], cells[2:]], title="16 samples each, from the same noise",
                  gap=0).save(path)


def heat_map(vector, columns=16, cell=8):
    """Draw numbers as cells, blue below 0, white at 0, red above -> Image"""
    image, draw = canvas(cell * columns, cell * -(-len(vector) // columns))
    for i, value in enumerate((vector / 3).clamp(-1, 1).tolist()):
        x, y = i % columns * cell, i // columns * cell
        draw.rectangle([x, y, x + cell - 1, y + cell - 1], tuple(
            int(255 + abs(value) * (c - 255)) for c in ((192, 57, 43) if value > 0 else
                                                        (44, 111, 187))))
    return image


def unclip_parts(models, path):
    """From a text feature by way of three embeddings to images: prior, decoder, upsampler."""
    targets = torch.tensor([models.captions.index(CAPTION)] * 3)
    text = guide.scale_features(models.text_features[targets])
    z = sample.sample_embeddings(models, models.text_features[targets],
                                 [data.generator("sampling", 0, i) for i in range(3)])
    low = sample.decode(models, z, None, sample.SamplingConfig(
        method="unclip", size=models.unet.config.image_size))
    high = unclip.upsample(models.upsampler, low, 4 * low.shape[-1], unclip.SAMPLED_AUG_LEVEL)
    columns = {"text feature": text, "image embedding": z, "image": low, "larger image": high}
    image, draw = canvas(240 * len(columns) - 80, 520)
    for column, (name, x) in enumerate(columns.items()):
        left, size = 16 + 240 * column, " x ".join(map(str, x.shape[min(2, x.dim() - 1):]))
        draw.text((left + 64, 20), name, "black", LARGE, "mm")
        draw.text((left + 64, 44), size + (" pixels" if x.dim() > 2 else " numbers"), GRAY, FONT,
                  "mm")
        for i in range(3) if column else [1]:
            middle = 136 + 152 * i
            cell = to_image(x[i], 128) if x.dim() > 2 else heat_map(x[i])
            image.paste(cell, (left, middle - cell.height // 2))
            if column:
                start, label = (left - 100, middle if column > 1 else 288), (left - 56, middle - 12)
                draw.line([start, (left - 8, middle)], RED, 2)
                draw.ellipse([left - 12, middle - 4, left - 4, middle + 4], RED)
                if column > 1 or i == 1:
                    draw.text(label, ("prior", "decoder", "upsampler")[column - 1], RED, FONT, "mm")
    draw.text((80, 344), f'"{CAPTION}"', "black", FONT, "mm")
    image.save(path)


def render_held_out(size, n):
    """Render the first n held-out cars -> (n, 3, size, size), labels (n, A)"""
    images, labels = cars.render(0, range(cars.VALIDATION, cars.VALIDATION + n), size)
    return data.to_float(images), labels


def strips(images, titles, path):
    """Save rows of images, each with a title above; images: lists of (3, H, W)"""
    rows = [[labelled_grid([[to_image(x, 112, Image.LANCZOS) for x in row]], title=title, gap=4)]
            for row, title in zip(images, titles)]
    labelled_grid(rows, gap=0).save(path)


def variations(models, path):
    """Held-out cars, and seven variations of each: of the whole embedding, of a half-hidden one."""
    x_0, labels = render_held_out(models.unet.config.image_size, 3)
    large, _ = render_held_out(4 * models.unet.config.image_size, 3)
    images, titles = [], []
    for vary in (0., .5):
        for x, given, row in zip(x_0, large, labels):
            config = sample.SamplingConfig(n=7, method="unclip", vary=vary)
            drawn = sample.variations(models, x[None], config)
            images.append([given, *drawn])
            titles.append(f"{cars.caption(*row)} (left), and --variations of it, --vary {vary:g}")
    strips(images, titles, path)


def interpolations(models, path):
    """From one held-out car to the next."""
    x_0, labels = render_held_out(models.unet.config.image_size, 4)
    names = [cars.caption(*row) for row in labels]
    config = sample.SamplingConfig(n=8, method="unclip", scale=1.)
    strips([sample.interpolate(models, x_0[i:i + 2], config) for i in range(3)],
           [f"{a} to {b}: both drawn again, and images between" for a, b in zip(names, names[1:])],
           path)


def text_diffs(models, path):
    """Held-out cars changed as two captions differ: in body, main and second colour."""
    x_0, labels = render_held_out(models.unet.config.image_size, 3)
    images, titles = [], []
    for i, (x, row) in enumerate(zip(x_0, labels)):
        changed = row.copy()   # in one attribute, to its next value
        changed[i] = (row[i] + 1) % len(list(cars.ATTRIBUTES.values())[i])
        texts = [cars.caption(*some) for some in (row, changed)]
        config = sample.SamplingConfig(n=8, method="unclip", scale=1.)
        images.append(sample.diff(models, x[None], *texts, config))
        titles.append('"{}" to "{}": drawn again, then changed, little to much'.format(*texts))
    strips(images, titles, path)


def trajectory_gif(models, path):
    """Four guided samples on their way: x_t above, x_0_hat below."""
    visited = trajectory(partial(sample.generate, models, CAPTION, n=4, size=32))
    frames = [labelled_grid([[to_image(x, 80) for x in row] for row in pair],
                            ["x_t", "x_0_hat"], (), f'"{CAPTION}", t = {t}').quantize(64)
              for t, pair in visited.items()]
    frames += 20 * frames[-1:]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0)


def figures(models, args):
    """Draw every figure, on the CPU -> a row for each: name, path"""
    guided = sample.load_models(args.clip, args.ddpm, args.weak, upsampler=args.upsampler)
    decodes = sample.load_models(args.clip, prior=args.prior, upsampler=args.upsampler,
                                 method="unclip")
    by_unclip = unclip_parts, variations, interpolations, text_diffs
    for draw in (hero, forward, noising, unet, similarity, swiss_roll, scales, eta_recurrence,
                 guidance, prompts, trajectory_gif, *by_unclip):
        path = args.out / f"{draw.__name__}.png".replace("_gif.png", ".gif")
        draw(decodes if draw in by_unclip else guided, path)
        yield {"name": draw.__doc__.splitlines()[0], "path": str(path)}
