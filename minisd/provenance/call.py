"""A call of a task: everything its pictures depend on, to and from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from minisd import __version__
from minisd.config import PredictionType
from minisd.schema import OLDER_NAMES, from_dict
from minisd.tasks import TASKS, Options


@dataclass(frozen=True)
class File:
    """A file that a picture was made from: its name seen from the picture's folder, and what tells it from others."""

    name: str
    digest: str


@dataclass(frozen=True)
class EmbeddingFile:
    """A textual-inversion file, and the token it was given; None is the file's own."""

    file: File
    token: str | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, and the weight it was merged at."""

    file: File
    weight: float = 1.0


@dataclass(frozen=True)
class LoadedModel:
    """Which model drew, how it was loaded, and what was added to it."""

    checkpoint: File
    vae: File | None = None
    weights: Literal["raw", "ema"] = "raw"
    prediction: PredictionType | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "cpu"
    embeddings: tuple[EmbeddingFile, ...] = ()
    loras: tuple[LoraFile, ...] = ()


@dataclass(frozen=True)
class Call:
    """One call of a task: enough to make its pictures again.

    threads: of the CPU; on their number, and on torch's version, the last bit of a picture may depend.
    """

    options: Options
    prompts: list[str]
    model: LoadedModel
    inputs: dict[str, File] = field(default_factory=dict)
    threads: int = 0
    torch: str = ""
    version: str = __version__

    def __len__(self) -> int:
        """How many pictures it makes."""
        return len(self.prompts) * self.options.num_images

    def batch(self, index: int) -> tuple[Call, int]:
        """The call of just the batch that picture `index` is in, and its place there: the same work, bit for bit."""
        size, count = self.options.batch_size, self.options.num_images
        start = index - index % size
        places = range(start, min(start + size, len(self)))
        counting = "variation_seed" if self._varied else "seed"  # the one that goes up from image to image
        options = replace(self.options, num_images=1, **{counting: getattr(self.options, counting) + start})
        return replace(self, prompts=[self.prompts[i // count] for i in places], options=options), index - start

    @property
    def _varied(self) -> bool:
        """Whether all images start from one seed, as variations of it do."""
        return getattr(self.options, "variation_seed", None) is not None

    def seed(self, index: int) -> int:
        """Of one of its images."""
        return self.options.seed + (0 if self._varied else index)


def to_json(call: Call, index: int) -> str:
    """The record of one image of a call."""
    return json.dumps({"task": call.options.name, "index": index, "seed": call.seed(index)} | asdict(call))


def from_json(text: str) -> tuple[Call, int]:
    """(call, index) of `to_json`, every type checked: the text may come from anywhere. ValueError otherwise."""
    try:
        values = json.loads(text)
        task, prompts, index = TASKS[values["task"]], values["prompts"], values["index"]
        if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
            raise ValueError("prompts must be a list of texts")
        if not all(type(number) is int for number in (index, values["threads"])):
            raise ValueError("index and threads must be whole numbers")
        call = Call(
            from_dict(task, values["options"] if "options" in values else _older(values)),
            prompts,
            from_dict(LoadedModel, values["model"]),
            {name: from_dict(File, values["inputs"][name]) for name in task.images()},
            values["threads"],
            str(values["torch"]),
            str(values["version"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"its record of how it was made cannot be read: {reason}") from error
    count = len(call.prompts) * call.options.num_images  # len(call) itself must fit a machine's word
    if not 0 <= index < count:
        raise ValueError(f"its record speaks of picture {index} of a call that makes {count}")
    return call, index


def _older(values: dict) -> dict:
    """The options of a record that was written before they were one group."""
    options = {OLDER_NAMES.get(name, name): v for name, v in {**values["arguments"], **values["settings"]}.items()}
    if not options.get("eta"):  # then 0 stood for the sampler's own
        options["eta"] = None
    return options
