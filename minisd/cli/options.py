"""Options that several commands share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

from minisd.cli.output import Output
from minisd.config import Settings

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion
    from minisd.record.call import LoadedModel

Sampled = Annotated[Settings, Parameter(name="*", group=Group("Sampling", sort_key=1))]


@Parameter(name="*", group=Group("Model", sort_key=2))
@dataclass(frozen=True)
class Model:
    """Which model, and how it is loaded.

    Attributes:
        checkpoint: a .safetensors or .ckpt file or a diffusers folder; the mini model when left out.
        weights: "ema" takes the separate EMA copy that full training files carry.
        prediction: what the U-Net's output means, where the file does not tell.
        vae: a file or folder whose VAE is taken instead.
        dtype: of the weights; the file's own when left out (float16 becomes float32 on a CPU).
        device: cpu, cuda, cuda:1, mps …
    """

    checkpoint: Path | None = None
    weights: Literal["raw", "ema"] = "raw"
    prediction: Literal["eps", "v", "x_0"] | None = None
    vae: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"

    def load(self) -> StableDiffusion:
        """The model; says in three lines on stderr what it is."""
        import torch

        import minisd

        self.check()
        sd = minisd.load(
            self.checkpoint,
            weights=self.weights,
            prediction=self.prediction,
            vae=self.vae,
            dtype=self.dtype and getattr(torch, self.dtype),
            device=self.device,
        )
        print("\n".join(sd.report[:3]), file=sys.stderr)
        return sd

    def check(self) -> None:
        """ValueError for a device that is not there."""
        import torch

        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"there is no device {self.device!r}: cpu, cuda, cuda:1, mps … are devices") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(f"the device {self.device} cannot be used ({reason}): try --device cpu") from error

    def record(self, folder: Path) -> LoadedModel:
        """How a picture in this folder remembers the model."""
        from minisd.pipeline import mini_model
        from minisd.record.call import LoadedModel
        from minisd.record.files import remember_checkpoint

        return LoadedModel(
            remember_checkpoint(self.checkpoint or mini_model(), folder),
            self.vae and remember_checkpoint(self.vae, folder),
            weights=self.weights,
            prediction=self.prediction,
            dtype=self.dtype,
            device=self.device,
        )


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every command takes that makes pictures."""

    settings: Sampled = Settings()
    model: Model = Model()
    output: Output = Output()  # noqa: RUF009
