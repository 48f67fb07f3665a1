"""The training steps of diffusers' examples on diffusers' own modules: the reference of minisd's recipes.

Each function takes the models of a diffusers folder and returns an Example, which takes one optimiser step per batch.
The steps are those of train_dreambooth.py, textual_inversion.py and train_dreambooth_lora.py without what changes no
number: accelerate, logging, saving. The tests compare minisd's weights with theirs (test_subject_diffusers.py),
`minisd bench train` compares the time, on the same weights, latents, noise and timesteps.
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
from torch import Tensor, nn
from transformers import CLIPTextModel

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class ExampleBatch:
    """latents, noise 'b c h w'; timesteps 'b'; input_ids 'b 77'. With a prior: first the instances, then the class."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor


@dataclass(frozen=True)
class ExampleRun:
    """The loss of every step, and the trained weights before and after, by diffusers' names."""

    losses: list[float]
    before: Weights
    after: Weights


class ExampleModels:
    """What the examples load from a folder.

    mixed: autocast to bfloat16, as accelerate's --mixed_precision bf16; `freeze` then keeps frozen weights in bfloat16.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, mixed: bool = False):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=dtype)
        self.noise_scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        self.mixed = mixed
        if dtype == torch.float64:  # diffusers computes ᾱ in float32, off by 1e-6
            config = self.noise_scheduler.config
            ends = config.beta_start**0.5, config.beta_end**0.5
            betas = torch.linspace(*ends, config.num_train_timesteps, dtype=dtype) ** 2
            self.noise_scheduler.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.unet.requires_grad_(False).train()
        self.text_encoder.requires_grad_(False).train()

    def freeze(self, *networks: nn.Module) -> None:
        """Frozen weights are kept in the precision that they are used in."""
        for network in networks if self.mixed else ():
            network.to(torch.bfloat16)

    def checkpoint_gradients(self) -> None:
        """--gradient_checkpointing."""
        self.unet.enable_gradient_checkpointing()

    def loss(self, batch: ExampleBatch, prior_loss_weight: float | None = None) -> Tensor:
        """The loss of a batch, as all three examples compute it."""
        scheduler = self.noise_scheduler
        noisy_latents = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        with torch.autocast(noisy_latents.device.type, torch.bfloat16, enabled=self.mixed):
            encoder_hidden_states = self.text_encoder(batch.input_ids)[0]
            model_pred = self.unet(noisy_latents, batch.timesteps, encoder_hidden_states).sample
        model_pred = model_pred.to(batch.noise.dtype)
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


@dataclass(frozen=True)
class Example:
    """One of the examples, ready for its first step. trained: the weights that are trained, by diffusers' names."""

    models: ExampleModels
    optimizer: torch.optim.Optimizer
    trained: Callable[[], Weights]
    prior_loss_weight: float | None = None
    max_grad_norm: float | None = None
    restore: Callable[[], None] = lambda: None

    def step(self, batch: ExampleBatch) -> Tensor:
        """Loss, backward, clip, step."""
        loss = self.models.loss(batch, self.prior_loss_weight)
        loss.backward()
        if self.max_grad_norm is not None:
            parameters = chain(*(group["params"] for group in self.optimizer.param_groups))
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.restore()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, batches: Iterable[ExampleBatch]) -> ExampleRun:
        before = {name: tensor.detach().clone() for name, tensor in self.trained().items()}
        losses = [self.step(batch).item() for batch in batches]
        return ExampleRun(losses, before, {name: tensor.detach().clone() for name, tensor in self.trained().items()})


def dreambooth(
    models: ExampleModels,
    *,
    lr: float,
    prior_loss_weight: float | None,
    max_grad_norm: float,
    train_text_encoder: bool = False,
) -> Example:
    """train_dreambooth.py, without weight decay."""
    networks = {"unet": models.unet} | ({"text_encoder": models.text_encoder} if train_text_encoder else {})
    for network in networks.values():
        network.requires_grad_(True)
    models.freeze(*(() if train_text_encoder else (models.text_encoder,)))
    optimizer = torch.optim.AdamW(chain(*(n.parameters() for n in networks.values())), lr=lr, weight_decay=0.0)

    def trained() -> Weights:
        named = {f"{network}.{name}": p for network, n in networks.items() for name, p in n.named_parameters()}
        # transformers before 5 has one more module there
        return {name.replace("text_encoder.text_model.", "text_encoder."): p for name, p in named.items()}

    return Example(models, optimizer, trained, prior_loss_weight, max_grad_norm)


def textual_inversion(models: ExampleModels, rows: Tensor, *, lr: float) -> Example:
    """textual_inversion.py, without weight decay: the whole table is optimised, and all old rows restored each step."""
    text_encoder = models.text_encoder
    models.freeze(models.unet)
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

    return Example(models, optimizer, lambda: {"rows": table[old:]}, restore=restore)


def lora(
    models: ExampleModels,
    initial: Mapping[str, Tensor] | None = None,
    *,
    rank: int,
    alpha: float,
    target_modules: str,
    lr: float,
    prior_loss_weight: float | None,
    max_grad_norm: float,
) -> Example:
    """train_dreambooth_lora.py on the U-Net, by peft, without weight decay. initial: peft's names → first matrices."""
    dtype = models.unet.dtype
    models.freeze(models.unet, models.text_encoder)
    models.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules))
    parameters = [p for p in models.unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    if initial is not None:
        set_peft_model_state_dict(models.unet, dict(initial))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    trained = lambda: get_peft_model_state_dict(models.unet)  # noqa: E731
    return Example(models, optimizer, trained, prior_loss_weight, max_grad_norm)
