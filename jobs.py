"""What each of the three models learns: its loss on one batch, and a look at how far it is.

A job puts the chapters together, data, CLIP, diffusion model and judge, for the loop in train.py.
Every one draws its times and noise from the generator that it is given and from nothing else, so
that a step of training is a function of (seed, step). It draws them for the whole batch and picks
out its `own`, those of the pictures that this process deals with (parallel.py).

config: the model's dataclass, options: train.TrainConfig, dataset, validation: data.Dataset.
"""
import math
from typing import Callable, NamedTuple

import numpy as np
import torch

import bpe
import data
import judge
import parallel
import plot
import tinyclip
import tinyddpm
from parallel import in_pieces, own
from unet import UNet


class Job(NamedTuple):
    """What the loop has to know about one kind of model."""
    kind: str
    model: torch.nn.Module
    loss: Callable       # (model, own x_0, rows of the whole batch, generator) -> scalar
    preview: Callable    # (averaged model, folder) -> a line to print; may draw into the folder
    content: dict        # what weights.pt holds of this kind, beside what it always holds
    note: str            # printed before the first step: what to compare the loss with


def clip_job(config, options, dataset, validation, device):
    """Which of all captions belongs to this noised picture?"""
    if len(dataset.captions) < 2:
        raise data.UserError(f"all pictures have the caption {dataset.captions[0]!r}; CLIP learns "
                             "from differences")
    alpha_bar = tinyddpm.cosine_alpha_bar(config.T).to(device)
    caption_of = torch.from_numpy(dataset.caption_of).to(device)
    tokenizer = bpe.Tokenizer.train(sum(dataset.spellings, []), vocab_size=4096)
    tokens = torch.stack([tokenizer.batch(texts, config.context_length)
                          for texts in dataset.spellings]).to(device)   # (S, K, L)
    (S, K, _), B = tokens.shape, options.batch

    def loss(model, x_0, rows, generator):
        t = tinyddpm.random_times(B, config.T, generator)
        shuffled = torch.randperm(B, generator=generator, device=device)
        t[shuffled[:round(options.clean * B)]] = 0
        eps = torch.randn(B, *x_0.shape[1:], generator=generator, device=device)
        chosen, weight = some_captions(K, caption_of[rows], options.most_captions, generator)
        spelling = torch.randint(S, chosen.shape, generator=generator, device=device)
        x_t = tinyddpm.q_sample(x_0, own(t), own(eps), alpha_bar)
        image_features = in_pieces(model.encode_image, options.accumulate, x_t, own(t))
        image_features = parallel.whole(image_features)                          # (B, E)
        text_features = model.encode_text(tokens[spelling, chosen])              # (chosen, E)
        logits = model.logits(image_features, text_features, t) + weight.log()   # (B, chosen)
        place = torch.searchsorted(chosen, caption_of[rows])   # of its own caption, in chosen
        return tinyclip.clip_loss(logits, place, t == 0)

    def preview(model, folder):
        accuracy = accuracy_through_noise(model, tokens[0], validation, alpha_bar, options)
        curve = list(accuracy), list(accuracy.values())
        plot.lines(folder / "accuracy.png", {"top-1": curve}, "t",
                   f"accuracy among {K} captions")
        some = [f"{accuracy[t]:.1%} at t = {t}" for t in (0, 300, 500, 700) if t in accuracy]
        return "top-1 on held-out pictures: " + ", ".join(some)

    content = {**captions_of(dataset), "spellings": dataset.spellings, "merges": tokenizer.merges}
    chance = math.log(K) + tinyclip.TEXT_TO_IMAGE * math.log(max(1, round(options.clean * B)))
    note = f"chance is a loss of {chance:.2f}: ln({K}), and a little for the text-to-image term"
    return Job("clip", tinyclip.CLIP(config, tokenizer), loss, preview, content, note)


def captions_of(dataset):
    """What a checkpoint holds of the captions: all of them, and how often each one occurs."""
    counts = np.bincount(dataset.caption_of, minlength=len(dataset.captions))
    return {"captions": dataset.captions, "counts": counts.tolist()}


def some_captions(K, needed, most, generator):
    """The captions that one step compares its pictures with -> ascending indices, and for how
    many captions each one stands.

    All K of them, or the needed ones, the batch's own, and random others until there are `most`, if
    there is room for any. The others stand for all that were left out too, so that the sum over all
    exp(logits) is right on average.
    """
    if K <= most:
        return torch.arange(K, device=needed.device), torch.ones(K, device=needed.device)
    luck = torch.rand(K, generator=generator, device=needed.device)
    luck[needed] = 2.
    needs = int((luck == 2.).sum())
    chosen = luck.topk(max(most, needs)).indices.sort().values
    others = max(1, len(chosen) - needs)
    return chosen, torch.where(luck[chosen] == 2., 1., (K - needs) / others)


def pieces(count, options):
    """-> in how many pieces to look at `count` pictures, lest a preview need more memory than
    training does."""
    return math.ceil(count * parallel.processes() * options.accumulate / options.batch)


