"""Pictures and captions for training: real folders, with everything that real folders hold."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from training_tiny import pictures

from minisd.text.tokenizer import Tokenizer
from minisd.training.captions import compose, with_article
from minisd.training.data import Augmentation, augmented, load_pictures
from minisd.training.draws import Draws
from minisd.training.recipes.vocabulary import Rows

from training_tiny import MODEL  # isort: skip

RED = (200, 30, 40)


def draws(n: int, step: int = 0) -> Draws:
    return Draws(0, step, n, slice(0, n))


def colour(pixels) -> list[int]:
    """The median colour of a picture 'h w 3'."""
    return np.median(np.asarray(pixels).reshape(-1, 3), axis=0).round().astype(int).tolist()


def only_picture(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_pictures(folder, size=16)
    assert found.pixels.shape == (1, 16, 16, 3)
    return found.pixels[0]


# --------------------------------------------------------------------------------------------------- plain folders


def test_the_middle_square_of_a_wide_picture_is_taken(tmp_path):
    image = Image.new("RGB", (96, 32), "white")
    image.paste(RED, (32, 0, 64, 32))
    image.save(tmp_path / "wide.png")
    assert (only_picture(tmp_path) == RED).all()


def test_a_picture_that_a_camera_turned_is_upright(tmp_path):
    image = Image.new("RGB", (32, 32), "white")
    image.paste(RED, (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    image.save(tmp_path / "turned.png", exif=exif)
    turned = only_picture(tmp_path)
    assert colour(turned[:7]) == [255, 255, 255]
    assert colour(turned[9:]) == list(RED)


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red, green, blue = colour(only_picture(tmp_path))
    assert red > 230
    assert green < 40
    assert blue < 40


def test_sixteen_bits_keep_their_range(tmp_path):
    Image.fromarray(np.full((20, 20), 0x8080, np.uint16)).save(tmp_path / "deep.png")
    assert colour(only_picture(tmp_path)) == [128, 128, 128]


def test_a_palette_becomes_its_colours_and_its_transparency_white(tmp_path):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 16, 8))
    image.quantize(4).save(tmp_path / "few.png")
    found = only_picture(tmp_path)
    assert colour(found[:8]) == list(RED)
    assert colour(found[8:]) == [255, 255, 255]


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 20), c) for c in (RED, "blue")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    assert colour(only_picture(tmp_path)) == list(RED)


def test_broken_and_empty_files_are_left_out_with_a_warning_that_names_them(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.warns(UserWarning, match="left out") as said:
        found = load_pictures(tmp_path, size=16)
    assert found.names == ("good.png",)
    assert [any(name in str(w.message) for w in said) for name in ("cut.png", "empty.jpg")] == [True, True]
    assert len(said) == 2


def test_a_folder_without_a_usable_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_pictures(tmp_path, size=16)
    (tmp_path / "empty.png").touch()
    with (
        pytest.warns(UserWarning, match=r"left out: .*empty\.png"),
        pytest.raises(ValueError, match=r"1 were left out, first: .*empty\.png"),
    ):
        load_pictures(tmp_path, size=16)
    with pytest.raises(ValueError, match="no such folder"):
        load_pictures(tmp_path / "elsewhere", size=16)


def test_a_text_beside_a_picture_holds_its_captions(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (20, 20), RED).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a red square\n\n red paint \n")
    found = load_pictures(tmp_path, size=16)
    assert found.captions == (("a red square", "red paint"), ())
    with pytest.raises(ValueError, match=r"1 of 2 pictures have no caption, first: b\.png: put a text file"):
        found.check_captions()


def test_the_digest_tells_pictures_captions_and_sizes_apart(tmp_path):
    Image.new("RGB", (20, 20), RED).save(tmp_path / "a.png")
    digests = [load_pictures(tmp_path, size=size).digest for size in (16, 16, 8)]
    (tmp_path / "a.txt").write_text("red")
    digests.append(load_pictures(tmp_path, size=16).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# ------------------------------------------------------------------------------------------------- the emoji data set


@pytest.fixture
def emoji(tmp_path):
    """A folder as scripts/build_emoji.py makes it, of three drawings."""
    pixels = np.zeros((3, 8, 8, 4), np.uint8)
    pixels[:, 2:6, 2:6] = (*RED, 255)
    np.save(tmp_path / "images.npy", pixels)
    record = {"concept": "red-apple", "style": "noto", "label": "red apple", "tags": ["fruit", "red"], "group": "food"}
    records = [record | {"split": s, "style": y} for s, y in (("train", "noto"), ("subject", "flat"), ("unseen", "t"))]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "data.json").write_text('{"size": 8}')
    return tmp_path


def test_a_split_of_the_emoji_has_its_pictures_and_captions(emoji):
    found = load_pictures(emoji, size=8)
    assert found.names == ("red-apple (noto)",)
    assert found.captions[0][0] == "a red apple, noto style"
    image = found.images([0])
    assert torch.equal(image[0, :, 0, 0], torch.ones(3))
    assert torch.allclose(image[0, :, 3, 3], torch.tensor(RED) / 127.5 - 1, atol=1e-6)
    assert load_pictures(emoji, split="unseen").captions[0][0] == "a red apple, t style"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 16}, "pictures of 8 px, the recipe wants 16: build them with --size 16"),
        ({"split": "test"}, "no pictures of the split 'test'; known: subject, train, unseen"),
    ],
)
def test_emoji_that_do_not_fit_are_refused(emoji, options, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(emoji, **options)


def test_emoji_without_a_caption_for_every_picture_are_refused(emoji):
    lines = (emoji / "captions.jsonl").read_text().splitlines()
    (emoji / "captions.jsonl").write_text("\n".join(lines[:2]))
    with pytest.raises(ValueError, match="3 pictures and 2 captions: build the data set again"):
        load_pictures(emoji)


def test_captions_put_a_record_in_several_ways_always_the_same():
    record = {"concept": "eagle", "style": "flat", "label": "Eagle", "tags": ["bird", "animal", "eagle", "wing"]}
    ways = compose(record)
    assert ways[0] == "an eagle, flat style"
    assert ways == compose(record)
    assert len(set(ways)) > 3
    assert all("eagle" in way for way in ways)
    assert any("style" not in way for way in (way for i in range(20) for way in compose(record | {"concept": str(i)})))


def test_articles_suit_their_words():
    assert [with_article(x) for x in ("red apple", "eagle", "sunglasses", "cross", "octopus")] == [
        "a red apple", "an eagle", "sunglasses", "a cross", "an octopus"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- augmentation


def test_without_augmentation_a_picture_is_itself():
    discs, rows = pictures(), torch.arange(11)
    assert torch.equal(augmented(discs, rows, draws(11), Augmentation()), discs.images(rows))


def test_flipping_mirrors_about_half_of_the_pictures_and_nothing_else():
    discs = pictures(1)
    discs.pixels[0, :, :5, 3] = 255  # a bar on the left
    seen = augmented(discs, torch.zeros(64, dtype=torch.long), draws(64), Augmentation(flip=True))
    plain = discs.images([0])
    is_plain = (seen - plain).abs().amax((1, 2, 3)) < 1e-4
    is_mirrored = (seen - plain.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
    assert (is_plain ^ is_mirrored).all()
    assert 16 < is_mirrored.sum() < 48


def test_random_backgrounds_show_through_transparency_only():
    seen = augmented(pictures(1), torch.zeros(64, dtype=torch.long), draws(64), Augmentation(background=0.5))
    corner, middle = seen[:, :, 0, 0], seen[:, :, 8, 8]
    assert torch.equal(middle, middle[:1].expand_as(middle))
    assert 16 < (corner == 1).all(1).sum() < 48


def test_zoomed_and_moved_drawings_have_no_dark_fringes():
    discs = pictures(1)
    discs.pixels[..., :3] = np.where(discs.pixels[..., 3:] > 0, 255, 0)  # white on transparent black
    seen = augmented(discs, torch.zeros(16, dtype=torch.long), draws(16), Augmentation(zoom=0.5, shift=0.2))
    assert seen.min() > 1 - 1e-4


def test_shifts_move_a_picture_by_so_much():
    discs = pictures(1, 32)
    seen = augmented(discs, torch.zeros(256, dtype=torch.long), draws(256), Augmentation(shift=0.25))
    covered = 1 - seen[:, 1] / 2 - 0.5
    x = torch.arange(32) - 15.5
    moved = (covered.sum(1) * x).sum(1) / covered.sum((1, 2)) / 32
    assert 0.2 < moved.abs().max() < 0.25 + 1e-3
    assert abs(moved.mean()) < 0.02


# ------------------------------------------------------------------------------------------------------- vocabulary


def test_the_rows_of_a_data_set_are_those_of_its_tokens_and_one_for_all_others():
    tokenizer, config = Tokenizer(), MODEL.text
    rows = Rows.used_by(["a red apple"], tokenizer, config, keep=["sks"])
    kept = {*tokenizer.encode("a red apple sks"), 49406, 49407}
    assert set(rows.ids) == kept
    assert rows.row_of_id[tokenizer.encode("zebra")].tolist() == [rows.unknown]
    compact = rows.compact(config)
    assert compact.vocab_size == len(kept) + 1
    assert rows.row_of_id[49407] == compact.eos_id == compact.pad_id


def test_an_expanded_table_reads_the_captions_as_the_compact_one():
    tokenizer = Tokenizer()
    rows = Rows.used_by(["a red apple"], tokenizer, MODEL.text)
    table = torch.randn(rows.unknown + 1, 4)
    ids = tokenizer(["a red apple", "a zebra"])
    full = rows.expand(table)
    assert full.shape == (49408, 4)
    assert torch.equal(full[ids], table[rows.row_of_id[ids]])
    assert torch.equal(full[tokenizer.encode("zebra")[0]], table[rows.unknown])
