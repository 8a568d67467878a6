"""What a shared space of images and texts gives without training for a task, and what it does not.

    python -m experiments predict out/red-bus.png "a red bus" "a blue van"     probabilities
    python -m experiments predict FOLDER     how many of a class folder's images it gets right

Zero-shot prediction beside a linear probe and the judge; words painted on cars, which CLIP may read
(Goh et al. 2021, "Multimodal Neurons", distill.pub/2021/multimodal-neurons); two cars in one image.
N images, K captions, A attributes, E embedding width; models is a sample.Models, args the flags.
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import cars
import data
import sample
import train
from experiments import ablations, figures, metrics, second_judge
from experiments.clip import held_out_phrasings
from experiments.evaluator import normalized
from infra import cli, image_folders
from judge import predict

TEST_IMAGES, SEEN = 2000, 10_000       # images to test on, and to fit the linear probe on
SIDE_VIEWS, WITH_WORDS = 400, 4000     # cars to test words on, and to train on
PAIRS_OF_CARS = 300
FONT = {"B": "###,#.#,##.,#.#,###", "C": "###,#..,#..,#..,###", "J": "..#,..#,..#,#.#,###",
        "N": "###,#.#,#.#,#.#,#.#", "P": "###,#.#,###,#..,#..", "R": "###,#.#,##.,#.#,#.#",
        "S": "###,#..,###,..#,###", "U": "#.#,#.#,#.#,#.#,###", "V": "#.#,#.#,#.#,#.#,.#.",
        "A": "###,#.#,###,#.#,#.#", "E": "###,#..,##.,#..,###", "K": "#.#,#.#,##.,#.#,#.#",
        "T": "###,.#.,.#.,.#.,.#."}   # 3 x 5, from the top
WORDS = {"BUS": 3, "VAN": 4, "JEEP": 2, "CAR": 0}   # the body that each names


def predict_file(arguments=None):
    """CLIP's probabilities of texts for an image file; accuracy on a folder of class folders."""
    parser = cli.Parser("python -m experiments predict", description=predict_file.__doc__)
    parser.add_argument("image", type=Path, help="or a folder with one folder for each class")
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--clip", help="its weights.pt; default: as sample.py")
    args = parser.parse_args(arguments)
    if args.image.is_dir() == bool(args.texts):
        raise cli.UserError("give an image and texts, or a folder alone")
    models = sample.load_models(args.clip)
    size = models.unet.config.image_size
    with torch.no_grad():
        if args.image.is_dir():
            for way, correct in predict_folder(models.clip, args.image, size).items():
                print(f"{way}: {correct.float().mean():.1%} of {len(correct):,} images")
            return
        x = data.to_float(image_folders.read_image(args.image, size)[None])
        features = models.clip.encode_captions(normalized(args.texts))
        for p, text in sorted(zip(models.clip.caption_probs(x, features)[0].tolist(), args.texts),
                              reverse=True):
            print(f"{p:6.1%}  {text}")


def predict_texts(clip, x, text_features):
    """Predict the most probable text: x (N, 3, H, W), text_features (n, E) -> (N,) int"""
    return clip.caption_probs(x.to(text_features.device), text_features).argmax(dim=1).cpu()


def predict_folder(clip, folder, size):
    """Zero-shot prediction of class folders -> {"zero-shot, one prompt": (N,) bool, ...}

    Prints what was found and what is left out. UserError if there is no image to read.
    """
    try:
        scan = image_folders.scan_folder(folder)
    except cli.UserError as error:
        raise cli.UserError(f"{folder}: {error}") from None
    if not scan.classes:
        raise cli.UserError(f"{folder} holds {scan.layout}; put each class in a folder of its own")
    images, readable = image_folders.make_images(scan.files, size)
    readable = np.flatnonzero(np.array(readable) >= 0)   # -1: cannot be read
    captions, templates, caption_ids = image_folders.captions_and_templates(scan)
    print(image_folders.report(scan, "test", range(len(images)), readable, len(captions)))
    if not len(readable):
        raise cli.UserError(f"{folder}: none of {len(images):,} images can be read")
    x, truth, correct = data.to_float(images[readable]), torch.tensor(caption_ids)[readable], {}
    for way, ensemble in (("one prompt", templates[:1]), (f"{len(templates)} prompts", templates)):
        features = clip.encode_ensemble(list(map(normalized, ensemble)))
        correct[f"zero-shot, {way}"] = predict_texts(clip, x, features) == truth
    return correct


