"""Live comparison with diffusers, transformers and open_clip.

What minisd saves they load, what they save minisd loads, and the outputs agree.
"""

import json
from dataclasses import replace

import pytest
import torch
from tiny import TINY, checkpoint, contiguous, ldm_file, random_network, same_tensors, weight

from minisd.checkpoints.files import save_safetensors
from minisd.checkpoints.keymaps import keymap, to_official
from minisd.checkpoints.load import load_checkpoint, load_network
from minisd.checkpoints.save import save_checkpoint
from minisd.config import ControlNetConfig
from minisd.diffusion.schedule import Schedule, scaled_linear_betas
from minisd.models.unet import Conditioning
from minisd.text.tokenizer import Tokenizer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ATOL = 5e-5  # float32: ten times as far as the original implementations are apart


@pytest.fixture(autouse=True)
def no_grad_and_fixed_draws():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_agrees(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    assert theirs.std() > 0.01  # a comparison of something


# ------------------------------------------------------------------------------------------ the same call on both sides


def assert_same_unet(ours, theirs):
    config = ours.config
    x, t = torch.randn(2, config.in_channels, 8, 12), torch.tensor([3, 981])
    context = torch.randn(2, 7, config.context_dim)
    y = None
    if config.num_classes:
        y = torch.tensor([0, config.num_classes - 1])
    if config.vector_dim:
        y = torch.randn(2, config.vector_dim)
    assert_agrees(ours(x, t, Conditioning(context, y=y)), theirs(x, t, context, class_labels=y).sample)


def assert_same_vae(ours, theirs):
    image = torch.randn(1, 3, 32, 16)
    assert_agrees(ours.encode(image).mean, theirs.encode(image).latent_dist.mean * theirs.config.scaling_factor)
    latents = torch.randn(1, 4, 4, 6)
    assert_agrees(ours.decode(latents), theirs.decode(latents / theirs.config.scaling_factor).sample)
    assert ours.config.scale_factor == theirs.config.scaling_factor


def assert_same_text(ours, theirs):
    ids = torch.randint(0, ours.config.vocab_size - 2, (2, ours.config.length))
    assert_agrees(ours(ids), theirs(ids).last_hidden_state)


def assert_same_vision(ours, theirs):
    image = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
    assert_agrees(ours(image), theirs(image).image_embeds)


# ---------------------------------------------------------------------------------------------- what minisd saves


KINDS = ["SD1", "SD1_INPAINT", "SD1_PIX2PIX", "SD2_BASE", "SD2_V", "SD2_INPAINT", "SD2_DEPTH"]
KINDS += ["SD2_UNCLIP_H", "SD2_UNCLIP_L", "SD_X4_UPSCALER"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_component_that_minisd_saves_is_loaded_by_its_own_class_and_agrees(tmp_path, kind):
    made = checkpoint(kind)
    save_checkpoint(made, tmp_path / "m", layout="diffusers")
    load = {"low_cpu_mem_usage": False}
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "m" / "unet", **load).eval()
    assert_same_unet(made.networks["unet"], theirs)
    assert_same_vae(
        made.networks["vae"], diffusers.AutoencoderKL.from_pretrained(tmp_path / "m" / "vae", **load).eval()
    )
    text = transformers.CLIPTextModel.from_pretrained(tmp_path / "m" / "text_encoder").eval()
    assert_same_text(made.networks["text"], text)
    if "vision" in made.networks:
        vision = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "m" / "image_encoder").eval()
        assert_same_vision(made.networks["vision"], vision)


@pytest.mark.parametrize("kind", ["SD1", "SD2_V"])
def test_the_saved_tokenizer_is_theirs(tmp_path, kind):
    text = replace(TINY[kind].text, vocab_size=49410, bos_id=49406, eos_id=49407)
    text = replace(text, pad_id=0 if kind == "SD2_V" else 49407)
    made = checkpoint(replace(TINY[kind], text=text), added_tokens={"<my-cat>": [49408, 49409]})
    save_checkpoint(made, tmp_path / "m", layout="diffusers")
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / "m" / "tokenizer")
    ids = theirs("a photo of a red apple, 4k", padding="max_length", max_length=77, return_tensors="pt").input_ids
    ours = Tokenizer(pad_id=text.pad_id, dialect=text.dialect, added_tokens=made.added_tokens)
    assert torch.equal(ours("a photo of a red apple, 4k"), ids)
    assert theirs("<my-cat> <my-cat>_1").input_ids[1:-1] == [49408, 49409]


