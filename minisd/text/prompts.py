r"""From prompts to the context of the U-Net, in the syntax for which the prompt was written.

    syntax  weights                                 over 75 tokens            what a weight w does to hidden states z
    plain       - (brackets are text)                   cut, with a warning       -
    chunked     - (brackets are text)                   chunks                    -
    a1111       (x) [x] (x:1.3), escaped by a backslash chunks, BREAK, commas     w·z, then rescaled to the mean of z
    comfyui     (x) (x:1.3), escaped by a backslash     chunks                    z_empty + w·(z - z_empty)

"plain" is Stable Diffusion's own code (CompVis), "a1111" AUTOMATIC1111's stable-diffusion-webui, "comfyui" ComfyUI. A
chunk is up to 75 ids between BOS and EOS; it is encoded by itself, and the states of a prompt's chunks concatenated.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from minisd.text.tokenizer import FIRST_ADDED, Tokenizer

SYNTAXES = ("plain", "chunked", "a1111", "comfyui")
EMPHASIS = 1.1  # what a pair of round brackets multiplies by
COMMA_WINDOW = 20  # A1111's option "prompt word wrap length limit", its default
WHOLE_BELOW = 8  # ComfyUI keeps a fragment of fewer tokens in one chunk (max_word_length)


def encode_prompts(
    text_encoder: Callable[[Tensor], Tensor],
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    *,
    syntax: str = "plain",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The context 'b l d' of the prompts; l is the tokenizer's length (77) times the number of chunks.

    text_encoder: ids 'n 77' (int64, on `device`) → hidden states 'n 77 d', such as CLIPText. Weights act in float32 or
    wider; the result has the states' dtype. Prompts of unequal length are repeated to one length, which changes no
    image (see `same_length`), and none depends on its neighbours. ValueError for an unknown syntax or no prompt.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError('no prompts were given: for an image without a prompt encode the empty prompt, [""]')
    per_prompt = [chunk_prompt(tokenizer, prompt, syntax) for prompt in prompts]
    chunks = list(chain(*per_prompt))
    ids = torch.tensor([chunk.ids for chunk in chunks], device=device)
    states = text_encoder(ids)
    if any(weight != 1 for chunk in chunks for weight in chunk.weights):
        weights = torch.tensor([chunk.weights for chunk in chunks], dtype=torch.float32, device=device)
        if syntax == "a1111":
            states = weigh_a1111(states, weights)
        else:
            empty = text_encoder(torch.tensor([tokenizer.frame([])], device=device))
            states = weigh_comfyui(states, weights, empty)
    parts = states.split([len(own) for own in per_prompt])
    return torch.cat(same_length(*(rearrange(part, "k l d -> 1 (k l) d") for part in parts)))


def same_length(*contexts: Tensor) -> list[Tensor]:
    """Contexts 'b l d' of any lengths, repeated whole until all are equally long: for a prompt and its negative prompt.

    Exact: over k copies of the same keys and values, softmax attention gives what it gives over one. (ComfyUI does this
    in comfy/conds.py; A1111 runs two passes.) To pad with chunks of "" would change an image with the length of the
    prompt beside it.
    """
    length = math.lcm(*(context.shape[1] for context in contexts))
    return [repeat(context, "b l d -> b (k l) d", k=length // context.shape[1]) for context in contexts]


def weigh_a1111(states: Tensor, weights: Tensor) -> Tensor:
    """w·z of states z 'n l d' and weights w 'n l', rescaled so that the mean of each chunk is what it was.

    stable-diffusion-webui modules/sd_emphasis.py, "Original"; there the mean is over the tensor of one call, which
    holds one chunk of one prompt. ValueError where a mean changes its sign or becomes zero: no scale restores it.
    """
    z = states.to(torch.promote_types(states.dtype, torch.float32))
    weighted = z * weights[..., None]
    scale = z.mean((1, 2), keepdim=True) / weighted.mean((1, 2), keepdim=True)
    scale = torch.where(weights.ne(1).any(1)[:, None, None], scale, 1.0)
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError(
            "a1111 weights are followed by a rescaling to the old mean of the states, and these weights turn the mean "
            "to zero or to the other sign: use weights nearer to 1, or prompt_syntax='comfyui'"
        )
    return (weighted * scale).to(states.dtype)


def weigh_comfyui(states: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """z_empty + w·(z - z_empty) of states z 'n l d' and weights w 'n l', at each position.

    empty: the states '1 l d' of the empty prompt. ComfyUI comfy/sd1_clip.py, encode_token_weights.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    z, z_empty, w = states.to(dtype), empty.to(dtype), weights[..., None].to(dtype)
    return torch.lerp(z_empty, z, w).to(states.dtype)  # lerp is exact at w = 0 and at w = 1


