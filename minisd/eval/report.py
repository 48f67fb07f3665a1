"""What was measured, of what, with what and where: as plain values for JSON, and as a page with a table."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import minisd
from minisd.eval.mini import Row

NOTES = (
    "Pictures are over white. PSNR and SSIM (Wang et al. 2004: Gaussian window, mean over RGB) are those of pictures "
    "decoded from the means of their latents, in 8 bits; means over pictures.",
    "Image → text: the picture's own caption is among the k nearest (cosine) of one caption per concept; ties count "
    "against it. Captions name no style unless it says so. A held-out concept is not found by a word that no training "
    "caption has: a CLIP that minisd trained knows such words only as unknown.",
    "Right concept: of the training drawings whose 16 × 16 RGB means, less each picture's mean, are nearest (cosine), "
    "one of the first 10 shows the prompt's concept.",
    "Likeness: the largest cosine between a picture's thumbnail, as above, and a training drawing's; a copy has 1.",
    "Unseen pairs: a thing and a colour that no training picture shows together. Hue: the mean of the foreground's, "
    "weighed by how coloured its pixels are, is within 30° of the asked one. Shape: among the 10 training drawings "
    "whose shapes are nearest (foreground cut out, grey, brought to one size of 16 × 16) is one of the thing.",
    "Ground: of a picture's corners the colour, its deviation and its changes across and down are likeliest under the "
    "asked ground, of all colours and textures that training paints, and white.",
    "Fréchet distance: of normal distributions fitted to features of the space named above. It is no FID, which is "
    "taken in Inception's space, and compares only with rows of this table of as many pictures.",
    "Intervals hold the middle 95 % of 2000 bootstrap means over pictures. The rows in italics are baselines, taken by "
    "the same code.",
)


def machine(device: torch.device) -> dict[str, str]:
    """The processor, how many threads of it were used, and the versions that numbers depend on."""
    name = f"{_processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    versions = {"minisd": minisd.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"machine": name, "system": f"{platform.system()} {platform.machine()}", **versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def page(result: Mapping, rows: Sequence[Row]) -> str:
    """A Markdown page of what `eval.json` holds: the table, what it was measured with, and what its words mean."""
    checkpoint, data, settings, plan = (result[name] for name in ("checkpoint", "data", "settings", "plan"))
    loaded = "".join(f", {name} {value}" for name, value in checkpoint.items() if name not in ("file", "digest"))
    facts = [
        f"checkpoint: {checkpoint['file']}, {checkpoint['digest']}{loaded}",
        f"data: {', '.join(f'{n} {name}' for name, n in data.items() if name != 'digest')}; data.json {data['digest']}",
        f"feature space: {result['feature_space']}",
        f"drawn with {settings['steps']} steps of {settings['sampler']}, guidance {settings['guidance_scale']:g}; "
        f"picture i of each set has the seed {plan['seed']} + i",
        f"{result['machine']}; minisd {result['minisd']}, torch {result['torch']}, python {result['python']}; "
        f"{result['seconds'] / 60:.1f} min",
    ]
    items = "\n".join(f"- {line}" for line in (*facts, *NOTES))
    return f"# {result['model']}, measured\n\n{table(rows)}\n\n{items}\n"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; baselines in italics."""
    lines = ["| measure | of | value | 95 % interval | pictures | asked |", "|---|---|---|---|---|---|"]
    for row in rows:
        of = f"*{row.of}*" if row.kind == "baseline" else row.of
        between = " to ".join(spelled(bound, row.unit) for bound in row.interval or ())
        asked = "" if row.asked is None else f"≥ {spelled(row.asked, row.unit)}"
        cells = (row.measure, of, spelled(row.value, row.unit), between, row.n or "", asked)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def spelled(value: float, unit: str) -> str:
    """A share 0.913 as "91.3 %", 26.254 as "26.25 dB", or 0.9134 as "0.913"."""
    return {"%": f"{100 * value:.1f} %", "dB": f"{value:.2f} dB", "": f"{value:.3f}"}[unit]
