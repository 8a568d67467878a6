"""A second judge, of another architecture and trained on other images; the accuracy of both.

If guidance produced adversarial examples of the first judge, the second would disagree with it.
"""
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import cars
import data
import sample
import train
from experiments import metrics
from infra import checkpoint, cli
from judge import Judge, predict

JUDGE_TEST = 5000               # images on which the judges are tested
FOLDER = Path("runs/judge-2")   # of the second judge's training


class PlainNet(Judge):
    """Large convolutions without skip connections (after Simonyan & Zisserman 2015)."""

    def __init__(self, config, attributes):
        super().__init__(config, attributes)
        w, layers = config.width, []
        for c_in, c_out, kernel in (3, w, 5), (w, 2 * w, 5), (2 * w, 4 * w, 5), (4 * w, 4 * w, 3):
            layers += [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2),
                       nn.GroupNorm(max(1, c_out // 16), c_out), nn.ReLU(), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*layers[:-1], nn.AdaptiveMaxPool2d(2))    # (B, 4w, 2, 2)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(16 * w, values) for name, values in attributes.items()})


def load_second_judge(data_name, device="cpu"):
    """-> PlainNet for this data set, trained here or shipped; None if there is none."""
    for path in (FOLDER / "weights.pt", Path(data.__file__).parent / "weights/judge-2.pt"):
        if path.exists() and checkpoint.load(path, "judge")["data"] == data_name:
            return checkpoint.load_model(path, PlainNet, "judge")[0].to(device)


def load_judges(models, args):
    """-> the judge, its checkpoint, the second judge or None; UserError if there is no judge."""
    device = models.alpha_bar.device
    judge, content = sample.load_judge(models.captions, args.judge, device)
    if judge is None or not set(models.captions) <= set(content["captions"]):
        raise cli.UserError(f"there is no judge for {models.data}; for cars and for class folders "
                            f"train one with: python train.py judge --data {models.data}")
    return judge, content, load_second_judge(models.data, device)


def train_second_judge(arguments=None):
    """Train the second judge, in about the time of `python train.py judge`."""
    parser = cli.Parser("experiments second_judge", description=train_second_judge.__doc__)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)
    device, (make_task, config, options) = cli.pick_device(args.device), train.TASKS["judge"]
    dataset = data.load("cars", config.image_size, options.images, "judge-2")
    validation = data.load("cars", config.image_size, JUDGE_TEST, "judge-test")
    torch.manual_seed(1)   # for the initial weights
    network = PlainNet(config, {name: len(values) for name, values in cars.ATTRIBUTES.items()})
    task = make_task(config, options, dataset, validation, device)
    train.train(task._replace(model=network), options, dataset, FOLDER, seed=1, device=device)


def judges(models, args):
    """Accuracy of both judges on held-out images; for cars, also by the height of the camera."""
    judge, _, second = load_judges(models, args)
    dataset = data.load(models.data, judge.config.image_size, JUDGE_TEST, "judge-test")
    x = data.to_float(dataset.images[:]).to(models.alpha_bar.device)
    predicted, other = predict(judge, x).cpu(), predict(second or judge, x).cpu()   # (N, A)
    labels, groups = torch.from_numpy(dataset.labels), {"all": torch.ones(len(x), dtype=bool)}
    if models.data == "cars":
        scenes = (cars.scene(0, data.SPLITS["judge-test"] + i)[0] for i in range(len(x)))
        degrees = torch.tensor([math.degrees(math.asin(-scene.forward[2])) for scene in scenes])
        groups |= {f"camera at {low} to {high} degrees": (degrees >= low) & (degrees < high)
                   for low, high in pairwise((0, 15, 30, 45, 60, 90))}
    for name, group in groups.items():
        if group.any():
            yield {"images": name, **metrics.accuracy_row((predicted == labels)[group].all(1)),
                   "second_judge": metrics.mean((other == labels)[group].all(1)),
                   "different": metrics.mean((other != predicted)[group].any(1))}
