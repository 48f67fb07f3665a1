"""Models of every official kind shrunk to a few hundred kilobytes, and files of the official names and shapes."""

import json
import math
import struct
from dataclasses import replace
from functools import lru_cache

import torch

from minisd.checkpoints.load import Checkpoint
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.save import ldm_tensors, metadata
from minisd.config import PRESETS, ModelConfig

BYTES = {"F32": 4, "F16": 2, "I64": 8, "I32": 4}


def shrunk(preset: ModelConfig) -> ModelConfig:
    """The preset with everything that makes its kind, and little of everything else."""
    unet, text, vision = preset.unet, preset.text, preset.vision
    tiny_text = replace(text, vocab_size=200, width=64, layers=3, heads=2, mlp_width=96, bos_id=198, eos_id=199)
    tiny_text = replace(tiny_text, pad_id=0 if text.pad_id == 0 else 199, projection_dim=text.projection_dim and 32)
    return replace(
        preset,
        name=f"tiny {preset.name}",
        unet=replace(
            unet,
            channels=32,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            cross_only_levels=(0,) if unet.cross_only_levels else (),
            num_heads=4 if unet.num_heads else None,
            head_width=16 if unet.head_width else None,
            context_dim=64,
            num_classes=unet.num_classes and 10,
            vector_dim=unet.vector_dim and 64,
        ),
        vae=replace(preset.vae, channels=32, channel_mult=preset.vae.channel_mult[:2], num_res_blocks=1),
        text=tiny_text,
        vision=vision and replace(vision, image_size=28, width=64, layers=2, heads=2, mlp_width=128, projection_dim=32),
        image_size=32,
    )


TINY = {name: shrunk(preset) for name, preset in PRESETS.items()}


@lru_cache(maxsize=64)
def random_network(name: str, config, seed: int = 0) -> torch.nn.Module:
    """All weights drawn, also those that start at zero or one. Shared among tests: not to be changed in place."""
    with torch.device("meta"):
        network = NETWORKS[name].module(config)
    generator = torch.Generator().manual_seed(seed)
    draw = {name: weight(name, tuple(p.shape), generator) for name, p in network.state_dict().items()}
    network.load_state_dict(draw, assign=True)
    return network.eval()


def weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Matrices and kernels of gain 1, norm scales round 1, everything else small: activations stay near 1."""
    z = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return z / math.prod(shape[1:]) ** 0.5
    return 1 + 0.1 * z if name.endswith("weight") else 0.05 * z


def checkpoint(kind: str | ModelConfig = "SD1", *, extras=None, **fields) -> Checkpoint:
    """A whole random model of a kind ("SD1", "SD2_V" …)."""
    config = TINY[kind] if isinstance(kind, str) else kind
    parts = {"unet": config.unet, "vae": config.vae, "text": config.text, "vision": config.vision}
    networks = {n: random_network(n, c, seed=len(n)) for n, c in parts.items() if c is not None}
    return Checkpoint(config, networks, dict(extras or {}), [], fields.pop("prediction_evidence", "the test"), **fields)


def sparse_file(path, tensors: dict, *, metadata=None, values=None):
    """A safetensors file of these names → [shape, dtype], all zeros (holes in the file, which cost nothing) but for
    `values`."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (shape, dtype) in tensors.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in (values or {}).items():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().numpy().tobytes())
    return path


def same_tensors(a, b) -> bool:
    """Equal names, dtypes, shapes and bits."""
    return set(a) == set(b) and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and torch.equal(a[n].contiguous().view(-1).view(torch.uint8), b[n].contiguous().view(-1).view(torch.uint8))
        for n in a
    )


def ldm_file(kind="SD1"):
    """(tensors under the original's names, metadata) of a tiny model."""
    made = checkpoint(kind)
    tensors = {}
    for name, network in made.networks.items():
        tensors |= ldm_tensors(name, network)
    return tensors, dict(metadata(made))


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def same_networks(a, b) -> bool:
    return a.keys() == b.keys() and all(same_tensors(a[n].state_dict(), b[n].state_dict()) for n in a)
