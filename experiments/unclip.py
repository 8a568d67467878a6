"""unCLIP: what a prior draws, what a decoder keeps, what an upsampler adds.

N images, K captions, A attributes, E embedding width; models is a sample.Models, args the flags.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import cars
import data
import guide
import sample
import tinyddpm
import train
import unclip
from experiments import evaluator, guidance, metrics, zeroshot
from infra import checkpoint
from judge import predict

POOL = 50_000            # images, of training or held out, among whose embeddings one is drawn
PROBED = 8000            # images to fit a linear probe on, and as many to test it on
IMAGES, EACH = 200, 4    # held-out images, and variations of each
FRACTIONS = .1, .2, .3, .4, .5   # of text diffs
PATHS, ON_THE_WAY = 100, 9       # interpolations, and images on each
LARGE = 588              # images of 128 x 128 pixels
LEVELS = 0., .05, .1, .2         # augmentation levels of the upsampler


def sampling_config(models, args, n, scale=None):
    """For n small images by unCLIP -> sample.SamplingConfig"""
    return sample.fill_in(evaluator.sampling_config(
        args, n=n, method="unclip", size=models.unet.config.image_size, scale=scale), models)


# ---- ways from text to image embedding -----------------------------------------------------------

def make_ways(models, args):
    """-> name: (targets (N,), generators) -> z (N, E)"""
    device, K = models.alpha_bar.device, len(models.captions)
    dataset = data.load(models.data, models.unet.config.image_size, POOL)
    z, ids = train.embed_images(models.clip, dataset, device), torch.from_numpy(dataset.caption_ids)
    text, ids = guide.scale_features(models.text_features), ids.to(device)    # (K, E), (N,)
    means = torch.stack([z[ids == k].mean(dim=0) for k in range(K)])          # (K, E)
    of_caption = [(ids == k).nonzero()[:, 0] for k in range(K)]
    held_out = data.load(models.data, models.unet.config.image_size, POOL, "validation")
    true_z = train.embed_images(models.clip, held_out, device)
    of_held_out = [np.flatnonzero(held_out.caption_ids == k) for k in range(K)]
    ridge = ridge_probe(text[ids].cpu(), z.cpu())
    mlp = train_without_diffusion(z, text, ids)
    draw = lambda pool, generator: pool[torch.randint(len(pool), (), generator=generator)]
    drawn = lambda n, scale=1: lambda targets, generators: unclip.sample_prior(
        models.prior, text[targets], generators, models.alpha_bar, draws=n, scale=scale)
    return {
        "true, of held-out images": lambda targets, generators: true_z[torch.tensor(
            [draw(of_held_out[k], g) for k, g in zip(targets.tolist(), generators)])],
        "text feature": lambda targets, _: text[targets],
        "text feature + modality gap": lambda targets, _: text[targets] + z.mean(0) - text.mean(0),
        "ridge regression": lambda targets, _: ridge(text[targets].cpu()).float().to(device),
        "mean of the caption": lambda targets, _: means[targets],
        "training image of the caption": lambda targets, generators: z[torch.stack(
            [draw(of_caption[k], g) for k, g in zip(targets.tolist(), generators)])],
        "MLP without diffusion": lambda targets, _: mlp(text[targets]),
        "prior, 1 draw": drawn(1), "prior, best of 2": drawn(2),
        "prior, best of 2, guidance 2": drawn(2, 2.)}


def train_without_diffusion(z, text, ids, steps=1000):
    """ECLIPSE (Patel et al. 2023, arXiv 2312.04655): squared error + .2 contrastive -> text to z"""
    E = z.shape[1]
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(E, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
                        nn.Linear(256, E)).to(z.device)
    optimizer = torch.optim.AdamW(mlp.parameters(), 1e-3)
    with torch.enable_grad():
        for step in range(steps):
            batch = torch.randint(len(z), (256,), generator=data.generator("training", step))
            true, k = z[batch], ids[batch]
            z_hat = mlp(text[k])
            logits = F.normalize(z_hat, dim=1) @ F.normalize(text, dim=1).T / 0.07   # (256, K)
            loss = F.mse_loss(z_hat, true) + 0.2 * F.cross_entropy(logits, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return mlp


def within(z, targets):
    """The covariance of embeddings about the mean of their caption -> (E, E)"""
    means = torch.stack([z[targets == k].mean(dim=0) for k in targets.unique()])
    rest = (z - means[torch.unique(targets, return_inverse=True)[1]]).double()
    return rest.T @ rest / len(z)


def priors(models, args):
    """Ways from text to image embedding: how near they are, how varied, and what is decoded.

    cosine: with true embeddings of the caption; spread: variance within a caption, relative to the
    true one; directions: the cosine of both covariances; the others: see evaluator.score.
    """
    indices, targets, scores = guidance.prepare(models, args)
    many = torch.arange(len(models.captions), device=indices.device).repeat(8)
    config = sampling_config(models, args, len(indices))
    ways, true = make_ways(models, args), None
    generators = lambda n: [data.generator("evaluation", args.seed, i) for i in range(n)]
    for way, draw in ways.items():
        z = guide.scale_features(draw(many, generators(len(many))))
        covariance = within(z, many)
        if true is None:   # the first way
            true = z, covariance
        make = lambda part, own: unclip.decoder_denoiser(
            models.unet, models.alpha_bar, guide.scale_features(draw(targets[part], own)),
            config.scale, config.interval)
        images = data.to_uint8(sample.sample_batches(models, make, config))
        row = evaluator.score(images, targets, models, scores)
        data.save_grid(args.out / f"prior-{way.replace(' ', '-')}.png", images[:48], zoom=2)
        spread = covariance.trace() / true[1].trace()
        directions = F.cosine_similarity(covariance.flatten(), true[1].flatten(), dim=0)
        yield {"way": way, "cosine": F.cosine_similarity(
            z, true[0].roll(len(models.captions), 0)).mean().item(), "spread": spread.item(),
            "directions": directions.item() if spread > 1e-6 else None,
            **{key: row[key] for key in ("prompt_accuracy", "low", "high", "second_judge", "kid",
                                         "kid_error", "diversity")}}


# ---- what an embedding holds, and what is decoded from it ----------------------------------------

def camera_and_shape(indices):
    """-> (N, 5) of rendered cars: cosine and sine of the azimuth, sine of the elevation, and length
    and height relative to the width"""
    rows = []
    for index in indices:
        scene, _ = cars.scene(0, index)
        vertices = np.concatenate([solid.vertices for solid in scene.solids])
        x, y, z = np.ptp(vertices, axis=0)
        back = -scene.forward
        rows.append([*back[:2] / np.linalg.norm(back[:2]), back[2], x / y, z / y])
    return torch.tensor(np.array(rows), dtype=torch.float32)


def ridge_probe(features, values, strength=10.):
    """Fit a linear map by least squares -> features (N, F) to values"""
    # float64: in bf16 autocast its products would be far from exact
    mean, std = features.double().mean(dim=0), features.double().std(dim=0) + 1e-6
    inputs = lambda features: F.pad((features.double() - mean) / std, (0, 1), value=1.)
    x = inputs(features)
    weights = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1]), x.T @ values.double())
    return lambda features: inputs(features) @ weights


def rendered_cars(models, count, split):
    """-> x_0 (count, 3, H, W), their camera_and_shape (count, 5), bodies (count,)"""
    dataset = data.load("cars", models.unet.config.image_size, count, split)
    start = cars.TRAIN if split == "train" else cars.VALIDATION
    return (data.to_float(dataset.images).to(models.alpha_bar.device),
            camera_and_shape(range(start, start + count)), torch.from_numpy(dataset.labels[:, 0]))


def camera_probe(models, encode):
    """Fit a linear probe -> images to the camera_and_shape that their features tell"""
    x, values, _ = rendered_cars(models, PROBED, "train")
    probe = ridge_probe(encode(x).cpu(), values)
    return lambda x: probe(encode(x).cpu())


def correlations(a, b, bodies):
    """Pearson's, of two camera_and_shape, among cars of the same body -> a part of a row"""
    of_body = lambda x: torch.stack([x[bodies == i].mean(dim=0) for i in range(len(cars.BODIES))])
    a, b = (x - of_body(x)[bodies] for x in (a.double(), b.double()))
    r = (a * b).sum(dim=0) / (a.norm(dim=0) * b.norm(dim=0))
    return {"azimuth": r[:2].mean().item(),
            **dict(zip(("elevation", "length", "height"), r[2:].tolist()))}


