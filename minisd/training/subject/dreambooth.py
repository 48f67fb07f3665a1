"""DreamBooth: all weights learn the subject, beside what they know of its class (Ruiz et al. 2023).

photos = load_photos("my-dog/", sd.config.image_size)
sd = train_dreambooth(sd, photos, "out/", DreamBoothConfig(SubjectConfig("sks", "dog")))    # out/model.safetensors
sd.txt2img("a sks dog in the snow")
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minisd.checkpoints.save import save_checkpoint
from minisd.stable_diffusion import StableDiffusion
from minisd.training.options import LoopConfig
from minisd.training.subject.config import SubjectConfig
from minisd.training.subject.method import Method
from minisd.training.subject.prior import PriorConfig
from minisd.training.subject.recipe import SubjectRecipe, with_networks
from minisd.training.subject.small import small_preset
from minisd.training.weights import copied


@dataclass(frozen=True)
class DreamBoothConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion.

    Each weight that learns takes 16 bytes: itself, its gradient and two moments in float32. With precision bfloat16
    these are the master copies; autocast rounds them where they are multiplied.

    Attributes:
        subject: the subject in words.
        prior: prior preservation.
        loop: the training loop. Without prior preservation fewer steps, 400 or so, are enough.
        text_encoder: train the text encoder, too: closer to the subject, and farther from other prompts.
        dtype: of the saved weights.
    """

    subject: SubjectConfig
    prior: PriorConfig = field(default_factory=PriorConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=800, batch_size=1, lr=2e-6, warmup=0, weight_decay=0.01, ema=None)
    )
    text_encoder: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def for_small_model(self) -> DreamBoothConfig:
        return small_preset(self, steps=400, lr=2e-4)


def learner(sd: StableDiffusion, config: DreamBoothConfig) -> StableDiffusion:
    """The U-Net as a copy that learns, with the text encoder or beside it."""
    unet = copied(sd.unet, learn=True)
    # frozen, it is asked once: in float32 it had better be shared
    half = config.loop.precision == "bfloat16" and sd.dtype != torch.float32
    text = copied(sd.text_encoder, learn=config.text_encoder, half=half)
    return with_networks(sd, unet=unet, text=text)


def result(recipe: SubjectRecipe, sd: StableDiffusion, config: DreamBoothConfig) -> StableDiffusion:
    """A model of its own that knows the subject, in float32."""
    return recipe.sd if config.text_encoder else with_networks(recipe.sd, text=sd.text_encoder)


def save(learnt: StableDiffusion, sd: StableDiffusion, folder: Path, config: DreamBoothConfig) -> None:
    dtype = getattr(torch, config.dtype)
    kept = {name: copied(network, learn=False).to(dtype) for name, network in learnt.networks.items()}
    save_checkpoint(replace(learnt.checkpoint, networks=kept), folder / "model.safetensors")


METHOD = Method(
    name="dreambooth",
    config=DreamBoothConfig,
    learner=learner,
    result=result,
    save=save,
    apply=lambda sd, learnt, folder, config: learnt,
    writes="the whole model, model.safetensors",
)
train_dreambooth = METHOD.train
