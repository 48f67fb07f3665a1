"""Families of models: which preset a checkpoint is, and which base model an adapter was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minisd.config import PRESETS, ModelConfig, Prediction, UNetConfig

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}  # by the width of the text states
SDXL = "SDXL"
SDXL_WIDTHS = {2048, 1280}  # of SDXL's context, and of its second text encoder
TASKS = {4: "text-to-image", 5: "depth", 7: "upscaling", 8: "pix2pix", 9: "inpainting"}  # by the U-Net's channels


def presets_of(unet: UNetConfig) -> dict[str, ModelConfig]:
    """The official models with this U-Net: one, or an ε and a v model of the same shapes."""
    return {name: preset for name, preset in PRESETS.items() if preset.unet == unet}


def model_config(networks: Mapping[str, Any], prediction: Prediction | None) -> ModelConfig:
    """The preset with this U-Net and prediction, or SD1's frame named "custom"; with the networks' own configs."""
    presets = list(presets_of(networks["unet"]).values())
    exact = next((preset for preset in presets if preset.prediction == prediction), None)
    preset = exact or (presets[0] if presets else replace(ModelConfig(), name="custom"))
    return replace(preset, **networks, prediction=prediction or preset.prediction)


def task_of(config: ModelConfig) -> str:
    """What a model is for, by what its U-Net takes besides x_t, t and text."""
    return "image-variation" if config.unet.vector_dim else TASKS.get(config.unet.in_channels, "text-to-image")


def base_of(width: int | None) -> str:
    """The family whose text states have this width; "" for none that is known."""
    return SDXL if width in SDXL_WIDTHS else BASES.get(width, "")


def other_family(width: int, own: int) -> str:
    """Why what was made for text states of one width does not go into a model of another: a sentence, both named."""
    theirs, ours = (f"{w} ({base_of(w) or 'a family of its own'})" for w in (width, own))
    return f"it is for a text width of {theirs}, this model has {ours}: take one that was trained for it"
