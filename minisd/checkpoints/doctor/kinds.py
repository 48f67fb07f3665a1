"""Files of tensors that are no networks of Stable Diffusion 1.x or 2.x: LoRAs, embeddings, other families."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from minisd.checkpoints.files import TensorFile

BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}
_SDXL, _UNREAD = "SDXL", "minisd runs Stable Diffusion 1.x and 2.x only"


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

_DOWN = re.compile(r"(.+?)(?:\.(lora_down)|\.(lora_A)(?:\.\w+)?|[._](lora\.down)|\.(lora_linear_layer\.down))\.weight$")
_UP = {
    "lora_down": "lora_up",
    "lora_A": "lora_B",
    "lora.down": "lora.up",
    "lora_linear_layer.down": "lora_linear_layer.up",
}
_LAYOUTS = {"lora_down": "kohya layout", "lora_A": "peft layout"}
_NOT_PLAIN = (
    (r"\.hada_w", "LoHa"),
    (r"\.lokr_w", "LoKr"),
    (r"\.dora_scale|lora_magnitude", "DoRA"),
    ("lora_mid", "CP"),
)


def _lora(file: TensorFile) -> Kind | None:
    downs = {name: found for name in file if (found := _DOWN.match(name))}
    variants = [kind for pattern, kind in _NOT_PLAIN if any(re.search(pattern, name) for name in file)]
    if not downs and not variants:
        return None
    marks = {next(filter(None, found.groups()[1:])) for found in downs.values()}
    layout = next((_LAYOUTS[mark] for mark in _LAYOUTS if mark in marks), "old diffusers layout")
    modules = [found[1] for found in downs.values()] or list(file)
    kind = Kind(f"a LoRA ({layout})" if downs else f"a {variants[0]} (an adapter of the LyCORIS family)")
    kind.base = _lora_base(file, downs)
    ranks = sorted({file.shape(name)[0] for name in downs if file.shape(name)})
    if ranks:
        kind.facts["rank"] = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        kind.facts["alpha"] = _alpha(file, ranks)
    networks = Counter(map(_lora_network, modules))
    kind.facts["changes"] = ", ".join(f"{count} layers of the {network}" for network, count in networks.items())
    if trained := file.metadata.get("ss_sd_model_name") or file.metadata.get("ss_base_model_version"):
        kind.facts["trained on"] = trained
    if variants:
        kind.problems.append(f"it is a {'/'.join(variants)} adapter: only plain LoRAs are read")
    kind.used = {name for name in file if name in downs or name.endswith(".alpha")}
    kind.used |= {up for name, found in downs.items() if (up := _up_name(name, found)) in file}
    if lost := [name for name, found in downs.items() if _up_name(name, found) not in file]:
        kind.problems.append(f"{len(lost)} layers lack their second matrix, first: {_up_name(lost[0], downs[lost[0]])}")
    if kind.base in BASES.values():
        kind.needs.append(f"a checkpoint of {kind.base}, then sd.load_lora({Path(file.path).name!r}, weight=1.0)")
    elif kind.base:
        kind.problems.append(f"it is for {kind.base}: {_UNREAD}")
    else:
        kind.needs.append("the layers it changes exist in several families: its author says which checkpoint it is for")
    return kind


def _up_name(name: str, found: re.Match) -> str:
    mark = next(filter(None, found.groups()[1:]))
    at = found.end(1)
    return name[:at] + name[at:].replace(mark, _UP[mark])


def _lora_network(module: str) -> str:
    if re.search(r"text_model|text_encoder|lora_te|encoder[._]layers", module):
        return "text encoder" + (" 2" if re.search(r"te2_|text_encoder_2", module) else "")
    if re.search(r"(down|up|input|output)_blocks|mid_block|middle_block|lora_unet|^unet\.", module):
        return "U-Net"
    return "transformer"


def _lora_base(file: TensorFile, downs: dict[str, re.Match]) -> str:
    """By the width of the context that the U-Net's cross-attention reads, else of the text encoder."""
    if any(re.search(r"lora_te[12]_|text_encoder_2", name) for name in file):
        return _SDXL
    if any(re.search(r"(double|single|joint)_(transformer_)?blocks", name) for name in file):
        return "Flux or SD3"
    shapes = {found[1]: file.shape(name) for name, found in downs.items()}
    context = {s[1] for module, s in shapes.items() if re.search(r"attn2.*to_[kv]$", module) and len(s) > 1}
    text = {s[1] for module, s in shapes.items() if re.search(r"self_attn.*[qkv]_proj$", module) and len(s) > 1}
    width = next(iter(context or text), None)
    return _SDXL if width == 2048 else BASES.get(width, "")


def _alpha(file: TensorFile, ranks: list[int]) -> str:
    stored = [name for name in file if name.endswith(".alpha") and prod(file.shape(name)) == 1]
    alphas = sorted({float(file[name].float().item()) for name in stored})
    source = ""
    if not alphas:
        alphas, source = _peft_alpha(file)
    if not alphas:
        return "not in the file, which means alpha = rank (scale 1)"
    said = f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} to {alphas[-1]:g}"
    scale = f" (scale alpha/rank = {alphas[0] / ranks[0]:g})" if len(alphas) == len(ranks) == 1 and ranks[0] else ""
    return said + scale + source


