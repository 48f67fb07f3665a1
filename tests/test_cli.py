"""The command line, as a person meets it: what it makes, what it says, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from lively import lively, lively_checkpoint, mask, picture
from PIL import Image

from minisd import tasks
from minisd.adapters.embeddings import save_embedding
from minisd.adapters.lora import LowRank, layer_of, save_lora
from minisd.checkpoints.load import load_checkpoint
from minisd.checkpoints.save import save_checkpoint
from minisd.cli import BENCHES, COMMANDS, EVALUATIONS, PLOTS, TRAININGS, main
from minisd.cli.options import Model
from minisd.cli.output import Output, Preview, Strip
from minisd.tasks import Txt2Img

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2"]
PATHS = [*COMMANDS, *PLOTS, *TRAININGS, *EVALUATIONS, *BENCHES]
ALL = [path.rpartition(":")[2].replace("_", " ", 1).replace("_", "-") for path in PATHS]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Small checkpoints that draw 32 × 32 pixels."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind, changes in (
        ("sd1", "SD1", {}),
        ("other", "SD1", {"seed": 1}),
        ("inpaint", "SD1_INPAINT", {}),
        ("sd2_v", "SD2_V", {}),
        ("depth", "SD2_DEPTH", {}),
    ):
        save_checkpoint(lively_checkpoint(kind, **changes), folder / f"{name}.safetensors")
    broken = lively_checkpoint("SD1")
    with torch.no_grad():
        broken.networks["unet"].conv_in.weight[0, 0, 0, 0] = torch.nan
    save_checkpoint(broken, folder / "nan.safetensors")
    return folder


@pytest.fixture
def minisd(models, tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "models").symlink_to(models)
    picture().save("cat.png")
    mask((4, 4, 20, 28)).save("mask.png")

    def run(*tokens, model="sd1"):
        if model is not None and tokens[0] in ("txt2img", "img2img", "inpaint", "outpaint"):
            tokens = [*tokens, "--checkpoint", f"models/{model}.safetensors"]
        code = main([str(token) for token in tokens])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result) -> str:
    """The one sentence on stderr of a command that came to nothing."""
    code, out, err = result
    assert (code, out) == (1, "")
    (sentence,) = [line for line in err.splitlines() if line.startswith("minisd: ")]
    assert "Traceback" not in err
    return sentence


def run_alone(*tokens, **environment):
    """A command in a process of its own."""
    command = [sys.executable, "-m", "minisd", *tokens]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")


def pngs(folder=".") -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.png") if path.name not in ("cat.png", "mask.png"))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------------------------- pictures


def test_txt2img_draws_what_the_library_draws(minisd):
    code, out, _ = minisd(
        "txt2img", "a cat", "--out", "cat-1.png", "--seed", 5, "--steps", 3, "--sampler", "euler", "--width", 40
    )
    (image,) = lively().txt2img("a cat", seed=5, steps=3, sampler="euler", width=40)
    assert (code, out) == (0, "cat-1.png\n")
    assert (pixels("cat-1.png") == np.asarray(image)).all()


def test_several_prompts_become_numbered_pictures_with_seeds_that_count_on(minisd):
    Path("prompts.txt").write_bytes("\ufeffa dog\r\n\r\n  ein Häuschen \r\n".encode())
    code, out, err = minisd(
        "txt2img", "a cat", "--prompts", "prompts.txt", "--num-images", 2, "--seed", 7, "--steps", 1,
        "--out", "new/folder", "--grid", "sheet.png",
    )  # fmt: skip
    assert code == 0
    assert pngs("new/folder") == [f"{i:05}-{7 + i}.png" for i in range(6)]
    assert out.splitlines() == [*(str(Path("new/folder", name)) for name in pngs("new/folder")), "sheet.png"]
    assert "s/step" in err  # the bar, with seconds per step
    with Image.open("new/folder/00004-11.png") as image:
        assert image.info["parameters"].startswith("ein Häuschen\n")
    with Image.open("sheet.png") as image:
        assert image.size == (3 * 32, 2 * 32)
    minisd("txt2img", "a cat", "--out", "new/folder", "--steps", 1)
    assert pngs("new/folder")[-1] == "00006-0.png"


@pytest.mark.parametrize(
    ("tokens", "size"),
    [
        (["img2img", "a dog", "cat.png", "--strength", "0.6", "--width", "48"], (48, 48)),
        (["inpaint", "a dog", "cat.png", "mask.png", "--strength", "0.9"], (32, 32)),
        (["outpaint", "a dog", "cat.png", "--left", "5", "--top", "8"], (37, 40)),
        (["txt2img", "a dog", "--height", "48", "--width", "64", "--hires-fix", "0.6"], (64, 48)),
        (["txt2img", "a dog", "--variation-seed", "9", "--variation-strength", "0.3"], (32, 32)),
        (
            ["txt2img", "a dog", "--dtype", "bfloat16", "--sampler", "ddpm", "--guidance-interval", "100", "900"],
            (32, 32),
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_every_task_replays_bit_for_bit(minisd, tokens, size):
    code, out, _ = minisd(*tokens, "--steps", 3, "--num-images", 3, "--batch-size", 2, "--out", "made.png")
    assert (code, out.split()) == (0, ["made-0.png", "made-1.png", "made-2.png"])
    with Image.open("made-1.png") as image:
        assert image.size == size
    code, out, _ = minisd("replay", "made-1.png", "--out", "sub/again.png")
    assert (code, out) == (0, f"{Path('sub/again.png')}\nmade-1.png: made again, equal in every pixel\n")
    code, out, _ = minisd("replay", "sub/again.png")
    assert (code, out) == (0, f"{Path('sub/again.png')}: made again, equal in every pixel\n")


def test_inpainting_models_and_v_models_draw(minisd):
    assert minisd("inpaint", "x", "cat.png", "mask.png", *QUICK, "--out", "a.png", model="inpaint")[0] == 0
    assert minisd("txt2img", "x", *QUICK, "--out", "b.png", model="sd2_v")[0] == 0
    assert minisd("replay", "a.png")[0] == minisd("replay", "b.png")[0] == 0


def test_img2img_says_how_many_steps_run(minisd):
    _, _, err = minisd("img2img", "x", "cat.png", "--strength", 0.5, "--steps", 4, "--out", "a.png")
    assert "2 of 4 steps run (strength 0.5)\n" in err
    _, _, err = minisd("img2img", "x", "cat.png", "--strength", 0.5, "--steps", 4, "--exact-steps", "--out", "b.png")
    assert "steps run" not in err


def test_a_trajectory_is_a_strip_that_ends_in_the_first_picture(minisd):
    code, out, _ = minisd(
        "txt2img", "x", "--num-images", 2, "--steps", 3, "--out", "a.png", "--trajectory", "strip.png"
    )
    assert (code, out.split()) == (0, ["a-0.png", "a-1.png", "strip.png"])
    strip, first = pixels("strip.png").astype(int), pixels("a-0.png").astype(int)
    assert strip.shape == (32, 3 * 32, 3)
    assert abs(strip[:, -32:] - first).mean() < abs(strip[:, :32] - first).mean()


def test_a_strip_of_many_steps_holds_ten_of_them_and_the_last():
    (sampling,) = tasks.txt2img(lively(), "x", steps=23)
    strip, kept = Strip(), []
    for number, step in enumerate(sampling):
        before = len(strip.images)
        strip.add(sampling, number, step)
        kept += [number] * (len(strip.images) - before)
    assert len(kept) == 10
    assert kept[-1] == 22
    assert set(np.diff(kept)) == {2, 3}


def test_a_preview_shows_what_is_coming_after_a_pause(tmp_path):
    (sampling,) = tasks.txt2img(lively(), "x", steps=2)
    now, later, never = Preview(tmp_path / "now.png", pause=0), Preview(tmp_path / "later.png"), Preview(None, pause=0)
    for step in sampling:
        for preview in (now, later, never):
            preview.show(sampling, step)
    with Image.open(tmp_path / "now.png") as image:
        assert image.size == (32, 32)
    assert os.listdir(tmp_path) == ["now.png"]


def test_a_preview_that_cannot_be_written_does_not_cost_the_run(tmp_path):
    (sampling,) = tasks.txt2img(lively(), "x", steps=1)
    (tmp_path / "file").write_text("")
    preview = Preview(tmp_path / "file" / "a.png", pause=0)
    with pytest.warns(UserWarning, match="no preview was written"):
        preview.show(sampling, next(iter(sampling)))


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapters(minisd):
    """An embedding and a LoRA for the small model, in adapters/."""
    sd = lively("SD1")
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for layer in ("unet.down.0.attn.blocks.0.attn2.to_v", "unet.mid.0.res.conv1", "text.blocks.1.fc1"):
        shape = layer_of(sd.loras.networks, layer).weight.shape
        down = torch.randn(2, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        lora[layer] = LowRank(down, torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator), 2.0)
    Path("adapters").mkdir()
    save_lora("adapters/style.safetensors", lora, sd.loras.networks)
    save_embedding("adapters/toy.pt", "<toy>", torch.randn(2, 64, generator=generator), layout="a1111")


ADAPTERS = ["--embedding", "adapters/toy.pt", "--lora", "adapters/style.safetensors:0.8"]


@pytest.mark.parametrize(
    "task", [["txt2img", "a <toy>"], ["img2img", "a <toy>", "cat.png"], ["inpaint", "a <toy>", "cat.png", "mask.png"]]
)
def test_adapters_change_the_picture_and_come_back_in_a_replay(minisd, adapters, task):
    code, _, err = minisd(*task, *QUICK, *ADAPTERS, "--out", "sub/with.png")
    assert code == 0
    assert "adapters/toy.pt: adds <toy>" in err
    assert "adapters/style.safetensors: 3 layers changed, weight 0.8" in err
    minisd(*task, *QUICK, *ADAPTERS[:2], "--out", "embedding.png")
    minisd(*task, *QUICK, *ADAPTERS[2:], "--out", "lora.png")
    made = [pixels(name).tobytes() for name in ("sub/with.png", "embedding.png", "lora.png")]
    assert len(set(made)) == 3
    code, out, _ = minisd("replay", "sub/with.png", "--out", "again.png")
    assert (code, out) == (0, "again.png\nsub/with.png: made again, equal in every pixel\n")
    assert minisd("replay", "again.png")[0] == 0


def test_replay_refuses_adapters_that_are_gone_or_changed(minisd, adapters):
    minisd("txt2img", "a <toy>", *QUICK, *ADAPTERS, "--out", "a.png")
    for name, what in (("toy.pt", "embedding"), ("style.safetensors", "LoRA")):
        path = Path("adapters", name)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert f"{path} is not the {what} it was (another SHA-256)" in refused(minisd("replay", "a.png"))
        path.unlink()
        assert f"the {what} {path} is not there" in refused(minisd("replay", "a.png"))
        path.write_bytes(whole)
    assert minisd("replay", "a.png")[0] == 0


def test_adapters_take_other_names_and_weights_and_odd_file_names(minisd, adapters):
    Path("adapters/toy.pt").rename("adapters/my=toy.pt")
    Path("adapters/style.safetensors").rename("adapters/a:0.5")
    options = ["--embedding", "<it>=adapters/my=toy.pt", "--lora", "adapters/a:0.5:-1", *QUICK]
    code, _, err = minisd("txt2img", "a <it>", *options, "--out", "a.png")
    assert "adapters/my=toy.pt: adds <it>" in err
    assert "adapters/a:0.5: 3 layers changed, weight -1" in err
    assert (code, minisd("replay", "a.png")[0]) == (0, 0)
    code, _, err = minisd("txt2img", "x", *QUICK, "--embedding", "adapters/my=toy.pt", "--lora", "adapters/a:0.5")
    assert code == 0
    assert "weight 1\n" in err


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--lora", "adapters/none.safetensors:0.5"], "adapters/none.safetensors does not exist"),
        (["--lora", "adapters/style.safetensors:x"], "adapters/style.safetensors:x does not exist"),
        (["--lora", "adapters/style.safetensors:nan"], "the weight of a LoRA is nan: give a finite number"),
        (["--lora", "adapters/style.safetensors:0.3", "--lora", "adapters/style.safetensors"], "is given 2 times"),
        (["--lora", "adapters/toy.pt"], "adapters/toy.pt: it holds no LoRA"),
        (["--embedding", "adapters/style.safetensors"], "it holds no textual-inversion embedding"),
        (["--embedding", "cat.png"], "cat.png: an image that carries no embedding"),
        (["--embedding", "cat=adapters/toy.pt"], "'cat' is a word of CLIP's vocabulary"),
        (["--embedding", "adapters/toy.pt", "--embedding", "adapters/toy.pt"], "'<toy>' is an added token already"),
    ],
)
def test_adapters_that_cannot_be_used_are_refused(minisd, adapters, option, sentence):
    assert sentence in refused(minisd("txt2img", "x", *QUICK, *option))


# --------------------------------------------------------------------------------------------------------------- replay


def test_replay_with_another_checkpoint_says_so_and_finds_the_difference(minisd):
    minisd("txt2img", "x", *QUICK, "--out", "a.png")
    code, out, err = minisd("replay", "a.png", "--checkpoint", "models/other.safetensors")
    assert code == 1
    assert "of its pixels differ, by up to" in out
    assert "models/other.safetensors is another checkpoint than the one that drew the picture" in err


def test_replay_finds_a_changed_pixel(minisd):
    minisd("txt2img", "x", *QUICK, "--out", "a.png")
    with Image.open("a.png") as image:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_text("minisd", image.info["minisd"])
        red, green, blue = image.getpixel((3, 4))
        image.putpixel((3, 4), (red, green, blue ^ 1))
        image.save("b.png", pnginfo=info)
    code, out, _ = minisd("replay", "b.png")
    assert (code, out) == (1, "b.png: made again, but 0.10% of its pixels differ, by up to 1 of 255 levels\n")


def test_replay_refuses_when_something_is_not_as_it_was(minisd):
    minisd("img2img", "x", "cat.png", *QUICK, "--out", "a.png")
    assert "a.png exists already" in refused(minisd("replay", "a.png", "--out", "a.png"))
    picture(mode="L").save("cat.png")
    assert "cat.png is not the input picture it was" in refused(minisd("replay", "a.png"))
    Path("cat.png").unlink()
    assert "the input picture cat.png is not there" in refused(minisd("replay", "a.png"))
    Path("models").unlink()
    picture().save("cat.png")
    assert "sd1.safetensors is not there, seen from .: say where with --checkpoint" in refused(
        minisd("replay", "a.png")
    )


def test_replay_refuses_pictures_of_others(minisd):
    assert "does not say how it was made" in refused(minisd("replay", "cat.png"))
    assert "there is no such image" in refused(minisd("replay", "none.png"))
    Path("text.png").write_text("no picture")
    assert "not a readable image" in refused(minisd("replay", "text.png"))


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (["txt2img", "x", "--sampler", "dimm"], "unknown sampler 'dimm'; known: ddim, "),
        (["txt2img"], "no prompt was given"),
        (["txt2img", "x", "--num-images", "0"], "num_images is 0: give 1 or more"),
        (["txt2img", "x", "--seed", "-1"], "seed is -1: give a whole number from 0"),
        (["txt2img", "x", "--steps", "0"], "steps is 0: give 1 or more"),
        (["txt2img", "x", "--guidance-scale", "nan"], "guidance_scale is nan: give a finite number"),
        (["txt2img", "x", "--guidance-interval", "900", "100"], "give the lower timestep first"),
        (["txt2img", "x", "--guidance-rescale", "2"], "guidance_rescale is 2.0: it lies in"),
        (["txt2img", "x", "--device", "gpu"], "there is no device 'gpu': cpu, cuda"),
        (["txt2img", "x", "--checkpoint", "none.ckpt"], "none.ckpt: there is no such file or folder"),
        (["txt2img", "x", "--prompts", "none.txt"], "none.txt: cannot be read"),
        (["txt2img", "x", "--prompts", "cat.png"], "cat.png: not a text in UTF-8"),
        (["txt2img", "x", "--prompts", os.devnull], "there is no prompt in it"),
        (["txt2img", "bad \udcff byte"], "holds bytes that are no text"),
        (["txt2img", "x", "--out", "a.jpg"], "pictures are saved as .png"),
        (["txt2img", "x", "--out", "cat.png"], "cat.png exists already: choose another name, or add --overwrite"),
        (["txt2img", "x", "--out", "cat.png/a.png"], "cat.png is no folder that one may write to"),
        (["txt2img", "x", "--grid", "cat.png"], "cat.png exists already"),
        (["txt2img", "x", "--grid", "a.gif"], "a.gif: sheets and previews are saved as .png"),
        (["txt2img", "x", "--out", "a.png", "--grid", "a.png"], "name the same file"),
        (["img2img", "x", "none.png"], "none.png: there is no such image"),
        (["img2img", "x", "cat.png", "--strength", "1.5"], "strength is 1.5"),
        (["outpaint", "x", "cat.png"], "give new pixels for at least one side"),
    ],
    ids=lambda value: " ".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else None,
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(minisd, monkeypatch, tokens, sentence):
    loader = "minisd.stable_diffusion.load_checkpoint"
    monkeypatch.setattr(loader, lambda *_, **__: pytest.fail("a checkpoint was loaded"))
    assert sentence in refused(minisd(*tokens, model=None if "--checkpoint" in tokens else "sd1"))
    assert pngs() == []


@pytest.mark.parametrize(
    ("model", "tokens", "sentence"),
    [
        ("sd1", ["txt2img", "x", "--height", "33"], "height 33 is not a multiple of 2"),
        ("sd1", ["txt2img", "x", "--steps", "2000"], "2000 steps"),
        ("sd1", ["txt2img", "x", "--variation-strength", "0.5"], "variation_seed"),
        ("sd1", ["img2img", "x", "cat.png", "--strength", "0.01"], "runs none"),
        ("sd1", ["inpaint", "x", "cat.png", "sheet.png"], "make them equal"),
        ("inpaint", ["txt2img", "x"], "inpainting model"),
        ("depth", ["txt2img", "x"], "depth map"),
        ("nan", ["txt2img", "x"], "first in the layer conv_in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_model_cannot_do_is_one_sentence(minisd, model, tokens, sentence):
    picture(40, 32).save("sheet.png")
    assert sentence in refused(minisd(*tokens, model=model))
    assert not Path("outputs").exists()


def test_black_pictures_are_pointed_out_and_kept(minisd, models):
    dark = lively_checkpoint("SD1")
    with torch.no_grad():
        dark.networks["vae"].decoder.conv_out.weight.zero_()
        dark.networks["vae"].decoder.conv_out.bias.fill_(-2)
    save_checkpoint(dark, "dark.safetensors")
    code, out, err = minisd("txt2img", "x", *QUICK, "--out", "a.png", "--checkpoint", "dark.safetensors", model=None)
    assert (code, out) == (0, "a.png\n")
    assert "minisd: note: the image of seed 0 is all black" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_one_may_not_write_to_is_refused(minisd, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "is no folder that one may write to" in refused(minisd("txt2img", "x", "--out", "locked/a.png"))


def test_nothing_is_overwritten_unless_asked(minisd):
    for expected in (0, 1, 0):
        overwrite = ["--overwrite"] if expected == 0 and pngs() else []
        assert minisd("txt2img", "x", *QUICK, "--out", "a.png", *overwrite)[0] == expected


def test_names_of_pictures_sort_and_go_on_after_what_is_there(tmp_path):
    assert [p.name for p in Output(tmp_path / "a.PNG").names(11, 0)][::10] == ["a-00.PNG", "a-10.PNG"]
    for name in ("00041-3.png", "holiday.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in Output(tmp_path).names(2, 9)] == ["00042-9.png", "00043-10.png"]
    (tmp_path / "odd.png").mkdir()
    assert Output(tmp_path / "odd.png").names(1, 0) == [tmp_path / "odd.png" / "00000-0.png"]


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (["txt2img", "x", "--stepz", "3"], "Did you mean --steps"),
        (["txt2img", "x", "--steps", "many"], "--steps"),
        (["txt2img", "x", "--steps", "4.5"], "--steps: 4.5 is not a whole number"),
        (["txt2img", "x", "--variation-seed", "2.5"], "--variation-seed: 2.5 is not a whole number"),
        (["txt2img", "x", "--weights", "best"], "raw"),
        (["txt3img", "x"], "txt2img"),
        (["img2img", "x"], "image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_command_line_that_is_not_understood_exits_with_2(minisd, tokens, sentence):
    code, out, err = minisd(*tokens, model=None)
    assert (code, out) == (2, "")
    assert err.startswith("minisd: ")
    assert err.count("\n") == 1
    assert sentence.lower() in err.lower()


def test_faults_of_the_program_are_not_hidden(minisd, monkeypatch):
    monkeypatch.setattr("minisd.tasks.sampling.denoise", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        minisd("txt2img", "x")


def test_a_large_picture_says_what_it_takes_and_one_that_cannot_fit_is_refused_before_its_first_step(
    minisd, monkeypatch
):
    monkeypatch.setattr("minisd.runtime.memory.is_large", lambda _: True)
    _, _, said = minisd("txt2img", "a", "--steps", 1)
    assert re.search(r"about \d\.\d GB of memory: weights \d\.\d, then a step \d\.\d, decoding \d\.\d", said)
    monkeypatch.setattr("minisd.runtime.memory.available", lambda _: 1000)
    monkeypatch.setattr("minisd.pipeline.as_model", lambda *_: lambda *_: pytest.fail("a step was taken"))
    sentence = refused(minisd("txt2img", "a", "--steps", 1))
    assert "0.0 GB are free beside the weights: choose a smaller --batch-size" in sentence


def test_a_preview_replaces_neither_an_input_nor_a_result(minisd):
    picture().save("photo.png")
    before = Path("photo.png").read_bytes()
    assert "give the preview a name" in refused(minisd("img2img", "a", "photo.png", "--preview", "photo.png"))
    assert Path("photo.png").read_bytes() == before
    assert "give the preview a name" in refused(minisd("txt2img", "a", "--out", "b.png", "--preview", "b.png"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_a_lack_of_memory_is_one_sentence(minisd, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("minisd.tasks.sampling.denoise", fail)
    assert "the memory does not suffice" in refused(minisd("txt2img", "x"))


# --------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_leaves_whole_pictures_and_says_how_many(minisd, models):
    tokens = ["txt2img", "x", "--num-images", "1000", "--steps", "2", "--out", "many", "--grid", "sheet.png"]
    command = [sys.executable, "-m", "minisd", *tokens, "--checkpoint", str(models / "sd1.safetensors")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # a job in the background (`pytest &`) ignores Ctrl-C, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(3):
            assert process.stdout.readline().startswith("many")
        time.sleep(0.05)  # somewhere in the next picture
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    made = pngs("many")
    assert process.returncode == 130
    assert f"minisd: interrupted: {len(made)} of 1000 images are finished, in many\n" in err
    assert "Traceback" not in err
    assert 3 <= len(made) < 1000
    assert sorted(os.listdir("many")) == made  # no half files beside them
    assert all(pixels(f"many/{name}").shape == (32, 32, 3) for name in made)
    assert not Path("sheet.png").exists()


# ------------------------------------------------------------------------------------------- inspect, convert, plot


def test_inspect_prints_a_page_or_json_and_its_exit_code_tells(minisd):
    code, out, _ = minisd("inspect", "models/sd1.safetensors", "--verify")
    assert code == 0
    assert "a Stable Diffusion checkpoint" in out
    assert "checksums     match" in out
    code, out, _ = minisd("inspect", "models/sd2_v.safetensors", "--json")
    assert (code, json.loads(out)["prediction"]) == (0, "v")
    assert minisd("inspect", "models/nan.safetensors", "--verify")[0] == 1
    code, out, _ = minisd("inspect", "cat.png", "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_convert_there_and_back_is_the_same_model(minisd):
    assert minisd("convert", "models/sd1.safetensors", "new/folder")[0] == 0
    assert minisd("convert", "new/folder", "back.safetensors")[0] == 0
    assert Path("back.safetensors").read_bytes() == Path("models/sd1.safetensors").read_bytes()


def test_convert_changes_the_dtype_and_the_vae(minisd):
    half = ["--dtype", "float16", "--vae", "models/other.safetensors"]
    assert minisd("convert", "models/sd1.safetensors", "half.safetensors", *half)[0] == 0
    half, other = load_checkpoint("half.safetensors"), load_checkpoint("models/other.safetensors")
    weight = half.networks["vae"].quant_conv.weight
    assert weight.dtype == torch.float16
    assert torch.equal(weight, other.networks["vae"].quant_conv.weight.half())


def test_convert_refuses_to_overwrite_and_to_write_pickles(minisd):
    Path("folder").mkdir()
    Path("folder/mine").touch()
    Path("a.safetensors").touch()
    assert "a.safetensors exists already" in refused(minisd("convert", "models/sd1.safetensors", "a.safetensors"))
    assert "folder exists already" in refused(minisd("convert", "models/sd1.safetensors", "folder"))
    assert "name it a.safetensors" in refused(minisd("convert", "models/sd1.safetensors", "a.ckpt"))
    assert os.listdir("folder") == ["mine"]
    assert Path("a.safetensors").stat().st_size == 0
    assert minisd("convert", "models/sd1.safetensors", "a.safetensors", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    "tokens",
    [
        ["schedules", "linear", "cosine-zsnr"],
        ["noising", "cat.png", "--schedules", "linear", "cosine", "--steps", "3"],
        ["trajectory", "a red apple", "--steps", "3", "--panels", "2", "--checkpoint", "models/sd1.safetensors"],
        ["attention", "a red apple", "--steps", "1", "--checkpoint", "models/sd1.safetensors"],
    ],
    ids=lambda tokens: tokens[0],
)
def test_every_plot_writes_a_figure(minisd, tokens):
    pytest.importorskip("matplotlib")
    assert minisd("plot", *tokens, "--out", "new/figure.png")[:2] == (0, f"{Path('new/figure.png')}\n")
    assert pixels("new/figure.png").std() > 10
    assert "a figure is saved as" in refused(minisd("plot", *tokens, "--out", "figure.gif"))


# ----------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ALL)
def test_every_command_explains_itself_in_80_columns(command):
    out = run_alone(*command.split(), "--help", COLUMNS="80").stdout
    assert out.startswith(f"Usage: minisd {command} ")
    assert f"Examples:\n  minisd {command} " in out
    assert max(map(len, out.splitlines())) <= 80
    for noise in (" STR", " INT", " FLOAT", " BOOL", "[default: None]", "[default: False]", "[required]", "--no-"):
        assert noise not in out
    options = [line for line in out.splitlines() if line.startswith("│ --")]
    assert all(len(line[26:].strip("│ ")) > 3 for line in options), "an option without a word of help"


def test_every_option_of_a_task_is_there(minisd):
    out = minisd("txt2img", "--help", model=None)[1]
    labels = [re.split(r" {2,}", line)[0] for line in out.splitlines() if line.startswith(("│ --", "│ PROMPT"))]
    shown = {word for label in labels for word in re.findall(r"--[\w-]+|PROMPT", label)}
    names = [field.name for part in (Txt2Img, Model, Output) for field in fields(part)]
    aliases = {"--cfg", "--cfg-scale"}
    assert shown == {"PROMPT", "--prompts"} | aliases | {"--" + name.replace("_", "-") for name in names}


def test_torchrun_refuses_no_option_of_a_training(minisd):
    from torch.distributed.run import get_args_parser

    for command in ("mini", "ddpm", "lora", "dreambooth", "textual-inversion"):
        out = minisd("train", command, "--help", model=None)[1]
        options = [line.split()[1] for line in out.splitlines() if line.startswith("│ --")]
        assert "--out" in options
        for option in options:  # one that could be the beginning of torchrun's own
            typed = ["-m", "minisd", "train", command, "folder", option, "value"]
            assert get_args_parser().parse_args(typed).training_script_args[-2:] == [option, "value"]


@pytest.mark.parametrize("tokens", [["--help"], ["--version"], ["txt2img", "--help"], ["plot", "trajectory", "--help"]])
def test_help_is_quick_because_torch_stays_out(tokens):
    code = (
        "import sys; from minisd.cli import main; assert main(sys.argv[1:]) == 0;"
        "print(*{m.partition('.')[0] for m in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *tokens],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "PIL", "matplotlib", "safetensors"} & set(done.stderr.split())


def test_python_m_minisd_is_the_command_line():
    done = run_alone("--version")
    assert (done.returncode, done.stderr) == (0, "")
    done = run_alone("nothing")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_console_without_greek_is_no_reason_to_stop():
    done = run_alone("plot", "schedules", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "log-SNR over t" in done.stdout


def test_train_makes_a_model_and_goes_on_where_it_stopped(minisd):
    unet = ["unet.channels=16", "unet.channel_mult=[1,2]", "unet.num_heads=2", "unet.norm_groups=8"]
    quick = ["--set", "size=16", "loop.steps=2", "loop.batch_size=1", "schedule.num_timesteps=10", *unet]
    Path("photos").mkdir()
    picture().save("photos/a.png")
    code, out, err = minisd("train", "ddpm", "photos", "--quiet", *quick, model=None)
    assert (code, out) == (0, "ddpm/ddpm.safetensors\n"), err
    assert {path.name for path in Path("ddpm").iterdir()} >= {"config.json", "log.jsonl", "state.safetensors"}
    assert "choose another" in refused(minisd("train", "ddpm", ".", "--quiet", *quick, model=None))
    code, _, err = minisd("train", "ddpm", "photos", "--quiet", *quick, "loop.lr=0.5", model=None)
    assert code == 1
    assert "recipe.loop.lr was 0.0002, is 0.5. Give the old values" in err
