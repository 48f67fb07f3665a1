"""How a picture was made, written into the picture: as A1111's `parameters` text, and as JSON that `replay` reads."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minisd import __version__
from minisd.config import Settings, from_dict

CHUNK = "minisd"


@dataclass(frozen=True)
class Call:
    """One call of a task, in plain values: enough to make it again.

    arguments: of the task, by name, but for pictures: inputs maps those to their {"name", "sha256"}. model: how the
    checkpoint was loaded. threads: of the CPU, on which the last bit of a picture may depend.
    """

    task: str
    arguments: dict
    settings: Settings
    model: dict
    inputs: dict = field(default_factory=dict)
    threads: int = 0
    version: str = __version__


def save_png(path: Path, image: Image.Image, call: Call, index: int, seed: int, prompt: str, negative: str) -> None:
    """Write image number `index` of a call, whole or not at all."""
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(call, image, seed, prompt, negative))
    info.add_itxt(CHUNK, json.dumps(asdict(call) | {"index": index, "seed": seed}, ensure_ascii=False))
    write_whole(path, lambda out: image.save(out, "PNG", pnginfo=info))


def parameters_text(call: Call, image: Image.Image, seed: int, prompt: str, negative: str) -> str:
    """The text that AUTOMATIC1111's web page writes into its PNGs and other programs read."""
    settings = call.settings
    values = {
        "Steps": settings.steps,
        "Sampler": settings.sampler,
        "CFG scale": settings.guidance_scale,
        "Seed": seed,
        "Size": f"{image.width}x{image.height}",
        "Model": Path(call.model.get("checkpoint") or "mini").stem,
    }
    if "strength" in call.arguments:
        values["Denoising strength"] = call.arguments["strength"]
    if settings.clip_skip is not None:
        values["Clip skip"] = settings.clip_skip + 1
    values["Version"] = f"minisd {call.version}"
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in values.items())])


def read_png(path: Path) -> tuple[Call, int]:
    """(call, index) of a picture that minisd made. ValueError where it carries none, or a damaged one."""
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(CHUNK)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    if text is None:
        raise ValueError(
            f"{path}: it does not say how it was made (no {CHUNK!r} chunk): was it made by minisd, and kept whole?"
        )
    try:
        values = json.loads(text)
        index = int(values.pop("index"))
        values.pop("seed", None)
        settings = values.pop("settings")
        if isinstance(settings.get("guidance_interval"), list):
            settings["guidance_interval"] = tuple(settings["guidance_interval"])
        return Call(settings=from_dict(Settings, settings), **values), index
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: its record of how it was made is not readable: {error}") from error


def input_record(path: Path) -> dict:
    """What a call remembers of an input picture."""
    return {"name": str(path), "sha256": file_sha256(path)}


def check_input(said: dict, beside: Path) -> Path:
    """The input picture of a record, looked for as it was named and beside the replayed picture; refused if changed."""
    name = Path(said["name"])
    for path in (name, beside / name, beside / name.name):
        if path.is_file():
            if file_sha256(path) != said["sha256"]:
                raise ValueError(f"{path} is not the picture it was (its SHA-256 has changed): replay would lie")
            return path
    raise ValueError(f"the input picture {name} is not there, neither here nor in {beside}: put it back to replay")


def file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def write_whole(path: Path, write) -> None:
    """Call write(file) on a file beside path, then rename it over path: an interruption leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as out:
            write(out)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
