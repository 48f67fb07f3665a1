"""The commands that make images: one for each task, its options those that the task declares."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from cyclopts import Group, Parameter

from minisd.cli.options import Model
from minisd.cli.output import Output, Preview, Strip, progress, save_sheet
from minisd.tasks import TASKS
from minisd.tasks.options import Options, check_seed, option_help
from minisd.tasks.sampler_names import NAMES

if TYPE_CHECKING:
    from minisd.pipeline import CondNetwork
    from minisd.provenance.call import Call
    from minisd.stable_diffusion import StableDiffusion
    from minisd.tasks.sampling import Sampling

ALIASES = {  # the spellings of other programs
    "guidance_scale": ("--cfg", "--cfg-scale"),
    "steps": ("-s",),
    "num_images": ("-n",),
    "width": ("-W",),
    "height": ("-H",),
    "strength": ("--denoising-strength",),
}
SAMPLING = Group("Sampling", sort_key=1)


def __getattr__(name: str) -> Callable[..., None]:
    """The command of a task, by the task's name."""
    if name not in TASKS:
        raise AttributeError(name)
    return command(TASKS[name])


def command(task: type[Options]) -> Callable[..., None]:
    """The task as a function from whose signature cyclopts makes a command: prompt, images, options, model, output."""
    images, several = task.images(), not task.images()

    def run(*args: Any, model: Model | None = None, output: Output | None = None, **options: Any) -> None:
        prompts = [*args, *read_prompts(options.pop("prompts", None))] if several else [args[0]]
        paths = {} if several else dict(zip(images, args[1:], strict=True))
        make(prompts, task.of(options), model or Model(), output or Output(), paths)

    run.__name__ = task.name
    run.__doc__ = None
    run.__annotations__ = {}
    run.__signature__ = inspect.Signature([*_inputs(task), *sampling_parameters(task), *_common()])  # type: ignore[attr-defined]
    return run


def _inputs(task: type[Options]) -> list[inspect.Parameter]:
    texts = option_help(task)

    def parameter(name: str, kind: Any, hint: Any, text: str, **default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, kind, annotation=Annotated[hint, Parameter(help=text)], **default)

    if not task.images():
        return [
            parameter("prompt", inspect.Parameter.VAR_POSITIONAL, str, "what to draw; several are drawn in turn"),
            parameter(
                "prompts",
                inspect.Parameter.KEYWORD_ONLY,
                Path | None,
                "a text file of further prompts, one a line",
                default=None,
            ),
        ]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [
        parameter("prompt", kind, str, "what the result shows"),
        *(parameter(name, kind, Path, texts[name]) for name in task.images()),
    ]


def sampling_parameters(task: type[Options], only: tuple[str, ...] | None = None) -> list[inspect.Parameter]:
    """The options of a task as keywords with help, aliases and groups. only: some of them."""
    hints, texts = get_type_hints(task), dict(option_help(task))
    texts["sampler"] = f"{', '.join(NAMES)}; {texts['sampler'].partition(', ')[2]}"
    parameters = []
    for field in fields(task):
        if only is not None and field.name not in only:
            continue
        hint = hints[field.name]
        if isinstance(hint, UnionType) and str in get_args(hint):  # in Python also a list, or a function
            hint = str
        group = {"group": SAMPLING} if field.name in Options.__annotations__ else {}
        annotation = Parameter(help=texts[field.name], alias=ALIASES.get(field.name, ()), **group)
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[hint, annotation],
            )
        )
    return sorted(parameters, key=lambda parameter: parameter.name in Options.__annotations__)


