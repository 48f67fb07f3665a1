"""What the JSON files of a diffusers folder say about our configs.

Reading starts from the config that the shapes show and adds what they do not; a value with which our networks would
compute something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from minisd.checkpoints.files.entries import CheckpointError
from minisd.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    Prediction,
    ScheduleConfig,
    UNetConfig,
    VAEConfig,
)

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


def read_json(path: Path) -> dict:
    """A JSON object; CheckpointError, naming the file, for everything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({str(error)[:100]})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


# (key, the values with which our networks agree); anything else would change the numbers silently
_UNET_FIXED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False, None),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}
_VAE_FIXED = {"act_fn": ("silu",), "shift_factor": (None,), "use_quant_conv": (True,), "use_post_quant_conv": (True,)}


def _check_fixed(config: dict, fixed: Mapping[str, tuple], path: Path) -> None:
    for key, allowed in fixed.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the networks of minisd have {allowed[0]!r}")


def _number(config: dict, key: str, default, kind, path: Path):
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or not 0 < value < 1e9:
        raise CheckpointError(f"{path}: {key} is {value!r}, a positive {kind.__name__} is expected")
    return kind(value)


def _refine_unet(unet: UNetConfig, config: dict, path: Path) -> UNetConfig:
    """Heads and norms. diffusers' attention_head_dim is the NUMBER of heads."""
    _check_fixed(config, _UNET_FIXED, path)
    heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
    levels = len(unet.channel_mult)
    per_level = heads if isinstance(heads, list) else [heads] * levels
    if len(per_level) != levels or not all(type(h) is int and 0 < h < 1e9 for h in per_level):
        raise CheckpointError(f"{path}: attention_head_dim is {heads!r}; a number, or one for each of {levels} levels")
    with_heads = sorted({*unet.attention_levels, levels - 1})  # the middle has the heads of the deepest level
    numbers = {per_level[level] for level in with_heads}
    widths = {unet.channels * unet.channel_mult[level] / per_level[level] for level in with_heads}
    if len(numbers) == 1 and (unet.num_heads or len(widths) > 1):
        split = {"num_heads": numbers.pop(), "head_width": None}
    elif len(widths) == 1 and (width := widths.pop()) == int(width):
        split = {"num_heads": None, "head_width": int(width)}
    else:
        raise CheckpointError(f"{path}: heads {per_level} are neither of one number nor of one width on all levels")
    try:
        return replace(
            unet,
            **split,
            cross_only_levels=_cross_only(unet, config, path),
            norm_groups=_number(config, "norm_num_groups", 32, int, path),
            norm_eps=_number(config, "norm_eps", 1e-5, float, path),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _cross_only(unet: UNetConfig, config: dict, path: Path) -> tuple[int, ...]:
    """The levels without self-attention; shapes do not tell where a level is as wide as the context."""
    said = config.get("only_cross_attention", False)
    if said is False or said is None:
        said = [False] * len(unet.channel_mult)
    if not isinstance(said, list) or len(said) != len(unet.channel_mult):
        raise CheckpointError(f"{path}: only_cross_attention is {said!r}; false, or a list with a value for each level")
    levels = tuple(level for level in unet.attention_levels if said[level])
    unclear = {level for level in unet.attention_levels if unet.channels * unet.channel_mult[level] == unet.context_dim}
    if set(levels) - unclear != set(unet.cross_only_levels) - unclear:
        raise CheckpointError(f"{path}: only_cross_attention is {said!r}, the weights say {unet.cross_only_levels}")
    return levels


def _refine_vae(vae: VAEConfig, config: dict, path: Path) -> VAEConfig:
    _check_fixed(config, _VAE_FIXED, path)
    return replace(
        vae,
        norm_groups=_number(config, "norm_num_groups", 32, int, path),
        scale_factor=_number(config, "scaling_factor", vae.scale_factor, float, path),
    )


def _refine_text(text: CLIPTextConfig, config: dict, path: Path) -> CLIPTextConfig:
    """What diffusers stores is run whole: SD2's folder holds 23 of the 24 blocks."""
    text = _refine_clip(text, config, path, heads=8)
    if text.vocab_size < CLIPTextConfig.vocab_size:  # a tiny test model with special ids of its own
        ids = {f"{name}_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
        text = replace(text, **{name: value for name, value in ids.items() if type(value) is int})
    return replace(text, skip=0)


def _refine_vision(vision: CLIPVisionConfig, config: dict, path: Path) -> CLIPVisionConfig:
    return _refine_clip(vision, config, path, heads=12)


def _refine_clip(clip: CLIPTextConfig | CLIPVisionConfig, config: dict, path: Path, *, heads: int):
    """heads: transformers' default, which its config.json may leave out."""
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; known: gelu, quick_gelu")
    heads = _number(config, "num_attention_heads", heads, int, path)
    if clip.width % heads:
        raise CheckpointError(f"{path}: {heads} heads do not divide the width {clip.width}")
    return replace(
        clip, heads=heads, activation=activation, norm_eps=_number(config, "layer_norm_eps", 1e-5, float, path)
    )


def _refine_control(control: ControlNetConfig, config: dict, path: Path) -> ControlNetConfig:
    _check_fixed(config, {"controlnet_conditioning_channel_order": ("rgb",), "global_pool_conditions": (False,)}, path)
    return replace(control, unet=_refine_unet(control.unet, config, path))


_REFINE = {
    "unet": _refine_unet,
    "vae": _refine_vae,
    "text": _refine_text,
    "vision": _refine_vision,
    "control": _refine_control,
}


def refine(network: str, seen, config: dict, path: Path):
    """The config that shapes show, with what only the component's config.json (at path) says."""
    return _REFINE[network](seen, config, path)


def read_schedule(config: dict, path: Path) -> tuple[ScheduleConfig, tuple[Prediction, str]]:
    """The training schedule of a scheduler_config.json, and what it says about the prediction."""
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    if kind not in tuple(SCHEDULES) or config.get("trained_betas") is not None:
        raise CheckpointError(
            f"{path}: beta_schedule {kind!r} / trained_betas; known: {', '.join(SCHEDULES)}, no trained_betas"
        )
    if prediction not in tuple(PREDICTIONS):
        raise CheckpointError(f"{path}: prediction_type {prediction!r}; known: {', '.join(PREDICTIONS)}")
    schedule = ScheduleConfig(
        kind=SCHEDULES[kind],
        num_timesteps=_number(config, "num_train_timesteps", 1000, int, path),
        start=_number(config, "beta_start", 1e-4, float, path),
        end=_number(config, "beta_end", 0.02, float, path),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", False) else None,
    )
    if not schedule.start <= schedule.end < 1 or schedule.num_timesteps > 100_000:
        raise CheckpointError(f"{path}: {schedule} is no noise schedule")
    said = "prediction_type" if "prediction_type" in config else "no prediction_type, diffusers' default is epsilon"
    return schedule, (PREDICTIONS[prediction], f"{path.name} ({said})")
