"""The commands that measure how good a model is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from minisd.cli.options import Model
from minisd.cli.output import check_target
from minisd.tasks import Txt2Img

if TYPE_CHECKING:
    from minisd.eval.drawings import Drawings
    from minisd.eval.mini import Sets
    from minisd.stable_diffusion import StableDiffusion

FILES = ("eval.json", "eval.md", "prompts.png", "name_these.png", "name_these.txt", "nearest.png")


def eval_mini(
    *,
    data: Path = Path("emoji"),
    out: Path = Path("evaluation"),
    seed: int = 0,
    concepts: int = 200,
    pictures: int = 1000,
    steps: int = 30,
    sampler: str = "ddim",
    guidance_scale: float = 7.5,
    batch_size: int = 16,
    overwrite: bool = False,
    model: Model = Model(),
) -> None:
    """Evaluate a model trained on the emoji: reconstruction, retrieval, samples, each beside its baseline.

    Args:
        data: data set folder made by scripts/build_emoji.py.
        out: output folder: eval.json, eval.md, a sheet of 48 fixed prompts, one of 20 objects for a person to name, and
            one of these beside the training images that they are most like.
        seed: random seed of the first image of every set.
        concepts: number of concepts to sample and to look up among the training images.
        pictures: number of samples for the Fréchet distance.
        steps: sampling steps.
        sampler: sampler, as for txt2img.
        guidance_scale: classifier-free guidance (CFG) scale; 1 disables guidance and halves the time.
        batch_size: images per batch; affects speed and memory, not results.
        overwrite: replace existing files.
    """
    options = Txt2Img(steps=steps, sampler=sampler, guidance_scale=guidance_scale, batch_size=batch_size)
    for name in FILES:
        check_target(out / name, overwrite=overwrite)
    if not (data / "images.npy").is_file():
        raise ValueError(f"{data} is no data set of scripts/build_emoji.py (it has no images.npy): give --data FOLDER")
    from minisd.eval import mini, report
    from minisd.eval.features import CLIPFeatures
    from minisd.files import fingerprint, sha256, write_whole
    from minisd.stable_diffusion import mini_model

    began, plan = time.monotonic(), mini.Plan(seed, concepts, pictures)
    sd = model.load_whole()
    checkpoint = model.checkpoint or mini_model()
    digest = fingerprint(checkpoint) if checkpoint.is_dir() else sha256(checkpoint)
    space = CLIPFeatures.of(sd).name
    size = sd.config.image_size
    sets = data_sets(data, size)
    rows = mini.measure(sd, sets, plan, options)
    sheets = draw_sheets(sd, sets.train, seed, options)

    result = {
        "model": sd.config.name,
        "checkpoint": {"file": checkpoint.name, "digest": digest, **_loaded(model)},
        "data": {"digest": sha256(data / "data.json"), **{name: len(some) for name, some in sets}},
        "feature_space": space,
        "settings": asdict(options),
        "plan": asdict(plan),
        **report.machine(sd.device),
        "seconds": round(time.monotonic() - began, 1),
        "rows": [asdict(row) for row in rows],
    }
    texts = {
        "eval.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "eval.md": report.page(result, rows),
    }
    writers: dict[str, Callable[[BinaryIO], None]] = {
        name: lambda file, text=text: file.write(text.encode()) for name, text in texts.items()
    }
    for name, write in (writers | sheets).items():
        write_whole(out / name, write)
    print(report.table(rows))
    print(*(out / name for name in FILES), sep="\n")


def _loaded(model: Model) -> dict[str, str]:
    """What was not left to the file itself."""
    from minisd.files import sha256

    names = ("weights", "prediction", "vae", "dtype", "device")
    usual, values = asdict(Model()), {name: getattr(model, name) for name in names}
    files = [(f"{path.name} ({weight:g})", path) for path, weight in model.loras()]
    files += [(path.name, path) for path, _ in model.embeddings()]
    return {name: str(value) for name, value in values.items() if value != usual[name]} | {
        f"with {name}": sha256(path) for name, path in files
    }


def data_sets(folder: Path, size: int) -> Sets:
    """All splits of the emoji: the unseen vendors each for itself, and held-out concepts for tests where there are."""
    from minisd.eval.mini import Sets
    from minisd.training.data import read_records

    unseen = drawings(folder, size, "unseen")
    first, *more = dict.fromkeys(unseen.styles)
    others = {f"{style}, an unseen vendor": unseen.of_style(style) for style in more}
    if any(record["split"] == "test" for record in read_records(folder)):
        others["held-out concepts, for tests"] = drawings(folder, size, "test")
    return Sets(drawings(folder, size, "train"), drawings(folder, size, "subject"), unseen.of_style(first), others)


def drawings(folder: Path, size: int, split: str) -> Drawings:
    """A split of the emoji as the measures want it: over white, the words of a drawing without its style."""
    import torch

    from minisd.eval.drawings import Drawings
    from minisd.tasks.images import to_uint8
    from minisd.training.data import load_pictures

    pictures = load_pictures(folder, size=size, split=split)
    images = torch.cat([to_uint8(pictures.images(rows)) for rows in torch.arange(len(pictures)).split(256)])
    named = [name.removesuffix(")").rpartition(" (") for name in pictures.names]  # "red-apple (noto)"
    concepts, styles = tuple(name[0] for name in named), tuple(name[2] for name in named)
    words = [texts[0].removesuffix(f", {style} style") for texts, style in zip(pictures.captions, styles, strict=True)]
    return Drawings(images, concepts, styles, tuple(words))


def draw_sheets(
    sd: StableDiffusion, train: Drawings, seed: int, options: Txt2Img
) -> dict[str, Callable[[BinaryIO], None]]:
    """How to write the sheet of prompts, that of nameless objects, its key, and their nearest, by file name."""
    from minisd.eval.mini import draw, nearest
    from minisd.eval.sheets import COMMON, PROMPTS, captioned, shuffled
    from minisd.tasks.images import to_pil

    prompts = captioned(to_pil(draw(sd, PROMPTS, seed, options, progress="sheet of prompts")), PROMPTS, columns=8)
    hidden = shuffled(COMMON, seed)
    numbers = [str(i + 1) for i in range(len(hidden))]
    images = draw(sd, hidden, seed, options, progress="objects to name")
    objects = captioned(to_pil(images), numbers, columns=5)
    key = "".join(f"{number}: {prompt}\n" for number, prompt in zip(numbers, hidden, strict=True))
    rows = nearest(images, train)
    pairs = [picture for i, row in enumerate(rows) for picture in (images[i], train.images[row])]
    names = [name for prompt, row in zip(hidden, rows, strict=True) for name in (prompt, train.captions()[row])]
    beside = captioned([one for picture in pairs for one in to_pil(picture[None])], names, columns=8)
    return {
        "prompts.png": lambda file: prompts.save(file, "PNG", optimize=True),
        "name_these.png": lambda file: objects.save(file, "PNG", optimize=True),
        "name_these.txt": lambda file: file.write(key.encode()),
        "nearest.png": lambda file: beside.save(file, "PNG", optimize=True),
    }
