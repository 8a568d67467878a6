"""python train.py clip | ddpm | decoder | prior | upsampler | judge: train one model.

    python train.py clip                    a CLIP for 32 x 32 pixels, in minutes on two CPU cores
    python train.py ddpm --minutes 10       stop cleanly after ten minutes (so does Ctrl-C)
    python train.py ddpm                    the same run again: it resumes where it stopped
    python train.py ddpm --clip FILE        conditional, for classifier-free guidance
    python train.py decoder --clip FILE     of unCLIP, and so: prior --clip FILE
    python train.py upsampler --ddpm FILE   from 32 to 128 pixels; FILE: a DDPM or decoder
    torchrun --nproc_per_node 2 train.py ddpm       data-parallel, on two GPUs
    python train.py ddpm -h                 fields of the config are flags, such as --channels 48
    python train.py clip --data photos --preset photos      photographs in class folders

A run's folder (runs/clip, ...) gets checkpoint.pt, to resume from; weights.pt, what sample.py uses;
loss.png; a ddpm's, decoder's or upsampler's also samples.png. Step n draws its images, timesteps
and noise from (seed, n, rank), so it depends on nothing else but the state of the training before
it. A run that was interrupted, or killed, ends with the same weights, bit for bit, as one that ran
through, on the same machine and with the same number of threads, ranks and micro-batches: each rank
and micro-batch draws timesteps, clean images and texts for its own part of the batch, and compares
images with texts within it.
"""
import argparse
import copy
import dataclasses
import functools
import math
import time
import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import guide
import judge
import tinyclip
import tinyddpm
import unclip
from infra import checkpoint, cli, distributed, muon, plot


@dataclasses.dataclass
class TrainConfig:
    steps: int = 1000            # the length of the whole run; the learning rate reaches zero there
    batch: int = 128             # images per step, over all ranks
    accumulate: int = 1          # micro-batches per step (gradient accumulation): less memory
    lr: float = 1e-3             # the highest learning rate, of both optimizers
    warmup: float = 0.03         # fraction of the run in which the learning rate rises from zero
    weight_decay: float = 0.05   # of Muon's matrices; AdamW's parameters do not decay
    images: int = 50_000         # built-in cars to render; of a folder all images are used
    flips: float = 0.            # probability that an image is mirrored left to right
    shift: int = 0               # pixels by which images are shifted at most, to all sides
    cutout: int = 0              # side of a gray square that hides a part of each image, in pixels
    perturbation: float = 1.     # L2 norm of adversarial perturbations at t = 0; 0: none


# What only some kinds take. Diffusion models would learn to draw the traces of shift and cutout;
# decoder and prior use embeddings that were computed once, of images that are not mirrored.
ONLY_OF = {"shift": ("clip", "judge"), "cutout": ("clip", "judge"), "perturbation": ("clip",),
           "flips": ("clip", "judge", "ddpm", "upsampler")}


def takes(kind, name):
    """Whether a kind of model has this field of TrainConfig as a setting"""
    return kind in ONLY_OF.get(name, (kind,))


# ---- what each model is trained for --------------------------------------------------------------

CLOSED_SET = 1024          # up to so many captions all are encoded in each step
CLEAN_FRACTION = 0.125     # of the images of a micro-batch, shown to CLIP without noise
PERTURBED_FRACTION = 0.5   # of the images, with and without noise, if perturbation is not 0
PARTIAL_PER_STEP = 32      # partial captions ("a bus"), drawn at random for each micro-batch
PARTIAL_WEIGHT = 0.25      # of the loss among these; that among the captions has the weight 1
ENSEMBLE = 8               # templates that weights.pt holds, to average text features


