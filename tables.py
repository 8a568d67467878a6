"""The tables of evaluate.py about CLIP, the diffusion model and the judge, each by itself.

Each is a function (models, args) that yields rows, dictionaries; where their keys change a new
table begins. Plots and pictures go into args.out.

models: checkpoints.Models, args: what the command line says. N pictures, K captions, A attributes,
E the width of CLIP's features.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

import cars
import checkpoints
import data
import judge
import measure
import plot
import tinyddpm

PROBED = 4000      # training pictures that a linear probe learns from
TRAINED = 50_000   # training pictures, among which copies are looked for
STEPPED = 100      # pictures for each number of steps
STEPS = (5, 10, 20, 50, 100, 1000)
INVERTED = (10, 25, 50, 100, 250)   # steps to noise, and as many back
EXAM = 5000        # pictures by which a judge is judged


# ---- CLIP ----------------------------------------------------------------------------------------

def reliability(probabilities, truth, bins=15):
    """What is claimed against what is true, over equal ranges of confidence: the reliability
    diagram of Guo et al. 2017, arXiv 1706.04599, sec. 2.

    probabilities: (N, K), truth: (N,) int -> mean confidence, accuracy and share of the answers in
    each range that has any, ascending: three (<= bins,)
    """
    confidence, answer = probabilities.max(dim=1)
    right = (answer == truth).float()
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    inside = torch.stack([(bin_of == b).float() for b in bin_of.unique()])    # (used bins, N)
    count = inside.sum(dim=1)
    mean = lambda x: (inside * x).sum(dim=1) / count
    return mean(confidence), mean(right), count / len(truth)


def calibration_error(probabilities, truth, bins=15):
    """Expected calibration error (Guo et al. 2017 eq. 3): the mean gap between confidence and
    accuracy, each range weighted by its share -> float"""
    confidence, accuracy, share = reliability(probabilities, truth, bins)
    return (share * (confidence - accuracy).abs()).sum().item()


def clip_table(models, args):
    """What CLIP sees through rising noise, then what else it can do, both on held-out pictures.

    First: how often the right caption is the most probable of all, or among five; how often each
    attribute of the most probable one is right; calibration.
    """
    truth, dataset, x_0, eps = measure.held_out(models, args.seed)
    models = checkpoints.with_captions(models, dataset.captions)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)          # (K, A)
    rows, curves = [], {}
    for t in (0, 50, *range(100, 1000, 100), 950):
        times, x_t = noised(x_0, eps, t, models)
        features = checkpoints.encode_images(models.clip, x_t, times)
        logits = checkpoints.clip_logits(models.clip, features, models.text_features, times)
        best = logits.topk(min(5, logits.shape[1])).indices                   # (N, 5)
        hit = best == truth[:, None]
        right = (labels[best[:, 0]] == labels[truth]).float().mean(0)         # (A,)
        if t in (0, 500, 700, 800):
            curves[f"t = {t}"] = [x.tolist() for x in reliability(logits.softmax(1), truth)[:2]]
        rows.append({"t": t, "top-1": hit[:, 0].float().mean().item(),
                     "top-5": hit.any(1).float().mean().item(),
                     **dict(zip(dataset.attributes, right.tolist())),
                     "ece": calibration_error(logits.softmax(1), truth),
                     "logit_scale": models.clip.logit_scale(times[:1]).item()})
        yield rows[-1]
    by_t = {name: ([row["t"] for row in rows], [row[name] for row in rows])
            for name in ("top-1", *dataset.attributes)}
    plot.lines(args.out / "clip.png", by_t, "t", "accuracy on held-out pictures")
    honest = {"as claimed": ([0, 1], [0, 1])}
    plot.lines(args.out / "reliability.png", {**curves, **honest}, "confidence", "accuracy")
    yield from other_skills(models, args)


def noised(x_0, eps, t, models):
    """Pictures at time t, an int -> times (N,), x_t (N, 3, H, W)"""
    times = torch.full((len(x_0),), t, device=x_0.device)
    return times, tinyddpm.q_sample(x_0, times, eps, models.alpha_bar)


def other_skills(models, args):
    """At a few times: retrieval, word order, words never read, and what is in the features.

    captions@k: how often a picture's caption is among the k most probable ones. pictures@k: how
    often one of the k pictures that suit a caption best is of that caption. order: how often "a
    white and red car" is preferred to "a red and white car" where it is right (chance 50 %).
    phrased: as captions@1, but all captions read like "a car that is white with a red roof".

    Beside captions@1, which is CLIP's zero-shot answer, stands how often all attributes are told
    right by linear probes on its features, and by the judge, who never met noise.
    """
    truth, dataset, x_0, eps = measure.held_out(models, args.seed)
    models = checkpoints.with_captions(models, dataset.captions)
    labels = torch.from_numpy(dataset.caption_labels).to(x_0.device)          # (K, A)
    grader, _ = checkpoints.load_judge(models.data, args.judge, x_0.device)
    for t in (0, 300, 500, 700):
        times, x_t = noised(x_0, eps, t, models)
        features = checkpoints.encode_images(models.clip, x_t, times)            # (N, E)
        logits = checkpoints.clip_logits(models.clip, features, models.text_features, times)
        row = {"t": t, **found(logits, truth)}
        if models.data == "cars":
            row["order"] = right_order(logits, truth, labels)
            phrased = models.clip.encode_captions(list(map(paraphrase, labels.tolist())))
            answer = checkpoints.clip_logits(models.clip, features, phrased, times).argmax(1)
            row["phrased"] = (answer == truth).float().mean().item()
        if dataset.attributes:
            row["probe"] = linear_probe(models, args, t, features, labels[truth])
        if grader:
            seen = judge.verdict(grader, x_t)
            row["judge"] = (seen == labels[truth]).all(1).float().mean().item()
        yield row


def found(logits, truth):
    """Recall both ways. logits: (N, K), truth: (N,) int -> {name: share}"""
    N, K = logits.shape
    shares = {}
    for k in (1, 5, 10):
        best = logits.topk(min(k, K)).indices                                 # (N, k)
        shares[f"captions@{k}"] = (best == truth[:, None]).any(1).float().mean().item()
    shown = truth.unique()   # captions of which there is a picture to be found
    for k in (1, 5, 10):
        best = logits[:, shown].topk(min(k, N), dim=0).indices                # (k, shown)
        shares[f"pictures@{k}"] = (truth[best] == shown).any(0).float().mean().item()
    return shares


def right_order(logits, truth, labels):
    """How often the right caption of two colours is preferred to the one with them exchanged."""
    two = (labels[truth, 1] != labels[truth, 2]).nonzero()[:, 0]              # rows of logits
    exchanged = torch.from_numpy(cars.caption_index(labels.cpu().numpy()[:, [0, 2, 1]])).to(truth)
    own = truth[two]
    return (logits[two, own] > logits[two, exchanged[own]]).float().mean().item()


def paraphrase(labels):
    """(3,) indices of body, main and second -> a caption in words that CLIP never read so."""
    body, main, second = cars.BODIES[labels[0]], *(cars.COLOURS[i] for i in labels[1:])
    return f"a {body} that is {main}" + (f" with a {second} roof" if main != second else "")


def linear_probe(models, args, t, features, labels):
    """How often softmax regressions on CLIP's normalised features, one for each attribute, name all
    attributes; they learn from PROBED training pictures at the same time t.

    features: (N, E), labels: (N, A) int, those to be named -> float
    """
    config, device = models.unet.config, features.device
    training = data.load(models.data, config.image_size, PROBED, "train")
    N = len(training.pictures)
    rows = np.linspace(0, N - 1, min(N, PROBED)).astype(int)   # evenly, see measure.held_out
    x_0 = data.to_float(training.pictures[rows]).to(device)
    generator = data.generator(args.seed, 1, device=device)
    times, x_t = noised(x_0, torch.randn(x_0.shape, generator=generator, device=device), t, models)
    scaled = lambda f: F.normalize(f.float(), dim=1) * f.shape[1] ** .5
    x, queries = scaled(checkpoints.encode_images(models.clip, x_t, times)), scaled(features)
    right = torch.ones(len(queries), dtype=torch.bool, device=device)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for i, values in enumerate(training.attributes.values()):
            truth = torch.tensor(training.labels[rows, i]).to(device)
            linear = torch.nn.Linear(x.shape[1], len(values)).to(device)
            optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100,
                                          line_search_fn="strong_wolfe")

            def loss():
                optimizer.zero_grad()
                decay = 1e-4 * linear.weight.square().sum()
                value = F.cross_entropy(linear(x), truth) + decay
                value.backward()
                return value

            optimizer.step(loss)
            right &= linear(queries).argmax(1) == labels[:, i]
    return right.float().mean().item()


# ---- the diffusion model -------------------------------------------------------------------------

def ddpm_table(models, args):
    """The loss on held-out pictures by time; how far unguided pictures are from real ones, and what
    that distance is worth; and by the number of steps."""
    _, _, x_0, eps = measure.held_out(models, args.seed)
    errors = {}
    for t in (50, 150, 300, 500, 700, 900):
        times = torch.full((len(x_0),), t, device=x_0.device)
        parts = [tinyddpm.ddpm_loss(models.unet, *part, models.alpha_bar)
                 for part in zip(x_0.split(250), times.split(250), eps.split(250))]
        errors[t] = torch.cat(parts).mean().item()
        yield {"t": t, "v_error": errors[t]}
    plot.lines(args.out / "ddpm.png", {"v_error": (list(errors), list(errors.values()))}, "t",
               "loss on held-out pictures")
    grader, _ = checkpoints.load_judge(models.data, args.judge, x_0.device)
    if grader:
        yield from distance_table(models, grader, args)
        yield from steps_table(models, grader, args)


def distance_table(models, grader, args):
    """KID (judge.kid) from held-out pictures: of others, which is the floor; of others that were
    spoilt, which has to be more; of unguided ones. Once more by a judge of random weights, to see
    what its training matters. And the share of copies of training pictures (judge.copies, pixels).
    """
    real, others = real_halves(models)
    torch.manual_seed(args.seed)
    untrained = judge.Judge(grader.config, {name: head.out_features
                                            for name, head in grader.heads.items()})
    judges = {"kid": grader, "random_net": untrained.to(real.device).eval()}
    training = data.load(models.data, models.unet.config.image_size, TRAINED, "train")
    known = data.to_float(torch.tensor(training.pictures)).flatten(1).to(real.device)
    unguided = data.to_float(measure.unguided(models, args, len(others)).pictures)
    noticed = {column: judge.features(judge_, real) for column, judge_ in judges.items()}
    for name, x in (("other real ones", others),
                    ("other real ones, each pixel the mean of 3 x 3",
                     F.avg_pool2d(others, 3, 1, 1, count_include_pad=False)),
                    ("other real ones, red and blue exchanged", others.flip(1)),
                    ("unguided", unguided.to(real.device))):
        row = {"pictures": name, "number": len(x)}
        for column, judge_ in judges.items():
            row[column], row[f"{column}_error"] = judge.kid(
                noticed[column], judge.features(judge_, x))
        yield {**row, "copies": judge.copies(x.flatten(1), known).float().mean().item()}


def real_halves(models):
    """Held-out pictures in two parts of equal size, in random order -> x_0 (<= POOL, 3, H, W) each.
    """
    most = measure.POOL
    dataset = data.load(models.data, models.unet.config.image_size, 2 * most, "validation")
    mixed = torch.randperm(len(dataset.pictures), generator=data.generator(0))[:2 * most]
    x = data.to_float(dataset.pictures[mixed.numpy()]).to(models.alpha_bar.device)
    half = len(x) // 2
    return x[:half], x[half:2 * half]


def steps_table(models, grader, args):
    """KID of unguided pictures by the number of steps, deterministic (eta 0) and noisy (eta 1)."""
    real, _ = real_halves(models)
    real = judge.features(grader, real[:STEPPED])
    number = len(real)   # a folder may hold fewer
    curves = {}
    for eta in (0., 1.):
        for steps in STEPS:
            plain = measure.altered(args, steps=steps, eta=eta, recurrence=1)
            drawing = measure.unguided(models, plain, number)
            x = data.to_float(drawing.pictures).to(real.device)
            kid, error = judge.kid(real, judge.features(grader, x))
            if kid is not None:
                curves.setdefault(f"eta {eta:g}", []).append((math.log10(steps), kid))
            data.save_grid(args.out / f"steps-{steps}-eta-{eta:g}.png", drawing.pictures[:32], 8, 2)
            yield {"steps": steps, "eta": eta, "number": number, "kid": kid,
                   "kid_error": error}
    curves = {name: tuple(zip(*points)) for name, points in curves.items()}
    if curves:
        plot.lines(args.out / "steps.png", curves, "log10 of the steps", "KID from real pictures")


def inversion_table(models, args):
    """What becomes of held-out pictures on the way to noise and back, by the number of steps."""
    _, _, x_0, _ = measure.held_out(models, args.seed, 64)
    alpha_bar, denoise = models.alpha_bar, tinyddpm.denoiser(models.unet, models.alpha_bar)
    for steps in INVERTED:
        x_T = tinyddpm.invert(denoise, x_0, alpha_bar, steps)
        back = tinyddpm.sample(denoise, x_T, None, alpha_bar, steps, eta=0., clamp=False)
        some = torch.cat([x_0[:8], back[:8]])   # as they were, as they came back
        data.save_grid(args.out / f"inversion-{steps}.png", data.to_uint8(some), 8, 2)
        yield {"steps": steps, "rms_error": (back - x_0).square().mean().sqrt().item(),
               "x_T_mean": x_T.mean().item(), "x_T_std": x_T.std().item()}


# ---- the judges ----------------------------------------------------------------------------------

def judge_table(models, args):
    """The judges' own accuracy on held-out pictures; for cars, also by how high the camera is. The
    second judge's rows also say how often the two say different things."""
    device, first_saw = models.alpha_bar.device, None
    for name in ("judge", "judge-2"):
        path = args.judge if name == "judge" else None
        grader, content = checkpoints.load_judge(models.data, path, device, name)
        if grader is None:
            continue
        dataset = data.load(content["data"], grader.config.size, EXAM, "judge-test")
        x = data.to_float(torch.tensor(dataset.pictures)).to(device)
        saw = judge.verdict(grader, x).cpu()                                  # (N, A)
        right = saw == torch.from_numpy(dataset.labels)
        first_saw = saw if first_saw is None else first_saw
        other = (saw != first_saw).any(1).float()
        for group, some in camera_groups(content["data"], len(right)).items():
            hits = right[some].all(1)
            if not len(hits):
                continue
            low, high = judge.wilson(int(hits.sum()), len(hits))
            yield {"judge": name, "pictures": group, "samples": len(hits),
                   "joint": hits.float().mean().item(), "low": low, "high": high,
                   **dict(zip(content["attributes"], right[some].float().mean(0).tolist())),
                   "unlike the first": other[some].mean().item()}


def camera_groups(name, N):
    """The first N pictures of the split "judge-test" -> {group: (N,) bool}"""
    groups = {"all": torch.ones(N, dtype=torch.bool)}
    if name == "cars":
        first = data.SPLITS["judge-test"]
        groups |= measure.by_height(
            torch.tensor([cars.camera_height(0, first + i) for i in range(N)]))
    return groups
