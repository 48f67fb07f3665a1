"""The names by which A1111, ComfyUI, diffusers and k-diffusion call the samplers, and what they are here."""

from __future__ import annotations

import re

NAMES = {  # ours → those of other programs; one is as good as another in any case, with spaces, hyphens or underscores
    "ddim": ("DDIM", "DDIMScheduler"),
    "ddpm": ("DDPM", "DDPMScheduler"),
    "dpmpp_2m": ("DPM++ 2M", "DPM-Solver++(2M)", "DPMSolverMultistepScheduler", "k_dpmpp_2m", "sample_dpmpp_2m"),
    "euler": ("Euler", "EulerDiscreteScheduler", "k_euler", "sample_euler"),
    "euler_ancestral": (
        "Euler a",
        "euler_a",
        "EulerAncestralDiscreteScheduler",
        "k_euler_a",
        "k_euler_ancestral",
        "sample_euler_ancestral",
    ),
    "heun": ("Heun", "HeunDiscreteScheduler", "k_heun", "sample_heun"),
    "lms": ("LMS", "LMSDiscreteScheduler", "k_lms", "sample_lms"),
    "plms": ("PLMS", "PNDM", "PNDMScheduler"),
}


def resolve(name: str) -> tuple[str, str | None]:
    """(sampler, spacing): "DPM++ 2M Karras" is ("dpmpp_2m", "karras"), "euler_a:s_noise=0.9" keeps its options.

    A name that no table knows stays as it is. The spacing is None where the name says nothing of it.
    """
    name, colon, options = name.partition(":")
    key = _key(name)
    spacing = "karras" if key.endswith("karras") else None
    known = {_key(theirs): ours for ours, names in NAMES.items() for theirs in (ours, *names)}
    sampler = known.get(key.removesuffix("karras"))
    if sampler is None:
        return name + colon + options, None
    return sampler + colon + options, spacing


def a1111_name(sampler: str) -> str:
    """What AUTOMATIC1111 calls a sampler."""
    return NAMES[sampler][0] if sampler in NAMES else sampler


def _key(name: str) -> str:
    return re.sub(r"[\s_()-]", "", name.lower())
