"""Byte-pair encoding (Sennrich et al. 2016) with CLIP's vocabulary: one word in, its ids out.

An id is a position in this list: 256 bytes, the same 256 bytes as the last of a word, then 48894 learned merges of two
earlier entries, in the order they were learned. So the vocabulary is one table, (id, id) → id, and the lower of two
ids is the earlier merge.
"""

import gzip
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

# the order of the first 256 ids: the printable bytes of Latin-1, then the rest
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = _PRINTABLE + sorted({*range(256)} - {*_PRINTABLE})
_BYTE_IDS = {byte: i for i, byte in enumerate(_BYTES)}
_MERGES = 48894


@lru_cache(maxsize=1 << 16)
def byte_pairs(word: str) -> tuple[int, ...]:
    """The ids of one word (not empty): start from its UTF-8 bytes, the last one marked as the end of the word, and
    apply the earliest learned merge wherever it fits, from the left, until no merge fits."""
    merges = vocabulary().merges
    ids = [_BYTE_IDS[byte] for byte in word.encode()]
    ids[-1] += 256
    while possible := [merges[pair] for pair in pairwise(ids) if pair in merges]:
        earliest, merged, i = min(possible), [], 0
        while i < len(ids):
            fits = i + 1 < len(ids) and merges.get((ids[i], ids[i + 1])) == earliest
            merged.append(earliest if fits else ids[i])
            i += 2 if fits else 1
        ids = merged
    return tuple(ids)


class Vocabulary(NamedTuple):
    """symbols: id → the entry as the file writes it. spelled: id → its UTF-8 bytes, a space after the end of a word.
    merges: (id, id) → id of the two joined."""

    symbols: list[str]
    spelled: list[bytes]
    merges: dict[tuple[int, int], int]


@lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    """CLIP's 49406 entries, read once from the file that OpenAI published."""
    # the file writes a printable byte as its Latin-1 character and the others, in order, as U+0100 and on
    symbols = [chr(byte) for byte in _PRINTABLE] + [chr(256 + i) for i in range(256 - len(_PRINTABLE))]
    symbols += [symbol + "</w>" for symbol in symbols]
    spelled = [bytes([byte]) for byte in _BYTES] + [bytes([byte]) + b" " for byte in _BYTES]
    merges: dict[tuple[int, int], int] = {}
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    for line in merge_lines():
        left, right = line.split()
        pair = ids[left], ids[right]
        merges[pair] = ids[left + right] = len(symbols)
        symbols.append(left + right)
        spelled.append(spelled[pair[0]] + spelled[pair[1]])
    return Vocabulary(symbols, spelled, merges)


def merge_lines() -> list[str]:
    """The merges as the file writes them: "t h</w>"."""
    packed = Path(__file__).parent / "vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
    # a line that names the version comes first, and the file goes on after the merges that CLIP uses
    return gzip.decompress(packed.read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
