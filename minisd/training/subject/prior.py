"""Pictures of the class, drawn by the model before it learns a subject: what it must not forget (Ruiz et al. 2023)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minisd.checkpoints.digests import network_digest
from minisd.files import write_whole
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.tasks.images import load_image
from minisd.training.parallel import Processes
from minisd.training.subject.photos import Photos


@dataclass(frozen=True)
class PriorConfig:
    """The pictures of the class, and how much they count.

    Attributes:
        weight: λ, of the loss over them beside that over the subject; 0 for no prior preservation.
        count: how many are drawn.
        prompt: of all of them; {} is the class word.
        seed: of the first; they count up.
        settings: how they are drawn.
    """

    weight: float = 1.0
    count: int = 200
    prompt: str = "a {}"
    seed: int = 0
    settings: Txt2Img = field(default_factory=lambda: Txt2Img(batch_size=4))

    def __post_init__(self):
        if self.weight < 0 or self.count < 1:
            raise ValueError(f"weight={self.weight}, count={self.count}: the weight is 0 or more, the count 1 or more")


def drawn_class(
    sd: StableDiffusion, folder: Path, class_word: str, config: PriorConfig, group: Processes, *, quiet: bool = False
) -> Photos | None:
    """The pictures of the class, from a folder of their own in `folder`; those that are missing there are drawn first.

    The folder's name has a digest of the model, the prompt and all that the pictures depend on, so other runs find
    them again, and an interrupted drawing goes on. None where config.weight is 0.
    """
    if not config.weight:
        return None
    prompt = config.prompt.replace("{}", class_word)
    networks = [network_digest(network) for network in (sd.unet, sd.text_encoder, sd.vae)]
    made = {"prompt": prompt, "seed": config.seed, "settings": vars(config.settings), "networks": networks}
    text = json.dumps(made, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    place = folder / f"{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:40]}-{digest}"
    paths = [place / f"{i:05}.png" for i in range(config.count)]
    if group.is_first:
        write_whole(place / "made.json", lambda file: file.write(text.encode()))
        size = config.settings.batch_size
        missing = [i for i in range(0, config.count, size) if not all(path.exists() for path in paths[i : i + size])]
        for first in tqdm(missing, f"drawing {prompt!r}", unit="batch", disable=quiet or not missing):
            batch = paths[first : first + size]
            images = sd.txt2img(
                prompt, **vars(replace(config.settings, num_images=len(batch), seed=config.seed + first))
            )
            for path, image in zip(batch, images, strict=True):
                write_whole(path, lambda file, image=image: image.save(file, "PNG"))
    group.wait()
    pixels = np.stack([np.asarray(load_image(path).convert("RGB")) for path in paths])[:, None]
    names = tuple(path.name for path in paths)
    found = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    return Photos(pixels, None, ((),) * len(paths), names, found)
