"""Samplers against recorded runs of CompVis, Stability AI, k-diffusion, guided-diffusion and diffusers.

The recordings ran analytic models, not networks, in float32 with float64 models: "gauss" is exact for x_0 ~ N(0, I),
ε = √(1-ᾱ) x; "two" is exact for x_0 = ±1. Tolerance 1e-4 throughout, unless stated: float32 rounding, added up over
the steps, where the official implementations are up to 4e-5 apart.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minisd.diffusion.gaussian import Chain, from_network
from minisd.diffusion.prediction import as_model, as_prediction, clipped
from minisd.diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, euler, plms
from minisd.diffusion.samplers.ddim import ddim_step
from minisd.diffusion.schedule import (
    Schedule,
    cosine_betas,
    expand,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)

DATA = Path(__file__).parent / "data"


def stored(betas):
    """The schedule with ᾱ rounded to float32, as checkpoints hold it and CompVis' ddim and plms compute with it.

    Near the end of a cosine schedule "two" multiplies a rounding error by up to 1/(1-ᾱ) = 1e4 in each step.
    """
    abar = torch.cumprod(1 - betas, 0).float().double()
    return Schedule(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))


EXACT = {"sd": Schedule(scaled_linear_betas()), "cosine": Schedule(cosine_betas())}
STORED = {"sd": stored(scaled_linear_betas()), "cosine": stored(cosine_betas())}
SD = STORED["sd"]


def load(name):
    with np.load(DATA / f"samplers_{name}.npz") as file:
        return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in file.items()}


def analytic(kind, alpha_cumprod):
    """The exact ε of x_0 ~ N(0, I) or of x_0 = ±1, in float64; ε = x where ᾱ is 0."""

    def model(x, t):
        abar, x64 = expand(alpha_cumprod(t), x.double()), x.double()
        if kind == "gauss":
            return ((1 - abar).sqrt() * x64).to(x)
        x_0 = torch.tanh(abar.sqrt() * x64 / (1 - abar))
        return ((x64 - abar.sqrt() * x_0) / (1 - abar).sqrt()).to(x)

    return model


def replayed(noises):
    """A `noise` that gives the recorded draws in their order."""
    draws = iter(noises)
    return lambda x: next(draws).to(x)


def states(x, steps):
    return torch.stack([x, *(step.x for step in steps)])


def assert_same(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# CompVis and Stability AI


@pytest.mark.parametrize(
    "tag",
    [
        "sd_gauss_S10_eta0.0",
        "sd_gauss_S50_eta0.0",
        "sd_two_S10_eta1.0",
        "sd_two_S50_eta1.0",
        "sd_two_S30_eta0.0",
        "cosine_two_S10_eta0.0",
        "cosine_gauss_S50_eta1.0",
    ],
)
def test_ddim_is_compvis_ddim(tag):
    z = load("ddim_ldm")
    name, kind, n, eta = tag.split("_")
    schedule = STORED[name]
    timesteps = schedule.timesteps(int(n[1:]), "compvis")
    assert timesteps == z[f"timesteps_{tag}"].tolist()[::-1]
    model = analytic(kind, schedule.alpha_cumprod)
    steps = list(ddim(model, z["x_T"], schedule, timesteps, eta=float(eta[3:]), noise=replayed(z["noise"])))
    assert_same(states(z["x_T"], steps)[z[f"idx_{tag}"]], z[f"out_{tag}_x"])
    assert_same(steps[-1].x_0, z[f"out_{tag}_pred_x0_last"])


def guided_two(guidance_scale, cond):
    """CompVis' guidance of ε_two + 0.05 c sin(2x + 1), with c = 0 the unconditional."""
    two = analytic("two", SD.alpha_cumprod)
    return lambda x, t: (
        two(x, t) + guidance_scale * 0.05 * torch.tensor(cond)[:, None, None, None] * torch.sin(2 * x + 1)
    )


def test_ddim_is_compvis_ddim_on_a_guided_model_with_a_condition_per_image():
    z = load("ddim_ldm_extra")
    steps = ddim(guided_two(7.5, [1.0, -2.0]), z["x_T"], SD, SD.timesteps(10))
    assert_same(states(z["x_T"], steps), z["out_cfg"])


