"""`minisd bench train`: a step of DreamBooth, LoRA and Textual Inversion, beside diffusers' examples."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minisd.bench.machine import machine
from minisd.bench.options import Pictures
from minisd.bench.pairs import FLOAT32_DISTANCE, NO_FURTHER, Measured, Program, Result, distance, failed, say
from minisd.bench.peers import chosen, judge
from minisd.bench.process import Failed, Run, Worker
from minisd.bench.report import Report
from minisd.bench.unet import Step
from minisd.bench.weights import write_random_folder
from minisd.config import SD1, ModelConfig
from minisd.training.subject import METHODS, load_method

TOKEN, PLACEHOLDER, CLASS, RANK = "sks", "<sks>", "dog", 8


@dataclass(frozen=True)
class Training:
    """One step: `batch` photos under one prompt, without prior preservation; latents are made before.

    dtype: bfloat16 means autocast; what learns is float32 either way. gradient_checkpointing: gradient checkpointing.
    """

    config: ModelConfig
    method: str
    size: int
    batch: int
    dtype: str
    device: str = "cpu"
    gradient_checkpointing: bool = False

    @property
    def label(self) -> dict[str, str | int]:
        return {"method": self.method, "size": self.size, "batch": self.batch}

    def flop(self) -> float:
        """Of the U-Net: forward, backward to its inputs, and to its weights where they learn."""
        forward = Step(self.config, self.size, self.batch, self.dtype).flop() / 2
        return forward * (3 if self.method == "dreambooth" else 2)

    def latents_and_noise(self) -> tuple[Tensor, Tensor]:
        """'b c h w' each, float32: the same in every process."""
        vae, side, generator = self.config.vae, self.size // self.config.vae.factor, torch.Generator().manual_seed(0)
        shape = (self.batch, vae.latent_channels, side, side)
        x_0, noise = (torch.randn(shape, generator=generator).to(self.device) for _ in range(2))
        return x_0, noise

    @property
    def t(self) -> Tensor:
        return torch.full((self.batch,), self.config.schedule.num_timesteps // 2, device=self.device)


def with_the_first(unet: nn.Module, step: Callable[[], object]) -> Run:
    """What is measured of a contender: the step, which gives the U-Net's output beside that of the first, taken here.

    The second output hangs on the whole of the first step: backward, clipping, optimiser. Outputs and not losses, which
    are two numbers: how far those are off in bfloat16 is mostly chance.
    """
    outputs: list[Tensor] = []
    unet.register_forward_hook(lambda _, __, output: outputs.append(getattr(output, "sample", output).detach()))

    def run() -> Tensor:
        del outputs[1:]
        step()
        return torch.stack(outputs)

    step()
    return run


@torch.no_grad()
def start_alike(first_matrices: Iterable[Tensor]) -> None:
    """A LoRA's first matrices, which each contender would draw in its own way, become the same in all of them."""
    for matrix in first_matrices:
        matrix.copy_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)) / matrix.shape[1] ** 0.5)


