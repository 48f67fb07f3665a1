"""The KL autoencoder in files: its names, its config from shapes and from a config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints.files.entries import CheckpointError
from minisd.checkpoints.networks.format import Naming, NetworkFormat, Shapes, Source, check_fixed, count, number
from minisd.config import PRESETS, ModelConfig, VAEConfig
from minisd.models.vae import VAE as Autoencoder


def vae_names(config: VAEConfig, dialect: str) -> Iterator[tuple[str, str | Source]]:
    """Our names are the original's but for `skip`; diffusers counts the decoder's levels from the deepest."""
    ldm, last = dialect == "ldm", len(config.channel_mult) - 1
    res = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {
        "skip": "nin_shortcut" if ldm else "conv_shortcut"
    }
    attn = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    yield from ((f"{x}quant_conv",) * 2 for x in ("", "post_"))
    for net, side, blocks in (
        ("encoder", "down", config.num_res_blocks),
        ("decoder", "up", config.num_res_blocks + 1),
    ):
        yield from ((f"{net}.{x}",) * 2 for x in ("conv_in", "conv_out"))
        yield f"{net}.norm_out", f"{net}.norm_out" if ldm else f"{net}.conv_norm_out"
        for level in range(last + 1):
            ours = f"{net}.{side}.{level}"
            theirs = ours if ldm else f"{net}.{side}_blocks.{level if side == 'down' else last - level}"
            for i in range(blocks):
                for name, official in res.items():
                    yield f"{ours}.block.{i}.{name}", f"{theirs}.{'block' if ldm else 'resnets'}.{i}.{official}"
            resample = f"{side}sample.conv"
            yield f"{ours}.{resample}", f"{theirs}.{resample if ldm else f'{side}samplers.0.conv'}"
        for i in (1, 2):
            for name, official in res.items():
                block = f"mid.block_{i}" if ldm else f"mid_block.resnets.{i - 1}"
                yield f"{net}.mid.block_{i}.{name}", f"{net}.{block}.{official}"
        for name, official in attn.items():
            ours = f"{net}.mid.attn_1.{name}"
            theirs = ours if ldm else f"{net}.mid_block.attentions.0.{official}"
            yield ours, theirs
            if not ldm and name != "norm":
                yield f"{ours}.weight", Source(f"{theirs}.weight", linear=True)


def config_from_shapes(tensors: Shapes, dialect: str) -> tuple[VAEConfig, str]:
    ldm = dialect == "ldm"
    level = r"encoder\.down\.(\d+)\." if ldm else r"encoder\.down_blocks\.(\d+)\."
    block = "encoder.down.{}.block.{}" if ldm else "encoder.down_blocks.{}.resnets.{}"
    channels, image_channels = tensors.shape("encoder.conv_in.weight")[:2]
    latents = tensors.shape("decoder.conv_in.weight")[1]
    if latents != 4:
        raise CheckpointError(
            f"its VAE has {latents} latent channels, Stable Diffusion 1.x and 2.x have 4: SD3's or Flux's?"
        )
    widths = [tensors.shape(block.format(i, 0) + ".conv1.weight")[0] for i in range(count(tensors, level))]
    config = VAEConfig(
        image_channels=image_channels,
        latent_channels=latents,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count(tensors, re.escape(block.format(0, "N")).replace("N", r"(\d+)") + r"\."),
    )
    for preset in PRESETS.values():
        if VAE.agrees(preset.vae, config):
            return preset.vae, ""
    return config, "no official VAE has these shapes, and they do not tell its scale factor"


_FIXED = {"act_fn": ("silu",), "shift_factor": (None,), "use_quant_conv": (True,), "use_post_quant_conv": (True,)}


def config_from_json(vae: VAEConfig, config: dict, path: Path) -> VAEConfig:
    check_fixed(config, _FIXED, path)
    return replace(
        vae,
        norm_groups=number(config, "norm_num_groups", 32, int, path),
        scale_factor=number(config, "scaling_factor", vae.scale_factor, float, path),
    )


def config_to_json(config: ModelConfig) -> dict:
    vae = config.vae
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "in_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.image_channels,
        "sample_size": config.image_size,
        "scaling_factor": vae.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
    }


def new_name(name: str) -> str:
    """diffusers < 0.15 called the projections of the VAE's attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(mid_block\.attentions\.0\.){old}\.", rf"\g<1>{new}.", name)
    return name


_NAMES = r"encoder\.|decoder\.|quant_conv|post_quant_conv"

VAE = NetworkFormat(
    name="vae",
    title="VAE",
    kind="a VAE alone",
    module=Autoencoder,
    names=vae_names,
    namings=(
        Naming("ldm", ("first_stage_model.", ""), "encoder.down.0.block.0.norm1.weight", _NAMES),
        Naming("diffusers", ("",), "encoder.down_blocks.0.resnets.0.norm1.weight", _NAMES, rename=new_name),
    ),
    config_from_shapes=config_from_shapes,
    inferred_not=("scale_factor", "norm_groups", "norm_eps", "logvar_range"),
    prefixes={"ldm": "first_stage_model."},
    subfolder="vae",
    config_from_json=config_from_json,
    config_to_json=config_to_json,
    about=lambda config: f"1 latent per {config.factor} × {config.factor} pixels",
)