# ---- zero-shot, linear probe, judge --------------------------------------------------------------

def linear_probe(features, labels, steps=300):
    """Fit softmax regression of labels (N, A) on features (N, E) -> a function features -> (N, A)
    """
    heads = [torch.nn.Linear(features.shape[1], int(labels[:, a].max()) + 1)
             for a in range(labels.shape[1])]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=0.05)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(steps):
            loss = sum(F.cross_entropy(10 * head(features), labels[:, a])
                       for a, head in enumerate(heads))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lambda x: torch.stack([head(x).argmax(dim=1) for head in heads], dim=1)


def image_features(models, x):
    features = [models.clip.encode_image(part) for part in x.to(models.alpha_bar.device).split(250)]
    return F.normalize(torch.cat(features).float(), dim=-1).cpu()


def zero_shot(models, args):
    """Zero-shot prediction beside a linear probe and the judge; painted words; two cars."""
    judge, _, _ = second_judge.load_judges(models, args)
    labels = torch.from_numpy(cars.caption_labels(np.arange(len(cars.CAPTIONS))))
    held_out = data.load("cars", judge.config.image_size, TEST_IMAGES, "validation")
    x, truth = data.to_float(held_out.images[:]), torch.from_numpy(held_out.labels)
    seen = data.load("cars", judge.config.image_size, 50_000)
    x_seen, seen_labels = data.to_float(seen.images[:SEEN]), torch.from_numpy(seen.labels[:SEEN])
    by_judge = predict(judge, x.to(models.alpha_bar.device)).cpu()
    zero_shot_of = lambda models, features: labels[predict_texts(models.clip, x, features)]

    def compare(task, ways, subset=slice(None)):   # ways: name -> (N, A) int
        for way, predicted in ways.items():
            yield row(task, way, (predicted == truth).all(dim=1)[subset])

    yield from class_folders(models, held_out)
    probe = linear_probe(image_features(models, x_seen), seen_labels)
    yield from compare("all attributes", {
        "zero-shot, 294 captions": zero_shot_of(models, models.text_features),
        "linear probe, 10,000 images": probe(image_features(models, x)),
        "the judge, 50,000 images": by_judge})
    phrasings = [sample.encode_in_wordings(normalized(texts), models)
                 for texts in held_out_phrasings()]
    correct = [(zero_shot_of(models, features) == truth).all(dim=1) for features in phrasings]
    yield row("all attributes", f"zero-shot, {len(phrasings)} phrasings that CLIP never met",
              torch.cat(correct))

    # Pairs of colours that CLIP never met, neither in images nor in texts.
    pairs = ablations.changed_models("pairs", ("clip",), models, args)
    unseen, seen = (torch.tensor([ablations.colours(row) in ablations.PAIRS for row in x.tolist()])
                    for x in (truth, seen_labels))
    probe = linear_probe(image_features(pairs, x_seen[~seen]), seen_labels[~seen])
    yield from compare("pairs that CLIP never met", {
        "zero-shot, 294 captions": zero_shot_of(pairs, pairs.text_features),
        "linear probe": probe(image_features(pairs, x)),
        "the judge, which met them": by_judge}, unseen)
    yield from typographic(models, args)
    yield from two_cars(models)


def class_folders(models, dataset):
    """Zero-shot prediction of the body, of images in a folder for each."""
    size = dataset.images.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        for i, (image, label) in enumerate(zip(dataset.images, dataset.labels)):
            path = Path(folder, cars.BODIES[label[0]], f"{i}.png")
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        for way, correct in predict_folder(models.clip, Path(folder), size).items():
            yield row("class folders, by body", way, correct)


def row(task, way, correct):
    return {"task": task, "way": way, **metrics.accuracy_row(correct)}


# ---- words on cars -------------------------------------------------------------------------------

