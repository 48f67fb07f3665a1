"""The U-Net in files: its names, its config from shapes and from a config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints.files.entries import CheckpointError
from minisd.checkpoints.networks.format import Naming, NetworkFormat, Shapes, check_fixed, count, number
from minisd.config import PRESETS, ModelConfig, UNetConfig
from minisd.models.unet import UNet

_RES = {
    "ldm": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "emb": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    "diffusers": {
        "norm1": "norm1",
        "conv1": "conv1",
        "emb": "time_emb_proj",
        "norm2": "norm2",
        "conv2": "conv2",
        "skip": "conv_shortcut",
    },
}
_TRANSFORMER_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "norm3": "norm3",
    "ff.proj_in": "ff.net.0.proj",
    "ff.proj_out": "ff.net.2",
    **{
        f"{attn}.{ours}": f"{attn}.{theirs}"
        for attn in ("attn1", "attn2")
        for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"))
    },
}


def _slot_parts(config: UNetConfig, dialect: str) -> Iterator[tuple[str, str, str]]:
    """(our slot, part, the file's name of that part) for every part of every slot."""
    plan = config.plan()
    parts = lambda slot: [p for p in ("res", "attn", "resample") if getattr(slot, p)]  # noqa: E731
    if dialect == "ldm":
        for i, slot in enumerate(plan.down):
            for n, part in enumerate(parts(slot)):
                yield f"down.{i}", part, f"input_blocks.{i + 1}.{n}" + (".op" if part == "resample" else "")
        middle = [(f"mid.{i}", part) for i, slot in enumerate(plan.mid) for part in parts(slot)]
        for n, (slot, part) in enumerate(middle):
            yield slot, part, f"middle_block.{n}"
        for i, slot in enumerate(plan.up):
            for n, part in enumerate(parts(slot)):
                yield f"up.{i}", part, f"output_blocks.{i}.{n}" + (".conv" if part == "resample" else "")
        return
    names = {"res": "resnets", "attn": "attentions"}
    for side, slots, per_level in (
        ("down", plan.down, config.num_res_blocks + 1),
        ("up", plan.up, config.num_res_blocks + 1),
    ):
        for i, slot in enumerate(slots):
            level, n = divmod(i, per_level)
            for part in parts(slot):
                name = f"{side}samplers.0.conv" if part == "resample" else f"{names[part]}.{n}"
                yield f"{side}.{i}", part, f"{side}_blocks.{level}.{name}"
    for i, slot in enumerate(plan.mid):
        for part in parts(slot):
            yield f"mid.{i}", part, f"mid_block.{names[part]}.{i}"


def unet_names(config: UNetConfig, dialect: str) -> Iterator[tuple[str, str]]:
    """(our module, what the dialect calls it); `label_emb` is there in every form that it can have."""
    time, vector, label, conv_in, norm_out, conv_out = {
        "ldm": ["time_embed.{}", "label_emb.0.{}", "label_emb", "input_blocks.0.0", "out.0", "out.2"],
        "diffusers": [
            "time_embedding.linear_{}",
            "class_embedding.linear_{}",
            "class_embedding",
            "conv_in",
            "conv_norm_out",
            "conv_out",
        ],
    }[dialect]
    for ours, n in ((0, 0), (2, 2)) if dialect == "ldm" else ((0, 1), (2, 2)):
        yield f"time_embed.{ours}", time.format(n)
        yield f"label_emb.{ours}", vector.format(n)
    yield from (("label_emb", label), ("conv_in", conv_in), ("norm_out", norm_out), ("conv_out", conv_out))
    for slot, part, official in _slot_parts(config, dialect):
        if part == "res":
            for ours, theirs in _RES[dialect].items():
                yield f"{slot}.res.{ours}", f"{official}.{theirs}"
        elif part == "resample":
            yield f"{slot}.resample.conv", official
        else:
            for name in ("norm", "proj_in", "proj_out"):
                yield f"{slot}.attn.{name}", f"{official}.{name}"
            for depth in range(config.transformer_depth):
                for ours, theirs in _TRANSFORMER_BLOCK.items():
                    yield f"{slot}.attn.blocks.{depth}.{ours}", f"{official}.transformer_blocks.{depth}.{theirs}"


def config_from_shapes(tensors: Shapes, dialect: str) -> tuple[UNetConfig, str]:
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
        transformer_depth=count(tensors, re.escape(transformer) + r"\.transformer_blocks\.(\d+)\."),
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
        for level in range(count(tensors, r"down_blocks\.(\d+)\.")):
            for i in range(count(tensors, rf"down_blocks\.{level}\.resnets\.(\d+)\.")):
                yield level, f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}"
        return
    level = 0
    for i in range(1, count(tensors, r"input_blocks\.(\d+)\.")):
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
    guess = "heads of width 64, as in SD2" if by_width else "8 heads, as in SD1"
    try:
        config = replace(config, num_heads=None if by_width else 8, head_width=64 if by_width else None)
    except ValueError:
        guess = "one head"
    return config, f"no official U-Net has these shapes, and they do not tell its heads: {guess} would be a guess"


