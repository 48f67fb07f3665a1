"""Tiny recipes that train in a second; and, run as a script, trainings that are killed or shared by processes.

python training_tiny.py killed FOLDER 3 rename 7 ...   each attempt dies by SIGKILL in that step, or at its first rename
torchrun … training_tiny.py train FOLDER ddpm clip …   each recipe into a folder of its name
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minisd.checkpoints.files import save_safetensors
from minisd.config import CLIPTextConfig, CLIPVisionConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from minisd.training.data import Augmentation, Pictures
from minisd.training.optimizers import Muon
from minisd.training.options import LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, processes
from minisd.training.recipes.clip import CLIPRecipeConfig, train_clip
from minisd.training.recipes.ddpm import DDPMConfig, DDPMRecipe, train_ddpm
from minisd.training.recipes.latent_diffusion import LatentDiffusionConfig, train_latent_diffusion
from minisd.training.recipes.mini import MiniConfig
from minisd.training.recipes.vae import VAERecipeConfig, train_vae

RUN = TrainingRun(save_every=3, log_every=2, sample_every=0, quiet=True)
LOOP = LoopConfig(steps=10, batch_size=8, lr=1e-3, warmup=4, decay="cosine", weight_decay=0.01, ema=0.9)
UNET = UNetConfig(
    channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    num_heads=2,
    context_dim=16,
    norm_groups=8,
)
MODEL = ModelConfig(
    name="tiny",
    unet=UNET,
    vae=VAEConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
    text=CLIPTextConfig(width=16, layers=1, heads=2, mlp_width=32, projection_dim=8),
    vision=CLIPVisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2, mlp_width=32, projection_dim=8),
    schedule=ScheduleConfig(num_timesteps=100),
    prediction="v",
    image_size=16,
)
DDPM = DDPMConfig(size=16, unet=replace(UNET, in_channels=3, out_channels=3), loop=LOOP)
DDPM = replace(DDPM, schedule=ScheduleConfig("linear", 100, 1e-3, 0.2), augmentation=Augmentation(flip=True, shift=0.1))
MINI = MiniConfig(
    vae=VAERecipeConfig(vae=MODEL.vae, loop=LOOP, augmentation=Augmentation(background=0.5, zoom=0.2)),
    clip=CLIPRecipeConfig(text=MODEL.text, vision=MODEL.vision, loop=LOOP),
    unet=LatentDiffusionConfig(model=MODEL, loop=LOOP, prompts=("a disc",), min_snr=5.0),
)


def pictures(n: int = 11, size: int = 16) -> Pictures:
    """Discs of several colours and radii on transparent ground, with captions that say so."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    names = list(COLOURS)
    drawn = np.zeros((n, size, size, 4), np.uint8)
    for i in range(n):
        drawn[i, ..., :3] = COLOURS[names[i % 4]]
        drawn[i, ..., 3] = 255 * (np.hypot(x, y) < 2 + i % 5)
    captions = tuple((f"a {names[i % 4]} disc", f"{names[i % 4]} disc, size {i % 5}")[: 1 + i % 2] for i in range(n))
    return Pictures(drawn, captions, tuple(f"disc {i}" for i in range(n)), f"discs {n} {size}")


COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}


def train_recipe(name: str, folder: Path, *, gradient_accumulation: int = 1, precision: str = "float32", group=ALONE):
    """Train a tiny recipe by name and return what it gives."""
    loop = replace(LOOP, gradient_accumulation=gradient_accumulation, precision=precision)
    if name == "ddpm":
        return train_ddpm(pictures(), folder, replace(DDPM, loop=loop), RUN, group)
    if name == "muon":
        return train_ddpm(pictures(), folder, replace(DDPM, loop=replace(loop, muon=0.02)), RUN, group)
    if name == "muon-steps":
        return muon_steps(folder, group)
    if name == "vae":
        return train_vae(pictures(), folder, replace(MINI.vae, loop=loop), RUN, group)
    if name == "clip":
        return train_clip(pictures(), folder, replace(MINI.clip, loop=loop), RUN, group)
    vae, text = frozen_networks()
    config = replace(MINI.unet, loop=loop, model=replace(MODEL, vae=vae.config, text=text.config))
    return train_latent_diffusion(pictures(), vae, text, folder, config, RUN, group)


def muon_steps(folder: Path, group) -> None:
    """The weights that three steps in bfloat16 with given gradients lead to, as a state of theirs."""
    draws = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 4, 3, 3), (16, 8, 1, 1), (5, 40)]
    weights = {str(i): torch.nn.Parameter(torch.randn(shape, generator=draws)) for i, shape in enumerate(shapes)}
    optimizer = Muon(weights.values(), lr=0.02, weight_decay=0.1, half=True, processes=group)
    for _ in range(3):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=draws)
        optimizer.step()
    if group.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        save_safetensors(folder / "state.safetensors", {name: w.detach() for name, w in weights.items()}, {})


def frozen_networks():
    from tiny import random_network

    return random_network("vae", MODEL.vae), random_network("text", MODEL.text)


def killed(folder: Path, moments: list[str]) -> None:
    """One attempt for each moment, in a process of its own, and one that may finish."""
    for moment in [*moments, None]:
        if (child := os.fork()) == 0:
            _arm(moment)
            train_recipe("ddpm", folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        expected = 0 if moment is None else signal.SIGKILL
        if status != expected:
            sys.exit(f"the attempt that was to end at {moment} ended with {status}")


def _arm(moment: str | None) -> None:
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "rename":
        os.replace = lambda source, target: die() if "state" in str(target) else os.rename(source, target)
    elif moment is not None:
        loss = DDPMRecipe.loss
        DDPMRecipe.loss = lambda self, e, draws: die() if draws.step == int(moment) else loss(self, e, draws)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, folder, *rest = sys.argv[1:]
    if command == "killed":
        killed(Path(folder), rest)
    else:
        with processes() as group:
            for recipe in rest:
                train_recipe(recipe, Path(folder) / recipe, group=group)
