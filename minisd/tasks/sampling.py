"""What all tasks share: batches and their seeds, the noise of each image, and a sampling under way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from minisd.config import Settings
from minisd.diffusion.samplers import Step, get_sampler
from minisd.images import to_pil, to_uint8
from minisd.models.unet import Conditioning
from minisd.prompts import same_length

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


class NonFiniteError(ValueError):
    """A network gave NaN or infinity. The message names the first layer that did."""


class Sampling:
    """One batch on its way from noise to pictures: iterate to take the steps, then ask for the `images()`.

    len() is the number of steps. prompts, seeds: one per image. is_draft: a first pass, whose pictures only the second
    pass wants.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        batch: Batch,
        cond: Conditioning,
        uncond: Conditioning | None,
        x: Tensor,
        timesteps: list,
        settings: Settings,
        noise: Noise,
        *,
        blend: Callable[[Step], None] | None = None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ):
        self.sd, self.settings, self.timesteps = sd, settings, timesteps
        self.prompts, self.negative_prompts, self.seeds = batch.prompts, batch.negative_prompts, batch.seeds
        self.is_draft = False
        self.latents = x
        self._conditions, self._noise, self._blend, self._finish = (cond, uncond), noise, blend, finish
        self._steps = self._sample()
        self._images: list[Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[Step]:
        """The steps that have not been taken yet."""
        return self._steps

    @torch.no_grad()
    def _sample(self) -> Iterator[Step]:
        sd, settings = self.sd, self.settings
        model = sd.guided_model(*self._conditions, settings)
        sampler = get_sampler(settings.sampler)
        own = {"eta": settings.eta} if settings.eta else {}
        for step in sampler(model, self.latents, sd.schedule, self.timesteps, noise=self._noise, **own):
            if not step.x.isfinite().all():
                raise NonFiniteError(self._nonfinite(step.t))
            if self._blend is not None:
                self._blend(step)
            self.latents = step.x
            yield step

    def _nonfinite(self, t) -> str:
        where = first_nonfinite_layer(self.sd.unet, lambda: self.sd.run_unet(self.latents, t, self._conditions[0]))
        return explain_nonfinite("U-Net", where, f"at t = {t}", self.sd.dtype)

    @torch.no_grad()
    def images(self) -> list[Image.Image]:
        """The pictures; takes the steps that are left."""
        for _ in self:
            pass
        if self._images is None:
            pixels = self.sd.decode_latents(self.latents, self.settings)
            pixels = to_uint8(pixels) if self._finish is None else self._finish(pixels)
            self._images = to_pil(pixels)
            if black := [seed for seed, image in zip(self.seeds, self._images, strict=True) if not _lit(image)]:
                warnings.warn(
                    f"the picture of seed {black[0]} is all black: weights of another prediction type (see `minisd "
                    "inspect`), or a very low guidance, do that",
                    stacklevel=2,
                )
        return self._images

    def origin(self, place: int) -> tuple[int, str, str]:
        """Seed, prompt and negative prompt of one picture of the batch."""
        return self.seeds[place], self.prompts[place], self.negative_prompts[place]

    def preview(self, step: Step) -> list[Image.Image]:
        """What the model believes the pictures to be, decoded from a step's x_0."""
        return to_pil(self.sd.decode_latents(step.x_0, self.settings))


@dataclass(frozen=True)
class Batch:
    """Some images of a call: their places in it, prompts and seeds."""

    indices: list[int]
    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]


def batches(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int, seed: int, batch_size: int
) -> Iterator[Batch]:
    """All images of a call, prompts outermost, batch_size at a time; image i has the seed `seed + i`."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    if not prompts:
        raise ValueError("no prompt was given: give a text or a list of texts")
    if len(negatives) != len(prompts):
        raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: give 1 or more")
    total = len(prompts) * num_images
    if not 0 <= seed <= 2**63 - total:
        raise ValueError(f"seed {seed} is not in 0 … 2^63 - {total}")
    for start in range(0, total, batch_size):
        indices = list(range(start, min(start + batch_size, total)))
        yield Batch(
            indices,
            [prompts[i // num_images] for i in indices],
            [negatives[i // num_images] for i in indices],
            [seed + i for i in indices],
        )


def encode_pairs(sd: StableDiffusion, batch: Batch, settings: Settings) -> tuple[Conditioning, Conditioning | None]:
    """(cond, uncond) of a batch, the keys and values of each prompt's context computed here, once for all steps."""
    guided = settings.guidance_scale != 1
    texts = batch.prompts + (batch.negative_prompts if guided else [])
    contexts = {text: sd.encode_prompt([text], settings).context for text in dict.fromkeys(texts)}
    lengths = dict(zip(contexts, same_length(*contexts.values()), strict=True))

    def joined(some: list[str]) -> Conditioning:
        return sd.unet.with_keys_values(Conditioning(torch.cat([lengths[text] for text in some])))

    with torch.no_grad():
        return joined(batch.prompts), joined(batch.negative_prompts) if guided else None


class Noise:
    """Standard normal noise, of each image from its own generator on the CPU: no image knows of its neighbours.

    Called with a tensor it draws the next noise of its shape, as samplers ask.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """'b …' float32 for a shape '…'."""
        parts = [torch.randn(tuple(shape), generator=g, dtype=torch.float32) for g in self.generators]
        return torch.stack(parts).to(self.device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.draw(x.shape[1:])


def first_nonfinite_layer(network: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first layer whose output is not finite while `run` calls the network; None if all are."""
    found: list[str] = []

    def watch(name: str):
        def hook(module, args, output) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all() and not found:
                found.append(name)

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def explain_nonfinite(network: str, layer: str | None, when: str, dtype: torch.dtype) -> str:
    half = dtype in (torch.float16, torch.bfloat16)
    advice = (
        "use dtype=float32, or bfloat16, whose range is wider" if half else "look for damaged weights with --verify"
    )
    return f"the {network} gave NaN or infinity {when}, first in the layer {layer or '(none when run alone)'}: {advice}"


def _lit(image: Image.Image) -> bool:
    return max(high for _, high in image.getextrema()) > 1
