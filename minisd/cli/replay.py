"""The command that makes a picture again, and says whether it is the same."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.cli.generate import samplings
from minisd.cli.options import Model
from minisd.cli.output import check_target, progress

if TYPE_CHECKING:
    from PIL import Image

    from minisd.provenance.call import Call, File, LoadedModel


def replay(
    image: Path,
    *,
    checkpoint: Path | None = None,
    vae: Path | None = None,
    device: str | None = None,
    offload: bool = False,
    out: Path | None = None,
) -> int:
    """Make a picture again from what it says of itself, and say whether every pixel is equal.

    Args:
        image: a PNG that minisd made.
        checkpoint: the model, where it lies elsewhere now.
        vae: the VAE of its own, likewise.
        device: run elsewhere than the first time; pixels may then differ by a level.
        offload: as for txt2img, on a GPU that cannot hold all networks.
        out: save the picture made again as this .png file.
    """
    from minisd.provenance.files import find_input
    from minisd.provenance.png import read_png

    if out is not None:
        if out.suffix.lower() != ".png":
            raise ValueError(f"{out}: pictures are saved as .png, which holds how they were made: name it so")
        check_target(out, overwrite=None)
    call, index = read_png(image)
    folder = image.parent
    inputs = {name: find_input(file, folder) for name, file in call.inputs.items()}
    model = replace(_model(call.model, folder, checkpoint, vae, device), offload=offload)
    again = draw_again(model, call, index, inputs)
    if out is not None:
        _save(out, again, call, index, model, inputs)
    from PIL import Image

    with Image.open(image) as first:
        difference = _difference(first, again)
    print(f"{image}: made again, {difference or 'equal in every pixel'}")
    if difference:
        print(
            f"(it was made with minisd {call.version} and torch {call.torch}, threads: {call.threads}, "
            f"device: {call.model.device})",
            file=sys.stderr,
        )
    return 1 if difference else 0


def draw_again(model: Model, call: Call, index: int, inputs: dict[str, Path]) -> Image.Image:
    """Picture `index` of a call, drawn in a batch of the same pictures, with as many threads."""
    import torch

    if 0 < call.threads <= (os.cpu_count() or 1):
        torch.set_num_threads(call.threads)
    else:
        warnings.warn(f"the picture was made on {call.threads} threads, which are not here", stacklevel=2)
    batch, position = call.batch(index)
    for sampling in samplings(model.load(), batch, inputs, None):
        for _ in progress(sampling):
            pass
        if not sampling.is_draft:
            return sampling.images()[position]
    raise AssertionError("a task ended in a draft")


def _model(recorded: LoadedModel, folder: Path, checkpoint: Path | None, vae: Path | None, device: str | None) -> Model:
    from minisd.provenance.files import find_input

    return Model(
        checkpoint=_weights(recorded.checkpoint, folder, checkpoint, "--checkpoint"),
        weights=recorded.weights,
        prediction=recorded.prediction,
        vae=recorded.vae and _weights(recorded.vae, folder, vae, "--vae"),
        dtype=recorded.dtype,
        device=device or recorded.device,
        embedding=tuple(
            "=".join(filter(None, [one.token, str(find_input(one.file, folder, "embedding"))]))
            for one in recorded.embeddings
        ),
        lora=tuple(f"{find_input(one.file, folder, 'LoRA')}:{one.weight}" for one in recorded.loras),
    )


def _weights(file: File, folder: Path, given: Path | None, option: str) -> Path:
    """Where the weights lie now; a note if they are not those of the record."""
    from minisd.files import fingerprint
    from minisd.provenance.files import find

    path = given or find(file, folder)
    if path is None:
        raise ValueError(f"the checkpoint {file.name} is not there, seen from {folder}: say where with {option}")
    if fingerprint(path) != file.digest:
        warnings.warn(f"{path} is another checkpoint than the one that drew the picture", stacklevel=2)
    return path


def _difference(first: Image.Image, again: Image.Image) -> str:
    """How two pictures differ; nothing where they do not."""
    import numpy as np

    if first.size != again.size:
        return "but it has {}×{} pixels in place of {}×{}".format(*again.size, *first.size)
    apart = np.abs(np.asarray(first.convert("RGB"), dtype=int) - np.asarray(again, dtype=int)).max(axis=-1)
    if not apart.any():
        return ""
    return f"but {(apart > 0).mean():.2%} of its pixels differ, by up to {apart.max()} of 255 levels"


def _save(out: Path, image: Image.Image, call: Call, index: int, model: Model, inputs: dict[str, Path]) -> None:
    """The picture with its record, files named as they are seen from where it goes."""
    import torch

    from minisd import __version__
    from minisd.provenance.files import remember_input
    from minisd.provenance.png import save_png

    call = replace(
        call,
        model=model.record(out.parent),
        inputs={name: remember_input(path, out.parent) for name, path in inputs.items()},
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        version=__version__,
    )
    save_png(out, image, call, index)
    print(out)
