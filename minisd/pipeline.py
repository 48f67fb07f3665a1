"""Stable Diffusion as one object: load it, ask it for pictures, take it apart, save it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from minisd import tasks
from minisd.adapters.embeddings import add_embedding, load_embeddings
from minisd.adapters.lora import Lora, MergedLoras, load_lora
from minisd.checkpoints.load import Checkpoint, load_checkpoint, load_network
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ModelConfig, Prediction, ScheduleConfig, Settings
from minisd.diffusion.guidance import guided
from minisd.diffusion.prediction import Model, from_v, from_x_0
from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from minisd.diffusion.spacing import karras_sigmas, timesteps
from minisd.models.controlnet import ControlNet
from minisd.models.unet import Conditioning
from minisd.runtime.cuda_graph import Graphed
from minisd.runtime.offload import Offload, check_device
from minisd.runtime.tuning import tune
from minisd.tasks.nonfinite import nonfinite_error
from minisd.tasks.options import task_options
from minisd.tasks.sampling import Sampling
from minisd.text.prompts import encode_prompts
from minisd.text.tokenizer import Tokenizer


class StableDiffusion:
    """The networks of a latent diffusion model and what they need: tokenizer, schedule, config.

    `txt2img` and its sisters return pictures at once. To watch or steer a sampling, iterate over `minisd.tasks.txt2img`
    and its sisters, which take the same arguments after the model.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        networks = checkpoint.networks
        self.unet, self.vae, self.text_encoder = networks["unet"], networks["vae"], networks["text"]
        self.vision_encoder = networks.get("vision")
        text = self.config.text
        self.tokenizer = Tokenizer(
            length=text.length, pad_id=text.pad_id, dialect=text.dialect, added_tokens=checkpoint.added_tokens
        )
        self.schedule = build_schedule(self.config.schedule)
        self.offload: Offload | None = None  # Offload(device): one network at a time is there (tasks/offload.py)
        self.cuda_graph = False  # True: record each sampling's step as a CUDA graph and replay it (tasks/cuda_graph.py)
        self.loras = MergedLoras({"unet": self.unet, "text": self.text_encoder})

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def report(self) -> list[str]:
        """What loading found, chose and left out, a sentence a line."""
        return self.checkpoint.report

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.offload.device if self.offload else self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's. Latents stay float32 between its calls."""
        return self.unet.conv_in.weight.dtype

    # ------------------------------------------------------------------------------------------------------- tasks

    def txt2img(self, prompt: str | Sequence[str], **options) -> list[Image.Image]:
        """Pictures of a prompt. options: those of `tasks.txt2img`, and the fields of `Settings`, by name."""
        return _pictures(tasks.txt2img, self, prompt, options=options)

    def img2img(self, prompt: str | Sequence[str], image: Image.Image, **options) -> list[Image.Image]:
        """Pictures after a picture. options: those of `tasks.img2img`, and the fields of `Settings`, by name."""
        return _pictures(tasks.img2img, self, prompt, image, options=options)

    def inpaint(
        self, prompt: str | Sequence[str], image: Image.Image, mask: Image.Image, **options
    ) -> list[Image.Image]:
        """A picture repainted where the mask is white. options: as above, of `tasks.inpaint`."""
        return _pictures(tasks.inpaint, self, prompt, image, mask, options=options)

    def outpaint(self, prompt: str | Sequence[str], image: Image.Image, **options) -> list[Image.Image]:
        """A picture painted on beyond its edges. options: as above, of `tasks.outpaint`."""
        return _pictures(tasks.outpaint, self, prompt, image, options=options)

    # ----------------------------------------------------------------------------- the parts that tasks are made of

    def encode_prompt(self, prompts: str | Sequence[str], settings: Settings | None = None) -> Conditioning:
        """The context of prompts as the U-Net wants it, 'b l d'. Warns of words that the model was never taught."""
        settings = settings or Settings()
        self.bring(self.text_encoder)
        if unknown := self.unknown_words(prompts):
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"{self.config.name} was never taught {words}: nothing is drawn of it", stacklevel=2)

        def text_encoder(ids: Tensor) -> Tensor:
            return self.text_encoder(ids, skip=settings.clip_skip)

        def encode() -> Tensor:
            return encode_prompts(
                text_encoder, self.tokenizer, prompts, convention=settings.convention, device=self.device
            )

        with torch.no_grad():
            context = encode()
        if not context.isfinite().all():
            raise nonfinite_error("text encoder", self.text_encoder, encode)
        return Conditioning(context.to(self.dtype))

    def unknown_words(self, prompts: str | Sequence[str]) -> list[str]:
        """The words of prompts that have no embedding of their own; only models of small vocabularies have such."""
        if (unknown_id := self.config.text.unknown_id) is None:
            return []
        self.bring(self.text_encoder)
        words = {
            word: ids
            for text in ([prompts] if isinstance(prompts, str) else prompts)
            for word, ids in self.tokenizer.words(text)
            if any(map(str.isalnum, word))
        }

        def is_unknown(ids: list[int]) -> bool:
            # asked for, not read: a training may have put another module in the table's place
            row, *rows = self.text_encoder.token_embedding(torch.tensor([unknown_id, *ids], device=self.device))
            return any(torch.equal(row, own) for own in rows)

        return [word for word, ids in words.items() if is_unknown(ids)]

    def guided_model(self, cond: Conditioning, uncond: Conditioning | None, settings: Settings) -> Model:
        """The U-Net as a sampler's model (x_t, t): guided, and ε, v or x_0 told apart."""
        tune(self.unet, self.device)
        if self.cuda_graph and self.offload:
            raise ValueError("a CUDA graph holds the addresses of weights, which offload changes: choose one of them")
        network = guided(
            Graphed(self.run_unet, self.unet) if self.cuda_graph else self.run_unet,
            cond,
            uncond,
            settings.guidance_scale,
            rescale=settings.guidance_rescale,
            interval=settings.guidance_interval,
        )
        wrap = {"eps": lambda network, _: network, "v": from_v, "x_0": from_x_0}[self.config.prediction]
        return wrap(network, self.schedule)

    def run_unet(self, x_t: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """unet(x_t, t, cond) in the U-Net's dtype, between float32 latents."""
        return self.bring(self.unet)(x_t.to(self.dtype), t, cond).to(x_t.dtype)

    def bring(self, network: nn.Module) -> nn.Module:
        """The same network, now on the device that it runs on; with offload all others leave it."""
        if self.offload:
            self.offload.bring(network)
        return network

    def rest(self) -> None:
        """With offload, let no network be on the device: before weights are changed, saved or counted."""
        if self.offload:
            self.offload.rest()

    def timesteps(self, settings: Settings, T: int | None = None) -> list:
        """The falling times to visit of the schedule's first T, of all by default."""
        T = self.schedule.num_timesteps if T is None else T
        if settings.spacing != "karras":
            return timesteps(T, settings.steps, settings.spacing, offset=min(1, T - 1))
        least, most = self.schedule.sigmas[[0, T - 1]].tolist()
        if math.isinf(most):
            raise ValueError("a karras ladder needs a finite σ, and zero terminal SNR has none: use spacing='trailing'")
        return self.schedule.t_from_sigma(karras_sigmas(settings.steps, least, most)).tolist()

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, or the model's own. ValueError where the VAE's factor does not divide it."""
        sides = {"height": height, "width": width}
        for name, side in sides.items():
            side = self.config.image_size if side is None else side
            factor = self.config.vae.factor
            if not isinstance(side, Integral):
                raise ValueError(f"{name} is {side!r}: give a whole number of pixels")
            if side < factor or side % factor:
                lower = max(side // factor * factor, factor)
                raise ValueError(
                    f"{name} {side} is not a multiple of {factor} (the VAE's factor): use {lower} or {lower + factor}"
                )
            sides[name] = side
        return sides["height"], sides["width"]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        vae = self.config.vae
        return vae.latent_channels, height // vae.factor, width // vae.factor

    @property
    def is_inpainting_model(self) -> bool:
        """Whether the U-Net takes, after x_t, a mask and the latents of what it does not cover."""
        return self.config.unet.in_channels == 2 * self.config.vae.latent_channels + 1

    def check_plain(self, task: str) -> None:
        """ValueError where the U-Net wants more than noise, time and prompt."""
        unet, latents = self.config.unet, self.config.vae.latent_channels
        if self.is_inpainting_model:
            raise ValueError(f"{self.config.name} is an inpainting model ({unet.in_channels} channels): use inpaint")
        if unet.in_channels != latents or unet.num_classes is not None or unet.vector_dim is not None:
            raise ValueError(
                f"{task} needs a model that takes {latents} latent channels and a prompt; {self.config.name} wants a "
                "depth map, a picture or an embedding too: call sd.unet yourself, with Conditioning(y=…, concat=…)"
            )

    # ------------------------------------------------------------------------------------------------------- adapters

    def load_embedding(self, path: str | os.PathLike, token: str | None = None) -> list[str]:
        """Add the placeholders of a textual-inversion file and return them; any prompt takes them, `save` keeps them.

        token: its name here, in place of the one that the file, or the file's name, gives it. Layouts: those of
        `checkpoints.embeddings`. ValueError where the file is none, is for models of another width, or the token is
        taken or has a meaning of its own.
        """
        embeddings = load_embeddings(path)
        if token is not None:
            if len(embeddings) > 1:
                raise ValueError(f"{path} holds {len(embeddings)} tokens ({', '.join(embeddings)}): leave token= out")
            embeddings = dict(zip([token], embeddings.values(), strict=True))
        added = []
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
        self.rest()
        ids = add_embedding(self.tokenizer, self.text_encoder, token, vectors)
        self.checkpoint.config = replace(self.config, text=self.text_encoder.config)
        return ids

    def load_lora(self, path: str | os.PathLike, weight: float = 1.0) -> Lora:
        """Merge a LoRA file into the weights of U-Net and text encoder, W + weight · alpha/rank · up·down; return it.

        Several stack. The same path again replaces what it brought before, so that it is the way to another weight.
        `unmerge` restores the originals; until then `save` writes the weights as they are, LoRAs and all. Layouts,
        errors and the warning about unmatched tensors: see `checkpoints.lora.load_lora`.
        """
        self.rest()
        lora = load_lora(path, self.loras.networks)
        self.loras.merge(os.path.abspath(path), lora, weight)
        return lora

    def unmerge(self) -> None:
        """Take all LoRAs out again: every weight is what it was before, bit for bit. Without any, nothing happens."""
        self.rest()
        self.loras.unmerge()

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike, *, layout: Literal["ldm", "diffusers"] = "ldm") -> list[str]:
        """Write the model as one .safetensors file or a diffusers folder, all or nothing; says what was written."""
        self.rest()
        self.checkpoint.added_tokens = self.tokenizer.added_tokens
        return save_checkpoint(self.checkpoint, path, layout=layout)


def _pictures(task: Callable[..., Iterator[Sampling]], *args, options: dict) -> list[Image.Image]:
    samplings = task(*args, **task_options(task, options))
    return [image for sampling in samplings if not sampling.is_draft for image in sampling.images()]


def load(
    path: str | os.PathLike | None = None,
    *,
    weights: Literal["raw", "ema"] = "raw",
    prediction: Prediction | None = None,
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
    runs: slower, and only the largest must fit there; tasks see to it, loops of your own call `sd.bring(network)`.
    Nothing is fetched, and no code in a file is run.
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
    sd = StableDiffusion(checkpoint)
    sd.offload = Offload(device) if offload else None
    return sd


def load_controlnet(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ControlNet:
    """A ControlNet 1.0 or 1.1 from a file or folder in either layout: control(x_t, t, cond, hint) → residuals."""
    promoted: set[torch.dtype] = set()
    control = load_network(path, "control", cast=_cast(dtype, device, promoted), device=device)
    _announce(promoted, path)
    return control


def mini_model() -> Path:
    """Where the mini model lies: inside the installed package, or in the checkout."""
    package = Path(__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (found := folder / "mini.safetensors").is_file():
            return found
    raise ValueError("weights/mini.safetensors is missing: give the path of a checkpoint (see weights/README.md)")


def build_schedule(config: ScheduleConfig) -> Schedule:
    T = config.num_timesteps
    betas = {
        "scaled_linear": lambda: scaled_linear_betas(T, config.start, config.end),
        "linear": lambda: linear_betas(T, config.start, config.end),
        "cosine": lambda: cosine_betas(T),
    }[config.kind]()
    return Schedule(zero_terminal_snr(betas) if config.zero_terminal_snr else betas, config.final_alpha_cumprod)


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
