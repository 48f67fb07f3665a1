"""Loading: every official file is understood to the last tensor, and so are the files that people make of them."""

import io
import json
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import recipe
import torch
from reference import manifest
from tiny import (
    TINY,
    checkpoint,
    contiguous,
    ldm_file,
    random_network,
    same_networks,
    same_tensors,
    sparse_file,
)

from minisd.checkpoints.building import on_meta
from minisd.checkpoints.files import CheckpointError, save_safetensors
from minisd.checkpoints.keymaps import keymap, to_official
from minisd.checkpoints.load import load_checkpoint, load_network, open_checkpoint
from minisd.checkpoints.save import ldm_tensors, save_checkpoint
from minisd.config import PRESETS, ControlNetConfig

# ------------------------------------------------------------------------------------------------------ official files

SCHEDULES = "schedule buffers (recomputed)"
POSITIONS, TEMPERATURE = "position indices 0, 1, 2, …", "CLIP temperature"
OFFICIAL = {  # manifest: preset, what is known and not run
    "sd-v1": ("SD1", {SCHEDULES: 12, POSITIONS: 1}),
    "sd-v1-full-ema": ("SD1", {SCHEDULES: 12, POSITIONS: 1, "EMA weights": 688}),
    "sd-v1-inpainting": ("SD1_INPAINT", {SCHEDULES: 12, POSITIONS: 1}),
    "sd-v2-base": ("SD2_BASE", {SCHEDULES: 12, TEMPERATURE: 1}),
    "sd-v2-1": ("SD2_V", {SCHEDULES: 12, TEMPERATURE: 1}),
    "sd-v2-inpainting": ("SD2_INPAINT", {SCHEDULES: 12, TEMPERATURE: 1}),
    "sd-2-depth": ("SD2_DEPTH", {SCHEDULES: 12, TEMPERATURE: 1, "MiDaS depth model": 368}),
    "sd-x4-upscaler": ("SD_X4_UPSCALER", {SCHEDULES: 20, TEMPERATURE: 1}),
    "sd-2-1-unclip-h": (
        "SD2_UNCLIP_H",
        {SCHEDULES: 20, TEMPERATURE: 2, "CLIP text projection": 1, "CLIP image encoder's unused parts": 4},
    ),
    "controlnet-cldm-v15": ("SD1", {SCHEDULES: 12, POSITIONS: 1, "training log-variance": 1}),
    "controlnet-cldm-v21": ("SD2_BASE", {SCHEDULES: 12, TEMPERATURE: 1, "training log-variance": 1}),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_file_is_loaded_and_every_tensor_accounted_for(tmp_path, name):
    preset, not_run = OFFICIAL[name]
    tensors = manifest(name)["tensors"]
    path = sparse_file(tmp_path / "model.safetensors", tensors)
    found = open_checkpoint(path).contents
    used = sum(len(part.tensors) for part in found.parts.values())
    assert {reason: len(names) for reason, names in found.known.items()} == not_run
    assert found.unknown == []
    assert used + sum(not_run.values()) == len(tensors)
    loaded = load_checkpoint(path, prediction=PRESETS[preset].prediction)
    assert loaded.config == PRESETS[preset]


def test_instruct_pix2pix_is_sd1_with_eight_input_channels(tmp_path):
    tensors = dict(manifest("sd-v1")["tensors"])
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = [[320, 8, 3, 3], "F32"]
    loaded = load_checkpoint(sparse_file(tmp_path / "model.safetensors", tensors))
    assert loaded.config == PRESETS["SD1_PIX2PIX"]
    assert loaded.networks["unet"].conv_in.weight.shape == (320, 8, 3, 3)


def test_an_unclip_l_file_is_told_from_h_by_its_shapes(tmp_path):
    tensors = {k: v for k, v in manifest("sd-2-1-unclip-h")["tensors"].items() if not k.startswith("embedder.")}
    tensors["model.diffusion_model.label_emb.0.0.weight"] = [[1280, 1536], "F32"]
    vision = on_meta("vision", PRESETS["SD2_UNCLIP_L"].vision)
    official = to_official(vision.state_dict(), keymap(vision, "openclip"))
    tensors |= {f"embedder.model.visual.{name}": [tuple(t.shape), "F32"] for name, t in official.items()}
    loaded = load_checkpoint(sparse_file(tmp_path / "model.safetensors", tensors))
    assert loaded.config == PRESETS["SD2_UNCLIP_L"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd-v1", "sd-v2-1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_of_the_official_size_has_every_value_in_its_place(tmp_path, name, dtype):
    """Gigabytes are written, loaded as float32 and compared."""
    found = manifest(name)
    original = {k: torch.from_numpy(v) for k, v in recipe.synthetic_state_dict(found).items()}
    original = {k: t.to(dtype) if t.is_floating_point() else t for k, t in original.items()}
    save_safetensors(tmp_path / "model.safetensors", original)
    loaded = load_checkpoint(tmp_path / "model.safetensors", prediction="eps", cast=lambda _: torch.float32)
    for network in loaded.networks:
        for key, tensor in ldm_tensors(network, loaded.networks[network]).items():
            assert torch.equal(tensor, original.pop(key).float()), key
    assert same_tensors(dict(loaded.extras), original)


ALONE = {  # manifest: network, config
    "sd15-unet.diffusers": ("unet", PRESETS["SD1"].unet),
    "sd15-inpainting-unet.diffusers": ("unet", PRESETS["SD1_INPAINT"].unet),
    "sd21-unet.diffusers": ("unet", PRESETS["SD2_V"].unet),
    "sd21-unclip-h-unet.diffusers": ("unet", PRESETS["SD2_UNCLIP_H"].unet),
    "sdx4-unet.diffusers": ("unet", PRESETS["SD_X4_UPSCALER"].unet),
    "sd15-vae.diffusers-new": ("vae", PRESETS["SD1"].vae),
    "sd15-vae.diffusers-old": ("vae", PRESETS["SD1"].vae),
    "sdx4-vae.diffusers-new": ("vae", PRESETS["SD_X4_UPSCALER"].vae),
    "sdx4-vae.diffusers-old": ("vae", PRESETS["SD_X4_UPSCALER"].vae),
    "sd15-text_encoder.diffusers-hub": ("text", PRESETS["SD1"].text),
    "sd15-text_encoder.transformers5": ("text", PRESETS["SD1"].text),
    "sd21-text_encoder.diffusers-hub": ("text", replace(PRESETS["SD2_V"].text, layers=23, skip=0, projection_dim=None)),
    "sd21-text_encoder.transformers5": ("text", replace(PRESETS["SD2_V"].text, layers=23, skip=0, projection_dim=None)),
    "sd15-controlnet.diffusers": ("control", ControlNetConfig(PRESETS["SD1"].unet)),
    "sd21-controlnet.diffusers": ("control", ControlNetConfig(PRESETS["SD2_V"].unet)),
}


@pytest.mark.parametrize("name", ALONE)
def test_every_diffusers_file_loads_as_the_official_network(tmp_path, name):
    network, config = ALONE[name]
    tensors = manifest(name)["tensors"]
    path = sparse_file(tmp_path / "weights.safetensors", tensors)
    found = open_checkpoint(path).contents
    positions = sum(key.endswith("position_ids") for key in tensors)
    assert (len(found.parts[network].tensors), found.unknown) == (len(tensors) - positions, [])
    loaded = load_network(path, network)
    assert (loaded.control_config if network == "control" else loaded.config) == config


# --------------------------------------------------------------------------------------- what people make of the files


CKPTS = {
    "zip": lambda tensors: torch_bytes({"state_dict": tensors, "global_step": 470000}),
    "legacy": lambda tensors: torch_bytes({"state_dict": tensors}, _use_new_zipfile_serialization=False),
    "bare": lambda tensors: torch_bytes(tensors),
    "bare legacy": lambda tensors: torch_bytes(tensors, _use_new_zipfile_serialization=False),
    "parameters": lambda tensors: torch_bytes({k: torch.nn.Parameter(t) for k, t in tensors.items()}),
}


def torch_bytes(value, **options):
    torch.save(value, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("how", CKPTS)
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_ckpt_of_any_make_is_told_by_content_whatever_its_name(tmp_path, how, name):
    (tmp_path / name).write_bytes(CKPTS[how](contiguous(ldm_file()[0])))
    loaded = load_checkpoint(tmp_path / name, config=TINY["SD1"])
    assert same_networks(loaded.networks, checkpoint("SD1").networks)
    assert loaded.global_step == (470000 if how == "zip" else None)


def test_a_lightning_container_loads_and_its_objects_are_named_and_left_out(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for i in range(3):
        package = ".".join(name.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[name].ModelCheckpoint = callback
    value = {"state_dict": contiguous(ldm_file()[0]), "callbacks": {callback: {"best": 1.0}}, "epoch": 3}
    (tmp_path / "model.ckpt").write_bytes(torch_bytes(value))
    loaded = load_checkpoint(tmp_path / "model.ckpt", config=TINY["SD1"])
    assert same_networks(loaded.networks, checkpoint("SD1").networks)
    assert any("ModelCheckpoint" in line and "left out" in line for line in loaded.report)


TEXT = "cond_stage_model.transformer."
LEFTOVERS = {
    "float position_ids": {TEXT + "text_model.embeddings.position_ids": torch.arange(77.0)[None]},
    "position_ids": {TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None]},
    "logit_scale": {"cond_stage_model.logit_scale": torch.tensor(2.659)},
    "VAE loss": {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.w": torch.ones(3),
    },
    "EMA counters": {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    },
    "schedule": {"betas": torch.zeros(1000), "logvar": torch.zeros(1000)},
    "a stranger": {"something.else": torch.ones(2)},
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_leftovers_are_tolerated_reported_and_kept(tmp_path, what):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors | LEFTOVERS[what], said)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert same_networks(loaded.networks, checkpoint("SD1").networks)
    assert same_tensors(dict(loaded.extras), LEFTOVERS[what])
    assert any(line.startswith(("not run:", "unknown, kept but not run:")) for line in loaded.report)


def test_text_names_without_text_model_load(tmp_path):
    tensors, said = ldm_file()
    tensors = {name.replace(TEXT + "text_model.", TEXT): tensor for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "a.safetensors", tensors, said)
    assert same_networks(load_checkpoint(tmp_path / "a.safetensors").networks, checkpoint("SD1").networks)


@pytest.mark.parametrize("kind", ["SD1", "SD2_V"])
def test_the_text_projection_may_be_there_or_not(tmp_path, kind):
    tensors, _ = ldm_file(kind)
    name = TEXT + "text_projection.weight" if kind == "SD1" else "cond_stage_model.model.text_projection"
    projection = tensors.pop(name, None)
    config = TINY[kind]
    without = replace(config, text=replace(config.text, projection_dim=None))
    save_safetensors(tmp_path / "a.safetensors", tensors)
    assert load_checkpoint(tmp_path / "a.safetensors", config=without).networks["text"].projection is None
    save_safetensors(tmp_path / "b.safetensors", tensors | {name: torch.ones(32, 64) if kind == "SD1" else projection})
    there = replace(config, text=replace(config.text, projection_dim=32))
    assert load_checkpoint(tmp_path / "b.safetensors", config=there).networks["text"].projection.weight.shape == (
        32,
        64,
    )


def test_an_open_clip_tower_of_23_blocks_runs_all_of_them(tmp_path):
    tensors = {
        name: spec
        for name, spec in manifest("sd-v2-1")["tensors"].items()
        if "resblocks.23." not in name and not name.endswith(("text_projection", "logit_scale"))
    }
    loaded = load_checkpoint(sparse_file(tmp_path / "wd14.safetensors", tensors), prediction="eps")
    text = loaded.config.text
    assert (text.layers, text.skip, text.projection_dim, text.activation) == (23, 0, None, "gelu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_load_as_they_are_or_as_asked(tmp_path, dtype):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", {name: tensor.to(dtype) for name, tensor in tensors.items()}, said)
    kept = load_checkpoint(tmp_path / "a.safetensors").networks["unet"].conv_in.weight
    cast = load_checkpoint(tmp_path / "a.safetensors", cast=lambda _: torch.float32).networks["unet"].conv_in.weight
    original = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    assert torch.equal(kept, original.to(dtype))
    assert torch.equal(cast, original.to(dtype).float())


def test_mixed_dtypes_stay_mixed_unless_cast(tmp_path):
    tensors, said = ldm_file()
    half = {name: tensor.half() if name.startswith("model.") else tensor for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "a.safetensors", half, said)
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert {name: next(n.parameters()).dtype for name, n in loaded.networks.items()} == {
        "unet": torch.float16,
        "vae": torch.float32,
        "text": torch.float32,
    }


def with_ema(tensors):
    """The names of a training file: `model_ema.` + the key without "model." and without dots."""
    unet = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    return {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in unet.items()}


def test_weights_ema_gives_the_ema_values_and_says_so(tmp_path):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors | with_ema(tensors), said)
    raw, ema = (load_checkpoint(tmp_path / "a.safetensors", weights=w) for w in ("raw", "ema"))
    own = checkpoint("SD1").networks["unet"].state_dict()
    assert all(torch.equal(t, own[n]) for n, t in raw.networks["unet"].state_dict().items())
    assert all(torch.equal(t, own[n] + 1) for n, t in ema.networks["unet"].state_dict().items())
    assert 'weights: raw (the file also holds EMA weights: weights="ema")' in raw.report
    assert "weights: ema" in ema.report
    assert not ema.extras


def test_weights_ema_also_finds_them_in_a_folder_of_ours(tmp_path):
    tensors, said = ldm_file("SD2_V")
    save_safetensors(tmp_path / "a.safetensors", tensors | with_ema(tensors), said)
    save_checkpoint(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "folder", layout="diffusers")
    ema = load_checkpoint(tmp_path / "folder", weights="ema").networks["unet"].state_dict()
    own = checkpoint("SD2_V").networks["unet"].state_dict()
    assert all(torch.equal(tensor, own[name] + 1) for name, tensor in ema.items())


def test_weights_ema_is_refused_where_the_file_has_none_or_too_few(tmp_path):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors, said)
    with pytest.raises(
        CheckpointError, match='Pruned files carry the EMA under the ordinary names: leave out weights="ema"'
    ):
        load_checkpoint(tmp_path / "a.safetensors", weights="ema")
    half = dict(list(with_ema(tensors).items())[3:])
    save_safetensors(tmp_path / "b.safetensors", tensors | half, said)
    with pytest.raises(CheckpointError, match="3 EMA tensors are missing"):
        load_checkpoint(tmp_path / "b.safetensors", weights="ema")


# ----------------------------------------------------------------------------------------------------------- the VAE


def vae_files(tmp_path, config):
    """The same VAE as people have it: as a file in either layout, a training file, a component and a whole folder."""
    network = random_network("vae", config, seed=99)
    original, theirs = (to_official(network.state_dict(), keymap(network, d)) for d in ("ldm", "diffusers"))
    original, theirs = contiguous(original), contiguous(theirs)
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.ones(3, 3)}
    save_safetensors(tmp_path / "ldm.safetensors", original)
    torch.save({"state_dict": original | loss}, tmp_path / "training.ckpt")
    save_safetensors(tmp_path / "prefixed.safetensors", {f"first_stage_model.{k}": v for k, v in original.items()})
    save_safetensors(tmp_path / "diffusers.safetensors", theirs)
    old = theirs
    for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {k.replace(f".attentions.0.{new_name}.", f".attentions.0.{old_name}."): v for k, v in old.items()}
    assert old.keys() != theirs.keys()
    save_safetensors(tmp_path / "old.safetensors", old)
    made = replace_vae(checkpoint("SD1"), network)
    save_checkpoint(made, tmp_path / "whole", layout="diffusers")
    return network, {
        "an LDM file": tmp_path / "ldm.safetensors",
        "a training file": tmp_path / "training.ckpt",
        "an LDM file with prefix": tmp_path / "prefixed.safetensors",
        "a diffusers file": tmp_path / "diffusers.safetensors",
        "an old diffusers file": tmp_path / "old.safetensors",
        "a component's folder": tmp_path / "whole" / "vae",
        "a whole folder": tmp_path / "whole",
    }


def replace_vae(made, network):
    return replace(made, config=replace(made.config, vae=network.config), networks=made.networks | {"vae": network})


def test_vae_takes_every_kind_of_file_and_folder(tmp_path):
    network, places = vae_files(tmp_path, TINY["SD1"].vae)
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "model.safetensors", tensors, said)
    for how, place in places.items():
        loaded = load_checkpoint(tmp_path / "model.safetensors", vae=place)
        assert f"the VAE is that of {place}" in loaded.report
        assert same_tensors(loaded.networks["vae"].state_dict(), network.state_dict()), how
        assert same_tensors(loaded.networks["unet"].state_dict(), checkpoint("SD1").networks["unet"].state_dict())


