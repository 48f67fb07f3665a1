"""Train models from nothing. Free of torch: a recipe is imported when it is asked for.

A new recipe is one file, with a `TrainingRecipe` called RECIPE, and one line in `RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# A recipe's file under this package, and its line of help.
RECIPES = {
    "mini": "A whole small Stable Diffusion from scratch: VAE, CLIP, U-Net.",
    "ddpm": "An unconditional DDPM in pixel space, the simplest diffusion model.",
}


@dataclass(frozen=True)
class TrainingRecipe:
    """What the command line needs to know of a recipe.

    config: its config dataclass, with the defaults for a device ("cpu", "cuda" …). train: (images, folder, config, run,
    group). load: (folder, config) → images. writes: the result's file in the folder.
    """

    config: Callable[[str], Any]
    train: Callable[..., Any]
    load: Callable[[Path, Any], Any]
    writes: str


def load_recipe(name: str) -> TrainingRecipe:
    return import_module(f"minisd.training.recipes.{name}").RECIPE
