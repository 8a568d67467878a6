"""Chapter 2: CLIP. A tokenizer, a text Transformer and an image encoder whose features agree when picture and words do.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"   arxiv.org/abs/2103.00020
    Nichol et al. 2021, "GLIDE" (sec. 2.4: CLIP on noised pictures)                                 arxiv.org/abs/2112.10741
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (the stem)                  arxiv.org/abs/2106.14881
    Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"     arxiv.org/abs/1508.07909

This CLIP also sees pictures through noise: t = 0 is a clean picture, t = 1..T the x_t of the diffusion model, and both its
features and the sharpness of its opinion, logit_scale(t), depend on t. That is what lets it guide every step of a sampler.

Shapes: B pictures, K captions, L tokens, D width, E embedding width; pictures (B, 3, H, W) in [-1, 1].
Left out: the published weights, ResNet towers, distributed training.
"""
import functools
import html
import math
from dataclasses import dataclass

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class CLIPConfig:
    stem: str = "conv"             # "conv": convolutions that know t, the default; "patch": one linear map, as published
    patch: int = 4                 # pixels along a token's side; for "conv" a power of two
    width: int = 128               # of the image Transformer
    layers: int = 3
    heads: int = 4
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    embed_dim: int = 128
    context_length: int = 16       # the most tokens of a text, start and end included; the published CLIP has 77
    max_logit_scale: float = 100.  # as published
    image_size: int = 32
    T: int = 1000                  # of the diffusion model whose x_t it shall understand


# ---- words to numbers: byte-level byte pair encoding ----------------------------------------------------------------

def clean(text):
    """Mend mojibake, undo HTML entities (twice: they come doubly escaped), squeeze white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


# CLIP's own way of cutting text into words: contractions, letters, single digits, runs of anything else.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@functools.cache
def byte_symbols():
    """Every byte as one printable character: itself where it has one, else the next character from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """Byte pair encoding: a word starts as its bytes, the last one marked </w>; then the most frequent pairs of
    neighbours, found in training, merge into longer symbols, in the order in which they were found.

    Ids: 256 bytes, 256 bytes that end a word, the merges, start, end. Any text has an encoding: what was never seen stays bytes.
    """

    def __init__(self, merges):
        """merges: list of pairs of symbols, most important first, such as ("c", "a") and ("ca", "r</w>")."""
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        symbols = sorted(byte_symbols().values(), key=lambda s: (s not in map(chr, range(33, 256)), s))
        self.symbols = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in self.merges]
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.start, self.end = len(self.symbols), len(self.symbols) + 1
        self.vocab_size = self.end + 1
        self.byte_of = {s: b for b, s in byte_symbols().items()}

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from texts until the vocabulary has vocab_size entries, or every word is one token."""
        words = {}                                                    # a word as a tuple of symbols -> how often it occurs
        for text in texts:
            for word in WORDS.findall(clean(text)):
                symbols = cls.split(word)
                words[symbols] = words.get(symbols, 0) + 1
        merges = []
        while len(merges) < vocab_size - 514:
            pairs = {}
            for symbols, count in words.items():
                for pair in zip(symbols, symbols[1:]):
                    pairs[pair] = pairs.get(pair, 0) + count
            if not pairs:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))   # ties by spelling, so that training is repeatable
            merges.append(best)
            words = {merge(symbols, best): count for symbols, count in words.items()}
        return cls(merges)

    @staticmethod
    def split(word):
        """"car" -> ("c", "a", "r</w>")"""
        symbols = [byte_symbols()[b] for b in word.encode("utf-8")]
        return (*symbols[:-1], symbols[-1] + "</w>")

    def encode(self, text):
        """-> list of ids, without start and end."""
        ids = []
        for word in WORDS.findall(clean(text)):
            symbols = self.split(word)
            while len(symbols) > 1:
                best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
                if best not in self.rank:
                    break
                symbols = merge(symbols, best)
            ids += [self.id_of[s] for s in symbols]
        return ids

    def decode(self, ids):
        """-> text, a space after every word; start and end are skipped."""
        text = "".join(self.symbols[i] for i in ids if i < self.start).replace("</w>", " ")
        return b"".join(b" " if s == " " else bytes([self.byte_of[s]]) for s in text).decode("utf-8", errors="replace").strip()

    def batch(self, texts, context_length):
        """-> (K, L) int64: start, the ids, end, then zeros up to context_length. Too long a text loses its tail, not its end."""
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)[:context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def merge(symbols, pair):
    """Join every occurrence of a pair of neighbours: ("c", "a", "r</w>"), ("c", "a") -> ("ca", "r</w>")"""
    merged, i = [], 0
    while i < len(symbols):
        if symbols[i:i + 2] == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return tuple(merged)


# ---- the Transformer ------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017 eq. 1): softmax(q k^T / sqrt(D/heads)) v. (B, L, D) -> (B, L, D)"""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)   # (B, heads, L, D/heads) each
        scores = q @ k.transpose(-2, -1) * (D // self.heads) ** -0.5                              # (B, heads, L, L)
        if self.causal:   # a token sees itself and what stands before it
            future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, L, D))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation to GELU that the published CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class TransformerBlock(nn.Module):
    """Pre-LN: x + attention(LN(x)), then x + MLP(LN(x)). (B, L, D) -> (B, L, D)"""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.ln_1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# ---- the image encoder ------------------------------------------------------------------------------------------------

