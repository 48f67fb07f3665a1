"""The checkpoint doctor: for every kind of file, the sentence that its owner needs."""

import json
import math
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import recipe
import torch
from reference import DATA, manifest
from torch import nn

import minisd
from minisd.checkpoints.doctor import inspect_checkpoint
from minisd.checkpoints.evidence import PROBE_TENSORS
from minisd.checkpoints.files import open_tensors, save_safetensors
from minisd.checkpoints.load import Checkpoint
from minisd.checkpoints.networks import NETWORKS
from minisd.checkpoints.save import save_checkpoint
from minisd.config import CLIPTextConfig, ModelConfig, UNetConfig, VAEConfig
from minisd.models.unet import Conditioning

BYTES = {"F32": 4, "F16": 2, "I64": 8, "I32": 4}


def official(path, name, *, half=True, metadata=None, change=lambda tensors: tensors, values=None):
    """A safetensors file of an official model's names and shapes; of its bytes only `values` are written, the rest is a
    hole, so that gigabytes cost nothing. half: F16 in place of F32."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key, (shape, dtype) in change(dict(manifest(name)["tensors"])).items():
        dtype = "F16" if half and dtype == "F32" else dtype
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for key, tensor in (values or {}).items():
            file.seek(8 + len(text) + header[key]["data_offsets"][0])
            file.write(tensor.half().numpy().tobytes())
    return path


def without(prefix):
    return lambda tensors: {key: spec for key, spec in tensors.items() if not key.startswith(prefix)}


TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_heads=2, context_dim=32
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=CLIPTextConfig(vocab_size=50, length=8, width=32, layers=2, heads=2, mlp_width=64, bos_id=48, eos_id=49),
    image_size=16,
)


def tiny_checkpoint(config=TINY, **changes):
    torch.manual_seed(0)
    networks = {name: NETWORKS[name].module(getattr(config, name)) for name in ("unet", "vae", "text")}
    for network in networks.values():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.02)
    return replace(Checkpoint(config, networks, {}, []), **changes)


def tiny_file(path, config=TINY, **changes):
    save_checkpoint(tiny_checkpoint(config, **changes), path)
    return path


def page(path, **options):
    """The printed page in one line, so that line breaks do not matter, with the checks that hold for every page."""
    found = inspect_checkpoint(path, **options)
    assert json.loads(json.dumps(found.as_dict()))["ok"] is found.ok
    assert all(len(line) <= 100 for line in str(found).replace(str(path), "FILE").splitlines())
    return " ".join(str(found).replace(str(path), "FILE").split())


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("name", "family", "inputs", "parameters"),
    [
        ("sd-v1", "Stable Diffusion 1.x (preset SD1)", "4 channels: latents", 1_066_235_307),
        ("sd-v1-full-ema", "Stable Diffusion 1.x (preset SD1)", "4 channels: latents", 1_066_235_307),
        ("sd-v1-inpainting", "Stable Diffusion 1.5 inpainting (preset SD1_INPAINT)", "9 channels", 1_066_249_707),
        ("sd-v2-base", "Stable Diffusion 2.x base (preset SD2_BASE)", "4 channels: latents", 1_303_597_227),
        ("sd-v2-inpainting", "Stable Diffusion 2 inpainting (preset SD2_INPAINT)", "9 channels", 1_303_611_627),
        ("sd-2-depth", "Stable Diffusion 2 depth (preset SD2_DEPTH)", "a depth map", 1_303_600_107),
        ("sd-x4-upscaler", "Stable Diffusion x4 upscaler (preset SD_X4_UPSCALER)", "noise level", 882_756_587),
        ("sd-2-1-unclip-h", "unCLIP (H) (preset SD2_UNCLIP_H)", "y is an image embedding", 1_939_936_427),
    ],
)
def test_official_files_are_named_and_every_tensor_is_accounted_for(tmp_path, name, family, inputs, parameters):
    found = inspect_checkpoint(official(tmp_path / "x", name))
    text = page(tmp_path / "x")
    assert found.ok
    assert "FILE: a Stable Diffusion checkpoint file" in text
    assert f"family {family}" in text.replace("Stable Diffusion 2.1 unCLIP", "unCLIP")
    assert inputs in text
    assert sum(network.parameters for network in found.networks) == parameters
    assert found.unknown == []
    assert found.used + sum(map(len, found.known.values())) == found.tensors == len(manifest(name)["tensors"])


def test_sizes_dtypes_counts_and_memory_stand_in_the_page(tmp_path):
    text = page(official(tmp_path / "x", "sd-v1", half=False))
    assert "file 4.27 GB, safetensors, original layout" in text
    assert "U-Net 686 859,520,964 float32 3.44 GB 3.44 GB 4 channels in, context 768" in text
    assert "text encoder 196 123,060,480 float32 492.24 MB 492.24 MB CLIP ViT-L/14, 12 layers" in text
    assert "memory for the weights: 4.26 GB as they are stored, 4.26 GB in float32" in text
    assert 'nothing else: minisd txt2img "a red apple" --checkpoint FILE' in text
    half = page(official(tmp_path / "y", "sd-v1"))
    assert "memory for the weights: 2.13 GB as they are stored, 4.26 GB in float32" in half


def test_a_full_training_file_has_two_sets_of_weights_and_a_pruned_one_has_one(tmp_path):
    full = page(official(tmp_path / "full", "sd-v1-full-ema"))
    assert 'two sets: a plain load takes the raw ones, weights="ema" the EMA copy (686 tensors)' in full
    assert "688 not run: EMA weights" in full
    assert "one set, no separate EMA copy" in page(official(tmp_path / "pruned", "sd-v1"))


def test_an_ema_that_lacks_tensors_is_pointed_out(tmp_path):
    lost = "model_ema.diffusion_modelinput_blocks00weight"
    text = page(official(tmp_path / "x", "sd-v1-full-ema", change=without(lost)))
    assert f'weights="ema" will be refused: 1 tensors of the EMA are missing, first: {lost}' in text


def test_tensors_that_are_not_run_are_listed_with_their_reason(tmp_path):
    text = page(official(tmp_path / "x", "sd-2-depth"))
    assert "368 not run: MiDaS depth model" in text
    assert "12 not run: schedule buffers (recomputed)" in text


@pytest.mark.parametrize(("scale", "prediction"), [(0.05, "eps"), (0.2, "v")])
def test_sd2_tells_eps_from_v_by_a_bias_and_says_so(tmp_path, scale, prediction):
    name = "model.diffusion_model." + PROBE_TENSORS["ldm"]
    bias = torch.full((320,), scale)
    bias[::2] *= -1
    found = inspect_checkpoint(official(tmp_path / "x", "sd-v2-1", values={name: bias}))
    assert found.prediction == prediction
    assert found.presets == ["SD2_V" if prediction == "v" else "SD2_BASE"]
    assert f"{prediction}: std {scale:.3f} of {PROBE_TENSORS['ldm']} (v where above 0.09)" in found.facts["prediction"]
    assert "overrides it" in found.facts["prediction"]


def test_evidence_that_contradicts_itself_is_pointed_out(tmp_path):
    metadata = {"modelspec.prediction_type": "v"}
    text = page(official(tmp_path / "x", "sd-v2-1", metadata=metadata))
    assert "prediction v: modelspec.prediction_type 'v' in its metadata; prediction=\"eps\" overrides it" in text
    assert "evidence 2 eps: std 0.000" in text
    assert "CONTRADICTS v" in text
    assert "the evidence for eps or v contradicts itself: loading takes v." in text


def test_a_missing_vae_or_text_encoder_is_asked_for(tmp_path):
    text = page(official(tmp_path / "x", "sd-v1", change=without("first_stage_model.")))
    assert "To run it - a VAE: minisd.load('x', vae=FILE)" in text
    text = page(official(tmp_path / "y", "sd21-unet.diffusers"))
    assert "a U-Net alone" in text
    assert "a text encoder, which minisd takes from the checkpoint's own file or folder" in text


def test_tensors_that_no_network_has_are_named(tmp_path):
    extra = {f"mystery.{i}": [[3], "F32"] for i in range(8)}
    path = official(tmp_path / "x", "sd-v1", change=lambda tensors: tensors | extra)
    text = page(path)
    assert "8 unknown, not run: mystery.0 mystery.1 mystery.2 mystery.3 mystery.4 … and 3 more" in text
    assert inspect_checkpoint(path).ok
    assert any("mystery.7" in line for line in inspect_checkpoint(path).lines(verbose=True))


def test_a_foreign_layer_inside_a_network_makes_loading_refuse_and_the_doctor_says_so(tmp_path):
    extra = {"model.diffusion_model.extra_layer.weight": [[3], "F32"]}
    found = inspect_checkpoint(official(tmp_path / "x", "sd-v1", change=lambda tensors: tensors | extra))
    assert not found.ok
    assert "1 tensors in its networks are not Stable Diffusion's" in str(found.problems)


def test_missing_tensors_and_wrong_shapes_are_found_without_reading_any(tmp_path):
    lost = "first_stage_model.decoder.conv_out.bias"
    found = inspect_checkpoint(official(tmp_path / "x", "sd-v1", change=without(lost)))
    assert "VAE: 1 tensors of its vae are missing, first: decoder.conv_out.bias" in str(found.problems)
    key = "model.diffusion_model.out.2.bias"
    found = inspect_checkpoint(official(tmp_path / "y", "sd-v1", change=lambda t: t | {key: [[5], "F32"]}))
    assert "out.2.bias of its unet has shape (5,), (4,) is expected" in str(found.problems)


def test_a_lightning_file_tells_its_step_what_was_dropped_and_what_lies_beside_the_weights(tmp_path):
    weights = {
        key: torch.from_numpy(value)
        for name in ("tiny-unet-sd1", "tiny-vae", "tiny-clip-text-quick")
        for key, value in recipe.synthetic_state_dict(manifest(name)).items()
    }
    content = {"state_dict": weights, "global_step": 470_000, "optimizer_states": [{"state": {0: torch.ones(50)}}]}
    torch.save(content, tmp_path / "x")
    text = page(tmp_path / "x")
    assert "global step 470,000" in text
    assert "optimizer_states, beside state_dict, holds 1 tensors (200 bytes): never read" in text
    dropped = inspect_checkpoint(DATA / "lightning_style.ckpt")
    assert "nothing of them was run: pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint" in str(dropped.notes)


def test_a_network_of_unknown_heads_and_prediction_says_what_is_missing(tmp_path):
    weights = recipe.synthetic_state_dict(manifest("tiny-unet-sd1"))
    save_safetensors(tmp_path / "x", {key: torch.from_numpy(value) for key, value in weights.items()})
    found = inspect_checkpoint(tmp_path / "x")
    assert found.family == "custom: no official U-Net has these shapes"
    assert found.prediction is None
    assert 'prediction="eps" or prediction="v", as its author says; both can be tried' in found.needs
    assert "they do not tell its heads" in found.needs[0]


def test_what_minisd_saved_is_known_by_its_metadata(tmp_path):
    config = replace(TINY, text=replace(TINY.text, vocab_size=49410, bos_id=49406, eos_id=49407))
    said = {"added_tokens": {"<cat-toy>": [49408, 49409]}, "prediction_evidence": "its trainer", "global_step": 12}
    text = page(tiny_file(tmp_path / "x", config=config, **said))
    assert "family tiny" in text
    assert "prediction eps: its trainer" in text
    assert "tokens <cat-toy> (2 vectors)" in text
    assert "global step 12" in text
    assert page(tmp_path / "x", verify=True).count("checksums match") == 1


def test_a_vocabulary_that_stores_equal_rows_once_is_told_beside_its_full_size():
    text = page(Path(minisd.__file__).parents[1] / "weights" / "mini.safetensors")
    assert "vocabulary 3,700 different rows for 49,408 tokens" in text


# ------------------------------------------------------------------------------------------------------- folders


def test_a_folder_names_the_file_of_each_component(tmp_path):
    save_checkpoint(tiny_checkpoint(), tmp_path / "model", layout="diffusers")
    text = page(tmp_path / "model")
    assert "a Stable Diffusion checkpoint" in text
    assert "diffusers folder" in text
    assert "U-Net unet/diffusion_pytorch_model.safetensors" in text
    assert "text encoder text_encoder/model.safetensors" in text
    assert inspect_checkpoint(tmp_path / "model").ok


def test_a_folder_without_optional_parts_and_with_other_variants_says_so(tmp_path):
    folder = tmp_path / "model"
    save_checkpoint(tiny_checkpoint(), folder, layout="diffusers")
    shutil.rmtree(folder / "tokenizer")
    shutil.copy(folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/other.bin")
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    text = page(folder)
    assert "not read, another file of the U-Net comes first: unet/other.bin" in text
    assert "vae: the fp16 variant, the only one in the folder" in text
    assert "tokenizer/ is missing, which is no harm: CLIP's own comes with minisd" in text


def test_a_folder_that_is_no_checkpoint_names_the_files_in_it(tmp_path):
    save_safetensors(tmp_path / "lora.safetensors", {"a": torch.ones(1)})
    text = page(tmp_path)
    assert "a folder without image_encoder, text_encoder, unet, vae" in text
    assert "one of the files in it: lora.safetensors" in text


# ----------------------------------------------------------------------------------------- one network, or none of ours


def test_single_networks_are_named_and_what_they_go_with(tmp_path):
    vae = page(official(tmp_path / "vae", "sd15-vae.diffusers-old"))
    assert "a VAE alone" in vae
    assert "a checkpoint whose VAE it replaces: minisd.load(CHECKPOINT, vae='vae')" in vae
    upscaler = page(official(tmp_path / "f4", "sdx4-vae.diffusers-new"))
    assert "family Stable Diffusion x4 upscaler" in upscaler
    text = page(official(tmp_path / "text", "sd21-text_encoder.diffusers-hub"))
    assert "a CLIP text encoder alone" in text
    assert "OpenCLIP ViT-H/14, 23 layers" in text
    control = page(official(tmp_path / "control", "sd21-controlnet.diffusers"))
    assert "FILE: a ControlNet" in control
    assert "a checkpoint of Stable Diffusion 2.x base or Stable Diffusion 2.x 768-v for it to steer" in control
    assert "minisd.load_controlnet('control')" in control


def test_a_controlnet_inside_a_whole_checkpoint_is_named_beside_it(tmp_path):
    text = page(official(tmp_path / "x", "controlnet-cldm-v15"))
    assert "a Stable Diffusion checkpoint with a ControlNet" in text
    assert "ControlNet 340 361,279,120" in text


@pytest.mark.parametrize(
    ("name", "family", "layers"), [("lora-kohya-sd15", "1.x", 72), ("lora-kohya-sd21", "2.x", 138)]
)
def test_a_kohya_lora_tells_its_rank_networks_and_family(tmp_path, name, family, layers):
    found = inspect_checkpoint(official(tmp_path / "x", name))
    text = page(tmp_path / "x")
    assert found.ok
    assert "FILE: a LoRA (kohya layout)" in text
    assert f"family Stable Diffusion {family}" in text
    assert "rank 8" in text
    assert f"changes {layers} layers of the text encoder, 192 layers of the U-Net" in text
    assert found.used == found.tensors


GUIDED = {
    "input_blocks.0.0.weight": (32, 3, 3, 3),
    "time_embed.0.weight": (128, 32),
    "time_embed.2.weight": (1,),
    "label_emb.weight": (10, 128),
    "output_blocks.0.0.x": (1,),
    "out.2.weight": (6, 32, 3, 3),
}
ATTN2 = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
UNDERSCORED = "lora_unet_" + ATTN2.replace(".", "_")


def lora(down, up, *, rank=4, width=768, **more):
    return {down: torch.ones(rank, width), up: torch.ones(320, rank), **more}


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [
        (lora(f"unet.{ATTN2}.to_k.lora_A.weight", f"unet.{ATTN2}.to_k.lora_B.weight"), "peft layout"),
        (
            lora(f"base_model.model.{ATTN2}.to_k.lora_A.weight", f"base_model.model.{ATTN2}.to_k.lora_B.weight"),
            "peft layout",
        ),
        (
            lora(f"unet.{ATTN2}.processor.to_k_lora.down.weight", f"unet.{ATTN2}.processor.to_k_lora.up.weight"),
            "old diffusers layout",
        ),
        (
            lora(f"{ATTN2}.processor.to_k_lora.down.weight", f"{ATTN2}.processor.to_k_lora.up.weight"),
            "old diffusers layout",
        ),
    ],
)
def test_loras_of_other_layouts_are_read_alike(tmp_path, tensors, layout):
    save_safetensors(tmp_path / "x", tensors)
    text = page(tmp_path / "x")
    assert f"a LoRA ({layout}) file" in text
    assert "family Stable Diffusion 1.x rank 4 alpha not in the file, which means alpha = rank (scale 1)" in text
    assert "changes 1 layers of the U-Net" in text
    assert "0 unknown" in text


def test_alpha_is_found_in_the_file_its_metadata_or_the_config_beside_it(tmp_path):
    names = f"{UNDERSCORED}_to_k.lora_down.weight", f"{UNDERSCORED}_to_k.lora_up.weight"
    save_safetensors(tmp_path / "kohya", lora(*names, **{f"{UNDERSCORED}_to_k.alpha": torch.tensor(2.0)}))
    assert "alpha 2 (scale alpha/rank = 0.5)" in page(tmp_path / "kohya")
    peft = lora(f"unet.{ATTN2}.to_k.lora_A.weight", f"unet.{ATTN2}.to_k.lora_B.weight")
    save_safetensors(tmp_path / "meta", peft, {"lora_adapter_metadata": '{"unet.lora_alpha": 8}'})
    assert "alpha 8 (scale alpha/rank = 2), says the metadata" in page(tmp_path / "meta")
    names = f"base_model.model.{ATTN2}.to_k.lora_A.weight", f"base_model.model.{ATTN2}.to_k.lora_B.weight"
    save_safetensors(tmp_path / "peft", lora(*names))  # peft's own names, beside peft's own config
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 4}')
    assert "alpha 16 (scale alpha/rank = 4), says adapter_config.json" in page(tmp_path / "peft")
    save_safetensors(tmp_path / "other", peft)
    assert "alpha not in the file" in page(tmp_path / "other")


def test_a_lora_that_minisd_cannot_apply_says_why(tmp_path):
    names = f"{UNDERSCORED}_to_k.lora_down.weight", f"{UNDERSCORED}_to_k.lora_up.weight"
    cases = {
        "it is for SDXL: minisd runs": lora(*names, width=2048),
        "1 layers lack their second matrix, first: " + names[1]: {names[0]: torch.ones(4, 768)},
        "it is a LoHa adapter: only plain LoRAs are read": {f"{UNDERSCORED}_to_k.hada_w1_a": torch.ones(4, 4)},
    }
    for i, (sentence, tensors) in enumerate(cases.items()):
        save_safetensors(tmp_path / str(i), tensors)
        assert sentence in page(tmp_path / str(i))
        assert not inspect_checkpoint(tmp_path / str(i)).ok


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (
            {
                "string_to_token": {"*": torch.tensor(265)},
                "string_to_param": nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 768))}),
                "name": "cat-toy",
                "step": 3000,
                "sd_checkpoint_name": "sd-v1-4",
            },
            [
                "A1111's and the original's layout",
                "1.x",
                "2 of width 768",
                "'*', named 'cat-toy'",
                "on sd-v1-4",
                "3,000",
            ],
        ),
        ({"<cat-toy>": torch.ones(1024)}, ["(diffusers layout)", "2.x", "1 of width 1024", "token '<cat-toy>'"]),
        ({"emb_params": torch.ones(4, 768)}, ["(kohya layout)", "1.x", "4 of width 768", "by custom it is the file's"]),
        (torch.ones(3, 768), ["(a bare tensor)", "1.x", "3 of width 768"]),
    ],
    ids=["A1111", "diffusers", "kohya", "bare"],
)
def test_a_textual_inversion_embedding_tells_token_vectors_and_family(tmp_path, content, sentences):
    torch.save(content, tmp_path / "x")
    text = page(tmp_path / "x")
    assert "FILE: a textual-inversion embedding" in text
    assert all(sentence in text for sentence in sentences), text
    assert "sd.load_embedding('x', token=…)" in text
    assert inspect_checkpoint(tmp_path / "x").ok


def test_an_embedding_of_sdxl_is_told_by_its_two_widths(tmp_path):
    save_safetensors(tmp_path / "x", {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)})
    text = page(tmp_path / "x")
    assert "a textual-inversion embedding (SDXL layout)" in text
    assert "it is for SDXL: minisd runs Stable Diffusion 1.x and 2.x only" in text


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({"conditioner.embedders.0.transformer.x": (1,)}, "an SDXL checkpoint"),
        ({"add_embedding.linear_1.weight": (1,), "conv_in.weight": (320, 4, 3, 3)}, "an SDXL U-Net (diffusers layout)"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "an SD3 checkpoint"),
        ({"double_blocks.0.img_attn.qkv.weight": (1,)}, "a Flux checkpoint"),
        ({"single_transformer_blocks.0.norm.linear.weight": (1,)}, "a Flux transformer (diffusers layout)"),
        ({"decoder.conv_in.weight": (512, 16, 3, 3)}, "a VAE of 16 latent channels, as SD3's and Flux's"),
        ({"image_proj.norm.weight": (1,), "ip_adapter.1.to_k_ip.weight": (1,)}, "an IP-Adapter"),
        ({"768.0.linear.0.weight": (1,)}, "a hypernetwork of A1111"),
        (
            GUIDED,
            "a pixel diffusion network of guided-diffusion",
        ),
    ],
)
def test_models_of_other_families_are_called_by_their_name(tmp_path, tensors, kind):
    save_safetensors(tmp_path / "x", {name: torch.zeros(shape) for name, shape in tensors.items()})
    text = page(tmp_path / "x")
    assert f"FILE: {kind} PROBLEM minisd runs Stable Diffusion 1.x and 2.x only" in text
    assert not inspect_checkpoint(tmp_path / "x").ok


def test_an_optimisers_state_and_tensors_of_nothing_known_are_said_to_be_that(tmp_path):
    torch.save({"optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}], "epoch": 1}, tmp_path / "x")
    assert "the optimiser's state of a training run, without weights" in page(tmp_path / "x")
    save_safetensors(tmp_path / "y", {"layer.weight": torch.ones(3, 3), "layer.bias": torch.ones(3)})
    text = page(tmp_path / "y")
    assert "its tensors are those of no network that minisd knows" in text
    assert "2 in layer (12 elements)" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            b"<!DOCTYPE html><html>Log in</html>",
            "it is a web page, such as a log-in or error page in place of the file",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git-LFS pointer, the real file was not"),
        (b"GGUF\x03\0\0\0", "it is a GGUF file"),
        (b"\x89PNG\r\n\x1a\n\0\0", "it is a PNG image, not a checkpoint"),
        (b"7z\xbc\xaf\x27\x1c\0\0", "it is a 7z archive: unpack it"),
        (b"", "it is empty (0 bytes)"),
    ],
)
def test_what_is_no_checkpoint_at_all_is_diagnosed_and_not_ok(tmp_path, content, sentence):
    (tmp_path / "x").write_bytes(content)
    assert sentence in page(tmp_path / "x")
    assert not inspect_checkpoint(tmp_path / "x").ok


def test_truncated_and_missing_files_are_diagnosed(tmp_path):
    path = tiny_file(tmp_path / "model.safetensors")
    cut = path.read_bytes()[:-100]
    (tmp_path / "cut.safetensors").write_bytes(cut)
    assert f"it is cut short ({len(cut):,} of {len(cut) + 100:,} bytes)" in page(tmp_path / "cut.safetensors")
    assert "does not exist; did you mean model.safetensors" in page(tmp_path / "mdel.safetensors")


LORA = {f"{UNDERSCORED}_to_k.{name}": (4, 4) for name in ("lora_down.weight", "lora_up.weight", "alpha")}


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize(
    "shapes",
    [GUIDED, LORA, {"clip_l": (768,), "clip_g": (1280,)}, {"emb_params": (2, 768)}, {"string_to_param.*": (2, 768)}]
    + [{name: shape for name, (shape, _) in manifest(f"tiny-{net}")["tensors"].items()} for net in ("unet-sd1", "vae")],
    ids=["guided", "lora", "sdxl embedding", "kohya embedding", "A1111 embedding", "unet", "vae"],
)
def test_impossible_shapes_never_end_in_a_crash(tmp_path, shapes, shape):
    wrong = [name for i, name in enumerate(shapes) if i % (len(shapes) // 6 or 1) == 0]
    for name in wrong:
        tensors = {n: torch.zeros(shape if n == name else s) for n, s in shapes.items()}
        save_safetensors(tmp_path / "x", tensors)
        assert page(tmp_path / "x", verify=True).startswith("FILE: ")


# ------------------------------------------------------------------------------------------------------- verify, probe


def test_verify_names_the_tensors_with_nan_and_inf(tmp_path):
    checkpoint = tiny_checkpoint()
    with torch.no_grad():
        checkpoint.networks["unet"].conv_out.bias[:2] = float("nan")
        checkpoint.networks["vae"].decoder.conv_out.weight[0, 0, 0, 0] = float("inf")
    save_checkpoint(checkpoint, tmp_path / "x")
    text = page(tmp_path / "x", verify=True)
    assert "1 tensors hold NaN: model.diffusion_model.out.2.bias (2)" in text
    assert "1 tensors hold Inf: first_stage_model.decoder.conv_out.weight (1)" in text
    assert inspect_checkpoint(tmp_path / "x").ok
    assert not inspect_checkpoint(tmp_path / "x", verify=True).ok


def test_verify_says_that_a_healthy_file_is_healthy_and_looks_at_eight_bit_floats_too(tmp_path):
    text = page(tiny_file(tmp_path / "x"), verify=True)
    assert f"all {len(open_tensors(tmp_path / 'x'))} tensors were read: no NaN, no Inf" in text
    eight = torch.full((3,), float("nan")).to(torch.float8_e4m3fn)
    save_safetensors(tmp_path / "y", {"a.weight": eight})
    assert "1 tensors hold NaN: a.weight (3)" in page(tmp_path / "y", verify=True)


def test_verify_finds_a_flipped_bit_in_what_minisd_saved(tmp_path):
    path = tiny_file(tmp_path / "x")
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    assert "its tensors do not match their checksum" in page(path, verify=True)
    assert not inspect_checkpoint(path, verify=True).ok


def test_verify_points_at_weights_of_nothing_but_zeros_and_at_missing_checksums(tmp_path):
    weights = lora(f"unet.{ATTN2}.to_k.lora_A.weight", f"unet.{ATTN2}.to_k.lora_B.weight")
    weights[f"unet.{ATTN2}.to_k.lora_B.weight"].zero_()
    torch.save(weights, tmp_path / "x", _use_new_zipfile_serialization=False)
    text = page(tmp_path / "x", verify=True)
    assert f"1 weights hold nothing but 0, an untrained layer? unet.{ATTN2}.to_k.lora_B.weight" in text
    assert "checksums none in it" in text
    assert inspect_checkpoint(tmp_path / "x", verify=True).ok


@pytest.mark.parametrize(("shift", "said"), [(0.0, "eps"), (-5.0, "v")])
def test_the_probe_is_one_forward_of_constant_inputs(tmp_path, shift, said):
    checkpoint = tiny_checkpoint()
    unet = checkpoint.networks["unet"]
    nn.init.constant_(unet.conv_out.bias, shift)
    x, context = torch.full((1, 4, 8, 8), 0.5), torch.full((1, 2, 32), 0.5)
    with torch.no_grad():
        mean = (unet(x, 999, Conditioning(context)) - x).mean().item()
    save_checkpoint(checkpoint, tmp_path / "x")
    text = page(tmp_path / "x", probe=True)
    assert f"probe {said}: forward probe, mean(out - x) = {mean:.3f} (v where below -1" in text
    assert ("CONTRADICTS eps" in text) == (said == "v")
    assert ('give prediction="v"' in text) == (said == "v")


@pytest.mark.parametrize(
    ("more", "given"),
    [
        ({"in_channels": 9}, {"concat": torch.zeros(1, 5, 8, 8)}),
        ({"num_classes": 10}, {"y": torch.zeros(1, dtype=torch.long)}),
        ({"vector_dim": 6}, {"y": torch.zeros(1, 6)}),
    ],
    ids=["inpainting", "upscaler", "unCLIP"],
)
def test_the_probe_gives_zeros_to_the_further_inputs_of_a_unet(tmp_path, more, given):
    checkpoint = tiny_checkpoint(replace(TINY, unet=replace(TINY.unet, **more)))
    unet, x = checkpoint.networks["unet"], torch.full((1, 4, 8, 8), 0.5)
    with torch.no_grad():
        mean = (unet(x, 999, Conditioning(torch.full((1, 2, 32), 0.5), **given)) - x).mean().item()
    save_checkpoint(checkpoint, tmp_path / "x")
    assert f"forward probe, mean(out - x) = {mean:.3f}" in page(tmp_path / "x", probe=True)


def test_without_a_unet_there_is_nothing_to_probe(tmp_path):
    assert "there is no U-Net to probe" in page(official(tmp_path / "x", "sd15-vae.diffusers-new"), probe=True)