def clip_objective(clip, x_0, caption_ids, tokens, partial_true_of, alpha_bar, generator,
                   clean_fraction=CLEAN_FRACTION, perturbation=TrainConfig.perturbation):
    """Compute the loss of matching noised images with texts -> scalar

    x_0: (B, 3, H, W), caption_ids: (B,) int in 0..K-1, alpha_bar: (T + 1,); tokens: (S, K + P, L),
    S templates of the K captions and of P partial captions; partial_true_of: (P, K) bool, whether
    partial caption p is true of caption k. Each image is compared with N texts: all K captions and
    at most PARTIAL_PER_STEP partial ones, or of many captions those of the images. clean_fraction
    of the images get t = 0, for guidance by x_0_hat and for the text-to-image term of the loss, the
    others a timestep in 1..T. perturbation: `norm` of perturb, for PERTURBED_FRACTION of them; 0 is
    none.
    """
    (B, *_), S, (P, K) = x_0.shape, len(tokens), partial_true_of.shape
    randperm = functools.partial(torch.randperm, generator=generator, device=x_0.device)
    t = tinyddpm.stratified_timesteps(B, generator)
    clean = randperm(B)[:math.ceil(clean_fraction * B)]   # at random: t is ascending
    t[clean] = 0
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x_t = tinyddpm.q_sample(x_0, t, eps, alpha_bar)

    closed = K <= CLOSED_SET   # else the captions of this micro-batch, as in CLIP
    partial = randperm(P)[:PARTIAL_PER_STEP]
    ids = torch.cat([torch.arange(K, device=x_0.device), K + partial]) if closed else caption_ids
    template = torch.randint(S, ids.shape, generator=generator, device=x_0.device)
    text_features = clip.encode_text(tokens[template, ids])                   # (N, E)
    if perturbation:
        moved = randperm(B)[:round(PERTURBED_FRACTION * B)]
        x_t[moved] = perturb(clip, x_t[moved], t[moved], text_features[:K], alpha_bar, perturbation)
    logits = clip.logits(clip.encode_image(x_t, t), text_features, t)         # (B, N)
    if not closed:
        return tinyclip.contrastive_loss(logits, caption_ids)
    # Captions have a softmax of their own: it estimates p(caption | x_t), which guidance needs.
    # Partial captions, several of which are true of an image, have another softmax.
    is_true = F.one_hot(caption_ids, K).bool()                                # (B, K)
    loss = tinyclip.closed_set_loss(logits[:, :K], is_true, clean)
    partial_is_true = partial_true_of[partial][:, caption_ids].T              # (B, N - K)
    return loss + PARTIAL_WEIGHT * tinyclip.closed_set_loss(logits[:, K:], partial_is_true, clean)


def perturb(clip, x_t, t, text_features, alpha_bar, norm):
    """Move images one gradient step away from CLIP's most probable text -> like x_t

    x_t: (B, 3, H, W), t: (B,) int in 0..T, text_features: (K, E), norm > 0
    The step goes along the gradient of -log p(most probable text | x_t). Its L2 norm grows with the
    noise: norm (1 + 3 sqrt(1 - alpha_bar_t)) at 32 x 32 pixels, in proportion to the side.
    differs from the paper: one step, not several of projected gradient descent.

    Why: a network that is robust to such perturbations has perceptually aligned gradients, and
    guides to what people recognise (Kawar et al. 2023, arXiv 2208.08664).
    subtle: with the correct text in place of the most probable one, CLIP could learn to predict the
    text from the perturbation (label leaking: Kurakin et al. 2017, arXiv 1611.01236).
    """
    x = x_t.clone().requires_grad_()
    logits = clip.logits(clip.encode_image(x, t), text_features.detach(), t)              # (B, K)
    loss = F.cross_entropy(logits, logits.argmax(dim=1), reduction="sum")
    grad, = torch.autograd.grad(loss, x)
    side = (x_t.shape[-2] * x_t.shape[-1]) ** 0.5
    sigma = (1 - tinyddpm.extract(alpha_bar, t)).sqrt()                               # (B, 1, 1, 1)
    step = norm * side / 32 * (1 + 3 * sigma)
    return x_t + step * F.normalize(grad.flatten(1), dim=1).view_as(x_t)


def ddpm_objective(unet, x_0, cond, alpha_bar, generator):
    """Compute the loss of denoising; x_0: (B, 3, H, W), cond: (B, cond_dim) or None -> scalar"""
    t = tinyddpm.stratified_timesteps(len(x_0), generator)
    eps = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    return tinyddpm.ddpm_loss(unet, x_0, t, eps, alpha_bar, cond).mean()


def drop_text(cond, generator):
    """Drop one condition in ten, to train unconditionally too (Ho & Salimans 2022)."""
    drop = torch.rand(len(cond), 1, generator=generator, device=cond.device) < 0.1
    return cond.masked_fill(drop, 0.)


def noise_embeddings(z, generator):
    """Make the decoder's condition of image embeddings at a random noise level -> (B, E + 1)

    Three in ten are clean, three have a level from 0 to 1, and four have level 1, which is no
    condition, for classifier-free guidance.
    differs from the paper: four in ten, not one, so that one U-Net might be decoder and DDPM. Its
    unconditional images are not as good as a DDPM's (experiments/LOG.md).
    """
    draw = torch.rand(len(z), 1, generator=generator, device=z.device)
    noise_level = ((draw - 0.3) / 0.3).clamp(0, 1)
    noise = torch.randn(z.shape, generator=generator, device=z.device)
    return unclip.decoder_condition(z, noise_level, noise)


def prior_objective(prior, z, caption_ids, text_features, alpha_bar, generator):
    """Compute the loss of predicting image embeddings from texts -> scalar

    z: (B, E), caption_ids: (B,); text_features: (S, K, E), of S ways to write K captions
    """
    (B, E), S = z.shape, len(text_features)
    t = tinyddpm.stratified_timesteps(B, generator)
    eps = torch.randn(B, E, 1, 1, generator=generator, device=z.device)
    template = torch.randint(S, (B,), generator=generator, device=z.device)
    text = drop_text(text_features[template, caption_ids], generator)         # (B, E)
    return tinyddpm.ddpm_loss(prior, z[:, :, None, None], t, eps, alpha_bar, text).mean()


