"""python -m experiments NAME: measure what README.md and experiments/README.md claim.

Prints a Markdown table, and writes it to --out/NAME.json with commit, machine, seed and flags.
With flags of their own (-h): predict, second_judge, benchmark, interruptions; tables has none.
"""
import argparse
import sys
from pathlib import Path

import torch

import guide
import sample
from experiments import (ablations, benchmark, clip, ddpm, english, evaluator, figures, guidance,
                         interruptions, latents, photographs, second_judge, tables, unclip,
                         zeroshot)
from infra import cli

EXPERIMENTS = {   # (models, args) -> rows of a table
    "clip": clip.zero_shot, "ddpm": ddpm.unguided_quality, "judges": second_judge.judges,
    "guidance": guidance.compare_methods, "sweep": guidance.sweep, "failures": guidance.failures,
    "english": english.english, "zeroshot": zeroshot.zero_shot,
    "prior": unclip.priors, "decoder": unclip.decoder, "embeddings": unclip.embeddings,
    "upsampler": unclip.upsamplers, "latents": latents.latents, "poster": photographs.poster,
    "curve": photographs.curve, "ablations": ablations.ablations,
    "composition": ablations.composition,
    "figures": figures.figures}
STANDALONE = {   # list of arguments -> None
    "predict": zeroshot.predict_file,
    "second_judge": second_judge.train_second_judge, "benchmark": benchmark.main,
    "interruptions": interruptions.main, "tables": tables.write_tables}


def parse_args(arguments):
    names = "".join(f"    {name:13}{function.__doc__.splitlines()[0]}\n"
                    for name, function in EXPERIMENTS.items())
    parser = cli.Parser("python -m experiments", description=f"{__doc__}\n{names}",
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, sample.SamplingConfig(batch=49)
    add("name", choices=[*EXPERIMENTS, *STANDALONE])
    add("--methods", nargs="+", choices=[*evaluator.METHODS, *guidance.BEST_OF], metavar="METHOD",
        default=["none", "noise-unaware", "noise-aware", guide.DEFAULT], help="of guidance")
    add("--scales", type=float, nargs="+", help="of guidance; default: each method's own")
    add("--prompts", default="all", choices=guidance.PROMPTS, help="tune on half of the captions")
    add("--each", type=int, default=1, help="samples of each caption")
    add("--interval", type=int, nargs=2, metavar=("LO", "HI"), help="timesteps with guidance")
    for name, kind in (("steps", int), ("eta", float), ("recurrence", int),
                       ("autoguidance", float), ("seed", int), ("batch", int)):
        add(f"--{name}", type=kind, default=getattr(default, name), help="see sample.py")
    for kind in ("clip", "ddpm", "weak", "prior", "upsampler", "judge"):
        add(f"--{kind}", help="its weights.pt; default: as sample.py")
    add("--out", type=Path, default="out", help="folder for tables and images")
    add("--device", default="auto", help="auto is the first of cuda, mps, cpu")
    args = parser.parse_args(arguments)
    cli.check_ranges(args, each=(1, 1000))
    if "unclip" in args.methods and set(args.methods) - {"none", "unclip"}:
        raise cli.UserError("unclip has a U-Net of its own: compare it with none in one command, "
                            "other methods in another")
    evaluator.sampling_config(args)   # checks them
    return args


def main(arguments):
    if arguments and arguments[0] in STANDALONE:
        return STANDALONE[arguments[0]](arguments[1:])
    args = parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = cli.pick_device(args.device)
    with torch.no_grad(), cli.autocast(device):
        decodes = args.name in ("prior", "decoder") or "unclip" in args.methods
        models = sample.load_models(args.clip, args.ddpm, args.weak, args.prior, args.upsampler,
                                    device, "unclip" if decodes else guide.DEFAULT)
        if args.name in ("prior", "upsampler") and not getattr(models, args.name):
            raise cli.UserError(f"{args.name} needs a trained one: python train.py {args.name} -h")
        print(models.description)
        sample.fill_in(evaluator.sampling_config(args), models)   # UserError for what they lack
        tables.record(EXPERIMENTS[args.name](models, args), args.name, args, device)


if __name__ == "__main__":
    cli.run_command(lambda: main(sys.argv[1:]))
