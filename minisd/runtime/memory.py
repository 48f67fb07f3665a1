"""How much memory a sampling takes at most, found by running its networks on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisd.models.latents import decoded
from minisd.models.unet import Conditioning, UNet
from minisd.models.vae import VAE
from minisd.pipeline import LatentDiffusion
from minisd.runtime.allocator import give_back_freed_memory
from minisd.runtime.meta import on_meta
from minisd.runtime.optimize import optimize
from minisd.tasks.sampling import Sampling

PER_PIXEL = 3072  # bytes that the official VAE takes to decode a pixel, untiled and in float32


@dataclass(frozen=True)
class Needs:
    """Bytes: of all weights together, and, beside them, of a step of the U-Net and of the decoding at their fullest.

    With offload no weights stay: those of the U-Net are in its step, those of the VAE in the decoding. What PyTorch's
    libraries keep for themselves (a convolution's scratch, fragments) comes on top: a tenth or two. So does, on a CPU,
    what `keep_freed_memory` keeps for the next layer.
    """

    weights: int
    step: int
    decode: int

    @property
    def beside_weights(self) -> int:
        return max(self.step, self.decode)

    @property
    def peak(self) -> int:
        return self.weights + self.beside_weights

    def __str__(self) -> str:
        weights, step, decode = (f"{n / 1e9:.1f}" for n in (self.weights, self.step, self.decode))
        first = f"weights {weights}, then" if self.weights else "with the weights of the network at work"
        return f"about {self.peak / 1e9:.1f} GB of memory: {first} a step {step}, decoding {decode}"


def is_large(sampling: Sampling) -> bool:
    """Whether a sampling may take more than a gigabyte: for less it is not worth the two seconds that `needs` takes."""
    b, _, h, w = sampling.latents.shape
    pixels = b * h * w * sampling.sd.config.vae.factor**2
    sd = sampling.sd
    return all_weights(sd) + PER_PIXEL * pixels > 1e9


def all_weights(sd: LatentDiffusion) -> int:
    """Bytes."""
    networks = sd.unet, sd.vae, sd.text_encoder, getattr(sd, "vision_encoder", None)
    return sum(weights_of(network) for network in networks if network is not None)


def weights_of(network: nn.Module) -> int:
    """Bytes."""
    return sum(weight.nbytes for weight in network.parameters())


def needs(sampling: Sampling, *, offload: bool = False) -> Needs:
    """What the steps and the decoding of a sampling will take, for its size, batch, guidance, tiles and dtype.

    Nothing is computed: two seconds for Stable Diffusion's networks.
    """
    sd, batch, latents = sampling.sd, sampling.batch, sampling.latents
    context = torch.cat([cond.context for cond in (batch.cond, batch.uncond) if cond is not None]).to("meta")
    unet = on_meta(UNet, sd.unet.config).to(sd.dtype)
    if sd.device.type == "cpu":
        optimize(unet)
    vae = on_meta(VAE, sd.vae.config).to(sd.vae.quant_conv.weight.dtype)
    n, channels = context.shape[0], sd.config.unet.in_channels
    x = torch.empty(n, channels, *latents.shape[-2:], dtype=sd.dtype, device="meta")
    step = live_bytes(lambda: unet(x, 0, Conditioning(context)), unet)
    decode = live_bytes(lambda: decoded(vae, latents.to("meta"), sampling.options.vae_tiling), vae)
    if offload:
        return Needs(0, step + weights_of(sd.unet), decode + weights_of(sd.vae))
    return Needs(all_weights(sd), step, decode)


@torch.no_grad()
def live_bytes(run: Callable[[], object], network: nn.Module) -> int:
    """The most bytes that the tensors made by run(), beside the network's weights, hold at one time."""
    with _WholeAttention(), _Live(network) as live:
        run()
    return live.peak


class _Live(TorchDispatchMode):
    """Sees every operation, and which storages are alive after it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata for weight in network.parameters()}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.weights:
                self.alive[key] = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class _WholeAttention(TorchFunctionMode):
    """Without data PyTorch would take attention apart, into the matrix of all weights that no kernel ever holds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def available(device: torch.device) -> int:
    """Bytes that can still be had on a device: of a GPU, and for all others of the computer's memory, without swap."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    give_back_freed_memory()
    return psutil.virtual_memory().available
