"""Recipe: the autoencoder (Rombach et al. 2022, section 3.1), with or without a patch discriminator (GAN)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from minisd.config import VAEConfig
from minisd.models.unet import zero_residual_branches
from minisd.models.vae import VAE
from minisd.tasks.images import grid, to_pil
from minisd.training.data import Augmentation, Pictures, augmented
from minisd.training.draws import Draws, generator
from minisd.training.loop import train
from minisd.training.loss import adaptive_weight, gradient_loss, hinge_loss, kl_to_standard
from minisd.training.options import RUN, LoopConfig, TrainingRun
from minisd.training.parallel import ALONE, Processes
from minisd.training.recipes.patchgan import PatchDiscriminator
from minisd.training.weights import seeded

INITIAL_LOGVAR = -6.0  # of the latents: a standard deviation of 0.05


@dataclass(frozen=True)
class VAERecipeConfig:
    """The autoencoder and how it learns.

    Attributes:
        vae: the network; its scale factor is measured after the training.
        loop: the training loop.
        pixel: the error of a pixel value: l1, or l2 squared.
        gradient_weight: of the error of neighbouring pixels' differences, which keeps edges sharp.
        kl_weight: of the divergence of the latents from N(0, I): small, it only keeps them from drifting apart.
        gan_weight: of the adversarial loss, relative to the gradient of the reconstruction; 0 for no discriminator.
        gan_start: the step at which the discriminator begins.
        gan_channels: the discriminator's width.
        gan_layers: how often it halves a picture: its patches have about 2^(layers + 3) pixels a side.
        decoder_loop: afterwards the decoder alone learns on, by squared error and a tenth of the edges'; as the
            official "ft-MSE" decoder did (MSE + 0.1 LPIPS). Latents stay what they were. Null leaves it out.
        equivariance: share of steps in which latents and pictures are shrunk and turned alike before the one is
            decoded to the other (EQ-VAE, Kouzelis et al. 2025, eq. 5): what a picture shows then stays where it is in
            its latent, and the U-Net finds it more quickly.
        augmentation: how pictures are varied.
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    pixel: Literal["l1", "l2"] = "l1"
    gradient_weight: float = 1.0
    kl_weight: float = 1e-6
    gan_weight: float = 0.0
    gan_start: int = 50001
    gan_channels: int = 32
    gan_layers: int = 3
    decoder_loop: LoopConfig | None = None
    equivariance: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)


