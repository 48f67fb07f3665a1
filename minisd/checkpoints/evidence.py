"""ε or v? The same tensors serve both, so the answer needs evidence from outside the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from minisd.checkpoints.detect import Contents
from minisd.checkpoints.diffusers_json import read_json, read_schedule
from minisd.checkpoints.families import presets_of
from minisd.checkpoints.files.entries import CheckpointError
from minisd.config import PredictionType, UNetConfig

# global_step of official 2.x files whose other evidence is missing
GLOBAL_STEPS = {875_000: "eps", 110_000: "v"}
# ComfyUI's probe: Stability's training left this bias wide in its v models
PROBE_TENSORS = {
    "ldm": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}
PROBE_THRESHOLD = 0.09
SPELLINGS: dict[str, PredictionType] = {
    "v_prediction": "v",
    "velocity": "v",
    "v": "v",
    "epsilon": "eps",
    "eps": "eps",
    "sample": "x_0",
    "x0": "x_0",
}
Evidence = tuple[PredictionType, str]


def prediction_of(
    contents: Contents, path: Path, global_step: int | None, metadata: Mapping[str, str] | None = None
) -> tuple[PredictionType | None, str]:
    """The strongest evidence of what the U-Net predicts; (None, what is lacking) where there is none."""
    lacking = (
        f"no metadata, no scheduler_config.json or yaml beside the file, global_step {global_step}, "
        "no official U-Net's shapes"
    )
    return next(evidence_of(contents, path, global_step, metadata), (None, lacking))


def evidence_of(
    contents: Contents, path: Path, global_step: int | None, metadata: Mapping[str, str] | None = None
) -> Iterator[Evidence]:
    """What the U-Net predicts, and why one should think so, the strongest evidence first.

    The trainer's metadata, a scheduler_config.json or yaml beside the file, the official family where all its members
    agree, global_step, and the standard deviation of one bias.
    """
    unet = contents.parts["unet"]
    family = _from_family(unet.config)
    declared = (_from_trainer(metadata or {}), _from_scheduler(path), _from_yaml(path))
    yield from filter(None, (*declared, family))
    if global_step in GLOBAL_STEPS:
        yield GLOBAL_STEPS[global_step], f"global_step {global_step}"
    tensor = PROBE_TENSORS[unet.dialect]
    if tensor in unet.tensors and (family is None or unet.config.context_dim == 1024):  # calibrated on SD2
        std = unet.tensors[tensor].double().std(unbiased=False).item()
        prediction = "v" if std > PROBE_THRESHOLD else "eps"
        yield prediction, f"std {std:.3f} of {tensor} (v where above {PROBE_THRESHOLD})"


def _from_trainer(metadata: Mapping[str, str]) -> Evidence | None:
    """modelspec.prediction_type, which kohya's scripts and others write into safetensors files."""
    word = metadata.get("modelspec.prediction_type", "").lower()
    return (SPELLINGS[word], f"modelspec.prediction_type {word!r} in its metadata") if word in SPELLINGS else None


def _from_scheduler(path: Path) -> Evidence | None:
    """scheduler_config.json beside the file, or in scheduler/ beside it, as in the official repositories."""
    for file in (path.parent / "scheduler_config.json", path.parent / "scheduler" / "scheduler_config.json"):
        if path.is_file() and file.is_file():
            return read_schedule(read_json(file), file)[1]
    return None


def _from_yaml(path: Path) -> Evidence | None:
    """The original's config: model.yaml beside model.ckpt, or the only yaml of a folder with this one model."""
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        models = [p for p in path.parent.glob("*.*") if p.suffix in (".ckpt", ".safetensors", ".pt", ".pth", ".bin")]
        yamls = [p for p in path.parent.glob("*.yaml") if p.is_file()]
        if len(yamls) != 1 or models not in ([], [path]):
            return None
        beside = yamls[0]
    try:
        text = beside.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CheckpointError(f"{beside}: it says what this model predicts, but cannot be read: {error}") from error
    if "diffusion" not in text.lower():
        return None
    match = re.search(r"^\s*parameterization\s*:\s*[\"']?(\w+)", text, re.MULTILINE)
    if match is None:
        return "eps", f"{beside.name} (no parameterization, the original's default is eps)"
    return (SPELLINGS[match[1]], f"parameterization in {beside.name}") if match[1] in SPELLINGS else None


def _from_family(unet: UNetConfig) -> Evidence | None:
    """Where every official model of these shapes predicts the same."""
    presets = list(presets_of(unet).values())
    predictions = {preset.prediction for preset in presets}
    if len(predictions) == 1:
        return predictions.pop(), f"every official {presets[0].name} model does"
    return None