def test_a_vae_with_a_training_loss_in_a_folder_loads(tmp_path):
    network, places = vae_files(tmp_path, TINY["SD1"].vae)
    weights = places["a component's folder"] / "diffusion_pytorch_model.safetensors"
    tensors = contiguous(to_official(network.state_dict(), keymap(network, "diffusers")))
    save_safetensors(weights, tensors | {"loss.logvar": torch.zeros(())})
    assert same_tensors(load_network(places["a whole folder"], "vae").state_dict(), network.state_dict())


def test_a_checkpoint_without_vae_asks_for_one(tmp_path):
    tensors, said = ldm_file()
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    save_safetensors(tmp_path / "a.safetensors", bare, said)
    with pytest.raises(CheckpointError, match=r"a whole model also needs vae: give one with vae="):
        load_checkpoint(tmp_path / "a.safetensors")
    _, places = vae_files(tmp_path, TINY["SD1"].vae)
    assert load_checkpoint(tmp_path / "a.safetensors", vae=places["a component's folder"]).networks["vae"]


def test_a_file_without_a_vae_is_no_vae(tmp_path):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors, said)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    save_safetensors(tmp_path / "unet.safetensors", unet)
    with pytest.raises(CheckpointError, match=r"unet.safetensors: it holds no VAE: it is a U-Net alone"):
        load_checkpoint(tmp_path / "a.safetensors", vae=tmp_path / "unet.safetensors")


