"""python tests/benchmark.py: how fast this is, beside peers that run in the same minutes.

    pip install -r requirements-benchmark.txt   the peers; a missing one is a skipped row
    python tests/benchmark.py                   all of it, half an hour on two cores
    python tests/benchmark.py ddpm clip         some of it

Machines are noisy: those who are compared take turns, the first round does not count, and of the
others the fastest does; byte pair encoding goes once. Ratios can be compared, and seconds only
within one run. Everything is timed as it is used: a step of training is train.train_step, from the
bytes of the pictures to the averaged weights.
"""
import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bpe, cars, checkpoints, data, guide   # noqa: E402,E401
import jobs, plot, tinyclip, tinyddpm, train   # noqa: E402,E401
from unet import UNet, UNetConfig   # noqa: E402

OUT, DEVICE = Path("out"), data.pick_device()

# About 35.7 million parameters, as those of the peers below.
AS_LARGE = UNetConfig(channels=64, multipliers=(1, 2, 3, 8))
AS_WIDE = UNetConfig(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,))


# ---- measuring -----------------------------------------------------------------------------------

def race(rounds=3, **contestants):
    """Functions that take turns -> the least seconds of each."""
    seconds = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: min(times[1:]) for name, times in seconds.items()}


def table(title, header, rows):
    """Print a table as Markdown, as it goes -> {"title", "header", "rows"}, for the JSON."""
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    kept = []
    for row in rows:
        kept.append(list(row))
        print(f"| {' | '.join(map(str, row))} |", flush=True)
    return {"title": title, "header": header, "rows": kept}


def here(package):
    return importlib.util.find_spec(package) is not None


autocast = functools.partial(data.autocast, DEVICE)
PRECISIONS = {"fp32": False, "bf16": True}


# ---- ours ----------------------------------------------------------------------------------------

def noise_pictures(size, captions, file=None):
    """A data set of 2,000 pictures of random pixels: what is in a picture takes no time. Or of a
    file, however large."""
    rng = np.random.default_rng(0)
    if file:
        count = file.stat().st_size // (size * size * 3)
        pictures = np.memmap(file, np.uint8, "r", shape=(count, size, size, 3))
    else:
        count = 2000
        pictures = rng.integers(0, 256, (count, size, size, 3), np.uint8)
    return data.Dataset("noise", pictures, rng.integers(0, len(captions), count), captions,
                        [captions], np.zeros((len(captions), 1), np.int64), {"class": [""]}, "")


def training(kind, config, options, bf16, captions=cars.CAPTIONS, file=None):
    """-> a function that takes the next step of a new run, its model."""
    size = config.size if kind == "judge" else config.image_size
    dataset = noise_pictures(size, captions, file)
    torch.manual_seed(0)
    job = jobs.JOBS[kind](config, options, dataset, dataset, DEVICE)
    run = train.begin(job, None, {"seed": 0}, options, DEVICE)._replace(bf16=bf16)
    steps = itertools.count(1)
    return lambda: train.train_step(run, next(steps), dataset, options), run.model


