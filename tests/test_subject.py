"""A subject from a few photos: what is read of them, what the loss is, and what each method moves and writes."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from subject_tiny import CONFIGS, LOOP, PRIOR, RUN, SUBJECT, VALIDATION, model, photos, train
from tiny import checkpoint
from training_tiny import MODEL

import minisd
from minisd.adapters.lora import load_lora
from minisd.checkpoints.save import save_checkpoint
from minisd.cli import main
from minisd.cli.personalise import check_free
from minisd.eval.comparison import (
    CEILING,
    FLOOR,
    NO_PRIOR,
    OTHERS,
    SECONDS,
    TRANSFER,
    Comparison,
    compare,
    cut_out,
    images_of,
)
from minisd.eval.comparison_page import contact_sheet, table
from minisd.eval.features import CLIPFeatures
from minisd.eval.subject import SubjectScorer
from minisd.models.unet import Conditioning
from minisd.stable_diffusion import StableDiffusion
from minisd.tasks import Txt2Img
from minisd.training.draws import Draws
from minisd.training.options import TrainingRun
from minisd.training.parallel import ALONE
from minisd.training.progress import read_log
from minisd.training.subject import METHODS, load_method
from minisd.training.subject.config import SubjectConfig, prompts_of
from minisd.training.subject.lora import LoRAConfig, LoRALayer, add_layers
from minisd.training.subject.method import Method
from minisd.training.subject.photos import Views, load_photos, near_duplicates
from minisd.training.subject.prior import class_samples
from minisd.training.subject.recipe import SubjectRecipe
from minisd.training.subject.validation import best_step
from minisd.training.weights import copied

HERE = Path(__file__).parent
DUCK = HERE.parent / "weights" / "subjects" / "duck"
STATE = "state.safetensors"


def picture(path: Path, size=(40, 30), *, seed=0, **options) -> Path:
    """Blobs of noise, so that no two are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.NEAREST).save(path, **options)
    return path


def half_mask(path: Path, size=(40, 30)) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