def _peft_alpha(file: TensorFile) -> tuple[list[float], str]:
    """peft keeps alpha in adapter_config.json, diffusers in the metadata of the file."""
    beside = Path(file.path).with_name("adapter_config.json")
    try:
        texts = [(file.metadata.get("lora_adapter_metadata", "{}"), "the metadata")]
        texts += [(beside.read_text(encoding="utf-8"), beside.name)] if beside.is_file() else []
        for text, place in texts:
            for name, value in json.loads(text).items():
                if name.split(".")[-1] == "lora_alpha" and isinstance(value, int | float):
                    return [float(value)], f", says {place}"
    except (ValueError, AttributeError, OSError, RecursionError):
        pass  # not readable: then it says nothing
    return [], ""


# ---------------------------------------------------------------------------------------------------------- embeddings


def _embedding(file: TensorFile) -> Kind | None:
    """The layouts of rinongal and A1111, of diffusers, of kohya, of SDXL, and a bare tensor."""
    vectors = {name: file.shape(name) for name in file if file.dtype(name).is_floating_point}
    if param := {n: s for n, s in vectors.items() if n.startswith("string_to_param.")}:
        layout, vectors = "A1111's and the original's layout", param
    elif "emb_params" in vectors:
        layout, vectors = "kohya layout", {"emb_params": vectors["emb_params"]}
    elif {"clip_l", "clip_g"} & set(vectors):
        layout = "SDXL layout"
    else:
        layout = "diffusers layout" if set(vectors) != {""} else "a bare tensor"
        widths = {shape[-1] for shape in vectors.values() if 1 <= len(shape) <= 2}
        small = len(file) <= 8 and all(1 <= len(s) <= 2 and prod(s) <= 1024 * 1280 for s in vectors.values())
        if not vectors or len(vectors) != len(file) or not small or not widths <= {*BASES, 1280}:
            return None
        if any(name.endswith((".weight", ".bias")) for name in vectors):
            return None
    kind = Kind(f"a textual-inversion embedding ({layout})")
    if not all(1 <= len(shape) <= 2 for shape in vectors.values()):
        kind.problems.append(f"its vectors have the impossible shapes {list(vectors.values())}")
        return kind
    kind.used = set(vectors) | {name for name in file if name.startswith("string_to_token.")}
    kind.facts["vectors"] = ", ".join(
        f"{1 if len(shape) == 1 else shape[0]} of width {shape[-1]}" for shape in vectors.values()
    )
    widths = {shape[-1] for shape in vectors.values()}
    kind.base = BASES.get(min(widths), "") if len(widths) == 1 and layout != "SDXL layout" else _SDXL
    _name_token(kind, file, list(vectors), layout)
    if layout == "SDXL layout" or kind.base == _SDXL:
        kind.problems.append(f"it is for SDXL: {_UNREAD}")
    elif not kind.base:
        kind.problems.append(f"no text encoder of Stable Diffusion 1.x or 2.x is {min(widths)} wide (768 or 1024)")
    else:
        file_name = Path(file.path).name
        kind.needs.append(f"a checkpoint of {kind.base}, then sd.load_embedding({file_name!r}, token=…)")
    return kind


def _name_token(kind: Kind, file: TensorFile, names: list[str], layout: str) -> None:
    tokens = [name.removeprefix("string_to_param.") for name in names]
    named = isinstance(file.extra.get("name"), str) and file.extra["name"]
    if layout in ("kohya layout", "SDXL layout", "a bare tensor"):
        kind.facts["token"] = "none in the file: by custom it is the file's name"
    else:
        kind.facts["token"] = ", ".join(map(repr, tokens)) + (f", named {named!r}" if named else "")
    if isinstance(file.extra.get("step"), int):
        kind.facts["step"] = f"{file.extra['step']:,}"
    if isinstance(trained := file.extra.get("sd_checkpoint_name"), str):
        kind.facts["trained on"] = trained


# ------------------------------------------------------------------------------------------------------ other families

# (what only they have among their names, kind), the first match wins
_OTHERS = (
    (r"conditioner\.embedders\.", "an SDXL checkpoint"),
    (r"add_embedding\.linear_1\.", "an SDXL U-Net (diffusers layout)"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "an SD3 checkpoint"),
    (r"single_transformer_blocks\.", "a Flux transformer (diffusers layout)"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux checkpoint"),
    (r"transformer_blocks\.0\.attn\.add_k_proj\.", "an SD3 transformer (diffusers layout)"),
    (r".*(motion_modules|time_mixer|temporal_transformer)", "a video model or a motion module"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"(adapter\.)?body\.\d+\.(block1|resnets)\.", "a T2I-Adapter"),
    (r"(320|640|768|1024|1280)\.[01]\.linear\.", "a hypernetwork of A1111"),
    (r"(params_ema\.|params\.)?(model\.1\.sub\.0\.|conv_first\.)", "an image upscaler (the ESRGAN family)"),
    (r"((taesd_)?(en|de)coder\.)(layers\.)?\d+\.conv\.\d\.", "a TAESD (tiny autoencoder)"),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.", "a T5 text encoder"),
    (r"(special_care|concept)_embeds(_weights)?$", "a safety checker"),
    (r"(blocks\.0\.)?(adaLN_modulation|adaln_single)\.", "a diffusion transformer (DiT, PixArt)"),
)


def _by_name(file: TensorFile) -> Kind | None:
    for pattern, kind in _OTHERS:
        if any(re.match(pattern, name) for name in file):
            return Kind(kind, problems=[_UNREAD])
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
