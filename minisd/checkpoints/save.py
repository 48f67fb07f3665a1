"""Saving, the inverse of loading: in the original's layout or as a diffusers folder, bit for bit, all or nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from minisd.checkpoints.diffusers_layout import EXTRA, NORMALIZER
from minisd.checkpoints.diffusers_write import folder_files, is_unclip
from minisd.checkpoints.families import config_to_json
from minisd.checkpoints.files import folded, save_safetensors
from minisd.checkpoints.keymaps import keymap, to_official
from minisd.checkpoints.load import Checkpoint
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import KeyMap
from minisd.checkpoints.opening import CONFIG_KEY, EVIDENCE_KEY, STEP_KEY, TOKENS_KEY
from minisd.config import PRESETS, ModelConfig
from minisd.files import write_whole_folder

Layout = Literal["ldm", "diffusers"]


def save_checkpoint(
    checkpoint: Checkpoint, path: str | os.PathLike, *, layout: Layout = "ldm", fold: bool = False
) -> list[str]:
    """Write the whole model: one .safetensors file ("ldm") or a diffusers folder, with its config in the metadata.

    fold: of "ldm", store equal rows of the token embedding once; minisd alone reads such a file, and converts it.
    An old file is replaced only once the new one is complete; an existing folder that is not empty is refused.
    Returns lines that say what was written and what the layout holds only in the extra file.

    diffusers' pipelines load the folder as it is, except where they need a network that minisd does not have: the depth
    model's needs depth_estimator= and feature_extractor= (MiDaS), unCLIP-L's needs image_normalizer= (its embeddings'
    mean and deviation, which no single file holds) unless the model came from a folder that has it.
    """
    if layout == "ldm":
        return _save_file(checkpoint, Path(path), fold)
    if layout == "diffusers":
        return _save_folder(checkpoint, Path(path))
    raise ValueError(f"layout={layout!r}; allowed: ldm, diffusers")


def save_networks(
    networks: dict[str, nn.Module],
    config: ModelConfig,
    path: str | os.PathLike,
    *,
    evidence: str = "",
    global_step: int | None = None,
    fold: bool = False,
) -> None:
    """Write some networks ("unet", "vae", "text", "vision") of a model into one .safetensors file, with its config.

    evidence: why config.prediction is what it is. global_step: of the training. fold: see `save_checkpoint`.
    """
    save_checkpoint(Checkpoint(config, networks, {}, [], evidence, global_step), path, fold=fold)


def _save_file(checkpoint: Checkpoint, path: Path, fold: bool) -> list[str]:
    if path.is_dir():
        raise ValueError(
            f'{path} is a folder; layout "ldm" is one file: give a name such as {path / "model.safetensors"}'
        )
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: minisd writes safetensors only: name it {path.with_suffix('.safetensors')}")
    tensors = dict(checkpoint.extras)
    for name, network in checkpoint.networks.items():
        tensors |= ldm_tensors(name, network)
    if fold and "text" in checkpoint.networks:
        (name,) = ldm_tensors("text", checkpoint.networks["text"], keep={"token_embedding.weight"})
        tensors |= folded(name, tensors[name])
    save_safetensors(path, tensors, metadata(checkpoint))
    return [f"{path}: {len(tensors)} tensors, original layout"]


def ldm_tensors(name: str, network: nn.Module, keep: set[str] | None = None) -> dict[str, Tensor]:
    """A network's tensors under their names in the original's single files; only our names in `keep`, if given."""
    dialect = NETWORKS[name].single_file_dialect(network.config)
    names = keymap(network, dialect)
    names = {ours: source for ours, source in names.items() if keep is None or ours in keep}
    return {NETWORKS[name].prefixes[dialect] + key: tensor for key, tensor in _official_tensors(network, names).items()}


def _official_tensors(network: nn.Module, names: KeyMap) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in to_official(network.state_dict(), names).items()}


def _save_folder(checkpoint: Checkpoint, path: Path) -> list[str]:
    """Everything into a folder beside, which is then renamed."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already and is not an empty folder: give a new name, or remove it first")
    extra: list[str] = []
    write_whole_folder(path, lambda folder: extra.extend(_write_folder(checkpoint, folder)))
    lines = [f"{path}: {len(checkpoint.networks)} networks, diffusers layout"]
    if extra:
        lines.append(f"{EXTRA} keeps {len(extra)} tensors that this layout cannot hold, first: {sorted(extra)[0]}")
    return lines


def _write_folder(checkpoint: Checkpoint, folder: Path) -> list[str]:
    extra = dict(checkpoint.extras)
    for file, text in folder_files(checkpoint.config, checkpoint.added_tokens).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    for name, network in checkpoint.networks.items():
        declared = NETWORKS[name]
        names, unheld = keymap(network, declared.folder_dialect), declared.not_in_folder(network.config)
        if rest := {ours for ours in names if ours.startswith(unheld)}:
            extra |= ldm_tensors(name, network, keep=rest)
        names = {ours: source for ours, source in names.items() if ours not in rest}
        path = folder / declared.subfolder / f"{declared.weights}.safetensors"
        save_safetensors(path, _official_tensors(network, names), {"format": "pt"})
    if normalizer := _normalizer(checkpoint.config, extra):
        save_safetensors(folder / NORMALIZER / "diffusion_pytorch_model.safetensors", normalizer, {"format": "pt"})
    save_safetensors(folder / EXTRA, extra, metadata(checkpoint))
    return list(extra)


def _normalizer(config: ModelConfig, extra: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """unCLIP's statistics of image embeddings, 'mean' and 'std', each '1 e'. Those of the H model are 0 and 1."""
    if not is_unclip(config):
        return None
    kept = [extra.get(f"noise_augmentor.data_{name}") for name in ("mean", "std")]
    if None not in kept:
        return {name: tensor.reshape(1, -1) for name, tensor in zip(("mean", "std"), kept, strict=True)}
    width = config.vision.projection_dim
    is_l = config.vision == PRESETS["SD2_UNCLIP_L"].vision
    return None if is_l or width is None else {"mean": torch.zeros(1, width), "std": torch.ones(1, width)}


def metadata(checkpoint: Checkpoint) -> Mapping[str, str]:
    result = {
        "format": "pt",
        CONFIG_KEY: config_to_json(checkpoint.config),
        EVIDENCE_KEY: checkpoint.prediction_evidence,
    }
    if checkpoint.global_step is not None:
        result[STEP_KEY] = str(checkpoint.global_step)
    if checkpoint.added_tokens:
        result[TOKENS_KEY] = json.dumps(checkpoint.added_tokens)
    return result
