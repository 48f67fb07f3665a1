"""Plots draw the numbers they name, and files are whole pictures; attention maps are the softmax that the U-Net ran."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minisd.config import UNetConfig
from minisd.diffusion.guidance import guided
from minisd.diffusion.schedule import Schedule, cosine_betas, linear_betas, scaled_linear_betas, zero_terminal_snr
from minisd.models.unet import Conditioning, UNet
from minisd.plots.attention_maps import AttentionMaps, level_size, prompt_words
from minisd.text.tokenizer import Tokenizer

pytest.importorskip("matplotlib")

from minisd.plots import (
    attention_figure,
    noising_figure,
    plot_attention,
    plot_noising,
    plot_schedules,
    plot_trajectory,
    schedules_figure,
    trajectory_figure,
)

TOKENS = 9
SIDES = (6, 5)  # odd: the middle level is 3 × 3


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def unet():
    config = UNetConfig(
        channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(0, 1), num_heads=4, context_dim=12
    )
    unet = UNet(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        torch.nn.init.normal_(parameter, std=0.6 if "to_q" in name or "to_k" in name else 0.15, generator=generator)
    return unet


@pytest.fixture
def cond():
    return Conditioning(seeded(1, TOKENS, 12, seed=1))


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# ------------------------------------------------------------------------------------------------------- schedules


def test_the_lines_are_the_schedules_betas_abar_and_log_snr():
    named = {"mine": Schedule(scaled_linear_betas()), "cosine": Schedule(cosine_betas())}
    for panel, expected in zip(
        schedules_figure(named).axes,
        ("betas", "alphas_cumprod", "snr"),
        strict=True,
    ):
        for line, schedule in zip(panel.lines, named.values(), strict=True):
            values = getattr(schedule, expected)
            np.testing.assert_array_equal(line.get_xdata(), np.arange(1000))
            np.testing.assert_array_equal(line.get_ydata(), values.log() if expected == "snr" else values)


def test_names_stand_for_the_schedules_of_the_papers():
    figure = schedules_figure(["linear", "scaled_linear-zsnr"])
    linear, zero = figure.axes[1].lines
    np.testing.assert_array_equal(linear.get_ydata(), Schedule(linear_betas()).alphas_cumprod)
    np.testing.assert_array_equal(zero.get_ydata(), Schedule(zero_terminal_snr(scaled_linear_betas())).alphas_cumprod)
    assert zero.get_ydata()[-1] == 0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["linear", "scaled_linear-zsnr"]


def test_no_two_of_many_schedules_look_alike_and_a_variant_is_dashed():
    named = {f"{i}{suffix}": Schedule(linear_betas(10)) for suffix in ("", "-zsnr") for i in range(9)}
    lines = schedules_figure(named).axes[0].lines
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines}) == 18
    assert [line.get_linestyle() == "--" for line in lines[:7] + lines[9:16]] == [False] * 7 + [True] * 7


def test_schedules_of_different_lengths_share_the_axis_of_t_over_T():
    panel = schedules_figure({"a": Schedule(linear_betas(10)), "b": Schedule(linear_betas(1000))}).axes[0]
    assert panel.get_xlabel() == "t / T"
    np.testing.assert_allclose([line.get_xdata()[-1] for line in panel.lines], [0.9, 0.999], rtol=1e-15)


@pytest.mark.parametrize("schedules", [["sqrt"], "cosine_zsnr"])
def test_an_unknown_schedule_is_refused_with_the_known_ones(schedules):
    with pytest.raises(
        ValueError, match=r"unknown schedule '(sqrt|cosine_zsnr)'; known: linear, scaled_linear, cosine, "
    ):
        schedules_figure(schedules)


# ---------------------------------------------------------------------------------------------------------- strips


def shown(panel):
    return np.asarray(panel.images[0].get_array()).astype(int)


def test_noising_shows_q_sample_with_the_same_noise_in_every_row():
    image, steps = gradient(64, 64), 4
    panels = np.reshape(noising_figure(image, ("linear", "cosine"), steps=steps, seed=3).axes, (2, steps))
    x_0 = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    noise = seeded(*x_0.shape, seed=3)
    for row, betas in zip(panels, (linear_betas(), cosine_betas()), strict=True):
        abar = torch.cumprod(1 - betas, 0)
        for panel, t in zip(row, (0, 333, 666, 999), strict=True):
            x_t = abar[t].sqrt().float() * x_0 + (1 - abar[t]).sqrt().float() * noise
            expected = ((x_t[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
            assert abs(shown(panel)[::4, ::4] - expected).max() <= 1  # float32 rounding at .5


def test_noising_labels_times_and_signal_to_noise_ratios():
    panels = np.reshape(noising_figure(gradient(), ("linear", "cosine-zsnr"), steps=3).axes, (2, 3))
    assert [panel.get_title() for panel in panels[0]] == ["t = 0", "t = 500", "t = 999"]
    assert [panel.get_xlabel() for panel in panels[0]] == ["SNR 1.0·10⁴", "SNR 0.084", "SNR 4.0·10⁻⁵"]
    assert panels[1, 2].get_xlabel() == "SNR 0"
    assert [row[0].get_ylabel() for row in panels] == ["linear", "cosine-zsnr"]


def test_a_large_image_is_reduced_before_noise_is_added():
    assert shown(noising_figure(gradient(512, 256), steps=2, size=32).axes[0]).shape == (128, 256, 3)


def test_a_trajectory_shows_evenly_chosen_frames_with_both_ends():
    frames = [(981.0 - 20 * i, gradient(8, 8)) for i in range(50)]
    titles = [panel.get_title() for panel in trajectory_figure(frames, panels=8).axes]
    assert titles == [f"t = {981 - 20 * i}" for i in (0, 7, 14, 21, 28, 35, 42, 49)]
    assert len(trajectory_figure(frames[:3], panels=8).axes) == 3


def test_a_trajectory_shows_the_pictures_it_was_given():
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    panels = trajectory_figure([(901.5, red), (1, blue)]).axes
    assert [panel.get_title() for panel in panels] == ["t = 901.5", "t = 1"]
    assert [tuple(shown(panel)[3, 7]) for panel in panels] == [(255, 0, 0), (0, 0, 255)]


# ----------------------------------------------------------------------------------------------------------- files


def test_every_plot_is_a_picture_of_the_expected_size_and_not_blank(tmp_path):
    image = gradient(64, 64)
    maps = seeded(TOKENS, 4, 4).softmax(0)
    sizes = {  # margins: 12 between, 48 per title, 44 per caption, 17 per letter of a row's name
        plot_schedules(["linear", "cosine"], tmp_path / "schedules.png"): (2000, 740),
        plot_noising(image, tmp_path / "noising.png", steps=5): (17 * 6 + 24 + 5 * 268, 48 + 2 * 312),
        plot_trajectory([(9, image), (1, image)], tmp_path / "trajectory.png"): (12 + 2 * 268, 48 + 268),
        plot_attention(maps, [("red", [1]), ("cat", [2])], image, tmp_path / "a.png"): (12 + 3 * 268, 48 + 312),
    }
    for path, (width, height) in sizes.items():
        pixels = picture(path)
        assert pixels.shape == (height, width, 3), path
        assert pixels.std() > 10
        assert (pixels[[0, -1]] == 255).all(), "something is clipped at the edge"
        assert (pixels[:, [0, -1]] == 255).all(), "something is clipped at the edge"
    assert sorted(tmp_path.iterdir()) == sorted(sizes)


@pytest.mark.parametrize("size", [(64, 8), (8, 64)], ids=["wide", "narrow"])
def test_no_text_is_clipped_or_overlaps_another(size):
    image, maps = gradient(*size), torch.full((4, 4, 4), 0.25)
    figures = [
        schedules_figure([name + suffix for suffix in ("", "-zsnr") for name in ("linear", "scaled_linear", "cosine")]),
        noising_figure(image, ("linear", "scaled_linear-zsnr"), steps=5),
        trajectory_figure([(981.25, image)] * 4),
        attention_figure(maps, [("photorealistic", [1]), ("antidisestablishmentarianism", [2])], image),
    ]
    for figure in figures:
        figure.canvas.draw()
        inches = figure.get_tightbbox()
        assert (inches.min >= 0).all()
        assert (inches.max <= figure.get_size_inches()).all()
        texts = [text for panel in figure.axes for text in (panel.title, panel.xaxis.label, panel.yaxis.label)]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for one, other in combinations([text for text in texts if text.get_text()], 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def test_pictures_of_a_strip_reach_the_file_unchanged(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 192, 3), dtype=np.uint8))
    pixels = picture(plot_trajectory([(5, image), (1, image)], tmp_path / "t.png"))
    for left in (12, 12 + 192 + 12):
        np.testing.assert_array_equal(pixels[48 : 48 + 256, left : left + 192], np.asarray(image))


@pytest.mark.parametrize(("suffix", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")])
def test_the_suffix_names_the_format(tmp_path, suffix, start):
    path = plot_trajectory([(1, gradient())], tmp_path / f"plot.{suffix}")
    assert path.read_bytes().startswith(start)


def test_a_failed_write_leaves_the_old_picture_and_no_rest(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fails(self, file, **kwargs):
        file.write_bytes(b"half a pic")
        raise OSError("no space left on device")

    out = tmp_path / "plot.png"
    out.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="no space left"):
        plot_schedules(["linear"], out)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_unwritable_name_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match=r"end the name in \.png, \.pdf, \.svg"):
        plot_schedules(["linear"], tmp_path / "plot.doc")
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        plot_schedules(["linear"], tmp_path / "nowhere" / "plot.png")


PLOT_AND_COMPARE = """
import sys, matplotlib
state = lambda: (list(dict.items(matplotlib.rcParams)), sorted(matplotlib.colormaps))  # reading a value may set it
before = state()
from minisd.plots import plot_schedules
plot_schedules(["linear"], sys.argv[1])
assert state() == before
assert "matplotlib.pyplot" not in sys.modules
"""
PLOT_WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from minisd.plots import plot_schedules
plot_schedules(["linear"], sys.argv[1])
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_matplotlibs_global_state_is_left_alone(tmp_path):
    done = run(PLOT_AND_COMPARE, tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr


def test_without_matplotlib_the_error_says_what_to_install(tmp_path):
    done = run(PLOT_WITHOUT_MATPLOTLIB, tmp_path / "plot.png")
    assert done.stderr.splitlines()[-1] == "ImportError: plots need matplotlib: pip install 'minisd[plot]'"


# --------------------------------------------------------------------------------------------------- attention maps


@torch.no_grad()
def by_hand(unet, x, t, cond):
    """The mean over heads and layers of the weights, one head at a time in float64, from inputs caught by hooks."""
    caught, hooks = [], []
    for name, layer in unet.attentions().items():
        if name.endswith("attn2"):
            hooks.append(layer.register_forward_pre_hook(lambda layer, args: caught.append((layer, args[0]))))
    unet(x, t, cond)
    for hook in hooks:
        hook.remove()
    total = 0
    for layer, tokens in caught:
        q, k = (y.double().chunk(4, dim=-1) for y in (layer.to_q(tokens), layer.to_k(cond.context)))
        heads = [(a @ b.mT / a.shape[-1] ** 0.5).softmax(-1) for a, b in zip(q, k, strict=True)]
        h, w = {30: (6, 5), 9: (3, 3)}[tokens.shape[1]]
        grid = (sum(heads) / 4).transpose(1, 2).reshape(-1, TOKENS, h, w)
        total = total + F.interpolate(grid, size=SIDES, mode="bilinear", align_corners=False)
    assert len(caught) == 7  # one per res block with attention: 2 down, 1 in the middle, 4 up
    return total / len(caught)


@torch.no_grad()
def test_maps_are_the_softmax_of_every_cross_attention_averaged(unet, cond):
    x = seeded(1, 4, *SIDES, seed=2)
    with AttentionMaps(unet) as maps:
        for t in (900, 500):
            unet(x, t, cond)
    expected = (by_hand(unet, x, 900, cond) + by_hand(unet, x, 500, cond)) / 2
    assert expected.std(dim=(2, 3)).max() > 0.01  # the maps of this U-Net are not flat
    torch.testing.assert_close(maps.mean().double(), expected, atol=2e-6, rtol=0)  # float32 against float64


@torch.no_grad()
def test_maps_sum_to_1_over_the_tokens(unet, cond):
    with AttentionMaps(unet, images=3) as maps:
        unet(seeded(3, 4, *SIDES), torch.tensor([1, 500, 999]), cond.repeat(3))
    assert maps.mean().shape == (3, TOKENS, *SIDES)
    torch.testing.assert_close(maps.mean().sum(1), torch.ones(3, *SIDES), atol=1e-6, rtol=0)


@pytest.mark.parametrize("precomputed", [False, True], ids=["context", "kv"])
@torch.no_grad()
def test_recording_changes_no_bit_of_the_output(unet, cond, precomputed):
    cond = unet.with_keys_values(cond) if precomputed else cond
    x = seeded(1, 4, *SIDES, seed=2)
    before = unet(x, 700, cond)
    with AttentionMaps(unet) as maps:
        during = unet(x, 700, cond)
    assert torch.equal(before, during)
    assert torch.equal(before, unet(x, 700, cond))
    torch.testing.assert_close(maps.mean().double(), by_hand(unet, x, 700, cond), atol=2e-6, rtol=0)


def test_recording_changes_no_gradient(unet, cond):
    x = seeded(1, 4, *SIDES).requires_grad_()
    before = torch.autograd.grad(unet(x, 700, cond).sum(), x)[0]
    with AttentionMaps(unet) as maps:
        during = torch.autograd.grad(unet(x, 700, cond).sum(), x)[0]
    assert torch.equal(before, during)
    assert not maps.mean().requires_grad


@torch.no_grad()
def test_of_a_guided_batch_only_the_conditional_half_counts(unet, cond):
    x, uncond = seeded(2, 4, *SIDES), Conditioning(seeded(2, TOKENS, 12, seed=5))
    with AttentionMaps(unet, images=2) as maps:
        guided(unet, cond.repeat(2), uncond, 7.5)(x, 300)
    torch.testing.assert_close(maps.mean().double(), by_hand(unet, x, 300, cond.repeat(2)), atol=2e-6, rtol=0)


@torch.no_grad()
def test_steps_with_and_without_guidance_count_alike(unet, cond):
    x, uncond = seeded(1, 4, *SIDES), Conditioning(seeded(1, TOKENS, 12, seed=5))
    with AttentionMaps(unet) as maps:
        model = guided(unet, cond, uncond, 7.5, interval=(0, 400))
        model(x, 900)
        model(x, 300)
    expected = (by_hand(unet, x, 900, cond) + by_hand(unet, x, 300, cond)) / 2
    torch.testing.assert_close(maps.mean().double(), expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_the_maps_of_two_prompts_are_not_mixed(unet, cond):
    model = guided(unet, cond, Conditioning(seeded(1, TOKENS, 12, seed=5)), 7.5, joined=False)
    with AttentionMaps(unet), pytest.raises(ValueError, match=r"one AttentionMaps per prompt.*joined=True"):
        model(seeded(1, 4, *SIDES), 300)


@torch.no_grad()
def test_a_batch_of_unexpected_size_is_refused(unet, cond):
    with AttentionMaps(unet), pytest.raises(ValueError, match=r"called with 4 rows, but AttentionMaps\(images=1\)"):
        unet(seeded(4, 4, *SIDES), 300, cond.repeat(4))


@torch.no_grad()
def test_everything_is_restored_even_after_an_exception(unet, cond):
    modules = {"unet": unet, **unet.attentions()}
    before = {name: dict(module.__dict__) for name, module in modules.items()}
    keys = list(unet.state_dict())
    maps = AttentionMaps(unet)

    def interrupted():
        with maps:
            assert list(unet.state_dict()) == keys
            unet(seeded(1, 4, *SIDES), 300, cond)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {name: dict(module.__dict__) for name, module in modules.items()} == before
    assert maps.mean().shape == (1, TOKENS, *SIDES)


@torch.no_grad()
def test_a_layer_that_was_wrapped_already_stays_wrapped(unet, cond):
    name = "mid.0.attn.blocks.0.attn2"
    layer, calls = unet.attentions()[name], []
    layer.forward = lambda x, *args, **kwargs: calls.append(name) or type(layer).forward(layer, x, *args, **kwargs)
    wrapped = layer.forward
    try:
        with AttentionMaps(unet):
            unet(seeded(1, 4, *SIDES), 300, cond)
        assert calls == [name]
        assert layer.forward is wrapped
    finally:
        del layer.forward


@torch.no_grad()
def test_single_layers_can_be_recorded_and_read(unet, cond):
    one, other = "mid.0.attn.blocks.0.attn2", "down.0.attn.blocks.0.attn2"
    x = seeded(1, 4, *SIDES)
    with AttentionMaps(unet) as everything, AttentionMaps(unet, layers=[one]) as single:
        unet(x, 300, cond)
    assert torch.equal(single.mean(), everything.mean([one]))
    assert not torch.allclose(everything.mean([one]), everything.mean([other]))
    with pytest.raises(ValueError, match=f"'{other}' was not recorded; recorded: {one}"):
        single.mean([other])
    with pytest.raises(ValueError, match=f"no cross-attention layer '{one[:-1]}1' in this U-Net; known: {other}"):
        AttentionMaps(unet, layers=[f"{one[:-1]}1"])


@torch.no_grad()
def test_latents_of_two_sizes_are_not_mixed(unet, cond):
    with AttentionMaps(unet) as maps:
        unet(seeded(1, 4, *SIDES), 300, cond)
        with pytest.raises(ValueError, match=r"latents of \(8, 4\) after latents of \(6, 5\)"):
            unet(seeded(1, 4, 8, 4), 300, cond)
    assert maps.mean().shape[-2:] == SIDES


def test_maps_before_any_call_are_refused(unet):
    with pytest.raises(ValueError, match="run the U-Net inside"):
        AttentionMaps(unet).mean()


@pytest.mark.parametrize(
    ("tokens", "size"), [(96 * 64, (96, 64)), (48 * 32, (48, 32)), (7 * 5, (7, 5)), (4 * 3, (4, 3)), (2 * 2, (2, 2))]
)
def test_a_level_is_found_by_its_number_of_tokens(tokens, size):
    h, w = (96, 64) if size[0] > 8 else (7, 5)
    assert level_size(h, w, tokens=tokens) == size


def test_tokens_of_no_level_are_refused():
    with pytest.raises(ValueError, match="no level of a U-Net has 13 tokens where the latents are 7x5"):
        level_size(7, 5, tokens=13)


# ----------------------------------------------------------------------------------------------- words and their maps


def test_words_join_their_sub_word_tokens_and_leave_out_the_frame():
    tokenizer = Tokenizer()
    ids = tokenizer(["A red photobombing capybara!"])[0]
    assert len(tokenizer.encode("photobombing capybara")) > 2  # both are spelled in pieces
    words = prompt_words(tokenizer, ids)
    assert [word.text for word in words] == ["a", "red", "photobombing", "capybara", "!"]
    assert [p for word in words for p in word.positions] == list(
        range(1, 1 + len(tokenizer.encode("A red photobombing capybara!")))
    )


def test_a_placeholder_of_three_vectors_is_one_word():
    tokenizer = Tokenizer(pad_id=0)
    tokenizer.add_token("<my-cat>", 3)
    words = prompt_words(tokenizer, tokenizer(["my <my-cat> sleeps"])[0])
    assert words == [("my", [1]), ("<my-cat>", [2, 3, 4]), ("sleeps", [5])]


def test_words_of_a_long_prompt_are_found_in_every_chunk():
    tokenizer = Tokenizer(length=5)
    rows = [tokenizer.frame(run) for run in tokenizer.chunks(tokenizer.encode("one two three four"))]
    words = prompt_words(tokenizer, [i for row in rows for i in row])
    assert words == [("one", [1]), ("two", [2]), ("three", [3]), ("four", [6])]


def test_a_word_cut_at_the_end_of_a_row_is_still_named():
    tokenizer = Tokenizer(length=4)
    with pytest.warns(UserWarning, match="dropped"):
        ids = tokenizer(["red photobombing"])[0]
    assert [word.positions for word in prompt_words(tokenizer, ids)] == [[1], [2]]


def test_the_empty_prompt_has_no_words(tmp_path):
    tokenizer = Tokenizer()
    assert prompt_words(tokenizer, tokenizer([""])[0]) == []
    with pytest.raises(ValueError, match="no words"):
        plot_attention(torch.ones(77, 4, 4) / 77, [], gradient(), tmp_path / "a.png")


def test_a_panel_lights_where_the_tokens_of_its_word_are_looked_at():
    maps = torch.zeros(5, 8, 8)
    maps[1, 1, 6], maps[2, 1, 6], maps[3, 6, 1] = 0.02, 0.03, 0.25
    figure = attention_figure(maps, [("photobombing", [1, 2]), ("cat", [3])], Image.new("RGB", (64, 64), "white"))
    image, first, second = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["image", "photobombing", "cat"]
    assert [panel.get_xlabel() for panel in figure.axes] == ["", "0.0 – 5.0 %", "0.0 – 25.0 %"]
    assert (shown(image) == 255).all()
    cell = 256 // 8
    for panel, (row, column) in ((first, (1, 6)), (second, (6, 1))):
        pixels = np.asarray(panel.images[0].get_array())
        lit = np.linalg.norm(pixels - 0.4, axis=-1)  # the dimmed white picture is grey 0.4
        y, x = np.unravel_index(lit.argmax(), lit.shape)
        assert (y // cell, x // cell) == (row, column)
        np.testing.assert_allclose(pixels[(7 - row) * cell, (7 - column) * cell], 0.4, atol=1e-6)


def test_words_with_dollar_signs_are_no_formulas(tmp_path):
    maps = torch.ones(4, 2, 2) / 4
    path = plot_attention(maps, [("$$", [1]), (r"$\frac$", [2])], gradient(), tmp_path / "a.png")
    assert picture(path).std() > 10


@pytest.mark.parametrize(
    ("shape", "words", "message"),
    [((1, 5, 4, 4), [("a", [1])], "take one of maps"), ((5, 4, 4), [("a", [5])], "'a' stands beyond the 5 tokens")],
)
def test_maps_that_do_not_fit_the_words_are_refused(shape, words, message):
    with pytest.raises(ValueError, match=message):
        attention_figure(torch.zeros(shape), words, gradient())


def test_a_flat_map_is_the_dimmed_picture():
    panel = attention_figure(torch.full((3, 4, 4), 0.02), [("a", [1])], Image.new("RGB", (32, 32), "white")).axes[1]
    np.testing.assert_allclose(np.asarray(panel.images[0].get_array()), 0.4, atol=1e-6)
    assert panel.get_xlabel() == "2.0 – 2.0 %"
