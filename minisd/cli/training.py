"""The commands that train from nothing. `torchrun --nproc-per-node N -m minisd train …` shares one training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from minisd.cli.options import Model
from minisd.training.options import RUN, Run, changed, read_changes

Carried = Annotated[Run, Parameter(name="*", group=Group("Run", sort_key=1))]
Settings = Annotated[list[str], Parameter(name="--set", negative=(), consume_multiple=True)]


def train_mini(
    folder: Path,
    *,
    out: Path = Path("mini"),
    start_from: Annotated[list[Path], Parameter(negative=(), consume_multiple=True)] = (),
    config: Path | None = None,
    settings: Settings = (),
    run: Carried = RUN,
) -> None:
    """Train a whole model from nothing: autoencoder, CLIP, U-Net. The same command again goes on where it stopped.

    Args:
        folder: pictures with captions: the data set of scripts/build_emoji.py, or pictures with .txt files beside them.
        out: gets the states, logs, curves and sample sheets of each part, then mini.safetensors and mini.json.
        start_from: a file with networks, such as mini.safetensors or the vae/vae.safetensors of another training: its
            VAE and CLIP are taken as they are, its U-Net learns on. Several may follow.
        config: a JSON file of what differs from the plan, such as the mini.json of another training.
        settings: FIELD=VALUE, a change of its own: unet.loop.steps=1000, vae.vae.channels=32 … Several may follow.
    """
    from minisd.training.parallel import processes
    from minisd.training.recipes.mini import mini_config, train_mini
    from minisd.training.scenes import load_training

    check(folder, out, run)
    plan = changed(mini_config(gpu=run.device.startswith("cuda")), read_changes(config, settings))
    if start_from:
        plan = replace(plan, start=tuple(map(str, start_from)))
    pictures = load_training(folder, size=plan.unet.model.image_size, scenes=plan.scenes)
    with processes(run.device) as group:
        train_mini(pictures, out, plan, run, group)
    print(out / "mini.safetensors")


def train_ddpm(
    folder: Path,
    *,
    out: Path = Path("ddpm"),
    config: Path | None = None,
    settings: Settings = (),
    run: Carried = RUN,
) -> None:
    """Train a DDPM on the pixels themselves, without autoencoder or words: the smallest lesson.

    Args:
        folder: pictures, of any size.
        out: gets the state, log, curves and sample sheets, then ddpm.safetensors.
        config: a JSON file of what differs from the defaults.
        settings: FIELD=VALUE, a change of its own: size=64, schedule.kind=cosine, learned_variance=true with
            unet.out_channels=6, loop.steps=1000 … Several may follow.
    """
    from minisd.training.data import load_pictures
    from minisd.training.parallel import processes
    from minisd.training.recipes.ddpm import DDPMConfig, train_ddpm

    check(folder, out, run)
    plan = changed(DDPMConfig(), read_changes(config, settings))
    with processes(run.device) as group:
        train_ddpm(load_pictures(folder, size=plan.size), out, plan, run, group)
    print(out / "ddpm.safetensors")


def check(folder: Path, out: Path, run: Run) -> None:
    """ValueError for a device that is not there, and for sheets that would become pictures to learn from."""
    Model(device=run.device).check()
    if out.absolute().is_relative_to(folder.absolute()):
        raise ValueError(
            f"{out} lies in {folder}, where its own sheets would be pictures to learn from: choose another"
        )
