"""Textual inversion (Gal et al. 2022): vectors for a new word, read from files of every layout, written in three."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minisd.checkpoints.embedding_files import SDXL, layout_of
from minisd.checkpoints.families import other_family
from minisd.checkpoints.files import CheckpointError, TensorFile, open_tensors, save_safetensors
from minisd.checkpoints.files.embedding_image import is_png, read_image
from minisd.files import write_whole
from minisd.models.clip import CLIPText
from minisd.text.tokenizer import Tokenizer

MAX_ELEMENTS = 1 << 18  # 75 vectors, as many as a prompt has room for, of SDXL's 2048 and more


def load_embeddings(path: str | os.PathLike) -> dict[str, Tensor]:
    """Token → its vectors 'n d' in the file's dtype; nearly always one. Where the file names none, its own name is it.

    CheckpointError where the file holds no embedding, or one that no Stable Diffusion 1.x or 2.x can take.
    """
    path = Path(path)
    if is_png(path):
        name, vectors = read_image(path)
        return {name or path.stem: _checked(path, "its image", vectors)}
    file = open_tensors(path)
    if (layout := layout_of(file)) is None:
        _refuse(path, f"it holds no textual-inversion embedding: `minisd inspect {path}` says what it is")
    if layout.name == SDXL:
        _refuse(path, "it is for SDXL (clip_l, clip_g): minisd runs Stable Diffusion 1.x and 2.x only")
    for name in layout.vectors.values():
        _check_shape(path, name or "its tensor", file.shape(name))
    return {
        token or _own_name(file): _checked(path, name or "its tensor", file.read(name))
        for token, name in layout.vectors.items()
    }


def _own_name(file: TensorFile) -> str:
    named = file.extra.get("name")
    return named if isinstance(named, str) and named else Path(file.path).stem


def _checked(path: Path, name: str, vectors: Tensor) -> Tensor:
    """The vectors as 'n d', if they can be that."""
    _check_shape(path, name, tuple(vectors.shape))
    if not vectors.float().isfinite().all():
        _refuse(path, f"{name} holds values that are not finite (NaN, Inf): its training went wrong")
    return torch.atleast_2d(vectors)


def _check_shape(path: Path, name: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2) or not 0 < prod(shape) <= MAX_ELEMENTS:
        _refuse(path, f"{name} has the shape {shape}: an embedding has 'd' or 'n d', a few vectors of a text's width")


def _refuse(path: str | os.PathLike, why: str):
    raise CheckpointError(f"{path}: {why}")


# -------------------------------------------------------------------------------------------------------------- adding


def add_embedding(tokenizer: Tokenizer, text_encoder: CLIPText, token: str, vectors: Tensor) -> list[int]:
    """Make `token` a placeholder for these vectors 'n d' and return its ids.

    The token embedding grows by their rows, in its own dtype; all other rows keep their bits. ValueError for a token
    that the tokenizer cannot have, or vectors of another width.
    """
    table = text_encoder.token_embedding
    if vectors.shape[1] != table.embedding_dim:
        raise ValueError(other_family(vectors.shape[1], table.embedding_dim))
    ids = tokenizer.add_token(token, len(vectors))
    if ids[0] > table.num_embeddings:
        tokenizer.remove_token(token)
        raise ValueError(
            f"the text encoder has {table.num_embeddings} tokens, fewer than CLIP's tokenizer knows: it takes no others"
        )
    rows = max(table.num_embeddings, ids[-1] + 1)
    weight = table.weight.new_empty(rows, table.embedding_dim)
    weight[: table.num_embeddings] = table.weight.detach()
    weight[ids[0] : ids[-1] + 1] = vectors.detach().to(weight)
    table.weight = torch.nn.Parameter(weight, requires_grad=table.weight.requires_grad)
    table.num_embeddings = rows
    text_encoder.config = replace(text_encoder.config, vocab_size=rows)
    return ids


# -------------------------------------------------------------------------------------------------------------- writing


def save_embedding(
    path: str | os.PathLike,
    token: str,
    vectors: Tensor,
    *,
    layout: Literal["a1111", "diffusers", "kohya"] = "diffusers",
    step: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the vectors 'n d' of a token, all or nothing.

    layout: "a1111" is its .pt, "diffusers" and "kohya" are .safetensors. A1111 calls an embedding by the file's name,
    and so does everybody a kohya file, which has no place for the token. step: of the training, for A1111's file.
    metadata: text for the header of a .safetensors file.
    """
    if layout not in ("a1111", "diffusers", "kohya"):
        raise ValueError(f"layout={layout!r}; allowed: a1111, diffusers, kohya")
    suffix = ".pt" if layout == "a1111" else ".safetensors"
    stem, extension = os.path.splitext(os.fspath(path))
    if extension != suffix:
        raise ValueError(f"{path}: the layout {layout} is a {suffix} file: name it {stem}{suffix}")
    if vectors.ndim != 2:
        raise ValueError(f"the vectors have the shape {tuple(vectors.shape)}: give 'n d', one row per vector")
    vectors = vectors.detach().cpu().contiguous()
    if layout != "a1111":
        save_safetensors(path, {token if layout == "diffusers" else "emb_params": vectors}, metadata)
        return
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors.clone()},
        "name": token,
        "step": step,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    write_whole(path, lambda file: torch.save(content, file), make_folder=False)
