"""What the tables are made of; test_commands.py draws whole ones."""
import argparse

import pytest
import torch

import data
import measure
import tables


def test_calibration_error_by_hand():
    """Four answers: two given with 95 %, of which one is right, two with 52 %, of which both are:
    half of |.5 - .95| and half of |1 - .52|."""
    sure, unsure = [0.95, 0.05], [0.48, 0.52]
    probabilities = torch.tensor([sure, sure, unsure, unsure])
    error = tables.calibration_error(probabilities, torch.tensor([0, 1, 1, 1]), bins=10)
    assert error == pytest.approx((0.45 + 0.48) / 2, abs=1e-6)


def test_real_pictures_are_of_their_captions_and_never_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(measure, "REAL", 400)
    dataset = data.load("cars", 8, 800, "validation")
    common = [k for k in range(294) if (dataset.caption_of == k).sum() >= 4][:20]
    models = argparse.Namespace(
        data="cars", captions=dataset.captions,
        unet=argparse.Namespace(config=argparse.Namespace(image_size=8)))
    targets, args = torch.tensor(common * 2), argparse.Namespace(each=2)
    first, others = (measure.real_pictures(models, targets, args, skip) for skip in (0, 2))
    place = {picture.tobytes(): k for picture, k in zip(dataset.pictures, dataset.caption_of)}
    assert [place[picture.tobytes()] for picture in first] == targets.tolist()
    assert len({picture.tobytes() for picture in [*first, *others]}) == 80


def test_what_was_drawn_is_kept_by_all_that_decides_it(clip, unet):
    """Weights, captions and prior. Two rows that differ in the prior alone once shared a key."""
    models = argparse.Namespace(clip=clip, unet=unet, captions=["a", "b"],
                                log_prior=torch.zeros(2))
    known = measure.fingerprint(models)
    assert measure.fingerprint(models) == known
    models.log_prior = torch.tensor([0., 1.])
    other = measure.fingerprint(models)
    models.captions = ["b", "a"]
    swapped = measure.fingerprint(models)
    clip.log_scale.data += 1
    assert len({known, other, swapped, measure.fingerprint(models)}) == 4
