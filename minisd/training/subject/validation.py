"""What is seen of a subject while it is learnt: sheets of the validation prompts, their scores, the best weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import nn

from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.files import write_whole
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks.images import grid
from minisd.training.progress import draw_curves, read_log
from minisd.training.state import learnt_weights, take_weights
from minisd.training.subject.config import SubjectConfig, filled

BEST = "best.safetensors"
WORK_FILES = ("state.safetensors", "photos.safetensors", "class.safetensors", BEST)  # beside the results, no results
SEED = 0  # of the validation images, the same at every sheet


class Scorer(Protocol):
    """Numbers by name from images and their prompts: `eval.subject.SubjectScorer.scores`, or one's own.

    CLIP-I (or DINO) and CLIP-T choose the best weights, see `best_step`.
    """

    def __call__(
        self, images: list[Image.Image], prompts: list[str], *, class_images: list[Image.Image]
    ) -> dict[str, float]: ...


class Validator:
    """Draws and scores the validation prompts. networks: those whose best weights are kept in the folder."""

    def __init__(
        self,
        sd: StableDiffusion,
        networks: nn.ModuleDict,
        config: SubjectConfig,
        folder: Path,
        *,
        phrase: str,
        autocast: bool,
        scorer: Scorer | None,
    ):
        self.sd, self.networks, self.config, self.folder = sd, networks, config, folder
        self.phrase, self.autocast, self.scorer = phrase, autocast, scorer

    @torch.no_grad()
    def sheet(self, step: int) -> Image.Image:
        """The validation prompts, a row each, drawn by the code that draws every picture, and scored."""
        validation = self.config.validation
        images = self._samples(self.phrase)
        if self.scorer is not None:
            # to the scorer the token says nothing: the class word stands in its place
            prompts = [filled(p, self.config.class_word) for p in validation.prompts for _ in range(validation.seeds)]
            self._keep(step, self.scorer(images, prompts, class_images=self._samples(self.config.class_word)))
        return grid(images, columns=validation.seeds)

    def take_best(self) -> None:
        """Go back to the weights of the best scores, if there were any."""
        if self.config.validation.best and (self.folder / BEST).exists():
            file = open_tensors(self.folder / BEST)
            take_weights(self.networks, {name: file.read(name) for name in file}, self.folder / BEST)

    def _samples(self, phrase: str) -> list[Image.Image]:
        validation = self.config.validation
        prompts = [filled(prompt, phrase) for prompt in validation.prompts]
        with torch.autocast(self.sd.device.type, torch.bfloat16, enabled=self.autocast):
            return self.sd.txt2img(
                prompts,
                num_images=validation.seeds,
                seed=SEED,
                steps=validation.steps,
                guidance_scale=validation.guidance_scale,
                batch_size=validation.seeds,
            )

    def _keep(self, step: int, scores: dict[str, float]) -> None:
        """One more point of the curves in scores.jsonl and scores.png; the weights of the best one are kept."""
        path = self.folder / "scores.jsonl"
        before = [line for line in read_log(path) if line["step"] < step]  # a resumed training comes here again
        lines = [*before, {"step": step, **scores}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_whole(path, lambda file: file.write(text.encode()))
        draw_curves(lines, self.folder / "scores.png")
        if self.config.validation.best and best_step(lines) == step:
            save_safetensors(self.folder / BEST, learnt_weights(self.networks), {"step": str(step)})


def best_step(lines: Sequence[Mapping[str, float]]) -> int:
    """The step whose geometric mean of fidelity (DINO, else CLIP-I) and prompt-following (CLIP-T) is highest.

    Either alone is best at one end of a training: when nothing is learnt yet, and when nothing else is left. The scale
    of a score is without effect on the order of geometric means.
    """

    def merit(line: Mapping[str, float]) -> float:
        return max(line.get("DINO", line["CLIP-I"]), 0) * max(line["CLIP-T"], 0)

    return max(lines, key=merit)["step"]
