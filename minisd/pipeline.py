"""Stable Diffusion as one object: load it, ask it for pictures, take it apart, save it."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from minisd import tasks
from minisd.checkpoints.load import Checkpoint, load_checkpoint, load_network
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ModelConfig, Prediction, ScheduleConfig, Settings
from minisd.diffusion.guidance import guided
from minisd.diffusion.prediction import Model, from_v, from_x_0
from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from minisd.diffusion.spacing import karras_sigmas
from minisd.models.controlnet import ControlNet
from minisd.models.tiling import tiled_decode, tiled_encode
from minisd.models.tokenizer import Tokenizer
from minisd.models.unet import Conditioning
from minisd.prompts import encode_prompts
from minisd.tasks.sampling import Noise, NonFiniteError, Sampling, explain_nonfinite, first_nonfinite_layer

TILE_ABOVE = 1024 * 1024  # pixels; the untiled decoder needs some 4 kB of memory for each in float32


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

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def report(self) -> list[str]:
        """What loading found, chose and left out, a sentence a line."""
        return self.checkpoint.report

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's. Latents stay float32 between its calls."""
        return self.unet.conv_in.weight.dtype

    # ------------------------------------------------------------------------------------------------------- tasks

    def txt2img(self, prompt: str | Sequence[str], **options) -> list[Image.Image]:
        """Pictures of a prompt. options: those of `tasks.txt2img`, and the fields of `Settings` by name."""
        return self._images(tasks.txt2img, prompt, **options)

    def img2img(self, prompt: str | Sequence[str], image: Image.Image, **options) -> list[Image.Image]:
        """Pictures after a picture. options: those of `tasks.img2img`, and the fields of `Settings` by name."""
        return self._images(tasks.img2img, prompt, image, **options)

    def inpaint(
        self, prompt: str | Sequence[str], image: Image.Image, mask: Image.Image, **options
    ) -> list[Image.Image]:
        """A picture repainted where the mask is white. options: as above, of `tasks.inpaint`."""
        return self._images(tasks.inpaint, prompt, image, mask, **options)

    def outpaint(self, prompt: str | Sequence[str], image: Image.Image, **options) -> list[Image.Image]:
        """A picture painted on beyond its edges. options: as above, of `tasks.outpaint`."""
        return self._images(tasks.outpaint, prompt, image, **options)

    def _images(self, task, *args, **options) -> list[Image.Image]:
        """Split the options into the task's own and `Settings`, whose constructors refuse what neither knows."""
        names = Settings.__dataclass_fields__.keys() & options.keys()
        if names and "settings" in options:
            raise ValueError(f"give {', '.join(sorted(names))} inside settings, or leave settings out")
        if names:
            options = {k: v for k, v in options.items() if k not in names} | {
                "settings": Settings(**{name: options[name] for name in names})
            }
        samplings: Iterable[Sampling] = task(self, *args, **options)
        return [image for sampling in samplings for image in sampling.images() if not sampling.is_draft]

    # ----------------------------------------------------------------------------- the parts that tasks are made of

    def encode_prompt(self, prompts: str | Sequence[str], settings: Settings | None = None) -> Conditioning:
        """The context of prompts as the U-Net wants it, 'b l d'."""
        settings = settings or Settings()

        def text_encoder(ids: Tensor) -> Tensor:
            return self.text_encoder(ids, skip=settings.clip_skip)

        with torch.no_grad():
            context = encode_prompts(
                text_encoder, self.tokenizer, prompts, convention=settings.convention, device=self.device
            )
        return Conditioning(context.to(self.dtype))

    def guided_model(self, cond: Conditioning, uncond: Conditioning | None, settings: Settings) -> Model:
        """The U-Net as a sampler's model (x_t, t): guided, and ε, v or x_0 told apart."""
        network = guided(
            self.run_unet,
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
        return self.unet(x_t.to(self.dtype), t, cond).to(x_t.dtype)

    def timesteps(self, settings: Settings) -> list:
        if settings.spacing != "karras":
            return self.schedule.timesteps(settings.steps, settings.spacing)
        sigmas = self.schedule.sigmas
        ladder = karras_sigmas(settings.steps, sigmas[0].item(), sigmas[-1].item())
        return self.schedule.t_from_sigma(ladder).tolist()

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, or the model's own. ValueError where the VAE's factor does not divide it."""
        sides = {"height": height, "width": width}
        for name, side in sides.items():
            side = self.config.image_size if side is None else side
            factor = self.config.vae.factor
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

    def encode_image(self, image: Tensor, noise: Noise, settings: Settings) -> Tensor:
        """Latents 'b c h w' of an image 'b 3 H W' in [-1, 1], sampled with each image's own noise, float32."""
        vae = self.vae
        weight = vae.quant_conv.weight
        image = image.to(weight.device, weight.dtype)
        with torch.no_grad():
            if rows := self._stripe_rows(image.shape[-2] * image.shape[-1], settings):
                posterior = tiled_encode(vae, image, rows=rows)
            else:
                posterior = vae.encode(image)
        mean, std = posterior.mean.float(), posterior.std.float()
        latents = mean + std * noise(mean)
        if not latents.isfinite().all():
            where = first_nonfinite_layer(vae, lambda: vae.encode(image))
            raise NonFiniteError(explain_nonfinite("VAE's encoder", where, "for this picture", weight.dtype))
        return latents

    def decode_latents(self, latents: Tensor, settings: Settings) -> Tensor:
        """Images 'b 3 H W' in about [-1, 1] of latents; a half-precision VAE that fails is run again in float32."""
        images = self._decode(self.vae, latents, settings)
        if images.isfinite().all():
            return images
        dtype = self.vae.quant_conv.weight.dtype
        if dtype != torch.float32:
            warnings.warn(f"the VAE gave NaN in {dtype}: decoding again in float32", stacklevel=2)
            images = self._decode(copy.deepcopy(self.vae).float(), latents, settings)
        if not images.isfinite().all():
            weight = self.vae.quant_conv.weight
            where = first_nonfinite_layer(self.vae, lambda: self.vae.decode(latents.to(weight)))
            raise NonFiniteError(explain_nonfinite("VAE's decoder", where, "for these latents", torch.float32))
        return images

    def _decode(self, vae: nn.Module, latents: Tensor, settings: Settings) -> Tensor:
        latents = latents.to(vae.quant_conv.weight)
        pixels = latents.shape[-2] * latents.shape[-1] * self.config.vae.factor**2
        with torch.no_grad():
            if rows := self._stripe_rows(pixels, settings):
                return tiled_decode(vae, latents, rows=rows).float()
            return vae.decode(latents).float()

    def _stripe_rows(self, pixels: int, settings: Settings) -> int:
        """How many rows a stripe of the VAE has; 0 runs it whole."""
        if settings.tile is None:
            return 64 if pixels > TILE_ABOVE else 0
        return settings.tile

    def check_plain(self, task: str) -> None:
        """ValueError where the U-Net wants more than noise, time and prompt."""
        unet, latents = self.config.unet, self.config.vae.latent_channels
        if unet.in_channels == 2 * latents + 1:
            raise ValueError(f"{self.config.name} is an inpainting model ({unet.in_channels} channels): use inpaint")
        if unet.in_channels != latents or unet.num_classes is not None or unet.vector_dim is not None:
            raise ValueError(
                f"{task} needs a model that takes {latents} latent channels and a prompt; {self.config.name} wants a "
                "depth map, a picture or an embedding too: call sd.unet yourself, with Conditioning(y=…, concat=…)"
            )

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | os.PathLike, *, layout: Literal["ldm", "diffusers"] = "ldm") -> list[str]:
        """Write the model as one .safetensors file or a diffusers folder, all or nothing; says what was written."""
        self.checkpoint.added_tokens = self.tokenizer.added_tokens
        return save_checkpoint(self.checkpoint, path, layout=layout)