def test_blending_between_steps_is_compvis_inpainting():
    z = load("ddim_ldm_extra")
    noise, keep, timesteps = iter(z["noise"][::2]), z["mask"].bool(), SD.timesteps(10)

    def known(t):
        return SD.q_sample(z["x0"], t, next(noise))

    x_T = torch.where(keep, known(timesteps[0]), z["x_T"])
    trajectory = [z["x_T"]]
    for step in ddim(analytic("two", SD.alpha_cumprod), x_T, SD, timesteps):
        trajectory.append(step.x.clone())
        if step.t_prev is not None:  # the original leaves the last step as it is
            step.x.copy_(torch.where(keep, known(step.t_prev), step.x))
    assert_same(torch.stack(trajectory), z["out_mask"])


def test_ddim_is_compvis_img2img():
    z = load("ddim_ldm_extra")
    timesteps, t_enc = SD.timesteps(50), 37
    encoded = SD.q_sample(z["x0"], timesteps[-1 - t_enc], z["noise"][0])  # one above the first step that is run
    assert_same(encoded, z["out_img2img_encoded"])
    *_, last = ddim(analytic("two", SD.alpha_cumprod), encoded, SD, timesteps[-t_enc:])
    assert_same(last.x, z["out_img2img_decoded"])


@pytest.mark.parametrize("tag", ["sd_two_S10_eta0.0", "sd_gauss_S50_eta1.0"])
def test_ddim_is_stability_ddim_on_a_v_model(tag):
    z = load("ddim_v")
    _, kind, n, eta = tag.split("_")
    eps = analytic(kind, SD.alpha_cumprod)
    model = as_model(lambda x, t: SD.v_from_eps(x, t, eps(x, t)), SD, "v")
    timesteps = SD.timesteps(int(n[1:]))
    steps = ddim(model, z["x_T"], SD, timesteps, eta=float(eta[3:]), noise=replayed(z["noise"]))
    assert_same(states(z["x_T"], steps)[z[f"idx_{tag}"]], z[f"out_{tag}_x"])


def test_ddim_inversion_is_stability_encode():
    z = load("ddim_v")
    model, index = analytic("gauss", SD.alpha_cumprod), iter(range(10))
    # The recorded version gave its model the loop's index for the time; later ones give it the timestep, as ours does.
    *_, last = ddim_invert(lambda x, t: model(x, next(index)), z["x0"], SD, SD.timesteps(20)[-10:])
    assert_same(last.x, z["out_inversion_10of20"])


@pytest.mark.parametrize("tag", ["sd_gauss_S10", "sd_two_S50", "cosine_two_S10"])
def test_plms_is_compvis_plms(tag):
    z = load("plms_ldm")
    name, kind, n = tag.split("_")
    schedule = STORED[name]
    steps = plms(analytic(kind, schedule.alpha_cumprod), z["x_T"], schedule, schedule.timesteps(int(n[1:])))
    assert_same(states(z["x_T"], steps)[z[f"idx_{tag}"]], z[f"out_{tag}_x"])


def test_plms_is_compvis_plms_on_a_guided_model():
    z = load("plms_ldm")
    *_, last = plms(guided_two(7.5, [1.0, -2.0]), z["x_T"], SD, SD.timesteps(20))
    assert_same(last.x, z["out_cfg_S20"])


@pytest.mark.parametrize("tag", ["sd_two", "cosine_gauss"])
def test_ddpm_is_compvis_ancestral_sampling_over_a_thousand_steps(tag):
    z = load("ddpm_ldm")
    name, kind = tag.split("_")
    schedule, key = EXACT[name], f"input:public:sampler_ddpm_ldm:noise_{tag}"  # posterior buffers: from float64 betas
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal((1000, 1, 4, 4, 6), dtype=np.float32)
    model = analytic(kind, STORED[name].alpha_cumprod)
    steps = ddpm(model, z["x_T"], schedule, schedule.timesteps(1000), noise=replayed(torch.from_numpy(noise)))
    assert_same(states(z["x_T"], steps)[z["idx"]], z[f"out_{tag}_x"])


# guided-diffusion


