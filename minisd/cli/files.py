"""The commands that look into checkpoint files and rewrite them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from minisd.cli.output import check_target


def inspect(file: Path, *, verify: bool = False, probe: bool = False, json: bool = False, verbose: bool = False) -> int:
    """Say what a checkpoint is, what is in it, and what it needs to run.

    Args:
        file: a checkpoint, LoRA, embedding … in any format, or a diffusers folder.
        verify: read every tensor: checksums, NaN and infinity.
        probe: run the U-Net once to tell eps from v.
        json: print JSON instead of text.
        verbose: list every tensor that is not run.
    """
    from json import dumps

    from minisd.checkpoints.doctor import inspect_checkpoint

    found = inspect_checkpoint(file, probe=probe, verify=verify)
    print(dumps(found.as_dict(), indent=2) if json else "\n".join(found.lines(verbose=verbose)))
    return 0 if found.ok else 1


def convert(
    source: Path,
    target: Path,
    *,
    layout: Literal["ldm", "diffusers"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    weights: Literal["raw", "ema"] = "raw",
    prediction: Literal["eps", "v", "x_0"] | None = None,
    vae: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Rewrite a checkpoint in another layout, as safetensors; nothing is lost on the way.

    Args:
        source: a single file or a diffusers folder.
        target: a .safetensors file (layout ldm) or a new folder (layout diffusers).
        layout: told from the target's name when left out.
        dtype: of the networks' weights; the file's own when left out.
        weights: "ema" keeps the separate EMA copy of a full training file instead of the raw weights.
        prediction: what the U-Net's output means, where the file does not tell.
        vae: a file or folder whose VAE is taken instead.
        overwrite: replace an existing file. Folders are not replaced.
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

    wanted = dtype and getattr(torch, dtype)
    checkpoint = load_checkpoint(
        source, weights=weights, prediction=prediction, vae=vae, cast=lambda stored: wanted or stored
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    print("\n".join([*checkpoint.report, *save_checkpoint(checkpoint, target, layout=layout)]))
