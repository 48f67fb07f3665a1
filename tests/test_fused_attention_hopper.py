"""The Hopper kernel, executed: TMA, mbarriers and wgmma under the shim, and on a GPU of compute capability 9.0."""

import pytest
import torch
from emulated import Emulator
from test_fused_attention import ROUNDING, distances, exact, in_nan, inputs

from minisd.runtime.kernels.hopper import TILES, cuda_hopper_launch, hopper_launch
from minisd.runtime.kernels.launch import Params
from minisd.runtime.kernels.nvrtc import compile_kernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = ["cpu", *(["cuda"] if HOPPER else [])]
SHAPES = [(70, 77, 2, 2), (200, 129, 1, 1), (64, 700, 1, 1), (1, 1, 1, 1)]  # queries, keys, images, heads


def run(q, k, v, device, schedule=0):
    launch = hopper_launch(q, k)
    o = in_nan(torch.full(q.shape, float("nan"), dtype=q.dtype), device, 16)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=device)
    params = Params.of(q.shape[-1] ** -0.5, lse, q=q, k=k, v=v, o=o)
    (Emulator(schedule=schedule) if device == "cpu" else cuda_hopper_launch)(launch, params)
    return o, lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("d", TILES)
def test_output_is_exact_to_rounding(d, dtype, shape, device):
    q, k, v, dout = inputs(d, dtype, shape, device)
    o, lse = run(q, k, v, device)
    (expected, *_), expected_lse = exact(q, k, v, dout)
    assert distances([o], [expected])[0] < 1.5 * ROUNDING[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=0)  # float32 sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", TILES)
def test_scores_near_minus_200_are_scores_like_any_other(d, device):
    q, k, v, dout = inputs(d, torch.float16, (48, 77 + d, 1, 1), device, cold=True)
    o, lse = run(q, k, v, device)
    (expected, *_), expected_lse = exact(q, k, v, dout)
    assert distances([o], [expected])[0] < 3 * ROUNDING[torch.float16]
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-4, rtol=0)


@pytest.mark.parametrize("d", TILES)
def test_no_order_of_warps_and_copies_changes_a_bit(d):
    """TMA at once, late or last first; wgmma's operands read as early or as late as legal; producer first or last."""
    q, k, v, _ = inputs(d, torch.float16, (130, 400, 1, 1), "cpu")
    first, first_lse = run(q, k, v, "cpu")
    for schedule in range(1, 7):
        o, lse = run(q, k, v, "cpu", schedule)
        assert torch.equal(o, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("d", TILES)
def test_it_compiles_within_the_registers_of_its_warpgroups(d):
    q = torch.empty(1, 1, 1, d, dtype=torch.bfloat16, device="meta")
    launch = hopper_launch(q, q)
    compiled = compile_kernel(launch.kernel, "sm_90a", launch.source)
    assert compiled.spilled == 0
    assert compiled.registers * launch.threads <= 65536
    assert launch.shared <= 227 * 1024
