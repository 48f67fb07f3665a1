"""CLIP's two towers in files: their names, their configs from shapes and from a config.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints.files.entries import CheckpointError
from minisd.checkpoints.networks.format import Naming, NetworkFormat, Shapes, Source, count, number, source_of
from minisd.config import PRESETS, CLIPTextConfig, CLIPVisionConfig, ModelConfig
from minisd.family.clip_vision import CLIPVision
from minisd.models.clip import CLIPText

Names = Iterator[tuple[str, str | Source]]


def text_names(config: CLIPTextConfig, dialect: str) -> Names:
    """(our module or tensor, what the dialect calls it)."""
    if dialect == "hf":
        yield "token_embedding", "text_model.embeddings.token_embedding"
        yield "position_embedding", "text_model.embeddings.position_embedding"
        yield "final_norm", "text_model.final_layer_norm"
        yield "projection", "text_projection"
        yield from _hf_blocks(config.layers, "text_model.encoder.layers")
    else:
        yield "token_embedding", "token_embedding"
        yield "position_embedding.weight", Source("positional_embedding")
        yield "final_norm", "ln_final"
        yield "projection.weight", Source("text_projection", transposed=True)
        yield from _openclip_blocks(config.layers)


def vision_names(config: CLIPVisionConfig, dialect: str) -> Names:
    """(our module or tensor, what the dialect calls it)."""
    if dialect == "hf":
        yield "class_embedding", Source("vision_model.embeddings.class_embedding")
        yield "patch_embedding", "vision_model.embeddings.patch_embedding"
        yield "position_embedding", "vision_model.embeddings.position_embedding"
        yield "pre_norm", "vision_model.pre_layrnorm"  # the typo is Hugging Face's
        yield "post_norm", "vision_model.post_layernorm"
        yield "projection", "visual_projection"
        yield from _hf_blocks(config.layers, "vision_model.encoder.layers")
    else:
        yield "class_embedding", Source("class_embedding")
        yield "position_embedding.weight", Source("positional_embedding")
        yield "projection.weight", Source("proj", transposed=True)
        yield from (("patch_embedding", "conv1"), ("pre_norm", "ln_pre"), ("post_norm", "ln_post"))
        yield from _openclip_blocks(config.layers)


def _hf_blocks(layers: int, beginning: str) -> Names:
    attention = {f"attn.to_{x}": f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")}
    names = attention | {"norm1": "layer_norm1", "norm2": "layer_norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    for i in range(layers):
        yield from ((f"blocks.{i}.{ours}", f"{beginning}.{i}.{theirs}") for ours, theirs in names.items())


def _openclip_blocks(layers: int) -> Names:
    names = {"norm1": "ln_1", "attn.to_out": "attn.out_proj", "norm2": "ln_2", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        yield from ((f"blocks.{i}.{ours}", f"{block}.{theirs}") for ours, theirs in names.items())
        for third, x in enumerate("qkv"):
            for leaf in ("weight", "bias"):
                yield f"blocks.{i}.attn.to_{x}.{leaf}", Source(f"{block}.attn.in_proj_{leaf}", third=third)


def text_from_shapes(tensors: Shapes, dialect: str) -> tuple[CLIPTextConfig, str]:
    names = dict(text_names(CLIPTextConfig(layers=1), dialect))
    vocab_size, width = _shape(tensors, names, "token_embedding.weight")
    # ViT-L/14 is OpenAI's, with quick-GELU; ViT-H/14 is OpenCLIP's, with GELU, and SD2 leaves out its last block
    presets = [preset.text for preset in PRESETS.values() if dialect == "hf" or preset.text.activation == "gelu"]
    official = [text for text in presets if text.width == width]
    base = (official or presets)[0]
    tower = _tower(tensors, names, width)
    config = replace(
        base,
        **tower,
        vocab_size=vocab_size,
        length=_shape(tensors, names, "position_embedding.weight")[0],
        heads=base.heads if official else max(width // 64, 1),
        skip=base.skip if tower["layers"] == base.layers else 0,
    )
    doubt = "no text encoder of Stable Diffusion has this width, and shapes do not tell its heads and activation"
    return config, "" if official else doubt


def vision_from_shapes(tensors: Shapes, dialect: str) -> tuple[CLIPVisionConfig, str]:
    names = dict(vision_names(CLIPVisionConfig(layers=1), dialect))
    width, _, patch_size, _ = _shape(tensors, names, "patch_embedding.weight")
    presets = [preset.vision for preset in PRESETS.values() if preset.vision]
    official = [vision for vision in presets if vision.width == width]
    base = (official or [CLIPVisionConfig()])[0]
    config = replace(
        base,
        **_tower(tensors, names, width),
        image_size=round((_shape(tensors, names, "position_embedding.weight")[0] - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        heads=base.heads if official else max(width // 64, 1),
    )
    doubt = "no image encoder of Stable Diffusion has this width, and shapes do not tell its heads and activation"
    return config, "" if official else doubt


def _tower(tensors: Shapes, names: Mapping[str, str | Source], width: int) -> dict[str, int | None]:
    """The fields that both towers' configs have, from the names of a tower of one block."""
    blocks, projection_dim = names["blocks.0.fc1"].partition(".0.")[0], None
    if source_of(names, "projection.weight").key in tensors:
        projection_dim, _ = _shape(tensors, names, "projection.weight")
    return {
        "width": width,
        "layers": count(tensors, rf"{re.escape(blocks)}\.(\d+)\."),
        "mlp_width": _shape(tensors, names, "blocks.0.fc1.weight")[0],
        "projection_dim": projection_dim,
    }


