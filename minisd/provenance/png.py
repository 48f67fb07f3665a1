"""The record in a PNG: A1111's `parameters` text, which other programs read, and our JSON, which `replay` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from minisd.files import write_whole
from minisd.provenance.call import Call, File, from_json, to_json
from minisd.tasks import Txt2Img
from minisd.tasks.sampler_names import a1111_name

if TYPE_CHECKING:
    from PIL import Image

CHUNK = "minisd"


def save_png(path: Path, image: Image.Image, call: Call, index: int) -> None:
    """Write picture `index` of a call, whole or not at all, with the record of the batch that it was made in."""
    from PIL.PngImagePlugin import PngInfo

    call, index = call.batch(index)  # a record of all prompts would grow with the square of their number
    info = PngInfo()
    info.add_text("parameters", parameters_text(call, index, image.size))
    info.add_text(CHUNK, to_json(call, index))
    write_whole(path, lambda out: image.save(out, "PNG", pnginfo=info))


def read_png(path: Path) -> tuple[Call, int]:
    """(call, index) of a picture that minisd made. ValueError where it carries no record, or a damaged one."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(CHUNK)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: it does not say how it was made; replay needs a PNG as minisd saved it")
    try:
        return from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parameters_text(call: Call, index: int, size: tuple[int, int]) -> str:
    """What AUTOMATIC1111's web page writes into its PNGs and other programs read: prompts, then `Key: value, …`."""
    options = call.options
    name, _, own = str(options.sampler).partition(":")
    values = {
        "Steps": options.steps,
        "Sampler": a1111_name(name),
        "Sampler options": own or None,
        "Schedule type": "Karras" if options.spacing == "karras" else None,
        "CFG scale": options.guidance_scale,
        "Seed": call.seed(index),
        "Size": "{}x{}".format(*size),
        "Model": _stem(call.model.checkpoint),
        "Denoising strength": getattr(options, "strength", None),
        "Clip skip": None if options.clip_skip is None else options.clip_skip + 1,
        "TI hashes": ", ".join(f"{_stem(e.file)}: {e.file.digest[7:19]}" for e in call.model.embeddings) or None,
        "Version": f"minisd {call.version}",
    }
    if isinstance(options, Txt2Img) and options.variation_seed is not None:
        values["Variation seed"] = options.variation_seed + index
        values["Variation seed strength"] = options.variation_strength
    negative = [f"Negative prompt: {options.negative_prompt}"] if options.negative_prompt else []
    listed = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in values.items() if value is not None)
    loras = (f"<lora:{_stem(lora.file)}:{lora.weight:g}>" for lora in call.model.loras)  # A1111 has them in the prompt
    return "\n".join([" ".join([call.prompts[index // options.num_images], *loras]), *negative, listed])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def _stem(file: File) -> str:
    path = Path(file.name)
    return path.stem if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") else path.name