def parameters(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


# ---- peers, as their own training loops use them -------------------------------------------------

def peer_step(model, optimizer, loss, bf16, parts=1, reads=True, norm=None, after=lambda: None):
    """-> a function that takes one step as these loops do: the loss of each part of a batch, which
    some of them read to report it; the gradient, which some clip; the update; what comes after."""
    def step():
        for _ in range(parts):
            with autocast(bf16):
                part = loss() / parts
            part.backward()
            if reads:
                part.item()
        if norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


def lucidrains(batch, bf16):
    """denoising-diffusion-pytorch 2.3: the network of its README, the steps of its Trainer: two
    halves of a batch, Adam, averaged weights."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA
    diffusion = GaussianDiffusion(Unet(dim=64, dim_mults=(1, 2, 4, 8)), image_size=32).to(DEVICE)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    pictures = torch.rand(batch // 2, 3, 32, 32, device=DEVICE)
    return peer_step(diffusion, optimizer, lambda: diffusion(pictures), bf16, parts=2, norm=1.,
                     after=ema.update), diffusion


def diffusers_unet():
    """The U-Net of Ho et al. 2020 for CIFAR-10, as diffusers has it (google/ddpm-cifar10-32)."""
    from diffusers import UNet2DModel
    plain, attends = "DownBlock2D", "AttnDownBlock2D"
    return UNet2DModel(
        sample_size=32, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=(plain, attends, plain, plain), up_block_types=(
            "UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).to(DEVICE)


def diffusers(batch, bf16):
    """The steps of diffusers' example train_unconditional.py, with its defaults."""
    from diffusers import DDPMScheduler
    unet, scheduler = diffusers_unet(), DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999),
                                  weight_decay=1e-6)
    clean = torch.rand(batch, 3, 32, 32, device=DEVICE) * 2 - 1

    def loss():
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (batch,), device=DEVICE)
        return F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample.float(), noise)

    return peer_step(unet, optimizer, loss, bf16, norm=1.), unet


