"""diffusers folders: official, old, half, sharded, of transformers 5, incomplete; what they say is read or refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from reference import manifest
from safetensors.torch import load_file, save_file
from tiny import TINY, checkpoint, same_networks, same_tensors, sparse_file

from minisd.checkpoints.files import CheckpointError
from minisd.checkpoints.load import load_checkpoint
from minisd.checkpoints.save import save_checkpoint
from minisd.config import PRESETS
from minisd.text.tokenizer import Tokenizer

FOLDERS = {
    "SD1": {"unet": "sd15-unet.diffusers", "vae": "sd15-vae.diffusers-old", "text": "sd15-text_encoder.diffusers-hub"},
    "SD1_INPAINT": {
        "unet": "sd15-inpainting-unet.diffusers",
        "vae": "sd15-vae.diffusers-new",
        "text": "sd15-text_encoder.transformers5",
    },
    "SD2_V": {
        "unet": "sd21-unet.diffusers",
        "vae": "sd15-vae.diffusers-old",
        "text": "sd21-text_encoder.diffusers-hub",
    },
    "SD_X4_UPSCALER": {
        "unet": "sdx4-unet.diffusers",
        "vae": "sdx4-vae.diffusers-old",
        "text": "sd21-text_encoder.transformers5",
    },
}


@pytest.mark.parametrize("preset", FOLDERS)
def test_every_official_folder_is_loaded_with_its_own_json(tmp_path, preset):
    weights = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text": "model"}
    for network, name in FOLDERS[preset].items():
        place = tmp_path / {"text": "text_encoder"}.get(network, network)
        place.mkdir()
        (place / "config.json").write_text(json.dumps(manifest(name)["config"]))
        sparse_file(place / f"{weights[network]}.safetensors", manifest(name)["tensors"])
    config, schedule = PRESETS[preset], PRESETS[preset].schedule
    said = {"beta_schedule": "scaled_linear", "beta_start": schedule.start, "beta_end": schedule.end}
    said |= {"prediction_type": {"eps": "epsilon", "v": "v_prediction"}[config.prediction], "set_alpha_to_one": False}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(said))
    text = config.text if config.text.layers == 12 else replace(config.text, layers=23, skip=0, projection_dim=None)
    assert load_checkpoint(tmp_path).config == replace(config, text=text)


@pytest.fixture
def folder(tmp_path):
    """A folder as diffusers writes it: nothing of minisd's in it."""
    save_checkpoint(checkpoint("SD1"), tmp_path / "folder", layout="diffusers")
    (tmp_path / "folder" / "minisd_extra.safetensors").unlink()
    return tmp_path / "folder"


def rewrite(path, change):
    """Tensors of a file through change, written in place."""
    save_file(change(load_file(path)), path)


def test_a_folder_without_anything_of_ours_gives_the_same_model(folder):
    loaded = load_checkpoint(folder)
    assert loaded.config == replace(TINY["SD1"], name="custom")
    assert same_networks(loaded.networks, checkpoint("SD1").networks)


def test_optional_parts_of_a_folder_may_be_missing(folder):
    for name in ("tokenizer", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / "model_index.json").unlink()
    loaded = load_checkpoint(folder, prediction="eps")
    assert same_networks(loaded.networks, checkpoint("SD1").networks)


def test_weights_as_bin_or_fp16_variant_load(folder):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(unet), folder / "unet" / "diffusion_pytorch_model.bin")
    unet.unlink()
    text = folder / "text_encoder" / "model.safetensors"
    torch.save({k: v.half() for k, v in load_file(text).items()}, folder / "text_encoder" / "pytorch_model.fp16.bin")
    text.unlink()
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    rewrite(vae, lambda tensors: {k: v.half() for k, v in tensors.items()})
    vae.rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    loaded, own = load_checkpoint(folder), checkpoint("SD1").networks
    assert same_tensors(loaded.networks["unet"].state_dict(), own["unet"].state_dict())
    for name in ("vae", "text"):
        half = {k: v.half() for k, v in own[name].state_dict().items()}
        assert same_tensors(loaded.networks[name].state_dict(), half)
    assert any("fp16 variant" in line for line in loaded.report)


def test_safetensors_come_before_bin_and_full_precision_before_fp16(folder):
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"junk")
    assert same_networks(load_checkpoint(folder).networks, checkpoint("SD1").networks)


