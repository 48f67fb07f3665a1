"""The layouts of textual-inversion files, told by the names and shapes of their tensors.

the original's    .pt: {"string_to_token": {"*": 265}, "string_to_param": {"*": 'n d'}}
A1111's           the same with "name", "step" …; or a PNG with the same in it (`files.embedding_image`)
diffusers         {token: 'd' or 'n d'}, .bin or .safetensors
kohya             {"emb_params": 'n d'}
a bare tensor     'd' or 'n d'
"""

from __future__ import annotations

from dataclasses import dataclass

from minisd.checkpoints.files import TensorFile

A1111, DIFFUSERS, KOHYA, SDXL, BARE = LAYOUTS = (
    "A1111's and the original's layout",
    "diffusers layout",
    "kohya layout",
    "SDXL layout",
    "a bare tensor",
)
_PARAM = "string_to_param."


@dataclass(frozen=True)
class Layout:
    """How a file holds its vectors. vectors: the token that the file names, "" for none → the tensor's name there."""

    name: str
    vectors: dict[str, str]


def layout_of(file: TensorFile) -> Layout | None:
    """The layout of a file of embeddings, by its names; None where they are not those of embeddings."""
    names = [name for name in file if file.dtype(name).is_floating_point]
    if param := [name for name in names if name.startswith(_PARAM)]:
        tokens = (name.removeprefix(_PARAM) for name in param)
        return Layout(A1111, dict(zip(("" if token == "*" else token for token in tokens), param, strict=True)))
    if "emb_params" in names:
        return Layout(KOHYA, {"": "emb_params"})
    if sdxl := [name for name in names if name in ("clip_l", "clip_g")]:
        return Layout(SDXL, {name: name for name in sdxl})
    small = 0 < len(names) == len(file) <= 8 and all(1 <= len(file.shape(name)) <= 2 for name in names)
    if not small or any(name.endswith((".weight", ".bias")) for name in names):
        return None
    return Layout(BARE if names == [""] else DIFFUSERS, {name: name for name in names})
