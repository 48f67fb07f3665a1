"""CLIP (Radford et al. 2021): the text tower that prompts go through, and the vision tower that judges pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisd.config import CLIPTextConfig, CLIPVisionConfig
from minisd.nn.attention import Attention


class CLIPText(nn.Module):
    """A causal transformer over token ids. Called, it gives the context that the U-Net wants."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.projection = (
            None if config.projection_dim is None else nn.Linear(config.width, config.projection_dim, bias=False)
        )
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.01)

    def forward(self, ids: Tensor, *, skip: int | None = None) -> Tensor:
        """Context 'b l d' of ids 'b l' (l ≤ config.length): all states, padding too, after the final norm.

        skip: how many of the last blocks to leave out; None is the model's own (SD1: 0, SD2: 1). skip=1 on SD1 is what
        others call "clip skip 2".
        """
        return self.final_norm(self.states(ids, skip=self.config.skip if skip is None else skip))

    def states(self, ids: Tensor, *, skip: int = 0) -> Tensor:
        """The states 'b l d' after all blocks but the last `skip`, before the final norm."""
        if ids.shape[-1] > self.config.length:
            raise ValueError(f"{ids.shape[-1]} tokens; this text encoder takes {self.config.length}: split the prompt")
        if not 0 <= skip < len(self.blocks):
            raise ValueError(f"skip={skip} blocks of {len(self.blocks)}: allowed are 0 to {len(self.blocks) - 1}")
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[-1]]
        for block in self.blocks[: len(self.blocks) - skip]:
            x = block(x, causal=True)
        return x

    def embed(self, ids: Tensor) -> Tensor:
        """The prompts in the shared image-text space, 'b e': the last block's state at the first EOS, projected."""
        if self.projection is None:
            raise ValueError("this text encoder has no projection to the image-text space: load one from a CLIP file")
        is_eos = ids == self.config.eos_id
        if not is_eos.any(-1).all():
            raise ValueError(f"a prompt without the end token {self.config.eos_id} has no embedding")
        states = self.final_norm(self.states(ids))
        return self.projection(states[torch.arange(len(ids), device=ids.device), is_eos.int().argmax(-1)])


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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each round a skip."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attn = Attention(config.width, heads=config.heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.activation = {"gelu": F.gelu, "quick_gelu": quick_gelu}[config.activation]
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=causal)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))  # type: ignore[operator]  # builtin or function


def quick_gelu(x: Tensor) -> Tensor:
    """x·σ(1.702x), OpenAI's approximation of GELU (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)
