"""Tokenizer, encoders and losses of CLIP against formulas, worked examples and known ids."""
import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F

import cars
import data
import tinyclip
from conftest import ROOT
from tinyclip import CLIP, CLIPConfig, Tokenizer, closed_set_loss, contrastive_loss

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"   # of github.com/openai/CLIP


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(cars.CAPTIONS, 4096)


@pytest.fixture(scope="module")
def published():
    for path in ROOT.parent.glob(f"*/openai_clip/{VOCABULARY}"):
        return Tokenizer.from_openai(path)
    pytest.skip(f"no {VOCABULARY} in a folder openai_clip beside the repository")


# ---- text and tokens -----------------------------------------------------------------------------

def test_published_vocabulary_gives_the_published_ids(published):
    """The example of CLIP's own README, and its prompts for CIFAR-10, have the ids they have there;
    special tokens in a text are ordinary characters."""
    assert published.vocab_size == 49408
    assert published.batch(["a diagram"], 77)[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert published.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert 49407 not in published.encode("<|endoftext|>")


def test_merges_of_a_small_corpus_by_hand():
    """Words: low x 3, lower x 1, slow x 2. l+o occurs 3 + 1 + 2 = 6 times and o+w</w> 3 + 2 = 5
    times, so "lo" comes first; then lo+w</w> (5), then s+low</w> (2)."""
    tokenizer = Tokenizer.train(["low low low lower slow slow"], 517)
    assert tokenizer.merges == [("l", "o"), ("lo", "w</w>"), ("s", "low</w>")]
    symbols = [tokenizer.symbols[i] for i in tokenizer.encode("slow lower")]
    assert symbols == ["slow</w>", "lo", "w", "e", "r</w>"]


def test_bpe_yields_every_merge():
    """A word starts as its bytes, the last one marked, and one merge is made at a time."""
    tokenizer = Tokenizer([("c", "a"), ("ca", "r</w>")])
    assert list(tokenizer.bpe("car")) == [("c", "a", "r</w>"), ("ca", "r</w>"), ("car</w>",)]
    assert list(tokenizer.bpe("cart")) == [("c", "a", "r", "t</w>"), ("ca", "r", "t</w>")]
    assert tinyclip.merge(("a", "a", "a"), ("a", "a")) == ("aa", "a")


def test_merges_have_the_order_of_training():
    """Where two merges overlap, the one that was learnt first is made."""
    pairs = [("a", "b"), ("b", "c</w>")]
    for merges, symbols in ((pairs, ("ab", "c</w>")), (pairs[::-1], ("a", "bc</w>"))):
        assert list(Tokenizer(merges).bpe("abc"))[-1] == symbols


def test_training_counts_as_a_plain_loop_does():
    """Tokenizer.train updates its counts of pairs from merge to merge; counted anew each time, the
    merges are the same."""
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 9))) for _ in range(20))
        words, merges = [Tokenizer.split(word) for word in text.split()], []
        while len(merges) < 30:
            pairs = [pair for word in words for pair in zip(word, word[1:])]
            if not pairs:
                break
            merges.append(max(pairs, key=lambda pair: (pairs.count(pair), pair)))
            words = [tinyclip.merge(word, merges[-1]) for word in words]
        assert merges and Tokenizer.train([text], 514 + 30).merges == merges


def test_every_known_word_is_one_token(tokenizer):
    """With enough ids, training goes on until each word of the texts is one symbol."""
    assert len(tokenizer.encode("a white and red sports car")) == 6


AWKWARD = [
    "", " ", "a white and red car", "naïve café", "赤い車", "빨간 자동차", "🚗🚙", "👩‍🔧 🇩🇪", "a\tb\n c",
    "x" * 500, "<|endoftext|>", "<|startoftext|> car", "'s 12 isn't", "&amp;amp;lt;b&amp;gt;",
    "schÃ¶n â€œquotedâ€\x9d", "ﬁne oﬃce", "e\u0301\u0323 a\u030a", "\ud83d", "a\ud800b",
    "\x00\x07\x1b[31m", "\u200b\u202e\ufeff", "½ ² Ⅷ ①", "</w>", "Ġ",
    "red-and_white/car!!", "İstanbul", "a car " * 1667]


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("which", ["tokenizer", "published"])
def test_decode_returns_what_was_encoded(which, request, text):
    """For any text, decoding returns the cleaned text but for spaces, and encoding that again gives
    the same ids, none of them start or end."""
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).replace(" ", "") == tinyclip.clean_text(text).replace(" ", "")
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert all(0 <= i < tokenizer.start for i in ids)


