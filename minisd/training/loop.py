"""The training loop: forward, backward, clip, step, all in sight. Every recipe runs through it.

What a step does depends on the config, the data and the number of the step alone (see `draws`), so a training that was
killed and started again ends with the same bits as one that was not, and several processes train as one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.files import write_whole
from minisd.models.nonfinite import first_nonfinite_layer
from minisd.runtime.optimize import channels_last, optimize
from minisd.training.draws import Draws, examples
from minisd.training.ema import EMA
from minisd.training.optimizers import build_optimizers
from minisd.training.options import LoopConfig, TrainingRun
from minisd.training.parallel import Processes
from minisd.training.progress import Progress
from minisd.training.state import load_state, save_state


class Recipe(Protocol):
    """What is learnt from what, by which loss. The loop needs to know no more.

    networks: all that has weights to learn, by name; those without requires_grad stay as they are, and the state is
    without them. len(): the number of examples.
    """

    name: str
    networks: nn.ModuleDict

    def __len__(self) -> int: ...

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        """Scalars by name: "loss" is differentiated, the mean over the examples (indices, 'b'); the rest is logged."""

    def sheet(self, step: int) -> Image.Image | None:
        """Samples of the networks as they are after so many steps."""


class Diverged(ValueError):
    """The loss or a gradient is NaN or infinite. The message says at which step, and which layer gave it first."""


def train(
    recipe: Recipe,
    config: LoopConfig,
    folder: str | os.PathLike,
    run: TrainingRun,
    group: Processes,
    settings: dict[str, Any],
) -> None:
    """Train the recipe's networks to the last step; they then hold their averages (where config.ema keeps some).

    folder: takes the state, the log and the pictures; a training that stands there is taken up where it was saved, and
    one that is finished is only loaded. settings: everything that the result depends on, as plain values; kept in
    config.json, and a state of other settings is refused. Diverged (a ValueError) when the loss is not finite. After
    Ctrl-C the step is finished and the state saved, then KeyboardInterrupt says so.
    """
    folder, device = Path(folder), group.device
    group.check(config.batch_size, config.gradient_accumulation)
    networks = recipe.networks.to(device).train()
    # as sampling lays them out: moments take the weights' layout, which no sheet may then change under them
    channels_last(optimize(networks))
    optimizers = build_optimizers(networks, config, group)
    ema = EMA(networks, config.ema)
    state = folder / "state.safetensors"
    start = load_state(state, networks, optimizers, ema, settings)
    if start > config.steps:
        raise ValueError(f"{state} holds {start} steps, more than the {config.steps} asked for: give as many at least")

    def losses(step: int, part: int) -> dict[str, Tensor]:
        """Those of one micro-batch of this process."""
        rows = group.rows(config.batch_size, part, config.gradient_accumulation)
        chosen = examples(config.seed, step, config.batch_size, len(recipe))[rows]
        draws = Draws(config.seed, step, config.batch_size, rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return recipe.loss(chosen, draws)

    def due(done: int, every: int) -> bool:
        return group.is_first and (done == config.steps or (every > 0 and done % every == 0))

    if group.is_first:
        _write_json(folder / "config.json", settings)
    first, show = group.is_first, group.is_first and not run.quiet
    board = run.tensorboard
    progress = Progress(
        folder, recipe.name, start, config.steps, config.batch_size, bar=show, write=first, tensorboard=board
    )
    with deterministic(device), progress, whole_steps(group) as interrupted:
        for step in range(start, config.steps):
            for parameters in chain(*(optimizer.param_groups for optimizer in optimizers)):
                parameters["lr"] = learning_rate(config, step) * parameters["relative_lr"]

            values: dict[str, Tensor] = {}
            for part in range(config.gradient_accumulation):
                scalars = losses(step, part)
                (scalars["loss"] / config.gradient_accumulation).backward()
                for name, value in scalars.items():
                    values[name] = values.get(name, 0) + value.detach().float() / config.gradient_accumulation

            group.average_([p.grad for p in networks.parameters() if p.grad is not None])
            group.average_(list(values.values()))
            norms = [nn.utils.clip_grad_norm_(network.parameters(), config.clip) for network in networks.values()]
            # a network without gradients yet (the VAE's discriminator before its start) has a norm of 0 on the CPU
            values["gradient"] = torch.stack([norm.to(device) for norm in norms]).norm()
            if not torch.stack(list(values.values())).isfinite().all():
                again = [lambda part=part: losses(step, part) for part in range(config.gradient_accumulation)]  # noqa: B023
                raise Diverged(_divergence(recipe, values, step, again, state))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.update(step + 1)

            done = step + 1
            progress.step(values)
            if due(done, run.log_every):
                progress.log(done, lr=learning_rate(config, step))
            if due(done, run.sample_every):
                with ema.applied():
                    progress.draw(done, recipe.sheet(done))
            stop = interrupted()
            if due(done, run.save_every) or stop:
                save_state(state, done, networks, optimizers, ema, settings)
            if stop:
                raise KeyboardInterrupt(
                    f": {state} holds {done} of {config.steps} steps; the same command goes on there"
                )
    ema.swap()
    networks.eval()


def _write_json(path: Path, values: dict) -> None:
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def learning_rate(config: LoopConfig, step: int) -> float:
    """The rate of a step, from 0: a linear warm-up, then constant or half a cosine down to 0; in each cycle anew.

    Loshchilov & Hutter 2017 (SGDR), with a warm-up in place of their jump.
    """
    length = config.steps // config.cycles
    step %= length
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(length - config.warmup, 1)))


def _divergence(recipe: Recipe, values: dict[str, Tensor], step: int, again: list[Callable[[], dict]], state: Path):
    """What went wrong, found by computing the step once more: its weights have not moved yet."""
    bad = ", ".join(f"{name} = {value.item()}" for name, value in values.items() if not value.isfinite())
    kept = f"the state in {state} is the last good one" if state.exists() else "no state had been saved before"
    return (
        f"{recipe.name} diverged at step {step}: {bad}, first in {_culprit(recipe, again)}; {kept}. Train into another "
        'folder with a lower learning rate, a longer warm-up, or precision "float32"'
    )


def _culprit(recipe: Recipe, again: list[Callable[[], dict]]) -> str:
    for run in again:
        if layer := first_nonfinite_layer(recipe.networks, run):
            return f"the layer {layer}"
    recipe.networks.zero_grad()
    for run in again:
        scalars = run()
        if not scalars["loss"].isfinite():
            return "the loss itself: every layer's output is finite"
        scalars["loss"].backward()
    bad = [n for n, p in recipe.networks.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    # the backward pass runs from the last layer to the first
    return f"the gradient of {bad[-1]}" if bad else "what another process computed"


@contextmanager
def whole_steps(group: Processes) -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the step first: the block asks the function it gets whether one came. A second Ctrl-C ends at once.

    Several processes, which would not end at the same step, and threads other than the main one end at once.
    """
    if group.count > 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = []

    def note(*_):
        came.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Equal bits from equal runs: on a CPU for a fixed number of threads, on a GPU as far as PyTorch has such kernels.

    Its attention has none for the backward pass of long sequences.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        False,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
