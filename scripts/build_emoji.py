"""Build the mini model's data set: the emoji that three vendors' styles have in common, as six vendors draw them, and
the words for them.

    python scripts/build_emoji.py FOLDER --download

fetches nine pinned npm packages with `npm pack` (32 MB; nothing else touches the network), rasterises their SVGs with
resvg (about two minutes), and writes

    FOLDER/images.npy         uint8 'n h w c', RGBA with straight alpha; can be memory-mapped
    FOLDER/captions.jsonl     one JSON object per image, in the same order: code (Unicode's, without variation
                              selectors), concept, label, tags, group, kind, style, split
    FOLDER/data.json          size, styles, versions, SHA-256 of the packages and of the two files above
    FOLDER/subjects/NAME/     {train,test}/*.png and masks/{train,test}/*.png: views of one held-out drawing each;
                              other/STYLE.png: the same concept as other vendors drew it
    FOLDER/contact_sheet.png, FOLDER/attribution.txt, FOLDER/packages/

Concepts are matched by code point, since names differ between packages. Splits: "unseen" is the whole of Twemoji and of
OpenMoji, two vendors that no training sees; "subject" and "test" are the concepts that scripts/held_out.py held out in
the other styles too, 20 for development and 100 for tests; "train" is the rest. Flags of countries (flag-…) and skin
tones are left out.

The files are the same bit for bit where the versions are the same: over a finished FOLDER the command builds again and
compares. Stopped, it leaves FOLDER.part; the same command takes up the downloads in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from emoji_packages import (
    COMPLETE,
    SOURCES,
    STYLES,
    attribution,
    fetch,
    other_vendors,
    read_drawings,
    read_emoji,
    subject_attribution,
)
from emoji_pictures import contact_sheet, rasterise, write_subject
from PIL import Image
from tqdm import tqdm

UNSEEN = ("twemoji", "openmoji")
HELD_OUT = Path(__file__).with_name("held_out.json")  # by scripts/held_out.py
SUBJECTS = {  # concept: (word for its class, style of its drawing); training keeps other members of every class
    "alarm-clock": ("clock", "flat"),
    "backpack": ("bag", "noto"),
    "black-cat": ("cat", "fluent"),
    "cactus": ("plant", "noto"),
    "cupcake": ("cake", "fluent"),
    "duck": ("bird", "noto"),
    "lady-beetle": ("beetle", "flat"),
    "locomotive": ("train", "noto"),
    "pineapple": ("fruit", "flat"),
    "poodle": ("dog", "fluent"),
    "racing-car": ("car", "noto"),
    "running-shoe": ("shoe", "noto"),
    "sailboat": ("boat", "flat"),
    "sunglasses": ("glasses", "fluent"),
    "t-rex": ("dinosaur", "flat"),
    "teapot": ("pot", "flat"),
    "teddy-bear": ("bear", "noto"),
    "tropical-fish": ("fish", "noto"),
    "tulip": ("flower", "fluent"),
    "violin": ("instrument", "noto"),
}
RESVG = "0.5.0"  # of PyPI's resvg_py
RECORDED = {  # SHA-256 at 128 px, with the versions pinned here and in emoji_packages.py
    "images.npy": "9eb2b19d79ecd873bbe4458395e9a55472c49216b678bb684e719a16c0f7eed2",
    "captions.jsonl": "e42456f47dbf379a4dff67a7200d1816228e88dee6d05bb5e91fa9484102cbfa",
}
PARTS = {*RECORDED, "data.json", "subjects", "packages", "contact_sheet.png", "attribution.txt"}


def build(packages: Path, out: Path, size: int) -> dict:
    """Write the data set into `out`; returns what data.json says."""
    words, codes = read_emoji(packages)
    drawings = {style: read_drawings(packages, style, codes) for style in STYLES}
    shared = concepts(packages, words, codes)
    by_name = {words[code]["concept"]: code for code in shared}
    if missing := sorted(set(SUBJECTS) - set(by_name)):
        raise ValueError(f"the packages have no {', '.join(missing)} in every style: are their versions others?")
    subjects = {by_name[name]: about for name, about in SUBJECTS.items()}
    held_out = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    split = {entry["code"]: "test" for entry in held_out["test"]} | dict.fromkeys(subjects, "subject")

    records = [
        words[code] | {"style": style, "split": "unseen" if style in UNSEEN else split.get(code, "train")}
        for code in shared
        for style in STYLES
        if code in drawings[style]
    ]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _write(out / "captions.jsonl", lines)

    with open(out / "images.npy", "wb") as file:  # in order, not through a map, where a full disk would be a crash
        shape = (len(records), size, size, 4)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for record in tqdm(records, desc="rasterise", unit=" pictures"):
            file.write(rasterise(drawings[record["style"]][record["code"]], size).tobytes())

    shutil.rmtree(out / "subjects", ignore_errors=True)  # of a build that was stopped
    for n, (code, (_, style)) in enumerate(subjects.items()):
        subject = out / "subjects" / words[code]["concept"]
        others = {other: drawings[other][code] for other in other_vendors(style)}
        hue = 0.381966 * n  # the golden section spreads them
        write_subject(subject, drawings[style][code], others, size, hue)
        _write(subject / "attribution.txt", subject_attribution(words[code]["label"], style))
    about = {
        words[code]["concept"]: {"label": words[code]["label"], "class": kind, "style": style}
        for code, (kind, style) in subjects.items()
    }
    _write(out / "subjects" / "subjects.json", json.dumps(about, indent=1) + "\n")
    _write(out / "attribution.txt", attribution())
    _sheet(out, records).save(out / "contact_sheet.png", optimize=True)

    data = {
        "size": size,
        "images": len(records),
        "concepts": len(shared),
        "splits": {name: sum(r["split"] == name for r in records) for name in ("train", "subject", "test", "unseen")},
        "styles": {style: vars(source) for style, source in STYLES.items()},
        "subjects": list(SUBJECTS),
        "versions": {s.package: s.version for s in SOURCES} | {"resvg_py": version("resvg_py")},
        "packages": {source.file: _sha256(packages / source.file) for source in SOURCES},
        "sha256": {name: _sha256(out / name) for name in RECORDED},
    }
    _write(out / "data.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return data


def concepts(packages: Path, words: dict[str, dict], codes: dict[str, str]) -> list[str]:
    """The code points that every complete style draws, in the order of their concepts' names."""
    drawn = [read_drawings(packages, style, codes).keys() for style in COMPLETE]
    shared = set.intersection(set(words), *map(set, drawn))
    return sorted(
        (code for code in shared if not words[code]["concept"].startswith("flag-")),
        key=lambda code: words[code]["concept"],
    )


