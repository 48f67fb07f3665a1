"""Loading: detect by content, rename, check every name and shape, assign without a copy; and say what was done."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from minisd.checkpoints.building import Cast, build, keep_dtype, on_meta, refuse_doubt
from minisd.checkpoints.detect import Contents, Part
from minisd.checkpoints.families import model_config
from minisd.checkpoints.files.entries import refuse
from minisd.checkpoints.keymaps import keymap
from minisd.checkpoints.networks import NETWORKS, WHOLE
from minisd.checkpoints.networks.format import Renamed
from minisd.checkpoints.opening import Opened, open_checkpoint, opened_configs
from minisd.config import ModelConfig, PredictionType


@dataclass
class Checkpoint:
    """A loaded model: the networks by name ("unet", "vae", "text", "vision"), and all that a file held besides.

    extras: tensors that no network here runs, under the original's names, kept so that saving loses nothing.
    report: lines that say what the file is, what was chosen and what left out.
    """

    config: ModelConfig
    networks: dict[str, nn.Module]
    extras: Renamed | dict[str, torch.Tensor]
    report: list[str]
    prediction_evidence: str = ""
    global_step: int | None = None
    added_tokens: dict[str, list[int]] = field(default_factory=dict)


def load_checkpoint(
    path: str | os.PathLike,
    *,
    weights: Literal["raw", "ema"] = "raw",
    prediction: PredictionType | None = None,
    vae: str | os.PathLike | None = None,
    config: ModelConfig | None = None,
    cast: Cast = keep_dtype,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Load a whole model from a single file or a diffusers folder.

    weights: "raw" is what stands under the ordinary names (in pruned files that already is the EMA), "ema" the separate
    copy of full training files. prediction: what the U-Net's output means, where the file does not tell or is wrong.
    vae: a file or folder whose VAE replaces the checkpoint's. config: for networks of unofficial shapes, in files that
    hold no config. cast: the dtype to load for the dtype in the file. CheckpointError, naming the file, for whatever
    cannot be loaded exactly.
    """
    if weights not in ("raw", "ema"):
        raise ValueError(f"weights={weights!r}; allowed: raw, ema")
    if prediction not in (None, "eps", "v", "x_0"):
        raise ValueError(f"prediction={prediction!r}; allowed: eps, v, x_0")
    opened = open_checkpoint(path, config=config)
    parts = opened.contents.parts
    if vae is not None:
        parts["vae"] = _drop_in_vae(opened, vae)
    _require_whole(opened)

    has_ema = any(name.startswith("model_ema.diffusion_model") for name in opened.extras)
    if weights == "ema":
        _use_ema(opened, has_ema)
    config, evidence = _settle(opened, prediction)
    networks = {
        name: build(
            name,
            parts[name],
            cast=cast,
            device=device,
            rest=opened.text_rest if name == "text" else None,
            where=vae if name == "vae" and vae is not None else path,
        )
        for name in WHOLE
        if name in parts
    }
    _check_tokens(opened, config)
    return Checkpoint(
        config=config,
        networks=networks,
        extras=opened.extras,
        report=_report(opened, config, weights, has_ema, networks, evidence),
        prediction_evidence=evidence,
        global_step=opened.global_step,
        added_tokens=opened.added_tokens,
    )


