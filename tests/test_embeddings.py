"""Textual-inversion embeddings: files of every layout, and the words that they add to a model."""

import base64
import collections
import contextlib
import json
import math
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lively import lively, picture, pixels
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

import minisd
from minisd.adapters.embeddings import load_embeddings, save_embedding
from minisd.checkpoints.doctor import inspect_checkpoint
from minisd.checkpoints.files import CheckpointError, save_safetensors
from minisd.checkpoints.files.embedding_image import _random_bytes
from minisd.checkpoints.save import save_checkpoint

WIDTH = 64  # of the small models' text encoder
LAYOUTS = {"a1111": "pt", "diffusers": "safetensors", "kohya": "safetensors"}


def vectors(n=2, width=WIDTH, seed=0):
    return 0.1 * torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- layouts, read


def original(x):
    """The original implementation's: token ids as tensors, the vectors in a ParameterDict."""
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(x)})}


READ = {
    "the original": (original, {"toy": "n d"}),
    "the original, named": (
        lambda x: {"string_to_token": {"sks": torch.tensor(48136)}, "string_to_param": nn.ParameterDict({"sks": x})},
        {"sks": "n d"},
    ),
    "A1111": (
        lambda x: {"string_to_token": {"*": 265}, "string_to_param": {"*": x}, "name": "cat-toy", "step": 3000},
        {"cat-toy": "n d"},
    ),
    "A1111, cuda graph of old": (
        lambda x: {"string_to_param": collections.OrderedDict({"*": x}), "name": None, "sd_checkpoint": None},
        {"toy": "n d"},
    ),
    "diffusers": (lambda x: {"<cat-toy>": x}, {"<cat-toy>": "n d"}),
    "diffusers, one vector": (lambda x: {"<cat-toy>": x[0]}, {"<cat-toy>": "d"}),
    "diffusers, two tokens": (lambda x: {"<a>": x[:1], "<b>": x[1:]}, {"<a>": "first", "<b>": "second"}),
    "kohya": (lambda x: {"emb_params": x}, {"toy": "n d"}),
    "bare": (lambda x: x, {"toy": "n d"}),
    "bare, one vector": (lambda x: x[0], {"toy": "d"}),
}


