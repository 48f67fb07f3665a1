"""What a task is told: one dataclass each, and from it its Python signature, its command line and an image's metadata.

Free of torch, so that the command line and its help never wait for it; a task imports what it runs when it runs.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral
from typing import Any, ClassVar, Literal, TypeVar

from minisd.tasks.sampler_names import resolve

Spacing = Literal["leading", "trailing", "linspace", "compvis", "karras"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every task takes besides prompts and images.

    Attributes:
        negative_prompt: what to steer away from; needs guidance
        num_images: images per prompt
        seed: of the first image; image i has seed + i, at any batch size
        steps: sampling steps, how often the U-Net is evaluated (heun: twice a step)
        sampler: by name, its own options behind a colon: euler:s_churn=40; A1111's, ComfyUI's and diffusers' names too
        guidance_scale: classifier-free guidance (CFG) scale; 1 disables guidance and halves the time
        guidance_rescale: CFG rescale φ in [0, 1], against over-exposure at high scales (Lin et al. 2023; theirs is 0.7)
        guidance_interval: guide only at timesteps t between these two (Kynkäänniemi et al. 2024)
        spacing: timestep spacing ("schedule type"); karras spaces σ; leading where the sampler's name says nothing
        eta: noise of ddim and euler_ancestral, from 0 (deterministic) to 1 (DDPM's); the sampler's own when left out
        prompt_syntax: how (weights:1.3), [brackets] and long prompts are read
        clip_skip: last layers of the text encoder to skip, 1 is what A1111 calls 2; the model's own when left out
        batch_size: images per forward pass; changes memory and speed, not the images
        vae_tiling: rows per tile of the VAE, 0 disables tiling; by the image's size when left out
    """

    name: ClassVar[str]
    samplings: ClassVar[Callable[..., Iterator]]  # runs the task: one `Sampling` per batch

    negative_prompt: str | Sequence[str] = ""
    num_images: int = 1
    seed: int = 0
    steps: int = 30
    sampler: str | Callable[..., Iterator] = "ddim"
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    spacing: Spacing | None = None
    eta: float | None = None
    prompt_syntax: Literal["plain", "chunked", "a1111", "comfyui"] = "plain"
    clip_skip: int | None = None
    batch_size: int = 1
    vae_tiling: int | None = None

    def __post_init__(self) -> None:
        """ValueError for what is wrong whatever the model."""
        for name in ("steps", "batch_size", "num_images"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}: give 1 or more, and a whole number")
        check_seed("seed", self.seed, self.num_images)
        for name in ("guidance_scale", "guidance_rescale", "eta"):
            if (value := getattr(self, name)) is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}: give a finite number")
        for name in ("guidance_rescale", "eta"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it lies in [0, 1]")
        for name in ("strength", "hires_fix"):
            if (share := getattr(self, name, None)) is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}: a denoising strength lies in (0, 1], where 1 is a new image")
        if self.guidance_interval is not None and not self.guidance_interval[0] <= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {self.guidance_interval}: give the lower timestep first")
        if isinstance(self.sampler, str):
            sampler, spacing = resolve(self.sampler)
            if spacing and self.spacing not in (None, spacing):
                raise ValueError(f"the sampler {self.sampler!r} means spacing={spacing!r}, not {self.spacing!r}")
            object.__setattr__(self, "sampler", sampler)
            object.__setattr__(self, "spacing", spacing or self.spacing)

    @classmethod
    def of(cls: type[Chosen], values: dict[str, Any]) -> Chosen:
        """The options of these names. ValueError, naming the known ones, for any other."""
        known = [field.name for field in fields(cls)]
        if unknown := next((name for name in values if name not in known), None):
            near = difflib.get_close_matches(unknown, known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{cls.name} has no option {unknown!r}: {meant}known: {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def images(cls) -> list[str]:
        """The names of the images that the task takes beside the prompt, in order."""
        parameters = inspect.signature(cls.samplings).parameters.values()
        return [
            p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "sd", "prompt")
        ]


Chosen = TypeVar("Chosen", bound=Options)


def check_seed(name: str, seed: int, count: int) -> None:
    """ValueError unless the generators of `count` images, seeded from `seed` on, exist."""
    last = 2**63 - count
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed <= last:
        raise ValueError(f"{name} is {seed!r}: give a whole number from 0 to {last}")


def function(task: type[Options]) -> Callable[..., Iterator]:
    """The task as a function (sd, prompt, [image, …] *, option=…, …, network=None), a generator of `Sampling`s."""
    own = list(inspect.signature(task.samplings).parameters.values())[1:]  # without self
    extra = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    names = {parameter.name for parameter in extra}

    def run(*args: Any, **options: Any) -> Iterator:
        inputs = {name: options.pop(name) for name in list(options) if name in names or name in task.images()}
        return task.of(options).samplings(*args, **inputs)

    keyword = inspect.Parameter.KEYWORD_ONLY
    chosen = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in sorted(fields(task), key=lambda field: field.name in Options.__annotations__)  # its own ones first
        if field.default is not MISSING
    ]
    run.__name__ = run.__qualname__ = task.name
    run.__doc__ = documentation(task)
    vars(run)["__signature__"] = inspect.Signature([*(p for p in own if p not in extra), *chosen, *extra])
    return run


def documentation(task: type[Options]) -> str:
    """The task's docstring, with its own options and those of every task."""
    text = inspect.getdoc(task) or ""
    common = (inspect.getdoc(Options) or "").partition("Attributes:\n")[2]
    text = text.replace("Attributes:", "Args:") if "Attributes:" in text else f"{text}\n\nArgs:"
    network = "network: (x_t, t, cond) → output, in place of the U-Net: a ControlNet round it, an experiment"
    return f"{text}\n{common}\n    {network}\n"


@functools.cache
def option_help(task: type[Options]) -> dict[str, str]:
    """What the docstrings say of each option, by name."""
    from docstring_parser import parse

    return {param.arg_name: " ".join((param.description or "").split()) for param in parse(documentation(task)).params}