def upsampler_objective(upsampler, x_0, low, aug_level, generator):
    """Compute the mean absolute error of both doublings -> scalar

    x_0: (B, 3, 4H, 4W), low: (B, 3, H, W), aug_level: (B,): see Upsampler. The second doubling
    gets what the first has made, of which a random part of size H x W, to save time. An absolute
    error, not a squared one: its minimum is a median, which has sharp edges, not a mean.
    """
    H, W = low.shape[-2:]
    middle = upsampler(low, aug_level, second=False)                          # (B, 3, 2H, 2W)
    top, left = (torch.randint(size + 1, (), generator=generator, device=x_0.device).item()
                 for size in (H, W))
    crop = lambda x, k: x[:, :, k * top:k * (top + H), k * left:k * (left + W)]
    high = upsampler(crop(middle, 1), aug_level, second=True)                 # (B, 3, 2H, 2W)
    return F.l1_loss(middle, F.avg_pool2d(x_0, 2)) + F.l1_loss(high, crop(x_0, 2))


class Task(NamedTuple):
    """A model and how it is trained; kind is a key of TASKS."""
    kind: str
    model: torch.nn.Module
    objective: Callable   # (model, x_0, indices of images, generator) -> scalar loss
    preview: Callable     # (averaged model, folder) -> a line to print; may draw into the folder
    content: dict         # what weights.pt holds of this kind, besides what it always holds
    chance: float         # the loss of a model that has learned nothing, about


def normalized_templates(dataset):
    """The texts of a data set, normalised like prompts -> S lists of K + P texts"""
    return [[tinyclip.normalize_prompt(text) for text in texts] for texts in dataset.templates]


def report_truncated_texts(texts, captions, tokenizer, context_length):
    """Print how many texts exceed the context length, and how many captions CLIP cannot tell apart
    """
    lengths = [len(tokenizer.encode(text)) + 2 for text in set(texts)]   # 2: start and end
    if max(lengths) > context_length:
        print(f"{sum(n > context_length for n in lengths):,} of {len(lengths):,} texts are longer "
              f"than {context_length} tokens and are truncated; --context-length {max(lengths)} "
              "is enough")
    if alike := len(captions) - len(tokenizer.batch(captions, context_length).unique(dim=0)):
        print(f"{alike:,} of {len(captions):,} captions are the same as another to CLIP, which "
              "ignores case, signs, a first article and what is truncated")


@torch.no_grad()
def embed_images(clip, dataset, device):
    """Embed all images of a data set, or load what was embedded before -> (N, E), scaled"""
    path = data.CACHE / (f"embeddings-{checkpoint.weights_checksum(clip):08x}-"
                         f"{zlib.crc32(dataset.images):08x}.pt")
    if not path.exists():
        parts = range(0, len(dataset.images), 500)
        with cli.autocast(device):
            z = [guide.scale_features(clip.encode_image(
                data.to_float(dataset.images[i:i + 500]).to(device)))
                for i in tqdm(parts, "embedding images", unit="batch")]
        checkpoint.save(path, {"kind": "embeddings", "z": torch.cat(z).half().cpu()})
    return checkpoint.load(path, "embeddings")["z"].float().to(device)


