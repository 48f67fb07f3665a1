"""How good a model is that was trained on the drawings: what it keeps, what it understands, what it draws.

Every measure stands beside its baselines, which the same code takes. `measure` runs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from minisd.config import VAEConfig
from minisd.diffusion.samplers import get_sampler
from minisd.eval.drawings import Drawings, evenly
from minisd.eval.features import CLIPFeatures, cosine, in_range
from minisd.eval.frechet import frechet_distance
from minisd.eval.intervals import Interval, bootstrap
from minisd.eval.reconstruction import psnr, quantized, ssim
from minisd.eval.retrieval import chance, found, thumbnails
from minisd.models.latents import decode_latents, encode_image
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img

NEAREST = "right concept in the nearest 10"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    n: pictures. interval: absent where a value belongs to no single pictures. unit: "dB", "" or "%", of a share in
    [0, 1]. kind: a baseline is what measures of its name are to be compared with. asked: what the mini model is to
    reach, in that unit.
    """

    measure: str
    of: str
    value: float
    n: int
    interval: tuple[float, float] | None = None
    unit: Literal["dB", "%", ""] = ""
    kind: Literal["measure", "baseline"] = "measure"
    asked: float | None = None

    @classmethod
    def mean(cls, measure: str, of: str, values: Tensor, **more) -> Row:
        """The mean of one value for each picture, with its bootstrap interval."""
        found: Interval = bootstrap(values)
        return cls(measure, of, found.mean, found.n, (found.low, found.high), **more)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        seed: of the first picture of every set that is drawn; picture i of a set has the seed + i.
        concepts: how many concepts are drawn and looked for in the gallery.
        pictures: how many pictures are drawn for the Fréchet distance.
        reconstructions: how many pictures of a set go through the autoencoder, at most.
    """

    seed: int = 0
    concepts: int = 200
    pictures: int = 1000
    reconstructions: int = 300

    def __post_init__(self):
        for name in ("concepts", "pictures", "reconstructions"):
            if (value := getattr(self, name)) < 2:
                raise ValueError(f"{name} is {value}: two are the least that can be measured")


@dataclass(frozen=True)
class Sets:
    """The data set's splits: `train`, the concepts `held_out` of training in the same styles, and an `unseen` style."""

    train: Drawings
    held_out: Drawings
    unseen: Drawings

    def __iter__(self) -> Iterator[tuple[str, Drawings]]:
        yield "held-out concepts", self.held_out
        yield "training drawings", self.train
        yield f"{self.unseen.styles[0]}, an unseen vendor", self.unseen


def measure(sd: StableDiffusion, sets: Sets, plan: Plan, options: Txt2Img) -> list[Row]:
    """All measures in the order of the data, with bars on stderr. ValueError before the first for a model unfit."""
    clip = CLIPFeatures.of(sd)
    size = sd.config.image_size
    for name, drawings in sets:
        if tuple(drawings.images.shape[-2:]) != (size, size):
            height, width = drawings.images.shape[-2:]
            raise ValueError(f"the {name} have {height}×{width} pixels, {sd.config.name} draws {size}: make them equal")
    sd.check_task("eval mini", "text-to-image")
    get_sampler(options.sampler)
    rows = [*reconstruction(sd, sets, plan)]
    seen = [clip.images(drawings.images, progress=f"CLIP, {name}") for name, drawings in sets]
    return [
        *rows,
        *retrieval(clip, sets, seen),
        *generation(sd, sets, plan, options),
        *distances(sd, clip, sets, seen, plan, options),
    ]


# --------------------------------------------------------------------------------------------------------- autoencoder


