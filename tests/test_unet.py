"""The U-Net's seams: conditioning, residuals, precomputed keys and values, odd sizes, words for wrong inputs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd.config import ControlNetConfig, UNetConfig
from minisd.models.controlnet import ControlNet, controlled
from minisd.models.unet import Conditioning, UNet

TINY = UNetConfig(
    channels=16,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(0, 1),
    num_heads=2,
    context_dim=12,
    norm_groups=8,
)


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """New networks begin as the identity: give every weight a value, so that everything has an effect."""
    g = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return network.eval()


def inputs(config: UNetConfig, b: int = 2, h: int = 8, w: int = 8, tokens: int = 5):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(b, config.in_channels, h, w, generator=g)
    return x, Conditioning(torch.randn(b, tokens, config.context_dim, generator=g))


@pytest.fixture(scope="module")
def unet():
    return lively(UNet(TINY))


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 21), w=st.integers(1, 21))
def test_any_side_lengths_come_back_as_they_went_in(unet, h, w):
    x, cond = inputs(TINY, 1, h, w)
    assert unet(x, 5, cond).shape == x.shape


@torch.no_grad()
def test_t_may_be_an_int_a_float_or_one_per_image(unet):
    x, cond = inputs(TINY)
    both = unet(x, torch.tensor([7, 400]), cond)
    torch.testing.assert_close(both[:1], unet(x[:1], 7, Conditioning(cond.context[:1])), atol=1e-5, rtol=0)
    torch.testing.assert_close(both[1:], unet(x[1:], 400.0, Conditioning(cond.context[1:])), atol=1e-5, rtol=0)
    between = unet(x[:1], 7.5, Conditioning(cond.context[:1]))
    assert not torch.equal(between, both[:1])


@torch.no_grad()
def test_keys_and_values_computed_once_are_exact(unet):
    x, cond = inputs(TINY)
    assert torch.equal(unet(x, 5, unet.with_keys_values(cond)), unet(x, 5, cond))


@torch.no_grad()
def test_keys_and_values_survive_cat_and_repeat(unet):
    x, cond = inputs(TINY)
    kept = unet.with_keys_values(cond)
    twice = torch.cat([x, x])
    torch.testing.assert_close(
        unet(twice, 5, Conditioning.cat([kept, kept])),
        unet(twice, 5, Conditioning.cat([cond, cond])),
        atol=1e-5,
        rtol=0,
    )
    doubled = x.repeat_interleave(2, 0)
    torch.testing.assert_close(unet(doubled, 5, kept.repeat(2)), unet(doubled, 5, cond.repeat(2)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_attention_in_place_of_self_attention_takes_precomputed_keys_too():
    unet = lively(UNet(replace(TINY, cross_only_levels=(0,))))
    x, cond = inputs(TINY)
    assert torch.equal(unet(x, 5, unet.with_keys_values(cond)), unet(x, 5, cond))


@torch.no_grad()
def test_concat_is_joined_behind_x_t():
    wide = lively(UNet(replace(TINY, in_channels=9)))
    x, cond = inputs(replace(TINY, in_channels=9))
    split = replace(cond, concat=x[:, 4:])
    assert torch.equal(wide(x[:, :4], 5, split), wide(x, 5, cond))


@pytest.mark.parametrize(("kind", "y"), [("num_classes", torch.tensor([3, 7])), ("vector_dim", torch.randn(2, 10))])
@torch.no_grad()
def test_y_changes_the_picture(kind, y):
    unet = lively(UNet(replace(TINY, **{kind: 10})))
    x, cond = inputs(TINY)
    out = unet(x, 5, replace(cond, y=y))
    other = unet(x, 5, replace(cond, y=y.flip(0)))
    assert not torch.allclose(out, other)


@torch.no_grad()
def test_a_new_unet_predicts_zero():
    x, cond = inputs(TINY)
    assert UNet(TINY)(x, 5, cond).abs().max() == 0


@torch.no_grad()
def test_zero_control_changes_nothing(unet):
    x, cond = inputs(TINY)
    control = ControlNet(ControlNetConfig(TINY))
    control.copy_encoder(unet)
    hint = torch.rand(2, 3, 64, 64)
    assert torch.equal(controlled(unet, control, hint)(x, 5, cond), unet(x, 5, cond))


@torch.no_grad()
def test_controls_add_up(unet):
    x, cond = inputs(TINY)
    a, b = lively(ControlNet(ControlNetConfig(TINY))), lively(ControlNet(ControlNetConfig(TINY)))
    hint = torch.rand(2, 3, 64, 64)
    stacked = controlled(controlled(unet, a, hint), b, 1 - hint)(x, 5, cond)
    sums = tuple(r + s for r, s in zip(a(x, 5, cond, hint), b(x, 5, cond, 1 - hint), strict=True))
    torch.testing.assert_close(stacked, unet(x, 5, replace(cond, residuals=sums)), atol=1e-5, rtol=0)


def test_attentions_are_found_by_name(unet):
    names = list(unet.attentions())
    assert "down.0.attn.blocks.0.attn1" in names
    assert "mid.0.attn.blocks.0.attn2" in names
    assert len(names) == 2 * sum(slot.attn is not None for slot in unet.slots())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, c: (x[:, :3], c), "this U-Net takes 4 input channels"),
        (lambda x, c: (x, replace(c, context=c.context[..., :5])), "takes a context 'b l 12'.*another model's text"),
        (lambda x, c: (x, replace(c, context=c.context[:1])), "x_t holds 2 images, the context 1"),
        (lambda x, c: (x, replace(c, y=torch.tensor([1, 2]))), "takes no y"),
        (lambda x, c: (torch.cat([x, x[:, :1]], 1), c), "4 input channels"),
    ],
)
def test_wrong_inputs_are_refused_in_words(unet, change, sentence):
    x, cond = change(*inputs(TINY))
    with pytest.raises(ValueError, match=sentence):
        unet(x, 5, cond)


def test_a_missing_y_is_asked_for():
    unet = UNet(replace(TINY, vector_dim=10))
    with pytest.raises(ValueError, match=r"needs y, a vector of width 10 per image: Conditioning\(context, y=…\)"):
        unet(*inputs(TINY)[:1], 5, inputs(TINY)[1])


def test_conditionings_of_unequal_parts_are_not_joined():
    cond = Conditioning(torch.zeros(1, 5, 12))
    with pytest.raises(ValueError, match="only some have 'y'"):
        Conditioning.cat([cond, replace(cond, y=torch.tensor([1]))])
    with pytest.raises(ValueError, match=r"contexts of \[5, 10\] tokens"):
        Conditioning.cat([cond, Conditioning(torch.zeros(1, 10, 12))])