def with_options(task: type[Options], *names: str) -> Callable[[Callable], Callable]:
    """A decorator of commands that take `options: task`: on the command line these are the task's options `names`."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args: Any, **keywords: Any) -> Any:
            options = task.of({name: keywords.pop(name) for name in list(keywords) if name in names})
            return function(*args, options=options, **keywords)

        own = inspect.signature(function, eval_str=True).parameters.values()
        kept = [parameter for parameter in own if parameter.name != "options"]
        run.__annotations__ = {}
        run.__signature__ = inspect.Signature([*kept, *sampling_parameters(task, names)])  # type: ignore[attr-defined]
        del run.__wrapped__  # whose annotations cyclopts would read
        return run

    return decorate


def _common() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=part(), annotation=part)
        for name, part in (("model", Model), ("output", Output))
    ]


def make(prompts: list[str], options: Options, model: Model, output: Output, images: dict[str, Path]) -> None:
    """Load, sample with a bar, save each image as soon as it is finished, and print its name."""
    call, names = plan(prompts, options, model, output, images)
    sd = model.load()
    preview, strip, sheet, done = Preview(output.preview), Strip(), [], 0
    from minisd.provenance.png import save_png

    try:
        for sampling in samplings(sd, call, images, model.network(sd)):
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
        raise KeyboardInterrupt(f": {done} of {len(names)} images are finished{where}") from None


def plan(
    prompts: list[str], options: Options, model: Model, output: Output, images: dict[str, Path]
) -> tuple[Call, list[Path]]:
    """The call and its images' names; refuses what can be refused before gigabytes are loaded."""
    if not prompts:
        raise ValueError('no prompt was given: minisd txt2img "a red apple", or --prompts FILE')
    if any(_undecoded(text) for text in [*prompts, str(options.negative_prompt)]):
        raise ValueError("a prompt holds bytes that are no text: give it in UTF-8")
    import torch

    from minisd.diffusion.samplers import get_sampler
    from minisd.provenance.call import Call
    from minisd.provenance.files import remember_input
    from minisd.tasks.images import load_image

    get_sampler(options.sampler, eta=options.eta)
    total = len(prompts) * options.num_images
    check_seed("seed", options.seed, total)
    names = output.names(total, options.seed)
    for path in images.values():
        load_image(path)
    # a preview replaces the one before it, and must replace nothing else
    others = [path for path in (*names, *images.values(), output.grid, output.trajectory) if path is not None]
    if output.preview is not None and output.preview.absolute() in {path.absolute() for path in others}:
        raise ValueError(f"{output.preview} is an input or a result of this call: give the preview a name of its own")
    model.check()
    folder = output.folder
    call = Call(
        options,
        prompts,
        model.record(folder),
        {name: remember_input(path, folder) for name, path in images.items()},
        torch.get_num_threads(),
        torch.__version__,
    )
    return call, names


def samplings(
    sd: StableDiffusion, call: Call, images: dict[str, Path], network: CondNetwork | None
) -> Iterator[Sampling]:
    """The samplings of a call, first passes among them."""
    from minisd.tasks.images import load_image

    opened = [load_image(path) for path in images.values()]
    return call.options.samplings(sd, call.prompts, *opened, network=network)


def announce(call: Call, sampling: Sampling) -> None:
    """How many steps really run, where it is not the number asked for."""
    if len(sampling) != call.options.steps:
        reason = f" (strength {s:g})" if (s := getattr(call.options, "strength", None)) else ""
        print(f"{len(sampling)} of {call.options.steps} steps run{reason}", file=sys.stderr)


def check_memory(sampling: Sampling) -> None:
    """Say what a large sampling will take; ValueError, before its first step, where that much is not to be had."""
    from minisd.runtime import memory
    from minisd.stable_diffusion import StableDiffusion

    sd = sampling.sd
    assert isinstance(sd, StableDiffusion)
    if not memory.is_large(sampling):
        return
    sd.unload()  # then what is free, too, is without the weights
    offload = sd.offload is not None
    needs, free = memory.needs(sampling, offload=offload), memory.available(sd.device)
    print(needs, file=sys.stderr)
    if free is not None and needs.beside_weights > free:
        beside = "" if offload else " beside the weights"
        advice = ", --offload" if beside and sd.device.type != "cpu" else ""
        raise ValueError(
            f"{needs}; {free / 1e9:.1f} GB are free{beside}: choose a smaller --batch-size, --height and --width, "
            f"--vae-tiling 64{advice}, or --dtype bfloat16"
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
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{file}: there is no prompt in it: write one a line")
    return prompts


def _undecoded(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)