class VAERecipe:
    """reconstruction + kl_weight·KL + gan_weight·w·(-D(x̂)), and beside it the discriminator's hinge loss.

    Both players share one backward pass: the autoencoder's loss sees the discriminator's weights as constants, the
    discriminator's sees the reconstruction as one. w brings the adversarial gradient to the size of the
    reconstruction's; it is that of the micro-batch at hand, as in the original, so with a discriminator the number of
    processes matters beyond rounding.
    """

    name = "vae"

    def __init__(self, pictures: Pictures, config: VAERecipeConfig):
        if pictures.size % config.vae.factor:
            raise ValueError(f"pictures of {pictures.size} px do not divide by the VAE's factor {config.vae.factor}")
        least = 3 * 2**config.gan_layers if config.gan_weight else 1
        if pictures.size < least:
            raise ValueError(
                f"a discriminator of {config.gan_layers} layers needs {least} px, the pictures have {pictures.size}"
            )
        self.pictures, self.config = pictures, config
        self.least = ceil(least / config.vae.factor)  # latents' pixels a side
        with seeded("vae", config.loop.seed):
            self.vae = VAE(replace(config.vae, scale_factor=1.0))
            # noise as strong as the signal, which is what a fresh network gives, would drown channels for good
            nn.init.constant_(self.vae.quant_conv.bias[config.vae.latent_channels :], INITIAL_LOGVAR)
            # nearly linear at first, so that it learns what varies most, colours among it, before anything else:
            # from random branches a hue can take thousands of steps to be found
            zero_residual_branches(self.vae)
            self.networks = nn.ModuleDict({"vae": self.vae})
            if config.gan_weight:
                self.networks["discriminator"] = PatchDiscriminator(config.gan_channels, config.gan_layers)

    def __len__(self) -> int:
        return len(self.pictures.visited)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        config = self.config
        image = augmented(self.pictures, self.pictures.visited[examples], draws, config.augmentation)
        posterior = self.vae.encode(image)
        z = posterior.mean + posterior.std * draws.normal(*posterior.mean.shape[1:])
        kl = kl_to_standard(posterior).mean() / image[0].numel()
        image, z = self._moved(image, z, draws.step)
        output = self.vae.decode(z).float()

        error = output - image
        pixel = error.abs().mean() if config.pixel == "l1" else error.square().mean()
        edges = gradient_loss(output, image) if config.gradient_weight else pixel.new_zeros(())
        reconstruction = pixel + config.gradient_weight * edges
        losses = {"pixel": pixel, "edges": edges, "kl": kl}
        total = reconstruction + config.kl_weight * kl
        if config.gan_weight and draws.step >= config.gan_start:
            adversary, discriminator = self._players(image, output)
            # nothing is differentiated where the loop looks for the cause of a NaN
            last = self.vae.decoder.conv_out.weight
            weight = adaptive_weight(reconstruction, adversary, last) if torch.is_grad_enabled() else 1.0
            losses |= {"adversary": adversary, "discriminator": discriminator}
            total = total + config.gan_weight * weight * adversary + discriminator
        return {"loss": total, **losses}

    def _moved(self, image: Tensor, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Both as they are or, for the share of steps, shrunk to a quarter at the least and turned by right angles.

        Never to less than the discriminator needs.
        """
        chance = generator("equivariance", self.config.loop.seed, step)
        if torch.rand((), generator=chance) >= self.config.equivariance:
            return image, z
        whole = z.shape[-1]
        side = int(torch.randint(max(whole // 4, self.least), whole + 1, (), generator=chance))
        turns = int(torch.randint(4, (), generator=chance))

        def moved(x: Tensor, size: int) -> Tensor:
            return F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).rot90(turns, (2, 3))

        return moved(image, side * self.config.vae.factor), moved(z, side)

    def _players(self, image: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """What each player wants small: the autoencoder's -D(x̂) with D held, D's hinge loss with x̂ held."""
        discriminator = self.networks["discriminator"]
        held = {name: weight.detach() for name, weight in discriminator.named_parameters()}
        adversary = -functional_call(discriminator, held, (output,)).float().mean()
        return adversary, hinge_loss(discriminator(image).float(), discriminator(output.detach()).float())

    @torch.no_grad()
    def sheet(self, step: int) -> Image.Image:
        """Pictures above, their reconstructions below."""
        rows = torch.linspace(0, len(self.pictures) - 1, min(8, len(self.pictures))).long()
        device = next(self.vae.parameters()).device
        image = self.pictures.images(rows, device)
        return grid(to_pil(torch.cat([image, self.vae.decode(self.vae.encode(image).mean)])), columns=len(rows))


class DecoderRecipe(VAERecipe):
    """The decoder of a trained autoencoder alone, by squared error."""

    name = "decoder"

    def __init__(self, pictures: Pictures, config: VAERecipeConfig, vae: VAE):
        edges = 0.1 * config.gradient_weight
        super().__init__(pictures, replace(config, pixel="l2", gradient_weight=edges, gan_weight=0.0, equivariance=0.0))
        self.vae.load_state_dict(vae.state_dict())
        for part in (self.vae.encoder, self.vae.quant_conv):
            part.requires_grad_(False)


def train_vae(
    pictures: Pictures,
    folder: str | os.PathLike,
    config: VAERecipeConfig,
    run: TrainingRun = RUN,
    group: Processes = ALONE,
) -> VAE:
    """The trained autoencoder, averaged, on the run's device, its scale factor measured on its pictures."""
    recipe = VAERecipe(pictures, config)
    settings = {"recipe": asdict(replace(config, decoder_loop=None)), "data": pictures.digest}
    train(recipe, config.loop, folder, run, group, settings)
    if config.decoder_loop is not None:
        recipe = DecoderRecipe(pictures, config, recipe.vae)
        settings = {"recipe": asdict(config), "data": pictures.digest}
        train(recipe, config.decoder_loop, Path(folder, "decoder"), run, group, settings)
    vae = recipe.vae.requires_grad_(False)
    vae.config = replace(config.vae, scale_factor=latent_scale(vae, pictures))
    return vae


@torch.no_grad()
def latent_scale(vae: VAE, pictures: Pictures, *, batch_size: int = 32, most: int = 2048) -> float:
    """1/std of sampled latents, over all channels together, to 5 digits (Rombach et al. 2022, appendix G).

    The diffusion process assumes unit variance. vae must have scale_factor 1. Evenly spaced pictures, at most `most`.
    """
    device = next(vae.parameters()).device
    rows = torch.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().long()
    noise = generator("latent scale")
    latents = [vae.encode(pictures.images(part, device)).sample(noise).float().cpu() for part in rows.split(batch_size)]
    return float(f"{1 / torch.cat(latents).std().item():.5g}")
