"""Chapter 2b: CLIP. Two encoders, one for words and one for pictures, whose features agree when
picture and words do.

    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"
        arxiv.org/abs/2103.00020
    Nichol et al. 2021, "GLIDE" (sec. 2.4: CLIP on noised pictures)
        arxiv.org/abs/2112.10741
    Xiao et al. 2021, "Early Convolutions Help Transformers See Better" (the stem)
        arxiv.org/abs/2106.14881

This CLIP also sees pictures through noise: t = 0 is a clean picture, t = 1..T the x_t of the
diffusion model, and both its features and the sharpness of its opinion, logit_scale(t), depend on
t. That is what lets it guide every step of a sampler.

Shapes: B pictures, K captions, L tokens, D width, E embedding width; pictures (B, 3, H, W) in
[-1, 1] with H = W = image_size.

Left out: the published weights, ResNet towers.
"""
import math
from dataclasses import dataclass

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
        if min(self.patch, self.width, self.layers, self.heads, self.text_width, self.text_layers,
               self.text_heads, self.embed_dim, self.image_size) < 1:
            raise ValueError("every size, and every number of layers or heads, must be at least 1")
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


# ---- the Transformer -----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017 eq. 1): softmax(q k^T / sqrt(D/heads)) v.

    x: (B, L, D) -> (B, n, D), of the first n tokens, which look at all L; n = None is for all.
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
        if self.causal:   # a token sees itself and what stands before it
            future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)[:n]
            scores = scores.masked_fill(future, -math.inf)
        mixed = scores.softmax(dim=-1) @ v                                    # (B, heads, n, d)
        return self.out(mixed.transpose(1, 2).reshape(B, -1, D))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the approximation to GELU that the published CLIP was trained with."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702   # silu(x) = x sigmoid(x), in one go and not in two


class TransformerBlock(nn.Module):
    """Pre-LN: x + attention(LN(x)), then x + MLP(LN(x)).

    x: (B, L, D) -> (B, n, D), the first n tokens; n = None is for all.
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
        tokens = self.blocks[:-1](self.ln_pre(tokens))                        # (B, 1 + grid^2, D)
        # What the other tokens become in the last block nobody reads.
        class_token = self.blocks[-1](tokens, n=1)[:, 0]                      # (B, D)
        return self.projection(self.ln_post(class_token))                     # (B, E)


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
    """An image encoder, a text encoder, and the scale that turns their cosines into logits.

    tokenizer: a bpe.Tokenizer.
    """

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
        """tokens: (K, L) int from tokenizer.batch -> text_features: (K, E), unnormalised."""
        return torch.cat([self.text(part) for part in tokens.split(2048)])   # to save memory

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


# ---- training ------------------------------------------------------------------------------------

TEXT_TO_IMAGE = 0.1   # weight of the second term of clip_loss


def clip_loss(logits, caption_of, is_clean):
    """Contrastive loss, differs from the paper: every picture against all captions of the world.

    logits: (B, K) for the K captions compared, all there are unless they are very many (see
    jobs.some_captions), caption_of: (B,) int in 0..K-1, each picture's own caption, is_clean: (B,)
    bool, which pictures carry no noise -> scalar

    Image to text: cross-entropy of each picture's own caption among all K. The paper's in-batch
    loss is the case in which the captions are the batch's own; with few captions in the world we
    can afford them all, so no batch is too small, repeated captions do no harm, and every near
    miss ("red and white") is always among the distractors. The softmax is then calibrated: it
    estimates p(caption | x_t), which is what guidance needs.

    Text to image, weighted by TEXT_TO_IMAGE: each caption that occurs among the clean pictures has
    to find its own there, of which there may be several. Only clean ones: how noisy a picture is
    tells nothing about its caption, but would decide this contest.
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


if __name__ == "__main__":   # what the shipped CLIP sees in one car, through more and more noise
    import cars
    import checkpoints
    import data
    from tinyddpm import cosine_alpha_bar, q_sample

    clip, content = checkpoints.load_model(checkpoints.SHIPPED / "clip.pt", "clip")
    pictures, labels = cars.render(seed=0, indices=[cars.VALIDATION], size=32)
    print("the truth:", cars.caption(*labels[0]))
    x_0, text_features = data.to_float(pictures), clip.encode_captions(content["captions"])
    eps = torch.randn(x_0.shape, generator=data.generator(0))
    for t in torch.tensor([[0], [300], [600], [800], [900]]):
        x_t = q_sample(x_0, t, eps, cosine_alpha_bar())
        p = clip.logits(clip.encode_image(x_t, t), text_features, t).softmax(dim=1)[0]
        best = [f"{p[i]:4.0%} {content['captions'][i]}" for i in p.topk(2).indices]
        print(f"t = {int(t):3}:", ", ".join(best))

# the truth: a yellow and gray truck
# t =   0:  99% a yellow and gray truck,   0% a yellow and gray van
# t = 300:  99% a yellow and gray truck,   1% a yellow and gray van
# t = 600:  73% a yellow and gray truck,  23% a yellow and gray van
# t = 800:  21% a yellow and gray truck,   8% a yellow and gray van
# t = 900:   3% a gray and yellow jeep,   3% a white and yellow jeep
