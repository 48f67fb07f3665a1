"""The commands that plot figures to study by."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from minisd.cli.generate import with_options
from minisd.cli.options import Model
from minisd.cli.output import check_target, progress
from minisd.tasks import Options, Txt2Img

ONE_IMAGE = {"num_images", "batch_size"}  # what a figure of one image has no use for
DRAWN = ("height", "width", *(name for name in Options.__annotations__ if name != "name" and name not in ONE_IMAGE))


def plot_schedules(*names: str, out: Path = Path("schedules.png")) -> None:
    """Noise schedules side by side: β, ᾱ and log-SNR over t.

    Args:
        names: linear, scaled_linear or cosine; with -zsnr behind it, rescaled to zero terminal SNR [all three]
        out: figure to write, as .png, .svg or .pdf
    """
    from minisd.plots import plot_schedules as draw

    check_figure(out)
    print(draw(names or ("linear", "scaled_linear", "cosine"), out))


def plot_noising(
    image: Path,
    *,
    schedules: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    steps: int = 8,
    out: Path = Path("noising.png"),
) -> None:
    """The forward process q(x_t | x_0) on an image: one row per noise schedule, the same noise in all.

    Args:
        image: image to add noise to
        schedules: noise schedules, named as for `minisd plot schedules` [linear cosine]
        steps: timesteps shown, evenly spaced from 0 to T-1
        out: figure to write, as .png, .svg or .pdf
    """
    from minisd.plots import plot_noising as draw
    from minisd.tasks.images import load_image

    check_figure(out)
    print(draw(load_image(image), out, schedules or ("linear", "cosine"), steps=steps))


@with_options(Txt2Img, *DRAWN)
def plot_trajectory(
    prompt: str,
    *,
    options: Txt2Img,
    panels: int = 10,
    model: Model = Model(),
    out: Path = Path("trajectory.png"),
) -> None:
    """The predicted x_0 at each step of sampling, decoded.

    Args:
        prompt: text prompt
        panels: steps shown, evenly spaced, the first and the last included
        out: figure to write, as .png, .svg or .pdf
    """
    from minisd.plots import plot_trajectory as draw

    check_figure(out)
    (sampling,) = options.samplings(model.load(), prompt)
    frames = [(float(step.t), sampling.preview(step)[0]) for step in progress(sampling)]
    print(draw(frames, out, panels=panels))


@with_options(Txt2Img, *DRAWN)
def plot_attention(
    prompt: str,
    *,
    options: Txt2Img,
    model: Model = Model(),
    out: Path = Path("attention.png"),
) -> None:
    """Cross-attention maps: where an image attends to each word of its prompt, mean over steps, layers and heads.

    Args:
        prompt: text prompt
        out: figure to write, as .png, .svg or .pdf
    """
    from minisd.plots import plot_attention as draw
    from minisd.plots.attention_maps import AttentionMaps, prompt_words
    from minisd.text.prompts import chunk_prompt

    check_figure(out)
    sd = model.load()
    (sampling,) = options.samplings(sd, prompt)
    with AttentionMaps(sd.unet) as maps:
        for _ in progress(sampling):
            pass
    ids = [i for chunk in chunk_prompt(sd.tokenizer, prompt, options.prompt_syntax) for i in chunk.ids]
    print(draw(maps.mean()[0], prompt_words(sd.tokenizer, ids), sampling.images()[0], out))


def check_figure(out: Path) -> None:
    """ValueError where a figure could not be saved, before the model is loaded."""
    from minisd.plots.figures import FORMATS, new_figure

    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out}: a figure is saved as {', '.join(FORMATS)}: name it so")
    new_figure(1, 1)  # ImportError without matplotlib
    check_target(out, overwrite=None)
    out.parent.mkdir(parents=True, exist_ok=True)
