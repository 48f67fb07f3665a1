"""Every network agrees with the original implementation's outputs (float32, CPU).

Tolerance: 5e-5 absolute, ten times what two official implementations differ by, and six times below the weakest
mistake that the references can see. The "small" cases bring the inputs of all norms to a variance near 1e-6, so that a
wrong epsilon changes them by more than 0.2.
"""

from dataclasses import replace

import pytest
import recipe
import torch
from reference import build, given, load, manifest

from minisd.checkpoints.keymaps import keymap, to_official
from minisd.config import (
    SD1,
    SD1_INPAINT,
    SD2_UNCLIP_H,
    SD2_V,
    SD_X4_UPSCALER,
    CLIPTextConfig,
    ControlNetConfig,
    UNetConfig,
    VAEConfig,
)
from minisd.models.clip import CLIPText
from minisd.models.controlnet import ControlNet, controlled
from minisd.models.unet import Conditioning, UNet
from minisd.models.vae import VAE, DiagonalGaussian

TINY = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (0, 1)}
TINY_SD1 = UNetConfig(**TINY, num_heads=4, context_dim=48)
TINY_SD2 = UNetConfig(**TINY, num_heads=None, head_width=16, context_dim=40, linear_projection=True)
TINY_VAE = VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)
TINY_TEXT = {
    "quick": CLIPTextConfig(vocab_size=200, length=16, width=64, layers=3, heads=4, mlp_width=256),
    "gelu": CLIPTextConfig(vocab_size=200, length=16, width=48, layers=2, heads=3, mlp_width=192, activation="gelu"),
}


