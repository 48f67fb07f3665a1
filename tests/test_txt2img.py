"""From prompts to pictures: sizes, guidance, prompts, seeds turned into one another, two passes, stripes."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from lively import Watched, lively, only, picture, pixels
from PIL import Image

from minisd.diffusion.samplers import ddim
from minisd.models.unet import Conditioning
from minisd.tasks import txt2img
from minisd.tasks.images import to_tensor, to_uint8

KINDS = {"eps": lively("SD1"), "v": lively("SD2_V"), "x_0": lively("SD1", prediction="x_0")}
SD = KINDS["eps"]
QUICK = {"steps": 2, "guidance_scale": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_txt2img_is_the_four_hops_written_out(kind):
    """Prompt → context → guided model → ddim → decode: the README's picture of it, by hand."""
    sd = KINDS[kind]
    cond, uncond = sd.encode_prompt(["a red apple"]), sd.encode_prompt(["grey"])
    x_T = torch.randn(1, 4, 16, 20, generator=torch.Generator().manual_seed(3))

    def model(x, t):
        out_c, out_u = sd.unet(x, t, cond), sd.unet(x, t, uncond)
        out = out_u + 4 * (out_c - out_u)
        abar = sd.schedule.alpha_cumprod(t).float()
        if kind == "eps":
            return out
        return abar.sqrt() * out + (1 - abar).sqrt() * x if kind == "v" else (x - abar.sqrt() * out) / (1 - abar).sqrt()

    with torch.no_grad():
        *_, last = ddim(model, x_T, sd.schedule, sd.schedule.timesteps(6))
        expected = to_uint8(sd.vae.decode(last.x))
    sampling = only(
        txt2img(
            sd,
            "a red apple",
            negative_prompt="grey",
            seed=3,
            height=32,
            width=40,
            steps=6,
            guidance_scale=4,
        )
    )
    (image,) = sampling.images()
    torch.testing.assert_close(sampling.latents, last.x, rtol=1e-4, atol=1e-4)  # v and x_0 were converted in float32
    assert abs(to_uint8(to_tensor(image)).int() - expected.int()).max() <= 1


def test_the_promised_arguments_give_pil_images():
    images = SD.txt2img(
        "a red apple",
        negative_prompt="",
        steps=3,
        guidance_scale=7.5,
        seed=0,
        height=None,
        width=None,
        num_images=2,
        sampler="ddim",
    )
    assert [type(image) for image in images] == [Image.Image] * 2
    assert [image.size for image in images] == [(32, 32)] * 2
    assert images[0] != images[1]


def test_encode_prompt_gives_the_conditioning_that_the_unet_takes():
    cond = SD.encode_prompt(["a cat", "a dog"])
    assert isinstance(cond, Conditioning)
    assert torch.equal(cond.context, SD.text_encoder(SD.tokenizer(["a cat", "a dog"])))
    assert not cond.context.requires_grad


@pytest.mark.parametrize(("height", "width"), [(2, 2), (6, 10), (34, 46), (50, 18), (22, 130)])
def test_any_multiple_of_the_vae_factor_is_a_size(height, width):
    deep = replace(SD.config.unet, channel_mult=(1, 1, 1), attention_levels=(0, 2))  # odd sides on the way down
    sd = lively("SD1", unet=deep)
    assert sd.txt2img("a dog", height=height, width=width, **QUICK)[0].size == (width, height)


