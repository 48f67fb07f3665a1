"""Loading: detect by content, rename, check every name and shape, assign without a copy; and say what was done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from minisd.checkpoints.detect import Contents, Part, Renamed, contents
from minisd.checkpoints.diffusers_layout import EXTRA, SUBFOLDERS, Folder, open_folder
from minisd.checkpoints.evidence import prediction_of
from minisd.checkpoints.io import CheckpointError, TensorFile, open_tensors
from minisd.checkpoints.keymaps import keymap, take
from minisd.config import PRESETS, ModelConfig, Prediction
from minisd.models.clip import CLIPText, CLIPVision
from minisd.models.controlnet import ControlNet
from minisd.models.unet import UNet
from minisd.models.vae import VAE

NETWORKS = {"unet": UNet, "vae": VAE, "text": CLIPText, "vision": CLIPVision, "control": ControlNet}
PREFIXES = {  # of the original's single files
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    ("text", "hf"): "cond_stage_model.transformer.",
    ("text", "openclip"): "cond_stage_model.model.",
    "vision": "embedder.model.visual.",
    "control": "control_model.",
}
CONFIG_KEY, EVIDENCE_KEY, STEP_KEY, TOKENS_KEY = (
    f"minisd_{name}" for name in ("config", "prediction_evidence", "global_step", "added_tokens")
)


@dataclass
class Opened:
    """A checkpoint that has been opened and understood, but of which no tensor has been read."""

    path: Path
    layout: Literal["ldm", "diffusers"]
    contents: Contents
    files: list[TensorFile]
    config: ModelConfig | None = None
    prediction: tuple[Prediction | None, str] = (None, "")
    metadata: Mapping[str, str] = field(default_factory=dict)
    global_step: int | None = None
    notes: list[str] = field(default_factory=list)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # what diffusers cannot hold of the text encoder, from the folder's extra file
    text_rest: Renamed | None = None


@dataclass
class Checkpoint:
    """A loaded model: the networks by name ("unet", "vae", "text", "vision"), and all that a file held besides.

    extras: tensors that no network here runs, under the original's names, kept so that saving loses nothing.
    report: lines that say what was found, chosen and left out.
    """

    config: ModelConfig
    networks: dict[str, nn.Module]
    extras: Mapping[str, Tensor]
    report: list[str]
    prediction_evidence: str = ""
    global_step: int | None = None
    added_tokens: dict[str, list[int]] = field(default_factory=dict)


def load_checkpoint(
    path: str | os.PathLike,
    *,
    weights: Literal["raw", "ema"] = "raw",
    prediction: Prediction | None = None,
    vae: str | os.PathLike | None = None,
    cast: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    device: str | torch.device = "cpu",
) -> Checkpoint:
    """Load a whole model from a single file or a diffusers folder.

    weights: "raw" is what stands under the ordinary names (in pruned files that already is the EMA), "ema" the separate
    copy of full training files. prediction: what the U-Net's output means, where the file does not tell or is wrong.
    vae: a file or folder whose VAE replaces the checkpoint's. cast: the dtype to load for the dtype in the file.
    CheckpointError, naming the file, for whatever cannot be loaded exactly.
    """
    opened = open_checkpoint(path)
    found = opened.contents
    if vae is not None:
        found.parts["vae"] = open_checkpoint(vae).contents.parts.get("vae") or _refuse(vae, "it holds no VAE")
        opened.notes.append(f"the VAE is that of {vae}")
    if missing := [name for name in ("unet", "vae", "text") if name not in found.parts]:
        hint = ": give one with vae=" if missing == ["vae"] else ""
        _refuse(path, f"{found.kind} ({_summary(found)}); a whole model also needs {' and '.join(missing)}{hint}")
    if foreign := foreign_tensors(found):
        _refuse(path, f"{len(foreign)} tensors in its networks are not Stable Diffusion's, first: {foreign[0]}")

    has_ema = any(name.startswith("model_ema.diffusion_model") for name in opened.extras)
    if weights == "ema":
        _use_ema(opened, has_ema)
    elif weights != "raw":
        raise ValueError(f"weights={weights!r}; allowed: raw, ema")
    config = _whole_config(opened, prediction, replaced_vae=vae is not None)
    networks = {
        name: build(name, found.parts[name], cast=cast, device=device, rest=opened.text_rest, where=path)
        for name in ("unet", "vae", "text", "vision")
        if name in found.parts
    }
    evidence = "prediction= was given" if prediction else opened.prediction[1]
    return Checkpoint(
        config=config,
        networks=networks,
        extras=opened.extras,
        report=_report(opened, config, weights, has_ema, networks, evidence),
        prediction_evidence=evidence,
        global_step=opened.global_step,
        added_tokens=_added_tokens(opened.metadata, path),
    )


def load_network(
    path: str | os.PathLike,
    name: Literal["vae", "control", "text", "vision", "unet"],
    *,
    cast: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """One network out of a file or folder that holds it, alone or among others."""
    opened = open_checkpoint(path)
    part = opened.contents.parts.get(name)
    if part is None:
        _refuse(path, f"it holds no {NETWORKS[name].__name__}: it is {opened.contents.kind}")
    return build(name, part, cast=cast, device=device, rest=opened.text_rest, where=path)


def open_checkpoint(path: str | os.PathLike) -> Opened:
    """Open a file or a folder and understand it, without reading its tensors."""
    path = Path(path)
    try:
        return _open_folder(path) if path.is_dir() else _open_file(path)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, IndexError, ZeroDivisionError) as error:
        # detection reads shapes by name: a network of which half is missing ends here
        raise CheckpointError(f"{path}: incomplete, it lacks a tensor that its kind must have: {error}") from error


def _open_file(path: Path) -> Opened:
    file = open_tensors(path)
    found = contents(file)
    opened = Opened(path, "ldm", found, [file], metadata=file.metadata)
    step = file.extra.get("global_step", file.metadata.get(STEP_KEY))
    opened.global_step = int(step) if str(step).isdigit() else None
    if file.dropped:
        opened.notes.append(
            f"pickled objects left out, nothing of them was run: {', '.join(sorted(set(file.dropped)))}"
        )
    names = [name for names in found.known.values() for name in names] + found.unknown
    names += list(found.parts["control"].tensors.names.values()) if {"control", "unet"} <= set(found.parts) else []
    opened.extras = Renamed(file, {name: name for name in names})
    _config_from_metadata(opened)
    if "unet" in found.parts and opened.config is None:
        opened.prediction = prediction_of(found, path, opened.global_step, file.metadata)
    return opened


def _open_folder(path: Path) -> Opened:
    folder: Folder = open_folder(path)
    found = folder.contents
    opened = Opened(path, "diffusers", found, folder.files, notes=folder.notes)
    if (path / EXTRA).is_file():
        extra = open_tensors(path / EXTRA)
        opened.files.append(extra)
        opened.metadata = extra.metadata
        opened.global_step = int(extra.metadata[STEP_KEY]) if STEP_KEY in extra.metadata else None
        prefix = PREFIXES["text", "openclip"]
        rest = {name.removeprefix(prefix): name for name in extra if name.startswith(prefix)}
        opened.extras = Renamed(extra, {name: name for name in extra})
        _config_from_metadata(opened, rest=Renamed(extra, rest))
    if "unet" in found.parts and opened.config is None:
        opened.prediction = folder.prediction or prediction_of(found, path, None)
        schedule = folder.schedule or ModelConfig().schedule
        text = found.parts["text"].config if "text" in found.parts else None
        if text is not None and folder.pad_id is not None and text.vocab_size >= 49408:
            found.parts["text"].config = replace(text, pad_id=folder.pad_id)
        opened.config = replace(_family(found, opened.prediction[0]), schedule=schedule)
    return opened


def _config_from_metadata(opened: Opened, rest: Renamed | None = None) -> None:
    """minisd's own metadata says everything: take its config, and with it the parts that shapes do not show."""
    if CONFIG_KEY not in opened.metadata:
        return
    try:
        config = ModelConfig.from_json(opened.metadata[CONFIG_KEY])
    except ValueError as error:
        raise CheckpointError(f"{opened.path}: the config in its metadata is not readable: {error}") from error
    parts = opened.contents.parts
    for name in ("unet", "vae", "text", "vision"):
        if name in parts:
            said, seen = getattr(config, name), parts[name].config
            if rest is None and said is not None:
                parts[name].config, parts[name].doubt = said, ""
            elif name == "text" and said is not None:
                parts[name].config, opened.text_rest = said, rest
            elif said != seen:
                raise CheckpointError(
                    f"{opened.path}: {SUBFOLDERS[name]}/config.json and {EXTRA} disagree: {seen} / {said}"
                )
    opened.config = config
    opened.prediction = config.prediction, opened.metadata.get(EVIDENCE_KEY, "minisd's metadata says so")


