"""Saving: both layouts, bit for bit and back again; all or nothing; and never a silently different model."""

import json
import random
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TINY, checkpoint, contiguous, ldm_file, same_networks, same_tensors

from minisd.checkpoints.detect import SCHEDULE_BUFFERS
from minisd.checkpoints.files import CheckpointError, open_tensors, save_safetensors
from minisd.checkpoints.load import Checkpoint, load_checkpoint
from minisd.checkpoints.save import save_checkpoint

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def leftovers(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """What an original training file of the kind holds besides its networks."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    unet = [name for name in ldm_file(kind)[0] if name.startswith("model.diffusion_model.")]
    found = {name: draw(1000) for name in SCHEDULE_BUFFERS}
    found |= {"model_ema." + n.removeprefix("model.").replace(".", ""): draw(3) for n in unet}
    found |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9, dtype=torch.int32)}
    if kind.startswith("SD1"):
        return found | {POSITIONS: torch.arange(77)[None]}
    found["cond_stage_model.model.logit_scale"] = draw()
    if kind == "SD2_DEPTH":
        found["depth_model.model.pretrained.model.cls_token"] = draw(1, 1, 8)
    if kind == "SD_X4_UPSCALER":
        found["low_scale_model.betas"] = draw(1000)
    if kind.startswith("SD2_UNCLIP"):
        found |= {"embedder.model.logit_scale": draw(), "noise_augmentor.betas": draw(1000)}
    return found


@st.composite
def originals(draw):
    """(kind, the tensors of an original file, its global_step): dtypes by network, any of the leftovers."""
    kind = draw(st.sampled_from(sorted(TINY)))
    dtypes = {
        p: draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])) for p in ("model.", "first", "cond")
    }
    tensors = ldm_file(kind)[0]
    tensors = {n: t.to(next((d for p, d in dtypes.items() if n.startswith(p)), t.dtype)) for n, t in tensors.items()}
    kept = {n: t for n, t in leftovers(kind).items() if n.startswith("model_ema") or draw(st.booleans())}
    if draw(st.booleans()):
        kept = {n: t for n, t in kept.items() if not n.startswith("model_ema")}
    return kind, contiguous(tensors | kept), draw(st.none() | st.integers(0, 10**9))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(original=originals())
def test_original_to_minisd_to_diffusers_to_minisd_to_original_is_bit_exact(tmp_path_factory, original):
    kind, tensors, global_step = original
    place = tmp_path_factory.mktemp("trip")
    torch.save({"state_dict": tensors, "global_step": global_step}, place / "original.ckpt")
    first = load_checkpoint(place / "original.ckpt", config=TINY[kind])
    save_checkpoint(first, place / "folder", layout="diffusers")
    second = load_checkpoint(place / "folder")
    save_checkpoint(second, place / "again.safetensors")
    assert same_tensors(load_file(place / "again.safetensors"), tensors)
    assert (second.global_step, second.config) == (global_step, TINY[kind])
    save_checkpoint(load_checkpoint(place / "again.safetensors"), place / "once more", layout="diffusers")
    for file in (place / "folder").rglob("*.*"):
        twin = place / "once more" / file.relative_to(place / "folder")
        assert file.is_dir() or file.read_bytes() == twin.read_bytes()
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["SD1", "SD2_V", "SD2_UNCLIP_L"])
def test_without_the_extra_file_the_way_back_has_everything_that_diffusers_holds(tmp_path, kind):
    made = checkpoint(kind, extras=leftovers(kind))
    written = save_checkpoint(made, tmp_path / "folder", layout="diffusers")
    assert any("minisd_extra.safetensors keeps" in line for line in written)
    (tmp_path / "folder" / "minisd_extra.safetensors").unlink()
    save_checkpoint(load_checkpoint(tmp_path / "folder"), tmp_path / "b.safetensors")
    original, back = ldm_file(kind)[0], load_file(tmp_path / "b.safetensors")
    lost = {name for name in original if name not in back}
    last = {f"cond_stage_model.model.transformer.resblocks.{TINY[kind].text.layers - 1}."}
    assert all(name.startswith((*last, "cond_stage_model.model.text_projection")) for name in lost)
    assert bool(lost) == (kind != "SD1")
    assert same_tensors({n: original[n] for n in original if n in back}, {n: back[n] for n in original if n in back})


def test_equal_models_give_equal_bytes_and_metadata_that_explain_them(tmp_path):
    for name in ("a", "b"):
        save_checkpoint(checkpoint("SD2_V", global_step=5), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert open_tensors(tmp_path / "a.safetensors").verify()
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = file.metadata()
    assert json.loads(said["minisd_config"])["prediction"] == "v"
    assert (said["minisd_prediction_evidence"], said["minisd_global_step"]) == ("the test", "5")


def test_added_tokens_travel_in_both_layouts(tmp_path):
    text = replace(TINY["SD1"].text, vocab_size=49411, bos_id=49406, eos_id=49407, pad_id=49407)
    made = checkpoint(replace(TINY["SD1"], text=text))
    made.added_tokens = {"<cat>": [49408, 49409], "<dog>": [49410]}
    save_checkpoint(made, tmp_path / "a.safetensors")
    save_checkpoint(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "folder", layout="diffusers")
    assert load_checkpoint(tmp_path / "folder").added_tokens == made.added_tokens


DAMAGED_TOKENS = [
    "[1]",
    '{"<cat>": 49408}',
    '{"<cat>": [1]}',
    '{"<cat>": ["x"]}',
    '{"a": [49408]}',
    "{",
    '{"<cat>": []}',
]
DAMAGED_TOKENS += ['{"<cat>": [49408]}']  # for which the token embedding has no row


@pytest.mark.parametrize("text", DAMAGED_TOKENS)
def test_added_tokens_that_cannot_be_are_refused(tmp_path, text):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors, said | {"minisd_added_tokens": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the added token"):
        load_checkpoint(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------------------ all or nothing


@contextmanager
def full_disk(nbytes: int):
    """No file may grow beyond nbytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 1000, 50_000, 1_000_000])