def clip_task(config, options, dataset, validation, device):
    """Train a tokenizer on the texts and set up CLIP's training; warn of truncated texts."""
    if dataset.captions == [""]:
        raise cli.UserError(f"--data {dataset.name}: there are images but no captions; put each "
                            "class in a folder of its own, write NAME.txt beside NAME.png, or "
                            "captions.csv with the columns image and caption")
    K, alpha_bar = len(dataset.captions), tinyddpm.cosine_alpha_bar().to(device)
    partial_true_of = torch.from_numpy(dataset.partial_true_of).to(device)    # (P, K)
    templates = normalized_templates(dataset)
    all_texts = sum(templates, [])
    tokenizer = tinyclip.Tokenizer.train(all_texts, vocab_size=4096)
    report_truncated_texts(all_texts, templates[0][:K], tokenizer, config.context_length)
    tokens = torch.stack([tokenizer.batch(texts, config.context_length)
                          for texts in templates]).to(device)                 # (S, K + P, L)
    caption_ids = torch.from_numpy(dataset.caption_ids).to(device)            # (N,)
    objective = lambda model, x_0, indices, generator: clip_objective(
        model, x_0, caption_ids[indices], tokens, partial_true_of, alpha_bar, generator,
        perturbation=options.perturbation)

    @torch.no_grad()
    def preview(model, folder):   # the same images and noise in each call
        x_0, indices = data.batch(validation, 0, 0, 500, device)
        generator = data.generator("evaluation", 0, device=device)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        text_features, accuracies = model.encode_text(tokens[0, :K]), []
        for timestep in (0, 300, 500, 700):
            t = torch.full((len(x_0),), timestep, device=device)
            probs = model.caption_probs(tinyddpm.q_sample(x_0, t, eps, alpha_bar), text_features, t)
            correct = probs.argmax(dim=1).cpu().numpy() == validation.caption_ids[indices]
            accuracies.append(f"{correct.mean():.1%} at t = {timestep}")
        return f"top-1 of {K} captions on held-out images: {', '.join(accuracies)}"

    B = options.batch // (options.accumulate * distributed.world_size())   # of a micro-batch
    compared = K if K <= CLOSED_SET else B
    chance = math.log(compared)   # image to text
    if K <= CLOSED_SET:   # text to image, among clean ones; image to partial caption
        chance += tinyclip.TEXT_TO_IMAGE * math.log(math.ceil(CLEAN_FRACTION * B))
        chance += PARTIAL_WEIGHT * math.log(min(PARTIAL_PER_STEP, len(partial_true_of)) or 1)
    if compared < 2:
        raise cli.UserError(f"an image is compared with {compared} caption; CLIP learns from "
                            "differences: use more captions or a larger --batch")
    content = {"caption_labels": dataset.caption_labels.tolist(), "templates": templates[:ENSEMBLE],
               "partial": dataset.templates[0][K:], "partial_true_of": partial_true_of.cpu(),
               "merges": tokenizer.merges, "words": sorted(set(" ".join(all_texts).split()))}
    return Task("clip", tinyclip.CLIP(config, tokenizer), objective, preview, content, chance)


def diffusion_task(kind, config, dataset, validation, device, condition, validation_cond, content):
    """Set up a U-Net's training.

    condition: (indices of images, generator) -> cond: (B, cond_dim), or None; validation_cond:
    (N, cond_dim), the condition of each validation image, for previews, or None
    """
    alpha_bar = tinyddpm.cosine_alpha_bar().to(device)
    objective = lambda model, x_0, indices, generator: ddpm_objective(
        model, x_0, condition(indices, generator), alpha_bar, generator)

    @torch.no_grad()
    def preview(model, folder):
        x_0, indices = data.batch(validation, 0, 0, 500, device)
        generators, size = [data.generator("sampling", 0, i) for i in range(16)], config.image_size
        x_T = tinyddpm.randn_per_image(generators, (3, size, size), device)
        losses, images = [], []
        for cond in [None] if validation_cond is None else [None, validation_cond[indices]]:
            generator = data.generator("evaluation", 0, device=device)
            parts = zip(x_0.split(50), [None] * 10 if cond is None else cond.split(50))
            losses.append(torch.stack([ddpm_objective(model, x, c, alpha_bar, generator)
                                       for x, c in parts]).mean())   # in parts, to save memory
            denoise = tinyddpm.denoiser(model, alpha_bar, None if cond is None else cond[:16])
            images.append(tinyddpm.sample(denoise, x_T, generators, alpha_bar))
        data.save_grid(folder / "samples.png", data.to_uint8(torch.cat(images)), zoom=2)
        values = ", with their condition ".join(f"{loss:.4f}" for loss in losses)
        return f"loss on held-out images {values}, {16 * len(images)} samples in samples.png"

    x_0, _ = data.batch(dataset, 0, 0, 500)
    a = alpha_bar[1:].mean().item()
    v_squared = a + (1 - a) * x_0.square().mean().item()   # its mean: the loss of v_hat = 0
    return Task(kind, tinyddpm.UNet(config), objective, preview, content, v_squared)


def ddpm_task(config, options, dataset, validation, device, clip=None):
    """Set up the training of a DDPM; clip: None, or whose text features are the condition"""
    if clip is None:
        no_condition = lambda indices, generator: None
        return diffusion_task("ddpm", config, dataset, validation, device, no_condition, None, {})
    config = dataclasses.replace(config, cond_dim=clip.config.embed_dim)
    templates = normalized_templates(dataset)[:ENSEMBLE]
    text_features = clip.to(device).encode_ensemble(templates)                # (K + P, E)
    cond = guide.scale_features(text_features[:len(dataset.captions)])        # (K, E)
    caption_ids = torch.from_numpy(dataset.caption_ids).to(device)            # (N,)
    condition = lambda indices, generator: drop_text(cond[caption_ids[indices]], generator)
    content = {"clip": checkpoint.weights_checksum(clip)}   # sample.py needs the same one
    return diffusion_task("ddpm", config, dataset, validation, device, condition,
                          cond[validation.caption_ids], content)


