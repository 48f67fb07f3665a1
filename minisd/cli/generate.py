"""The commands that make pictures, and the one that makes them again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from minisd.config import Settings

if TYPE_CHECKING:
    from PIL import Image

    from minisd.pipeline import StableDiffusion
    from minisd.record import Call
    from minisd.tasks import Sampling, Step


@Parameter(name="*", group="Model")
@dataclass(frozen=True)
class Model:
    """Which model, and how it is loaded.

    Attributes:
        checkpoint: a .safetensors or .ckpt file or a diffusers folder; the mini model when left out.
        weights: "ema" takes the separate EMA copy that full training files carry.
        prediction: what the U-Net's output means, where the file does not tell.
        vae: a file or folder whose VAE is taken instead.
        dtype: float32, bfloat16 or float16; the file's own when left out (float16 becomes float32 on a CPU).
        device: cpu, cuda, cuda:1, mps …
    """

    checkpoint: Path | None = None
    weights: Literal["raw", "ema"] = "raw"
    prediction: Literal["eps", "v", "x_0"] | None = None
    vae: Path | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"

    def as_plain(self) -> dict:
        """The values as JSON holds them."""
        return asdict(self) | {name: str(p) for name in ("checkpoint", "vae") if (p := getattr(self, name))}


@Parameter(name="*", group="Output")
@dataclass(frozen=True)
class Output:
    """Where pictures go.

    Attributes:
        out: a .png file, numbered where there are several pictures, or a folder. Nothing is overwritten.
        overwrite: replace pictures of the same name.
        grid: also a sheet of all pictures, as this file.
        trajectory: also the strip of what the model believed the first picture to be, step by step, as this file.
        preview: keep this file showing what is coming, about every two seconds.
    """

    out: Path = Path("outputs")
    overwrite: bool = False
    grid: Path | None = None
    trajectory: Path | None = None
    preview: Path | None = None


Sampled = Annotated[Settings, Parameter(name="*", group="Sampling")]


def txt2img(
    *prompt: str,
    prompts: Path | None = None,
    negative_prompt: str = "",
    num_images: int = 1,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    variation_seed: int | None = None,
    variation: float = 0.0,
    two_pass: float | None = None,
    settings: Sampled = Settings(),  # noqa: B008 (frozen)
    model: Model = Model(),
    output: Output = Output(),
) -> None:
    """Draw pictures of one or several prompts.

    Args:
        prompt: what to draw; several are drawn one after the other.
        prompts: a text file of further prompts, one a line.
        negative_prompt: what to keep away from.
        num_images: pictures per prompt.
        seed: of the first picture; the others count on from it.
        height: a multiple of 8; the model's own size when left out.
        width: likewise.
        variation_seed: turn the noise of --seed towards that of this seed, by --variation.
        variation: 0 is the picture of --seed, 1 that of --variation-seed.
        two_pass: for sizes beyond the model's own: draw small, enlarge, redraw with this strength (0.5 to 0.7).
    """
    arguments = {
        "prompt": _prompts(prompt, prompts),
        "negative_prompt": negative_prompt,
        "num_images": num_images,
        "seed": seed,
        "height": height,
        "width": width,
        "variation_seed": variation_seed,
        "variation": variation,
        "two_pass": two_pass,
    }
    _make("txt2img", arguments, {}, settings, model, output)


def img2img(
    prompt: str,
    image: Path,
    *,
    strength: float = 0.75,
    exact_steps: bool = False,
    negative_prompt: str = "",
    num_images: int = 1,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    settings: Sampled = Settings(),  # noqa: B008
    model: Model = Model(),
    output: Output = Output(),
) -> None:
    """Redraw a picture after a prompt.

    Args:
        prompt: what it shall become.
        image: the picture to start from.
        strength: how far it may go from the picture, in (0, 1].
        exact_steps: run all --steps, instead of the share that --strength leaves of them.
        negative_prompt: what to keep away from.
        num_images: how many pictures.
        seed: of the first picture; the others count on from it.
        height: resize the picture first.
        width: likewise.
    """
    arguments = {
        "prompt": prompt,
        "strength": strength,
        "exact_steps": exact_steps,
        "negative_prompt": negative_prompt,
        "num_images": num_images,
        "seed": seed,
        "height": height,
        "width": width,
    }
    _make("img2img", arguments, {"image": image}, settings, model, output)


def inpaint(
    prompt: str,
    image: Path,
    mask: Path,
    *,
    strength: float = 1.0,
    exact_steps: bool = False,
    feather: int = 8,
    negative_prompt: str = "",
    num_images: int = 1,
    seed: int = 0,
    settings: Sampled = Settings(),  # noqa: B008
    model: Model = Model(),
    output: Output = Output(),
) -> None:
    """Repaint the part of a picture where a mask is white; the rest stays as it is, bit for bit.

    Args:
        prompt: what the picture shows once it is repainted.
        image: the picture.
        mask: a picture of the same size, white where to repaint.
        strength: below 1, traces of what was there remain.
        exact_steps: run all --steps, instead of the share that --strength leaves of them.
        feather: pixels inside the mask over which the new part is blended in.
        negative_prompt: what to keep away from.
        num_images: how many pictures.
        seed: of the first picture; the others count on from it.
    """
    arguments = {
        "prompt": prompt,
        "strength": strength,
        "exact_steps": exact_steps,
        "feather": feather,
        "negative_prompt": negative_prompt,
        "num_images": num_images,
        "seed": seed,
    }
    _make("inpaint", arguments, {"image": image, "mask": mask}, settings, model, output)


def outpaint(
    prompt: str,
    image: Path,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    feather: int = 8,
    negative_prompt: str = "",
    num_images: int = 1,
    seed: int = 0,
    settings: Sampled = Settings(),  # noqa: B008
    model: Model = Model(),
    output: Output = Output(),
) -> None:
    """Paint on beyond the edges of a picture.

    Args:
        prompt: what the larger picture shows.
        image: the picture.
        left: new pixels to the left.
        right: to the right.
        top: above.
        bottom: below.
        feather: new pixels over which the painting is blended in.
        negative_prompt: what to keep away from.
        num_images: how many pictures.
        seed: of the first picture; the others count on from it.
    """
    arguments = {
        "prompt": prompt,
        "left": left,
        "right": right,
        "top": top,
        "bottom": bottom,
        "feather": feather,
        "negative_prompt": negative_prompt,
        "num_images": num_images,
        "seed": seed,
    }
    _make("outpaint", arguments, {"image": image}, settings, model, output)


def replay(image: Path, *, checkpoint: Path | None = None, device: str | None = None, out: Path | None = None) -> None:
    """Make a picture again from what it says of itself, and compare.

    Args:
        image: a PNG that minisd made.
        checkpoint: the model, where it lies elsewhere now.
        device: run elsewhere than the first time (pixels may then differ by a level).
        out: save the picture made again as this file.
    """
    import numpy as np
    import torch
    from PIL import Image

    from minisd.record import check_input, read_png, save_png

    call, index = read_png(image)
    inputs = {name: check_input(said, image.parent) for name, said in call.inputs.items()}
    if checkpoint is not None:
        call.model["checkpoint"] = str(checkpoint)
    if device is not None:
        call.model["device"] = device
    if call.threads and call.threads != torch.get_num_threads():
        torch.set_num_threads(call.threads)
    sd = load_model(call.model)
    for start, sampling in _samplings(sd, call, inputs):
        if not start <= index < start + len(sampling.seeds):
            continue
        for _ in progress(sampling):
            pass
        place = index - start
        again = sampling.images()[place]
        if sampling.is_draft:
            continue
        with Image.open(image) as first:
            difference = np.abs(np.asarray(first.convert("RGB"), dtype=int) - np.asarray(again, dtype=int))
        if out is not None:
            save_png(
                out,
                again,
                call,
                index,
                sampling.seeds[place],
                sampling.prompts[place],
                sampling.negative_prompts[place],
            )
        if difference.max() == 0:
            print(f"{image}: made again, equal in every pixel")
            return
        share = (difference.max(axis=-1) > 0).mean()
        raise ValueError(
            f"{image}: made again, but {share:.2%} of the pixels differ, by up to {difference.max()} of 255 levels "
            f"(recorded with minisd {call.version}, {call.threads} threads)"
        )
    raise ValueError(f"{image}: its record speaks of picture {index}, which its call does not make")


# ------------------------------------------------------------------------------------------------- what all of them do


def _make(
    task: str, arguments: dict, inputs: dict[str, Path], settings: Settings, model: Model, output: Output
) -> None:
    """Load, sample with a bar, save each picture as soon as it is finished."""
    from minisd.images import grid
    from minisd.record import Call, input_record, save_png, write_whole

    total = arguments["num_images"] * (len(arguments["prompt"]) if isinstance(arguments["prompt"], list) else 1)
    names = _names(output, total, arguments["seed"])
    records = {name: input_record(path) for name, path in inputs.items()}
    options = model.as_plain()
    import torch  # after the cheap checks

    call = Call(task, arguments, settings, options, records, threads=torch.get_num_threads())
    sd = load_model(options)
    images: list[Image.Image] = []
    strip: list[tuple[float, Image.Image]] = []
    for start, sampling in _samplings(sd, call, inputs):
        if start == 0 and task != "txt2img":
            print(f"{len(sampling)} of {settings.steps} steps at strength {arguments.get('strength', 1.0)}")
        for number, step in enumerate(progress(sampling)):
            if output.preview is not None and _due():
                picture = sampling.preview(step)[0]
                write_whole(output.preview, lambda file, picture=picture: picture.save(file, "PNG"))
            if output.trajectory is not None and start == 0 and _chosen(number, len(sampling)):
                strip.append((float(step.t), sampling.preview(step)[0]))
        if sampling.is_draft:
            continue
        for place, image in enumerate(sampling.images()):
            index = start + place
            save_png(names[index], image, call, index, *sampling.origin(place))
            print(names[index])
            images.append(image)
    if output.grid is not None:
        write_whole(output.grid, lambda file: grid(images).save(file, "PNG"))
        print(output.grid)
    if strip:
        write_whole(output.trajectory, lambda file: grid([i for _, i in strip], len(strip)).save(file, "PNG"))
        print(output.trajectory)


def load_model(model: Model | dict) -> StableDiffusion:
    """The model of the options (or of a record's plain values); says in three lines what it is."""
    import torch

    import minisd

    options = model.as_plain() if isinstance(model, Model) else model

    sd = minisd.load(
        options["checkpoint"],
        weights=options["weights"],
        prediction=options["prediction"],
        vae=options["vae"],
        dtype=options["dtype"] and getattr(torch, options["dtype"]),
        device=options["device"],
    )
    print("\n".join(sd.report[:3]))
    return sd


def _samplings(sd: StableDiffusion, call: Call, inputs: dict[str, Path]) -> Iterator[tuple[int, Sampling]]:
    """(index of its first picture, sampling) for every batch of a call."""
    from minisd import tasks
    from minisd.images import load_image

    pictures = {name: load_image(path) for name, path in inputs.items()}
    start = 0
    for sampling in getattr(tasks, call.task)(sd, settings=call.settings, **call.arguments, **pictures):
        yield start, sampling
        start += 0 if sampling.is_draft else len(sampling.seeds)


def progress(sampling: Sampling) -> Iterator[Step]:
    """The steps of a sampling, under a bar with seconds per step."""
    from tqdm import tqdm

    label = f"seed {sampling.seeds[0]}" + (f"…{sampling.seeds[-1]}" if len(sampling.seeds) > 1 else "")
    label += " (first pass)" if sampling.is_draft else ""
    form = "{desc} {bar:24} {n_fmt}/{total_fmt} {elapsed}<{remaining}, {rate_inv_fmt}"
    return tqdm(sampling, total=len(sampling), desc=label, unit="step", bar_format=form)


def _prompts(given: tuple[str, ...], file: Path | None) -> list[str]:
    lines = []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not readable as a text of prompts ({error})") from error
    if not (found := [*given, *(line for line in lines if line)]):
        raise ValueError('no prompt was given: minisd txt2img "a red apple", or --prompts FILE')
    return found


def _names(output: Output, total: int, seed: int) -> list[Path]:
    """One file name per picture; nothing that exists is among them, unless it may be overwritten."""
    if output.out.suffix.lower() == ".png":
        width = len(str(total - 1))
        numbered = [output.out.with_stem(f"{output.out.stem}-{i:0{width}}") for i in range(total)]
        names = [output.out] if total == 1 else numbered
    elif output.out.suffix and not output.out.is_dir():
        raise ValueError(f"{output.out}: pictures are saved as .png, which holds how they were made; name it so")
    else:
        taken = [int(p.stem.split("-")[0]) for p in output.out.glob("*.png") if p.stem.split("-")[0].isdigit()]
        first = max(taken, default=-1) + 1
        names = [output.out / f"{first + i:05}-{seed + i}.png" for i in range(total)]
    others = [path for path in (output.grid, output.trajectory) if path is not None]
    if not output.overwrite and (there := next((path for path in [*names, *others] if path.exists()), None)):
        raise ValueError(f"{there} exists already: choose another name, or add --overwrite")
    return names


def _chosen(number: int, total: int, frames: int = 10) -> bool:
    """Evenly spread steps of a sampling, the last among them."""
    return total <= frames or (number + 1) * frames // total > number * frames // total


_last_preview = 0.0


def _due(seconds: float = 2.0) -> bool:
    import time

    global _last_preview
    if time.monotonic() - _last_preview < seconds:
        return False
    _last_preview = time.monotonic()
    return True
