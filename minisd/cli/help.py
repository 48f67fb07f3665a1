"""How `--help` looks: what kind of value each option takes is said in words of the reader's, not of Python's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args, get_origin

from cyclopts.help import ColumnSpec, DefaultFormatter, DescriptionRenderer, HelpEntry
from cyclopts.help.specs import get_default_command_columns

KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
SHORT = 12  # columns that the choices of an option may take beside its name
WIDTH = 24  # of the labels, in every panel


def label(entry: HelpEntry) -> str:
    """`PROMPT`, `--steps N`, `--weights raw|ema`, `--overwrite`."""
    positional = [name for name in entry.names if not name.startswith("-")]
    if positional or getattr(entry, "positional_label", None):  # cyclopts 4 and 5
        return getattr(entry, "positional_label", None) or positional[0]
    return " ".join(filter(None, [", ".join(entry.names + entry.shorts), kind(entry.type)]))


def kind(hint) -> str:
    """What stands for a value of this type; nothing for a flag."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if get_origin(hint) is Literal:
        choices = "|".join(options)
        return choices if len(choices) <= SHORT else "NAME"
    if get_origin(hint) is tuple:
        return " ".join(kind(option) for option in options if option is not ...)
    if options:  # an optional, or a list
        return kind(options[0])
    return KINDS.get(hint, "")


def description(entry: HelpEntry):
    """The help text, with choices where the label could not hold them, and the default."""
    named = entry.choices is not None and "|".join(entry.choices) in label(entry)
    return DescriptionRenderer()(entry.copy(choices=None if named else entry.choices, required=False))


def columns(console, options, entries):
    """A panel of options, its columns where those of the other panels are; commands as cyclopts shows them."""
    if entries[0].type is None:
        return get_default_command_columns(console, options, entries)
    return (
        ColumnSpec(renderer=label, style="cyan", min_width=WIDTH, no_wrap=True),
        ColumnSpec(renderer=description, overflow="fold"),
    )


formatter = DefaultFormatter(column_specs=columns)
