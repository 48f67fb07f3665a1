"""The loss by which a subject is learnt from a few photos, whatever learns it.

Methods differ in what they let move: the whole U-Net, a row of the token embedding, low-rank additions to layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.diffusion.gaussian import per_image
from minisd.models.unet import Conditioning
from minisd.runtime.allocator import forget_file_pages
from minisd.stable_diffusion import StableDiffusion
from minisd.training.draws import Draws
from minisd.training.loss import min_snr_weights
from minisd.training.state import learnt_weights
from minisd.training.subject.config import SubjectConfig, filled, prompts_of
from minisd.training.subject.examples import Examples, SubjectBatch, load_latents
from minisd.training.subject.photos import Photos
from minisd.training.subject.validation import Scorer, Validator
from minisd.training.weights import checkpoint_gradients, copied

TINY = 1e-6  # the least mean weight to divide by: a view without the subject counts 0


class SubjectRecipe:
    """E‖target - unet(x_t, t, prompt)‖² over the subject, and λ times the same over its class; the target is ε or v.

    The second term is DreamBooth's prior preservation (Ruiz et al. 2023, eq. 2): without it the class becomes the
    subject. sd: the model that learns; what of its U-Net and text encoder has requires_grad moves. phrase: what the
    prompts call the subject. class_photos: of the prior; None for no such term. folder: of the latents and the
    scores. scorer: of the validation images.
    """

    def __init__(
        self,
        name: str,
        sd: StableDiffusion,
        config: SubjectConfig,
        photos: Photos,
        folder: Path,
        *,
        phrase: str,
        precision: str,
        class_photos: Photos | None = None,
        prior_weight: float = 1.0,
        scorer: Scorer | None = None,
    ):
        sd.check_task(f"{name} training", "text-to-image")
        self.name, self.sd, self.config, self.folder = name, sd, config, folder
        self.autocast, self.prior_weight = precision == "bfloat16", prior_weight
        self.networks = nn.ModuleDict({"unet": sd.unet, "text": sd.text_encoder})
        if config.gradient_checkpointing:
            checkpoint_gradients(sd.unet.slots())
            checkpoint_gradients(sd.text_encoder.blocks)
        self.validator = Validator(
            sd, self.networks, config, folder, phrase=phrase, autocast=self.autocast, scorer=scorer
        )
        self.class_digest = class_photos and class_photos.digest
        texts = [prompts_of(captions, config.prompts, phrase, config.token) for captions in photos.captions]
        of_class = [filled(prompt, config.class_word) for prompt in config.prompts]
        self.prompts = list(dict.fromkeys([*chain(*texts), *(of_class if class_photos else ())]))
        dtype, device = torch.promote_types(sd.dtype, torch.float32), sd.device
        self.ids = sd.tokenizer(self.prompts).to(device)

        def examples(photos: Photos, texts: Sequence[Sequence[str]], cache: str) -> Examples:
            latents = load_latents(photos, sd.vae, folder / cache)
            mean, std, mask = (tensor.to(device, dtype) for tensor in latents)
            weight = config.background + (1 - config.background) * mask
            weight = weight / weight.mean((2, 3, 4), keepdim=True).clamp(min=TINY)
            prompt = torch.tensor([self.prompts.index(text) for ways in texts for text in ways], device=device)
            count = torch.tensor([len(ways) for ways in texts], device=device)
            return Examples(mean, std, weight, prompt, count.cumsum(0) - count, count)

        self.photos = examples(photos, texts, "photos.safetensors")
        self.prior = class_photos and examples(class_photos, [of_class] * len(class_photos), "class.safetensors")
        self.states = None
        if not learnt_weights(sd.text_encoder):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                self.states = torch.cat([sd.text_encoder(ids) for ids in self.ids.split(16)]).to(dtype)
            for weight in sd.text_encoder.parameters():
                forget_file_pages(weight)  # it is not asked again but for sheets

    def __len__(self) -> int:
        return len(self.photos)

    def batch(self, examples: Tensor, draws: Draws) -> SubjectBatch:
        """The photos of these rows, and as many of the class, any of them."""
        parts = [self.photos.draw(examples.to(draws.device), self.sd.schedule, draws)]
        if self.prior is not None:
            rows = (draws.uniform() * len(self.prior)).long()
            parts.append(self.prior.draw(rows, self.sd.schedule, draws))
        return SubjectBatch.cat(parts)

    def loss(self, examples: Tensor, draws: Draws) -> dict[str, Tensor]:
        return self.losses(self.batch(examples, draws))

    def losses(self, batch: SubjectBatch) -> dict[str, Tensor]:
        errors = self.errors(batch)
        if self.prior is None:
            return {"loss": errors.mean()}
        subject, prior = (part.mean() for part in errors.chunk(2))
        return {"loss": subject + self.prior_weight * prior, "subject": subject, "prior": prior}

    def errors(self, batch: SubjectBatch) -> Tensor:
        """The weighted square error of each latent, 'b'."""
        schedule, prediction = self.sd.schedule, self.sd.config.prediction
        x_0, noise, t = batch.x_0, batch.noise, batch.t
        context = self.sd.text_encoder(self.ids[batch.prompt]) if self.states is None else self.states[batch.prompt]
        x_t = schedule.q_sample(x_0, t, noise)
        target = schedule.target(x_0, t, noise, prediction)
        output = self.sd.unet(x_t, t, Conditioning(context)).to(x_0.dtype)
        weights = min_snr_weights(schedule, t, self.config.min_snr, prediction).to(output)
        return weights * per_image(batch.weight * (output - target) ** 2)

    def sheet(self, step: int) -> Image.Image:
        return self.validator.sheet(step)


def with_networks(sd: StableDiffusion, **networks: nn.Module) -> StableDiffusion:
    """A model of its own with some networks ("unet", "text") in place of sd's; it shares the others.

    ValueError where sd was loaded with offload: networks that learn stay on the device.
    """
    if sd.offload:
        raise ValueError("a model that was loaded with offload only draws: load it without, to train it")
    return StableDiffusion.of(replace(sd.checkpoint, networks=sd.networks | networks))


def frozen_copy(sd: StableDiffusion) -> StableDiffusion:
    """A model with a text encoder and a U-Net of its own, to which words and LoRAs can be added."""
    return with_networks(sd, unet=copied(sd.unet, learn=False), text=copied(sd.text_encoder, learn=False))