# (key, the values with which our networks agree); anything else would change the numbers silently
_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False, None),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}


def config_from_json(unet: UNetConfig, config: dict, path: Path) -> UNetConfig:
    """Heads and norms. diffusers' attention_head_dim is the NUMBER of heads."""
    check_fixed(config, _FIXED, path)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    levels = len(unet.channel_mult)
    per_level = heads if isinstance(heads, list) else [heads] * levels
    if len(per_level) != levels or not all(type(h) is int and 0 < h < 1e9 for h in per_level):
        raise CheckpointError(f"{path}: attention_head_dim is {heads!r}; a number, or one for each of {levels} levels")
    with_heads = sorted({*unet.attention_levels, levels - 1})  # the middle has the heads of the deepest level
    numbers = {per_level[level] for level in with_heads}
    widths = {unet.channels * unet.channel_mult[level] / per_level[level] for level in with_heads}
    if len(numbers) == 1 and (unet.num_heads or len(widths) > 1):
        split = {"num_heads": numbers.pop(), "head_width": None}
    elif len(widths) == 1 and (width := widths.pop()) == int(width):
        split = {"num_heads": None, "head_width": int(width)}
    else:
        raise CheckpointError(f"{path}: heads {per_level} are neither of one number nor of one width on all levels")
    try:
        return replace(
            unet,
            **split,
            cross_only_levels=_cross_only(unet, config, path),
            norm_groups=number(config, "norm_num_groups", 32, int, path),
            norm_eps=number(config, "norm_eps", 1e-5, float, path),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _cross_only(unet: UNetConfig, config: dict, path: Path) -> tuple[int, ...]:
    """The levels without self-attention; shapes do not tell where a level is as wide as the context."""
    declared = config.get("only_cross_attention", False)
    if declared is False or declared is None:
        declared = [False] * len(unet.channel_mult)
    if not isinstance(declared, list) or len(declared) != len(unet.channel_mult):
        raise CheckpointError(
            f"{path}: only_cross_attention is {declared!r}; false, or a list with a value for each level"
        )
    levels = tuple(level for level in unet.attention_levels if declared[level])
    unclear = {level for level in unet.attention_levels if unet.channels * unet.channel_mult[level] == unet.context_dim}
    if set(levels) - unclear != set(unet.cross_only_levels) - unclear:
        raise CheckpointError(f"{path}: only_cross_attention is {declared!r}, the weights say {unet.cross_only_levels}")
    return levels


def config_to_json(config: ModelConfig) -> dict:
    unet = config.unet
    levels = range(len(unet.channel_mult))
    widths = [unet.channels * mult for mult in unet.channel_mult]
    cross = [level in unet.attention_levels for level in levels]
    heads = unet.num_heads or [max(width // unet.head_width, 1) for width in widths]
    only_cross = [level in unet.cross_only_levels for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": "projection" if unet.vector_dim else None,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        "num_class_embeds": unet.num_classes,
        "only_cross_attention": only_cross if unet.cross_only_levels else False,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "sample_size": config.image_size // config.vae.factor,
        "transformer_layers_per_block": unet.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "use_linear_projection": unet.linear_projection,
    }


# ---------------------------------------------------------------------------------------------------- the declaration


def in_folder(declared: UNetConfig, inferred: UNetConfig) -> UNetConfig:
    """A config.json says heads by number or by width, whichever: the plan is the same."""
    if declared.plan() != inferred.plan():
        return declared
    return replace(declared, num_heads=inferred.num_heads, head_width=inferred.head_width)


ORIGINAL_NAMES = r"time_embed|label_emb|input_blocks|middle_block|output_blocks|out\.|zero_convs|input_hint_block"
HINT_MARKERS = {"ldm": "input_hint_block.0.weight", "diffusers": "controlnet_cond_embedding.conv_in.weight"}

UNET = NetworkFormat(
    name="unet",
    title="U-Net",
    kind="a U-Net alone",
    module=UNet,
    names=unet_names,
    namings=(
        Naming("ldm", ("model.diffusion_model.", ""), "input_blocks.0.0.weight", ORIGINAL_NAMES, HINT_MARKERS["ldm"]),
        Naming("diffusers", ("",), "time_embedding.linear_1.weight", unless=HINT_MARKERS["diffusers"]),
    ),
    config_from_shapes=config_from_shapes,
    inferred_not=(
        "cross_only_levels",
        "num_heads",
        "head_width",
        "norm_groups",
        "norm_eps",
        "attn_norm_eps",
        "layer_norm_eps",
    ),
    prefixes={"ldm": "model.diffusion_model."},
    subfolder="unet",
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    in_folder=in_folder,
    about=lambda config: f"{config.in_channels} channels in, context {config.context_dim}",
)