def _family(found: Contents, prediction: Prediction | None) -> ModelConfig:
    """The preset of these shapes and this prediction, or SD1's frame under the name "custom"."""
    parts = {name: part.config for name, part in found.parts.items() if name in ("unet", "vae", "text", "vision")}
    candidates = [p for p in PRESETS.values() if p.unet == parts["unet"]]
    exact = next((p for p in candidates if p.prediction == prediction), None)
    preset = exact or (candidates[0] if candidates else replace(ModelConfig(), name="custom"))
    return replace(preset, **parts, prediction=prediction or preset.prediction)


def _whole_config(opened: Opened, prediction: Prediction | None, *, replaced_vae: bool) -> ModelConfig:
    found_prediction, evidence = opened.prediction
    if prediction not in (None, "eps", "v", "x_0"):
        raise ValueError(f"prediction={prediction!r}; allowed: eps, v, x_0")
    prediction = prediction or found_prediction
    if prediction is None:
        _refuse(
            opened.path, f'nothing tells whether its U-Net predicts eps or v ({evidence}): give prediction="eps" or "v"'
        )
    config = opened.config or _family(opened.contents, prediction)
    if replaced_vae:
        config = replace(config, vae=opened.contents.parts["vae"].config)
    return replace(config, prediction=prediction)