def agrees(actual: torch.Tensor, expected: torch.Tensor, atol: float = 5e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------------- tiny ones


@pytest.mark.parametrize(("name", "config"), [("sd1", TINY_SD1), ("sd2", TINY_SD2)])
@torch.no_grad()
def test_tiny_unet_agrees_with_the_original(name, config):
    case = f"tiny_unet_{name}"
    unet = build(UNet, config, f"tiny-unet-{name}", "model.diffusion_model.", "ldm")
    cond = Conditioning(given(case, "context", 2, 7, config.context_dim))
    reference = load("tiny", case)
    agrees(unet(given(case, "x", 2, 4, 8, 12), reference["t"], cond), reference["out"])


@pytest.mark.parametrize(("name", "config"), [("sd1", TINY_SD1), ("sd2", TINY_SD2)])
def test_tiny_unet_has_the_originals_gradients(name, config):
    """Tolerance 1e-4 relative: a gradient sums thousands of products, and norms of it lie between 1e-2 and 4e2."""
    case = f"tiny_unet_{name}"
    unet = build(UNet, config, f"tiny-unet-{name}", "model.diffusion_model.", "ldm")
    x = given(case, "x", 2, 4, 8, 12).requires_grad_()
    context = given(case, "context", 2, 7, config.context_dim).requires_grad_()
    reference = load("tiny", case)
    out = unet(x, reference["t"], Conditioning(context))
    (out * given(case, "grad_weight", 2, 4, 8, 12)).sum().backward()
    agrees(x.grad, reference["out_grad_x"], 1e-4)
    agrees(context.grad, reference["out_grad_context"], 1e-4)

    grads = to_official({n: p.grad for n, p in unet.named_parameters()}, keymap(unet, "ldm"))
    keys = sorted(grads)
    norms = torch.stack([grads[key].norm() for key in keys])
    torch.testing.assert_close(norms, reference["out_grad_norm"].float(), rtol=1e-4, atol=1e-4)
    full = [f"model.diffusion_model.{key}" for key in keys]
    probes = [torch.from_numpy(recipe.array(f"probe:{k}", grads[key].shape)) for k, key in zip(full, keys, strict=True)]
    dots = torch.stack([(grads[key] * probe).sum() for key, probe in zip(keys, probes, strict=True)])
    torch.testing.assert_close(dots, reference["out_grad_probe"].float(), rtol=1e-4, atol=5e-3)


@torch.no_grad()
def test_tiny_vae_agrees_with_the_original():
    vae = build(VAE, TINY_VAE, "tiny-vae", "first_stage_model.", "ldm")
    reference = load("tiny", "tiny_vae")
    agrees(vae.moments((0.5 * given("tiny_vae", "x", 2, 3, 16, 24)).clamp(-1, 1)), reference["out_moments"])
    z = given("tiny_vae", "z", 2, 4, 8, 12)
    agrees(vae.decode(z * vae.config.scale_factor), reference["out_decoded"])


@pytest.mark.parametrize("name", ["quick", "gelu"])
@torch.no_grad()
def test_tiny_clip_text_agrees_with_the_original(name):
    reference = load("tiny", f"tiny_clip_text_{name}")
    text = build(CLIPText, TINY_TEXT[name], f"tiny-clip-text-{name}", "cond_stage_model.transformer.", "hf")
    agrees(text(reference["ids"]), reference["out_last"])
    agrees(text.states(reference["ids"], skip=1), reference["out_hidden_penultimate"])


@torch.no_grad()
def test_tiny_controlnet_agrees_with_the_original():
    """Residuals: 5e-5 of their largest value, as two official implementations differ by 1e-6 of it."""
    unet = build(UNet, TINY_SD1, "tiny-controlnet", "model.diffusion_model.", "ldm")
    control = build(ControlNet, ControlNetConfig(TINY_SD1), "tiny-controlnet", "control_model.", "ldm")
    reference = load("tiny", "tiny_controlnet")
    x, cond = given("tiny_controlnet", "x", 2, 4, 8, 12), Conditioning(given("tiny_controlnet", "context", 2, 7, 48))
    residuals = control(x, reference["t"], cond, reference["hint"])
    for i, residual in enumerate(residuals):
        expected = reference[f"out_res{i:02d}"]
        agrees(residual, expected, 5e-5 * expected.abs().max().item())
    agrees(unet(x, reference["t"], replace(cond, residuals=residuals)), reference["out_eps"])


# ---------------------------------------------------------------------------------------------- the official sizes

UNETS = [  # case, manifest, config, variant, batch, height, width, tokens
    ("unet_sd1_16x16", "sd-v1", SD1.unet, "standard", 2, 16, 16, 77),
    ("unet_sd1_32x24", "sd-v1", SD1.unet, "standard", 2, 32, 24, 77),
    ("unet_sd1_8x8_ctx154", "sd-v1", SD1.unet, "standard", 2, 8, 8, 154),
    ("unet_sd1_small_16x16", "sd-v1", SD1.unet, "small", 2, 16, 16, 77),
    ("unet_sd1_inpaint_16x16", "sd-v1-inpainting", SD1_INPAINT.unet, "standard", 2, 16, 16, 77),
    ("unet_sd2_16x16", "sd-v2-1", SD2_V.unet, "standard", 2, 16, 16, 77),
    ("unet_sd2_24x32_b1", "sd-v2-1", SD2_V.unet, "standard", 1, 24, 32, 77),
    ("unet_sd2_small_16x16_b1", "sd-v2-1", SD2_V.unet, "small", 1, 16, 16, 77),
    ("unet_x4_16x16_b1", "sd-x4-upscaler", SD_X4_UPSCALER.unet, "standard", 1, 16, 16, 77),
    ("unet_unclip_h_16x16_b1", "sd-2-1-unclip-h", SD2_UNCLIP_H.unet, "standard", 1, 16, 16, 77),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "name", "config", "variant", "b", "h", "w", "l"), UNETS, ids=[case[0] for case in UNETS]
)
@torch.no_grad()
def test_official_unet_agrees_with_the_original(case, name, config, variant, b, h, w, l):  # noqa: E741
    unet = build(UNet, config, name, "model.diffusion_model.", "ldm", variant)
    reference = load("full", case)
    y = reference.get("y")
    if config.vector_dim:
        y = given(case, "y", b, config.vector_dim)
    cond = Conditioning(given(case, "context", b, l, config.context_dim), y=y)
    x = given(case, "x", b, config.in_channels, h, w)
    agrees(unet(x, reference["t"], cond), reference["out"])
    agrees(unet(x, reference["t"], unet.with_keys_values(cond)), reference["out"])


VAES = [  # case, manifest, config, variant, batch, height, width
    ("vae_64x64", "sd-v1", SD1.vae, "standard", 2, 64, 64),
    ("vae_96x64", "sd-v1", SD1.vae, "standard", 1, 96, 64),
    ("vae_small_64x64", "sd-v1", SD1.vae, "small", 2, 64, 64),
    ("vae_f4_32x48", "sd-x4-upscaler", SD_X4_UPSCALER.vae, "standard", 1, 32, 48),
]


