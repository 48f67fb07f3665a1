"""What a sampler promises, and what every one of SAMPLERS keeps: see `minisd.diffusion.samplers.step`."""

import inspect

import pytest
import torch

from minisd.diffusion.prediction import Prediction, as_model, as_prediction
from minisd.diffusion.samplers import SAMPLERS, ddim, ddim_invert, ddpm, euler, get_sampler, heun, lms
from minisd.diffusion.schedule import Schedule, expand, scaled_linear_betas, zero_terminal_snr

SD = Schedule(scaled_linear_betas())
TO_ONE = Schedule(scaled_linear_betas(), final_alpha_cumprod=1.0)
X_T = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
STOCHASTIC = {"ddim": {"eta": 0.7}, "euler": {"s_churn": 2.0, "s_tmax": 9.0}, "heun": {"s_churn": 2.0, "s_tmax": 9.0}}
ALL = [*SAMPLERS, *(f"{name} stochastic" for name in STOCHASTIC)]


def wavy(x, t):
    """Some ε, smooth in x and t and different in every pixel."""
    return torch.sin(x + 0.001 * expand(torch.as_tensor(t), x).to(x)) * 0.9


def sampler_of(case):
    """'heun stochastic' as heun with its noise switched on."""
    name, *stochastic = case.split()
    own = STOCHASTIC[name] if stochastic else {}
    return lambda *args, **kwargs: SAMPLERS[name](*args, **{**own, **kwargs})


def seeded(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ALL)
def test_every_sampler_yields_a_step_per_timestep_and_keeps_dtype_and_input(case, dtype):
    x, timesteps = X_T.to(dtype), SD.timesteps(7)
    before = x.clone()
    steps, seen = [], []
    for step in sampler_of(case)(wavy, x, SD, timesteps, noise=seeded()):
        steps.append(step)
        seen.append(step.x.clone())
    assert [step.t for step in steps] == timesteps
    assert [step.t_prev for step in steps] == [*timesteps[1:], None]
    assert all(y.dtype == dtype and y.shape == x.shape for step in steps for y in (step.x, step.x_0))
    assert torch.equal(x, before)
    assert all(torch.equal(step.x, x) for step, x in zip(steps, seen, strict=True))  # no Step changes afterwards


@pytest.mark.parametrize("case", ALL)
def test_replayed_noise_gives_the_same_bits(case):
    drawn, draw = [], seeded()

    def record(x):
        drawn.append(draw(x))
        return drawn[-1]

    first = [step.x for step in sampler_of(case)(wavy, X_T, SD, SD.timesteps(9), noise=record)]
    replay = iter(drawn)
    again = [step.x for step in sampler_of(case)(wavy, X_T, SD, SD.timesteps(9), noise=lambda x: next(replay))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert next(replay, None) is None


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "euler", "heun", "lms", "plms"])
def test_deterministic_samplers_draw_no_noise(name):
    def refuse(x):
        raise AssertionError("a deterministic sampler drew noise")

    assert len(list(SAMPLERS[name](wavy, X_T, SD, SD.timesteps(5), noise=refuse))) == 5


@pytest.mark.parametrize(
    ("case", "schedule", "draws"),
    [("ddim stochastic", SD, 6), ("ddim stochastic", TO_ONE, 5), ("ddpm", SD, 5), ("euler_ancestral", SD, 5)],
)
def test_no_noise_is_drawn_for_a_step_that_adds_none(case, schedule, draws):
    calls = []
    list(sampler_of(case)(wavy, X_T, schedule, SD.timesteps(6), noise=lambda x: calls.append(x) or torch.zeros_like(x)))
    assert len(calls) == draws


@pytest.mark.parametrize("case", ALL)
def test_what_is_written_into_a_step_is_what_the_model_sees_next(case):
    seen, written, s_noise = [], None, {}
    if case in ("euler stochastic", "heun stochastic"):
        s_noise = {"s_noise": 0.0}  # churn comes between the Step and the model: here it only rescales x

    def model(x, t):
        seen.append(x / SD.alpha_cumprod(t).sqrt().item())
        return wavy(x, t)

    for step in sampler_of(case)(model, X_T, SD, SD.timesteps(4), noise=seeded(), **s_noise):
        if written is not None:
            assert any(torch.allclose(x, written, rtol=1e-5, atol=0) for x in seen)
        seen.clear()
        step.x.copy_(torch.full_like(step.x, 0.25))
        written = step.x / SD.alpha_cumprod(step.t_prev).sqrt().item() if step.t_prev is not None else None


