"""`optimize(network)`: the same network, its layers in the forms that are quick on the machine at hand.

A layer's form is its class: `optimize` gives each layer the subclass that FORMS names, `plain` gives it its own class
back (torch does likewise in `fully_shard` and `parametrize`). Weights, names, hooks and every reference to the layer
stay. Results change by rounding at most. What is learnt, compiled or mapped by torch.func runs the plain forms.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from minisd.models.vae import PixelAttention
from minisd.nn.attention import Attention
from minisd.nn.blocks import Conv3x3, ResBlock
from minisd.nn.transformer import FeedForward
from minisd.runtime.allocator import forget_file_pages, give_back_freed_memory, keep_freed_memory
from minisd.runtime.convolution import conv3x3
from minisd.runtime.kernels import attention
from minisd.runtime.modes import is_transformed

TOKENS = 1024  # of a feed-forward layer at a time: eight times their width then stays in a CPU's cache

LARGE = 2**25  # bytes of a map

Network = TypeVar("Network", bound=nn.Module)


def optimize(network: Network) -> Network:
    """The network itself, made quick. Calling it again changes nothing; on a GPU only attention may run another form.

    On a CPU the process is also told to keep freed memory (`allocator.keep_freed_memory`).
    """
    for module in network.modules():
        module.__class__ = FORMS.get(type(module), type(module))
    if any(weight.device.type == "cpu" for weight in network.parameters()):
        keep_freed_memory()
    return network


def plain(network: Network) -> Network:
    """The network itself, its layers in the forms that are there to be read."""
    own = {form: layer for layer, form in FORMS.items()}
    for module in network.modules():
        module.__class__ = own.get(type(module), type(module))
    return network


class QuickAttention(Attention):
    """The form of attention that was measured to be the quickest for each shape (`kernels/choice.py`)."""

    attend = staticmethod(attention)


class QuickPixelAttention(PixelAttention):
    attend = staticmethod(attention)


class QuickConv2d(nn.Conv2d):
    """On a CPU, with weights laid out channels-last from the first call on: twice as quick there, or more."""

    def forward(self, x: Tensor) -> Tensor:
        lay_out(self)
        return super().forward(x)


class QuickConv3x3(Conv3x3):
    """Direct, as one matrix product, or with a quarter of the multiplications: by the number of its pixels."""

    def convolve(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        lay_out(self)
        return conv3x3(x, self.weight, self.bias, padding=padding)


class QuickFeedForward(FeedForward):
    """TOKENS tokens at a time on a CPU, where nothing is learnt."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in ("cpu", "meta") or torch.is_grad_enabled():
            return super().forward(x)
        return torch.cat(
            [super(QuickFeedForward, self).forward(part) for part in x.flatten(0, -2).split(TOKENS)]
        ).view_as(x)


class QuickGroupNorm(nn.GroupNorm):
    """Where gradients are wanted on a CPU, bfloat16 is normalised in float32: PyTorch's own backward is slow there."""

    def forward(self, x: Tensor) -> Tensor:
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32
        if slow and torch.is_grad_enabled():
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


class QuickResBlock(ResBlock):
    """Before large maps of a VAE in half precision, freed memory is given back: glibc fits no aligned block into a hole
    of its own size, and the heap would grow with every block (BENCHMARKS.md has what it saves and costs)."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        large = x.device.type == "cpu" and x.dtype.itemsize == 2 and x.nbytes >= LARGE
        if emb is None and large and not torch.is_grad_enabled() and not is_transformed():
            give_back_freed_memory()
        return super().forward(x, emb)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: QuickAttention,
    PixelAttention: QuickPixelAttention,
    nn.Conv2d: QuickConv2d,
    Conv3x3: QuickConv3x3,
    FeedForward: QuickFeedForward,
    nn.GroupNorm: QuickGroupNorm,
    ResBlock: QuickResBlock,
}


def channels_last(network: nn.Module) -> None:
    """Lay all convolutions' weights out as `lay_out` does, now instead of at their first call."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            lay_out(module)


@torch.no_grad()
def lay_out(conv: nn.Conv2d) -> None:
    """The weight as 'o h w c' in memory where it is on a CPU. Name, shape and values stay; a second call does nothing.

    The outputs of such convolutions are laid out alike, and pixels become tokens without a copy.
    """
    weight = conv.weight
    if weight.device.type != "cpu" or weight.is_contiguous(memory_format=torch.channels_last) or is_transformed():
        return
    before, weight.data = weight.data, weight.data.contiguous(memory_format=torch.channels_last)
    forget_file_pages(before)