def shard(folder, *, index="diffusion_pytorch_model.safetensors.index.json"):
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        part = f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / "unet" / part)
        weight_map |= dict.fromkeys(names[i::3], part)
    (folder / "unet" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "unet" / index


def test_sharded_weights_load_and_a_missing_shard_is_named(folder):
    shard(folder)
    assert same_networks(load_checkpoint(folder).networks, checkpoint("SD1").networks)
    lost = folder / "unet" / "diffusion_pytorch_model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(CheckpointError, match="00002-of-00003"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", ["../../secret.safetensors", "/etc/passwd", "", "a\0b", 3, None, ["x"]])
def test_a_shard_index_that_points_elsewhere_is_refused(folder, value):
    index = shard(folder)
    said = json.loads(index.read_text())
    said["weight_map"][next(iter(said["weight_map"]))] = value
    index.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load_checkpoint(folder)


def test_text_names_of_transformers_5_and_of_the_hub_load(folder):
    text = folder / "text_encoder" / "model.safetensors"
    rewrite(text, lambda tensors: {k.removeprefix("text_model."): v for k, v in tensors.items()})
    assert same_networks(load_checkpoint(folder).networks, checkpoint("SD1").networks)
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    rewrite(text, lambda tensors: {f"text_model.{k}": v for k, v in tensors.items()} | positions)
    assert same_networks(load_checkpoint(folder).networks, checkpoint("SD1").networks)


UNSUPPORTED = [
    ("unet", "act_fn", "gelu"),
    ("unet", "flip_sin_to_cos", False),
    ("unet", "freq_shift", 1),
    ("unet", "resnet_time_scale_shift", "scale_shift"),
    ("unet", "addition_embed_type", "text_time"),
    ("unet", "dual_cross_attention", True),
    ("unet", "only_cross_attention", True),
    ("unet", "only_cross_attention", [True, False]),
    ("unet", "mid_block_only_cross_attention", True),
    ("unet", "class_embed_type", "timestep"),
    ("unet", "attention_type", "gated"),
    ("unet", "resnet_out_scale_factor", 2.0),
    ("unet", "attention_head_dim", [4, 3]),
    ("unet", "attention_head_dim", 5),
    ("unet", "attention_head_dim", "many"),
    ("unet", "attention_head_dim", [4]),
    ("unet", "norm_num_groups", 7),
    ("unet", "norm_eps", -1.0),
    ("unet", "norm_eps", float("nan")),
    ("unet", "norm_eps", 10**400),
    ("vae", "act_fn", "relu"),
    ("vae", "shift_factor", 0.1),
    ("vae", "use_quant_conv", False),
    ("vae", "norm_num_groups", 5),
    ("vae", "scaling_factor", "big"),
    ("vae", "scaling_factor", float("inf")),
    ("text_encoder", "hidden_act", "relu"),
    ("text_encoder", "num_attention_heads", 3),
    ("scheduler", "beta_schedule", "sigmoid"),
    ("scheduler", "beta_schedule", ["linear"]),
    ("scheduler", "trained_betas", [0.1, 0.2]),
    ("scheduler", "prediction_type", "flow"),
    ("scheduler", "num_train_timesteps", 10**9),
    ("scheduler", "beta_end", 1.5),
]


@pytest.mark.parametrize(("place", "key", "value"), UNSUPPORTED)
def test_what_would_change_the_numbers_is_refused_by_name(folder, place, key, value):
    path = folder / place / ("scheduler_config.json" if place == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(CheckpointError, match=str(folder)):
        load_checkpoint(folder)


def test_a_folder_with_placeholders_of_textual_inversion_brings_them(folder):
    rows = 49408 + 3
    text = replace(TINY["SD1"].text, vocab_size=rows, bos_id=49406, eos_id=49407, pad_id=49407)
    made = checkpoint(replace(TINY["SD1"], text=text))
    made.added_tokens = {"<cat>": [49408, 49409], "<dog>": [49410]}
    save_checkpoint(made, folder.parent / "ti", layout="diffusers")
    (folder.parent / "ti" / "minisd_extra.safetensors").unlink()
    loaded = load_checkpoint(folder.parent / "ti")
    assert loaded.added_tokens == made.added_tokens
    assert Tokenizer(added_tokens=loaded.added_tokens).encode("a <cat>")[1:] == [49408, 49409]
