"""Families of models: which preset a checkpoint is, and which base model an adapter was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from minisd.config import PRESETS, ModelConfig, PredictionType, Task, UNetConfig, VAEConfig
from minisd.schema import from_dict

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}  # by the width of the text states
SDXL = "SDXL"
SDXL_WIDTHS = {2048, 1280}  # of SDXL's context, and of its second text encoder


def presets_of(unet: UNetConfig) -> dict[str, ModelConfig]:
    """The official models with this U-Net: one, or an ε and a v model of the same shapes."""
    return {name: preset for name, preset in PRESETS.items() if preset.unet == unet}


def model_config(networks: Mapping[str, Any], prediction: PredictionType | None) -> ModelConfig:
    """The preset with this U-Net and prediction, or SD1's frame named "custom"; with the networks' own configs."""
    presets = list(presets_of(networks["unet"]).values())
    exact = next((preset for preset in presets if preset.prediction == prediction), None)
    custom = replace(
        ModelConfig(), name="custom", task=task_of_shapes(networks["unet"], networks.get("vae", VAEConfig()))
    )
    preset = exact or (presets[0] if presets else custom)
    return replace(preset, **networks, prediction=prediction or preset.prediction)


def base_of(width: int | None) -> str:
    """The family whose text states have this width; "" for none that is known."""
    return SDXL if width in SDXL_WIDTHS else BASES.get(width, "")


def other_family(width: int, own: int) -> str:
    """Why what was made for text states of one width does not go into a model of another: a sentence, both named."""
    theirs, ours = (f"{w} ({base_of(w) or 'a family of its own'})" for w in (width, own))
    return f"it is for a text width of {theirs}, this model has {ours}: take one that was trained for it"


def config_to_json(config: ModelConfig) -> str:
    return json.dumps(asdict(config), sort_keys=True)


def config_from_json(text: str) -> ModelConfig:
    """The inverse of config_to_json. ValueError for unknown or ill-typed fields: a typo must not pass for a default."""
    values = json.loads(text)
    config = from_dict(ModelConfig, values)
    return config if "task" in values else replace(config, task=task_of_shapes(config.unet, config.vae))


def task_of_shapes(unet: UNetConfig, vae: VAEConfig) -> Task:
    """For files that do not say their task: those of unofficial shapes, and minisd's own of before configs had it."""
    if unet.vector_dim is not None:
        return "image-variation"
    further: dict[int, Task] = {5: "inpainting", 1: "depth-to-image", 4: "pix2pix", 3: "upscaling"}
    return further.get(unet.in_channels - vae.latent_channels, "text-to-image")
