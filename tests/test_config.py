"""Configs: presets state differences, travel as JSON, and refuse what no network can be."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisd.config import PRESETS, SD1, ModelConfig, Settings, UNetConfig


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    assert ModelConfig.from_json(PRESETS[name].to_json()) == PRESETS[name]


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("unet", "chanels"), 320, "UNetConfig has no field 'chanels'; known: attention_levels"),
        (("unet", "channels"), "320", "UNetConfig.channels must be int, got '320'"),
        (("unet", "channels"), True, "UNetConfig.channels must be int, got True"),
        (("unet", "channel_mult"), 4, "UNetConfig.channel_mult must be a list"),
        (("prediction",), "noise", "ModelConfig.prediction is 'noise'; allowed: 'eps', 'v', 'x_0'"),
        (("text", "activation"), "relu", "allowed: 'quick_gelu', 'gelu'"),
        (("vae",), [], "VAEConfig must be an object"),
    ],
)
def test_damaged_json_is_refused_by_name(path, value, sentence):
    values = json.loads(SD1.to_json())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=sentence):
        ModelConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"head_width": 64}, "by number or by width, not both"),
        ({"channel_mult": (2, 4)}, "channel_mult is .* starts with 1"),
        ({"num_heads": 7}, "level 0 has 320 channels, which num_heads=7 .* does not divide"),
        ({"norm_groups": 33}, "33 norm groups do not divide"),
        ({"num_classes": 5, "vector_dim": 5}, "a class .* or a vector"),
    ],
)
def test_impossible_unets_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SD1.unet, **change)


@given(
    mult=st.lists(st.integers(1, 4), max_size=4).map(lambda rest: [1, *rest]),
    blocks=st.integers(1, 3),
    levels=st.sets(st.integers(0, 4)),
)
def test_every_plan_pops_exactly_what_it_pushes(mult, blocks, levels):
    config = UNetConfig(
        channels=32,
        channel_mult=tuple(mult),
        num_res_blocks=blocks,
        attention_levels=tuple(sorted(levels)),
        num_heads=4,
    )
    plan = config.plan()
    skips, width = list(plan.skip_channels), plan.mid[-1].out_channels
    assert width == plan.down[-1].out_channels
    for slot in plan.up:
        assert slot.in_channels == width + skips.pop()
        width = slot.out_channels
    assert not skips
    assert width == config.channels
    assert sum(s.resample == "down" for s in plan.down) == sum(s.resample == "up" for s in plan.up) == len(mult) - 1


def test_settings_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="steps=0: give 1 or more"):
        Settings(steps=0)
    with pytest.raises(ValueError, match=r"steps=2\.5: give 1 or more, and a whole number"):
        Settings(steps=2.5)
    with pytest.raises(ValueError, match=r"eta=0\.5 belongs to the sampler ddim, not to euler"):
        Settings(eta=0.5, sampler="euler")


def test_the_samplers_that_the_settings_name_are_those_there_are():
    from minisd.diffusion.samplers import SAMPLERS

    listed = Settings.__doc__.split("sampler: ")[1].split("; in Python")[0].replace(" or ", ", ").replace("\n", " ")
    assert sorted(name.strip() for name in listed.split(",")) == sorted(SAMPLERS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: give a finite number"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1\.5: it lies in \[0, 1\]"),
        ({"guidance_interval": (900.0, 100.0)}, "give the lower time first"),
    ],
)
def test_settings_that_guide_nowhere_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**change)