@pytest.mark.full
@pytest.mark.parametrize(("case", "name", "config", "variant", "b", "h", "w"), VAES, ids=[case[0] for case in VAES])
@torch.no_grad()
def test_official_vae_agrees_with_the_original(case, name, config, variant, b, h, w):
    vae = build(VAE, config, name, "first_stage_model.", "ldm", variant)
    reference, scale = load("full", case), config.scale_factor
    latent = (4, h // config.factor, w // config.factor)
    z, noise = given(case, "z", b, *latent), given(case, "noise", b, *latent)
    moments = vae.moments((0.5 * given(case, "x", b, 3, h, w)).clamp(-1, 1))
    posterior = DiagonalGaussian.from_moments(moments, config)
    latents = posterior.mean + posterior.std * noise
    agrees(moments, reference["out_moments"])
    agrees(latents / scale, reference["out_sample"])
    agrees(latents, reference["out_latent"])
    agrees(vae.decode(z * scale), reference["out_decoded"])
    agrees(vae.decode(posterior.mean), reference["out_recon"])


TEXTS = [
    ("clip_l_standard", "sd-v1", SD1.text, "cond_stage_model.transformer.", "hf", "standard"),
    ("clip_l_small", "sd-v1", SD1.text, "cond_stage_model.transformer.", "hf", "small"),
    ("clip_h_standard", "sd-v2-1", SD2_V.text, "cond_stage_model.model.", "openclip", "standard"),
    ("clip_h_small", "sd-v2-1", SD2_V.text, "cond_stage_model.model.", "openclip", "small"),
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "name", "config", "prefix", "dialect", "variant"), TEXTS, ids=[case[0] for case in TEXTS]
)
@torch.no_grad()
def test_official_text_encoder_agrees_with_the_original(case, name, config, prefix, dialect, variant):
    text = build(CLIPText, config, name, prefix, dialect, variant)
    reference = load("full", case)
    ids = reference["ids"]
    if dialect == "hf":
        agrees(text(ids)[..., ::8], reference["out_last"])
        agrees(text(ids[:1], skip=1)[..., ::8], reference["out_skip2_first"])
    else:
        agrees(text(ids)[..., ::8], reference["out_penultimate"])
        agrees(text(ids[:1], skip=0)[..., ::8][..., ::4], reference["out_last_first"])


@pytest.mark.full
@torch.no_grad()
def test_official_controlnet_agrees_with_the_original():
    case, config = "controlnet_16x16", ControlNetConfig(SD1.unet)
    unet = build(UNet, SD1.unet, "controlnet-cldm-v15", "model.diffusion_model.", "ldm")
    control = build(ControlNet, config, "controlnet-cldm-v15", "control_model.", "ldm")
    reference, all_residuals = load("full", case), load("full", case + "_residuals")
    x, t, cond = given(case, "x", 2, 4, 16, 16), reference["t"], Conditioning(given(case, "context", 2, 77, 768))
    hint = reference["hint_u8"].float() / 255
    for i, residual in enumerate(control(x, t, cond, hint)):
        expected = all_residuals[f"out_res{i:02d}"]
        agrees(residual[:, i % 8 :: 8], expected, 5e-5 * expected.abs().max().item())
    middle = tuple(r * (i == 12) for i, r in enumerate(control(x, t, cond, hint)))
    agrees(unet(x, t, cond), reference["out_eps_plain"])
    agrees(unet(x, t, replace(cond, residuals=middle)), reference["out_eps_mid"])
    agrees(controlled(unet, control, hint)(x, t, cond), reference["out_eps"])
    agrees(controlled(unet, control, hint, scale=0.7, decay=0.825)(x, t, cond), reference["out_eps_guess"])


@pytest.mark.parametrize(
    ("name", "prefix", "parameters"),
    [
        ("sd-v1", "model.diffusion_model.", 859_520_964),
        ("sd-v2-1", "model.diffusion_model.", 865_910_724),
        ("sd-x4-upscaler", "model.diffusion_model.", 473_398_020),
    ],
)
def test_official_unets_have_the_published_number_of_parameters(name, prefix, parameters):
    config = {"sd-v1": SD1, "sd-v2-1": SD2_V, "sd-x4-upscaler": SD_X4_UPSCALER}[name]
    with torch.device("meta"):
        unet = UNet(config.unet)
    listed = {k for k in manifest(name)["tensors"] if k.startswith(prefix)}
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == len(listed)
