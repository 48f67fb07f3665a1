"""`minisd bench train`: a training step of DreamBooth, LoRA and textual inversion, beside diffusers' examples."""

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
from minisd.bench.options import ImageBenchOptions
from minisd.bench.pairs import Contender, ContenderResult, MeasuredCase, failure, hold_to, log
from minisd.bench.peers import reference_of, select
from minisd.bench.process import Run, Worker, WorkerError
from minisd.bench.report import BenchReport
from minisd.bench.unet import GuidedStep
from minisd.bench.weights import write_random_folder
from minisd.config import SD1, ModelConfig
from minisd.training.subject import METHODS, load_method

TOKEN, PLACEHOLDER, CLASS, RANK = "sks", "<sks>", "dog", 8


@dataclass(frozen=True)
class TrainingStep:
    """One step on `batch` images of one prompt, without prior preservation, from latents that were encoded before.

    dtype: bfloat16 means autocast; the trained weights are float32 either way.
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
        """Of the U-Net: forward, backward to its inputs, and to its weights where they are trained."""
        forward = GuidedStep(self.config, self.size, self.batch, self.dtype).flop() / 2
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


def outputs_of_two_steps(unet: nn.Module, step: Callable[[], object]) -> Run:
    """What is measured of a contender: the step, whose result is the U-Net's output beside that of a first step here.

    The second output depends on the whole first step: backward, clipping, optimiser. Outputs and not losses, which are
    two numbers, whose errors in bfloat16 are mostly chance.
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
def set_lora_down(matrices: Iterable[Tensor]) -> None:
    """Set a LoRA's down matrices, which each contender would draw in its own way, to the same values."""
    for matrix in matrices:
        matrix.copy_(torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0)) / matrix.shape[1] ** 0.5)


# A contender: (the folder with the weights, what to train) → the function that is measured.
def minisd(folder: Path, case: TrainingStep) -> Run:
    from minisd.runtime.optimize import optimize
    from minisd.stable_diffusion import load
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
    # a placeholder: all contenders train on the latents of the case
    photos = Photos(np.zeros((1, 1, 64, 64, 3), np.uint8), None, ((),), ("photo.png",), "benchmark")
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as out, torch.enable_grad():
        recipe = taught.recipe(sd, photos, Path(out), taught.config(subject, loop=loop))
        set_lora_down(layer.down.weight for layer in layers_of(recipe).values())
    networks = recipe.networks.train()
    optimize(networks)
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

    return outputs_of_two_steps(networks["unet"], step)


def diffusers(folder: Path, case: TrainingStep) -> Run:
    from minisd.bench import diffusers_training as examples
    from minisd.text.tokenizer import Tokenizer

    models = examples.ExampleModels(folder, torch.float32, mixed=case.dtype == "bfloat16")
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
            set_lora_down(weight for name, weight in models.unet.named_parameters() if ".lora_A." in name)
        else:
            table = models.text_encoder.get_input_embeddings().weight
            rows = table[[tokenizer.encode(CLASS)[0]]].detach().clone()
            tokenizer.add_token(PLACEHOLDER, 1)
            example = examples.textual_inversion(models, rows, lr=1e-4)
    prompt = f"a {PLACEHOLDER}" if case.method == "textual-inversion" else f"a {TOKEN} {CLASS}"
    ids = tokenizer([prompt] * case.batch).to(case.device)
    batch = examples.ExampleBatch(*case.latents_and_noise(), case.t, ids)
    return outputs_of_two_steps(models.unet, torch.enable_grad()(lambda: example.step(batch)))


CONTENDERS = {"minisd": minisd, "diffusers": diffusers}


def bench_train(
    options: ImageBenchOptions,
    config: ModelConfig = SD1,
    *,
    methods: Iterable[str] = METHODS,
    gradient_checkpointing: bool = False,
) -> BenchReport:
    """Seconds and peak memory of one step of each method, with PyTorch's AdamW.

    Every contender has a new process in every pair: two trainings of the official size do not fit beside each other.
    """
    if options.dtype == "float16":
        raise ValueError("float16 is no precision to train in here: give bfloat16 or float32")
    cases = [
        TrainingStep(
            config, load_method(name).command, size, batch, options.dtype, options.device, gradient_checkpointing
        )
        for name, (size, batch) in product(methods, list(options.cases(config)))
    ]
    contenders = select(CONTENDERS, options.peers)
    suffix = ", gradient checkpointing" if gradient_checkpointing else ""
    what = f"a training step on {config.name}, random weights, latents precomputed{suffix}"
    report = BenchReport("train", what, machine(options.device), options)
    with tempfile.TemporaryDirectory(prefix="minisd-bench-") as folder:
        write_random_folder(Path(folder), config)
        for case in cases:
            report.cases.append(_measure(case, contenders, Path(folder), options))
    return report


def _measure(
    case: TrainingStep, contenders: Mapping[str, Contender], folder: Path, options: ImageBenchOptions
) -> MeasuredCase:
    """The contenders in turn, one process at a time. They must agree on the U-Net's outputs in two steps."""
    measured = MeasuredCase(case.label, {name: ContenderResult() for name in contenders}, case.flop())
    outputs: dict[str, np.ndarray] = {}
    for i in range(options.pairs):
        names = [name for name in contenders if not measured.results[name].failed]
        for name in names if i % 2 == 0 else reversed(names):
            result = measured.results[name]
            try:
                with Worker(partial(contenders[name], folder, case), options.device) as worker:
                    outputs[name] = worker.output()
                    result.seconds.append(worker.seconds())
                    result.peak = max(result.peak or 0, worker.peak())
            except WorkerError as error:
                if name == "minisd":
                    raise
                measured.results[name] = failure(measured, name, error)
        times = ", ".join(f"{name} {r.seconds[-1]:.3g} s" for name, r in measured.results.items() if r.seconds)
        log(measured, f"pair {i + 1} of {options.pairs}: {times}")
    if (reference := reference_of(CONTENDERS)) is not None:
        name = next((name for name in outputs if contenders[name] is reference), None)
        expected = outputs[name] if case.dtype == "float32" and name else _float32_output(case, reference, folder)
        if expected is not None:
            hold_to(measured, outputs, expected, name, case.dtype)
    return measured


def _float32_output(case: TrainingStep, reference: Contender, folder: Path) -> np.ndarray | None:
    try:
        with Worker(partial(reference, folder, replace(case, dtype="float32")), case.device) as worker:
            return worker.output()
    except WorkerError as error:
        print(f"no float32 result to compare with: {error}", file=sys.stderr)
        return None