def _use_ema(opened: Opened, has_ema: bool) -> None:
    """Point the U-Net's names at the EMA copies, whose names are `model_ema.` + the key without `model.` and dots."""
    if not has_ema:
        _refuse(
            opened.path,
            "it has no separate EMA weights (model_ema.*). Pruned files carry the EMA under the ordinary names: "
            'leave out weights="ema"',
        )
    unet = opened.contents.parts["unet"]
    if unet.dialect != "ldm":
        _refuse(opened.path, 'weights="ema" is for the original\'s files: in a diffusers folder the EMA is kept aside')
    renamed = {name: "model_ema.diffusion_model" + name.replace(".", "") for name in unet.tensors}
    if lost := [ema for ema in renamed.values() if ema not in opened.extras]:
        _refuse(opened.path, f"{len(lost)} EMA tensors are missing, first: {lost[0]}")
    unet.tensors = Renamed(opened.files[0], renamed)
    kept = {name: name for name in opened.extras if not name.startswith("model_ema.")}
    opened.extras = Renamed(opened.files[0], kept)


def foreign_tensors(found: Contents) -> list[str]:
    """Tensors under a network's prefix that the network does not have: another architecture, not leftovers."""
    prefixes = tuple(PREFIXES.values())
    return [name for name in found.unknown if name.startswith(prefixes)]


