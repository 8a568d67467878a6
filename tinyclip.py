"""Chapter 2: CLIP. Two encoders, one for words and one for pictures, whose features agree when
picture and words do.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
        arxiv.org/abs/2103.00020
    Nichol et al. 2021, "GLIDE" (sec. 2.4: CLIP on noised pictures)
        arxiv.org/abs/2112.10741
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (the stem)
        arxiv.org/abs/2106.14881
    Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"
        arxiv.org/abs/1508.07909

This CLIP also sees pictures through noise: t = 0 is a clean picture, t = 1..T the x_t of the
diffusion model, and both its features and the sharpness of its opinion, logit_scale(t), depend on
t. That is what lets it guide every step of a sampler.

Shapes: B pictures, K captions, L tokens, D width, E embedding width; pictures (B, 3, H, W) in
[-1, 1] with H = W = image_size.

Left out: the published weights, ResNet towers, distributed training.
"""
import functools
import gzip
import html
import math
from dataclasses import dataclass
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class CLIPConfig:
    stem: str = "conv"             # "conv": convolutions that know t; "patch": as published
    patch: int = 4                 # pixels along a token's side; for "conv" a power of two
    width: int = 128               # D of the image Transformer
    layers: int = 3                # its blocks
    heads: int = 4                 # its attention heads, width / heads channels each
    text_width: int = 128          # the same three for the text Transformer
    text_layers: int = 2
    text_heads: int = 4
    embed_dim: int = 128           # E, where pictures and words meet
    context_length: int = 16       # most tokens of a text with start and end; published: 77
    max_logit_scale: float = 20.   # differs from the paper (100): a softer CLIP guides better
    image_size: int = 32           # pixels, H and W
    T: int = 1000                  # of the diffusion model whose x_t it shall understand

    def __post_init__(self):
        if self.stem not in ("conv", "patch"):
            raise ValueError(f"stem must be conv or patch, not {self.stem!r}")
        if self.stem == "conv" and (self.patch & (self.patch - 1) or self.width % 32):
            raise ValueError("with the conv stem, patch must be a power of two and width a "
                             "multiple of 32")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch {self.patch}")
        if self.width % self.heads or self.text_width % self.text_heads:
            raise ValueError("width must be a multiple of heads, and text_width of text_heads")
        if self.context_length < 3 or self.max_logit_scale <= 0 or self.T < 10:
            raise ValueError("context_length must be at least 3, max_logit_scale more than 0, and "
                             "T at least 10")


# ---- words to numbers: byte-level byte pair encoding ---------------------------------------------

def clean(text):
    """Mend mojibake, undo HTML entities, squeeze white space, lower case."""
    plain = text.isascii() and text.isprintable() and "&" not in text
    if not plain:   # there ftfy would find nothing to mend, and take its time
        text = html.unescape(html.unescape(ftfy.fix_text(text)))   # twice: they come so escaped
    return regex.sub(r"\s+", " ", text).strip().lower()


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
        words = {}   # a word as a tuple of symbols -> how often it occurs
        for text in texts:
            for word in WORDS.findall(clean(text)):
                symbols = cls.split(word)
                words[symbols] = words.get(symbols, 0) + 1
        merges = []
        while len(merges) < vocab_size - 514:   # 2 * 256 bytes, start, end
            pairs = {}   # two neighbours -> how often they occur
            for symbols, count in words.items():
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] = pairs.get(pair, 0) + count
            if not pairs:
                break
            # Ties go by spelling, so that training is repeatable.
            best = max(pairs, key=lambda pair: (pairs[pair], pair))
            merges.append(best)
            words = {merge(symbols, best): count for symbols, count in words.items()}
        return cls(merges)

    @classmethod
    def from_openai(cls, path):
        """The tokenizer of the published CLIP, 49,408 ids, from bpe_simple_vocab_16e6.txt.gz of
        github.com/openai/CLIP: a header, then one merge a line, of which it uses these many.

        differs from the published one: "<|endoftext|>" in a text is a row of letters and signs
        like any other. There it becomes the end token, so that a prompt can cut itself short.
        """
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        return cls(line.split() for line in lines[1:49_408 - 514 + 1])

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


