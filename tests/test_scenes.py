"""Scenes composed of drawings: what the caption says is what is in the picture, and what is held out is in none."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.training.colours import (
    COLOURS,
    HUES,
    PAIRS,
    SHOWN,
    apart,
    dominant_colour,
    hsl,
    is_held_out,
    recoloured,
    rgb_of,
)
from minisd.training.data import Pictures, visits_of
from minisd.training.grounds import GROUNDS, painted
from minisd.training.scenes import PLACES, Composer, load_training, noun, with_scenes

SIDE = 64


def disc(rgb, radius: float = 0.45, spot=None) -> np.ndarray:
    """A disc with alpha, and in its middle a spot of another colour."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    picture = np.zeros((SIDE, SIDE, 4), np.uint8)
    picture[..., :3], picture[..., 3] = rgb, 255 * (np.hypot(x, y) < radius)
    if spot is not None:
        picture[np.hypot(x, y) < 0.15] = (*spot, 255)
    return picture


def record(label: str, **more) -> dict:
    return {"concept": label, "style": "noto", "label": label, "tags": [], "group": "objects", "kind": "tool", **more}


RED, GREEN, WHITE = (210, 40, 40), (40, 150, 50), (255, 255, 255)
NAMES = ("red ball", "kite", "dog", "bell", "dolphin face", "checked flag", "cross: a sign")
RECORDS = [record(name) for name in NAMES] + [record("worker", group="people-body")]
PIXELS = np.stack([disc(RED), disc(RED, 0.3), disc(RED), disc(RED, spot=GREEN), disc(RED), *[disc(WHITE)] * 3])


@pytest.fixture(scope="module")
def composer():
    return Composer(PIXELS, RECORDS, [1] * len(RECORDS))


@pytest.fixture(scope="module")
def scenes(composer):
    return [composer.plan(number) for number in range(900)]


def test_a_colour_and_its_hsl_are_each_others_inverse():
    rgb = np.random.default_rng(0).random((200, 3))
    np.testing.assert_allclose(rgb_of(*hsl(rgb)), rgb, atol=1e-6)


