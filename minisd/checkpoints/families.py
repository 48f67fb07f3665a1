"""The families of models that adapter files are made for, told by the width of the text that they read."""

from __future__ import annotations

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
SDXL_WIDTHS = {2048, 1280}  # of SDXL's context, and of its second text encoder


def family_of(width: int) -> str:
    """ "Stable Diffusion 1.x (768 wide)": a family as the errors name it."""
    name = "SDXL" if width in SDXL_WIDTHS else BASES.get(width)
    return f"{name} ({width} wide)" if name else f"a model whose text encoder is {width} wide"


def other_family(width: int, own: int) -> str:
    """Why what was made for text states of one width does not go into a model of another."""
    return f"it is for {family_of(width)}, this model is {family_of(own)}: take one that was trained for it"
