from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minisd.diffusion.gaussian import Chain, from_network, p_mean_variance
from minisd.diffusion.guidance import classifier_gradient, classifier_guided, classifier_guided_mean, guided
from minisd.diffusion.prediction import as_model, clipped
from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas, scaled_linear_betas

DATA = Path(__file__).parent / "data"
SD = Schedule(scaled_linear_betas())
CHAINS = {"linear": Chain(Schedule(linear_betas())), "cosine": Chain(Schedule(cosine_betas()))}


@dataclass(frozen=True)
class Shift:
    """The least of a condition: one number per image."""

    by: Tensor

    @classmethod
    def cat(cls, parts):
        return cls(torch.cat([part.by for part in parts]))


class Network:
    """x_t and t and the condition all show in the output; calls are recorded."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t: Tensor, t, cond: Shift) -> Tensor:
        self.calls.append((x_t.shape[0], t))
        t = torch.as_tensor(t, dtype=x_t.dtype).reshape(-1, 1, 1, 1)
        return torch.sin(2 * x_t + cond.by[:, None, None, None].to(x_t.dtype)) + 0.001 * t


X = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
COND, UNCOND = Shift(torch.tensor([1.0, 2.0, 3.0])), Shift(torch.tensor([0.1, 0.2, 0.3]))


def outputs(x: Tensor = X, t=300) -> tuple[Tensor, Tensor]:
    network = Network()
    return network(x, t, COND), network(x, t, UNCOND)


# Classifier-free guidance


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("t", [300, 300.5, torch.tensor(300), torch.tensor([300, 2, 999])])
def test_ho_salimans_eq_6(t, joined):
    c, u = outputs(t=t)
    actual = guided(Network(), COND, UNCOND, 7.5, joined=joined)(X, t)
    assert_close(actual, u + 7.5 * (c - u), rtol=0, atol=1e-5)


def test_both_conditions_go_through_the_network_in_one_call_unless_asked_otherwise():
    for joined, sizes in [(True, [6]), (False, [3, 3])]:
        network = Network()
        guided(network, COND, UNCOND, 7.5, joined=joined)(X, 300)
        assert [size for size, _ in network.calls] == sizes


def test_guidance_scale_1_is_the_conditional_model_run_once_and_needs_no_uncond():
    network = Network()
    assert torch.equal(guided(network, COND, None, 1.0)(X, 300), outputs()[0])
    assert [size for size, _ in network.calls] == [3]


def test_guidance_scale_0_is_the_unconditional_model():
    assert_close(guided(Network(), COND, UNCOND, 0.0)(X, 300), outputs()[1], rtol=0, atol=1e-6)


def test_equal_prompts_cancel_exactly_at_any_scale():
    assert torch.equal(guided(Network(), COND, COND, 1000.0)(X, 300), outputs()[0])


@pytest.mark.parametrize("scales", [[1.0, 3.0, 7.5], (1, 3, 7.5), torch.tensor([1.0, 3.0, 7.5])])
def test_every_image_may_have_its_own_scale(scales):
    actual = guided(Network(), COND, UNCOND, scales)(X, 300)
    for i, scale in enumerate([1.0, 3.0, 7.5]):
        alone = guided(Network(), Shift(COND.by[i : i + 1]), Shift(UNCOND.by[i : i + 1]), scale)(X[i : i + 1], 300)
        assert_close(actual[i : i + 1], alone, rtol=0, atol=1e-6)


def test_outside_its_interval_the_conditional_model_runs_alone():
    network = Network()
    model = guided(network, COND, UNCOND, 7.5, interval=(100, 600))
    for t, size in [(99, 3), (100, 6), (600.0, 6), (601, 3), (torch.tensor([1, 2, 999]), 3)]:
        model(X, t)
        assert network.calls.pop()[0] == size
    assert torch.equal(model(X, 99), outputs(t=99)[0])


def test_the_interval_holds_for_each_image_of_a_batch():
    t = torch.tensor([99, 100, 601])
    c, u = outputs(t=t)
    actual = guided(Network(), COND, UNCOND, 7.5, interval=(100, 600))(X, t)
    assert_close(actual[[0, 2]], c[[0, 2]], rtol=0, atol=1e-6)
    assert_close(actual[1], (u + 7.5 * (c - u))[1], rtol=0, atol=1e-5)


def test_guiding_eps_v_or_x_0_is_the_same():
    """At one x_t they are affine in each other, and guidance is an affine combination whose weights add up to 1."""
    x = X.double()

    def as_v(x, t, cond):
        return SD.v_from_eps(x, t, Network()(x, t, cond))

    def as_x_0(x, t, cond):
        return SD.x_0_from_eps(x, t, Network()(x, t, cond))

    eps = guided(Network(), COND, UNCOND, 7.5)(x, 300)
    for network, predicts in ((as_v, "v"), (as_x_0, "x_0")):
        model = as_model(guided(network, COND, UNCOND, 7.5), SD, predicts)
        assert_close(model(x, 300).eps, eps, rtol=0, atol=1e-10)


def test_lin_eq_15_and_16_rescaling_restores_the_deviation_of_each_image():
    c, u = outputs()
    plain = u + 7.5 * (c - u)
    dims = (1, 2, 3)
    full = guided(Network(), COND, UNCOND, 7.5, rescale=1.0)(X, 300)
    assert_close(full.std(dims), c.std(dims), rtol=1e-5, atol=0)
    assert_close(full / full.std(dims, keepdim=True), plain / plain.std(dims, keepdim=True), rtol=0, atol=1e-5)
    some = guided(Network(), COND, UNCOND, 7.5, rescale=0.7)(X, 300)
    assert_close(some, 0.7 * full + 0.3 * plain, rtol=0, atol=1e-5)


def test_rescaling_acts_on_what_the_network_returns():
    """Unlike guidance it is not affine: rescaled v is not the v of a rescaled ε."""
    x = X.double()

    def as_v(x, t, cond):
        return SD.v_from_eps(x, t, Network()(x, t, cond))

    v = guided(as_v, COND, UNCOND, 7.5, rescale=0.7)(x, 300)
    eps = guided(Network(), COND, UNCOND, 7.5, rescale=0.7)(x, 300)
    assert (SD.eps_from_v(x, 300, v) - eps).abs().max() > 0.1


def test_rescaling_an_untrained_network_that_returns_zeros_gives_zeros():
    model = guided(lambda x, t, cond: torch.zeros_like(x), COND, UNCOND, 7.5, rescale=0.7)
    assert torch.equal(model(X, 300), torch.zeros_like(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_contrasted_in_float32(dtype):
    c, u = (out.to(dtype) for out in outputs())
    network = lambda x, t, cond: torch.cat([u, c])  # noqa: E731
    actual = guided(network, COND, UNCOND, 7.5)(X.to(dtype), 300)
    assert torch.equal(actual, (u.float() + 7.5 * (c.float() - u.float())).to(dtype))


def test_impossible_guidance_is_refused():
    with pytest.raises(ValueError, match=r"guidance by 7\.5 needs uncond"):
        guided(Network(), COND, None, 7.5)
    with pytest.raises(ValueError, match=r"rescale is 7\.5: it lies in"):
        guided(Network(), COND, UNCOND, 7.5, rescale=7.5)
    with pytest.raises(ValueError, match=r"\(1, 2\): give one number"):
        guided(Network(), COND, UNCOND, [[1, 2]])
    with pytest.raises(ValueError, match=r"\(2,\) for a batch of 3"):
        guided(Network(), COND, UNCOND, [2.0, 3.0])(X, 300)


# Classifier guidance, against OpenAI's guided-diffusion


def golden() -> dict[str, Tensor]:
    arrays = np.load(DATA / "gaussian_pq.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_dhariwal_algorithm_1_moves_the_mean_by_the_variance_times_the_gradient(kind):
    pq, chain = golden(), CHAINS[kind]
    x_t, t = pq["x_t"], pq["t"]
    model = clipped(from_network(lambda x, t: pq["model_output"], chain, variance="learned_range"), chain.schedule)
    prediction = classifier_guided_mean(model, lambda x, t: pq["gradient"], chain)(x_t, t)
    p = p_mean_variance(prediction, x_t, t, chain)
    drawn = p.mean + (t > 0)[:, None, None, None] * (p.log_variance / 2).exp() * pq["noise"]
    assert_close(drawn, pq[f"out_{kind}_condmean_psample"], rtol=1e-5, atol=1e-6)
    assert torch.equal(prediction.x_0, model(x_t, t).x_0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_dhariwal_eq_14_moves_eps_by_the_score_of_the_classifier(kind):
    pq, chain = golden(), CHAINS[kind]
    x_t, t = pq["x_t"], pq["t"]
    model = clipped(from_network(lambda x, t: pq["model_output"], chain, variance="learned_range"), chain.schedule)
    seen = classifier_guided(model, lambda x, t: pq["gradient"], chain.schedule)(x_t, t)
    # OpenAI's DDIM starts from float32 ᾱ, and its 1 - ᾱ is wrong by up to 6e-4 of itself where ᾱ is near 1.
    abar, prev = (a[t][:, None, None, None].float() for a in (chain.alphas_cumprod, chain.alphas_cumprod_prev))
    sigma = 0.5 * ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt()  # DDIM, eq. 12 and 16, η = 0.5
    noise = torch.where(t[:, None, None, None] > 0, pq["noise"], 0.0)
    x = prev.sqrt() * seen.x_0 + (1 - prev - sigma**2).sqrt() * seen.eps + sigma * noise
    expected = pq[f"out_{kind}_condscore_ddim_eta0.5"]
    scale = expected.abs().amax(dim=(1, 2, 3), keepdim=True)
    assert_close(x / scale, expected / scale, rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_log_probability_of_each_images_class():
    weights = torch.randn(120, 7, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([2, 0, 6])
    with torch.no_grad():
        actual = classifier_gradient(lambda x, t: x.flatten(1) @ weights, y, scale=3.0)(X, 300)
    p = (X.flatten(1) @ weights).softmax(dim=-1)
    expected = 3 * (weights.T[y] - p @ weights.T).reshape(X.shape)  # ∇ log softmax of linear logits
    assert_close(actual, expected, rtol=0, atol=1e-4)
    assert not actual.requires_grad


def test_both_forms_of_classifier_guidance_move_the_mean_alike():
    """μ is affine in ε (Ho eq. 11), so the score form moves it by β/√α ∇ log p: Σ ∇ log p up to √α, with Σ = β."""
    chain, gradient, i = CHAINS["linear"], (lambda x, t: X.flip(0).double()), 500
    x, eps = X.double(), (lambda x, t: 0.1 * x)
    by_mean = classifier_guided_mean(eps, gradient, chain, variance="large")(x, i).mean
    by_score = p_mean_variance(classifier_guided(eps, gradient, chain.schedule)(x, i), x, i, chain).mean
    plain = p_mean_variance(from_network(eps, chain)(x, i), x, i, chain).mean
    assert_close((by_score - plain) * (1 - chain.betas[i]).sqrt(), by_mean - plain, rtol=0, atol=1e-12)