def open_clip(batch, bf16, config, vocabulary):
    """open_clip's model with the same towers, and the steps of its train_one_epoch."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    image = CLIPVisionCfg(layers=config.layers, width=config.width, patch_size=config.patch,
                          head_width=config.width // config.heads, image_size=config.image_size)
    text = CLIPTextCfg(context_length=config.context_length, vocab_size=vocabulary,
                       width=config.text_width, heads=config.text_heads, layers=config.text_layers)
    clip = CLIP(config.embed_dim, image, text, quick_gelu=True, output_dict=True).to(DEVICE)
    optimizer, loss = torch.optim.AdamW(clip.parameters(), lr=5e-4, eps=1e-6), ClipLoss()
    pictures = torch.rand(batch, 3, config.image_size, config.image_size, device=DEVICE)
    words = torch.randint(0, vocabulary, (batch, config.context_length), device=DEVICE)
    return peer_step(
        clip, optimizer, lambda: loss(**clip(pictures, words)), bf16, reads=False,
        after=lambda: clip.logit_scale.data.clamp_(0, math.log(100))), clip


# ---- the tables ----------------------------------------------------------------------------------

def matrix_rates():
    """Of a product of two 2048 x 2048 matrices, multiplications and additions a second."""
    matrices = [torch.ones(2048, 2048, device=DEVICE, dtype=dtype)
                for dtype in (torch.float32, torch.bfloat16)]
    least = race(5, **{name: functools.partial(torch.mm, m, m)
                       for name, m in zip(PRECISIONS, matrices)})
    return {name: 2 * 2048 ** 3 / seconds for name, seconds in least.items()}


def ddpm_table(batch=64):
    """Training of a diffusion model, pictures/s."""
    peers = {"denoising-diffusion-pytorch": ("denoising_diffusion_pytorch", lucidrains, AS_LARGE),
             "diffusers": ("diffusers", diffusers, AS_LARGE),
             "diffusers, a U-Net of the same widths": ("diffusers", diffusers, AS_WIDE)}
    options = train.TrainConfig(batch=batch)
    for name, (package, peer, config) in peers.items():
        if not here(package):
            yield name, "not installed", *[""] * 8
            continue
        ours = lambda bf16: training("ddpm", config, options, bf16)
        yield name, *compared(ours, functools.partial(peer, batch), batch, 2, default="fp32")


def compared(ours, theirs, batch, rounds, default):
    """ours, theirs: bf16 -> a function to time, its model. -> the parameters of both; pictures/s
    of both, and the ratio, in each precision; the ratio of ours to what the peer does by default.
    """
    sides = {"ours": ours, "theirs": theirs}
    made = {(side, precision): make(bf16) for side, make in sides.items()
            for precision, bf16 in PRECISIONS.items()}
    least = race(rounds, **{" ".join(key): run for key, (run, _) in made.items()})
    cells = [parameters(made[side, "fp32"][1]) for side in sides]
    for precision in PRECISIONS:
        mine, yours = least[f"ours {precision}"], least[f"theirs {precision}"]
        cells += [f"{batch / mine:.1f}", f"{batch / yours:.1f}", f"{yours / mine:.2f}"]
    mine = least["ours bf16" if data.bf16_is_fast(DEVICE) else "ours fp32"]
    return *cells, f"{least[f'theirs {default}'] / mine:.2f}"


def clip_table(batch=128):
    """Training of CLIP, pictures/s."""
    options, config = train.CLIPTrainConfig(batch=batch), tinyclip.CLIPConfig(stem="patch")
    if not here("open_clip"):
        yield "open_clip", "not installed", *[""] * 8
        return
    vocabulary = bpe.Tokenizer.train(cars.CAPTIONS, 4096).vocab_size
    ours = lambda bf16: training("clip", config, options, bf16)
    theirs = lambda bf16: open_clip(batch, bf16, config, vocabulary)
    yield "open_clip", *compared(ours, theirs, batch, 20, default="bf16")


def sampling_table(batch=8, steps=10):
    """DDIM, pictures/s."""
    if not here("diffusers"):
        yield "diffusers", "not installed", *[""] * 8
        return
    from diffusers import DDIMPipeline, DDIMScheduler
    theirs, alpha_bar = diffusers_unet().eval(), tinyddpm.cosine_alpha_bar().to(DEVICE)
    pipeline = DDIMPipeline(theirs, DDIMScheduler(1000))
    pipeline.set_progress_bar_config(disable=True)
    ours = UNet(AS_LARGE).eval().to(DEVICE, memory_format=torch.channels_last)
    generators = [data.generator(0, i) for i in range(batch)]

    def draw(unet, bf16):
        with autocast(bf16):
            x_T = tinyddpm.noise(generators, (3, 32, 32), DEVICE)
            data.to_uint8(tinyddpm.sample(tinyddpm.denoiser(unet, alpha_bar), x_T, generators,
                                          alpha_bar, steps, eta=0.))

    def their_draw(bf16):
        with autocast(bf16):
            pipeline(batch_size=batch, num_inference_steps=steps)

    same = lambda x_t, t: theirs(x_t, t).sample
    for name, unet, model in (("a U-Net of as many parameters", ours, ours),
                              ("the very same U-Net", same, theirs)):
        yield f"diffusers, {name}", *compared(
            lambda bf16: (functools.partial(draw, unet, bf16), model),
            lambda bf16: (functools.partial(their_draw, bf16), theirs), batch, 2, default="fp32")


def guidance_table(steps=25):
    """The shipped models: what guidance adds, and where the time goes."""
    draw, models, x = drawing(cars.CAPTIONS, steps)
    x, t = x.clone().requires_grad_(), torch.full((len(x),), 500, device=DEVICE)

    def evaluate_unet():
        with autocast(), torch.no_grad():
            models.unet(x, t)

    def evaluate_encoder():
        with autocast():
            features = models.clip.encode_image(x, t)
            logits = models.clip.logits(features, models.text_features, t)
        torch.autograd.grad(logits.sum(), x)

    def in_every_step(evaluate):
        for _ in range(steps):
            evaluate()

    least = race(5, **{
        "unguided": functools.partial(draw, "none"), "guided": draw,
        "of it the U-Net": functools.partial(in_every_step, evaluate_unet),
        "of it CLIP's encoder, forward and backward":
            functools.partial(in_every_step, evaluate_encoder)})
    for what, seconds in least.items():
        yield what, f"{1000 * seconds / steps:.1f}", f"{seconds / least['unguided']:.2f}"


def drawing(texts, steps, batch=16):
    """-> a function that draws pictures by the shipped models, guided by a method among these
    captions; the models; what the pictures start from."""
    models = checkpoints.load_pair(checkpoints.SHIPPED / "clip.pt", checkpoints.SHIPPED / "ddpm.pt",
                                   DEVICE)
    with torch.no_grad():
        models = checkpoints.with_captions(models, texts)
    generators = [data.generator(0, i) for i in range(batch)]
    x_T = tinyddpm.noise(generators, (3, 32, 32), DEVICE)
    target = torch.zeros(batch, dtype=torch.long, device=DEVICE)

    def draw(method=guide.DEFAULT):
        with autocast():
            tinyddpm.sample(guide.guided_by(method, models, target), x_T, generators,
                            models.alpha_bar, steps)
    return draw, models, x_T


def words_table():
    """Rendering on one core, and byte pair encoding."""
    for size in (32, 64, 128):
        seconds = race(render=lambda: cars.render(0, range(200), size))["render"]
        yield f"rendering at {size} x {size} on one core", f"{200 / seconds:.0f} pictures/s"
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts, size = [], 0
    for path in library:
        if size < 10e6:
            texts.append(path.read_text("utf-8", "replace"))
            size += len(texts[-1].encode())
    began = time.perf_counter()
    tokenizer = bpe.Tokenizer.train(texts, 4096)
    yield (f"BPE, 4,096 tokens from {size / 1e6:.1f} MB of Python's own source",
           f"{time.perf_counter() - began:.1f} s")
    words = " ".join(texts)[:2_000_000].split()
    rng = np.random.default_rng(0)
    captions = [" ".join(words[i:i + 10]) for i in rng.integers(0, len(words) - 10, 100_000)]
    began = time.perf_counter()
    tokens = tokenizer.batch(captions, 77)
    yield (f"encoding 100,000 captions of ten words, {(tokens != 0).sum() / 1e5:.0f} tokens each",
           f"{time.perf_counter() - began:.1f} s")


def share_table():
    """Arithmetic a second in steps of training, as a share of that of a 2048 x 2048 product."""
    rates = matrix_rates()
    for kind, batch, config in (("ddpm", 32, UNetConfig()), ("ddpm", 64, AS_LARGE),
                                ("clip", 128, tinyclip.CLIPConfig())):
        options = dataclasses.replace(train.PRESETS["tiny"][kind][1], batch=batch)
        for precision, bf16 in PRECISIONS.items():
            step, _ = training(kind, config, options, bf16)
            with FlopCounterMode(display=False) as counter:
                step()
            seconds = race(step=step)["step"]
            rate = counter.get_total_flops() / seconds
            yield (f"{kind}, batch {batch}", precision, f"{batch / seconds:.0f}",
                   f"{rate / 1e9:.0f}", f"{rates[precision] / 1e9:.0f}",
                   f"{rate / rates[precision]:.0%}")


def memory_table():
    """Two steps of each preset in a process of its own, and its peak memory."""
    for preset, kinds in train.PRESETS.items():
        for kind in kinds:
            for pieces in (1, 8) if preset == "base" and kind != "judge" else (1,):
                found = in_own_process(preset=preset, kind=kind, accumulate=pieces)
                yield (preset, kind, f"{found['parameters'] / 1e6:.1f} M", found["batch"], pieces,
                       f"{found['gib']:.1f}", f"{found['seconds']:.1f}")


def large_table(count=537_750, size=128):
    """ShapeNet's pictures, 26 GB, in a (sparse) file: 1,000 batches read, two steps taken."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.raw"
        with file.open("wb") as empty:
            empty.truncate(count * size * size * 3)
        for kind, pieces in (("clip", 1), ("ddpm", 8)):
            found = in_own_process(preset="base", kind=kind, accumulate=pieces, file=str(file))
            yield kind, pieces, f"{file.stat().st_size / 1e9:.1f}", f"{found['gib']:.1f}"


