"""Every command as a user runs it, at toy size, in a folder of its own."""
import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import cars
import checkpoints
import data
import evaluate
import guide
import judge
import measure
import sample
import suspects
import sweeps
import tables
import tinyddpm
import train

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "weights"
TINY = {
    "clip": "--pictures 64 --batch 8 --width 32 --layers 1 --heads 2 --text-width 32 "
            "--text-layers 1 --text-heads 2 --embed-dim 16 --image-size 16",
    "ddpm": "--pictures 64 --batch 8 --channels 16 --multipliers 1 2 --attention 1 --image-size 16",
    "judge": "--pictures 64 --batch 8 --width 8 --size 16",
}


def run(folder, command, code=0):
    program, *arguments = command.split("|") if "|" in command else command.split()
    done = subprocess.run([sys.executable, str(ROOT / program), *arguments],
                          cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which toy models of every kind have been trained; of one kind by the command, of
    the others in this process, which need not import torch again."""
    folder = tmp_path_factory.mktemp("toys")
    assert "finished" in run(folder, f"train.py clip --steps 4 {TINY['clip']} --device cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind in ("ddpm", "judge"):
            train.main(f"{kind} --steps 4 {TINY[kind]} --device cpu".split())
    assert all((folder / "runs" / kind / "weights.pt").exists() for kind in TINY)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """In this process, in the folder of the toy models; of real cars no more than it takes to have
    one of each caption."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(measure, "REAL", 1900)
    monkeypatch.setattr(measure, "HELD_OUT", 100)
    return folder


def test_a_run_leaves_its_curve_and_a_finished_run_says_so(here, capsys):
    for name in ("clip/loss.png", "clip/accuracy.png", "ddpm/samples.png"):
        assert Image.open(here / "runs" / name).width > 16
    train.main(f"clip --steps 4 {TINY['clip']} --device cpu".split())
    assert "is finished" in capsys.readouterr().out


def test_other_settings_do_not_go_on_silently(here):
    with pytest.raises(data.UserError, match=r"another batch \(8, now 9\)"):
        train.main(f"clip --steps 4 {TINY['clip']} --device cpu --batch 9".split())


def test_stop_and_start_is_bit_identical(here, capsys):
    """Stopped by --minutes after its first step and started again, a run ends where one that ran
    through ends. (test_killed.py does it the hard way.)"""
    command = f"clip --steps 4 {TINY['clip']} --device cpu --out".split()
    train.main([*command, "whole"])
    train.main([*command, "parts", "--minutes", "0.00001"])
    assert "stopped at step 1 of 4" in capsys.readouterr().out
    train.main([*command, "parts"])
    assert "going on in parts at step 2 of 4" in capsys.readouterr().out
    parts, whole = (torch.load(f"{out}/checkpoint.pt", weights_only=True)
                    for out in ("parts", "whole"))
    for part in ("model", "ema"):
        assert all(torch.equal(tensor, parts[part][name]) for name, tensor in whole[part].items())
    assert parts["step"] == whole["step"] == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
def test_a_terminated_run_says_how_to_go_on(folder):
    """After its first preview: it ends with the signal's code, one line and a checkpoint of its
    last step."""
    command = f"train.py clip --steps 400 {TINY['clip']} --device cpu --out terminated"
    program, *arguments = command.split()
    running = subprocess.Popen([sys.executable, str(ROOT / program), *arguments],
                               cwd=folder, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    while "step 50:" not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    running.terminate()
    out, error = running.communicate(timeout=300)
    step = torch.load(folder / "terminated/checkpoint.pt", weights_only=True)["step"]
    assert running.returncode == 143 and 50 <= step < 400 and "Traceback" not in error
    assert out.strip() == f"stopped at step {step} of 400; the same command goes on"


def stop_in_step(monkeypatch, number, *signals):
    """Let these signals arrive in the middle of that step."""
    honest = train.train_step

    def interrupted(run, step, *rest):
        for one in signals if step == number else ():
            signal.raise_signal(one)
        return honest(run, step, *rest)

    monkeypatch.setattr(train, "train_step", interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_at_hand(here, monkeypatch, capsys, number, code):
    """The step is finished and saved, and what else would be told of the signal is told again."""
    stop_in_step(monkeypatch, 3, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match=str(code)):
        train.main(f"ddpm --steps 9 {TINY['ddpm']} --device cpu --out {number.name}".split())
    assert "stopped at step 3 of 9; the same command goes on" in capsys.readouterr().out
    assert torch.load(f"{number.name}/checkpoint.pt", weights_only=True)["step"] == 3
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_at_once(here, monkeypatch):
    stop_in_step(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.main(f"ddpm --steps 9 {TINY['ddpm']} --device cpu --out twice".split())
    assert not Path("twice/checkpoint.pt").exists()


@pytest.mark.parametrize("save_every, kept", [(0, 5), (1000, None)])
def test_a_loss_that_is_not_finite_ends_the_run(here, monkeypatch, save_every, kept):
    """The step is named; what was saved before stays as it was."""
    honest = train.train_step

    def diverging(run, step, *rest):
        result = honest(run, step, *rest)
        return torch.tensor([0.5, math.nan]) if step == 6 else result

    monkeypatch.setattr(train, "train_step", diverging)
    command = f"ddpm --steps 9 {TINY['ddpm']} --device cpu --out diverging{save_every}"
    with pytest.raises(data.UserError, match="not finite at step 6; diverging.* half the --lr"):
        train.main([*command.split(), "--save-every", str(save_every)])
    path = Path(f"diverging{save_every}/checkpoint.pt")
    assert (torch.load(path, weights_only=True)["step"] if path.exists() else None) == kept


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_disk_that_is_full_in_mid_run(here, capsys):
    """One line, exit code 2, and what was saved before is still whole."""
    import resource
    command = f"ddpm --steps 9 {TINY['ddpm']} --device cpu --out full".split()
    train.main([*command, "--minutes", "0.00001"])
    before = Path("full/checkpoint.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))   # bytes per file
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *command],
                          preexec_fn=limit, capture_output=True, text=True)
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("train.py: cannot write full/")
    assert Path("full/checkpoint.pt").read_bytes() == before
    assert not list(Path("full").glob("*.tmp"))
    capsys.readouterr()
    train.main(command)
    assert "going on in full at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("command, message", [
    ("clip --minutes 0", "--minutes must be more than 0, not 0.0"),
    ("clip --minutes nan", "--minutes must be"), ("clip --steps 0", "--steps must be at least 1"),
    ("clip --batch 0", "--batch must be"), ("clip --pictures -5", "--pictures must be"),
    ("clip --lr nan", "--lr must be"), ("clip --seed -1", "--seed must be"),
    ("clip --preset huge", "'huge'"), ("clip --steps many", "'many'"),
    ("clip --labels odd", "--labels must be one of balanced, shapenet"),
    ("clip --stem foo", "stem must be"), ("clip --heads 3", "multiple of heads"),
    ("clip --heads 0", "at least 1"), ("clip --clean nan", "--clean"),
    ("clip --image-size 30", "no multiple of patch"),
    ("clip --patch 3 --image-size 33", "power of two"),
    ("ddpm --channels 40", "multiple of 16"), ("ddpm --attention 7", "levels 0 to 2"),
    ("ddpm --image-size 30", "cannot be halved 2 times"), ("ddpm --dropout 5", "dropout must be"),
    ("ddpm --channels 16 --multipliers 1 --attention 0", "of 32 where there is attention"),
    ("judge --net huge", "net must be"), ("judge --width 56", "multiple of 16"),
    ("judge --width 0", "multiple of 16"), ("judge --dropout 5", "dropout must be")])
def test_nothing_can_be_trained_like_this(command, message):
    with pytest.raises(data.UserError, match=message):
        train.parse(command.split())


@pytest.mark.parametrize("command, message", [
    ("train.py ddpm --minutes nan", "--minutes must be"),
    ("sample.py --steps 0", "--steps must be"),
    ("evaluate.py nothing", "invalid choice: 'nothing'")])
def test_such_a_number_is_refused_in_one_line(tmp_path, command, message):
    error = run(tmp_path, command, code=2)
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_flags_change_the_preset(capsys):
    """Given flags replace the preset's values and no others; -h lists the fields of both
    configs."""
    args, config, options = train.parse(
        "ddpm --channels 48 --multipliers 1 2 --attention 1 --lr 0.002".split())
    assert (config.channels, config.multipliers, config.blocks,
            options.lr, options.batch) == (48, (1, 2), 1, 0.002, 32)
    assert args.out == "runs/ddpm"
    with pytest.raises(SystemExit, match="0"):
        train.parse(["ddpm", "-h"])
    out = capsys.readouterr().out
    assert "--channels" in out and "--weight-decay" in out and "--clean" not in out


def test_sample_with_the_trained_models(here, capsys):
    out = run(here, "sample.py|white and RED car|-n|3|--steps|3|--gif|--device|cpu|--batch|2")
    assert "CLIP from runs/clip/weights.pt" in out.replace("\\", "/") and "probability" in out
    image = Image.open("out/white-and-red-car.png")
    assert (image.text["prompt"] == "white and RED car" and image.text["seed"] == "0"
            and image.text["method"] == guide.DEFAULT)
    # 2 of x_t (--batch), below them 2 of x_0_hat; 3 steps, all but the last taken twice
    gif = Image.open("out/white-and-red-car.gif")
    assert gif.n_frames == 5 and gif.width == gif.height
    sample.main("-n 1 --steps 2 --device cpu".split())
    assert "unguided" in capsys.readouterr().out


def test_new_words_are_named_and_new_captions_join(here, capsys):
    sample.main(["a purple car", "-n", "1", "--steps", "2", "--device", "cpu"])
    out, error = capsys.readouterr()
    assert "'purple'" in error and "'car'" not in error and "among 295 captions" in out


def test_a_prompt_of_ten_thousand_characters(here, capsys):
    sample.main(["wheel " * 1667, "-n", "1", "--steps", "2", "--device", "cpu", "--out", "x.png"])
    out, error = capsys.readouterr()
    assert "CLIP reads its first 14 tokens" in error and "CLIP never read 'wheel';" in error
    assert max(map(len, (out + error).splitlines())) < 1000 and Path("x.png").exists()


def test_several_prompts_start_from_the_same_noise(here):
    sample.main("red bus|A blue van|-n|2|--steps|2|--scale|0|--device|cpu|--out|several".split("|"))
    images = [Image.open(here / "several" / f"{name}.png") for name in ("red-bus", "blue-van")]
    assert [image.text["prompt"] for image in images] == ["red bus", "A blue van"]
    assert images[0].tobytes() == images[1].tobytes()
    args = sample.parse(["red bus 3", "red bus", "a red bus", "the red bus"])
    assert len(set(sample.paths(args))) == 4
    sample.main("red bus|A red bus|blue van|-n|1|--steps|5|--device|cpu|--out|several".split("|"))
    images = [Image.open(here / "several" / f"{name}.png").tobytes()
              for name in ("red-bus", "red-bus-2", "blue-van")]
    assert images[0] == images[1] != images[2]


@pytest.mark.parametrize("method", [name for name in guide.METHODS if name != "classifier-free"])
def test_every_method_samples(here, capsys, method):
    sample.main(["red bus", "-n", "1", "--steps", "2", "--method", method, "--recurrence", "2",
                 "--device", "cpu", "--out", "m.png"])
    assert f"(2 x 2 steps, {method}, scale" in capsys.readouterr().out
    assert Image.open("m.png").text["recurrence"] == "2"


def test_classifier_free_needs_a_ddpm_that_was_told_captions(here, capsys):
    flags = "-n 1 --steps 2 --method classifier-free --device cpu --out m.png".split()
    with pytest.raises(data.UserError, match="train.py ddpm --text"):
        sample.main(["red bus", *flags])
    train.main(f"ddpm --text --steps 2 {TINY['ddpm']} --device cpu --out told".split())
    flags += ["--ddpm", "told/weights.pt"]
    sample.main(["red bus", *flags])
    assert "classifier-free, scale" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="'purple bus' is none of the 294 captions"):
        sample.main(["purple bus", *flags])


