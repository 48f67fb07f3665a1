"""The 3×3 convolution in its three forms: each is PyTorch's, and each is taken where it is quick."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from minisd.nn.blocks import Conv3x3
from minisd.runtime import convolution as forms
from minisd.runtime.convolution import conv3x3, conv3x3_as_product, conv3x3_winograd
from minisd.runtime.optimize import optimize


def numbers(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("b", "h", "w"), [(1, 1, 1), (2, 8, 8), (3, 5, 7)])
def test_a_convolution_as_a_product_is_the_convolution(memory_format, b, h, w):
    x, weight = (y.contiguous(memory_format=memory_format) for y in (numbers(b, 6, h, w), numbers(4, 6, 3, 3)))
    expected = F.conv2d(x, weight, numbers(4), padding=1)
    torch.testing.assert_close(conv3x3_as_product(x, weight, numbers(4)), expected, atol=1e-13, rtol=0)


@given(
    b=st.integers(1, 3),
    c=st.integers(1, 5),
    o=st.integers(1, 5),
    h=st.integers(1, 13),
    w=st.integers(1, 13),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    scratch=st.sampled_from([1, 36, 400, 2**23]),
)
def test_fewer_products_give_the_convolution(b, c, o, h, w, padding, memory_format, scratch):
    """However the picture falls into tiles, and the tiles and filters into parts."""
    h, w = max(h, 3 - 2 * padding[0]), max(w, 3 - 2 * padding[1])
    x, weight = (y.contiguous(memory_format=memory_format) for y in (numbers(b, c, h, w), numbers(o, c, 3, 3)))
    expected = F.conv2d(x, weight, numbers(o), padding=padding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "SCRATCH", scratch)
        found = conv3x3_winograd(x, weight, numbers(o), padding)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_fewer_products_round_hardly_more_coarsely():
    x, weight, bias = numbers(1, 256, 32, 32), numbers(128, 256, 3, 3) / 48, numbers(128)
    exact = F.conv2d(x, weight, bias, padding=1)
    small = (y.float() for y in (x, weight, bias))
    assert (conv3x3_winograd(*small) - exact).norm() < 2e-6 * exact.norm()


@pytest.mark.parametrize(
    ("channels", "side", "dtype", "form"),
    [
        (64, 2, torch.float32, "conv3x3_as_product"),
        (64, 4, torch.float32, None),
        (64, 4, torch.bfloat16, "conv3x3_as_product"),
        (64, 16, torch.float32, None),
        (64, 48, torch.float32, None),
        (128, 32, torch.float32, None),
        (128, 48, torch.float32, "conv3x3_winograd"),
        (128, 48, torch.bfloat16, None),
    ],
)
def test_the_form_that_is_quick_for_a_size_is_taken(monkeypatch, channels, side, dtype, form):
    assert taken(monkeypatch, numbers(1, channels, side, side, dtype=dtype)) == ([form] if form else [])


def test_what_learns_is_compiled_or_transformed_takes_pytorchs_own(monkeypatch):
    x = numbers(1, 128, 48, 48, dtype=torch.float32)
    assert taken(monkeypatch, x, learns=True) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert taken(monkeypatch, x) == []
    monkeypatch.setattr(forms, "is_transformed", lambda: True)
    assert taken(monkeypatch, x) == []


def taken(monkeypatch, x, learns=False) -> list[str]:
    """The forms that a Conv3x3 takes, beside PyTorch's own."""
    seen = []
    for name in ("conv3x3_as_product", "conv3x3_winograd"):
        monkeypatch.setattr(forms, name, lambda x, *_, name=name: seen.append(name) or x)
    with torch.set_grad_enabled(learns):
        optimize(Conv3x3(x.shape[1], x.shape[1]).to(x.dtype))(x)
    return seen


def test_a_bias_that_learns_alone_gets_its_gradient():
    conv = optimize(Conv3x3(128, 128)).requires_grad_(False)
    conv.bias.requires_grad_(True)
    conv(numbers(1, 128, 48, 48, dtype=torch.float32)).sum().backward()
    torch.testing.assert_close(conv.bias.grad, torch.full((128,), 48.0 * 48.0))


def test_products_of_rounded_factors_are_not_for_it(monkeypatch):
    x, before = numbers(1, 128, 48, 48, dtype=torch.float32), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert taken(monkeypatch, x) == []
    finally:
        torch.set_float32_matmul_precision(before)
    assert taken(monkeypatch, x) == ["conv3x3_winograd"]


def test_stripes_without_padding_above_take_the_same_form():
    x, weight, bias = (y.float() for y in (numbers(1, 128, 50, 48), numbers(128, 128, 3, 3) / 34, numbers(128)))
    with torch.no_grad():
        found = conv3x3(x, weight, bias, padding=(0, 1))
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=(0, 1)), atol=1e-4, rtol=0)
    assert not torch.equal(found, F.conv2d(x, weight, bias, padding=(0, 1)))  # by another way
