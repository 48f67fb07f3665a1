"""Small whole models that draw: random weights scaled so that every layer passes a signal of about unit size on.

`tiny.checkpoint` is for files; its weights are too faint for pictures to differ. Here the vocabulary is the real one.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tiny import TINY

from minisd.checkpoints.load import Checkpoint
from minisd.checkpoints.networks import NETWORKS
from minisd.config import CLIPTextConfig, ModelConfig
from minisd.runtime.optimize import optimize
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks.sampling import Sampling


def lively(kind: str | ModelConfig = "SD1", *, seed: int = 0, **changes) -> StableDiffusion:
    """A model of a kind ("SD1", "SD2_V" …); changes to its config by name. Its VAE's factor is 2, its pictures 32²."""
    sd = StableDiffusion.of(lively_checkpoint(kind, seed=seed, **changes))
    for network in sd.networks.values():
        optimize(network)  # as `load` does
    return sd


def lively_checkpoint(kind: str | ModelConfig = "SD1", *, seed: int = 0, **changes) -> Checkpoint:
    config = replace(TINY[kind] if isinstance(kind, str) else kind, **changes)
    real = CLIPTextConfig()
    pad_id = 0 if config.text.pad_id == 0 else real.pad_id
    words = {"vocab_size": real.vocab_size, "bos_id": real.bos_id, "eos_id": real.eos_id, "pad_id": pad_id}
    config = replace(config, text=replace(config.text, **words))
    # more than one channel to a group, or a picture of one latent could not be normalised
    config = replace(config, unet=replace(config.unet, norm_groups=8), vae=replace(config.vae, norm_groups=8))
    parts = {"unet": config.unet, "vae": config.vae, "text": config.text}
    networks = {name: _network(name, part, seed) for name, part in parts.items()}
    return Checkpoint(config, networks, {}, [], "the test")


def _network(name: str, config, seed: int) -> torch.nn.Module:
    with torch.device("meta"):
        network = NETWORKS[name].module(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, like in network.state_dict().items():
        z = torch.randn(like.shape, generator=generator)
        if like.ndim > 1:
            state[key] = z * 0.02 if "embedding" in key else z / like[0].numel() ** 0.5
        else:
            state[key] = 1 + 0.1 * z if key.endswith("weight") else 0.05 * z
    network.load_state_dict(state, assign=True)
    return network.eval()


def picture(width: int = 32, height: int = 32, mode: str = "RGB") -> Image.Image:
    """A picture of smooth colours with edges in it, and a little grain."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(0).integers(0, 24, (height, width, 3))
    colours = np.stack([x * 255 // width, y * 255 // height, 160 * ((x // 5 + y // 7) % 2)], axis=-1)
    return Image.fromarray((colours * 0.9 + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def mask(box: tuple[int, int, int, int], width: int = 32, height: int = 32) -> Image.Image:
    """White inside the box (left, top, right, bottom)."""
    result = Image.new("L", (width, height), 0)
    result.paste(255, box)
    return result


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def only(samplings: Iterable[Sampling]) -> Sampling:
    """The sampling of a call of one batch."""
    (sampling,) = samplings
    return sampling


class Watched:
    """The inputs (x, t) and conditionings of every call of a U-Net, while it lasts."""

    def __init__(self, sd):
        self.sd, self.calls = sd, []

    def __enter__(self):
        def note(module, args):
            self.calls.append(args)

        self.handle = self.sd.unet.register_forward_pre_hook(note)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    @property
    def times(self) -> list[float]:
        return [float(torch.as_tensor(t)) for _, t, _ in self.calls]

    @property
    def batch_sizes(self) -> list[int]:
        return [len(x) for x, _, _ in self.calls]
