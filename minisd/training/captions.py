"""The words for a drawing: its label, some of its tags, its style, put in several ways."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

WAYS = 6  # captions of one drawing at most; the first is the plainest
STYLE_DROPPED = 0.2  # so that a prompt without a style has a meaning, too


def compose(record: Mapping, ways: int = WAYS) -> tuple[str, ...]:
    """Captions of a record with label, tags, style and concept, such as "a red apple, noto style".

    The first is always label and style; the others leave out the article or the style, and add up to three tags in any
    order. The same record has the same captions everywhere: chance comes from its concept and style.
    """
    label, style = record["label"].lower(), record["style"]
    tags = [tag for tag in record["tags"] if tag.lower() != label]
    named = f"{style} style"
    captions = [f"{with_article(label)}, {named}"]
    for way in range(1, ways):
        chance = random.Random(f"{record['concept']}/{style}/{way}")
        subject = label if chance.random() < 0.5 else with_article(label)
        chosen = chance.sample(tags, min(len(tags), chance.randrange(4)))
        parts = [subject, *chosen] if chance.random() < STYLE_DROPPED else [subject, *chosen, named]
        captions.append(", ".join(parts))
    return tuple(dict.fromkeys(captions))


def with_article(label: str) -> str:
    """ "red apple" → "a red apple", "eagle" → "an eagle"; plurals stay bare, "face with open eyes" is none."""
    last = (re.split(r" (?:with|without|of|in|on|from|showing) ", label)[0].split() or [""])[-1]
    if not last or not last[0].isalpha() or (last.endswith("s") and not last.endswith(("ss", "us"))):
        return label
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
