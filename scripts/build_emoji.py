"""Build the mini model's data set: the emoji that four styles of three vendors have in common, and the words for them.

    python scripts/build_emoji.py FOLDER --download

fetches five pinned npm packages with `npm pack` (27 MB; nothing else touches the network), rasterises their SVGs with
resvg (about a minute), and writes

    FOLDER/images.npy         uint8 'n h w c', RGBA with straight alpha; can be memory-mapped
    FOLDER/captions.jsonl     one JSON object per image, in the same order: concept, style, label, tags, group, split
    FOLDER/data.json          size, styles, versions, SHA-256 of the packages and of the two files above
    FOLDER/subjects/NAME/     {train,test}/*.png and masks/{train,test}/*.png: views of one held-out drawing each;
                              other/STYLE.png: the same concept as other vendors drew it
    FOLDER/contact_sheet.png, FOLDER/attribution.txt, FOLDER/packages/

Splits: "unseen" is the whole of Twemoji, a vendor that no training sees; "subject" are the 20 concepts held out in the
other styles too; "train" is the rest. Flags of countries (flag-…) and skin tones are left out.

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
    SOURCES,
    STYLES,
    attribution,
    fetch,
    other_vendors,
    read_drawings,
    read_words,
    subject_attribution,
)
from emoji_pictures import contact_sheet, rasterise, write_subject
from PIL import Image
from tqdm import tqdm

UNSEEN = "twemoji"
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
    "images.npy": "b846fce32054c82ca6f41b27222f2be3a48fdafca44aaa36b090a2c7c0e9a388",
    "captions.jsonl": "574a9599dc7f2813b70fb62eb23c3bbc354cae16c9a02121e8ce07b6759df069",
}
PARTS = {*RECORDED, "data.json", "subjects", "packages", "contact_sheet.png", "attribution.txt"}


def build(packages: Path, out: Path, size: int) -> dict:
    """Write the data set into `out`; returns what data.json says."""
    drawings = {style: read_drawings(packages, style) for style in STYLES}
    words = read_words(packages)
    shared = set.intersection(set(words), *drawings.values())
    concepts = sorted(name for name in shared if not name.startswith("flag-"))
    if missing := sorted(set(SUBJECTS) - set(concepts)):
        raise ValueError(f"the packages have no {', '.join(missing)} in every style: are their versions others?")

    records = [{"concept": concept, "style": style, **words[concept]} for concept in concepts for style in STYLES]
    for record in records:
        held_out = "subject" if record["concept"] in SUBJECTS else "train"
        record["split"] = "unseen" if record["style"] == UNSEEN else held_out
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _write(out / "captions.jsonl", lines)

    with open(out / "images.npy", "wb") as file:  # in order, not through a map, where a full disk would be a crash
        shape = (len(records), size, size, 4)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for record in tqdm(records, desc="rasterise", unit=" pictures"):
            file.write(rasterise(drawings[record["style"]][record["concept"]], size).tobytes())

    shutil.rmtree(out / "subjects", ignore_errors=True)  # of a build that was stopped
    for n, (concept, (_, style)) in enumerate(SUBJECTS.items()):
        subject = out / "subjects" / concept
        others = {other: drawings[other][concept] for other in other_vendors(style)}
        hue = 0.381966 * n  # the golden section spreads them
        write_subject(subject, drawings[style][concept], others, size, hue)
        _write(subject / "attribution.txt", subject_attribution(words[concept]["label"], style))
    about = {name: {"label": words[name]["label"], "class": c, "style": s} for name, (c, s) in SUBJECTS.items()}
    _write(out / "subjects" / "subjects.json", json.dumps(about, indent=1) + "\n")
    _write(out / "attribution.txt", attribution())
    _sheet(out, [words[concept] for concept in concepts]).save(out / "contact_sheet.png", optimize=True)

    data = {
        "size": size,
        "images": len(records),
        "concepts": len(concepts),
        "splits": {split: sum(r["split"] == split for r in records) for split in ("train", "subject", "unseen")},
        "styles": {style: vars(source) for style, source in STYLES.items()},
        "subjects": list(SUBJECTS),
        "versions": {s.package: s.version for s in SOURCES} | {"resvg_py": version("resvg_py")},
        "packages": {source.file: _sha256(packages / source.file) for source in SOURCES},
        "sha256": {name: _sha256(out / name) for name in RECORDED},
    }
    _write(out / "data.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return data


def _sheet(out: Path, words: list[dict], most: int = 96) -> Image.Image:
    """About a hundred concepts, evenly from all groups, in every style."""
    images = np.load(out / "images.npy", mmap_mode="r")
    images = images.reshape(len(words), len(STYLES), *images.shape[1:])
    order = sorted(range(len(words)), key=lambda i: words[i]["group"])
    shown = [order[i] for i in np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]
    return contact_sheet(images[shown], [words[i]["label"] for i in shown])


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
