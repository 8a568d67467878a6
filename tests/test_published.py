"""The published CLIP: its layout, its files, and guidance by it, with random weights.

The reference is built from torch's own modules, under the published names, sequence first.
"""
import collections
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
import tinyclip
from conftest import ROOT
from infra import cli, published

VOCABULARY = ROOT.parent / "shared/openai_clip/bpe_simple_vocab_16e6.txt.gz"
pytestmark = [
    pytest.mark.skipif(not VOCABULARY.exists(), reason="needs the published vocabulary"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")]
TOY = {"width": 128, "layers": 2, "patch": 8, "size": 32, "embed": 64, "text_width": 64,
       "text_layers": 1}
VIT_B_32 = {"width": 768, "layers": 12, "patch": 32, "size": 224, "embed": 512, "text_width": 512,
            "text_layers": 12}


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width, mask):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2, self.mask = nn.LayerNorm(width), nn.LayerNorm(width), mask
        self.mlp = nn.Sequential(collections.OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))

    def forward(self, x):   # (L, B, D)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, mask=None):
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, mask) for _ in range(layers)))

    def forward(self, x):   # (B, L, D)
        return self.resblocks(x.permute(1, 0, 2)).permute(1, 0, 2)


class VisionTransformer(nn.Module):
    def __init__(self, width, layers, patch, size, embed, **_):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.proj = nn.Parameter(torch.randn(width, embed) * width ** -0.5)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding + torch.zeros_like(x[:, :1]), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Published(nn.Module):
    def __init__(self, text_width, text_layers, embed, **vision):
        super().__init__()
        self.visual = VisionTransformer(embed=embed, **vision)
        self.transformer = Transformer(text_width, text_layers,
                                       torch.full((77, 77), -math.inf).triu(1))
        self.token_embedding = nn.Embedding(49_408, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(77, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed) * text_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(100.)))

    def encode_text(self, tokens):
        x = self.transformer(self.token_embedding(tokens) + self.positional_embedding)
        rows = torch.arange(tokens.shape[0])
        return self.ln_final(x)[rows, tokens.argmax(dim=1)] @ self.text_projection

    def forward(self, x, tokens):
        features = self.visual(x), self.encode_text(tokens)
        image, text = (f / f.norm(dim=1, keepdim=True) for f in features)
        return self.logit_scale.exp() * image @ text.T


@pytest.fixture(scope="module")
def tokenizer():
    return tinyclip.Tokenizer.from_openai(VOCABULARY)


def reference(sizes):
    torch.manual_seed(0)
    return Published(**sizes).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the toy, in three formats, beside the vocabulary; -> folder, state dict"""
    folder, model = tmp_path_factory.mktemp("published"), reference(TOY)
    weights = model.state_dict()
    shutil.copy(VOCABULARY, folder)
    torch.save({name: w.half() for name, w in weights.items()}, folder / "plain.pt")
    example = torch.zeros(2, 3, 32, 32), torch.zeros(2, 77, dtype=torch.long)
    torch.jit.save(torch.jit.trace(model, example), folder / "script.pt")
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, w in weights.items():
        raw = w.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(w.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    head = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    return folder, weights


# ---- the layout ----------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [TOY, VIT_B_32], ids=["toy", "ViT-B/32"])
def test_features_and_logits_are_those_of_the_published_architecture(sizes, tokenizer):
    """To 1e-5, in torch's own modules."""
    model = reference(sizes)
    clip = tinyclip.CLIP.from_openai(model.state_dict(), tokenizer)
    x = torch.randn(2, 3, sizes["size"], sizes["size"])
    tokens = tokenizer.batch(["a photo of a red bus.", "a van"], 77)
    image, text = clip.encode_image(x), clip.encode_text(tokens)
    assert (image - model.visual(x)).abs().max() < 1e-5
    assert (text - model.encode_text(tokens)).abs().max() < 1e-5
    assert (clip.logits(image, text) - model(x, tokens)).abs().max() < 2e-5   # of up to 100
    assert image.isfinite().all() and image.std() > 0.1 and text.std() > 0.1


@pytest.mark.parametrize("name, sizes", [
    ("ViT-B/16", {"width": 768, "patch": 16, "size": 224}),
    ("ViT-L/14", {"width": 1024, "patch": 14, "size": 224}),
    ("ViT-L/14@336", {"width": 1024, "patch": 14, "size": 336})])
def test_sizes_come_from_the_shapes(name, sizes, tokenizer):
    """Of the other published ones, here with one block."""
    model = reference({**TOY, **sizes, "layers": 1})
    config = tinyclip.CLIP.from_openai(model.state_dict(), tokenizer).config
    assert (config.width, config.patch, config.image_size, config.heads) == (
        sizes["width"], sizes["patch"], sizes["size"], sizes["width"] // 64)
    assert (config.context_length, config.text_width, config.layers) == (77, 64, 1)


def test_there_and_back_is_exact(tokenizer):
    """to_openai gives every tensor again; a noise-aware CLIP has no such form."""
    weights = reference(TOY).state_dict()
    back = tinyclip.CLIP.from_openai(weights, tokenizer).to_openai()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], w) for name, w in weights.items())
    with pytest.raises(ValueError, match="no timesteps"):
        tinyclip.CLIP(tinyclip.CLIPConfig(stem="patch"), tokenizer).to_openai()


