"""What every recipe is told besides its own: how it learns, and how the training is carried out. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from minisd.config import from_dict


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast a recipe learns.

    Attributes:
        steps: updates of the weights.
        batch_size: examples per update, over all processes and micro-batches together.
        accumulate: micro-batches per process and update; more need less memory, and change the result by rounding only
            (beside a rival, whose weight is found for each, by more).
        lr: the learning rate of AdamW after the warm-up.
        muon: that of Muon, which then moves matrices and kernels (`optimizers.Muon`); null leaves all to AdamW.
        warmup: steps in which the rate rises linearly.
        decay: what the rate does then: stays, or falls to 0 along half a cosine.
        cycles: how often the rate goes through warm-up and decay, in equal parts of the steps (warm restarts). A model
            is at its best at the end of each.
        betas: of AdamW.
        weight_decay: of matrices and kernels; norms, biases and embeddings have none.
        clip: the most that the gradient's norm may be, for each network.
        ema: the decay of the average of the weights; none when null.
        precision: bfloat16 computes under autocast, with float32 weights.
        seed: of everything random.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
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
            said = f"steps={self.steps}, lr={self.lr}, muon={self.muon}, clip={self.clip}"
            raise ValueError(f"{said}: all of them are above 0")
        if self.cycles < 1 or self.steps % self.cycles:
            raise ValueError(f"{self.steps} steps in {self.cycles} cycles: the steps must divide into equal ones")

    @property
    def is_open_ended(self) -> bool:
        """Whether no step depends on how many will follow, so that a training can end, or go on, at any of them."""
        return self.decay == "constant" and self.cycles == 1


@dataclass(frozen=True)
class Run:
    """How a training is carried out and watched. Nothing but the device, which draws its own noise, changes a weight.

    Attributes:
        device: cpu, cuda … Under torchrun each process takes its own GPU.
        save_every: steps between two states; a crash costs as many.
        log_every: steps between two lines of the log.
        sample_every: steps between two sheets of samples; 0 for none but the last.
        quiet: no progress bar.
        tensorboard: also write the log and the sheets for TensorBoard (pip install 'minisd[tensorboard]').
    """

    device: str = "cpu"
    save_every: int = 500
    log_every: int = 50
    sample_every: int = 1000
    quiet: bool = False
    tensorboard: bool = False


RUN = Run()

Config = TypeVar("Config")


def changed(config: Config, changes: Mapping) -> Config:
    """A (nested) config dataclass with other values; a typo is a ValueError that names the fields there are.

    changes: {"unet": {"loop": {"steps": 100}}}, only what differs.
    """
    return from_dict(type(config), _merged(asdict(config), changes))


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
