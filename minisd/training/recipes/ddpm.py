"""Recipe: DDPM on pixels (Ho et al. 2020), the smallest lesson: no autoencoder, no words.

train_ddpm(load_pictures("flowers/", size=32), "out/", DDPMConfig())     # out/ddpm.safetensors, curves, samples
load_ddpm("out/ddpm.safetensors").sample(16, seed=0)                     # PIL images
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.checkpoints.files import CheckpointError, open_tensors, save_safetensors
from minisd.config import ScheduleConfig, UNetConfig
from minisd.diffusion.gaussian import Chain, from_network, per_image
from minisd.diffusion.prediction import clipped
from minisd.diffusion.samplers import Step, ddim, ddpm
from minisd.models.unet import Conditioning, UNet
from minisd.pipeline import build_schedule
from minisd.schema import from_dict
from minisd.tasks.images import grid, to_pil
from minisd.training.data import Augmentation, Pictures, augmented, load_pictures
from minisd.training.draws import Draws, generator
from minisd.training.improved_ddpm import hybrid_loss
from minisd.training.loop import train
from minisd.training.options import RUN, LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.recipes import TrainingRecipe
from minisd.training.weights import seeded

KEY = "minisd_ddpm"  # in the metadata: the config


@dataclass(frozen=True)
class DDPMConfig:
    """The network and how it learns.

    Attributes:
        size: image resolution (side in pixels); images are center-cropped and resized.
        unet: the network; without words its context is one empty token.
        schedule: the noise schedule: linear (1e-4 to 0.02, the paper's) or cosine.
        learned_variance: learn the variance, too, by the hybrid loss of Nichol & Dhariwal 2021.
        loop: the training loop.
        augmentation: data augmentation.
    """

    size: int = 32
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            in_channels=3,
            out_channels=3,
            channels=64,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_levels=(1,),
            num_heads=4,
            context_dim=16,
            norm_groups=16,
        )
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig("linear", start=1e-4, end=0.02))
    learned_variance: bool = False
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=20_000, lr=2e-4, ema=0.999))
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self):
        wanted = 6 if self.learned_variance else 3
        if (self.unet.in_channels, self.unet.out_channels) != (3, wanted):
            raise ValueError(
                f"the U-Net takes {self.unet.in_channels} channels and gives {self.unet.out_channels}: for RGB with "
                f"learned_variance={self.learned_variance} they are 3 and {wanted}"
            )
        if self.size % self.unet.factor:
            raise ValueError(f"size {self.size} does not divide by {self.unet.factor}, the U-Net's factor")


class DDPM:
    """A trained network with its chain: iterate over `steps`, or take the pictures of `sample`."""

    def __init__(self, unet: UNet, config: DDPMConfig):
        self.unet, self.config = unet, config
        self.schedule = build_schedule(config.schedule)

    def network(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """ε 'b 3 h w', with the interpolation of the variances behind it where they are learnt."""
        context = x_t.new_zeros(len(x_t), 1, self.config.unet.context_dim)  # a U-Net without words hears one silence
        return self.unet(x_t, t, Conditioning(context))

    @torch.no_grad()
    def steps(
        self, n: int = 1, *, seed: int = 0, steps: int | None = None, deterministic: bool = False
    ) -> Iterator[Step]:
        """Ancestral sampling of n pictures by all times of the schedule, or by `steps` of them evenly; or by DDIM."""
        device = self.unet.conv_in.weight.device
        times = list(reversed(range(self.schedule.num_timesteps))) if steps is None else self.schedule.timesteps(steps)
        chance = [generator("ddpm", seed + i) for i in range(n)]  # a seed is a picture, whatever the others are

        def noise(x: Tensor) -> Tensor:
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in chance]).to(x)

        x = noise(torch.empty(n, 3, self.config.size, self.config.size, device=device))
        variance = "learned_range" if self.config.learned_variance else None
        model = from_network(self.network, Chain(self.schedule, times), variance=variance)
        sampler = ddim if deterministic else ddpm
        yield from sampler(clipped(model, self.schedule), x, self.schedule, times, noise=noise)

    def sample(self, n: int = 1, **options) -> list[Image.Image]:
        """n pictures; options as those of `steps`."""
        *_, last = self.steps(n, **options)
        return to_pil(last.x)


class DDPMRecipe:
    """L_simple (Ho et al. 2020, eq. 14), or L_hybrid where variances are learnt."""

    name = "ddpm"

    def __init__(self, pictures: Pictures, config: DDPMConfig):
        self.pictures, self.config = pictures, config
        with seeded("ddpm", config.loop.seed):
            self.model = DDPM(UNet(config.unet), config)
        self.chain = Chain(self.model.schedule)
        self.networks = nn.ModuleDict({"unet": self.model.unet})

    def __len__(self) -> int:
        return len(self.pictures)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        x_0 = augmented(self.pictures, examples, draws, self.config.augmentation)
        t = draws.integers(len(self.chain)).cpu()
        noise = draws.normal(*x_0.shape[1:])
        if self.config.learned_variance:
            hybrid = hybrid_loss(self.model.network, x_0, t, self.chain, noise)
            return {"loss": hybrid.loss.mean(), "simple": hybrid.simple.mean()}
        x_t = self.chain.q_sample(x_0, t, noise)
        eps = self.model.network(x_t, t.to(x_t.device)).float()
        return {"loss": per_image((eps - noise) ** 2).mean()}

    def sheet(self, step: int) -> Image.Image:
        return grid(self.model.sample(16, steps=min(25, len(self.chain)), deterministic=True))


def train_ddpm(
    pictures: Pictures,
    folder: str | os.PathLike,
    config: DDPMConfig = DDPMConfig(),
    run: TrainingRun = RUN,
    group: Processes = ALONE,
) -> DDPM:
    """The trained model, averaged; also in folder/ddpm.safetensors, with its config in the metadata."""
    if pictures.size != config.size:
        raise ValueError(f"the pictures have {pictures.size} px, the config {config.size}: make them equal")
    if len(pictures) < config.loop.batch_size:
        warnings.warn(
            f"{len(pictures)} pictures for batches of {config.loop.batch_size}: the model will learn them by heart",
            stacklevel=2,
        )
    recipe = DDPMRecipe(pictures, config)
    train(recipe, config.loop, folder, run, group, {"recipe": asdict(config), "data": pictures.digest})
    recipe.model.unet.requires_grad_(False)
    if group.is_first:
        text = json.dumps(asdict(config), sort_keys=True)
        save_safetensors(Path(folder) / "ddpm.safetensors", recipe.model.unet.state_dict(), {KEY: text})
    return recipe.model


def load_ddpm(path: str | os.PathLike, *, device: str | torch.device = "cpu") -> DDPM:
    """A model that train_ddpm saved."""
    file = open_tensors(path)
    if KEY not in file.metadata:
        raise CheckpointError(f"{path}: no pixel-space DDPM of minisd's; whole models are loaded by minisd.load")
    config = from_dict(DDPMConfig, json.loads(file.metadata[KEY]))
    unet = UNet(config.unet)
    unet.load_state_dict({name: file.read(name) for name in file})
    return DDPM(unet.to(device).eval().requires_grad_(False), config)


RECIPE = TrainingRecipe(
    config=lambda device: DDPMConfig(),
    train=train_ddpm,
    load=lambda folder, config: load_pictures(folder, size=config.size),
    writes="ddpm.safetensors",
)
