"""Chapter 2: CLIP: byte pair encoding, a text and an image encoder, and the contrastive loss.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
        arxiv.org/abs/2103.00020
    Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units"
        arxiv.org/abs/1508.07909 (byte pair encoding)
    Nichol et al. 2021, "GLIDE", sec. 2.4 (CLIP trained on noised images)
        arxiv.org/abs/2112.10741
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (the stem)
        arxiv.org/abs/2106.14881

Two encoders map images and captions to features of the same width; a cosine says how well they
fit. This CLIP is noise-aware: t = 0 is a clean image, t = 1..T the x_t of the diffusion model, and
both the image features and logit_scale(t) depend on t. So it can guide every sampling step.
"published" is what OpenAI published, code and weights: github.com/openai/CLIP.

Shapes: B images, K captions, L tokens, D width, E embedding width; images (B, 3, H, W) in [-1, 1]
with H = W = image_size.

This file imports only torch, ftfy and regex: copy it and it works.
Left out: ResNet encoders.
"""
import collections
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

T = 1000   # number of diffusion timesteps, as in tinyddpm.py


# ---- text ----------------------------------------------------------------------------------------

def clean_text(text):
    """Fix encoding errors, unescape HTML, collapse white space, lower-case."""
    if not text.isascii() or not text.isprintable() or "&" in text:   # else ftfy changes nothing
        text = html.unescape(html.unescape(ftfy.fix_text(text)))      # twice, as published
    return regex.sub(r"\s+", " ", text).strip().lower()


def normalize_prompt(prompt):
    """Map equivalent prompts to one text: 'A White/red  "car"!' -> "white red car". "&", "+": "and"
    """
    text = regex.sub(r"[&+]", " and ", clean_text(prompt))
    words = regex.sub(r"[^\w\s]|_", " ", text).split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


# ---- byte pair encoding --------------------------------------------------------------------------

# How CLIP cuts text into words: contractions, letters, single digits, runs of anything else.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
                     regex.IGNORECASE)


@functools.cache
def bytes_to_unicode():
    """Map each byte to a printable character: itself, or else the next unused one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1),
               *range(ord("¡"), ord("¬") + 1),
               *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def merge(symbols, pair):
    """Merge a pair of neighbours wherever it occurs.

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


FIXED_IDS = 256 + 256 + 2   # ids: bytes, bytes that end a word, start and end