@pytest.mark.parametrize("case", ALL)
def test_every_image_may_have_its_own_times(case):
    together = torch.tensor([SD.timesteps(6, "trailing"), SD.timesteps(6, "leading")]).T
    draws = [seeded(i)(X_T) for i in range(6)]
    # Churn that begins at different steps for different images would draw at different steps, too.
    always = {"s_tmax": 99.0} if case in ("euler stochastic", "heun stochastic") else {}

    def run(x, timesteps, pick):
        replay = iter(draws)
        *_, last = sampler_of(case)(wavy, x, SD, timesteps, noise=lambda x: next(replay)[pick], **always)
        return last.x

    one_by_one = [run(X_T[i : i + 1], together[:, i], slice(i, i + 1)) for i in range(2)]
    # float32 rounding of the same numbers in another broadcast; steps in σ carry x/√ᾱ, fifteen times as large
    torch.testing.assert_close(run(X_T, together, slice(None)), torch.cat(one_by_one), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ALL)
def test_times_may_be_fractional_numbers_tensors_or_arrays(case):
    timesteps = [873.25, 500.5, 77.125]

    def run(timesteps):
        return [step.x for step in sampler_of(case)(wavy, X_T, SD, timesteps, noise=seeded())]

    expected = run(timesteps)
    for given in (torch.tensor(timesteps, dtype=torch.float64), torch.tensor(timesteps).numpy()):
        assert all(torch.equal(a, b) for a, b in zip(run(given), expected, strict=True))


@pytest.mark.parametrize("case", ALL)
def test_a_prediction_means_the_same_as_its_eps(case):
    def model(x, t):
        return as_prediction(wavy(x, t), x, t, SD)

    def run(model):
        return [step.x for step in sampler_of(case)(model, X_T, SD, SD.timesteps(5), noise=seeded())]

    assert all(torch.equal(a, b) for a, b in zip(run(model), run(wavy), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3, 9, 27, 36, 37, 101, 333])
@pytest.mark.parametrize("case", ALL)
def test_every_number_of_steps_finds_the_only_image_there_is(case, n):
    """Where all of x_0 is one image the model knows it at once, and every sampler must end there, from any noise."""
    image = seeded(5)(X_T.double())
    *_, last = sampler_of(case)(
        lambda x, t: TO_ONE.eps_from_x_0(x, t, image), X_T.double(), TO_ONE, TO_ONE.timesteps(n), noise=seeded()
    )
    torch.testing.assert_close(last.x, image, rtol=0, atol=1e-9)  # float64


@pytest.mark.parametrize("name", SAMPLERS)
def test_half_precision_costs_its_own_rounding_only(name):
    """bfloat16 resolves 0.002 to 0.004 at 0.5 to 1. Measured: 0.003 to 0.007 after 50 steps, and with coefficients
    rounded to bfloat16, too, 0.005 to 0.019."""

    def gaussian(x, t):  # the exact ε of x_0 ~ N(0, 0.5²), so that only the sampler rounds
        abar = SD.alpha_cumprod(t).item()
        return ((1 - abar) ** 0.5 * x.double() / (abar * 0.25 + 1 - abar)).to(x)

    def run(x):
        *_, last = SAMPLERS[name](gaussian, x, SD, SD.timesteps(50), noise=seeded())
        return last.x.double()

    x_T = seeded()(torch.empty(2, 4, 32, 32)).bfloat16()
    assert (run(x_T) - run(x_T.double())).std() < 0.0085


# Learned variances, zero terminal SNR


def test_ddpm_takes_mean_and_variance_from_the_prediction():
    mean, log_variance = torch.full_like(X_T, 0.5), torch.full_like(X_T, -2.0)
    ones = torch.ones_like(X_T)

    def model(x, t):
        return Prediction(x, x, log_variance, mean)

    first, last = ddpm(model, X_T, SD, [500, 100], noise=lambda x: ones)
    torch.testing.assert_close(first.x, mean + ones * torch.e**-1)
    assert torch.equal(last.x, mean)


@pytest.mark.parametrize("case", ["ddim", "ddim stochastic", "ddpm", "dpmpp_2m"])
def test_zero_terminal_snr_is_sampled_from_a_v_model(case):
    schedule = Schedule(zero_terminal_snr(scaled_linear_betas()), final_alpha_cumprod=1.0)
    image = torch.full_like(X_T, 0.3)
    model = as_model(lambda x, t: schedule.v_from_x_0(x, t, image), schedule, "v")
    *_, last = sampler_of(case)(model, X_T, schedule, schedule.timesteps(10, "trailing"), noise=seeded())
    torch.testing.assert_close(last.x, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "lms"])