def decoder_task(config, options, dataset, validation, device, clip):
    """Set up the training of a decoder; clip: whose image embeddings are the condition"""
    config = dataclasses.replace(config, cond_dim=clip.config.embed_dim + 1)
    z, validation_z = (embed_images(clip.to(device), d, device) for d in (dataset, validation))
    no_noise = z.new_zeros(len(validation_z), 1)
    condition = lambda indices, generator: noise_embeddings(z[indices], generator)
    content = {"clip": checkpoint.weights_checksum(clip)}
    return diffusion_task("decoder", config, dataset, validation, device, condition,
                          unclip.decoder_condition(validation_z, no_noise, 0.), content)


def prior_task(config, options, dataset, validation, device, clip):
    """Set up the training of a prior; clip: whose image features it learns to sample from text"""
    config, clip = dataclasses.replace(config, clip_dim=clip.config.embed_dim), clip.to(device)
    alpha_bar, K = tinyddpm.cosine_alpha_bar().to(device), len(dataset.captions)
    z, validation_z = (embed_images(clip, d, device) for d in (dataset, validation))
    with torch.no_grad(), cli.autocast(device):
        text_features = torch.stack([guide.scale_features(clip.encode_captions(texts[:K]))
                                     for texts in normalized_templates(dataset)])   # (S, K, E)
    caption_ids, validation_ids = (torch.from_numpy(d.caption_ids).to(device)
                                   for d in (dataset, validation))

    def objective(model, x_0, indices, generator):
        return prior_objective(model, z[indices], caption_ids[indices], text_features, alpha_bar,
                               generator)

    @torch.no_grad()
    def preview(model, folder):
        _, indices = data.batch(validation, 0, 0, 500)
        generators = [data.generator("sampling", 0, i) for i in range(500)]
        text = guide.scale_features(text_features.mean(dim=0))[validation_ids[indices]]   # (500, E)
        drawn = unclip.sample_prior(model, text, generators, alpha_bar)
        cosine = F.cosine_similarity(drawn, validation_z[indices]).mean()
        return f"cosine of drawn and true embeddings of held-out images: {cosine:.3f}"

    content = {"clip": checkpoint.weights_checksum(clip)}
    return Task("prior", unclip.Prior(config), objective, preview, content, 1.)


def upsampler_task(config, options, dataset, validation, device, ddpm):
    """Set up the training of an upsampler; ddpm: a trained U-Net, for unclip.redraw"""
    alpha_bar = tinyddpm.cosine_alpha_bar().to(device)
    denoise = tinyddpm.denoiser(ddpm.to(device), alpha_bar)

    def objective(model, x_0, indices, generator):
        low = F.avg_pool2d(x_0, 4)
        coin = torch.randint(2, (), generator=generator, device=device).item()
        # The first half of a batch, which is in random order.
        aug_level, half = low.new_zeros(len(low)), (len(low) + coin) // 2
        t = torch.randint(50, 301, (), generator=generator, device=device).item()
        eps = torch.randn(low[:half].shape, generator=generator, device=device)
        with torch.no_grad():
            low[:half] = unclip.redraw(denoise, low[:half], t, eps, alpha_bar)
        aug_level[:half] = t / tinyddpm.T
        return upsampler_objective(model, x_0, low, aug_level, generator)

    @torch.no_grad()
    def preview(model, folder):
        x_0, _ = data.batch(validation, 0, 0, 100, device)
        low = F.avg_pool2d(x_0, 4)
        bicubic = F.interpolate(low, scale_factor=4, mode="bicubic").clamp(-1, 1)
        high = torch.cat([unclip.upsample(model, x, config.image_size) for x in low.split(20)])
        psnr = [10 * torch.log10(4 / (x - x_0).square().mean(dim=(1, 2, 3))).mean()
                for x in (high, bicubic)]   # 4 is the square of the range of pixels
        rows = data.to_uint8(torch.cat([bicubic[:8], high[:8], x_0[:8]]))
        data.save_grid(folder / "samples.png", rows)
        return (f"PSNR on held-out images {psnr[0]:.2f} dB, bicubic {psnr[1]:.2f}; samples.png: "
                "bicubic, upsampled, true")

    x_0, _ = data.batch(validation, 0, 0, 100)
    middle, low = F.avg_pool2d(x_0, 2), F.avg_pool2d(x_0, 4)
    chance = (F.l1_loss(unclip.enlarge(low), middle)
              + F.l1_loss(unclip.enlarge(middle), x_0)).item()
    return Task("upsampler", unclip.Upsampler(config), objective, preview,
                {"ddpm": checkpoint.weights_checksum(ddpm)}, chance)


