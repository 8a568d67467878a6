"""Small models, random in every parameter, that the test files share."""
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cars   # noqa: E402
import tinyclip   # noqa: E402
import tinyddpm   # noqa: E402

torch.set_num_threads(1)

# Toys learn as well from 16 lists of texts; to make and read 192 takes three seconds each time.
ALL_DESCRIPTIONS = cars.descriptions
cars.descriptions = lambda count, seed=0: ALL_DESCRIPTIONS(min(count, 16), seed)


class NoFloat64(TorchDispatchMode):
    """A context in which no operation may have a result in float64, which MPS does not support."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            assert not isinstance(x, torch.Tensor) or x.dtype != torch.float64, function
        return out


@pytest.fixture
def no_float64():
    return NoFloat64()


@pytest.fixture
def alpha_bar():
    return tinyddpm.cosine_alpha_bar()


@pytest.fixture
def clip():
    """An untrained CLIP for 16 x 16 pixels, or as many patches in another shape, as in 8 x 32."""
    torch.manual_seed(0)
    tokenizer = tinyclip.Tokenizer.train(cars.CAPTIONS, 4096)
    config = tinyclip.CLIPConfig(width=32, layers=1, heads=2, text_width=32, text_layers=1,
                                 text_heads=2, embed_dim=16, image_size=16)
    clip = tinyclip.CLIP(config, tokenizer).eval()
    torch.nn.init.normal_(clip.log_scale_time.weight, std=0.1)
    return clip


@pytest.fixture
def unet():
    """An untrained U-Net with a condition of width 16; its zero-initialised layers are random too,
    so that every path shows in the output."""
    torch.manual_seed(0)
    unet = tinyddpm.UNet(tinyddpm.UNetConfig(
        channels=16, multipliers=(1, 2), attention=(1,), cond_dim=16, image_size=16)).eval()
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return unet


@pytest.fixture
def text_features(clip):
    with torch.no_grad():
        return clip.encode_captions(cars.CAPTIONS)
