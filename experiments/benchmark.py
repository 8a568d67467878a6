"""Speed, beside other projects that run in turns with ours.

    pip install -r requirements-benchmark.txt     the peers; a missing one is skipped, by name
    python -m experiments benchmark               half an hour on two cores

Machines are noisy: what is compared takes turns, the first round is a warm-up, and the fastest of
the others counts. Compare ratios, and seconds only within one run.
"""
import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

import cars
import data
import tinyclip
import tinyddpm
import train
from experiments import tables
from infra import cli

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
millions = lambda model: round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
LIMIT = 120   # seconds for a comparison
BATCH, DDIM_STEPS = {"ddpm": 64, "clip": 128, "ddim": 8}, 10
# As many parameters as the peers' U-Nets, 35.7 million; and diffusers' widths, blocks, attention.
LARGE = tinyddpm.UNetConfig(channels=64, multipliers=(1, 2, 3, 8))
WIDE = tinyddpm.UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,))
PATCH_CLIP = tinyclip.CLIPConfig(stem="patch")   # the stem of the published CLIP


def fastest(functions, rounds):
    """Time functions in turns: name -> function -> name -> its least seconds

    Ends with the round in which LIMIT passes; TimeoutError if that is the warm-up.
    """
    seconds, begin = {name: [] for name in functions}, time.perf_counter()
    for n in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
        if time.perf_counter() > begin + LIMIT:
            break
    if n == 0:
        raise TimeoutError(f"one round takes more than {LIMIT} s")
    return {name: min(times[1:]) for name, times in seconds.items()}


# Ours and the peers': functions bf16 -> a function to time, its model.
def train_ours(kind, config, bf16):
    """Set up a run on 2,000 images; the function takes one of its steps, always the same."""
    options = train.TrainConfig(batch=BATCH[kind])
    dataset = data.load("cars", config.image_size, 2000)
    task = train.TASKS[kind][0](config, options, dataset, dataset, DEVICE)
    run = train.Run(task, options, dataset, None, 0, DEVICE)
    run.bf16 = bf16
    return lambda: train.train_step(run, step=500), run.model


def ddim_ours(make_unet, bf16):
    """make_unet() -> a function (x_t, t) -> v_hat, its model"""
    (unet, model), alpha_bar = make_unet(), tinyddpm.cosine_alpha_bar().to(DEVICE)
    generators = [data.generator("sampling", 0, i) for i in range(BATCH["ddim"])]
    def run():
        with torch.no_grad(), cli.autocast(DEVICE, bf16):
            x_T = tinyddpm.randn_per_image(generators, (3, 32, 32), DEVICE)
            data.to_uint8(tinyddpm.sample(tinyddpm.denoiser(unet, alpha_bar), x_T, generators,
                                          alpha_bar, DDIM_STEPS, eta=0.))
    return run, model


def our_unet():
    unet = tinyddpm.UNet(LARGE).eval().to(DEVICE, memory_format=torch.channels_last)
    return unet, unet


def peer_step(model, optimizer, loss, bf16, accumulate=1, max_norm=None, after=lambda: None):
    """Build a training step like that of the peers' own loops; after: what follows the update"""
    def step():
        for _ in range(accumulate):
            with cli.autocast(DEVICE, bf16):
                micro_batch = loss() / accumulate
            micro_batch.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step, model


def train_lucidrains(bf16):
    """denoising-diffusion-pytorch: the network of its README, the step of its Trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    diffusion = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8)), image_size=32).to(DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    images = torch.rand(BATCH["ddpm"] // 2, 3, 32, 32, device=DEVICE)
    return peer_step(diffusion, optimizer, lambda: diffusion(images), bf16, 2, 1., ema.update)


def diffusers_unet():
    """The U-Net of Ho et al. 2020 for CIFAR-10, as diffusers has it (google/ddpm-cifar10-32)."""
    from diffusers import UNet2DModel
    unet = UNet2DModel(
        sample_size=32, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).to(DEVICE)
    return lambda x_t, t: unet(x_t, t).sample, unet


def train_diffusers(bf16):
    """The step of diffusers' example train_unconditional.py, with its defaults."""
    from diffusers import DDPMScheduler
    (predict, unet), scheduler, B = diffusers_unet(), DDPMScheduler(1000), BATCH["ddpm"]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                  weight_decay=1e-6)
    x_0 = torch.rand(B, 3, 32, 32, device=DEVICE) * 2 - 1
    def loss():
        eps, t = torch.randn_like(x_0), torch.randint(0, 1000, (B,), device=DEVICE)
        return (predict(scheduler.add_noise(x_0, eps, t), t).float() - eps).square().mean()
    return peer_step(unet, optimizer, loss, bf16, max_norm=1.)