def judge_task(config, options, dataset, validation, device):
    """Set up the training of a classifier of the data set's attributes."""
    if not dataset.attributes:
        raise cli.UserError("a judge needs the built-in cars or class folders; other captions name "
                            "no attributes that it could learn")
    labels = torch.from_numpy(dataset.labels).to(device)                      # (N, A)
    sizes = {name: len(values) for name, values in dataset.attributes.items()}
    objective = lambda model, x_0, indices, generator: judge.judge_loss(
        model, x_0, labels[indices])

    def preview(model, folder):
        x = data.to_float(validation.images).to(device)
        correct = judge.predict(model, x).cpu() == torch.from_numpy(validation.labels)   # (N, A)
        each = ", ".join(f"{name} {p:.2%}" for name, p in zip(sizes, correct.float().mean(dim=0)))
        return f"on {len(x)} held-out images: all {correct.all(1).float().mean():.2%}, {each}"

    content = {"attributes": dataset.attributes, "caption_labels": dataset.caption_labels.tolist()}
    return Task("judge", judge.Judge(config, sizes), objective, preview, content,
                sum(math.log(n) for n in sizes.values()))


UNET_TRAINING = TrainConfig(steps=4500, batch=32, lr=4e-3, weight_decay=0.01)
TASKS = {   # kind -> what makes its Task; default configs of the model and of its training
    "clip": (clip_task, tinyclip.CLIPConfig(), TrainConfig(steps=2100, lr=2e-3)),
    "ddpm": (ddpm_task, tinyddpm.UNetConfig(), UNET_TRAINING),
    "decoder": (decoder_task, tinyddpm.UNetConfig(), UNET_TRAINING),
    "prior": (prior_task, unclip.PriorConfig(), TrainConfig(steps=3000, batch=256, lr=2e-3)),
    "upsampler": (upsampler_task, unclip.UpsamplerConfig(),
                  TrainConfig(steps=1500, batch=16, lr=3e-3, weight_decay=0.01, images=6000)),
    "judge": (judge_task, judge.JudgeConfig(), TrainConfig(steps=800))}
# Other defaults. --preset photos is for photographs in class folders, such as CIFAR-10's 50,000.
PRESETS = {"photos": {
    "clip": {"steps": 6000, "flips": 0.5, "shift": 4, "perturbation": 0.5},
    "ddpm": {"channels": 48, "batch": 64, "steps": 30_000, "flips": 0.5},
    "judge": {"width": 64, "steps": 3000, "flips": 0.5, "shift": 4, "cutout": 12}}}


# ---- a run ---------------------------------------------------------------------------------------

