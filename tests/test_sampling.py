"""A sampling under way, in the hands of its caller; samplers with keywords, and samplers of one's own."""

from functools import partial

import torch
from lively import Watched, lively, only, pixels

from minisd.config import ScheduleConfig
from minisd.diffusion.samplers import ddim, euler
from minisd.tasks import txt2img
from minisd.tasks.images import to_pil

SD = lively()


def test_a_sampling_is_watched_and_stopped_from_the_callers_loop():
    sampling = only(txt2img(SD, "a dog", steps=7))
    seen = []
    for step in sampling:
        seen.append(step.t)
        if len(seen) == 3:
            break
    assert len(sampling) == 7
    assert torch.equal(sampling.latents, step.x)
    assert sampling.preview(step)[0].size == (32, 32)
    seen += [step.t for step in sampling]  # the rest
    assert seen == SD.schedule.timesteps(7)
    assert sampling.images() == SD.txt2img("a dog", steps=7)
    assert sampling.images() is sampling.images()


def test_what_is_decoded_is_what_the_pictures_are_finished_from():
    sampling = only(txt2img(SD, "a dog", steps=3))
    decoded = sampling.pixels()  # it takes the steps
    assert torch.equal(sampling.pixels(), decoded)
    assert to_pil(sampling.finish(decoded)) == sampling.images() == SD.txt2img("a dog", steps=3)


def test_the_preview_of_the_last_step_of_euler_is_the_picture():
    sampling = only(txt2img(SD, "a dog", steps=3, sampler="euler"))
    *_, last = sampling
    assert abs(pixels(sampling.preview(last)[0]) - pixels(sampling.images()[0])).max() <= 1


def test_a_batch_knows_its_prompts_and_seeds():
    samplings = list(txt2img(SD, ["a", "b"], negative_prompt=["c", "d"], num_images=2, seed=9, steps=1, batch_size=3))
    assert [list(zip(s.batch.seeds, s.batch.prompts, s.batch.negative_prompts, strict=True)) for s in samplings] == [
        [(9, "a", "c"), (10, "a", "c"), (11, "b", "d")],
        [(12, "b", "d")],
    ]


def test_a_sampler_of_ones_own_needs_no_registration():
    def my_sampler(model, x, schedule, timesteps, *, noise):
        yield from ddim(model, x, schedule, timesteps, eta=1.0, noise=noise)

    assert SD.txt2img("a dog", steps=4, sampler=my_sampler) == SD.txt2img("a dog", steps=4, eta=1.0)
    assert only(txt2img(SD, "a dog", steps=4, sampler=my_sampler)).images() == SD.txt2img(
        "a dog", steps=4, sampler="ddim", eta=1.0
    )


def test_a_samplers_own_keywords_are_bound_with_partial():
    churned = SD.txt2img("a dog", steps=4, sampler=partial(euler, s_churn=2.0))
    assert churned == SD.txt2img("a dog", steps=4, sampler=partial(euler, s_churn=2.0))
    assert churned != SD.txt2img("a dog", steps=4, sampler="euler")
    assert SD.txt2img("a dog", steps=4, sampler=partial(ddim, eta=0.5)) == SD.txt2img("a dog", steps=4, eta=0.5)


def test_a_karras_ladder_visits_real_times():
    sampling = only(txt2img(SD, "a dog", steps=5, sampler="dpmpp_2m", spacing="karras"))
    times = [step.t for step in sampling]
    sigmas = SD.schedule.sigma(torch.tensor(times))
    low, high = SD.schedule.sigmas[0] ** (1 / 7), SD.schedule.sigmas[-1] ** (1 / 7)
    torch.testing.assert_close(sigmas, torch.linspace(high, low, 5).double() ** 7, rtol=1e-5, atol=0)  # EDM, eq. 5
    assert times[1] % 1 != 0


def test_zero_terminal_snr_starts_from_pure_noise():
    sd = lively("SD2_V", schedule=ScheduleConfig(zero_terminal_snr=True))
    with Watched(sd) as watched:
        images = sd.txt2img("a dog", steps=3, spacing="trailing", guidance_rescale=0.7)
    assert watched.times[0] == 999
    assert pixels(images[0]).std() > 20


def test_a_prompt_is_encoded_once_a_call():
    encoded = []
    handle = SD.text_encoder.register_forward_pre_hook(lambda _, args: encoded.append(args))
    SD.txt2img(["a dog", "a cat"], num_images=3, steps=1, batch_size=2)
    handle.remove()
    assert len(encoded) == 3  # and ""
