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

from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.models.tiling import tiled_decode
from minisd.models.unet import Conditioning
from minisd.nn.blocks import Conv3x3
from minisd.nn.transformer import FeedForward
from minisd.runtime.allocator import forget_file_pages
from minisd.runtime.optimize import FORMS, TOKENS, channels_last, optimize, plain

NETWORKS = {
    "unet": lambda network, x, cond: network(x, 7, cond),
    "vae decoder": lambda network, x, cond: network.decode(x),
    "vae encoder": lambda network, x, cond: network.encode(x[:, :3]).mean,
    "tiled decoder": lambda network, x, cond: tiled_decode(network, x, rows=4),
    "text": lambda network, x, cond: network(torch.arange(154).view(2, 77)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("learns", [False, True])
def test_the_quick_form_of_every_network_is_the_plain_one_to_rounding(name, learns, monkeypatch):
    monkeypatch.setattr("minisd.runtime.optimize.TOKENS", 24)
    monkeypatch.setattr("minisd.runtime.convolution.fewer_products_are_quicker", lambda *_: not learns)
    sd = lively()
    network = plain({"unet": sd.unet, "text": sd.text_encoder}.get(name, sd.vae))
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(2, 4, 16, 16, generator=generator), Conditioning(torch.randn(2, 5, 64, generator=generator))
    with torch.set_grad_enabled(learns and "tiled" not in name):
        expected = NETWORKS[name](network, x, cond).detach()
        classes = [type(module) for module in network.modules()]
        out = NETWORKS[name](optimize(network), x, cond).detach()
    # 2e-5 of the largest value: sums of a few hundred float32 products in another order
    torch.testing.assert_close(out, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert [type(module) for module in network.modules()] != classes
    assert [type(module) for module in plain(network).modules()] == classes


def test_optimizing_twice_is_optimizing_once_and_every_form_is_a_form_of_its_layer():
    unet = optimize(lively().unet)
    classes = [type(module) for module in unet.modules()]
    assert [type(module) for module in optimize(unet).modules()] == classes
    assert all(issubclass(form, layer) for layer, form in FORMS.items())


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_channels_last_changes_no_weight_and_no_output_beyond_rounding(name):
    own = getattr(lively(), name)
    other = copy.deepcopy(own)
    channels_last(other)
    for key, tensor in own.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    conv = next(m for m in other.modules() if isinstance(m, Conv3x3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Conditioning(torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1)))
    run = (lambda network: network(x, 7, cond)) if name == "unet" else (lambda network: network.decode(x))
    with torch.no_grad():
        expected, out = run(plain(own)), run(other)
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
    optimize(layer)
    parts = []
    layer.proj_in.register_forward_pre_hook(lambda _, inputs: parts.append(len(inputs[0])))
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
from minisd.runtime.allocator import give_back_freed_memory, keep_freed_memory
from minisd.runtime.optimize import optimize
optimize(torch.nn.Linear(1, 1))

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
