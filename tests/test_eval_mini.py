"""`minisd eval mini`: every measure on models and drawings whose score is known, then the command on a tiny model."""

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import checkpoint
from training_tiny import COLOURS, MODEL

from minisd.checkpoints.save import save_checkpoint
from minisd.cli import main
from minisd.cli.evaluate import FILES, drawings
from minisd.config import SD1
from minisd.eval import mini
from minisd.eval.drawings import Drawings, evenly
from minisd.eval.features import CLIPFeatures
from minisd.eval.report import spelled, table
from minisd.eval.sheets import COMMON, PROMPTS, captioned, shuffled
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.captions import with_article

STYLES = ("noto", "fluent", "flat", "twemoji")
QUICK = Txt2Img(steps=2, batch_size=8)
PLAN = mini.Plan(concepts=4, pictures=4, reconstructions=4)


def emoji(folder: Path, size: int = 16) -> Path:
    """A data set folder like the one that scripts/build_emoji.py makes: discs of 4 colours at 3 heights."""
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    records, pixels = [], []
    for colour, rgb in COLOURS.items():
        for place, height in (("high", -4), ("middle", 0), ("low", 4)):
            for n, style in enumerate(STYLES):
                concept, label = f"{place}-{colour}-disc", f"{place} {colour} disc"
                split = "unseen" if style == "twemoji" else "subject" if concept == "middle-red-disc" else "train"
                record = {"concept": concept, "style": style, "label": label, "tags": ["disc"], "group": "objects"}
                records.append(record | {"split": split})
                picture = np.zeros((size, size, 4), np.uint8)
                picture[..., :3], picture[..., 3] = rgb, 255 * (np.hypot(x, y - height) < 3 + n / 4)
                pixels.append(picture)
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", np.stack(pixels))
    (folder / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return emoji(tmp_path_factory.mktemp("data") / "emoji")


@pytest.fixture(scope="module")
def sets(data):
    return mini.Sets(*(drawings(data, 16, split) for split in ("train", "subject", "unseen")))


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.of(checkpoint(MODEL))


def of(rows, measure, start):
    (row,) = [row for row in rows if row.measure == measure and row.of.startswith(start)]
    return row


# ------------------------------------------------------------------------------------------------------------- drawings


def test_drawings_carry_concept_style_and_words_of_the_data_set(sets):
    assert (len(sets.train), len(sets.held_out), len(sets.unseen)) == (33, 3, 12)
    assert set(sets.train.styles) == {"noto", "fluent", "flat"}
    assert sets.held_out.words == ("a middle red disc",) * 3
    assert sets.train.captions()[0] == "a high red disc, noto style"
    assert sets.train.images.dtype == torch.uint8
    assert sets.train.images[0, :, 0, 0].tolist() == [255, 255, 255]  # transparent over white
    assert set(sets.train.of_style("flat").styles) == {"flat"}


def test_rows_are_spread_over_the_whole_and_never_twice():
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(3, 10) == [0, 1, 2]


def test_words_with_brackets_and_styles_in_them_are_told_apart(tmp_path):
    folder = emoji(tmp_path / "emoji")
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines[0] |= {"concept": "a-button (blood-type)", "label": "A button (blood type)"}
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first = drawings(folder, 16, "train").subset([0])
    assert (first.concepts[0], first.styles[0]) == ("a-button (blood-type)", "noto")
    assert first.words[0] == with_article("a button (blood type)")


# ------------------------------------------------------------------------------------------------------------- measures


def test_the_baseline_of_the_autoencoder_has_as_many_numbers_as_the_latents():
    assert mini.equal_side(SD1.vae, 128) == 18  # 3·18² = 972 for 4·16² = 1024
    flat = torch.full((1, 3, 64, 64), 0.25)
    torch.testing.assert_close(mini.reduced_and_enlarged(flat, 18), flat)


def test_reconstruction_measures_decoded_means_of_latents(sd, sets):
    rows = list(mini.reconstruction(sd, sets, PLAN))
    images = sets.held_out.images.float() / 127.5 - 1
    with torch.no_grad():
        decoded = sd.vae.decode(sd.vae.encode(images).mean).clamp(-1, 1)
    error = ((decoded + 1) * 127.5).round() - sets.held_out.images.float()
    psnr = 10 * torch.log10(255**2 / error.square().flatten(1).mean(1))
    row, baseline = (row for row in rows if row.measure == "PSNR" and row.of.startswith("held-out"))
    assert row.value == pytest.approx(psnr.mean().item(), abs=1e-3)
    assert (row.n, row.asked, baseline.kind) == (3, 29.0, "baseline")
    assert row.interval[0] <= row.value <= row.interval[1]
    assert {r.n for r in rows if r.of == "training drawings"} == {PLAN.reconstructions}


class Knowing(CLIPFeatures):
    """A CLIP that sees and reads the colour and the height of a disc, but of the shape of words nothing."""

    def __init__(self, sets):
        self.words = list(sets.unseen.words)
        self.by_picture = {}
        for _, some in sets:
            for image, words in zip(some.images, some.words, strict=True):
                self.by_picture[image.numpy().tobytes()] = words

    def images(self, images, **_):
        return torch.stack([self._one_hot(self.by_picture[image.numpy().tobytes()]) for image in images])

    def texts(self, prompts, **_):
        return torch.stack([self._one_hot(prompt.partition(",")[0]) for prompt in prompts])

    def _one_hot(self, words):
        return torch.eye(len(self.words))[self.words.index(words)]


def seen_by(clip, sets):
    return [clip.images(drawings.images) for _, drawings in sets]


def test_retrieval_of_a_clip_that_knows_is_perfect_and_of_one_that_sees_nothing_is_none(sets):
    knowing, blind = Knowing(sets), Knowing(sets)
    rows = list(mini.retrieval(knowing, sets, seen_by(knowing, sets)))
    assert {row.value for row in rows if row.kind == "measure"} == {1.0}
    assert of(rows, "image → text, top 1", "chance among 12").value == pytest.approx(1 / 12)
    blind._one_hot = lambda words: torch.ones(4)
    rows = mini.retrieval(blind, sets, seen_by(blind, sets))
    assert {row.value for row in rows if row.kind == "measure"} == {0.0}


def draws_instead(monkeypatch, sets, shift):
    """Every prompt gives the unseen vendor's drawing of the concept `shift` places on."""
    places = {words: i + shift for i, words in enumerate(sets.unseen.words)}

    def draw(sd, prompts, seed, settings, *, progress):
        return sets.unseen.images[[places[prompt.partition(",")[0]] % 12 for prompt in prompts]]

    monkeypatch.setattr(mini, "draw", draw)


@pytest.mark.parametrize(("shift", "hits"), [(0, 1.0), (5, 0.0)])
def test_the_judge_finds_what_was_drawn_right_and_not_what_was_drawn_wrong(sd, sets, monkeypatch, shift, hits):
    draws_instead(monkeypatch, sets, shift)
    rows = list(mini.generation(sets, mini.judged_pictures(sd, sets, PLAN, QUICK)))
    for prompts in ("with", "without"):
        row = of(rows, mini.NEAREST, f"drawn by prompts {prompts} a style, among 33 training drawings")
        assert (row.value, row.n) == (hits, 4)
    for real in ("noto drawings among fluent ones", "twemoji drawings among 33 training drawings"):
        assert of(rows, mini.NEAREST, real).value == 1
    assert of(rows, mini.NEAREST, "chance among 33").value == pytest.approx(1 - math.comb(30, 10) / math.comb(33, 10))


def test_copies_of_training_drawings_are_as_like_as_can_be_and_others_less(sets):
    train = sets.train
    copies = mini.Judged(["high-red-disc"], train.images[[5, 9]], sets.unseen.images[[5, 9]])
    rows = list(mini.memory(sets, copies))
    assert of(rows, mini.LIKENESS, "drawn by prompts with a style").value == pytest.approx(1, abs=1e-6)
    assert of(rows, mini.LIKENESS, "drawn by prompts without a style").value < 1 - 1e-4
    assert of(rows, mini.LIKENESS, "twemoji drawings of the same concepts").n == 1
    assert torch.equal(train.images[mini.nearest(train.images[[5, 9]], train)], train.images[[5, 9]])


def test_distances_are_zero_for_drawings_that_are_the_reference(sd, sets, monkeypatch):
    plan = replace(PLAN, pictures=12)
    clip = CLIPFeatures.of(sd)
    monkeypatch.setattr(mini, "draw", lambda *_, **__: sets.train.images)
    rows = list(mini.distances(sd, clip, sets, seen_by(clip, sets), plan, QUICK))
    assert of(rows, "Fréchet distance", "drawn → the 33 training drawings").value == pytest.approx(0, abs=1e-4)
    assert of(rows, "Fréchet distance", "drawn → the 12 of twemoji").value > 0
    assert [row.n for row in rows] == [12] * 5


def test_a_drawn_picture_has_the_seed_of_its_place_whatever_the_batches(sd):
    prompts = ["a red disc", "a blue disc", "a green disc"]
    together = mini.draw(sd, prompts, 5, QUICK)
    alone = mini.draw(sd, prompts[2:], 7, QUICK)
    assert together.shape == (3, 3, 16, 16)
    assert (together[2:].int() - alone.int()).abs().max() <= 1


# ----------------------------------------------------------------------------------------------------- sheets and table


def test_the_prompts_are_48_and_the_objects_20_of_which_no_two_are_alike():
    assert (len(set(PROMPTS)), len(set(COMMON))) == (48, 20)
    assert {"a blue apple", "a cat with a crown"} <= set(PROMPTS)
    assert sorted(shuffled(COMMON, 1)) == sorted(COMMON) != shuffled(COMMON, 1) == shuffled(COMMON, 1)


def test_a_sheet_has_room_for_the_words_below_each_picture():
    red = Image.new("RGB", (64, 64), "red")
    sheet = captioned([red] * 3, ["a", "a cat with a crown", "b"], columns=2)
    assert sheet.width == 128
    assert sheet.height == 2 * (64 + 2 * 13 + 4)
    assert np.asarray(sheet)[66:90, 64:].min() < 100  # ink
    assert np.asarray(sheet)[94:, 64:].min() == 255  # the fourth place is empty
    with pytest.raises(ValueError, match="1 pictures and 2 texts"):
        captioned([red], ["a", "b"], columns=2)


def test_the_table_spells_each_row_in_its_unit():
    rows = [mini.Row.mean("PSNR", "drawings", torch.tensor([30.0, 30.0]), unit="dB", asked=26.0)]
    rows.append(mini.Row("top 10", "chance", 0.0064, 0, unit="%", kind="baseline"))
    assert table(rows).splitlines()[2:] == [
        "| PSNR | drawings | 30.00 dB | 30.00 dB to 30.00 dB | 2 | ≥ 26.00 dB |",
        "| top 10 | *chance* | 0.6 % |  |  |  |",
    ]
    assert spelled(1.2345, "") == "1.234"


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "mini.safetensors"
    save_checkpoint(checkpoint(MODEL), path)
    return path


def run(capsys, *tokens):
    code = main(["eval", "mini", *map(str, tokens)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_writes_the_table_the_facts_and_the_sheets(data, model, tmp_path, capsys):
    quick = ["--steps", "2", "--concepts", "4", "--pictures", "6", "--seed", "3"]
    code, out, err = run(capsys, "--checkpoint", model, "--data", data, "--out", tmp_path / "e", *quick)
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == sorted(FILES)
    result = json.loads((tmp_path / "e" / "eval.json").read_text())
    page = (tmp_path / "e" / "eval.md").read_text()
    assert {row["measure"] for row in result["rows"]} >= {
        *("PSNR", "SSIM", "Fréchet distance"),
        *(mini.NEAREST, mini.LIKENESS, mini.HUE, mini.GROUND),
    }
    assert all(np.isfinite(row["value"]) for row in result["rows"])
    assert result["checkpoint"]["digest"] == "sha256:" + sha256(model.read_bytes()).hexdigest()
    assert (result["plan"]["seed"], result["settings"]["steps"], result["data"]["training drawings"]) == (3, 2, 33)
    assert out.split("\n\n")[0].splitlines()[0] in page
    assert result["feature_space"] in page
    key = (tmp_path / "e" / "name_these.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[2] for line in key) == sorted(COMMON)
    assert Image.open(tmp_path / "e" / "prompts.png").width == 8 * 16

    code, _, err = run(capsys, "--checkpoint", model, "--data", data, "--out", tmp_path / "e", *quick)
    assert code == 1
    assert "eval.json exists already: choose another name, or add --overwrite" in err


def test_folders_that_are_no_data_set_are_refused(model, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for folder in ("photos", "nothing"):
        code, _, err = run(capsys, "--checkpoint", model, "--data", tmp_path / folder, "--out", tmp_path / "e")
        assert (code, err.count("\n")) == (1, 1)
        assert f"{folder} is no data set of scripts/build_emoji.py (it has no images.npy): give --data FOLDER" in err
    assert not (tmp_path / "e").exists()


def test_a_data_set_of_another_size_is_refused(model, tmp_path, capsys):
    folder = emoji(tmp_path / "large", size=32)
    code, _, err = run(capsys, "--checkpoint", model, "--data", folder, "--out", tmp_path / "e")
    assert code == 1
    assert "holds pictures of 32 px, the recipe wants 16" in err


def test_a_model_without_a_vision_tower_is_refused(data, tmp_path, capsys):
    made = checkpoint("SD1")
    save_checkpoint(made, tmp_path / "sd1.safetensors")
    code, _, err = run(capsys, "--checkpoint", tmp_path / "sd1.safetensors", "--data", data, "--out", tmp_path / "e")
    assert code == 1
    assert "has no vision tower to judge pictures by: take a checkpoint that minisd trained" in err


def test_measuring_refuses_drawings_of_another_size_and_too_few_of_them(sd, sets):
    small = Drawings(sets.train.images[..., :8, :8], sets.train.concepts, sets.train.styles, sets.train.words)
    with pytest.raises(ValueError, match="training drawings have 8×8 pixels, tiny draws 16: make them equal"):
        mini.measure(sd, replace(sets, train=small), PLAN, QUICK)
    with pytest.raises(ValueError, match="concepts is 1: two are the least"):
        mini.Plan(concepts=1)
