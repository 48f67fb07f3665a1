"""The losses of the recipes, as formulas: tensors in, tensors out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.config import PredictionType
from minisd.diffusion.schedule import Schedule
from minisd.models.vae import DiagonalGaussian


def min_snr_weights(schedule: Schedule, t: Tensor, gamma: float | None, prediction: PredictionType) -> Tensor:
    """The weight of each picture's square error, float32 'b' (Hang et al. 2023, section 3.4); ones without a gamma.

    In units of x_0's error all three are min(SNR, γ): divided by SNR for ε, by SNR + 1 for v. t: LongTensor 'b'.
    """
    snr = schedule.snr[t.cpu()]
    if gamma is None:
        return torch.ones_like(snr).float()
    if gamma <= 0:
        raise ValueError(f"min-SNR gamma {gamma}: it is above 0 (the paper's is 5), or None to weigh all times alike")
    if prediction == "eps" and (snr == 0).any():
        raise ValueError("ε at zero terminal SNR says nothing of x_0, and its weight is infinite: predict v")
    clamped = snr.clamp(max=gamma)
    return {"eps": clamped / snr, "v": clamped / (snr + 1), "x_0": clamped}[prediction].float()


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss and its accuracy from a batch of pairs 'b e' (Radford et al. 2021, figure 3). scale: 1/temperature.

    Every picture picks its caption among all of the batch, every caption its picture; accuracy is the share of pictures
    that pick rightly.
    """
    with torch.autocast(image.device.type, enabled=False):  # it would round logits of up to 100 to bfloat16
        logits = scale.float() * F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    own = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss, (logits.argmax(1) == own).float().mean()


# The autoencoder's (Rombach et al. 2022, appendix G). All are per pixel value, where the original sums over a picture:
# only the ratios count.


def gradient_loss(image: Tensor, target: Tensor, *, scales: int = 3) -> Tensor:
    """Mean absolute difference of neighbouring pixels' differences, at full size and at halves: 'b c h w' → scalar.

    What a perceptual term is for, sharp edges in the right places, without a network that was trained elsewhere. The
    mean over `scales` sizes, of a tiny picture over those that leave a pixel its neighbours.
    """
    errors = [image - target]
    while len(errors) < scales and min(errors[-1].shape[-2:]) >= 4:
        errors.append(F.avg_pool2d(errors[-1], 2))
    return torch.stack([e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean() for e in errors]).mean()


def kl_to_standard(posterior: DiagonalGaussian) -> Tensor:
    """KL(N(mean, std²) ‖ N(0, I)) in nats, summed over a picture, 'b'."""
    mean, std = posterior.mean.float(), posterior.std.float()
    return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).flatten(1).sum(1)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's: real logits above 1, fake ones below -1 (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversary: Tensor, last: Tensor) -> Tensor:
    """What brings the adversarial gradient to the size of the reconstruction's, at the decoder's last weight
    (Esser et al. 2021, eq. 7): ‖∇reconstruction‖ / (‖∇adversary‖ + 1e-4), at most 1e4, a constant.
    """
    by_reconstruction, by_adversary = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversary)
    )
    return (by_reconstruction / (by_adversary + 1e-4)).clamp(max=1e4).detach()
