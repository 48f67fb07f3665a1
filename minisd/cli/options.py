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
    from minisd.provenance.call import LoadedModel

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
        offload: keep the networks in CPU memory and copy each to the device while it runs: slower, for a GPU on which
            they do not fit together. It has not run on a GPU yet.
        cuda_graph: record the step as a CUDA graph and replay it: the same pictures, sooner where launching is what
            takes the time. It has not run on a GPU yet.
        embedding: a textual-inversion file whose word prompts may then hold; TOKEN=FILE names the word. Any number.
        lora: a LoRA file to merge into the weights; FILE:0.8 sets how strongly, 1 by default. Any number.
    """

    checkpoint: Path | None = None
    weights: Literal["raw", "ema"] = "raw"
    prediction: Literal["eps", "v", "x_0"] | None = None
    vae: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    offload: bool = False
    cuda_graph: bool = False
    embedding: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()

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
            offload=self.offload,
        )
        sd.cuda_graph = self.cuda_graph
        print("\n".join(sd.report[:3]), file=sys.stderr)
        for path, token in self.embeddings():
            print(f"{path}: adds {', '.join(sd.load_embedding(path, token))}", file=sys.stderr)
        for path, weight in self.loras():
            print(f"{path}: {len(sd.load_lora(path, weight))} layers changed, weight {weight:g}", file=sys.stderr)
        return sd

    def load_whole(self) -> StableDiffusion:
        """The model for what uses several networks at once; ValueError with offload."""
        if self.offload:
            raise ValueError("--offload is for drawing alone: here the networks work side by side, leave it out")
        return self.load()

    def embeddings(self) -> list[tuple[Path, str | None]]:
        """(file, token) of each --embedding."""
        return [_file_and_token(text) for text in self.embedding]

    def loras(self) -> list[tuple[Path, float]]:
        """(file, weight) of each --lora."""
        return [_file_and_weight(text) for text in self.lora]

    def check(self) -> None:
        """ValueError for a device that is not there or cannot do what is asked, and for files that are no adapters."""
        import torch

        from minisd.adapters.embeddings import load_embeddings
        from minisd.adapters.lora import open_lora
        from minisd.runtime import cuda_graph, offload

        for path, _ in self.embeddings():
            load_embeddings(path)
        for path in (files := [path for path, _ in self.loras()]):
            open_lora(path)
            if files.count(path) > 1:
                raise ValueError(f"{path} is given {files.count(path)} times: give it once, at the sum of the weights")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"there is no device {self.device!r}: cpu, cuda, cuda:1, mps … are devices") from None
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise ValueError(f"the device {self.device} cannot be used ({reason}): try --device cpu") from error
        if self.cuda_graph:
            cuda_graph.check_device(device)
        if self.offload:
            offload.check_device(device)

    def record(self, folder: Path) -> LoadedModel:
        """How a picture in this folder remembers the model."""
        from minisd.pipeline import mini_model
        from minisd.provenance.call import Embedding, LoadedModel, Lora
        from minisd.provenance.files import remember_checkpoint, remember_input

        return LoadedModel(
            remember_checkpoint(self.checkpoint or mini_model(), folder),
            self.vae and remember_checkpoint(self.vae, folder),
            weights=self.weights,
            prediction=self.prediction,
            dtype=self.dtype,
            device=self.device,
            embeddings=tuple(Embedding(remember_input(path, folder), token) for path, token in self.embeddings()),
            loras=tuple(Lora(remember_input(path, folder), weight) for path, weight in self.loras()),
        )


def _file_and_token(text: str) -> tuple[Path, str | None]:
    token, equals, file = text.partition("=")
    if Path(text).exists() or not equals:  # a name that is a file is not taken apart
        return Path(text), None
    return Path(file), token


def _file_and_weight(text: str) -> tuple[Path, float]:
    file, colon, number = text.rpartition(":")
    if Path(text).exists() or not colon:
        return Path(text), 1.0
    try:
        return Path(file), float(number)
    except ValueError:
        return Path(text), 1.0  # a drive of Windows, or a name that is not there


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every command takes that makes pictures."""

    settings: Sampled = Settings()
    model: Model = Model()
    output: Output = Output()  # noqa: RUF009
