"""Pictures repainted and painted on: the rest stays, bit for bit."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import Watched, lively, mask, only, picture, pixels
from PIL import Image

from minisd.tasks import inpaint
from minisd.tasks.images import inward_feather, to_mask, to_tensor

SD, INPAINTING = lively(), lively("SD1_INPAINT")
QUICK = {"steps": 2, "guidance_scale": 2}


@st.composite
def repainting(draw):
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = (left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))
    white = mask(box, width, height)
    for _ in range(draw(st.integers(0, 5))):
        white.putpixel((draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))), 255)
    return white, draw(st.integers(0, 12)), draw(st.sampled_from([1.0, 0.6]))


@settings(max_examples=40, deadline=None)
@given(repainting())
def test_unmasked_pixels_come_back_bit_for_bit(case):
    white, feather, strength = case
    image = picture(*white.size)
    (result,) = SD.inpaint("a dog", image, white, feather=feather, strength=strength, **QUICK)
    outside = pixels(white) == 0
    assert result.size == image.size
    assert (pixels(result)[outside] == pixels(image)[outside]).all()
    if white.width * white.height > 60 and (~outside).sum() > 30:
        assert (pixels(result)[~outside] != pixels(image)[~outside]).mean() > 0.5


@settings(max_examples=15, deadline=None)
@given(repainting())
def test_unmasked_pixels_come_back_bit_for_bit_from_a_9_channel_model(case):
    white, feather, strength = case
    white.paste(255, (0, 0, 2, 2))  # a latent's upper left pixel, which the model sees
    image = picture(*white.size)
    (result,) = INPAINTING.inpaint("a dog", image, white, feather=feather, strength=strength, **QUICK)
    outside = pixels(white) == 0
    assert (pixels(result)[outside] == pixels(image)[outside]).all()


def test_the_feather_blends_inside_the_mask():
    white = mask((8, 8, 26, 26))
    hard, soft = (SD.inpaint("a dog", picture(), white, feather=f, **QUICK)[0] for f in (0, 4))
    weight = inward_feather(to_mask(white, (32, 32)), 4)[0, 0].numpy()[..., None]
    expected = pixels(picture()) + weight * (pixels(hard) - pixels(picture()))
    assert abs(pixels(soft) - expected).max() <= 0.5


def test_known_latents_are_put_back_after_every_step():
    white = mask((10, 0, 32, 32))
    sampling = only(inpaint(SD, "a dog", picture(), white, seed=2, steps=5, guidance_scale=2))
    g = torch.Generator().manual_seed(2)
    posterior = SD.vae.encode(to_tensor(picture()))
    x_0 = posterior.mean + posterior.std * torch.randn(1, 4, 16, 16, generator=g)
    noise = torch.randn(1, 4, 16, 16, generator=g)
    torch.testing.assert_close(sampling.latents[..., 5:], noise[..., 5:])
    for step in sampling:
        known = x_0 if step.t_prev is None else SD.schedule.q_sample(x_0, step.t_prev, noise)
        torch.testing.assert_close(step.x[..., :5], known[..., :5], rtol=0, atol=1e-5)
        assert not torch.isclose(step.x[..., 5:], known[..., 5:], atol=1e-2).all()


def test_a_latent_is_kept_only_where_none_of_its_pixels_is_to_be_painted():
    white = mask((9, 0, 32, 32))  # the fifth column of latents holds pixels 8 and 9
    (step,) = only(inpaint(SD, "a dog", picture(), white, steps=1))
    posterior = SD.vae.encode(to_tensor(picture()))
    x_0 = posterior.mean + posterior.std * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = torch.isclose(step.x, x_0, rtol=0, atol=1e-5).all(dim=(0, 1, 2))
    assert kept.tolist() == [True] * 4 + [False] * 12


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_9_channel_model_sees_x_t_then_the_mask_then_the_picture_without_the_masked_part(guidance_scale):
    white = mask((8, 4, 20, 30))
    with Watched(INPAINTING) as watched:
        INPAINTING.inpaint("a dog", picture(), white, steps=2, seed=5, guidance_scale=guidance_scale)
    g = torch.Generator().manual_seed(5)
    x_T = torch.randn(1, 4, 16, 16, generator=g)
    blanked = to_tensor(picture())
    blanked[..., 4:30, 8:20] = 0  # mid-grey
    posterior = INPAINTING.vae.encode(blanked)
    masked = posterior.mean + posterior.std * torch.randn(1, 4, 16, 16, generator=g)
    channel = torch.zeros(1, 1, 16, 16)
    channel[..., 2:15, 4:10] = 1
    x, _, cond = watched.calls[0]
    assert len(x) == len(cond.concat) == (1 if guidance_scale == 1 else 2)
    for row in range(len(x)):
        torch.testing.assert_close(x[row : row + 1], x_T)
        assert torch.equal(cond.concat[row : row + 1, :1], channel)
        torch.testing.assert_close(cond.concat[row : row + 1, 1:], masked, rtol=0, atol=1e-5)


def test_a_9_channel_model_learns_nothing_of_what_was_under_the_mask():
    white, other = mask((8, 4, 20, 30)), picture()
    other.paste((255, 0, 0), (8, 4, 20, 30))
    repaint = partial(INPAINTING.inpaint, "a dog", mask=white, steps=3, feather=0)
    assert repaint(image=picture()) == repaint(image=other)


def test_full_strength_forgets_and_less_remembers_what_was_under_the_mask():
    white, other = mask((8, 4, 20, 30)), picture()
    other.paste((255, 0, 0), (10, 6, 18, 28))  # two pixels inside, and yet seen through the encoder's neighbours
    for strength, same in ((1.0, False), (0.5, False)):
        first, second = (
            SD.inpaint("a dog", i, white, steps=4, strength=strength, feather=0) for i in (picture(), other)
        )
        assert (first == second) is same
    forgets = only(inpaint(SD, "a dog", picture(), white, steps=4)).latents
    noise_only = only(inpaint(SD, "a dog", other, white, steps=4)).latents
    assert torch.equal(forgets[..., 2:15, 4:10], noise_only[..., 2:15, 4:10])


@pytest.mark.parametrize(
    "sides", [{"left": 7}, {"right": 3}, {"top": 9}, {"bottom": 40}, {"left": 1, "top": 2, "right": 3, "bottom": 4}]
)
@pytest.mark.parametrize("sd", [SD, INPAINTING], ids=["4 channels", "9 channels"])
def test_outpainting_frames_the_picture_and_keeps_its_bits(sd, sides):
    image = picture(33, 21)
    (result,) = sd.outpaint("a dog", image, steps=2, **sides)
    left, top, right, bottom = (sides.get(side, 0) for side in ("left", "top", "right", "bottom"))
    assert result.size == (33 + left + right, 21 + top + bottom)
    assert result.crop((left, top, left + 33, top + 21)) == image
    frame = pixels(result).copy()
    frame[top : top + 21, left : left + 33] = frame.mean()
    assert frame.std() > 5


def test_outpainting_is_inpainting_a_frame():
    wider = Image.new("RGB", (40, 32))
    image = picture()
    for x in range(8):  # its last column goes on
        wider.paste(image.crop((31, 0, 32, 32)), (32 + x, 0))
    wider.paste(image, (0, 0))
    assert SD.outpaint("a dog", image, right=8, **QUICK) == SD.inpaint(
        "a dog", wider, mask((32, 0, 40, 32), 40, 32), **QUICK
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_pictures_of_every_mode_are_redrawn_and_repainted(mode):
    image = picture(mode=mode)
    (result,) = SD.inpaint("a dog", image, mask((0, 0, 9, 9)), **QUICK)
    assert (pixels(result)[9:] == pixels(image.convert("RGB"))[9:]).all()
    assert SD.img2img("a dog", image, **QUICK)[0].mode == "RGB"
