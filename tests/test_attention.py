"""softmax(q kᵀ · scale) v: every implementation is the formula."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from einops import rearrange

from minisd import attention, kernels
from minisd.kernels import IMPLEMENTATIONS, attention_with_lse, weights_from_lse
from minisd.kernels.attention import _bfloat16_products
from minisd.kernels.choice import choose
from minisd.models.attention_maps import attention_weights

EVERYWHERE = [
    name for name in IMPLEMENTATIONS if name not in ("fused", "hopper")
]  # its own tests: test_fused_attention.py
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


@pytest.mark.parametrize("impl", [name for name in EVERYWHERE if name != "blocked"])
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_blocks_of_queries_make_the_same_whole(dtype, causal, rows, monkeypatch):
    g = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(2, 16, 3, 8, generator=g).to(dtype) for _ in range(3))
    monkeypatch.setattr(sys.modules["minisd.kernels.attention"], "BLOCK", rows * 16)
    out = attention(q, k, v, causal=causal, impl="blocked")
    expected = by_hand(q, k, v, causal, 8**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_blocks_keep_their_scores_in_float32():
    """Scores near 100 in bfloat16 are off by up to 0.25, and weights by a quarter."""
    g = torch.Generator().manual_seed(6)
    q = torch.full((1, 64, 1, 4), 10.0).bfloat16()
    k = (10 + torch.rand(1, 64, 1, 4, generator=g) / 4).bfloat16()
    v = torch.randn(1, 64, 1, 4, generator=g).bfloat16()
    out = attention(q, k, v, scale=0.25, impl="blocked")
    assert (out.double() - by_hand(q, k, v, False, 0.25)).abs().max() < 2**-8


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="PyTorch before 2.9 has no such setting")
def test_blocks_leave_the_precision_of_other_products_as_it_was():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    q = torch.ones(1, 4, 1, 4, dtype=torch.bfloat16)
    attention(q, q, q, impl="blocked")
    with pytest.raises(KeyboardInterrupt), _bfloat16_products.used(True):
        raise KeyboardInterrupt
    assert settings.fp32_precision == before
    with _bfloat16_products.used(True):
        attention(q, q, q, impl="blocked")
        assert settings.fp32_precision == "bf16"  # until the last one is done
    assert settings.fp32_precision == before


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="PyTorch before 2.9 has no such setting")
def test_blocks_let_products_inherit_their_precision_as_before():
    q, parent = torch.ones(1, 4, 1, 4, dtype=torch.bfloat16), torch.backends.mkldnn
    attention(q, q, q, impl="blocked")
    before = parent.fp32_precision
    try:
        for said in ("bf16", "ieee"):
            parent.fp32_precision = said
            attention(q, q, q, impl="blocked")
            assert parent.matmul.fp32_precision == said
    finally:
        parent.fp32_precision = before


def test_blocks_in_many_threads_leave_it_as_it_was_too():
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    before = settings and settings.fp32_precision
    q = torch.ones(1, 8, 4, 4, dtype=torch.bfloat16)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: attention(q, q, q, impl="blocked"), range(400)))
    assert (settings and settings.fp32_precision) == before


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_blocks_of_nothing_are_as_pytorchs_own(n, m):
    q, k = torch.ones(2, n, 1, 4), torch.ones(2, m, 1, 4)
    assert torch.equal(attention(q, k, k, impl="blocked"), attention(q, k, k, impl="sdpa"))


def test_auto_can_be_mapped_where_a_cpu_would_take_blocks(monkeypatch):
    monkeypatch.setattr(sys.modules["minisd.kernels.choice"], "blocks_are_quick", lambda: True)
    q, k, v = torch.randn(3, 2, 1, 512, 1, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    naive, near = partial(attention, impl="naive"), {"atol": TOLERANCE[q.dtype], "rtol": TOLERANCE[q.dtype]}
    assert choose(q[0], k[0], v[0], False, 1.0) == "blocked"
    for dims, given in ((0, (q, k, v)), ((None, 0, 0), (q[0], k, v)), ((0, None, None), (q, k[0], v[0]))):
        mapped = (torch.vmap(f, in_dims=dims)(*given) for f in (attention, naive))
        torch.testing.assert_close(*mapped, **near)


def test_auto_is_compiled_in_one_piece_where_a_cpu_would_take_blocks():
    q = torch.randn(1, 512, 1, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q, q, q), attention(q, q, q), atol=TOLERANCE[q.dtype], rtol=0)


def test_blocks_refuse_to_be_trained():
    q = torch.ones(1, 2, 1, 4, requires_grad=True)
    with pytest.raises(ValueError, match="attention's impl 'blocked' has no gradient"):
        attention(q, q, q, impl="blocked")


@pytest.mark.parametrize(
    ("cpu", "threads", "tokens", "dtype", "causal", "picked"),
    [
        ({"avx512_bf16"}, 2, 1024, torch.bfloat16, False, "blocked"),
        ({"avx512_bf16"}, 2, 1024, torch.float32, False, "sdpa"),
        ({"avx512_bf16"}, 2, 1024, torch.bfloat16, True, "sdpa"),
        ({"avx512_bf16"}, 2, 77, torch.bfloat16, False, "sdpa"),
        ({"avx512_bf16"}, 32, 1024, torch.bfloat16, False, "sdpa"),
        ({"avx512_bf16", "amx_tile"}, 2, 1024, torch.bfloat16, False, "sdpa"),
        (set(), 2, 1024, torch.bfloat16, False, "sdpa"),
    ],
)
def test_auto_takes_blocks_only_where_they_were_measured_to_win(
    cpu, threads, tokens, dtype, causal, picked, monkeypatch
):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda has=name in cpu: has, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", object(), raising=False)
    q, k = (torch.empty(1, n, 1, 8, dtype=dtype) for n in (1024, tokens))
    assert choose(q, k, k, causal, 1.0) == picked


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
def test_auto_trains_few_keys_in_float32_on_a_cpu_and_never_in_blocks(keys, width, dtype, picked, monkeypatch):
    monkeypatch.setattr("minisd.kernels.choice.blocks_are_quick", lambda: True)
    q, k = (torch.empty(1, n, 1, width, dtype=dtype) for n in (1024, keys))
    q.requires_grad_()
    assert choose(q, k, k, False, 1.0) == picked


def test_an_unknown_impl_is_refused_with_the_known_ones():
    q = torch.zeros(1, 2, 1, 4)
    with pytest.raises(
        ValueError,
        match="unknown attention impl 'flash'; known: auto, naive, matmul, sdpa, sdpa32, blocked, fused, hopper",
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


@pytest.mark.parametrize("impl", ["auto", *EVERYWHERE])
def test_weights_come_back_from_the_log_sum_exp(impl):
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, n, 3, 8, generator=g) for n in (300, 77, 77))
    out, lse = attention_with_lse(q, k, v, impl=impl)
    assert torch.equal(out, attention(q, k, v, impl=impl))
    assert lse.shape == (2, 3, 300)
    weights = weights_from_lse(q[:, 50:60], k, lse[..., 50:60])
    torch.testing.assert_close(weights, attention_weights(q, k)[:, :, 50:60], atol=1e-6, rtol=1e-5)
    by_weights = torch.einsum("b i n m, b m i d -> b n i d", weights, v)
    torch.testing.assert_close(by_weights, out[:, 50:60], atol=2e-6, rtol=0)


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
