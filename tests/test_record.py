"""What a picture says of how it was made: the text that other programs read, and the JSON that makes it again."""

import inspect
import json
import os
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from lively import lively, mask, picture
from PIL import Image

from minisd import tasks
from minisd.cli import main
from minisd.files import fingerprint, write_whole
from minisd.provenance.call import Call, EmbeddingFile, File, LoadedModel, LoraFile, from_json, to_json
from minisd.provenance.files import find, find_input, remember_checkpoint, remember_input
from minisd.provenance.png import parameters_text, read_png, save_png
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import TASKS, Img2Img, Inpaint, Outpaint, Txt2Img

MODEL = LoadedModel(File("../models/sd-v1.5.safetensors", "sampled-sha256:0"))
TXT2IMG = Call(Txt2Img(seed=7, num_images=2, height=64), ["a cat", "a dog"], MODEL, threads=1, torch="2")
INPAINT = Call(
    Inpaint(strength=0.5, guidance_interval=(1.0, 500.0)), ["a cat"], MODEL,
    {"image": File("a.png", "sha256:1"), "mask": File("b.png", "sha256:2")}, threads=4, torch="2",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the tasks


@pytest.mark.parametrize("task", TASKS)
def test_every_option_of_a_task_is_in_its_signature_and_its_help_with_type_and_default(task):
    method = getattr(StableDiffusion, task)
    parameters = inspect.signature(method).parameters
    for field in fields(TASKS[task]):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].annotation == field.type
        assert f"\n    {field.name}: " in method.__doc__
    others = {*parameters} - {field.name for field in fields(TASKS[task])}
    assert others - {"latents"} == {"sd", "prompt", "network", *TASKS[task].images()}
    assert parameters == inspect.signature(getattr(tasks, task)).parameters


@pytest.mark.parametrize(
    ("task", "options", "named"),
    [
        (Txt2Img, {"num_images": 0}, "num_images is 0"),
        (Txt2Img, {"seed": -1}, "seed is -1"),
        (Txt2Img, {"hires_fix": 1.5}, "hires_fix is 1.5"),
        (Img2Img, {"strength": 0.0}, "strength is 0.0"),
        (Inpaint, {"strength": float("nan")}, "strength is nan"),
        (Outpaint, {}, "at least one side"),
        (Outpaint, {"left": -8, "right": 16}, "at least one side"),
    ],
)
def test_what_no_model_could_do_is_refused(task, options, named):
    with pytest.raises(ValueError, match=named):
        task(**options)


def test_the_call_of_one_batch_draws_the_same_picture_bit_for_bit():
    sd, source = lively(), picture()
    calls = {
        "txt2img": (Txt2Img(seed=3, num_images=2), {}),
        "variations": (Txt2Img(seed=3, num_images=2, variation_seed=9, variation_strength=0.4), {}),
        "two passes": (Txt2Img(seed=3, num_images=2, height=48, width=40, hires_fix=0.6), {}),
        "img2img": (Img2Img(seed=3, num_images=2), {"image": source}),
        "inpaint": (Inpaint(seed=3, num_images=2), {"image": source, "mask": mask((4, 4, 20, 28))}),
        "outpaint": (Outpaint(seed=3, num_images=2, left=8), {"image": source}),
    }
    prompts = ["a cat", "a dog, " * 40]
    for name, (options, inputs) in calls.items():
        call = Call(replace(options, steps=2, batch_size=3, prompt_syntax="chunked"), prompts, MODEL)
        images = draw(sd, call, inputs)
        assert len(images) == len(call) == 4
        for index in (2, 3):  # of the whole batch of three, and of the rest of one
            batch, place = call.batch(index)
            assert len(batch) == (3 if index == 2 else 1)
            assert draw(sd, batch, inputs)[place].tobytes() == images[index].tobytes(), name


def draw(sd, call, inputs):
    samplings = call.options.samplings(sd, call.prompts, **inputs)
    return [image for sampling in samplings for image in sampling.images() if not sampling.is_draft]


# ----------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(("call", "index"), [(TXT2IMG, 3), (INPAINT, 0)])
def test_a_record_comes_back_as_it_went(call, index):
    assert from_json(to_json(call, index)) == (call, index)


def test_records_are_plain_ascii_whatever_the_prompt():
    prompt = 'a "quoted" café\nwith 林檎 🍎 and \\ and \0'
    text = to_json(replace(TXT2IMG, prompts=[prompt]), 1)
    assert text.isascii()
    assert from_json(text)[0].prompts == [prompt]


