"""A tiny model that learns a subject in a second; run as a script, trainings that are killed.

python subject_tiny.py FOLDER 3 rename 7    each attempt, of each method, dies by SIGKILL in that step or at a rename
"""

import os
import signal
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny import checkpoint
from training_tiny import MODEL

from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.options import LoopConfig, TrainingRun
from minisd.training.subject.config import SubjectConfig, Validation
from minisd.training.subject.dreambooth import DreamBoothConfig, train_dreambooth
from minisd.training.subject.lora import LoRAConfig, train_lora
from minisd.training.subject.photos import Photos
from minisd.training.subject.prior import PriorConfig
from minisd.training.subject.recipe import SubjectRecipe
from minisd.training.subject.textual_inversion import TextualInversionConfig, train_textual_inversion

RUN = TrainingRun(save_every=2, log_every=1, sample_every=3, quiet=True)
LOOP = LoopConfig(steps=5, batch_size=2, lr=1e-3, warmup=0, ema=None)
VALIDATION = Validation(prompts=("a {}",), seeds=2, steps=1, guidance_scale=1.0)
SUBJECT = SubjectConfig("sks", "dog", validation=VALIDATION)
PRIOR = PriorConfig(count=3, settings=Txt2Img(steps=1, guidance_scale=1.0, batch_size=2))
CONFIGS = {
    "dreambooth": DreamBoothConfig(SUBJECT, PRIOR, LOOP),
    "lora": LoRAConfig(SUBJECT, PRIOR, LOOP, rank=2, alpha=4.0, unet=("*.attn?.to_*", "*.conv1"), text=("*.to_q",)),
    "textual inversion": TextualInversionConfig(replace(SUBJECT, token="<my-dog>"), LOOP, vectors=2),
}
TRAIN = {"dreambooth": train_dreambooth, "lora": train_lora, "textual inversion": train_textual_inversion}


def model(prediction="v", dtype=torch.float32) -> StableDiffusion:
    """A model of its own, of random weights."""
    made = checkpoint(replace(MODEL, prediction=prediction, vision=None))
    networks = {name: deepcopy(network).to(dtype) for name, network in made.networks.items()}
    return StableDiffusion.of(replace(made, networks=networks))


def photos(n: int = 3, views: int = 2, size: int = 16, masks: bool = False, seed: int = 0) -> Photos:
    """Noise: nobody looks at it."""
    drawn = np.random.default_rng(seed).integers(0, 256, (n, views, size, size, 3), dtype=np.uint8)
    mask = np.zeros((n, views, size, size), bool)
    mask[..., size // 2 :] = True
    names = tuple(f"{i}.png" for i in range(n))
    return Photos(drawn, mask if masks else None, ((),) * n, names, f"noise {n} {views} {size} {masks} {seed}")


def train(method: str, folder: Path, sd: StableDiffusion | None = None, *, config=None, run=RUN, **options):
    """Train by a method's name."""
    if method != "textual inversion":
        options = {"class_photos": photos(2, 1, seed=1), **options}
    given = options.pop("photos", None) or photos()
    return TRAIN[method](sd or model(), given, folder, config or CONFIGS[method], run, **options)


def killed(folder: Path, method: str, moments: list[str]) -> None:
    """One attempt for each moment, in a process of its own, and one that may finish."""
    for moment in [*moments, None]:
        if (child := os.fork()) == 0:
            _arm(moment)
            train(method, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != (0 if moment is None else signal.SIGKILL):
            sys.exit(f"the attempt of {method} that was to end at {moment} ended with {status}")


def _arm(moment: str | None) -> None:
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "rename":
        os.replace = lambda source, target: die() if "state" in str(target) else os.rename(source, target)
    elif moment is not None:
        loss = SubjectRecipe.loss
        SubjectRecipe.loss = lambda self, e, draws: die() if draws.step == int(moment) else loss(self, e, draws)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *rest = sys.argv[1:]
    for name in CONFIGS:
        killed(Path(place) / name, name, rest)