class PatchStem(nn.Module):
    """The published stem: cut the picture into patches, one linear map each. It does not look at the time."""

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)

    def forward(self, x, time):
        return self.conv(x)


class ConvStem(nn.Module):
    """Convolutions down to the same grid of tokens, each one normalised, then scaled and shifted by what it knows of t.

    A small ViT on few pictures learns slowly, since it has to find out that neighbouring pixels belong together, and its
    gradient with respect to the pixels is a patchwork. Convolutions begin with that knowledge.
    """

    def __init__(self, config):
        super().__init__()
        halvings = int(math.log2(config.patch))
        widths = [max(32, config.width >> (halvings - i)) for i in range(halvings + 1)]     # 32, 64, 128 for patch 4
        plan = [(3, widths[0], 1)]
        for c_in, c_out in zip(widths, widths[1:]):
            plan += [(c_in, c_out, 2), (c_out, c_out, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in plan)
        self.norms = nn.ModuleList(nn.GroupNorm(c_out // 16, c_out) for _, c_out, _ in plan)
        self.times = nn.ModuleList(nn.Linear(config.width, 2 * c_out) for _, c_out, _ in plan)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) -> (B, D, H/patch, W/patch)"""
        for conv, norm, to_scale_shift in zip(self.convs, self.norms, self.times):
            scale, shift = to_scale_shift(time)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(norm(conv(x)) * (1 + scale) + shift)
        return x


class ImageEncoder(nn.Module):
    """Stem, class token, position embedding, ln_pre, pre-LN blocks, ln_post on the class token, projection without bias."""

    def __init__(self, config):
        super().__init__()
        D, grid = config.width, config.image_size // config.patch
        self.stem = {"conv": ConvStem, "patch": PatchStem}[config.stem](config)
        self.class_token = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.positions = nn.Parameter(torch.randn(grid * grid + 1, D) * D ** -0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blocks = nn.Sequential(*(TransformerBlock(D, config.heads, causal=False) for _ in range(config.layers)))
        self.projection = nn.Linear(D, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=D ** -0.5)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) -> (B, E). The class token carries the time (GLIDE's released code does so too)."""
        tokens = self.stem(x, time).flatten(2).transpose(1, 2)                             # (B, HW/patch^2, D)
        first = (self.class_token + time)[:, None]                                         # (B, 1, D)
        tokens = self.ln_pre(torch.cat([first, tokens], dim=1) + self.positions)
        return self.projection(self.ln_post(self.blocks(tokens)[:, 0]))


class TextEncoder(nn.Module):
    """Token and position embedding, causal blocks, ln_final, and the feature at the end token, projected. (K, L) -> (K, E)

    The mask is causal, so the end token, which has seen the whole text, does not see the padding behind it.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        D, layers = config.text_width, config.text_layers
        self.end = tokenizer.end
        self.tokens, self.positions = nn.Embedding(tokenizer.vocab_size, D), nn.Parameter(torch.randn(config.context_length, D) * 0.01)
        self.blocks = nn.Sequential(*(TransformerBlock(D, config.text_heads, causal=True) for _ in range(layers)))
        self.ln_final, self.projection = nn.LayerNorm(D), nn.Linear(D, config.embed_dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)                    # these deviations are the published ones
        nn.init.normal_(self.projection.weight, std=D ** -0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=D ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=D ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=D ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        is_end = tokens == self.end
        tokens = tokens[:, :int(is_end.any(dim=0).nonzero().max()) + 1]  # nobody sees what stands behind the last end token
        x = self.ln_final(self.blocks(self.tokens(tokens) + self.positions[:tokens.shape[1]]))   # (K, L, D)
        return self.projection(x[torch.arange(len(x), device=x.device), is_end.int().argmax(dim=1)])


# ---- CLIP -------------------------------------------------------------------------------------------------------------

class CLIP(nn.Module):
    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer, D = config, tokenizer, config.width
        self.image, self.text = ImageEncoder(config), TextEncoder(config, tokenizer)
        self.time = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())   # smooth in t: nothing jumps
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))                     # sec. 2.5 of the paper
        self.log_scale_of_time = nn.Linear(D, 1, bias=False)
        nn.init.zeros_(self.log_scale_of_time.weight)

    def time_features(self, t):
        """t: (B,) int in 0..T -> (B, D)"""
        return self.time(t[:, None].float() * (4 / self.config.T))

    def encode_image(self, x, t=None):
        """x: (B, 3, H, W) in [-1, 1], noised up to t: (B,) int in 0..T; None is 0, clean -> image_features: (B, E), unnormalised."""
        t = torch.zeros(len(x), dtype=torch.long, device=x.device) if t is None else t
        return self.image(x, self.time_features(t))

    def encode_text(self, tokens):
        """tokens: (K, L) from Tokenizer.batch -> text_features: (K, E), unnormalised."""
        return self.text(tokens)

    def logit_scale(self, t):
        """t: (B,) int in 0..T -> (B, 1). How sharp an opinion is warranted at t: high on clean pictures, low in noise."""
        log_scale = self.log_scale + self.log_scale_of_time(self.time_features(t)).float()
        return log_scale.clamp(max=math.log(self.config.max_logit_scale)).exp()

    def logits(self, image_features, text_features, t=None):
        """(B, E), (K, E), t: (B,) -> (B, K): logit_scale(t) times the cosine between each picture and each caption."""
        t = torch.zeros(len(image_features), dtype=torch.long, device=image_features.device) if t is None else t
        cosine = F.normalize(image_features.float(), dim=-1) @ F.normalize(text_features.float(), dim=-1).T
        return self.logit_scale(t) * cosine


def from_checkpoint(content):
    """The content of a checkpoint of kind "clip" -> CLIP in fp32."""
    clip = CLIP(CLIPConfig(**content["config"]), Tokenizer(content["merges"]))
    clip.load_state_dict({name: p.float() for name, p in content["weights"].items()})
    return clip


def canonical(prompt):
    """Prompts that mean the same caption, spelled the same: "  A White and red car" -> "white and red car"."""
    return regex.sub(r"^(a|an|the) ", "", clean(prompt))


TEXT_TO_IMAGE = 0.1   # weight of the second term


def clip_loss(logits, caption_of, clean):
    """logits: (B, K) over all K captions, caption_of: (B,) int, clean: (B,) bool, which pictures carry no noise -> scalar

    Image to text: cross-entropy of each picture's own caption among all K. The paper's in-batch loss is the case in which
    the captions are the batch's own; with few captions in the world we can afford them all, so no batch is too small,
    repeated captions do no harm, and every near miss ("red and white") is always among the distractors. The softmax is then
    calibrated: it estimates p(caption | x_t), which is what guidance needs.
    Text to image: for each caption that occurs among the clean pictures, which of them are its own (several may be right).
    Only clean ones: how noisy a picture is tells nothing about its caption, but would decide this contest.
    """
    image_to_text = F.cross_entropy(logits, caption_of)
    if not clean.any():
        return image_to_text
    own = F.one_hot(caption_of[clean], logits.shape[1]).T.float()                      # (K, clean pictures)
    occurs = own.any(dim=1)
    share = own[occurs] / own[occurs].sum(dim=1, keepdim=True)
    text_to_image = -(share * logits[clean].T[occurs].log_softmax(dim=1)).sum(dim=1).mean()
    return image_to_text + TEXT_TO_IMAGE * text_to_image
