"""What `minisd.load` gives: a latent diffusion model with the tasks as methods, with adapters, and `save`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.adapters.embeddings import add_embedding, load_embeddings
from minisd.adapters.lora import Lora, MergedLoras, load_lora
from minisd.checkpoints.load import Checkpoint, load_checkpoint, load_network
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ModelConfig, PredictionType
from minisd.diffusion.schedule import Schedule
from minisd.family.clip_vision import CLIPVision
from minisd.models.clip import CLIPText
from minisd.models.controlnet import ControlNet
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.pipeline import LatentDiffusion, build_schedule
from minisd.runtime.allocator import give_back_freed_memory
from minisd.runtime.offload import Offload, check_device
from minisd.runtime.optimize import optimize
from minisd.tasks import TASKS, Options
from minisd.tasks.options import function
from minisd.text.tokenizer import Tokenizer


class StableDiffusion(LatentDiffusion):
    """The networks of a latent diffusion model and what one asks of it: `sd.txt2img("a red apple")` and its sisters.

    They return PIL images at once. To watch or steer a sampling, iterate over `minisd.tasks.txt2img(sd, …)` and its
    sisters, which take the same options. Adapters change weights in place: no other thread may draw meanwhile.

    Made of networks: to build one by hand, give them. origin: what a file held besides them, kept for `save`.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: CLIPText,
        tokenizer: Tokenizer | None = None,
        schedule: Schedule | None = None,
        config: ModelConfig | None = None,
        *,
        vision_encoder: CLIPVision | None = None,
        origin: Checkpoint | None = None,
    ):
        vision = vision_encoder and vision_encoder.config
        parts: dict[str, Any] = {"unet": unet.config, "vae": vae.config, "text": text_encoder.config, "vision": vision}
        config = replace(config or ModelConfig(name="a model made of networks"), **parts)
        text = config.text
        tokenizer = tokenizer or Tokenizer(length=text.length, pad_id=text.pad_id, dialect=text.dialect)
        schedule = schedule or build_schedule(config.schedule)
        super().__init__(unet, vae, text_encoder, tokenizer, schedule, config)
        self.vision_encoder, self.origin = vision_encoder, origin
        self.offload: Offload | None = None
        self.loras = MergedLoras({"unet": self.unet, "text": self.text_encoder})

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StableDiffusion:
        """The model of a checkpoint that was loaded."""
        networks: dict[str, Any] = checkpoint.networks
        text = checkpoint.config.text
        tokenizer = Tokenizer(
            length=text.length, pad_id=text.pad_id, dialect=text.dialect, added_tokens=checkpoint.added_tokens
        )
        parts = networks["unet"], networks["vae"], networks["text"], tokenizer
        return cls(*parts, config=checkpoint.config, vision_encoder=networks.get("vision"), origin=checkpoint)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """By the names that files are told apart by: "unet", "vae", "text" and, where there is one, "vision"."""
        networks = {"unet": self.unet, "vae": self.vae, "text": self.text_encoder, "vision": self.vision_encoder}
        return {name: network for name, network in networks.items() if network is not None}

    @property
    def checkpoint(self) -> Checkpoint:
        """The model as a file would hold it."""
        origin = self.origin or Checkpoint(self.config, {}, {}, [], "its maker said so")
        tokens = self.tokenizer.added_tokens
        return replace(origin, config=self.config, networks=self.networks, added_tokens=tokens)

    @property
    def report(self) -> list[str]:
        """What loading read, chose and left out, a sentence a line."""
        return self.origin.report if self.origin else []

    @property
    def device(self) -> torch.device:
        return self.offload.device if self.offload else super().device

    def decode(self, latents: Tensor, *, vae_tiling: int | None = None) -> Tensor:
        give_back_freed_memory()  # the U-Net's blocks have other sizes than the VAE's
        return super().decode(latents, vae_tiling=vae_tiling)

    # ------------------------------------------------------------------------------------------------------- adapters

    def load_embedding(self, path: str | os.PathLike, token: str | None = None) -> list[str]:
        """Add the placeholders of a textual-inversion file and return them; any prompt takes them, `save` keeps them.

        token: its name here, in place of the one that the file, or the file's name, gives it. Layouts: those of
        `adapters.embeddings`. ValueError where the file is none, is for models of another width, or the token is
        taken or has a meaning of its own.
        """
        embeddings = load_embeddings(path)
        if token is not None:
            if len(embeddings) > 1:
                raise ValueError(f"{path} holds {len(embeddings)} tokens ({', '.join(embeddings)}): leave token= out")
            embeddings = dict(zip([token], embeddings.values(), strict=True))
        added: list[str] = []
        try:
            for name, vectors in embeddings.items():
                self.add_embedding(name, vectors)
                added.append(name)
        except ValueError as error:
            for name in added:
                self.tokenizer.remove_token(name)
            raise ValueError(f"{path}: {error}") from error
        return added

    def add_embedding(self, token: str, vectors: Tensor) -> list[int]:
        """Make `token` a placeholder for vectors 'n d', rows of the token embedding from now on, and return its ids."""
        self.unload()
        ids = add_embedding(self.tokenizer, self.text_encoder, token, vectors)
        self.config = replace(self.config, text=self.text_encoder.config)
        return ids

    def load_lora(self, path: str | os.PathLike, weight: float = 1.0) -> Lora:
        """Merge a LoRA file into the weights of U-Net and text encoder, W + weight · alpha/rank · up·down; return it.

        Several stack. The same path again replaces what it brought before, so that it is the way to another weight.
        `unmerge` restores the originals; until then `save` writes the weights as they are, LoRAs and all. Layouts,
        errors and the warning about unmatched tensors: see `adapters.lora.load_lora`.
        """
        self.unload()
        lora = load_lora(path, self.loras.networks)
        self.loras.merge(os.path.abspath(path), lora, weight)
        return lora

    def unmerge(self) -> None:
        """Take all LoRAs out again: every weight is what it was before, bit for bit. Without any, nothing happens."""
        self.unload()
        self.loras.unmerge()

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike, *, layout: Literal["ldm", "diffusers"] = "ldm") -> list[str]:
        """Write the model as one .safetensors file or a diffusers folder, all or nothing; says what was written."""
        self.unload()
        return save_checkpoint(self.checkpoint, path, layout=layout)

    def unload(self) -> None:
        """With offload, leave the device: before weights are changed, saved or counted."""
        if self.offload:
            self.offload.unload()


