"""CLIP's tokenizer: clean the text, cut it into words, encode each word by BPE, frame the ids (BOS, EOS, padding).

The ids equal those of openai/CLIP's own tokenizer, which the text towers were trained with. On raw text Hugging Face's
fast CLIPTokenizer differs by design: it neither repairs text with ftfy nor decodes HTML entities, so curly quotes,
full-width letters, mojibake, control characters and `&amp;` get other ids there. On text that went through `clean` the
two agree.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from minisd.text.bpe import byte_pairs, vocabulary

if TYPE_CHECKING:
    import regex
    import torch

BOS, EOS = 49406, 49407
FIRST_ADDED = 49408  # placeholders come after CLIP's own rows of the token embedding
SPECIALS = {  # how a prompt can spell BOS and EOS; each dialect reads the other's words as plain text
    "openai": ("<|startoftext|>", "<|endoftext|>"),
    "open_clip": ("<start_of_text>", "<end_of_text>"),
}


class Tokenizer:
    """`tokenizer(["a cat"])` is a LongTensor 'b length': BOS, the prompt's ids, EOS, then `pad_id` up to `length`.

    pad_id: 49407 (EOS) for SD1, 0 (which reads "!") for SD2; OpenAI's and open_clip's own `tokenize` pad with 0.
    dialect: "openai" (CLIP, SD1) or "open_clip" (official SD2); they differ only in the words of SPECIALS.
    added_tokens: {placeholder: its consecutive ids}, as the property of that name gives it, to restore a checkpoint's.
    """

    def __init__(
        self,
        *,
        length: int = 77,
        pad_id: int = EOS,
        dialect: str = "openai",
        added_tokens: Mapping[str, Sequence[int]] | None = None,
    ):
        if length < 3:
            raise ValueError(f"length {length} has no room for a prompt between BOS and EOS: use 3 or more (CLIP: 77)")
        if not 0 <= pad_id < FIRST_ADDED:
            raise ValueError(f"pad_id {pad_id} is not one of CLIP's ids 0…{EOS}: use 49407 (SD1) or 0 (SD2)")
        if dialect not in SPECIALS:
            raise ValueError(f"unknown dialect {dialect!r}; known: {', '.join(SPECIALS)}")
        self.length, self.pad_id, self.dialect = length, pad_id, dialect
        self._added: dict[str, list[int]] = {}
        for token, ids in (added_tokens or {}).items():
            self._add(token, list(ids))

    def __call__(self, prompts: str | Sequence[str]) -> torch.Tensor:
        """A prompt or a list of them as a LongTensor 'b length'.

        What does not fit is cut (BOS and the first length - 2 ids stay, then EOS: the original's rule) with a
        UserWarning that quotes the dropped words. `chunks` is the way to keep them.
        """
        import torch

        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, (list, tuple)):
            raise ValueError(f"prompts must be a str or a list of str, not {type(prompts).__name__}")
        fitted = list(map(self._fit, prompts))
        return torch.tensor([self.frame(ids) for ids in fitted], dtype=torch.long).reshape(-1, self.length)

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without BOS, EOS or padding."""
        return [i for _, ids in self._words(clean(text)) for i in ids]

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, cleaned, each with its ids."""
        cleaned = clean(text)
        words = [(start, list(ids)) for start, ids in self._words(cleaned)]
        ends = [*(start for start, _ in words[1:]), len(cleaned)]
        return [(cleaned[start:end].strip(), ids) for (start, ids), end in zip(words, ends, strict=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids spell, as CLIP reads it: lower case, a space after every word ("isn 't", "1 2").

        A framed row (it starts with BOS) is read up to its first EOS. The first of a placeholder's ids spells its name.
        """
        ids = [int(i) for i in ids]
        if ids and ids[0] == BOS:
            ids = ids[1 : ids.index(EOS)] if EOS in ids else ids[1:]
        spelled = dict(zip((BOS, EOS), SPECIALS[self.dialect], strict=True))
        for token, own in self._added.items():
            spelled |= dict.fromkeys(own, "") | {own[0]: token}
        if unknown := [i for i in ids if not 0 <= i < BOS and i not in spelled]:
            raise ValueError(f"id {unknown[0]} is no token: CLIP has 0…{EOS}, added are {self._added or 'none'}")
        table = vocabulary().spelled
        spelling = [table[i] if i < BOS else f"{spelled[i]} ".encode() for i in ids if spelled.get(i) != ""]
        return b"".join(spelling).decode(errors="replace").strip()

    # Long prompts: [tokenizer.frame(run) for run in tokenizer.chunks(tokenizer.encode(prompt))]

    def chunks(self, ids: Sequence[int]) -> list[list[int]]:
        """The ids in order, in runs of at most length - 2, as `frame` takes them; no ids are one empty run.

        A placeholder's vectors stay in one run. The lengths of the runs say how to cut what goes with the ids, such as
        the weights of a weighted prompt.
        """
        room, inside = self.length - 2, {i for own in self._added.values() for i in own[1:]}
        runs, rest = [], list(ids)
        while len(rest) > room:
            end = next((end for end in range(room, 0, -1) if rest[end] not in inside), room)
            runs.append(rest[:end])
            rest = rest[end:]
        return [*runs, rest]

    def frame(self, ids: Sequence[int]) -> list[int]:
        """BOS, up to length - 2 ids, EOS, padding: one row for the text encoder."""
        padding = self.length - 2 - len(ids)
        if padding < 0:
            raise ValueError(f"{len(ids)} ids with BOS and EOS do not fit in {self.length}: split them with chunks")
        return [BOS, *ids, EOS, *[self.pad_id] * padding]

    # Placeholders (textual inversion, Gal et al. 2022): words with embedding rows of their own

    @property
    def added_tokens(self) -> dict[str, list[int]]:
        """Placeholder → its ids, in the order of adding; `Tokenizer(added_tokens=…)` restores exactly these ids."""
        return {token: list(ids) for token, ids in self._added.items()}

    @property
    def vocab_size(self) -> int:
        """The rows that the token embedding needs: the highest id plus one."""
        return max((ids[-1] for ids in self._added.values()), default=EOS) + 1

    def add_token(self, token: str, vectors: int = 1) -> list[int]:
        """Make `token` a placeholder for `vectors` new consecutive ids, from `vocab_size` on, and return them.

        It is found in any case, anywhere in a prompt, next to punctuation too ("<my-cat>'s bed"), with or without
        spaces round it; only where it starts or ends with a letter, digit or underscore it is never part of a longer
        word. Of two placeholders the longer wins. The ids of any text without it stay what they were.
        """
        if not isinstance(vectors, int) or not 1 <= vectors <= self.length - 2:
            raise ValueError(f"a token has 1…{self.length - 2} vectors, what one row of ids can hold, not {vectors}")
        return list(self._add(token, list(range(self.vocab_size, self.vocab_size + vectors))))

    def remove_token(self, token: str) -> list[int]:
        """Make `token` plain text again and return the ids it had. The other placeholders keep theirs."""
        if (name := clean(token)) not in self._added:
            raise ValueError(f"{token!r} is not an added token; added: {', '.join(self._added) or 'none'}")
        return self._added.pop(name)

    def _add(self, token: str, ids: list[int]) -> list[int]:
        name = clean(token)
        if not name or name != token.lower() or name != clean(name) or " " in name:
            raise ValueError(
                f"{token!r} cannot be a placeholder: it is looked for in cleaned prompts (it becomes {name!r}), "
                "so use one word without spaces, entities or typographic characters, such as '<my-cat>'"
            )
        if name in self._added:
            raise ValueError(f"{token!r} is an added token already, ids {self._added[name]}: remove it or rename yours")
        if len(known := self.encode(name)) == 1:
            raise ValueError(
                f"{token!r} is a word of CLIP's vocabulary (id {known[0]}) and keeps its meaning: "
                "choose a name that CLIP has no single id for, such as '<my-cat>'"
            )
        taken = {i for own in self._added.values() for i in own}
        if not ids or ids[0] < FIRST_ADDED or ids != list(range(ids[0], ids[0] + len(ids))) or taken & {*ids}:
            raise ValueError(f"ids {ids} of {token!r} must be consecutive, {FIRST_ADDED} or more, and no other token's")
        self._added[name] = ids
        return ids

    def _words(self, text: str) -> Iterator[tuple[int, Sequence[int]]]:
        """(position, ids) of each word of a cleaned text: placeholders are cut out first, then CLIP's words between."""
        pattern, specials = _word_pattern(self.dialect), dict(zip(SPECIALS[self.dialect], ([BOS], [EOS]), strict=True))
        start = 0
        for placeholder in [*_placeholder_pattern(tuple(self._added)).finditer(text), None]:
            for word in pattern.finditer(text, start, placeholder.start() if placeholder else len(text)):
                yield word.start(), specials.get(word[0]) or byte_pairs(word[0])
            if placeholder:
                yield placeholder.start(), self._added[placeholder[0]]
                start = placeholder.end()

    def _fit(self, prompt: str) -> list[int]:
        """The ids of a prompt that one row has room for, with a warning that quotes the words it has not."""
        room, written = self.length - 2, _repair(prompt)
        text = written.lower()
        words = list(self._words(text))
        ids = [i for _, own in words for i in own]
        read = 0
        for start, own in words:
            if read + len(own) > room:
                # a few letters change length in lower case ("İ"): then the positions hold in the cleaned text only
                dropped = (written if len(written) == len(text) else text)[start:]
                partly = f" (of its first word, {room - read} of {len(own)} tokens stay)" if read < room else ""
                message = f"the prompt has {len(ids)} tokens, the text encoder reads {room}: dropped {dropped!r}"
                warnings.warn(message + partly, stacklevel=3)
                break
            read += len(own)
        return ids[:room]


def clean(text: str) -> str:
    """OpenAI's cleaning: ftfy's repairs, HTML entities decoded twice, white space collapsed, lower case."""
    return _repair(text).lower()


def _repair(text: str) -> str:
    import ftfy

    if not isinstance(text, str):
        raise ValueError(f"a text must be a str, not {type(text).__name__}: {text!r:.80}")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


@lru_cache
def _word_pattern(dialect: str) -> regex.Pattern[str]:
    import regex

    specials = "|".join(regex.escape(word) for word in SPECIALS[dialect])
    # IGNORECASE is the original's and matters in lower case too: "ſ" (long s) folds to "s"
    return regex.compile(rf"{specials}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE)


@lru_cache
def _placeholder_pattern(tokens: tuple[str, ...]) -> regex.Pattern[str]:
    import regex

    def whole(token: str) -> str:
        before, after = regex.match(r"\w", token), regex.search(r"\w$", token)
        return (r"(?<!\w)" if before else "") + regex.escape(token) + (r"(?!\w)" if after else "")

    return regex.compile("|".join(map(whole, sorted(tokens, key=len, reverse=True))) or r"(?!)")