PIPELINES = {
    "SD1": "StableDiffusionPipeline",
    "SD1_INPAINT": "StableDiffusionInpaintPipeline",
    "SD1_PIX2PIX": "StableDiffusionInstructPix2PixPipeline",
    "SD2_BASE": "StableDiffusionPipeline",
    "SD2_V": "StableDiffusionPipeline",
    "SD2_INPAINT": "StableDiffusionInpaintPipeline",
    "SD2_UNCLIP_H": "StableUnCLIPImg2ImgPipeline",
    "SD_X4_UPSCALER": "StableDiffusionUpscalePipeline",
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_saved_folder_is_a_pipeline(tmp_path, kind):
    made = checkpoint(kind)
    save_checkpoint(made, tmp_path / "m", layout="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    assert type(pipeline).__name__ == PIPELINES[kind]
    said = pipeline.scheduler.config
    assert (said.beta_start, said.beta_end) == (made.config.schedule.start, made.config.schedule.end)
    assert said.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[made.config.prediction]
    assert_same_unet(made.networks["unet"], pipeline.unet)
    ours = Schedule(scaled_linear_betas(1000, made.config.schedule.start, made.config.schedule.end))
    torch.testing.assert_close(ours.alphas_cumprod.float(), pipeline.scheduler.alphas_cumprod, atol=1e-6, rtol=1e-5)


def test_a_saved_pipeline_of_theirs_makes_pictures(tmp_path):
    """The whole path runs: tokenizer, text encoder, U-Net, scheduler, VAE."""
    text = replace(TINY["SD1"].text, vocab_size=49408, bos_id=49406, eos_id=49407, pad_id=49407)
    save_checkpoint(checkpoint(replace(TINY["SD1"], text=text)), tmp_path / "m", layout="diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert image.shape == (32, 32, 3)


def test_the_depth_pipeline_takes_the_folder_and_a_depth_model_of_its_own(tmp_path):
    save_checkpoint(checkpoint("SD2_DEPTH"), tmp_path / "m", layout="diffusers")
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 4, 4], fusion_hidden_size=4, is_hybrid=False,
    )  # fmt: skip
    depth = transformers.DPTForDepthEstimation(config)
    extra = {"depth_estimator": depth, "feature_extractor": transformers.DPTImageProcessor()}
    pipeline = diffusers.StableDiffusionDepth2ImgPipeline.from_pretrained(
        tmp_path / "m", local_files_only=True, **extra
    )
    assert_same_unet(checkpoint("SD2_DEPTH").networks["unet"], pipeline.unet)


@pytest.mark.parametrize("kind", ["SD1", "SD2_V", "SD_X4_UPSCALER"])
def test_diffusers_reads_our_single_files_too(tmp_path, kind):
    """Its single-file loaders, given the configs of our folder in place of a look-up."""
    made = checkpoint(kind)
    save_checkpoint(made, tmp_path / "a.safetensors")
    save_checkpoint(made, tmp_path / "m", layout="diffusers")
    load = {"config": str(tmp_path / "m"), "local_files_only": True, "low_cpu_mem_usage": False}
    unet = diffusers.UNet2DConditionModel.from_single_file(str(tmp_path / "a.safetensors"), subfolder="unet", **load)
    assert_same_unet(made.networks["unet"], unet.eval())
    vae = diffusers.AutoencoderKL.from_single_file(str(tmp_path / "a.safetensors"), subfolder="vae", **load)
    assert_same_vae(made.networks["vae"], vae.eval())


def test_a_controlnet_of_ours_is_loaded_by_theirs_and_agrees(tmp_path):
    config = ControlNetConfig(TINY["SD1"].unet, 3, (8, 16, 16, 24))
    ours = random_network("control", config, seed=4)
    theirs = diffusers.ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 16, 16, 24),
    ).eval()  # fmt: skip
    theirs.load_state_dict(to_official(ours.state_dict(), keymap(ours, "diffusers")), strict=True)
    assert_same_control(ours, theirs)