def embeddings(models, args):
    """What CLIP's embeddings hold beside the body: correlation of a linear probe with the truth."""
    judge, _ = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    x, values, bodies = rendered_cars(models, PROBED, "validation")
    for name, encode in (
            ("CLIP's embedding",
             lambda x: torch.cat([sample.embed(models, part) for part in x.split(250)])),
            ("the judge's features", lambda x: metrics.judge_features(judge, x))):
        yield {"features": name, **correlations(
            camera_probe(models, encode)(x), values, bodies)}


def held_out_cars(models, count, skip=0):
    """-> x_0 (N, 3, H, W) of held-out cars, labels (N, A)"""
    dataset = data.load("cars", models.unet.config.image_size, 2000, "validation")
    part = slice(skip, skip + count)
    x_0 = data.to_float(dataset.images[part]).to(models.alpha_bar.device)
    return x_0, torch.from_numpy(dataset.labels[part])


def kept(judge, x, labels):
    """Fraction of images with each attribute, and metrics.accuracy_row of all of them"""
    same = predict(judge, x).cpu() == labels                                  # (N, A)
    return {**dict(zip(("body", "main", "second"), same.float().mean(dim=0).tolist())),
            **metrics.accuracy_row(same.all(dim=1))}


def overlap(x, y):
    """Intersection over union of what is not white -> (N,)"""
    a, b = ((image < 0.8).any(dim=1) for image in (x, y))
    return (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)


