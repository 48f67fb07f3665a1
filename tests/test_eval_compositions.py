"""Judges of unseen pairs and of grounds, on pictures whose answer is known."""

import numpy as np
import pytest
import torch

from minisd.eval.compositions import (
    GroundJudge,
    colour_prompts,
    foreground,
    ground_prompts,
    has_hue,
    hues,
    is_of_thing,
    on_grounds,
    shapes,
)
from minisd.eval.drawings import Drawings
from minisd.training.colours import HUES, PAIRS
from minisd.training.grounds import GROUNDS

SIDE = 64
RED, BLUE = (210, 40, 40), (40, 80, 210)


def picture(rgb, *, wide: float = 0.3, high: float = 0.3, centre=(0.5, 0.5), ground=(255, 255, 255)) -> torch.Tensor:
    """An ellipse on an even ground, uint8 '3 h w'."""
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    inside = ((x - centre[0]) / wide) ** 2 + ((y - centre[1]) / high) ** 2 < 1
    return torch.from_numpy(np.where(inside[..., None], rgb, ground).astype(np.uint8)).permute(2, 0, 1)


def test_the_foreground_is_what_differs_from_the_border_whatever_its_colour():
    for ground in ((255, 255, 255), (20, 120, 40)):
        mask = foreground(picture(RED, ground=ground)[None].float() / 255)
        assert mask.float().mean().item() == pytest.approx(np.pi * 0.09, abs=0.01)


def test_a_picture_has_the_hue_of_its_foreground_and_a_grey_one_none():
    red, blue, grey = picture(RED), picture(BLUE, ground=(250, 240, 60)), picture((120, 120, 120))
    found = hues(torch.stack([red, blue, grey]))
    assert found[:2] == pytest.approx([0, 226], abs=2)
    assert found[2] is None
    assert has_hue(torch.stack([red, blue, grey, red]), ["red", "blue", "blue", "green"]).tolist() == [1, 1, 0, 0]


def test_shapes_are_alike_at_any_size_place_and_colour_and_others_are_not():
    flat = picture(RED, high=0.1)
    same = picture(BLUE, wide=0.15, high=0.05, centre=(0.3, 0.7))
    tall = picture(RED, wide=0.1)
    a, b, c, nothing = shapes(torch.stack([flat, same, tall, torch.full_like(flat, 255)]))
    assert a @ b > 0.95
    assert a @ c < 0.5
    assert not nothing.any()


def test_things_are_found_in_the_words_for_drawings():
    words = ("a red apple", "a pineapple", "an apple, cut", "a cat")
    drawings = Drawings(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), words, ("noto",) * 4, words)
    assert is_of_thing(drawings, ["apple", "cat"]).tolist() == [[True, False, True, False], [False, False, False, True]]


def test_the_prompts_ask_for_every_held_out_pair_and_thirty_times_for_a_ground():
    assert len(colour_prompts()) == len(PAIRS)
    assert "a pink dolphin" in colour_prompts()
    prompts = ground_prompts()
    assert len(set(prompts)) == 30
    assert ("a cat face on grass", "grass") in prompts
    assert {name for _, name in prompts} >= set(GROUNDS)


def test_the_judge_knows_grounds_behind_things_and_is_not_fooled_by_white():
    judge = GroundJudge(SIDE)
    names = [*GROUNDS, *HUES, "black"]
    things = torch.stack([picture(RED if name != "red" else BLUE) for name in names])
    assert judge.hits(on_grounds(things, names), names).mean() > 0.9  # clouds can be taken for snow
    assert judge(things) == [None] * len(names)