@pytest.mark.parametrize(
    "change",
    [
        {"task": "rm"},
        {"task": ["txt2img"]},
        {"task": None},
        {"prompts": "a cat"},
        {"prompts": [1, 2]},
        {"prompts": {"a": 1}},
        {"prompts": []},
        {"index": -1},
        {"index": 4},
        {"index": True},
        {"index": "0"},
        {"index": 1e99},
        {"options": None},
        {"options": []},
        {"options": {"seed": "0"}},
        {"options": {"seed": -1}},
        {"options": {"sd": 1}},
        {"options": {"num_images": 10**6, "latents": []}},
        {"options": {"sampler": ["ddim"]}},
        {"options": {"steps": "30"}},
        {"options": {"spacing": "odd"}},
        {"options": {"batch_size": 0}},
        {"options": {"guidance_interval": 3}},
        {"model": {}},
        {"model": {"checkpoint": "x"}},
        {"model": {"checkpoint": {"name": 1, "digest": ""}}},
        {"model": asdict(MODEL) | {"dtype": "__import__"}},
        {"model": asdict(MODEL) | {"loras": [{"file": {"name": "a", "digest": ""}, "weight": "1"}]}},
        {"model": asdict(MODEL) | {"embeddings": {"a": 1}}},
        {"threads": "many"},
        {"threads": None},
    ],
    ids=json.dumps,
)
def test_records_of_wrong_types_are_refused_in_a_sentence(change):
    with pytest.raises(ValueError, match="its record"):
        from_json(json.dumps(json.loads(to_json(TXT2IMG, 0)) | change))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", "[" * 100_000, '{"task": NaN}'])
def test_what_is_no_record_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="its record"):
        from_json(text)


@pytest.mark.parametrize("name", ["image", "mask"])
def test_records_without_an_input_are_refused(name):
    values = json.loads(to_json(INPAINT, 0))
    del values["inputs"][name]
    with pytest.raises(ValueError, match=f"it lacks '{name}'"):
        from_json(json.dumps(values))


# --------------------------------------------------------------------------------------------------------- A1111's text