def test_a_dominant_colour_is_a_hue_of_most_of_the_drawing_and_of_white_ones_there_is_none():
    assert apart(dominant_colour(disc((250, 140, 20))), 31) < 4
    assert dominant_colour(disc(WHITE)) is None
    halves = disc(RED)
    halves[:, SIDE // 2 :, :3] = GREEN
    assert dominant_colour(halves) is None


@pytest.mark.parametrize("name", COLOURS)
def test_a_recoloured_drawing_has_the_hue_and_lightness_of_its_name_and_keeps_the_rest(name):
    picture = disc(RED, spot=GREEN)
    new = recoloured(picture, dominant_colour(picture), name)
    assert (new[..., 3] == picture[..., 3]).all()
    assert (new[SIDE // 2, SIDE // 2] == picture[SIDE // 2, SIDE // 2]).all()
    hue, saturation, lightness = hsl(new[SIDE // 2, 8, :3] / 255)
    assert COLOURS[name].hue is None or apart(hue, COLOURS[name].hue) < 2
    assert abs(lightness - COLOURS[name].lightness) < 0.03
    assert COLOURS[name].hue is not None or saturation < 0.2


def test_shades_stay_in_their_order_when_a_drawing_is_recoloured():
    picture = disc(RED)
    picture[: SIDE // 2, :, :3] = (120, 10, 10)
    for name in COLOURS:
        above, _, below = recoloured(picture, 0.0, name)[[16, 32, 48], 32, :3].astype(int).sum(1)
        assert above < below


def test_what_is_said_is_what_one_sees(composer, scenes):
    """Of every scene with one coloured thing on white, the foreground has the colour, and is where it should be."""
    seen = 0
    for scene in scenes:
        (thing, *others) = scene.things
        if others or scene.ground is not None or thing.colour not in HUES:
            continue
        rgb = composer.paint(scene)[..., :3] / 255
        hue, saturation, _ = hsl(rgb)
        is_thing = saturation > 0.3
        assert np.median(apart(hue[is_thing], COLOURS[thing.colour].hue)) < 8, scene.caption
        assert f"{thing.colour} {thing.noun}" in scene.caption
        place = next((place for place in PLACES if place in scene.caption), None)
        down, across = (np.nonzero(is_thing)[axis].mean() / SIDE for axis in (0, 1))
        expected = PLACES.get(place, (0.5, 0.5))
        assert abs(across - expected[0]) < 0.08
        assert abs(down - expected[1]) < 0.08
        seen += 1
    assert seen > 100


def test_pairs_that_are_held_out_are_in_no_scene(scenes):
    shown = {(thing.noun, thing.colour) for scene in scenes for thing in scene.things if thing.colour}
    assert len(shown) > 40
    assert not any(is_held_out(*pair) for pair in shown)
    assert ("dog", "turquoise") in PAIRS  # of which the drawings here would have made some
    assert ("dolphin", "pink") in PAIRS
    colours = {
        thing: {colour for name, colour in shown if name == thing} - {"white"} for thing in ("dog", "dolphin face")
    }
    assert colours["dog"] == set(COLOURS) - {"turquoise", "white"}  # white stands on grounds only, and is rare
    assert colours["dolphin face"] == set(COLOURS) - {"pink", "white"}


def test_thirty_pairs_are_held_out_each_of_a_thing_of_its_own():
    assert len(PAIRS) == len(dict(PAIRS)) == 30
    assert not {thing.split()[0] for thing, _ in SHOWN} & set(dict(PAIRS))
    assert {colour for _, colour in (*PAIRS, *SHOWN)} <= set(COLOURS)


def test_a_label_is_put_without_its_own_colour_and_signs_are_left_out():
    labels = ["red apple", "Cat face", "leafy green", "keycap: 1", "1st place medal", "orange", "eight o’clock"]
    assert [noun(x) for x in labels] == ["apple", "cat face", None, None, None, None, "eight o’clock"]


def test_people_and_signs_are_in_no_scene_and_faces_are_given_no_colour_of_skin(composer, scenes):
    assert not any("worker" in scene.caption or "cross" in scene.caption for scene in scenes)
    faces = Composer(PIXELS, [r | {"group": "smileys-emotion"} for r in RECORDS], [1] * len(RECORDS))
    colours = {thing.colour for number in range(300) for thing in faces.plan(number).things}
    assert colours == {None, *HUES}


def test_two_things_stand_as_the_words_between_them_say(composer, scenes):
    pairs = [scene for scene in scenes if len(scene.things) == 2]
    assert len(pairs) > 50
    for scene in pairs:
        first, second = (thing.centre for thing in scene.things)
        if " to the left of " in scene.caption or " and " in scene.caption:
            assert first[0] < second[0]
        elif " above " in scene.caption:
            assert first[1] < second[1]
        assert scene.things[0].noun != scene.things[1].noun


def test_a_scene_is_the_same_whenever_it_is_painted_and_another_number_is_another(composer, scenes):
    again = Composer(PIXELS, RECORDS, [1] * len(RECORDS))
    for scene in scenes[:20]:
        assert again.plan(scene.number) == scene
        assert (again.paint(scene) == composer.paint(scene)).all()
    assert len({scene.caption for scene in scenes}) > 300
    assert composer.plan(3) != Composer(PIXELS, RECORDS, [1] * len(RECORDS), seed=1).plan(3)


def test_grounds_differ_from_each_other_and_vary():
    means = {}
    for name in (None, *COLOURS, *GROUNDS):
        one, other = (painted(name, SIDE, np.random.default_rng(seed)) for seed in (0, 1))
        assert one.shape == (SIDE, SIDE, 3)
        assert name is None or (one != other).any()
        means[name] = one.reshape(-1, 3).mean(0)
    apart = [np.abs(a - b).max() for i, a in enumerate(means.values()) for b in list(means.values())[:i]]
    assert min(apart) > 8


def test_scenes_follow_the_drawings_and_are_seen_once_in_a_pass():
    names = (*NAMES, "worker")
    drawings = Pictures(PIXELS, tuple((name,) for name in names), names, "digest", (3,) * len(PIXELS))
    both = with_scenes(drawings, RECORDS, 20)
    assert (len(both), len(both.visited)) == (28, 24 + 20)
    assert (both.pixels[[2]][0] == PIXELS[2]).all()
    assert both.images([8, 9]).shape == (2, 3, SIDE, SIDE)
    assert all(texts[0] == f"{texts[1]}, noto style" for texts in both.captions[8:])
    assert torch.equal(both.images([27]), both.images([27]))
    digests = {both.digest, with_scenes(drawings, RECORDS, 21).digest, with_scenes(drawings, RECORDS, 20, 1).digest}
    assert len(digests) == 3


def test_the_emoji_are_loaded_with_scenes_and_a_plain_folder_without(tmp_path):
    emoji, plain = tmp_path / "emoji", tmp_path / "plain"
    for folder in (emoji, plain):
        folder.mkdir()
    np.save(emoji / "images.npy", PIXELS)
    splits = ["train"] * 3 + ["subject"] * 2 + ["test", "unseen", "unseen"]
    lines = [json.dumps(r | {"split": split}) for r, split in zip(RECORDS, splits, strict=True)]
    (emoji / "captions.jsonl").write_text("\n".join(lines))
    (emoji / "data.json").write_text("{}")
    Image.fromarray(PIXELS[0]).save(plain / "a.png")

    loaded = load_training(emoji, scenes=50)
    assert len(loaded) == 3 + 50
    assert not any("bell" in text or "dolphin" in text for texts in loaded.captions for text in texts)  # held out
    assert len(load_training(emoji)) == 3
    assert len(load_training(plain, size=SIDE, scenes=50)) == 1


def test_drawings_of_one_colour_are_needed():
    with pytest.raises(ValueError, match="no drawing has one dominant colour"):
        Composer(PIXELS[5:], RECORDS[5:], [1, 1, 1])


def test_common_things_are_seen_more_often_than_a_job_in_its_third_form():
    apple = record("red apple", group="food-drink")
    assert visits_of(apple) > visits_of(record("baby", group="people-body"))
    assert visits_of(record("baby", group="people-body")) > visits_of(record("woman judge", group="people-body"))
    assert visits_of(apple | {"style": "fluent"}) + visits_of(apple | {"style": "flat"}) == visits_of(apple)
