"""Does it look like the subject, does it follow the prompt, is it more than one picture (Ruiz et al. 2023, DreamBooth).

Section 4.1 of the paper defines CLIP-I, CLIP-T and DINO, section 4.3 PRES and DIV. All are means of cosines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minisd.eval.features import CLIPFeatures, DINOFeatures, Images, cosine


class SubjectScorer:
    """Scores pictures that a model drew of a subject against real pictures of it.

    clip: `CLIPFeatures.of(sd)`, the model's own small one, or an official CLIP. real_images: of the subject, not those
    that it was trained on. dino: `DINOFeatures.load(file)`; without it DINO is missing from the scores, and PRES and
    DIV are measured in CLIP's space. `spaces` says for every score where it was measured.

    A scorer that was trained with the model is no neutral one, and a mini CLIP sees little: compare its scores with
    each other, and with the floor and the ceiling of the same table, never with a paper's.
    """

    def __init__(self, clip: CLIPFeatures, real_images: Images, dino: DINOFeatures | None = None):
        self.clip, self.dino = clip, dino
        self.best = dino or clip
        self._real_clip = clip.images(real_images)
        self._real_best = self._real_clip if dino is None else dino.images(real_images)

    @property
    def spaces(self) -> dict[str, str]:
        """Score → the feature space it is measured in."""
        names = {"CLIP-I": self.clip.name, "CLIP-T": self.clip.name}
        if self.dino is not None:
            names["DINO"] = self.dino.name
        return names | {"PRES": self.best.name, "DIV": self.best.name}

    def scores(
        self, images: Images, prompts: str | Sequence[str], *, class_images: Images | None = None
    ) -> dict[str, float]:
        """The means of `each`, and those scores that belong to no single picture.

        images: drawn by the model, of the subject. prompts: what each was asked to show, or one for all, with the
        class word in place of the rare token, which says nothing to CLIP. class_images: drawn by the same model of the
        class without the token ("a dog").

        PRES: mean cosine of class_images and real pictures of the subject, lower is better: where a model has
        forgotten its class, every dog is this dog. Only with class_images.
        DIV: mean of 1 - cosine over the pairs of pictures of one prompt, higher is more diverse. The paper takes
        LPIPS for the distance, whose weights we do not ship: ours stands beside other values of ours only. Only where
        a prompt has two pictures.
        """
        prompts = self._prompts(images, prompts)
        clip = self.clip.images(images)
        best = clip if self.dino is None else self.dino.images(images)
        scores = {name: values.mean().item() for name, values in self._each(clip, best, prompts).items()}
        if class_images is not None:
            scores["PRES"] = cosine(self.best.images(class_images), self._real_best).mean().item()
        if (diversity := diversity_of(best, prompts)) is not None:
            scores["DIV"] = diversity
        return scores

    def each(self, images: Images, prompts: str | Sequence[str]) -> dict[str, Tensor]:
        """Of every picture, 'b':

        CLIP-I: mean cosine to the real pictures, in CLIP's space. DINO: the same in DINO's, which unlike CLIP's was
        not trained to overlook the differences between subjects of one class.
        CLIP-T: cosine to its prompt, in CLIP's space (CLIPScore of Hessel et al. 2021 is 2.5 of it, cut at 0).
        """
        prompts = self._prompts(images, prompts)
        clip = self.clip.images(images)
        return self._each(clip, clip if self.dino is None else self.dino.images(images), prompts)

    def _each(self, clip: Tensor, best: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        words = list(dict.fromkeys(prompts))
        texts = self.clip.texts(words)[[words.index(prompt) for prompt in prompts]]
        scores = {"CLIP-I": cosine(clip, self._real_clip).mean(1)}
        if self.dino is not None:
            scores["DINO"] = cosine(best, self._real_best).mean(1)
        return scores | {"CLIP-T": torch.cosine_similarity(clip, texts)}

    @staticmethod
    def _prompts(images: Images, prompts: str | Sequence[str]) -> list[str]:
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts: give one for each, or one for all")
        return prompts


def diversity_of(features: Tensor, prompts: Sequence[str]) -> float | None:
    """Mean of 1 - cosine over all pairs of one prompt, then over prompts; None where no prompt has a pair."""
    distances = []
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, other in enumerate(prompts) if other == prompt]
        if len(rows) > 1:
            pairs = torch.triu_indices(len(rows), len(rows), offset=1)
            distances.append((1 - cosine(features[rows], features[rows])[pairs[0], pairs[1]]).mean())
    return torch.stack(distances).mean().item() if distances else None
