"""Files of tensors that are no networks of Stable Diffusion 1.x or 2.x: LoRAs, embeddings, other families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from minisd.checkpoints import embedding_files
from minisd.checkpoints.families import BASES, SDXL, SDXL_WIDTHS, base_of
from minisd.checkpoints.files import TensorFile
from minisd.checkpoints.foreign import foreign_checkpoint, lora_base, lycoris_kinds
from minisd.checkpoints.lora_files import Pair, layout_of, network_of, pairs_in, peft_alpha, peft_config, text_width

_UNREAD = "minisd runs Stable Diffusion 1.x and 2.x only"


@dataclass
class Kind:
    """What a file is. base: the family it belongs to; used: the tensors that make it what it is, none where the whole
    file is foreign; facts, needs, problems: as in Inspection."""

    kind: str
    base: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)


def other_kind(file: TensorFile) -> Kind | None:
    """What the file is if it holds no networks of Stable Diffusion 1.x or 2.x; None if it may hold them."""
    recognisers: tuple[Callable[[TensorFile], Kind | None], ...] = (_lora, _by_name, _guided_diffusion, _embedding)
    return next((kind for recognise in recognisers if (kind := recognise(file))), None)


# ---------------------------------------------------------------------------------------------------------------- LoRA


def _lora(file: TensorFile) -> Kind | None:
    pairs, others = pairs_in(file), lycoris_kinds(file)
    if not pairs and not others:
        return None
    kind = Kind(f"a LoRA ({layout_of(pairs)})" if pairs else f"a {others[0]} (an adapter of the LyCORIS family)")
    width = text_width(file, pairs)
    kind.base = lora_base(file) or base_of(width)
    ranks = sorted({file.shape(pair.down)[0] for pair in pairs if file.shape(pair.down)})
    if ranks:
        kind.facts["rank"] = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind.facts["alpha"] = _alpha(file, pairs, ranks)
    networks = Counter(map(network_of, [pair.module for pair in pairs] or list(file)))
    kind.facts["changes"] = ", ".join(f"{count} layers of the {network}" for network, count in networks.items())
    if trained := file.metadata.get("ss_sd_model_name") or file.metadata.get("ss_base_model_version"):
        kind.facts["trained on"] = trained
    if others:
        kind.problems.append(f"it is a {'/'.join(others)} adapter: only plain LoRAs are read")
    kind.used = {name for pair in pairs for name in (pair.down, pair.up, pair.mid, pair.alpha) if name in file}
    if lost := [pair.up for pair in pairs if pair.up not in file]:
        kind.problems.append(f"{len(lost)} layers lack their second matrix, first: {lost[0]}")
    if kind.base in BASES.values():
        kind.needs.append(f"a checkpoint of {kind.base}, then sd.load_lora({Path(file.path).name!r}, weight=1.0)")
    elif kind.base:
        kind.problems.append(f"it is for {kind.base}: {_UNREAD}")
    elif width is not None:
        kind.needs.append(f"a checkpoint whose text encoder is {width} wide, which is no official one")
    else:
        kind.needs.append("the layers it changes exist in several families: its author says which checkpoint it is for")
    return kind


def _alpha(file: TensorFile, pairs: list[Pair], ranks: list[int]) -> str:
    stored = [pair.alpha for pair in pairs if pair.alpha in file and prod(file.shape(pair.alpha)) == 1]
    alphas, source = {float(file[name].float().item()) for name in stored}, ""
    if not alphas:
        config, source = peft_config(file)
        declared = (peft_alpha(config, pair.module, ranks[0]) for pair in pairs)
        alphas, source = {alpha for alpha in declared if alpha is not None}, f", says {source}"
    if not alphas:
        return "not in the file, which means alpha = rank (scale 1)"
    least, most = min(alphas), max(alphas)
    alpha = f"{least:g}" if least == most else f"{least:g} to {most:g}"
    scale = f" (scale alpha/rank = {least / ranks[0]:g})" if len(alphas) == len(ranks) == 1 and ranks[0] else ""
    return alpha + scale + source


# ---------------------------------------------------------------------------------------------------------- embeddings


def _embedding(file: TensorFile) -> Kind | None:
    layout = embedding_files.layout_of(file)
    if layout is None:
        return None
    vectors = {name: file.shape(name) for name in layout.vectors.values()}
    if layout.name in (embedding_files.DIFFUSERS, embedding_files.BARE) and not _as_of_words(vectors):
        return None
    kind = Kind(f"a textual-inversion embedding ({layout.name})")
    kind.used = set(vectors) | {name for name in file if name.startswith("string_to_token.")}
    _name_token(kind, file, layout)
    _describe_vectors(kind, list(vectors.values()), Path(file.path).name, sdxl=layout.name == embedding_files.SDXL)
    return kind


def image_kind(path: Path, name: str, shape: tuple[int, ...]) -> Kind:
    """What an image of A1111's is that carries vectors of this shape."""
    kind = Kind("an image that carries a textual-inversion embedding of A1111")
    kind.facts["token"] = repr(name) if name else "none in it: by custom it is the file's name"
    _describe_vectors(kind, [shape], path.name)
    return kind