def variations(models, args, judge):
    """Variations of held-out images, at several levels of noise on the embedding.

    azimuth, elevation, length, height: their correlation with those of the image, within a body.
    """
    x_0, labels = held_out_cars(models, IMAGES)
    values = camera_and_shape(range(cars.VALIDATION, cars.VALIDATION + IMAGES))
    probe = camera_probe(models, lambda x: metrics.judge_features(judge, x))
    config = sampling_config(models, args, IMAGES * EACH)
    drawn = {f"vary {vary:g}": sample.variations(models, x_0, replace(config, vary=vary))
             for vary in (0., .25, .5, .75)}
    same = x_0.repeat(EACH, 1, 1, 1)
    for way, x in {"the same image": same, **drawn, "another car": same.roll(1, 0)}.items():
        yield {"task": "variations", "way": way, **kept(judge, x, labels.repeat(EACH, 1)),
               "overlap": overlap(x, same).mean().item(),
               **correlations(probe(x), values.repeat(EACH, 1), labels[:, 0].repeat(EACH))}


def text_diffs(models, args, judge):
    """One attribute of held-out images is changed by two texts that differ in it."""
    x_0, labels = held_out_cars(models, IMAGES)
    rng, wanted = np.random.default_rng(0), labels.clone()
    names = list(cars.ATTRIBUTES)
    which = torch.from_numpy(rng.integers(3, size=len(x_0)))
    for i, a in enumerate(which.tolist()):
        n = len(cars.ATTRIBUTES[names[a]])
        wanted[i, a] = (labels[i, a] + rng.integers(1, n)) % n
    text = guide.scale_features(models.text_features)
    ids = [torch.from_numpy(cars.caption_index(some.numpy())) for some in (labels, wanted)]
    z = sample.embed(models, x_0)
    x_T = sample.invert(models, x_0, z)
    config = sampling_config(models, args, len(z), scale=1.)
    rows = torch.arange(len(x_0))
    for fraction in (0., *FRACTIONS):
        moved = unclip.text_diff(z, *(text[k] for k in ids), fraction)
        x = sample.decode(models, moved, x_T, config)
        same = predict(judge, x).cpu() == wanted
        others = torch.ones_like(same)
        others[rows, which] = False
        groups = {"any": torch.ones(len(x), dtype=torch.bool)}
        if fraction == FRACTIONS[-1]:
            groups |= {name: which == a for a, name in enumerate(names)}
        for name, part in groups.items():
            yield {"task": "text diff", "way": f"fraction {fraction:g}", "attribute": name,
                   "changed": same[rows, which][part].float().mean().item(),
                   "others kept": (same | ~others).all(dim=1)[part].float().mean().item(),
                   "overlap": overlap(x, x_0)[part].mean().item()}


def interpolations(models, args, judge):
    """Between two cars: how often the judge's preference for one of both captions turns once."""
    x_0, labels = held_out_cars(models, 2 * PATHS, skip=IMAGES)
    config = sampling_config(models, args, ON_THE_WAY, scale=1.)
    turns, ends = [], []
    for a, b in tqdm(zip(range(0, 2 * PATHS, 2), range(1, 2 * PATHS, 2)), total=PATHS, leave=False):
        x = sample.interpolate(models, x_0[[a, b]], config)
        log_p = [sum(logits.log_softmax(dim=1)[:, labels[i, column]]
                     for column, logits in enumerate(judge(x).values())) for i in (a, b)]
        first = log_p[0] > log_p[1]
        turns.append((first[1:] != first[:-1]).sum().item())
        ends.append(first[0].item() and not first[-1].item())
    yield {"task": "interpolation", "way": "first caption at the start, second at the end",
           "changed": np.mean(ends)}
    yield {"task": "interpolation", "way": "changes once", "changed": np.mean(np.array(turns) == 1)}


