"""The diffusers folder: one subfolder per component, each a config.json and weights under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minisd.checkpoints.detect import Contents, contents
from minisd.checkpoints.diffusers_json import read_json, read_schedule, read_tokenizer
from minisd.checkpoints.files import CheckpointError, TensorFile, open_tensors
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.networks.format import Renamed
from minisd.config import PredictionType, ScheduleConfig

EXTRA = "minisd_extra.safetensors"
NORMALIZER = "image_normalizer"  # mean and std of unCLIP's image embeddings
NOT_RUN = ("safety_checker", "depth_estimator")


@dataclass
class Folder:
    """An opened diffusers folder: contents as of a single file, and what its JSON files say."""

    contents: Contents
    files: list[TensorFile] = field(default_factory=list)
    schedule: ScheduleConfig | None = None
    prediction: tuple[PredictionType, str] | None = None
    pad_id: int | None = None
    sample_size: int | None = None  # the U-Net's, in latents
    added_tokens: dict[str, list[int]] = field(default_factory=dict)
    normalizer: Tensors | None = None
    notes: list[str] = field(default_factory=list)


class Tensors(Renamed):
    """The tensors of one component, in one file or in several shards: name → its file."""

    def __init__(self, files: Mapping[str, TensorFile]):
        super().__init__(None, {name: name for name in files})
        self.files = files

    def file_of(self, name: str) -> TensorFile:
        return self.files[name]


def open_folder(path: Path) -> Folder:
    """Open every component that minisd runs. CheckpointError where the folder holds none or its JSON is damaged.

    path: the folder with model_index.json, or that of one component.
    """
    folder = Folder(Contents("a diffusers folder", {}, {}, []))
    subfolders = {name: declared.subfolder for name, declared in NETWORKS.items() if declared.subfolder}
    for network, subfolder in subfolders.items():
        if (path / subfolder).is_dir():
            _add(folder, network, path / subfolder)
    if not folder.contents.parts and (path / "config.json").is_file():
        _add(folder, None, path)
    if not folder.contents.parts:
        raise CheckpointError(
            f"{path}: a folder without {', '.join(sorted(subfolders.values()))} or a config.json of its own: "
            "give a diffusers folder (the one that holds model_index.json) or a single file"
        )
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        folder.schedule, folder.prediction = read_schedule(read_json(scheduler), scheduler)
    folder.pad_id, folder.added_tokens = read_tokenizer(path / "tokenizer")
    if any((path / NORMALIZER).glob("diffusion_pytorch_model*")):
        folder.normalizer = _open_weights(path / NORMALIZER, folder)
        names = [f"{NORMALIZER}/{name}" for name in folder.normalizer]
        folder.contents.known["unCLIP embedding statistics"] = names
    folder.notes += [f"{name}/ is not run" for name in NOT_RUN if (path / name).is_dir()]
    return folder


def _add(folder: Folder, network: str | None, path: Path) -> None:
    """Add the component at path: the network that belongs there, or every one that its file holds."""
    config, tensors = read_json(path / "config.json"), _open_weights(path, folder)
    content = contents(tensors)
    networks = [network] if network else list(content.parts)
    if not networks or networks[0] not in content.parts:
        raise CheckpointError(f"{path}: its weights are {content.kind}, not a {network or 'network that minisd runs'}")
    if content.unknown:
        raise CheckpointError(
            f"{path}: {len(content.unknown)} tensors of no known network, first: {content.unknown[0]}"
        )
    for name in networks:
        part = content.parts[name]
        own = config.get(f"{name}_config")  # a whole CLIP model has one for either tower
        declared = own if isinstance(own, dict) else config
        part.config = NETWORKS[name].config_from_json(part.config, declared, path / "config.json")
        part.doubt = ""
        folder.contents.parts[name] = part
    for reason, names in content.known.items():
        folder.contents.known.setdefault(reason, []).extend(f"{path.name}/{name}" for name in names)
    if list(folder.contents.parts) == networks:
        folder.contents.kind = content.kind
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
