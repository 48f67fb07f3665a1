"""What each task takes, in plain values: the command line makes options of them, a picture's record keeps them.

`check` refuses what no model could do, before one is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Arguments:
    """What every task takes besides prompts and pictures. `inputs` names the pictures.

    Attributes:
        negative_prompt: what to keep away from.
        num_images: pictures per prompt.
        seed: of the first picture; the others count on from it.
    """

    task: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]] = ()

    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0

    def check(self) -> None:
        """ValueError for what is wrong whatever the model."""
        if self.num_images < 1:
            raise ValueError(f"num_images is {self.num_images}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: give 0 or more")
        for name in ("strength", "two_pass"):
            if (share := getattr(self, name, None)) is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}: give more than 0 and at most 1, which is a new picture")


@dataclass(frozen=True)
class Txt2Img(Arguments):
    """Of `tasks.txt2img`.

    Attributes:
        height: a multiple of 8; the model's own size when left out.
        width: likewise.
        variation_seed: turn the noise of --seed towards that of this seed, by --variation.
        variation: 0 is the picture of --seed, 1 that of --variation-seed.
        two_pass: for sizes beyond the model's own: draw small, enlarge, redraw with this strength (0.5 to 0.7).
    """

    task: ClassVar[str] = "txt2img"

    height: int | None = None
    width: int | None = None
    variation_seed: int | None = None
    variation: float = 0.0
    two_pass: float | None = None


@dataclass(frozen=True)
class Img2Img(Arguments):
    """Of `tasks.img2img`.

    Attributes:
        strength: how far it may go from the picture, above 0 and up to 1.
        exact_steps: run all --steps, instead of the share that --strength leaves of them.
        height: resize the picture first; one side alone keeps its proportions.
        width: likewise.
    """

    task: ClassVar[str] = "img2img"
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    strength: float = 0.75
    exact_steps: bool = False
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Inpaint(Arguments):
    """Of `tasks.inpaint`.

    Attributes:
        strength: below 1, traces of what was under the mask remain.
        exact_steps: run all --steps, instead of the share that --strength leaves of them.
        feather: pixels inside the mask over which the new part is blended in.
    """

    task: ClassVar[str] = "inpaint"
    inputs: ClassVar[tuple[str, ...]] = ("image", "mask")

    strength: float = 1.0
    exact_steps: bool = False
    feather: int = 8


@dataclass(frozen=True)
class Outpaint(Arguments):
    """Of `tasks.outpaint`.

    Attributes:
        left: new pixels to the left.
        right: new pixels to the right.
        top: new pixels above.
        bottom: new pixels below.
        feather: new pixels over which the painting is blended in.
    """

    task: ClassVar[str] = "outpaint"
    inputs: ClassVar[tuple[str, ...]] = ("image",)

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
    feather: int = 8

    def check(self) -> None:
        super().check()
        if not max(sides := (self.left, self.right, self.top, self.bottom)) or min(sides) < 0:
            raise ValueError("give the new pixels of at least one side: left, right, top or bottom, none below 0")


TASKS: dict[str, type[Arguments]] = {cls.task: cls for cls in (Txt2Img, Img2Img, Inpaint, Outpaint)}
