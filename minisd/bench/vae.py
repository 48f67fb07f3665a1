"""`minisd bench vae`: images decoded and encoded, beside the peers' VAEs with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

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
from minisd.models.vae import VAE
from minisd.runtime.optimize import optimize


@dataclass(frozen=True)
class VAEPass:
    """One pass through half of the VAE: U-Net latents → images, or images → the mean of their latents."""

    config: ModelConfig
    way: Literal["decode", "encode"]
    size: int
    batch: int
    dtype: str
    device: str = "cpu"

    @property
    def label(self) -> dict[str, str | int]:
        return {"way": self.way, "size": self.size, "batch": self.batch}

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def input(self) -> Tensor:
        """Latents 'b c h w', or images 'b 3 H W': the same in every process."""
        vae, generator = self.config.vae, torch.Generator().manual_seed(0)
        channels, side = (vae.latent_channels, self.size // vae.factor) if self.way == "decode" else (3, self.size)
        x = torch.randn(self.batch, channels, side, side, generator=generator)
        return (x if self.way == "decode" else x.tanh()).to(self.device, self.torch_dtype)

    def flop(self) -> int:
        case = replace(self, dtype="float32", device="meta")
        return flop(_through(on_meta("vae", self.config.vae), case))


def _through(vae: VAE, vae_pass: VAEPass) -> Run:
    x = vae_pass.input()
    return (lambda: vae.decode(x)) if vae_pass.way == "decode" else (lambda: vae.encode(x).mean)


def minisd(folder: Path, vae_pass: VAEPass) -> Run:
    vae = load_network(folder, "vae", cast=lambda _: vae_pass.torch_dtype, device=vae_pass.device)
    optimize(vae)  # as `load` does
    return _through(vae, vae_pass)


def diffusers(folder: Path, vae_pass: VAEPass) -> Run:
    vae, x = _Diffusers(folder, vae_pass, vae_pass.torch_dtype), vae_pass.input()
    return lambda: vae(x)


def diffusers_compiled(folder: Path, vae_pass: VAEPass) -> Run:
    vae, x = torch.compile(_Diffusers(folder, vae_pass, vae_pass.torch_dtype)), vae_pass.input()
    return lambda: vae(x)


def openvino(folder: Path, vae_pass: VAEPass) -> Run:
    x = vae_pass.input().float()  # OpenVINO takes float32 and computes in the precision of its hint
    run = peers.compiled_by_openvino(_Diffusers(folder, vae_pass, torch.float32), (x,), vae_pass.dtype)
    return lambda: run(x)


class _Diffusers(nn.Module):
    """AutoencoderKL between images and the U-Net's (scaled) latents."""

    def __init__(self, folder: Path, vae_pass: VAEPass, dtype: torch.dtype):
        from diffusers import AutoencoderKL

        super().__init__()
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        self.vae, self.way = vae.to(vae_pass.device).eval(), vae_pass.way

    def forward(self, x: Tensor) -> Tensor:
        scale = self.vae.config.scaling_factor
        if self.way == "decode":
            return self.vae.decode(x / scale, return_dict=False)[0]
        return scale * self.vae.encode(x, return_dict=False)[0].mean


CONTENDERS = {
    "minisd": minisd,
    "diffusers": diffusers,
    "diffusers-compiled": diffusers_compiled,
    "openvino": openvino,
}


def bench_vae(options: ImageBenchOptions, config: ModelConfig = SD1) -> BenchReport:
    """Seconds of decoding and of encoding, for every size and batch of the options."""
    cases = [
        VAEPass(config, way, size, batch, options.dtype, options.device)
        for size, batch in options.cases(config)
        for way in ("decode", "encode")
    ]
    what = f"images through {config.name}'s VAE, random weights"
    return compare("vae", what, CONTENDERS, cases, options, networks=("vae",))
