"""NaN, infinity and black pictures: named by the layer they came from, mended where float32 mends them."""

import copy
import re
import warnings

import pytest
import torch
from lively import Watched, lively, mask, only, picture, pixels
from PIL import Image

from minisd.diffusion.samplers import ddim
from minisd.models.nonfinite import NonFiniteError
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import txt2img
from minisd.tasks.images import to_pil


def damaged(network: str, layer: str, value: float = float("nan")) -> StableDiffusion:
    """A model, one weight of which is no number."""
    sd = lively()
    getattr(sd, network).get_submodule(layer).weight.data.view(-1)[0] = value
    return sd


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "layer",
    ["conv_in", "time_embed.0", "down.1.resample.conv", "mid.0.attn.blocks.0.attn2.to_k", "up.1.attn.norm", "conv_out"],
)
def test_the_unets_layer_with_a_damaged_weight_is_named(layer, value):
    sentence = f"the U-Net gave NaN or infinity at t = 801, first in the layer {layer}, whose weights hold it"
    with pytest.raises(NonFiniteError, match=re.escape(sentence)):
        damaged("unet", layer, value).txt2img("a dog", steps=5)


@pytest.mark.parametrize("layer", ["token_embedding", "blocks.1.attn.to_v", "final_norm"])
def test_the_text_encoders_layer_is_named(layer):
    sd = lively()
    # of an embedding the last row, which ends every prompt
    sd.text_encoder.get_submodule(layer).weight.data.view(-1)[-1] = float("nan")
    with pytest.raises(NonFiniteError, match=f"the text encoder .* first in the layer {layer}, whose weights"):
        sd.txt2img("a dog", steps=2)


@pytest.mark.parametrize("layer", ["post_quant_conv", "decoder.mid.attn_1.v", "decoder.up.1.upsample.conv"])
@pytest.mark.parametrize("vae_tiling", [0, 8])
def test_the_vaes_layer_is_named_with_and_without_stripes(layer, vae_tiling):
    with pytest.raises(
        NonFiniteError, match=rf"the VAE's decoder .* first in the layer {re.escape(layer)}, whose weights"
    ):
        damaged("vae", layer).txt2img("a dog", steps=2, vae_tiling=vae_tiling)


def test_the_encoders_layer_is_named_before_any_step_is_taken():
    sd = damaged("vae", "encoder.down.0.block.0.conv1")
    with (
        Watched(sd) as watched,
        pytest.raises(NonFiniteError, match=r"the VAE's encoder .* layer encoder\.down\.0\.block\.0\.conv1"),
    ):
        sd.img2img("a dog", picture(), steps=2)
    assert not watched.calls


def test_a_sampler_that_makes_nan_of_good_predictions_is_told_from_the_network():
    def broken(model, x, schedule, timesteps, *, noise):
        for step in ddim(model, x, schedule, timesteps):
            step.x.div_(torch.zeros(()))
            yield step

    with pytest.raises(NonFiniteError, match="no layer of it does when it runs again: look at the sampler"):
        lively().txt2img("a dog", steps=2, sampler=broken)


def overflowing(part: str) -> StableDiffusion:
    """A float16 VAE whose weights are fine and whose activations pass 65504."""
    sd = lively()
    conv = getattr(sd.vae, part).conv_in
    conv.weight.data *= 6e4 / conv.weight.abs().max()
    sd.vae.half()
    return sd


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_vae_that_overflows_in_half_precision_is_run_again_in_float32(part):
    sd = overflowing(part)
    wide = copy.copy(sd)
    wide.vae = copy.deepcopy(sd.vae).float()

    def draw(sd):
        if part == "decoder":
            return sd.txt2img("a dog", steps=2)
        return sd.img2img("a dog", picture(), steps=2)

    message = f"the VAE's {part} gave NaN or infinity in torch.float16: run again in float32"
    with pytest.warns(UserWarning, match=message):
        (image,) = draw(sd)
    assert sd.vae.quant_conv.weight.dtype == torch.float16  # the model is left as it was
    assert abs(pixels(image) - pixels(draw(wide)[0])).max() <= (0 if part == "decoder" else 4)  # decoded in float16


def test_a_half_precision_unet_that_overflows_is_named_with_the_way_out():
    sd = lively()
    sd.unet.half()
    sd.unet.down[0].res.conv1.weight.data.fill_(6e4)
    with pytest.raises(NonFiniteError, match=r"layer down\.0\.res\.conv1, in float16, which ends at 65504: load"):
        sd.txt2img("a dog", steps=2)


def test_half_precision_models_draw_without_a_warning():
    for dtype in (torch.bfloat16, torch.float16):
        sd = lively()
        for network in (sd.unet, sd.vae, sd.text_encoder):
            network.to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampling = only(txt2img(sd, "a dog", steps=3))
            (image,) = sampling.images()
        assert sampling.latents.dtype == torch.float32
        assert pixels(image).std() > 20


def test_black_pictures_are_remarked_on_with_their_seeds():
    sd = lively()
    sd.vae.decoder.conv_out.weight.data.zero_()
    sd.vae.decoder.conv_out.bias.data.fill_(-3)
    with pytest.warns(UserWarning, match="is all black") as seen:
        images = sd.txt2img("a dog", steps=2, seed=5, num_images=2, batch_size=2)
    assert images == to_pil(torch.full((2, 3, 32, 32), -1.0))
    assert [str(w.message)[:29] for w in seen] == ["the image of seed 5 is all bl", "the image of seed 6 is all bl"]


def test_dark_pictures_are_not_black():
    image = Image.new("RGB", (32, 32), (4, 0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lively().inpaint("a dog", image, mask((0, 0, 2, 2)), steps=2)
