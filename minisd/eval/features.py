"""Pictures and prompts as vectors: the space in which they are compared, and what must be said of it.

A score in a feature space means nothing without the network and the way pictures are brought to its size (half a
point is lost or won by that alone), so every space has a `name` that states both, with a hash of the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from minisd.checkpoints.digests import network_digest
from minisd.checkpoints.files import CheckpointError, open_tensors
from minisd.family import clip_vision, dino
from minisd.family.clip_vision import CLIPVision
from minisd.family.dino import DINO
from minisd.models.clip import CLIPText
from minisd.tasks.images import to_tensor
from minisd.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minisd.stable_diffusion import StableDiffusion

Images = Tensor | Sequence[Image]  # 'b 3 h w' in [-1, 1], or uint8 0…255, or PIL pictures of any sizes
Interpolation = Literal["bicubic", "bilinear"]


class CLIPFeatures:
    """The space that a CLIP's pictures and prompts share (Radford et al. 2021).

    interpolation: how pictures are resized, their shorter side to the tower's, before the middle square is taken. The
    official towers want "bicubic"; minisd trains its own with "bilinear". Both with antialiasing.
    """

    def __init__(
        self,
        text: CLIPText,
        vision: CLIPVision,
        tokenizer: Tokenizer,
        *,
        label: str = "CLIP",
        interpolation: Interpolation = "bicubic",
    ):
        text_width, width = text.config.projection_dim, vision.config.projection_dim
        if width is None or text_width != width:
            raise ValueError(f"text and vision tower share no space: projection_dim is {text_width} and {width}")
        self.text, self.vision, self.tokenizer = text, vision, tokenizer
        self.label, self.interpolation = label, interpolation

    @classmethod
    def of(cls, sd: StableDiffusion) -> CLIPFeatures:
        """The space of a model that carries a vision tower, as the mini model does; its name says whose it is.

        ValueError for a model without one.
        """
        if sd.vision_encoder is None:
            raise ValueError(
                f"{sd.config.name} has no vision tower to judge pictures by: take a checkpoint that minisd trained, or "
                "a CLIP of your own (minisd.eval.features.CLIPFeatures)"
            )
        small = sd.vision_encoder.config.image_size < 224
        label = f"the CLIP of {sd.config.name}"
        interpolation = "bilinear" if small else "bicubic"
        return cls(sd.text_encoder, sd.vision_encoder, sd.tokenizer, label=label, interpolation=interpolation)

    @cached_property
    def name(self) -> str:
        side = self.vision.config.image_size
        return (
            f"{self.label} ({side} px, {self.interpolation}, antialiased; vision tower {network_digest(self.vision)})"
        )

    def images(self, images: Images, *, batch_size: int = 64, progress: str | None = None) -> Tensor:
        """The pictures' embeddings 'b e', not normalised, float32 on the CPU. progress: shows a bar of this label."""
        side = self.vision.config.image_size

        def prepare(image: Tensor) -> Tensor:
            return clip_vision.normalize(middle_square(image, side, side, self.interpolation))

        return features_of(self.vision, prepare, images, batch_size, progress)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], *, batch_size: int = 64, progress: str | None = None) -> Tensor:
        """The prompts' embeddings 'b e', likewise."""
        prompts, device = list(prompts), self.text.token_embedding.weight.device
        starts = tqdm(range(0, len(prompts), batch_size), desc=progress, unit="batch", disable=progress is None)
        parts = [self.text.embed(self.tokenizer(prompts[i : i + batch_size]).to(device)) for i in starts]
        return checked(torch.cat([part.float().cpu() for part in parts]), self.label) if parts else torch.empty(0, 0)


class DINOFeatures:
    """DINO's space (Caron et al. 2021), with the pictures brought to its size as its authors do for evaluation."""

    def __init__(self, network: DINO):
        self.network = network

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: str | torch.device = "cpu") -> DINOFeatures:
        """From the official file, such as dino_deitsmall16_pretrain.pth, or the teacher of a full training file."""
        return cls(load_dino(path).to(device))

    @cached_property
    def name(self) -> str:
        config, digest = self.network.config, network_digest(self.network)
        size = f"{self._resized} px, bicubic, antialiased, middle {config.image_size}"
        return f"DINO ViT of width {config.width}, patches of {config.patch_size} ({size}; {digest})"

    @property
    def _resized(self) -> int:
        return round(self.network.config.image_size * 256 / 224)

    def images(self, images: Images, *, batch_size: int = 32, progress: str | None = None) -> Tensor:
        """The pictures' features 'b d', not normalised, float32 on the CPU."""

        def prepare(image: Tensor) -> Tensor:
            return dino.normalize(middle_square(image, self._resized, self.network.config.image_size, "bicubic"))

        return features_of(self.network, prepare, images, batch_size, progress)


def load_dino(path: str | os.PathLike) -> DINO:
    """The network in a file of the official names. Nothing in the file is executed."""
    file = open_tensors(path)
    prefixes = ("", "teacher.backbone.", "backbone.", "module.backbone.")
    prefix = next((prefix for prefix in prefixes if f"{prefix}cls_token" in file), None)
    if prefix is None:
        raise CheckpointError(
            f"{os.fspath(path)}: it holds no DINO ViT ('cls_token' is missing): see its README's files"
        )
    tensors: Mapping[str, Tensor] = {
        name.removeprefix(prefix): file.read(name, torch.float32) for name in file if name.startswith(prefix)
    }
    try:
        return dino.from_official(tensors)
    except ValueError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from error


@torch.no_grad()
def features_of(
    network: nn.Module,
    prepare: Callable[[Tensor], Tensor],
    images: Images,
    batch_size: int,
    progress: str | None,
) -> Tensor:
    """network(prepare(images)) 'b d' in float32 on the CPU, `batch_size` at a time."""
    weight = next(network.parameters())
    parts = []
    for start in tqdm(range(0, len(images), batch_size), desc=progress, unit="batch", disable=progress is None):
        part = images[start : start + batch_size]
        ready = [prepare(image) for image in ([in_range(part)] if isinstance(part, Tensor) else map(to_tensor, part))]
        parts.append(network(torch.cat(ready).to(weight)).float().cpu())
    if not parts:
        raise ValueError("there are no pictures to look at: give at least one")
    return checked(torch.cat(parts), type(network).__name__)


def in_range(images: Tensor) -> Tensor:
    """uint8 0…255 → [-1, 1]; floats as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def middle_square(image: Tensor, resized: int, side: int, interpolation: Interpolation) -> Tensor:
    """Images 'b 3 h w' in [-1, 1], the shorter side brought to `resized`, then the middle square of `side`."""
    height, width = image.shape[-2:]
    scale = resized / min(height, width)
    size = (round(height * scale), round(width * scale))
    if size != (height, width):
        # PIL, with which the towers were trained, cuts what bicubic overshoots
        image = F.interpolate(image, size=size, mode=interpolation, antialias=True).clamp(-1, 1)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return image[..., top : top + side, left : left + side]


def checked(features: Tensor, source: str) -> Tensor:
    """The features, if all are finite."""
    if not features.isfinite().all():
        bad = int((~features.isfinite().all(-1)).sum())
        raise ValueError(f"{bad} of {len(features)} features of {source} are NaN or infinite: the weights are damaged")
    return features


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosines 'n m' between the rows of a 'n d' and b 'm d'. A row of zeros has the cosine 0 to all."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
