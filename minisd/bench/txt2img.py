"""`minisd bench txt2img`: whole images beside the peers' pipelines, and where the command line spends its time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisd.bench.compare import compare
from minisd.bench.options import ImageBenchOptions
from minisd.bench.process import Run
from minisd.bench.report import BenchReport, markdown
from minisd.bench.startup import startup
from minisd.bench.unet import GuidedStep
from minisd.bench.vae import VAEPass
from minisd.config import SD1, ModelConfig

PROMPT = "a red apple on a blue table"


@dataclass(frozen=True)
class TextToImage:
    """`batch` images of one prompt: text encoder, `steps` DDIM steps with CFG, decoder."""

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
        """Of the steps and the decoder; the text encoder adds less than a thousandth."""
        step = GuidedStep(self.config, self.size, self.batch, self.dtype).flop()
        return self.steps * step + VAEPass(self.config, "decode", self.size, self.batch, self.dtype).flop()


def minisd(folder: Path, case: TextToImage) -> Run:
    from minisd.stable_diffusion import load
    from minisd.tasks import txt2img

    sd, latents = load(folder, dtype=case.torch_dtype, device=case.device), case.latents()
    options = {"num_images": case.batch, "batch_size": case.batch, "steps": case.steps}

    def run() -> Tensor:
        (sampling,) = txt2img(sd, PROMPT, height=case.size, width=case.size, latents=latents, **options)
        return (sampling.pixels() / 2 + 0.5).clamp(0, 1)

    return run


def diffusers(folder: Path, case: TextToImage) -> Run:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=case.torch_dtype).to(case.device)
    pipeline.set_progress_bar_config(disable=True)
    latents, size = case.latents().to(case.torch_dtype), case.size
    options = {"height": size, "width": size, "num_inference_steps": case.steps, "output_type": "pt"}
    return lambda: pipeline(PROMPT, num_images_per_prompt=case.batch, latents=latents, **options).images


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_txt2img(
    options: ImageBenchOptions, config: ModelConfig = SD1, *, steps: int = 20, checkpoint: Path | None = None
) -> BenchReport:
    """Seconds of whole images by a random model of the official size, once loaded; then the start-up's breakdown.

    checkpoint: with which `minisd txt2img` is profiled as a whole process; the mini model when None.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    cases = [
        TextToImage(config, size, batch, steps, options.dtype, options.device) for size, batch in options.cases(config)
    ]
    what = f"images by {config.name}, random weights, DDIM with CFG"
    report = compare("txt2img", what, CONTENDERS, cases, options, float32_error=1 / 255)
    report.notes.append(startup_note(checkpoint, options.pairs))
    return report


def startup_note(checkpoint: Path | None, runs: int) -> str:
    """Where a whole `minisd txt2img` process spends its time, as a table under a line of text."""
    try:
        phases = startup(checkpoint, PROMPT, runs)
    except ValueError as error:
        return f"The start-up was not measured: {error}"
    row = {name: f"{seconds:.2f}" for name, seconds in phases.items()}
    name = f"`{checkpoint.name}`" if checkpoint else "the mini model"
    return f"`minisd txt2img` with {name}, whole process, seconds (medians of {runs}):\n\n{markdown([row])}"
