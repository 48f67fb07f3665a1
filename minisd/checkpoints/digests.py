"""A short digest of a network's weights, by which records and caches tell one training from another."""

from __future__ import annotations

import hashlib

from torch import nn

from minisd.runtime.allocator import forget_file_pages


def network_digest(network: nn.Module) -> str:
    """16 hex digits of the SHA-256 of a network's names, shapes and float32 weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        forget_file_pages(tensor)  # all of a mapped file has been read now, and not all of it is needed
    return f"sha256:{digest.hexdigest()[:16]}"