def build(
    name: str,
    part: Part,
    *,
    cast: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype,
    device: str | torch.device = "cpu",
    rest: Renamed | None = None,
    where: str | os.PathLike = "",
) -> nn.Module:
    """The network of a part, its tensors assigned: mapped where the dtype stays, converted one by one where not."""
    if part.doubt:
        _refuse(where, f"{part.doubt}: give a diffusers folder, whose config.json says it, or a file saved by minisd")
    try:
        with torch.device("meta"):
            network = NETWORKS[name](part.config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    names = keymap(network, part.dialect)
    state = _checked(
        name, network, {ours: s for ours, s in names.items() if s.key in part.tensors}, part.tensors, where
    )
    result = take(_reader(part.tensors, cast, device), {ours: names[ours] for ours in state})
    missing = [ours for ours in names if ours not in state]
    if missing and rest is not None:
        more = {ours: s for ours, s in keymap(network, "openclip").items() if ours in missing and s.key in rest}
        result |= take(_reader(rest, cast, device), {n: more[n] for n in _checked(name, network, more, rest, where)})
        missing = [ours for ours in missing if ours not in result]
    if missing:
        _refuse(
            where, f"{len(missing)} tensors of its {name} are missing, first: {names[missing[0]].key}: is it whole?"
        )
    used = {source.key for source in names.values()}
    if foreign := [key for key in part.tensors if key not in used]:
        _refuse(where, f"{len(foreign)} tensors of its {name} belong to no layer of {part.config}, first: {foreign[0]}")
    network.load_state_dict(result, strict=True, assign=True)
    return network.eval()


def _checked(name: str, network: nn.Module, names: dict, tensors: Renamed, where) -> list[str]:
    """names, once every one of them has been found to have the network's shape and a floating dtype."""
    wanted = network.state_dict()
    shapes = take(lambda key: torch.empty(tensors.shape(key), device="meta"), _sane(names, tensors, where, name))
    for ours, seen in shapes.items():
        key = names[ours].key
        if seen.shape != wanted[ours].shape:
            _refuse(
                where, f"{key} of its {name} has shape {tuple(seen.shape)}, {tuple(wanted[ours].shape)} is expected"
            )
        if not tensors.dtype(key).is_floating_point:
            _refuse(where, f"{key} of its {name} holds {tensors.dtype(key)}: quantised files are not supported")
    return list(names)


def _sane(names: dict, tensors: Renamed, where, network: str) -> dict:
    """Refuse ranks that `take` could not even slice or transpose."""
    for source in names.values():
        rank = len(tensors.shape(source.key))
        packed = source.third is not None and (rank == 0 or tensors.shape(source.key)[0] % 3)
        if packed or ((source.transposed or source.linear) and rank != 2):
            _refuse(where, f"{source.key} of its {network} has the impossible shape {tensors.shape(source.key)}")
    return names


def _reader(tensors: Renamed, cast: Callable, device) -> Callable[[str], Tensor]:
    def read(key: str) -> Tensor:
        dtype = cast(tensors.dtype(key))
        tensor = tensors[key] if dtype == tensors.dtype(key) else tensors.read(key, dtype)
        return tensor.to(device)

    return read


def _added_tokens(metadata: Mapping[str, str], path) -> dict[str, list[int]]:
    try:
        return json.loads(metadata.get(TOKENS_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: the added tokens in its metadata are not readable: {error}") from error


def _summary(found: Contents) -> str:
    return ", ".join(f"{name}: {len(part.tensors)} tensors" for name, part in found.parts.items()) or "no network"


def _report(opened: Opened, config: ModelConfig, weights, has_ema, networks, evidence) -> list[str]:
    lines = [
        f"{opened.path}: {config.name}, {opened.layout} layout",
        f"prediction: {config.prediction} ({evidence})",
        f"weights: {weights}"
        + (' (the file also holds EMA weights: weights="ema")' if has_ema and weights == "raw" else ""),
    ]
    for name, network in networks.items():
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in network.parameters()})
        count = sum(p.numel() for p in network.parameters())
        lines.append(f"{name}: {count:,} parameters, {', '.join(dtypes)}")
    lines += [f"not run: {len(names)} × {reason}" for reason, names in opened.contents.known.items()]
    if unknown := opened.contents.unknown:
        lines.append(f"unknown, kept but not run: {len(unknown)} tensors, first: {unknown[0]}")
    return lines + opened.notes


def _refuse(path, why: str):
    raise CheckpointError(f"{path}: {why}")
