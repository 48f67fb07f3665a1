"""Encoding and decoding in stripes: the untiled network's result, in bounded memory."""

import weakref
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisd.config import VAEConfig
from minisd.models.tiling import norm_silu, tiled_decode, tiled_encode
from minisd.models.vae import VAE

TINY = VAEConfig(channels=8, norm_groups=4, channel_mult=(1, 2, 3, 2), num_res_blocks=1)
CONFIGS = {
    "f8": TINY,
    "f8 two blocks": VAEConfig(channels=8, norm_groups=4),
    "f4": VAEConfig(channels=8, norm_groups=4, channel_mult=(1, 2, 4)),
    "f2": VAEConfig(channels=8, norm_groups=2, channel_mult=(1, 2), num_res_blocks=1),
    "f1": VAEConfig(channels=8, norm_groups=2, channel_mult=(1,), num_res_blocks=1),
}
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, values of order 1: rounding alone


def make(config: VAEConfig, dtype=torch.float64) -> VAE:
    torch.manual_seed(0)
    return VAE(config).to(dtype)


def random_latents(config, h, w, b=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(b, config.latent_channels, h, w, generator=generator, dtype=torch.float64).to(dtype)


def random_image(config, h, w, b=1, dtype=torch.float64):
    """'b 3 H W' for latents of h × w."""
    generator = torch.Generator().manual_seed(2)
    sides = (h * config.factor, w * config.factor)
    return (torch.rand(b, config.image_channels, *sides, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


@pytest.fixture(scope="module")
def vae():
    return make(TINY)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("latent_rows", [1, 2, 3])
@torch.inference_mode()
def test_in_stripes_the_vae_computes_what_it_computes_whole(name, latent_rows):
    config = CONFIGS[name]
    vae, rows = make(config), latent_rows * config.factor
    z, image = random_latents(config, 7, 4), random_image(config, 7, 4)
    torch.testing.assert_close(tiled_decode(vae, z, rows=rows), vae.decode(z), **EXACT)
    whole, tiled = vae.encode(image), tiled_encode(vae, image, rows=rows)
    torch.testing.assert_close(tiled.mean, whole.mean, **EXACT)
    torch.testing.assert_close(tiled.std, whole.std, **EXACT)


@given(h=st.integers(1, 9), w=st.integers(1, 6), latent_rows=st.integers(1, 12), batch=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_any_sides_go_with_any_stripes(h, w, latent_rows, batch):
    vae, rows = make(TINY), latent_rows * TINY.factor
    z, image = random_latents(TINY, h, w, batch), random_image(TINY, h, w, batch)
    with torch.no_grad():
        torch.testing.assert_close(tiled_decode(vae, z, rows=rows), vae.decode(z), **EXACT)
        torch.testing.assert_close(tiled_encode(vae, image, rows=rows).mean, vae.encode(image).mean, **EXACT)


@torch.inference_mode()
def test_in_float32_no_pixel_is_a_hundredth_of_a_level_away():
    vae = make(CONFIGS["f8 two blocks"], torch.float32)
    z = random_latents(vae.config, 24, 12, dtype=torch.float32)
    levels = (tiled_decode(vae, z, rows=16) - vae.decode(z)).abs() * 127.5
    assert levels.max() < 0.01  # seen: 0.0007


@torch.inference_mode()
def test_in_bfloat16_stripes_are_as_near_to_float32_as_the_whole_is():
    vae = make(CONFIGS["f8 two blocks"], torch.float32)
    z = random_latents(vae.config, 16, 8, dtype=torch.float32)
    exact = vae.decode(z)
    vae, z = vae.bfloat16(), z.bfloat16()
    tiled, whole = tiled_decode(vae, z, rows=16), vae.decode(z)
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).abs().mean() < 1.1 * (whole - exact).abs().mean()


@torch.inference_mode()
def test_the_statistics_are_the_whole_picture_s_and_not_the_stripe_s(vae):
    z = random_latents(TINY, 8, 4)
    z[:, :, 4:] *= 20
    whole, upper_alone = vae.decode(z), vae.decode(z[:, :, :4])
    assert (whole[:, :, :8] - upper_alone[:, :, :8]).abs().mean() > 0.05  # rows far from the cut
    torch.testing.assert_close(tiled_decode(vae, z, rows=8), whole, **EXACT)


def test_group_statistics_keep_their_digits_where_the_mean_dwarfs_the_deviation():
    norm = nn.GroupNorm(2, 8, eps=1e-6)
    x = 1000 + torch.randn(2, 8, 37, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    stripes = x.float().split(5, dim=2)
    with torch.no_grad():
        ours = torch.cat([activated for _, activated in norm_silu(norm, stripes)], dim=2)
        exact = F.silu(norm.double()(x))
    # float32 holds 1000 + n to 6e-5; sums of squares without centring would be 0.1 off
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-3)


@torch.inference_mode()
def test_rows_beyond_the_picture_are_one_stripe(vae):
    z = random_latents(TINY, 3, 2)
    torch.testing.assert_close(tiled_decode(vae, z, rows=8000), vae.decode(z), **EXACT)


def test_nothing_is_changed_and_no_gradient_is_kept(vae):
    before = deepcopy(vae.state_dict())
    z, image = random_latents(TINY, 3, 2), random_image(TINY, 3, 2).requires_grad_()
    z_before, image_before = z.clone(), image.detach().clone()
    assert not tiled_decode(vae, z, rows=8).requires_grad
    assert not tiled_encode(vae, image, rows=8).mean.requires_grad
    assert torch.equal(z, z_before)
    assert torch.equal(image, image_before)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


class LiveBytes(TorchDispatchMode):
    """The bytes of all tensors that operators have made and that still live; .peak is the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._grow(storage.nbytes())
                weakref.finalize(storage, self._grow, -storage.nbytes())
        return out

    def _grow(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_of(function, *args, **kwargs) -> int:
    with torch.no_grad(), LiveBytes() as memory:
        function(*args, **kwargs)
    return memory.peak


# level 0 rules and the middle is small, as in Stable Diffusion
LARGE = VAEConfig(channels=16, norm_groups=4, num_res_blocks=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_memory_is_what_the_law_says(way, dtype):
    vae, rows = make(LARGE, dtype), 8
    z, image = random_latents(LARGE, 64, 4, dtype=dtype), random_image(LARGE, 64, 4, dtype=dtype)
    whole, tiled, x = {"decode": (vae.decode, tiled_decode, z), "encode": (vae.encode, tiled_encode, image)}[way]
    pixels, stripe = image.shape[-2] * image.shape[-1], rows * image.shape[-1]
    waiting = values_per_pixel(LARGE) * pixels * dtype.itemsize
    in_work = 6 * values_per_pixel(LARGE) * stripe * 4  # float32: the statistics' type
    pictures = 2 * 3 * pixels * dtype.itemsize
    peak = peak_of(tiled, vae, x, rows=rows)
    assert waiting < peak < waiting + in_work + pictures
    assert peak < 0.6 * peak_of(whole, x)


def test_a_stripe_more_in_the_picture_costs_only_what_waits():
    vae = make(LARGE, torch.float32)
    short, tall = (
        peak_of(tiled_decode, vae, random_latents(LARGE, h, 4, dtype=torch.float32), rows=8) for h in (32, 64)
    )
    more_pixels = 32 * 4 * LARGE.factor**2
    per_pixel = (tall - short) / (4 * more_pixels)
    assert values_per_pixel(LARGE) <= per_pixel < values_per_pixel(LARGE) + 7  # 3 or 6 are the picture itself


def test_a_batch_takes_no_more_memory_than_its_pictures():
    vae = make(LARGE, torch.float32)
    one, four = (peak_of(tiled_decode, vae, random_latents(LARGE, 32, 4, b, torch.float32), rows=8) for b in (1, 4))
    assert four - one < 2 * 4 * 4 * 3 * (32 * 4 * LARGE.factor**2)


def values_per_pixel(config: VAEConfig) -> float:
    """How many values wait per image pixel at most: the decoder's and the encoder's peak, without the stripes in work.

    At level l, of 4^l times fewer pixels, a residual block keeps its skip and its hidden map, 2·c_l channels together,
    and what the decoder brought up from below to feed the first of them had c_{l+1}.
    """
    widths = [config.channels * mult for mult in config.channel_mult]
    below = [*widths[1:], 0]
    return max(max(2 * width, wide) / 4**level for level, (width, wide) in enumerate(zip(widths, below, strict=True)))


def test_stable_diffusion_waits_with_256_values_per_pixel():
    assert values_per_pixel(VAEConfig()) == values_per_pixel(VAEConfig(channel_mult=(1, 2, 4))) == 256


@pytest.mark.parametrize(("rows", "use"), [(0, "8 or 16"), (-8, "8 or 16"), (12, "8 or 16"), (30, "24 or 32")])
def test_rows_that_cut_a_latent_are_refused_with_two_that_do_not(vae, rows, use):
    for tiled, x in ((tiled_decode, random_latents(TINY, 2, 2)), (tiled_encode, random_image(TINY, 2, 2))):
        with pytest.raises(ValueError, match=rf"rows {rows} is not a positive multiple of 8 .* use {use}"):
            tiled(vae, x, rows=rows)


def test_sides_and_shapes_that_the_vae_cannot_take_are_refused(vae):
    with pytest.raises(ValueError, match="height 20 is not a multiple of 8"):
        tiled_encode(vae, torch.zeros(1, 3, 20, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="latents must be 'b c h w'"):
        tiled_decode(vae, torch.zeros(4, 8, 8))
    with pytest.raises(ValueError, match="image must be 'b c h w' with no side 0"):
        tiled_encode(vae, torch.zeros(0, 3, 8, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="stripes are offloaded from an accelerator")
@torch.inference_mode()
def test_offloaded_stripes_free_the_accelerator():
    vae, z = make(LARGE, torch.float32).cuda(), random_latents(LARGE, 256, 4, dtype=torch.float32).cuda()
    images, peaks = [], []
    for offload in (None, "cpu"):
        torch.cuda.reset_peak_memory_stats()
        images.append(tiled_decode(vae, z, rows=64, offload=offload))
        peaks.append(torch.cuda.max_memory_allocated())
    assert images[1].is_cuda
    assert peaks[1] < 0.7 * peaks[0]
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-4)
