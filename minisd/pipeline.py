"""A latent diffusion model: its networks, and the two ways through them, prompt → conditioning and latents → image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from minisd.config import TASK_INPUTS, ModelConfig, ScheduleConfig, Task
from minisd.diffusion.guidance import guided
from minisd.diffusion.prediction import Model, as_model
from minisd.diffusion.schedule import Schedule, Time, cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from minisd.diffusion.spacing import karras_sigmas, timesteps
from minisd.models.clip import CLIPText
from minisd.models.latents import decode_latents, encode_image
from minisd.models.nonfinite import nonfinite_error
from minisd.models.unet import Conditioning, UNet
from minisd.models.vae import VAE, DiagonalGaussian
from minisd.text.prompts import encode_prompts
from minisd.text.tokenizer import Tokenizer

CondNetwork = Callable[[Tensor, Time, Conditioning], Tensor]


class LatentDiffusion:
    """U-Net, VAE and text encoder with their tokenizer and schedule (Rombach et al. 2022): what the tasks work on.

    Made of networks; `minisd.load` makes a `minisd.StableDiffusion` of a file, which is this with the tasks as methods.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: CLIPText,
        tokenizer: Tokenizer,
        schedule: Schedule,
        config: ModelConfig,
    ):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule, self.config = tokenizer, schedule, config

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's. Latents stay float32 between its calls."""
        return self.unet.conv_in.weight.dtype

    def encode_prompt(
        self, prompts: str | Sequence[str], *, prompt_syntax: str = "plain", clip_skip: int | None = None
    ) -> Conditioning:
        """The context of prompts, as the U-Net takes it, 'b l d'. Warns of words that the model was never taught.

        prompt_syntax: how brackets and long prompts are read, see `text.prompts`. clip_skip: the last blocks of the
        text encoder to leave out; None is the model's own.
        """
        if unknown := self.unknown_words(prompts):
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"{self.config.name} was never taught {words}: nothing is drawn of it", stacklevel=2)

        def text_encoder(ids: Tensor) -> Tensor:
            return self.text_encoder(ids, skip=clip_skip)

        def encode() -> Tensor:
            return encode_prompts(text_encoder, self.tokenizer, prompts, syntax=prompt_syntax, device=self.device)

        with torch.no_grad():
            context = encode()
        if not context.isfinite().all():
            raise nonfinite_error("text encoder", self.text_encoder, encode)
        return Conditioning(context.to(self.dtype))

    def denoiser(
        self,
        cond: Conditioning,
        uncond: Conditioning | None = None,
        *,
        guidance_scale: float | Sequence[float] | Tensor = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        network: CondNetwork | None = None,
    ) -> Model:
        """The way from a network to a sampler: (x_t, t) → Prediction, guided, whatever the network predicts.

        cond, uncond: of the prompts and of the empty or negative ones; guidance_scale=1 needs no uncond. The guidance
        options are those of `diffusion.guidance.guided`. network: (x_t, t, cond) → what `config.prediction` says, in
        place of the U-Net itself: one that passes residuals on, a wrapped U-Net, an experiment.
        """
        if network is None:  # the U-Net alone is sure to want its own keys and values, the same at every step
            network = self.unet
            cond = self.unet.with_keys_values(cond)
            uncond = uncond and self.unet.with_keys_values(uncond)
        guided_network = guided(
            network,
            cond,
            uncond,
            guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
            dtype=self.dtype,
        )
        return as_model(guided_network, self.schedule, self.config.prediction)

    def encode(self, image: Tensor, *, vae_tiling: int | None = None) -> DiagonalGaussian:
        """The distribution of the latents 'b c h w' of images 'b 3 H W' in [-1, 1]; both in float32.

        vae_tiling: image rows per tile, 0 for none; None decides by the image's size.
        """
        return encode_image(self.vae, image.to(self.device), vae_tiling)

    def decode(self, latents: Tensor, *, vae_tiling: int | None = None) -> Tensor:
        """Images 'b 3 H W' in about [-1, 1], in float32, of latents 'b c h w'. vae_tiling: as above."""
        return decode_latents(self.vae, latents.to(self.device), vae_tiling)

    # What tasks ask before they begin

    def timesteps(self, steps: int, spacing: str = "leading", T: int | None = None) -> Sequence[Time]:
        """The timesteps to visit, descending, of the schedule's first T, of all by default.

        spacing: see `diffusion.spacing.timesteps`; "karras" is a σ schedule, whose timesteps are fractional.
        """
        T = self.schedule.num_timesteps if T is None else T
        if spacing != "karras":
            return [*timesteps(T, steps, spacing, offset=min(1, T - 1))]
        sigma_min, sigma_max = self.schedule.sigmas[[0, T - 1]].tolist()
        if math.isinf(sigma_max):
            raise ValueError("a karras ladder needs a finite σ, and zero terminal SNR has none: use spacing='trailing'")
        return self.schedule.t_from_sigma(karras_sigmas(steps, sigma_min, sigma_max)).tolist()

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The size asked for, or the model's own. ValueError where the VAE's factor does not divide it."""
        return self._side("height", height), self._side("width", width)

    def _side(self, name: str, side: int | None) -> int:
        side, factor = self.config.image_size if side is None else side, self.config.vae.factor
        if not isinstance(side, Integral):
            raise ValueError(f"{name} is {side!r}: give a whole number of pixels")
        if side < factor or side % factor:
            lower = max(side // factor * factor, factor)
            raise ValueError(
                f"{name} {side} is not a multiple of {factor} (the VAE's factor): use {lower} or {lower + factor}"
            )
        return int(side)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        vae = self.config.vae
        return vae.latent_channels, height // vae.factor, width // vae.factor

    def check_task(self, asked: str, *tasks: Task) -> None:
        """ValueError unless the model is made for one of these tasks; asked: what the user called."""
        if (task := self.config.task) in tasks:
            return
        if task == "inpainting":
            channels = self.config.unet.in_channels
            raise ValueError(f"{self.config.name} is an inpainting model ({channels} channels): use inpaint")
        raise ValueError(
            f"{asked} needs a model that takes a prompt and nothing more; {self.config.name} is made for {task} and "
            f"takes {TASK_INPUTS[task]}: call sd.denoiser with Conditioning(context, y=…, concat=…) yourself"
        )

    def unknown_words(self, prompts: str | Sequence[str]) -> list[str]:
        """The words of prompts that have no embedding of their own; only models of small vocabularies have such."""
        if (unknown_id := self.config.text.unknown_id) is None:
            return []
        words = {
            word: ids
            for text in ([prompts] if isinstance(prompts, str) else prompts)
            for word, ids in self.tokenizer.words(text)
            if any(map(str.isalnum, word))
        }

        def is_unknown(ids: Sequence[int]) -> bool:
            # called, not indexed: textual inversion may have put another module in place of the nn.Embedding
            row, *rows = self.text_encoder.token_embedding(torch.tensor([unknown_id, *ids], device=self.device))
            return any(torch.equal(row, own) for own in rows)

        return [word for word, ids in words.items() if is_unknown(ids)]


def build_schedule(config: ScheduleConfig) -> Schedule:
    T = config.num_timesteps
    if config.kind == "cosine":
        betas = cosine_betas(T)
    else:
        ends = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
        betas = ends[config.kind](T, config.start, config.end)
    return Schedule(zero_terminal_snr(betas) if config.zero_terminal_snr else betas, config.final_alpha_cumprod)
