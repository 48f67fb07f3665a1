"""What a method of teaching a subject declares, and how any of them is run.

A new method is one file, with a config dataclass and a `Method` called METHOD, and one line in `METHODS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from minisd.checkpoints.digests import network_digest
from minisd.stable_diffusion import StableDiffusion
from minisd.training.loop import train
from minisd.training.options import RUN, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.subject.config import SubjectConfig
from minisd.training.subject.photos import Photos
from minisd.training.subject.prior import class_samples
from minisd.training.subject.recipe import SubjectRecipe
from minisd.training.subject.validation import Scorer


@dataclass(frozen=True)
class Method:
    """A way to teach a model a subject: what moves, what comes of it, how it is used.

    name: in states and records. config: its dataclass, with the fields `subject` and `loop`, with `prior` where it has
    prior preservation, and with `for_small_model()`. learner: a model of its own; what of its U-Net and text encoder
    has requires_grad moves. result: of a finished training; the second model is the one that was given. save: the
    files. apply: a model that knows the subject; the given one stays. phrase: what prompts call the subject. token: the
    word that shall mean it where none is given. writes: the files in words.
    """

    name: str
    config: type
    learner: Callable[[StableDiffusion, Any], StableDiffusion]
    result: Callable[[SubjectRecipe, StableDiffusion, Any], Any]
    save: Callable[[Any, StableDiffusion, Path, Any], None]
    apply: Callable[[StableDiffusion, Any, Path, Any], StableDiffusion]
    writes: str
    phrase: Callable[[SubjectConfig], str] = lambda subject: subject.phrase
    token: str | None = "sks"

    @property
    def command(self) -> str:
        """What is typed after `minisd train`."""
        return self.name.replace(" ", "-")

    def train(
        self,
        sd: StableDiffusion,
        photos: Photos,
        folder: str | os.PathLike,
        config: Any,
        run: TrainingRun = RUN,
        group: Processes = ALONE,
        *,
        class_photos: Photos | None = None,
        class_folder: str | os.PathLike | None = None,
        scorer: Scorer | None = None,
    ) -> Any:
        """Learn the subject of the photos; the result, which is also saved in the folder. sd stays as it is.

        class_photos: real ones for the prior; left out, sd draws them into class_folder (folder/class), where other
        runs with the same model and class find them again. scorer: of the validation images on the way.
        """
        folder = Path(folder)
        prior = getattr(config, "prior", None)
        if class_photos is None and prior is not None:
            samples = Path(class_folder or folder / "class")
            class_photos = class_samples(sd, samples, config.subject.class_word, prior, group, quiet=run.quiet)
        recipe = self.recipe(sd, photos, folder, config, class_photos=class_photos, scorer=scorer)
        learn(recipe, config, sd, photos, run, group)
        result = self.result(recipe, sd, config)
        if group.is_first:
            self.save(result, sd, folder, config)
        return result

    def recipe(
        self,
        sd: StableDiffusion,
        photos: Photos,
        folder: Path,
        config: Any,
        *,
        class_photos: Photos | None = None,
        scorer: Scorer | None = None,
    ) -> SubjectRecipe:
        """What the loop trains."""
        prior = getattr(config, "prior", None)
        if class_photos is not None and prior is None:
            raise ValueError(f"{self.name} has no prior preservation: leave the class photos out")
        return SubjectRecipe(
            self.name,
            self.learner(sd, config),
            config.subject,
            photos,
            folder,
            phrase=self.phrase(config.subject),
            precision=config.loop.precision,
            class_photos=class_photos,
            prior_weight=1.0 if prior is None else prior.weight,
            scorer=scorer,
        )


def learn(
    recipe: SubjectRecipe, config: Any, base: StableDiffusion, photos: Photos, run: TrainingRun, group: Processes
) -> None:
    """Train a recipe to its end; its networks are then frozen and hold the weights that the method's file is made of.

    config: the method's. base: the model as it was given.
    """
    if base.device.type != group.device.type:
        raise ValueError(f"the model is on {base.device}, the training runs on {group.device}: load it there")
    # where memory is saved changes nothing
    same = replace(config, subject=replace(config.subject, gradient_checkpointing=False))
    settings = {
        "method": recipe.name,
        "recipe": asdict(same),
        "photos": photos.digest,
        "class": recipe.class_digest,
        "base": [network_digest(network) for network in (base.unet, base.text_encoder, base.vae)],
    }
    train(recipe, config.loop, recipe.folder, run, group, settings)
    group.wait()
    recipe.validator.take_best()
    recipe.networks.requires_grad_(False)
