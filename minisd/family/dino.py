"""DINO's vision transformer (Caron et al. 2021), whose class token tells one subject from another of its class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from minisd.models.clip import Block

# mean and standard deviation of ImageNet's pictures, RGB
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DINOConfig:
    """The defaults are those of ViT-S/16 (dino_deitsmall16_pretrain.pth), with which DreamBooth's authors measure."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 384
    layers: int = 12
    heads: int = 6
    mlp_width: int = 1536
    activation: Literal["gelu"] = "gelu"
    norm_eps: float = 1e-6


class DINO(nn.Module):
    """Called on images made by `normalize`, 'b 3 s s' with s = image_size, it gives the class token's state, 'b d'."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1 + patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        nn.init.trunc_normal_(self.class_embedding, std=0.02)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        side = self.config.image_size
        if image.shape[-2:] != (side, side):
            raise ValueError(f"this DINO takes {side}×{side} pixels, got {tuple(image.shape[-2:])}")
        patches = rearrange(self.patch_embedding(image), "b c h w -> b (h w) c")
        class_token = self.class_embedding.expand(image.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


def normalize(image: Tensor) -> Tensor:
    """Images 'b 3 h w' in [-1, 1] → DINO's input: shifted and scaled by the mean and deviation of ImageNet."""
    mean, std = (
        torch.tensor(x, device=image.device, dtype=image.dtype)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD)
    )
    return ((image + 1) / 2 - mean) / std


def from_official(tensors: Mapping[str, Tensor]) -> DINO:
    """The network that a state dict of the official names holds; the config is read off the shapes.

    Every official ViT has heads of 64 channels. ValueError where a tensor is missing, too many, or of another shape.
    """
    try:
        width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
        config = DINOConfig(
            image_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch,
            patch_size=patch,
            width=width,
            layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            heads=max(width // 64, 1),
            mlp_width=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"these are no weights of a DINO ViT: {error} is missing") from None
    with torch.device("meta"):
        network = DINO(config)
    state = dict(own_names(tensors))
    shapes, theirs = ({n: tuple(x.shape) for n, x in some.items()} for some in (network.state_dict(), state))
    if wrong := sorted(shapes.items() ^ theirs.items()):
        raise ValueError(f"these are no weights of a DINO ViT: {wrong[0][0]} is missing, too many, or of another shape")
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def own_names(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) for those of an official state dict; its packed queries, keys and values apart."""
    for name, tensor in tensors.items():
        if name == "cls_token":
            yield "class_embedding", tensor.flatten()
        elif name == "pos_embed":
            yield "position_embedding", tensor.flatten(0, -2)
        elif ".attn.qkv." in name:
            for part, own in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".qkv.", f".to_{part}."), own.contiguous()
        else:
            for official, own in (
                ("patch_embed.proj", "patch_embedding"),
                (".attn.proj", ".attn.to_out"),
                (".mlp", ""),
            ):
                name = name.replace(official, own)
            yield name, tensor
