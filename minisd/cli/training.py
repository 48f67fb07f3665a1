"""The commands that train from nothing, one for each of `RECIPES`, and what they share with `minisd train lora …`.

`torchrun --nproc-per-node N -m minisd train …` shares one training among N processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, make_dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from cyclopts import Group, Parameter
from docstring_parser import parse

from minisd.cli.options import Model
from minisd.config import CLIPTextConfig, CLIPVisionConfig, ModelConfig, UNetConfig, VAEConfig
from minisd.training.options import RUN, TrainingRun, changed, read_changes
from minisd.training.recipes import RECIPES, load_recipe

Carried = Annotated[TrainingRun, Parameter(name="*", group=Group("Run", sort_key=2))]
NETWORKS = (UNetConfig, VAEConfig, CLIPTextConfig, CLIPVisionConfig, ModelConfig)  # listed by `minisd inspect`
LISTED = {"consume_multiple": True, "negative": ()}

TRAINING = Group("Training", sort_key=1)
PLAIN_GROUP = Parameter(name="*", group=TRAINING)

# Options of their own, and the field of a config that each sets, where the config has it. --set reaches the others.
PLAIN = {
    "steps": "loop.steps",
    "lr": "loop.lr",
    "batch_size": "loop.batch_size",
    "rank": "rank",
    "resolution": "size",
    "seed": "loop.seed",
    "start_from": "start",
}
OWN = {*PLAIN.values(), "subject.token", "subject.class_word"}  # fields that --set need not list


def plain_options(default: Any, small: Any = None) -> type:
    """A dataclass of those options of PLAIN that a config has; None where none is given.

    Types and help come from the config's fields; the help ends with the defaults, those of a small model beside.
    """
    options = []
    for name, path in PLAIN.items():
        *parents, field = path.split(".")
        try:
            owner, owner_of_small = (reduce(getattr, parents, c) for c in (default, small or default))
            value, value_of_small = getattr(owner, field), getattr(owner_of_small, field)
        except AttributeError:
            continue
        text = described(type(owner))[field]
        if value is not None and value != ():
            of_small = "" if value == value_of_small else f"; small models {value_of_small}"
            text = f"{text.rstrip('.')} [{value}{of_small}]"
        parameter = Parameter(help=text, **(LISTED if isinstance(value, tuple) else {}))
        options.append((name, Annotated[get_type_hints(type(owner))[field] | None, parameter], None))
    return make_dataclass("PlainOptions", options, frozen=True, namespace={"__module__": __name__})


def plain_changes(options: Any) -> dict:
    """What was given, as changes of a config."""
    values = {PLAIN[f.name]: getattr(options, f.name) for f in fields(options)}
    changes: dict = {}
    for path, value in values.items():
        if value is not None:
            *parents, field = path.split(".")
            reduce(lambda level, name: level.setdefault(name, {}), parents, changes)[field] = value
    return changes


def settings_of(default: Any) -> Any:
    """The annotation of --set: its help lists the other fields with their defaults, networks left out."""
    others = [f"{path}={json.dumps(value)}" for path, value in leaves(default) if path not in OWN]
    text = f"FIELD=VALUE, any other field of the config; several may follow. Defaults: {' '.join(others)}"
    return Annotated[list[str], Parameter(name="--set", help=text, group=TRAINING, **LISTED)]


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested config that are no configs themselves, by path, without those of networks."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not is_dataclass(value):
            yield f"{path}{field.name}", value
        elif not isinstance(value, NETWORKS):
            yield from leaves(value, f"{path}{field.name}.")


def described(config: type) -> dict[str, str]:
    """The fields of a config dataclass in the words of its docstring."""
    return {p.arg_name: " ".join(p.description.split()) for p in parse(config.__doc__).params}


def training_command(name: str) -> Callable[..., None]:
    """`minisd train NAME`."""
    trained = load_recipe(name)
    default = trained.config("cpu")
    options_type = plain_options(default)
    unset = options_type()

    def command(folder, *, out=Path(name), config=None, options=unset, settings=(), run=RUN) -> None:
        from minisd.training.parallel import processes

        check(folder, out, run)
        plan = changed(trained.config(run.device), read_changes(config, ()))
        plan = changed(changed(plan, plain_changes(options)), read_changes(None, settings))
        images = trained.load(folder, plan)
        with processes(run.device) as group:
            trained.train(images, out, plan, run, group)
        print(out / trained.writes)

    command.__doc__ = f"""{RECIPES[name]} The same command resumes an interrupted training.

    Args:
        folder: training images of any size, captions in .txt files of the same name; or the scripts/build_emoji.py set.
        out: output folder: {trained.writes}, training state, logs, sample sheets.
        config: a JSON file of the fields that differ from the defaults.
    """
    command.__annotations__ = {
        "folder": Path,
        "out": Path,
        "config": Path | None,
        "options": Annotated[options_type, PLAIN_GROUP],
        "settings": settings_of(default),
        "run": Carried,
        "return": None,
    }
    return command


def __getattr__(name: str) -> Callable[..., None]:
    """train_mini, train_ddpm …: made when the command line asks for them."""
    if (known := name.removeprefix("train_")) in RECIPES and known != name:
        return training_command(known)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check(folder: Path, out: Path, run: TrainingRun) -> None:
    """ValueError for a device that is not there, and for sheets that would become pictures to learn from."""
    Model(device=run.device).check()
    if out.absolute().is_relative_to(folder.absolute()):
        raise ValueError(
            f"{out} lies in {folder}, where its own sheets would be pictures to learn from: choose another"
        )