def reconstruction(sd: StableDiffusion, sets: Sets, plan: Plan) -> Iterator[Row]:
    """PSNR and SSIM of pictures decoded from the means of their latents, in 8 bits.

    The baseline has as many numbers as the latents: the picture reduced to so many RGB values, and enlarged again.
    """
    side = equal_side(sd.config.vae, sd.config.image_size)
    for name, drawings in sets:
        images = in_range(drawings.spread(plan.reconstructions).images)
        batches = tqdm(images.split(16), desc=f"autoencoder, {name}", unit="batch")
        decoded = quantized(torch.cat([reconstructed(sd, batch).cpu() for batch in batches]))
        reduced = quantized(reduced_and_enlarged(images, side))
        is_asked = drawings is sets.held_out
        yield Row.mean("PSNR", name, psnr(decoded, images), unit="dB", asked=26.0 if is_asked else None)
        yield Row.mean("SSIM", name, ssim(decoded, images))
        if is_asked:
            baseline = f"{name}, reduced to {side} × {side} RGB and enlarged"
            yield Row.mean("PSNR", baseline, psnr(reduced, images), unit="dB", kind="baseline")
            yield Row.mean("SSIM", baseline, ssim(reduced, images), kind="baseline")


def reconstructed(sd: StableDiffusion, images: Tensor) -> Tensor:
    """Pictures 'b 3 h w' in [-1, 1] to the mean of their latents and back, not clamped."""
    return decode_latents(sd.vae, encode_image(sd.vae, images).mean)