def _shape(tensors: Shapes, names: Mapping[str, str | Source], ours: str) -> tuple[int, ...]:
    source = source_of(names, ours)
    return source.our_shape(tensors.shape(source.key))


def text_from_json(text: CLIPTextConfig, config: dict, path: Path) -> CLIPTextConfig:
    """What diffusers stores is run whole: SD2's folder holds 23 of the 24 blocks."""
    text = _clip_from_json(text, config, path, heads=8)
    if text.vocab_size < CLIPTextConfig.vocab_size:  # a tiny test model with special ids of its own
        ids = {f"{name}_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = replace(text, **{name: value for name, value in ids.items() if type(value) is int})
    return replace(text, skip=0)


def vision_from_json(vision: CLIPVisionConfig, config: dict, path: Path) -> CLIPVisionConfig:
    return _clip_from_json(vision, config, path, heads=12)


def _clip_from_json(clip: CLIPTextConfig | CLIPVisionConfig, config: dict, path: Path, *, heads: int):
    """heads: transformers' default, which its config.json may leave out."""
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; known: gelu, quick_gelu")
    heads = number(config, "num_attention_heads", heads, int, path)
    if clip.width % heads:
        raise CheckpointError(f"{path}: {heads} heads do not divide the width {clip.width}")
    return replace(
        clip, heads=heads, activation=activation, norm_eps=number(config, "layer_norm_eps", 1e-5, float, path)
    )


def _clip_to_json(clip: CLIPTextConfig | CLIPVisionConfig, layers: int) -> dict:
    return {
        "attention_dropout": 0.0,
        "hidden_act": clip.activation,
        "hidden_size": clip.width,
        "intermediate_size": clip.mlp_width,
        "layer_norm_eps": clip.norm_eps,
        "num_attention_heads": clip.heads,
        "num_hidden_layers": layers,
        "projection_dim": clip.projection_dim or clip.width,
    }


def text_to_json(config: ModelConfig) -> dict:
    text = config.text
    return _clip_to_json(text, text.layers - text.skip) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "max_position_embeddings": text.length,
        "pad_token_id": text.pad_id,
        "vocab_size": text.vocab_size,
    }


