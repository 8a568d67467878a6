"""Trained models: found, loaded, checked, and put together for the commands."""
from pathlib import Path
from typing import NamedTuple

import torch

import data
import guide
import judge
import tinyclip
import tinyddpm

SHIPPED = Path(__file__).resolve().parent / "weights"   # trained models, they come with the source
BUILD = {"clip": tinyclip.from_checkpoint, "ddpm": tinyddpm.from_checkpoint,
         "judge": judge.from_checkpoint}   # content of a file -> model

# What weights.pt of each kind holds, beside "kind", "config", "weights" and "data".
HOLDS = {"clip": ("schedule", "captions", "spellings", "counts", "merges"),
         "ddpm": ("schedule", "captions", "counts"),
         "judge": ("attributes", "captions", "caption_labels")}


def load_model(path, kind):
    """The weights.pt of a "clip", "ddpm" or "judge" -> (model, content), the model in eval mode and
    without gradients for its parameters.

    UserError if there is no such file, or not every name and shape matches.
    """
    content = data.load_checkpoint(path, kind)
    missing = [key for key in ("config", "weights", "data", *HOLDS[kind]) if key not in content]
    if missing:
        raise data.UserError(f"{path} holds no {missing[0]!r}, it is of another version; train one "
                             f"with: python train.py {kind} --fresh")
    try:
        return BUILD[kind](content).eval().requires_grad_(False), content
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]   # torch: headline, then details
        raise data.UserError(f"{path} does not fit its own config: {lines[-1].strip()}") from None


def find_weights(clip=None, ddpm=None):
    """-> the two models' paths: as given, else those trained in runs/, else the shipped ones.

    Of runs/ it is both or none: a CLIP and a DDPM are only of use to each other if trained alike.
    """
    trained = [Path("runs") / kind / "weights.pt" for kind in ("clip", "ddpm")]
    shipped = [SHIPPED / f"{kind}.pt" for kind in ("clip", "ddpm")]
    usual = trained if all(path.exists() for path in trained) else shipped
    return Path(clip or usual[0]), Path(ddpm or usual[1])


def load_judge(name, path, device="cpu", which="judge"):
    """A judge for a data set, or for any if name is None: that of the path, if one is given, else
    one trained in runs/, else one that is shipped. which: "judge", or "judge-2" for the second.

    -> (model, content) as load_model does; (None, None) if there is none.
    """
    usual = [Path("runs") / which / "weights.pt", SHIPPED / f"{which}.pt"]
    for candidate in [path] if path else usual:
        if not path and not candidate.exists():
            continue
        found = data.load_checkpoint(candidate, "judge").get("data")
        if name in (None, found):
            grader, content = load_model(candidate, "judge")
            return grader.to(device), content
        if path:
            raise data.UserError(f"--judge {path} knows {found}, but these models {name}")
    return None, None


def check_fit(clip, ddpm):
    """The contents of two checkpoints; UserError where they differ in what they must share.

    Guidance is meaningless if CLIP knows other pictures or other noise than the DDPM.
    """
    shared = [(key, clip[key], ddpm[key]) for key in ("data", "schedule")]
    shared += [(key, clip["config"][key], ddpm["config"][key]) for key in ("image_size", "T")]
    for key, a, b in shared:
        if a != b:
            raise data.UserError(f"these CLIP and DDPM do not fit together: {key} is {a} for CLIP "
                                 f"and {b} for the DDPM; train both alike")
    a, b = set(clip["captions"]), set(ddpm["captions"])
    told = ddpm["config"].get("text")   # which is by number
    if clip["captions"] != ddpm["captions"] if told else not (a <= b or b <= a):
        raise data.UserError("these CLIP and DDPM do not fit together: they know other captions; "
                             "train both alike")


def check_told(unet):
    """UserError if a U-Net cannot be told captions, as classifier-free guidance has to."""
    if not unet.config.text:
        raise data.UserError("this DDPM is told no captions; train one with: python train.py ddpm "
                             "--text --fresh")


class Models(NamedTuple):
    """A CLIP and a diffusion model that fit together, and what else it takes to guide."""
    clip: torch.nn.Module
    unet: torch.nn.Module
    alpha_bar: torch.Tensor       # (T + 1,)
    captions: list                # K, that CLIP was trained on
    spellings: list               # S lists of K texts, the ways in which it read them
    text_features: torch.Tensor   # (K, E), of the captions
    log_prior: torch.Tensor       # (K,), see guide.contrastive
    data: str                     # the name of the data set
    where: str                    # the models' files and the device, to be printed


def load_pair(clip=None, ddpm=None, device="cpu"):
    """The two models that find_weights finds, on the device -> Models.

    UserError if they do not fit together.
    """
    clip_path, ddpm_path = find_weights(clip, ddpm)
    clip, clip_content = load_model(clip_path, "clip")
    unet, ddpm_content = load_model(ddpm_path, "ddpm")
    check_fit(clip_content, ddpm_content)
    clip, unet = (m.to(device, memory_format=torch.channels_last) for m in (clip, unet))
    captions, counts = clip_content["captions"], clip_content["counts"]
    # Of a caption that the DDPM never met, no ratio is known: say, as often as in CLIP's training.
    met = dict(zip(ddpm_content["captions"], ddpm_content["counts"]))
    share = sum(met.values()) / sum(n for text, n in zip(captions, counts) if text in met)
    ddpm_counts = [met.get(caption, count * share) for caption, count in zip(captions, counts)]
    return Models(clip, unet, tinyddpm.cosine_alpha_bar(unet.config.T).to(device), captions,
                  clip_content["spellings"], clip.encode_captions(captions),
                  guide.prior_ratio(ddpm_counts, counts).to(device), clip_content["data"],
                  f"CLIP from {clip_path}, DDPM from {ddpm_path}, on {device}")


def with_prompt(models, prompt):
    """The same models, with one caption more. Of a new caption no prior is known."""
    features = models.clip.encode_captions([prompt])
    return models._replace(captions=[*models.captions, prompt],
                           text_features=torch.cat([models.text_features, features]),
                           log_prior=torch.cat([models.log_prior, models.log_prior.new_zeros(1)]))
