"""Trained models: found, loaded, checked, and put together for the commands."""
from pathlib import Path
from typing import NamedTuple

import torch

import bpe
import data
import guide
import judge
import tinyclip
import tinyddpm
from unet import UNet, UNetConfig

SHIPPED = Path(__file__).resolve().parent / "weights"   # trained models, they come with the source
BUILD = {   # what a file holds -> the model, with random weights
    "clip": lambda content: tinyclip.CLIP(tinyclip.CLIPConfig(**content["config"]),
                                          bpe.Tokenizer(content["merges"])),
    "ddpm": lambda content: UNet(UNetConfig(**content["config"]), len(content["captions"])),
    "judge": lambda content: judge.Judge(judge.JudgeConfig(**content["config"]), {
        name: len(values) for name, values in content["attributes"].items()})}

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
        model = BUILD[kind](content)
        model.load_state_dict({name: p.float() for name, p in content["weights"].items()})
        return model.eval().requires_grad_(False), content
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
    """A judge for a data set: that of the path, if one is given, else one trained in runs/, else
    one that is shipped. which: "judge", or "judge-2" for the second.

    -> (model, content) as load_model does; (None, None) if there is none.
    """
    usual = [Path("runs") / which / "weights.pt", SHIPPED / f"{which}.pt"]
    for candidate in [path] if path else usual:
        if not path and not candidate.exists():
            continue
        found = data.load_checkpoint(candidate, "judge").get("data")
        if name == found:
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
    fit = a <= b or b <= a
    if ddpm["config"].get("text"):   # it is told captions by number
        fit = clip["captions"] == ddpm["captions"]
    if not fit:
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
    # Of a caption that the DDPM does not list, no ratio is known: say, as often as in CLIP's
    # training. One that it lists with a count of 0 is improbable, see prior_ratio.
    listed = dict(zip(ddpm_content["captions"], ddpm_content["counts"]))
    share = sum(listed.values()) / sum(n for text, n in zip(captions, counts) if text in listed)
    ddpm_counts = [listed.get(caption, count * share) for caption, count in zip(captions, counts)]
    return Models(clip, unet, tinyddpm.cosine_alpha_bar(unet.config.T).to(device), captions,
                  clip_content["spellings"], clip.encode_captions(captions),
                  guide.prior_ratio(ddpm_counts, counts).to(device), clip_content["data"],
                  f"CLIP from {clip_path}, DDPM from {ddpm_path}, on {device}")


def find_caption(prompt, models):
    """-> the index of the caption that is meant, whatever its spelling; None if there is none."""
    spelt = {bpe.canonical(text): i for texts in models.spellings for i, text in enumerate(texts)}
    return spelt.get(bpe.canonical(prompt))


def with_captions(models, captions):
    """The same models, with these captions in this order; of those that are new to CLIP, no prior
    is known."""
    if models.captions == captions:
        return models
    known = dict(zip(models.captions, models.log_prior.tolist()))
    log_prior = torch.tensor([known.get(caption, 0.) for caption in captions])
    return models._replace(captions=captions, log_prior=log_prior.to(models.alpha_bar.device),
                           text_features=models.clip.encode_captions(captions))


# ---- what CLIP thinks ----------------------------------------------------------------------------

def encode_images(clip, x, t):
    """x: (N, 3, H, W), t: (N,) -> (N, E), a part at a time to save memory."""
    return torch.cat([clip.encode_image(*part) for part in zip(x.split(250), t.split(250))])


def clip_logits(clip, image_features, text_features, t):
    """CLIP.logits in full precision, because near-ties count -> (N, K)"""
    with torch.autocast(text_features.device.type, enabled=False):
        return clip.logits(image_features.float(), text_features.float(), t)


def beliefs(models, x, t=None):
    """How probable the captions are in the opinion of the CLIP that guides -> (N, K)

    x: (N, 3, H, W), noised up to t, (N,) int; None: clean pictures.
    """
    t = torch.zeros(len(x), dtype=torch.long, device=x.device) if t is None else t
    logits = clip_logits(models.clip, encode_images(models.clip, x, t), models.text_features, t)
    return (logits + models.log_prior).softmax(dim=1)
