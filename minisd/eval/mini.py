"""How good a model is that was trained on the drawings: what it keeps, what it understands, what it draws.

Every measure stands beside its baselines, which the same code takes. `measure` runs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from minisd.eval.compositions import (
    HUE_NEAR,
    GroundJudge,
    colour_prompts,
    ground_prompts,
    has_hue,
    is_of_thing,
    on_grounds,
    shapes,
)
from minisd.eval.drawings import Drawings, evenly
from minisd.eval.features import CLIPFeatures, cosine, in_range
from minisd.eval.frechet import frechet_distance
from minisd.eval.intervals import Interval, bootstrap
from minisd.eval.reconstruction import psnr, quantized, ssim
from minisd.eval.retrieval import chance, found, thumbnails
from minisd.models.latents import decode_latents, encode_image
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.colours import PAIRS

NEAREST = "right concept in the nearest 10"
HUE, SHAPE = "hue of an unseen pair", "shape of an unseen pair in the nearest 10"
GROUND, LIKENESS = "ground as asked", "likeness to the nearest training drawing"


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
    """The data set's splits: `train`, the concepts `held_out` of training in the same styles, and an `unseen` style.

    others: more of either, by the names that their rows shall have.
    """

    train: Drawings
    held_out: Drawings
    unseen: Drawings
    others: Mapping[str, Drawings] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, Drawings]]:
        yield "held-out concepts", self.held_out
        yield "training drawings", self.train
        yield f"{self.unseen.styles[0]}, an unseen vendor", self.unseen
        yield from self.others.items()


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
    judged_ones = judged_pictures(sd, sets, plan, options)
    return [
        *rows,
        *retrieval(clip, sets, seen),
        *generation(sets, judged_ones),
        *memory(sets, judged_ones),
        *colours(sd, sets, plan, options),
        *grounds(sd, sets, plan, options),
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
        yield Row.mean("PSNR", name, psnr(decoded, images), unit="dB", asked=29.0 if is_asked else None)
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
            asked = {id(sets.train): 0.95, id(sets.unseen): 0.55}.get(id(drawings)) if k == 10 else None
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


@dataclass(frozen=True, eq=False)
class Judged:
    """What was drawn of evenly spaced concepts, by prompts with a style and without: uint8 'n 3 h w' each."""

    concepts: list[str]
    with_style: Tensor
    without_style: Tensor


def judged_pictures(sd: StableDiffusion, sets: Sets, plan: Plan, options: Txt2Img) -> Judged:
    """The styles in turn; the same concepts and seeds again by prompts that name no style."""
    train = sets.train
    styles = list(dict.fromkeys(train.styles))
    concepts = [list(dict.fromkeys(train.concepts))[i] for i in evenly(len(set(train.concepts)), plan.concepts)]
    words = dict(zip(train.concepts, train.words, strict=True))
    prompts = [words[concept] for concept in concepts]
    styled = [f"{prompt}, {styles[i % len(styles)]} style" for i, prompt in enumerate(prompts)]
    images = (draw(sd, some, plan.seed, options, progress="judged pictures") for some in (styled, prompts))
    return Judged(concepts, *images)


def generation(sets: Sets, drawn: Judged) -> Iterator[Row]:
    """Is the right concept among a drawn picture's 10 nearest in the gallery of all training drawings.

    Nearest by `thumbnails`, which no network has a part in. What the judge is worth: the hits of the unseen vendor's
    drawings in the same gallery, of one vendor's among another's, and of one style's among a sister style's, where only
    the rendering differs.
    """
    train, concepts = sets.train, drawn.concepts
    gallery = thumbnails(in_range(train.images))
    styles = list(dict.fromkeys(train.styles))
    for images, prompts in ((drawn.with_style, "with"), (drawn.without_style, "without")):
        hits = found(thumbnails(in_range(images)) @ gallery.T, train.is_of(concepts), 10)
        of = f"drawn by prompts {prompts} a style, among {len(train)} training drawings"
        yield Row.mean(NEAREST, of, hits, unit="%", asked=0.97 if prompts == "with" else None)
    of = f"{sets.unseen.styles[0]} drawings among {len(train)} training drawings"
    yield Row.mean(NEAREST, of, judged(sets.unseen, train), unit="%", kind="baseline")
    for a, b in pairwise(styles):
        hits = judged(train.of_style(a), train.of_style(b))
        yield Row.mean(NEAREST, f"{a} drawings among {b} ones", hits, unit="%", kind="baseline")
    right = train.is_of(concepts).sum(1)
    blind = sum(chance(10, int(n), len(train)) for n in right) / len(right)
    yield Row(NEAREST, f"chance among {len(train)}", blind, 0, unit="%", kind="baseline")


def memory(sets: Sets, drawn: Judged) -> Iterator[Row]:
    """How like a drawn picture is to the training drawing that it is most like: cosine of `thumbnails`.

    A copy's is about 1. The baselines: the unseen vendor's drawings of the same concepts, which nobody copied from
    these; and each training drawing of one style against those of all other vendors' styles.
    """
    gallery = thumbnails(in_range(sets.train.images))

    def likeness(images: Tensor) -> Tensor:
        return (thumbnails(in_range(images)) @ gallery.T).amax(1).double()

    yield Row.mean(LIKENESS, "drawn by prompts with a style", likeness(drawn.with_style))
    yield Row.mean(LIKENESS, "drawn by prompts without a style", likeness(drawn.without_style))
    same = [i for i, concept in enumerate(sets.unseen.concepts) if concept in set(drawn.concepts)]
    of = f"{sets.unseen.styles[0]} drawings of the same concepts"
    yield Row.mean(LIKENESS, of, likeness(sets.unseen.images[same]), kind="baseline")
    own = sets.train.styles[0]
    rest = sets.train.subset([i for i, style in enumerate(sets.train.styles) if style != own])
    near = thumbnails(in_range(sets.train.of_style(own).images)) @ thumbnails(in_range(rest.images)).T
    yield Row.mean(LIKENESS, f"{own} drawings, among the other styles'", near.amax(1).double(), kind="baseline")


def nearest(images: Tensor, train: Drawings) -> list[int]:
    """The training drawing that each picture is most like, by `thumbnails`."""
    return (thumbnails(in_range(images)) @ thumbnails(in_range(train.images)).T).argmax(1).tolist()


def colours(sd: StableDiffusion, sets: Sets, plan: Plan, options: Txt2Img) -> Iterator[Row]:
    """Things in colours that no training picture shows them in: has the foreground that hue, and the thing its shape.

    Shapes are compared grey and at one size (`compositions.shapes`), with those of all training drawings. What the
    judges are worth: the unseen vendor's drawings of the same things, and chance.
    """
    images = draw(sd, colour_prompts(), plan.seed, options, progress="unseen pairs of thing and colour")
    names = [colour for _, colour in PAIRS]
    yield Row.mean(HUE, "drawn", has_hue(images, names), unit="%", asked=0.8)
    yield Row(HUE, f"chance, a hue within {HUE_NEAR:g}° of another", HUE_NEAR / 180, 0, unit="%", kind="baseline")
    known = {
        thing: bool(hits.any()) for (thing, _), hits in zip(PAIRS, is_of_thing(sets.train, dict(PAIRS)), strict=True)
    }
    things = [thing for thing, _ in PAIRS if known[thing]]
    if not things:
        return
    gallery, right = shapes(sets.train.images), is_of_thing(sets.train, things)
    drawn = shapes(images[[known[thing] for thing, _ in PAIRS]])
    yield Row.mean(SHAPE, "drawn", found(drawn @ gallery.T, right, 10), unit="%", asked=0.5)
    real = is_of_thing(sets.unseen, things)
    rows = [i for i in range(len(things)) if real[i].any()]
    first = [int(real[i].nonzero()[0]) for i in rows]
    if first:
        hits = found(shapes(sets.unseen.images[first]) @ gallery.T, right[rows], 10)
        yield Row.mean(SHAPE, f"{sets.unseen.styles[0]} drawings of the same things", hits, unit="%", kind="baseline")
    blind = sum(chance(10, int(n), len(gallery)) for n in right.sum(1)) / len(right)
    yield Row(SHAPE, f"chance among {len(gallery)}", blind, 0, unit="%", kind="baseline")


def grounds(sd: StableDiffusion, sets: Sets, plan: Plan, options: Txt2Img) -> Iterator[Row]:
    """Things on grounds: is the ground in the corners the asked one, among all colours and textures and white."""
    prompts, names = zip(*ground_prompts(), strict=True)
    judge = GroundJudge(sd.config.image_size)
    images = draw(sd, prompts, plan.seed, options, progress="grounds")
    yield Row.mean(GROUND, "drawn", judge.hits(images, names), unit="%", asked=0.85)
    some = sets.unseen.spread(len(names)).images
    real = on_grounds(some, names[: len(some)])
    of = f"{sets.unseen.styles[0]} drawings put on the same grounds"
    yield Row.mean(GROUND, of, judge.hits(real, names[: len(some)]), unit="%", kind="baseline")
    yield Row(GROUND, f"chance among {len(judge.names)}", 1 / len(judge.names), 0, unit="%", kind="baseline")


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
    train, unseen = seen[1:3]
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
