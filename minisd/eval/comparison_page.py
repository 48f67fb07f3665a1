"""What a comparison of methods says: a table over all subjects, what its words mean, and a sheet to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from minisd.eval.comparison import CEILING, FLOOR, NO_PRIOR, OTHERS, TRANSFER, Comparison, Scores, folder_of
from minisd.eval.intervals import bootstrap, paired_bootstrap
from minisd.eval.sheets import captioned
from minisd.tasks.images import load_image
from minisd.training.folders import image_paths

COLUMNS = {
    "CLIP-I": "higher",
    "DINO": "higher",
    TRANSFER: "higher",
    "CLIP-T": "higher",
    "PRES": "lower",
    "DIV": "higher",
}


def table(found: Mapping[str, Mapping[str, Scores]]) -> str:
    """Markdown: every row's mean over the subjects, with 95 % intervals; then, paired, its distance from the floor.

    found: subject → row → scores.
    """
    names = rows_of(found)
    columns = [name for name in COLUMNS if any(name in scores[FLOOR] for scores in found.values())]

    def values(column: str, *rows: str) -> list[list[float]]:
        """Of each row, over the subjects that have all of them."""
        scores = [[of[row].get(column) for row in rows] for of in found.values() if of.keys() >= set(rows)]
        whole = [values for values in scores if None not in values]
        return [list(of_row) for of_row in zip(*whole, strict=True)] or [[] for _ in rows]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(row: str, column: str, against: str | None = None) -> str:
        own, *others = values(column, row, *([against] if against else []))
        if not own:
            return "-"
        if not others:
            return str(bootstrap(own))
        interval = paired_bootstrap(own, *others)
        return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"

    head = [
        line(["", *(f"{name} ({COLUMNS[name]} is better)" for name in columns)]),
        line(["---"] * (1 + len(columns))),
    ]
    means = [line([name, *(cell(name, column) for column in columns)]) for name in names]
    learnt = [name for name in names if name not in (FLOOR, CEILING, OTHERS)]
    pairs = [line([name, *(cell(name, column, FLOOR) for column in columns)]) for name in learnt]
    kept = [line(["dreambooth, less that without prior", *(cell("dreambooth", c, NO_PRIOR) for c in columns)])]
    first = [*head, *means, "", "Less the untouched model, subject by subject:", ""]
    return "\n".join([*first, *head, *pairs, *(kept if NO_PRIOR in names else [])]) + "\n"


def rows_of(found: Mapping[str, Mapping[str, Scores]]) -> list[str]:
    return list(dict.fromkeys(row for scores in found.values() for row in scores))


def notes(plan: Comparison) -> list[str]:
    """What the table's words mean."""
    loops = {method.name: method.config("thing").loop for method in plan.lessons()}
    steps = ", ".join(f"{name} {loop.steps} × {loop.batch_size} at {loop.lr:g}" for name, loop in loops.items())
    prompts = ", ".join(f'"{prompt.replace("{}", "thing")}"' for prompt in plan.prompts)
    return [
        f"Learnt from {plan.views} views at most, judged by test views; views with masks are cut out, over white, "
        f"with hard edges. Steps, photos in each, rate: {steps}; beside each photo one of {plan.class_prior} pictures "
        "of the class, but in textual inversion and without prior. Chosen on the duck and the alarm clock.",
        f"Drawn: {plan.seeds} pictures of each prompt ({prompts}), {plan.settings.steps} steps of "
        f"{plan.settings.sampler}, guidance {plan.settings.guidance_scale:g}. The untouched model is given the class "
        "word, each method what it calls the subject.",
        f"CLIP-I: mean cosine to the test views. {TRANSFER}: to other vendors' drawings of the same thing, high where "
        "the thing was learnt and not one drawing of it. CLIP-T: cosine to the prompt with the class word. PRES: mean "
        f"cosine of {plan.class_pictures} pictures of the class alone to the test views, which tells drift. DIV: mean "
        "of 1 - cosine between the pictures of a prompt. After Ruiz et al. 2023, section 4, with the space named above "
        "in place of DINO and LPIPS.",
        "Intervals hold the middle 95 % of bootstrap means over subjects; of five subjects that is too narrow, and "
        "covers about 85 %. A CLIP that was trained with the model is no neutral judge: compare within the table.",
    ]


def contact_sheet(out: Path, subjects: Mapping[str, Path], found: Mapping[str, Mapping[str, Scores]]) -> Image.Image:
    """A line for each subject: a training view, then the first picture of every other row, of the plainest prompt."""
    rows = [row for row in rows_of(found) if row != CEILING]
    images, texts = [], []
    for subject, folder in subjects.items():
        drawn = {row: folder_of(out / subject, row) / "first.png" for row in rows if row in found[subject]}
        for text, path in {subject: image_paths(folder / "train")[0], **{row: drawn.get(row) for row in rows}}.items():
            image = Image.new("RGB", images[0].size, "white") if path is None else load_image(path).convert("RGB")
            images.append(image if not images else image.resize(images[0].size))
            texts.append(text)
    return captioned(images, texts, columns=1 + len(rows))
