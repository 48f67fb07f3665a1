"""ControlNet in files: the U-Net's encoder, and the convolutions that read the hint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints.networks import unet
from minisd.checkpoints.networks.format import Naming, NetworkFormat, Shapes, check_fixed, count
from minisd.config import ControlNetConfig
from minisd.models.controlnet import ControlNet


def control_names(config: ControlNetConfig, dialect: str) -> Iterator[tuple[str, str]]:
    yield from unet.unet_names(config.unet, dialect)
    skips = len(config.unet.plan().skip_channels)
    for i in range(skips):
        yield f"zero_convs.{i}", f"zero_convs.{i}.0" if dialect == "ldm" else f"controlnet_down_blocks.{i}"
    yield "zero_conv_mid", "middle_block_out.0" if dialect == "ldm" else "controlnet_mid_block"
    hints = 2 * len(config.hint_widths)
    for i in range(hints):
        if dialect == "ldm":
            yield f"hint.convs.{i}", f"input_hint_block.{2 * i}"
        else:
            name = "conv_in" if i == 0 else "conv_out" if i == hints - 1 else f"blocks.{i - 1}"
            yield f"hint.convs.{i}", f"controlnet_cond_embedding.{name}"


def config_from_shapes(tensors: Shapes, dialect: str) -> tuple[ControlNetConfig, str]:
    encoder, doubt = unet.config_from_shapes(tensors, dialect)
    if dialect == "ldm":
        names = [f"input_hint_block.{2 * i}" for i in range(count(tensors, r"input_hint_block\.(\d+)\.weight"))]
    else:
        blocks = count(tensors, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
        names = [f"controlnet_cond_embedding.{x}" for x in ("conv_in", *(f"blocks.{i}" for i in range(blocks)))]
    first, *rest = (tensors.shape(f"{name}.weight") for name in names)
    rest = rest[:-1] if dialect == "ldm" else rest  # the last one leads to the U-Net's width
    return ControlNetConfig(encoder, first[1], (first[0], *(shape[0] for shape in rest[1::2]))), doubt


def config_from_json(control: ControlNetConfig, config: dict, path: Path) -> ControlNetConfig:
    check_fixed(config, {"controlnet_conditioning_channel_order": ("rgb",), "global_pool_conditions": (False,)}, path)
    return replace(control, unet=unet.config_from_json(control.unet, config, path))


CONTROL = NetworkFormat(
    name="control",
    title="ControlNet",
    kind="a ControlNet",
    module=ControlNet,
    names=control_names,
    namings=(
        Naming("ldm", ("control_model.", ""), unet.HINT_MARKERS["ldm"], unet.ORIGINAL_NAMES),
        Naming("diffusers", ("",), unet.HINT_MARKERS["diffusers"]),
    ),
    config_from_shapes=config_from_shapes,
    prefixes={"ldm": "control_model."},
    config_from_json=config_from_json,
    about=lambda config: f"context {config.unet.context_dim}, {config.hint_channels}-channel hint",
    config_of=lambda network: network.control_config,
)
