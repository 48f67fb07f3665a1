import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from minisd.diffusion.prediction import Prediction, as_model, as_prediction, clipped
from minisd.diffusion.schedule import (
    Schedule,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from minisd.diffusion.spacing import karras_sigmas, polyexponential_sigmas, space_timesteps, timesteps

DATA = Path(__file__).parent / "data"
SD = Schedule(scaled_linear_betas())
TERMINAL = Schedule(zero_terminal_snr(scaled_linear_betas()))


def golden(name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(DATA / name)
    return {key: torch.from_numpy(arrays[key]) for key in arrays}


def images(b: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, b, 4, 5, 6, generator=generator)
    return x_0.to(dtype), noise.to(dtype)


# betas


def test_betas_are_those_of_the_original_latent_diffusion():
    ldm = golden("schedule_ldm.npz")
    # float64 against float64; 1e-10: cos near π/2 loses digits, differently in numpy and torch.
    assert_close(scaled_linear_betas(), ldm["out_betas_linear_1000"], rtol=1e-10, atol=0)
    assert_close(linear_betas(1000, 0.00085, 0.012), ldm["out_betas_sqrt_linear_1000"], rtol=1e-10, atol=0)
    assert_close(cosine_betas(), ldm["out_betas_cosine_1000"], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("betas", "abar_first", "abar_last", "sigma_max"),
    [
        (scaled_linear_betas(), 0.99915, 4.660099e-3, 14.614641),
        (linear_betas(), 0.9999, 4.035830e-5, 157.4073),
        (cosine_betas(), 0.99995872, 2.428767e-9, 20291.17),
    ],
)
def test_the_known_ends_of_each_schedule(betas, abar_first, abar_last, sigma_max):
    schedule = Schedule(betas)
    actual = [schedule.alphas_cumprod[0], schedule.alphas_cumprod[-1], schedule.sigmas[-1]]
    assert_close(torch.stack(actual), torch.tensor([abar_first, abar_last, sigma_max]).double(), rtol=1e-6, atol=0)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == torch.float64


def test_zero_terminal_snr_ends_at_0_and_keeps_the_first_step():
    assert TERMINAL.alphas_cumprod[-1] == 0 == TERMINAL.snr[-1]
    assert_close(TERMINAL.alphas_cumprod[0], SD.alphas_cumprod[0], rtol=1e-12, atol=0)
    # Lin et al. 2023, algorithm 1: √ᾱ is an affine function of the old one.
    old, new = SD.alphas_cumprod.sqrt(), TERMINAL.alphas_cumprod.sqrt()
    slope = new.diff() / old.diff()
    assert_close(slope, slope[:1].expand_as(slope), rtol=1e-9, atol=0)


def test_final_alpha_cumprod_is_abar_0_unless_named():
    assert SD.final_alpha_cumprod == SD.alphas_cumprod[0].item()
    assert Schedule(scaled_linear_betas(), final_alpha_cumprod=1.0).final_alpha_cumprod == 1.0


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0, 0.1], [0.1, 1.1], [0.1, float("nan")], [[0.1]]])
def test_betas_that_are_no_schedule_are_refused(betas):
    with pytest.raises(ValueError, match=r"beta"):
        Schedule(betas)


# q(x_t | x_0)


def test_q_sample_has_the_mean_and_variance_of_ddpm_eq_4():
    """Running Ho et al. 2020, eq. 2, step by step gives the closed form of eq. 4."""
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(SD.betas.tolist()):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        if t in (0, 1, 500, 999):
            one, zero = torch.ones(1, 1), torch.zeros(1, 1)
            assert_close(SD.q_sample(one, t, zero).item(), mean, rtol=1e-6, atol=0)
            assert_close(SD.q_sample(zero, t, one).item(), variance**0.5, rtol=1e-6, atol=0)


def test_one_t_for_the_batch_is_that_t_for_every_image():
    x_0, noise = images()
    each = SD.q_sample(x_0, torch.tensor([7, 7, 7]), noise)
    for t in (7, 7.0, torch.tensor(7), torch.tensor([7])):
        assert torch.equal(SD.q_sample(x_0, t, noise), each)


