"""What the tables are made of; test_commands.py draws whole ones."""
import argparse

import pytest
import torch

import cars
import data
import guide
import measure
import tables
import variants


def test_calibration_error_by_hand():
    """Four answers: two given with 95 %, of which one is right, two with 52 %, of which both are:
    half of |.5 - .95| and half of |1 - .52|."""
    sure, unsure = [0.95, 0.05], [0.48, 0.52]
    probabilities = torch.tensor([sure, sure, unsure, unsure])
    error = tables.calibration_error(probabilities, torch.tensor([0, 1, 1, 1]), bins=10)
    assert error == pytest.approx((0.45 + 0.48) / 2, abs=1e-6)


def test_reliability_by_hand():
    """Of two answers given with 95 % one is right, of two with 52 % both are."""
    sure, unsure = [0.95, 0.05], [0.48, 0.52]
    probabilities = torch.tensor([sure, sure, unsure, unsure])
    curve = tables.reliability(probabilities, torch.tensor([0, 1, 1, 1]), bins=10)
    expected = torch.tensor([[0.52, 0.95], [1., 0.5], [0.5, 0.5]])
    assert torch.allclose(torch.stack(curve), expected)


def test_recall_by_hand():
    """Three pictures of captions 1, 0, 0; nobody shows caption 2."""
    logits = torch.tensor([[0., 3., 1.], [2., 0., 1.], [0., 5., 1.]])
    shares = tables.found(logits, torch.tensor([1, 0, 0]))
    assert shares["captions@1"] == pytest.approx(2 / 3)   # the third is taken for caption 1
    assert shares["captions@5"] == 1                      # of three
    assert shares["pictures@1"] == 0.5   # caption 0 finds the second, caption 1 the third
    assert shares["pictures@5"] == 1


def test_word_order_by_hand():
    """A white and red car, taken for a red and white one, and a red one, which has no order."""
    labels = torch.from_numpy(cars.caption_labels(torch.arange(294).numpy()))
    white_red, red_white, red = (cars.CAPTIONS.index(f"a {c} car")
                                 for c in ("white and red", "red and white", "red"))
    logits = torch.zeros(2, 294)
    truth = torch.tensor([white_red, red])
    for better, share in ((white_red, 1.), (red_white, 0.)):
        logits[0] = 0
        logits[0, better] = 1
        assert tables.right_order(logits, truth, labels) == share


def test_paraphrases_say_the_same_in_other_words():
    white_red, red = (cars.caption_labels(cars.CAPTIONS.index(f"a {c} sports car"))
                      for c in ("white and red", "red"))
    assert tables.paraphrase(white_red) == "a sports car that is white with a red roof"
    assert tables.paraphrase(red) == "a sports car that is red"


def test_the_sweep_starts_from_the_default(clip, unet, text_features, alpha_bar):
    """With nothing exchanged, its softmax is that of guide.contrastive; no rival leaves the logit;
    and tau2 is what its formula says."""
    torch.manual_seed(0)
    x, t, target = torch.randn(2, 3, 16, 16), torch.tensor([300, 700]), torch.tensor([5, 77])
    prior = torch.randn(294)
    models = argparse.Namespace(clip=clip, text_features=text_features, log_prior=prior,
                                captions=cars.CAPTIONS, alpha_bar=alpha_bar)
    # Looking ahead by nothing, at x_t itself, so that only the softmax is compared.
    value = lambda **parts: variants.ahead_with(models, target, share=1., **parts)(x, t, x)
    with torch.no_grad():
        usual = guide.contrastive(clip, text_features, target, prior)(x, t, None)
        logits = clip.logits(clip.encode_image(x, t), text_features, t) + prior
        own = logits[[0, 1], target]
        assert torch.allclose(value(), usual, atol=1e-4)
        assert torch.allclose(value(rivals=0), own, atol=1e-4)
        assert torch.allclose(value(tau2=.5), own - (logits / 2).exp().sum(1).log(), atol=1e-4)
        near = torch.nn.functional.normalize(text_features, dim=1)
        other = near[target] @ near.T
        for i in (0, 1):   # the nearest that is not the target itself
            other[i, target[i]] = -2
        pair = torch.stack([own, logits[[0, 1], other.argmax(1)]], dim=1)
        assert torch.allclose(value(rivals=1), 5 * (pair / 5).log_softmax(1)[:, 0], atol=1e-4)


def test_factored_guidance_sums_over_whatever_has_an_attribute(clip, text_features, alpha_bar):
    """By hand: p(body) p(main) p(second), each a sum over captions, of the softened softmax."""
    torch.manual_seed(0)
    x, t, target = torch.randn(1, 3, 16, 16), torch.tensor([300]), torch.tensor([77])
    models = argparse.Namespace(clip=clip, text_features=text_features, log_prior=torch.zeros(294),
                                alpha_bar=alpha_bar)
    with torch.no_grad():
        found = variants.factored(models, target)(x, t, torch.zeros_like(x))
        eps_hat = x / (1 - alpha_bar[300]).sqrt()   # of an x_0_hat that is zero
        sooner = torch.tensor([225])
        x_225 = (1 - alpha_bar[225]).sqrt() * eps_hat
        logits = clip.logits(clip.encode_image(x_225, sooner), text_features, sooner)
        p = (logits[0] / 5).softmax(0)
    product = 1.
    for attribute in range(3):
        same = [i for i, labels in enumerate(cars.caption_labels(torch.arange(294).numpy()))
                if labels[attribute] == cars.caption_labels(77)[attribute]]
        product *= p[same].sum()
    assert torch.allclose(found, 5 * product.log(), atol=1e-4)


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
