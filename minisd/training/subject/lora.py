"""LoRA: low-rank additions to some layers learn the subject (Hu et al. 2021); with class pictures, DreamBooth's way.

photos = load_photos("my-dog/", sd.config.image_size)
train_lora(sd, photos, "out/", LoRAConfig(SubjectConfig("sks", "dog")))     # out/lora.safetensors, out/lora-peft.…
sd.load_lora("out/lora.safetensors")
sd.txt2img("a sks dog in the snow")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.adapters.lora import Lora, LowRank, save_lora
from minisd.nn.transformer import PointwiseConv
from minisd.stable_diffusion import StableDiffusion
from minisd.training.options import RUN, LoopConfig, Run
from minisd.training.parallel import ALONE, Processes
from minisd.training.subject.photos import Photos
from minisd.training.subject.prior import PriorConfig, drawn_class
from minisd.training.subject.recipe import Scores, SubjectConfig, SubjectRecipe, learn, with_networks
from minisd.training.weights import copied, seeded


@dataclass(frozen=True)
class LoRAConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion; small.py has others.

    Attributes:
        subject: the subject in words.
        prior: prior preservation.
        loop: the training loop.
        rank: of the additions; more hold more detail.
        alpha: they are scaled by alpha/rank; the rank itself when null.
        unet: patterns of the layers that get one: names of its linear layers and convolutions, * for any part. Others
            of use: *.ff.* (feed-forward), *.attn.proj_* (round the transformers), *.conv* (convolutions).
        text: likewise of the text encoder, such as *.attn.to_*; none when empty.
    """

    subject: SubjectConfig
    prior: PriorConfig = field(default_factory=PriorConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=800, batch_size=1, lr=1e-4, warmup=0, ema=None))
    rank: int = 8
    alpha: float | None = None
    unet: tuple[str, ...] = ("*.attn?.to_*",)
    text: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rank < 1 or (self.alpha is not None and not self.alpha > 0):
            raise ValueError(f"rank={self.rank}, alpha={self.alpha}: both are above 0")
        if not self.unet and not self.text:
            raise ValueError("no layers are named to learn: give patterns for the U-Net, the text encoder, or both")


class LoRALayer(nn.Module):
    """layer(x) + alpha/rank · up(down(x)), for a linear layer or a convolution; only down and up learn.

    up starts at zero, so that training begins at the layer itself; down as PyTorch starts a layer of its shape.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.layer, self.alpha, self.scale = layer, alpha, alpha / rank
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, PointwiseConv):
            place = {"stride": layer.stride, "padding": layer.padding}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **place)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            out, inside = layer.weight.shape[:2]
            self.down, self.up = nn.Linear(inside, rank, bias=False), nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(layer.weight.device, torch.promote_types(layer.weight.dtype, torch.float32))

    @property
    def weight(self) -> Tensor:
        """The layer's own, which tells a network's device and dtype."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * self.up(self.down(x))

    def low_rank(self) -> LowRank:
        """The addition as a file holds it: matrices, or kernels for a convolution."""
        down, up = self.down.weight.detach().cpu(), self.up.weight.detach().cpu()
        if isinstance(self.layer, PointwiseConv):
            down, up = down[:, :, None, None], up[:, :, None, None]
        return LowRank(down, up, self.alpha)


def train_lora(
    sd: StableDiffusion,
    photos: Photos,
    folder: str | os.PathLike,
    config: LoRAConfig,
    run: Run = RUN,
    group: Processes = ALONE,
    *,
    class_photos: Photos | None = None,
    class_folder: str | os.PathLike | None = None,
    scores: Scores | None = None,
) -> Lora:
    """The additions by layer; sd stays as it is. Saved as folder/lora.safetensors (kohya's layout) and lora-peft.….

    class_photos, class_folder, scores: as for `train_dreambooth`.
    """
    folder = Path(folder)
    if class_photos is None:
        place = Path(class_folder or folder / "class")
        class_photos = drawn_class(sd, place, config.subject.class_word, config.prior, group, quiet=run.quiet)
    recipe, layers = lora_recipe(sd, photos, folder, config, class_photos=class_photos, scores=scores)
    learn(recipe, config, sd, photos, run, group)
    lora = {path: layer.low_rank() for path, layer in layers.items()}
    if group.is_first:
        own = {"unet": sd.unet, "text": sd.text_encoder}
        save_lora(folder / "lora.safetensors", lora, own, layout="kohya")
        save_lora(folder / "lora-peft.safetensors", lora, own, layout="peft")
    return lora


def lora_recipe(
    sd: StableDiffusion,
    photos: Photos,
    folder: Path,
    config: LoRAConfig,
    *,
    class_photos: Photos | None = None,
    scores: Scores | None = None,
) -> tuple[SubjectRecipe, dict[str, LoRALayer]]:
    """Frozen networks, and the layers in them that learn, by "unet" or "text" and their names."""
    half = config.loop.precision == "bfloat16"
    networks = {  # a text encoder that does not learn is asked once: in float32 it had better be shared
        "unet": copied(sd.unet, learn=False, half=half),
        "text": copied(sd.text_encoder, learn=False, half=half and (bool(config.text) or sd.dtype != torch.float32)),
    }
    alpha = float(config.rank if config.alpha is None else config.alpha)
    with seeded("lora", config.loop.seed):
        layers = {
            f"{name}.{path}": layer
            for name, patterns in (("unet", config.unet), ("text", config.text))
            for path, layer in add_layers(networks[name], patterns, config.rank, alpha).items()
        }
    recipe = SubjectRecipe(
        "lora",
        with_networks(sd, **networks),
        config.subject,
        photos,
        folder,
        phrase=config.subject.phrase,
        precision=config.loop.precision,
        class_photos=class_photos,
        prior_weight=config.prior.weight,
        scores=scores,
    )
    return recipe, layers


def add_layers(network: nn.Module, patterns: Sequence[str], rank: int, alpha: float) -> dict[str, LoRALayer]:
    """Put a LoRALayer round every linear layer and convolution whose name fits a pattern; they are returned by name.

    ValueError for a pattern that fits none: what it means to train would not be.
    """
    found = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen = {}
    for pattern in patterns:
        fitting = {name: layer for name, layer in found.items() if fnmatchcase(name, pattern)}
        if not fitting:
            kinds = sorted({name.rpartition(".")[2] for name in found if not name.rpartition(".")[2].isdigit()})
            raise ValueError(
                f"the pattern {pattern!r} fits no layer of the {type(network).__name__}; its layers are called such as "
                f"{next(iter(found))} and end in {', '.join(kinds)}"
            )
        chosen |= fitting
    layers = {name: LoRALayer(layer, rank, alpha) for name, layer in chosen.items()}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer)
    return layers
