"""ε or v? The same tensors serve both, so the answer needs evidence from outside the network."""

from __future__ import annotations

import re
from pathlib import Path

from minisd.checkpoints.detect import Contents
from minisd.config import PRESETS, Prediction, UNetConfig

# global_step of official 2.x files whose other evidence is missing
GLOBAL_STEPS = {875_000: "eps", 110_000: "v"}
PROBE_TENSOR = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
PROBE_THRESHOLD = 0.09


def prediction_of(contents: Contents, path: Path, global_step: int | None) -> tuple[Prediction | None, str]:
    """What the U-Net of a single file predicts, and why one should think so; (None, why not) without evidence.

    In this order: the official family where all its members agree, a yaml beside the file, global_step, and the
    standard deviation of one bias (which Stability's training left above 0.09 in v models, ComfyUI's probe).
    """
    unet = contents.parts["unet"]
    if said := _from_yaml(path):
        return said
    if family := _from_family(unet.config):
        return family
    if global_step in GLOBAL_STEPS:
        return GLOBAL_STEPS[global_step], f"global_step {global_step}"
    if unet.dialect == "ldm" and PROBE_TENSOR in unet.tensors:
        std = unet.tensors[PROBE_TENSOR].double().std(unbiased=False).item()
        prediction = "v" if std > PROBE_THRESHOLD else "eps"
        return prediction, f"std {std:.3f} of {PROBE_TENSOR} (v where above {PROBE_THRESHOLD})"
    return None, f"no metadata, no yaml beside the file, global_step {global_step}, no {PROBE_TENSOR}"


def _from_yaml(path: Path) -> tuple[Prediction, str] | None:
    """The original's config: model.yaml beside model.ckpt, or the only yaml in its folder."""
    if not path.is_file():
        return None
    beside = [path.with_suffix(".yaml")] if path.with_suffix(".yaml").is_file() else list(path.parent.glob("*.yaml"))
    if len(beside) != 1:
        return None
    text = beside[0].read_text(encoding="utf-8", errors="replace")
    if "LatentDiffusion" not in text and "diffusion" not in text.lower():
        return None
    said = re.search(r"^\s*parameterization\s*:\s*[\"']?(\w+)", text, re.MULTILINE)
    if said is None:
        return "eps", f"{beside[0].name} (no parameterization, the original's default is eps)"
    names = {"v": "v", "eps": "eps", "x0": "x_0"}
    return (names[said[1]], f"parameterization in {beside[0].name}") if said[1] in names else None


def _from_family(unet: UNetConfig) -> tuple[Prediction, str] | None:
    """Where every official model of these shapes predicts the same."""
    families = [preset for preset in PRESETS.values() if preset.unet == unet]
    predictions = {preset.prediction for preset in families}
    if len(predictions) == 1:
        return predictions.pop(), f"every official {families[0].name} model does"
    return None