def assert_same_control(ours, theirs):
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.randn(2, 7, ours.config.context_dim)
    hint = torch.rand(2, 3, 64, 64)
    down, mid = theirs(x, t, context, hint, return_dict=False)
    for a, b in zip(ours(x, t, Conditioning(context), hint), (*down, mid), strict=True):
        assert_agrees(a, b)


# ---------------------------------------------------------------------------------------------- what they save


def shaken(model):
    """Every weight drawn, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        parameter.copy_(weight(name, parameter.shape, generator))
    return model.eval()


SMALL_UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 64, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
UNETS = {
    "SD1": {"attention_head_dim": 4},
    "SD1 inpainting": {"attention_head_dim": 4, "in_channels": 9},
    "SD2": {"attention_head_dim": (2, 4), "use_linear_projection": True},
    "two transformer blocks": {"attention_head_dim": 2, "transformer_layers_per_block": 2, "norm_eps": 1e-4},
    "a level without attention": {
        "attention_head_dim": (2, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "x4": {
        "attention_head_dim": 4,
        "use_linear_projection": True,
        "num_class_embeds": 10,
        "in_channels": 7,
        "only_cross_attention": (True, False),
    },
    "only cross-attention as wide as the context": {"attention_head_dim": 4, "only_cross_attention": (False, True)},
    "unCLIP": {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 48,
    },
}


@pytest.mark.parametrize("kind", UNETS)
def test_a_unet_of_theirs_loads_and_agrees(tmp_path, kind):
    theirs = shaken(diffusers.UNet2DConditionModel(sample_size=8, **(SMALL_UNET | UNETS[kind])))
    theirs.save_pretrained(tmp_path)
    assert_same_unet(load_network(tmp_path, "unet"), theirs)


@pytest.mark.parametrize("levels", [1, 3, 4])
@pytest.mark.parametrize("safe", [True, False])
def test_a_vae_of_theirs_loads_and_agrees(tmp_path, levels, safe):
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 48)[:levels],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=2,
        scaling_factor=0.7,
    )
    shaken(theirs).save_pretrained(tmp_path, safe_serialization=safe, max_shard_size="200KB")
    assert_same_vae(load_network(tmp_path, "vae"), theirs)


CLIP = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = {"vocab_size": 99, "max_position_embeddings": 20, "bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 1}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_text_encoder_of_theirs_loads_and_agrees(tmp_path, activation):
    config = transformers.CLIPTextConfig(**CLIP, **SPECIAL, hidden_act=activation, projection_dim=24)
    theirs = shaken(transformers.CLIPTextModel(config))
    theirs.save_pretrained(tmp_path / "plain")
    assert_same_text(load_network(tmp_path / "plain", "text"), theirs)

    theirs = shaken(transformers.CLIPTextModelWithProjection(config))
    theirs.save_pretrained(tmp_path / "projected")
    ours = load_network(tmp_path / "projected", "text")
    ids = torch.randint(2, 97, (2, 20))
    ids[:, 15] = 98
    assert_agrees(ours.embed(ids), theirs(ids).text_embeds)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_image_encoder_of_theirs_loads_and_agrees(tmp_path, activation):
    config = transformers.CLIPVisionConfig(
        **CLIP, image_size=28, patch_size=14, hidden_act=activation, projection_dim=24
    )
    theirs = shaken(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    assert_same_vision(load_network(tmp_path, "vision"), theirs)


def test_a_whole_clip_model_of_theirs_gives_both_towers(tmp_path):
    text = CLIP | SPECIAL | {"hidden_act": "quick_gelu"}
    vision = CLIP | {"image_size": 28, "patch_size": 14, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    theirs = shaken(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    image, ids = torch.randn(2, 3, 28, 28), torch.randint(2, 97, (2, 20))
    ids[:, 15] = 98
    out = theirs(input_ids=ids, pixel_values=image)
    as_unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    assert_agrees(as_unit(load_network(tmp_path, "vision")(image)), out.image_embeds)
    assert_agrees(as_unit(load_network(tmp_path, "text").embed(ids)), out.text_embeds)


def test_a_controlnet_of_theirs_loads_and_agrees(tmp_path):
    small = {key: value for key, value in SMALL_UNET.items() if key != "up_block_types"}
    theirs = diffusers.ControlNetModel(
        **small,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        conditioning_embedding_out_channels=(8, 16, 16, 24),
    )
    shaken(theirs).save_pretrained(tmp_path)
    assert_same_control(load_network(tmp_path, "control"), theirs)


def test_an_open_clip_tower_under_the_original_names_agrees(tmp_path):
    """As official 2.x files hold it: cond_stage_model.model.*, of which SD2 runs all blocks but the last."""
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 28, "layers": 2, "width": 64, "patch_size": 14, "head_width": 32},
        text_cfg={"context_length": 20, "vocab_size": 200, "width": 64, "heads": 2, "layers": 3},
    )
    shaken(theirs)
    mine = {k: v for k, v in theirs.state_dict().items() if not k.startswith(("visual.", "attn_mask"))}
    tensors = {k: v for k, v in ldm_file("SD2_V")[0].items() if not k.startswith("cond_stage_model.")}
    tensors |= {f"cond_stage_model.model.{name}": tensor for name, tensor in mine.items()}
    save_safetensors(tmp_path / "a.safetensors", contiguous(tensors))
    text = replace(TINY["SD2_V"].text, length=20, mlp_width=256)
    ours = load_checkpoint(tmp_path / "a.safetensors", config=replace(TINY["SD2_V"], text=text)).networks["text"]
    ids = torch.randint(0, 198, (2, 20))
    ids[:, 15] = 199
    assert_agrees(ours.embed(ids), theirs.encode_text(ids))

    x = theirs.token_embedding(ids) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    assert_agrees(ours(ids), theirs.ln_final(x))

    vision = {f"embedder.model.{k}": v for k, v in theirs.state_dict().items() if k.startswith("visual.")}
    save_safetensors(tmp_path / "b.safetensors", contiguous(ldm_file("SD2_UNCLIP_H")[0] | vision))
    config = replace(TINY["SD2_UNCLIP_H"], vision=replace(TINY["SD2_UNCLIP_H"].vision, mlp_width=256))
    ours = load_checkpoint(tmp_path / "b.safetensors", config=config).networks["vision"]
    image = torch.randn(2, 3, 28, 28)
    assert_agrees(ours(image), theirs.encode_image(image))


def test_a_whole_pipeline_of_theirs_loads_and_comes_back_the_same(tmp_path):
    text = replace(TINY["SD2_V"].text, vocab_size=49408, bos_id=49406, eos_id=49407)
    save_checkpoint(checkpoint(replace(TINY["SD2_V"], text=text)), tmp_path / "ours", layout="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    for name, options in (("safe", {}), ("half", {"variant": "fp16"}), ("bin", {"safe_serialization": False})):
        pipeline.save_pretrained(tmp_path / name, **options)
        loaded = load_checkpoint(tmp_path / name)
        assert loaded.config.prediction == "v"
        assert loaded.config.schedule == TINY["SD2_V"].schedule
        assert loaded.config.text.pad_id == 0
        assert loaded.config.image_size == 32
        own = checkpoint("SD2_V").networks
        for network in ("unet", "vae"):
            assert same_tensors(loaded.networks[network].state_dict(), own[network].state_dict())
        assert_same_text(loaded.networks["text"], pipeline.text_encoder)


def test_the_unclip_statistics_of_a_folder_come_along(tmp_path):
    save_checkpoint(checkpoint("SD2_UNCLIP_L"), tmp_path / "m", layout="diffusers")
    (tmp_path / "m" / "minisd_extra.safetensors").unlink()
    place = tmp_path / "m" / "image_normalizer"
    statistics = {"mean": torch.randn(1, 32), "std": torch.rand(1, 32)}
    place.mkdir(exist_ok=True)
    save_safetensors(place / "diffusion_pytorch_model.safetensors", statistics)
    (place / "config.json").write_text(json.dumps({"embedding_dim": 32}))
    save_checkpoint(load_checkpoint(tmp_path / "m"), tmp_path / "a.safetensors")
    save_checkpoint(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "again", layout="diffusers")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert torch.equal(pipeline.image_normalizer.mean, statistics["mean"])
    assert torch.equal(pipeline.image_normalizer.std, statistics["std"])
