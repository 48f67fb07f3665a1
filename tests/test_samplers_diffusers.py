"""Samplers against diffusers' schedulers, live, on the same ε, where diffusers is installed."""

import pytest
import torch

from minisd.diffusion.samplers import SAMPLERS
from minisd.diffusion.schedule import Schedule, scaled_linear_betas

diffusers = pytest.importorskip("diffusers")

SD = Schedule(scaled_linear_betas())
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X_T = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def eps(x, t):
    return 0.9 * torch.sin(x + 0.001 * float(t)) + 0.1 * x.flip(-1)


def theirs(scheduler, n, **own):
    """A sampling loop as diffusers' pipelines run it."""
    scheduler.set_timesteps(n)
    x = X_T * (scheduler.sigmas[0] if own.pop("scaled", False) else 1)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(scheduler.scale_model_input(x, t), t), t, x, **own).prev_sample
    return x


def ours(name, timesteps, **own):
    scaled = name in ("euler", "euler_ancestral", "heun", "lms")  # their x/√ᾱ starts as σ x_T
    x = X_T * (1 - SD.alpha_cumprod(timesteps[0]).item()) ** 0.5 if scaled else X_T
    *_, last = SAMPLERS[name](eps, x, SD, timesteps, **own)
    return last.x


def assert_same(actual, expected):
    # float32 rounding, multiplied by an ε that is not contracting: relative to outputs of up to 100
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def generator():
    return torch.Generator().manual_seed(7)


def draws():
    g = generator()
    return lambda x: torch.randn(x.shape, generator=g)


@pytest.mark.parametrize("n", [7, 10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(n, eta):
    scheduler = diffusers.DDIMScheduler(**CONFIG, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    assert_same(
        ours("ddim", SD.timesteps(n), eta=eta, noise=draws()), theirs(scheduler, n, eta=eta, generator=generator())
    )


@pytest.mark.parametrize("n", [8, 50, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(n, variance):
    scheduler = diffusers.DDPMScheduler(**CONFIG, clip_sample=False, variance_type=f"fixed_{variance}")
    timesteps = SD.timesteps(n, offset=0)
    assert_same(ours("ddpm", timesteps, variance=variance, noise=draws()), theirs(scheduler, n, generator=generator()))


@pytest.mark.parametrize("n", [10, 50])
def test_plms(n):
    scheduler = diffusers.PNDMScheduler(**CONFIG, skip_prk_steps=True, steps_offset=1)
    assert_same(ours("plms", SD.timesteps(n)), theirs(scheduler, n))


@pytest.mark.parametrize("n", [7, 30])
@pytest.mark.parametrize(
    ("name", "scheduler", "own"),
    [
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("lms", "LMSDiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_samplers_in_sigma(name, scheduler, own, n):
    if name == "lms":
        pytest.importorskip("scipy")
    scheduler = getattr(diffusers, scheduler)(**CONFIG, **own)
    scheduler.set_timesteps(n)
    timesteps = SD.t_from_sigma(torch.unique(scheduler.sigmas.double()).flip(0)[:-1])
    stochastic = {"generator": generator()} if name == "euler_ancestral" else {}
    expected = theirs(scheduler, n, scaled=True, **stochastic)
    assert_same(ours(name, timesteps, noise=draws()), expected)


@pytest.mark.parametrize("n", [7, 30])
def test_dpmpp_2m(n):
    scheduler = diffusers.DPMSolverMultistepScheduler(**CONFIG)
    scheduler.set_timesteps(n)
    assert_same(ours("dpmpp_2m", scheduler.timesteps.tolist()), theirs(scheduler, n))
