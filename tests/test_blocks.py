"""The quick forms of layers are the plain ones."""

import copy
import os
import platform
import subprocess
import sys
from mmap import PAGESIZE

import pytest
import torch
from lively import lively
from torch.profiler import profile

from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.models.unet import Conditioning
from minisd.nn.blocks import ResBlock
from minisd.nn.transformer import FeedForward
from minisd.runtime.conv3x3 import Conv3x3
from minisd.runtime.tuning import TOKENS, channels_last, forget_file_pages, tune


@pytest.mark.parametrize(
    ("layer", "x", "more", "kept", "otherwise"),
    [
        # projection 8, product 4, result 1; otherwise also the activated gate 4
        (FeedForward(32), torch.randn(1, 64, 32), (), 13, 17),
        # for each convolution its input and its result; otherwise also what is activated
        (ResBlock(8, 8, 16, norm_groups=2, norm_eps=1e-5), torch.randn(1, 8, 32, 32), (torch.randn(1, 16),), 4, 6),
    ],
    ids=["feed-forward", "residual block"],
)
def test_what_is_cheap_is_computed_again_for_the_same_gradient(layer, x, more, kept, otherwise, monkeypatch):
    """kept, otherwise: for the backward pass, in sizes of x."""

    def learn() -> tuple[float, list[torch.Tensor]]:
        layer.zero_grad()
        own = x.clone().requires_grad_()
        with profile(profile_memory=True) as seen:
            out = layer(own, *more)
        out.square().sum().backward()
        held = sum(event.self_cpu_memory_usage for event in seen.events() if hasattr(event, "self_cpu_memory_usage"))
        return held / x.nbytes, [own.grad, *(p.grad.clone() for p in layer.parameters())]

    monkeypatch.setattr("minisd.nn.recomputed.LARGE", 0)
    learn()  # what is allocated once
    held, gradients = learn()
    monkeypatch.undo()  # these tensors are small
    plain_held, plain = learn()
    assert held == pytest.approx(kept, rel=0.02)
    assert plain_held == pytest.approx(otherwise, rel=0.02)
    assert all(torch.equal(*pair) for pair in zip(gradients, plain, strict=True))


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_channels_last_changes_no_weight_and_no_output_beyond_rounding(name):
    plain = getattr(lively(), name)
    other = copy.deepcopy(plain)
    channels_last(other)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    conv = next(m for m in other.modules() if isinstance(m, Conv3x3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)))
    run = (lambda network: network(x, 7, cond)) if name == "unet" else (lambda network: network.decode(x))
    with torch.no_grad():
        expected, out = run(plain), run(other)
    # 2e-5 of the largest value: sums of a few hundred float32 products in another order
    torch.testing.assert_close(out, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    before = [p.data_ptr() for p in other.parameters()]
    channels_last(other)
    assert [p.data_ptr() for p in other.parameters()] == before


def test_a_model_that_has_drawn_is_saved_as_it_was(tmp_path):
    from minisd import load

    sd = lively()
    sd.save(tmp_path / "before.safetensors")
    sd.txt2img("a dog", steps=1)
    sd.save(tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    assert load(tmp_path / "after.safetensors", config=sd.config).txt2img("a dog", steps=1)


@pytest.mark.parametrize("shape", [(2, TOKENS, 8), (3, TOKENS // 2 + 1, 8), (1, 1, 8)])
def test_a_feed_forward_takes_its_tokens_in_parts_where_nothing_is_learnt(shape, monkeypatch):
    torch.manual_seed(0)
    layer, x = FeedForward(8).double(), torch.randn(shape, dtype=torch.float64)
    whole = layer(x).detach()
    tune(layer, torch.device("cpu"))
    parts = []
    monkeypatch.setattr(layer, "gated", lambda tokens: parts.append(len(tokens)) or FeedForward.gated(layer, tokens))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole, rtol=1e-13, atol=1e-13)
    full, rest = divmod(shape[0] * shape[1], TOKENS)
    assert parts == [TOKENS] * full + [rest] * (rest > 0)
    layer(x)
    assert parts[-1] == shape[0]  # to learn it takes all in one go, as they are


@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="another allocator")
@pytest.mark.parametrize(("setting", "kept"), [("", True), ("MALLOC_TRIM_THRESHOLD_", False)])
def test_memory_that_a_layer_frees_is_kept_for_the_next_unless_the_user_set_malloc(setting, kept):
    """Seen by the new pages that the system hands out for a second tensor, smaller than one that was freed."""
    program = """
import resource, torch
from minisd.runtime.tuning import give_back_freed_memory, keep_freed_memory, tune
tune(torch.nn.Linear(1, 1), torch.device("cpu"))

def new_pages(tensor):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

size = min(2**28, keep_freed_memory() or 2**28) // 4
torch.ones(size // 4 * 3)
again = new_pages(lambda: torch.ones(size // 2))
give_back_freed_memory()
print(again, new_pages(lambda: torch.ones(size // 2)))
"""
    theirs = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    environment |= {setting: "131072"} if setting else {}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, text=True, capture_output=True, check=True)
    again, given_back = map(int, run.stdout.split())
    assert given_back >= 4  # large pages of 2 MB, or very many small ones
    assert (again < 4) == kept


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="the system does not tell")
def test_a_file_that_was_laid_out_anew_leaves_the_memory_unless_it_was_changed(tmp_path):
    def resident() -> int:
        """Bytes of the file in this process's memory."""
        with open("/proc/self/statm") as file:
            return int(file.read().split()[2]) * PAGESIZE

    weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(0))  # 9.4 MB
    save_safetensors(tmp_path / "x.safetensors", {"weight": weight}, {})
    mapped = open_tensors(tmp_path / "x.safetensors")["weight"]
    layer = torch.nn.Conv2d(512, 512, 3, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(mapped)
    mapped.sum()  # now it is there
    before = resident()
    channels_last(layer)
    assert before - resident() > 0.9 * weight.nbytes
    assert torch.equal(layer.weight, weight)
    assert torch.equal(mapped, weight)  # read again
    mapped[0] += 1
    forget_file_pages(mapped)
    assert torch.equal(mapped[0], weight[0] + 1)
    forget_file_pages(weight)  # memory of no file
    assert torch.equal(mapped[1:], weight[1:])