def typographic(models, args, judge):
    """Cars with a word on their side through the decoder: is it still the car?"""
    indices = zeroshot.from_the_side(IMAGES, cars.VALIDATION)
    words = [list(zeroshot.WORDS)[i % 4] for i in range(len(indices))]
    for way, some in (("without a word", [None] * len(words)), ("with a word", words)):
        images, labels = zeroshot.render_with_words(indices, some, models.unet.config.image_size)
        z = sample.embed(models, data.to_float(images).to(models.alpha_bar.device))
        x = sample.decode(models, z, None, sampling_config(models, args, len(z)))
        bodies = predict(judge, x).cpu()[:, 0].numpy()
        named = np.array([zeroshot.WORDS[word] for word in words])
        other = named != labels[:, 0]
        yield {"task": "words on cars", "way": way,
               "body": np.mean(bodies[other] == labels[other, 0]),
               "as the word": np.mean(bodies[other] == named[other])}


def decoder(models, args):
    """What decoded images keep and change: variations, text diffs, interpolation, words on cars."""
    judge, _ = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    for task in (variations, text_diffs, interpolations, typographic):
        yield from task(models, args, judge)


# ---- upsampling ----------------------------------------------------------------------------------

class DiffusionUpsampler(nn.Module):
    """What unclip.Upsampler predicts in one pass, by diffusion: the blocks of one doubling.

    x_t: (B, 12, H, W), what bicubic interpolation lacks, times SCALE, in blocks of 2 x 2 pixels of
    3 colours; t: (B,), cond: (low (B, 3, H, W), second) -> v_hat like x_t
    """
    SCALE = 4.   # to unit variance, about

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.channels
        self.time_mlp = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, 1))
        self.conv_in = nn.Conv2d(15, C, 3, padding=1)
        self.blocks = nn.ModuleList(unclip.UpsamplerBlock(C) for _ in range(config.blocks))
        self.conv_out = tinyddpm.zero_init(nn.Conv2d(C, 12, 3, padding=1))

    def forward(self, x_t, t, cond):
        low, second = cond
        time = self.time_mlp(tinyddpm.timestep_embedding(t, self.config.channels))   # (B, 1)
        cond = torch.cat([time, torch.full_like(time, second)], dim=1)
        h = self.conv_in(torch.cat([x_t, low], dim=1))
        for block in self.blocks:
            h = block(h, cond)
        return self.conv_out(h)


def residual_of(high, low):
    """What bicubic interpolation lacks, times SCALE: (B, 3, 2H, 2W), (B, 3, H, W) -> (B, 12, H, W)
    """
    return F.pixel_unshuffle(high - unclip.enlarge(low), 2) * DiffusionUpsampler.SCALE


def diffusion_objective(model, x_0, alpha_bar, generator):
    """The loss of both doublings, of the second on random crops of half the size."""
    B, n = len(x_0), x_0.shape[-1] // 2
    loss = 0.
    for second, large in ((False, F.avg_pool2d(x_0, 2)), (True, x_0)):
        top, left = 2 * torch.randint((large.shape[-1] - n) // 2 + 1, (2,), generator=generator,
                                      device=x_0.device)
        large = large[:, :, top:top + n, left:left + n]
        low = F.avg_pool2d(large, 2)
        t = tinyddpm.stratified_timesteps(B, generator)
        residual = residual_of(large, low)
        eps = torch.randn(residual.shape, generator=generator, device=x_0.device)
        loss = loss + tinyddpm.ddpm_loss(model, residual, t, eps, alpha_bar, (low, second)).mean()
    return loss


def by_diffusion(model, low, steps, start=None):
    """Upsample by diffusion -> (B, 3, 4H, 4W); start: (B, 3, 4H, 4W) from which to begin in the
    middle, at t = 500, else from noise"""
    alpha_bar, high = tinyddpm.cosine_alpha_bar().to(low.device), low
    for second in (False, True):
        generators = [data.generator("sampling", second, i) for i in range(len(low))]
        x_t = tinyddpm.randn_per_image(generators, (12, *high.shape[-2:]), low.device)
        denoise, first = tinyddpm.denoiser(model, alpha_bar, (high, second)), tinyddpm.T
        if start is not None:
            first, target = 500, start if second else F.avg_pool2d(start, 2)
            t = torch.full((len(low),), first, device=low.device)
            x_t = tinyddpm.q_sample(residual_of(target, high), t, x_t, alpha_bar)
        residual = tinyddpm.sample(denoise, x_t, generators, alpha_bar[:first + 1], steps, eta=0.,
                                   clamp=False)
        high = unclip.enlarge(high) + F.pixel_shuffle(residual / DiffusionUpsampler.SCALE, 2)
    return unclip.match_average(high, low).clamp(-1, 1)


