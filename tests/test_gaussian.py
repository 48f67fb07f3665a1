"""gaussian.py and losses.py against the equations of Ho et al. 2020 ("Ho") and Nichol & Dhariwal 2021 ("ND"), and
against numbers of OpenAI's improved-diffusion."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from minisd.diffusion.gaussian import (
    Chain,
    Gaussian,
    from_network,
    learned_range,
    p_mean_variance,
    per_image,
    posterior,
    read,
    x_0_from_mean,
)
from minisd.diffusion.prediction import Prediction, clipped
from minisd.diffusion.samplers import ddpm
from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas
from minisd.diffusion.spacing import space_timesteps
from minisd.training.improved_ddpm import (
    LossSecondMoment,
    bits_per_dim,
    discretized_log_likelihood,
    hybrid_loss,
    kl,
    prior_term,
    standard_normal_cdf,
    training_target,
    variational_bound,
    vlb_loss,
    vlb_term,
)

DATA = Path(__file__).parent / "data"
CHAINS = {"linear": Chain(Schedule(linear_betas())), "cosine": Chain(Schedule(cosine_betas()))}
PREDICTS = {"EPSILON": "eps", "START_X": "x_0", "PREVIOUS_X": "previous_x"}
LINEAR = CHAINS["linear"]


def golden(name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(DATA / name)
    return {key: torch.from_numpy(arrays[key]) for key in arrays}


def assert_like_openai(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-5 of each image's largest number: float32 in both, and x_0 at ᾱ = 1e-9 is a difference of large numbers."""
    actual, expected = actual.expand_as(expected).flatten(1), expected.flatten(1)
    scale = expected.abs().amax(dim=1, keepdim=True)
    assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)


PQ = golden("gaussian_pq.npz")
X_0, X_T, STEP, NOISE, OUTPUT = (PQ[key] for key in ("x_start", "x_t", "t", "noise", "model_output"))


# The chain


@pytest.mark.parametrize("T", [1000, 250])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_tables_are_openais(kind, T):
    tables = golden("gaussian_schedules.npz")
    at = tables[f"at_{T}"]
    betas = linear_betas(T, 1e-4 * 1000 / T, 0.02 * 1000 / T) if kind == "linear" else cosine_betas(T)
    chain = Chain(Schedule(betas))
    abar, prev = chain.alphas_cumprod, chain.alphas_cumprod_prev
    for name, table in {
        "betas": chain.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "posterior_variance": chain.posterior_variances,
        "posterior_log_variance_clipped": chain.log_variances["small"],
        "posterior_mean_coef1": prev.sqrt() * chain.betas / (1 - abar),
        "posterior_mean_coef2": (1 - chain.betas).sqrt() * (1 - prev) / (1 - abar),
    }.items():
        # float64 in both; betas come back from ᾱ, which costs the digits of 1 - β.
        assert_close(table[at], tables[f"out_{kind}{T}_{name}"], rtol=1e-10, atol=0)


def test_nd_eq_19_respaced_betas_compose_to_the_same_alphas_cumprod():
    chain = Chain(LINEAR.schedule, [999, 3, 500, 20])
    assert chain.timesteps.tolist() == [3, 20, 500, 999]
    assert_close((1 - chain.betas).cumprod(0), LINEAR.alphas_cumprod[[3, 20, 500, 999]], rtol=1e-12, atol=0)
    assert chain.alphas_cumprod_prev[0] == 1


def test_a_chain_finds_its_steps_by_their_time():
    chain = Chain(LINEAR.schedule, [3, 20, 500])
    assert chain.index(20) == 1
    assert chain.t(2) == 500
    assert chain.index(chain.t(torch.tensor([2, 0]))).tolist() == [2, 0]
    ladder = Chain(LINEAR.schedule, LINEAR.schedule.t_from_sigma(torch.tensor([80.0, 3.3, 0.1])).tolist())
    assert [ladder.index(ladder.t(i)) for i in range(3)] == [0, 1, 2]
    for t in (4, 4.5, 20.1, 600, torch.tensor([3, 21])):
        with pytest.raises(ValueError, match="not a step of this chain of 3"):
            chain.index(t)


