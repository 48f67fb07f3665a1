"""What theory says of the samplers, on distributions whose ε is known exactly. All in float64."""

import math

import pytest
import torch

from minisd.diffusion.gaussian import Chain, posterior
from minisd.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddim_invert,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    lms,
    plms,
)
from minisd.diffusion.samplers.ddim import ddim_invert_step, ddim_sigma, ddim_step
from minisd.diffusion.samplers.ddpm import ddpm_variance, posterior_mean
from minisd.diffusion.samplers.dpmpp_2m import dpmpp_step
from minisd.diffusion.samplers.euler import churn, euler_step
from minisd.diffusion.samplers.lms import lms_coefficients
from minisd.diffusion.samplers.plms import adams_bashforth
from minisd.diffusion.schedule import Schedule, scaled_linear_betas
from minisd.diffusion.spacing import karras_sigmas, polyexponential_sigmas

SD = Schedule(scaled_linear_betas())
TO_ONE = Schedule(scaled_linear_betas(), final_alpha_cumprod=1.0)
S = 0.5


def gaussian(x, t):
    """E[ε | x_t] for x_0 ~ N(0, S²)."""
    abar = SD.alpha_cumprod(t)
    return (1 - abar).sqrt() * x / (abar * S**2 + 1 - abar)


def two_points(share):
    """E[ε | x_t] where x_0 is 1 with probability `share`, and else -1."""

    def model(x, t):
        abar = SD.alpha_cumprod(t)
        x_0 = torch.tanh(abar.sqrt() * x / (1 - abar) + math.log(share / (1 - share)) / 2)
        return (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    return model


def wavy(x, t):
    return torch.sin(x + 0.001 * t) * 0.9


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def final(steps):
    *_, last = steps
    return last.x


# Distributions


@pytest.mark.parametrize(("n", "std"), [(10, 0.405), (50, 0.477), (250, 0.494)])
def test_ddim_recovers_a_gaussian(n, std):
    """ε is linear in x and DDIM deterministic, so the std of the samples is what becomes of x_T = 1."""
    x = final(ddim(gaussian, torch.ones(1, 1, 1, 1, dtype=torch.float64), TO_ONE, TO_ONE.timesteps(n, offset=1)))
    assert x.item() == pytest.approx(std, abs=6e-4)  # three digits are given


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("ddim", {}),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {}),
        ("dpmpp_2m", {}),
        ("euler", {}),
        ("euler", {"s_churn": 10.0, "s_tmax": 10.0}),
        ("euler_ancestral", {}),
        ("heun", {}),
        ("heun", {"s_churn": 10.0, "s_tmax": 10.0}),
        ("lms", {}),
        ("plms", {}),
    ],
)
def test_every_sampler_recovers_a_gaussian_and_two_points(name, own):
    """150 steps on Karras' ladder, 10,000 samples, whose own error is 0.7 % of a std and 0.005 of a share."""
    timesteps = TO_ONE.t_from_sigma(karras_sigmas(150, TO_ONE.sigmas[0].item(), TO_ONE.sigmas[-1].item()))

    def run(model, x_0):  # from the true distribution at t = 999, which is not quite N(0, I)
        x_T = TO_ONE.q_sample(x_0, timesteps[0].item(), normal(*x_0.shape))
        return final(SAMPLERS[name](model, x_T, TO_ONE, timesteps, noise=seeded(), **own))

    x_0 = normal(1, 1, 100, 100).flip(-1)
    assert run(gaussian, S * x_0).std().item() == pytest.approx(S, rel=0.05)
    points = run(two_points(0.3), (x_0 < x_0.quantile(0.3)).double() * 2 - 1)
    assert (points > 0).double().mean().item() == pytest.approx(0.3, abs=0.012)
    torch.testing.assert_close(points.abs(), torch.ones_like(points), rtol=0, atol=0.02)


# Order of convergence


def gaussian_ode(x, t_from, t_to):
    """The probability-flow ODE's exact solution: x keeps its quantile."""

    def std(t):
        return (SD.alpha_cumprod(t) * S**2 + 1 - SD.alpha_cumprod(t)).sqrt()

    return x * std(t_to) / std(t_from)


