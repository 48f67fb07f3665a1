"""What a checkpoint holds, told by its tensors' names and shapes alone.

`contents(file)` finds the networks, reads the config of each off its shapes, and accounts for every other tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.checkpoints.shapes import config_of

SCHEDULE_BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)

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
    parts = {}
    for place in PLACES:
        view = None if place.network in parts else place.view(file, names)
        if view is not None:
            config, doubt = config_of(place.network, view, place.dialect)
            parts[place.network] = Part(config, place.dialect, view, doubt)
    used = {original for part in parts.values() for original in part.tensors.names.values()}
    found = Contents(_kind(set(parts), file, names), parts, {}, [])
    account([name for name in names if name not in used], found)
    return found


def account(names: Iterable[str], found: Contents, place: str = "") -> None:
    """Sort tensors that no network uses into the known and the unknown, listed with the place they stand in."""
    for name in names:
        reason = next((reason for pattern, reason in KNOWN_NOT_RUN if pattern.match(name)), None)
        (found.unknown if reason is None else found.known.setdefault(reason, [])).append(place + name)


def _kind(parts: set[str], file, names: list[str]) -> str:
    if {"unet", "vae"} <= parts or {"unet", "text"} <= parts:
        return "a Stable Diffusion checkpoint" + (" with a ControlNet" if "control" in parts else "")
    alone = {
        "control": "a ControlNet",
        "unet": "a U-Net alone",
        "vae": "a VAE alone",
        "text": "a CLIP text encoder alone",
        "vision": "a CLIP vision encoder alone",
    }
    if {"text", "vision"} <= parts:
        return "a CLIP model"
    for network, kind in alone.items():
        if network in parts:
            return kind
    widths = {tuple(file.shape(name))[-1:] for name in names if len(file.shape(name)) <= 2}
    if names and len(names) <= 4 and widths and widths <= {(768,), (1024,), (1280,)}:
        return "a textual-inversion embedding"
    return "no kind of checkpoint that minisd knows"


# ------------------------------------------------------------------------------------------- where each network stands


def _new_vae_name(name: str) -> str:
    """diffusers < 0.15 called the projections of the VAE's attention otherwise."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = re.sub(rf"(mid_block\.attentions\.0\.){old}\.", rf"\g<1>{new}.", name)
    return name


def _with_text_model(name: str) -> str:
    """transformers 5 and NovelAI-style merges leave out the level "text_model."."""
    return name if name.startswith("text_projection") else f"text_model.{name}"


def _with_vision_model(name: str) -> str:
    return name if name.startswith("visual_projection") else f"vision_model.{name}"


@dataclass(frozen=True)
class Place:
    """One way in which a network stands in a file: behind one of the prefixes, where there is a tensor `marker`.

    names: the beginnings of its tensors' names after the prefix. unless: a tensor that makes it another network.
    """

    network: str
    dialect: str
    prefixes: tuple[str, ...]
    marker: str
    names: str = ""
    unless: str | None = None
    rename: Callable[[str], str] = str

    def view(self, file, names: list[str]) -> Renamed | None:
        """The network's tensors under its dialect's names; None where it does not stand in this way."""
        for prefix in self.prefixes:
            if prefix + self.marker in file and (self.unless is None or prefix + self.unless not in file):
                pattern = re.compile(f"{re.escape(prefix)}({self.names})")
                mine = [name for name in names if pattern.match(name) and not INSIDE.match(name)]
                return Renamed(file, {self.rename(name[len(prefix) :]): name for name in mine})
        return None


INSIDE = re.compile(r".*(position_ids|logit_scale|attn_mask)$")  # not run, though among a network's own tensors
_UNET_LDM = r"time_embed|label_emb|input_blocks|middle_block|output_blocks|out\.|zero_convs|input_hint_block"
_VAE = r"encoder\.|decoder\.|quant_conv|post_quant_conv"
_HINT = "controlnet_cond_embedding.conv_in.weight"
_LDM_TEXT = ("cond_stage_model.transformer.", "")
PLACES = (  # of each network the first that fits
    Place(
        "unet", "ldm", ("model.diffusion_model.", ""), "input_blocks.0.0.weight", _UNET_LDM, "input_hint_block.0.weight"
    ),
    Place("unet", "diffusers", ("",), "time_embedding.linear_1.weight", unless=_HINT),
    Place("control", "ldm", ("control_model.", ""), "input_hint_block.0.weight", _UNET_LDM),
    Place("control", "diffusers", ("",), _HINT),
    Place("vae", "ldm", ("first_stage_model.", ""), "encoder.down.0.block.0.norm1.weight", _VAE),
    Place("vae", "diffusers", ("",), "encoder.down_blocks.0.resnets.0.norm1.weight", _VAE, rename=_new_vae_name),
    Place("text", "hf", _LDM_TEXT, "text_model.embeddings.token_embedding.weight", "text_model|text_projection"),
    Place(
        "text",
        "hf",
        _LDM_TEXT,
        "embeddings.token_embedding.weight",
        "embeddings|encoder|final_layer_norm|text_projection",
        rename=_with_text_model,
    ),
    Place(
        "text",
        "openclip",
        ("cond_stage_model.model.", ""),
        "ln_final.weight",
        "token_embedding|positional_embedding|transformer|ln_final|text_projection",
    ),
    Place("vision", "openclip", ("embedder.model.visual.", "visual."), "class_embedding"),
    Place("vision", "hf", ("",), "vision_model.embeddings.class_embedding", "vision_model|visual_projection"),
    Place(
        "vision",
        "hf",
        ("",),
        "embeddings.class_embedding",
        "embeddings|pre_layrnorm|encoder|post_layernorm|visual_projection",
        rename=_with_vision_model,
    ),
)
