"""Pictures ↔ latents: in stripes where a picture is large, in float32 where half precision overflows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from minisd.models.tiling import tiled_decode, tiled_encode
from minisd.models.vae import VAE, DiagonalGaussian
from minisd.runtime.tuning import tune
from minisd.tasks.nonfinite import nonfinite_error

TILE_ABOVE = 768 * 768  # pixels; the untiled decoder needs 3 kB of memory for each in float32
TILE_ROWS = 64
WATCHED = 128  # latents per side that are run again to name a layer: a large picture would not fit untiled


def encode_picture(vae: VAE, picture: Tensor, tile: int | None = None) -> DiagonalGaussian:
    """The latents' distribution 'b c h w', in float32, of pictures 'b 3 H W' in [-1, 1]. tile: see `Settings`."""

    def run(vae: VAE) -> Tensor:
        weight = vae.quant_conv.weight
        rows = _rows(picture.shape[-2] * picture.shape[-1], tile)
        image = picture.to(weight.device, weight.dtype)
        posterior = tiled_encode(vae, image, rows=rows) if rows else vae.encode(image)
        return torch.stack([posterior.mean.float(), posterior.std.float()])

    def again(vae: VAE) -> None:
        side = WATCHED * vae.config.factor
        vae.encode(picture[..., :side, :side].to(vae.quant_conv.weight))

    return DiagonalGaussian(*_finite(vae, run, again, "VAE's encoder"))


def decode_latents(vae: VAE, latents: Tensor, tile: int | None = None) -> Tensor:
    """Pictures 'b 3 H W' in about [-1, 1], in float32, of U-Net latents 'b c h w'. tile: see `Settings`."""

    def again(vae: VAE) -> None:
        vae.decode(latents[..., :WATCHED, :WATCHED].to(vae.quant_conv.weight))

    return _finite(vae, lambda vae: decoded(vae, latents, tile), again, "VAE's decoder")


def decoded(vae: VAE, latents: Tensor, tile: int | None) -> Tensor:
    """`decode_latents` as it stands, whatever comes out."""
    rows = _rows(latents.shape[-2] * latents.shape[-1] * vae.config.factor**2, tile)
    z = latents.to(vae.quant_conv.weight)
    return (tiled_decode(vae, z, rows=rows) if rows else vae.decode(z)).float()


@torch.no_grad()
def _finite(vae: VAE, run: Callable[[VAE], Tensor], again: Callable[[VAE], None], name: str) -> Tensor:
    """run(vae), of a copy in float32 where half precision fails; the layer is named where that fails too."""
    tune(vae, vae.quant_conv.weight.device)
    result = run(vae)
    dtype = vae.quant_conv.weight.dtype
    if not result.isfinite().all() and dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"the {name} gave NaN or infinity in {dtype}: run again in float32", stacklevel=4)
        vae = copy.deepcopy(vae).float()
        result = run(vae)
    if not result.isfinite().all():
        raise nonfinite_error(name, vae, lambda: again(vae))
    return result


def _rows(pixels: int, tile: int | None) -> int:
    """How many rows a stripe has; 0 runs the VAE whole."""
    if tile is None:
        return TILE_ROWS if pixels > TILE_ABOVE else 0
    return tile
