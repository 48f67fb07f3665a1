"""The commands that look into checkpoint files and rewrite them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from minisd.cli.output import check_target

SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def inspect(file: Path, *, verify: bool = False, probe: bool = False, json: bool = False, verbose: bool = False) -> int:
    """Say what a checkpoint, LoRA or embedding is: base model, networks, dtype, prediction type, and how to run it.

    Args:
        file: a .safetensors, .ckpt, .pt or .bin file (never run as code), an embedding's .png, or a diffusers folder.
        verify: read every tensor too: checksums, NaN and Inf, weights that are all zero.
        probe: run the U-Net once too, to measure whether it predicts eps or v (calibrated on SD 2.x).
        json: print JSON for scripts instead of text.
        verbose: name every tensor that no network uses, not only the first few.
    """
    from json import dumps

    from minisd.checkpoints.doctor import inspect_checkpoint

    inspection = inspect_checkpoint(file, probe=probe, verify=verify)
    print(dumps(inspection.as_dict(), indent=2) if json else "\n".join(inspection.lines(verbose=verbose)))
    return 0 if inspection.ok else 1


def convert(
    source: Path,
    target: Path,
    *,
    layout: Literal["ldm", "diffusers"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] | None = None,
    weights: Literal["raw", "ema"] = "raw",
    prediction: Literal["eps", "v", "x_0"] | None = None,
    vae: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint: .ckpt to .safetensors, single file to diffusers folder and back, or to another precision.

    Args:
        source: the checkpoint: a .safetensors, .ckpt, .pt or .bin file, or a diffusers folder.
        target: a .safetensors file, or a new folder, which is written in diffusers' layout.
        layout: ldm (one file, for A1111 and ComfyUI) or diffusers (a folder for from_pretrained); told by TARGET.
        dtype: precision of the saved weights; that of the source when left out.
        weights: ema takes a full training checkpoint's EMA copy, usually the better one to sample from.
        prediction: prediction type, where the source declares none: eps (epsilon), v (v_prediction), x_0 (sample).
        vae: a file or folder whose VAE replaces the checkpoint's, baked in.
        overwrite: replace an existing file; a folder never is.
    """
    if layout is None:
        layout = "diffusers" if not target.suffix or target.is_dir() else "ldm"
    if layout == "ldm":
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: minisd writes safetensors only: name it {target.with_suffix('.safetensors')}")
        check_target(target, overwrite=overwrite)
    import torch

    from minisd.checkpoints.load import load_checkpoint
    from minisd.checkpoints.save import save_checkpoint

    chosen = dtype and getattr(torch, SHORT_DTYPES.get(dtype, dtype))
    checkpoint = load_checkpoint(
        source, weights=weights, prediction=prediction, vae=vae, cast=lambda stored: chosen or stored
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    print("\n".join([*checkpoint.report, *save_checkpoint(checkpoint, target, layout=layout)]))