def growth_table():
    """Time and memory against one number at a time, all others as in the tiny preset."""
    many = 294, 1000, 10_000, 100_000
    axes = [("training the DDPM, batch", "ddpm", "batch", (8, 16, 32, 64, 128)),
            ("training the DDPM, pixels a side", "ddpm", "image_size", (16, 32, 64, 128)),
            ("training CLIP, captions", "clip", "captions", many),
            ("16 guided pictures, captions", "sample", "captions", many),
            ("16 guided pictures, steps", "sample", "steps", (10, 25, 50, 100, 200))]
    times, memories = {}, {}
    for name, kind, field, values in axes:
        found = [in_own_process(kind=kind, **{field: value}) for value in values]
        for value, one in zip(values, found):
            yield name, f"{value:,}", f"{one['seconds']:.2f}", f"{one['gib']:.2f}"
        doublings = np.log2(np.array(values) / values[0])
        for curves, what in ((times, "seconds"), (memories, "gib")):
            measured = np.array([one[what] for one in found])
            curves[f"{name} from {values[0]}"] = doublings, np.log2(measured / measured[0])
    for what, curves in (("time", times), ("memory", memories)):
        plot.lines(OUT / f"growth-{what}.png", curves, "doublings of the number in the legend",
                   f"doublings of the {what}", 800)