@pytest.mark.parametrize("layout", READ)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_pickled_layout_is_read(tmp_path, layout, zipped):
    make, expected = READ[layout]
    x = vectors()
    parts = {"n d": x, "d": x[:1], "first": x[:1], "second": x[1:]}
    torch.save(make(x), tmp_path / "toy.pt", _use_new_zipfile_serialization=zipped)
    found = load_embeddings(tmp_path / "toy.pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[token], parts[part]) for token, part in expected.items())


@pytest.mark.parametrize("layout", ["diffusers", "diffusers, one vector", "kohya"])
def test_safetensors_are_read_whatever_their_dtype(tmp_path, layout):
    make, expected = READ[layout]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        save_safetensors(tmp_path / "toy.safetensors", make(vectors().to(dtype)))
        found = load_embeddings(tmp_path / "toy.safetensors")
        assert list(found) == list(expected)
        assert all(x.dtype == dtype and x.ndim == 2 for x in found.values())


# ------------------------------------------------------------------------------------------------- A1111's pictures


def as_json(x, **more):
    stored = {"TORCHTENSOR": x.tolist()}
    return json.dumps({"string_to_token": {"*": 265}, "string_to_param": {"*": stored}, **more}).encode()


def hidden(image, content):
    """The picture between two strips of half-bytes, as A1111 lays them out; its ornament takes the upper half-bytes."""
    data = np.frombuffer(zlib.compress(content, 9), np.uint8)
    height = image.height
    size = -(-(len(data) + 1) // (3 * height)) * 3 * height
    strips = []
    for half in (data & 0x0F, data >> 4):
        block = np.resize(half, size).reshape(height, -1, 3)
        mask = np.array([next_byte & 0x0F for next_byte in generator(size)], np.uint8).reshape(block.shape)
        strips.append(block ^ mask | 0x50)
    wide = Image.new("RGB", (image.width + 2 * strips[0].shape[1] + 2, height))
    wide.paste(Image.fromarray(strips[0]), (0, 0))
    wide.paste(image, (strips[0].shape[1] + 1, 0))
    wide.paste(Image.fromarray(strips[1]), (strips[0].shape[1] + image.width + 2, 0))
    return wide


def generator(count):
    state = 0
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        yield state % 255


def test_the_random_sequence_of_the_pixels_is_a1111s():
    """The numbers that its image_embedding.py checks itself by."""
    numbers = _random_bytes(100_100)
    assert numbers[:10].tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79]
    assert numbers[90:100].tolist() == [82, 204, 86, 73, 222, 44, 198, 118, 240, 97]
    assert numbers[100:].astype(int).sum() == 12731374


@pytest.mark.parametrize(("more", "token"), [({"name": "cat-toy", "step": 5}, "cat-toy"), ({}, "toy")])
@pytest.mark.parametrize("place", ["text", "pixels"])
def test_an_embedding_in_a_picture_is_read(tmp_path, more, token, place):
    x, image, info = vectors(3), picture(48, 40), PngInfo()
    if place == "text":
        info.add_text("sd-ti-embedding", base64.b64encode(as_json(x, **more)).decode())
    else:
        image = hidden(image, as_json(x, **more))
    image.save(tmp_path / "toy.png", pnginfo=info)
    found = load_embeddings(tmp_path / "toy.png")
    assert list(found) == [token]
    assert torch.equal(found[token], x)  # a float32 in decimal digits comes back exactly
    page = " ".join(str(inspect_checkpoint(tmp_path / "toy.png")).split())
    assert "an image that carries a textual-inversion embedding" in page
    assert "3 of width 64" in page


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "an image that carries no embedding, neither as text nor in its pixels"),
        ("!", "the embedding in this image is damaged"),
        (base64.b64encode(b"{").decode(), "the embedding in this image is damaged"),
        (base64.b64encode(b"[1]").decode(), "the embedding in this image is damaged"),
        (base64.b64encode(b"[" * 100_000).decode(), "the embedding in this image is damaged"),
        (base64.b64encode(as_json(torch.ones(2, 2, 2))).decode(), r"has the shape \(2, 2, 2\)"),
        (base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1e999]]}}}').decode(), "not finite"),
    ],
    ids=["none", "no base64", "cut", "no mapping", "deep", "3-D", "Inf"],
)
def test_bad_pictures_are_refused_in_a_sentence(tmp_path, text, sentence):
    info = PngInfo()
    if text is not None:
        info.add_text("sd-ti-embedding", text)
    picture().save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(CheckpointError, match=sentence):
        load_embeddings(tmp_path / "a.png")
    assert not inspect_checkpoint(tmp_path / "a.png").ok


