"""Options that several commands share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from minisd.pipeline import CondNetwork
    from minisd.provenance.call import LoadedModel
    from minisd.stable_diffusion import StableDiffusion

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DType = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]


@Parameter(name="*", group=Group("Model", sort_key=2))
@dataclass(frozen=True)
class Model:
    """Which model draws, and how it is loaded.

    Attributes:
        checkpoint: .safetensors or .ckpt file, or diffusers folder; the mini model when left out
        weights: raw, or the separate EMA weights that full training checkpoints carry
        prediction: prediction type of the U-Net (eps, v or x_0), where the file does not tell it
        vae: file or folder of another VAE to decode with
        dtype: precision of the weights; the file's own when left out (float16 becomes float32 on a CPU)
        device: cpu, cuda, cuda:1, mps …
        offload: sequential CPU offload, one network on the GPU at a time: slower, less memory (not run on a GPU yet)
        cuda_graph: replay the denoising step as a CUDA graph: the same images, fewer launches (not run on a GPU yet)
        embedding: textual-inversion embedding to load, FILE or TOKEN=FILE; may be repeated
        lora: LoRA to merge into the weights, FILE or FILE:WEIGHT (1 by default); may be repeated
    """

    checkpoint: Path | None = None
    weights: Literal["raw", "ema"] = "raw"
    prediction: Literal["eps", "v", "x_0"] | None = None
    vae: Path | None = None
    dtype: DType | None = None
    device: str = "cpu"
    offload: bool = False
    cuda_graph: bool = False
    embedding: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "dtype", DTYPES.get(self.dtype, self.dtype))

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
        print("\n".join(sd.report[:3]), file=sys.stderr)
        for path, token in self.embeddings():
            print(f"{path}: adds {', '.join(sd.load_embedding(path, token))}", file=sys.stderr)
        for path, weight in self.loras():
            print(f"{path}: {len(sd.load_lora(path, weight))} layers changed, weight {weight:g}", file=sys.stderr)
        return sd

    def network(self, sd: StableDiffusion) -> CondNetwork | None:
        """What a task takes as its network: the U-Net's own when None."""
        from minisd.runtime.cuda_graph import CUDAGraph

        return CUDAGraph(sd.unet) if self.cuda_graph else None

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
        if self.cuda_graph and self.offload:
            raise ValueError("a CUDA graph holds the addresses of weights, which offload changes: choose one of them")
        if self.cuda_graph:
            cuda_graph.check_device(device)
        if self.offload:
            offload.check_device(device)

    def record(self, folder: Path) -> LoadedModel:
        """How an image in this folder remembers the model."""
        from minisd.provenance.call import EmbeddingFile, LoadedModel, LoraFile
        from minisd.provenance.files import remember_checkpoint, remember_input
        from minisd.stable_diffusion import mini_model

        return LoadedModel(
            remember_checkpoint(self.checkpoint or mini_model(), folder),
            self.vae and remember_checkpoint(self.vae, folder),
            weights=self.weights,
            prediction=self.prediction,
            dtype=self.dtype,
            device=self.device,
            embeddings=tuple(EmbeddingFile(remember_input(path, folder), token) for path, token in self.embeddings()),
            loras=tuple(LoraFile(remember_input(path, folder), weight) for path, weight in self.loras()),
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
