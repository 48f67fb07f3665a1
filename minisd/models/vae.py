"""The KL autoencoder: images to latents and back (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisd.config import VAEConfig
from minisd.nn.attention import sdpa_attention
from minisd.nn.blocks import Conv3x3, Downsample, ResBlock, Upsample, layers


class VAE(nn.Module):
    """encode: image 'b 3 H W' in [-1, 1] → DiagonalGaussian over U-Net latents; decode: the way back.

    Latents are always *U-Net latents*: the scale factor is applied inside (and by the VAE's tiled form, `tiling.py`),
    nowhere else. Module names are the official ones, except `skip` for `nin_shortcut`.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """ValueError for sides that are not multiples of config.factor."""
        check_sides(image, self.config.factor)
        return DiagonalGaussian.from_moments(self.moments(image), self.config)

    def decode(self, latents: Tensor) -> Tensor:
        """U-Net latents 'b c h w' → image 'b 3 H W' in about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale_factor))

    def moments(self, image: Tensor) -> Tensor:
        """The encoder's raw output 'b 2c h w': mean and log-variance, unscaled and unclamped."""
        return self.quant_conv(self.encoder(image))


def check_sides(image: Tensor, factor: int) -> None:
    """ValueError where a side of image 'b c H W' is not a multiple of factor."""
    for name, side in zip(("height", "width"), image.shape[-2:], strict=True):
        if side % factor:
            lower = max(side // factor * factor, factor)
            raise ValueError(
                f"{name} {side} is not a multiple of {factor} (the VAE's factor): use {lower} or {lower + factor}"
            )


@dataclass(frozen=True)
class DiagonalGaussian:
    """The VAE's posterior: a normal distribution over U-Net latents 'b c h w', of independent components."""

    mean: Tensor
    std: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor, config: VAEConfig) -> DiagonalGaussian:
        mean, logvar = moments.chunk(2, dim=1)
        std = (0.5 * logvar.clamp(*config.logvar_range)).exp()
        return cls(config.scale_factor * mean, config.scale_factor * std)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std·noise; the noise is drawn on the generator's device (the mean's without one)."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


class Encoder(nn.Module):
    """Residual blocks and downsamplings, level by level, then a middle with attention."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        norm: dict[str, Any] = {"norm_groups": config.norm_groups, "norm_eps": config.norm_eps}
        self.conv_in = Conv3x3(config.image_channels, config.channels)
        self.down = layers(
            Level(before, width, config.num_res_blocks, norm, down=level < len(widths) - 1)
            for level, (width, before) in enumerate(zip(widths, [config.channels, *widths], strict=False))
        )
        self.mid = Middle(widths[-1], norm)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], config.norm_eps)
        self.conv_out = Conv3x3(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                x = block(x)
            if down.downsample is not None:
                x = down.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)), inplace=True))


class Decoder(nn.Module):
    """The encoder backwards, with one more residual block per level. `up` is indexed by level, as the official one."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * mult for mult in config.channel_mult]
        norm: dict[str, Any] = {"norm_groups": config.norm_groups, "norm_eps": config.norm_eps}
        self.conv_in = Conv3x3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], norm)
        self.up = layers(
            Level(before, width, config.num_res_blocks + 1, norm, up=level > 0)
            for level, (width, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True))
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], config.norm_eps)
        self.conv_out = Conv3x3(widths[0], config.image_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for up in reversed(self.up):
            for block in up.block:
                x = block(x)
            if up.upsample is not None:
                x = up.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Level(nn.Module):
    def __init__(
        self, before: int, width: int, blocks: int, norm: dict[str, Any], down: bool = False, up: bool = False
    ):
        super().__init__()
        self.block = layers(ResBlock(before if i == 0 else width, width, **norm) for i in range(blocks))
        self.downsample = Downsample(width, symmetric=False) if down else None
        self.upsample = Upsample(width) if up else None


class Middle(nn.Module):
    def __init__(self, width: int, norm: dict[str, Any]):
        super().__init__()
        self.block_1 = ResBlock(width, width, **norm)
        self.attn_1 = PixelAttention(width, **norm)
        self.block_2 = ResBlock(width, width, **norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class PixelAttention(nn.Module):
    """One head of self-attention as wide as the channels; its projections are 1×1 convolutions."""

    attend = staticmethod(sdpa_attention)

    def __init__(self, width: int, *, norm_groups: int, norm_eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, width, norm_eps)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b (h w) 1 c") for f in (self.q, self.k, self.v))
        out = rearrange(self.attend(q, k, v), "b (h w) 1 c -> b c h w", h=x.shape[-2])
        return x + self.proj_out(out)