# -------------------------------------------------------------------------------------------------- layouts, written


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None)
@given(
    n=st.integers(1, 16),
    width=st.sampled_from([64, 128, 768, 1024]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_is_written_comes_back_bit_for_bit(tmp_path_factory, layout, n, width, dtype):
    path = tmp_path_factory.mktemp("embedding") / f"toy.{LAYOUTS[layout]}"
    x = vectors(n, width).to(dtype)
    save_embedding(path, "<cat-toy>", x, layout=layout)
    ((token, found),) = load_embeddings(path).items()
    assert token == ("toy" if layout == "kohya" else "<cat-toy>")
    assert found.dtype == dtype
    assert torch.equal(found, x)
    assert inspect_checkpoint(path).ok or (layout, width) == ("kohya", 1280)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_written_file_holds_the_vectors_only_and_replaces_the_old_one_whole(tmp_path, layout):
    path = tmp_path / f"toy.{LAYOUTS[layout]}"
    path.write_bytes(b"old")
    save_embedding(path, "<cat-toy>", vectors(1000)[3:5].requires_grad_(), layout=layout)  # a view of a large table
    assert path.stat().st_size < 4000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="give 'n d'"):
        save_embedding(path, "<cat-toy>", vectors()[0], layout=layout)
    with pytest.raises(ValueError, match=rf"the layout {layout} is a .{LAYOUTS[layout]} file: name it "):
        save_embedding(tmp_path / "toy.bin", "<cat-toy>", vectors(), layout=layout)
    with pytest.raises(OSError, match="nothing was changed"):
        save_embedding(tmp_path / "nowhere" / path.name, "<cat-toy>", vectors(), layout=layout)


# --------------------------------------------------------------------------------------------------- in the model


def test_only_the_new_rows_are_new_and_the_token_reads_them(tmp_path):
    sd, x = lively(), vectors(3)
    before = sd.text_encoder.token_embedding.weight.detach().clone()
    save_embedding(tmp_path / "a.safetensors", "<cat-toy>", x)
    assert sd.load_embedding(tmp_path / "a.safetensors") == ["<cat-toy>"]
    after = sd.text_encoder.token_embedding
    assert torch.equal(after.weight[:49408], before)
    assert torch.equal(after.weight[49408:], x)
    assert after.num_embeddings == sd.config.text.vocab_size == sd.text_encoder.config.vocab_size == 49411
    ids = sd.tokenizer("a <cat-toy>'s bed")[0]
    assert ids[2:5].tolist() == [49408, 49409, 49410]


@pytest.mark.parametrize("prompt_syntax", ["plain", "chunked", "a1111", "comfyui"])
def test_the_placeholder_works_in_any_prompt(tmp_path, prompt_syntax):
    sd = lively()
    save_embedding(tmp_path / "a.safetensors", "<cat-toy>", vectors(4))
    sd.load_embedding(tmp_path / "a.safetensors", token="<it>")
    options = {"steps": 2, "prompt_syntax": prompt_syntax}
    drawn = [pixels(sd.txt2img(f"a photo of {x}, red", **options)[0]) for x in ("<it>", "<cat-toy>", "it")]
    assert abs(drawn[0] - drawn[1]).max() > 10  # <cat-toy> is plain text
    assert abs(drawn[0] - drawn[2]).max() > 10


def test_a_word_given_its_own_vector_anew_is_the_word(tmp_path):
    """The strongest check of the way from file to context: nothing may change."""
    sd = lively()
    (word,) = sd.tokenizer.encode("apple")
    save_embedding(tmp_path / "a.safetensors", "<x>", sd.text_encoder.token_embedding.weight[word : word + 1])
    sd.load_embedding(tmp_path / "a.safetensors")
    contexts = [sd.encode_prompt(f"a red {x} on a table").context for x in ("apple", "<x>")]
    assert torch.equal(*contexts)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_saved_model_keeps_its_words(tmp_path, layout):
    sd = lively()
    save_embedding(tmp_path / "a.safetensors", "<cat-toy>", vectors(3))
    save_embedding(tmp_path / "b.pt", "<b>", vectors(1, seed=1), layout="a1111")
    sd.load_embedding(tmp_path / "a.safetensors")
    sd.load_embedding(tmp_path / "b.pt")
    path = tmp_path / ("m" if layout == "diffusers" else "m.safetensors")
    sd.save(path, layout=layout)
    again = minisd.load(path)
    assert again.tokenizer.added_tokens == {"<cat-toy>": [49408, 49409, 49410], "<b>": [49411]}
    prompt = "a <cat-toy> beside a <b>"
    assert torch.equal(again.encode_prompt(prompt).context, sd.encode_prompt(prompt).context)
    assert again.config == sd.config
    again.load_embedding(tmp_path / "a.safetensors", token="<third>")
    assert again.tokenizer.added_tokens["<third>"] == [49412, 49413, 49414]


def test_a_half_precision_model_rounds_the_vectors_once(tmp_path):
    sd = lively()
    sd.text_encoder.half()
    save_embedding(tmp_path / "a.safetensors", "<x>", vectors())
    sd.load_embedding(tmp_path / "a.safetensors")
    assert torch.equal(sd.text_encoder.token_embedding.weight[49408:], vectors().half())


def test_a_loaded_models_file_is_not_written_to(tmp_path):
    save_checkpoint(lively().checkpoint, tmp_path / "m.safetensors")
    content = (tmp_path / "m.safetensors").read_bytes()
    sd = minisd.load(tmp_path / "m.safetensors")
    save_embedding(tmp_path / "a.safetensors", "<x>", vectors())
    sd.load_embedding(tmp_path / "a.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == content


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("width", "sentence"),
    [
        (
            768,
            r"a text width of 768 \(Stable Diffusion 1.x\), this model has 64 \(a family of its own\): take",
        ),
        (1024, r"a text width of 1024 \(Stable Diffusion 2.x\), this model has 64"),
        (1280, r"a text width of 1280 \(SDXL\), this model has 64"),
        (128, r"a text width of 128 \(a family of its own\), this model has 64"),
    ],
)
def test_another_width_is_refused_by_naming_both_families(tmp_path, width, sentence):
    sd = lively()
    save_embedding(tmp_path / "a.safetensors", "<x>", vectors(width=width))
    with pytest.raises(ValueError, match=sentence):
        sd.load_embedding(tmp_path / "a.safetensors")
    assert not sd.tokenizer.added_tokens
    assert sd.config.text.vocab_size == 49408


BAD = {
    "SDXL": ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "it is for SDXL .*: minisd runs"),
    "no embedding": ({"layer.weight": torch.ones(3, 3), "layer.bias": torch.ones(3)}, "it holds no textual-inversion"),
    "integers": ({"<x>": torch.ones(2, WIDTH, dtype=torch.long)}, "it holds no textual-inversion"),
    "NaN": ({"<x>": torch.full((2, WIDTH), math.nan)}, "<x> holds values that are not finite"),
    "empty": ({"<x>": torch.ones(0, WIDTH)}, r"<x> has the shape \(0, 64\)"),
    "huge": ({"<x>": torch.ones(2048, 4 * WIDTH)}, r"<x> has the shape \(2048, 256\): an embedding"),
    "3-D": ({"emb_params": torch.ones(2, 2, WIDTH)}, r"emb_params has the shape \(2, 2, 64\)"),
    "too many": ({"<x>": torch.ones(76, WIDTH)}, "a token has 1…75 vectors"),
    "a word": ({"cat": torch.ones(2, WIDTH)}, "'cat' is a word of CLIP's vocabulary"),
    "spaces": ({"my cat": torch.ones(2, WIDTH)}, "'my cat' cannot be a placeholder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_a_sentence_and_change_nothing(tmp_path, case):
    sd, (tensors, sentence) = lively(), BAD[case]
    torch.save(tensors, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=sentence) as caught:
        sd.load_embedding(tmp_path / "x.pt")
    assert str(caught.value).startswith(str(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)
    assert not sd.tokenizer.added_tokens


def test_a_name_can_be_given_to_one_token_only_and_be_taken_only_once(tmp_path):
    sd = lively()
    torch.save({"<a>": vectors(1), "<b>": vectors(1)}, tmp_path / "two.bin")
    with pytest.raises(ValueError, match=r"holds 2 tokens \(<a>, <b>\): leave token= out"):
        sd.load_embedding(tmp_path / "two.bin", token="<c>")
    assert sd.load_embedding(tmp_path / "two.bin") == ["<a>", "<b>"]
    with pytest.raises(ValueError, match="'<a>' is an added token already"):
        sd.load_embedding(tmp_path / "two.bin")


def test_a_file_with_one_bad_token_adds_none(tmp_path):
    sd = lively()
    torch.save({"<a>": vectors(1), "cat": vectors(1)}, tmp_path / "two.bin")
    with pytest.raises(ValueError, match="'cat' is a word"):
        sd.load_embedding(tmp_path / "two.bin")
    assert not sd.tokenizer.added_tokens


def test_a_text_encoder_of_another_vocabulary_takes_none(tmp_path):
    sd = lively()
    sd.text_encoder.token_embedding = nn.Embedding(200, WIDTH)
    with pytest.raises(ValueError, match="has 200 tokens, fewer than CLIP's tokenizer knows"):
        sd.add_embedding("<x>", vectors())
    assert not sd.tokenizer.added_tokens


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("fired"),)


def test_a_malicious_pickle_does_not_fire(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("a", {"string_to_param": {"*": vectors()}, "name": Payload()}), ("b", {"<x>": Payload()})):
        torch.save(content, f"{name}.pt")
        Path(f"{name}.plain").write_bytes(pickle.dumps(content))
        for path in (f"{name}.pt", f"{name}.plain"):
            with contextlib.suppress(CheckpointError):
                assert list(load_embeddings(path)) == ["a"]
            inspect_checkpoint(path)
    assert load_embeddings("a.pt")["a"].shape == (2, WIDTH)
    assert not Path("fired").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_files_are_refused_at_every_length(tmp_path, layout):
    path = tmp_path / f"toy.{LAYOUTS[layout]}"
    save_embedding(path, "<cat-toy>", vectors(), layout=layout)
    whole = path.read_bytes()
    for length in [0, 7, 8, 30, *range(60, len(whole) - 1, 61)]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="toy"):
            load_embeddings(path)


@pytest.mark.parametrize("place", ["text", "pixels"])
def test_truncated_pictures_are_refused_at_every_length(tmp_path, place):
    image, info = picture(48, 40), PngInfo()
    if place == "text":
        info.add_text("sd-ti-embedding", base64.b64encode(as_json(vectors())).decode())
    else:
        image = hidden(image, as_json(vectors()))
    image.save(tmp_path / "a.png", pnginfo=info)
    whole = (tmp_path / "a.png").read_bytes()
    for length in range(0, len(whole) - 20, len(whole) // 25):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.png"):
            load_embeddings(tmp_path / "a.png")


# -------------------------------------------------------------------------------------------------- beside diffusers


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Fresh pipelines of both sides of one small model."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("model") / "m"
    save_checkpoint(lively().checkpoint, folder, layout="diffusers")

    def both():
        options = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, **options)
        theirs.set_progress_bar_config(disable=True)
        stable = {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **stable)
        return theirs, minisd.load(folder)

    return both


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_loaded_by_diffusers_and_draws_the_same_picture(tmp_path, pipeline, layout):
    theirs, ours = pipeline()
    path = tmp_path / f"toy.{LAYOUTS[layout]}"
    save_embedding(path, "<toy>", 3 * vectors(3), layout=layout)
    theirs.load_textual_inversion(tmp_path, weight_name=path.name, token="<toy>")
    ours.load_embedding(path, token="<toy>")
    size, prompt = {"height": 32, "width": 32, "guidance_scale": 5.0}, "a photo of <toy>, on a table"
    generator = torch.Generator().manual_seed(7)
    picture = theirs(prompt, num_inference_steps=6, generator=generator, **size).images[0]
    own = pixels(ours.txt2img(prompt, steps=6, seed=7, **size)[0])
    assert abs(own - pixels(picture)).max() <= 1  # one of 255 levels: rounding
    plain = pixels(ours.txt2img("a photo of toy, on a table", steps=6, seed=7, **size)[0])
    assert abs(own - plain).max() > 20


def test_a_model_saved_with_its_words_is_a_pipeline_of_diffusers_that_knows_them(tmp_path, pipeline):
    _, ours = pipeline()
    save_embedding(tmp_path / "a.safetensors", "<toy>", vectors(2))
    ours.load_embedding(tmp_path / "a.safetensors")
    ours.save(tmp_path / "m", layout="diffusers")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "m" / "tokenizer")
    text_encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "m" / "text_encoder").eval()
    ids = tokenizer("a <toy> <toy>_1 here", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = text_encoder(ids).last_hidden_state
    torch.testing.assert_close(ours.encode_prompt("a <toy> here").context, theirs, atol=5e-5, rtol=0)