def test_samplers_that_step_in_sigma_refuse_an_infinite_one(name):
    schedule = Schedule(zero_terminal_snr(scaled_linear_betas()))
    model = as_model(lambda x, t: x, schedule, "v")
    with pytest.raises(ValueError, match=r"zero terminal SNR.*use ddim"):
        next(SAMPLERS[name](model, X_T, schedule, [999, 500]))


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_a_bare_eps_is_refused_at_zero_snr(name):
    schedule = Schedule(zero_terminal_snr(scaled_linear_betas()))
    with pytest.raises(ValueError, match="signal-to-noise ratio at t = 999 is 0"):
        next(SAMPLERS[name](wavy, X_T, schedule, [999, 500]))


# Names and refusals


def test_samplers_share_one_signature_and_carry_their_names():
    for name, sampler in SAMPLERS.items():
        assert sampler.__name__ == name
        parameters = inspect.signature(sampler).parameters
        assert list(parameters)[:4] == ["model", "x", "schedule", "timesteps"]
        assert parameters["noise"].default is None
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters.values())[4:])


def test_a_sampler_is_found_by_name_and_a_callable_is_itself():
    assert get_sampler("ddim") is ddim
    assert get_sampler(wavy) is wavy
    with pytest.raises(ValueError, match="unknown sampler 'dimm'; known: ddim, ddpm, "):
        get_sampler("dimm")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("timesteps", [[1, 500], [500, 500, 1], [900.5, 400.25, 400.5]])
def test_times_that_do_not_fall_are_refused(name, timesteps):
    with pytest.raises(ValueError, match="timesteps fall from noise to image"):
        next(SAMPLERS[name](wavy, X_T, SD, timesteps))


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_outside_the_schedule_are_refused_before_the_model_is_asked(name):
    def model(x, t):
        raise AssertionError("the model was asked")

    with pytest.raises(ValueError, match=r"t = 1000.* is not within the schedule's \[0, 999\]"):
        next(SAMPLERS[name](model, X_T, SD, [1000, 500]))


def test_no_timesteps_are_no_steps():
    assert all(list(sampler(wavy, X_T, SD, [])) == [] for sampler in SAMPLERS.values())
    assert list(ddim_invert(wavy, X_T, SD, [])) == []


@pytest.mark.parametrize(
    ("sampler", "own", "sentence"),
    [
        (ddim, {"eta": 1.5}, r"eta is 1.5: it lies in \[0, 1\]"),
        (SAMPLERS["euler_ancestral"], {"eta": -0.1}, r"eta is -0.1: it lies in \[0, 1\]"),
        (euler, {"s_churn": -1.0}, "s_churn is negative"),
        (heun, {"s_churn": -1.0}, "s_churn is negative"),
        (lms, {"order": 0}, "order is 0"),
        (ddpm, {"variance": "huge"}, "unknown variance 'huge'; known: small, large"),
        (ddim_invert, {"iterations": 0}, "iterations is 0"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(sampler, own, sentence):
    with pytest.raises(ValueError, match=sentence):
        next(sampler(wavy, X_T, SD, SD.timesteps(5), **own))


def test_a_samplers_own_options_follow_its_name():
    sampler = get_sampler("euler:s_churn=2,s_noise=1.5")
    assert (sampler.func, sampler.keywords) == (SAMPLERS["euler"], {"s_churn": 2.0, "s_noise": 1.5})
    assert get_sampler("lms:order=2").keywords == {"order": 2}
    assert get_sampler("ddpm:variance=large").keywords == {"variance": "large"}
    assert get_sampler("ddim", eta=0.5).keywords == {"eta": 0.5}
    assert get_sampler("euler_ancestral", eta=0.5).keywords == {"eta": 0.5}
    assert get_sampler("heun") is SAMPLERS["heun"]


@pytest.mark.parametrize(
    ("sampler", "eta", "sentence"),
    [
        ("eular", None, "unknown sampler 'eular'; known: ddim, ddpm"),
        ("euler:churn=2", None, "the sampler euler has no option 'churn'; it has: s_churn, s_tmin, s_tmax, s_noise"),
        ("dpmpp_2m:eta=1", None, "the sampler dpmpp_2m has no option 'eta'; it has: none"),
        ("euler:s_churn=much", None, "euler:s_churn=much: s_churn is a number, 0.0 by default"),
        ("euler:s_churn=1,s_churn=2", None, "s_churn is given twice"),
        ("ddim:eta=0.5", 0.2, "eta is given twice, 0.2 and 0.5: give it once"),
        ("heun", 0.5, "eta=0.5 belongs to ddim, euler_ancestral, not to heun"),
    ],
)
def test_options_that_a_sampler_does_not_have_are_refused(sampler, eta, sentence):
    with pytest.raises(ValueError, match=sentence):
        get_sampler(sampler, eta=eta)