def ode_error(sampler, n, **own):
    """What n steps from σ_max to σ_min, evenly spaced in log σ, are off; the step to σ = 0 is left out."""
    ladder = SD.t_from_sigma(polyexponential_sigmas(n + 1, SD.sigmas[0].item(), SD.sigmas[-1].item()))
    *_, last, _ = sampler(gaussian, torch.ones(1, 1, 1, 1, dtype=torch.float64), SD, ladder, **own)
    return (last.x - gaussian_ode(1.0, ladder[0], ladder[-1])).abs().item()


def order(sampler, n, **own):
    return math.log2(ode_error(sampler, n, **own) / ode_error(sampler, 2 * n, **own))


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_ddim_and_euler_are_of_first_order(sampler):
    assert order(sampler, 100) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sampler", [heun, dpmpp_2m, plms])
def test_heun_dpmpp_2m_and_plms_are_of_second_order(sampler):
    assert order(sampler, 100) == pytest.approx(2, abs=0.15)


def test_lms_of_two_slopes_is_of_second_order():
    assert order(lms, 200, order=2) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("sampler", [heun, dpmpp_2m, lms, plms])
def test_higher_order_gets_ten_times_closer_than_ddim_in_as_many_steps(sampler):
    assert ode_error(sampler, 50) < ode_error(ddim, 50) / 10


# One sampler as another


def test_ddim_with_eta_1_is_ddpm():
    """Up to the convention for the last step: Stable Diffusion's ends at ᾱ[0], with noise, and DDPM's at 1, without."""
    x_T, timesteps = normal(2, 4, 3, 5), SD.timesteps(20)
    ancestral = list(ddpm(wavy, x_T, SD, timesteps, noise=seeded()))
    same = list(ddim(wavy, x_T, TO_ONE, timesteps, eta=1.0, noise=seeded()))
    sd = list(ddim(wavy, x_T, SD, timesteps, eta=1.0, noise=seeded()))
    for a, b, c in zip(ancestral, same, sd, strict=True):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-10)
        assert a.t_prev is None or torch.equal(b.x, c.x)
    assert not torch.allclose(sd[-1].x, same[-1].x, atol=1e-3)


def test_euler_is_ddim_that_ends_at_sigma_0():
    x_T, timesteps = normal(2, 4, 3, 5), SD.timesteps(20)
    torch.testing.assert_close(final(euler(wavy, x_T, SD, timesteps)), final(ddim(wavy, x_T, TO_ONE, timesteps)))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_euler_ancestral_is_ddim_of_the_same_eta_that_ends_at_sigma_0(eta):
    x_T, timesteps = normal(2, 4, 3, 5), SD.timesteps(20)
    ancestral = final(euler_ancestral(wavy, x_T, SD, timesteps, eta=eta, noise=seeded()))
    torch.testing.assert_close(ancestral, final(ddim(wavy, x_T, TO_ONE, timesteps, eta=eta, noise=seeded())))


def test_lms_of_one_slope_is_euler():
    x_T, timesteps = normal(2, 4, 3, 5), SD.timesteps(20)
    torch.testing.assert_close(final(lms(wavy, x_T, SD, timesteps, order=1)), final(euler(wavy, x_T, SD, timesteps)))


def test_heun_on_a_constant_slope_is_euler():
    x_T, timesteps, slope = normal(2, 4, 3, 5), SD.timesteps(20), normal(2, 4, 3, 5)

    def constant(x, t):
        return slope

    torch.testing.assert_close(final(heun(constant, x_T, SD, timesteps)), final(euler(constant, x_T, SD, timesteps)))


# Inversion


def inversion_error(n, **own):
    x, timesteps = normal(1, 1, 4, 4) * S, SD.timesteps(n)
    x_T = final(ddim_invert(gaussian, x, SD, timesteps, **own))
    return (final(ddim(gaussian, x_T, SD, timesteps)) - x).abs().max().item()


def test_inversion_and_ddim_are_a_round_trip_to_first_order():
    assert math.log2(inversion_error(100) / inversion_error(200)) == pytest.approx(1, abs=0.2)


def test_inversion_becomes_exact_as_its_iterations_are_added():
    assert inversion_error(20, iterations=1) > 0.01
    assert inversion_error(20, iterations=12) < 1e-6


