"""`minisd bench txt2img`: whole pictures beside the peers' pipelines, and where the time of the command line goes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisd.bench.compare import compare
from minisd.bench.options import Pictures
from minisd.bench.process import Run
from minisd.bench.report import Report, markdown
from minisd.bench.startup import startup
from minisd.bench.unet import Step
from minisd.bench.vae import Coding
from minisd.config import SD1, ModelConfig

PROMPT = "a red apple on a blue table"


@dataclass(frozen=True)
class Picture:
    """`batch` pictures of one prompt: text encoder, `steps` guided DDIM steps, decoder."""

    config: ModelConfig
    size: int
    batch: int
    steps: int
    dtype: str
    device: str = "cpu"

    @property
    def label(self) -> dict[str, int]:
        return {"size": self.size, "batch": self.batch, "steps": self.steps}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def latents(self) -> Tensor:
        """x_T 'b c h w', float32: the same in every process."""
        vae, side = self.config.vae, self.size // self.config.vae.factor
        shape = (self.batch, vae.latent_channels, side, side)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def flop(self) -> int:
        """Of the steps and the decoder; the text encoder does less than a thousandth."""
        step = Step(self.config, self.size, self.batch, self.dtype).flop()
        return self.steps * step + Coding(self.config, "decode", self.size, self.batch, self.dtype).flop()


def minisd(folder: Path, picture: Picture) -> Run:
    from minisd.stable_diffusion import load
    from minisd.tasks import txt2img

    sd, latents = load(folder, dtype=picture.torch_dtype, device=picture.device), picture.latents()
    size = picture.size

    def run() -> Tensor:
        (sampling,) = txt2img(
            sd,
            PROMPT,
            num_images=picture.batch,
            height=size,
            width=size,
            latents=latents,
            steps=picture.steps,
            batch_size=picture.batch,
        )
        return (sampling.pixels() / 2 + 0.5).clamp(0, 1)

    return run


def diffusers(folder: Path, picture: Picture) -> Run:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=picture.torch_dtype).to(picture.device)
    pipeline.set_progress_bar_config(disable=True)
    latents, size = picture.latents().to(picture.torch_dtype), picture.size
    options = {"height": size, "width": size, "num_inference_steps": picture.steps, "output_type": "pt"}
    return lambda: pipeline(PROMPT, num_images_per_prompt=picture.batch, latents=latents, **options).images


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_txt2img(
    options: Pictures, config: ModelConfig = SD1, *, steps: int = 20, checkpoint: Path | None = None
) -> Report:
    """Seconds of whole pictures of a random model of the official size, model loaded; then the start-up's breakdown.

    checkpoint: whose whole `minisd txt2img` is taken apart; the mini model when None, and nothing where there is none.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    cases = [
        Picture(config, size, batch, steps, options.dtype, options.device) for size, batch in options.cases(config)
    ]
    what = f"pictures of {config.name}, random weights, DDIM, guided"
    report = compare("txt2img", what, CONTENDERS, cases, options, float32_distance=1 / 255)
    report.notes.append(startup_note(checkpoint, options.pairs))
    return report


def startup_note(checkpoint: Path | None, runs: int) -> str:
    """The breakdown of a whole `minisd txt2img` as a table under a line of text."""
    try:
        parts = startup(checkpoint, PROMPT, runs)
    except ValueError as error:
        return f"The start-up was not measured: {error}"
    row = {name: f"{seconds:.2f}" for name, seconds in parts.items()}
    name = f"`{checkpoint.name}`" if checkpoint else "the mini model"
    return f"`minisd txt2img` with {name}, whole process, seconds (medians of {runs}):\n\n{markdown([row])}"