class Tokenizer:
    """Byte-level byte pair encoding.

    A word is first its bytes, the last one marked </w>; then pairs of neighbours are merged, in the
    order in which they were learned, most frequent first. Ids, in this order: 256 bytes, 256 bytes
    that end a word, the merges, start, end. Any text has an encoding: unknown words stay bytes.
    """

    def __init__(self, merges):
        """merges: pairs of symbols in order of priority, such as ("c", "a"), ("ca", "r</w>")."""
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: i for i, pair in enumerate(self.merges)}
        single = list(bytes_to_unicode().values())
        self.symbols = [*single, *(s + "</w>" for s in single), *(a + b for a, b in self.merges)]
        self.id_of = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.byte_of = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
        self.ids_of_word = {}   # cache: words repeat
        self.start = len(self.symbols)
        self.end = len(self.symbols) + 1
        self.vocab_size = len(self.symbols) + 2

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn merges from texts until there are vocab_size ids, or every word is one symbol."""
        counts = collections.Counter(
            word for text in texts for word in WORD.findall(clean_text(text)))
        words = [cls.split(word) for word in counts]   # each a tuple of symbols
        pairs = collections.Counter()                  # pair of neighbours -> how often it occurs
        words_with = collections.defaultdict(set)      # pair of neighbours -> indices of words

        def count_pairs(i, count):
            for pair in zip(words[i], words[i][1:]):
                pairs[pair] += count
                words_with[pair].add(i)
                if not pairs[pair]:
                    del pairs[pair]

        frequency, merges = list(counts.values()), []
        for i, count in enumerate(frequency):
            count_pairs(i, count)
        while pairs and len(merges) < vocab_size - FIXED_IDS:
            most = max(pairs.values())   # ties are broken by spelling, so training is repeatable
            best = max(pair for pair, count in pairs.items() if count == most)
            merges.append(best)
            for i in words_with.pop(best):   # all other words keep their counts
                count_pairs(i, -frequency[i])   # of the word as it was
                words[i] = merge(words[i], best)
                count_pairs(i, frequency[i])
        return cls(merges)

    @classmethod
    def from_openai(cls, path):
        """Read the published vocabulary (49,408 ids), bpe_simple_vocab_16e6.txt.gz of
        github.com/openai/CLIP: a header, then one merge per line; the first 48,894 are used.

        differs from the published one: "<|endoftext|>" in a text is ordinary characters. There it
        becomes the end token, and a prompt can cut itself short.
        """
        lines = gzip.decompress(Path(path).read_bytes()).decode("utf-8").split("\n")
        return cls(line.split() for line in lines[1:49_408 - FIXED_IDS + 1])

    @staticmethod
    def split(word):
        """"car" -> ("c", "a", "r</w>")"""
        symbols = [bytes_to_unicode()[b] for b in word.encode("utf-8")]
        return (*symbols[:-1], symbols[-1] + "</w>")

    def bpe(self, word):
        """Merge a word step by step, yielding its symbols at the start and after each merge.

        "car" -> ("c", "a", "r</w>"), then ("ca", "r</w>"), then ("car</w>",)
        """
        symbols = self.split(word)
        yield symbols
        while len(symbols) > 1:
            best = min(zip(symbols, symbols[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            symbols = merge(symbols, best)
            yield symbols

    def encode(self, text):
        """Encode a text -> list of ids, without start and end."""
        ids = []
        for word in WORD.findall(clean_text(text)):
            if word not in self.ids_of_word:
                *_, symbols = self.bpe(word)
                self.ids_of_word[word] = [self.id_of[s] for s in symbols]
            ids += self.ids_of_word[word]
        return ids

    def decode(self, ids):
        """Decode a list of ids -> text, with a space after every word; start and end are skipped.
        """
        text = "".join(self.symbols[i] for i in ids if i < self.start).replace("</w>", " ")
        # subtle: the byte 32 is written "Ġ", so a space here can only come from </w>.
        text = b"".join(b" " if s == " " else bytes([self.byte_of[s]]) for s in text)
        return text.decode("utf-8", errors="replace").strip()

    def batch(self, texts, context_length):
        """Encode K texts -> (K, L) int64, L = context_length: start, ids, end, zeros.

        The zeros follow the end token, which does not attend to them. A text that is too long
        loses its tail; the end token stays.
        """
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.start, *self.encode(text)[:context_length - 2], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ---- the Transformer -----------------------------------------------------------------------------

@dataclass
class CLIPConfig:
    stem: str = "conv"             # "conv": convolutions that depend on t; "patch": as published
    patch: int = 4                 # pixels along the side of a patch; for "conv" a power of two
    width: int = 128               # D of the image Transformer
    layers: int = 3                # its blocks
    heads: int = 4                 # its attention heads, width / heads channels each
    text_width: int = 128          # the same three for the text Transformer
    text_layers: int = 2
    text_heads: int = 4
    embed_dim: int = 128           # E, width of the image and text features
    context_length: int = 32       # maximum number of tokens with start and end; published: 77
    max_logit_scale: float = 20.   # paper: 100; a softer p guides better (experiments/LOG.md)
    image_size: int = 32           # pixels, H and W
    noise_aware: bool = True       # False: t does not matter, as published

    @property
    def stem_widths(self):
        """Channels of the conv stem at each resolution: 32, 64, 128 for patch 4 and width 128"""
        return [max(32, self.width >> i) for i in reversed(range(self.patch.bit_length()))]

    def __post_init__(self):
        if min(self.patch, self.width, self.layers, self.heads, self.text_width, self.text_layers,
               self.text_heads, self.embed_dim, self.image_size) < 1:
            raise ValueError("every size, and every number of layers or heads, must be at least 1")
        if self.stem not in ("conv", "patch"):
            raise ValueError(f"stem must be conv or patch, not {self.stem!r}")
        if self.stem == "conv" and not self.noise_aware:
            raise ValueError("the conv stem depends on t; without noise-awareness use patch")
        if self.stem == "conv" and (self.patch & (self.patch - 1) or self.width < 32 or
                                    any(width % 16 for width in self.stem_widths)):
            raise ValueError(f"the conv stem has {self.stem_widths} channels; each must be a "
                             "multiple of 16, width at least 32, and patch a power of two")
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch {self.patch}")
        if self.width % self.heads or self.text_width % self.text_heads:
            raise ValueError("width must be a multiple of heads, and text_width of text_heads")
        if self.context_length < 3 or not 0 < self.max_logit_scale < math.inf:
            raise ValueError("context_length must be at least 3, max_logit_scale positive, finite")


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017 eq. 1): softmax(q k^T / sqrt(D/heads)) v.

    x: (B, L, D) -> (B, n, D), queries of the first n tokens only; n = None: all L
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, n=None):
        B, L, D = x.shape
        d = D // self.heads
        qkv = self.qkv(x).view(B, L, 3, self.heads, d)                        # (B, L, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # 3 x (B, heads, L, d)
        scores = (q[:, :, :n] * d ** -0.5) @ k.transpose(-2, -1)              # (B, heads, n, L)
        if self.causal:   # a token attends to itself and to those before it
            future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)[:n]
            scores = scores.masked_fill(future, -math.inf)
        values = scores.softmax(dim=-1) @ v                                   # (B, heads, n, d)
        return self.out(values.transpose(1, 2).reshape(B, -1, D))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation to GELU that the published CLIP was trained with."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702   # silu(x) = x sigmoid(x), one kernel instead of two


class TransformerBlock(nn.Module):
    """Pre-LN block: x + attention(LN(x)), then x + MLP(LN(x)).

    x: (B, L, D) -> (B, n, D), the first n tokens only; n = None: all L
    """

    def __init__(self, width, heads, causal):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))

    def forward(self, x, n=None):
        x = x[:, :n] + self.attention(self.ln_1(x), n)
        return x + self.mlp(self.ln_2(x))


# ---- the image encoder ---------------------------------------------------------------------------

class PatchStem(nn.Module):
    """The published stem: one linear map for all patches; it does not depend on t.

    x: (B, 3, H, W) -> (B, D, H/patch, W/patch)
    """

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)

    def forward(self, x, time):
        return self.conv(x)


class ConvStem(nn.Module):
    """Convolutions to the same grid of tokens, each normalised, then scaled and shifted by t.

    differs from CLIP: a small ViT on few images first has to learn that neighbouring pixels
    belong together, and its gradient with respect to the pixels shows the borders of the patches.
    Convolutions start with that knowledge (experiments/LOG.md has the figures).
    """

    def __init__(self, config):
        super().__init__()
        widths = config.stem_widths
        layers = [(3, widths[0], 1)]   # (channels in, channels out, stride) of each convolution
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [(c_in, c_out, 2), (c_out, c_out, 1)]
        self.convs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1) for c_in, c_out, stride in layers)
        self.norms = nn.ModuleList(nn.GroupNorm(c_out // 16, c_out) for _, c_out, _ in layers)
        self.time_projs = nn.ModuleList(
            nn.Linear(config.width, 2 * c_out) for _, c_out, _ in layers)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) or (1, D) -> (B, D, H/patch, W/patch)"""
        for conv, norm, time_proj in zip(self.convs, self.norms, self.time_projs):
            scale, shift = time_proj(time)[:, :, None, None].chunk(2, dim=1)  # (B, c_out, 1, 1)
            x = F.silu(norm(conv(x)) * (1 + scale) + shift)
        return x


