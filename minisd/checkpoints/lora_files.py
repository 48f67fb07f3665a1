"""The layouts of LoRA files: what their tensors are called, and which of our layers a name means.

    kohya           lora_unet_down_blocks_0_…_to_q.lora_down.weight, .lora_up.weight, .alpha; lora_te_…
    peft            unet.down_blocks.0.….to_q.lora_A.weight, .lora_B.weight; text_encoder.…; base_model.model.…
    old diffusers   unet.down_blocks.0.….processor.to_q_lora.down.weight, .up.weight; ….lora_linear_layer.down.weight

The path of a layer is diffusers' or the original's. Both are in the key maps, from which the tables here are made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minisd.checkpoints.files import TensorFile
from minisd.checkpoints.keymaps import keymap

_DOWN = re.compile(r"(.+?)(?:\.(lora_down)|\.(lora_A)(?:\.\w+)?|[._](lora\.down)|\.(lora_linear_layer\.down))\.weight$")
_UP = {
    "lora_down": "lora_up",
    "lora_A": "lora_B",
    "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}
_LAYOUTS = {"lora_down": "kohya layout", "lora_A": "peft layout"}
_PREFIXES = re.compile(r"(base_model\.model\.|diffusion_model\.|unet\.|text_encoder\.|lora_unet_|lora_te1?_)+")
METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's config
PEFT_CONFIG = "adapter_config.json"  # where peft itself keeps it


@dataclass(frozen=True)
class Pair:
    """The tensors of one layer by their names in the file, where they may or may not be. module: the layer's name."""

    module: str
    mark: str
    down: str
    up: str

    @property
    def mid(self) -> str:
        """LoCon's kernel between the two, of a convolution that was factored into three."""
        return f"{self.module}.lora_mid.weight"

    @property
    def alpha(self) -> str:
        return f"{self.module}.alpha"


def pairs_in(names: Iterable[str]) -> list[Pair]:
    """The layers that a file changes: one for each first matrix in it."""
    pairs = []
    for name in names:
        if match := _DOWN.match(name):
            mark, end = next(filter(None, match.groups()[1:])), match.end(1)
            pairs.append(Pair(match[1], mark, name, name[:end] + name[end:].replace(mark, _UP[mark])))
    return pairs


def layout_of(pairs: Iterable[Pair]) -> str:
    marks = {pair.mark for pair in pairs}
    return next((_LAYOUTS[mark] for mark in _LAYOUTS if mark in marks), "old diffusers layout")


def network_of(module: str) -> str:
    """The network that a layer belongs to, by its name in a file alone."""
    if re.search(r"text_model|text_encoder|lora_te|encoder[._]layers", module):
        return "text encoder" + (" 2" if re.search(r"te2_|text_encoder_2", module) else "")
    if re.search(r"(down|up|input|output)_blocks|mid_block|middle_block|lora_unet|^unet\.", module):
        return "U-Net"
    return "transformer"


def text_width(file: TensorFile, pairs: Iterable[Pair]) -> int | None:
    """The width of the text states that the file's layers read: told by cross-attention, else by the text encoder."""
    shapes = {pair.module: file.shape(pair.down) for pair in pairs}
    context = {s[1] for module, s in shapes.items() if re.search(r"attn2.*to_[kv]$", module) and len(s) > 1}
    text = {s[1] for module, s in shapes.items() if re.search(r"self_attn.*[qkv](_proj)?$", module) and len(s) > 1}
    return min(context or text, default=None)


# ------------------------------------------------------------------------------------------------ file names and ours


def names_from_official(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """What files call the layers that a LoRA can change, dots as underscores → ours: "unet." or "text." and the path.

    networks: "unet" and "text", as in a checkpoint.
    """
    names = {}
    for network, dialect in (("unet", "diffusers"), ("unet", "ldm"), ("text", "hf"), ("text", "openclip")):
        for ours, theirs in _layers(networks[network], dialect):
            for spelling in _spellings(theirs):
                names[spelling.replace(".", "_")] = f"{network}.{ours}"
    return names


def names_to_official(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Ours → (the network's name, the layer's path) in diffusers and Hugging Face's CLIP: what written files use."""
    dialects = {"unet": ("unet", "diffusers"), "text": ("text_encoder", "hf")}
    return {
        f"{network}.{ours}": (theirs, path)
        for network, (theirs, dialect) in dialects.items()
        for ours, path in _layers(networks[network], dialect)
    }


def flat_name(module: str) -> str:
    """A layer as a file calls it, as `names_from_official` has it: without the network, dots as underscores."""
    return _PREFIXES.sub("", module, count=1).replace(".processor.", ".").replace(".", "_")


def _layers(network: nn.Module, dialect: str) -> Iterator[tuple[str, str]]:
    modules = dict(network.named_modules())
    for name, source in keymap(network, dialect).items():
        layer = name.removesuffix(".weight")
        if source.third is None and isinstance(modules.get(layer), nn.Linear | nn.Conv2d):
            yield layer, source.key.removesuffix(".weight")


def _spellings(path: str) -> Iterator[str]:
    """The path, and how else it is written: without text_model., and by the names of old attention processors."""
    yield path
    yield re.sub(r"^text_model\.", "", path)
    yield re.sub(r"\.to_out\.0$", ".to_out", path)
    yield re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", path)


# --------------------------------------------------------------------------------------------------------- peft's alpha


def peft_config(file: TensorFile) -> tuple[dict, str]:
    """(peft's settings as diffusers writes them into the metadata, or as they lie beside a file of peft's own; where).

    Keys have the network before them, "unet.r", in the metadata only.
    """
    text, source = file.metadata.get(METADATA), "the metadata"
    beside = Path(file.path).with_name(PEFT_CONFIG)
    try:
        if text is None and beside.is_file() and any(name.startswith("base_model.model.") for name in file):
            text, source = beside.read_text(encoding="utf-8"), PEFT_CONFIG
        config = json.loads(text or "{}")
    except (ValueError, OSError, RecursionError):
        return {}, ""  # not readable: then it says nothing
    return (config, source) if isinstance(config, dict) else ({}, "")


def peft_alpha(config: Mapping, module: str, rank: int) -> float | None:
    """What the settings say of one layer; None where they say nothing. Rank-stabilised ones (α/√rank) are converted."""
    path = module.removeprefix("base_model.model.")
    if any("." in key for key in config):
        network, _, path = path.partition(".")
        config = {key[len(network) + 1 :]: value for key, value in config.items() if key.startswith(f"{network}.")}
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    named = [value for key, value in patterns.items() if f".{path}".endswith("." + key.removeprefix("^"))]
    alpha = named[0] if named else config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    return alpha * rank**0.5 if config.get("use_rslora") is True else float(alpha)
