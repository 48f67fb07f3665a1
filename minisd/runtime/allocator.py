"""The process's memory: keep what layers free for the next layer, give it back between two phases.

Linux with glibc; elsewhere nothing happens. jemalloc and tcmalloc, if preloaded, keep freed memory by themselves.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from mmap import PAGESIZE

import numpy as np
from torch import Tensor

KEPT = 2**30  # bytes
OLD_KEPT = 2**25  # the most that older glibc takes for M_MMAP_THRESHOLD
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MADV_DONTNEED = 4  # of sys/mman.h


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
