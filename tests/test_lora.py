"""LoRA: files of every layout read and written, changes merged into weights and taken out again."""

import contextlib
import gzip
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively
from tiny import TINY, checkpoint, random_network, sparse_file

import minisd
from minisd.adapters.lora import LowRank, MergedLoras, layer_of, load_lora, save_lora
from minisd.checkpoints.building import on_meta
from minisd.checkpoints.files import CheckpointError, save_safetensors
from minisd.checkpoints.keymaps import keymap
from minisd.checkpoints.lora_files import names_to_official
from minisd.checkpoints.save import save_checkpoint
from minisd.config import PRESETS

NETWORKS = {"unet": random_network("unet", TINY["SD1"].unet), "text": random_network("text", TINY["SD1"].text)}
NAMES = names_to_official(NETWORKS)  # ours → (network, path) of theirs
LAYERS = list(NAMES)
ATTN, CONV = "unet.down.0.attn.blocks.0.attn2.to_k", "unet.mid.0.res.conv1"
ATTN_PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = "lora_unet_" + ATTN_PATH.replace(".", "_")


def random_lora(layers=LAYERS, *, rank=3, alpha=2.0, seed=0, dtype=torch.float32, networks=NETWORKS):
    """A change for each layer, of about half its weight."""
    generator, lora = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        shape = layer_of(networks, layer).weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        up = 0.5 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        lora[layer] = LowRank(down.to(dtype), up.to(dtype), alpha)
    return lora


def weights(sd):
    named = [*sd.unet.named_parameters(prefix="unet"), *sd.text_encoder.named_parameters(prefix="text")]
    return {name: parameter.detach().clone() for name, parameter in named}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_changes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[layer].delta(), b[layer].delta()) for layer in a)


# ---------------------------------------------------------------------------------------------------------- the formula


def test_a_change_is_alpha_over_rank_times_up_times_down():
    low_rank = LowRank(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 10.0], [1.0, 1.0]]), 4.0)
    assert torch.equal(low_rank.delta(), 2 * torch.tensor([[1.0, 2.0], [30.0, 40.0], [4.0, 6.0]]))


def test_the_change_of_a_convolution_is_that_of_its_two_convolutions_in_a_row():
    down, up, x = torch.randn(2, 3, 3, 3).double(), torch.randn(5, 2, 1, 1).double(), torch.randn(1, 3, 6, 7).double()
    both = torch.conv2d(torch.conv2d(x, down, padding=1), up)
    torch.testing.assert_close(torch.conv2d(x, LowRank(down, up, 2.0).delta(), padding=1), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_added_up_in_float32_and_rounded_once(dtype):
    sd = lively()
    sd.unet.to(dtype)
    original = layer_of(sd.loras.networks, ATTN).weight.detach().clone()
    for seed in range(3):
        lora = random_lora([ATTN], seed=seed, dtype=dtype, networks=sd.loras.networks)
        sd.loras.merge(str(seed), lora, 0.3)
    deltas = [low_rank[ATTN].delta() for low_rank, _ in sd.loras.loras.values()]
    assert all(delta.dtype == torch.float32 for delta in deltas)
    exact = original.float() + 0.3 * deltas[0] + 0.3 * deltas[1] + 0.3 * deltas[2]
    assert torch.equal(layer_of(sd.loras.networks, ATTN).weight, exact.to(dtype))
    one_by_one = original
    for delta in deltas:
        one_by_one = (one_by_one.float() + 0.3 * delta).to(dtype)
    assert not torch.equal(exact.to(dtype), one_by_one)  # rounding thrice would show


# -------------------------------------------------------------------------------------------------------------- merging


def test_unmerging_restores_every_bit_and_is_nothing_without_a_lora():
    sd = lively()
    before = weights(sd)
    sd.unmerge()
    sd.loras.merge("a", random_lora(names_to_official(sd.loras.networks), networks=sd.loras.networks), 0.7)
    after = weights(sd)
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(names_to_official(sd.loras.networks))
    sd.unmerge()
    sd.unmerge()
    assert equal(weights(sd), before)
    assert not sd.loras.originals


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0])), max_size=6))
def test_any_series_of_merges_is_the_sum_of_the_last_of_each_name_and_leaves_no_trace(series):
    networks = {"unet": on_meta("unet", TINY["SD1"].unet), "text": NETWORKS["text"]}
    networks["unet"].load_state_dict(NETWORKS["unet"].state_dict(), assign=True)
    original = {layer: layer_of(networks, layer).weight.detach().clone() for layer in (ATTN, CONV)}
    loras = {name: random_lora(layers, seed=ord(name)) for name, layers in (("a", [ATTN]), ("b", [CONV, ATTN]))}
    loras["c"] = random_lora([CONV], seed=9)
    merged = MergedLoras(networks)
    for name, weight in series:
        merged.merge(name, loras[name], weight)
    for layer in original:
        parts = [weight * loras[name][layer].delta() for name, weight in dict(series).items() if layer in loras[name]]
        total = sum(parts, original[layer])
        torch.testing.assert_close(layer_of(networks, layer).weight, total, atol=1e-6, rtol=0)  # order of summing
    merged.unmerge()
    assert all(torch.equal(layer_of(networks, layer).weight, tensor) for layer, tensor in original.items())


