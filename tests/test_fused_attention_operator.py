"""The kernels as operators of torch: gradients, torch.compile, what is refused and in which words, what auto picks."""

import json
import math
import warnings
from functools import partial

import pytest
import torch
from emulated import Emulator
from torch._subclasses.fake_tensor import FakeTensorMode

from minisd import attention
from minisd.nn.attention import Attention
from minisd.runtime.kernels import choice, fused
from minisd.runtime.kernels.nvrtc import CompilerMissing


@pytest.fixture
def on_cpu(monkeypatch):
    """impl="fused" on CPU tensors, by the kernels' own text under the shim."""
    library = torch.library.Library("minisd", "IMPL")
    library.impl("attention_forward", partial(fused.forward, launcher=Emulator()), "CPU")
    library.impl("attention_backward", partial(fused.backward, launcher=Emulator()), "CPU")
    monkeypatch.setattr(fused, "why_not_fused", lambda *inputs, **options: None)
    yield
    library._destroy()


def tensors(n=20, m=77, d=40, i=2, dtype=torch.float16):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(1, tokens, i, d, generator=g).to(dtype).requires_grad_() for tokens in (n, m, m)]


def gradients_of(f, inputs):
    out = f(*inputs)
    return out.detach(), torch.autograd.grad((out * out.detach()).sum(), inputs)


@pytest.mark.parametrize("impl", ["fused", "hopper"])
def test_autograd_runs_through_the_kernels(impl, on_cpu):
    inputs = tensors()
    out, found = gradients_of(partial(attention, impl=impl), inputs)
    expected_out, expected = gradients_of(
        partial(attention, impl="naive"), [x.detach().double().requires_grad_() for x in inputs]
    )
    torch.testing.assert_close(out.double(), expected_out, atol=1e-3, rtol=0)  # fp16 of values below 1
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() < 1e-3 * y.norm()  # three roundings to fp16


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_operators_pass_torchs_own_checks(on_cpu):
    q, k, v = tensors()
    torch.library.opcheck(torch.ops.minisd.attention_forward.default, (q, k, v, 0.2, False))
    o, lse = torch.ops.minisd.attention_forward(q, k, v, 0.2, False)
    saved = [x.detach() for x in (torch.ones_like(o), q, k, v, o, lse)]
    torch.library.opcheck(torch.ops.minisd.attention_backward.default, (*saved, 0.2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", ["fused", "auto"])
def test_a_layer_compiles_without_a_break_and_to_the_same_bits(impl, on_cpu):
    torch.manual_seed(0)
    layer = Attention(80, heads=2).half()
    layer.impl = impl
    x = torch.randn(1, 24, 80).half().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for found, expected in zip(gradients_of(compiled, [x]), gradients_of(layer, [x]), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_shapes_are_known_without_a_gpu():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 8, 40, dtype=torch.float16, device="cuda") for n in (9, 7, 7))
        o, lse = torch.ops.minisd.attention_forward(q, k, v, 0.2, False)
        gradients = torch.ops.minisd.attention_backward(o, q, k, v, o, lse, 0.2)
    assert (o.shape, o.dtype, o.device.type) == (q.shape, q.dtype, "cuda")
    assert (lse.shape, lse.dtype) == ((2, 8, 9), torch.float32)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("impl", ["fused", "hopper", "auto"])
def test_tensors_of_a_gpu_are_traced_without_a_break_and_without_a_gpu(impl, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(choice, "fastest_of", lambda rows, heads: "fused")
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 8, 40, dtype=torch.float16, device="cuda") for n in (9, 7, 7))
        torch._dynamo.reset()
        out = torch.compile(partial(attention, impl=impl), backend=backend, fullgraph=True)(q, k, v)
    assert out.shape == q.shape
    assert len(graphs) == 1
    assert "minisd.attention_forward" in graphs[0]


def test_the_log_sum_exp_gives_the_attention_weights(on_cpu):
    q, k, v = (x.detach() for x in tensors())
    out, lse = fused.fused_attention(q, k, v, False, 40**-0.5)
    assert torch.equal(out, attention(q, k, v, impl="fused"))
    scores = torch.einsum("b n i d, b m i d -> b i n m", q.double(), k.double()) * 40**-0.5
    weights = (scores - lse[..., None] * math.log(2)).exp()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 20).double(), atol=2e-5, rtol=0)
    torch.testing.assert_close(weights, scores.softmax(-1), atol=2e-6, rtol=2e-5)


# ---------------------------------------------------------------------------------------------------------- refusals


class OnGPU:
    """What why_not_fused asks of a tensor, of one that lies on a GPU."""

    def __init__(self, shape=(1, 4, 2, 40), dtype=torch.float16, device="cuda:0"):
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)


