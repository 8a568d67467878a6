"""What makes pictures disobey, and can what was never seen be drawn? Two tables of evaluate.py that
need trainings of their own.

They look for these in runs/suspects/, by the flags they were trained with, and where one is missing
they print the command that trains it and go on with the next row.

models: checkpoints.Models, what works, args: what the command line says. What works should be
trained as these are, by the presets (--clip, --ddpm), or a row would change two things.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import cars
import checkpoints
import data
import guide
import judge
import measure
import variants


def trained(kind, flags):
    """Where the weights of `python train.py KIND FLAGS` are -> path, None if they are not there."""
    name = "-".join([kind, *flags.replace("--", "").replace("+", "-").replace(",", "-").split()])
    folder = Path("runs/suspects") / name
    if (folder / "weights.pt").exists():
        return folder / "weights.pt"
    print(f"first: python train.py {kind} {flags} --out {folder}")
    return None


def others(models, args, clip="", ddpm="", prior=True):
    """Models in which the CLIP or the diffusion model is another one, trained with these flags.

    -> checkpoints.Models, None if they are not trained.
    """
    needed = {"clip": clip, "ddpm": ddpm}
    paths = {kind: trained(kind, flags) for kind, flags in needed.items() if flags}
    if None in paths.values():
        return None
    if clip == LARGER:
        return enlarged(models, paths["clip"])
    changed = measure.altered(args, **paths, no_prior=args.no_prior or not prior)
    return measure.load_models(changed, models.alpha_bar.device)


LARGER = "--image-size 64 --patch 8"   # a CLIP for larger pictures than the diffusion model draws


def enlarged(models, path):
    """The same models, but for this CLIP of larger pictures -> checkpoints.Models"""
    clip, content = checkpoints.load_model(path, "clip")
    enlarging = Enlarging(clip.to(models.alpha_bar.device))
    return models._replace(clip=enlarging, text_features=clip.encode_captions(content["captions"]))


class Enlarging(nn.Module):
    """A CLIP that enlarges the pictures that it is given, as photographs are.

    Noise that is enlarged is no longer the noise that it was trained on.
    """

    def __init__(self, clip):
        super().__init__()
        self.clip, self.config = clip, clip.config
        self.logits, self.logit_scale = clip.logits, clip.logit_scale

    def encode_image(self, x, t=None):
        size = self.config.image_size
        return self.clip.encode_image(F.interpolate(x, (size, size), mode="bicubic"), t)


# ---- the three suspects --------------------------------------------------------------------------

class Suspect(NamedTuple):
    """One thing that differs from what works."""
    what: str
    clip: str = ""               # flags of `python train.py clip`; none: the CLIP that works
    ddpm: str = ""               # likewise
    method: str = guide.DEFAULT
    prior: bool = True           # whether guidance knows what CLIP and the DDPM have met how often


SUSPECTS = [
    Suspect("nothing"),
    Suspect("CLIP trained a tenth as long", clip="--steps 150"),
    Suspect("diffusion model trained a tenth as long", ddpm="--steps 450"),
    Suspect("captions dealt out at random", clip="--shuffle"),
    Suspect("CLIP met each car as often as in ShapeNet", clip="--labels shapenet"),
    Suspect("CLIP did, without the prior", clip="--labels shapenet", prior=False),
    Suspect("the diffusion model did", ddpm="--labels shapenet"),
    Suspect("the diffusion model did, without the prior", ddpm="--labels shapenet", prior=False),
    Suspect("both did", clip="--labels shapenet", ddpm="--labels shapenet"),
    Suspect("CLIP is for 64 pixels", clip=LARGER),
    Suspect("CLIP has met clean pictures alone", clip="--clean 1"),
    Suspect("that CLIP, told that x_t is clean", clip="--clean 1", method="clean"),
    Suspect("that CLIP, looking at x_0_hat", clip="--clean 1", method="x0-fast"),
    Suspect("the original recipe", clip="--clean 1", method="original")]


def check(models):
    """UserError if the models that work do not know all of the car world."""
    if models.captions != cars.CAPTIONS:
        raise data.UserError("this table is about the car world and models of all its captions")


def suspects_table(models, args):
    """Joint accuracy on all captions of two colours, one sample each, with one thing changed."""
    check(models)
    two = [i for i, caption in enumerate(models.captions) if " and " in caption]
    targets = torch.tensor(two, device=models.alpha_bar.device)
    court = measure.convene(models, targets, args)
    for suspect in SUSPECTS:
        these = others(models, args, suspect.clip, suspect.ddpm, suspect.prior)
        if these is None:
            continue
        if suspect.method == "original":
            how = measure.recipe_of(("original",), lambda targets: variants.dot_product(
                these, targets), these, args, like="clean", scale=0.1)
        else:
            how = measure.recipe(suspect.method, None, these, args)
        drawing = measure.drawn(how, targets, these, args)
        yield {"changed": suspect.what,
               **measure.score(drawing.pictures, targets, these, court)}


# ---- composition: pairs of colours that were never seen ------------------------------------------

UNSEEN = "white+red,blue+yellow,green+black"


def composition_table(models, args):
    """How captions of pairs of colours that CLIP, the diffusion model, both or neither have never
    seen are obeyed, and captions of other pairs; by the caption as a whole, and by its attributes.
    """
    check(models)
    groups = unseen_and_seen(args.each)
    for clip in ("", f"--hold-out {UNSEEN}"):
        for ddpm in ("", f"--hold-out {UNSEEN}"):
            these = others(models, args, clip, ddpm)
            if these is None:
                continue
            these = checkpoints.with_captions(these, models.captions)
            held_out = " and ".join(["CLIP"] * bool(clip) + ["the diffusion model"] * bool(ddpm))
            factored = measure.recipe_of(("factored",), lambda targets: variants.factored(
                these, targets), these, args)
            for name, indices in groups.items():
                indices = indices.to(models.alpha_bar.device)
                court = measure.convene(these, indices % len(models.captions), args)
                for how in (measure.recipe(guide.DEFAULT, None, these, args), factored):
                    yield {"held out of": held_out or "neither", "pairs": name,
                           "guidance": how.name[0], **obedience(how, indices, these, court, args)}


def unseen_and_seen(each):
    """-> {"unseen": each picture's index (N,), "seen": as many}; index i is of caption i % K.

    Unseen are `each` pictures of all captions of the pairs that are held out. The seen ones are
    drawn from all other captions of two colours, in random order, none twice before all are there.
    """
    pairs = [set(pair.split("+")) for pair in UNSEEN.split(",")]
    words = [set(caption.replace(" and ", " ").split()) for caption in cars.CAPTIONS]
    two = [i for i, caption in enumerate(cars.CAPTIONS) if " and " in caption]
    unseen = [i for i in two if any(pair <= words[i] for pair in pairs)]
    seen = np.random.default_rng(0).permutation([i for i in two if i not in unseen])
    N = each * len(unseen)
    K = len(cars.CAPTIONS)
    nth = lambda captions: np.resize(captions, N) + K * (np.arange(N) // len(captions))
    return {"unseen": torch.tensor(nth(unseen)), "seen": torch.tensor(nth(seen))}


def obedience(how, indices, models, court, args):
    """What measure.score says of the pictures with these indices, drawn by a Recipe, and how many
    have the right colours the wrong way round."""
    targets = indices % len(models.captions)
    drawing = measure.drawn(how, indices, models, args)
    saw = judge.verdict(court.judge, data.to_float(drawing.pictures).to(indices.device)).cpu()
    swapped = (saw == measure.promised(targets, models, court)[:, [0, 2, 1]]).all(1)
    return {**measure.score(drawing.pictures, targets, models, court),
            "swapped": swapped.float().mean().item()}