def test_every_byte_has_its_own_printable_character():
    """bytes_to_unicode can be inverted, and no character of it is white space."""
    characters = tinyclip.bytes_to_unicode()
    assert list(range(256)) == sorted(characters) and len(set(characters.values())) == 256
    assert all(c.isprintable() and not c.isspace() for c in characters.values())


def test_cleaning():
    """HTML, encoding errors, white space and case are repaired."""
    assert tinyclip.clean_text("  A &amp;amp; B\n\nc ") == "a & b c"
    assert tinyclip.clean_text("a<b &amp;amp; c") == "a<b & c"   # here ftfy leaves HTML alone
    assert tinyclip.clean_text("schÃ¶n") == "schön"


@pytest.mark.parametrize("prompt, normalized", [
    (" A  White and Red car", "white and red car"), ("white and red car", "white and red car"),
    ("the white and red car", "white and red car"), ("another car", "another car"),
    ("White & red car", "white and red car"), ("white+red car", "white and red car"),
    ("White/red-roofed  'car'!", "white red roofed car"), ("a_white_car.", "white car"),
    ('"An" (open) car: red, new?', "open car red new"), ("an 4x4 赤い Škoda", "4x4 赤い škoda"),
    ("a", "a"), ("the the car", "the car"), ("...", ""), (" & ", "and")])
def test_normalize_prompt(prompt, normalized):
    """Case, the first article and punctuation do not matter; & and + are "and"; / - _ part words;
    letters of any alphabet stay. What it returns, it leaves as it is, but for a second article."""
    assert tinyclip.normalize_prompt(prompt) == normalized
    assert normalized.startswith("the ") or tinyclip.normalize_prompt(normalized) == normalized


def test_batch_has_start_end_and_padding_and_truncates_before_the_end(tokenizer):
    """A short text is padded with zeros behind the end token, a long one loses its tail."""
    tokens = tokenizer.batch(["a car", "a white and red sports car"], 6)
    short, long = tokens.tolist()
    assert tokens.shape == (2, 6) and tokens.dtype == torch.long
    assert short == [tokenizer.start, *tokenizer.encode("a car"), tokenizer.end, 0, 0]
    assert long == [tokenizer.start, *tokenizer.encode("a white and red"), tokenizer.end]


