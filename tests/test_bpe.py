import random

import pytest

import bpe
import cars
import checkpoints
from bpe import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(cars.CAPTIONS, 4096)


@pytest.fixture(scope="module")
def published():
    path = checkpoints.SHIPPED.parent.parent / "shared/openai_clip/bpe_simple_vocab_16e6.txt.gz"
    if not path.exists():
        pytest.skip(f"the published vocabulary is not here: {path}")
    return Tokenizer.from_openai(path)


def test_the_published_vocabulary_gives_the_published_ids(published):
    """The example of CLIP's own README, and its prompts for CIFAR-10."""
    assert published.vocab_size == 49408
    assert published.batch(["a diagram"], 77)[0, :5].tolist() == [49406, 320, 22697, 49407, 0]
    assert published.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert 49407 not in published.encode("<|endoftext|>")


def test_merges_of_a_small_corpus_by_hand():
    """Words: low x 3, lower x 1, slow x 2. Pairs at first: l-o 4 (low, lower; not slow: there o-w
    ends the word too) ...

    l+o occurs 3 + 1 + 2 = 6 times and o+w</w> 3 + 2 = 5, so "lo" comes first; then lo+w</w> (5),
    s+low</w> (2).
    """
    tokenizer = Tokenizer.train(["low low low lower slow slow"], 517)
    assert tokenizer.merges == [("l", "o"), ("lo", "w</w>"), ("s", "low</w>")]
    assert ([tokenizer.symbols[i] for i in tokenizer.encode("slow lower")]
            == ["slow</w>", "lo", "w", "e", "r</w>"])


def test_every_known_word_is_one_token(tokenizer):
    assert len(tokenizer.encode("a white and red sports car")) == 6


AWKWARD = [
    "", " ", "a white and red car", "naïve café", "赤い車", "빨간 자동차", "🚗🚙", "👩‍🔧 🇩🇪", "a\tb\n c",
    "x" * 500, "<|endoftext|>", "<|startoftext|> car", "'s 12 isn't", "&amp;amp;lt;b&amp;gt;",
    "schÃ¶n â€œquotedâ€\x9d", "ﬁne oﬃce", "e\u0301\u0323 a\u030a", "\ud83d", "a\ud800b",
    "\x00\x07\x1b[31m", "\u200b\u202e\ufeff", "½ ² Ⅷ ①", "</w>", "Ġ",
    "red-and_white/car!!", "İstanbul", "a car " * 1667]


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("which", ["tokenizer", "published"])
def test_decode_returns_what_encode_read(which, request, text):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).replace(" ", "") == bpe.clean(text).replace(" ", "")
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert all(0 <= i < tokenizer.start for i in ids)


def test_cleaning():
    assert bpe.clean("  A &amp;amp; B\n\nc ") == "a & b c"
    assert bpe.clean("schÃ¶n") == "schön"
    assert (bpe.canonical(" A  White and Red car") == bpe.canonical("white and red car")
            == "white and red car")


def test_batch_has_start_end_and_padding_and_truncates_before_the_end(tokenizer):
    short, long = tokenizer.batch(["a car", "a white and red sports car"], 6)
    assert short.tolist()[0] == tokenizer.start and short.tolist()[3:] == [tokenizer.end, 0, 0]
    assert long[-1] == tokenizer.end and long[0] == tokenizer.start


def test_training_counts_as_a_plain_loop_does():
    """The pairs are kept count of from merge to merge; here they are counted anew each time."""
    rng = random.Random(0)
    for _ in range(50):
        text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 9))) for _ in range(20))
        words, merges = [Tokenizer.split(word) for word in text.split()], []
        while len(merges) < 30:
            pairs = [pair for word in words for pair in zip(word, word[1:])]
            if not pairs:
                break
            merges.append(max(pairs, key=lambda pair: (pairs.count(pair), pair)))
            words = [bpe.merge(word, merges[-1]) for word in words]
        assert Tokenizer.train([text], 514 + 30).merges == merges
