"""What cannot be done is refused in one helpful sentence."""

import pytest
from lively import lively, mask, only, picture

from minisd.tasks import img2img

SD, INPAINTING = lively(), lively("SD1_INPAINT")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps is 0: give 1 or more"),
        ({"steps": 1001}, "1001 steps were asked of a schedule of 1000: give 1 to 1000"),
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"sampler": "dimm"}, "unknown sampler 'dimm'; known: ddim, ddpm"),
        ({"spacing": "even"}, "unknown spacing 'even'; known: leading"),
        ({"prompt_syntax": "midjourney"}, "unknown prompt syntax 'midjourney'; known: plain"),
        ({"eta": 0.5, "sampler": "euler"}, "eta=0.5 belongs to ddim, euler_ancestral, not to euler"),
        ({"eta": 1.5}, r"eta is 1.5: it lies in \[0, 1\]"),
        ({"guidance_rescale": 2}, r"guidance_rescale is 2: it lies in \[0, 1\]"),
        ({"height": 33}, r"height 33 is not a multiple of 2 \(the VAE's factor\): use 32 or 34"),
        ({"width": 0}, "width 0 is not a multiple of 2"),
        ({"width": -8}, "width -8 is not a multiple of 2 .*: use 2 or 4"),
        ({"width": 32.0}, "width is 32.0: give a whole number of pixels"),
        ({"vae_tiling": 7}, "vae_tiling is 7 rows: give a multiple of 2, or 0 for no tiling"),
        ({"seed": -1}, "seed is -1: give a whole number from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808: give a whole number from 0 to"),
        ({"seed": 1.5}, "seed is 1.5: give a whole number"),
        ({"num_images": 0}, "num_images is 0: give 1 or more"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts: give one, or one for each"),
        ({"variation_seed": 1, "variation_strength": 1.5}, r"variation_strength is 1.5: it lies in \[0, 1\]"),
        (
            {"variation_strength": 0.5},
            "variation_strength is 0.5, but there is no variation_seed to turn towards: give one",
        ),
        ({"variation_seed": -3, "variation_strength": 0.5}, "variation_seed is -3: give a whole number"),
        ({"height": 64, "hires_fix": 1.5}, r"hires_fix is 1.5: a denoising strength lies in \(0, 1\]"),
        ({"step": 3}, "txt2img has no option 'step': did you mean 'steps'"),
        (
            {"strength": 0.5},
            "txt2img has no option 'strength': did you mean 'variation_strength'[?] known: batch_size, clip_skip",
        ),
    ],
)
def test_impossible_options_get_one_helpful_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        SD.txt2img("a dog", **options)
    assert "\n" not in str(error.value)


def test_impossible_pictures_and_strengths_get_one_helpful_sentence():
    for strength in (0, -1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
            SD.img2img("a dog", picture(), strength=strength)
    with pytest.raises(ValueError, match=r"strength 0.01 of 30 steps runs none: use 0.034 or more, or exact_steps"):
        SD.img2img("a dog", picture(), strength=0.01)
    assert len(only(img2img(SD, "", picture(), strength=0.034, steps=30))) == 1
    with pytest.raises(ValueError, match="leaves 10 of the schedule's 1000 timesteps, too few for exactly 30 steps"):
        SD.img2img("a dog", picture(), strength=0.01, exact_steps=True)
    with pytest.raises(ValueError, match=r"0×5 .* give 1 or more"):
        SD.img2img("a dog", picture(), height=0, width=5)
    with pytest.raises(ValueError, match="a PIL image, not str"):
        SD.img2img("a dog", "picture.png")
    with pytest.raises(ValueError, match="the mask has no white part: there is nothing to repaint"):
        SD.inpaint("a dog", picture(), mask((0, 0, 0, 0)))
    with pytest.raises(ValueError, match="the mask is 31×32, the image 32×32"):
        SD.inpaint("a dog", picture(), mask((0, 0, 5, 5), 31))
    with pytest.raises(ValueError, match="feather is -1"):
        SD.inpaint("a dog", picture(), mask((0, 0, 5, 5)), feather=-1)
    with pytest.raises(ValueError, match="too thin for this model to see"):
        INPAINTING.inpaint("a dog", picture(), mask((5, 0, 6, 32)))
    with pytest.raises(ValueError, match=r"left=0 right=-2 .* give new pixels for at least one side"):
        SD.outpaint("a dog", picture(), right=-2)
    with pytest.raises(ValueError, match="give new pixels"):
        SD.outpaint("a dog", picture())
    with pytest.raises(ValueError, match="no prompt was given"):
        SD.txt2img([])
    with pytest.raises(ValueError, match="a prompt must be a str, not int"):
        SD.txt2img([3])


def test_a_model_is_refused_the_tasks_it_was_not_made_for():
    with pytest.raises(ValueError, match=r"inpainting model \(9 channels\): use inpaint"):
        INPAINTING.txt2img("a dog")
    for kind in ("SD2_DEPTH", "SD2_UNCLIP_H", "SD_X4_UPSCALER"):
        sd = lively(kind)
        for draw in (
            lambda sd=sd: sd.txt2img("a"),
            lambda sd=sd: sd.img2img("a", picture()),
            lambda sd=sd: sd.inpaint("a", picture(), mask((0, 0, 9, 9))),
        ):
            with pytest.raises(ValueError, match="needs a model that takes a prompt and nothing more; tiny Stable"):
                draw()