def in_own_process(**task):
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(task)], text=True,
                          capture_output=True)
    if done.returncode:
        raise SystemExit(f"{task}: exit code {done.returncode}, {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def one(preset="tiny", kind="ddpm", captions=294, steps=25, file=None, **changes):
    """What in_own_process runs -> parameters, batch, seconds, peak memory in GiB."""
    texts = [*cars.CAPTIONS, *(f"a thing of number {i}" for i in range(captions))][:captions]
    bf16 = data.bf16_is_fast(DEVICE)
    if kind == "sample":
        (run, _, x_T), model = drawing(texts, steps), torch.nn.Module()
        batch = len(x_T)
    else:
        config, options = (dataclasses.replace(part, **{
            field: value for field, value in changes.items() if hasattr(part, field)})
            for part in train.PRESETS[preset][kind])
        file = Path(file) if file else None
        (run, model), batch = training(kind, config, options, bf16, texts, file), options.batch
        if file:
            dataset = noise_pictures(config.image_size, texts, file)
            for step in range(1000):
                data.batch(dataset, 1, step, batch, DEVICE)
    seconds = race(1, run=run)["run"]
    return {"parameters": sum(p.numel() for p in model.parameters()), "batch": batch,
            "seconds": seconds, "gib": peak_memory() / 2 ** 30}


def peak_memory():
    """In bytes: of torch on the GPU, or else of the whole process. Not on Windows."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # On Linux that would begin with the memory of the process that has started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].removesuffix("kB"))


# ---- the command ---------------------------------------------------------------------------------

BESIDE = ["ours, parameters", "theirs", "ours, fp32", "theirs", "ratio",
          "ours, bf16", "theirs", "ratio", "ours to their default"]
TABLES = {
    "ddpm": (ddpm_table, ["beside", *BESIDE]),
    "clip": (clip_table, ["beside", *BESIDE]),
    "sampling": (sampling_table, ["beside", *BESIDE]),
    "guidance": (guidance_table, ["16 pictures, a step", "ms", "to unguided"]),
    "words": (words_table, ["what", "how fast"]),
    "share": (share_table, ["step", "precision", "pictures/s", "GFLOP/s", "a product's", "share"]),
    "memory": (memory_table, ["preset", "kind", "parameters", "batch", "pieces", "peak GiB",
                              "seconds a step"]),
    "large": (large_table, ["kind", "pieces", "file, GB", "peak GiB of resident memory"]),
    "growth": (growth_table, ["what", "value", "seconds", "peak GiB"]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return
    if not set(args.tables) <= set(TABLES):
        parser.error(f"there are the tables {', '.join(TABLES)}")
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in matrix_rates().items())
    machine = f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}; {rates}"
    print(machine)
    for name in args.tables or TABLES:
        make, header = TABLES[name]
        found = {"machine": machine, **table(make.__doc__.splitlines()[0], header, make())}
        OUT.mkdir(exist_ok=True)
        (OUT / f"benchmark-{name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
