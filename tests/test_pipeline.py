"""The pipeline made of networks: the loop that one writes by hand is the one that the tasks run, on any network."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lively import lively, mask, picture, pixels

import minisd
from minisd.cli import main
from minisd.models.unet import UNet
from minisd.tasks.images import to_pil

KINDS = {prediction: lively("SD1", prediction=prediction) for prediction in ("eps", "v", "x_0")}
TASKS = {
    "txt2img": lambda sd, **options: sd.txt2img("a dog", steps=3, num_images=2, batch_size=2, **options),
    "hires fix": lambda sd, **options: sd.txt2img("a dog", steps=3, height=64, width=64, hires_fix=0.7, **options),
    "img2img": lambda sd, **options: sd.img2img("a dog", picture(), steps=3, **options),
    "inpaint": lambda sd, **options: sd.inpaint("a dog", picture(), mask((4, 4, 28, 28)), steps=3, **options),
    "outpaint": lambda sd, **options: sd.outpaint("a dog", picture(), right=16, steps=3, **options),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_loop_written_by_hand_draws_the_image_of_txt2img_bit_for_bit(kind, scale):
    sd = KINDS[kind]
    cond, uncond = sd.encode_prompt("a dog"), sd.encode_prompt("")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        model = sd.denoiser(cond, uncond, guidance_scale=scale)
        for step in minisd.samplers.ddim(model, x, sd.schedule, sd.schedule.timesteps(5)):
            x = step.x
        by_hand = to_pil(sd.decode(x))[0]
    (image,) = sd.txt2img("a dog", seed=7, steps=5, guidance_scale=scale)
    assert np.array_equal(np.asarray(by_hand), np.asarray(image))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_takes_a_network_in_place_of_the_unet(task):
    sd, calls = KINDS["v"], []

    def watched(x_t, t, cond):
        calls.append(t)
        return sd.unet(x_t, t, cond)

    for image, plain in zip(TASKS[task](sd, network=watched), TASKS[task](sd), strict=True):
        assert abs(pixels(image) - pixels(plain)).max() <= 1  # the U-Net alone computes keys and values beforehand
    assert len(calls) >= 2
    coloured = TASKS[task](sd, network=lambda x_t, t, cond: sd.unet(x_t, t, cond) + 0.5)
    assert all(a.tobytes() != b.tobytes() for a, b in zip(coloured, TASKS[task](sd), strict=True))


def test_a_wrapper_passes_residuals_on_as_a_controlnet_does():
    sd = KINDS["eps"]
    plan = sd.config.unet.plan()
    zeros = (*[torch.zeros(())] * len(plan.skip_channels), torch.zeros(1, plan.mid[-1].out_channels, 1, 1))
    strong = (*zeros[:-1], zeros[-1] + 3)

    def with_residuals(residuals):
        return lambda x_t, t, cond: sd.unet(x_t, t, replace(cond, residuals=residuals))

    plain = sd.txt2img("a dog", steps=3, network=sd.unet)
    assert sd.txt2img("a dog", steps=3, network=with_residuals(zeros)) == plain
    assert sd.txt2img("a dog", steps=3, network=with_residuals(strong)) != plain


def test_another_models_unet_is_not_given_the_keys_and_values_of_ones_own():
    sd, other = lively("SD1"), lively("SD1", seed=1)
    images = sd.txt2img("a dog", steps=3, network=other.unet)
    sd.unet = other.unet
    assert abs(pixels(images[0]) - pixels(sd.txt2img("a dog", steps=3)[0])).max() <= 1


def test_a_model_is_made_of_networks_without_a_file(tmp_path):
    sd = lively("SD2_V")
    made = minisd.StableDiffusion(sd.unet, sd.vae, sd.text_encoder, sd.tokenizer, sd.schedule, sd.config)
    assert made.txt2img("a dog", steps=2) == sd.txt2img("a dog", steps=2)
    made.save(tmp_path / "made.safetensors")
    assert minisd.load(tmp_path / "made.safetensors").config == made.config


def test_from_the_command_line_to_the_unet_it_is_five_hops_at_most(tmp_path, monkeypatch):
    """A hop: from one function of the package to another, generators included, seen on the stack of a forward."""
    stacks, forward = [], UNet.forward

    def watched(self, *args):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if (module := frame.f_globals.get("__name__", "")).startswith("minisd."):
                names.append(f"{module}:{frame.f_code.co_name}")
            frame = frame.f_back
        stacks.append([*reversed(names), "minisd.models.unet:forward"])
        return forward(self, *args)

    monkeypatch.setattr(UNet, "forward", watched)
    arguments = ["--checkpoint", "tests/data/tiny.safetensors", "--steps", "1", "--out", str(tmp_path / "a.png")]
    assert main(["txt2img", "a dog", *arguments]) == 0
    for stack in stacks:
        path = stack[max(i for i, name in enumerate(stack) if name.startswith("minisd.cli")) :]
        assert len(path) - 1 <= 5, " → ".join(path)
