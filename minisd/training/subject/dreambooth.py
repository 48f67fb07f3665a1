"""DreamBooth: all weights learn the subject, beside what they know of its class (Ruiz et al. 2023).

photos = load_photos("my-dog/", sd.config.image_size)
sd = train_dreambooth(sd, photos, "out/", DreamBoothConfig(SubjectConfig("sks", "dog")))    # out/model.safetensors
sd.txt2img("a sks dog in the snow")
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from minisd.checkpoints.save import save_checkpoint
from minisd.stable_diffusion import StableDiffusion
from minisd.training.options import RUN, LoopConfig, Run
from minisd.training.parallel import ALONE, Processes
from minisd.training.subject.photos import Photos
from minisd.training.subject.prior import PriorConfig, drawn_class
from minisd.training.subject.recipe import Scores, SubjectConfig, SubjectRecipe, learn, with_networks
from minisd.training.weights import copied


@dataclass(frozen=True)
class DreamBoothConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion; small.py has others.

    Each weight that learns takes 16 bytes: itself, its gradient and two moments in float32. With precision bfloat16
    these are the master copies; autocast rounds them where they are multiplied.

    Attributes:
        subject: the subject in words.
        prior: prior preservation.
        loop: the training loop. Without prior preservation fewer steps, 400 or so, are enough.
        text_encoder: whether it learns, too: closer to the subject, and farther from other prompts.
        dtype: of the weights in the file.
    """

    subject: SubjectConfig
    prior: PriorConfig = field(default_factory=PriorConfig)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=800, batch_size=1, lr=2e-6, warmup=0, weight_decay=0.01, ema=None)
    )
    text_encoder: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


def train_dreambooth(
    sd: StableDiffusion,
    photos: Photos,
    folder: str | os.PathLike,
    config: DreamBoothConfig,
    run: Run = RUN,
    group: Processes = ALONE,
    *,
    class_photos: Photos | None = None,
    class_folder: str | os.PathLike | None = None,
    scores: Scores | None = None,
) -> StableDiffusion:
    """A model of its own that knows the subject, in float32; sd stays as it is. Saved as folder/model.safetensors.

    class_photos: real ones for the prior; left out, sd draws them into class_folder (folder/class), where other runs
    with the same model and class find them again. scores: judges the validation pictures on the way.
    """
    folder = Path(folder)
    if class_photos is None:
        place = Path(class_folder or folder / "class")
        class_photos = drawn_class(sd, place, config.subject.class_word, config.prior, group, quiet=run.quiet)
    recipe = dreambooth_recipe(sd, photos, folder, config, class_photos=class_photos, scores=scores)
    learn(recipe, config, sd, photos, run, group)
    learner = recipe.sd if config.text_encoder else with_networks(recipe.sd, text=sd.text_encoder)
    if group.is_first:
        dtype = getattr(torch, config.dtype)
        kept = {name: copied(network, learn=False).to(dtype) for name, network in learner.checkpoint.networks.items()}
        save_checkpoint(replace(learner.checkpoint, networks=kept), folder / "model.safetensors")
    return learner


def dreambooth_recipe(
    sd: StableDiffusion,
    photos: Photos,
    folder: Path,
    config: DreamBoothConfig,
    *,
    class_photos: Photos | None = None,
    scores: Scores | None = None,
) -> SubjectRecipe:
    """The U-Net as a copy that learns, with the text encoder or beside it."""
    unet = copied(sd.unet, learn=True)
    # frozen, it is asked once: in float32 it had better be shared
    half = config.loop.precision == "bfloat16" and sd.dtype != torch.float32
    text = copied(sd.text_encoder, learn=config.text_encoder, half=half)
    return SubjectRecipe(
        "dreambooth",
        with_networks(sd, unet=unet, text=text),
        config.subject,
        photos,
        folder,
        phrase=config.subject.phrase,
        precision=config.loop.precision,
        class_photos=class_photos,
        prior_weight=config.prior.weight,
        scores=scores,
    )
