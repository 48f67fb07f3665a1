"""Configs: presets state differences, travel as JSON, and refuse what no network can be."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisd.checkpoints.families import config_from_json, config_to_json
from minisd.config import PRESETS, SD1, UNetConfig
from minisd.tasks import Txt2Img
from minisd.tasks.sampler_names import NAMES


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name):
    assert config_from_json(config_to_json(PRESETS[name])) == PRESETS[name]


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
    values = json.loads(config_to_json(SD1))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=sentence):
        config_from_json(json.dumps(values))


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


def test_options_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="steps is 0: give 1 or more"):
        Txt2Img(steps=0)
    with pytest.raises(ValueError, match=r"steps is 2\.5: give 1 or more, and a whole number"):
        Txt2Img(steps=2.5)


def test_the_samplers_that_the_help_names_are_those_there_are():
    from minisd.diffusion.samplers import SAMPLERS

    assert sorted(NAMES) == sorted(SAMPLERS)


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [
        ("ddim", "ddim", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M", "dpmpp_2m", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        ("Euler a", "euler_ancestral", None),
        ("euler_a:s_noise=0.9", "euler_ancestral:s_noise=0.9", None),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", None),
        ("k_lms", "lms", None),
        ("LMS Karras", "lms", "karras"),
        ("PNDMScheduler", "plms", None),
        ("of my own", "of my own", None),
    ],
)
def test_samplers_are_known_by_the_names_of_other_programs(name, sampler, spacing):
    options = Txt2Img(sampler=name)
    assert (options.sampler, options.spacing) == (sampler, spacing)


def test_a_name_that_means_a_spacing_does_not_go_with_another():
    assert Txt2Img(sampler="DPM++ 2M Karras", spacing="karras").spacing == "karras"
    with pytest.raises(ValueError, match="means spacing='karras', not 'trailing'"):
        Txt2Img(sampler="DPM++ 2M Karras", spacing="trailing")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale is nan: give a finite number"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale is 1\.5: it lies in \[0, 1\]"),
        ({"guidance_interval": (900.0, 100.0)}, "give the lower timestep first"),
    ],
)
def test_options_that_guide_nowhere_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Txt2Img(**change)


def test_a_config_written_before_it_named_its_task_is_told_by_its_inputs():
    for preset in PRESETS.values():
        values = json.loads(config_to_json(preset))
        del values["task"]
        assert config_from_json(json.dumps(values)) == preset


def test_the_heads_of_the_middle_which_always_attends_are_checked():
    with pytest.raises(ValueError, match=r"level 2 has 192 channels, which .* head_width=80 does not divide"):
        UNetConfig(
            channels=64, channel_mult=(1, 2, 3), attention_levels=(), num_heads=None, head_width=80, norm_groups=16
        )