def test_other_weights_are_refused(tokenizer):
    """A ResNet, foreign tensors, one too many, one missing, another vocabulary."""
    weights = reference(TOY).state_dict()
    load = lambda changed: tinyclip.CLIP.from_openai(changed, tokenizer)
    one = torch.zeros(1)
    for changed, message in (
            ({**weights, "visual.layer1.0.conv1.weight": one}, "ResNet"),
            ({"a": one}, "not the weights"),
            ({**weights, "visual.extra": one}, "1 tensors are .*such as visual.extra"),
            ({name: w for name, w in weights.items() if name != "ln_final.bias"}, "ln_final.bias"),
            ({**weights, "token_embedding.weight": torch.zeros(99, 64)}, "99 tokens")):
        with pytest.raises(ValueError, match=message):
            load(changed)
    extra = {"input_resolution": one, "context_length": one, "vocab_size": one}
    load({**weights, **extra})   # the published files have these numbers too


def test_open_clip_reads_what_we_write(tokenizer):
    """And finds the same features."""
    model = pytest.importorskip("open_clip.model")
    weights = reference(TOY).state_dict()
    clip = tinyclip.CLIP.from_openai(weights, tokenizer)
    theirs = model.CLIP(
        64, model.CLIPVisionCfg(layers=2, width=128, patch_size=8, head_width=64, image_size=32),
        model.CLIPTextCfg(context_length=77, vocab_size=49_408, width=64, heads=1, layers=1),
        quick_gelu=True).eval()
    theirs.load_state_dict(clip.to_openai(), strict=False)   # it has masks as buffers
    x, tokens = torch.randn(2, 3, 32, 32), tokenizer.batch(["a red bus", "a van"], 77)
    assert (theirs.encode_image(x) - clip.encode_image(x)).abs().max() < 1e-5
    assert (theirs.encode_text(tokens) - clip.encode_text(tokens)).abs().max() < 1e-5


# ---- preprocessing -------------------------------------------------------------------------------

def test_preprocessing():
    """The centre of a wide image, normalised; one colour stays one; the differentiable version
    agrees on enlarged images."""
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))
    x = tinyclip.preprocess(image, 30)
    blue = (torch.tensor([0., 0., 1.]) - torch.tensor(tinyclip.MEAN)) / torch.tensor(tinyclip.STD)
    assert x.shape == (3, 30, 30) and torch.allclose(x, blue.view(3, 1, 1).expand_as(x), atol=1e-5)
    pixels = np.random.default_rng(0).integers(60, 200, (32, 32, 3), dtype=np.uint8)
    expected = tinyclip.preprocess(Image.fromarray(pixels), 224)
    x = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).requires_grad_()
    found = tinyclip.preprocess_pixels(x, 224)
    assert (found[0] - expected).abs().max() < 0.02   # Pillow rounds to bytes, 0.015 of these units
    found.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().min() > 0


# ---- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, atol", [("plain.pt", 2e-3), ("script.pt", 0.),
                                        ("a.safetensors", 0.)])
def test_all_tensors_of_a_file_are_read(folder, name, atol):
    """In float32; fp16 as stored."""
    path, weights = folder[0] / name, folder[1]
    tensors = published.load_tensors(path)
    assert published.is_published(path) and tensors.keys() == weights.keys()
    for key, w in weights.items():
        assert tensors[key].dtype == torch.float32
        assert torch.allclose(tensors[key], w, rtol=1e-3, atol=atol)


def test_nothing_in_an_archive_is_run(tmp_path, folder):
    """A TorchScript archive whose pickle asks for os.system gets an object that does nothing."""
    import zipfile
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    evil = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/code/b.py", "")
        archive.writestr("a/data.pkl", evil)
    with pytest.raises(cli.UserError, match="evil.pt is no readable file"):
        published.load_tensors(path)
    assert not marker.exists()


def test_files_that_cannot_be_used_are_one_line(tmp_path, folder):
    """Cut off, missing, without the vocabulary beside it."""
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((folder[0] / "a.safetensors").read_bytes()[:100])
    for path, message in ((cut, "no readable file"), (tmp_path / "no.pt", "no file")):
        with pytest.raises(cli.UserError, match=message):
            published.load_tensors(path)
    alone = shutil.copy(folder[0] / "plain.pt", tmp_path)
    with pytest.raises(cli.UserError, match="needs the published vocabulary beside it"):
        sample.load_models(clip=alone)
    assert not published.is_published(ROOT / "weights/ddpm.pt")


# ---- guidance ------------------------------------------------------------------------------------

def test_a_published_clip_guides_our_ddpm(tmp_path, folder, monkeypatch, capsys):
    """Through x_0_hat, as the command says; the prompt changes the image."""
    monkeypatch.chdir(tmp_path)
    images = []
    for prompt in ("red bus", "a nice old bus"):
        sample.main([prompt, "--clip", str(folder[0] / "plain.pt"), "-n", "1", "--steps", "2",
                     "--device", "cpu", "--out", "a.png"])
        out = capsys.readouterr().out
        assert "method x0-fast instead of lookahead" in out and "not trained" not in out
        images.append(Image.open("a.png").tobytes())
    assert "not judged: the caption is new" in out
    sample.main(["-n", "1", "--steps", "2", "--device", "cpu", "--out", "a.png"])
    assert len({*images, Image.open("a.png").tobytes()}) == 3
