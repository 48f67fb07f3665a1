"""This package's attention for CPUs is the formula, is taken where it wins, and is compiled once."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import attention
from minisd.runtime.kernels import avx512, choice
from minisd.runtime.kernels.choice import choose

HERE = [dtype for dtype in (torch.float32, torch.bfloat16) if not avx512._wrong_machine(dtype)]
runs_here = pytest.mark.skipif(not HERE, reason="no AVX-512, or no C++ compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of scores up to 20, rounded


def tensors(n, m, *, b=1, i=1, d=40, dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(n * m + d)
    return [(spread * torch.randn(b, tokens, i, d, generator=g)).to(dtype) for tokens in (n, m, m)]


def exact(q, k, v, scale=None):
    return attention(q.double(), k.double(), v.double(), scale=scale, impl="naive")


@runs_here
@pytest.mark.parametrize("dtype", HERE)
@settings(deadline=None)  # each width is compiled when it is met first
@given(
    b=st.integers(1, 2),
    i=st.integers(1, 3),
    n=st.integers(1, 110),
    m=st.integers(1, 150),
    d=st.sampled_from([2, 8, 16, 30, 40, 64, 80, 96, 160]),
    scale=st.sampled_from([None, 0.3]),
    threads=st.integers(1, 3),
)
def test_it_is_the_formula_whatever_falls_into_the_last_tile(dtype, b, i, n, m, d, scale, threads):
    q, k, v = tensors(n, m, b=b, i=i, d=d, dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = attention(q, k, v, scale=scale, impl="avx512")
    finally:
        torch.set_num_threads(before)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact(q, k, v, scale), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@runs_here
@pytest.mark.parametrize("dtype", HERE)
def test_it_rounds_about_as_coarsely_as_pytorchs_own(dtype):
    q, k, v = tensors(500, 3000, i=2, dtype=dtype, spread=2)
    ours, theirs = (
        (attention(q, k, v, impl=impl).double() - exact(q, k, v)).norm().item() for impl in ("avx512", "sdpa")
    )
    assert ours < (1.1 if dtype == torch.bfloat16 else 2) * theirs


@runs_here
@pytest.mark.parametrize("dtype", HERE)
@pytest.mark.parametrize("level", [-200.0, 200.0])
def test_scores_far_from_zero_neither_vanish_nor_overflow(dtype, level):
    q, k, v = tensors(50, 100, d=4, dtype=dtype)
    q, k = torch.full_like(q, abs(level) ** 0.5), k / 8 + level / abs(level) ** 0.5
    near = 2e-2 if dtype == torch.bfloat16 else 1e-4  # rounding of scores of 200
    found = attention(q, k, v, scale=0.5, impl="avx512")
    torch.testing.assert_close(found.double(), exact(q, k, v, 0.5), atol=near, rtol=0)


@runs_here
def test_a_row_without_a_number_is_a_row_without_a_number():
    q, k, v = tensors(3, 70)
    q[0, 1, 0, 5] = float("nan")
    out = attention(q, k, v, impl="avx512")
    assert out.isnan().all(-1).flatten().tolist() == [False, True, False]


@runs_here
@pytest.mark.parametrize("dtype", HERE)
def test_views_of_a_packed_product_are_taken_as_they_are(dtype):
    packed = torch.randn(2, 100, 3 * 4 * 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    q, k, v = (x.unflatten(-1, (4, 8)) for x in packed.chunk(3, dim=-1))
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous(), impl="avx512")
    assert torch.equal(attention(q, k, v, impl="avx512"), expected)
    wide = q[:, :1].expand_as(q)  # one row for all, as it lies
    assert torch.equal(attention(wide, k, v, impl="avx512"), attention(wide.contiguous(), k, v, impl="avx512"))
    turned = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))  # no row lies together
    assert torch.equal(attention(*turned, impl="avx512"), expected)


@runs_here
def test_it_is_an_operator_that_tracing_sees():
    q, k, v = tensors(5, 7)
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: attention(*x, impl="avx512"))(q, k, v)
    assert "minisd.attention_avx512" in traced.code
    torch.library.opcheck(torch.ops.minisd.attention_avx512, (q, k, v, 1.0))
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.minisd.attention_avx512(q, k, v[:, :3], 1.0)
    with pytest.raises(ValueError, match="takes float32 or bfloat16"):
        torch.ops.minisd.attention_avx512(q.half(), k.half(), v.half(), 1.0)


@runs_here
def test_the_numbers_do_not_depend_on_the_batch_the_threads_or_other_callers():
    q, k, v = tensors(300, 200, b=4, i=3)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda n: attention(q[n : n + 1], k[n : n + 1], v[n : n + 1], impl="avx512"), range(4)))
    assert torch.equal(attention(q, k, v, impl="avx512"), torch.cat(alone))


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        ({"causal": True}, "has no causal form"),
        ({"dtype": torch.float16}, "takes float32 or bfloat16, one for all, got torch.float16"),
        ({"d": 41}, "takes heads of even widths up to 160, got 41"),
        ({"d": 162}, "takes heads of even widths up to 160, got 162"),
        ({"n": 0}, "takes at least one token"),
        ({"scale": -1.0}, "takes a positive scale, got -1.0"),
        ({"learns": True}, "has no gradient"),
        ({"device": "meta"}, "runs on CPUs, and the tensors are on meta"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(given_, why):
    options = {"n": 4, "d": 8, "dtype": torch.float32, "causal": False, "scale": 1.0, "learns": False, "device": "cpu"}
    n, d, dtype, causal, scale, learns, device = (options | given_).values()
    q, k, v = (x.to(device).requires_grad_(learns) for x in tensors(n, 4, d=d, dtype=dtype))
    with pytest.raises(ValueError, match=f"impl='avx512' {why}.*: use impl='sdpa', or 'auto'"):
        attention(q, k, v, causal=causal, scale=scale, impl="avx512")


def test_a_machine_that_cannot_run_it_says_what_is_missing(monkeypatch):
    q, k, v = tensors(4, 4)
    for has, path, dtype, why in (
        ({}, "c++", torch.float32, "needs a CPU with AVX-512"),
        ({"avx512"}, "c++", torch.bfloat16, "needs a CPU with AVX-512-BF16"),
        ({"avx512"}, None, torch.float32, "needs Linux and a C\\+\\+ compiler: install g\\+\\+"),
    ):
        pretend(monkeypatch, has, path)
        with pytest.raises(ValueError, match=why):
            attention(q.to(dtype), k.to(dtype), v.to(dtype), impl="avx512")


def pretend(monkeypatch, cpu, compiler):
    for module in (avx512, choice):
        monkeypatch.setattr(module, "cpu_has", lambda name: name in cpu)
    capability = "AVX512" if "avx512" in cpu else "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(avx512, "compiler", lambda: compiler)


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("cpu", "tokens", "causal", "picked"),
    [
        ({"avx512", "avx512_bf16"}, 1024, False, "avx512"),
        ({"avx512", "avx512_bf16"}, 1024, True, "sdpa"),
        ({"avx512", "avx512_bf16"}, 256, False, "sdpa"),
        ({"avx512", "avx512_bf16", "amx_tile"}, 1024, False, "sdpa"),
        ({"avx512"}, 1024, False, "sdpa"),
        ({}, 1024, False, "sdpa"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_it_only_where_it_was_measured_to_win(cpu, tokens, causal, picked, dtype, monkeypatch):
    pretend(monkeypatch, cpu, "c++")
    monkeypatch.setattr(choice, "can_compile", lambda dtype, width: True)
    q = torch.empty(1, tokens, 1, 8, dtype=dtype)
    assert choose(q, q, q, causal, 1.0) == picked


@runs_here
def test_auto_can_be_mapped_and_compiled_in_one_piece(monkeypatch):
    monkeypatch.setattr(choice, "own_kernel_is_quick", lambda: True)
    q, k, v = torch.randn(3, 2, 1, 1024, 1, 8, generator=torch.Generator().manual_seed(2))
    mapped = torch.vmap(attention)(q, k, v)
    torch.testing.assert_close(
        mapped, torch.stack([attention(*x) for x in zip(q, k, v, strict=True)]), atol=2e-6, rtol=0
    )
    assert choose(q[0], k[0], v[0], False, 1.0) == "avx512"
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(q[0], k[0], v[0]), mapped[0], atol=2e-6, rtol=0)


def test_auto_leaves_autocast_its_own_precision(monkeypatch):
    monkeypatch.setattr(choice, "own_kernel_is_quick", lambda: True)
    q = torch.ones(1, 1024, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, q, q).dtype == torch.bfloat16


def test_where_it_cannot_be_compiled_pytorchs_own_answers_after_one_warning(monkeypatch):
    def fails(dtype, width):
        raise RuntimeError("c++ cannot compile attention_avx512.cpp: no such flag")

    monkeypatch.setattr(avx512, "kernel", fails)
    avx512.can_compile.cache_clear()
    with pytest.warns(RuntimeWarning, match="PyTorch's own attention answers, .*: no such flag"):
        assert not avx512.can_compile(torch.float32, 40)
    assert not avx512.can_compile(torch.float32, 40)  # and says nothing more
    avx512.can_compile.cache_clear()


# --------------------------------------------------------------------------------------------------------- compilation

CODE = """
import torch
from minisd import attention
q = torch.ones(1, 2, 1, 8)
assert torch.equal(attention(q, q, q, impl="avx512"), q)
"""


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@runs_here
def test_it_is_compiled_once_for_all_runs(tmp_path):
    folder = tmp_path / "cache"
    assert run(XDG_CACHE_HOME=str(folder)).returncode == 0
    (kept,) = (path for path in folder.rglob("*") if path.is_file())
    made = kept.stat().st_mtime_ns
    assert run(XDG_CACHE_HOME=str(folder)).returncode == 0
    assert kept.stat().st_mtime_ns == made
    kept.write_bytes(b"")  # as after a loss of power
    assert run(XDG_CACHE_HOME=str(folder)).returncode == 0
    assert kept.stat().st_size > 0
    blocked = tmp_path / "file"
    blocked.touch()
    assert run(XDG_CACHE_HOME=str(blocked)).returncode == 0  # nothing can be kept there, and it runs all the same


@runs_here
def test_a_compiler_that_refuses_is_quoted(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(CXX=str(broken), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "compiler cannot compile attention_avx512.cpp: no such flag" in done.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
