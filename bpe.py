"""Chapter 2a: words to numbers. Byte-level byte pair encoding, as CLIP has it.

    Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"
        arxiv.org/abs/1508.07909
    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
        arxiv.org/abs/2103.00020 (sec. 2.4: the text is lower-cased, start and end enclose it)

A text is cleaned, cut into words, and each word into symbols: first its bytes, then pairs of
neighbours are merged, in the order in which training found them to be frequent.

Left out: training on more text than fits in memory.
"""
import collections
import functools
import gzip
import html
import math
from pathlib import Path

import ftfy
import regex
import torch


# ---- text ----------------------------------------------------------------------------------------

def clean(text):
    """Mend mojibake, undo HTML entities, squeeze white space, lower case."""
    plain = text.isascii() and text.isprintable() and "&" not in text
    if not plain:   # there ftfy would find nothing to mend, and take its time
        text = html.unescape(html.unescape(ftfy.fix_text(text)))   # twice: they come so escaped
    return regex.sub(r"\s+", " ", text).strip().lower()


def canonical(prompt):
    """Prompts that mean the same caption, spelled the same.

    "  A White and red car" -> "white and red car"
    """
    return regex.sub(r"^(a|an|the) ", "", clean(prompt))


# ---- the tokenizer -------------------------------------------------------------------------------

# CLIP's own way of cutting text into words: contractions, letters, single digits, runs of anything
# else.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
                      regex.IGNORECASE)


@functools.cache
def byte_symbols():
    """-> {byte: one printable character}: itself where it has one, else the next from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1),
               *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def merge(symbols, pair):
    """Join a pair of neighbours wherever it occurs.

    ("c", "a", "r</w>"), ("c", "a") -> ("ca", "r</w>")
    """
    merged = []
    i = 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


NOT_MERGED = 256 + 256 + 2   # ids: bytes, bytes that end a word, start and end


class Tokenizer:
    """Byte pair encoding: a word starts as its bytes, the last one marked </w>; then the most
    frequent pairs of neighbours, found in training, merge into longer symbols, in the order in
    which they were found.

    Ids, in this order: 256 bytes, 256 bytes that end a word, the merges, start, end. Any text has
    an encoding: what was never seen stays bytes.
    """

    def __init__(self, merges):
        """merges: pairs of symbols, most important first, such as ("c", "a"), ("ca", "r</w>")."""
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        single = list(byte_symbols().values())
        self.symbols = [*single, *(s + "</w>" for s in single), *(a + b for a, b in self.merges)]
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.byte_of = {symbol: byte for byte, symbol in byte_symbols().items()}
        self.ids_of_word = {}   # of the words read so far: the same few occur again and again
        self.start = len(self.symbols)
        self.end = len(self.symbols) + 1
        self.vocab_size = len(self.symbols) + 2

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from texts until there are vocab_size ids, or every word is one symbol."""
        counts = collections.Counter(
            word for text in texts for word in WORDS.findall(clean(text)))
        words = [cls.split(word) for word in counts]   # each as a tuple of symbols
        pairs = collections.Counter()                  # two neighbours -> how often they occur
        places = collections.defaultdict(set)          # two neighbours -> in which words

        def add(i, count):
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += count
                places[pair].add(i)
                if not pairs[pair]:
                    del pairs[pair]

        occurs, merges = list(counts.values()), []
        for i, count in enumerate(occurs):
            add(i, count)
        while pairs and len(merges) < vocab_size - NOT_MERGED:
            most = max(pairs.values())   # ties go by spelling, so that training is repeatable
            best = max(pair for pair, count in pairs.items() if count == most)
            merges.append(best)
            for i in places.pop(best):   # all other words stay as they are
                add(i, -occurs[i])
                words[i] = merge(words[i], best)
                add(i, occurs[i])
        return cls(merges)

    @classmethod
    def from_openai(cls, path):
        """The tokenizer of the published CLIP, 49,408 ids, from bpe_simple_vocab_16e6.txt.gz of
        github.com/openai/CLIP: a header, then one merge a line, of which it uses these many.

        differs from the published one: "<|endoftext|>" in a text is a row of letters and signs
        like any other. There it becomes the end token, so that a prompt can cut itself short.
        """
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        return cls(line.split() for line in lines[1:49_408 - NOT_MERGED + 1])

    @staticmethod
    def split(word):
        """"car" -> ("c", "a", "r</w>")"""
        symbols = [byte_symbols()[b] for b in word.encode("utf-8")]
        return (*symbols[:-1], symbols[-1] + "</w>")

    def joined(self, word):
        """Yield the symbols of a word: as split() gives them, then after each merge that applies.

        "car" -> ("c", "a", "r</w>"), then ("ca", "r</w>"), then ("car</w>",)
        """
        symbols = self.split(word)
        yield symbols
        while len(symbols) > 1:
            pairs = zip(symbols, symbols[1:])
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge(symbols, best)
            yield symbols

    def encode(self, text):
        """-> list of ids, without start and end."""
        ids = []
        for word in WORDS.findall(clean(text)):
            if word not in self.ids_of_word:
                *_, symbols = self.joined(word)   # the last ones, when nothing merges any more
                self.ids_of_word[word] = [self.id_of[s] for s in symbols]
            ids += self.ids_of_word[word]
        return ids

    def decode(self, ids):
        """List of ids -> text, with a space after every word; start and end are skipped."""
        text = "".join(self.symbols[i] for i in ids if i < self.start).replace("</w>", " ")
        # subtle: a space is no symbol (the byte 32 is written "Ġ"), so here it can only be </w>.
        text = b"".join(b" " if s == " " else bytes([self.byte_of[s]]) for s in text)
        return text.decode("utf-8", errors="replace").strip()

    def batch(self, texts, context_length):
        """K texts -> (K, L) int64, L = context_length: start, the ids, end, then zeros.

        A text that is too long loses its tail, not its end.
        """
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)[:context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


if __name__ == "__main__":   # one sentence through the tokenizer, step by step
    tokenizer = Tokenizer.train(["a red car", "a white car", "a red and white car"], 528)
    sentence = "A  WHITE&amp;red cart"
    print("cleaned:", clean(sentence))
    print("words:  ", WORDS.findall(clean(sentence)))
    for word in WORDS.findall(clean(sentence)):
        print("        ", "  ->  ".join(" ".join(symbols) for symbols in tokenizer.joined(word)))
    print("ids:    ", tokenizer.encode(sentence))
    print("decoded:", tokenizer.decode(tokenizer.encode(sentence)))
    print("batch:  ", tokenizer.batch([sentence], context_length=12).tolist())

# cleaned: a white&red cart
# words:   ['a', 'white', '&', 'red', 'cart']
#          a</w>
#          w h i t e</w>  ->  wh i t e</w>  ->  whi t e</w>  ->  whit e</w>  ->  white</w>
#          &</w>
#          r e d</w>  ->  re d</w>  ->  red</w>
#          c a r t</w>  ->  ca r t</w>
# ids:     [320, 517, 261, 519, 512, 81, 339]
# decoded: a white & red cart
# batch:   [[522, 320, 517, 261, 519, 512, 81, 339, 523, 0, 0, 0]]
