"""Choose what no training of the mini model sees: 120 concepts, by a rule with a seed.

    python scripts/held_out.py FOLDER/packages

writes scripts/held_out.json, which scripts/build_emoji.py reads. 20 concepts are for development, those of the example
subjects, and 100 for tests, so many of each family as QUOTAS says. A family's are those whose SHA-256 with the seed is
least, among those that no sheet of `minisd eval mini` asks for, as long as every held-out concept keeps a sibling in
training: one of the six of its kind that share most words with it, what a model can best know of a thing it never saw.
"""

from __future__ import annotations

import argparse
import json
import sys
from hashlib import sha256
from pathlib import Path

from build_emoji import SUBJECTS, concepts
from emoji_packages import read_emoji

from minisd.eval.sheets import COMMON, PROMPTS

SEED = "minisd mini, second edition"
FILE = Path(__file__).with_name("held_out.json")
QUOTAS = {"animals": 22, "plants": 6, "food": 22, "clothes": 12, "vehicles": 14, "objects": 24}
FAMILIES = {  # by the beginning of Emojibase's name for the kind
    "animals": ("animal-",),
    "plants": ("plant-",),
    "food": ("food-", "drink", "dishware"),
    "clothes": ("clothing",),
    "vehicles": ("transport-ground", "transport-water", "transport-air"),
    "objects": (
        *("musical-instrument", "music", "sound", "phone", "computer", "light-video", "book-paper", "money", "mail"),
        *("writing", "office", "lock", "tool", "science", "medical", "household", "other-object", "sport", "game"),
        *("arts-crafts", "award-medal", "event", "time"),
    ),
}
CLOCK_FACES = ("o’clock", "-thirty")  # twenty-four drawings of one thing
PLAIN = {"a", "an", "and", "the", "of", "with", "in", "on", "face", "symbol"}  # say nothing of what a thing is


def choose(words: dict[str, dict]) -> dict[str, list[dict]]:
    """{"development": [...], "test": [...]}, each {"code", "concept", "family", "siblings": codes, the nearest first}.

    words: those of `read_emoji`, of the concepts that the data set will have.
    """
    asked = {word for prompt in (*COMMON, *PROMPTS) for word in said(prompt)}
    by_name = {entry["concept"]: code for code, entry in words.items()}
    development = [by_name[name] for name in SUBJECTS]
    order = sorted(words, key=lambda code: sha256(f"{SEED}/{code}".encode()).digest())
    near = {code: siblings(code, words) for code in words}
    test: list[str] = []
    for family, quota in QUOTAS.items():
        members = [c for c in order if family_of(words[c]) == family and not asked & said(words[c]["label"])]
        members = [c for c in members if not words[c]["label"].endswith(CLOCK_FACES)]
        for code in members:
            out = {*development, *test, code}
            if code not in development and quota and all(set(near[c]) - out for c in out):
                test.append(code)
                quota -= 1
    out = {*development, *test}

    def entry(code: str) -> dict:
        left = [c for c in near[code] if c not in out]
        return {"code": code, "concept": words[code]["concept"], "family": family_of(words[code]), "siblings": left}

    return {"development": [*map(entry, development)], "test": [*map(entry, test)]}


def family_of(entry: dict) -> str | None:
    return next((name for name, kinds in FAMILIES.items() if entry["kind"].startswith(kinds)), None)


def said(label: str) -> set[str]:
    """The words of a label that say something, without the commonest ending of plurals."""
    plain = "".join(c if c.isalnum() else " " for c in label.lower())
    return {word.removesuffix("s") for word in plain.split()} - PLAIN


def siblings(code: str, words: dict[str, dict], most: int = 6) -> list[str]:
    """Concepts of the same kind that share words with this one, most shared words (of all that both have) first."""
    own = words[code]
    mine = said(" ".join([own["label"], *own["tags"]]))
    shared = {}
    for other, entry in words.items():
        if other != code and entry["kind"] == own["kind"]:
            theirs = said(" ".join([entry["label"], *entry["tags"]]))
            shared[other] = len(mine & theirs) / len(mine | theirs)
    return sorted((c for c, share in shared.items() if share > 0), key=lambda c: (-shared[c], c))[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder of the packages that build_emoji.py fetched")
    given = parser.parse_args()
    try:
        words, codes = read_emoji(given.packages)
        drawn = concepts(given.packages, words, codes)
    except (ValueError, OSError) as error:
        sys.exit(f"held_out: {error}")
    text = json.dumps(choose({code: words[code] for code in drawn}), indent=1, ensure_ascii=False) + "\n"
    FILE.write_text(text, encoding="utf-8", newline="\n")
    print(FILE)


if __name__ == "__main__":
    main()