# ---- the Transformer -----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017 eq. 1): softmax(q k^T / sqrt(D/heads)) v.

    x: (B, L, D) -> (B, L, D)
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        d = D // self.heads
        qkv = self.qkv(x).view(B, L, 3, self.heads, d)                        # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # 3 x (B, heads, L, d)
        scores = q @ k.transpose(-2, -1) * d ** -0.5                          # (B, heads, L, L)
        if self.causal:   # a token sees itself and what stands before it
            future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        mixed = scores.softmax(dim=-1) @ v                                    # (B, heads, L, d)
        return self.out(mixed.transpose(1, 2).reshape(B, L, D))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation to GELU that the published CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TransformerBlock(nn.Module):
    """Pre-LN: x + attention(LN(x)), then x + MLP(LN(x)).

    x: (B, L, D) -> (B, L, D)
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# ---- the image encoder ---------------------------------------------------------------------------

class PatchStem(nn.Module):
    """The published stem: cut the picture into patches, one linear map for all of them.

    x: (B, 3, H, W) -> (B, D, H/patch, W/patch). It does not look at the time.
    """

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)

    def forward(self, x, time):
        return self.conv(x)


class ConvStem(nn.Module):
    """Convolutions down to the same grid of tokens, each one normalised, then scaled and shifted
    by what it knows of t.

    A small ViT on few pictures learns slowly, since it has to find out that neighbouring pixels
    belong together, and its gradient with respect to the pixels is a patchwork. Convolutions begin
    with that knowledge.
    """

    def __init__(self, config):
        super().__init__()
        halvings = int(math.log2(config.patch))
        # Channels at each resolution: 32, 64, 128 for patch 4 and width 128.
        widths = [max(32, config.width >> (halvings - i)) for i in range(halvings + 1)]
        plan = [(3, widths[0], 1)]   # (channels in, channels out, stride) of each convolution
        for c_in, c_out in zip(widths, widths[1:]):
            plan += [(c_in, c_out, 2), (c_out, c_out, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in plan)
        self.norms = nn.ModuleList(nn.GroupNorm(c_out // 16, c_out) for _, c_out, _ in plan)
        self.times = nn.ModuleList(nn.Linear(config.width, 2 * c_out) for _, c_out, _ in plan)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) -> (B, D, H/patch, W/patch)"""
        for conv, norm, to_scale_shift in zip(self.convs, self.norms, self.times):
            scale, shift = to_scale_shift(time)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(norm(conv(x)) * (1 + scale) + shift)   # scale, shift: (B, c_out, 1, 1)
        return x


class ImageEncoder(nn.Module):
    """A vision Transformer: stem, class token, position embedding, ln_pre, pre-LN blocks, ln_post
    on the class token, projection without bias.

    The class token carries the time. (GLIDE's released code has a class token for each t.)
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        grid = config.image_size // config.patch   # tokens along each side of the picture
        self.stem = {"conv": ConvStem, "patch": PatchStem}[config.stem](config)
        self.class_token = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.positions = nn.Parameter(torch.randn(grid * grid + 1, D) * D ** -0.5)
        self.ln_pre = nn.LayerNorm(D)
        self.ln_post = nn.LayerNorm(D)
        self.blocks = nn.Sequential(
            *(TransformerBlock(D, config.heads, causal=False) for _ in range(config.layers)))
        self.projection = nn.Linear(D, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=D ** -0.5)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) -> (B, E)"""
        patches = self.stem(x, time).flatten(2).transpose(1, 2)               # (B, grid^2, D)
        first = (self.class_token + time)[:, None]                            # (B, 1, D)
        tokens = torch.cat([first, patches], dim=1) + self.positions          # (B, 1 + grid^2, D)
        tokens = self.blocks(self.ln_pre(tokens))                             # (B, 1 + grid^2, D)
        return self.projection(self.ln_post(tokens[:, 0]))                    # (B, E)


# ---- the text encoder ----------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """Token and position embedding, causal blocks, ln_final, and the feature at the end token,
    projected.

    The mask is causal, so the end token, which has seen the whole text, does not see the padding
    behind it.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        D, layers = config.text_width, config.text_layers
        self.end = tokenizer.end
        self.tokens = nn.Embedding(tokenizer.vocab_size, D)
        self.positions = nn.Parameter(torch.randn(config.context_length, D) * 0.01)
        self.blocks = nn.Sequential(
            *(TransformerBlock(D, config.text_heads, causal=True) for _ in range(layers)))
        self.ln_final = nn.LayerNorm(D)
        self.projection = nn.Linear(D, config.embed_dim, bias=False)

        # These deviations are the published ones. The layers that write into the residual stream,
        # two in each block, start smaller, so that their sum does not grow with depth.
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=D ** -0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=D ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=D ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=D ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        """tokens: (K, L) int, an end token in every row -> (K, E)"""
        is_end = tokens == self.end                                           # (K, L)
        end_at = is_end.int().argmax(dim=1)                                   # (K,)
        # Nobody sees what stands behind the last end token of all: cut it off.
        length = int(is_end.any(dim=0).nonzero().max()) + 1
        x = self.tokens(tokens[:, :length]) + self.positions[:length]         # (K, length, D)
        x = self.ln_final(self.blocks(x))                                     # (K, length, D)
        return self.projection(x[torch.arange(len(x), device=x.device), end_at])