# From a prompt to chunks


class Chunk(NamedTuple):
    """A row for the text encoder: framed ids, and one weight per id (1 for BOS, EOS and padding)."""

    ids: list[int]
    weights: list[float]


def chunk_prompt(tokenizer: Tokenizer, prompt: str, syntax: str) -> list[Chunk]:
    """The chunks of a prompt, at least one. Placeholders keep all their vectors in one chunk.

    Every fragment of `parse_weights` is tokenized by itself, as both programs do.
    """
    fragments = parse_weights(prompt, syntax)
    pattern, advice = UNREAD[syntax]
    if match := pattern.search(prompt):
        warnings.warn(f"{match[0]!r} is read as text in the prompt syntax {syntax!r}: {advice}", stacklevel=3)
    if syntax == "plain":
        return [Chunk(tokenizer(prompt)[0].tolist(), [1.0] * tokenizer.length)]
    if syntax == "chunked":
        runs = [[(i, 1.0) for i in run] for run in tokenizer.chunks(tokenizer.encode(prompt))]
    else:
        runs = {"a1111": _runs_a1111, "comfyui": _runs_comfyui}[syntax](tokenizer, fragments)
    return [_frame(tokenizer, run) for run in runs]


Run = list[tuple[int, float]]  # the (id, weight) of one chunk, without BOS, EOS and padding


def _frame(tokenizer: Tokenizer, run: Run) -> Chunk:
    ids = tokenizer.frame([i for i, _ in run])
    return Chunk(ids, [1.0, *(weight for _, weight in run), *[1.0] * (len(ids) - 1 - len(run))])


def _runs_a1111(tokenizer: Tokenizer, fragments: list[tuple[str, float]]) -> list[Run]:
    """The word BREAK ends a chunk; at the end of a full one, what follows its last comma moves on to the next if that
    comma is one of the last COMMA_WINDOW ids (stable-diffusion-webui modules/sd_hijack_clip.py, tokenize_line)."""
    room, comma = tokenizer.length - 2, tokenizer.encode(",")
    runs: list[Run] = [[]]
    comma_end = 0  # in the last run; 0 is no comma
    for text, weight in fragments:
        for section, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
            if section:
                runs.append([])
                comma_end = 0
            for ids in _units(tokenizer, part):
                if ids == comma:
                    comma_end = len(runs[-1]) + 1
                while runs[-1] and len(runs[-1]) + len(ids) > room:
                    run = runs.pop()
                    end = comma_end if comma_end and len(run) == room < comma_end + COMMA_WINDOW else len(run)
                    runs += [run[:end], run[end:]]
                    comma_end = 0
                runs[-1] += [(i, weight) for i in ids]
    return runs if runs[-1] or len(runs) == 1 else runs[:-1]  # a BREAK at the very end opens no chunk


def _runs_comfyui(tokenizer: Tokenizer, fragments: list[tuple[str, float]]) -> list[Run]:
    """A fragment of WHOLE_BELOW ids or more fills a chunk to its end and goes on in the next; a shorter one moves on
    whole (ComfyUI comfy/sd1_clip.py, tokenize_with_weights; earlier versions of it count the words one by one)."""
    room = tokenizer.length - 2
    runs: list[Run] = [[]]
    for text, weight in fragments:
        for added, units in groupby(_units(tokenizer, text), key=lambda ids: ids[0] >= FIRST_ADDED):
            for ids in units if added else [list(chain(*units))]:
                divisible = not added and len(ids) >= WHOLE_BELOW
                rest = [(i, weight) for i in ids]
                while len(runs[-1]) + len(rest) > room and (divisible or runs[-1]):
                    end = room - len(runs[-1]) if divisible else 0
                    runs[-1] += rest[:end]
                    rest = rest[end:]
                    runs.append([])
                runs[-1] += rest
    return runs


