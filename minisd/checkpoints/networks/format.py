"""What a network is in files, as one declaration that detection, loading, saving and inspection read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minisd.checkpoints.files.entries import CheckpointError
from minisd.config import ModelConfig

Config = Any  # UNetConfig, VAEConfig, CLIPTextConfig …: that of the network


@dataclass(frozen=True)
class NetworkFormat:
    """One network in files of every layout.

    name: in `Checkpoint.networks`, and in ModelConfig if it has a field of that name. title, kind: how `minisd inspect`
    calls it, and a file that holds nothing else. module: its class.
    names: (config, dialect) → pairs of our module (or tensor) and what the dialect calls it.
    namings: the ways in which files name it, the first that fits is taken.
    config_from_shapes: (tensors under a dialect's names, dialect) → (config, doubt); the doubt is a sentence about what
    had to be guessed, empty where the shapes are an official network's. inferred_not: fields that no shape shows.
    prefixes: of the original's single files, by dialect; single_file_dialect: which of them a config is saved in.
    subfolder, weights, folder_dialect: its place in a diffusers folder, "" for none.
    config_from_json: (inferred config, config.json, its path) → config. config_to_json: the inverse, of a ModelConfig.
    in_folder: (declared, inferred) → the declared config without what a diffusers folder cannot say of it.
    not_in_folder: beginnings of the names of our tensors that a diffusers folder has no place for.
    about: a few words on a config, for inspect.
    """

    name: str
    title: str
    kind: str
    module: type[nn.Module]
    names: Callable[[Config, str], Iterator[tuple[str, str | Source]]]
    namings: tuple[Naming, ...]
    config_from_shapes: Callable[[Shapes, str], tuple[Config, str]]
    prefixes: Mapping[str, str]
    config_from_json: Callable[[Config, dict, Path], Config]
    about: Callable[[Config], str]
    config_to_json: Callable[[ModelConfig], dict] | None = None
    subfolder: str = ""
    weights: str = "diffusion_pytorch_model"
    folder_dialect: str = "diffusers"
    inferred_not: tuple[str, ...] = ()
    single_file_dialect: Callable[[Config], str] = lambda config: "ldm"
    in_folder: Callable[[Config, Config], Config] = lambda declared, inferred: declared
    not_in_folder: Callable[[Config], tuple[str, ...]] = lambda config: ()
    config_of: Callable[[nn.Module], Config] = lambda network: network.config

    def agrees(self, declared: Config, inferred: Config) -> bool:
        """Whether a declared config has the shapes from which the other was inferred."""
        return replace(inferred, **{name: getattr(declared, name) for name in self.inferred_not}) == declared


@dataclass(frozen=True)
class Source:
    """Where one of our tensors stands in a file: under `key`, whole or as one third of a packed projection.

    transposed: the file holds the transpose. linear: the file holds a matrix where we have a 1×1 convolution.
    """

    key: str
    third: int | None = None
    transposed: bool = False
    linear: bool = False

    def our_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of our tensor, where the file's has this one."""
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        if self.transposed:
            shape = shape[::-1]
        return (*shape, 1, 1) if self.linear else shape


KeyMap = dict[str, Source]


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


NEVER_RUN = re.compile(r".*(position_ids|logit_scale|attn_mask)$")  # though among a network's own tensors


@dataclass(frozen=True)
class Naming:
    """One way in which a file names a network: behind one of the prefixes, where there is a tensor `marker`.

    names: the beginnings of its tensors' names after the prefix. unless: a tensor that makes it another network.
    """

    dialect: str
    prefixes: tuple[str, ...]
    marker: str
    names: str = ""
    unless: str | None = None
    rename: Callable[[str], str] = str

    def view(self, file, names: list[str]) -> Renamed | None:
        """The network's tensors under its dialect's names; None where the file does not name it so."""
        for prefix in self.prefixes:
            if prefix + self.marker in file and (self.unless is None or prefix + self.unless not in file):
                pattern = re.compile(f"{re.escape(prefix)}({self.names})")
                own = [name for name in names if pattern.match(name) and not NEVER_RUN.match(name)]
                return Renamed(file, {self.rename(name[len(prefix) :]): name for name in own})
        return None


# --------------------------------------------------------------------------------- what the declarations use


class Shapes(Collection[str], Protocol):
    def shape(self, name: str) -> tuple[int, ...]: ...


def count(tensors: Shapes, pattern: str) -> int:
    """How many different labels stand in place of the group; gaps among them end as missing tensors."""
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


def check_fixed(config: dict, fixed: Mapping[str, tuple], path: Path) -> None:
    """CheckpointError for a value with which our network would compute something else."""
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the networks of minisd have {allowed[0]!r}")


def number(config: dict, key: str, default, kind: type, path: Path):
    """A positive number of a JSON object."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or not 0 < value < 1e9:
        raise CheckpointError(f"{path}: {key} is {value!r}, a positive {kind.__name__} is expected")
    return kind(value)