def test_inversion_climbs_the_timesteps_that_ddim_descends():
    timesteps = SD.timesteps(4)
    steps = list(ddim_invert(gaussian, normal(1, 1, 2, 2), SD, timesteps))
    assert [(step.t, step.t_prev) for step in steps] == [(None, 1), (1, 251), (251, 501), (501, 751)]


# The bare formulas


def abars(*t):
    return [SD.alpha_cumprod(t) for t in t]


def test_one_step_formulas_of_one_first_order_step_agree():
    abar_t, abar_prev = abars(700, 400)
    x, eps = normal(1, 1, 4, 4), normal(1, 1, 4, 4).flip(-1)
    x_0 = (x - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    expected = ddim_step(x_0, eps, abar_prev)
    torch.testing.assert_close(euler_step(x, eps, abar_t, abar_prev), expected)
    torch.testing.assert_close(dpmpp_step(x, x_0, abar_t, abar_prev), expected)
    torch.testing.assert_close(ddim_invert_step(expected, eps, abar_t, abar_prev), x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_keeps_the_marginal_of_ddim_eq_7(eta):
    abar_t, abar_prev = abars(700, 400)
    sigma, ones = ddim_sigma(abar_t, abar_prev, eta), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zeros = 0 * ones
    mean = ddim_step(ones, zeros, abar_prev, sigma, zeros)
    variance = (
        ddim_step(zeros, ones, abar_prev, sigma, zeros) ** 2 + ddim_step(zeros, zeros, abar_prev, sigma, ones) ** 2
    )
    assert mean.item() == pytest.approx(abar_prev.sqrt().item())
    assert variance.item() == pytest.approx(1 - abar_prev.item())


def test_ddim_sigma_at_eta_1_is_the_posteriors():
    abar_t, abar_prev = abars(700, 400)
    torch.testing.assert_close(ddim_sigma(abar_t, abar_prev, 1.0) ** 2, ddpm_variance(abar_t, abar_prev, "small"))


def test_posterior_agrees_with_the_gaussian_chains():
    chain, x, x_0 = Chain(SD, [100, 400, 700]), normal(1, 1, 4, 4), normal(1, 1, 4, 4).flip(-1)
    abar_t, abar_prev = abars(700, 400)
    torch.testing.assert_close(posterior_mean(x, x_0, abar_t, abar_prev), posterior(x_0, x, 2, chain).mean)
    for variance in ("small", "large"):
        log_variance = ddpm_variance(abar_t, abar_prev, variance).log()
        torch.testing.assert_close(log_variance, chain.log_variances[variance][2])


def test_churn_raises_the_noise_to_sigma_hat_and_leaves_the_image():
    abar_t, ones = SD.alpha_cumprod(400), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    image, t_hat, abar_hat = churn(abar_t.sqrt() * ones, 0 * ones, abar_t, torch.tensor(0.25), SD)
    added, _, _ = churn(0 * ones, ones, abar_t, torch.tensor(0.25), SD)
    assert SD.sigma(t_hat).item() == pytest.approx(1.25 * SD.sigma(400).item())
    assert image.item() == pytest.approx(abar_hat.sqrt().item())
    kept = abar_hat / abar_t * (1 - abar_t)  # the variance of the noise that was there
    assert added.item() ** 2 + kept.item() == pytest.approx(1 - abar_hat.item())


def test_churn_above_the_largest_sigma_tells_the_model_the_last_time():
    asked = []
    next(euler(lambda x, t: asked.append(t) or x, normal(1, 1, 2, 2), SD, [999, 500], s_churn=1.0))
    assert asked == [999]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_coefficients_on_an_even_grid_are_adams_bashforth(order):
    sigmas = [torch.tensor(s, dtype=torch.float64) for s in (5.0, 6.0, 7.0, 8.0)[:order]]
    coefficients = lms_coefficients(sigmas, torch.tensor(4.0, dtype=torch.float64))
    unit = torch.eye(order, dtype=torch.float64)[:, :, None, None, None]  # adams_bashforth, too, shows its weights
    expected = [adams_bashforth(*(row[j : j + 1] for row in unit)).item() for j in range(order)]
    assert [-c.item() for c in coefficients] == pytest.approx(expected)
    assert sum(expected) == pytest.approx(1)
