"""The text files of a diffusers folder, with which diffusers and transformers build the same networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from minisd.checkpoints.diffusers_json import PREDICTIONS, SCHEDULES
from minisd.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ModelConfig,
    Prediction,
    ScheduleConfig,
)
from minisd.models.clip import IMAGE_MEAN, IMAGE_STD
from minisd.text.tokenizer import Tokenizer

VERSION = "0.35.0"  # of diffusers, whose names these are


def folder_files(config: ModelConfig, added_tokens: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """Path in the folder → text, for everything but the weights."""
    files = {
        "model_index.json": _model_index(config),
        "unet/config.json": _unet_json(config),
        "vae/config.json": _vae_json(config),
        "text_encoder/config.json": _text_json(config.text),
        "scheduler/scheduler_config.json": _scheduler("DDIMScheduler", config.schedule, config.prediction)
        | {
            "clip_sample": False,
            "set_alpha_to_one": config.schedule.final_alpha_cumprod == 1.0,
            "steps_offset": 1,
        },
    }
    if _is_upscaler(config):  # the noise that is added to the small picture has the same schedule
        files["low_res_scheduler/scheduler_config.json"] = _scheduler("DDPMScheduler", config.schedule, "eps")
    if config.vision:
        files["image_encoder/config.json"] = _vision_json(config.vision)
    if config.vision and config.unet.vector_dim:  # unCLIP; elsewhere CLIP judges pictures and is no part of a pipeline
        noise = ScheduleConfig(kind="cosine", start=0.0001, end=0.02)
        files["image_noising_scheduler/scheduler_config.json"] = _scheduler("DDPMScheduler", noise, "eps")
        files["feature_extractor/preprocessor_config.json"] = _preprocessor(config.vision)
        files["image_normalizer/config.json"] = {
            "_class_name": "StableUnCLIPImageNormalizer",
            "_diffusers_version": VERSION,
            "embedding_dim": config.vision.projection_dim,
        }
    text = config.text
    tokenizer = Tokenizer(length=text.length, pad_id=text.pad_id, dialect=text.dialect, added_tokens=added_tokens)
    return {path: json.dumps(value, indent=2) + "\n" for path, value in files.items()} | {
        f"tokenizer/{name}": text for name, text in tokenizer.files().items()
    }


def _model_index(config: ModelConfig) -> dict:
    """Which classes load the components. Those that minisd does not run (safety checker) are null."""
    pipeline = {
        9: "StableDiffusionInpaintPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        7: "StableDiffusionUpscalePipeline",
        5: "StableDiffusionDepth2ImgPipeline",
    }.get(
        config.unet.in_channels, "StableUnCLIPImg2ImgPipeline" if config.unet.vector_dim else "StableDiffusionPipeline"
    )
    index = {
        "_class_name": pipeline,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.vision and config.unet.vector_dim:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        index["image_normalizer"] = ["stable_diffusion", "StableUnCLIPImageNormalizer"]
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    elif _is_upscaler(config):
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    elif config.unet.in_channels in (4, 8, 9):
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    return index


def _is_upscaler(config: ModelConfig) -> bool:
    return config.unet.in_channels == 7


def _unet_json(config: ModelConfig) -> dict:
    unet = config.unet
    levels = range(len(unet.channel_mult))
    widths = [unet.channels * mult for mult in unet.channel_mult]
    cross = [level in unet.attention_levels for level in levels]
    heads = unet.num_heads or [max(width // unet.head_width, 1) for width in widths]
    only_cross = [level in unet.cross_only_levels for level in levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "class_embed_type": "projection" if unet.vector_dim else None,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": unet.norm_eps,
        "norm_num_groups": unet.norm_groups,
        "num_class_embeds": unet.num_classes,
        "only_cross_attention": only_cross if unet.cross_only_levels else False,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "sample_size": config.image_size // config.vae.factor,
        "transformer_layers_per_block": unet.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "use_linear_projection": unet.linear_projection,
    }


def _vae_json(config: ModelConfig) -> dict:
    vae = config.vae
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "in_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.image_channels,
        "sample_size": config.image_size,
        "scaling_factor": vae.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
    }


def _clip_json(clip: CLIPTextConfig | CLIPVisionConfig, layers: int) -> dict:
    return {
        "attention_dropout": 0.0,
        "hidden_act": clip.activation,
        "hidden_size": clip.width,
        "intermediate_size": clip.mlp_width,
        "layer_norm_eps": clip.norm_eps,
        "num_attention_heads": clip.heads,
        "num_hidden_layers": layers,
        "projection_dim": clip.projection_dim or clip.width,
    }


def _text_json(text: CLIPTextConfig) -> dict:
    return _clip_json(text, text.layers - text.skip) | {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "max_position_embeddings": text.length,
        "pad_token_id": text.pad_id,
        "vocab_size": text.vocab_size,
    }


def _vision_json(vision: CLIPVisionConfig) -> dict:
    return _clip_json(vision, vision.layers) | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": vision.image_size,
        "num_channels": 3,
        "patch_size": vision.patch_size,
    }


def _scheduler(name: str, schedule: ScheduleConfig, prediction: Prediction) -> dict:
    return {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "beta_end": schedule.end,
        "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[schedule.kind],
        "beta_start": schedule.start,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def _preprocessor(vision: CLIPVisionConfig) -> dict:
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