def vision_to_json(config: ModelConfig) -> dict:
    vision = config.vision
    return _clip_to_json(vision, vision.layers) | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "num_channels": 3,
        "patch_size": vision.patch_size,
    }


# --------------------------------------------------------------------------------------------------- the declarations


def text_in_folder(declared: CLIPTextConfig, inferred: CLIPTextConfig) -> CLIPTextConfig:
    """diffusers holds neither the block that SD2 leaves out nor the projection, and says the ids elsewhere."""
    unsaid = ("pad_id", "bos_id", "eos_id", "dialect", "unknown_id", "projection_dim")
    run = replace(declared, layers=declared.layers - declared.skip, skip=0)
    return replace(run, **{name: getattr(inferred, name) for name in unsaid})


def text_not_in_folder(config: CLIPTextConfig) -> tuple[str, ...]:
    return (*(f"blocks.{i}." for i in range(config.layers - config.skip, config.layers)), "projection")


def _about(config: CLIPTextConfig | CLIPVisionConfig, official: Mapping[int, str]) -> str:
    return official.get(config.width, f"{config.width} wide") + f", {config.layers} layers"


_ORIGINAL_TEXT = ("cond_stage_model.transformer.", "")

TEXT = NetworkFormat(
    name="text",
    title="text encoder",
    kind="a CLIP text encoder alone",
    module=CLIPText,
    names=text_names,
    namings=(
        Naming("hf", _ORIGINAL_TEXT, "text_model.embeddings.token_embedding.weight", "text_model|text_projection"),
        Naming(  # transformers 5 and NovelAI-style merges leave out the level "text_model."
            "hf",
            _ORIGINAL_TEXT,
            "embeddings.token_embedding.weight",
            "embeddings|encoder|final_layer_norm|text_projection",
            rename=lambda name: name if name.startswith("text_projection") else f"text_model.{name}",
        ),
        Naming(
            "openclip",
            ("cond_stage_model.model.", ""),
            "ln_final.weight",
            "token_embedding|positional_embedding|transformer|ln_final|text_projection",
        ),
    ),
    config_from_shapes=text_from_shapes,
    not_in_shapes=("heads", "activation", "skip", "bos_id", "eos_id", "pad_id", "dialect", "unknown_id", "norm_eps"),
    prefixes={"hf": "cond_stage_model.transformer.", "openclip": "cond_stage_model.model."},
    single_file_dialect=lambda config: "openclip" if config.activation == "gelu" else "hf",
    subfolder="text_encoder",
    weights="model",
    folder_dialect="hf",
    config_from_json=text_from_json,
    config_to_json=text_to_json,
    in_folder=text_in_folder,
    not_in_folder=text_not_in_folder,
    about=lambda config: _about(config, {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14"}),
)
VISION = NetworkFormat(
    name="vision",
    title="image encoder",
    kind="a CLIP vision encoder alone",
    module=CLIPVision,
    names=vision_names,
    namings=(
        Naming("openclip", ("embedder.model.visual.", "visual."), "class_embedding"),
        Naming("hf", ("",), "vision_model.embeddings.class_embedding", "vision_model|visual_projection"),
        Naming(
            "hf",
            ("",),
            "embeddings.class_embedding",
            "embeddings|pre_layrnorm|encoder|post_layernorm|visual_projection",
            rename=lambda name: name if name.startswith("visual_projection") else f"vision_model.{name}",
        ),
    ),
    config_from_shapes=vision_from_shapes,
    not_in_shapes=("heads", "activation", "norm_eps"),
    prefixes={"openclip": "embedder.model.visual."},
    single_file_dialect=lambda config: "openclip",
    subfolder="image_encoder",
    weights="model",
    folder_dialect="hf",
    config_from_json=vision_from_json,
    config_to_json=vision_to_json,
    about=lambda config: _about(config, {1024: "CLIP ViT-L/14", 1280: "OpenCLIP ViT-H/14"}),
)