@pytest.mark.parametrize("times", [[], [5, 5], [1, 1000]])
def test_a_chain_of_no_steps_or_repeated_or_unknown_ones_is_refused(times):
    with pytest.raises(ValueError, match=r"distinct times|not within the schedule"):
        Chain(LINEAR.schedule, times)


# q and p


def test_ho_eq_7_the_posterior_is_bayes_rule():
    """q(x_{t-1}|x_t,x_0) ∝ q(x_t|x_{t-1}) q(x_{t-1}|x_0): precisions add, means weigh by precision."""
    chain, i = Chain(LINEAR.schedule, [10, 300, 700]), 2
    x_0, x_t = X_0.double(), X_T.double()
    alpha, beta, prev = 1 - chain.betas[i], chain.betas[i], chain.alphas_cumprod_prev[i]
    precision = alpha / beta + 1 / (1 - prev)
    mean = (alpha.sqrt() * x_t / beta + prev.sqrt() * x_0 / (1 - prev)) / precision
    q = posterior(x_0, x_t, i, chain)
    assert_close(q.mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(q.log_variance.squeeze(), -precision.log(), rtol=1e-12, atol=0)


def test_ho_eq_7_solved_for_x_0():
    q = posterior(X_0.double(), X_T.double(), STEP, LINEAR)
    assert_close(x_0_from_mean(q.mean, X_T.double(), STEP, LINEAR), X_0.double(), rtol=0, atol=1e-8)


def test_ho_eq_11_the_mean_in_terms_of_eps():
    """μ = (x_t - β/√(1-ᾱ) ε)/√α."""
    for i in (1, 500, 999):
        beta, abar = LINEAR.betas[i], LINEAR.alphas_cumprod[i]
        x_t, eps = X_T.double(), NOISE.double()
        mean = p_mean_variance(read(eps, x_t, i, LINEAR), x_t, i, LINEAR).mean
        assert_close(mean, (x_t - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt(), rtol=0, atol=1e-10)


def test_nd_eq_15_learned_range_reaches_from_beta_tilde_to_beta():
    o = torch.ones(4, 3, 6, 5, dtype=torch.float64)
    low, high = (LINEAR.log_variances["small"][STEP], LINEAR.betas[STEP].log())
    for v, expected in [(-1, low), (1, high), (0, (low + high) / 2), (3, 2 * high - low)]:
        assert_close(learned_range(v * o, STEP, LINEAR)[:, 0, 0, 0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_q_is_openais(kind):
    chain = CHAINS[kind]
    assert_like_openai(chain.q_sample(X_0, STEP, NOISE), PQ[f"out_{kind}_q_sample"])
    q = posterior(X_0, X_T, STEP, chain)
    assert_like_openai(q.mean, PQ[f"out_{kind}_post_mean"])
    assert_like_openai(q.log_variance, PQ[f"out_{kind}_post_logvar"])


@pytest.mark.parametrize("clip", ["clip", "noclip"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("predicts", PREDICTS)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_p_is_openais(kind, predicts, variance, clip):
    chain, tag = CHAINS[kind], f"out_{kind}_{predicts}_{variance}_{clip}"
    learned = variance.lower() if variance.startswith("LEARNED") else None
    output = OUTPUT if learned else OUTPUT[:, :3]
    model = from_network(lambda x, t: output, chain, predicts=PREDICTS[predicts], variance=learned)
    prediction = (clipped(model, chain.schedule) if clip == "clip" else model)(X_T, STEP)
    fixed = "large" if variance == "FIXED_LARGE" else "small"
    p = p_mean_variance(prediction, X_T, STEP, chain, variance=fixed)
    assert_like_openai(p.mean, PQ[f"{tag}_mean"])
    if f"{tag}_logvar" in PQ:
        assert_like_openai(p.log_variance, PQ[f"{tag}_logvar"])
    if f"{tag}_xstart" in PQ:
        assert_like_openai(prediction.x_0, PQ[f"{tag}_xstart"])


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_draw_from_p_is_openais(kind, clip):
    chain = CHAINS[kind]
    model = from_network(lambda x, t: OUTPUT, chain, variance="learned_range")
    prediction = (clipped(model, chain.schedule) if clip else model)(X_T, STEP)
    p = p_mean_variance(prediction, X_T, STEP, chain)
    drawn = p.mean + (STEP > 0)[:, None, None, None] * (p.log_variance / 2).exp() * NOISE
    assert_like_openai(drawn, PQ[f"out_{kind}_psample_{clip}"])


def test_a_network_may_predict_v():
    x_t, v = X_T.double(), NOISE.double()
    prediction = read(v, x_t, STEP, LINEAR, predicts="v")
    assert_close(LINEAR.q_sample(prediction.x_0, STEP, prediction.eps), x_t, rtol=0, atol=1e-12)
    assert_close(LINEAR.schedule.v_target(prediction.x_0, STEP, prediction.eps), v, rtol=0, atol=1e-12)


def test_unknown_kinds_of_networks_are_refused():
    with pytest.raises(ValueError, match="gave 6 channels; with variance None it is 3"):
        read(OUTPUT, X_T, STEP, LINEAR)
    with pytest.raises(ValueError, match="cannot predict 'epsilon'; known: eps, x_0, v, previous_x"):
        read(NOISE, X_T, STEP, LINEAR, predicts="epsilon")
    with pytest.raises(ValueError, match="cannot predict 'epsilon'"):
        training_target(X_0, X_T, STEP, LINEAR, NOISE, predicts="epsilon")
    with pytest.raises(ValueError, match="unknown fixed variance 'medium'; known: small, large"):
        p_mean_variance(read(NOISE, X_T, STEP, LINEAR), X_T, STEP, LINEAR, variance="medium")


# The bound


def test_kl_is_the_divergence_of_normals():
    mean, log_variance = NOISE.double(), X_T.double()
    q, p = Gaussian(mean, log_variance), Gaussian(X_0.double(), -log_variance)
    expected = kl_divergence(*(Normal(g.mean, (g.log_variance / 2).exp()) for g in (q, p)))
    assert_close(kl(q, p), expected, rtol=1e-12, atol=1e-12)
    actual = kl(Gaussian(PQ["dg_means"], PQ["dg_log_scales"]), Gaussian(PQ["dg_x"], -PQ["dg_log_scales"]))
    assert_like_openai(actual, PQ["out_normal_kl"])


def test_the_normal_cdf_is_openais_and_right_to_3e_4():
    assert_like_openai(standard_normal_cdf(PQ["dg_means"]), PQ["out_approx_cdf"])
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    assert (standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 3e-4


def test_ho_eq_13_the_decoder_is_a_distribution_over_256_levels():
    levels = torch.arange(256).double() / 127.5 - 1
    for mean, std in [(0.0, 0.3), (0.98, 0.1), (-1.0, 0.01), (3.0, 0.5)]:
        p = Gaussian(torch.full((256,), mean).double(), torch.tensor(2 * math.log(std)).double())
        log_p = discretized_log_likelihood(levels, p)
        assert_close(log_p.exp().sum().item(), 1.0, rtol=0, atol=1e-9)


def test_ho_eq_13_is_openais():
    p = Gaussian(PQ["dg_means"], 2 * PQ["dg_log_scales"])
    assert_like_openai(discretized_log_likelihood(PQ["dg_x"], p), PQ["out_discretized_gaussian_ll"])


@pytest.mark.parametrize(
    ("tag", "predicts", "learned", "fixed"),
    [
        ("EPSILON_LEARNED_RANGE", "eps", "learned_range", "small"),
        ("START_X_FIXED_SMALL", "x_0", None, "small"),
        ("EPSILON_FIXED_LARGE", "eps", None, "large"),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ho_eq_5_each_term_is_openais(kind, tag, predicts, learned, fixed):
    chain = CHAINS[kind]
    output = OUTPUT if learned else OUTPUT[:, :3]
    network = from_network(lambda x, t: output, chain, predicts=predicts, variance=learned)
    prediction = clipped(network, chain.schedule)(X_T, STEP)
    vlb = vlb_term(prediction, X_0, X_T, STEP, chain, variance=fixed)
    # Below 1e-3 bits a term is a difference of numbers near 1, in float32.
    assert_close(vlb, PQ[f"out_{kind}_{tag}_vb_bpd"], rtol=1e-5, atol=1e-8)
    assert_close(prior_term(X_0, chain), PQ[f"out_{kind}_prior_bpd"], rtol=1e-5, atol=0)


def test_ho_eq_5_a_model_that_knows_x_0_pays_only_for_the_decoder():
    prediction = Prediction(LINEAR.schedule.eps_from_x_0(X_T, 500, X_0), X_0)
    assert_close(vlb_term(prediction, X_0, X_T, 500, LINEAR), torch.zeros(4), rtol=0, atol=1e-7)
    decoder = -discretized_log_likelihood(X_0, p_mean_variance(prediction, X_T, 0, LINEAR))
    assert_close(vlb_term(prediction, X_0, X_T, 0, LINEAR), bits_per_dim(decoder), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tag", ["linear_50", "cosine_10-10-5"])
def test_the_bound_of_a_respaced_chain_is_openais(tag):
    """The network is asked at the original times, its learned range spans the betas of the jumps."""
    loops = golden("gaussian_loops.npz")
    kind, counts = tag.split("_")
    schedule = CHAINS[kind].schedule
    chain = Chain(schedule, space_timesteps(1000, counts.replace("-", ",")))
    assert chain.timesteps.tolist() == loops[f"out_{tag}_timestep_map"].tolist()
    assert_close(chain.betas, loops[f"out_{tag}_betas"], rtol=1e-10, atol=0)

    def network(x, t):
        return torch.cat([x * (1 - schedule.alpha_cumprod(t)).sqrt().float(), torch.sin(3 * x)], dim=1)

    model = clipped(from_network(network, chain, variance="learned_range"), schedule)
    noise = iter(loops[f"noise_{tag}"])
    bound = variational_bound(model, (0.4 * loops["x_T"]).clamp(-1, 1), chain, noise=lambda x: next(noise))
    assert_close(bound.total, loops[f"out_{tag}_bpd_total_bpd"], rtol=1e-5, atol=0)
    assert_close(bound.prior, loops[f"out_{tag}_bpd_prior_bpd"], rtol=1e-5, atol=0)
    for actual, name in [(bound.vlb, "vb"), (bound.x_0_mse, "xstart_mse"), (bound.eps_mse, "mse")]:
        # OpenAI's columns run from noise to image; terms of 1e-3 bits are differences of numbers near 1 in float32.
        assert_close(actual.flip(1), loops[f"out_{tag}_bpd_{name}"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("tag", ["linear_50", "cosine_10-10-5"])
def test_ho_algorithm_2_with_learned_variances_walks_openais_path(tag):
    loops = golden("gaussian_loops.npz")
    kind, counts = tag.split("_")
    schedule = CHAINS[kind].schedule
    chain = Chain(schedule, space_timesteps(1000, counts.replace("-", ",")))

    def network(x, t):
        return torch.cat([x * (1 - schedule.alpha_cumprod(t)).sqrt().float(), torch.sin(3 * x)], dim=1)

    model, x, path = clipped(from_network(network, chain, variance="learned_range"), schedule), loops["x_T"], []
    for i, noise in zip(reversed(range(len(chain))), loops[f"noise_{tag}"], strict=True):
        p = p_mean_variance(model(x, chain.t(i)), x, i, chain)
        x = p.mean + (p.log_variance / 2).exp() * noise if i > 0 else p.mean
        path.append(x)
    kept = [*path[:: len(chain) // 5], path[-1]]
    expected = loops[f"out_{tag}_p_loop"]
    assert_close(torch.stack(kept), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("variance", ["small", "large", None])
def test_the_ddpm_sampler_draws_from_this_p(variance):
    """The sampler has the formulas of a step of its own; they are these."""
    chain = Chain(LINEAR.schedule, LINEAR.schedule.timesteps(7))
    network = lambda x, t: torch.cat([x.sin(), x.cos()], dim=1)[:, : 6 if variance is None else 3]  # noqa: E731
    model = clipped(
        from_network(network, chain, variance="learned_range" if variance is None else None), chain.schedule
    )
    noise = torch.randn(7, *X_T.shape, generator=torch.Generator().manual_seed(0)).double()
    draws, x = iter(noise), X_T.double()
    steps = ddpm(
        model,
        x,
        chain.schedule,
        LINEAR.schedule.timesteps(7),
        variance=variance or "small",
        noise=lambda x: next(draws),
    )
    for i, step, eps in zip(reversed(range(7)), steps, noise, strict=True):
        p = p_mean_variance(model(x, chain.t(i)), x, i, chain, variance=variance or "small")
        x = p.mean + (p.log_variance / 2).exp() * eps if i else p.mean
        assert_close(step.x, x, rtol=0, atol=1e-12)


def test_the_bound_of_an_ideal_model_meets_the_likelihood_of_its_data():
    """For 8-bit data from N(0, s²) the optimal p(x_{t-1}|x_t) is known, and so is -log₂ p(x_0) itself."""
    s, chain = 0.25, Chain(LINEAR.schedule, range(0, 1000, 10))
    x_0 = (s * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0)).double()).clamp(-1, 1)
    x_0 = (x_0 * 127.5 + 127.5).round() / 127.5 - 1

    def model(x, t):
        i = chain.index(t)
        abar, small = chain.alphas_cumprod[i], chain.log_variances["small"][i].exp()
        gain = abar.sqrt() * s**2 / (abar * s**2 + 1 - abar)  # E[x_0 | x_t] = gain · x_t
        prev, beta = chain.alphas_cumprod_prev[i], chain.betas[i]
        weight, spread = prev.sqrt() * beta / (1 - abar), s**2 * (1 - abar) / (abar * s**2 + 1 - abar)
        variance = (small if i else 0.0) + weight**2 * spread
        return Prediction((x - abar.sqrt() * gain * x) / (1 - abar).sqrt(), gain * x, variance.log().expand_as(x))

    generator = torch.Generator().manual_seed(1)
    draw = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    bound = variational_bound(model, x_0, chain, noise=draw).total.mean().item()
    exact = -(Normal(0.0, s).log_prob(x_0) - math.log(127.5)).mean().item() / math.log(2)
    assert abs(bound - exact) < 0.04  # three standard deviations of so few draws


# Losses


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_losses_are_openais(kind):
    chain = CHAINS[kind]
    hybrid = hybrid_loss(lambda x, t: OUTPUT, X_0, STEP, chain, NOISE)
    vlb = vlb_loss(lambda x, t: OUTPUT, X_0, STEP, chain, NOISE, variance="learned_range")
    for actual, name in [
        (hybrid.vlb, "MSE_vb"),
        (hybrid.simple, "MSE_mse"),
        (hybrid.loss, "RESCALED_MSE_loss"),
        (vlb, "RESCALED_KL_loss"),
        (vlb / 1000, "KL_loss"),
        (per_image((OUTPUT[:, :3] - NOISE) ** 2), "MSE_fixed"),
    ]:
        assert_close(actual, PQ[f"out_{kind}_loss_{name}"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("predicts", ["eps", "x_0", "v", "previous_x"])
def test_a_network_that_returns_its_target_knows_x_0(predicts):
    x_t = LINEAR.q_sample(X_0.double(), STEP, NOISE.double())
    target = training_target(X_0.double(), x_t, STEP, LINEAR, NOISE.double(), predicts=predicts)
    assert_close(read(target, x_t, STEP, LINEAR, predicts=predicts).x_0, X_0.double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("predicts", ["eps", "x_0", "v", "previous_x"])
def test_nd_eq_16_the_bound_teaches_the_variance_and_never_the_mean(predicts):
    output = OUTPUT.clone().requires_grad_()
    hybrid = hybrid_loss(lambda x, t: output, X_0, STEP, LINEAR, NOISE, predicts=predicts)
    (gradient,) = torch.autograd.grad(hybrid.vlb.sum(), output, retain_graph=True)
    assert torch.count_nonzero(gradient[:, :3]) == 0
    assert torch.count_nonzero(gradient[:, 3:]) > 0
    assert_close(hybrid.loss, hybrid.simple + 0.001 * 1000 * hybrid.vlb)
    (gradient,) = torch.autograd.grad(vlb_loss(lambda x, t: output, X_0, STEP, LINEAR, NOISE).sum(), output)
    assert torch.count_nonzero(gradient[:, :3]) > 0


def test_the_network_receives_the_time_of_the_schedule_and_not_the_step_of_the_chain():
    chain, seen = Chain(LINEAR.schedule, [3, 20, 500, 900]), []
    hybrid_loss(lambda x, t: seen.append(t) or OUTPUT, X_0, torch.tensor([3, 0, 1, 2]), chain, NOISE)
    assert seen[0].tolist() == [900, 3, 20, 500]


# Importance sampling


def test_nd_eq_18_steps_are_drawn_as_the_root_of_their_mean_square_loss():
    sampler = LossSecondMoment(3, uniform=0.03)
    for k in range(12):  # the first two of twelve are forgotten
        sampler.update(torch.tensor([0, 1, 2]), torch.tensor([100.0 if k < 2 else 3.0, 1.0, k % 2]))
    expected = 0.97 * torch.tensor([3, 1, 0.5**0.5], dtype=torch.float64) / (4 + 0.5**0.5) + 0.01
    assert_close(sampler.probabilities(), expected, rtol=1e-12, atol=0)


def test_steps_are_uniform_until_every_one_has_a_full_history():
    sampler = LossSecondMoment(3)
    for _ in range(10):
        assert_close(sampler.probabilities(), torch.full((3,), 1 / 3).double())
        sampler.update(torch.tensor([0, 1, 1, 0]), torch.tensor([9.0, 1.0, 1.0, 9.0]))
    sampler.update(torch.tensor([2] * 10), torch.ones(10))
    assert sampler.probabilities()[0] > 0.8


def test_nd_eq_18_the_weighted_loss_is_unbiased():
    sampler, losses = LossSecondMoment(4), torch.tensor([4.0, 1.0, 0.1, 0.0])
    for _ in range(10):
        sampler.update(torch.arange(4), losses)
    i, weights = sampler.sample(20_000, torch.Generator().manual_seed(0))
    drawn = i.bincount(minlength=4).double() / len(i)
    assert_close(drawn, sampler.probabilities(), rtol=0, atol=0.01)  # three standard deviations
    assert_close((weights * losses[i]).mean(), losses.mean(), rtol=0.02, atol=0)
    assert_close((sampler.probabilities()[i] * weights * 4).float(), torch.ones(len(i)), rtol=1e-5, atol=0)