def accuracy_through_noise(clip, tokens, validation, alpha_bar, options):
    """-> {t: how often, among 500 held-out pictures, the right caption is the most probable one}.

    Pictures and noise are the same at every t and every time this is called.
    """
    device, T = alpha_bar.device, clip.config.T
    x_0, rows = data.batch(validation, 0, 0, 500, device)
    eps = torch.randn(x_0.shape, generator=data.generator(0, 0, device=device), device=device)
    truth = torch.from_numpy(validation.caption_of[rows]).to(device)
    text_features, accuracy = clip.encode_text(tokens), {}
    for t in [0, *range(100, T, 100)]:
        times = torch.full((len(x_0),), t, device=device)
        x_t = tinyddpm.q_sample(x_0, times, eps, alpha_bar)
        features = in_pieces(clip.encode_image, pieces(len(x_t), options), x_t, times)
        logits = clip.logits(features, text_features, times)
        accuracy[t] = (logits.argmax(1) == truth).float().mean().item()
    return accuracy


def ddpm_job(config, options, dataset, validation, device):
    """What is the clean picture in this noised one?"""
    alpha_bar = tinyddpm.cosine_alpha_bar(config.T).to(device)
    told_as = torch.from_numpy(dataset.caption_of).to(device) + 1   # 0 is "it may be anything"

    def draw(B, generator):
        """Times and noise for B pictures."""
        shape = B, 3, config.image_size, config.image_size
        return (tinyddpm.random_times(B, config.T, generator),
                torch.randn(shape, generator=generator, device=device))

    def loss(model, x_0, rows, generator):
        told = []
        if config.text:
            # One in ten is told nothing, or it could not do without (Ho & Salimans 2022, Alg. 1).
            informed = torch.rand(len(rows), generator=generator, device=device) > 0.1
            told = [own(told_as[rows] * informed)]
        t, eps = map(own, draw(len(rows), generator))
        unet = lambda x_t, t: in_pieces(model, options.accumulate, x_t, t, *told)
        return tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar).mean()

    def preview(model, folder):
        x_0, _ = data.batch(validation, 0, 0, 500, device)
        t, eps = draw(len(x_0), data.generator(0, 0, device=device))
        unet = lambda x_t, t: in_pieces(model, pieces(len(x_t), options), x_t, t)
        held_out = tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar).mean()
        generators = [data.generator(0, i) for i in range(16)]
        x_T = tinyddpm.noise(generators, (3, config.image_size, config.image_size), device)
        denoise = tinyddpm.denoiser(model, alpha_bar)
        samples = tinyddpm.sample(denoise, x_T, generators, alpha_bar, steps=min(50, config.T))
        data.save_grid(folder / "samples.png", data.to_uint8(samples), zoom=2)
        return f"loss on held-out pictures {held_out:.4f}, {len(samples)} samples in samples.png"

    x_0, _ = data.batch(dataset, 0, 0, 500)
    a = alpha_bar[1:].mean().item()   # E[v^2] = E[a] + E[1 - a] E[x_0^2]
    silent = a + (1 - a) * x_0.square().mean().item()
    note = f"a network that says v = 0 has a loss of {silent:.2f}"
    net = UNet(config, len(dataset.captions))
    return Job("ddpm", net, loss, preview, captions_of(dataset), note)


def judge_job(config, options, dataset, validation, device):
    """What are body, main and second colour of this clean picture? Or what class is it?"""
    if not dataset.attributes:
        raise data.UserError("a judge learns the car world or class folders; other captions name "
                             "no attributes that it could tell")
    labels = torch.from_numpy(dataset.labels).to(device)
    sizes = {name: len(values) for name, values in dataset.attributes.items()}

    def loss(model, x_0, rows, generator):
        piece_loss = lambda *piece: judge.judge_loss(model, *piece)[None]
        return in_pieces(piece_loss, options.accumulate, x_0, own(labels[rows])).mean()

    def preview(model, folder):
        every = np.arange(len(validation.pictures))
        verdicts = [judge.verdict(model, data.to_float(validation.pictures[rows]).to(device)).cpu()
                    for rows in np.array_split(every, pieces(len(every), options))]
        right = torch.cat(verdicts) == torch.from_numpy(validation.labels)   # (N, A)
        parts = [f"{name} {share:.2%}" for name, share in zip(sizes, right.float().mean(0))]
        joint = right.all(1).float().mean()
        return f"on {len(right)} held-out pictures: joint {joint:.2%}, {', '.join(parts)}"

    note = f"chance is a loss of {sum(math.log(n) for n in sizes.values()):.2f}"
    content = {"attributes": dataset.attributes, "captions": dataset.captions,
               "caption_labels": dataset.caption_labels.tolist()}   # what each caption promises
    return Job("judge", judge.Judge(config, sizes), loss, preview, content, note)


JOBS = {"clip": clip_job, "ddpm": ddpm_job, "judge": judge_job}
