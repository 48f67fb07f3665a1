"""The diffusers folder: one subfolder per component, each a config.json and weights under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minisd.checkpoints.detect import Contents, contents
from minisd.checkpoints.diffusers_json import read_json, read_schedule, refine
from minisd.checkpoints.files import CheckpointError, TensorFile, open_tensors
from minisd.config import Prediction, ScheduleConfig
from minisd.text.tokenizer import FIRST_ADDED

SUBFOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model", "vision": "model"}
EXTRA = "minisd_extra.safetensors"
NORMALIZER = "image_normalizer"  # mean and std of unCLIP's image embeddings
NOT_RUN = ("safety_checker", "depth_estimator")


@dataclass
class Folder:
    """An opened diffusers folder: contents as of a single file, and what its JSON files say."""

    contents: Contents
    files: list[TensorFile] = field(default_factory=list)
    schedule: ScheduleConfig | None = None
    prediction: tuple[Prediction, str] | None = None
    pad_id: int | None = None
    sample_size: int | None = None  # the U-Net's, in latents
    added_tokens: dict[str, list[int]] = field(default_factory=dict)
    normalizer: Tensors | None = None
    notes: list[str] = field(default_factory=list)


class Tensors(Mapping[str, Tensor]):
    """The tensors of one component, in one file or in several shards."""

    def __init__(self, place: Mapping[str, TensorFile]):
        self.place = place

    def __getitem__(self, name: str) -> Tensor:
        return self.place[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.place[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.place[name].dtype(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.place[name].read(name, dtype)


def open_folder(path: Path) -> Folder:
    """Open every component that minisd runs. CheckpointError where the folder holds none or its JSON is damaged.

    path: the folder with model_index.json, or that of one component.
    """
    folder = Folder(Contents("a diffusers folder", {}, {}, []))
    for network, name in SUBFOLDERS.items():
        if (path / name).is_dir():
            _add(folder, network, path / name)
    if not folder.contents.parts and (path / "config.json").is_file():
        _add(folder, None, path)
    if not folder.contents.parts:
        raise CheckpointError(
            f"{path}: a folder without {', '.join(sorted(SUBFOLDERS.values()))} or a config.json of its own: "
            "give a diffusers folder (the one that holds model_index.json) or a single file"
        )
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        folder.schedule, folder.prediction = read_schedule(read_json(scheduler), scheduler)
    folder.pad_id, folder.added_tokens = _read_tokenizer(path / "tokenizer")
    if any((path / NORMALIZER).glob("diffusion_pytorch_model*")):
        folder.normalizer = _open_weights(path / NORMALIZER, folder)
        names = [f"{NORMALIZER}/{name}" for name in folder.normalizer]
        folder.contents.known["unCLIP embedding statistics"] = names
    folder.notes += [f"{name}/ is not run" for name in NOT_RUN if (path / name).is_dir()]
    return folder


def _add(folder: Folder, network: str | None, path: Path) -> None:
    """Add the component at path: the network that belongs there, or every one that its file holds."""
    config, tensors = read_json(path / "config.json"), _open_weights(path, folder)
    found = contents(tensors)
    networks = [network] if network else list(found.parts)
    if not networks or networks[0] not in found.parts:
        raise CheckpointError(f"{path}: its weights are {found.kind}, not a {network or 'network that minisd runs'}")
    if found.unknown:
        raise CheckpointError(f"{path}: {len(found.unknown)} tensors of no known network, first: {found.unknown[0]}")
    for name in networks:
        part = found.parts[name]
        said = config.get(f"{name}_config")  # a whole CLIP model has one for either tower
        part.config = refine(name, part.config, said if isinstance(said, dict) else config, path / "config.json")
        part.doubt = ""
        folder.contents.parts[name] = part
    for reason, names in found.known.items():
        folder.contents.known.setdefault(reason, []).extend(f"{path.name}/{name}" for name in names)
    if list(folder.contents.parts) == networks:
        folder.contents.kind = found.kind
    if network == "unet" and type(config.get("sample_size")) is int and 0 < config["sample_size"] < 10_000:
        folder.sample_size = config["sample_size"]


def _open_weights(path: Path, folder: Folder) -> Tensors:
    """The tensors of one component: safetensors before .bin, full precision before fp16."""
    for base in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for suffix in ("safetensors", "bin"):
            for variant in ("", ".fp16"):
                whole = path / f"{base}{variant}.{suffix}"
                indices = [path / f"{base}{variant}.{suffix}.index.json", path / f"{base}.{suffix}.index{variant}.json"]
                index = next((i for i in indices if i.is_file()), None)
                if not whole.is_file() and index is None:
                    continue
                if variant:
                    folder.notes.append(f"{path.name}: the fp16 variant, the only one in the folder")
                if (path / f"{base}.non_ema.{suffix}").is_file():
                    folder.notes.append(f"{path.name}: {base}.non_ema.{suffix} (the raw weights) is not used")
                if not whole.is_file():
                    return _open_shards(index, folder)
                file = open_tensors(whole)
                folder.files.append(file)
                return Tensors(dict.fromkeys(file, file))
    raise CheckpointError(
        f"{path}: no weights (diffusion_pytorch_model, model or pytorch_model as .safetensors or .bin): was the "
        "download interrupted?"
    )


def _open_shards(index: Path, folder: Folder) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise CheckpointError(f"{index}: it has no weight_map (tensor name → file name)")
    if outside := next((v for v in weight_map.values() if Path(v).name != v or "\0" in v), None):
        raise CheckpointError(f"{index}: the shard {outside!r} lies outside its folder")
    files = {name: open_tensors(index.parent / name) for name in sorted(set(weight_map.values()))}
    folder.files += files.values()
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise CheckpointError(
                f"{index.parent / name}: the tensor {tensor} is missing, {index.name} says it is there"
            )
    if stray := next((t for f in files.values() for t in f if t not in weight_map), None):
        raise CheckpointError(f"{index}: the tensor {stray} stands in a shard but not in the index")
    return Tensors({tensor: files[name] for tensor, name in weight_map.items()})


# ---------------------------------------------------------------------------------------------------------- tokenizer


def _read_tokenizer(path: Path) -> tuple[int | None, dict[str, list[int]]]:
    """(id of the padding, 49407 or 0, None where no file says; the added tokens: placeholder → its ids)."""
    files = {
        name: read_json(path / name) if (path / name).is_file() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    }
    pad_id = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        pad = files[name].get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if pad_id is None and pad in ("!", "<|endoftext|>"):
            pad_id = 0 if pad == "!" else 49407
    added = dict(files["added_tokens.json"])
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder", {})  # transformers 5 keeps them here
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal():
            added[token["content"]] = int(number[:10])
    if bad := next((f"{name!r}: {i!r}" for name, i in added.items() if type(i) is not int), None):
        raise CheckpointError(f"{path / 'added_tokens.json'}: {bad} is not a token and its id")
    return pad_id, _placeholders({name: i for name, i in added.items() if i >= FIRST_ADDED})


def _placeholders(ids: Mapping[str, int]) -> dict[str, list[int]]:
    """diffusers names the n vectors of a placeholder `<cat>`, `<cat>_1`, `<cat>_2`, …: back to one name for all."""
    groups: dict[str, list[int]] = {}
    for name, i in sorted(ids.items(), key=lambda item: item[1]):
        first, _, n = name.rpartition("_")
        if first in groups and n == str(len(groups[first])) and i == groups[first][-1] + 1:
            groups[first].append(i)
        else:
            groups[name] = [i]
    return groups