# A contender: from the folder with the weights, and what to learn, to the function that is measured.
def minisd(folder: Path, case: Training) -> Run:
    from minisd.pipeline import load
    from minisd.runtime.tuning import tune
    from minisd.training.optimizers import build_optimizers
    from minisd.training.options import LoopConfig
    from minisd.training.subject.config import SubjectConfig
    from minisd.training.subject.examples import SubjectBatch
    from minisd.training.subject.lora import layers_of
    from minisd.training.subject.photos import Photos

    sd = load(folder, device=case.device)
    taught = load_method(case.method)
    loop = LoopConfig(batch_size=case.batch, precision=case.dtype, ema=None)
    subject = SubjectConfig(taught.token or PLACEHOLDER, CLASS, gradient_checkpointing=case.gradient_checkpointing)
    # the photo itself is not learnt from: the latents are those of the case, for every contender
    photos = Photos(np.zeros((1, 1, 64, 64, 3), np.uint8), None, ((),), ("photo.png",), "benchmark")
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as work, torch.enable_grad():
        recipe = taught.recipe(sd, photos, Path(work), taught.config(subject, loop=loop))
        start_alike(layer.down.weight for layer in layers_of(recipe).values())
    networks = recipe.networks.train()
    tune(networks, torch.device(case.device))
    optimizers = build_optimizers(networks, loop)
    x_0, noise = case.latents_and_noise()
    first = torch.zeros(case.batch, dtype=torch.long, device=case.device)
    batch = SubjectBatch(x_0, noise, case.t, first, torch.ones_like(x_0[:, :1]))

    @torch.enable_grad()
    def step() -> None:  # a step of training.loop.train
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = recipe.losses(batch)["loss"]
        loss.backward()
        for network in networks.values():
            nn.utils.clip_grad_norm_(network.parameters(), loop.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return with_the_first(networks["unet"], step)


def diffusers(folder: Path, case: Training) -> Run:
    from minisd.bench import diffusers_training as examples
    from minisd.text.tokenizer import Tokenizer

    models = examples.Models(folder, torch.float32, mixed=case.dtype == "bfloat16")
    models.unet.to(case.device)
    models.text_encoder.to(case.device)
    if case.gradient_checkpointing:
        models.checkpoint_gradients()
    text = case.config.text
    tokenizer = Tokenizer(length=text.length, pad_id=text.pad_id, dialect=text.dialect)
    clipped = {"prior_loss_weight": None, "max_grad_norm": 1.0}
    with torch.enable_grad():
        if case.method == "dreambooth":
            example = examples.dreambooth(models, lr=1e-4, **clipped)
        elif case.method == "lora":
            attention = ["to_q", "to_k", "to_v", "to_out.0"]
            example = examples.lora(models, rank=RANK, alpha=RANK, target_modules=attention, lr=1e-4, **clipped)
            start_alike(weight for name, weight in models.unet.named_parameters() if ".lora_A." in name)
        else:
            table = models.text_encoder.get_input_embeddings().weight
            rows = table[[tokenizer.encode(CLASS)[0]]].detach().clone()
            tokenizer.add_token(PLACEHOLDER, 1)
            example = examples.textual_inversion(models, rows, lr=1e-4)
    prompt = f"a {PLACEHOLDER}" if case.method == "textual-inversion" else f"a {TOKEN} {CLASS}"
    ids = tokenizer([prompt] * case.batch).to(case.device)
    batch = examples.Batch(*case.latents_and_noise(), case.t, ids)
    return with_the_first(models.unet, torch.enable_grad()(lambda: example.step(batch)))


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_train(
    options: Pictures,
    config: ModelConfig = SD1,
    *,
    methods: Iterable[str] = METHODS,
    gradient_checkpointing: bool = False,
) -> Report:
    """Seconds and peak of one step of each method; every contender has a new process in every pair.

    Both optimise with PyTorch's AdamW. Two trainings of the official size would not fit beside each other.
    """
    if options.dtype == "float16":
        raise ValueError("float16 is no precision to train in here: give bfloat16 or float32")
    found = [
        Training(config, load_method(name).command, size, batch, options.dtype, options.device, gradient_checkpointing)
        for name, (size, batch) in product(methods, list(options.cases(config)))
    ]
    programs = chosen(CONTENDERS, options.peers)
    saved = ", gradient checkpointing" if gradient_checkpointing else ""
    what = f"a training step on {config.name}, random weights, latents given{saved}"
    report = Report("train", what, machine(options.device), options)
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as folder:
        write_random_folder(Path(folder), config)
        for case in found:
            report.cases.append(_measure(case, programs, Path(folder), options))
    return report


def _measure(case: Training, programs: Mapping[str, Program], folder: Path, options: Pictures) -> Measured:
    """The contenders in turn, one process at a time. What the U-Net put out in two steps is what they must agree on."""
    found = Measured(case.label, {name: Result() for name in programs}, case.flop())
    outputs: dict[str, np.ndarray] = {}
    for i in range(options.pairs):
        names = [name for name in programs if not found.results[name].failed]
        for name in names if i % 2 == 0 else reversed(names):
            result = found.results[name]
            try:
                with Worker(partial(programs[name], folder, case), options.device) as worker:
                    outputs[name] = worker.output()
                    result.seconds.append(worker.seconds())
                    result.peak = max(result.peak or 0, worker.peak())
            except Failed as error:
                if name == "minisd":
                    raise
                found.results[name] = failed(found, name, error)
        times = ", ".join(f"{name} {r.seconds[-1]:.3g} s" for name, r in found.results.items() if r.seconds)
        say(found, f"pair {i + 1} of {options.pairs}: {times}")
    _hold_together(found, outputs, case, programs, folder)
    return found


def _hold_together(
    found: Measured, outputs: dict[str, np.ndarray], case: Training, programs: Mapping[str, Program], folder: Path
) -> None:
    """Every contender's outputs against the judge's in float32."""
    reference = judge(CONTENDERS)
    if reference is None:
        return
    name = next((name for name, program in programs.items() if program is reference and name in outputs), None)
    if case.dtype == "float32" and name:
        expected = outputs[name]
    else:
        try:
            exact = replace(case, dtype="float32")
            with Worker(partial(reference, folder, exact), case.device) as worker:
                expected = worker.output()
        except Failed as error:
            print(f"no result in float32 to compare with: {error}", file=sys.stderr)
            return
    for each, output in outputs.items():
        found.results[each].distance = distance(output, expected)
    judged = found.results[name].distance if name else None
    allowed = FLOAT32_DISTANCE if case.dtype == "float32" else judged and NO_FURTHER * judged
    found.results["minisd"].allowed = allowed
