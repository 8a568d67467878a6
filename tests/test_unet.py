import torch
import torch.nn.functional as F

from unet import ResBlock, SelfAttention, UNet, UNetConfig


def test_a_unet_that_is_told_captions():
    """It starts as if told nothing, caption 0 stays nothing, and each caption becomes its own."""
    torch.manual_seed(0)
    unet = UNet(UNetConfig(
        channels=32, multipliers=(1,), attention=(), text=True), captions=3)
    torch.nn.init.normal_(unet.last[2].weight)
    for block in [m for m in unet.modules() if isinstance(m, ResBlock)]:
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x, t = torch.randn(1, 3, 4, 6).expand(4, -1, -1, -1), torch.full((4,), 300)
    out = unet(x, t, torch.arange(4))
    assert torch.allclose(out[0], unet(x, t)[0], atol=1e-5)
    assert all((out[i] - out[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    out.square().sum().backward()
    grad = unet.caption.weight.grad
    assert (grad[0] == 0).all() and (grad[1:] != 0).any(dim=1).all()


def test_the_attention_of_the_unet_is_softmax_attention():
    torch.manual_seed(0)
    layer = SelfAttention(64)
    torch.nn.init.normal_(layer.out.weight, std=.1)
    x = torch.randn(2, 64, 3, 5)
    tokens = layer.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (part.view(2, 15, 2, 32).transpose(1, 2)
               for part in layer.qkv(tokens).chunk(3, dim=-1))
    expected = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 15, 64))
    assert torch.allclose(layer(x), x + expected.transpose(1, 2).view(2, 64, 3, 5), atol=1e-5)


def test_unet_at_start_says_zero_and_takes_any_shape_that_halves():
    unet = UNet(UNetConfig(
        channels=16, multipliers=(1, 2), blocks=1, attention=(1,)))
    out = unet(torch.randn(2, 3, 16, 24), torch.tensor([1, 1000]))
    assert out.shape == (2, 3, 16, 24) and (out == 0).all()


def test_unet_depends_on_time_and_pictures_do_not_interact(unet):
    x, t = torch.randn(3, 3, 8, 12), torch.tensor([5, 500, 995])
    with torch.no_grad():
        together, alone = unet(x, t), unet(x[1:2], t[1:2])
        assert torch.isfinite(together).all() and torch.allclose(together[1:2], alone, atol=1e-5)
        assert not torch.allclose(unet(x[1:2], t[2:]), alone, atol=1e-3)