def as_a1111_reads_it(text):
    """prompt, negative prompt and values, by the rules that AUTOMATIC1111's page and its followers parse with."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3  # fewer, and they take the line for a prompt
    values = {key: json.loads(value) if value[:1] == '"' else value for key, value in pairs}
    start = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[start:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:start]), negative, values


def test_parameters_are_read_by_other_programs():
    own = {"seed": 7, "num_images": 2, "negative_prompt": "ugly, blurred\nand: dark", "strength": 0.6}
    options = Img2Img(**own, steps=20, sampler="euler_ancestral", spacing="karras", clip_skip=1)
    call = replace(TXT2IMG, options=options, prompts=["a cat\non a mat", "b"])
    prompt, negative, values = as_a1111_reads_it(parameters_text(call, 1, (64, 48)))
    assert (prompt, negative) == ("a cat\non a mat", "ugly, blurred\nand: dark")
    assert values == {
        "Steps": "20",
        "Sampler": "Euler a",
        "Schedule type": "Karras",
        "CFG scale": "7.5",
        "Seed": "8",
        "Size": "64x48",
        "Model": "sd-v1.5",
        "Denoising strength": "0.6",
        "Clip skip": "2",
        "Version": f"minisd {call.version}",
    }


def test_names_with_commas_are_quoted_for_other_programs():
    call = replace(TXT2IMG, model=LoadedModel(File('my, "own": model.ckpt', "")))
    assert as_a1111_reads_it(parameters_text(call, 0, (8, 8)))[2]["Model"] == 'my, "own": model'


def test_adapters_stand_where_others_look_for_them():
    style = (LoraFile(File("style.safetensors", "sha256:1"), 0.8), LoraFile(File("sub/b.pt", "sha256:2")))
    toy = (EmbeddingFile(File("toy.pt", "sha256:0123456789abcdef"), "<toy>"),)
    call = replace(TXT2IMG, model=replace(MODEL, loras=style, embeddings=toy))
    prompt, _, values = as_a1111_reads_it(parameters_text(call, 0, (8, 8)))
    assert prompt == "a cat <lora:style:0.8> <lora:b:1>"
    assert values["TI hashes"] == "toy: 0123456789ab"
    assert from_json(to_json(call, 0)) == (call, 0)


def test_a_variation_names_both_its_seeds():
    call = replace(TXT2IMG, options=Txt2Img(seed=7, num_images=3, variation_seed=100, variation_strength=0.2))
    values = as_a1111_reads_it(parameters_text(call, 2, (8, 8)))[2]
    assert (values["Seed"], values["Variation seed"], values["Variation seed strength"]) == ("7", "102", "0.2")


# ------------------------------------------------------------------------------------------------------------ the files


def test_a_png_carries_both_texts_and_its_pixels(tmp_path):
    image, path = picture(), tmp_path / "new" / "a.png"
    call = replace(TXT2IMG, prompts=["ein Äpfel", "林檎"])
    save_png(path, image, call, 2)
    assert read_png(path) == call.batch(2)
    with Image.open(path) as read:
        assert read.info["parameters"].startswith("林檎\nSteps: 30, ")
        assert read.tobytes() == image.tobytes()
    assert os.listdir(path.parent) == ["a.png"]


def test_pictures_without_a_record_are_refused(tmp_path):
    for name in ("a.png", "a.jpg"):
        picture().save(tmp_path / name)
        with pytest.raises(ValueError, match="does not say how it was made"):
            read_png(tmp_path / name)


def test_truncated_pictures_are_refused_at_every_length(tmp_path):
    path = tmp_path / "a.png"
    save_png(path, picture(), TXT2IMG, 0)
    whole = path.read_bytes()
    for length in [0, 7, 20, 60, *range(100, len(whole) - 20, 150)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
            read_png(path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_names_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing was changed") as caught:
        write_whole(tmp_path / "file" / "a.png", lambda file: None)
    assert caught.value.filename == str(tmp_path / "file" / "a.png")


def test_inputs_are_found_after_moving_with_the_picture_and_refused_when_changed(tmp_path):
    source, folder = tmp_path / "in" / "cat.png", tmp_path / "out"
    source.parent.mkdir()
    source.write_bytes(b"a cat")
    remembered = remember_input(source, folder)
    assert remembered.name == "../in/cat.png"
    assert find_input(remembered, folder) == source

    moved = tmp_path / "far" / "away"
    moved.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"in/cat\.png is not there"):
        find_input(remembered, moved)
    source.rename(moved / "cat.png")
    assert find_input(remembered, moved) == moved / "cat.png"
    (moved / "cat.png").write_bytes(b"a dog")
    with pytest.raises(ValueError, match="another SHA-256"):
        find_input(remembered, moved)


def test_a_record_cannot_make_replay_read_devices_or_folders(tmp_path):
    for name in ("/dev/zero", str(tmp_path)):
        with pytest.raises(ValueError, match="is not there"):
            find_input(File(name, "sha256:0"), tmp_path)


def test_a_fingerprint_tells_one_training_from_the_next(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(bytes(1 << 20))
    first = fingerprint(path)
    with path.open("r+b") as file:
        file.seek((1 << 20) - 5)
        file.write(b"x")
    assert fingerprint(path) != first
    path.write_bytes(bytes((1 << 20) + 1))
    assert fingerprint(path) != first
    path.write_bytes(bytes(1 << 20))
    assert fingerprint(path) == first


def test_the_fingerprint_of_a_folder_is_that_of_its_weights_wherever_it_lies(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "b" / "README.md").write_text("words")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "unet" / "model.safetensors").write_bytes(b"weightz")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\.ckpt: there is no such file"):
        remember_checkpoint(tmp_path / "x.ckpt", tmp_path)
    assert find(File("x.ckpt", ""), Path("nowhere")) is None


# ------------------------------------------------------------------------------------- what was drawn by older versions

DRAWN = sorted((Path(__file__).parent / "data" / "pictures").glob("*.png"))


@pytest.mark.parametrize("path", [p for p in DRAWN if p.name not in ("input.png", "mask.png")], ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore:.*holds float16")
def test_an_image_drawn_by_an_older_version_is_drawn_again(path, capsys):
    """By version 0.1.0, whose records held the options in two groups and under other names."""
    code, out = main(["replay", str(path)]), capsys.readouterr().out
    if "equal in every pixel" not in out:  # another CPU may round some pixels to the next level
        share, most = map(float, re.search(r"([\d.]+)% of its pixels differ, by up to (\d+)", out).groups())
        assert most <= 1, out
        assert share < 5, out
    else:
        assert code == 0
