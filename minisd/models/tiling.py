"""The VAE on images too large for it: encode and decode tile by tile, in about a third of the memory, without seams.

This computes what the untiled network computes, up to rounding: nothing is left out, blended or done twice. An image
flows through the convolutions as a stream of tiles, rows of the full width, each with one row borrowed from either
neighbour (the halo of a 3×3 convolution). Only a GroupNorm has to see the whole image before it lets a row pass: there
the tiles wait until it has counted the last one. The middle, whose attention is global, runs whole, at latent size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from minisd.models.vae import VAE, DiagonalGaussian, check_sides
from minisd.nn.blocks import Conv3x3, Downsample, ResBlock, Upsample

Device = torch.device | str | None


@torch.no_grad()
def tiled_decode(vae: VAE, latents: Tensor, *, rows: int = 64, offload: Device = None) -> Tensor:
    """vae.decode(latents), tile by tile: U-Net latents 'b c h w' → image 'b 3 H W' in about [-1, 1], no gradients.

    rows: image rows per tile, a multiple of vae.config.factor; fewer take less memory and more time. offload: the
    device on which tiles wait between layers; None leaves them where they are. The images of a batch go one after
    the other. Any dtype; statistics are summed in float32 at least. ValueError for impossible shapes and rows.
    """
    _check(vae, "latents", latents, rows)
    return torch.cat([_decode(vae, one, rows // vae.config.factor, offload) for one in latents.split(1)])


@torch.no_grad()
def tiled_encode(vae: VAE, image: Tensor, *, rows: int = 64, offload: Device = None) -> DiagonalGaussian:
    """vae.encode(image), tile by tile; rows, offload and errors as in `tiled_decode`, and those of vae.encode."""
    _check(vae, "image", image, rows)
    check_sides(image, vae.config.factor)
    moments = torch.cat([_moments(vae, one, rows, offload) for one in image.split(1)])
    return DiagonalGaussian.from_moments(moments, vae.config)


def _decode(vae: VAE, latents: Tensor, rows: int, offload: Device) -> Tensor:
    decoder = vae.decoder
    whole = decoder.mid(decoder.conv_in(vae.post_quant_conv(latents / vae.config.scale_factor)))
    x = iter(whole.split(rows, dim=2))
    del whole
    for up in reversed(decoder.up):
        for block in up.block:
            x = res_block(block, x, offload)
        if up.upsample is not None:
            x = upsample(up.upsample, x)
    x = (activated for _, activated in norm_silu(decoder.norm_out, x, offload))
    return torch.cat(list(convolve(decoder.conv_out, x)), dim=2)


def _moments(vae: VAE, image: Tensor, rows: int, offload: Device) -> Tensor:
    encoder = vae.encoder
    x = convolve(encoder.conv_in, image.split(rows, dim=2))
    for down in encoder.down:
        for block in down.block:
            x = res_block(block, x, offload)
        if down.downsample is not None:
            x = downsample(down.downsample, x)
    whole = encoder.mid(torch.cat(list(x), dim=2))
    return vae.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(whole))))


def res_block(block: ResBlock, stripes: Iterable[Tensor], offload: Device = None) -> Iterator[Tensor]:
    """ResBlock.forward without an embedding. Of every tile only the skip and the hidden map are kept."""
    skips: deque[Tensor] = deque()

    def hidden() -> Iterator[Tensor]:
        for x, activated in norm_silu(block.norm1, stripes, offload):
            skips.append(block.skip(x).to(offload or x.device))
            yield activated

    h = convolve(block.conv1, hidden())
    h = convolve(block.conv2, (activated for _, activated in norm_silu(block.norm2, h, offload)))
    for residual in h:
        yield residual + skips.popleft().to(residual.device)


def upsample(layer: Upsample, stripes: Iterable[Tensor]) -> Iterator[Tensor]:
    return convolve(layer.conv, (repeat(x, "b c h w -> b c (h 2) (w 2)") for x in stripes))


def downsample(layer: Downsample, stripes: Iterable[Tensor]) -> Iterator[Tensor]:
    """The VAE's, which pads right and below: a tile of an even number of rows needs one row of the next."""
    for window in with_halo(stripes, above=False):
        yield layer.conv(F.pad(window, (0, 1)))


def convolve(conv: Conv3x3, stripes: Iterable[Tensor]) -> Iterator[Tensor]:
    for window in with_halo(stripes):
        yield conv.convolve(window, padding=(0, 1))


def with_halo(stripes: Iterable[Tensor], *, above: bool = True) -> Iterator[Tensor]:
    """Each tile 'b c h w' between the last row of the one above and the first of the one below, zeros at the ends."""
    stripes = iter(stripes)
    tile = next(stripes)
    edge = torch.zeros_like(tile[:, :, :1])
    upper = edge
    while tile is not None:
        following = next(stripes, None)
        lower = edge if following is None else following[:, :, :1]
        yield torch.cat([upper, tile, lower] if above else [tile, lower], dim=2)
        # a copy: a view of one row would keep its whole tile alive
        upper, tile = tile[:, :, -1:].clone(), following


def norm_silu(norm: nn.GroupNorm, stripes: Iterable[Tensor], offload: Device = None) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, silu(norm(x))) for each tile x, once all have come and the statistics of the whole image are known."""
    waiting: deque[Tensor] = deque()
    counts, variances, means = [], [], []
    for x in stripes:
        groups = rearrange(x, "b (g c) h w -> b g (c h w)", g=norm.num_groups)
        mean = groups.mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))
        # in two passes: as exact as torch.var_mean, and faster on a CPU
        variances.append((groups - mean[..., None]).square_().mean(-1))
        counts.append(groups.shape[-1])
        means.append(mean)
        waiting.append(x.to(offload or x.device))
    device, dtype = x.device, x.dtype
    del x, groups
    # the law of total variance puts the tiles together: no difference of large sums, which half precision would feel
    share = torch.tensor(counts, device=device, dtype=mean.dtype)[:, None, None] / sum(counts)
    means = torch.stack(means)
    mean = (share * means).sum(0)
    variance = (share * (torch.stack(variances) + (means - mean).square())).sum(0)
    scale, shift = _affine(norm, mean, variance)
    while waiting:
        x = waiting.popleft().to(device)
        yield x, F.silu(torch.addcmul(shift, x, scale).to(dtype), inplace=True)


def _affine(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """GroupNorm as scale·x + shift, both 'b c 1 1', from each group's mean and variance 'b g'."""
    per_group = norm.num_channels // norm.num_groups
    rstd, mean = (repeat(v, "b g -> b (g c) 1 1", c=per_group) for v in ((variance + norm.eps).rsqrt(), mean))
    scale = rstd * norm.weight[:, None, None]
    return scale, norm.bias[:, None, None] - mean * scale


def _check(vae: VAE, name: str, x: Tensor, rows: int) -> None:
    factor = vae.config.factor
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"{name} must be 'b c h w' with no side 0, got the shape {tuple(x.shape)}")
    if rows <= 0 or rows % factor:
        lower = max(rows // factor * factor, factor)
        raise ValueError(
            f"rows {rows} is not a positive multiple of {factor} (the VAE's factor): use {lower} or {lower + factor}"
        )
