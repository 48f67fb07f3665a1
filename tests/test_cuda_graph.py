"""CUDA graphs without a GPU: a tape that, like a graph, runs the recorded operations on the recorded memory again."""

from dataclasses import replace

import pytest
import torch
from lively import lively, only, pixels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisd import tasks
from minisd.cli.options import Model
from minisd.models.unet import Conditioning
from minisd.plots.attention_maps import AttentionMaps
from minisd.runtime.cuda_graph import CUDAGraph

SD = lively()


class Tape(TorchDispatchMode):
    """Every operation that computes, with the very tensors it read and wrote; numbers and shapes are frozen."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def taped(captures: list):
    def capture(function):
        captures.append(tape := Tape())
        with tape:
            out = function()
        return tape.replay, out

    return capture


@pytest.fixture
def captures(monkeypatch):
    """The tapes made; graphs work, on a CPU."""
    made = []
    monkeypatch.setattr("minisd.runtime.cuda_graph.check_device", lambda device: None)
    monkeypatch.setattr("minisd.runtime.cuda_graph.cuda_capture", taped(made))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "plms", "guidance_scale": 1.0},
        {"sampler": "dpmpp_2m", "spacing": "karras"},
        {"sampler": "heun", "num_images": 2, "batch_size": 2},
    ],
)
def test_replayed_steps_draw_the_same_image(captures, options):
    def latents(network=None):
        sampling = only(tasks.txt2img(SD, "a dog", seed=1, steps=5, **options, network=network))
        return [step.x.clone() for step in sampling][-1]

    graphed = latents(CUDAGraph(SD.unet))
    assert len(captures) == 1
    # 1e-5: keys and values were computed for both contexts at once, and without a graph for each
    torch.testing.assert_close(graphed, latents(), atol=1e-5, rtol=0)
    assert len(captures) == 1


def test_guidance_in_an_interval_has_a_recording_for_each_of_its_two_batches(captures):
    draw = lambda network: SD.txt2img("a dog", steps=6, guidance_interval=(300, 700), network=network)[0]  # noqa: E731
    graphed = draw(CUDAGraph(SD.unet))
    assert len(captures) == 2
    assert abs(pixels(graphed) - pixels(draw(None))).max() <= 1


def test_everything_that_may_change_between_two_steps_reaches_the_replay():
    """Also a ControlNet's residuals, which are others at every step; results outlive the next replay."""
    captures, x = [], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = CUDAGraph(SD.unet, taped(captures))
    plain = Conditioning(torch.randn(2, 5, SD.config.unet.context_dim))
    skips, middle = skip_shapes(x, plain)
    calls = []
    for t in (900, 500, torch.tensor(3)):
        residuals = tuple(torch.randn(shape) for shape in (*skips, middle))
        calls.append((torch.randn_like(x), t, replace(plain, context=plain.context + t, residuals=residuals)))
    with torch.no_grad():
        expected = [SD.unet(*call) for call in calls]
    for got, wanted in zip([step(*call) for call in calls], expected, strict=True):
        assert torch.equal(got, wanted)
    assert len(captures) == 1


def skip_shapes(x, cond):
    shapes = []
    handles = [
        module.register_forward_hook(lambda *hooked: shapes.append(hooked[-1].shape))
        for module in (SD.unet.conv_in, *SD.unet.down, SD.unet.mid[-1])
    ]
    with torch.no_grad():
        SD.unet(x, 0, cond)
    for handle in handles:
        handle.remove()
    return shapes[:-1], shapes[-1]


def test_a_time_that_is_a_fraction_is_not_taken_for_the_whole_one_that_was_recorded():
    x, cond = torch.randn(1, 4, 8, 8), Conditioning(torch.randn(1, 5, SD.config.unet.context_dim))
    step = CUDAGraph(SD.unet, taped([]))
    with torch.no_grad():
        for t in (500, 500.5, torch.tensor([500.25], dtype=torch.float64)):
            assert torch.equal(step(x, t, cond), SD.unet(x, t, cond))


def test_looking_inside_is_refused_because_a_replay_would_pass_it_by(captures):
    with AttentionMaps(SD.unet), pytest.raises(ValueError, match=r"is watched while it runs .* leave cuda_graph out"):
        SD.txt2img("a dog", steps=2, network=CUDAGraph(SD.unet))
    assert not captures


def test_a_cpu_is_refused_in_a_sentence_before_anything_is_loaded():
    with pytest.raises(ValueError, match="a CUDA graph needs an NVIDIA GPU, and the model is on cpu"):
        Model(checkpoint="not there", cuda_graph=True).load()
    with pytest.raises(ValueError, match="leave cuda_graph out"):
        CUDAGraph(SD.unet)
