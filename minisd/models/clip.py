"""CLIP's text encoder (Radford et al. 2021); the image encoder is `family/clip_vision.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        """The hidden states 'b l d' after all blocks but the last `skip`, before the final norm."""
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


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

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