def _sheet(out: Path, records: list[dict], most: int = 96) -> Image.Image:
    """About a hundred concepts, evenly from all groups, in every style that draws them."""
    images = np.load(out / "images.npy", mmap_mode="r")
    rows: dict[str, dict[str, int]] = {}
    for row, record in enumerate(records):
        rows.setdefault(record["code"], {})[record["style"]] = row
    order = sorted(rows, key=lambda code: records[rows[code]["noto"]]["group"])
    shown = [order[i] for i in np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]
    nothing = np.zeros_like(images[0])
    drawn = [[images[rows[c][style]] if style in rows[c] else nothing for style in STYLES] for c in shown]
    return contact_sheet(np.array(drawn), [records[rows[c]["noto"]]["label"] for c in shown])


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run(folder: Path, *, download: bool, size: int, packages: Path | None) -> str:
    """Build beside the folder, then rename; or compare with what is there. Returns what came of it, in words."""
    if not 16 <= size <= 1024:
        raise ValueError(f"size {size} is out of range: 16 to 1024 pixels, 128 for the mini model")
    try:
        version("resvg_py")
    except PackageNotFoundError:
        raise ValueError(f"resvg is not installed: pip install resvg_py=={RESVG}") from None
    folder = folder.resolve()
    part = folder.with_name(folder.name + ".part")
    finished = _finished(folder)
    if part.exists() and (not part.is_dir() or {path.name for path in part.iterdir()} - PARTS):
        raise ValueError(f"{part} is in the way and holds other things: move it, or name another folder")

    if packages is None:
        packages = (folder if (folder / "packages").is_dir() else part) / "packages"
    for needed in (packages, part):
        needed.mkdir(parents=True, exist_ok=True)
    if download:
        fetch(packages)
    data = build(packages, part, size)
    if finished is not None:
        shutil.rmtree(part)
        return _compare(folder, finished, data)
    if folder.exists():
        folder.rmdir()  # it is empty
    part.replace(folder)

    counts = ", ".join(f"{n} {split}" for split, n in data["splits"].items())
    said = f"{folder}: {data['concepts']} concepts, {data['images']} pictures of {size} px ({counts})"
    if size != 128:
        return said
    same = "the same bits as" if data["sha256"] == RECORDED else "other bits than"
    return f"{said}; {same} the recorded build (resvg_py {RESVG}; here {data['versions']['resvg_py']})"


def _finished(folder: Path) -> dict | None:
    """What data.json says of the data set that is there already; None where the folder is new or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    try:
        return dict(json.loads((folder / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{folder} is there and holds no data set: remove it, or name another folder") from None


def _compare(folder: Path, finished: dict, data: dict) -> str:
    differ = [key for key in ("size", "sha256", "packages", "versions") if finished.get(key) != data[key]]
    for name, digest in data["sha256"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            differ.append(name)
    if differ:
        raise ValueError(f"{folder} holds another build (different: {', '.join(differ)}); it was left as it is")
    return f"built again: {folder} is the same bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder, or one to compare with")
    parser.add_argument("--download", action="store_true", help="fetch the packages that are missing, with npm")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="side of the pictures (default: 128)")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="the packages' files (default: FOLDER/packages)")
    given = parser.parse_args()
    try:
        print(run(given.folder, download=given.download, size=given.size, packages=given.packages))
    except (ValueError, OSError) as error:
        sys.exit(f"build_emoji: {error}")
    except KeyboardInterrupt:
        sys.exit("build_emoji: stopped; the same command again takes up the downloads")


if __name__ == "__main__":
    main()