@pytest.mark.parametrize("tag", ["cosine_ddim25", "linear_50", "cosine_10-10-5"])
@pytest.mark.parametrize("loop", ["p_loop", "ddim_eta0.0", "ddim_eta1.0"])
def test_loops_on_a_respaced_chain_are_guided_diffusions(tag, loop):
    z = load("guided_loops")
    schedule = Schedule(cosine_betas() if tag.startswith("cosine") else linear_betas(), final_alpha_cumprod=1.0)
    timesteps, noise = z[f"out_{tag}_timestep_map"].tolist()[::-1], replayed(z[f"noise_{tag}"])
    eps = analytic("gauss", schedule.alpha_cumprod)

    def network(x, t):
        return torch.cat([eps(x, t), torch.sin(3 * x)], dim=1)

    model = from_network(network, Chain(schedule, timesteps), variance="learned_range")
    if loop == "p_loop":
        steps = list(ddpm(clipped(model, schedule), z["x_T"], schedule, timesteps, noise=noise))
    else:  # recorded without clipping
        steps = list(ddim(model, z["x_T"], schedule, timesteps, eta=float(loop[-3:]), noise=noise))
    actual = torch.stack([step.x for step in [*steps[:: len(steps) // 5], steps[-1]]])
    # At ᾱ = 2e-9 and eta = 1 the original's 1 - ᾱ_prev - σ² cancels in float32, and costs it 7e-5; ours is in float64.
    atol = 1e-4 if (tag, loop) == ("cosine_10-10-5", "ddim_eta1.0") else 1e-5
    torch.testing.assert_close(actual, z[f"out_{tag}_{loop}"], rtol=1e-5, atol=atol)


# k-diffusion


@pytest.mark.parametrize("case", ["gauss_karras", "two_karras", "two_discrete"])
@pytest.mark.parametrize("tag", ["euler", "euler_churn", "euler_ancestral", "heun", "heun_churn", "dpmpp_2m", "lms"])
def test_sigma_samplers_are_k_diffusions(tag, case):
    z = load("kdiffusion")
    kind, ladder = case.split("_")
    # One more step, at σ = 25, gives the churned σ above Stable Diffusion's largest, 14.6, a time of their own.
    last = EXACT["sd"].alphas_cumprod[-1:]
    schedule = Schedule(torch.cat([EXACT["sd"].betas, 1 - 1 / (1 + 25.0**2) / last]))
    timesteps = schedule.t_from_sigma(z[f"sigmas_{ladder}"][:-1])
    exact, seen = analytic(kind, schedule.alpha_cumprod), []

    def model(x, t):
        seen.append(x / schedule.alpha_cumprod(t).sqrt().item())
        return exact(x, t)

    churn = dict(s_churn=4, s_tmin=0.05, s_tmax=50, s_noise=1.003) if tag.endswith("churn") else {}
    sampler = SAMPLERS[tag.removesuffix("_churn")]
    x_T = z["x_T_unit"] / (1 + z[f"sigmas_{ladder}"][0] ** -2) ** 0.5
    *_, last = sampler(model, x_T, schedule, timesteps, noise=replayed(z["noise"]), **churn)
    # Recorded: x/√ᾱ as it goes into steps 3, 6 and 9 (churned), and the result. heun asks twice in all but the last.
    calls = [6, 12, 18] if tag.startswith("heun") else [3, 6, 9]
    assert_same(torch.stack([*(seen[i] for i in calls), last.x]), z[f"out_{tag}_{case}"])


# diffusers

with np.load(DATA / "samplers_diffusers.npz") as file:
    RUNS = json.loads(file["runs"].item())
OURS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "PNDMScheduler": "plms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
BETAS = {"scaled_linear": scaled_linear_betas, "linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def diffusers_schedule(scheduler, config):
    betas = BETAS[config["beta_schedule"]]()
    if config.get("rescale_betas_zero_snr"):
        betas = zero_terminal_snr(betas)
    to_one = config.get("set_alpha_to_one", scheduler != "PNDMScheduler")
    return Schedule(betas, final_alpha_cumprod=1.0 if to_one else None)


def diffusers_model(run, schedule, round_t=False):
    """The recording's model. Between integer times diffusers' runs took log ᾱ, not log σ, to be linear."""
    log_abar = schedule.alphas_cumprod.log().numpy()
    exact = analytic(run["model"], lambda t: torch.tensor(np.exp(np.interp(t, np.arange(1000), log_abar))))
    eps = (lambda x, t: exact(x, round(t))) if round_t else exact
    kind = run["config"].get("prediction_type", "epsilon")
    if kind == "v_prediction":

        def abar(t):
            return schedule.alpha_cumprod(t).item()

        def x_0(x, t):
            return (x - (1 - abar(t)) ** 0.5 * eps(x, t)) / abar(t) ** 0.5 if abar(t) else 0 * x

        model = as_model(lambda x, t: abar(t) ** 0.5 * eps(x, t) - (1 - abar(t)) ** 0.5 * x_0(x, t), schedule, "v")
    elif kind == "sample":
        model = as_model(lambda x, t: schedule.x_0_from_eps(x, t, eps(x, t)), schedule, "x_0")
    else:
        model = eps
    if not run["config"].get("clip_sample", False):
        return model

    def clip(x, t):  # ε stays what it was: use_clipped_model_output is False
        prediction = as_prediction(model(x, t), x, t, schedule)
        return replace(prediction, x_0=prediction.x_0.clamp(-1, 1))

    return clip


@pytest.mark.parametrize("tag", [tag for tag in RUNS if tag != "ddim_linspace_10"])
def test_samplers_are_diffusers_schedulers(tag):
    z, run = load("diffusers"), RUNS[tag]
    name, config = OURS[run["scheduler"]], run["config"]
    schedule = diffusers_schedule(run["scheduler"], config)
    timesteps = sorted({int(t) for t in z[f"timesteps_{tag}"]}, reverse=True)  # a second call of a step is listed there
    ladder = bool(config.get("use_karras_sigmas") or config.get("use_lu_lambdas"))
    if ladder:
        timesteps = schedule.t_from_sigma(torch.unique(z[f"sigmas_{tag}"]).flip(0)[:-1]).tolist()
    # DPM-Solver++ asks the model at the integer next to the ladder's σ; the other schedulers at the fractional time.
    model = diffusers_model(run, schedule, round_t=ladder and name == "dpmpp_2m")
    sampler = euler if config.get("solver_order") == 1 else SAMPLERS[name]
    own = {"eta": 1.0} if tag.endswith("eta1") else {}
    if config.get("variance_type") == "fixed_large":
        own = {"variance": "large"}

    scaled = name in ("euler", "euler_ancestral", "heun", "lms")  # these schedulers hold x/√ᾱ
    x_T = (
        z["x_T_unit"] * run["init_noise_sigma"] * (schedule.alpha_cumprod(timesteps[0]).item() ** 0.5 if scaled else 1)
    )
    steps = list(sampler(model, x_T, schedule, timesteps, noise=replayed(z["noise"]), **own))
    assert len(steps) == run["steps"]
    compared = 0
    for calls, expected in zip(z[f"idx_{tag}"].tolist(), z[f"out_{tag}"], strict=True):
        # plms calls its scheduler twice in the first step, heun in all but the last: states between are no Steps.
        done = {"plms": calls - 1, "heun": len(steps) if calls == 19 else calls / 2}.get(name, calls)
        if done < 1 or done % 1:
            continue
        step = steps[int(done) - 1]
        abar = 1.0 if step.t_prev is None or not scaled else schedule.alpha_cumprod(step.t_prev).item()
        assert_same(step.x / abar**0.5 if scaled else step.x, expected)
        compared += 1
    assert compared >= 3


def test_the_bare_formula_repeats_diffusers_ddim_and_its_fixed_stride():
    """diffusers steps to t - ⌊T/n⌋, not to the next time of the list: on linspace times the two differ by 9e-4."""
    z, run = load("diffusers"), RUNS["ddim_linspace_10"]
    model, x, trajectory, schedule = diffusers_model(run, SD), z["x_T_unit"], [z["x_T_unit"]], EXACT["sd"]
    for t in z["timesteps_ddim_linspace_10"].int().tolist():
        prediction = as_prediction(model(x, t), x, t, schedule)
        x = ddim_step(prediction.x_0, prediction.eps, schedule.alpha_cumprod(max(t - 100, 0)))
        trajectory.append(x)
    assert_same(torch.stack(trajectory)[z["idx_ddim_linspace_10"]], z["out_ddim_linspace_10"])
