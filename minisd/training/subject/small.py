"""What teaching a subject to a small model takes, such as the mini model: steps, rates, layers, class pictures.

Those of `minisd eval subjects`, chosen on two subjects for the mini model's 11 million weights. There LoRA on all
layers came nearer to the subject than on attention alone, and DreamBooth at 2e-4 nearer than at half of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.options import LoopConfig
from minisd.training.subject.dreambooth import DreamBoothConfig
from minisd.training.subject.lora import LoRAConfig
from minisd.training.subject.textual_inversion import TextualInversionConfig

SMALL = 50_000_000  # weights of a U-Net
LAYERS = ("*.attn?.to_*", "*.ff.*", "*.attn.proj_*", "*.conv*")

Config = TypeVar("Config", DreamBoothConfig, LoRAConfig, TextualInversionConfig)


def is_small(sd: StableDiffusion) -> bool:
    return sum(weight.numel() for weight in sd.unet.parameters()) < SMALL


def for_small_model(config: Config) -> Config:
    """The same subject, method, seed and precision, by steps, rates, layers and class pictures for a small model."""
    validation = replace(config.subject.validation, guidance_scale=5.0)
    config = replace(config, subject=replace(config.subject, validation=validation))

    def loop(steps: int, lr: float) -> LoopConfig:
        return replace(config.loop, steps=steps, batch_size=4, lr=lr, warmup=20, weight_decay=0.0)

    if isinstance(config, TextualInversionConfig):
        return replace(config, loop=loop(600, 5e-3), vectors=4)
    prior = replace(config.prior, count=64, settings=Txt2Img(steps=25, guidance_scale=5.0, batch_size=8))
    if isinstance(config, LoRAConfig):
        return replace(config, prior=prior, loop=loop(500, 1e-3), rank=16, unet=LAYERS)
    return replace(config, prior=prior, loop=loop(400, 2e-4))
