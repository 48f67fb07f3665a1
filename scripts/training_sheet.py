"""A contact sheet of what the mini model learns from, drawings and scenes as often as it sees them, with captions.

python scripts/training_sheet.py emoji --out training.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minisd.eval.sheets import captioned
from minisd.tasks.images import to_pil
from minisd.training.draws import examples
from minisd.training.recipes.mini import mini_config
from minisd.training.scenes import load_training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the data set of scripts/build_emoji.py")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="the sheet (default: training.png)")
    parser.add_argument("--count", type=int, default=100, help="pictures on it (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="which they are (default: 0)")
    given = parser.parse_args()
    pictures = load_training(given.folder, scenes=mini_config().scenes)
    rows = pictures.visited[examples(given.seed, 0, given.count, len(pictures.visited))]
    texts = [pictures.captions[row][i % len(pictures.captions[row])] for i, row in enumerate(rows)]
    captioned(to_pil(pictures.images(rows)), texts, columns=10).save(given.out, optimize=True)
    is_scene = rows >= len(pictures) - mini_config().scenes
    print(f"{given.out}: {given.count} pictures, {int(is_scene.sum())} of them scenes")


if __name__ == "__main__":
    main()
