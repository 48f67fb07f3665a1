"""Pictures redrawn: how much noise a strength means, how many steps, which sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively, only, picture
from PIL import Image

from minisd.tasks import Img2Img, img2img
from minisd.tasks.images import to_tensor
from minisd.tasks.img2img import partial_timesteps

KINDS = {"eps": lively("SD1"), "v": lively("SD2_V"), "x_0": lively("SD1", prediction="x_0")}
SD = KINDS["eps"]
QUICK = {"steps": 2, "guidance_scale": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_img2img_starts_from_the_noised_picture(kind):
    sd = KINDS[kind]
    sampling = only(img2img(sd, "a dog", picture(), strength=0.5, seed=3, steps=10))
    g = torch.Generator().manual_seed(3)
    posterior = sd.vae.encode(to_tensor(picture()))
    x_0 = posterior.mean + posterior.std * torch.randn(1, 4, 16, 16, generator=g)
    abar = sd.schedule.alphas_cumprod[401].float()
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * torch.randn(1, 4, 16, 16, generator=g)
    assert [step.t for step in sampling] == [401, 301, 201, 101, 1]
    first = only(img2img(sd, "a dog", picture(), strength=0.5, seed=3, steps=10)).latents
    torch.testing.assert_close(first, x_t, rtol=0, atol=1e-5)  # float32 rounding


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1))
def test_a_strength_runs_the_floor_of_its_share_of_the_steps(steps, strength):
    expected = min(int(steps * strength + 1e-9), steps)
    if expected == 0:
        with pytest.raises(ValueError, match=r"runs none: use .* or more, or exact_steps"):
            partial_timesteps(SD, Img2Img(steps=steps), strength)
        return
    found = partial_timesteps(SD, Img2Img(steps=steps), strength)
    assert found == SD.schedule.timesteps(steps)[-expected:]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1))
def test_exact_steps_runs_all_of_them_from_the_same_noise(steps, strength):
    if steps > round(1000 * strength):
        with pytest.raises(ValueError, match="use fewer steps, or a larger strength"):
            partial_timesteps(SD, Img2Img(steps=steps), strength, exact_steps=True)
        return
    for spacing in ("leading", "trailing", "karras"):
        settings = Img2Img(steps=steps, spacing=spacing)
        found = partial_timesteps(SD, settings, strength, exact_steps=True)
        assert len(found) == steps
        most = round(1000 * strength) - 1
        # the whole strides of "leading" may end early
        assert found[0] <= most if spacing == "leading" else found[0] == pytest.approx(most, abs=1e-6)


def test_the_hundred_percent_trap():
    """0.29 · 100 is 28.999999999999996 in floating point."""
    assert len(only(img2img(SD, "", picture(), strength=0.29, steps=100))) == 29


@pytest.mark.parametrize("size", [(33, 21), (1, 1), (40, 32), (5, 64)])
def test_img2img_gives_back_the_size_it_was_given(size):
    assert SD.img2img("a dog", picture(*size), **QUICK)[0].size == size


def test_img2img_resizes_first_and_keeps_proportions_where_one_side_is_given():
    for asked, size in (({"height": 16}, (32, 16)), ({"width": 16}, (16, 8)), ({"height": 9, "width": 30}, (30, 9))):
        assert SD.img2img("a dog", picture(40, 20), **QUICK, **asked)[0].size == size
    resized = picture(40, 20).resize((32, 16), Image.Resampling.LANCZOS)
    assert SD.img2img("a dog", resized, **QUICK) == SD.img2img("a dog", picture(40, 20), height=16, **QUICK)


def test_strength_1_of_compvis_spacing_starts_at_its_first_timestep_though_it_visits_more_than_asked():
    visited = SD.timesteps(30, "compvis")
    assert len(visited) == 31
    assert partial_timesteps(SD, Img2Img(steps=30, spacing="compvis"), 1.0) == visited