def _describe_vectors(kind: Kind, shapes: list[tuple[int, ...]], name: str, *, sdxl: bool = False) -> None:
    if not all(1 <= len(shape) <= 2 for shape in shapes):
        kind.problems.append(f"its vectors have the impossible shapes {shapes}")
        return
    kind.facts["vectors"] = ", ".join(f"{1 if len(s) == 1 else s[0]} of width {s[-1]}" for s in shapes)
    widths = {shape[-1] for shape in shapes}
    if sdxl or len(widths) > 1 or widths & SDXL_WIDTHS:
        kind.base = SDXL
        kind.problems.append(f"it is for SDXL: {_UNREAD}")
        return
    kind.base = BASES.get(min(widths), "")
    models = kind.base or f"a model whose text encoder is {min(widths)} wide, which is no official one"
    kind.needs.append(f"a checkpoint of {models}, then sd.load_embedding({name!r}, token=…)")


def _as_of_words(vectors: dict[str, tuple[int, ...]]) -> bool:
    """Whether tensors that say nothing of themselves are vectors of words: of an official width, or of a <token>."""
    official = {shape[-1] for shape in vectors.values()} <= {*BASES, *SDXL_WIDTHS}
    named = all(re.fullmatch(r"<.+>", name) for name in vectors)
    return (official or named) and all(prod(shape) <= 1024 * 1280 for shape in vectors.values())


def _name_token(kind: Kind, file: TensorFile, layout: embedding_files.Layout) -> None:
    named = isinstance(file.extra.get("name"), str) and file.extra["name"]
    if layout.name in (embedding_files.KOHYA, embedding_files.SDXL, embedding_files.BARE):
        kind.facts["token"] = "none in the file: by custom it is the file's name"
    else:
        kind.facts["token"] = ", ".join(repr(token or "*") for token in layout.vectors)
        kind.facts["token"] += f", named {named!r}" if named else ""
    if isinstance(file.extra.get("step"), int):
        kind.facts["step"] = f"{file.extra['step']:,}"
    if isinstance(trained := file.extra.get("sd_checkpoint_name"), str):
        kind.facts["trained on"] = trained


# ------------------------------------------------------------------------------------------------------ other families


def _by_name(file: TensorFile) -> Kind | None:
    if foreign := foreign_checkpoint(file):
        return Kind(foreign, problems=[_UNREAD])
    if len(file) and all(re.match(r"(optimizer(_states)?|state)\.", name) for name in file):
        why = "nothing in it can be run: its weights stand in another file of the same training"
        return Kind("the optimiser's state of a training run, without weights", problems=[why])
    for name in file:
        shape = file.shape(name)
        if name.endswith("attn2.to_k.weight") and len(shape) == 2 and shape[1] == 2048:
            return Kind("an SDXL U-Net (its context is 2048 wide)", problems=[_UNREAD])
        if name in ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight") and shape[1:2] == (16,):
            return Kind("a VAE of 16 latent channels, as SD3's and Flux's", problems=[_UNREAD])
    return None


def _guided_diffusion(file: TensorFile) -> Kind | None:
    """OpenAI's guided- and improved-diffusion: the U-Net's names without cross-attention."""
    mine = {"input_blocks.0.0.weight", "time_embed.0.weight", "time_embed.2.weight"} <= set(file)
    if not mine or any(".transformer_blocks." in name for name in file) or "input_hint_block.0.weight" in file:
        return None
    channels, images = file.shape("input_blocks.0.0.weight")[:2]
    facts = {"input": f"{images} channels, {channels} wide at the first level"}
    if "label_emb.weight" in file:
        facts["classes"] = f"{file.shape('label_emb.weight')[0]:,}"
    if not any(name.startswith("output_blocks.") for name in file):
        return Kind("a classifier of guided-diffusion", "OpenAI guided-diffusion", facts, problems=[_UNREAD])
    if "out.2.weight" in file:
        out = file.shape("out.2.weight")[0]
        learned = ", the second half of it the variance" if out == 6 else ""
        facts["output"] = f"{out} channels{learned}"
    return Kind("a pixel diffusion network of guided-diffusion", "OpenAI guided-diffusion", facts, problems=[_UNREAD])
