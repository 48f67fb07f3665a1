"""The diffusers folder: one subfolder per component, each a JSON config and weights under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minisd.checkpoints.detect import Contents, Part, contents
from minisd.checkpoints.io import CheckpointError, TensorFile, open_tensors
from minisd.config import CLIPTextConfig, CLIPVisionConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig

SUBFOLDERS = {"unet": "unet", "vae": "vae", "text": "text_encoder", "vision": "image_encoder"}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model", "vision": "model"}
EXTRA = "minisd_extra.safetensors"


@dataclass
class Folder:
    """An opened diffusers folder: contents as of a single file, and what its JSON files say."""

    contents: Contents
    files: list[TensorFile] = field(default_factory=list)
    schedule: ScheduleConfig | None = None
    prediction: tuple[str, str] | None = None
    pad_id: int | None = None
    notes: list[str] = field(default_factory=list)


def open_folder(path: Path) -> Folder:
    """Open every component that minisd runs. CheckpointError where the folder holds none or its JSON is damaged."""
    folder = Folder(Contents("a diffusers folder", {}, {}, []))
    for network, name in SUBFOLDERS.items():
        if (path / name).is_dir():
            tensors, config = open_component(path / name, folder)
            _add(folder, network, tensors, config, path / name)
    if not folder.contents.parts and (path / "config.json").is_file():
        tensors, config = open_component(path, folder)
        _add(folder, None, tensors, config, path)
    if not folder.contents.parts:
        raise CheckpointError(
            f"{path}: a folder without {', '.join(sorted(SUBFOLDERS.values()))} or a config.json of its own: "
            "give a diffusers folder (the one that holds model_index.json) or a single file"
        )
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        folder.schedule, folder.prediction = _schedule_from(read_json(scheduler), scheduler)
    folder.pad_id = _pad_id(path / "tokenizer")
    left = [name for name in ("safety_checker", "depth_estimator") if (path / name).is_dir()]
    folder.notes += [f"{name}/ is not run" for name in left]
    return folder


def _add(folder: Folder, network: str | None, tensors: Tensors, config: dict, path: Path) -> None:
    found = contents(tensors)
    network = network or next(iter(found.parts), None)
    if network not in found.parts:
        raise CheckpointError(f"{path}: its weights are {found.kind}, not a {network or 'network that minisd runs'}")
    part = found.parts[network]
    if found.unknown:
        raise CheckpointError(f"{path}: {len(found.unknown)} tensors of no known network, first: {found.unknown[0]}")
    part.config = _REFINE[network](part.config, config, path / "config.json")
    part.doubt = ""
    folder.contents.parts[network] = part
    for reason, names in found.known.items():
        folder.contents.known.setdefault(reason, []).extend(f"{path.name}/{name}" for name in names)
    if len(folder.contents.parts) == 1:
        folder.contents.kind = found.kind


class Tensors(Mapping[str, Tensor]):
    """The tensors of one component, in one file or in several shards."""

    def __init__(self, place: Mapping[str, TensorFile]):
        self.place = place

    def __getitem__(self, name: str) -> Tensor:
        return self.place[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.place)

    def __len__(self) -> int:
        return len(self.place)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.place[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.place[name].dtype(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.place[name].read(name, dtype)


def open_component(path: Path, folder: Folder) -> tuple[Tensors, dict]:
    """The tensors and the config.json of one component. safetensors before .bin, full precision before fp16."""
    config = read_json(path / "config.json")
    for base in ("diffusion_pytorch_model", "model", "pytorch_model"):
        for suffix in ("safetensors", "bin"):
            for variant in ("", ".fp16"):
                whole = path / f"{base}{variant}.{suffix}"
                indices = [path / f"{base}{variant}.{suffix}.index.json", path / f"{base}.{suffix}.index{variant}.json"]
                index = next((i for i in indices if i.is_file()), None)
                if not whole.is_file() and index is None:
                    continue
                if variant:
                    folder.notes.append(f"{path.name}: the fp16 variant, the only one in the folder")
                if (path / f"{base}.non_ema.{suffix}").is_file():
                    folder.notes.append(f"{path.name}: {base}.non_ema.{suffix} (the raw weights) is not used")
                if whole.is_file():
                    file = open_tensors(whole)
                    folder.files.append(file)
                    return Tensors(dict.fromkeys(file, file)), config
                return _open_shards(index, folder), config
    raise CheckpointError(
        f"{path}: no weights (diffusion_pytorch_model, model or pytorch_model as .safetensors or .bin): was the "
        "download interrupted?"
    )


def _open_shards(index: Path, folder: Folder) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: it has no weight_map (tensor name → file name)")
    if outside := next((v for v in weight_map.values() if Path(v).name != v), None):
        raise CheckpointError(f"{index}: the shard {outside!r} lies outside its folder")
    files = {name: open_tensors(index.parent / name) for name in sorted(set(weight_map.values()))}
    folder.files += files.values()
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise CheckpointError(
                f"{index.parent / name}: the tensor {tensor} is missing, {index.name} says it is there"
            )
    if stray := next((t for f in files.values() for t in f if t not in weight_map), None):
        raise CheckpointError(f"{index}: the tensor {stray} stands in a shard but not in the index")
    return Tensors({tensor: files[name] for tensor, name in weight_map.items()})


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------- JSON → our configs

# (key, the values with which our networks agree); anything else would change the numbers silently
_UNET_FIXED = {
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default",),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional", None),
    "dual_cross_attention": (False, None),
    "center_input_sample": (False, None),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "class_embed_type": (None, "projection"),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
}
_VAE_FIXED = {"act_fn": ("silu",), "shift_factor": (None,), "use_quant_conv": (True,), "use_post_quant_conv": (True,)}


def _check_fixed(config: dict, fixed: dict[str, tuple], path: Path) -> None:
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the networks of minisd have {allowed[0]!r}")


def _number(config: dict, key: str, default, kind, path: Path):
    value = config.get(key, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}, a positive {kind.__name__} is expected")
    return kind(value)


def _refine_unet(unet: UNetConfig, config: dict, path: Path) -> UNetConfig:
    """Heads and norms, which shapes do not show. diffusers' attention_head_dim is the NUMBER of heads."""
    _check_fixed(config, _UNET_FIXED, path)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    levels = len(unet.channel_mult)
    per_level = heads if isinstance(heads, list) else [heads] * levels
    if len(per_level) != levels or not all(type(h) is int and h > 0 for h in per_level):
        raise CheckpointError(f"{path}: attention_head_dim is {heads!r}; a number, or one for each of {levels} levels")
    widths = [unet.channels * mult / h for mult, h in zip(unet.channel_mult, per_level, strict=True)]
    if len(set(per_level)) == 1:
        split = {"num_heads": per_level[0], "head_width": None}
    elif len(set(widths)) == 1 and widths[0] == int(widths[0]):
        split = {"num_heads": None, "head_width": int(widths[0])}
    else:
        raise CheckpointError(f"{path}: heads {per_level} are neither of one number nor of one width on all levels")
    try:
        return replace(
            unet,
            **split,
            norm_groups=_number(config, "norm_num_groups", 32, int, path),
            norm_eps=_number(config, "norm_eps", 1e-5, float, path),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _refine_vae(vae: VAEConfig, config: dict, path: Path) -> VAEConfig:
    _check_fixed(config, _VAE_FIXED, path)
    return replace(
        vae,
        norm_groups=_number(config, "norm_num_groups", 32, int, path),
        scale_factor=_number(config, "scaling_factor", vae.scale_factor, float, path),
    )


def _refine_text(text: CLIPTextConfig, config: dict, path: Path) -> CLIPTextConfig:
    """What diffusers stores is run whole: SD2's folder holds 23 of the 24 blocks."""
    text = _refine_clip(text, config, path)
    if text.vocab_size < CLIPTextConfig.vocab_size:  # a tiny test model with special ids of its own
        ids = {f"{name}_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = replace(text, **{name: value for name, value in ids.items() if type(value) is int})
    return replace(text, skip=0)


def _refine_clip(clip: CLIPTextConfig | CLIPVisionConfig, config: dict, path: Path):
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; known: gelu, quick_gelu")
    heads = _number(config, "num_attention_heads", clip.heads, int, path)
    if clip.width % heads:
        raise CheckpointError(f"{path}: {heads} heads do not divide the width {clip.width}")
    return replace(
        clip, heads=heads, activation=activation, norm_eps=_number(config, "layer_norm_eps", 1e-5, float, path)
    )


def _refine_control(control, config: dict, path: Path):
    if config.get("controlnet_conditioning_channel_order", "rgb") != "rgb":
        raise CheckpointError(f"{path}: controlnet_conditioning_channel_order is not 'rgb'")
    return replace(control, unet=_refine_unet(control.unet, config, path))


_REFINE = {
    "unet": _refine_unet,
    "vae": _refine_vae,
    "text": _refine_text,
    "vision": _refine_clip,
    "control": _refine_control,
}
_KINDS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


def _schedule_from(config: dict, path: Path) -> tuple[ScheduleConfig, tuple[str, str]]:
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if kind not in _KINDS or config.get("trained_betas") is not None:
        raise CheckpointError(
            f"{path}: beta_schedule {kind!r} / trained_betas; known: {', '.join(_KINDS)}, no trained_betas"
        )
    if prediction not in _PREDICTIONS:
        raise CheckpointError(f"{path}: prediction_type {prediction!r}; known: {', '.join(_PREDICTIONS)}")
    schedule = ScheduleConfig(
        kind=_KINDS[kind],
        num_timesteps=_number(config, "num_train_timesteps", 1000, int, path),
        start=_number(config, "beta_start", 1e-4, float, path),
        end=_number(config, "beta_end", 0.02, float, path),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", False) else None,
    )
    said = "prediction_type" if "prediction_type" in config else "no prediction_type, diffusers' default is epsilon"
    return schedule, (_PREDICTIONS[prediction], f"scheduler_config.json ({said})")


def _pad_id(tokenizer: Path) -> int | None:
    """49407 or 0, as the tokenizer's files name the padding; None where they are missing."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            pad = read_json(tokenizer / name).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if pad in ("!", "<|endoftext|>"):
                return 0 if pad == "!" else 49407
    return None


# ------------------------------------------------------------------------------------------------- our configs → JSON


def component_json(network: str, config: ModelConfig) -> dict:
    """The config.json with which diffusers or transformers builds the same network."""
    if network == "unet":
        return _unet_json(config.unet) | {"_class_name": "UNet2DConditionModel", "sample_size": _latent_side(config)}
    if network == "vae":
        return _vae_json(config.vae) | {"sample_size": config.image_size}
    return _text_json(config.text) if network == "text" else _vision_json(config.vision)


def _latent_side(config: ModelConfig) -> int:
    return config.image_size // config.vae.factor


def _unet_json(unet: UNetConfig) -> dict:
    levels = range(len(unet.channel_mult))
    widths = [unet.channels * mult for mult in unet.channel_mult]
    cross = [level in unet.attention_levels for level in levels]
    heads = unet.num_heads or [width // unet.head_width for width in widths]
    return {
        "_diffusers_version": "0.35.0",
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
        "only_cross_attention": [level in unet.cross_only_levels for level in levels]
        if unet.cross_only_levels
        else False,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.vector_dim,
        "transformer_layers_per_block": unet.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(cross)],
        "use_linear_projection": unet.linear_projection,
    }


def _vae_json(vae: VAEConfig) -> dict:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.35.0",
        "act_fn": "silu",
        "block_out_channels": [vae.channels * mult for mult in vae.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(vae.channel_mult),
        "in_channels": vae.image_channels,
        "latent_channels": vae.latent_channels,
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "out_channels": vae.image_channels,
        "scaling_factor": vae.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * len(vae.channel_mult),
    }


def _text_json(text: CLIPTextConfig) -> dict:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "hidden_act": text.activation,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "layer_norm_eps": text.norm_eps,
        "max_position_embeddings": text.length,
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers - text.skip,
        "pad_token_id": text.pad_id,
        "projection_dim": text.projection_dim or text.width,
        "vocab_size": text.vocab_size,
    }


def _vision_json(vision: CLIPVisionConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": vision.activation,
        "hidden_size": vision.width,
        "image_size": vision.image_size,
        "intermediate_size": vision.mlp_width,
        "layer_norm_eps": vision.norm_eps,
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "projection_dim": vision.projection_dim or vision.width,
    }


def scheduler_json(config: ModelConfig) -> dict:
    schedule = config.schedule
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.35.0",
        "beta_end": schedule.end,
        "beta_schedule": {ours: theirs for theirs, ours in _KINDS.items()}[schedule.kind],
        "beta_start": schedule.start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTIONS.items()}[config.prediction],
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "set_alpha_to_one": schedule.final_alpha_cumprod == 1.0,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def model_index_json(config: ModelConfig) -> dict:
    """Which classes load the components. Those that minisd does not run (safety checker, depth model) are null."""
    pipeline = {
        9: "StableDiffusionInpaintPipeline",
        8: "StableDiffusionInstructPix2PixPipeline",
        7: "StableDiffusionUpscalePipeline",
        5: "StableDiffusionDepth2ImgPipeline",
    }.get(config.unet.in_channels, "StableUnCLIPImg2ImgPipeline" if config.vision else "StableDiffusionPipeline")
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if config.vision:
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    elif config.unet.in_channels in (4, 8, 9):
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    return index