def test_several_files_stack_and_the_same_file_again_sets_its_weight(tmp_path):
    sd = lively()
    before = weights(sd)
    for seed in (0, 1):
        lora = random_lora([ATTN], seed=seed, networks=sd.loras.networks)
        save_lora(tmp_path / f"{seed}.safetensors", lora, sd.loras.networks)
    first, second = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    deltas = [sd.load_lora(first, 0.5)[ATTN].delta(), sd.load_lora(second)[ATTN].delta()]
    both = before[f"{ATTN}.weight"] + 0.5 * deltas[0] + deltas[1]
    assert torch.equal(layer_of(sd.loras.networks, ATTN).weight, both)
    sd.load_lora(tmp_path / "." / "0.safetensors", 0.5)
    assert torch.equal(layer_of(sd.loras.networks, ATTN).weight, both)
    sd.load_lora(first, 0.0)
    assert torch.equal(layer_of(sd.loras.networks, ATTN).weight, before[f"{ATTN}.weight"] + deltas[1])
    sd.unmerge()
    assert equal(weights(sd), before)


def test_a_lora_that_cannot_be_merged_changes_nothing():
    sd = lively()
    before = weights(sd)
    good, bad = random_lora([ATTN], networks=sd.loras.networks), {CONV: LowRank(torch.ones(1, 2), torch.ones(3, 1), 1)}
    with pytest.raises(RuntimeError):
        sd.loras.merge("a", good | bad)
    with pytest.raises(ValueError, match="the weight of a LoRA is inf: give a finite number"):
        sd.loras.merge("a", good, math.inf)
    assert equal(weights(sd), before)
    assert not sd.loras.loras


