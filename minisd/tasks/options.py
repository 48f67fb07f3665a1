"""One flat set of options for a task: its own, and those of `Settings`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import fields

from minisd.config import Settings


def task_options(task: Callable, options: dict) -> dict:
    """The keyword arguments of a task, its settings gathered. ValueError, naming the known ones, for any other."""
    own = {name for name, p in inspect.signature(task).parameters.items() if p.kind is p.KEYWORD_ONLY}
    of_settings = {field.name for field in fields(Settings)}
    known = sorted(own | of_settings)
    if unknown := next((name for name in options if name not in known), None):
        near = difflib.get_close_matches(unknown, known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{task.__name__} has no option {unknown!r}: {meant}known: {', '.join(known)}")
    gathered = {name: value for name, value in options.items() if name in of_settings}
    if gathered and options.get("settings") is not None:
        raise ValueError(f"give {', '.join(sorted(gathered))} inside settings, or leave settings out")
    rest = {name: value for name, value in options.items() if name not in of_settings}
    return rest | {"settings": Settings(**gathered)} if gathered else rest
