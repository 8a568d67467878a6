import math

import pytest
import torch
import torch.nn.functional as F

import cars
import data
import tinyclip
from bpe import Tokenizer


def test_attention_against_torch():
    torch.manual_seed(0)
    for causal in (False, True):
        attention = tinyclip.Attention(24, 3, causal)
        x = torch.randn(2, 5, 24)
        q, k, v = (p.view(2, 5, 3, 8).transpose(1, 2) for p in attention.qkv(x).chunk(3, dim=-1))
        expected = (F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                    .transpose(1, 2).reshape(2, 5, 24))
        assert torch.allclose(attention(x), attention.out(expected), atol=1e-6)


def test_the_first_tokens_alone_become_what_they_would_among_all():
    torch.manual_seed(0)
    for causal in (False, True):
        block = tinyclip.TransformerBlock(24, 3, causal)
        x = torch.randn(2, 5, 24)
        whole = block(x)
        assert whole.shape == x.shape and not torch.allclose(whole, x, atol=0.01)
        for n in (1, 3, 5):
            assert torch.allclose(block(x, n), whole[:, :n], atol=1e-6)


def test_text_features_do_not_change_with_padding_or_company(clip):
    texts = ["a red car", "a white and red sports car"]
    with torch.no_grad():
        both = clip.encode_text(clip.tokenizer.batch(texts, 16))
        shorter = clip.encode_text(clip.tokenizer.batch(texts, 9))
        alone = clip.encode_text(clip.tokenizer.batch(texts[:1], 16))
    assert torch.isfinite(both).all()
    assert torch.allclose(both, shorter, atol=1e-6) and torch.allclose(both[:1], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_order_of_words_matters(clip):
    with torch.no_grad():
        a, b = clip.encode_text(clip.tokenizer.batch(
            ["a white and red car", "a red and white car"], 16))
    assert (a - b).abs().max() > 1e-3


def test_no_time_is_time_zero_and_time_matters(clip):
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 0])
    with torch.no_grad():
        assert torch.equal(clip.encode_image(x), clip.encode_image(x, t))
        assert not torch.allclose(clip.encode_image(x), clip.encode_image(x, t + 500), atol=1e-3)
        assert (clip.logit_scale(t).shape == (2, 1)
                and clip.logit_scale(t)[0] != clip.logit_scale(t + 500)[0])


def test_pictures_of_a_batch_do_not_interact(clip):
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 10, 700])
    with torch.no_grad():
        assert torch.allclose(clip.encode_image(x, t)[1:2],
                              clip.encode_image(x[1:2], t[1:2]), atol=1e-5)


def test_logits_are_scaled_cosines(clip, text_features):
    image_features, t = torch.randn(4, 16), torch.tensor([0, 1, 500, 1000])
    logits = clip.logits(image_features, text_features, t)
    cosine = F.cosine_similarity(image_features[:, None], text_features[None], dim=-1)
    assert torch.allclose(logits, clip.logit_scale(t) * cosine, atol=1e-4)
    assert torch.allclose(clip.logits(3 * image_features, text_features, t), logits, atol=1e-4)
    torch.nn.init.constant_(clip.log_scale, 50.)
    assert clip.logit_scale(t).max() <= clip.config.max_logit_scale * 1.0001


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_loss_at_start_is_about_chance(stem):
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(cars.CAPTIONS, 4096)
    clip = tinyclip.CLIP(
        tinyclip.CLIPConfig(stem=stem, image_size=16, width=64, layers=1, heads=2), tokenizer)
    t = torch.randint(1, 1001, (16,))
    logits = clip.logits(clip.encode_image(torch.randn(16, 3, 16, 16), t),
                         clip.encode_text(tokenizer.batch(cars.CAPTIONS, 16)), t)
    loss = F.cross_entropy(logits, torch.randint(294, (16,)))
    assert loss.item() == pytest.approx(math.log(294), abs=1.5)


def test_clip_loss_is_the_papers_loss_when_the_captions_are_the_batchs_own():
    """K = B, picture i has caption i: both terms are the cross-entropies of the pseudocode in
    fig. 3 of the paper."""
    torch.manual_seed(0)
    logits, own = torch.randn(6, 6), torch.arange(6)
    rows, columns = F.cross_entropy(logits, own), F.cross_entropy(logits.T, own)
    every, nothing = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    assert torch.allclose(tinyclip.clip_loss(logits, own, every),
                          rows + tinyclip.TEXT_TO_IMAGE * columns)
    assert torch.allclose(tinyclip.clip_loss(logits, own, nothing), rows)


def test_text_to_image_accepts_every_picture_of_a_caption():
    """Two pictures of one caption share the mass: with equal logits the loss is log 3 among three,
    floor log 2 for the pair."""
    logits = torch.zeros(3, 2)
    logits[:2, 0] = 50.
    own, every = torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.bool)
    got = tinyclip.clip_loss(logits, own, every) - F.cross_entropy(logits, own)
    assert got.item() == pytest.approx(
        tinyclip.TEXT_TO_IMAGE * (math.log(2) + math.log(3)) / 2, abs=1e-4)


def test_learning():
    """Sixteen pictures with different captions, clean and noised, are told apart after a few
    steps."""
    torch.manual_seed(0)
    pictures, labels = cars.render(0, range(16), 16)
    x, captions = data.to_float(pictures), sorted({cars.caption(*row) for row in labels})
    own = torch.tensor([captions.index(cars.caption(*row)) for row in labels])
    tokenizer = Tokenizer.train(captions, 4096)
    clip = tinyclip.CLIP(
        tinyclip.CLIPConfig(width=64, layers=1, heads=2, text_layers=1, image_size=16), tokenizer)
    tokens, optimizer = tokenizer.batch(captions, 16), torch.optim.AdamW(clip.parameters(), 5e-4)
    clean = torch.ones(16, dtype=torch.bool)
    for _ in range(60):
        logits = clip.logits(clip.encode_image(x), clip.encode_text(tokens))
        optimizer.zero_grad()
        tinyclip.clip_loss(logits, own, clean).backward()
        optimizer.step()
    assert (logits.argmax(1) == own).float().mean() > 0.9
