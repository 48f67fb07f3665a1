"""The subject in words, and what is drawn of it while it is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from minisd.training.subject.photos import Views


@dataclass(frozen=True)
class Validation:
    """What is drawn, and scored where scores are given, while a subject is learnt. Nothing here changes a step.

    Attributes:
        prompts: {} is the subject.
        seeds: images per prompt, always of the same seeds.
        steps: sampling steps.
        guidance_scale: classifier-free guidance (CFG) scale.
        best: keep the weights of the best scores instead of the last ones.
    """

    prompts: tuple[str, ...] = ("a {}", "a {} in the snow", "a red {}", "a drawing of a {}")
    seeds: int = 2
    steps: int = 25
    guidance_scale: float = 7.5
    best: bool = True

    def __post_init__(self):
        if not self.prompts or self.seeds < 1 or self.steps < 1:
            raise ValueError(
                f"validation: {len(self.prompts)} prompts, {self.seeds} seeds, {self.steps} steps: 1 of each at least "
                "(--sample-every 0 draws at the end alone)"
            )


@dataclass(frozen=True)
class SubjectConfig:
    """The subject in words, and what its photos are to the loss.

    Attributes:
        token: instance token: a rare word of CLIP's, or a new word for Textual Inversion.
        class_word: class of the subject, such as dog.
        prompts: prompt templates of the photos, {} is the subject. A photo's captions are added to each; those that
            name the token, or hold {} themselves, replace the templates.
        views: cropping and flipping.
        background: loss weight outside masks, 1 inside; for photos with masks.
        min_snr: γ of min-SNR loss weighting (the paper's is 5); null weighs all times alike.
        gradient_checkpointing: a third more computation, much less memory; results are the same.
        validation: sample images on the way.
    """

    token: str
    class_word: str
    prompts: tuple[str, ...] = ("a {}",)
    views: Views = field(default_factory=Views)
    background: float = 0.0
    min_snr: float | None = None
    gradient_checkpointing: bool = False
    validation: Validation = field(default_factory=Validation)

    def __post_init__(self):
        if not self.token.strip() or not self.class_word.strip():
            raise ValueError(f"token {self.token!r}, class {self.class_word!r}: give a word for each")
        for prompt in (*self.prompts, *self.validation.prompts):
            if prompt.count("{}") != 1:
                raise ValueError(f"the prompt {prompt!r} needs one {{}}, where the subject stands")
        if not self.prompts:
            raise ValueError('there is no prompt to show the photos with: give one, such as "a {}"')
        if not 0 <= self.background <= 1:
            raise ValueError(f"background {self.background} is a weight in [0, 1]")

    @property
    def phrase(self) -> str:
        """What DreamBooth calls the subject: a sks dog is a dog, only this one."""
        return f"{self.token} {self.class_word}"


def filled(prompt: str, phrase: str) -> str:
    """The prompt with the phrase where {} stands."""
    return prompt.replace("{}", phrase)


def prompts_of(captions: Sequence[str], prompts: Sequence[str], phrase: str, token: str) -> list[str]:
    """What is said of a photo: the prompts; with captions, each caption after each prompt.

    A caption that names the token, or holds {} for the subject, is taken as it is.
    """
    if not captions:
        return [filled(prompt, phrase) for prompt in prompts]
    whole = [filled(caption, phrase) for caption in captions]
    return [
        text
        for caption in whole
        for text in ([caption] if names(caption, token) else [f"{filled(p, phrase)}, {caption}" for p in prompts])
    ]


def names(caption: str, token: str) -> bool:
    """Whether the token stands in a caption as a word of its own; "asks" does not name "sks"."""
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", caption, re.IGNORECASE) is not None
