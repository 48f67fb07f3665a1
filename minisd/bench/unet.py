"""`minisd bench unet`: one denoising step of the U-Net with CFG, beside the peers' U-Nets with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minisd.bench import peers
from minisd.bench.compare import compare
from minisd.bench.machine import flop
from minisd.bench.options import ImageBenchOptions
from minisd.bench.process import Run
from minisd.bench.report import BenchReport
from minisd.checkpoints.building import on_meta
from minisd.checkpoints.load import load_network
from minisd.config import SD1, ModelConfig
from minisd.models.unet import Conditioning
from minisd.runtime.optimize import optimize


@dataclass(frozen=True)
class GuidedStep:
    """A step with CFG of `batch` images, each of which goes through the U-Net with its prompt and without."""

    config: ModelConfig
    size: int
    batch: int
    dtype: str
    device: str = "cpu"

    @property
    def label(self) -> dict[str, int]:
        return {"size": self.size, "batch": self.batch}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def flop(self) -> int:
        unet = on_meta("unet", self.config.unet)
        for attention in unet.attentions().values():
            attention.impl = "naive"  # whose matrix products the counter sees
        x_t, t, context = replace(self, dtype="float32", device="meta").inputs()
        return flop(lambda: unet(x_t, t, Conditioning(context)))

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_t '2b c h w', t '2b', context '2b l d': the same in every process."""
        unet, side, generator = self.config.unet, self.size // self.config.vae.factor, torch.Generator().manual_seed(0)
        x_t = torch.randn(2 * self.batch, unet.in_channels, side, side, generator=generator)
        context = torch.randn(2 * self.batch, self.config.text.length, unet.context_dim, generator=generator)
        t = torch.full((2 * self.batch,), 500, device=self.device)
        return x_t.to(self.device, self.torch_dtype), t, context.to(self.device, self.torch_dtype)


def minisd(folder: Path, step: GuidedStep) -> Run:
    unet = load_network(folder, "unet", cast=lambda _: step.torch_dtype, device=step.device)
    optimize(unet)  # as `load` does
    x_t, t, context = step.inputs()
    cond = unet.with_keys_values(Conditioning(context))  # once for a whole sampling
    return lambda: unet(x_t, t, cond)


def diffusers(folder: Path, step: GuidedStep) -> Run:
    unet = _diffusers_unet(folder, step)
    x_t, t, context = step.inputs()
    return lambda: unet(x_t, t, context).sample


def diffusers_compiled(folder: Path, step: GuidedStep) -> Run:
    unet = torch.compile(_diffusers_unet(folder, step))
    x_t, t, context = step.inputs()
    return lambda: unet(x_t, t, context).sample


def openvino(folder: Path, step: GuidedStep) -> Run:
    inputs = step.inputs()
    x_t, t, context = (x.float() for x in inputs)  # OpenVINO takes float32 and computes in the precision of its hint

    class Sample(nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = _diffusers_unet(folder, step, torch.float32)

        def forward(self, x_t, t, context):
            return self.unet(x_t, t, context, return_dict=False)[0]

    run = peers.compiled_by_openvino(Sample(), (x_t, t, context), step.dtype)
    return lambda: run(x_t, t, context)


def _diffusers_unet(folder: Path, step: GuidedStep, dtype: torch.dtype | None = None) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype or step.torch_dtype)
    return unet.to(step.device).eval()


CONTENDERS = {
    "minisd": minisd,
    "diffusers": diffusers,
    "diffusers-compiled": diffusers_compiled,
    "openvino": openvino,
}


def bench_unet(options: ImageBenchOptions, config: ModelConfig = SD1) -> BenchReport:
    """Seconds of a step with CFG, for every size and batch of the options."""
    cases = [GuidedStep(config, size, batch, options.dtype, options.device) for size, batch in options.cases(config)]
    what = f"a denoising step of {config.name}'s U-Net with CFG, random weights"
    return compare("unet", what, CONTENDERS, cases, options, networks=("unet",))
