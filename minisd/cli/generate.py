"""The commands that make pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from minisd.cli.options import Common
from minisd.cli.output import Preview, Strip, progress, save_sheet
from minisd.provenance.arguments import Arguments, Img2Img, Inpaint, Outpaint, Txt2Img

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion
    from minisd.provenance.call import Call
    from minisd.tasks import Sampling

Flat = Parameter(name="*")  # a dataclass's fields as options of their own names


def txt2img(
    *prompt: str,
    prompts: Path | None = None,
    arguments: Annotated[Txt2Img, Flat] = Txt2Img(),
    common: Common = Common(),
) -> None:
    """Draw pictures of one or several prompts.

    Args:
        prompt: what to draw; several are drawn one after the other.
        prompts: a text file of further prompts, one a line.
    """
    make([*prompt, *read_prompts(prompts)], arguments, common)


def img2img(
    prompt: str,
    image: Path,
    *,
    arguments: Annotated[Img2Img, Flat] = Img2Img(),
    common: Common = Common(),
) -> None:
    """Redraw a picture after a prompt.

    Args:
        prompt: what it shall become.
        image: the picture to start from.
    """
    make([prompt], arguments, common, image=image)


def inpaint(
    prompt: str,
    image: Path,
    mask: Path,
    *,
    arguments: Annotated[Inpaint, Flat] = Inpaint(),
    common: Common = Common(),
) -> None:
    """Repaint the part of a picture where a mask is white; the rest stays as it is, bit for bit.

    Args:
        prompt: what the picture shows once it is repainted.
        image: the picture.
        mask: a picture of the same size, white where to repaint.
    """
    make([prompt], arguments, common, image=image, mask=mask)


def outpaint(
    prompt: str,
    image: Path,
    *,
    arguments: Annotated[Outpaint, Flat] = Outpaint(),
    common: Common = Common(),
) -> None:
    """Paint on beyond the edges of a picture.

    Args:
        prompt: what the larger picture shows.
        image: the picture.
    """
    make([prompt], arguments, common, image=image)


def make(prompts: list[str], arguments: Arguments, common: Common, **inputs: Path) -> None:
    """Load, sample with a bar, save each picture as soon as it is finished, and print its name."""
    call, names = plan(prompts, arguments, common, inputs)
    sd, output = common.model.load(), common.output
    preview, strip, sheet, done = Preview(output.preview), Strip(), [], 0
    from minisd.provenance.png import save_png

    try:
        for sampling in samplings(sd, call, inputs):
            if not done:
                announce(call, sampling)
                check_memory(sampling)
            for number, step in enumerate(progress(sampling)):
                preview.show(sampling, step)
                if output.trajectory is not None and not done and not sampling.is_draft:
                    strip.add(sampling, number, step)
            if sampling.is_draft:
                continue
            for image in sampling.images():
                save_png(names[done], image, call, done)
                done += 1
                print(names[done - 1], flush=True)
                if output.grid is not None:
                    sheet.append(image)
        if output.grid is not None:
            save_sheet(output.grid, sheet)
            print(output.grid)
        if output.trajectory is not None:
            save_sheet(output.trajectory, strip.images, columns=len(strip.images))
            print(output.trajectory)
    except KeyboardInterrupt:
        where = f", in {output.folder}" if done else ""
        raise KeyboardInterrupt(f": {done} of {len(names)} pictures are finished{where}") from None


def plan(prompts: list[str], arguments: Arguments, common: Common, inputs: dict[str, Path]) -> tuple[Call, list[Path]]:
    """The call and its pictures' names; refuses what can be refused before gigabytes are loaded."""
    if not prompts:
        raise ValueError('no prompt was given: minisd txt2img "a red apple", or --prompts FILE')
    if any(_undecoded(text) for text in [*prompts, arguments.negative_prompt]):
        raise ValueError("a prompt holds bytes that are no text: give it in UTF-8")
    arguments.check()
    import torch

    from minisd.diffusion.samplers import get_sampler
    from minisd.provenance.call import Call
    from minisd.provenance.files import remember_input
    from minisd.tasks.images import load_image

    settings, output = common.settings, common.output
    get_sampler(settings.sampler)
    names = output.names(len(prompts) * arguments.num_images, arguments.seed)
    for path in inputs.values():
        load_image(path)
    # a preview replaces the one before it, and must replace nothing else
    others = [path for path in (*names, *inputs.values(), output.grid, output.trajectory) if path is not None]
    if output.preview is not None and output.preview.absolute() in {path.absolute() for path in others}:
        raise ValueError(f"{output.preview} is an input or a result of this call: give the preview a name of its own")
    common.model.check()
    folder = output.folder
    call = Call(
        arguments,
        prompts,
        settings,
        common.model.record(folder),
        {name: remember_input(path, folder) for name, path in inputs.items()},
        torch.get_num_threads(),
        torch.__version__,
    )
    return call, names


def samplings(sd: StableDiffusion, call: Call, inputs: dict[str, Path]) -> Iterator[Sampling]:
    """The samplings of a call, first passes among them."""
    from minisd import tasks
    from minisd.tasks.images import load_image

    task = getattr(tasks, call.arguments.task)
    pictures = {name: load_image(path) for name, path in inputs.items()}
    yield from task(sd, call.prompts, **pictures, **vars(call.arguments), settings=call.settings)


def announce(call: Call, sampling: Sampling) -> None:
    """How many steps really run, where it is not the number asked for."""
    if len(sampling) != call.settings.steps:
        reason = f" (strength {s:g})" if (s := getattr(call.arguments, "strength", None)) else ""
        print(f"{len(sampling)} of {call.settings.steps} steps run{reason}", file=sys.stderr)


def check_memory(sampling: Sampling) -> None:
    """Say what a large sampling will take; ValueError, before its first step, where that much is not to be had."""
    from minisd.runtime import memory

    if not memory.is_large(sampling):
        return
    sd = sampling.sd
    sd.rest()  # then what is free, too, is without the weights
    needs, free = memory.needs(sampling), memory.available(sd.device)
    print(needs, file=sys.stderr)
    if free is not None and needs.beside_weights > free:
        beside = "" if sd.offload else " beside the weights"
        offload = ", --offload" if beside and sd.device.type != "cpu" else ""
        raise ValueError(
            f"{needs}; {free / 1e9:.1f} GB are free{beside}: choose a smaller --batch-size, --height and --width, "
            f"--tile 64{offload}, or --dtype bfloat16"
        )


def read_prompts(file: Path | None) -> list[str]:
    """The lines of a text file in UTF-8 that are not empty."""
    if file is None:
        return []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8 ({error.reason} at byte {error.start}): save it so") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file}: there is no prompt in it: write one a line")
    return found


def _undecoded(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
