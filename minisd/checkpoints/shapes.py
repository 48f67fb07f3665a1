"""The config of a network, read off its tensors' names and shapes, and what shapes cannot tell.

Each reader takes a network's tensors under its dialect's names and returns (config, doubt): doubt is a sentence about
what had to be guessed, empty where the shapes are those of an official network, whose config is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Protocol

from minisd.checkpoints.files.entries import CheckpointError
from minisd.config import PRESETS, CLIPTextConfig, CLIPVisionConfig, ControlNetConfig, UNetConfig, VAEConfig

# Fields that no shape shows.
UNSEEN = {
    "unet": [
        "cross_only_levels",
        "num_heads",
        "head_width",
        "norm_groups",
        "norm_eps",
        "attn_norm_eps",
        "layer_norm_eps",
    ],
    "vae": ("scale_factor", "norm_groups", "norm_eps", "logvar_range"),
    "text": ("heads", "activation", "skip", "bos_id", "eos_id", "pad_id", "dialect", "unknown_id", "norm_eps"),
    "vision": ("heads", "activation", "norm_eps"),
    "control": (),
}


class Shapes(Collection[str], Protocol):
    def shape(self, name: str) -> tuple[int, ...]: ...


def config_of(network: str, tensors: Shapes, dialect: str):
    """(config, doubt) of a network. CheckpointError, KeyError, IndexError, ValueError … where the tensors make none."""
    return _READERS[network](tensors, dialect)


def agrees(network: str, said, seen) -> bool:
    """Whether a config that somebody states has the shapes that were seen."""
    if network == "control":
        return agrees("unet", said.unet, seen.unet) and replace(said, unet=seen.unet) == seen
    return replace(seen, **{name: getattr(said, name) for name in UNSEEN[network]}) == said


def _count(tensors: Shapes, pattern: str) -> int:
    """How many different labels stand in place of the group; gaps among them end as missing tensors."""
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


# ---------------------------------------------------------------------------------------------------------- U-Net


def _unet(tensors: Shapes, dialect: str) -> tuple[UNetConfig, str]:
    shape, name = tensors.shape, _UNET_NAMES[dialect]
    channels, in_channels = shape(name["conv_in"])[:2]
    levels, widths = [], {}
    attention_levels, cross_only_levels, transformer = set(), set(), None
    for level, block, attention in _encoder_blocks(tensors, dialect):
        levels.append(level)
        widths[level] = shape(f"{block}.{name['conv1']}.weight")[0]
        if f"{attention}.proj_in.weight" in tensors:
            transformer = attention
            attention_levels.add(level)
            if shape(f"{attention}.transformer_blocks.0.attn1.to_k.weight")[1] != widths[level]:
                cross_only_levels.add(level)
    blocks_per_level = {levels.count(level) for level in levels}
    if transformer is None or len(blocks_per_level) != 1:
        raise CheckpointError(
            "its U-Net has no cross-attention or an irregular number of blocks per level: it is none of Stable "
            "Diffusion 1.x or 2.x"
        )
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=shape(name["conv_out"])[0] if name["conv_out"] in tensors else UNetConfig.out_channels,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths.values()),
        num_res_blocks=blocks_per_level.pop(),
        attention_levels=tuple(sorted(attention_levels)),
        cross_only_levels=tuple(sorted(cross_only_levels)),
        num_heads=1,
        transformer_depth=_count(tensors, re.escape(transformer) + r"\.transformer_blocks\.(\d+)\."),
        context_dim=shape(f"{transformer}.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=len(shape(f"{transformer}.proj_in.weight")) == 2,
        num_classes=shape(name["label"])[0] if name["label"] in tensors else None,
        vector_dim=shape(name["vector"])[1] if name["vector"] in tensors else None,
        norm_groups=math.gcd(channels, UNetConfig.norm_groups),  # where 32 do not fit, a doubt remains (_with_heads)
    )
    return _with_heads(config)


_UNET_NAMES = {
    "ldm": {
        "conv_in": "input_blocks.0.0.weight",
        "conv_out": "out.2.weight",
        "label": "label_emb.weight",
        "vector": "label_emb.0.0.weight",
        "conv1": "in_layers.2",
    },
    "diffusers": {
        "conv_in": "conv_in.weight",
        "conv_out": "conv_out.weight",
        "label": "class_embedding.weight",
        "vector": "class_embedding.linear_1.weight",
        "conv1": "conv1",
    },
}


def _encoder_blocks(tensors: Shapes, dialect: str) -> Iterator[tuple[int, str, str]]:
    """(level, residual block, the transformer that would follow it) down the encoder."""
    if dialect == "diffusers":
        for level in range(_count(tensors, r"down_blocks\.(\d+)\.")):
            for i in range(_count(tensors, rf"down_blocks\.{level}\.resnets\.(\d+)\.")):
                yield level, f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}"
        return
    level = 0
    for i in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in tensors:
            level += 1
        else:
            yield level, f"input_blocks.{i}.0", f"input_blocks.{i}.1"


def _with_heads(config: UNetConfig) -> tuple[UNetConfig, str]:
    """Shapes do not show how a width is split into heads: the official networks of the same shapes do."""
    for preset in PRESETS.values():
        if replace(preset.unet, num_heads=1, head_width=None) == config:
            return preset.unet, ""
    by_width = config.linear_projection
    says = "heads of width 64, as in SD2" if by_width else "8 heads, as in SD1"
    try:
        config = replace(config, num_heads=None if by_width else 8, head_width=64 if by_width else None)
    except ValueError:
        says = "one head"
    return config, f"no official U-Net has these shapes, and they do not tell its heads: {says} would be a guess"


def _control(tensors: Shapes, dialect: str) -> tuple[ControlNetConfig, str]:
    unet, doubt = _unet(tensors, dialect)
    if dialect == "ldm":
        names = [f"input_hint_block.{2 * i}" for i in range(_count(tensors, r"input_hint_block\.(\d+)\.weight"))]
    else:
        blocks = _count(tensors, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
        names = [f"controlnet_cond_embedding.{x}" for x in ("conv_in", *(f"blocks.{i}" for i in range(blocks)))]
    first, *rest = (tensors.shape(f"{name}.weight") for name in names)
    rest = rest[:-1] if dialect == "ldm" else rest  # the last one leads to the U-Net's width
    return ControlNetConfig(unet, first[1], (first[0], *(shape[0] for shape in rest[1::2]))), doubt


# ------------------------------------------------------------------------------------------------------------ VAE


def _vae(tensors: Shapes, dialect: str) -> tuple[VAEConfig, str]:
    ldm = dialect == "ldm"
    level = r"encoder\.down\.(\d+)\." if ldm else r"encoder\.down_blocks\.(\d+)\."
    block = "encoder.down.{}.block.{}" if ldm else "encoder.down_blocks.{}.resnets.{}"
    channels, image_channels = tensors.shape("encoder.conv_in.weight")[:2]
    latents = tensors.shape("decoder.conv_in.weight")[1]
    if latents != 4:
        raise CheckpointError(
            f"its VAE has {latents} latent channels, Stable Diffusion 1.x and 2.x have 4: SD3's or Flux's?"
        )
    widths = [tensors.shape(block.format(i, 0) + ".conv1.weight")[0] for i in range(_count(tensors, level))]
    config = VAEConfig(
        image_channels=image_channels,
        latent_channels=latents,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=_count(tensors, re.escape(block.format(0, "N")).replace("N", r"(\d+)") + r"\."),
    )
    for preset in PRESETS.values():
        if agrees("vae", preset.vae, config):
            return preset.vae, ""
    return config, "no official VAE has these shapes, and they do not tell its scale factor"


# ----------------------------------------------------------------------------------------------------------- CLIP


def _text(tensors: Shapes, dialect: str) -> tuple[CLIPTextConfig, str]:
    if dialect == "hf":
        block = "text_model.encoder.layers"
        tokens, positions = (f"text_model.embeddings.{x}_embedding.weight" for x in ("token", "position"))
        mlp, projection = "mlp.fc1.weight", "text_projection.weight"
    else:
        block, tokens, positions = "transformer.resblocks", "token_embedding.weight", "positional_embedding"
        mlp, projection = "mlp.c_fc.weight", "text_projection"
    vocab_size, width = tensors.shape(tokens)
    # ViT-L/14 is OpenAI's, with quick-GELU; ViT-H/14 is OpenCLIP's, with GELU, and SD2 leaves out its last block
    base = PRESETS["SD2_BASE" if dialect == "openclip" or width == 1024 else "SD1"].text
    layers = _count(tensors, rf"{re.escape(block)}\.(\d+)\.")
    config = replace(
        base,
        vocab_size=vocab_size,
        length=tensors.shape(positions)[0],
        width=width,
        layers=layers,
        heads=max(width // 64, 1),
        mlp_width=tensors.shape(f"{block}.0.{mlp}")[0],
        skip=base.skip if layers == base.layers else 0,
        projection_dim=_projection_dim(tensors, projection, dialect),
    )
    doubt = "no text encoder of Stable Diffusion has this width, and shapes do not tell its heads and activation"
    return config, "" if width == base.width else doubt


def _vision(tensors: Shapes, dialect: str) -> tuple[CLIPVisionConfig, str]:
    hf = dialect == "hf"
    patch = tensors.shape("vision_model.embeddings.patch_embedding.weight" if hf else "conv1.weight")
    positions = tensors.shape("vision_model.embeddings.position_embedding.weight" if hf else "positional_embedding")[0]
    block = "vision_model.encoder.layers" if hf else "transformer.resblocks"
    width, patch_size = patch[0], patch[-1]
    base = PRESETS["SD2_UNCLIP_H" if width == 1280 else "SD2_UNCLIP_L"].vision
    config = replace(
        base,
        image_size=round((positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=_count(tensors, rf"{re.escape(block)}\.(\d+)\."),
        heads=base.heads if width == base.width else max(width // 64, 1),
        mlp_width=tensors.shape(f"{block}.0.mlp.{'fc1' if hf else 'c_fc'}.weight")[0],
        projection_dim=_projection_dim(tensors, "visual_projection.weight" if hf else "proj", dialect),
    )
    doubt = "no image encoder of Stable Diffusion has this width, and shapes do not tell its heads and activation"
    return config, "" if width == base.width else doubt


def _projection_dim(tensors: Shapes, name: str, dialect: str) -> int | None:
    if name not in tensors:
        return None
    return tensors.shape(name)[0 if dialect == "hf" else 1]


_READERS = {"unet": _unet, "control": _control, "vae": _vae, "text": _text, "vision": _vision}