@pytest.mark.parametrize(
    ("change", "causal", "scale", "words"),
    [
        ({}, False, 0.1, None),
        ({"dtype": torch.bfloat16}, False, 0.1, None),
        ({}, True, 0.1, "has no causal form"),
        ({"dtype": torch.float32}, False, 0.1, "takes float16 or bfloat16, one for all, got torch.float32"),
        ({"shape": (1, 4, 2, 48)}, False, 0.1, "knows head widths 40, 64, 80, 128, 160, got 48"),
        ({"shape": (1, 4, 1, 512)}, False, 0.1, "knows head widths 40, 64, 80, 128, 160, got 512"),
        ({"shape": (1, 0, 2, 40)}, False, 0.1, "at least one token"),
        ({"shape": (65536, 1, 2, 40)}, False, 0.1, "1 to 65535 images"),
        ({}, False, 0.0, "takes a positive scale, got 0.0"),
        ({"device": "cpu"}, False, 0.1, "runs on CUDA GPUs, and the tensors are on cpu"),
    ],
)
def test_what_the_kernels_cannot_take_is_said_in_a_sentence(change, causal, scale, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = OnGPU(**change)
    reason = fused.why_not_fused(q, q, q, causal, scale)
    assert reason is None if words is None else words in reason


def test_an_old_gpu_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = fused.why_not_fused(*[OnGPU()] * 3, False, 0.1)
    assert reason == "needs compute capability 8.0 (Ampere) or newer, and Tesla T4 has 7.5"


def test_the_hopper_kernel_says_which_gpu_it_wants(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "B200")
    reason = fused.why_not_fused(*[OnGPU()] * 3, False, 0.1, hopper=True)
    assert reason == "needs compute capability 9.0 (Hopper), and B200 has 10.0"
    assert fused.why_not_fused(*[OnGPU()] * 3, False, 0.1) is None


def test_fused_on_a_cpu_says_what_to_use_instead():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="impl='fused' runs on CUDA GPUs, and the tensors are on cpu: use impl='sdpa'"):
        attention(q, k, v, impl="fused")


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (1.0, "differ from the plain version by 1.0e"),
        (float("inf"), "inf"),
        (CompilerMissing("pip install it"), "pip install it"),
    ],
)
def test_kernels_that_fail_their_check_are_replaced_loudly(happens, words, monkeypatch):
    def self_check(*inputs):
        if isinstance(happens, Exception):
            raise happens
        return happens

    monkeypatch.setattr(fused, "self_check", self_check)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new GPU")
    fused.trusted.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"(?s){words}.* on a new GPU: the plain version runs instead"):
        assert not fused.trusted(0, 40, torch.float16, "forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fused.trusted(0, 40, torch.float16, "forward")  # said once
    fused.trusted.cache_clear()


def test_the_plain_form_that_replaces_them_is_the_same_operator():
    q, k, v = (x.detach().double() for x in tensors(d=8))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    o, lse = fused.plain_forward(q, k, v, 0.3)
    expected_out, expected = gradients_of_naive(q, k, v, dout)
    torch.testing.assert_close(o, expected_out)
    for found, y in zip(fused.plain_backward(dout, q, k, v, o, lse, 0.3), expected, strict=True):
        torch.testing.assert_close(found, y)


def gradients_of_naive(q, k, v, dout):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, scale=0.3, impl="naive")
    return out.detach(), torch.autograd.grad(out, inputs, dout)


@pytest.mark.parametrize("wrong", ["o", "lse", "nan"])
def test_the_check_notices_kernels_that_are_wrong(wrong):
    def launcher(launch, params):
        Emulator()(launch, params)
        broken.append(launch)

    broken, forward = [], fused.forward

    def spoiled(*inputs, launcher):
        o, lse = forward(*inputs, launcher=launcher)
        changed = {
            "o": (o * 1.01, lse),
            "lse": (o, lse + 0.1),
            "nan": (o.index_fill(1, torch.tensor(0), float("nan")), lse),
        }
        return changed[wrong]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "forward", spoiled)
        error = fused.self_check(torch.device("cpu"), 40, torch.float16, "forward", launcher)
    assert broken
    assert error > fused.TOLERANCE[torch.float16]


# --------------------------------------------------------------------------------------------------------------- auto

ROW = {"dtype": "float16", "n": 4096, "m": 77, "d": 40, "pass": "forward"}


def test_the_committed_table_is_well_formed():
    table = json.loads(choice.MEASURED.read_text())
    assert set(table) == {"format", "written", "tables"}
    for gpu in table["tables"]:
        assert {"gpu", "date", "torch", "rows"} <= set(gpu)
        for row in gpu["rows"]:
            assert set(row) == {*ROW, "heads", "us"}
            assert row["pass"] in ("forward", "training")
            assert "sdpa" in row["us"]


@pytest.mark.parametrize(
    ("heads", "picked"),
    [(8, "sdpa"), (16, "sdpa"), (32, "fused"), (40, "fused"), (64, "matmul"), (1000, "matmul")],
)
def test_auto_takes_what_was_measured_for_no_more_heads_than_it_has(heads, picked):
    rows = [
        {**ROW, "heads": 16, "us": {"sdpa": 10.0, "fused": 9.9}},  # within the spread of a measurement
        {**ROW, "heads": 32, "us": {"sdpa": 20.0, "fused": 15.0}},
        {**ROW, "heads": 64, "us": {"sdpa": 40.0, "fused": 39.0, "matmul": 5.0}},
    ]
    assert choice.fastest_of(rows, heads) == picked


def test_auto_reads_the_table_of_its_own_gpu_and_pass(monkeypatch, tmp_path):
    table = {
        "gpu": "one GPU",
        "date": "",
        "torch": "",
        "rows": [{**ROW, "heads": 16, "us": {"sdpa": 2.0, "fused": 1.0}}],
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"tables": [table]}))
    monkeypatch.setattr(choice, "MEASURED", path)
    choice._rows.cache_clear()
    found = {}
    for gpu in ("one GPU", "another"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, gpu=gpu: gpu)
        for training in (False, True):
            found[gpu, training] = choice._measured(0, "float16", 16, 4096, 77, 40, training)
    choice._rows.cache_clear()
    assert found == {("one GPU", False): "fused", ("one GPU", True): "sdpa"} | {
        ("another", training): "sdpa" for training in (False, True)
    }


def test_auto_is_pytorchs_own_where_nothing_was_measured():
    q, k, v = (x.detach() for x in tensors())
    assert choice.choose(q, k, v, False, 0.1) == "sdpa"
    assert torch.equal(attention(q, k, v), attention(q, k, v, impl="sdpa"))
