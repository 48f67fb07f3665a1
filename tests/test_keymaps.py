"""Official names ↔ ours: a bijection for every official network, in both layouts, and for networks of any shape."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from reference import manifest
from tiny import random_network

from minisd.checkpoints.keymaps import from_official, keymap, to_official
from minisd.checkpoints.networks import NETWORKS
from minisd.config import (
    PRESETS,
    SD1,
    SD1_INPAINT,
    SD2_BASE,
    SD2_DEPTH,
    SD2_INPAINT,
    SD2_UNCLIP_H,
    SD2_V,
    SD_X4_UPSCALER,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    UNetConfig,
    VAEConfig,
)

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPENCLIP, CONTROL, VISION = "cond_stage_model.model.", "control_model.", "embedder.model.visual."
CONTROL1, CONTROL2 = ControlNetConfig(SD1.unet), ControlNetConfig(SD2_BASE.unet)

# manifest, prefix, network, config, dialect
OFFICIAL = [
    ("sd-v1", UNET, "unet", SD1.unet, "ldm"),
    ("sd-v1", VAE, "vae", SD1.vae, "ldm"),
    ("sd-v1", TEXT, "text", SD1.text, "hf"),
    ("sd-v1-inpainting", UNET, "unet", SD1_INPAINT.unet, "ldm"),
    ("sd-v2-base", UNET, "unet", SD2_BASE.unet, "ldm"),
    ("sd-v2-1", UNET, "unet", SD2_V.unet, "ldm"),
    ("sd-v2-1", OPENCLIP, "text", SD2_V.text, "openclip"),
    ("sd-v2-inpainting", UNET, "unet", SD2_INPAINT.unet, "ldm"),
    ("sd-2-depth", UNET, "unet", SD2_DEPTH.unet, "ldm"),
    ("sd-2-1-unclip-h", UNET, "unet", SD2_UNCLIP_H.unet, "ldm"),
    ("sd-2-1-unclip-h", VISION, "vision", SD2_UNCLIP_H.vision, "openclip"),
    ("sd-x4-upscaler", UNET, "unet", SD_X4_UPSCALER.unet, "ldm"),
    ("sd-x4-upscaler", VAE, "vae", SD_X4_UPSCALER.vae, "ldm"),
    ("controlnet-cldm-v15", CONTROL, "control", CONTROL1, "ldm"),
    ("controlnet-cldm-v21", CONTROL, "control", CONTROL2, "ldm"),
    ("sd15-unet.diffusers", "", "unet", SD1.unet, "diffusers"),
    ("sd15-inpainting-unet.diffusers", "", "unet", SD1_INPAINT.unet, "diffusers"),
    ("sd15-vae.diffusers-new", "", "vae", SD1.vae, "diffusers"),
    ("sd15-text_encoder.diffusers-hub", "", "text", SD1.text, "hf"),
    ("sd15-controlnet.diffusers", "", "control", CONTROL1, "diffusers"),
    ("sd21-unet.diffusers", "", "unet", SD2_V.unet, "diffusers"),
    ("sd21-unclip-h-unet.diffusers", "", "unet", SD2_UNCLIP_H.unet, "diffusers"),
    ("sd21-controlnet.diffusers", "", "control", CONTROL2, "diffusers"),
    ("sdx4-unet.diffusers", "", "unet", SD_X4_UPSCALER.unet, "diffusers"),
    ("sdx4-vae.diffusers-new", "", "vae", SD_X4_UPSCALER.vae, "diffusers"),
]


def on_meta(name, config):
    with torch.device("meta"):
        return NETWORKS[name].module(config)


@pytest.mark.parametrize(
    ("name", "prefix", "network", "config", "dialect"), OFFICIAL, ids=[f"{c[0]}-{c[2]}" for c in OFFICIAL]
)
def test_the_key_map_is_a_bijection_on_official_names_and_shapes(name, prefix, network, config, dialect):
    official = {
        k.removeprefix(prefix): tuple(s) for k, (s, _) in manifest(name)["tensors"].items() if k.startswith(prefix)
    }
    not_run = {k for k in official if k.endswith(("position_ids", "logit_scale"))}
    network = on_meta(network, config)
    names = keymap(network, dialect)
    assert set(names) == set(network.state_dict())
    assert len({(s.key, s.third) for s in names.values()}) == len(names)
    assert {s.key for s in names.values()} == set(official) - not_run
    ours = from_official(lambda key: torch.empty(official[key], device="meta"), names)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in network.state_dict().items()}


# map, network, config, dialect of the original, prefix there, dialect of diffusers
MAPS = [
    ("map-sd15-unet", "unet", SD1.unet, "ldm", UNET, "diffusers"),
    ("map-sd15-inpainting-unet", "unet", SD1_INPAINT.unet, "ldm", UNET, "diffusers"),
    ("map-sd15-vae", "vae", SD1.vae, "ldm", VAE, "diffusers"),
    ("map-sd15-text_encoder", "text", SD1.text, "hf", TEXT, "hf"),
    ("map-sd15-controlnet", "control", CONTROL1, "ldm", CONTROL, "diffusers"),
    ("map-sd21-unet", "unet", SD2_V.unet, "ldm", UNET, "diffusers"),
    ("map-sd21-text_encoder", "text", SD2_V.text, "openclip", OPENCLIP, "hf"),
    ("map-sd21-controlnet", "control", CONTROL2, "ldm", CONTROL, "diffusers"),
    ("map-sd21-unclip-h-unet", "unet", SD2_UNCLIP_H.unet, "ldm", UNET, "diffusers"),
    ("map-sdx4-unet", "unet", SD_X4_UPSCALER.unet, "ldm", UNET, "diffusers"),
    ("map-sdx4-vae", "vae", SD_X4_UPSCALER.vae, "ldm", VAE, "diffusers"),
]


@pytest.mark.parametrize(("name", "network", "config", "ldm", "prefix", "diffusers"), MAPS, ids=[m[0] for m in MAPS])
def test_through_our_names_the_layouts_correspond_as_in_diffusers_own_converters(
    name, network, config, ldm, prefix, diffusers
):
    network = on_meta(network, config)
    theirs, here = {s.key: (n, s) for n, s in keymap(network, diffusers).items()}, keymap(network, ldm)
    for key, said in manifest(name)["map"].items():
        if key.endswith("position_ids"):
            continue
        ours, there = theirs[key]
        original = here[ours]
        rows = original.third is not None and (original.third * config.width, (original.third + 1) * config.width)
        assert said["from"] == prefix + original.key
        assert tuple(said.get("rows", ())) == (rows or ())
        assert bool(said.get("reshape")) == there.linear
        assert bool(said.get("transpose")) == (original.transposed != there.transposed)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_key_map_in_every_dialect(preset):
    config = PRESETS[preset]
    for name, dialects in (
        ("unet", ("ldm", "diffusers")),
        ("vae", ("ldm", "diffusers")),
        ("text", ("hf", "openclip")),
        ("vision", ("hf", "openclip")),
    ):
        if getattr(config, name) is not None:
            network = on_meta(name, getattr(config, name))
            for dialect in dialects:
                assert_bijection(network, dialect)


def assert_bijection(network, dialect):
    names = keymap(network, dialect)
    assert set(names) == set(network.state_dict())
    assert len({(source.key, source.third) for source in names.values()}) == len(names)


@st.composite
def unets(draw):
    levels = draw(st.integers(1, 4))
    mult = [1, *draw(st.lists(st.integers(1, 4), min_size=levels - 1, max_size=levels - 1))]
    attention = draw(st.sets(st.integers(0, levels - 1)))
    return UNetConfig(
        in_channels=draw(st.integers(1, 9)),
        channels=32,
        channel_mult=tuple(mult),
        num_res_blocks=draw(st.integers(1, 3)),
        attention_levels=tuple(sorted(attention)),
        cross_only_levels=tuple(sorted(draw(st.sets(st.sampled_from(sorted(attention)))) if attention else ())),
        **draw(st.sampled_from([{"num_heads": 4}, {"num_heads": None, "head_width": 16}])),
        transformer_depth=draw(st.integers(1, 2)),
        context_dim=48,
        linear_projection=draw(st.booleans()),
        **draw(st.sampled_from([{}, {"num_classes": 5}, {"vector_dim": 24}])),
    )


VAES = st.builds(
    lambda mult, blocks: VAEConfig(channels=32, channel_mult=tuple(mult), num_res_blocks=blocks),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 3),
)
TEXTS = st.builds(
    lambda layers, projection: CLIPTextConfig(
        vocab_size=30, length=8, width=32, layers=layers, heads=2, mlp_width=48, projection_dim=projection
    ),
    st.integers(1, 12),
    st.sampled_from([None, 16, 32]),
)
VISIONS = st.builds(
    lambda layers, projection: CLIPVisionConfig(
        image_size=28, width=32, layers=layers, heads=2, mlp_width=48, projection_dim=projection
    ),
    st.integers(1, 12),
    st.sampled_from([None, 16, 32]),
)
CONTROLS = st.builds(
    lambda unet, widths: ControlNetConfig(unet, 3, tuple(widths)),
    unets(),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
ANY = st.one_of(
    st.tuples(st.just("unet"), unets(), st.sampled_from(["ldm", "diffusers"])),
    st.tuples(st.just("vae"), VAES, st.sampled_from(["ldm", "diffusers"])),
    st.tuples(st.just("control"), CONTROLS, st.sampled_from(["ldm", "diffusers"])),
    st.tuples(st.just("text"), TEXTS, st.sampled_from(["hf", "openclip"])),
    st.tuples(st.just("vision"), VISIONS, st.sampled_from(["hf", "openclip"])),
)


@settings(max_examples=60, deadline=None)
@given(ANY)
def test_the_key_map_is_a_bijection_for_networks_of_any_shape(case):
    name, config, dialect = case
    assert_bijection(on_meta(name, config), dialect)


@settings(max_examples=15, deadline=None)
@given(
    st.one_of(st.tuples(st.just("text"), TEXTS), st.tuples(st.just("vision"), VISIONS), st.tuples(st.just("vae"), VAES))
)
def test_take_undoes_give_bit_for_bit(case):
    network = random_network(*case)
    state = network.state_dict()
    for dialect in ("ldm", "diffusers") if case[0] == "vae" else ("hf", "openclip"):
        names = keymap(network, dialect)
        file = to_official(state, names)
        again = from_official(file.__getitem__, names)
        assert set(again) == set(state)
        assert all(torch.equal(again[n], state[n]) for n in state)


def test_taking_reads_a_packed_projection_once_and_copies_nothing():
    network = random_network("text", CLIPTextConfig(vocab_size=30, length=8, width=32, layers=2, heads=2, mlp_width=48))
    names = keymap(network, "openclip")
    file, read = to_official(network.state_dict(), names), []
    state = from_official(lambda key: read.append(key) or file[key], names)
    assert len(read) == len(set(read)) == len(file)
    storages = {tensor.untyped_storage().data_ptr() for tensor in file.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in state.values()} <= storages