def test_photographs_from_folder_to_picture(here, tmp_path, monkeypatch, capsys):
    """Class folders train all three models as they come; prompts find their class, and a judge of
    the same pictures is the one that is asked."""
    for name, colour in (("fire_truck", (200, 0, 0)), ("airplane", (0, 0, 200))):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(150):
            picture = Image.new("RGB", (20, 16), tuple(min(255, c + i) for c in colour))
            picture.save(tmp_path / "photos" / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for kind, flags in TINY.items():
        train.main(f"{kind} --data photos/ --steps 3 {flags} --device cpu".split())
        out = capsys.readouterr().out
        assert "train: found" in out or kind == "judge"
        assert "2 captions (class folders); first three: " in out and "finished" in out
    sample.main("airplane -n 2 --steps 2 --device cpu".split())
    out, error = capsys.readouterr()
    assert "'a photo of an airplane'" in out and "class" in out and not error
    assert "the judge finds all of it right in" in out

    # Two captions, each with a handful of held-out pictures: small numbers everywhere.
    monkeypatch.setattr(tables, "STEPS", (2,))
    monkeypatch.setattr(measure, "POOL", 16)
    monkeypatch.setattr(sweeps, "SWEEPS", {"rivals": [9], "temperature": [2.]})
    for table in ("clip", "ddpm", "judge", "guidance --methods none best-of-4", "sweep",
                  "failures --each 4"):
        evaluate.main(f"{table} --steps 2 --device cpu".split())
    assert "probe" in rows_of("clip")[-1] and "order" not in rows_of("clip")[-1]
    assert [row["kid"] for row in rows_of("guidance")] == [None] * 3   # of two pictures
    for table in ("suspects", "composition"):
        with pytest.raises(data.UserError, match="about the car world"):
            evaluate.main([table, "--device", "cpu"])


def test_other_captions_are_another_run(here, tmp_path, monkeypatch):
    """Even if there are as many of them, and the first ones are the same."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(60):
        Image.new("RGB", (16, 16)).save(photos / f"{i:02d}.png")
        (photos / f"{i:02d}.txt").write_text(f"a thing of number {i}")
    monkeypatch.chdir(tmp_path)
    command = f"clip --data photos --steps 2 {TINY['clip']} --device cpu".split()
    train.main(command)
    (photos / "59.txt").write_text("what is this?")
    with pytest.raises(data.UserError, match="another captions' checksum"):
        train.main(command)


def test_real_captions_have_no_judge(here, tmp_path, monkeypatch):
    for i in range(60):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a thing")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UserError, match="name no attributes"):
        train.main(f"judge --data . --steps 3 {TINY['judge']} --device cpu".split())


def test_where_processes_are_spawned(here, tmp_path):
    """As on Windows and macOS: rendering and packing work from a script with the usual guard."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    script = tmp_path / "script.py"
    script.write_text(f"""if __name__ == "__main__":
    import multiprocessing, pathlib, sys
    sys.path.insert(0, {str(ROOT)!r})
    multiprocessing.set_start_method("spawn")
    import data, folders, packing
    print(len(data.load("cars", 8, 20).pictures))
    packing.pack([pathlib.Path("a.png")], folders.read_some, 8, pathlib.Path("packed.raw"))
    print(pathlib.Path("packed.raw").stat().st_size)
""")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout.split() == ["20", "192"], done.stderr


@pytest.mark.parametrize("arguments, message", [
    ("-n|0", "-n must be"), ("--steps|0", "--steps must be"), ("--steps|1001", "--steps must be"),
    ("--eta|2", "--eta must be"), ("--interval|900|100", "--interval must be"),
    ("--scale|nan", "--scale must be"), (" ", "prompt is empty"),
    ("a car|--clip|none.pt", "there is no file none.pt"),
    ("a car|--clip|runs/ddpm/weights.pt", "holds 'ddpm'"),
    ("a car|--device|gpu7", "--device gpu7"), ("-n|-3", "-n must be"), ("-n|x", "invalid int"),
    ("--steps|5000", "--steps must be"), ("--recurrence|0", "--recurrence must be"),
    ("a car|--out|a.jpg", "end it in .png"), ("a car|--judge|none.pt", "no file none.pt"),
    ("a car|--method|magic", "invalid choice: 'magic'"), ("a car|--colour", "unrecognized"),
    ("\t&nbsp; ", "prompt is empty")])
def test_mistakes_are_named(here, arguments, message):
    with pytest.raises(data.UserError, match=message):
        sample.main(arguments.split("|"))


@pytest.mark.parametrize("program, arguments, message", [
    (sample, "a car|--clip|none.pt", "none.pt"), (sample, "-n|1|--scale", "expected one argument"),
    (sample, "-n|1|--steps|1|--out|file/a.png", "file"), (train, "ddpm|--out|file/a", "file"),
    (train, "nothing", "invalid choice: 'nothing'"), (evaluate, "clip|--out|file/a", "file")])
def test_a_mistake_is_answered_in_one_line_and_with_code_2(here, monkeypatch, capsys, program,
                                                           arguments, message):
    Path("file").write_text("no folder")
    monkeypatch.setattr(sys, "argv", [program.__file__, *arguments.split("|")])
    with pytest.raises(SystemExit, match="2"):
        data.command(program.main)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def rows_of(table):
    return json.loads(Path(f"out/{table}.json").read_text())["rows"]


def test_tables(here, monkeypatch):
    for module, name, small in (
            (measure, "POOL", 64), (tables, "EXAM", 120), (tables, "PROBED", 60),
            (tables, "TRAINED", 60), (tables, "STEPPED", 16), (tables, "STEPS", (1, 3))):
        monkeypatch.setattr(module, name, small)
    for table in ("clip", "ddpm", "judge", "figure"):
        evaluate.main(f"{table} --judge runs/judge/weights.pt --steps 3 --device cpu".split())
    rows = rows_of("clip")
    assert [row["t"] for row in rows] == [
        0, 50, *range(100, 1000, 100), 950, 0, 300, 500, 700] and "order" in rows[-1]
    rows = rows_of("ddpm")   # by time, then four sets of pictures, then steps x eta
    assert len(rows) == 6 + 4 + 4 and rows[7]["kid"] > rows[6]["kid"] and "steps" in rows[-1]
    assert rows_of("judge")[0]["samples"] == 120
    assert Image.open("out/figure.png").width > 300

    guidance = ("guidance --methods none x0 best-of-4 --judge runs/judge/weights.pt --steps 3 "
                "--recurrence 1 --prompts odd --device cpu")
    monkeypatch.setattr(sweeps, "HALVES", {"odd": slice(1, None, 6)})
    evaluate.main(guidance.split())
    rows = rows_of("guidance")
    assert [row["method"] for row in rows] == ["real", "none", "x0", "best-of-4"]
    assert all(row["samples"] == 49 for row in rows)
    assert [(row["unet_calls"], row["unet_backwards"]) for row in rows] == [
        (0, 0), (3, 0), (3, 2), (12, 0)]
    monkeypatch.setattr(measure, "draw", None)   # a second time, nothing is drawn
    evaluate.main(guidance.split())
    assert rows_of("guidance") == rows


def test_tables_of_other_trainings(here, monkeypatch, capsys):
    """Each looks for its own weights, and says how to train what is not there."""
    common = "--judge runs/judge/weights.pt --steps 2 --batch 252 --device cpu".split()
    one = suspects.Suspect("a tenth", clip="--steps 150")
    monkeypatch.setattr(suspects, "SUSPECTS", [suspects.Suspect("nothing"), one])
    evaluate.main(["suspects", *common])
    assert [row["changed"] for row in rows_of("suspects")] == ["nothing"]
    assert "first: python train.py clip --steps 150 --out runs/suspects/clip-steps-150" in (
        capsys.readouterr().out)

    for name in ("clip-clean-1", "clip-image-size-64", "clip-hold-out-white-red"):
        shutil.copytree("runs/clip", f"runs/suspects/{name}")
    monkeypatch.setattr(suspects, "SUSPECTS", [
        suspects.Suspect("the recipe", clip="--clean 1", method="original"),
        suspects.Suspect("the size", clip="--image-size 64")])
    evaluate.main(["suspects", *common])
    assert [row["samples"] for row in rows_of("suspects")] == [252, 252]
    monkeypatch.setattr(suspects, "UNSEEN", "white+red")
    evaluate.main(["composition", *common])
    rows = rows_of("composition")
    assert len(rows) == 8 and {row["held out of"] for row in rows} == {"neither", "CLIP"}
    assert all(row["samples"] == 12 for row in rows)   # six bodies, two orders


def test_sweeps_and_failures(here, monkeypatch):
    monkeypatch.setattr(sweeps, "SWEEPS", {
        "scale of ahead": [1., 2.], "share": [.5], "tau2": [.5], "eta": [0.],
        "interval": [(1, 900)], "steps, recurrence": [(1, 1)]})
    monkeypatch.setattr(sweeps, "HALVES", {"even": slice(0, None, 6)})
    monkeypatch.setattr(tables, "INVERTED", (2, 3))
    common = "--judge runs/judge/weights.pt --steps 2 --prompts even --device cpu"
    for table in ("sweep", "failures", "inversion"):
        evaluate.main([table, *common.split()])
    rows = rows_of("sweep")
    assert [row["unet_calls"] for row in rows] == [3, 3, 3, 3, 3, 3, 1]
    assert Image.open("out/trade-off.png").width > 300
    rows = rows_of("failures")
    assert rows[0]["samples"] == 49 == sum(
        row["samples"] for row in rows if row["wanted"].startswith("camera"))
    assert [row["steps"] for row in rows_of("inversion")] == [2, 3]


def test_real_pictures_of_a_clip_that_knows_fewer_captions(here, monkeypatch):
    """Captions are found by their text: the numbers of a CLIP's captions are its own."""
    train.main(f"clip --steps 2 --hold-out white+red {TINY['clip']} --device cpu --out few".split())
    models = checkpoints.load_pair("few/weights.pt", "runs/ddpm/weights.pt")
    assert len(models.captions) == 282
    dataset = data.load("cars", 16, measure.REAL, "validation")
    place = {picture.tobytes(): k for picture, k in zip(dataset.pictures, dataset.caption_of)}
    targets = torch.arange(282)
    real = measure.real_pictures(models, targets, argparse.Namespace(each=1))
    found = [dataset.captions[place[picture.tobytes()]] for picture in real]
    assert found == models.captions

    # The other way round: what the diffusion model never met is as probable as ever.
    less = f"ddpm --steps 2 --hold-out white+red {TINY['ddpm']} --device cpu --out less"
    train.main(less.split())
    models = checkpoints.load_pair("runs/clip/weights.pt", "less/weights.pt")
    assert len(models.captions) == 294 and models.log_prior.abs().max() < 1e-6


def test_evaluate_is_a_command(folder):
    run(folder, "evaluate.py figure --steps 5 --device cpu --out drawn")
    assert "commit" in json.loads((folder / "drawn/figure.json").read_text())


@pytest.mark.skipif(not (SHIPPED / "ddpm.pt").exists(), reason="no shipped weights")
def test_the_shipped_models_obey():
    """Of 16 guided samples at least 14 are right by the judge, of 16 unguided ones at most 3."""
    models = checkpoints.load_pair(SHIPPED / "clip.pt", SHIPPED / "ddpm.pt")
    grader, _ = checkpoints.load_model(SHIPPED / "judge.pt", "judge")
    target = models.captions.index("a white and red car")

    def right(name):
        generators = [data.generator(0, i) for i in range(16)]
        denoise = guide.guided_by(name, models, torch.full((16,), target))
        x_T = tinyddpm.noise(generators, (3, 32, 32))
        with data.autocast(x_T.device), torch.no_grad():
            x_0 = tinyddpm.sample(denoise, x_T, generators, models.alpha_bar, 25, recurrence=2)
        return int((judge.verdict(grader, x_0).numpy() == cars.caption_labels(target)).all(1).sum())

    assert right(guide.DEFAULT) >= 14
    assert right("none") <= 3
