"""Files that are no networks of Stable Diffusion 1.x or 2.x, told by names that only they have.

One table for all who meet such files: loading, `minisd inspect` and the readers of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# (what only they have among their names, what they are); the first match wins
CHECKPOINTS = (
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
ADAPTERS = (
    (r"lora_(unet|te\d?)_|(unet|text_encoder)\..*lora_[AB]\.|.*\.lora_(down|up)\.|.*_lora\.(down|up)\.", "a LoRA"),
    (r"(string_to_param|emb_params|clip_[lg])(\.|$)", "a textual-inversion embedding"),
)
# kinds of adapter that are more than two matrices to a layer: (pattern anywhere in a name, kind)
LYCORIS = (
    (r"\.hada_w", "LoHa"),
    (r"\.lokr_w", "LoKr"),
    (r"\.dora_scale$|lora_magnitude", "DoRA"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.oft_(blocks|diag)", "OFT"),
    (r"\.on_input$", "IA3"),
    (r"\.diff(_b)?$", "full-difference"),
)
# base models whose layers have other names than Stable Diffusion 1.x's and 2.x's, by the names in a LoRA
LORA_BASES = (
    (r"lora_te2_|text_encoder_2", "SDXL"),
    (r"(double|single|joint)_(transformer_)?blocks", "Flux or SD3"),
)


def foreign_checkpoint(names: Iterable[str]) -> str:
    """What another kind of model's file is; "" for none that is known."""
    return next(_matches(CHECKPOINTS, names, at_beginning=True), "")


def foreign_kind(names: Iterable[str]) -> str:
    """The same, adapters included."""
    return next(_matches(CHECKPOINTS + ADAPTERS, names, at_beginning=True), "")


def lycoris_kinds(names: Iterable[str]) -> list[str]:
    """The kinds of adapter in a file that are more than two matrices to a layer."""
    return list(_matches(LYCORIS, names))


def lora_base(names: Iterable[str]) -> str:
    """The base model of a LoRA, if its layers have other names than Stable Diffusion 1.x's and 2.x's; else ""."""
    return next(_matches(LORA_BASES, names), "")


def _matches(table: Iterable[tuple[str, str]], names: Iterable[str], *, at_beginning: bool = False) -> Iterator[str]:
    text, start = "\n".join(names), "^" if at_beginning else ""  # one search over all names: 10 × quicker
    return (kind for pattern, kind in table if re.search(f"{start}(?:{pattern})", text, re.MULTILINE))
