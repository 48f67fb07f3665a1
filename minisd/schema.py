"""Plain JSON values → dataclasses, every field known and of its type: what comes from a file is never half read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints


def from_dict(cls: Any, values: Any) -> Any:
    """Build the (nested) config dataclass cls from plain JSON values, refusing fields that it does not have."""
    if not isinstance(values, dict):
        raise ValueError(f"{cls.__name__} must be an object, got {values!r}")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    return cls(**{name: _decode(hints[name], value, f"{cls.__name__}.{name}") for name, value in values.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    options = get_args(hint)
    if is_dataclass(hint):
        return from_dict(hint, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not options:
        if type(value) is not hint:
            raise ValueError(f"{where} must be {hint.__name__}, got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise ValueError(f"{where} must have {len(options)} values, got {value!r}")
        return tuple(_decode(options[0], v, where) for v in value)
    if get_origin(hint) is Literal:
        if value not in options:
            raise ValueError(f"{where} is {value!r}; allowed: {', '.join(map(repr, options))}")
        return value
    # what is left is Optional[...]
    return None if value is None else _decode(next(o for o in options if o is not type(None)), value, where)


OLDER_NAMES = {  # in records and configs that were written before
    "convention": "prompt_syntax",
    "two_pass": "hires_fix",
    "tile": "vae_tiling",
    "variation": "variation_strength",
}
