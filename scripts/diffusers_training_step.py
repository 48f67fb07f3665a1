"""The training steps of diffusers' examples, written out on diffusers' own modules: what minisd's recipes are held to.

Each function loads a diffusers folder, takes one optimiser step per batch, and returns the losses and the weights that
learnt, before and after. The steps are those of the examples (train_dreambooth.py, textual_inversion.py,
train_dreambooth_lora.py), without what does not touch a number: accelerate, logging, saving. The tests run them beside
minisd (test_subject_diffusers.py) on the same weights, latents, noise and times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import CLIPTextModel

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """latents, noise 'b c h w'; timesteps 'b'; input_ids 'b 77'. With a prior: first the instances, then the class."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor


@dataclass(frozen=True)
class Done:
    """The loss of every step, and the weights that learnt, by diffusers' names."""

    losses: list[float]
    before: Weights
    after: Weights


class Models:
    """What the examples load from a folder."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        load = {"low_cpu_mem_usage": False}
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **load).to(dtype)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").to(dtype)
        self.noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        if dtype == torch.float64:  # diffusers multiplies its betas up in float32, which alone would differ by 1e-6
            said = self.noise_scheduler.config
            ends = said.beta_start**0.5, said.beta_end**0.5
            betas = torch.linspace(*ends, said.num_train_timesteps, dtype=dtype) ** 2
            self.noise_scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.unet.requires_grad_(False)
        self.text_encoder.requires_grad_(False)

    def loss(self, batch: Batch, prior_loss_weight: float | None = None) -> Tensor:
        """The loss of a batch, as all three examples compute it."""
        scheduler = self.noise_scheduler
        noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        encoder_hidden_states = self.text_encoder(batch.input_ids)[0]
        model_pred = self.unet(noisy_latents, batch.timesteps, encoder_hidden_states).sample
        if scheduler.config.prediction_type == "epsilon":
            target = batch.noise
        else:
            target = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        if prior_loss_weight is None:
            return F.mse_loss(model_pred, target, reduction="mean")
        model_pred, model_pred_prior = torch.chunk(model_pred, 2, dim=0)
        target, target_prior = torch.chunk(target, 2, dim=0)
        loss = F.mse_loss(model_pred, target, reduction="mean")
        prior_loss = F.mse_loss(model_pred_prior, target_prior, reduction="mean")
        return loss + prior_loss_weight * prior_loss


def optimize(
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    learnt: Callable[[], Weights],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    restore: Callable[[], None] = lambda: None,
) -> Done:
    """One step per batch: loss, backward, clip, step."""
    losses = []
    before = {name: tensor.detach().clone() for name, tensor in learnt().items()}
    for batch in batches:
        value = loss(batch)
        value.backward()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(chain(*(group["params"] for group in optimizer.param_groups)), max_grad_norm)
        optimizer.step()
        restore()
        optimizer.zero_grad()
        losses.append(value.item())
    return Done(losses, before, {name: tensor.detach().clone() for name, tensor in learnt().items()})


def dreambooth(
    folder: Path,
    batches: Iterable[Batch],
    *,
    lr: float,
    prior_loss_weight: float | None,
    max_grad_norm: float,
    train_text_encoder: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Done:
    """train_dreambooth.py, without weight decay."""
    models = Models(folder, dtype)
    networks = {"unet": models.unet} | ({"text_encoder": models.text_encoder} if train_text_encoder else {})
    for network in networks.values():
        network.requires_grad_(True)
    optimizer = torch.optim.AdamW(chain(*(n.parameters() for n in networks.values())), lr=lr, weight_decay=0.0)

    def learnt() -> Weights:
        named = {f"{place}.{name}": p for place, n in networks.items() for name, p in n.named_parameters()}
        # transformers before 5 has one more module there
        return {name.replace("text_encoder.text_model.", "text_encoder."): p for name, p in named.items()}

    return optimize(batches, lambda batch: models.loss(batch, prior_loss_weight), learnt, optimizer, max_grad_norm)


def textual_inversion(
    folder: Path, batches: Iterable[Batch], rows: Tensor, *, lr: float, dtype: torch.dtype = torch.float32
) -> Done:
    """textual_inversion.py, without weight decay: the whole table is optimised, and all old rows put back each time."""
    models = Models(folder, dtype)
    text_encoder = models.text_encoder
    old = text_encoder.get_input_embeddings().weight.shape[0]
    text_encoder.resize_token_embeddings(old + len(rows), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[old:] = rows
    orig_embeds_params = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=lr, weight_decay=0.0)

    def restore() -> None:
        with torch.no_grad():
            table[:old] = orig_embeds_params[:old]

    return optimize(batches, models.loss, lambda: {"rows": table[old:]}, optimizer, None, restore)


def lora(
    folder: Path,
    batches: Iterable[Batch],
    initial: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    target_modules: str,
    lr: float,
    prior_loss_weight: float | None,
    max_grad_norm: float,
    dtype: torch.dtype = torch.float32,
) -> Done:
    """train_dreambooth_lora.py on the U-Net, by peft, without weight decay. initial: peft's names → first matrices."""
    models = Models(folder, dtype)
    models.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules))
    parameters = [p for p in models.unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    set_peft_model_state_dict(models.unet, dict(initial))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    learnt = lambda: get_peft_model_state_dict(models.unet)  # noqa: E731
    return optimize(batches, lambda batch: models.loss(batch, prior_loss_weight), learnt, optimizer, max_grad_norm)