def ddim_diffusers(bf16):
    from diffusers import DDIMPipeline, DDIMScheduler
    _, unet = diffusers_unet()
    pipeline = DDIMPipeline(unet.eval(), DDIMScheduler(1000))
    pipeline.set_progress_bar_config(disable=True)
    def run():
        with cli.autocast(DEVICE, bf16):
            pipeline(batch_size=BATCH["ddim"], num_inference_steps=DDIM_STEPS)
    return run, unet


def train_open_clip(bf16):
    """open_clip's model with the same two towers, and the step of its train_one_epoch."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    config, vocabulary = PATCH_CLIP, tinyclip.Tokenizer.train(cars.CAPTIONS, 4096).vocab_size
    image = CLIPVisionCfg(layers=config.layers, width=config.width, patch_size=config.patch,
                          head_width=config.width // config.heads, image_size=config.image_size)
    text = CLIPTextCfg(context_length=config.context_length, vocab_size=vocabulary,
                       width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    clip = CLIP(config.embed_dim, image, text, quick_gelu=True, output_dict=True).to(DEVICE)
    optimizer, loss = torch.optim.AdamW(clip.parameters(), lr=5e-4, eps=1e-6), ClipLoss()
    images = torch.rand(BATCH["clip"], 3, config.image_size, config.image_size, device=DEVICE)
    tokens = torch.randint(0, vocabulary, (BATCH["clip"], config.context_length), device=DEVICE)
    return peer_step(clip, optimizer, lambda: loss(**clip(images, tokens)), bf16,
                     after=lambda: clip.logit_scale.data.clamp_(0, 4.6052))   # ln 100


COMPARISONS = [   # peer, key of BATCH, theirs, ours
    ("denoising-diffusion-pytorch", "ddpm", train_lucidrains, partial(train_ours, "ddpm", LARGE)),
    ("diffusers", "ddpm", train_diffusers, partial(train_ours, "ddpm", LARGE)),
    ("diffusers, with its widths", "ddpm", train_diffusers, partial(train_ours, "ddpm", WIDE)),
    ("open_clip, equal towers", "clip", train_open_clip, partial(train_ours, "clip", PATCH_CLIP)),
    ("diffusers, as many parameters", "ddim", ddim_diffusers, partial(ddim_ours, our_unet)),
    ("diffusers, with its U-Net", "ddim", ddim_diffusers, partial(ddim_ours, diffusers_unet))]


def benchmark():
    """Speed beside peers, images/s"""
    names = ["fp32"] + ["bf16"] * cli.bf16_is_fast(DEVICE)
    if "bf16" not in names:
        print("skipped bf16: it is slower than fp32 on this device", file=sys.stderr)
    for peer, key, theirs, ours in COMPARISONS:
        try:
            made = {(side, name): make(bf16=name == "bf16") for name in names
                    for side, make in (("theirs", theirs), ("ours", ours))}
            seconds = fastest({name: function for name, (function, _) in made.items()},
                              rounds=20 if key == "clip" else 2)
        except (ModuleNotFoundError, TimeoutError) as error:
            print(f"skipped {key} beside {peer}: {error}", file=sys.stderr)
            continue
        row = {"task": key, "batch": BATCH[key], "peer": peer,
               "parameters_m": millions(made["ours", "fp32"][1]),
               "peer_parameters_m": millions(made["theirs", "fp32"][1])}
        for name in names:
            a, b = seconds["ours", name], seconds["theirs", name]
            row |= {name: BATCH[key] / a, f"peer_{name}": BATCH[key] / b, f"{name}_ratio": b / a}
        default = names[-1] if theirs is train_open_clip else "fp32"   # the others' is fp32
        yield {**row, "ratio_to_default": seconds["theirs", default] / seconds["ours", names[-1]]}


def main(arguments=None):
    parser = cli.Parser("python -m experiments benchmark", description=__doc__,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default="out")
    args = parser.parse_args(arguments, argparse.Namespace(seed=0))
    args.out.mkdir(parents=True, exist_ok=True)
    tables.record(benchmark(), "benchmark", args, DEVICE)
