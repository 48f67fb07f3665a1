"""Presets for small models, such as the mini model: those of `minisd eval subjects`, chosen on two of its subjects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img

SMALL = 50_000_000  # weights of a U-Net
GUIDANCE_SCALE = 5.0

Config = TypeVar("Config")


def is_small(sd: StableDiffusion) -> bool:
    return sum(weight.numel() for weight in sd.unet.parameters()) < SMALL


def small_preset(config: Config, *, steps: int, lr: float, **more: Any) -> Config:
    """The same subject, seed and precision; steps, rates and class images for a small model, and the fields in more."""
    validation = replace(config.subject.validation, guidance_scale=GUIDANCE_SCALE)
    subject = replace(config.subject, validation=validation)
    loop = replace(config.loop, steps=steps, batch_size=4, lr=lr, warmup=20, weight_decay=0.0)
    if hasattr(config, "prior"):
        settings = Txt2Img(steps=25, guidance_scale=GUIDANCE_SCALE, batch_size=8)
        more = {"prior": replace(config.prior, count=64, settings=settings), **more}
    return replace(config, subject=subject, loop=loop, **more)
