"""Choose the pairs of a thing and a colour that no training picture of the mini model shows, by a rule with a seed.

    python scripts/colour_pairs.py emoji

prints PAIRS for minisd/eval/colours.py. Things are single words of which four styles at least have a drawing in one
dominant colour, in the order of their SHA-256 with the seed; each gets the colour that so far has the fewest, of those
at least 75 degrees away from all its drawings' own.
"""

from __future__ import annotations

import argparse
import json
from hashlib import sha256
from pathlib import Path

import numpy as np

from minisd.training.colours import COLOURS, HUES, SHOWN, apart, dominant_colour
from minisd.training.scenes import GROUPS, noun

SEED, COUNT, FAR = "minisd mini, second edition", 30, 75.0
GROUPS = tuple(group for group in GROUPS if group != "smileys-emotion")


def choose(hues: dict[str, list[float]]) -> list[tuple[str, str]]:
    """hues: of each thing the dominant ones of its drawings, in degrees."""
    shown = {thing.split()[0] for thing, _ in SHOWN}
    order = sorted(hues, key=lambda thing: sha256(f"{SEED}/{thing}".encode()).digest())
    pairs: list[tuple[str, str]] = []
    for thing in order:
        able = [c for c in HUES if all(apart(COLOURS[c].hue, hue) >= FAR for hue in hues[thing])]
        if thing in shown or not able or len(pairs) == COUNT:
            continue
        often = {c: sum(colour == c for _, colour in pairs) for c in able}
        pairs.append((thing, min(able, key=lambda c: (often[c], sha256(f"{SEED}/{thing}/{c}".encode()).digest()))))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the data set of scripts/build_emoji.py")
    folder = parser.parse_args().folder
    images = np.load(folder / "images.npy", mmap_mode="r")
    hues: dict[str, list[float]] = {}
    for line, image in zip((folder / "captions.jsonl").read_text(encoding="utf-8").splitlines(), images, strict=True):
        record = json.loads(line)
        name = noun(record["label"])
        is_thing = record["split"] == "train" and record["group"] in GROUPS and name and " " not in name
        if is_thing and (hue := dominant_colour(image)) is not None:
            hues.setdefault(name, []).append(hue)
    for pair in choose({name: own for name, own in hues.items() if len(own) >= 4}):
        print(f"    {json.dumps(pair)[1:-1].join('()')},")


if __name__ == "__main__":
    main()
