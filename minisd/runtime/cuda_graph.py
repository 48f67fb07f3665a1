"""The denoising step as a CUDA graph: its kernels recorded once, then launched all together, step after step.

A step of a small batch launches about a thousand kernels, and Python may take longer to launch them than the GPU to
run them. A graph holds the launches with all their addresses, so that a replay is one call (Gray 2019, "Getting started
with CUDA graphs"). It computes what the recorded step computes, with the same kernels: the pictures are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minisd.models.unet import Conditioning, UNet

# Runs a function of nothing, records what the device did, and returns what does it again, and the result to be filled.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


class CUDAGraph:
    """unet(x_t, t, cond) recorded at its first call with arguments of these shapes and dtypes, and replayed afterwards.

    It is a `network=` for every task. Each call copies its arguments to where the recording reads them; t and residuals
    may differ at every step, and so may cond, which is copied only where it is another object. Without gradients. The
    recording holds the addresses of the weights: make a new one where weights or layers were replaced. ValueError off
    CUDA, and for a U-Net that Python code looks into while it runs, which a replay does not.
    """

    def __init__(self, unet: UNet, capture: Capture | None = None):
        if capture is None:
            check_device(next(unet.parameters()).device)
        self.unet, self.capture = unet, capture or cuda_capture
        self._recordings: dict[tuple, Recording] = {}

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        check_unwatched(self.unet)
        t = torch.as_tensor(t, device=x_t.device)
        key = tuple((x.shape, x.dtype) for x in (x_t, t, *_tensors(cond)))
        if key not in self._recordings:
            self._recordings[key] = self._record(x_t, t, cond)
        recording = self._recordings[key]
        recording.x_t.copy_(x_t)
        recording.t.copy_(t)
        if recording.filled_from[0] is not cond:
            for static, tensor in zip(_tensors(recording.cond), _tensors(self._prepared(cond)), strict=True):
                static.copy_(tensor)
            recording.filled_from[0] = cond
        recording.replay()
        return recording.out.clone()  # the next replay overwrites it, and samplers remember

    def _prepared(self, cond: Conditioning) -> Conditioning:
        """With keys and values, which are the same at every step."""
        return cond if cond.kv is not None else self.unet.with_keys_values(cond)

    def _record(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Recording:
        x, time, static = x_t.clone(), t.clone(), self._prepared(cond).map(torch.clone)
        return Recording(x, time, static, [cond], *self.capture(lambda: self.unet(x, time, static)))


class Recording(NamedTuple):
    """Where a recorded step reads its arguments, whose cond lies there, what runs it, and where its result appears."""

    x_t: Tensor
    t: Tensor
    cond: Conditioning
    filled_from: list[Conditioning]
    replay: Callable[[], None]
    out: Tensor


def cuda_capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The capture on a GPU. What happens at a first use only, compiling and choosing kernels, happens before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out


def check_device(device: torch.device | str) -> None:
    """ValueError unless graphs can be recorded there."""
    if torch.device(device).type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"a CUDA graph needs an NVIDIA GPU, and the model is on {device}: leave cuda_graph out")


def check_unwatched(network: nn.Module) -> None:
    """ValueError where a layer has a hook or a forward of its own: AttentionMaps would record the first step only."""
    for name, module in network.named_modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"the layer {name or type(module).__name__} is watched while it runs (AttentionMaps, or a hook), which "
                "the replay of a CUDA graph passes by: leave cuda_graph out to look inside"
            )


def _tensors(cond: Conditioning) -> list[Tensor]:
    """The tensors of cond in a fixed order."""
    tensors: list[Tensor] = []
    cond.map(lambda x: tensors.append(x) or x)
    return tensors
