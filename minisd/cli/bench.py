"""The commands that measure speed and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from minisd.bench.options import BenchOptions, ImageBenchOptions
from minisd.cli.output import check_target

if TYPE_CHECKING:
    from minisd.bench.report import BenchReport

Flat = Parameter(name="*")  # a dataclass's fields as options of their own names


def bench_unet(*, options: Annotated[ImageBenchOptions, Flat] = ImageBenchOptions()) -> int:
    """Denoising step of SD 1's U-Net with CFG: time and peak memory, random weights."""
    check(options)
    from minisd.bench.unet import bench_unet as measure

    return publish([measure(options)], options)


def bench_vae(*, options: Annotated[ImageBenchOptions, Flat] = ImageBenchOptions()) -> int:
    """Decoding and encoding with SD 1's VAE: time and peak memory, random weights."""
    check(options)
    from minisd.bench.vae import bench_vae as measure

    return publish([measure(options)], options)


def bench_txt2img(
    *,
    options: Annotated[ImageBenchOptions, Flat] = ImageBenchOptions(),
    steps: int = 20,
    checkpoint: Path | None = None,
) -> int:
    """Whole images by SD 1 with random weights, and the start-up of `minisd txt2img`: time and peak memory.

    Args:
        steps: DDIM steps per image
        checkpoint: model whose start-up is broken down; the mini model when left out
    """
    check(options)
    from minisd.bench.txt2img import bench_txt2img as measure

    return publish([measure(options, steps=steps, checkpoint=checkpoint)], options)


def bench_load(*, options: Annotated[BenchOptions, Flat] = BenchOptions()) -> int:
    """Loading an SD 1 checkpoint of --dtype: time and peak memory, random weights."""
    check(options)
    from minisd.bench.load import bench_load as measure

    return publish([measure(options)], options)


def bench_train(
    *,
    options: Annotated[ImageBenchOptions, Flat] = ImageBenchOptions(),
    method: Annotated[list[str], Parameter(negative=(), consume_multiple=True)] = (),
    gradient_checkpointing: bool = False,
) -> int:
    """Training step of textual inversion, LoRA and DreamBooth on SD 1: time and peak memory, random weights.

    Args:
        method: a method of `minisd train`: textual-inversion, lora, dreambooth, one or several; all when left out
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time
    """
    check(options)
    from minisd.bench.train import bench_train as measure
    from minisd.training.subject import METHODS

    return publish(
        [measure(options, methods=method or METHODS, gradient_checkpointing=gradient_checkpointing)], options
    )


def bench_attention(*, options: Annotated[BenchOptions, Flat] = BenchOptions(), training: bool = False) -> int:
    """Every implementation of attention (minisd's, PyTorch's, flash-attn's) in SD's shapes: time and error.

    Args:
        training: also measure forward and backward pass together
    """
    check(options)
    from minisd.bench.attention import bench_attention as measure

    return publish([measure(options, training=training)], options)


def bench_all(*, options: Annotated[ImageBenchOptions, Flat] = ImageBenchOptions(), steps: int = 20) -> int:
    """Every benchmark in turn: half an hour or more.

    Args:
        steps: DDIM steps per image of txt2img
    """
    check(options)
    from minisd.bench import attention, load, train, txt2img, unet, vae
    from minisd.bench.peers import with_known_peers
    from minisd.bench.process import WorkerError

    benchmarks = [
        (unet.bench_unet, unet.CONTENDERS),
        (vae.bench_vae, vae.CONTENDERS),
        (partial(txt2img.bench_txt2img, steps=steps), txt2img.CONTENDERS),
        (load.bench_load, load.CONTENDERS),
        (train.bench_train, train.CONTENDERS),
        (attention.bench_attention, attention.implementations()),
    ]
    known = {name for _, contenders in benchmarks for name in contenders}
    if unknown := [name for name in options.peers or () if name not in known | {"none"}]:
        raise ValueError(f"unknown peer {unknown[0]!r}; known: none, {', '.join(sorted(known - {'minisd'}))}")
    errors = []

    def reports() -> Iterator[BenchReport]:
        for measure, contenders in benchmarks:
            try:
                yield measure(with_known_peers(contenders, options))
            except (WorkerError, ValueError) as error:  # half an hour of the others' results is kept
                print(f"minisd: {error}", file=sys.stderr)
                errors.append(error)

    return publish(reports(), options) or int(bool(errors))


def check(options: BenchOptions) -> None:
    """ValueError for what could not be measured or written, before minutes are spent."""
    from minisd.cli.options import Model
    from minisd.cli.study import check_figure

    options.check()
    Model(device=options.device).check()
    if options.json is not None:
        check_target(options.json, overwrite=None)
    if options.plot is not None:
        check_figure(options.plot)


def publish(reports: Iterable[BenchReport], options: BenchOptions) -> int:
    from minisd.bench.publish import publish

    return publish(reports, options)
