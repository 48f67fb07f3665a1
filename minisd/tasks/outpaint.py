"""Paint on beyond the edges of an image: inpainting on a larger canvas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from minisd.tasks.inpaint import Inpaint
from minisd.tasks.options import Options

if TYPE_CHECKING:
    from PIL.Image import Image

    from minisd.pipeline import CondNetwork, LatentDiffusion
    from minisd.tasks.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Outpaint(Options):
    """Extend an image beyond its edges; its own pixels stay, bit for bit.

    Attributes:
        image: the image to extend
        left: new pixels to the left
        right: new pixels to the right
        top: new pixels above
        bottom: new pixels below
        feather: new pixels over which the painting is blended in
    """

    name: ClassVar[str] = "outpaint"

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    feather: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        sides = self.left, self.right, self.top, self.bottom
        if min(sides) < 0 or not any(sides):
            named = " ".join(f"{name}={getattr(self, name)}" for name in ("left", "right", "top", "bottom"))
            raise ValueError(f"{named}: give new pixels for at least one side, none below 0")

    def samplings(
        self, sd: LatentDiffusion, prompt: str | Sequence[str], image: Image, *, network: CondNetwork | None = None
    ) -> Iterator[Sampling]:
        import torch
        import torch.nn.functional as F

        from minisd.tasks.images import to_pil, to_tensor

        frame = (self.left, self.right, self.top, self.bottom)
        pixels = to_tensor(image)
        (wider,) = to_pil(F.pad(pixels, frame, mode="replicate"))
        (mask,) = to_pil(F.pad(-torch.ones_like(pixels), frame, value=1.0))
        common = {field.name: getattr(self, field.name) for field in fields(Options)}
        yield from Inpaint(**common, feather=self.feather).samplings(sd, prompt, wider, mask, network=network)