def load_network(
    path: str | os.PathLike,
    name: Literal["vae", "control", "text", "vision", "unet"],
    *,
    cast: Cast = keep_dtype,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """One network out of a file or folder that holds it, alone or among others."""
    opened = open_checkpoint(path)
    return build(name, _part(opened, name), cast=cast, device=device, rest=opened.text_rest, where=path)


def _part(opened: Opened, name: str) -> Part:
    if name not in opened.contents.parts:
        refuse(opened.path, f"it holds no {NETWORKS[name].module.__name__}: it is {opened.contents.kind}")
    return opened.contents.parts[name]


def _drop_in_vae(opened: Opened, path: str | os.PathLike) -> Part:
    """The VAE of another file or folder. Where shapes leave its scale factor open, it has that of the replaced one."""
    part, own = _part(open_checkpoint(path), "vae"), opened.contents.parts.get("vae")
    opened.notes.append(f"the VAE is that of {path}")
    replaced = opened.config.vae if opened.config else own and own.config
    if part.doubt and replaced and not (own and own.doubt) and NETWORKS["vae"].agrees(replaced, part.config):
        return replace(part, config=replaced, doubt="")
    return part


def _require_whole(opened: Opened) -> None:
    parts, kind = opened.contents.parts, opened.contents.kind
    missing = [name for name in ("unet", "vae", "text") if name not in parts]
    if missing:
        present = ", ".join(f"{name}: {len(part.tensors)} tensors" for name, part in parts.items())
        hint = ": give one with vae=" if missing == ["vae"] else ""
        needs = f"a whole model also needs {' and '.join(missing)}{hint}" if present else "not a whole model"
        refuse(opened.path, f"it is {kind}{f' ({present})' if present else ''}; {needs}")
    if doubt := next((part.doubt for name, part in parts.items() if part.doubt and name in WHOLE), ""):
        refuse_doubt(opened.path, doubt)
    if foreign := foreign_tensors(opened.contents):
        refuse(opened.path, f"{len(foreign)} tensors in its networks are not Stable Diffusion's, first: {foreign[0]}")


def foreign_tensors(contents: Contents) -> list[str]:
    """Tensors under a network's prefix that the network does not have: another architecture, not leftovers."""
    prefixes = tuple(prefix for declared in NETWORKS.values() for prefix in declared.prefixes.values())
    return [name for name in contents.unknown if name.startswith(prefixes)]


def _use_ema(opened: Opened, has_ema: bool) -> None:
    """Point the U-Net's names at the EMA copies, whose names are `model_ema.` + the key without `model.` and dots."""
    if not has_ema:
        refuse(
            opened.path,
            "it has no separate EMA weights (model_ema.*). Pruned files carry the EMA under the ordinary names: "
            'leave out weights="ema"',
        )
    unet = opened.contents.parts["unet"]
    keys = [source.key for source in keymap(on_meta("unet", unet.config, opened.path), "ldm").values()]
    renamed = {key: "model_ema.diffusion_model" + key.replace(".", "") for key in keys}
    if lost := [ema for ema in renamed.values() if ema not in opened.extras]:
        refuse(opened.path, f"{len(lost)} EMA tensors are missing, first: {lost[0]}")
    opened.contents.parts["unet"] = replace(unet, dialect="ldm", tensors=Renamed(opened.extras, renamed))
    opened.extras = Renamed(opened.extras, {n: n for n in opened.extras if not n.startswith("model_ema.")})


def _settle(opened: Opened, prediction: PredictionType | None) -> tuple[ModelConfig, str]:
    """The config of what is loaded, and why its prediction is what it is."""
    inferred, evidence = opened.prediction
    if prediction is not None:
        against = f", against {inferred}: {evidence}" if inferred not in (None, prediction) else ""
        evidence = "prediction= was given" + against
    elif inferred is None:
        refuse(
            opened.path, f'nothing tells whether its U-Net predicts eps or v ({evidence}): give prediction="eps" or "v"'
        )
    prediction = prediction or inferred
    config = opened.config or model_config(opened_configs(opened.contents), prediction)
    return replace(config, vae=opened.contents.parts["vae"].config, prediction=prediction), evidence


def _check_tokens(opened: Opened, config: ModelConfig) -> None:
    for token, ids in opened.added_tokens.items():
        if ids[-1] >= config.text.vocab_size:
            refuse(
                opened.path,
                f"the added token {token!r} has the ids {ids}, its text encoder only {config.text.vocab_size} rows",
            )


def _report(opened: Opened, config: ModelConfig, weights, has_ema, networks, evidence) -> list[str]:
    lines = [
        f"{opened.path}: {config.name}, {opened.layout} layout",
        f"prediction: {config.prediction} ({evidence})",
        f"weights: {weights}"
        + (' (the file also holds EMA weights: weights="ema")' if has_ema and weights == "raw" else ""),
    ]
    for name, network in networks.items():
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in {p.dtype for p in network.parameters()})
        count = sum(p.numel() for p in network.parameters())
        lines.append(f"{name}: {count:,} parameters, {', '.join(dtypes)}")
    lines += [f"not run: {len(names)} × {reason}" for reason, names in opened.contents.known.items()]
    if unknown := opened.contents.unknown:
        lines.append(f"unknown, kept but not run: {len(unknown)} tensors, first: {unknown[0]}")
    if opened.added_tokens:
        lines.append(f"added tokens: {', '.join(opened.added_tokens)}")
    return lines + opened.notes
