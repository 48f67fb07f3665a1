"""Photos as the loss sees them: latents, masks and prompts, computed once and drawn from at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from minisd.checkpoints.digests import network_digest
from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.diffusion.schedule import Schedule
from minisd.models.latents import encode_image
from minisd.models.vae import VAE
from minisd.training.draws import Draws
from minisd.training.subject.photos import Photos


@dataclass(frozen=True, eq=False)
class Examples:
    """Photos as the loss sees them, computed once.

    mean, std: of the latents of each view, 'n v c h w'. weight: of a latent's error, 'n v 1 h w', 1 on average. prompt:
    rows of the recipe's table of prompts, 'k'; photo i has the `count[i]` from `first[i]` on.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    prompt: Tensor
    first: Tensor
    count: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, rows: Tensor, schedule: Schedule, draws: Draws) -> SubjectBatch:
        """One view and one prompt of each of these photos, noise and a time."""
        view = (draws.uniform() * self.mean.shape[1]).long()
        way = (draws.uniform() * self.count[rows]).long()
        mean, std = self.mean[rows, view], self.std[rows, view]
        x_0 = mean + std * draws.normal(*mean.shape[1:]).to(mean)
        noise = draws.normal(*mean.shape[1:]).to(mean)
        t = draws.integers(schedule.num_timesteps)
        return SubjectBatch(x_0, noise, t, self.prompt[self.first[rows] + way], self.weight[rows, view])


@dataclass(frozen=True, eq=False)
class SubjectBatch:
    """What one step is about: latents x_0 and noise 'b c h w', t 'b', prompt 'b' (rows of the table), weight 'b 1 h w'.

    With prior preservation the photos of the subject come first, then as many of the class.
    """

    x_0: Tensor
    noise: Tensor
    t: Tensor
    prompt: Tensor
    weight: Tensor

    @classmethod
    def cat(cls, parts: Sequence[SubjectBatch]) -> SubjectBatch:
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def load_latents(photos: Photos, vae: VAE, path: Path, *, batch_size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation of the photos' latents 'n v c h w', and their masks 'n v 1 h w' in [0, 1]; kept in a file."""
    digest = f"{photos.digest} {network_digest(vae)}"
    if path.exists() and (file := open_tensors(path)).metadata.get("digest") == digest:
        return tuple(file.read(name) for name in ("mean", "std", "mask"))
    n, views = photos.pixels.shape[:2]
    images = rearrange(torch.from_numpy(photos.pixels), "n v h w c -> (n v) c h w")
    starts = tqdm(range(0, n * views, batch_size), "latents", unit="batch", disable=n * views <= 4 * batch_size)
    device = vae.quant_conv.weight.device
    gaussians = [encode_image(vae, images[i : i + batch_size].to(device).float() / 127.5 - 1) for i in starts]
    mean, std = (torch.cat([getattr(g, name).cpu() for g in gaussians]) for name in ("mean", "std"))
    mask = torch.ones(n * views, 1, *mean.shape[2:])
    if photos.masks is not None:
        mask = rearrange(torch.from_numpy(photos.masks), "n v h w -> (n v) 1 h w").float()
        mask = F.interpolate(mask, size=mean.shape[2:], mode="area")
    # contiguous, as they come back from the file: a convolution rounds otherwise where memory is laid out otherwise
    latents = tuple(rearrange(x, "(n v) c h w -> n v c h w", v=views).contiguous() for x in (mean, std, mask))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, dict(zip(("mean", "std", "mask"), latents, strict=True)), {"digest": digest})
    return latents