@pytest.mark.parametrize(("scale", "evaluations"), [(1.0, 1), (7.5, 2), (0.0, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_scale_1_runs_the_network_on_half_as_much(kind, scale, evaluations):
    with Watched(KINDS[kind]) as watched:
        KINDS[kind].txt2img("a dog", steps=5, num_images=3, batch_size=3, guidance_scale=scale)
    assert watched.batch_sizes == [3 * evaluations] * 5


def test_guidance_scale_1_does_not_look_at_the_negative_prompt():
    first, second = (SD.txt2img("a dog", negative_prompt=n, steps=3, guidance_scale=1) for n in ("", "grey"))
    assert first == second
    assert SD.txt2img("a dog", negative_prompt="grey", steps=3) != SD.txt2img("a dog", steps=3)


def test_guidance_acts_within_its_interval_only():
    with Watched(SD) as watched:
        SD.txt2img("a dog", steps=10, guidance_interval=(300, 700))
    doubled = [t for t, size in zip(watched.times, watched.batch_sizes, strict=True) if size == 2]
    assert doubled == [t for t in watched.times if 300 <= t <= 700] == [601, 501, 401, 301]


@pytest.mark.parametrize("kind", KINDS)
def test_full_rescale_gives_the_guided_output_the_deviation_of_the_conditional(kind):
    sd, deviations = KINDS[kind], []
    cond, uncond = sd.encode_prompt("a dog"), sd.encode_prompt("")
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), 500
    for scale, rescale in ((1.0, 0.0), (9.0, 1.0), (9.0, 0.0)):
        with torch.no_grad():
            eps = sd.denoiser(cond, uncond, guidance_scale=scale, guidance_rescale=rescale)(x, t).eps
        x_0 = sd.schedule.x_0_from_eps(x, t, eps)
        raw = {"eps": eps, "v": sd.schedule.v_from_eps(x, t, eps), "x_0": x_0}[kind]
        deviations.append(raw.std().item())
    conditional, rescaled, guided = deviations
    assert rescaled == pytest.approx(conditional, rel=1e-4)
    assert guided > 1.2 * conditional


@pytest.mark.parametrize("prompt_syntax", ["plain", "chunked", "a1111", "comfyui"])
def test_every_prompt_convention_reaches_the_unet(prompt_syntax):
    prompt = "a (red) [apple] " + "on a very long table " * 20
    with Watched(SD) as watched:
        plain = prompt_syntax == "plain"
        prompt = prompt[:15] if plain else prompt
        SD.txt2img(prompt, steps=1, prompt_syntax=prompt_syntax, height=8, width=8)
    ((_, _, cond),) = watched.calls
    assert cond.context.shape[1] == (77 if plain else 154)


def test_weights_of_a_prompt_change_the_picture_in_conventions_that_read_them():
    def draw(prompt, prompt_syntax):
        return SD.txt2img(prompt, steps=2, prompt_syntax=prompt_syntax, height=8, width=8)

    for prompt_syntax in ("a1111", "comfyui"):
        assert draw("a (red:1.4) apple", prompt_syntax) != draw("a red apple", prompt_syntax)
    assert draw("a red apple", "chunked") == draw("a red apple", "plain")


def test_a_prompt_too_long_for_the_plain_convention_says_what_was_dropped():
    with pytest.warns(UserWarning, match="last words"):
        SD.txt2img("word " * 90 + "last words", steps=1, height=8, width=8)


def test_clip_skip_leaves_blocks_of_the_text_encoder_out():
    for sd, own in ((SD, 0), (KINDS["v"], 1)):
        contexts = [sd.encode_prompt("a dog", clip_skip=skip).context for skip in (None, 0, 1)]
        assert torch.equal(contexts[0], contexts[1 + own])
        assert not torch.equal(contexts[1], contexts[2])
    with pytest.raises(ValueError, match="skip=3 blocks of 3: allowed are 0 to 2"):
        SD.txt2img("a dog", clip_skip=3)


def test_given_latents_take_the_place_of_the_noise():
    x_T = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6, 7)])
    assert SD.txt2img("a dog", num_images=3, latents=x_T, **{"steps": 2, "batch_size": 2, "seed": 5}) == SD.txt2img(
        "a dog", num_images=3, seed=5, steps=2, batch_size=2
    )
    assert SD.txt2img("a dog", latents=x_T[1:], steps=2) == SD.txt2img("a dog", seed=6, steps=2)
    with pytest.raises(ValueError, match=r"latents have the shape \(3, 4, 16, 16\): this call needs \(4, 4, 16, 16\)"):
        SD.txt2img("a dog", num_images=4, latents=x_T, batch_size=4)
    with pytest.raises(ValueError, match=r"this call needs \(1, 4, 16, 20\)"):
        SD.txt2img("a dog", width=40, latents=x_T)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_variations_lead_from_the_picture_of_one_seed_to_those_of_others(sampler):
    same = {"steps": 3, "sampler": sampler}
    start = SD.txt2img("a dog", seed=4, **same)
    ends = SD.txt2img("a dog", seed=70, num_images=2, **same)
    vary = partial(SD.txt2img, "a dog", seed=4, variation_seed=70, num_images=2, **same)
    assert vary(variation_strength=0.0) == start * 2
    assert vary(variation_strength=1.0) == ends
    between = vary(variation_strength=0.2)
    assert between[0] != between[1]
    assert not {*map(id, between)} & {*map(id, start + ends)}


