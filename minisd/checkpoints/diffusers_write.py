"""The text files of a diffusers folder, with which diffusers and transformers build the same networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from minisd.checkpoints.diffusers_json import PREDICTIONS, SCHEDULES
from minisd.checkpoints.networks import NETWORKS, WHOLE
from minisd.config import (
    CLIPVisionConfig,
    ModelConfig,
    PredictionType,
    ScheduleConfig,
)
from minisd.family.clip_vision import IMAGE_MEAN, IMAGE_STD
from minisd.text.bpe import merge_lines, vocabulary
from minisd.text.tokenizer import BOS, EOS, SPECIALS, Tokenizer

VERSION = "0.35.0"  # of diffusers, whose names these are
PIPELINES = {
    "text-to-image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "pix2pix": "StableDiffusionInstructPix2PixPipeline",
    "upscaling": "StableDiffusionUpscalePipeline",
    "depth-to-image": "StableDiffusionDepth2ImgPipeline",
    "image-variation": "StableUnCLIPImg2ImgPipeline",
}


def folder_files(config: ModelConfig, added_tokens: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """Path in the folder → text, for everything but the weights."""
    files = {
        "model_index.json": _model_index(config),
        "scheduler/scheduler_config.json": _scheduler("DDIMScheduler", config.schedule, config.prediction)
        | {
            "clip_sample": False,
            "set_alpha_to_one": config.schedule.final_alpha_cumprod == 1.0,
            "steps_offset": 1,
        },
    }
    for declared in (NETWORKS[name] for name in WHOLE if getattr(config, name) is not None):
        files[f"{declared.subfolder}/config.json"] = declared.config_to_json(config)
    if config.task == "upscaling":  # the noise that is added to the small image has the same schedule
        files["low_res_scheduler/scheduler_config.json"] = _scheduler("DDPMScheduler", config.schedule, "eps")
    if is_unclip(config):  # elsewhere CLIP's image encoder scores images and is no part of a pipeline
        noise = ScheduleConfig(kind="cosine", start=0.0001, end=0.02)
        files["image_noising_scheduler/scheduler_config.json"] = _scheduler("DDPMScheduler", noise, "eps")
        files["feature_extractor/preprocessor_config.json"] = _preprocessor(config.vision)
        files["image_normalizer/config.json"] = {
            "_class_name": "StableUnCLIPImageNormalizer",
            "embedding_dim": config.vision.projection_dim,
        }
    for values in files.values():
        if "_class_name" in values:
            values["_diffusers_version"] = VERSION
    text = config.text
    tokenizer = Tokenizer(length=text.length, pad_id=text.pad_id, dialect=text.dialect, added_tokens=added_tokens)
    return {path: json.dumps(values, indent=2, sort_keys=True) + "\n" for path, values in files.items()} | {
        f"tokenizer/{name}": text for name, text in tokenizer_files(tokenizer).items()
    }


def is_unclip(config: ModelConfig) -> bool:
    return config.vision is not None and config.task == "image-variation"


def _model_index(config: ModelConfig) -> dict:
    """Which classes load the components. Those that minisd does not run (safety checker) are null."""
    task = config.task
    index = {
        "_class_name": PIPELINES[task],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_unclip(config):
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        index["image_normalizer"] = ["stable_diffusion", "StableUnCLIPImageNormalizer"]
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    elif task == "upscaling":
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    elif task != "depth-to-image":
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    return index


def _scheduler(name: str, schedule: ScheduleConfig, prediction: PredictionType) -> dict:
    return {
        "_class_name": name,
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


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Name → text of the files of a Hugging Face CLIPTokenizer: the `tokenizer/` folder of a diffusers model.

    The n vectors of a placeholder are n tokens there, named as diffusers does: `<my-cat>`, `<my-cat>_1`, …
    """
    symbols = [*vocabulary().symbols, *SPECIALS["openai"]]
    named = {"bos_token": symbols[BOS], "eos_token": symbols[EOS], "unk_token": symbols[EOS]}
    named["pad_token"] = symbols[tokenizer.pad_id]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, "do_lower_case": True, **named}
    tables = {
        "vocab.json": {symbol: i for i, symbol in enumerate(symbols)},
        "special_tokens_map.json": named,
        "tokenizer_config.json": config,
    }
    if added := tokenizer.added_tokens:
        tables["added_tokens.json"] = {
            f"{token}_{n}" if n else token: i for token, ids in added.items() for n, i in enumerate(ids)
        }
    texts = {name: json.dumps(table, ensure_ascii=False, indent=1) for name, table in tables.items()}
    return texts | {"merges.txt": "\n".join(["#version: 0.2", *merge_lines(), ""])}
