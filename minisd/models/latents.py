"""Images ↔ latents: tiled where an image is large, in float32 where half precision overflows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from minisd.models.nonfinite import nonfinite_error
from minisd.models.tiling import tiled_decode, tiled_encode
from minisd.models.vae import VAE, DiagonalGaussian

TILE_ABOVE = 768 * 768  # pixels; without tiling the decoder needs 3 kB of memory for each in float32
TILE_ROWS = 64
WATCHED = 128  # latents per side that are run again to name a layer: a large image would not fit without tiling


def encode_image(vae: VAE, image: Tensor, tile_rows: int | None = None) -> DiagonalGaussian:
    """The distribution of the latents 'b c h w', in float32, of images 'b 3 H W' in [-1, 1] on the VAE's device.

    tile_rows: image rows per tile, 0 for no tiling; None decides by the image's size.
    """

    def run(vae: VAE) -> Tensor:
        rows = _rows(image.shape[-2] * image.shape[-1], tile_rows)
        x = image.to(vae.quant_conv.weight.dtype)
        posterior = tiled_encode(vae, x, rows=rows) if rows else vae.encode(x)
        return torch.stack([posterior.mean.float(), posterior.std.float()])

    def again(vae: VAE) -> None:
        side = WATCHED * vae.config.factor
        vae.encode(image[..., :side, :side].to(vae.quant_conv.weight.dtype))

    return DiagonalGaussian(*_finite(vae, run, again, "VAE's encoder"))


def decode_latents(vae: VAE, latents: Tensor, tile_rows: int | None = None) -> Tensor:
    """Images 'b 3 H W' in about [-1, 1], in float32, of U-Net latents 'b c h w'. tile_rows: as above."""

    def again(vae: VAE) -> None:
        vae.decode(latents[..., :WATCHED, :WATCHED].to(vae.quant_conv.weight.dtype))

    return _finite(vae, lambda vae: decoded(vae, latents, tile_rows), again, "VAE's decoder")


def decoded(vae: VAE, latents: Tensor, tile_rows: int | None) -> Tensor:
    """`decode_latents` without its check for NaN and infinity."""
    rows = _rows(latents.shape[-2] * latents.shape[-1] * vae.config.factor**2, tile_rows)
    z = latents.to(vae.quant_conv.weight.dtype)
    return (tiled_decode(vae, z, rows=rows) if rows else vae.decode(z)).float()


@torch.no_grad()
def _finite(vae: VAE, run: Callable[[VAE], Tensor], again: Callable[[VAE], None], name: str) -> Tensor:
    """run(vae), by a copy in float32 where half precision overflows; an error names the layer if that fails too."""
    result, dtype = run(vae), vae.quant_conv.weight.dtype
    if not result.isfinite().all() and dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"the {name} gave NaN or infinity in {dtype}: run again in float32", stacklevel=4)
        vae = copy.deepcopy(vae).float()
        result = run(vae)
    if not result.isfinite().all():
        raise nonfinite_error(name, vae, lambda: again(vae))
    return result


def _rows(pixels: int, tile_rows: int | None) -> int:
    """Image rows per tile; 0 runs the VAE whole."""
    if tile_rows is None:
        return TILE_ROWS if pixels > TILE_ABOVE else 0
    return tile_rows
