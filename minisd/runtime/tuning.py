"""What makes networks quicker on a CPU and changes what they compute by rounding at most."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from mmap import PAGESIZE

import numpy as np
import torch
from torch import Tensor, nn

from minisd.nn.transformer import FeedForward

TOKENS = 1024  # measured at width 320
KEPT = 2**30  # bytes
OLD_KEPT = 2**25  # the most that older glibc takes for M_MMAP_THRESHOLD
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MADV_DONTNEED = 4  # of sys/mman.h


def tune(network: nn.Module, device: torch.device) -> None:
    """Make a network quick on a device, without changing what it computes by more than rounding.

    Everything that runs a network many times calls this first. Calling it again, or for a GPU, changes nothing.
    """
    channels_last(network)
    in_parts(network, device)
    wide_norms(network, device)
    if device.type == "cpu":
        keep_freed_memory()


def in_parts(network: nn.Module, device: torch.device) -> None:
    """Let feed-forward layers take TOKENS tokens at a time on a CPU: then eight times their width stays in its cache.

    At 8192 tokens of width 320 that took 25 instead of 45 ms in bfloat16, and 97 instead of 142 in float32.
    """
    for module in network.modules():
        if isinstance(module, FeedForward):
            module.tokens = TOKENS if device.type == "cpu" else None


class WideGroupNorm(nn.GroupNorm):
    """Where gradients are wanted, bfloat16 is normalised in float32: with its backward pass torch 2.14's kernel for
    channels-last bfloat16 takes six times as long, and a U-Net that trains a sixth longer.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and self.weight.dtype == torch.float32 and torch.is_grad_enabled():
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def wide_norms(network: nn.Module, device: torch.device) -> None:
    """Let the group norms of a network that trains on a CPU be `WideGroupNorm`."""
    for module in network.modules():
        if type(module) is nn.GroupNorm and device.type == "cpu":
            module.__class__ = WideGroupNorm  # same weights, another forward


@torch.no_grad()
def channels_last(network: nn.Module) -> None:
    """Lay the convolutions' weights out as 'o h w c' in memory where they are on a CPU: twice as quick there, or more.

    Names, shapes and values stay; a second call does nothing. The outputs of such convolutions are laid out alike, and
    pixels become tokens without a copy.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.device.type == "cpu":
            before, module.weight.data = (
                module.weight.data,
                module.weight.data.contiguous(memory_format=torch.channels_last),
            )
            if before.data_ptr() != module.weight.data_ptr():
                forget_file_pages(before)


def forget_file_pages(tensor: Tensor) -> None:
    """Take a tensor that is not needed soon out of this process's memory, where it is a file that was mapped.

    Only pages that nobody has changed (nor may change meanwhile) and the system reads again at need: whatever still
    looks at the tensor sees the same numbers. Without effect on any other memory, and where the system does not tell
    (Linux does).
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or sys.platform != "linux":
        return
    first, end = -(-tensor.data_ptr() // PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // PAGESIZE  # whole pages
    if end <= first:
        return
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(8 * first)
            told = np.frombuffer(file.read(8 * (end - first)), np.uint64)
    except OSError:
        return
    present, swapped, of_a_file = ((told >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    if len(told) == end - first and not swapped.any() and (of_a_file >= present).all():
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        madvise(first * PAGESIZE, (end - first) * PAGESIZE, MADV_DONTNEED)


@functools.cache
def keep_freed_memory() -> int:
    """Let this process keep freed memory for the next layer, where its allocator is glibc's malloc, as on most Linux.

    That one hands every block of more than 32 MB back to the system when it is freed, and the next layer's block comes
    as new pages which the system fills with zeros first. On a virtual machine of 2 cores with AVX-512-BF16 this took a
    fifth of the time of decoding 512 x 512 pixels in bfloat16, and a quarter in float32. Now blocks of up to a gigabyte
    come from malloc's heap, and up to a gigabyte that is free at its end stays; `give_back_freed_memory` empties it.
    Older glibc takes 32 MB at most for a block, and the gain is smaller. Nothing is changed where the user has settings
    for malloc in the environment. Returns the size that malloc accepted, of the largest block that is kept; 0 for none.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return 0
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    accepted = next((size for size in (KEPT, OLD_KEPT) if mallopt and mallopt(M_MMAP_THRESHOLD, size)), 0)
    if accepted:
        mallopt(M_TRIM_THRESHOLD, KEPT)
    return accepted


def give_back_freed_memory() -> None:
    """Hand all that is free back to the system: between two phases, and before asking it how much there is."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
