"""What a checkpoint holds, told by its tensors' names and shapes alone.

`contents(tensors)` finds the networks, derives the config of each from the shapes, and accounts for every other tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minisd.checkpoints.entries import CheckpointError
from minisd.config import PRESETS, CLIPTextConfig, CLIPVisionConfig, ControlNetConfig, UNetConfig, VAEConfig

SCHEDULE_BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
).split()

# Tensors that official files hold and no network here runs: (pattern, what they are).
KNOWN_NOT_RUN = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (rf"((low_scale_model|noise_augmentor)\.)?({'|'.join(SCHEDULE_BUFFERS)})$", "schedule buffers (recomputed)"),
        (r"noise_augmentor\.data_(mean|std)$", "unCLIP embedding statistics"),
        (r"(.*\.)?logvar$", "training log-variance"),
        (r".*position_ids$", "position indices 0, 1, 2, …"),
        (r".*logit_scale$", "CLIP temperature"),
        (r".*attn_mask$", "causal mask (recomputed)"),
        (r".*text_projection(\.weight)?$", "CLIP text projection"),
        (r"model_ema\.", "EMA weights"),
        (r"depth_model\.", "MiDaS depth model"),
        (r"embedder\.", "CLIP image encoder's unused parts"),
        (r"(first_stage_model\.)?loss\.", "VAE training loss"),
        (r"safety_checker\.", "safety checker"),
    )
)

# Whole kinds of file that are not run here, by names that only they have: (pattern, kind).
FOREIGN = (
    (r"conditioner\.embedders\.", "an SDXL checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "an SD3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux checkpoint"),
    (r"add_embedding\.linear_1\.", "an SDXL U-Net in diffusers layout"),
    (r"lora_(unet|te\d?)_|(unet|text_encoder)\..*lora_[AB]\.|.*\.lora_(down|up)\.|.*_lora\.(down|up)\.", "a LoRA"),
    (r"(string_to_param|emb_params|clip_[lg])(\.|$)", "a textual-inversion embedding"),
)


class Renamed(Mapping[str, Tensor]):
    """Part of a file's tensors under other names: `names` maps the new name to the file's. Lazy, like the file."""

    def __init__(self, file, names: Mapping[str, str]):
        self.file, self.names = file, dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.file[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.file.shape(self.names[name]))

    def dtype(self, name: str) -> torch.dtype:
        return self.file.dtype(self.names[name])

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.file.read(self.names[name], dtype)


@dataclass
class Part:
    """One network of a file: its config, the dialect of its names, and its tensors under that dialect's names.

    doubt: what shapes alone leave open about the config; empty once a config file or metadata has said it.
    """

    config: object
    dialect: str
    tensors: Renamed
    doubt: str = ""


@dataclass
class Contents:
    """Everything in a file: networks ("unet", "vae", "text", "vision", "control"), and what belongs to none of them."""

    kind: str
    parts: dict[str, Part]
    known: dict[str, list[str]]
    unknown: list[str]


def contents(file) -> Contents:
    """Account for every tensor of an LDM single file, or of one network's file in either layout.

    file: a mapping name → tensor with shape(name), dtype(name) and read(name, dtype), as `open_tensors` gives.
    """
    names = list(file)
    for pattern, kind in FOREIGN:
        if any(re.match(pattern, name) for name in names):
            return Contents(kind, {}, {}, names)
    found = _views(file, names)
    parts = {network: _CONFIG_OF[network](view, dialect) for network, (dialect, view) in found.items()}
    used = {original for part in parts.values() for original in part.tensors.names.values()}
    known, unknown = {}, []
    for name in names:
        if name in used:
            continue
        reason = next((reason for pattern, reason in KNOWN_NOT_RUN if pattern.match(name)), None)
        if reason is None:
            unknown.append(name)
        else:
            known.setdefault(reason, []).append(name)
    return Contents(_kind(set(parts), file, names), parts, known, unknown)


def _kind(parts: set[str], file, names: list[str]) -> str:
    if {"unet", "vae"} <= parts or {"unet", "text"} <= parts:
        return "a Stable Diffusion checkpoint" + (" with a ControlNet" if "control" in parts else "")
    alone = {
        "control": "a ControlNet",
        "unet": "a U-Net alone",
        "vae": "a VAE alone",
        "text": "a CLIP text encoder alone",
    }
    for network, kind in alone.items():
        if network in parts:
            return kind
    if parts == {"vision"}:
        return "a CLIP vision encoder alone"
    widths = {tuple(file.shape(name))[-1:] for name in names if len(file.shape(name)) <= 2}
    if names and len(names) <= 4 and widths and widths <= {(768,), (1024,), (1280,)}:
        return "a textual-inversion embedding"
    return "no kind of checkpoint that minisd knows"


# ------------------------------------------------------------------------------------------- where each network stands


def _views(file, names: list[str]) -> dict[str, tuple[str, Renamed]]:
    """network → (dialect, its tensors under the dialect's names), for every network that the file holds."""

    def view(prefix: str, rename=lambda name: name, pattern: str = "") -> Renamed:
        mine = [n for n in names if n.startswith(prefix) and re.match(pattern, n[len(prefix) :])]
        mine = [n for n in mine if not any(p.match(n) for p, _ in _INSIDE)]
        return Renamed(file, {rename(n[len(prefix) :]): n for n in mine})

    has, found = set(names).__contains__, {}
    for prefix in ("model.diffusion_model.", ""):
        if has(prefix + "input_blocks.0.0.weight") and (prefix or not has("input_hint_block.0.weight")):
            found["unet"] = "ldm", view(prefix, pattern=_UNET_LDM)
            break
    if has("conv_in.weight") and has("time_embedding.linear_1.weight") and not has(_HINT):
        found["unet"] = "diffusers", view("")

    for prefix in ("control_model.", ""):
        if has(prefix + "input_hint_block.0.weight"):
            found["control"] = "ldm", view(prefix, pattern=_UNET_LDM)
            break
    if has(_HINT):
        found["control"] = "diffusers", view("")

    for prefix in ("first_stage_model.", ""):
        if has(prefix + "encoder.down.0.block.0.norm1.weight"):
            found["vae"] = "ldm", view(prefix, pattern=_VAE)
            break
    if has("encoder.down_blocks.0.resnets.0.norm1.weight"):
        found["vae"] = "diffusers", view("", rename=_new_vae_name, pattern=_VAE)

    for prefix in ("cond_stage_model.transformer.", ""):
        if has(prefix + "text_model.embeddings.token_embedding.weight"):
            found["text"] = "hf", view(prefix, pattern="text_model|text_projection")
        elif has(prefix + "embeddings.token_embedding.weight"):
            # transformers 5 and NovelAI-style merges leave out the level "text_model."
            found["text"] = (
                "hf",
                view(prefix, rename=_with_text_model, pattern="embeddings|encoder|final_layer|text_pro"),
            )
        if "text" in found:
            break
    for prefix in ("cond_stage_model.model.", ""):
        if (
            "text" not in found
            and has(prefix + "transformer.resblocks.0.attn.in_proj_weight")
            and has(prefix + "ln_final.weight")
        ):
            found["text"] = (
                "openclip",
                view(prefix, pattern="(token_emb|positional_emb|transformer|ln_final|text_proj)"),
            )

    for prefix in ("embedder.model.visual.", "visual."):
        if has(prefix + "class_embedding"):
            found["vision"] = "openclip", view(prefix)
            break
    if has("vision_model.embeddings.class_embedding"):
        found["vision"] = "hf", view("", pattern="vision_model|visual_projection")
    return found


_HINT = "controlnet_cond_embedding.conv_in.weight"
_UNET_LDM = "time_embed|label_emb|input_blocks|middle_block|output_blocks|out\\.|zero_convs|input_hint_block"
_VAE = "encoder|decoder|quant_conv|post_quant_conv"
# known leftovers that stand among a network's own tensors
_INSIDE = tuple(
    (p, r) for p, r in KNOWN_NOT_RUN if "position" in p.pattern or "logit" in p.pattern or "mask" in p.pattern
)


def _new_vae_name(name: str) -> str:
    """diffusers < 0.15 called the projections of the VAE's attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(mid_block\.attentions\.0\.){old}\.", rf"\g<1>{new}.", name)
    return name


def _with_text_model(name: str) -> str:
    return name if name.startswith("text_projection") else f"text_model.{name}"


# --------------------------------------------------------------------------------------------------- configs by shape


def _count(view: Renamed, pattern: str) -> int:
    """One more than the largest number that stands in place of the group in any name; 0 where none matches."""
    return max((int(m[1]) + 1 for name in view if (m := re.match(pattern, name))), default=0)


def _unet_part(view: Renamed, dialect: str) -> Part:
    shape, name = view.shape, _UNET_NAMES[dialect]
    channels, in_channels = shape(name["conv_in"])[:2]
    levels, widths = [], {}
    attention_levels, cross_only_levels, transformer = set(), set(), None
    for level, block, attention in _encoder_blocks(view, dialect):
        levels.append(level)
        widths[level] = shape(f"{block}.{name['conv1']}.weight")[0]
        if f"{attention}.proj_in.weight" in view:
            transformer = attention
            attention_levels.add(level)
            if shape(f"{attention}.transformer_blocks.0.attn1.to_k.weight")[1] != widths[level]:
                cross_only_levels.add(level)
    blocks_per_level = {levels.count(level) for level in levels}
    if transformer is None or len(blocks_per_level) != 1:
        raise CheckpointError(
            "its U-Net has no cross-attention or an irregular number of blocks per level: it is none of Stable "
            "Diffusion 1.x or 2.x"
        )
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=shape(name["conv_out"])[0] if name["conv_out"] in view else UNetConfig.out_channels,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths.values()),
        num_res_blocks=blocks_per_level.pop(),
        attention_levels=tuple(sorted(attention_levels)),
        cross_only_levels=tuple(sorted(cross_only_levels)),
        num_heads=1,
        transformer_depth=_count(view, re.escape(transformer) + r"\.transformer_blocks\.(\d+)\."),
        context_dim=shape(f"{transformer}.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=len(shape(f"{transformer}.proj_in.weight")) == 2,
        num_classes=shape(name["label"])[0] if name["label"] in view else None,
        vector_dim=shape(name["vector"])[1] if name["vector"] in view else None,
        norm_groups=32,
    )
    config, doubt = _with_heads(config)
    return Part(config, dialect, view, doubt)


_UNET_NAMES = {
    "ldm": {
        "conv_in": "input_blocks.0.0.weight",
        "conv_out": "out.2.weight",
        "label": "label_emb.weight",
        "vector": "label_emb.0.0.weight",
        "conv1": "in_layers.2",
    },
    "diffusers": {
        "conv_in": "conv_in.weight",
        "conv_out": "conv_out.weight",
        "label": "class_embedding.weight",
        "vector": "class_embedding.linear_1.weight",
        "conv1": "conv1",
    },
}


def _encoder_blocks(view: Renamed, dialect: str) -> Iterator[tuple[int, str, str]]:
    """(level, residual block, the transformer that would follow it) down the encoder."""
    if dialect == "diffusers":
        for level in range(_count(view, r"down_blocks\.(\d+)\.")):
            for i in range(_count(view, rf"down_blocks\.{level}\.resnets\.(\d+)\.")):
                yield level, f"down_blocks.{level}.resnets.{i}", f"down_blocks.{level}.attentions.{i}"
        return
    level = 0
    for i in range(1, _count(view, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in view:
            level += 1
        else:
            yield level, f"input_blocks.{i}.0", f"input_blocks.{i}.1"


def _with_heads(config: UNetConfig) -> tuple[UNetConfig, str]:
    """Shapes do not show how a width is split into heads: the official networks of the same shapes do."""
    for preset in PRESETS.values():
        if replace(preset.unet, num_heads=1, head_width=None) == config:
            return preset.unet, ""
    by_width = config.linear_projection
    says = "heads of width 64, as in SD2" if by_width else "8 heads, as in SD1"
    try:
        config = replace(config, num_heads=None if by_width else 8, head_width=64 if by_width else None)
    except ValueError:
        says = "one head"
    return config, f"no official U-Net has these shapes, and they do not tell its heads; {says} would be a guess"


def _control_part(view: Renamed, dialect: str) -> Part:
    part = _unet_part(view, dialect)
    if dialect == "ldm":
        hints = sorted((int(n.split(".")[1]), n) for n in view if re.match(r"input_hint_block\.\d+\.weight", n))
        shapes = [view.shape(name) for _, name in hints]
    else:
        blocks = _count(view, r"controlnet_cond_embedding\.blocks\.(\d+)\.")
        names = ["conv_in", *(f"blocks.{i}" for i in range(blocks)), "conv_out"]
        shapes = [view.shape(f"controlnet_cond_embedding.{name}.weight") for name in names]
    widths = (shapes[0][0], *(s[0] for s in shapes[2:-1:2]))
    return Part(ControlNetConfig(part.config, shapes[0][1], widths), dialect, view, part.doubt)


def _vae_part(view: Renamed, dialect: str) -> Part:
    if dialect == "ldm":
        level, block = r"encoder\.down\.(\d+)\.", "encoder.down.{}.block.0.conv1.weight"
        blocks = r"encoder\.down\.0\.block\.(\d+)\."
    else:
        level, block = r"encoder\.down_blocks\.(\d+)\.", "encoder.down_blocks.{}.resnets.0.conv1.weight"
        blocks = r"encoder\.down_blocks\.0\.resnets\.(\d+)\."
    channels = view.shape("encoder.conv_in.weight")[0]
    latents = view.shape("decoder.conv_in.weight")[1]
    if latents != 4:
        raise CheckpointError(
            f"its VAE has {latents} latent channels, Stable Diffusion 1.x and 2.x have 4: SD3's or Flux's?"
        )
    mult = tuple(view.shape(block.format(i))[0] // channels for i in range(_count(view, level)))
    config = VAEConfig(
        image_channels=view.shape("encoder.conv_in.weight")[1],
        latent_channels=latents,
        channels=channels,
        channel_mult=mult,
        num_res_blocks=_count(view, blocks),
        scale_factor=PRESETS["SD_X4_UPSCALER"].vae.scale_factor if len(mult) == 3 else VAEConfig.scale_factor,
    )
    return Part(config, dialect, view)


def _text_part(view: Renamed, dialect: str) -> Part:
    if dialect == "hf":
        block = "text_model.encoder.layers.{}"
        tokens, positions = (f"text_model.embeddings.{x}_embedding.weight" for x in ("token", "position"))
        mlp, projection = "mlp.fc1.weight", "text_projection.weight"
    else:
        block, tokens, positions = "transformer.resblocks.{}", "token_embedding.weight", "positional_embedding"
        mlp, projection = "mlp.c_fc.weight", "text_projection"
    width, layers = view.shape(tokens)[1], _count(view, re.escape(block).replace(r"\{\}", r"(\d+)") + r"\.")
    # ViT-L/14 is OpenAI's, with quick-GELU; ViT-H/14 is OpenCLIP's, with GELU, and SD2 leaves out its last block
    openclip = dialect == "openclip" or width == 1024
    base = PRESETS["SD2_BASE" if openclip else "SD1"].text
    config = replace(
        base,
        vocab_size=view.shape(tokens)[0],
        length=view.shape(positions)[0],
        width=width,
        layers=layers,
        heads=max(width // 64, 1),
        mlp_width=view.shape(f"{block.format(0)}.{mlp}")[0],
        skip=base.skip if layers == base.layers else 0,
        projection_dim=_projection_dim(view, projection, dialect),
    )
    return Part(config, dialect, view)


def _vision_part(view: Renamed, dialect: str) -> Part:
    hf = dialect == "hf"
    patch = view.shape("vision_model.embeddings.patch_embedding.weight" if hf else "conv1.weight")
    positions = view.shape("vision_model.embeddings.position_embedding.weight" if hf else "positional_embedding")[0]
    block = "vision_model.encoder.layers.{}" if hf else "transformer.resblocks.{}"
    width, patch_size = patch[0], patch[-1]
    config = CLIPVisionConfig(
        image_size=round((positions - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        width=width,
        layers=_count(view, re.escape(block).replace(r"\{\}", r"(\d+)") + r"\."),
        heads=16 if width == 1280 else max(width // 64, 1),
        mlp_width=view.shape(f"{block.format(0)}.mlp.{'fc1' if hf else 'c_fc'}.weight")[0],
        activation="gelu" if width == 1280 else "quick_gelu",
        projection_dim=_projection_dim(view, "visual_projection.weight" if hf else "proj", dialect),
    )
    return Part(config, dialect, view)


def _projection_dim(view: Renamed, name: str, dialect: str) -> int | None:
    if name not in view:
        return None
    return view.shape(name)[0 if dialect == "hf" else 1]


_CONFIG_OF = {
    "unet": _unet_part,
    "control": _control_part,
    "vae": _vae_part,
    "text": _text_part,
    "vision": _vision_part,
}
