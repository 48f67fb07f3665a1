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
from minisd.config import Settings

if TYPE_CHECKING:
    from minisd.eval.drawings import Drawings
    from minisd.eval.mini import Sets
    from minisd.pipeline import StableDiffusion

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
    """Measure a model that was trained on the emoji: what it keeps, understands and draws, each beside its baseline.

    Args:
        data: the folder that scripts/build_emoji.py made.
        out: a folder for eval.json, eval.md, a sheet of 48 fixed prompts, one of 20 objects for a person to name, and
            one of these beside the training drawings that they are most like.
        seed: of the first picture of every set that is drawn.
        concepts: how many are drawn and looked for among the training drawings.
        pictures: how many are drawn for the Fréchet distance.
        steps: how many times the model is asked for each picture.
        sampler: as for txt2img.
        guidance_scale: how much the prompt counts.
        batch_size: pictures per call of the network.
        overwrite: replace these files.
    """
    settings = Settings(steps=steps, sampler=sampler, guidance_scale=guidance_scale, batch_size=batch_size)
    for name in FILES:
        check_target(out / name, overwrite=overwrite)
    if not (data / "images.npy").is_file():
        raise ValueError(f"{data} is no data set of scripts/build_emoji.py (it has no images.npy): give --data FOLDER")
    from minisd.eval import mini, report
    from minisd.eval.features import CLIPFeatures
    from minisd.pipeline import mini_model
    from minisd.provenance.files import fingerprint, sha256, write_whole

    began, plan = time.monotonic(), mini.Plan(seed, concepts, pictures)
    sd = model.load_whole()
    checkpoint = model.checkpoint or mini_model()
    digest = fingerprint(checkpoint) if checkpoint.is_dir() else sha256(checkpoint)
    space = CLIPFeatures.of(sd).name
    size = sd.config.image_size
    sets = data_sets(data, size)
    rows = mini.measure(sd, sets, plan, settings)
    sheets = draw_sheets(sd, sets.train, seed, settings)

    result = {
        "model": sd.config.name,
        "checkpoint": {"file": checkpoint.name, "digest": digest, **_loaded(model)},
        "data": {"digest": sha256(data / "data.json"), **{name: len(some) for name, some in sets}},
        "feature_space": space,
        "settings": asdict(settings),
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
    from minisd.provenance.files import sha256

    names = ("weights", "prediction", "vae", "dtype", "device")
    usual, given = asdict(Model()), {name: getattr(model, name) for name in names}
    files = [(f"{path.name} ({weight:g})", path) for path, weight in model.loras()]
    files += [(path.name, path) for path, _ in model.embeddings()]
    return {name: str(value) for name, value in given.items() if value != usual[name]} | {
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
    sd: StableDiffusion, train: Drawings, seed: int, settings: Settings
) -> dict[str, Callable[[BinaryIO], None]]:
    """How to write the sheet of prompts, that of nameless objects, its key, and their nearest, by file name."""
    from minisd.eval.mini import draw, nearest
    from minisd.eval.sheets import COMMON, PROMPTS, captioned, shuffled
    from minisd.tasks.images import to_pil

    prompts = captioned(to_pil(draw(sd, PROMPTS, seed, settings, progress="sheet of prompts")), PROMPTS, columns=8)
    hidden = shuffled(COMMON, seed)
    numbers = [str(i + 1) for i in range(len(hidden))]
    images = draw(sd, hidden, seed, settings, progress="objects to name")
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