def equal_side(vae: VAEConfig, size: int) -> int:
    """The side of a square RGB picture of about as many numbers as the latents of a picture of `size` have."""
    return round(math.sqrt(vae.latent_channels * (size // vae.factor) ** 2 / 3))


def reduced_and_enlarged(images: Tensor, side: int) -> Tensor:
    """Bicubic both ways, antialiased on the way down."""
    small = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic")


# ----------------------------------------------------------------------------------------------------------- retrieval


def retrieval(clip: CLIPFeatures, sets: Sets, seen: Sequence[Tensor]) -> Iterator[Row]:
    """Is a picture's own caption among the k nearest of one caption per concept.

    seen: the pictures' embeddings, in the order of `sets`. All captions are without a style ("a red apple"), and, where
    the model knows the style, all with that of the picture.
    """
    words = {c: text for _, drawings in sets for c, text in zip(drawings.concepts, drawings.words, strict=True)}
    texts = {"": clip.texts(list(words.values()), progress="captions")}
    for style in dict.fromkeys(sets.train.styles):
        styled = [f"{text}, {style} style" for text in words.values()]
        texts[style] = clip.texts(styled, progress=f"captions, {style} style")
    for (name, drawings), images in zip(sets, seen, strict=True):
        right = drawings.is_of(list(words)).T
        similarity = cosine(images, texts[""])
        for k in (1, 10):
            asked = 0.9 if k == 10 and drawings is sets.train else None
            yield Row.mean(f"image → text, top {k}", name, found(similarity, right, k), unit="%", asked=asked)
        if set(drawings.styles) <= texts.keys():
            for style in set(drawings.styles):
                rows = [i for i, other in enumerate(drawings.styles) if other == style]
                similarity[rows] = cosine(images[rows], texts[style])
            hits = found(similarity, right, 10)
            yield Row.mean("image → text, top 10", f"{name}, captions with their style", hits, unit="%")
    for k in (1, 10):
        of = f"chance among {len(words)}"
        yield Row(f"image → text, top {k}", of, chance(k, 1, len(words)), 0, unit="%", kind="baseline")


# ---------------------------------------------------------------------------------------------------------- generation


def generation(sd: StableDiffusion, sets: Sets, plan: Plan, options: Txt2Img) -> Iterator[Row]:
    """Is the right concept among a drawn picture's 10 nearest in the gallery of all training drawings.

    Nearest by `thumbnails`, which no network has a part in. Evenly spaced concepts, the styles in turn; the same
    concepts again with prompts that name no style. What the judge is worth: the hits of the unseen vendor's drawings in
    the same gallery, of one vendor's among another's, and of one style's among a sister style's, where only the
    rendering differs.
    """
    train = sets.train
    gallery = thumbnails(in_range(train.images))
    styles = list(dict.fromkeys(train.styles))
    concepts = [list(dict.fromkeys(train.concepts))[i] for i in evenly(len(set(train.concepts)), plan.concepts)]
    words = dict(zip(train.concepts, train.words, strict=True))
    for styled in (True, False):
        named = [f", {styles[i % len(styles)]} style" if styled else "" for i in range(len(concepts))]
        prompts = [words[concept] + style for concept, style in zip(concepts, named, strict=True)]
        images = draw(sd, prompts, plan.seed, options, progress="judged pictures")
        hits = found(thumbnails(in_range(images)) @ gallery.T, train.is_of(concepts), 10)
        of = f"drawn by prompts {'with' if styled else 'without'} a style, among {len(train)} training drawings"
        yield Row.mean(NEAREST, of, hits, unit="%", asked=0.8 if styled else None)
    of = f"{sets.unseen.styles[0]} drawings among {len(train)} training drawings"
    yield Row.mean(NEAREST, of, judged(sets.unseen, train), unit="%", kind="baseline")
    for a, b in pairwise(styles):
        hits = judged(train.of_style(a), train.of_style(b))
        yield Row.mean(NEAREST, f"{a} drawings among {b} ones", hits, unit="%", kind="baseline")
    right = train.is_of(concepts).sum(1)
    blind = sum(chance(10, int(n), len(train)) for n in right) / len(right)
    yield Row(NEAREST, f"chance among {len(train)}", blind, 0, unit="%", kind="baseline")


def judged(queries: Drawings, gallery: Drawings, k: int = 10) -> Tensor:
    """Whether the right concept is among the k nearest, of every query whose concept the gallery has."""
    queries = queries.subset([i for i, concept in enumerate(queries.concepts) if concept in set(gallery.concepts)])
    similarity = thumbnails(in_range(queries.images)) @ thumbnails(in_range(gallery.images)).T
    return found(similarity, gallery.is_of(queries.concepts), k)


def distances(
    sd: StableDiffusion, clip: CLIPFeatures, sets: Sets, seen: Sequence[Tensor], plan: Plan, options: Txt2Img
) -> Iterator[Row]:
    """Fréchet distances in the space of `clip`, between sets of equal size and a whole reference.

    seen: the pictures' embeddings, in the order of `sets`. Drawn by the captions, with style, of evenly spaced training
    drawings. Of as many real drawings, chosen at random, the distance to the others is what chance alone brings.
    """
    _, train, unseen = seen
    n = min(plan.pictures, len(train) // 2, len(unseen))
    captions = sets.train.subset(evenly(len(train), n)).captions()
    images = draw(sd, captions, plan.seed, options, progress="pictures for the distance")
    drawn = clip.images(images, progress="CLIP, drawn pictures")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(plan.seed))
    real, rest, other = train[order[:n]], train[order[n:]], unseen[evenly(len(unseen), n)]
    vendor = sets.unseen.styles[0]
    for a, of_a, b, of_b in (
        (drawn, "drawn", train, f"the {len(train)} training drawings"),
        (real, "training drawings", rest, f"the {len(rest)} others"),
        (other, vendor, train, f"the {len(train)} training drawings"),
        (drawn, "drawn", unseen, f"the {len(unseen)} of {vendor}"),
        (real, "training drawings", unseen, f"the {len(unseen)} of {vendor}"),
    ):
        kind = "measure" if a is drawn else "baseline"
        yield Row("Fréchet distance", f"{of_a} → {of_b}", frechet_distance(a, b), n, kind=kind)


def draw(
    sd: StableDiffusion, prompts: Sequence[str], seed: int, options: Txt2Img, *, progress: str = "pictures"
) -> Tensor:
    """A picture of each prompt, uint8 'n 3 h w'; that of prompt i has the seed `seed + i`."""
    images: list[Image] = []
    with tqdm(total=len(prompts), desc=progress, unit="picture") as bar:
        for sampling in replace(options, seed=seed).samplings(sd, list(prompts)):
            images += sampling.images()
            bar.update(len(images) - bar.n)
    return torch.stack([rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w") for image in images])