# --------------------------------------------------------------------------------------------------------- ControlNet


def test_a_controlnet_loads_from_every_layout(tmp_path):
    official = {k: v for k, v in manifest("controlnet-cldm-v15")["tensors"].items() if k.startswith("control_model.")}
    bare = {k.removeprefix("control_model."): v for k, v in official.items()}
    whole = manifest("controlnet-cldm-v15")["tensors"]
    for name, tensors in (("prefixed", official), ("bare", bare), ("whole", whole)):
        loaded = load_network(sparse_file(tmp_path / f"{name}.safetensors", tensors), "control")
        assert loaded.control_config == ControlNetConfig(PRESETS["SD1"].unet)


def test_a_controlnet_folder_says_its_own_config(tmp_path):
    config = ControlNetConfig(TINY["SD2_V"].unet, 3, (8, 16, 24))
    network = random_network("control", config)
    save_safetensors(
        tmp_path / "diffusion_pytorch_model.safetensors",
        contiguous(to_official(network.state_dict(), keymap(network, "diffusers"))),
    )
    (tmp_path / "config.json").write_text(json.dumps({"attention_head_dim": [2, 4], "only_cross_attention": False}))
    loaded = load_network(tmp_path, "control")
    assert loaded.control_config == config
    assert same_tensors(loaded.state_dict(), network.state_dict())