def _units(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """The ids of a text one by one, those of a placeholder together."""
    vectors = {own[0]: len(own) for own in tokenizer.added_tokens.values()}
    ids, units, start = tokenizer.encode(text), [], 0
    while start < len(ids):
        units.append(ids[start : start + vectors.get(ids[start], 1)])
        start += len(units[-1])
    return units


# From a prompt to weighted fragments

NUMBER = r"\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*"
MARKS_A1111 = re.compile(rf"(\\[()\[\]\\]?|[(\[\])]|:{NUMBER}\))")
WEIGHT = re.compile(rf"(?<!\\)\([^()]*:{NUMBER}\)")
EDITING = re.compile(rf"(?<!\\)\[[^\[\]]*(?::{NUMBER}|\|[^\[\]]*)\]|\bAND\b")
WEIGHTS_ELSEWHERE = WEIGHT, "prompt_syntax='a1111' and 'comfyui' read weights"
UNREAD = {  # what another syntax reads: pattern, advice
    "plain": WEIGHTS_ELSEWHERE,
    "chunked": WEIGHTS_ELSEWHERE,
    "a1111": (EDITING, "minisd has no prompt editing, alternation or AND"),
    "comfyui": (re.compile(r"\bBREAK\b"), "'a1111' starts a new chunk there"),
}


def parse_weights(prompt: str, syntax: str) -> list[tuple[str, float]]:
    r"""The prompt as (text, weight) in order, without the syntax of the weights; no text is empty, "" gives [].

    a1111 (modules/prompt_parser.py, parse_prompt_attention): (x) is 1.1, [x] 1/1.1, (x:w) w; nested ones multiply; a
    bracket that nothing closes reaches to the end; one that nothing opened is text; \( \) \[ \] \\ are characters and
    any other backslash vanishes. Neighbours of equal weight are one fragment. Prompt editing, [a:b:0.5] and [a|b], is
    not read: its brackets are [x]. BREAK is left in the text, for the chunks, and works inside brackets too (where
    A1111 takes it for a word of negative weight).

    comfyui (comfy/sd1_clip.py, token_weights): (x) multiplies by 1.1; (x:w) is w whatever surrounds it; a bracket
    without its partner is text; \( \) are characters.

    In both a weight that is no finite number is text: (x:big) is "x:big" at 1.1.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"unknown prompt syntax {syntax!r}; known: {', '.join(SYNTAXES)}")
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt must be a str, not {type(prompt).__name__}: {prompt!r:.80}")
    fragments = {"a1111": _parse_a1111, "comfyui": _parse_comfyui}.get(syntax, lambda text: [(text, 1.0)])(prompt)
    return [fragment for fragment in fragments if fragment[0]]


def _parse_a1111(prompt: str) -> list[tuple[str, float]]:
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for n, part in enumerate(MARKS_A1111.split(prompt)):  # text and marks in turn
        if n % 2 == 0:
            pieces += [(part, 1.0)] if part else []
        elif part[0] == "\\":
            pieces.append((part[1:], 1.0))
        elif part in opened:
            opened[part].append(len(pieces))
        elif part[-1] == ")" and opened["("]:
            close("(", EMPHASIS if part == ")" else float(part[1:-1]))
        elif part == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        else:
            pieces.append((part, 1.0))
    for bracket, factor in ("(", EMPHASIS), ("[", 1 / EMPHASIS):
        while opened[bracket]:
            close(bracket, factor)
    return [("".join(text for text, _ in run), weight) for weight, run in groupby(pieces, key=itemgetter(1))]


def _parse_comfyui(prompt: str, weight: float = 1.0) -> list[tuple[str, float]]:
    fragments = []
    for part in _outer_brackets(prompt):
        if not re.fullmatch(r"\(.*(?<!\\)\)", part, re.DOTALL):
            fragments.append((re.sub(r"\\([()])", r"\1", part), weight))
            continue
        inside, _, number = part[1:-1].rpartition(":")
        own = _finite(number) if inside else None
        fragments += _parse_comfyui(part[1:-1], weight * EMPHASIS) if own is None else _parse_comfyui(inside, own)
    return fragments


def _outer_brackets(text: str) -> list[str]:
    """The text cut before and after its outermost brackets. A closing one too many takes the next opening one along."""
    parts, start, depth = [], 0, 0
    for bracket in re.finditer(r"(?<!\\)[()]", text):
        opens = bracket[0] == "("
        if opens and depth == 0:
            parts.append(text[start : bracket.start()])
            start = bracket.start()
        depth += 1 if opens else -1
        if not opens and depth == 0:
            parts.append(text[start : bracket.end()])
            start = bracket.end()
    return [part for part in [*parts, text[start:]] if part]


def _finite(number: str) -> float | None:
    try:
        value = float(number)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