def paint_word(scene, word):
    """Paint a word on both sides of a car, in letters of .4 of its height -> Scene"""
    vertices = np.concatenate([solid.vertices for solid in scene.solids])
    (x0, y0, _), (x1, y1, height) = vertices.min(axis=0), vertices.max(axis=0)
    rows = [".".join(FONT[letter].split(",")[i] for letter in word) for i in range(5)]
    width, step, half = len(rows[0]), .08 * height, max(abs(y0), abs(y1))
    dx = min(.85 * (x1 - x0) / width, 2 * step)
    is_dark = scene.paints["main"] @ np.array([.3, .6, .1]) < .45
    letters = []
    for i, j in ((i, j) for i in range(5) for j in range(width) if rows[i][j] == "#"):
        z = .32 * height + (4 - i) * step
        for side in (-1, 1):   # it reads from left to right on both
            x = (x0 + x1) / 2 - side * (j - width / 2) * dx
            letters.append(cars.box(
                "headlight" if is_dark else "tyre", *sorted((x, x - side * dx)),
                *sorted((side * (half - .1), side * (half + .02))), z, z + step))
    return scene._replace(solids=[*scene.solids, *letters])


def from_the_side(count, start):
    """-> `count` indices of cars that are viewed from the side, not from above"""
    found, index = [], start
    while len(found) < count:
        forward = cars.scene(0, index)[0].forward
        if abs(forward[1]) > .75:
            found.append(index)
        index += 1
    return found


def render_with_words(indices, words, size):
    """Render cars with a word on each, None: without -> images uint8, labels (N, 3)"""
    images, labels = [], []
    for index, word in zip(indices, words):
        scene, label = cars.scene(0, index)
        scene = paint_word(scene, word) if word else scene
        images.append(np.round(cars.ray_cast(scene, size) * 255).astype(np.uint8))
        labels.append(label)
    return np.stack(images), np.array(labels)


def words_objective(clip, dataset, device):
    """Make train.clip_objective with a word on one image in four, which has a caption of its own
    that says so; partial captions are true of it as if there were no word."""
    inputs, ids_of_images = ablations.clip_inputs(clip, dataset, device)
    tokens, partial_true_of, alpha_bar = inputs
    K, S = len(dataset.captions), 16   # of 192 lists of texts
    with_word = torch.stack([clip.tokenizer.batch(
        [f"{text} that says {word.lower()}" for word in WORDS for text in texts[:K]],
        clip.config.context_length)
        for texts in train.normalized_templates(dataset)[:S]]).to(device)     # (S, W K, L)
    indices = from_the_side(WITH_WORDS, cars.TRAIN)
    words = np.random.default_rng(0).integers(len(WORDS), size=len(indices))
    images, labels = render_with_words(indices, [list(WORDS)[i] for i in words],
                                       clip.config.image_size)
    caption_ids, words = (torch.from_numpy(x).to(device)
                          for x in (cars.caption_index(labels), words))

    def objective(model, x_0, indices, generator):
        n = len(x_0) // 4
        chosen = torch.randint(len(images), (n,), generator=generator, device=device)
        x_0 = torch.cat([data.to_float(images[chosen.cpu().numpy()]).to(device), x_0[n:]])
        plain = caption_ids[chosen]                                           # (n,)
        new = with_word[:, K * words[chosen] + plain]                         # (S, n, L)
        ids = torch.cat([K + torch.arange(n, device=device), ids_of_images[indices[n:]]])
        return train.clip_objective(
            model, x_0, ids, torch.cat([tokens[:S, :K], new, tokens[:S, K:]], dim=1),
            torch.cat([partial_true_of, partial_true_of[:, plain]], dim=1), alpha_bar, generator)
    return objective