@pytest.mark.parametrize("variation_strength", [0.1, 0.5, 0.9])
def test_the_noise_of_a_variation_is_standard_normal_and_in_between(variation_strength):
    wide = {"height": 128, "width": 128, "steps": 1}
    start = only(txt2img(SD, "", seed=0, **wide)).latents
    end = only(txt2img(SD, "", seed=1, **wide)).latents
    between = only(txt2img(SD, "", seed=0, variation_seed=1, variation_strength=variation_strength, **wide)).latents
    assert between.std().item() == pytest.approx(1, abs=0.02)  # 16384 draws: ± 0.6 %
    angle = math.pi / 2 * variation_strength  # independent noises are at right angles
    cosines = [torch.cosine_similarity(between.flatten(), x.flatten(), dim=0).item() for x in (start, end)]
    assert cosines == pytest.approx([math.cos(angle), math.sin(angle)], abs=0.03)


def test_two_passes_draw_at_the_models_own_size_and_then_redraw_enlarged():
    samplings, sizes = [], []
    for sampling in txt2img(SD, "a dog", height=64, width=96, hires_fix=0.5, steps=6):
        samplings.append(sampling)
        sizes.append(tuple(sampling.latents.shape[-2:]))
        sampling.images()
    first, second = samplings
    assert sizes == [(14, 20), (32, 48)]  # 28×40 pixels: about 32² of them, in about the proportions of 64×96
    assert (len(first), len(second)) == (6, 3)
    assert (first.is_draft, second.is_draft) == (True, False)
    assert SD.txt2img("a dog", height=64, width=96, hires_fix=0.5, steps=6) == second.images()


def test_the_second_pass_starts_from_the_first_enlarged_and_noised():
    options = {"height": 64, "width": 64, "steps": 10, "guidance_scale": 2}
    first, second = txt2img(SD, "a dog", seed=8, hires_fix=0.5, **options)
    g = torch.Generator().manual_seed(8)
    torch.randn(1, 4, 16, 16, generator=g)  # the first pass's x_T
    with torch.no_grad():
        draft = SD.vae.decode(first.latents).clamp(-1, 1)
        posterior = SD.vae.encode(torch.nn.functional.interpolate(draft, scale_factor=2, mode="bicubic"))
    x_0 = posterior.mean + posterior.std * torch.randn(1, 4, 32, 32, generator=g)
    x_t = SD.schedule.q_sample(x_0, 401, torch.randn(1, 4, 32, 32, generator=g))
    torch.testing.assert_close(second.latents, x_t, rtol=0, atol=1e-4)  # float32, through an encoder


def test_two_passes_are_one_at_the_models_own_size():
    assert SD.txt2img("a dog", steps=3, hires_fix=0.5) == SD.txt2img("a dog", steps=3)


@pytest.mark.parametrize("vae_tiling", [8, 10, 64])
def test_a_vae_in_stripes_draws_the_same_picture(vae_tiling):
    whole = SD.txt2img("a dog", height=66, width=34, steps=3, vae_tiling=0)
    striped = SD.txt2img("a dog", height=66, width=34, steps=3, vae_tiling=vae_tiling)
    assert abs(pixels(whole[0]) - pixels(striped[0])).max() <= 1
    whole, striped = (SD.img2img("a dog", picture(34, 66), steps=3, vae_tiling=t) for t in (0, vae_tiling))
    assert abs(pixels(whole[0]) - pixels(striped[0])).max() <= 1


def test_large_pictures_take_stripes_by_themselves(monkeypatch):
    from minisd.models import latents

    asked = []
    monkeypatch.setattr(latents, "tiled_decode", lambda vae, z, rows: asked.append(rows) or vae.decode(z))
    monkeypatch.setattr(latents, "TILE_ABOVE", 32 * 32)
    SD.txt2img("a dog", height=32, width=32, steps=1)
    assert asked == []
    SD.txt2img("a dog", height=32, width=34, steps=1)
    SD.txt2img("a dog", height=32, width=34, steps=1, vae_tiling=0)
    assert asked == [64]