def load(
    path: str | os.PathLike | None = None,
    *,
    weights: Literal["raw", "ema"] = "raw",
    prediction: Prediction | None = None,
    vae: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> StableDiffusion:
    """Load a model from a single file (.safetensors, .ckpt) or a diffusers folder; detected by content.

    path: None is the mini model. weights: "ema" takes the separate EMA copy of a full training file. prediction: what
    the U-Net's output means, where the file does not tell. vae: a file or folder whose VAE is taken instead. dtype:
    None keeps the file's, but float16 on a CPU becomes float32, which is announced. Nothing is fetched, and no code in
    a file is run.
    """
    if path is None:
        path = mini_model()
    cast = _cast(dtype, device, path)
    checkpoint = load_checkpoint(path, weights=weights, prediction=prediction, vae=vae, cast=cast, device=device)
    return StableDiffusion(checkpoint)


def load_controlnet(
    path: str | os.PathLike, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> ControlNet:
    """A ControlNet 1.0 or 1.1 from a file or folder in either layout: control(x_t, t, cond, hint) → residuals."""
    return load_network(path, "control", cast=_cast(dtype, device, path), device=device)


def mini_model() -> Path:
    """Where the mini model lies: inside the installed package, or in the checkout."""
    package = Path(__file__).parent
    for folder in (package / "weights", package.parent / "weights"):
        if (found := folder / "mini.safetensors").is_file():
            return found
    raise ValueError("the mini model has not been trained yet: give the path of a checkpoint (see weights/README.md)")


def build_schedule(config: ScheduleConfig) -> Schedule:
    T = config.num_timesteps
    betas = {
        "scaled_linear": lambda: scaled_linear_betas(T, config.start, config.end),
        "linear": lambda: linear_betas(T, config.start, config.end),
        "cosine": lambda: cosine_betas(T),
    }[config.kind]()
    return Schedule(zero_terminal_snr(betas) if config.zero_terminal_snr else betas, config.final_alpha_cumprod)


def _cast(dtype: torch.dtype | None, device: str | torch.device, path):
    """The dtype to load for each dtype of the file."""
    if dtype is not None:
        return lambda _: dtype
    if torch.device(device).type != "cpu":
        return lambda stored: stored
    announced = []

    def cast(stored: torch.dtype) -> torch.dtype:
        if stored == torch.float16 and not announced:
            announced.append(stored)
            warnings.warn(
                f"{path} holds float16, which a CPU is slow at: loaded as float32 (dtype= decides)", stacklevel=6
            )
        return torch.float32 if stored == torch.float16 else stored

    return cast
