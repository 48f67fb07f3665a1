"""What a sampling will take is found without computing it, and agrees with what PyTorch's allocator then hands out."""

import os
import sys
from functools import partial

import pytest
import torch
from lively import lively, only
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from minisd.models.latents import decoded
from minisd.models.unet import Conditioning
from minisd.runtime import memory
from minisd.tasks import txt2img

SD = lively("SD1")
N = 4 * 1000  # bytes of a thousand floats


def handed_out(run) -> int:
    """The most bytes that the allocator had given out at one time during run(), beyond those before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


class WithoutScratch(TorchFunctionMode):
    """Convolutions give an empty result: real ones of few channels take scratch from the same allocator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.conv2d:
            return function(*args, **(kwargs or {}))
        made = function(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args), **(kwargs or {}))
        return torch.empty_like(made, device="cpu")


@pytest.mark.parametrize("vae_tiling", [0, 16])
@torch.no_grad()
def test_a_step_and_the_decoding_take_what_the_allocator_hands_out(vae_tiling):
    sampling = only(txt2img(SD, "a", height=96, width=64, steps=1, vae_tiling=vae_tiling))
    needs, both = memory.needs(sampling), torch.cat([sampling.batch.cond.context, sampling.batch.uncond.context])
    x = sampling.latents.repeat(2, 1, 1, 1)
    assert needs.step == pytest.approx(handed_out(lambda: SD.unet(x, 0, Conditioning(both))), rel=0.05)
    with WithoutScratch():
        assert needs.decode == pytest.approx(
            handed_out(lambda: decoded(SD.vae, sampling.latents, vae_tiling)), rel=0.05
        )


def test_what_is_freed_is_counted_no_longer_and_weights_and_views_never():
    layer = nn.Linear(1, 1, device="meta")
    x = partial(torch.zeros, 1000, device="meta")
    assert memory.live_bytes(lambda: x(), layer) == N
    assert memory.live_bytes(lambda: x().add(1).add(1).add(1), layer) == 2 * N
    assert memory.live_bytes(lambda: [x(), x(), x()], layer) == 3 * N
    assert memory.live_bytes(lambda: x().view(10, 100).mT, layer) == N
    assert memory.live_bytes(lambda: layer.weight.mT, layer) == 0


def test_the_matrix_of_attention_is_never_held():
    sides = [only(txt2img(SD, "a", height=side, width=side, steps=1)) for side in (64, 128)]
    small, large = (memory.needs(sampling).step for sampling in sides)
    assert large < 4.2 * small  # 4 times the pixels; 16 times the matrix


def test_guidance_batch_and_precision_count():
    def step(sd=SD, **changes) -> int:
        options = {"steps": 1, **changes}
        return memory.needs(only(txt2img(sd, "a", num_images=options.get("batch_size", 1), **options))).step

    assert step() == pytest.approx(2 * step(guidance_scale=1), rel=0.02)
    assert 2 * step() < step(batch_size=3) < 3 * step()  # what feed-forward layers hold does not grow any more
    half = lively("SD1")
    half.unet.bfloat16()
    assert step(half) == pytest.approx(step() / 2, rel=0.1)


def test_weights_are_those_of_all_networks():
    networks = (SD.unet, SD.vae, SD.text_encoder)
    needs = memory.needs(only(txt2img(SD, "a", steps=1)))
    assert needs.weights == sum(4 * weight.numel() for n in networks for weight in n.parameters())


def test_small_samplings_are_not_measured_and_large_ones_are():
    sampling = only(txt2img(SD, "a", steps=1))
    assert not memory.is_large(sampling)
    sampling.latents = torch.empty(1, 4, 512, 512, device="meta")
    assert memory.is_large(sampling)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_what_is_available_is_between_nothing_and_what_the_machine_has():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine / 1000 < memory.available(torch.device("cpu")) <= machine
