"""Where a picture looks at which word: the weights of the cross-attention, recorded from the U-Net as it runs.

    with AttentionMaps(sd.unet) as maps:
        image = sd.txt2img(prompt, seed=0)[0]
    words = prompt_words(sd.tokenizer, sd.tokenizer(prompt)[0])
    plot_attention(maps.mean()[0], words, image, "attention.png")

The idea is Hertz et al. 2022 (prompt-to-prompt, section 3.1) and Tang et al. 2022 (DAAM, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minisd.models.unet import UNet
from minisd.nn.attention import Attention
from minisd.text.bpe import vocabulary
from minisd.text.tokenizer import BOS, EOS, Tokenizer


class AttentionMaps:
    """Inside `with`, the softmax(q kᵀ) of every cross-attention of `unet` is accumulated; its outputs stay bit-equal.

    images: how many images one call of the network works on. A call with twice as many rows is guidance's
    [uncond, cond], and only its second half counts. layers: which of the "….attn2" of `unet.attentions()` to record,
    by default all. Every layer and every call weighs the same. The layers run as they are, and their maps are
    computed once more beside them, without gradient and in float32 at least. On leaving the block, also by an
    exception, the U-Net is what it was; what was recorded stays, and a second `with` adds to it.

    ValueError for a call with another number of rows, and where the keys of a layer change between two calls: the maps
    of two prompts have no mean. Guidance in two calls (`joined=False`) is such a case.
    """

    def __init__(self, unet: UNet, *, images: int = 1, layers: Iterable[str] | None = None):
        cross = {name: layer for name, layer in unet.attentions().items() if name.endswith("attn2")}
        names = list(cross if layers is None else layers)
        if unknown := [name for name in names if name not in cross]:
            raise ValueError(f"no cross-attention layer {unknown[0]!r} in this U-Net; known: {', '.join(cross)}")
        if not names:
            raise ValueError("there is no cross-attention layer to record")
        self.unet, self.images = unet, images
        self.layers = {name: cross[name] for name in names}
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}
        self._keys: dict[str, Tensor] = {}
        self._stack = ExitStack()
        self._size: tuple[int, int] | None = None

    def mean(self, layers: Iterable[str] | None = None) -> Tensor:
        """The maps 'b l h w' of the l text tokens at the size of the latents, averaged over heads, layers and calls.

        float32 or wider; at every pixel they sum to 1 over the tokens. layers: some of those recorded, default all.
        """
        names = list(self._sums if layers is None else layers)
        if missing := [name for name in names if name not in self._sums]:
            raise ValueError(f"layer {missing[0]!r} was not recorded; recorded: {', '.join(self._sums) or 'none'}")
        if not names:
            raise ValueError("no attention was recorded: run the U-Net inside `with AttentionMaps(unet) as maps`")
        return sum(self._sums[name] / self._calls[name] for name in names) / len(names)

    def __enter__(self) -> AttentionMaps:
        self._stack.callback(_shadow(self.unet, self._sized(self.unet.forward)))
        for name, layer in self.layers.items():
            self._stack.callback(_shadow(layer, self._recorded(name, layer, layer.forward)))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _sized(self, forward):
        """The U-Net's forward, which tells the layers inside it how tall and wide their tokens once were."""

        def sized(x_t: Tensor, *args, **kwargs) -> Tensor:
            size = tuple(x_t.shape[-2:])
            if x_t.shape[0] not in (self.images, 2 * self.images):
                raise ValueError(
                    f"the U-Net was called with {x_t.shape[0]} rows, but AttentionMaps(images={self.images}) expects "
                    f"{self.images}, or {2 * self.images} with guidance: give it the number of images of a batch"
                )
            if self._sums and self._size != size:
                raise ValueError(
                    f"latents of {size} after latents of {self._size}: maps of two sizes have "
                    "no mean, so use one AttentionMaps for each (and for two-pass generation, one pass)"
                )
            self._size = size
            return forward(x_t, *args, **kwargs)

        return sized

    def _recorded(self, name: str, layer: Attention, forward):
        def recorded(x: Tensor, context: Tensor | None = None, *, kv=None, **kwargs) -> Tensor:
            with torch.no_grad():
                keys = layer.keys_values(x if context is None else context)[0] if kv is None else kv[0]
                self._record(name, layer, x[-self.images :], keys[-self.images :])
            return forward(x, context, kv=kv, **kwargs)

        return recorded

    def _record(self, name: str, layer: Attention, x: Tensor, keys: Tensor) -> None:
        # The keys depend on the prompt alone, whatever the step; batches of other shapes may round them differently.
        known = self._keys.setdefault(name, keys)
        if known.shape != keys.shape or (known - keys).abs().max() > 0.05 * known.abs().max():
            raise ValueError(
                "the prompt changed while its attention was recorded: use one AttentionMaps per prompt, and guidance "
                "in one call (joined=True)"
            )
        queries = rearrange(layer.to_q(x), "b n (i d) -> b n i d", i=layer.heads)
        weights = attention_weights(queries, keys)
        h, w = level_size(*self._size, tokens=x.shape[1])
        maps = rearrange(reduce(weights, "b i n l -> b l n", "mean"), "b l (h w) -> b l h w", h=h, w=w)
        maps = F.interpolate(maps, size=self._size, mode="bilinear", align_corners=False)
        self._sums[name] = self._sums[name] + maps if name in self._sums else maps
        self._calls[name] = self._calls.get(name, 0) + 1


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) 'b i n m' of q 'b n i d' and k 'b m i d', in float32 at least: what attention sums v by."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("b n i d, b m i d -> b i n m", q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype))
    return scores.softmax(dim=-1)


def level_size(h: int, w: int, *, tokens: int) -> tuple[int, int]:
    """The sides of the level of a U-Net on latents of h × w that has so many tokens; a level halves sides upwards."""
    sides = h, w
    while sides[0] * sides[1] > tokens:
        sides = (sides[0] + 1) // 2, (sides[1] + 1) // 2
    if sides[0] * sides[1] != tokens:
        raise ValueError(f"no level of a U-Net has {tokens} tokens where the latents are {h}x{w}")
    return sides


class Word(NamedTuple):
    """A word of a prompt, and the positions of its tokens in the row of ids, which are those of the maps."""

    text: str
    positions: list[int]


def prompt_words(tokenizer: Tokenizer, ids: Iterable[int]) -> list[Word]:
    """The words of a framed row of ids (several rows in a row for a long prompt), sub-word tokens joined.

    BOS, EOS and padding belong to no word. Punctuation and digits are words, as CLIP's tokenizer cuts them; a
    placeholder of several vectors is one.
    """
    last_of = {i: own[-1] for own in tokenizer.added_tokens.values() for i in own}
    words: list[Word] = []
    inside, part = False, []
    for position, i in enumerate(map(int, ids)):
        if inside and i not in (BOS, EOS):
            part.append((i, position))
        ends = i in (BOS, EOS) or (i == last_of[i] if i in last_of else vocabulary().spelled[i].endswith(b" "))
        if part and ends:
            words.append(Word(tokenizer.decode(i for i, _ in part), [position for _, position in part]))
            part = []
        if i in (BOS, EOS):
            inside = i == BOS
    return words


def _shadow(module: nn.Module, forward):
    """Give one module another forward, and return what takes it away again. Names and parameters stay untouched."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def restore() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return restore
