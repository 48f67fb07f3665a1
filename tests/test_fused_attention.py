"""The CUDA kernels of attention, executed: on a CPU under tests/cuda_shim, and on a GPU where there is one.

Everything is compared with float64 autograd, and every tensor lies in a buffer whose rest is NaN.
"""

import math

import pytest
import torch
from emulated import SHIM, Emulator

from minisd.runtime.kernels import fused
from minisd.runtime.kernels.launch import (
    C_NAME,
    TILES,
    Launch,
    Params,
    Tile,
    backward_launches,
    cuda_launch,
    forward_launch,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Relative L2 distance from float64: of the output, 1.5 times what rounding the exact result costs; of gradients, 3
# times, since the probabilities and their gradients are rounded too before they are multiplied.
ROUNDING = {torch.float16: 2.1e-4, torch.bfloat16: 1.7e-3}
NAN = float("nan")
SHAPES = [  # queries, keys, images, heads
    (70, 77, 2, 2),  # the text: one tile of keys; queries are no multiple of a block
    (16, 1, 1, 1),
    (1, 80, 1, 1),
    (33, 81, 1, 2),
    (96, 129, 1, 2),
    (130, 64, 1, 1),
    (40, 333, 1, 1),
]


def launcher(device, schedule=0):
    return Emulator(schedule=schedule) if device == "cpu" else cuda_launch


def in_nan(x, device, pad=8):
    """x inside a larger buffer of NaN: with other heads before it, other tokens behind it, and unusual strides."""
    b, n, i, d = x.shape
    buffer = torch.full((b, n + 3, i + 1, d + pad), NAN, dtype=x.dtype, device=device)
    buffer[:, :n, 1:, :d] = x.to(device)
    return buffer[:, :n, 1:, :d]


def inputs(d, dtype, shape, device, cold=False):
    n, m, b, i = shape
    g = torch.Generator().manual_seed(d * n + m)
    q, k, v, dout = (torch.randn(b, tokens, i, d, generator=g) for tokens in (n, m, m, n))
    q = 3 * q
    if cold:  # all scores near -200, where a forgotten mask or maximum overflows
        q, k = torch.full_like(q, 2.0), -100 * d**-0.5 + 0.25 * k
    return [in_nan(x.to(dtype), device, 8 + 8 * j) for j, x in enumerate((q, k, v, dout))]


def exact(q, k, v, dout):
    """Output, gradients and log2-sum-exp2 in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    s = torch.einsum("b n i d, b m i d -> b i n m", q, k) * q.shape[-1] ** -0.5
    o = torch.einsum("b i n m, b m i d -> b n i d", s.softmax(-1), v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), dout.double())], s.detach().logsumexp(-1) / math.log(2)


def run(q, k, v, dout, launch, tiles=None):
    """All three kernels, into buffers of NaN: (o, dq, dk, dv) and lse."""
    d = q.shape[-1]
    empty = [torch.full(x.shape, NAN, dtype=x.dtype) for x in (q, q, k, v)]
    o, dq, dk, dv = (in_nan(x, q.device, 8 + 8 * j) for j, x in enumerate(empty))
    lse, delta = (torch.full((q.shape[0], q.shape[2], q.shape[1]), NAN, device=q.device) for _ in range(2))
    params = Params.of(d**-0.5, lse, delta, q=q, k=k, v=v, o=o, dout=dout, dq=dq, dk=dk, dv=dv)
    for each in (forward_launch(q, k, tiles), *backward_launches(q, k)):
        launch(each, params)
    return (o, dq, dk, dv), lse


def distances(found, expected):
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, expected, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("d", TILES)
def test_output_and_gradients_are_exact_to_rounding(d, dtype, shape, device):
    tensors = inputs(d, dtype, shape, device)
    found, lse = run(*tensors, launcher(device))
    expected, expected_lse = exact(*tensors)
    u = ROUNDING[dtype]
    for error, bound in zip(distances(found, expected), (1.5 * u, 3 * u, 3 * u, 3 * u), strict=True):
        assert error < bound or shape[1] == 1  # one key: dq and dk are 0 but for rounding
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)  # float32 sums of up to 333 terms
    if shape[1] == 1:
        assert (found[0].cpu() == tensors[2].expand_as(found[0]).cpu()).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", TILES)
def test_scores_near_minus_200_are_scores_like_any_other(d, device):
    tensors = inputs(d, torch.float16, (48, 77 + d, 1, 1), device, cold=True)
    found, lse = run(*tensors, launcher(device))
    expected, expected_lse = exact(*tensors)
    o, _, dk, dv = distances(found, expected)
    assert max(o, dk, dv) < 3 * ROUNDING[torch.float16]
    # q is constant, so dq is a small difference of large terms: compared with the size of those
    assert (found[1].double() - expected[1]).abs().max() < 1e-3 * (200 / 2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-4, rtol=0)


@pytest.mark.parametrize("d", TILES)
def test_no_order_of_warps_changes_a_bit(d):
    """A missing barrier shows as another result in some order: 1 and 2 are adversarial, the rest random."""
    tensors = inputs(d, torch.bfloat16, (100, 200, 1, 1), "cpu")
    first, first_lse = run(*tensors, launcher("cpu"))
    for schedule in range(1, 6):
        found, lse = run(*tensors, launcher("cpu", schedule))
        assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("d", TILES)
@pytest.mark.parametrize("shape", [(64, 77, 1, 1), (64, 200, 1, 1)], ids=str)
def test_shared_memory_is_read_without_bank_conflicts(d, shape):
    emulator = Emulator()
    run(*inputs(d, torch.float16, shape, "cpu"), emulator)
    assert emulator.counts["ldmatrix"] > 0
    assert emulator.counts["conflicts"] == 0


def test_the_work_is_what_the_head_width_asks_for():
    """d = 40 is two steps of 16 and one of 8 in Q K^T, five of 8 columns in P V: nothing is padded to 64."""
    q, k, v, _ = inputs(40, torch.float16, (128, 128, 1, 1), "cpu")
    o, lse = torch.empty_like(q), torch.empty(1, 1, 128)
    emulator = Emulator()
    emulator(forward_launch(q, k), Params.of(1.0, lse, q=q, k=k, v=v, o=o))
    pieces = (128 // 16) * (128 // 8)  # of 16 x 8 scores
    assert emulator.counts["mma8"] == pieces
    assert emulator.counts["mma16"] == 2 * pieces + (128 // 16) * (128 // 16) * 5
    # each score's exponential, and one of the running maximum for every row (in the 4 lanes of its quad) and tile
    assert emulator.counts["ex2"] == 128 * 128 + 128 * 4 * (128 // TILES[40].forward.n)


def test_exponentials_on_the_fma_units_stay_within_their_error():
    tensors = inputs(40, torch.float16, (96, 200, 1, 1), "cpu")
    o, lse = fused.forward(*tensors[:3], 40**-0.5, launcher=Emulator())
    tile = Tile(TILES[40].forward.n, r=TILES[40].forward.r, poly=4)
    (found, *_), found_lse = run(*tensors, launcher("cpu"), tile)
    assert not torch.equal(found, o)
    torch.testing.assert_close(found, o, atol=4e-3, rtol=0)  # two units in the last place of values near 2
    torch.testing.assert_close(found_lse, lse, atol=2e-4, rtol=0)  # relative error 8e-5 of the polynomial


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", ["fused product", "odd offset", "odd strides", "transposed", "expanded"])
def test_any_view_of_any_tensor_is_taken(what, device):
    b, n, i, d = 2, 50, 3, 40
    g = torch.Generator().manual_seed(5)
    packed = torch.randn(b, n, 3 * i * d + 1, generator=g).half().to(device)
    q, k, v = {
        "fused product": lambda: [x.unflatten(-1, (i, d)) for x in packed[..., :-1].chunk(3, dim=-1)],
        "odd offset": lambda: [x.unflatten(-1, (i, d)) for x in packed[..., 1:].chunk(3, dim=-1)],
        "odd strides": lambda: [packed[..., j : 2 * i * d + j : 2].unflatten(-1, (i, d)) for j in range(3)],
        "transposed": lambda: [x.reshape(b, i, d, n).permute(0, 3, 1, 2) for x in packed[..., :-1].chunk(3, dim=-1)],
        "expanded": lambda: [packed[:1, :, j : j + 1].unsqueeze(2).expand(b, n, i, d) * 1 for j in range(3)],
    }[what]()
    if what == "expanded":
        q, k, v = q, k[:1].expand(b, n, i, d), v[:1, :, :1].expand(b, n, i, d)
    o, _ = fused.forward(q, k, v, 0.2, launcher=launcher(device))
    expected, _ = fused.forward(*(x.contiguous() for x in (q, k, v)), 0.2, launcher=launcher(device))
    assert torch.equal(o, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("d", TILES)
def test_the_self_check_of_the_first_use_passes(d, dtype, device):
    for kernel in ("forward", "backward"):
        error = fused.self_check(torch.device(device), d, dtype, kernel, launcher(device))
        assert error < 0.75 * fused.TOLERANCE[dtype]


# ------------------------------------------------------------------------------- the instructions they are made of


def conform(dtype, device):
    """What one warp answers to every instruction of device.cuh: 32-bit words 'slot lane', and its inputs."""
    g = torch.Generator().manual_seed(6)
    matrices, copied = (torch.randint(-8, 9, (size,), generator=g).to(dtype).to(device) for size in (256, 512))
    out = torch.zeros(32, 32, device=device)
    q, k = (x.reshape(1, -1, 1, 8) for x in (matrices, copied))
    kernel = f"conformance<{C_NAME[dtype]}>"
    launch = Launch(kernel, (1, 1, 1), 32, 2 * 768, SHIM / "conformance.cu")
    launcher(device)(launch, Params.of(1.0, out, q=q, k=k))
    return out.cpu().view(torch.int32), matrices.cpu(), copied.cpu()


def bits(x):
    return x.contiguous().view(torch.int32).flatten()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_instruction_does_what_nvidias_manual_says(dtype, device):
    """PTX ISA: ldmatrix, the fragments of mma.m16n8k16 and m16n8k8, cp.async, cvt, shfl.sync."""
    found, matrices, copied = conform(dtype, device)
    m = matrices.reshape(4, 8, 8)
    lane = torch.arange(32)
    for slot in range(4):
        assert torch.equal(found[slot], bits(m[slot].reshape(32, 2)))
        assert torch.equal(found[4 + slot], bits(m[slot].T.reshape(32, 2)))
    assert torch.equal(found[8:13], found[[0, 1, 4, 5, 0]])
    # registers a0..a3 hold the quarters (top, bottom) x (left, right) of A; b0 and b1 the halves of B, transposed
    a = torch.cat([torch.cat([m[0], m[2]], 1), torch.cat([m[1], m[3]], 1)]).double()
    c = torch.stack([1.0 * lane, *(torch.full((32,), x) for x in (2.0, -3.0, 0.5))]).double()
    rows, columns = (
        torch.stack([lane // 4, lane // 4, lane // 4 + 8, lane // 4 + 8]),
        lane % 4 * 2 + torch.tensor([[0], [1], [0], [1]]),
    )
    first = c + (a @ torch.cat([m[0], m[1]]).double())[rows, columns]
    second = first + (a[:, :8] @ m[2].double())[rows, columns]
    assert torch.equal(found[13:17].view(torch.float32).double(), first)  # small integers: exact in any order
    assert torch.equal(found[17:21].view(torch.float32).double(), second)
    x, y = m[0].reshape(32, 2).float().unbind(1)
    assert torch.equal(found[21:23].view(torch.float32), torch.stack([x, y]))
    assert torch.equal(found[23], bits(torch.stack([x / 3, y * 1.0001], 1).to(dtype)))
    assert torch.equal(found[24:26].view(torch.float32), torch.stack([x[lane ^ 1], x[lane ^ 2]]))
    assert torch.equal(found[26], bits(copied[:256].reshape(32, 8)[:, :2]))
    assert torch.equal(found[27], bits(torch.where(lane[:, None] % 3 == 0, copied[256:].reshape(32, 8)[:, 6:], 0)))
    powers = torch.exp2(-0.37 * lane.double())
    assert ((found[28].view(torch.float32) / powers - 1).abs() < 9e-5).all()
    assert ((found[29].view(torch.float32) / powers - 1).abs() < 1e-6).all()  # PTX ISA: 2 units in the last place


if "cuda" in DEVICES:

    @pytest.mark.parametrize("dtype", ROUNDING, ids=str)
    def test_the_shim_is_the_gpu_bit_for_bit(dtype):
        """In all but the last slot: the hardware's power of two is an approximation of its own."""
        assert torch.equal(conform(dtype, "cuda")[0][:29], conform(dtype, "cpu")[0][:29])

    @pytest.mark.parametrize("d", TILES)
    def test_the_same_input_gives_the_same_bits_on_a_gpu(d):
        tensors = inputs(d, torch.float16, (1024, 1000, 2, 8), "cuda")
        first, first_lse = run(*tensors, cuda_launch)
        for _ in range(20):
            found, lse = run(*tensors, cuda_launch)
            assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))
            assert torch.equal(lse, first_lse)
