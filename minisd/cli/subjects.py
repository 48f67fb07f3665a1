"""The command that compares the ways to teach a subject: `minisd eval subjects`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from minisd.cli.options import Model

FIRST = ("cupcake", "teapot", "teddy-bear", "racing-car", "tulip")  # in three styles; none that rates were chosen on


def eval_subjects(
    *subject: str,
    data: Path = Path("weights/subjects"),
    out: Path = Path("subjects"),
    all: bool = False,
    train_steps: int | None = None,
    model: Model = Model(),
) -> None:
    """Teach a model held-out subjects by every method, and score them: a table, and a sheet to look at.

    The same command goes on where it was stopped; what is finished is only read.

    Args:
        subject: folders of --data, each with train/ and test/, and masks/train/, masks/test/ and other/ if there are
            some; five of them when left out.
        data: the folder of the subjects, with a subjects.json that names their classes.
        out: gets subjects.md, subjects.json, subjects.png, and a folder for each subject and method.
        all: all subjects of the folder; about four times as long.
        train_steps: of every training, in place of some hundreds: to try it out.
    """
    file = data / "subjects.json"
    if not file.is_file():
        raise ValueError(f"{data} holds no subjects.json, which names the subjects and their classes: give --data")
    known = json.loads(file.read_text(encoding="utf-8"))
    first = [name for name in FIRST if name in known] or list(known)[: len(FIRST)]
    chosen = list(known) if all else list(subject or first)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{unknown[0]} is no subject of {data}; known: {', '.join(known)}")
    from minisd.eval.comparison import SECONDS, Comparison, compare
    from minisd.eval.comparison_page import contact_sheet, notes, table
    from minisd.eval.features import CLIPFeatures
    from minisd.eval.report import machine
    from minisd.eval.subject import SubjectJudge
    from minisd.files import write_whole
    from minisd.training.options import Run
    from minisd.training.recipes.mini import has_bfloat16

    sd = model.load_whole()
    quick = sd.device.type == "cuda" or has_bfloat16()
    plan = Comparison(precision="bfloat16" if quick else "float32", train_steps=train_steps)
    clip = CLIPFeatures.of(sd)
    run = Run(device=model.device, save_every=100, log_every=20, sample_every=0)
    found = {}
    for number, name in enumerate(chosen):
        print(f"{name} ({number + 1} of {len(chosen)})", file=sys.stderr)
        found[name] = compare(sd, data / name, known[name]["class"], out / name, plan, partial(SubjectJudge, clip), run)
    seconds = [scores.get(SECONDS, float("nan")) for rows in found.values() for scores in rows.values()]
    facts = machine(sd.device) | {"minutes, of all rows": round(sum(seconds) / 60, 1), "feature space": clip.name}
    about = [*(f"{key}: {value}" for key, value in facts.items()), *notes(plan)]
    page = "\n".join([table(found), *(f"- {line}" for line in about), ""])
    sheet = contact_sheet(out, {name: data / name for name in chosen}, found)
    text = json.dumps({**facts, "scores": found}, indent=1, ensure_ascii=False) + "\n"
    write_whole(out / "subjects.md", lambda file: file.write(page.encode()))
    write_whole(out / "subjects.json", lambda file: file.write(text.encode()))
    write_whole(out / "subjects.png", lambda file: sheet.save(file, "PNG", optimize=True))
    print(page, end="")
    print(*(out / f"subjects.{suffix}" for suffix in ("md", "json", "png")), sep="\n")