def test_merging_never_writes_into_the_tensors_it_finds_nor_into_a_mapped_file(tmp_path):
    save_checkpoint(checkpoint(), tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    sd = minisd.load(tmp_path / "model.safetensors")
    parameter = layer_of(sd.loras.networks, ATTN).weight
    mapped, copy = parameter.data, parameter.data.clone()
    sd.loras.merge("a", random_lora([ATTN]))
    assert layer_of(sd.loras.networks, ATTN).weight is parameter  # an optimiser or EMA that holds it still does
    assert torch.equal(mapped, copy)
    assert not torch.equal(parameter, copy)
    sd.unmerge()
    assert parameter.data_ptr() == mapped.data_ptr()
    assert (tmp_path / "model.safetensors").read_bytes() == content


def test_unmerging_follows_a_model_that_changed_its_dtype_meanwhile():
    sd = lively()
    before = layer_of(sd.loras.networks, ATTN).weight.detach().clone()
    sd.loras.merge("a", random_lora([ATTN], networks=sd.loras.networks))
    sd.unet.to(torch.bfloat16)
    sd.unmerge()
    assert torch.equal(layer_of(sd.loras.networks, ATTN).weight, before.to(torch.bfloat16))


def test_pictures_see_merged_weights_cached_keys_and_values_too():
    sd = lively()
    options = {"steps": 3, "seed": 1}
    plain = sd.txt2img("a cat", **options)[0].tobytes()
    sd.loras.merge("a", random_lora([ATTN], networks=sd.loras.networks))  # only what is computed once per call
    changed = sd.txt2img("a cat", **options)[0].tobytes()
    assert changed != plain
    sd.unmerge()
    assert sd.txt2img("a cat", **options)[0].tobytes() == plain


def test_saving_a_merged_model_writes_the_merged_weights(tmp_path):
    sd = lively()
    sd.loras.merge("a", random_lora([ATTN, "text.blocks.0.fc1"], networks=sd.loras.networks))
    sd.save(tmp_path / "merged.safetensors")
    assert equal(weights(minisd.load(tmp_path / "merged.safetensors")), weights(sd))


# ----------------------------------------------------------------------------------------------------- layouts, written


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@settings(max_examples=10, deadline=None)
@given(
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=8, unique=True),
    rank=st.integers(1, 5),
    power=st.integers(-3, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_what_is_written_comes_back_bit_for_bit(tmp_path_factory, layout, layers, rank, power, dtype):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    lora = random_lora(layers, rank=rank, alpha=rank * 2.0**power, dtype=dtype)
    save_lora(path, lora, NETWORKS, layout=layout)
    again = load_lora(path, NETWORKS)
    assert same_changes(again, lora)
    assert all(again[layer].down.dtype == dtype for layer in lora)
    if layout == "kohya":
        assert all(again[layer].alpha == low_rank.alpha for layer, low_rank in lora.items())
        assert all(torch.equal(again[layer].up, low_rank.up) for layer, low_rank in lora.items())


def test_the_same_lora_is_the_same_bytes_and_says_what_it_is_told(tmp_path):
    for name in ("a", "b"):
        save_lora(
            tmp_path / f"{name}.safetensors", random_lora([ATTN]), NETWORKS, metadata={"ss_sd_model_name": "mini"}
        )
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert b'"ss_sd_model_name":"mini"' in (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "layout", "layer", "sentence"),
    [
        ("a.pt", "kohya", ATTN, "a LoRA is saved as safetensors: name it .*a.safetensors"),
        ("a.safetensors", "ldm", ATTN, "layout='ldm'; allowed: kohya, peft"),
        (
            "a.safetensors",
            "kohya",
            "unet.nowhere",
            "'unet.nowhere' is no layer that a LoRA can change; they are unet.time",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_file_is_touched(tmp_path, name, layout, layer, sentence):
    with pytest.raises(ValueError, match=sentence):
        save_lora(tmp_path / name, {layer: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, NETWORKS, layout=layout)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- layouts, read


@pytest.mark.parametrize(("name", "preset", "layers"), [("sd15", "SD1", 264), ("sd21", "SD2_V", 330)])
def test_every_tensor_of_a_real_kohya_file_finds_its_layer(tmp_path, name, preset, layers):
    """The names and shapes of published LoRAs, against networks of the official sizes."""
    manifest = Path(__file__).parent / "data" / "manifests" / f"lora-kohya-{name}.json.gz"
    tensors = json.loads(gzip.decompress(manifest.read_bytes()))["tensors"]
    path = sparse_file(tmp_path / "x.safetensors", {n: (shape, dtype) for n, (shape, dtype) in tensors.items()})
    config = PRESETS[preset]
    networks = {"unet": on_meta("unet", config.unet), "text": on_meta("text", config.text)}
    assert len(load_lora(path, networks)) == layers  # a tensor without a layer would warn, which fails a test


def file_of(lora, name_of, *, alpha=None, marks=(".lora_down.weight", ".lora_up.weight")):
    tensors = {}
    for layer, low_rank in lora.items():
        tensors |= {name_of(layer) + mark: t for mark, t in zip(marks, (low_rank.down, low_rank.up), strict=True)}
        tensors |= {name_of(layer) + alpha: torch.tensor(low_rank.alpha)} if alpha else {}
    return tensors


ORIGINAL = {name: keymap(NETWORKS[name], dialect) for name, dialect in (("unet", "ldm"), ("text", "openclip"))}


def original_name(layer):
    """A layer as kohya names those of a network in the original's layout."""
    network, _, path = layer.partition(".")
    key = ORIGINAL[network][f"{path}.weight"].key
    return {"unet": "lora_unet_", "text": "lora_te_"}[network] + key.removesuffix(".weight").replace(".", "_")


def name_by_diffusers(layer):
    """A layer as diffusers' own conversion to kohya's layout names it."""
    network, path = NAMES[layer]
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_"}[network]
    return prefix + path.removeprefix("text_model.").replace(".", "_")


def old_attention_name(layer):
    network, path = NAMES[layer]
    path = path.replace("to_out.0", "to_out").replace("self_attn.out_proj", "self_attn.to_out")
    for letter in "qkv":
        path = path.replace(f"self_attn.{letter}_proj", f"self_attn.to_{letter}")
    block, _, leaf = path.rpartition(".")
    return f"{network}.{block}{'.processor' if network == 'unet' else ''}.{leaf}_lora"


UNET = [layer for layer in LAYERS if layer.startswith("unet.")]
PACKED = (".to_q", ".to_k", ".to_v")  # of OpenCLIP's text encoder, which has one matrix for the three
OTHER_LAYOUTS = {
    "kohya, the original's names": (
        [*UNET, *[x for x in LAYERS if x.startswith("text.blocks") and not x.endswith(PACKED)]],
        original_name,
        {"alpha": ".alpha"},
    ),
    "kohya, as diffusers converts": (
        LAYERS,
        name_by_diffusers,
        {"alpha": ".alpha"},
    ),
    "old attention processors": (
        [x for x in LAYERS if ".attn1." in x or ".attn2." in x or ".attn.to_" in x],
        old_attention_name,
        {"marks": (".down.weight", ".up.weight")},
    ),
    "old linear layers": (
        [x for x in LAYERS if x.startswith("text.blocks")],
        lambda x: ".".join(NAMES[x]),
        {"marks": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")},
    ),
    "peft, one network": (
        UNET,
        lambda x: f"base_model.model.{NAMES[x][1]}",
        {"marks": (".lora_A.weight", ".lora_B.weight")},
    ),
    "peft, named adapter": (
        UNET,
        lambda x: f"unet.{NAMES[x][1]}",
        {"marks": (".lora_A.default.weight", ".lora_B.default.weight")},
    ),
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
@pytest.mark.parametrize("pickled", [False, True])
def test_every_layout_gives_the_same_lora(tmp_path, layout, pickled):
    layers, name_of, options = OTHER_LAYOUTS[layout]
    lora = random_lora(layers, rank=4, alpha=2.0 if "alpha" in options else 4.0)
    tensors = file_of(lora, name_of, **options)
    if pickled:
        torch.save(tensors, tmp_path / "x")
    else:
        save_safetensors(tmp_path / "x", tensors)
    assert len(layers) > 10
    assert same_changes(load_lora(tmp_path / "x", NETWORKS), lora)


def test_alpha_comes_from_pefts_settings_per_layer_and_rank_stabilised(tmp_path):
    lora = random_lora([ATTN, CONV, "text.blocks.0.fc1"], rank=4, alpha=4.0)
    tensors = file_of(lora, lambda x: ".".join(NAMES[x]), marks=(".lora_A.weight", ".lora_B.weight"))
    said = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"conv1": 2}}
    said |= {"text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True}
    save_safetensors(tmp_path / "x", tensors, {"lora_adapter_metadata": json.dumps(said)})
    found = load_lora(tmp_path / "x", NETWORKS)
    assert [found[layer].scale for layer in lora] == [2.0, 0.5, 3.0]  # 8/4, 2/4, 6/√4


def test_a_middle_kernel_of_locon_is_folded_into_the_first(tmp_path):
    """down 1×1, mid 3×3, up 1×1, as convolutions in a row."""
    r, (out, inner, *_) = 2, layer_of(NETWORKS, CONV).weight.shape
    down, mid, up = torch.randn(r, inner, 1, 1), torch.randn(r, r, 3, 3), torch.randn(out, r, 1, 1)
    name = "lora_unet_mid_block_resnets_0_conv1"
    tensors = {f"{name}.lora_{part}.weight": t for part, t in (("down", down), ("mid", mid), ("up", up))}
    save_safetensors(tmp_path / "x", tensors | {f"{name}.alpha": torch.tensor(2.0)})
    x = torch.randn(1, inner, 5, 6)
    in_a_row = torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid, padding=1), up)
    delta = load_lora(tmp_path / "x", NETWORKS)[CONV].delta()
    torch.testing.assert_close(torch.conv2d(x, delta, padding=1), in_a_row, atol=1e-3, rtol=1e-4)  # float32 sums of ~50


def test_a_linear_layer_and_a_1x1_convolution_are_the_same_matrix(tmp_path):
    layer = "unet.mid.0.attn.proj_in"
    lora = random_lora([layer])
    flat = {layer: LowRank(lora[layer].down.flatten(1), lora[layer].up.flatten(1), lora[layer].alpha)}
    save_lora(tmp_path / "a.safetensors", flat, NETWORKS)
    sd = lively()
    before = sd.unet.mid[0].attn.proj_in.weight.detach().clone()
    sd.load_lora(tmp_path / "a.safetensors")
    assert torch.equal(sd.unet.mid[0].attn.proj_in.weight, before + lora[layer].delta())


# ------------------------------------------------------------------------------------------------------------- refusals


def plain(**more):
    pair = {f"{KOHYA}.lora_down.weight": torch.ones(4, 64), f"{KOHYA}.lora_up.weight": torch.ones(32, 4)}
    return pair | {name.replace("KEY", KOHYA): tensor for name, tensor in more.items()}


NAN = torch.full((32, 4), math.nan)
BAD = {
    "no LoRA": ({"a.weight": torch.ones(3, 3)}, "it holds no LoRA .*: `minisd inspect .*` says what it is"),
    "half a layer": ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64)}, f"{KOHYA} lacks its second matrix"),
    "no common rank": (
        plain(**{"KEY.lora_up.weight": torch.ones(32, 5)}),
        r"\(4, 64\) and \(32, 5\) have no common rank",
    ),
    "rank 0": (
        plain(**{"KEY.lora_down.weight": torch.ones(0, 64), "KEY.lora_up.weight": torch.ones(32, 0)}),
        "no common rank",
    ),
    "NaN": (plain(**{"KEY.lora_up.weight": NAN}), "lora_up.weight holds values that are not finite"),
    "NaN in alpha": (plain(**{"KEY.alpha": torch.tensor(math.nan)}), "alpha holds values that are not finite"),
    "many alphas": (plain(**{"KEY.alpha": torch.ones(3)}), "alpha holds 3 numbers, not one"),
    "integers": (
        plain(**{"KEY.lora_up.weight": torch.ones(32, 4).byte()}),
        "torch.uint8: quantised LoRAs are not read",
    ),
    "SD2": (
        plain(**{"KEY.lora_down.weight": torch.ones(4, 1024)}),
        r"a text width of 1024 \(Stable Diffusion 2.x\), this model has 64 \(a family of its own\)",
    ),
    "another U-Net": (
        plain(**{"KEY.lora_up.weight": torch.ones(48, 4)}),
        r"as a weight of \(48, 64\), this model's is \(32,",
    ),
    "SDXL": (plain(**{"lora_te2_x.lora_down.weight": torch.ones(1, 1)}), "it is for SDXL: minisd runs"),
    "Flux": ({"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(1, 1)}, "it is for Flux or SD3"),
    "nothing known": (
        {"lora_unet_x.lora_down.weight": torch.ones(1, 1), "lora_unet_x.lora_up.weight": torch.ones(1, 1)},
        "none of its 2 tensors belongs to a layer of this model, first: lora_unet_x",
    ),
    "twice": (
        plain(
            **{f"unet.{ATTN_PATH}.lora_{x}.weight": t for x, t in (("A", torch.ones(4, 64)), ("B", torch.ones(32, 4)))}
        ),
        "it changes the layer unet.down.0.attn.blocks.0.attn2.to_k twice",
    ),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(1, 1)}, "it is a LoHa adapter: only plain LoRAs are read"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(1, 1)}, "it is a LoKr adapter"),
    "DoRA": (plain(**{"KEY.dora_scale": torch.ones(32, 1)}), "it is a DoRA adapter"),
    "DoRA of peft": (plain(**{f"unet.{ATTN_PATH}.lora_magnitude_vector": torch.ones(32)}), "it is a DoRA adapter"),
    "GLoRA": ({f"{KOHYA}.a1.weight": torch.ones(1, 1)}, "it is a GLoRA adapter"),
    "IA3": ({f"{KOHYA}.weight": torch.ones(1, 1), f"{KOHYA}.on_input": torch.ones(1)}, "it is a IA3 adapter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence(tmp_path, case):
    tensors, sentence = BAD[case]
    torch.save(tensors, tmp_path / "x")
    with pytest.raises(ValueError, match=sentence) as caught:
        load_lora(tmp_path / "x", NETWORKS)
    assert str(caught.value).startswith(str(tmp_path / "x"))
    assert "\n" not in str(caught.value)


def test_tensors_without_a_layer_are_counted_and_the_first_is_named(tmp_path):
    save_safetensors(
        tmp_path / "x", plain(**{"lora_unet_new.alpha": torch.ones(()), "bundle_emb.a": torch.ones(2, 64)})
    )
    with pytest.warns(
        UserWarning, match="2 of its 4 tensors belong to no layer of this model and are left out, first: "
    ):
        assert list(load_lora(tmp_path / "x", NETWORKS)) == [ATTN]


def test_truncated_files_are_refused_at_every_length(tmp_path):
    path = tmp_path / "a.safetensors"
    save_lora(path, random_lora([ATTN]), NETWORKS)
    whole = path.read_bytes()
    for length in [0, 7, 8, 30, *range(60, len(whole), 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            load_lora(path, NETWORKS)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("fired"),)


def test_a_malicious_pickle_does_not_fire(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(plain() | {"x": Payload()}, tmp_path / "x")
    assert list(load_lora(tmp_path / "x", NETWORKS)) == [ATTN]
    (tmp_path / "y").write_bytes(pickle.dumps({f"{KOHYA}.lora_down.weight": Payload()}))
    with pytest.raises(ValueError, match="y"):
        load_lora(tmp_path / "y", NETWORKS)
    assert not (tmp_path / "fired").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_a_sentence_or_a_lora_never_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    save_safetensors(path, plain(**{"KEY.alpha": torch.tensor(1.0)}))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        load_lora(path, NETWORKS)
