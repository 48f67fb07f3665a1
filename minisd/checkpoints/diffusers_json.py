"""The JSON files of a diffusers folder that belong to no single network, read: the scheduler's and the tokenizer's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from minisd.checkpoints.files.entries import CheckpointError
from minisd.checkpoints.networks.format import number
from minisd.config import PredictionType, ScheduleConfig
from minisd.text.tokenizer import FIRST_ADDED

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


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


def read_schedule(config: dict, path: Path) -> tuple[ScheduleConfig, tuple[PredictionType, str]]:
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
        num_timesteps=number(config, "num_train_timesteps", 1000, int, path),
        start=number(config, "beta_start", 1e-4, float, path),
        end=number(config, "beta_end", 0.02, float, path),
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
        final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", False) else None,
    )
    if not schedule.start <= schedule.end < 1 or schedule.num_timesteps > 100_000:
        raise CheckpointError(f"{path}: {schedule} is no noise schedule")
    key = "prediction_type" if "prediction_type" in config else "no prediction_type, diffusers' default is epsilon"
    return schedule, (PREDICTIONS[prediction], f"{path.name} ({key})")


def read_tokenizer(path: Path) -> tuple[int | None, dict[str, list[int]]]:
    """(id of the padding, 49407 or 0, None where no file says; the added tokens: placeholder → its ids)."""
    files = {
        name: read_json(path / name) if (path / name).is_file() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    }
    pad_id = None
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        pad = files[name].get("pad_token")
        pad = pad.get("content") if isinstance(pad, dict) else pad
        if pad_id is None and pad in ("!", "<|endoftext|>"):
            pad_id = 0 if pad == "!" else 49407
    added = dict(files["added_tokens.json"])
    decoder = files["tokenizer_config.json"].get("added_tokens_decoder", {})  # transformers 5 keeps them here
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and i.isdecimal():
            added[token["content"]] = int(i[:10])
    if bad := next((f"{name!r}: {i!r}" for name, i in added.items() if type(i) is not int), None):
        raise CheckpointError(f"{path / 'added_tokens.json'}: {bad} is not a token and its id")
    return pad_id, _placeholders({name: i for name, i in added.items() if i >= FIRST_ADDED})


def _placeholders(ids: Mapping[str, int]) -> dict[str, list[int]]:
    """diffusers names the n vectors of a placeholder `<cat>`, `<cat>_1`, `<cat>_2`, …: back to one name for all."""
    groups: dict[str, list[int]] = {}
    for name, i in sorted(ids.items(), key=lambda item: item[1]):
        first, _, n = name.rpartition("_")
        if first in groups and n == str(len(groups[first])) and i == groups[first][-1] + 1:
            groups[first].append(i)
        else:
            groups[name] = [i]
    return groups