@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_full_disk_leaves_nothing_and_loses_nothing(tmp_path, layout, nbytes):
    path = tmp_path / "model"
    if layout == "ldm":
        save_checkpoint(checkpoint("SD1"), path)
    else:
        path.mkdir()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with full_disk(nbytes), pytest.raises(OSError, match="nothing was changed"):
        save_checkpoint(checkpoint("SD2_V"), path, layout=layout)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_saved_over_the_one_it_was_loaded_from(tmp_path):
    save_checkpoint(checkpoint("SD1"), tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    save_checkpoint(load_checkpoint(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_folder_with_something_in_it_is_never_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="exists already and is not an empty folder"):
            save_checkpoint(checkpoint("SD1"), path, layout="diffusers")
    with pytest.raises(ValueError, match="is a folder; layout"):
        save_checkpoint(checkpoint("SD1"), tmp_path)
    with pytest.raises(OSError, match="nothing was changed"):
        save_checkpoint(checkpoint("SD1"), tmp_path / "no such place" / "model", layout="diffusers")
    with pytest.raises(ValueError, match="allowed: ldm, diffusers"):
        save_checkpoint(checkpoint("SD1"), tmp_path / "a", layout="onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------------------------------------------- damage and edits


def damage(data: bytes, rng: random.Random) -> bytes:
    """One random accident: a flipped bit, a changed, lost, doubled or shuffled piece, a cut."""
    data, at = bytearray(data), rng.randrange(max(len(data), 1))
    size = rng.choice([1, 1, 2, 8, 64])
    how = rng.randrange(6)
    if how == 0 and data:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        data[at : at + size] = rng.randbytes(size)
    elif how == 2:
        del data[at : at + size]
    elif how == 3:
        data[at:at] = data[at : at + size]
    elif how == 4:
        del data[at:]
    else:  # a digit, which often leaves the JSON valid
        digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
        if digits:
            data[rng.choice(digits)] = 48 + rng.randrange(10)
    return bytes(data)


SMALLEST = replace(
    TINY["SD2_V"],
    unet=replace(TINY["SD2_V"].unet, channel_mult=(1,), attention_levels=(0,)),
    vae=replace(TINY["SD2_V"].vae, channel_mult=(1,)),
    text=replace(TINY["SD2_V"].text, layers=2),
)


def test_a_damaged_folder_of_ours_is_an_error_that_names_it_or_the_same_model(tmp_path):
    made = checkpoint(SMALLEST)
    save_checkpoint(made, tmp_path / "folder", layout="diffusers")
    files = sorted(p for p in (tmp_path / "folder").rglob("*.json") if p.name not in ("vocab.json",))
    rng, refused = random.Random(0), 0
    for _ in range(200):
        path = rng.choice(files)
        intact = path.read_bytes()
        path.write_bytes(damage(intact, rng))
        refused += assert_error_or_same(tmp_path / "folder", made)
        path.write_bytes(intact)
    assert 50 < refused < 200


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "text_encoder/model", "minisd_extra"])
def test_a_folder_of_ours_with_a_damaged_weights_header_is_refused_or_the_same(tmp_path, name):
    made = checkpoint(SMALLEST)
    save_checkpoint(made, tmp_path / "folder", layout="diffusers")
    path, rng = tmp_path / "folder" / f"{name}.safetensors", random.Random(1)
    intact = path.read_bytes()
    header = 8 + int.from_bytes(intact[:8], "little")
    for _ in range(40):
        path.write_bytes(damage(intact[:header], rng) + intact[header:])
        assert_error_or_same(tmp_path / "folder", made)


def test_a_single_file_of_ours_with_a_damaged_header_is_refused_or_the_same(tmp_path):
    made, path, rng = checkpoint(SMALLEST), tmp_path / "a.safetensors", random.Random(3)
    save_checkpoint(made, path)
    intact = path.read_bytes()
    header = 8 + int.from_bytes(intact[:8], "little")
    for _ in range(100):
        path.write_bytes(damage(intact[:header], rng) + intact[header:])
        assert_error_or_same(path, made)


def attempt(path) -> str | Checkpoint:
    """The loaded checkpoint, or the text of the only kind of error there may be, which names the path."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        text = str(error)
    assert str(path) in text
    return text


def assert_error_or_same(path, made) -> bool:
    """Whether loading was refused; if it was not, the model is the one that was saved."""
    loaded = attempt(path)
    if isinstance(loaded, str):
        return True
    assert loaded.config == made.config
    assert same_networks(loaded.networks, made.networks)
    return False


def test_a_damaged_foreign_folder_never_fails_in_another_way(tmp_path):
    """Without our metadata a changed number in a config.json may be a valid one."""
    save_checkpoint(checkpoint(SMALLEST), tmp_path / "folder", layout="diffusers")
    (tmp_path / "folder" / "minisd_extra.safetensors").unlink()
    files = sorted(p for p in (tmp_path / "folder").rglob("*.json") if p.name not in ("vocab.json",))
    rng = random.Random(2)
    for _ in range(200):
        path = rng.choice(files)
        intact = path.read_bytes()
        path.write_bytes(damage(intact, rng))
        attempt(tmp_path / "folder")
        path.write_bytes(intact)


EDITS = [
    ("unet/config.json", {"norm_eps": 1e-6}, "disagree"),
    ("unet/config.json", {"attention_head_dim": [4, 8]}, "disagree"),
    ("vae/config.json", {"scaling_factor": 0.5}, "disagree"),
    ("text_encoder/config.json", {"hidden_act": "quick_gelu"}, "disagree"),
    ("text_encoder/config.json", {"num_attention_heads": 4}, "disagree"),
    ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "make them agree"),
]


@pytest.mark.parametrize(("name", "edit", "why"), EDITS)
def test_a_folder_edited_by_hand_is_not_silently_another_model(tmp_path, name, edit, why):
    save_checkpoint(checkpoint("SD2_V"), tmp_path / "folder", layout="diffusers")
    path = tmp_path / "folder" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(CheckpointError, match=why):
        load_checkpoint(tmp_path / "folder")


UNET = "model.diffusion_model."
SPOILT = {
    "a wrong shape": (
        {UNET + "out.2.weight": torch.zeros(4, 32, 1, 1)},
        r"out\.2\.weight of its unet has shape \(4, 32, 1, 1\)",
    ),
    "a missing tensor": ({UNET + "out.2.bias": None}, r"1 tensors of its unet are missing, first: out\.2\.bias"),
    "a foreign tensor": ({UNET + "out.7.weight": torch.zeros(2)}, r"belong to no layer of .*, first: out\.7\.weight"),
    "a foreign block": ({UNET + "motion.weight": torch.zeros(2)}, r"not Stable Diffusion's, first: .*motion"),
    "integer weights": ({UNET + "out.2.weight": torch.zeros(4, 32, 3, 3, dtype=torch.int8)}, "quantised files are not"),
    "a scalar": ({UNET + "input_blocks.0.0.weight": torch.zeros(())}, "incomplete"),
    "an empty tensor": (
        {UNET + "input_blocks.0.0.weight": torch.zeros(0, 4, 3, 3)},
        "its config and the shapes|incomplete",
    ),
    "half a network": ({UNET + "input_blocks.1.0.in_layers.2.weight": None}, "incomplete, it lacks a tensor"),
    "a packed projection cut": (
        {"cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight": torch.zeros(100, 64)},
        "impossible shape",
    ),
    "a flat projection": ({"cond_stage_model.model.text_projection": torch.zeros(64)}, "incomplete|impossible shape"),
    "a huge block number": ({UNET + f"input_blocks.{10**30}.0.bias": torch.zeros(1)}, "a.safetensors"),
    "latents of another kind": (
        {"first_stage_model.decoder.conv_in.weight": torch.zeros(64, 16, 3, 3)},
        "16 latent channels",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_tensors_that_make_no_model_are_refused_by_name(tmp_path, what):
    changes, why = SPOILT[what]
    tensors, said = ldm_file("SD2_V")
    spoilt = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_safetensors(tmp_path / "a.safetensors", spoilt, said)
    with pytest.raises(CheckpointError, match=why) as error:
        load_checkpoint(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value)


BAD_CONFIGS = [
    "{",
    "[]",
    "null",
    '{"unet": 3}',
    '{"unet": {"num_heads": 0}}',
    '{"unet": {"channels": -32}}',
    '{"x": 1}',
]
BAD_CONFIGS += [
    '{"unet": {"num_heads": null, "head_width": 0}}',
    '{"prediction": "noise"}',
    '{"unet": {"norm_groups": 0}}',
]
BAD_CONFIGS += ["[" * 100_000]


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda text: text[:40])
def test_metadata_without_a_usable_config_are_refused(tmp_path, text):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors, said | {"minisd_config": text})
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["²", "-1", "1e9", "9" * 5000, "", "x"])
def test_a_step_that_is_no_number_is_no_evidence(tmp_path, text):
    tensors, said = ldm_file()
    save_safetensors(tmp_path / "a.safetensors", tensors, said | {"minisd_global_step": text})
    assert load_checkpoint(tmp_path / "a.safetensors").global_step is None