# ---- the encoders --------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_torch(causal):
    """Attention is F.scaled_dot_product_attention of three heads, causal or not."""
    torch.manual_seed(0)
    attention = tinyclip.Attention(24, 3, causal)
    x = torch.randn(2, 5, 24)
    q, k, v = (p.view(2, 5, 3, 8).transpose(1, 2) for p in attention.qkv(x).chunk(3, dim=-1))
    values = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    expected = attention.out(values.transpose(1, 2).reshape(2, 5, 24))
    assert torch.isfinite(expected).all() and torch.allclose(attention(x), expected, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_the_first_n_tokens_are_the_same_alone(causal):
    """A block that computes its first n tokens only gives what it gives for them among all."""
    torch.manual_seed(0)
    block = tinyclip.TransformerBlock(24, 3, causal)
    x = torch.randn(2, 5, 24)
    whole = block(x)
    assert whole.shape == x.shape and not torch.allclose(whole, x, atol=0.01)
    for n in (1, 3, 5):
        assert torch.allclose(block(x, n), whole[:, :n], atol=1e-6)


def test_a_block_is_pre_ln():
    """x + attention(LN(x)), then x + MLP(LN(x))."""
    torch.manual_seed(0)
    block, x = tinyclip.TransformerBlock(24, 3, True), torch.randn(2, 5, 24)
    h = x + block.attention(block.ln_1(x))
    assert torch.allclose(block(x), h + block.mlp(block.ln_2(h)), atol=1e-6)


def test_quick_gelu():
    """It is x sigmoid(1.702 x), within 0.021 of GELU."""
    x = torch.linspace(-6, 6, 101)
    out = tinyclip.QuickGELU()(x)
    assert torch.allclose(out, x * torch.sigmoid(1.702 * x), atol=1e-6)
    assert (out - F.gelu(x)).abs().max() < 0.021


def test_text_features_do_not_depend_on_padding_or_other_texts(clip):
    """A text has the same features in a shorter context and alone; another text has others."""
    texts = ["a red car", "a white and red sports car"]
    with torch.no_grad():
        both = clip.encode_text(clip.tokenizer.batch(texts, 16))
        shorter = clip.encode_text(clip.tokenizer.batch(texts, 9))
        alone = clip.encode_captions(texts[:1])
    assert torch.isfinite(both).all()
    assert torch.allclose(both, shorter, atol=1e-6) and torch.allclose(both[:1], alone, atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_order_of_words_matters(clip):
    """The same words in another order have other features."""
    with torch.no_grad():
        a, b = clip.encode_captions(["a white and red car", "a red and white car"])
    assert (a - b).abs().max() > 1e-3


def test_no_t_is_t_0_and_t_matters(clip, text_features):
    """Without t, images count as clean; features and logit_scale change with t."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 32), torch.tensor([0, 0])
    with torch.no_grad():
        image_features = clip.encode_image(x)
        assert torch.isfinite(image_features).all()
        assert torch.allclose(image_features, clip.encode_image(x, t), atol=1e-5)
        assert not torch.allclose(image_features, clip.encode_image(x, t + 500), atol=1e-3)
        assert torch.allclose(clip.logits(image_features, text_features),
                              clip.logits(image_features, text_features, t), atol=1e-5)
        assert clip.logit_scale(t).shape == (2, 1)
        assert (clip.logit_scale(t) - clip.logit_scale(t + 500)).abs().min() > 1e-3


def test_times_and_logits_are_in_full_precision(clip, text_features):
    """Under autocast, too: bf16 would take neighbouring timesteps for equal."""
    t, image_features = torch.arange(1001), torch.randn(3, 16)
    quantities = lambda: (clip.time_embedding(t), clip.logit_scale(t), clip.logits(
        image_features, text_features.float(), torch.tensor([0, 500, 1000])))
    with torch.no_grad():
        expected = quantities()
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, quantities(), expected))
    assert len(expected[0].unique(dim=0)) == 1001


def test_image_encoder_by_hand(clip):
    """The class token with the time, then patches, row by row; plus positions; LayerNorm, blocks,
    LayerNorm of the class token, projection."""
    encoder = clip.image_encoder
    x, t = torch.randn(2, 3, 8, 32), torch.tensor([3, 700])
    with torch.no_grad():
        for norm in (encoder.ln_pre, encoder.ln_post):
            torch.nn.init.normal_(norm.weight)
        time = clip.time_embedding(t)
        patches = encoder.stem(x, time)                                       # (2, 32, 2, 8)
        tokens = [encoder.class_token + time] + [
            patches[:, :, row, column] for row in range(2) for column in range(8)]
        h = encoder.ln_pre(torch.stack(tokens, dim=1) + encoder.position_embedding)
        expected = encoder.projection(encoder.ln_post(encoder.blocks(h)[:, 0]))
        assert torch.allclose(clip.encode_image(x, t), expected, atol=1e-5)


def test_conv_stem_by_hand(clip):
    """Convolution, norm, scale and shift by the time embedding, SiLU; as often as there are
    layers."""
    stem, x, time = clip.image_encoder.stem, torch.randn(2, 3, 8, 32), torch.randn(2, 32)
    with torch.no_grad():
        h = x
        for conv, norm, project in zip(stem.convs, stem.norms, stem.time_projs):
            scale, shift = project(time).view(2, 2, -1, 1, 1).unbind(dim=1)
            h = F.silu(norm(conv(h)) * (1 + scale) + shift)
        assert len(stem.convs) == 5 and torch.allclose(stem(x, time), h, atol=1e-6)


def test_images_of_a_batch_do_not_interact(clip):
    """An image has the same features alone, with its own t."""
    x, t = torch.randn(3, 3, 8, 32), torch.tensor([0, 10, 700])
    with torch.no_grad():
        together, alone = clip.encode_image(x, t), clip.encode_image(x[1:2], t[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_t_enters_through_the_stem_and_the_class_token():
    """The conv stem depends on t, the published stem does not; with it t still changes the image
    features, through the class token."""
    torch.manual_seed(0)
    x, t = torch.randn(2, 3, 8, 32), torch.tensor([0, 700])
    for stem, depends in (("conv", True), ("patch", False)):
        clip = CLIP(CLIPConfig(stem=stem, width=32, layers=1, image_size=16), Tokenizer([]))
        with torch.no_grad():
            time, clean = clip.time_embedding(t), clip.time_embedding(0 * t)
            stem_of = clip.image_encoder.stem
            assert torch.allclose(stem_of(x, time), stem_of(x, clean), atol=1e-4) == (not depends)
            clip.image_encoder.stem.forward = lambda x, time: torch.zeros(2, 32, 2, 8)
            change = clip.encode_image(x, t) - clip.encode_image(x, 0 * t)
        assert change[0].abs().max() == 0 and change[1].abs().max() > 1e-3


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_stem_keeps_height_and_width_apart(stem):
    """A grid of tokens has H / patch rows and W / patch columns, each of its own pixels."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(stem=stem, width=32, image_size=16), Tokenizer([]))
    x, time = torch.zeros(1, 3, 8, 32), torch.zeros(1, 32)
    changed = x.clone()
    changed[:, :, 4:, :4] = 1.   # the lower left patch
    with torch.no_grad():
        before, after = clip.image_encoder.stem(x, time), clip.image_encoder.stem(changed, time)
    change = (after - before).abs().amax(dim=(0, 1))                          # (2, 8)
    assert change.shape == (2, 8) and torch.isfinite(after).all()
    assert change.argmax() in (8, 9) and change[1, 0] > 1e-3   # row 1, column 0 or its neighbour
    if stem == "patch":   # no other patch changes
        assert change.count_nonzero() == 1


def test_logits_are_scaled_cosines(clip, text_features):
    """They do not depend on the lengths of the features, and logit_scale has a maximum."""
    torch.manual_seed(0)
    image_features, t = torch.randn(4, 16), torch.tensor([0, 1, 500, 1000])
    logits = clip.logits(image_features, text_features, t)
    cosine = F.cosine_similarity(image_features[:, None], text_features[None], dim=-1)
    assert torch.isfinite(logits).all()
    assert torch.allclose(logits, clip.logit_scale(t) * cosine, atol=1e-4)
    assert torch.allclose(clip.logits(3 * image_features, text_features, t), logits, atol=1e-4)
    assert torch.allclose(clip.logits(image_features, 3 * text_features, t), logits, atol=1e-4)
    torch.nn.init.constant_(clip.log_scale, 50.)
    assert clip.logit_scale(t).max().item() == pytest.approx(clip.config.max_logit_scale, rel=1e-4)


@pytest.mark.parametrize("options", [
    dict(stem="vit"), dict(patch=3), dict(width=224), dict(image_size=30), dict(layers=0),
    dict(heads=5), dict(text_heads=3), dict(context_length=2), dict(max_logit_scale=0.)])
def test_sizes_that_do_not_fit_are_refused(options):
    """Each setting that no CLIP can have is a ValueError that names it."""
    with pytest.raises(ValueError, match=next(iter(options)).removeprefix("max_")):
        CLIPConfig(**options)


def test_from_checkpoint_returns_the_same_clip(clip):
    """Config, merges and fp16 weights give back both encoders and the tokenizer, in eval mode."""
    clip.half().float()   # so that fp16 loses nothing
    content = {"config": dataclasses.asdict(clip.config),
               "merges": [list(pair) for pair in clip.tokenizer.merges],
               "weights": {name: w.half() for name, w in clip.state_dict().items()}}
    again = CLIP.from_checkpoint(content)
    x, t, texts = torch.randn(2, 3, 8, 32), torch.tensor([0, 700]), ["a red bus", "a jeep"]
    logits, expected = (
        model.logits(model.encode_image(x, t), model.encode_captions(texts), t)
        for model in (again, clip))
    assert torch.isfinite(logits).all() and torch.allclose(logits, expected, atol=1e-4)
    assert again.config == clip.config and again.tokenizer.merges == clip.tokenizer.merges
    assert not again.training and not logits.requires_grad


def test_an_ensemble_is_the_mean_of_directions(clip):
    """Each way to write a text counts the same, however long its feature is."""
    templates = [["a red bus", "a jeep"], ["the bus is red", "one jeep"], ["red coach", "jeeps"]]
    with torch.no_grad():
        features = torch.stack([clip.encode_captions(texts) for texts in templates])
        clip.text_encoder.register_forward_hook(lambda module, x, out: out * x[0].sum())
        ensemble = clip.encode_ensemble(templates)
    assert ensemble.shape == (2, 16) and torch.isfinite(ensemble).all()
    assert torch.allclose(ensemble, (features / features.norm(dim=2, keepdim=True)).mean(0),
                          atol=1e-5)


# ---- the losses ----------------------------------------------------------------------------------

def one_each(caption_ids, K):
    """One caption's index for each image -> is_true: (B, K) bool"""
    return F.one_hot(caption_ids, K).bool()



def test_contrastive_loss_is_the_pseudocode_of_the_paper():
    """With N different captions: labels = arange(n), the mean of the cross-entropies along both
    axes (Radford et al. 2021, fig. 3)."""
    torch.manual_seed(0)
    logits, caption_ids = 3 * torch.randn(6, 6), torch.tensor([7, 3, 0, 250, 5, 1])
    p_rows, p_columns = (logits.exp() / logits.exp().sum(dim=i, keepdim=True) for i in (1, 0))
    loss_i, loss_t = (-p.diagonal().log().mean() for p in (p_rows, p_columns))
    loss = contrastive_loss(logits, caption_ids)
    assert loss.item() == pytest.approx((loss_i + loss_t).item() / 2, rel=1e-5)
    assert loss.item() != pytest.approx(loss_i.item(), rel=1e-2)


def test_contrastive_loss_of_duplicate_captions_is_least_at_equal_mass():
    """Two images of one caption: the minimum is log 2 for each of the pair, with no gradient, and
    preferring the image's own copy of the caption costs more."""
    caption_ids = torch.tensor([4, 9, 4, 2])
    same = caption_ids[:, None] == caption_ids
    logits = torch.where(same, 40., 0.).requires_grad_()
    loss = contrastive_loss(logits, caption_ids)
    assert loss.item() == pytest.approx(2 * math.log(2) / 4, abs=1e-5)
    grad, = torch.autograd.grad(loss, logits)
    assert grad.abs().max() < 1e-6
    for change in (torch.eye(4), -torch.eye(4)):
        assert contrastive_loss(logits.detach() + change, caption_ids) > loss + 0.01


def test_closed_set_loss_is_the_papers_when_the_captions_are_the_batchs_own():
    """K = B, image i has caption i: both terms are the cross-entropies of the pseudocode in fig. 3
    of the paper; without clean images only the first is left."""
    torch.manual_seed(0)
    logits, caption_ids = torch.randn(6, 6), torch.arange(6)
    loss_i, loss_t = F.cross_entropy(logits, caption_ids), F.cross_entropy(logits.T, caption_ids)
    clean, none = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([], dtype=torch.long)
    is_true = torch.eye(6).bool()
    assert torch.allclose(closed_set_loss(logits, is_true, clean),
                          loss_i + tinyclip.TEXT_TO_IMAGE * loss_t)
    assert torch.allclose(closed_set_loss(logits, is_true, none), loss_i)


def test_closed_set_loss_of_texts_that_are_true_of_several_images_by_hand():
    """Two texts are true of image 1, none of image 2, which counts as 0. Softmax of image 0:
    (2, 1, 1)/4; of image 1: (1, 1, 8)/10; of texts 0 to 2 over all images: 2/6, 1/4, 8/10."""
    logits = torch.tensor([[2., 1., 1.], [1., 1., 8.], [3., 2., 1.]]).log()
    is_true = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    image_to_text = -(math.log(.5) + (math.log(.1) + math.log(.8)) / 2) / 3
    text_to_image = -(math.log(2 / 6) + math.log(1 / 4) + math.log(8 / 10)) / 3
    only = lambda *images: torch.tensor(images, dtype=torch.long)
    for clean, expected in ((only(), image_to_text), (only(2), image_to_text),   # none is true
                            (only(0, 1, 2),
                             image_to_text + tinyclip.TEXT_TO_IMAGE * text_to_image)):
        assert closed_set_loss(logits, is_true, clean).item() == pytest.approx(expected, rel=1e-5)


def test_text_to_image_accepts_every_image_of_a_caption():
    """Two images of one caption have equal targets: the least loss of the pair is log 2, that of
    equal logits log 3 among three; captions that no image has do not count."""
    logits = torch.zeros(3, 4)
    logits[:2, 0] = 50.
    caption_ids, clean = torch.tensor([0, 0, 1]), torch.arange(3)
    loss = closed_set_loss(logits, one_each(caption_ids, 4), clean)
    loss -= F.cross_entropy(logits, caption_ids)
    expected = tinyclip.TEXT_TO_IMAGE * (math.log(2) + math.log(3)) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_text_to_image_is_of_clean_images_only():
    """Noised images take part in the first term alone."""
    torch.manual_seed(0)
    logits, caption_ids = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    clean = torch.tensor([4, 0, 1])
    loss = closed_set_loss(logits, one_each(caption_ids, 3), clean)
    loss -= F.cross_entropy(logits, caption_ids)
    p = logits[[0, 1, 4]].softmax(dim=0)                                      # (3 images, 3)
    terms = [-(p[0, 0].log() + p[2, 0].log()) / 2, -p[1, 1].log()]
    expected = tinyclip.TEXT_TO_IMAGE * sum(terms).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_loss_at_start_is_about_chance(stem, tokenizer):
    """An untrained CLIP is near ln 294 on the 294 captions of the cars."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(stem=stem, image_size=16, width=64, layers=1, heads=2), tokenizer)
    t = torch.randint(1, 1001, (16,))
    with torch.no_grad():
        image_features = clip.encode_image(torch.randn(16, 3, 8, 32), t)
        logits = clip.logits(image_features, clip.encode_captions(cars.CAPTIONS), t)
    loss = F.cross_entropy(logits, torch.randint(294, (16,)))
    assert loss.item() == pytest.approx(math.log(294), abs=1.5)
    assert clip.logit_scale(t).flatten().tolist() == pytest.approx([1 / 0.07] * 16)   # for every t


def test_a_low_limit_of_the_logit_scale_is_where_it_starts(tokenizer):
    """Just below it: at its limit a clamped scale might have no gradient, and never learn."""
    clip = CLIP(CLIPConfig(max_logit_scale=5., layers=1), tokenizer)
    scale = clip.logit_scale()
    scale.sum().backward()
    assert scale.item() == pytest.approx(4.95) and clip.log_scale.grad > 0


@pytest.mark.parametrize("loss_of", [
    lambda logits, ids: closed_set_loss(logits, one_each(ids, logits.shape[1]),
                                        torch.arange(16)),
    lambda logits, ids: contrastive_loss(logits[:, ids], ids)], ids=["closed set", "contrastive"])
def test_learning(loss_of, tokenizer):
    """Sixteen images are assigned to their captions after a few steps, with either loss."""
    torch.manual_seed(0)
    images, labels = cars.render(0, range(16), 16)
    x, captions = data.to_float(images), sorted({cars.caption(*label) for label in labels})
    caption_ids = torch.tensor([captions.index(cars.caption(*label)) for label in labels])
    clip = CLIP(CLIPConfig(width=64, layers=1, heads=2, text_layers=1, image_size=16), tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), 5e-4)
    for _ in range(60):
        logits = clip.logits(clip.encode_image(x), clip.encode_captions(captions))
        optimizer.zero_grad()
        loss_of(logits, caption_ids).backward()
        optimizer.step()
    assert (logits.argmax(1) == caption_ids).float().mean() > 0.9
