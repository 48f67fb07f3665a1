"""CLIP's vision tower (Radford et al. 2021): images in the space that they share with prompts."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from minisd.config import CLIPVisionConfig
from minisd.models.clip import Block


class CLIPVision(nn.Module):
    """A vision transformer over patches and one class token."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, config.width)
        self.pre_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.post_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.projection = (
            None if config.projection_dim is None else nn.Linear(config.width, config.projection_dim, bias=False)
        )
        nn.init.normal_(self.class_embedding, std=config.width**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, image: Tensor) -> Tensor:
        """Pictures in the shared image-text space, 'b e', from images made by `normalize`: 'b 3 s s', s=image_size."""
        x = self.post_norm(self.states(image)[:, 0])
        return x if self.projection is None else self.projection(x)

    def states(self, image: Tensor) -> Tensor:
        """The states 'b (1 + patches) d' after the last block, the class token first."""
        side = self.config.image_size
        if image.shape[-2:] != (side, side):
            raise ValueError(f"this vision tower takes {side}×{side} pixels, got {tuple(image.shape[-2:])}")
        patches = rearrange(self.patch_embedding(image), "b c h w -> b (h w) c")
        class_token = self.class_embedding.expand(image.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding.weight
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return x


# mean and standard deviation of CLIP's training pictures, RGB
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(image: Tensor) -> Tensor:
    """Images 'b 3 h w' in [-1, 1] → CLIP's input: shifted and scaled by the mean and deviation of its training set."""
    mean, std = (
        torch.tensor(x, device=image.device, dtype=image.dtype)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD)
    )
    return ((image + 1) / 2 - mean) / std
