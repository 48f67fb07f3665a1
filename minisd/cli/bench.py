"""The commands that measure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from minisd.bench.options import Options, Pictures
from minisd.cli.output import check_target

if TYPE_CHECKING:
    from minisd.bench.report import Report

Flat = Parameter(name="*")  # a dataclass's fields as options of their own names


def bench_unet(*, options: Annotated[Pictures, Flat] = Pictures()) -> int:
    """Time and memory of one guided step of Stable Diffusion 1's U-Net with random weights."""
    check(options)
    from minisd.bench.unet import bench_unet as measure

    return publish([measure(options)], options)


def bench_vae(*, options: Annotated[Pictures, Flat] = Pictures()) -> int:
    """Time and memory of decoding and encoding pictures with Stable Diffusion 1's VAE and random weights."""
    check(options)
    from minisd.bench.vae import bench_vae as measure

    return publish([measure(options)], options)


def bench_txt2img(
    *, options: Annotated[Pictures, Flat] = Pictures(), steps: int = 20, checkpoint: Path | None = None
) -> int:
    """Time and memory of whole pictures, random weights of the official size; and the start-up of `minisd txt2img`.

    Args:
        steps: of each picture.
        checkpoint: whose `minisd txt2img` is taken apart; the mini model when left out.
    """
    check(options)
    from minisd.bench.txt2img import bench_txt2img as measure

    return publish([measure(options, steps=steps, checkpoint=checkpoint)], options)


def bench_load(*, options: Annotated[Options, Flat] = Options()) -> int:
    """Time and memory of loading a full-size Stable Diffusion 1 file with random weights of --dtype."""
    check(options)
    from minisd.bench.load import bench_load as measure

    return publish([measure(options)], options)


def bench_train(
    *,
    options: Annotated[Pictures, Flat] = Pictures(),
    method: Annotated[list[str], Parameter(negative=(), consume_multiple=True)] = (),
    gradient_checkpointing: bool = False,
) -> int:
    """Time and memory of a training step of each way to learn a subject, random weights of the official size.

    Args:
        method: a method of `minisd train`: textual-inversion, lora, dreambooth; several may follow [all]
        gradient_checkpointing: gradient checkpointing: less memory, a third more work
    """
    check(options)
    from minisd.bench.train import bench_train as measure
    from minisd.training.subject import METHODS

    return publish(
        [measure(options, methods=method or METHODS, gradient_checkpointing=gradient_checkpointing)], options
    )


def bench_attention(*, options: Annotated[Options, Flat] = Options(), training: bool = False) -> int:
    """Time and error of every form of attention in the shapes of Stable Diffusion: minisd's, PyTorch's, flash-attn's.

    Args:
        training: also forward and backward together.
    """
    check(options)
    from minisd.bench.attention import bench_attention as measure

    return publish([measure(options, training=training)], options)


def bench_all(*, options: Annotated[Pictures, Flat] = Pictures(), steps: int = 20) -> int:
    """All benchmarks one after the other; they take half an hour or more.

    Args:
        steps: of each picture of txt2img.
    """
    check(options)
    from minisd.bench import attention, load, train, txt2img, unet, vae
    from minisd.bench.peers import shared_with
    from minisd.bench.process import Failed

    subjects = [
        (unet.bench_unet, unet.CONTENDERS),
        (vae.bench_vae, vae.CONTENDERS),
        (partial(txt2img.bench_txt2img, steps=steps), txt2img.CONTENDERS),
        (load.bench_load, load.CONTENDERS),
        (train.bench_train, train.CONTENDERS),
        (attention.bench_attention, attention.forms()),
    ]
    known = {name for _, contenders in subjects for name in contenders}
    if strangers := [name for name in options.peers or () if name not in known | {"none"}]:
        raise ValueError(f"unknown peer {strangers[0]!r}; known: none, {', '.join(sorted(known - {'minisd'}))}")
    failures = []

    def reports() -> Iterator[Report]:
        for measure, contenders in subjects:
            try:
                yield measure(shared_with(contenders, options))
            except (Failed, ValueError) as error:  # what the others take half an hour for is kept
                print(f"minisd: {error}", file=sys.stderr)
                failures.append(error)

    return publish(reports(), options) or int(bool(failures))


def check(options: Options) -> None:
    """ValueError for what could not be measured or written, said before minutes are spent."""
    from minisd.cli.options import Model
    from minisd.cli.study import check_figure

    options.check()
    Model(device=options.device).check()
    if options.json is not None:
        check_target(options.json, overwrite=None)
    if options.plot is not None:
        check_figure(options.plot)


def publish(reports: Iterable[Report], options: Options) -> int:
    from minisd.bench.report import publish

    return publish(reports, options)
