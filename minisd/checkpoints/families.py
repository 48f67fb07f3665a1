"""The families of models that adapter files are made for, told by the width of the text that they read."""

from __future__ import annotations

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
SDXL_WIDTHS = {2048, 1280}  # of SDXL's context, and of its second text encoder


def other_family(width: int, own: int) -> str:
    """Why what was made for text states of one width does not go into a model of another: a sentence, both named."""
    return f"it is for a text width of {_named(width)}, this model has {_named(own)}: take one that was trained for it"


def _named(width: int) -> str:
    return f"{width} ({'SDXL' if width in SDXL_WIDTHS else BASES.get(width, 'a family of its own')})"