class Run:
    """A model in training, its moving average and its optimizers."""

    def __init__(self, task, options, dataset, folder, seed, device):
        self.task, self.options, self.dataset = task, options, dataset
        self.folder, self.seed, self.device = folder, seed, device
        self.settings = {   # all that must be the same when the run is resumed
            "number of images": len(dataset.images),
            "images' checksum": zlib.crc32(dataset.images),
            "captions' checksum": zlib.crc32(
                repr(dataset.templates).encode() + dataset.caption_ids.tobytes()),
            "CLIP": task.content.get("clip"), "DDPM": task.content.get("ddpm"), "seed": seed,
            **dataclasses.asdict(task.model.config),
            **{name: value for name, value in vars(options).items()
               if takes(task.kind, name) and name not in ("accumulate", "images")}}
        self.model = task.model.to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        # Muon takes less than half of AdamW's steps to the same loss; infra/muon.py says why.
        matrices, others = muon.split(self.model)   # weights at least 32 x 32; all else
        self.optimizers = (
            muon.Muon(matrices, options.lr, options.weight_decay),
            torch.optim.AdamW(others, options.lr, betas=(0.9, 0.99), weight_decay=0., fused=True))
        self.bf16 = distributed.any_rank(cli.bf16_is_fast(device))[0]   # the same in all ranks
        self.step, self.history = 0, []   # history: (step, mean loss since the entry before)

    def save(self):
        """Write all files, checkpoint.pt after weights.pt: killed in between, a run resumes."""
        checkpoint.save(self.folder / "weights.pt", {
            "kind": self.task.kind, "config": dataclasses.asdict(self.model.config),
            "data": self.dataset.name, "captions": self.dataset.captions, "steps": self.step,
            "weights": checkpoint.fp16_weights(self.ema), **self.task.content})
        checkpoint.save(self.folder / "checkpoint.pt", {
            "kind": f"{self.task.kind} run", "settings": self.settings, "step": self.step,
            "device": self.device.type, "bf16": self.bf16, "history": self.history,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]})
        steps, losses = zip(*self.history)
        plot.line_plot(self.folder / "loss.png", {"loss": (steps, losses)}, "step", "training loss")

    def resume(self):
        """Load checkpoint.pt if there is one; UserError if it is of another run."""
        path, kind = self.folder / "checkpoint.pt", f"{self.task.kind} run"
        saved = distributed.broadcast(   # rank 0 reads it for all
            lambda: path.exists() and checkpoint.load(path, kind))
        if not saved:
            return
        try:
            for key, now in self.settings.items():
                if (before := saved["settings"].get(key)) != now:
                    raise cli.UserError(
                        f"{self.folder} holds a run with another {key} ({before}, now {now}), and "
                        "must end as if it had never stopped: choose another --out, or start over "
                        "with --fresh")
            self.model.load_state_dict(saved["model"])
            self.ema.load_state_dict(saved["ema"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.history = saved["step"], saved["history"]
            if saved["device"] == self.device.type:
                self.bf16 = saved["bf16"]
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
            raise cli.UserError(f"{path} is of another version; start over with --fresh") from None


def learning_rate(step, options):
    """Linear warm-up, then half a cosine down to zero; step = 1, 2, ..."""
    warmup = max(1, round(options.warmup * options.steps))
    if step <= warmup:
        return options.lr * step / warmup
    progress = (step - warmup) / (options.steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(run, step):
    """Update the model and its moving average once -> (2,) loss and gradient norm"""
    options, seed, device, rank = run.options, run.seed, run.device, distributed.rank()
    size = options.batch // distributed.world_size()
    x_0, indices = data.batch(run.dataset, seed, step, size, device, rank)
    indices = torch.from_numpy(indices).to(device)
    generator = data.generator("training", seed, step, rank, device=device)
    torch.manual_seed(data.generator("dropout", seed, step, rank).initial_seed())
    x_0 = data.augment(x_0, options.flips, options.shift, options.cutout, generator)
    total = 0.
    for x, part in zip(x_0.chunk(options.accumulate), indices.chunk(options.accumulate)):
        with cli.autocast(device, run.bf16):
            loss = run.task.objective(run.model, x, part, generator) / options.accumulate
        loss.backward()
        total += loss.detach()

    distributed.average_gradients(run.model)
    # For AdamW; Muon's step depends on the gradients' directions and relative sizes alone.
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        optimizer.zero_grad()
    tinyddpm.ema_update(run.ema, run.model, step)
    return torch.stack([total, norm])


def record(run, measured):
    """Append the mean loss of the last steps to the history; UserError if any is not finite."""
    measured = distributed.mean_over_ranks(torch.stack(measured)).cpu()   # (steps, 2)
    for step, values in enumerate(measured, run.step - len(measured) + 1):
        if not values.isfinite().all():   # so nothing of it gets into a checkpoint
            raise cli.UserError(
                f"the loss or its gradient is not finite at step {step:,}; {run.folder} keeps "
                "what it held before; try --fresh with half the --lr, or look for odd values in "
                "the data")
    run.history.append((run.step, measured[:, 0].mean().item()))


def train(task, options, dataset, folder, seed=0, device=torch.device("cpu"),
          minutes=math.inf, save_every=120., fresh=False):
    """Train a task, or resume it, until its last step or until minutes or a signal stop it."""
    run, rank_0 = Run(task, options, dataset, folder, seed, device), distributed.rank() == 0
    if not fresh:
        run.resume()
    if run.step == options.steps:
        print(f"{folder} is finished ({run.step:,} steps); --fresh starts over")
        return
    if run.step:
        print(f"resuming {folder} at step {run.step + 1:,} of {options.steps:,}")
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{millions:.2f} million parameters on {device}; a loss of {task.chance:.2f} is chance")

    measured, start = [], time.monotonic()
    save_at = start + save_every
    bar = tqdm(total=options.steps * options.batch, initial=run.step * options.batch,
               desc=task.kind, unit="image", unit_scale=True, disable=not rank_0)
    with cli.catch_signals() as signals, bar:   # signals: empty until Ctrl-C or SIGTERM
        for step in range(run.step + 1, options.steps + 1):
            measured.append(train_step(run, step))
            run.step, last, now = step, step == options.steps, time.monotonic()
            bar.update(options.batch)
            stop, save = distributed.any_rank(   # all ranks leave the loop after the same step
                last or bool(signals) or now > start + 60 * minutes, rank_0 and now > save_at)
            if step % 50 == 0 or stop or save:   # not every step: it waits for the device
                record(run, measured)
                measured = []
                bar.set_postfix_str(f"loss {run.history[-1][1]:.3f}")
            if rank_0 and (stop or save):
                run.save()
                save_at = now + save_every
            if rank_0 and (step % max(50, options.steps // 10) == 0 or last):
                with cli.autocast(device, run.bf16):
                    bar.write(f"step {step:,}: {task.preview(run.ema, folder)}")
            if stop:
                break

    if last:
        print(f"finished: {folder}/weights.pt")
    else:
        print(f"stopped at step {step:,} of {options.steps:,}; the same command resumes"
              + (" (without --fresh)" if fresh else ""))
    if signals:   # all is saved; the caller should know why it ended
        raise SystemExit(128 + signals[0])


# ---- the command line ----------------------------------------------------------------------------

NOT_FLAGS = "cond_dim", "in_channels", "noise_aware", "clip_dim"   # these are not for users to set


def parse(arguments):
    """Parse the flags -> args, config, TrainConfig: the defaults of TASKS, changed by flags"""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, (_, config, options) in TASKS.items():
        add = kinds.add_parser(kind, help=f"python train.py {kind} -h lists its flags").add_argument
        add("--data", default="cars", help="cars, the built-in data set, or a folder of your own")
        add("--minutes", type=float, default=math.inf, help="stop after this many, to resume later")
        add("--save-every", type=float, default=120., metavar="SECONDS", help="default 120")
        add("--out", default=f"runs/{kind}", help=f"the run's folder; default runs/{kind}")
        add("--seed", type=int, default=0)
        add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
        add("--fresh", action="store_true", help="start over, even if there is a run")
        if kind in ("ddpm", "decoder", "prior"):
            add("--clip", required=kind != "ddpm", help="a CLIP's weights.pt, whose features are "
                "the condition (of a ddpm: for sample.py --method classifier-free)")
        if kind == "upsampler":
            add("--ddpm", required=True, help="weights.pt of a DDPM or decoder, which samples half "
                "of the inputs, so that its errors are corrected")
        if presets := [name for name, of_kind in PRESETS.items() if kind in of_kind]:
            add("--preset", choices=presets, help="other defaults: " + "; ".join(
                " ".join(f"--{flag} {value}" for flag, value in PRESETS[name][kind].items())
                for name in presets))
        for name, value in {**vars(config), **vars(options)}.items():
            several = isinstance(value, tuple)
            if name not in NOT_FLAGS and takes(kind, name):
                add("--" + name.replace("_", "-"), nargs="+" if several else None,
                    default=argparse.SUPPRESS, type=type(value[0] if several else value),
                    help=f"default: {value}")
    args = parser.parse_args(arguments)
    given = {**PRESETS.get(vars(args).get("preset"), {}).get(args.kind, {}), **vars(args)}
    changed = lambda default: dataclasses.replace(default, **{
        name: type(value)(given[name])   # argparse makes lists of tuples
        for name, value in vars(default).items() if name in given})
    try:
        config, options = map(changed, TASKS[args.kind][1:])
    except ValueError as error:   # a config refuses what cannot be built
        raise cli.UserError(str(error)) from None
    side = getattr(config, "image_size", 1)
    cli.check_ranges(
        options, steps=(1, math.inf), batch=(1, math.inf), accumulate=(1, math.inf),
        images=(1, 10_000_000), warmup=(0, 1), lr=(0, 1), weight_decay=(0, 1), flips=(0, 1),
        shift=(0, side - 1), cutout=(0, side), perturbation=(0, 100))
    cli.check_ranges(args, seed=(0, 2 ** 63 - 1), minutes=(0, math.inf), save_every=(0, math.inf))
    ranks = distributed.world_size()
    if options.batch % (ranks * options.accumulate):
        raise cli.UserError(f"--batch {options.batch} is not a multiple of {ranks} ranks x "
                            f"{options.accumulate} micro-batches")
    return args, config, options


def load_trained(args):
    """Load the model that --clip or --ddpm names -> {"clip" or "ddpm": model}, content; or {}, None
    """
    for flag, model_class, *kinds in (("clip", tinyclip.CLIP, "clip"),
                                      ("ddpm", tinyddpm.UNet, "ddpm", "decoder")):
        if path := vars(args).get(flag):
            model, content = checkpoint.load_model(path, model_class, *kinds)
            return {flag: model}, content
    return {}, None


def main(arguments=None):
    distributed.init()
    args, config, options = parse(arguments)
    device, folder = distributed.pick_device(args.device), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)   # or fail now, not after the first save
    trained, content = load_trained(args)
    its_size = content and content["config"]["image_size"]
    size = getattr(config, "image_size", its_size)   # of a prior, which has no images, its CLIP's
    splits, count = ("train", "validation"), min(2000, options.images)
    if args.kind == "judge":   # trained on other images than CLIP and the diffusion model
        splits, count = ("judge", "judge-test"), min(5000, options.images)
    with distributed.local_rank_0_first():
        dataset = data.load(args.data, size, options.images, splits[0])
        validation = data.load(args.data, size, count, splits[1])
    print(f"{dataset.report}\n{validation.report}")
    expected = size // 4 if args.kind == "upsampler" else size
    if trained and (content["captions"], its_size) != (dataset.captions, expected):
        flag, = trained
        raise cli.UserError(f"--{flag} {vars(args)[flag]} was trained on {content['data']} at "
                            f"{its_size} pixels, but {args.data} at {expected} is needed")
    torch.manual_seed(args.seed)   # for the initial weights
    task = TASKS[args.kind][0](config, options, dataset, validation, device, **trained)
    with checkpoint.lock(folder):
        train(task, options, dataset, folder, args.seed, device, args.minutes, args.save_every,
              args.fresh)


if __name__ == "__main__":
    cli.run_command(main)
