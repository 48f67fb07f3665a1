"""LoRA: low-rank additions to some layers learn the subject (Hu et al. 2021); with class pictures, DreamBooth's way.

photos = load_photos("my-dog/", sd.config.image_size)
train_lora(sd, photos, "out/", LoRAConfig(SubjectConfig("sks", "dog")))     # out/lora.safetensors, out/lora-peft.…
sd.load_lora("out/lora.safetensors")
sd.txt2img("a sks dog in the snow")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.adapters.lora import Lora, LowRank, save_lora
from minisd.nn.transformer import PointwiseConv
from minisd.stable_diffusion import StableDiffusion
from minisd.training.options import LoopConfig
from minisd.training.subject.config import SubjectConfig
from minisd.training.subject.method import Method
from minisd.training.subject.prior import PriorConfig
from minisd.training.subject.recipe import SubjectRecipe, frozen_copy, with_networks
from minisd.training.subject.small import small_preset
from minisd.training.weights import copied, seeded

ALL_LAYERS = ("*.attn?.to_*", "*.ff.*", "*.attn.proj_*", "*.conv*")  # nearer to the subject than attention alone


@dataclass(frozen=True)
class LoRAConfig:
    """What is learnt, and how. The defaults are for Stable Diffusion.

    Attributes:
        subject: the subject in words.
        prior: prior preservation.
        loop: the training loop.
        rank: LoRA rank (network dim); a higher one learns more detail and makes a larger file.
        alpha: LoRA alpha: the update is scaled by alpha/rank; null takes the rank.
        unet: target modules in the U-Net: patterns of the names of its linear layers and convolutions. Others of use:
            *.ff.* (feed-forward), *.attn.proj_* (round the transformers), *.conv* (convolutions).
        text: target modules in the text encoder, such as *.attn.to_*; none when empty.
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

    def for_small_model(self) -> LoRAConfig:
        return small_preset(self, steps=500, lr=1e-3, rank=16, unet=ALL_LAYERS)


class LoRALayer(nn.Module):
    """layer(x) + alpha/rank · up(down(x)), for a linear layer or a convolution; only down and up learn.

    up starts at zero, so that training begins at the layer itself; down as PyTorch starts a layer of its shape.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.layer, self.alpha, self.scale = layer, alpha, alpha / rank
        if isinstance(layer, nn.Conv2d) and not isinstance(layer, PointwiseConv):
            geometry = {"stride": layer.stride, "padding": layer.padding}
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **geometry)
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


def learner(sd: StableDiffusion, config: LoRAConfig) -> StableDiffusion:
    """Frozen networks, with layers in them that learn."""
    half = config.loop.precision == "bfloat16"
    networks = {  # a text encoder that does not learn is asked once: in float32 it had better be shared
        "unet": copied(sd.unet, learn=False, half=half),
        "text": copied(sd.text_encoder, learn=False, half=half and (bool(config.text) or sd.dtype != torch.float32)),
    }
    alpha = float(config.rank if config.alpha is None else config.alpha)
    with seeded("lora", config.loop.seed):
        for name, patterns in (("unet", config.unet), ("text", config.text)):
            add_layers(networks[name], patterns, config.rank, alpha)
    return with_networks(sd, **networks)


def layers_of(recipe: SubjectRecipe) -> dict[str, LoRALayer]:
    """The layers that learn, by "unet" or "text" and their names."""
    return {path: layer for path, layer in recipe.networks.named_modules() if isinstance(layer, LoRALayer)}


def result(recipe: SubjectRecipe, sd: StableDiffusion, config: LoRAConfig) -> Lora:
    """The additions by layer."""
    return {path: layer.low_rank() for path, layer in layers_of(recipe).items()}


def save(lora: Lora, sd: StableDiffusion, folder: Path, config: LoRAConfig) -> None:
    networks = {"unet": sd.unet, "text": sd.text_encoder}
    save_lora(folder / "lora.safetensors", lora, networks, layout="kohya")
    save_lora(folder / "lora-peft.safetensors", lora, networks, layout="peft")


def apply(sd: StableDiffusion, lora: Lora, folder: Path, config: LoRAConfig) -> StableDiffusion:
    model = frozen_copy(sd)
    model.load_lora(folder / "lora.safetensors")
    return model


def add_layers(network: nn.Module, patterns: Sequence[str], rank: int, alpha: float) -> dict[str, LoRALayer]:
    """Put a LoRALayer round every linear layer and convolution whose name fits a pattern; they are returned by name.

    ValueError for a pattern that fits none: what it means to train would not be.
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    chosen = {}
    for pattern in patterns:
        fitting = {name: layer for name, layer in layers.items() if fnmatchcase(name, pattern)}
        if not fitting:
            kinds = sorted({name.rpartition(".")[2] for name in layers if not name.rpartition(".")[2].isdigit()})
            raise ValueError(
                f"the pattern {pattern!r} fits no layer of the {type(network).__name__}; its layers are called such as "
                f"{next(iter(layers))} and end in {', '.join(kinds)}"
            )
        chosen |= fitting
    added = {name: LoRALayer(layer, rank, alpha) for name, layer in chosen.items()}
    for name, layer in added.items():
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer)
    return added


METHOD = Method(
    name="lora",
    config=LoRAConfig,
    learner=learner,
    result=result,
    save=save,
    apply=apply,
    writes="lora.safetensors (kohya's layout) and lora-peft.safetensors (peft's, diffusers')",
)
train_lora = METHOD.train