def train_diffusion_upsampler(device):
    """Train a DiffusionUpsampler as long as the upsampler, unless it is there -> model"""
    _, config, options = train.TASKS["upsampler"]
    folder = Path("runs/ablations/upsampler-diffusion")
    dataset = data.load("cars", config.image_size, options.images)
    alpha_bar = tinyddpm.cosine_alpha_bar().to(device)
    torch.manual_seed(0)
    objective = lambda model, x_0, indices, generator: diffusion_objective(
        model, x_0, alpha_bar, generator)
    task = train.Task("upsampler", DiffusionUpsampler(config), objective,
                      lambda model, folder: "diffusion", {}, 2.)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        train.train(task, options, dataset, folder, device=device)
    model = DiffusionUpsampler(config)
    model.load_state_dict(checkpoint.load(folder / "weights.pt", "upsampler")["weights"])
    return model.eval().to(device)


def crop_features(judge, x):
    """The judge's features of a random quarter of each image, not resized -> (N, F)"""
    generator, n = data.generator("evaluation", 0), x.shape[-1] // 2
    corners = torch.randint(n + 1, (len(x), 2), generator=generator).tolist()
    crops = torch.stack([image[:, i:i + n, j:j + n] for image, (i, j) in zip(x, corners)])
    return metrics.judge_features(judge, crops, batch=100, resize=False)


def steepness(x):
    """The mean of the steepest 2 % of horizontal differences, and the total variation per pixel."""
    across, down = x.diff(dim=3).abs(), x.diff(dim=2).abs()
    steepest = across.amax(dim=1).flatten().float()
    return (steepest.topk(len(steepest) // 50).values.mean().item(),
            (across.mean() + down.mean()).item())


def upsamplers(models, args):
    """Upsampling to 128 x 128 pixels, of true small images and of guided ones.

    edges and variation: relative to real images; KID: of quarters of the images.
    """
    judge, content = sample.load_judge(models.captions, args.judge, models.alpha_bar.device)
    device, size = models.alpha_bar.device, models.upsampler.config.image_size
    diffusion = train_diffusion_upsampler(device)
    real = data.to_float(data.load("cars", size, 2 * LARGE, "judge-test").images).to(device)
    true, real = real[:LARGE], crop_features(judge, real[LARGE:])
    edge, variation = steepness(true)
    indices = torch.arange(LARGE, device=device)
    guided = evaluator.sample_cached(guide.DEFAULT, indices, models, args).images
    labels = dict(zip(content["captions"], content["caption_labels"]))
    targets = torch.tensor([labels[models.captions[i % len(models.captions)]] for i in indices])
    accuracy = lambda x: metrics.accuracy_row((predict(judge, x).cpu() == targets).all(dim=1))
    regression = lambda low, level=0.: unclip.upsample(models.upsampler, low, size, level)
    ways = {"bicubic": lambda low: F.interpolate(low, scale_factor=4, mode="bicubic").clamp(-1, 1),
            **{f"regression, level {level:g}": lambda low, level=level: regression(low, level)
               for level in LEVELS},
            **{f"diffusion, {n} steps": lambda low, n=n: by_diffusion(diffusion, low, n)
               for n in (4, 8)},
            "regression, then diffusion": lambda low: by_diffusion(
                diffusion, low, 4, regression(low))}
    for name, low in (("true", F.avg_pool2d(true, 4)),
                      ("guided", data.to_float(guided).to(device))):
        for way, upsample in ways.items():
            x = torch.cat([upsample(part) for part in tqdm(low.split(28), way, leave=False)])
            steep, varies = steepness(x)
            kid, error = metrics.kid(real, crop_features(judge, x))
            row = {"images": name, "way": way, "edges": steep / edge,
                   "variation": varies / variation, "kid": kid, "kid_error": error}
            if name == "true":
                row["psnr"] = (10 * torch.log10(
                    4 / (x - true).square().mean(dim=(1, 2, 3)))).mean().item()
            else:
                row |= accuracy(x)
            data.save_grid(args.out / f"upsampler-{name}-{way.replace(' ', '-')}.png",
                           data.to_uint8(x[::LARGE // 16][:16]))
            yield row
    yield {"images": "guided", "way": "none: as sampled", **accuracy(low)}