def test_a_t_of_another_batch_size_is_refused():
    x_0, noise = images(b=3)
    with pytest.raises(ValueError, match=r"\(2,\) for a batch of 3"):
        SD.q_sample(x_0, torch.tensor([1, 2]), noise)


def test_images_may_live_on_another_device_than_the_tables():
    x = torch.empty(3, 4, 5, 6, device="meta")
    for t in (7, torch.tensor([7, 8, 9])):
        assert SD.q_sample(x, t, x).device == SD.x_0_from_eps(x, t, x).device == x.device


@pytest.mark.parametrize("t", [-1, 1000, 999.5, float("nan"), torch.tensor([3, -2])])
def test_a_t_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match=r"not within the schedule's \[0, 999\]"):
        SD.alpha_cumprod(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_from_float32(dtype):
    x_0, noise = images(dtype=dtype)
    for t in (0, 500, 999):
        exact = SD.x_0_from_eps(x_0.float(), t, noise.float())
        assert torch.equal(SD.x_0_from_eps(x_0, t, noise), exact.to(dtype))


def test_float64_images_get_float64_coefficients():
    x_0, noise = images(dtype=torch.float64)
    abar = SD.alphas_cumprod[981]
    assert_close(SD.q_sample(x_0, 981, noise), abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, rtol=1e-15, atol=1e-15)


# x_0, ε and v


@given(t=st.floats(0, 999), seed=st.integers(0, 1000))
def test_x_0_eps_and_v_are_views_of_one_x_t(t, seed):
    x_0, eps = images(seed=seed, dtype=torch.float64)
    x_t, v = SD.q_sample(x_0, t, eps), SD.v_target(x_0, t, eps)
    for actual, expected in [
        (SD.x_0_from_eps(x_t, t, eps), x_0),
        (SD.x_0_from_v(x_t, t, v), x_0),
        (SD.eps_from_x_0(x_t, t, x_0), eps),
        (SD.eps_from_v(x_t, t, v), eps),
        (SD.v_from_eps(x_t, t, eps), v),
        (SD.v_from_x_0(x_t, t, x_0), v),
    ]:
        assert_close(actual, expected, rtol=0, atol=1e-11)  # float64, amplified by at most 1/√ᾱ = 15 and 1/√(1-ᾱ) = 34


def test_v_is_the_derivative_of_x_t_by_its_angle():
    """Salimans & Ho 2022, appendix D: x_t = cos(φ) x_0 + sin(φ) ε and v = dx/dφ."""
    x_0, eps = images(dtype=torch.float64)
    phi = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    schedule = Schedule([1 - phi.detach().cos() ** 2])
    _, derivative = torch.autograd.functional.jvp(lambda p: p.cos() * x_0 + p.sin() * eps, phi, torch.ones_like(phi))
    assert_close(schedule.v_target(x_0, 0, eps), derivative, rtol=1e-12, atol=1e-12)


def test_at_snr_0_v_and_x_0_are_well_defined_and_eps_is_refused():
    x_0, eps = images()
    x_t, v = TERMINAL.q_sample(x_0, 999, eps), TERMINAL.v_target(x_0, 999, eps)
    assert torch.equal(x_t, eps)
    assert torch.equal(v, -x_0)
    assert torch.equal(TERMINAL.x_0_from_v(x_t, 999, v), x_0)
    assert torch.equal(TERMINAL.eps_from_v(x_t, 999, v), eps)
    assert torch.equal(TERMINAL.eps_from_x_0(x_t, 999, x_0), eps)
    for conversion in (TERMINAL.x_0_from_eps, TERMINAL.v_from_eps):
        with pytest.raises(ValueError, match="signal-to-noise ratio at t = 999 is 0"):
            conversion(x_t, 999, eps)


def test_v_prediction_walks_the_path_of_the_official_v_sampler():
    """DDIM (eq. 12, η = 0) on an analytic model given as v, against Stability's sampler."""
    path = golden("schedule_ddim_v.npz")["out_sd_two_S10_eta0.0_x"]

    def network(x, t):
        abar = SD.alpha_cumprod(t)
        x = x.double()
        x_0 = torch.tanh(abar.sqrt() * x / (1 - abar))
        eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return SD.v_target(x_0, t, eps).float()

    steps, model, x = SD.timesteps(10), as_model(network, SD, "v"), path[0]
    for i, t in enumerate(steps):
        abar_prev = SD.alphas_cumprod[steps[i + 1]] if i < 9 else SD.final_alpha_cumprod
        seen = model(x, t)
        x = float(abar_prev) ** 0.5 * seen.x_0 + (1 - float(abar_prev)) ** 0.5 * seen.eps
        assert_close(x, path[i + 1], rtol=0, atol=1e-5)  # float32 in both, ten steps


# models


def test_a_bare_tensor_is_eps():
    x_0, eps = images()
    x_t = SD.q_sample(x_0, 300, eps)
    assert_close(as_prediction(eps, x_t, 300, SD).x_0, x_0, rtol=0, atol=1e-5)
    prediction = Prediction(eps, x_0)
    assert as_prediction(prediction, x_t, 300, SD) is prediction


def test_networks_that_predict_x_0_or_v_give_the_same_model():
    x_0, eps = images()
    x_t = SD.q_sample(x_0, 300, eps)
    for model in (as_model(lambda x, t: x_0, SD, "x_0"), as_model(lambda x, t: SD.v_target(x_0, t, eps), SD, "v")):
        assert_close(model(x_t, 300).x_0, x_0, rtol=0, atol=1e-5)
        assert_close(model(x_t, 300).eps, eps, rtol=0, atol=1e-5)


def test_clipping_keeps_x_0_and_eps_two_views_of_x_t():
    x_0, eps = images()
    x_t = SD.q_sample(3 * x_0, 600, eps)
    prediction = clipped(lambda x, t: eps, SD)(x_t, 600)
    assert prediction.x_0.abs().max() == 1
    assert_close(SD.q_sample(prediction.x_0, 600, prediction.eps), x_t, rtol=0, atol=1e-5)


# σ and t


def test_sigmas_and_their_inverse_are_those_of_k_diffusion():
    k = golden("schedule_kdiffusion.npz")
    # k-diffusion computes in float32: 1-ᾱ at the clean end carries 1e-5.
    assert_close(SD.sigmas.float(), k["out_sigmas"], rtol=2e-5, atol=0)
    assert_close(SD.sigma(k["t_query"]).float(), k["out_t_to_sigma"], rtol=2e-5, atol=0)
    assert_close(SD.t_from_sigma(k["sigma_query"]).float(), k["out_sigma_to_t"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("n", [10, 50])
def test_sigma_ladders_are_those_of_k_diffusion(n):
    k = golden("schedule_kdiffusion.npz")
    ends = SD.sigmas[0].item(), SD.sigmas[-1].item()
    for name, ladder, rtol in [
        ("get_sigmas", SD.sigma(torch.linspace(999, 0, n, dtype=torch.float64)), 2e-5),
        ("karras", karras_sigmas(n, *ends), 2e-5),
        ("exponential", polyexponential_sigmas(n, *ends), 2e-5),
        ("polyexp_rho1.3", polyexponential_sigmas(n, *ends, rho=1.3), 2e-5),
    ]:
        assert_close(ladder.float(), k[f"out_{name}_{n}"][:-1], rtol=rtol, atol=0, msg=lambda m, name=name: name + m)


@given(t=st.floats(0, 999))
@pytest.mark.parametrize("schedule", [SD, Schedule(linear_betas()), Schedule(cosine_betas())])
def test_t_from_sigma_inverts_sigma(schedule, t):
    assert abs(schedule.t_from_sigma(schedule.sigma(t)).item() - t) < 1e-6


@given(t=st.integers(0, 998), w=st.floats(0, 1))
def test_log_sigma_is_linear_between_neighbours_and_exact_on_them(t, w):
    low, high = SD.sigmas[t].log(), SD.sigmas[t + 1].log()
    assert_close(SD.sigma(t + w).log(), low + w * (high - low), rtol=0, atol=1e-9)
    assert SD.alpha_cumprod(t) == SD.alphas_cumprod[t] == SD.alpha_cumprod(float(t))


def test_zero_terminal_snr_spoils_no_other_t():
    t = torch.cat([torch.arange(1000).double(), torch.linspace(0, 998, 777, dtype=torch.float64)])
    assert TERMINAL.alpha_cumprod(t).isfinite().all()
    assert (TERMINAL.alpha_cumprod(t[t <= 998]) > 0).all()
    assert TERMINAL.alpha_cumprod(998.5) == 0  # halfway to infinitely much noise
    assert_close(TERMINAL.t_from_sigma(TERMINAL.sigma(t[t <= 998])), t[t <= 998], rtol=0, atol=1e-6)


def test_a_sigma_outside_the_schedule_is_refused():
    last = SD.t_from_sigma(SD.sigmas[-1] * (1 + 6e-8))  # the end of the range, as float32 may round it
    assert 999 - 1e-9 < last <= 999
    for sigma in (0.0, 0.02, 15.0, float("nan")):
        with pytest.raises(ValueError, match=r"not within the schedule's \[0\.0291672, 14\.6146\]"):
            SD.t_from_sigma(sigma)


# timesteps


@given(st.data(), st.sampled_from(["leading", "trailing", "linspace"]), st.integers(1, 1200), st.integers(0, 3))
def test_n_steps_are_n_distinct_falling_steps_of_the_schedule(data, kind, T, offset):
    n = data.draw(st.integers(1, T))
    steps = timesteps(T, n, kind, min(offset, T - 1))
    assert len(steps) == n
    assert all(a > b for a, b in pairwise(steps))
    assert 0 <= steps[-1] <= steps[0] < T


@pytest.mark.parametrize(
    ("kind", "ten"),
    [
        ("leading", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("compvis", [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]),
    ],
)
def test_ten_steps_of_a_thousand(kind, ten):
    assert SD.timesteps(10, kind) == ten


@pytest.mark.parametrize("n", [*range(2, 61), 96, 500])
def test_spacings_round_halves_as_the_numpy_formulas_of_diffusers(n):
    assert SD.timesteps(n, "linspace")[::-1] == np.linspace(0, 999, n).round().astype(int).tolist()
    assert SD.timesteps(n, "trailing") == (np.arange(1000, 0, -1000 / n).round().astype(int) - 1).tolist()


def test_the_offset_gives_way_where_it_would_leave_the_schedule():
    assert SD.timesteps(1000) == list(range(999, -1, -1))
    assert SD.timesteps(500)[0] == 999


@pytest.mark.parametrize("n", [10, 20, 30, 50, 100, 250])
def test_compvis_spacing_is_the_original_also_in_its_number_of_steps(n):
    assert SD.timesteps(n, "compvis")[::-1] == golden("schedule_ldm.npz")[f"out_ddim_uniform_{n}"].tolist()
    assert len(SD.timesteps(30, "compvis")) == 31


def test_compvis_quadratic_spacing_is_the_original():
    assert SD.timesteps(20, "compvis-quad")[::-1] == golden("schedule_ldm.npz")["out_ddim_quad_20"].tolist()


def test_599_counts_that_crash_the_original_are_refused_with_neighbours_that_run():
    refused = []
    for n in range(1, 1001):
        try:
            assert max(SD.timesteps(n, "compvis")) < 1000
        except ValueError:
            refused.append(n)
    assert len(refused) == 599
    assert {3, 9, 27, 36, 37, 101} <= set(refused)
    with pytest.raises(ValueError, match=r"cannot run 27 steps: .* use 25, 26, 28, 29 steps"):
        SD.timesteps(27, "compvis")


@pytest.mark.parametrize(("n", "kind"), [(0, "leading"), (1001, "trailing"), (10, "karras")])
def test_impossible_steps_are_refused(n, kind):
    with pytest.raises(ValueError, match=r"give 1 to 1000|known: leading, trailing, linspace, compvis"):
        SD.timesteps(n, kind)


@pytest.mark.parametrize("case", json.loads((DATA / "schedule_space_timesteps.json").read_text()).items())
def test_respacing_keeps_the_steps_openai_keeps(case):
    (T, counts), kept = case[0].split("|"), case[1]
    assert space_timesteps(int(T), json.loads(counts) if counts.startswith("[") else counts) == kept


@pytest.mark.parametrize("counts", ["1001", "ddim600", "10,600"])
def test_more_steps_than_a_section_has_are_refused(counts):
    with pytest.raises(ValueError, match=r"section of|no whole stride"):
        space_timesteps(1000, counts)