def bits(sd) -> dict[str, torch.Tensor]:
    networks = {"unet": sd.unet, "text": sd.text_encoder, "vae": sd.vae}
    return {f"{n}.{name}": t.clone() for n, network in networks.items() for name, t in network.state_dict().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------------- photos


def test_photos_are_upright_and_opaque_with_their_captions_and_masks(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture(tmp_path / "a.jpg", (40, 30), exif=exif)
    Image.new("RGBA", (30, 40), (255, 0, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("in the garden\n\nat night\n")
    half_mask(tmp_path / "a.mask.png", (30, 40))
    half_mask(tmp_path / "b.mask.png", (30, 40))
    loaded = load_photos(tmp_path, 16)
    assert loaded.names == ("a.jpg", "b.png")
    assert loaded.captions == (("in the garden", "at night"), ())
    assert loaded.pixels.shape == (2, 1, 16, 16, 3)
    assert (loaded.pixels[1] == 255).all()
    assert loaded.masks[0, 0, :, 9:].all()
    assert not loaded.masks[0, 0, :, :7].any()


def test_masks_come_from_a_folder_too_and_one_alone_is_refused(tmp_path):
    assert load_photos(DUCK / "train", 32, masks=DUCK / "masks" / "train").masks.mean() == pytest.approx(0.25, abs=0.1)
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", seed=1)
    half_mask(tmp_path / "b.mask.png")
    with pytest.raises(ValueError, match=r"1 of 2 photos have no mask, first: a\.png"):
        load_photos(tmp_path, 16)
    half_mask(tmp_path / "a.mask.png", (10, 10))
    with pytest.raises(ValueError, match=r"a\.mask\.png: the mask is 10×10, the image 40×30"):
        load_photos(tmp_path, 16)


def test_random_views_are_of_the_seed_and_mirrors_follow_them(tmp_path):
    picture(tmp_path / "a.png")
    half_mask(tmp_path / "a.mask.png")
    views = Views(crop="random", count=3, flip=True)
    loaded, again, other = (load_photos(tmp_path, 16, views, seed=seed) for seed in (0, 0, 1))
    assert loaded.pixels.shape == (1, 6, 16, 16, 3)
    assert loaded.digest == again.digest != other.digest
    assert len({view.tobytes() for view in loaded.pixels[0]}) == 6
    for stack in (loaded.pixels[0], loaded.masks[0]):
        assert np.array_equal(stack[3:], stack[:3, :, ::-1])


def test_a_whole_photo_has_white_at_its_sides(tmp_path):
    Image.new("RGB", (40, 20), "black").save(tmp_path / "a.png")
    grey = load_photos(tmp_path, 16, Views(crop="whole")).pixels[0, 0, :, 8, 0]
    assert (grey[:3] > 250).all()  # Lanczos overshoots by a level or two
    assert (grey[6:10] < 5).all()
    with pytest.raises(ValueError, match="3 views of crop 'whole' would all be the same"):
        Views(crop="whole", count=3)


def test_copies_of_a_photo_are_named_and_views_of_a_subject_are_not(tmp_path):
    image = Image.open(DUCK / "train" / "00.png")
    image.save(tmp_path / "first.png")
    image.resize((90, 90)).save(tmp_path / "scaled.jpg", quality=60)
    with pytest.warns(UserWarning, match=r"first\.png and scaled\.jpg are nearly the same"):
        load_photos(tmp_path, 16)
    assert not near_duplicates([Image.open(path) for path in sorted((DUCK / "train").glob("*.png"))])


def test_what_is_no_photo_is_left_out_by_name_and_nothing_at_all_is_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with (
        pytest.warns(UserWarning, match=r"left out: .*broken\.png"),
        pytest.raises(ValueError, match="holds no images that can be read"),
    ):
        load_photos(tmp_path, 16)


def test_captions_follow_the_prompt_unless_they_name_the_subject():
    prompts = ["a {}", "one {}"]
    assert prompts_of((), prompts, "sks dog", "sks") == ["a sks dog", "one sks dog"]
    captions = ("asleep", "my sks dog", "a photo of {} {x}")
    assert prompts_of(captions, prompts, "sks dog", "sks") == [
        "a sks dog, asleep", "one sks dog, asleep", "my sks dog", "a photo of sks dog {x}"
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- prior


def test_class_pictures_are_drawn_once_and_taken_up_where_they_were_left(tmp_path):
    sd = model()
    first = class_samples(sd, tmp_path, "dog", PRIOR, ALONE, quiet=True)
    (place,) = tmp_path.iterdir()
    assert place.name.startswith("a-dog-")
    (place / "00002.png").unlink()
    kept = (place / "00000.png").stat().st_mtime_ns
    again = class_samples(sd, tmp_path, "dog", PRIOR, ALONE, quiet=True)
    assert again.digest == first.digest
    assert (place / "00000.png").stat().st_mtime_ns == kept
    assert first.pixels.shape == (3, 1, 16, 16, 3)
    assert class_samples(sd, tmp_path, "dog", replace(PRIOR, weight=0.0), ALONE) is None


# ----------------------------------------------------------------------------------------------------------- loss


def recipe(tmp_path, **options) -> SubjectRecipe:
    config = options.pop("config", SUBJECT)
    given = options.pop("photos", photos())
    return SubjectRecipe("test", model(), config, given, tmp_path, phrase="x dog", precision="float32", **options)


def draws(n: int, step: int = 0) -> Draws:
    return Draws(0, step, n, slice(0, n))


def test_the_loss_is_that_of_the_subject_and_lambda_times_that_of_the_class(tmp_path):
    found = recipe(tmp_path, class_photos=photos(2, 1, seed=1), prior_weight=0.3).loss(torch.arange(3), draws(3))
    assert found["loss"].item() == pytest.approx(found["subject"].item() + 0.3 * found["prior"].item())
    assert set(recipe(tmp_path / "b").loss(torch.arange(3), draws(3))) == {"loss"}


def test_the_class_is_shown_with_the_class_word_and_the_subject_with_its_own(tmp_path):
    made = recipe(tmp_path, class_photos=photos(2, 1, seed=1))
    batch = made.batch(torch.arange(3), draws(3))
    assert [made.prompts[row] for row in batch.prompt] == ["a x dog"] * 3 + ["a dog"] * 3


def test_errors_outside_the_mask_do_not_count(tmp_path):
    made = recipe(tmp_path, photos=photos(masks=True))
    batch = made.batch(torch.arange(3), draws(3))
    target = made.sd.schedule.v_target(batch.x_0, batch.t, batch.noise)
    outside, inside = target.clone(), target.clone()
    outside[..., :4] += 1  # the masks of the test are white on the right half
    inside[..., 4:] += 1
    losses = []
    for output in (outside, inside):
        made.sd.unet = lambda x_t, t, cond, output=output: output
        losses.append(made.errors(batch))
    assert losses[0].abs().max() < 1e-10
    torch.testing.assert_close(losses[1], torch.ones(3))  # a mean over the mask, however small it is


def test_the_best_step_is_good_at_both():
    lines = [
        {"step": 1, "CLIP-I": 0.5, "CLIP-T": 0.30},
        {"step": 2, "CLIP-I": 0.8, "CLIP-T": 0.25},
        {"step": 3, "CLIP-I": 0.9, "CLIP-T": 0.10},
    ]
    assert best_step(lines) == 2
    assert best_step([{**line, "DINO": 1.0} for line in lines]) == 1


def test_a_training_ends_with_its_best_weights_and_a_curve_of_the_scores(tmp_path):
    calls = []

    def scores(images, prompts, *, class_images):
        assert prompts == ["a dog"] * 2
        assert len(images) == len(class_images) == 2
        calls.append(images)
        return {"CLIP-I": {2: 0.9}.get(len(calls), 0.5), "CLIP-T": 0.3, "PRES": 0.1, "DIV": 0.2}

    run = replace(RUN, sample_every=1)
    best = train("lora", tmp_path / "a", run=run, scorer=scores)
    short = replace(CONFIGS["lora"], loop=replace(LOOP, steps=2))
    two = train("lora", tmp_path / "b", config=short)
    assert all(torch.equal(best[name].up, two[name].up) for name in two)
    lines = [json.loads(line) for line in (tmp_path / "a" / "scores.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert (tmp_path / "a" / "scores.png").exists()


# ------------------------------------------------------------------------------------------- what moves, what is saved


def test_dreambooth_moves_the_unet_alone_and_its_file_is_a_whole_model(tmp_path):
    sd = model()
    before = bits(sd)
    learnt = train("dreambooth", tmp_path, sd)
    assert same(bits(sd), before)
    loaded = minisd.load(tmp_path / "model.safetensors")
    assert same(bits(loaded), bits(learnt))
    moved = {name.partition(".")[0] for name, tensor in bits(learnt).items() if not torch.equal(tensor, before[name])}
    assert moved == {"unet"}
    with_text = replace(CONFIGS["dreambooth"], text_encoder=True)
    learnt = train("dreambooth", tmp_path / "text", sd, config=with_text)
    assert not torch.equal(learnt.text_encoder.final_norm.weight, sd.text_encoder.final_norm.weight)


def test_a_model_of_a_small_vocabulary_learns_a_word_and_still_tells_unknown_ones(tmp_path):
    sd = model()
    sd.text_encoder.config = replace(sd.text_encoder.config, unknown_id=100)
    sd.config = replace(sd.config, text=sd.text_encoder.config)
    with torch.no_grad():
        table = sd.text_encoder.token_embedding.weight
        table[sd.tokenizer.encode("xylophone")] = table[100].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors = train("textual inversion", tmp_path, sd)  # draws its sheets on the way
    sd.add_embedding("<my-dog>", vectors)
    assert sd.unknown_words("a <my-dog> with a xylophone") == ["xylophone"]


def test_textual_inversion_moves_only_its_own_rows(tmp_path):
    sd = model()
    before = bits(sd)
    config = CONFIGS["textual inversion"]
    vectors = train("textual inversion", tmp_path, sd, config=replace(config, loop=replace(LOOP, weight_decay=0.5)))
    plain = train("textual inversion", tmp_path / "plain", sd)
    assert same(bits(sd), before)
    assert torch.equal(vectors, plain)  # weight decay has nothing to take hold of
    start = sd.text_encoder.token_embedding.weight[sd.tokenizer.encode("dog")]
    assert (vectors - start).norm(dim=1).min() > 1e-3
    for name in ("my-dog.safetensors", "my-dog.pt", "my-dog-kohya.safetensors"):
        one = model()
        one.load_embedding(tmp_path / name, token="<my-dog>")
        rows = one.text_encoder.token_embedding.weight
        assert torch.equal(rows[-2:], vectors)
        assert torch.equal(rows[:-2], before["text.token_embedding.weight"])


def test_the_word_means_after_training_what_it_meant_while_it_learned(tmp_path, monkeypatch):
    seen = {}
    sheet = SubjectRecipe.sheet
    monkeypatch.setattr(SubjectRecipe, "sheet", lambda self, step: seen.update(me=self) or sheet(self, step))
    train("textual inversion", tmp_path)
    sd = model()
    sd.load_embedding(tmp_path / "my-dog.safetensors")
    prompt = "a <my-dog> in the snow"
    assert torch.equal(sd.encode_prompt(prompt).context, seen["me"].sd.encode_prompt(prompt).context)


@pytest.mark.parametrize("file", ["lora.safetensors", "lora-peft.safetensors"])
def test_a_lora_file_gives_the_model_that_was_trained(tmp_path, monkeypatch, file):
    seen = {}
    sheet = SubjectRecipe.sheet
    monkeypatch.setattr(SubjectRecipe, "sheet", lambda self, step: seen.update(me=self) or sheet(self, step))
    sd = model()
    before = bits(sd)
    train("lora", tmp_path, sd)
    assert same(bits(sd), before)
    sd.load_lora(tmp_path / file)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 70])
    ids = sd.tokenizer(["a sks dog", "a cat"])
    with torch.no_grad():
        ours, trained = (m.unet(x, t, Conditioning(m.text_encoder(ids))) for m in (sd, seen["me"].sd))
        plain = model().unet(x, t, Conditioning(model().text_encoder(ids)))
    torch.testing.assert_close(ours, trained, atol=2e-6, rtol=1e-5)  # float32: W + ΔW rounded once, or added later
    assert (ours - plain).abs().max() > 1e-4


def test_a_pattern_that_fits_no_layer_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'\*\.atn\*' fits no layer of the UNet; .*end in .*to_q"):
        add_layers(copied(model().unet, learn=False), ["*.atn*"], 2, 2.0)


def test_every_kind_of_layer_begins_as_it_was_and_fits_its_merged_form():
    network = copied(model().unet, learn=False)
    x, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 5, 16))
    before = network(x, 3, cond)
    layers = add_layers(network, ["*"], 2, 1.0)
    assert {type(layer.layer).__name__ for layer in layers.values()} >= {"Linear", "Conv2d", "Conv3x3", "PointwiseConv"}
    assert torch.equal(network(x, 3, cond), before)
    merged = copied(model().unet, learn=False)
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.up.weight, std=0.1)
        weight = merged.get_submodule(name).weight
        weight.data += layer.low_rank().delta().view_as(weight)
    torch.testing.assert_close(network(x, 3, cond), merged(x, 3, cond), atol=1e-5, rtol=1e-4)


def test_frozen_weights_in_bfloat16_are_what_autocast_makes_of_them():
    unet, halved = (copied(model().unet, learn=False, half=half) for half in (False, True))
    assert halved.conv_in.weight.dtype == torch.bfloat16
    assert halved.norm_out.weight.dtype == torch.float32
    x, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 5, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(halved(x, 3, cond), unet(x, 3, cond))


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_learns_in_bfloat16_what_it_learns_in_float32(tmp_path, method):
    half = replace(CONFIGS[method], loop=replace(LOOP, precision="bfloat16"))
    train(method, tmp_path / "half", config=half)
    train(method, tmp_path / "full")
    losses = [[line["loss"] for line in read_log(tmp_path / name / "log.jsonl")] for name in ("half", "full")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_model_that_wants_more_than_a_prompt_is_refused(tmp_path):
    unet = replace(MODEL.unet, in_channels=9)
    sd = StableDiffusion.of(checkpoint(replace(MODEL, task="inpainting", unet=unet, vision=None)))
    with pytest.raises(ValueError, match="is an inpainting model"):
        train("lora", tmp_path, sd)


def test_copies_that_learn_are_their_own_and_frozen_ones_take_no_memory():
    unet = model().unet
    frozen, learning = copied(unet, learn=False), copied(unet, learn=True)
    assert frozen.conv_in.weight.data_ptr() == unet.conv_in.weight.data_ptr() != learning.conv_in.weight.data_ptr()
    assert not frozen.conv_in.weight.requires_grad
    assert learning.conv_in.weight.requires_grad
    assert isinstance(LoRALayer(frozen.conv_in, 2, 2.0).weight, torch.nn.Parameter)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_copies_share_what_keeps_its_dtype_and_lay_out_the_rest(source):
    plain = model().unet.to(source)
    unet, values = copied(plain, learn=True).to(source), {name: w.clone() for name, w in plain.state_dict().items()}
    halved, whole = copied(unet, learn=False, half=True), copied(unet, learn=False)
    learning = copied(unet, learn=True)
    norms = unet.norm_out.weight.dtype == torch.float32
    for name, weight in unet.named_parameters():
        own, shared = weight.data_ptr(), source == torch.float32
        matrix = "norm" not in name and name.endswith("weight")
        assert (whole.get_parameter(name).data_ptr() == own) == shared, name
        assert (halved.get_parameter(name).data_ptr() == own) == (source == torch.bfloat16 if matrix else norms), name
        assert torch.equal(weight, values[name])
        for copy in (halved, whole, learning):
            found = copy.get_parameter(name)
            assert torch.equal(found, values[name].to(found.dtype))
            assert found.ndim < 4 or found.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------- resuming


def test_trainings_that_were_killed_end_with_the_bits_of_those_that_were_not(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / "subject_tiny.py"), str(tmp_path / "killed"), "rename", "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for method in CONFIGS:
        train(method, tmp_path / method)
        for path in (tmp_path / method).glob("*.safetensors"):
            assert (tmp_path / "killed" / method / path.name).read_bytes() == path.read_bytes(), path


def test_saving_memory_changes_no_bit_of_the_result(tmp_path):
    config = CONFIGS["lora"]
    saving = replace(config, subject=replace(config.subject, gradient_checkpointing=True))
    plain, saved = train("lora", tmp_path / "a"), train("lora", tmp_path / "b", config=saving)
    assert all(torch.equal(plain[name].up, saved[name].up) for name in plain)


def test_a_lora_of_another_base_does_not_take_up_a_training(tmp_path):
    train("lora", tmp_path)
    with pytest.raises(ValueError, match="is of another training: base was"):
        train("lora", tmp_path, StableDiffusion.of(_changed(model())))


def _changed(sd):
    with torch.no_grad():
        sd.unet.conv_out.bias += 1
    return sd.checkpoint


# ----------------------------------------------------------------------------------------------------- comparison


def scores_of(value: float) -> dict[str, float]:
    return {"CLIP-I": value, "CLIP-T": 0.3, "PRES": 1 - value, "DIV": 0.1}


def test_the_table_has_means_and_the_paired_distances_from_the_floor():
    found = {
        name: {
            FLOOR: scores_of(floor),
            CEILING: {"CLIP-I": 0.9, "CLIP-T": 0.3, "DIV": 0.1},
            "lora": scores_of(floor + 0.2),
            "dreambooth": scores_of(floor + 0.3),
            NO_PRIOR: scores_of(floor + 0.1),
        }
        for name, floor in (("a", 0.1), ("b", 0.5))
    }
    lines = table(found).splitlines()
    assert lines[0].startswith("|  | CLIP-I (higher is better) | CLIP-T (higher is better) | PRES (lower is better)")
    assert lines[2].startswith("| untouched model | 0.300 [0.100, 0.500] |")
    assert lines[3] == "| real views | 0.900 [0.900, 0.900] | 0.300 [0.300, 0.300] | - | 0.100 [0.100, 0.100] |"
    # paired: how hard a subject is cancels
    assert "| lora | +0.200 [+0.200, +0.200] | +0.000 [+0.000, +0.000] | -0.200 [-0.200, -0.200] |" in "\n".join(lines)
    assert lines[-1].startswith("| dreambooth, less that without prior | +0.200 [+0.200, +0.200] |")


def test_a_comparison_that_was_stopped_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    sd = StableDiffusion.of(checkpoint(MODEL))
    scorer_for = partial(SubjectScorer, CLIPFeatures.of(sd))
    settings = Txt2Img(steps=1, batch_size=2)
    plan = Comparison(("{}",), 2, 2, 2, settings, class_prior=2, train_steps=1)
    arguments = (sd, DUCK, "bird", tmp_path / "duck", plan, scorer_for, TrainingRun(quiet=True, sample_every=0))
    train = Method.train
    monkeypatch.setattr(Method, "train", lambda self, *a, **k: 1 / (self.name != "dreambooth") and train(self, *a, **k))
    with pytest.raises(ZeroDivisionError):
        compare(*arguments)
    monkeypatch.undo()
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "duck").glob("*/scores.json")}
    kept = {"untouched-model", "real-views", "other-vendors-drawings", "textual-inversion", "lora"}
    assert {path.parent.name for path in first} == kept
    rows = compare(*arguments)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert list(rows) == [FLOOR, CEILING, OTHERS, "textual inversion", "lora", "dreambooth", NO_PRIOR]
    drawn = {"CLIP-I", TRANSFER, "CLIP-T", "PRES", "DIV", SECONDS}
    assert all(rows[name].keys() == drawn for name in rows if name not in (CEILING, OTHERS))
    assert all(scores[SECONDS] > 0 for scores in rows.values())
    assert TRANSFER not in rows[OTHERS]  # they would be judged by themselves
    by_others = scorer_for(images_of(load_photos(DUCK / "other", sd.config.image_size)))
    views = load_photos(DUCK / "train", sd.config.image_size, masks=DUCK / "masks" / "train").first(2)
    seen = images_of(cut_out(views))
    assert rows[CEILING][TRANSFER] == pytest.approx(by_others.each(seen, "bird")["CLIP-I"].mean().item(), abs=1e-5)
    assert contact_sheet(tmp_path, {"duck": DUCK}, {"duck": rows}).width == 7 * 128


def test_a_comparison_learns_and_judges_what_masks_show_and_begins_again_where_anything_is_changed(
    tmp_path, monkeypatch
):
    sd, asked = StableDiffusion.of(checkpoint(MODEL)), []
    shutil.copytree(DUCK, tmp_path / "duck")
    plan = Comparison(("{}",), 2, 2, 2, Txt2Img(steps=1, batch_size=2), class_prior=2, train_steps=1)
    clip = CLIPFeatures.of(sd)

    def scorer_for(pictures):
        asked.append(pictures)
        return SubjectScorer(clip, pictures)

    def learn(method, sd, photos, *_, **__):
        asked.append(photos)
        return torch.zeros(4, sd.config.text.width)

    monkeypatch.setattr(Method, "train", learn)
    monkeypatch.setattr(Comparison, "lessons", lambda self, every=Comparison.lessons: every(self)[:1])

    def run():
        asked.clear()
        compare(
            sd, tmp_path / "duck", "bird", tmp_path / "out", plan, scorer_for, TrainingRun(quiet=True, sample_every=0)
        )
        return asked

    test, other, photos = run()
    assert len(photos) == plan.views
    corner = [picture.getpixel((0, 0)) for picture in (*test, *other, *images_of(photos))]
    assert len(test) == 4
    assert set(corner) == {(255, 255, 255)}  # the grounds are no part of the duck
    assert len(run()) == 2  # nothing is learnt again
    for changed in ("other/fluent.png", "masks/test/00.png", "train/00.txt"):
        place = tmp_path / "duck" / changed
        if place.suffix == ".txt":
            place.write_text("{} asleep")
        else:
            Image.open(place).rotate(180).save(place)
        assert len(run()) == 3, changed
    shutil.rmtree(tmp_path / "duck" / "masks" / "test")
    with pytest.raises(ValueError, match=r"masks of train/ or of test/: give both or none"):
        run()


def test_the_table_pairs_only_subjects_that_have_both_rows():
    lora = {"x": 0.3, "y": 0.9}
    found = {
        name: {FLOOR: scores_of(0.1), **({"lora": scores_of(lora[name])} if name in lora else {})} for name in "xyz"
    }
    assert "| lora | +0.500 [+0.200, +0.800] |" in table(found)
    assert "| untouched model | 0.100 [0.100, 0.100] |" in table(found)


def test_the_command_writes_the_table_what_its_words_mean_and_a_sheet(tmp_path, monkeypatch, capsys):
    quick = partial(Comparison, ("{}",), 2, 2, 2, Txt2Img(steps=1, batch_size=2), class_prior=2)
    monkeypatch.setattr("minisd.eval.comparison.Comparison", quick)
    save_checkpoint(StableDiffusion.of(checkpoint(MODEL)).checkpoint, tmp_path / "tiny.safetensors")
    line = ["eval", "subjects", "duck", "--data", str(DUCK.parent), "--out", str(tmp_path / "out")]
    assert main([*line, "--train-steps", "1", "--checkpoint", str(tmp_path / "tiny.safetensors")]) == 0
    page = (tmp_path / "out" / "subjects.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert all(f"| {row} |" in page for row in (FLOOR, CEILING, OTHERS, "textual inversion", "lora", NO_PRIOR))
    assert "lora 1 × 4 at 0.001" in page
    assert list(json.loads((tmp_path / "out" / "subjects.json").read_text())["scores"]) == ["duck"]
    assert Image.open(tmp_path / "out" / "subjects.png").width == 7 * 128
    assert main([*line, "goose"]) == 1
    assert "goose is no subject of" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model, and photos of a cat."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(model().checkpoint, tmp_path / "tiny.safetensors")
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "cat" / "b.png", seed=1)
    return tmp_path


def test_a_small_model_is_taught_by_the_plan_for_one_and_a_large_one_by_the_methods_own(folder, capsys, monkeypatch):
    start = ["train", "lora", "cat", "--class", "cat", "--checkpoint", "tiny.safetensors", "--quiet"]

    def planned(out: str, *more: str) -> dict:
        assert main([*start, "--out", out, "--set", *QUICK, *more]) == 0
        return json.loads((folder / out / "lora.json").read_text())["config"]

    small = planned("small")
    assert "small model, small preset: 2 steps, lr 0.001" in capsys.readouterr().err
    own = LoRAConfig(SubjectConfig("sks", "cat"))
    plan = own.for_small_model()
    assert (small["rank"], tuple(small["unet"]), small["loop"]["lr"]) == (plan.rank, plan.unet, plan.loop.lr)
    assert planned("told", "rank=3")["rank"] == 3
    other = replace(own, loop=replace(own.loop, seed=7), prior=replace(own.prior, weight=0.0))
    kept = other.for_small_model()
    assert (kept.loop.seed, kept.prior.weight) == (7, 0.0)
    capsys.readouterr()
    monkeypatch.setattr("minisd.training.subject.small.SMALL", 0)
    large = planned("large")
    assert "small preset" not in capsys.readouterr().err
    assert (large["rank"], tuple(large["unet"]), large["loop"]["lr"]) == (own.rank, own.unet, own.loop.lr)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main(["train", "lora", "--config", "large/lora.json", "--out", "again", "--quiet"]) == 0
    assert json.loads((folder / "again" / "lora.json").read_text())["config"] == large
    assert "small preset" not in capsys.readouterr().err


QUICK = ["loop.steps=2", "prior.count=2", "prior.settings.steps=1", "subject.validation.steps=1"]


def test_one_file_says_how_a_subject_was_learnt_and_runs_it_again(folder, capsys):
    start = ["train", "lora", "cat", "--class", "cat", "--checkpoint", "tiny.safetensors", "--quiet"]
    assert main([*start, "--out", "first", "--set", *QUICK, "rank=3"]) == 0
    assert capsys.readouterr().out.split() == ["first/lora-peft.safetensors", "first/lora.safetensors"]
    said = json.loads((folder / "first" / "lora.json").read_text())
    assert said["config"]["rank"] == 3
    assert said["config"]["subject"]["token"] == "sks"
    assert said["versions"].keys() == {"minisd", "torch", "python"}
    assert said["inputs"]["hashes"].keys() == {"checkpoint", "a.png", "b.png"}
    assert main(["train", "lora", "--config", "first/lora.json", "--out", "again", "--quiet"]) == 0
    assert (folder / "again" / "lora.safetensors").read_bytes() == (folder / "first" / "lora.safetensors").read_bytes()
    assert len(load_lora("again/lora.safetensors", model().loras.networks)) > 4
    picture(folder / "cat" / "b.png", seed=2)
    assert main(["train", "lora", "--config", "first/lora.json", "--out", "other", "--quiet"]) == 0
    assert "note: b.png is not what it was in first/lora.json" in capsys.readouterr().err


def test_plain_options_are_fields_and_set_has_the_last_word(folder):
    start = ["train", "lora", "cat", "--class", "cat", "--checkpoint", "tiny.safetensors", "--quiet"]
    plain = ["--steps", "9", "--rank", "3", "--lr", "0.5", "--batch-size", "2", "--seed", "5"]
    assert main([*start, *plain, "--set", *QUICK, "prior.weight=0"]) == 0
    config = json.loads((folder / "lora" / "lora.json").read_text())["config"]
    assert (config["rank"], config["loop"]["steps"], config["loop"]["lr"]) == (3, 2, 0.5)
    assert (config["loop"]["batch_size"], config["loop"]["seed"]) == (2, 5)


def test_a_run_that_was_written_under_the_old_names_of_fields_is_run_again(folder):
    start = ["train", "lora", "cat", "--class", "cat", "--checkpoint", "tiny.safetensors", "--quiet"]
    assert main([*start, "--out", "first", "--set", *QUICK, "prior.weight=0"]) == 0
    record = json.loads((folder / "first" / "lora.json").read_text())
    record["config"]["loop"]["accumulate"] = record["config"]["loop"].pop("gradient_accumulation")
    record["config"]["subject"]["recompute"] = record["config"]["subject"].pop("gradient_checkpointing")
    (folder / "first" / "lora.json").write_text(json.dumps(record))
    assert main(["train", "lora", "--config", "first/lora.json", "--out", "again", "--quiet"]) == 0
    assert (folder / "again" / "lora.safetensors").read_bytes() == (folder / "first" / "lora.safetensors").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_command_and_has_a_preset_for_small_models(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    taught = load_method(name)
    config = taught.config(SubjectConfig("sks", "cat"))
    assert type(config.for_small_model()) is taught.config
    assert main(["train", taught.command, "--help"]) == 0
    assert f"[{config.loop.steps}; small models {config.for_small_model().loop.steps}]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="unknown method 'loha'; known: textual-inversion, lora, dreambooth"):
        load_method("loha")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("lora", "PHOTOS is missing: minisd train lora PHOTOS --token TOKEN --class WORD"),
        ("lora cat", "--class is missing"),
        ("textual-inversion cat --class cat", "--token is missing"),
        ("lora dog --class cat", "dog: there is no such folder of photos"),
        ("lora cat --class cat --set loop.stepz=3", "has no field 'stepz'"),
        ("lora cat --class cat --set rank=0", "rank=0, alpha=None: both are above 0"),
        ("textual-inversion cat --class cat --token dog", "'dog' is a word of CLIP's vocabulary"),
        ("dreambooth cat --class cat --set 'subject.prompts=[\"sks\"]'", "the prompt 'sks' needs one {}"),
    ],
)
def test_what_a_training_cannot_do_is_told_in_a_sentence(folder, capsys, command, sentence):
    import shlex

    tokens = ["train", *shlex.split(command), "--checkpoint", "tiny.safetensors", "--quiet"]
    assert main(tokens) == 1
    assert sentence in capsys.readouterr().err


def test_validation_prompts_have_a_place_for_the_subject():
    with pytest.raises(ValueError, match=r"needs one \{\}"):
        replace(SUBJECT, validation=replace(VALIDATION, prompts=("a dog",)))


def test_a_caption_names_the_token_as_a_word_only():
    assert prompts_of(["My SKS dog", "a cat asks for food"], ["a {}"], "sks dog", "sks") == [
        "My SKS dog",
        "a sks dog, a cat asks for food",
    ]


def test_the_record_of_another_run_is_not_written_over(tmp_path):
    record = {"config": {"rank": 4, "subject": {"gradient_checkpointing": False}}, "inputs": {"hashes": {"a.png": "1"}}}
    path = tmp_path / "lora.json"
    check_free(path, record)
    path.write_text(json.dumps(record))
    check_free(
        path, record | {"config": record["config"] | {"subject": {"gradient_checkpointing": True}}}
    )  # saves memory only
    others = [record | {"config": {**record["config"], "rank": 8}}, record | {"inputs": {"hashes": {"a.png": "2"}}}]
    for other in others:
        with pytest.raises(ValueError, match=r"of another run .* choose another --out"):
            check_free(path, other)