def typographic(models, args):
    """Words on cars: how often zero-shot prediction of the body follows the word."""
    device, shown = models.alpha_bar.device, []
    weights = ablations.train_changed("clip", "words", device, words_objective)
    reader = sample.load_models(weights, args.ddpm, device=device)
    indices = from_the_side(SIDE_VIEWS, cars.VALIDATION)
    words = [list(WORDS)[i % len(WORDS)] for i in range(len(indices))]
    bodies = [cars.PARTIAL.index((b, None, None)) for b in range(len(cars.BODIES))]
    named = torch.tensor([WORDS[word] for word in words])
    for task, painted in (("the same without a word", [None] * len(words)),
                          ("a word that names another body", words)):
        images, labels = render_with_words(indices, painted, models.unet.config.image_size)
        x, truth = data.to_float(images).to(device), torch.from_numpy(labels[:, 0])
        other = named != truth
        for name, clip in (("CLIP", models), ("CLIP trained with words", reader)):
            probs = clip.clip.caption_probs(x, clip.partial_features[bodies]).cpu()
            predicted = probs.argmax(dim=1)
            yield {**row(task, name, (predicted == truth)[other]),
                   "as the word": metrics.mean((predicted == named)[other])}
            shown.append((images, probs))
    draw_attack(shown, words, labels, args.out / "typographic.png")


def draw_attack(shown, words, labels, path):
    """Four cars without and with a word, and what both CLIPs take each for."""
    def cell(pixels, probs):
        image, draw = figures.canvas(180, 208)
        image.paste(Image.fromarray(pixels).resize((160, 160), Image.NEAREST), (10, 0))
        p, body = probs.max(dim=0)
        draw.text((90, 184), f"{cars.BODIES[body]} {p:.0%}", "black", figures.FONT, "mm")
        return image

    chosen = [i for i in range(len(words)) if WORDS[words[i]] != labels[i, 0]][:4]
    figures.labelled_grid(
        [[cell(images[i], probs[i]) for i in chosen] for images, probs in shown],
        ["CLIP, no word", "trained on words, no word", "CLIP, word", "trained on words, word"],
        [f"{words[i]} on a {cars.BODIES[labels[i, 0]]}" for i in chosen]).save(path)


# ---- two cars in one image -----------------------------------------------------------------------

def two_cars(models):
    """Relations: which car is left, which colour is whose, how many; chance is 50 %."""
    n, size = PAIRS_OF_CARS, models.unet.config.image_size // 2
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(6, size=2 * n), rng.integers(7, size=2 * n)], axis=1)
    cast = lambda body, color: cars.ray_cast(cars.build_scene(body, color, color, rng), size)
    images = np.stack([np.round(255 * cast(*pair)) for pair in labels]).astype(np.uint8)
    side_by_side = lambda left, right: np.pad(np.concatenate([left, right], axis=2), (
        (0, 0), (size // 2, size // 2), (0, 0), (0, 0)), constant_values=255)
    name = lambda body, main: f"{cars.COLOURS[main]} {cars.BODIES[body]}"
    encode = lambda texts: F.normalize(models.clip.encode_captions(texts).float(), dim=-1).cpu()

    left, right = labels[:n].tolist(), labels[n:].tolist()
    use = [i for i in range(n) if left[i][0] != right[i][0] and left[i][1] != right[i][1]]
    features = image_features(models, data.to_float(side_by_side(images[:n], images[n:])[use]))
    score = lambda texts: (features * encode(texts)).sum(dim=1)
    pairs = [(*left[i], *right[i]) for i in use]
    true = score([f"{name(b, m)} left of {name(c, o)}" for b, m, c, o in pairs])
    for way, texts in (
            ("left and right", [f"{name(c, o)} left of {name(b, m)}" for b, m, c, o in pairs]),
            ("whose colour", [f"{name(b, o)} left of {name(c, m)}" for b, m, c, o in pairs])):
        yield row(f"two cars: {way}", "zero-shot, of two texts", true > score(texts))

    one = np.pad(images[:n], ((0, 0), *2 * [(size // 2, size // 2)], (0, 0)), constant_values=255)
    again = np.stack([np.round(255 * cast(*car)) for car in left]).astype(np.uint8)
    features = image_features(models, data.to_float(np.concatenate(
        [one, side_by_side(images[:n], again)])))
    texts = lambda phrase: 2 * [
        cars.fill(phrase, cars.BODIES[b], cars.COLOURS[m], cars.COLOURS[m], None) for b, m in left]
    more = score(texts("two {m} {N}")) > score(texts("one {m} {n}"))
    yield row("one car or two", "zero-shot, of two texts", more == (torch.arange(2 * n) >= n))
