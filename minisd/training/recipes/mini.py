"""The whole of Stable Diffusion from nothing: autoencoder, CLIP, U-Net, in that order, into one checkpoint.

Run again after any interruption, it goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from minisd.checkpoints.load import load_network
from minisd.checkpoints.networks import WHOLE
from minisd.checkpoints.opening import open_checkpoint
from minisd.checkpoints.save import save_networks
from minisd.config import MINI, ModelConfig
from minisd.files import write_whole
from minisd.stable_diffusion import StableDiffusion
from minisd.training.data import Augmentation, Pictures
from minisd.training.options import RUN, LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.recipes import TrainingRecipe
from minisd.training.recipes.clip import CLIPRecipeConfig, train_clip
from minisd.training.recipes.latent_diffusion import LatentDiffusionConfig, train_latent_diffusion
from minisd.training.recipes.vae import VAERecipeConfig, train_vae
from minisd.training.scenes import load_training
from minisd.training.state import differing

FILE = "mini.safetensors"


@dataclass(frozen=True)
class MiniConfig:
    """The three recipes, each with the networks that it trains.

    Attributes:
        vae: the autoencoder.
        clip: the text and the vision tower.
        unet: the U-Net. Its model's vae, text and vision are filled in with those trained before it.
        scenes: how many are composed of the emoji and learnt beside them (`training.scenes`); other pictures have none.
        half: whether the weights are saved in float16.
        start: checkpoints to start from (vae.safetensors, clip.safetensors, whole models): a VAE and a CLIP in them are
            used as they are, a U-Net is fine-tuned.
    """

    vae: VAERecipeConfig = field(default_factory=VAERecipeConfig)
    clip: CLIPRecipeConfig = field(default_factory=CLIPRecipeConfig)
    unet: LatentDiffusionConfig = field(default_factory=LatentDiffusionConfig)
    scenes: int = 0
    half: bool = True
    start: tuple[str, ...] = ()


def mini_config(*, gpu: bool = False, model: ModelConfig = MINI) -> MiniConfig:
    """The plan of the mini model: two hours of two quick CPU cores, or eight times as many examples on a GPU.

    In bfloat16 on a GPU and on CPUs that are quicker in it, else in float32.
    """
    more = 8 if gpu else 1
    precision = "bfloat16" if gpu or has_bfloat16() else "float32"
    common = {"decay": "cosine", "betas": (0.9, 0.99), "precision": precision}
    varied = Augmentation(background=0.3, zoom=0.2, shift=0.1)
    return MiniConfig(
        scenes=30_000,
        vae=VAERecipeConfig(
            vae=model.vae,
            loop=LoopConfig(steps=8_000, batch_size=4 * more, lr=1e-3, muon=0.012, ema=0.995, **common),
            decoder_loop=LoopConfig(steps=6_000, batch_size=32, lr=5e-4, ema=0.999, **common) if gpu else None,
            pixel="l2",  # punishes wrong hues most: under l1 the commonest one sufficed for thousands of steps
            augmentation=varied,
            gan_weight=0.5 if gpu else 0.0,  # half as dear again, and worth it once the rest is learnt
            gan_start=5000,
        ),
        clip=CLIPRecipeConfig(
            text=model.text,
            vision=model.vision,
            loop=LoopConfig(
                steps=700 * more, batch_size=256, lr=1e-3, muon=0.015, weight_decay=0.1, ema=0.99, **common
            ),
            augmentation=varied,
        ),
        unet=LatentDiffusionConfig(
            model=model,
            loop=LoopConfig(steps=9_000, batch_size=32 * more, lr=1e-3, muon=0.015, warmup=500, ema=0.999, **common),
            # min-SNR would leave hardly any weight to the noisiest times, where what the picture shows is decided
            min_snr=None,
        ),
    )


def has_bfloat16() -> bool:
    """Whether this CPU, an x86, multiplies bfloat16 by instructions of its own (AMX, AVX-512), quicker than float32."""
    return any(
        getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )


def train_mini(
    pictures: Pictures,
    folder: str | os.PathLike,
    config: MiniConfig,
    run: TrainingRun = RUN,
    group: Processes = ALONE,
) -> StableDiffusion:
    """All three recipes, in subfolders of `folder`; then folder/mini.safetensors, in the original's layout.

    What is finished is only loaded, so the same call takes an interrupted training up again. It also is kept for other
    trainings to start from: vae/vae.safetensors, clip/clip.safetensors. ValueError, before anything is learnt, for
    pictures or a start that do not fit the config.
    """
    pictures.check_captions()
    folder, size = Path(folder), config.unet.model.image_size
    if pictures.size != size:
        raise ValueError(f"the pictures have {pictures.size} px, the model {size}: make them equal")
    if any(Path(path).resolve() == (folder / FILE).resolve() for path in config.start):
        raise ValueError(f"{folder / FILE} is what this training will write: give it another folder")
    model = config.unet.model
    given, steps = networks_in(config.start, model)

    def save(path: Path, networks: dict[str, nn.Module], **options) -> None:
        if group.is_first:
            networks = {name: in_half(network) for name, network in networks.items()} if config.half else networks
            save_networks(networks, model, path, fold=True, evidence="minisd trained it so", **options)

    if (vae := given.get("vae")) is None:
        vae = train_vae(pictures, folder / "vae", config.vae, run, group)
        model = replace(model, vae=vae.config)
        save(folder / "vae" / "vae.safetensors", {"vae": vae})
    clip = {name: given[name] for name in ("text", "vision") if name in given}
    if not clip:
        trained = train_clip(pictures, folder / "clip", config.clip, run, group)
        clip = {"text": trained.text, "vision": trained.vision}
        model = replace(model, text=trained.text.config, vision=trained.vision.config)
        save(folder / "clip" / "clip.safetensors", clip)
    for network in (vae, *clip.values()):
        network.to(group.device).requires_grad_(False)
    model = replace(model, vae=vae.config, text=clip["text"].config, vision=clip["vision"].config)
    unet_config = replace(config.unet, model=model)
    unet = train_latent_diffusion(
        pictures, vae, clip["text"], folder / "unet", unet_config, run, group, start=given.get("unet")
    )

    networks = {"unet": unet, "vae": vae, **clip}
    steps += config.unet.loop.steps
    save(folder / FILE, networks, global_step=steps)
    if group.is_first:
        text = json.dumps(asdict(config), indent=1, sort_keys=True) + "\n"
        write_whole(folder / "mini.json", lambda file: file.write(text.encode()))
    return StableDiffusion(unet, vae, clip["text"], config=model, vision_encoder=clip["vision"])


def networks_in(paths: Sequence[str | os.PathLike], model: ModelConfig) -> tuple[dict[str, nn.Module], int]:
    """The networks of these files by name, in float32, and the steps that the U-Net among them has learnt.

    Where two files hold one, the later file's. ValueError where a U-Net is not the model's, predicts something else or
    learnt under another schedule, and for a CLIP without one of its towers.
    """
    found, steps = {}, 0
    for path in paths:
        opened = open_checkpoint(path)
        held = [name for name in WHOLE if name in opened.contents.parts]
        if not held:
            raise ValueError(f"{path} holds no VAE, CLIP or U-Net to start from")
        if len({"text", "vision"}.intersection(held)) == 1:
            raise ValueError(f"{path} holds half of a CLIP: text encoder and vision tower are taken over together")
        if "unet" in held:
            stored = opened.config
            if stored is None:
                raise ValueError(
                    f"{path} does not say how its U-Net was trained, as the files of minisd's trainings do"
                )
            learnt, asked = (
                {"unet": asdict(c.unet), "prediction": c.prediction, "schedule": asdict(c.schedule)}
                for c in (stored, model)
            )
            if other := differing(learnt, asked):
                raise ValueError(f"{path}: the U-Net to start from is another than the plan's: {'; '.join(other)}")
            steps = opened.global_step or 0
        found |= {name: load_network(path, name, cast=lambda _: torch.float32) for name in held}
    if "text" in found and (width := found["text"].config.width) != model.unet.context_dim:
        raise ValueError(f"the text encoder to start from has width {width}, the U-Net wants {model.unet.context_dim}")
    return found, steps


def in_half(network: nn.Module) -> nn.Module:
    """A copy of a network in float16; the weight stays what it was."""
    return deepcopy(network).half()


RECIPE = TrainingRecipe(
    config=lambda device: mini_config(gpu=device.startswith("cuda")),
    train=train_mini,
    load=lambda folder, config: load_training(folder, size=config.unet.model.image_size, scenes=config.scenes),
    writes=FILE,
)
