"""DreamBooth, Textual Inversion and LoRA on the same subjects: who is like them, heeds prompts, forgets nothing.

Every subject has a folder with views in train/ and others in test/; masks/train/ and masks/test/ say what of a view is
the subject; other/ holds other vendors' drawings of the same thing. Between a floor, the untouched model with the class
word, and a ceiling, real views judged as if they had been drawn, stands each method. What is finished is only read.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from minisd.checkpoints.digests import network_digest
from minisd.eval.sheets import captioned
from minisd.files import write_whole
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.captions import with_article
from minisd.training.options import Run
from minisd.training.parallel import Processes
from minisd.training.subject.dreambooth import DreamBoothConfig, train_dreambooth
from minisd.training.subject.lora import LoRAConfig, train_lora
from minisd.training.subject.photos import Photos, load_photos
from minisd.training.subject.prior import PriorConfig
from minisd.training.subject.recipe import SubjectConfig, Validation, with_networks
from minisd.training.subject.small import for_small_model
from minisd.training.subject.textual_inversion import TextualInversionConfig, train_textual_inversion
from minisd.training.weights import copied

if TYPE_CHECKING:
    from minisd.eval.subject import SubjectJudge

FLOOR, CEILING, NO_PRIOR = "untouched model", "real views", "dreambooth without prior"
OTHERS, TRANSFER = "other vendors' drawings", "CLIP-I to others"
SECONDS = "seconds"
TOKEN = "sks"
Config = DreamBoothConfig | LoRAConfig | TextualInversionConfig


@dataclass(frozen=True)
class Method:
    """A recipe and its config for a subject of this class word."""

    name: str
    config: Callable[[str], Config]


@dataclass(frozen=True)
class Comparison:
    """What is compared, and on what.

    Attributes:
        prompts: {} is the subject, or the class.
        seeds: pictures of each prompt.
        class_pictures: of the class alone, for PRES.
        views: training views of a subject, the first ones.
        settings: how all of these are drawn.
        precision: of the trainings.
        class_prior: pictures of the class for prior preservation.
        train_steps: of every training, in place of those planned.
    """

    prompts: tuple[str, ...] = ("{}", "{}, flat style", "a blue {}", "{} with a hat", "{} on a green field", "two {}")
    seeds: int = 4
    class_pictures: int = 16
    views: int = 4
    settings: Txt2Img = field(default_factory=lambda: Txt2Img(steps=25, guidance_scale=5.0, batch_size=8))
    precision: Literal["float32", "bfloat16"] = "float32"
    class_prior: int = 64
    train_steps: int | None = None

    def __post_init__(self):
        if self.train_steps is not None and self.train_steps < 1:
            raise ValueError(f"train_steps is {self.train_steps}: give 1 or more")

    def methods(self) -> tuple[Method, ...]:
        """The rows, by the plans for a small model. Steps and rates were chosen on the duck and the alarm clock."""
        prior = PriorConfig(count=self.class_prior, prompt="{}", settings=self.settings)
        quiet = Validation(prompts=("{}",), seeds=1, steps=2, guidance_scale=1.0, best=False)

        def planned(method: type, class_word: str, token: str = TOKEN, **more) -> Config:
            config = for_small_model(method(SubjectConfig(token, class_word)))
            subject = replace(config.subject, prompts=("{}", "a {}"), validation=quiet)
            steps = self.train_steps or config.loop.steps
            return replace(
                config, subject=subject, loop=replace(config.loop, steps=steps, precision=self.precision), **more
            )

        return (
            Method("textual inversion", lambda word: planned(TextualInversionConfig, word, "<subject>")),
            Method("lora", lambda word: planned(LoRAConfig, word, prior=prior)),
            Method("dreambooth", lambda word: planned(DreamBoothConfig, word, prior=prior)),
            Method(NO_PRIOR, lambda word: planned(DreamBoothConfig, word, prior=replace(prior, weight=0.0))),
        )


Scores = Mapping[str, float]


def compare(
    sd: StableDiffusion,
    folder: Path,
    class_word: str,
    out: Path,
    plan: Comparison,
    judge_by: Callable[[list[Image.Image]], SubjectJudge],
    run: Run,
) -> dict[str, Scores]:
    """Row → scores of one subject, floor and ceiling first. Each row keeps its scores and pictures in a folder of out.

    Among the scores are the SECONDS that a row took (one that was stopped: since it went on; the first row with a prior
    also draws the class). A later call that only reads them gives the same.

    judge_by: makes a judge from real pictures: `SubjectJudge` with its feature spaces. CLIP-I, DINO and PRES are taken
    against the test views; "CLIP-I to others" against the other vendors' drawings, which tells whether the thing was
    learnt, or one drawing of it. Views with masks are cut out, over white, to learn from and to judge by: of four views
    on four grounds a small model learns the grounds first.
    """
    named, photos = with_article(class_word), {}
    if (folder / "masks" / "train").is_dir() != (folder / "masks" / "test").is_dir():
        raise ValueError(
            f"{folder / 'masks'} has masks of train/ or of test/: give both or none, to judge what is learnt"
        )
    for part in ("train", "test", *(["other"] if (folder / "other").is_dir() else [])):
        masks = folder / "masks" / part
        whole = load_photos(folder / part, sd.config.image_size, masks=masks if masks.is_dir() else None)
        photos[part] = cut_out(whole.first(plan.views) if part == "train" else whole)
    real, test = images_of(photos["train"]), images_of(photos["test"])
    others = images_of(photos["other"]) if "other" in photos else []
    judge, judge_of_others = judge_by(test), judge_by(others) if others else None
    files = {part: of_part.digest for part, of_part in photos.items()}
    models = [network_digest(network) for network in (sd.unet, sd.text_encoder, sd.vae)]

    def row(name: str, config: object, draw: Callable[[Path], tuple[list, list, list]]) -> Scores:
        place = place_of(out, name)
        known = {"models": models, "judge": judge.spaces, "class": class_word, "files": files}
        made = {"plan": asdict(plan), "config": config, **known}
        digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:16]
        if (finished := _read(place / "scores.json", digest)) is not None:
            return finished
        began, work = time.monotonic(), place / f"training-{digest}"
        images, prompts, of_class = draw(work)
        scores = judge.scores(images, prompts, **({"class_images": of_class} if of_class else {}))
        if judge_of_others is not None and name != OTHERS:
            scores[TRANSFER] = judge_of_others.each(images, prompts)["CLIP-I"].mean().item()
        sheet = captioned(images, prompts, columns=plan.seeds)
        write_whole(place / "pictures.png", lambda file: sheet.save(file, "PNG"))
        write_whole(place / "first.png", lambda file: images[0].save(file, "PNG"))
        scores[SECONDS] = time.monotonic() - began
        text = json.dumps({"digest": digest, "scores": scores}, indent=1) + "\n"
        write_whole(place / "scores.json", lambda file: file.write(text.encode()))  # last: then the row is whole
        for heavy in ("state.safetensors", "model.safetensors", "class.safetensors"):
            (work / heavy).unlink(missing_ok=True)
        return scores

    def drawn(model: StableDiffusion, phrase: str) -> tuple[list, list, list]:
        prompts = [prompt.replace("{}", phrase) for prompt in plan.prompts]
        shown = [prompt.replace("{}", class_word) for prompt in plan.prompts for _ in range(plan.seeds)]
        images = model.txt2img(prompts, **vars(replace(plan.settings, num_images=plan.seeds)))
        of_class = model.txt2img(named, **vars(replace(plan.settings, num_images=plan.class_pictures, seed=1000)))
        return images, shown, of_class

    def learnt(config) -> Callable[[Path], tuple[list, list, list]]:
        def draw(work: Path) -> tuple[list, list, list]:
            seen = photos["train"]
            if isinstance(config, TextualInversionConfig):
                vectors = train_textual_inversion(sd, seen, work, config, run, group)
                model = _copy(sd)
                model.add_embedding(config.subject.token, vectors)
                found = drawn(model, config.subject.token)
            elif isinstance(config, LoRAConfig):
                train_lora(sd, seen, work, config, run, group, class_folder=out.parent / "class")
                model = _copy(sd)
                model.load_lora(work / "lora.safetensors")
                found = drawn(model, config.subject.phrase)
            else:
                model = train_dreambooth(sd, seen, work, config, run, group, class_folder=out.parent / "class")
                found = drawn(model, config.subject.phrase)
            return found

        return draw

    group = Processes(device=sd.device)
    rows = {FLOOR: row(FLOOR, None, lambda work: drawn(sd, class_word))}
    for name, shown in ((CEILING, real), (OTHERS, others)):
        if shown:
            rows[name] = row(name, None, lambda work, shown=shown: (shown, [class_word] * len(shown), []))
    for method in plan.methods():
        config = method.config(class_word)
        rows[method.name] = row(method.name, asdict(config), learnt(config))
    return rows


def cut_out(photos: Photos) -> Photos:
    """The photos, white where their masks leave something out."""
    if photos.masks is None:
        return photos
    pixels = np.where(photos.masks[..., None], photos.pixels, 255).astype(np.uint8)
    return replace(photos, pixels=pixels, masks=None, digest=f"{photos.digest}, cut out")


def images_of(photos: Photos) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in photos.pixels[:, 0]]


def place_of(out: Path, row: str) -> Path:
    return out / re.sub(r"[^a-z]+", "-", row)


def _copy(sd: StableDiffusion) -> StableDiffusion:
    """A model with a text encoder and a U-Net of its own, to which words and LoRAs can be added."""
    return with_networks(sd, unet=copied(sd.unet, learn=False), text=copied(sd.text_encoder, learn=False))


def _read(path: Path, digest: str) -> Scores | None:
    """The scores of a finished row, if it was made in this way."""
    if not path.exists():
        return None
    said = json.loads(path.read_text(encoding="utf-8"))
    return said["scores"] if said["digest"] == digest else None