class ImageEncoder(nn.Module):
    """Vision Transformer: stem, class token, position embedding, LayerNorm, blocks, LayerNorm,
    projection.

    The time embedding is added to the class token and scales the conv stem's layers. (GLIDE's
    released code has one token for each t.)
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        grid = config.image_size // config.patch   # tokens along each side of the image
        self.stem = {"conv": ConvStem, "patch": PatchStem}[config.stem](config)
        self.class_token = nn.Parameter(torch.randn(D) * D ** -0.5)
        self.position_embedding = nn.Parameter(torch.randn(grid * grid + 1, D) * D ** -0.5)
        self.ln_pre = nn.LayerNorm(D)
        self.ln_post = nn.LayerNorm(D)
        self.blocks = nn.Sequential(
            *(TransformerBlock(D, config.heads, causal=False) for _ in range(config.layers)))
        self.projection = nn.Linear(D, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=D ** -0.5)

    def forward(self, x, time):
        """x: (B, 3, H, W), time: (B, D) or (1, D) -> (B, E)"""
        patches = self.stem(x, time).flatten(2).transpose(1, 2)               # (B, grid^2, D)
        class_token = (self.class_token + time)[:, None].expand(len(x), 1, -1)   # (B, 1, D)
        tokens = torch.cat([class_token, patches], dim=1) + self.position_embedding
        tokens = self.blocks[:-1](self.ln_pre(tokens))                        # (B, 1 + grid^2, D)
        # Only the class token is used from here on: compute the last block for it alone.
        class_token = self.blocks[-1](tokens, n=1)[:, 0]                      # (B, D)
        return self.projection(self.ln_post(class_token))                     # (B, E)


# ---- the text encoder ----------------------------------------------------------------------------

class TextEncoder(nn.Module):
    """Text Transformer with a causal mask; the feature is that of the end token, projected.

    The end token attends to the whole text, and not to the padding that follows.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        D, layers = config.text_width, config.text_layers
        self.end = tokenizer.end
        self.token_embedding = nn.Embedding(tokenizer.vocab_size, D)
        self.position_embedding = nn.Parameter(torch.randn(config.context_length, D) * 0.01)
        self.blocks = nn.Sequential(
            *(TransformerBlock(D, config.text_heads, causal=True) for _ in range(layers)))
        self.ln_final = nn.LayerNorm(D)
        self.projection = nn.Linear(D, config.embed_dim, bias=False)

        # The published standard deviations. The layers that write into the residual stream, two a
        # block, start smaller, so that their sum does not grow with depth.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.projection.weight, std=D ** -0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=D ** -0.5)
            nn.init.normal_(block.attention.out.weight, std=D ** -0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp[2].weight, std=D ** -0.5 * (2 * layers) ** -0.5)

    def forward(self, tokens):
        """tokens: (K, L) int, an end token in every row -> (K, E)"""
        is_end = tokens == self.end                                           # (K, L)
        end_index = is_end.int().argmax(dim=1)                                # (K,)
        length = int(is_end.any(dim=0).nonzero().max()) + 1   # cut the padding common to all
        x = self.token_embedding(tokens[:, :length]) + self.position_embedding[:length]
        x = self.ln_final(self.blocks(x))                                     # (K, length, D)
        return self.projection(x[torch.arange(len(x), device=x.device), end_index])


