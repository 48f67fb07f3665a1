"""A seed is an image: the same noise at any batch size and order, the same picture but for rounding, and bit for bit
where the shape of the batch and the number of threads are the same."""

import pytest
import torch
from lively import lively, mask, picture, pixels

from minisd.diffusion.samplers import SAMPLERS, Step
from minisd.tasks import img2img, inpaint, txt2img

SD = lively()
INPAINTING = lively("SD1_INPAINT")
SHORT, LONG = "a red apple", "a green pear on a blue plate, " * 16  # LONG: two chunks of 75 tokens
assert 75 < len(SD.tokenizer.encode(LONG)) <= 150
PROMPTS = [SHORT, LONG, "a dog"]
TASKS = {
    "txt2img": lambda **options: txt2img(SD, PROMPTS, **options),
    "two passes": lambda **options: txt2img(SD, PROMPTS, height=48, width=56, hires_fix=0.6, **options),
    "variations": lambda **options: txt2img(SD, PROMPTS, variation_seed=90, variation_strength=0.3, **options),
    "img2img": lambda **options: img2img(SD, PROMPTS, picture(), **options),
    "inpaint": lambda **options: inpaint(SD, PROMPTS, picture(), mask((3, 3, 20, 30)), **options),
    "inpaint, 9 channels": lambda **options: inpaint(
        INPAINTING, PROMPTS, picture(), mask((3, 3, 20, 30)), strength=0.9, **options
    ),
}


def draws_of(task, batch_size: int) -> list[list[torch.Tensor]]:
    """All noise that each image of a call draws: a sampler that asks for noise and leaves x to it."""

    def sampler(model, x, schedule, timesteps, *, noise):
        draws.append(x)
        for t in timesteps:
            x = noise(x)
            draws.append(x)
            yield Step(x.clone(), x, t, None)

    images = []
    options = dict(steps=3, sampler=sampler, batch_size=batch_size, prompt_syntax="chunked")
    for sampling in task(num_images=2, seed=5, **options):
        draws = []
        sampling.images()
        images += zip(*draws, strict=True)
    return images


def run(task, batch_size: int, sampler: str = "ddim", **own):
    """(latents 'n c h w', pictures) of a call of two images for each of three prompts."""
    options = dict(steps=5, sampler=sampler, batch_size=batch_size, prompt_syntax="chunked", guidance_scale=4, **own)
    latents, images = [], []
    for sampling in task(num_images=2, seed=5, **options):
        images += [] if sampling.is_draft else sampling.images()
        latents += [] if sampling.is_draft else [sampling.latents]
    return torch.cat(latents), images


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("task", ["txt2img", "variations", "img2img", "inpaint", "inpaint, 9 channels"])
def test_noise_is_bit_equal_at_any_batch_size(task, batch_size):
    alone, together = draws_of(TASKS[task], 1), draws_of(TASKS[task], batch_size)
    assert len(alone) == len(together) == 6
    for own, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_no_two_images_and_no_two_draws_are_alike():
    draws = [draw for image in draws_of(TASKS["txt2img"], 4) for draw in image]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws) == 6 * 4


@pytest.mark.parametrize(("sampler", "own"), [*((name, {}) for name in SAMPLERS), ("ddim", {"eta": 1.0})])
def test_every_sampler_draws_the_same_picture_at_any_batch_size(sampler, own):
    assert_same_but_for_rounding(TASKS["txt2img"], sampler, **own)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_draws_the_same_picture_at_any_batch_size(task):
    assert_same_but_for_rounding(TASKS[task], "euler_ancestral")


def assert_same_but_for_rounding(task, sampler, **own):
    alone, pictures = run(task, 1, sampler, **own)
    together, others = run(task, 4, sampler, **own)
    # the contract of the house: matrix products of other shapes round otherwise
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    for one, other in zip(pictures, others, strict=True):
        assert pixels(one).std() > 20  # a flat picture would prove nothing
        assert abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_call_gives_the_same_bits(sampler):
    first, second = run(TASKS["txt2img"], 4, sampler), run(TASKS["txt2img"], 4, sampler)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]


def test_in_a_batch_of_the_same_shape_other_neighbours_change_no_bit():
    options = dict(steps=6, batch_size=3)
    apple, pear = (
        next(iter(txt2img(SD, ["a dog", prompt, "a cat"], seed=5, **options))) for prompt in ("apple", "pear")
    )
    assert apple.images()[0] == pear.images()[0]
    assert apple.images()[2] == pear.images()[2]
    assert apple.images()[1] != pear.images()[1]
    assert torch.equal(apple.latents[[0, 2]], pear.latents[[0, 2]])


def test_image_i_of_a_call_is_the_image_of_seed_plus_i_with_prompts_outermost():
    call = SD.txt2img(["a dog", "a cat"], num_images=2, seed=5, steps=5)
    alone = [("a dog", 5), ("a dog", 6), ("a cat", 7), ("a cat", 8)]
    assert call == [image for prompt, seed in alone for image in SD.txt2img(prompt, seed=seed, steps=5)]


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    SD.txt2img("a dog", steps=3, sampler="ddpm")
    SD.inpaint("a dog", picture(), mask((3, 3, 20, 30)), steps=3, sampler="ddim", eta=1.0)
    assert torch.equal(torch.get_rng_state(), before)
