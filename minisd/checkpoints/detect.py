"""What a checkpoint holds, told by its tensors' names and shapes alone.

`contents(file)` finds the networks, reads the config of each off its shapes, and accounts for every other tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from minisd.checkpoints.foreign import foreign_kind
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import Renamed

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
    if kind := foreign_kind(names):
        return Contents(kind, {}, {}, names)
    parts = {}
    for network, declared in NETWORKS.items():
        views = ((naming.dialect, naming.view(file, names)) for naming in declared.namings)
        dialect, view = next((pair for pair in views if pair[1] is not None), ("", None))
        if view is not None:
            config, doubt = declared.config_from_shapes(view, dialect)
            parts[network] = Part(config, dialect, view, doubt)
    used = {original for part in parts.values() for original in part.tensors.names.values()}
    result = Contents(_kind(set(parts), file, names), parts, {}, [])
    account([name for name in names if name not in used], result)
    return result


def account(names: Iterable[str], contents: Contents, folder: str = "") -> None:
    """Sort tensors that no network uses into the known and the unknown, listed with the folder they stand in."""
    for name in names:
        reason = next((reason for pattern, reason in KNOWN_NOT_RUN if pattern.match(name)), None)
        (contents.unknown if reason is None else contents.known.setdefault(reason, [])).append(folder + name)


def _kind(parts: set[str], file, names: list[str]) -> str:
    if {"unet", "vae"} <= parts or {"unet", "text"} <= parts:
        return "a Stable Diffusion checkpoint" + (" with a ControlNet" if "control" in parts else "")
    if {"text", "vision"} <= parts:
        return "a CLIP model"
    for network in ("control", *NETWORKS):
        if network in parts:
            return NETWORKS[network].kind
    widths = {tuple(file.shape(name))[-1:] for name in names if len(file.shape(name)) <= 2}
    if names and len(names) <= 4 and widths and widths <= {(768,), (1024,), (1280,)}:
        return "a textual-inversion embedding"
    return "no kind of checkpoint that minisd knows"
