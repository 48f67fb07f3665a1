"""LoRA: files of every layout read and written, changes merged into weights and taken out again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively
from tiny import TINY, random_network

from minisd.checkpoints.lora import LowRank, MergedLoras, layer_of, load_lora, save_lora
from minisd.checkpoints.lora_names import their_names

NETWORKS = {"unet": random_network("unet", TINY["SD1"].unet), "text": random_network("text", TINY["SD1"].text)}
LAYERS = list(their_names(NETWORKS))


def random_lora(layers=LAYERS, *, rank=3, alpha=2.0, seed=0, dtype=torch.float32, networks=NETWORKS):
    """A change for each layer, of about a tenth of its weight."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        shape = layer_of(networks, layer).weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        up = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        lora[layer] = LowRank(down.to(dtype), up.to(dtype), alpha)
    return lora


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@settings(max_examples=10, deadline=None)
@given(
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, unique=True),
    rank=st.integers(1, 5),
    power=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_what_is_written_comes_back_bit_for_bit(tmp_path_factory, layout, layers, rank, power, dtype):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    lora = random_lora(layers, rank=rank, alpha=rank * 2.0**power, dtype=dtype)
    save_lora(path, lora, NETWORKS, layout=layout)
    again = load_lora(path, NETWORKS)
    assert again.keys() == lora.keys()
    for layer, low_rank in lora.items():
        assert torch.equal(again[layer].delta(), low_rank.delta())
        assert again[layer].down.dtype == dtype
        if layout == "kohya":
            assert torch.equal(again[layer].up, low_rank.up)
            assert again[layer].alpha == low_rank.alpha


def test_unmerging_restores_every_bit_and_is_nothing_without_a_lora():
    sd = lively()
    before = {name: p.detach().clone() for net in (sd.unet, sd.text_encoder) for name, p in net.named_parameters()}
    merged = MergedLoras({"unet": sd.unet, "text": sd.text_encoder})
    merged.unmerge()
    merged.merge("a", random_lora(their_names(merged.networks), networks=merged.networks), 0.7)
    changed = [
        name
        for net in (sd.unet, sd.text_encoder)
        for name, p in net.named_parameters()
        if not torch.equal(p, before[name])
    ]
    assert len(changed) == len(their_names(merged.networks))
    merged.unmerge()
    merged.unmerge()
    assert all(torch.equal(p, before[name]) for net in (sd.unet, sd.text_encoder) for name, p in net.named_parameters())