# ------------------------------------------------------------------------------------------------- unofficial shapes


def test_shapes_that_tell_no_heads_are_not_guessed(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ldm_file()[0])
    with pytest.raises(CheckpointError, match=r"they do not tell its heads.*config="):
        load_checkpoint(tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors", config=TINY["SD1"]).config == TINY["SD1"]


def test_a_config_of_other_shapes_is_refused(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ldm_file()[0])
    for wrong in (TINY["SD2_V"], PRESETS["SD1"], replace(TINY["SD1"], vae=PRESETS["SD1"].vae)):
        with pytest.raises(CheckpointError, match=r"its config and the shapes of its .* disagree"):
            load_checkpoint(tmp_path / "a.safetensors", config=wrong)


# -------------------------------------------------------------------------------------------------------- time, memory


def test_building_draws_no_weights(monkeypatch):
    """Drawing on the meta device computes nothing, and imports torch's compiler, which takes seconds."""

    def draw(*args, **kwargs):
        raise AssertionError("a weight was drawn")

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, draw)
    monkeypatch.setattr(torch, "randn", draw)
    config = PRESETS["SD2_UNCLIP_H"]
    for name in ("unet", "vae", "text", "vision"):
        assert on_meta(name, getattr(config, name)).state_dict()


def test_tensors_that_keep_their_dtype_are_mapped_and_not_read(tmp_path):
    """4.3 GB in well under a gigabyte of memory."""
    path = sparse_file(tmp_path / "model.safetensors", manifest("sd-v1")["tensors"])
    code = "from minisd.bench.process import resident; import torch; import minisd; minisd.load; before = resident()\n"
    code += f"sd = minisd.load({str(path)!r}); print(resident(peak=True) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(done.stdout) < 300e6