# ---- CLIP ----------------------------------------------------------------------------------------

class CLIP(nn.Module):
    """An image encoder, a text encoder, and the scale that turns their cosines into logits."""

    def __init__(self, config, tokenizer):
        super().__init__()
        D = config.width
        self.config = config
        self.tokenizer = tokenizer
        self.image = ImageEncoder(config)
        self.text = TextEncoder(config, tokenizer)
        # Smooth in t, unlike a table with a row for each t: nothing jumps from step to step.
        self.time = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))   # sec. 2.5 of the paper
        self.log_scale_of_time = nn.Linear(D, 1, bias=False)
        nn.init.zeros_(self.log_scale_of_time.weight)                     # at first, alike at all t

    def time_features(self, t):
        """t: (B,) int in 0..T -> (B, D)"""
        return self.time(t[:, None].float() * (4 / self.config.T))   # 0..4: room for SiLU to bend

    def encode_image(self, x, t=None):
        """x: (B, 3, H, W) in [-1, 1], noised up to t -> image_features: (B, E), unnormalised.

        t: (B,) int in 0..T; 0 is a clean picture, and None means 0 for all of them.
        """
        if t is None:
            t = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return self.image(x, self.time_features(t))

    def encode_text(self, tokens):
        """tokens: (K, L) int from Tokenizer.batch -> text_features: (K, E), unnormalised."""
        return self.text(tokens)

    def encode_captions(self, texts):
        """K texts -> text_features: (K, E), unnormalised, where CLIP's parameters are."""
        tokens = self.tokenizer.batch(texts, self.config.context_length)
        return self.encode_text(tokens.to(self.log_scale.device))

    def logit_scale(self, t):
        """t: (B,) int in 0..T -> (B, 1), in (0, max_logit_scale].

        How sharp an opinion is warranted at t: high on clean pictures, low in noise.
        """
        log_scale = self.log_scale + self.log_scale_of_time(self.time_features(t)).float()
        return log_scale.clamp(max=math.log(self.config.max_logit_scale)).exp()

    def logits(self, image_features, text_features, t=None):
        """logit_scale(t) times the cosine between each picture and each caption.

        image_features: (B, E), text_features: (K, E), t as in encode_image -> (B, K)
        """
        if t is None:
            t = torch.zeros(len(image_features), dtype=torch.long, device=image_features.device)
        pictures = F.normalize(image_features.float(), dim=-1)
        captions = F.normalize(text_features.float(), dim=-1)
        return self.logit_scale(t) * (pictures @ captions.T)


def from_checkpoint(content):
    """The content of a checkpoint of kind "clip" -> CLIP in fp32."""
    clip = CLIP(CLIPConfig(**content["config"]), Tokenizer(content["merges"]))
    clip.load_state_dict({name: p.float() for name, p in content["weights"].items()})
    return clip


def canonical(prompt):
    """Prompts that mean the same caption, spelled the same.

    "  A White and red car" -> "white and red car"
    """
    return regex.sub(r"^(a|an|the) ", "", clean(prompt))


# ---- training ------------------------------------------------------------------------------------

TEXT_TO_IMAGE = 0.1   # weight of the second term of clip_loss


def clip_loss(logits, caption_of, is_clean):
    """Contrastive loss, differs from the paper: every picture against all captions of the world.

    logits: (B, K) for all K captions, caption_of: (B,) int in 0..K-1, each picture's own caption,
    is_clean: (B,) bool, which pictures carry no noise -> scalar

    Image to text: cross-entropy of each picture's own caption among all K. The paper's in-batch
    loss is the case in which the captions are the batch's own; with few captions in the world we
    can afford them all, so no batch is too small, repeated captions do no harm, and every near
    miss ("red and white") is always among the distractors. The softmax is then calibrated: it
    estimates p(caption | x_t), which is what guidance needs.

    Text to image: for each caption that occurs among the clean pictures, which of them are its own
    (several may be right). Only clean ones: how noisy a picture is tells nothing about its
    caption, but would decide this contest.
    """
    image_to_text = F.cross_entropy(logits, caption_of)
    if not is_clean.any():
        return image_to_text
    own = F.one_hot(caption_of[is_clean], logits.shape[1]).T.float()          # (K, clean pictures)
    occurs = own.any(dim=1)                                                   # (K,) bool
    share = own[occurs] / own[occurs].sum(dim=1, keepdim=True)                # each row sums to 1
    log_share_hat = logits[is_clean].T[occurs].log_softmax(dim=1)             # over the pictures
    text_to_image = -(share * log_share_hat).sum(dim=1).mean()
    return image_to_text + TEXT_TO_IMAGE * text_to_image


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