# ---- CLIP ----------------------------------------------------------------------------------------

def full_precision(x):
    """Context in which autocast, which computes in bf16, is off on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


class CLIP(nn.Module):
    """An image encoder, a text encoder, and the scale that turns their cosines into logits."""

    def __init__(self, config, tokenizer):
        super().__init__()
        D = config.width
        self.config = config
        self.tokenizer = tokenizer
        self.image_encoder = ImageEncoder(config)
        self.text_encoder = TextEncoder(config, tokenizer)
        # Sec. 2.5 of the paper; at its maximum a clamped scale would have no gradient.
        scale = min(1 / 0.07, 0.99 * config.max_logit_scale)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if config.noise_aware:
            # One number in, so smooth in t: nothing jumps from one sampling step to the next.
            self.time_mlp = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
            self.log_scale_time = nn.Linear(D, 1, bias=False)
            nn.init.zeros_(self.log_scale_time.weight)   # at first the same for all t

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """Rebuild a trained CLIP from the dictionary in weights.pt, in eval mode."""
        clip = cls(CLIPConfig(**checkpoint["config"]), Tokenizer(checkpoint["merges"]))
        clip.load_state_dict(checkpoint["weights"])   # fp16, copied into float32
        return clip.eval().requires_grad_(False)

    def time_embedding(self, t):
        """t: (B,) int in 0..T -> (B, D); None: t = 0 for all -> (1, D)"""
        if t is None:
            t = torch.zeros(1, dtype=torch.long, device=self.log_scale.device)
        if not self.config.noise_aware:
            return torch.zeros(len(t), self.config.width, device=t.device)
        with full_precision(t):   # in bf16 only 507 of the 1,001 timesteps would differ
            return self.time_mlp(t[:, None].float() * (4 / T))   # inputs of order 1

    def encode_image(self, x, t=None):
        """Encode images -> image_features: (B, E), unnormalised.

        x: (B, 3, H, W) in [-1, 1], noised up to t; t: (B,) int in 0..T, None: all are clean, t = 0.
        A published CLIP takes x from `preprocess` instead, and t does not matter.
        """
        return self.image_encoder(x, self.time_embedding(t))

    def encode_text(self, tokens):
        """Encode tokens: (K, L) int from tokenizer.batch -> text_features: (K, E), unnormalised."""
        return torch.cat([self.text_encoder(chunk) for chunk in tokens.split(2048)])   # less memory

    def encode_captions(self, texts):
        """Encode K texts -> text_features: (K, E), unnormalised, on CLIP's device."""
        tokens = self.tokenizer.batch(texts, self.config.context_length)
        return self.encode_text(tokens.to(self.log_scale.device))

    def encode_ensemble(self, phrasings):
        """Encode S lists of N texts, ways to write the same -> (N, E), the mean of their features

        Each is normalised before the mean (sec. 3.1.4 of the paper); `logits` normalises the mean.
        """
        return sum(F.normalize(self.encode_captions(texts).float(), dim=-1)
                   for texts in phrasings) / len(phrasings)

    def logit_scale(self, t=None):
        """t: as in encode_image -> (B, 1), or (1, 1) if it is the same for all; <= max_logit_scale

        Learned: the more noise, the less certain CLIP can be, and the flatter the softmax must be.
        """
        log_scale = self.log_scale.view(1, 1)
        if self.config.noise_aware:
            with full_precision(log_scale):
                log_scale = log_scale + self.log_scale_time(self.time_embedding(t))
        return log_scale.clamp(max=math.log(self.config.max_logit_scale)).exp()

    def logits(self, image_features, text_features, t=None):
        """Compute logit_scale(t) times the cosine of each image with each caption.

        image_features: (B, E), text_features: (K, E), t as in encode_image -> (B, K)
        Both are normalised here, in each call: a caller need not, but may.
        """
        images = F.normalize(image_features.float(), dim=-1)
        captions = F.normalize(text_features.float(), dim=-1)
        with full_precision(images):   # bf16 could reorder close captions
            return self.logit_scale(t) * (images @ captions.T)

    @torch.no_grad()
    def caption_probs(self, x, text_features, t=None):
        """Predict which caption an image has, zero-shot (sec. 3.1 of the paper) -> (N, K)

        x: (N, 3, H, W) and t as in encode_image, in parts of 250 images; text_features: (K, E)
        """
        t = torch.zeros(len(x), dtype=torch.long, device=x.device) if t is None else t
        image_features = torch.cat([self.encode_image(images, ts)
                                    for images, ts in zip(x.split(250), t.split(250))])
        return self.logits(image_features, text_features, t).softmax(dim=1)

    # Published weights (skip at first)

    @classmethod
    def from_openai(cls, weights, tokenizer):
        """Build one of OpenAI's CLIPs with a Vision Transformer: ViT-B/32, B/16, L/14, L/14@336.
        (QuickGELU, 64 channels a head: other projects' weights in this layout may differ in that.)

        weights: name -> tensor in the published layout; tokenizer: Tokenizer.from_openai. Sizes
        come from the shapes, all weights are used. ValueError if the weights are of another kind.
        encode_image then takes images from `preprocess`; see accept_pixels for guidance.
        """
        weights = {name: w.float() for name, w in weights.items()   # stored as fp16
                   if name not in ("input_resolution", "context_length", "vocab_size")}
        if "visual.layer1.0.conv1.weight" in weights:
            raise ValueError("this is a ResNet CLIP; only those with a Vision Transformer fit")
        if not {"visual.conv1.weight", "visual.proj", "text_projection"} <= weights.keys():
            raise ValueError("these are not the weights of a published CLIP")
        D, _, _, patch = weights["visual.conv1.weight"].shape
        layers = lambda tower: sum(name.startswith(f"{tower}transformer.") and
                                   name.endswith("ln_1.weight") for name in weights)
        text_width, E = weights["text_projection"].shape
        grid = math.isqrt(len(weights["visual.positional_embedding"]) - 1)
        config = CLIPConfig(
            stem="patch", patch=patch, width=D, layers=layers("visual."), heads=max(1, D // 64),
            text_width=text_width, text_layers=layers(""), text_heads=max(1, text_width // 64),
            embed_dim=E, context_length=len(weights["positional_embedding"]),
            max_logit_scale=101.,   # published scales are up to 100, so none is cut off
            image_size=patch * grid, noise_aware=False)
        if len(weights["token_embedding.weight"]) != tokenizer.vocab_size:
            raise ValueError(f"the weights are for {len(weights['token_embedding.weight']):,} "
                             f"tokens, the vocabulary has {tokenizer.vocab_size:,}")
        clip = cls(config, tokenizer)
        names = {published_name(name): name for name in clip.state_dict()}
        if names.keys() != weights.keys():
            odd = sorted(names.keys() ^ weights.keys())
            raise ValueError(f"{len(odd)} tensors are missing or extra, such as {odd[0]}")
        clip.load_state_dict({ours: weights[name].T if name.endswith(TRANSPOSED) else weights[name]
                              for name, ours in names.items()})
        return clip.eval().requires_grad_(False)

    def to_openai(self):
        """Export the weights in the published layout -> name: tensor; ValueError if noise-aware"""
        if self.config.noise_aware:
            raise ValueError("the published layout has no timesteps and no convolutions")
        weights = {published_name(name): w for name, w in self.state_dict().items()}
        return {name: w.T.contiguous() if name.endswith(TRANSPOSED) else w
                for name, w in weights.items()}


# ---- the published layout (skip at first) --------------------------------------------------------

TRANSPOSED = "visual.proj", "text_projection"   # published as (D, E), nn.Linear has (E, D)


def published_name(name):
    """Translate a name of ours: "text_encoder.blocks.0.ln_1.bias" ->
    "transformer.resblocks.0.ln_1.bias"
    """
    for ours, theirs in (
            ("image_encoder.projection.weight", "visual.proj"), ("image_encoder.", "visual."),
            ("text_encoder.projection.weight", "text_projection"), ("text_encoder.", ""),
            ("stem.conv.", "conv1."), ("class_token", "class_embedding"),
            ("position_embedding", "positional_embedding"), ("blocks.", "transformer.resblocks."),
            ("attention.qkv.", "attn.in_proj_"), ("attention.out.", "attn.out_proj."),
            ("mlp.0.", "mlp.c_fc."), ("mlp.2.", "mlp.c_proj."), ("log_scale", "logit_scale")):
        name = name.replace(ours, theirs)
    return name


# Mean and standard deviation of RGB in [0, 1] over the published training images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def preprocess(image, size):
    """Preprocess a PIL image as published: bicubic, centre crop, normalised -> (3, size, size)"""
    image = image.convert("RGB").resize([size * n // min(image.size) for n in image.size],
                                        resample=3)   # Pillow's number for bicubic
    left, top = (round((n - size) / 2) for n in image.size)
    image = image.crop((left, top, left + size, top + size))
    x = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3) / 255
    return ((x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def preprocess_pixels(x, size):
    """Preprocess square images in [-1, 1], differentiable: (B, 3, H, W) -> (B, 3, size, size)

    Like `preprocess`, but for its rounding and clipping to bytes.
    """
    x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True) / 2 + 0.5
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def accept_pixels(clip):
    """Change encode_image of a published CLIP to take what ours takes: (B, 3, H, W) in [-1, 1], of
    any size, and a t, which it ignores -> clip, the same object"""
    encode_image, size = clip.encode_image, clip.config.image_size
    clip.encode_image = lambda x, t=None: encode_image(preprocess_pixels(x, size))
    return clip


# ---- training ------------------------------------------------------------------------------------

def contrastive_loss(logits, caption_ids):
    """Compute the symmetric cross-entropy of CLIP (Radford et al. 2021, fig. 3) -> scalar

    logits: (B, B), image i against the caption of image j; caption_ids: (B,) int

    differs from the paper only where n images of a batch share a caption: then all n are right,
    with a target of 1/n each. With B different captions the targets are arange(B), as printed.
    (With noised images loss_t partly compares noise levels. closed_set_loss avoids that, but needs
    all captions in each step; where there are too many, train.py uses this one.)
    """
    same = (caption_ids[:, None] == caption_ids).float()                      # (B, B)
    targets = same / same.sum(dim=1, keepdim=True)
    loss_i = F.cross_entropy(logits, targets)      # each image among all captions
    loss_t = F.cross_entropy(logits.T, targets)    # each caption among all images
    return (loss_i + loss_t) / 2


TEXT_TO_IMAGE = 0.1   # weight of the second term of closed_set_loss


def closed_set_loss(logits, is_true, clean):
    """Compute the loss of each image against all N texts of a closed set -> scalar

    logits: (B, N); is_true: (B, N) bool, which texts are true of each image: of "a bus" and
    "something red" both may be true, or neither; clean: (n,) int, indices of images without noise

    differs from the paper: where captions are few, use them all, not only those of the batch. No
    batch is too small, and the hardest negatives ("red and white") are always there. The softmax
    among the captions then estimates p(caption | x_t), which guidance needs; within a batch it
    depends on which captions the batch happens to hold.
    Text to image (weight TEXT_TO_IMAGE): each caption against the clean images of the batch, of
    which several may be right. Noised images would be ranked by their noise, not their content.
    """
    def losses(logits, is_true):   # 0 in rows where nothing is true
        targets = is_true / is_true.sum(dim=1, keepdim=True).clamp(min=1)
        return F.cross_entropy(logits, targets, reduction="none")

    true_of = is_true[clean].T                                                # (N, n)
    text_to_image = losses(logits[clean].T, true_of).sum() / true_of.any(1).sum().clamp(min=1)
    return losses(logits, is_true).mean() + TEXT_TO_IMAGE * text_to_image


# ---- demonstration -------------------------------------------------------------------------------

def squares(n, generator):
    """Draw n images of one coloured square on the left or right -> (n, 3, 16, 16), n captions"""
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
    x, captions = -torch.ones(n, 3, 16, 16), []
    for image, i in zip(x, torch.randint(8, (n,), generator=generator).tolist()):
        name, left = list(colours)[i // 2], 1 + 8 * (i % 2)
        image[:, 5:11, left:left + 6] = torch.tensor(colours[name])[:, None, None]
        captions.append(f"a {name} square on the {('left', 'right')[i % 2]}")
    return x + 0.3 * torch.randn(x.shape, generator=generator), captions


if __name__ == "__main__":   # one sentence through the tokenizer, then a CLIP of squares
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = Tokenizer.train(squares(100, generator)[1], vocab_size=600)
    sentence = "A  GREEN&amp;red squirrel"
    for word in WORD.findall(clean_text(sentence)):
        print("  ->  ".join(" ".join(symbols) for symbols in tokenizer.bpe(word)))
    print("ids", tokenizer.batch([sentence], context_length=16).tolist()[0])

    clip = CLIP(CLIPConfig(image_size=16, layers=1, text_layers=1, context_length=16), tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    for step in range(201):   # about four images share a caption: a loss of ln 4 = 1.39 at best
        x, captions = squares(32, generator)
        caption_ids = torch.tensor([sorted(set(captions)).index(caption) for caption in captions])
        logits = clip.logits(clip.encode_image(x), clip.encode_captions(captions))
        loss = contrastive_loss(logits, caption_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3}: loss {loss.item():.2f}")
    names = sorted(set(captions))
    logits = clip.logits(clip.encode_image(x[:1]), clip.encode_captions(names))[0]
    print(f"{captions[0]!r} is classified as {names[logits.argmax()]!r}")

# a</w>
# g r e e n</w>  ->  g re e n</w>  ->  g ree n</w>  ->  g reen</w>  ->  green</w>
# &</w>
# r e d</w>  ->  re d</w>  ->  red</w>
# s q u i r r e l</w>  ->  sq u i r r e l</w>  ->  sq u i r re l</w>
# ids [539, 320, 535, 261, 528, 517, 84, 72, 81, 524, 331, 540, 0, 0, 0, 0]
# step   0: loss 3.53
# step 100: loss 2.12
# step 200: loss 1.88
# 'a red square on the right' is classified as 'a red square on the right'
