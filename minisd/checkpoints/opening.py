"""A checkpoint opened and understood, in either layout, before any of its tensors is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from minisd.checkpoints.detect import Contents, account, contents
from minisd.checkpoints.diffusers_layout import EXTRA, Folder, open_folder
from minisd.checkpoints.evidence import prediction_of
from minisd.checkpoints.families import config_from_json, model_config
from minisd.checkpoints.files import CheckpointError, TensorFile, open_tensors
from minisd.checkpoints.networks import NETWORKS, WHOLE
from minisd.checkpoints.networks.format import NEVER_RUN, Renamed
from minisd.config import ModelConfig, PredictionType
from minisd.text.tokenizer import Tokenizer

CONFIG_KEY, EVIDENCE_KEY, STEP_KEY, TOKENS_KEY = (
    f"minisd_{name}" for name in ("config", "prediction_evidence", "global_step", "added_tokens")
)


@dataclass
class Opened:
    """A checkpoint that has been opened and understood, but of which no tensor has been read.

    config: None where only shapes speak. extras: the tensors that no network here runs. text_rest: what diffusers
    cannot hold of the text encoder, from the folder's extra file.
    """

    path: Path
    layout: Literal["ldm", "diffusers"]
    contents: Contents
    files: list[TensorFile]
    config: ModelConfig | None = None
    prediction: tuple[PredictionType | None, str] = (None, "")
    metadata: Mapping[str, str] = field(default_factory=dict)
    global_step: int | None = None
    added_tokens: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    extras: Renamed = field(default_factory=lambda: Renamed({}, {}))
    text_rest: Renamed | None = None


def open_checkpoint(path: str | os.PathLike, *, config: ModelConfig | None = None) -> Opened:
    """Open a file or a folder and understand it. CheckpointError, naming it, for what cannot be understood.

    config: for models of unofficial shapes, whose heads, say, no shape tells.
    """
    path = Path(path)
    try:
        return _understand_folder(path, config) if path.is_dir() else understand(open_tensors(path), path, config)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, ArithmeticError, ValueError, TypeError) as error:
        # shapes are read by name, and unpacked: a network of which half is missing or misshapen ends here
        raise CheckpointError(f"{path}: incomplete, it lacks a tensor that its kind must have: {error}") from error


def understand(file: TensorFile, path: Path, config: ModelConfig | None = None) -> Opened:
    """What a single file is, from the names, shapes, plain values and metadata of an opened one."""
    inside = contents(file)
    opened = Opened(path, "ldm", inside, [file], metadata=file.metadata)
    opened.global_step = _step(file.extra.get("global_step", file.metadata.get(STEP_KEY)))
    if file.dropped:
        opened.notes.append(
            f"pickled objects left out, nothing of them was run: {', '.join(sorted(set(file.dropped)))}"
        )
    names = [name for names in inside.known.values() for name in names] + inside.unknown
    if "control" in inside.parts and "unet" in inside.parts:
        names += inside.parts["control"].tensors.names.values()
    opened.extras = Renamed(file, {name: name for name in names})
    if declared := _declared(opened, config):
        for name in WHOLE:
            if name in inside.parts:
                _adopt(opened, name, getattr(declared, name))
        opened.config = declared
    elif "unet" in inside.parts:
        opened.prediction = prediction_of(inside, path, opened.global_step, file.metadata)
    opened.added_tokens = _added_tokens(opened)
    return opened


def _adopt(opened: Opened, name: str, declared) -> None:
    """Take the declared config of a network, if it has the shapes of the tensors."""
    part = opened.contents.parts[name]
    if declared is None or not NETWORKS[name].agrees(declared, part.config):
        raise CheckpointError(
            f"{opened.path}: its config and the shapes of its {name} disagree: {declared} / inferred: {part.config}"
        )
    part.config, part.doubt = declared, ""


def _understand_folder(path: Path, config: ModelConfig | None) -> Opened:
    folder: Folder = open_folder(path)
    inside = folder.contents
    opened = Opened(path, "diffusers", inside, folder.files, notes=folder.notes, added_tokens=folder.added_tokens)
    if (path / EXTRA).is_file():
        _read_extra(opened)
    elif folder.normalizer is not None:
        names = {f"noise_augmentor.data_{name}": name for name in folder.normalizer if name in ("mean", "std")}
        opened.extras = Renamed(folder.normalizer, names)
    if declared := _declared(opened, config):
        for name in WHOLE:
            if name in inside.parts:
                _agree(opened, name, getattr(declared, name))
        if folder.prediction and folder.prediction[0] != declared.prediction:
            raise CheckpointError(
                f"{path}: scheduler/scheduler_config.json says {folder.prediction[0]}, its config "
                f"{declared.prediction}: make them agree, or remove the one that is wrong"
            )
        opened.config = declared
    elif "unet" in inside.parts:
        opened.prediction = folder.prediction or prediction_of(inside, path, opened.global_step)
        opened.config = _config_of_folder(folder, opened.prediction[0])
    return opened


def _read_extra(opened: Opened) -> None:
    extra = open_tensors(opened.path / EXTRA)
    opened.files.append(extra)
    opened.metadata, opened.global_step = extra.metadata, _step(extra.metadata.get(STEP_KEY))
    if TOKENS_KEY in extra.metadata:
        opened.added_tokens = _added_tokens(opened)
    opened.extras = Renamed(extra, {name: name for name in extra})
    rest = {
        name: name.removeprefix(prefix)
        for prefix in NETWORKS["text"].prefixes.values()
        for name in extra
        if name.startswith(prefix) and not NEVER_RUN.match(name)
    }
    opened.text_rest = Renamed(extra, {ours: name for name, ours in rest.items()})
    account([name for name in extra if name not in rest], opened.contents, f"{EXTRA}/")


def _agree(opened: Opened, name: str, declared) -> None:
    """A folder says everything twice, in its config.json files and in the checksummed metadata: they must agree."""
    part = opened.contents.parts[name]
    network = NETWORKS[name]
    if declared is None or network.in_folder(declared, part.config) != part.config:
        raise CheckpointError(
            f"{opened.path}: {network.subfolder}/config.json and the config in {EXTRA} disagree: {part.config} / "
            f"{declared}"
        )
    part.config = declared


def _config_of_folder(folder: Folder, prediction: PredictionType | None) -> ModelConfig:
    parts = folder.contents.parts
    text = parts["text"].config if "text" in parts else None
    if text is not None and folder.pad_id is not None and text.vocab_size >= 49408:
        parts["text"].config = replace(text, pad_id=folder.pad_id)
    config = model_config(opened_configs(folder.contents), prediction)
    if folder.sample_size is not None:
        config = replace(config, image_size=folder.sample_size * config.vae.factor)
    return replace(config, schedule=folder.schedule or config.schedule)


def opened_configs(contents: Contents) -> dict:
    """The configs of the networks that ModelConfig describes."""
    return {name: part.config for name, part in contents.parts.items() if name in WHOLE}


# ------------------------------------------------------------------------------------------------ what the metadata say


def _declared(opened: Opened, config: ModelConfig | None) -> ModelConfig | None:
    """The config that was given, or minisd's own metadata, which say everything; with the prediction they state."""
    if config is not None:
        opened.prediction = config.prediction, "config= was given"
        return config
    if CONFIG_KEY not in opened.metadata:
        return None
    try:
        config = config_from_json(opened.metadata[CONFIG_KEY])
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{opened.path}: the config in its metadata is not readable: {error}") from error
    opened.prediction = config.prediction, opened.metadata.get(EVIDENCE_KEY) or "minisd's metadata"
    return config


def _step(value) -> int | None:
    """global_step, where it is a number that somebody may have counted to."""
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def _added_tokens(opened: Opened) -> dict[str, list[int]]:
    """Placeholders and their ids, as the tokenizer takes them and the token embedding has rows for."""
    text = opened.metadata.get(TOKENS_KEY, "{}")
    try:
        tokens = Tokenizer(added_tokens=json.loads(text)).added_tokens
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{opened.path}: the added tokens in its metadata are damaged: {error}") from error
    return tokens
