"""What every recipe is told besides its own: how it learns, and how the training is carried out. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from minisd.schema import OLDER_NAMES, from_dict


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast a recipe learns.

    Attributes:
        steps: training steps (optimizer updates).
        batch_size: images per step, over all processes and accumulated micro-batches together.
        gradient_accumulation: micro-batches per step and process: less memory, results equal but for rounding (beside a
            discriminator, whose weight is computed for each micro-batch, by more).
        lr: peak learning rate of AdamW.
        muon: learning rate of Muon for matrices and kernels, AdamW for the rest; null trains all with AdamW.
        warmup: steps of linear learning-rate warm-up.
        decay: learning-rate schedule after the warm-up: constant, or cosine down to 0.
        cycles: learning-rate cycles (warm restarts), equal parts of the steps; a model is best at the end of one.
        betas: of AdamW.
        weight_decay: of matrices and kernels; norms, biases and embeddings have none.
        clip: gradient clipping: the largest norm, for each network.
        ema: decay of the weights' exponential moving average; null for none.
        precision: bfloat16 is mixed precision: autocast, with float32 master weights.
        seed: random seed of initial weights, noise, times and data order.
    """

    steps: int = 1000
    batch_size: int = 32
    gradient_accumulation: int = 1
    lr: float = 1e-4
    muon: float | None = None
    warmup: int = 100
    decay: Literal["constant", "cosine"] = "constant"
    cycles: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float | None = 0.9999
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self):
        if self.steps < 1 or not self.lr > 0 or not self.clip > 0 or not (self.muon is None or self.muon > 0):
            values = f"steps={self.steps}, lr={self.lr}, muon={self.muon}, clip={self.clip}"
            raise ValueError(f"{values}: all of them are above 0")
        if self.cycles < 1 or self.steps % self.cycles:
            raise ValueError(f"{self.steps} steps in {self.cycles} cycles: the steps must divide into equal ones")

    @property
    def is_open_ended(self) -> bool:
        """Whether no step depends on how many will follow, so that a training can end, or go on, at any of them."""
        return self.decay == "constant" and self.cycles == 1


@dataclass(frozen=True)
class TrainingRun:
    """How a training is carried out and watched. Nothing but the device, which draws its own noise, changes a weight.

    Attributes:
        device: cpu, cuda, cuda:1 …; under torchrun each process takes its own GPU.
        save_every: steps between training states (checkpoints to resume from).
        log_every: steps between lines of the log.
        sample_every: steps between sample sheets; 0 draws one at the end only.
        quiet: no progress bar.
        tensorboard: also log to TensorBoard (pip install 'minisd[tensorboard]').
    """

    device: str = "cpu"
    save_every: int = 500
    log_every: int = 50
    sample_every: int = 1000
    quiet: bool = False
    tensorboard: bool = False


RUN = TrainingRun()

Config = TypeVar("Config")


def changed(config: Config, changes: Mapping) -> Config:
    """A (nested) config dataclass with other values; a typo is a ValueError that names the fields there are.

    changes: {"unet": {"loop": {"steps": 100}}}, only what differs.
    """
    return from_dict(type(config), _merged(asdict(config), renamed(changes)))


# Fields as they were called before, in the states and JSON files of trainings from then → as they are called now.
RENAMED = OLDER_NAMES | {
    "recompute": "gradient_checkpointing",
    "accumulate": "gradient_accumulation",
    "judge": "scorer",
}


def renamed(values: Any) -> Any:
    """The same plain values with every field under its present name."""
    if isinstance(values, Mapping):
        return {RENAMED.get(name, name): renamed(value) for name, value in values.items()}
    return values


def _merged(old: Mapping, new: Mapping) -> dict:
    def value(name: str):
        nested = isinstance(old.get(name), Mapping) and isinstance(new[name], Mapping)
        return _merged(old[name], new[name]) if nested else new[name]

    return {**old, **{name: value(name) for name in new}}


def read_changes(file: Path | None, settings: Iterable[str]) -> dict:
    """The changes that a JSON file holds, then those of "unet.loop.steps=100"; a value that is no JSON is a text."""
    changes: dict = {}
    if file is not None:
        try:
            changes = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{file}: it is no JSON ({error}): a training writes such a file beside its result"
            ) from error
        if not isinstance(changes, dict):
            raise ValueError(f"{file}: a config is an object of fields, {{…}}")
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not all(name.split(".")):
            raise ValueError(f"{setting!r} sets nothing: give FIELD=VALUE, such as unet.loop.steps=1000")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        for part in reversed(name.split(".")):
            value = {part: value}
        changes = _merged(changes, value)
    return changes
