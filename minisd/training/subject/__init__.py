"""Teach a model one subject from a few photos. Free of torch: a method is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisd.training.subject.method import Method

# A method's file under this package, and its line of help.
METHODS = {
    "textual_inversion": "Textual Inversion: learn one new token embedding; the smallest file, changes nothing else.",
    "lora": "LoRA: learn low-rank additions to some layers; a small file, close to DreamBooth.",
    "dreambooth": "DreamBooth: fine-tune all of the U-Net (and the text encoder) on a subject.",
}


def load_method(name: str) -> Method:
    """The method of this name, such as "lora" or "textual-inversion". ValueError, with the known names, for another."""
    if (file := name.replace("-", "_")) not in METHODS:
        known = ", ".join(name.replace("_", "-") for name in METHODS)
        raise ValueError(f"unknown method {name!r}; known: {known}")
    return import_module(f"minisd.training.subject.{file}").METHOD