def _method(task: type[Options]) -> Callable[..., list[Image.Image]]:
    """The task as a method that returns all images of a call."""
    samplings = function(task)

    @wraps(samplings)
    def images(sd: StableDiffusion, *args: Any, **options: Any) -> list[Image.Image]:
        return [
            image
            for sampling in samplings(sd, *args, **options)
            if not sampling.is_draft
            for image in sampling.images()
        ]

    return images


for _task in TASKS.values():
    setattr(StableDiffusion, _task.name, _method(_task))


def load(
    path: str | os.PathLike | None = None,
    *,
    weights: Literal["raw", "ema"] = "raw",
    prediction: PredictionType | None = None,
    vae: str | os.PathLike | None = None,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: bool = False,
) -> StableDiffusion:
    """Load a model from a single file (.safetensors, .ckpt) or a diffusers folder; detected by content.

    path: None is the mini model. weights: "ema" takes the separate EMA copy of a full training file. prediction: what
    the U-Net's output means, where the file does not tell. vae: a file or folder whose VAE is taken instead. config:
    what the model is, for shapes that no official model has. dtype: None keeps the file's, but float16 on a CPU becomes
    float32, which is announced. offload: the networks stay in CPU memory, and each is copied to the device while it
    runs: slower, and only the largest must fit there. Nothing is fetched, and no code in a file is run.

    The networks' layers are the quick ones (`runtime.optimize`).
    """
    if offload:
        check_device(torch.device(device))
    promoted: set[torch.dtype] = set()
    checkpoint = load_checkpoint(
        mini_model() if path is None else path,
        weights=weights,
        prediction=prediction,
        vae=vae,
        config=config,
        cast=_cast(dtype, device, promoted),
        device="cpu" if offload else device,
    )
    if path is not None:
        _announce(promoted, path)
    sd = StableDiffusion.of(checkpoint)
    for network in sd.networks.values():
        optimize(network)
    if offload:
        sd.offload = Offload(device, sd.networks.values())
    return sd


def load_controlnet(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ControlNet:
    """A ControlNet 1.0 or 1.1 from a file or folder in either layout: control(x_t, t, cond, hint) → residuals."""
    promoted: set[torch.dtype] = set()
    control = load_network(path, "control", cast=_cast(dtype, device, promoted), device=device)
    _announce(promoted, path)
    return optimize(control)


def mini_model() -> Path:
    """Where the mini model lies: inside the installed package, or in the checkout."""
    package = Path(__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (file := folder / "mini.safetensors").is_file():
            return file
    raise ValueError("weights/mini.safetensors is missing: give the path of a checkpoint (see weights/README.md)")


def _cast(
    dtype: torch.dtype | None, device: str | torch.device, promoted: set[torch.dtype]
) -> Callable[[torch.dtype], torch.dtype]:
    """The dtype to load for each dtype of the file; notes in `promoted` those that nobody asked to change."""

    def cast(stored: torch.dtype) -> torch.dtype:
        if dtype is not None:
            return dtype
        if stored == torch.float16 and torch.device(device).type == "cpu":
            promoted.add(stored)
            return torch.float32
        return stored

    return cast


def _announce(promoted: set[torch.dtype], path: str | os.PathLike) -> None:
    if promoted:
        text = f"{path} holds float16, which a CPU is slow at: loaded as float32 (dtype= decides)"
        warnings.warn(text, stacklevel=3)
