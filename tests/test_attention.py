"""softmax(q kᵀ · scale) v: every implementation is the formula."""

import re
from pathlib import Path

import pytest
import torch
from einops import rearrange

from minisd import attention
from minisd.runtime import kernels
from minisd.runtime.kernels import IMPLEMENTATIONS
from minisd.runtime.kernels.choice import choose

# the others have their own tests: test_avx512_attention.py, test_fused_attention.py
EVERYWHERE = [name for name in IMPLEMENTATIONS if name not in ("avx512", "fused", "hopper")]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # rounding of dtype


def by_hand(q, k, v, causal, scale):
    """Written out in float64, one query at a time."""
    out = torch.empty_like(q, dtype=torch.float64)
    for n in range(q.shape[1]):
        last = n + 1 if causal else k.shape[1]
        scores = (q[:, n, None].double() * k[:, :last].double()).sum(-1) * scale
        out[:, n] = (scores.softmax(1)[..., None] * v[:, :last].double()).sum(1)
    return out


@pytest.mark.parametrize("impl", ["auto", *EVERYWHERE])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n", "m", "i", "d", "causal", "scale"),
    [
        (16, 16, 2, 40, False, None),
        (16, 77, 8, 40, False, None),
        (33, 7, 1, 64, False, 0.3),
        (1, 1, 3, 8, False, None),
        (12, 12, 2, 16, True, None),
        (9, 9, 1, 512, False, None),
    ],
)
def test_every_attention_impl_agrees(impl, dtype, n, m, i, d, causal, scale):
    g = torch.Generator().manual_seed(n * m + d)
    q = torch.randn(2, n, i, d, generator=g).to(dtype)
    k, v = (torch.randn(2, m, i, d, generator=g).to(dtype) for _ in range(2))
    out = attention(q, k, v, causal=causal, scale=scale, impl=impl)
    assert out.dtype == dtype
    assert out.shape == q.shape
    expected = by_hand(q, k, v, causal, d**-0.5 if scale is None else scale)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_every_attention_impl_has_the_right_gradients(impl):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 5, generator=g, dtype=torch.float64, requires_grad=True) for n in (4, 6, 6))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, impl=impl), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_auto_trains_in_float32_on_a_cpu_and_rounds_once(dtype, autocast, causal):
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 12, 2, 8, generator=g).to(dtype).requires_grad_() for _ in range(3))
    target = torch.randn(2, 12, 2, 8, generator=g).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = attention(q, k, v, causal=causal)
    exact = by_hand(*(x.detach() for x in (q, k, v)), causal, 8**-0.5)
    torch.testing.assert_close(out.detach(), exact.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    attention(*wide, causal=causal, impl="naive").backward(target.double())
    out.backward(target)
    for given, expected in zip((q, k, v), wide, strict=True):
        torch.testing.assert_close(given.grad.double(), expected.grad, atol=1e-3, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_views_of_a_packed_product_are_taken_as_they_are(impl):
    packed = torch.randn(2, 10, 3 * 4 * 8, generator=torch.Generator().manual_seed(1))
    q, k, v = (x.unflatten(-1, (4, 8)) for x in packed.chunk(3, dim=-1))
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), impl="naive")
    torch.testing.assert_close(attention(q, k, v, impl=impl), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_scores_near_minus_200_do_not_vanish(impl):
    q = torch.full((1, 3, 1, 4), 10.0)
    k = -q + torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(2)) * 0.1
    v = torch.randn(1, 3, 1, 4, generator=torch.Generator().manual_seed(3))
    expected = by_hand(q, k, v, False, 0.5)
    torch.testing.assert_close(attention(q, k, v, impl=impl).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("keys", "width", "dtype", "picked"),
    [
        (77, 40, torch.bfloat16, "sdpa32"),
        (256, 64, torch.bfloat16, "sdpa32"),
        (256, 128, torch.bfloat16, "sdpa32"),  # the mini VAE
        (1024, 40, torch.bfloat16, "sdpa"),
        (1024, 40, torch.float16, "sdpa32"),
        (77, 40, torch.float32, "sdpa"),
    ],
)
def test_auto_trains_few_keys_in_float32_on_a_cpu(keys, width, dtype, picked, monkeypatch):
    monkeypatch.setattr("minisd.runtime.kernels.choice.own_kernel_is_quick", lambda: True)
    q, k = (torch.empty(1, n, 1, width, dtype=dtype) for n in (1024, keys))
    q.requires_grad_()
    assert choose(q, k, k, False, 1.0) == picked


def test_an_unknown_impl_is_refused_with_the_known_ones():
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(
        ValueError,
        match="unknown attention impl 'flash'; known: auto, naive, matmul, sdpa, sdpa32, avx512, fused, hopper",
    ):
        attention(q, q, q, impl="flash")


def test_shapes_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match="attention takes q 'b n i d'"):
        attention(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 5))


@pytest.mark.parametrize("layout", ["b n (i d)", "b (i d) n"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_never_writes_all_scores_out_on_a_cpu(layout, dtype):
    """PyTorch does so, without a word, for rows that are not contiguous: 1 GiB for one image of 512 x 512 pixels."""
    shape = {"b n (i d)": (1, 64, 80), "b (i d) n": (1, 80, 64)}[layout]
    q, k, v = (rearrange(torch.randn(shape, dtype=dtype), f"{layout} -> b n i d", i=2) for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        attention(q, k, v, impl="sdpa")
    names = {event.name for event in seen.events()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_the_walk_to_the_kernels_runs_as_it_is_written():
    page = (Path(kernels.__file__).parent / "README.md").read_text()
    code = dict(torch=torch)
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, code)
    g = torch.Generator().manual_seed(7)
    q, k, v = (3 * torch.randn(n, 40, generator=g, dtype=torch.float64) for n in (30, 200, 200))
    expected = attention(q[None, :, None], k[None, :, None], v[None, :, None], impl="naive")[0, :, 0]
    torch.testing.assert_close(code["naive"](q, k, v), expected)
    torch.testing.assert_close(code["online"](q, k, v), expected)
