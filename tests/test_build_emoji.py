"""The emoji data set: what is in it, what is held out, and what is said when a package is missing or damaged.

The nine packages are made here, tiny, in the layout of the real ones: one coloured shape per concept and style.
"""

import io
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import build_emoji  # noqa: E402
import colour_pairs  # noqa: E402
import emoji_packages  # noqa: E402
import emoji_pictures  # noqa: E402
import held_out  # noqa: E402

pytest.importorskip("resvg_py", reason="the data set is rasterised by resvg")

SHAPES = {
    "noto": '<circle cx="64" cy="64" r="50" fill="{fill}"/>',
    "blob": '<circle cx="64" cy="64" r="40" fill="{fill}"/>',
    "fluent": '<path fill="{fill}" d="M4 4h24v24H4z"/>',
    "flat": '<path fill="{fill}" d="M16 4L28 28H4z"/>',
    "emojione": '<path fill="{fill}" d="M8 8h48v48H8z"/>',
    "fxemoji": '<path fill="{fill}" d="M0 0h256v512H0z"/>',
    "twemoji": '<path fill="{fill}" fill-opacity=".5" d="M0 0h36v18H0z"/>',  # touches the edge, half transparent
    "openmoji": '<path fill="{fill}" d="M0 0h72v36H0z"/>',
}
FILLED = dict(noto=0.48, blob=0.31, fluent=0.56, flat=0.28, emojione=0.56, fxemoji=0.5, twemoji=0.25, openmoji=0.5)
SIDES = dict(noto=128, blob=128, fluent=32, flat=32, emojione=64, fxemoji=512, twemoji=36, openmoji=72)
NAMELESS = ("blob", "fluent", "emojione", "fxemoji")  # packages that tell no code points
HELD_OUT = json.loads(build_emoji.HELD_OUT.read_text(encoding="utf-8"))
CODES = {entry["concept"]: entry["code"] for entry in HELD_OUT["development"]}
CODES |= {"red-apple": "1F34E", "green-apple": "1F34F", "knot": "1FAA2", "crab": "1F980"}
CONCEPTS = list(CODES)


def pack(folder: Path, source, members: dict) -> Path:
    """A .tgz as npm packs it."""
    members = {"package.json": {"name": source.package, "version": source.version}, **members}
    with tarfile.open(folder / source.file, "w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder / source.file


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    codes = CODES | {"flag-zz": "1F1FF", "wave": "1F44B"}
    for n, (style, source) in enumerate(build_emoji.STYLES.items()):
        icons = {
            name: {"body": SHAPES[style].format(fill=f"#{(37 * i + 90 * n) % 256:02x}8040")}
            for i, name in enumerate([*CONCEPTS, "flag-zz"])
        }
        icons["knot"] |= {"hidden": True}  # set aside by Iconify, and a drawing like any other
        icons[f"wave-{style}"] = icons["knot"]  # in one style only
        if style != "noto":
            icons["wave"] = icons["knot"]  # in all others
        if style == "twemoji":
            icons["red-apple"]["height"] = 18  # not square: to be fitted in, centred
        aliases = {"scarlet-apple": {"parent": "red-apple"}}
        if style == "fxemoji":
            icons = {"lady-beetle".replace("-", ""): icons["lady-beetle"], "pomme": icons["red-apple"]}
            aliases = {"apple-red": {"parent": "pomme"}, "red-apple": {"parent": "pomme"}}
        if style == "emojione":
            del icons["knot"]  # an incomplete style lacks what it lacks
        side = SIDES[style]
        chars = {} if style in NAMELESS else {code: name for name, code in codes.items() if name in icons}
        pack(
            folder,
            source,
            {"icons.json": {"icons": icons, "aliases": aliases, "width": side, "height": side}, "chars.json": chars},
        )
    entries = [
        {
            "label": name.replace("-", " "),
            "hexcode": f"{code}-FE0F",
            "tags": ["thing", name[:3]],
            "group": 7,
            "subgroup": 62,
        }
        for name, code in codes.items()
    ]
    groups = {"groups": {"7": "objects"}, "subgroups": {"62": "sport"}}
    pack(folder, emoji_packages.WORDS, {"en/data.json": entries, "meta/groups.json": groups})
    return folder


def build(folder: Path, packages: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "build_emoji.py", folder, "--packages", packages, "--size", "32", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "emoji"
    done = build(folder, packages)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_images_and_captions_come_in_the_same_order(folder, records):
    images = np.load(folder / "images.npy", mmap_mode="r")
    assert images.shape == (len(records), 32, 32, 4)
    assert images.dtype == np.uint8
    for image, record in zip(images, records, strict=True):
        alpha = image[..., 3]
        assert abs(alpha.mean() / 255 - FILLED[record["style"]]) < 0.02, record  # the shape's area (× .5 in twemoji)


def test_each_record_has_the_words_of_its_emoji(records):
    assert all(list(r) == ["code", "concept", "label", "tags", "group", "kind", "style", "split"] for r in records)
    apple = next(r for r in records if r["concept"] == "red-apple")
    assert (apple["label"], apple["tags"], apple["group"]) == ("red apple", ["thing", "red"], "objects")
    assert (apple["code"], apple["kind"]) == ("1F34E", "sport")


def test_only_concepts_drawn_in_every_complete_style_are_in_and_no_flags_or_aliases(records):
    assert {r["concept"] for r in records} == set(CONCEPTS)
    drawn = {style: {r["concept"] for r in records if r["style"] == style} for style in build_emoji.STYLES}
    assert all(drawn[style] == set(CONCEPTS) for style in build_emoji.COMPLETE)
    assert drawn["emojione"] == set(CONCEPTS) - {"knot"}


def test_drawings_of_packages_without_code_points_are_matched_by_name_or_alias(records):
    assert {r["concept"] for r in records if r["style"] == "fxemoji"} == {"lady-beetle", "red-apple"}


def test_two_vendors_and_the_held_out_concepts_of_all_others_are_in_no_training(records):
    held_out = dict.fromkeys(build_emoji.SUBJECTS, "subject") | {"crab": "test"}
    for r in records:
        unseen = r["style"] in ("twemoji", "openmoji")
        assert r["split"] == ("unseen" if unseen else held_out.get(r["concept"], "train"))


def test_a_hundred_and_twenty_concepts_are_held_out_and_each_has_a_sibling_that_is_not():
    assert {name: len(entries) for name, entries in HELD_OUT.items()} == {"development": 20, "test": 100}
    codes = {entry["code"] for entries in HELD_OUT.values() for entry in entries}
    assert len(codes) == 120
    assert [entry["concept"] for entry in HELD_OUT["development"]] == list(build_emoji.SUBJECTS)
    assert all(entry["siblings"] and not codes & set(entry["siblings"]) for e in HELD_OUT.values() for entry in e)
    families = [entry["family"] for entry in HELD_OUT["test"]]
    assert {name: families.count(name) for name in held_out.QUOTAS} == held_out.QUOTAS


def test_concepts_are_held_out_by_a_rule_that_spares_what_the_sheets_ask_for():
    names = [*build_emoji.SUBJECTS, *(f"elephant {n}" for n in range(10)), *(f"pet {n}" for n in range(60))]
    words = {
        f"{n:X}": {"concept": name, "label": name.replace("-", " "), "tags": ["pet"], "kind": "animal-mammal"}
        for n, name in enumerate(names)
    }
    chosen = held_out.choose(words)
    test = {words[entry["code"]]["label"] for entry in chosen["test"]}
    assert len(test) == held_out.QUOTAS["animals"]
    assert not any("elephant" in label for label in test)
    assert chosen == held_out.choose(dict(reversed(words.items())))


def test_pairs_are_chosen_by_a_rule_far_from_any_colour_that_the_thing_has_and_evenly():
    hues = {f"thing {n}": [12.0 * n, 12.0 * n + 20] for n in range(30)} | {"apple": [0.0]}
    pairs = colour_pairs.choose(hues)
    assert pairs == colour_pairs.choose(dict(reversed(hues.items())))
    assert len(pairs) == 30
    assert "apple" not in dict(pairs)  # the sheets ask for it
    for thing, colour in pairs:
        assert all(colour_pairs.apart(colour_pairs.COLOURS[colour].hue, hue) >= 75 for hue in hues[thing])
    counts = [sum(colour == c for _, colour in pairs) for c in colour_pairs.HUES]
    assert max(counts) - min(counts) <= 2


def test_alpha_is_straight_and_drawings_that_are_not_square_are_centred(folder, records):
    images = np.load(folder / "images.npy")
    image = images[[(r["concept"], r["style"]) for r in records].index(("red-apple", "twemoji"))]
    assert set(np.unique(image[..., 3])) == {0, 128}
    np.testing.assert_array_equal(image[..., 3] > 0, (np.arange(32) // 8 % 3 > 0)[:, None].repeat(32, 1))
    colour = image[image[..., 3] > 0][:, 1:3]
    assert abs(colour.astype(int) - [0x80, 0x40]).max() <= 1  # premultiplied alpha would halve it; 1 for its rounding


def test_data_json_says_what_was_built(folder, records):
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    assert (data["size"], data["images"], data["concepts"]) == (32, len(records), len(CONCEPTS))
    assert data["versions"]["emojibase-data"] == emoji_packages.WORDS.version
    assert data["sha256"]["images.npy"] == build_emoji._sha256(folder / "images.npy")
    assert set(data["packages"]) == {source.file for source in emoji_packages.SOURCES}


def test_every_owner_and_licence_is_named(folder):
    said = (folder / "attribution.txt").read_text(encoding="utf-8")
    for source in emoji_packages.SOURCES:
        assert all(word in said for word in (source.owner, source.url, source.licence, source.version))


def test_the_contact_sheet_shows_every_style_of_every_concept(folder):
    sheet = np.asarray(Image.open(folder / "contact_sheet.png"))
    cells = [sheet[6 + 84 * (i // 3) :, 12 + 524 * (i % 3) :][:64, :512] for i in range(len(CONCEPTS))]
    for cell in cells:
        shown = [(cell[:, s * 64 : s * 64 + 64] != 255).any() for s in range(8)]
        assert all(drawn for style, drawn in zip(FILLED, shown, strict=True) if style in build_emoji.COMPLETE)


@pytest.mark.parametrize("name", ["poodle", "racing-car"])
def test_a_subjects_views_differ_and_come_with_masks(folder, name):
    views = sorted((folder / "subjects" / name).glob("t*/*.png"))
    assert [len(list((folder / "subjects" / name / part).iterdir())) for part in ("train", "test")] == [5, 4]
    assert len({path.read_bytes() for path in views}) == 9
    for path in views:
        mask = np.asarray(Image.open(folder / "subjects" / name / "masks" / path.parent.name / path.name))
        picture = np.asarray(Image.open(path))
        assert picture.shape == (32, 32, 3)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.1 < (mask > 0).mean() < 0.6


@pytest.mark.parametrize("name", ["poodle", "racing-car"])
def test_a_subject_stands_beside_other_vendors_drawings_and_all_owners_are_named(folder, name):
    subject, own = folder / "subjects" / name, build_emoji.SUBJECTS[name][1]
    others = {path.stem: np.asarray(Image.open(path)) for path in (subject / "other").iterdir()}
    owners = {build_emoji.STYLES[style].owner for style in others}
    assert len(others) == len(owners) == 2
    assert build_emoji.STYLES[own].owner not in owners
    front = np.asarray(Image.open(subject / "train" / "00.png"))
    assert all(picture.shape == front.shape and (picture != front).any() for picture in others.values())
    said = (subject / "attribution.txt").read_text(encoding="utf-8")
    for style in (own, *others):
        source = build_emoji.STYLES[style]
        assert all(word in said for word in (source.owner, source.url, source.licence, source.version))
        assert (f"other/{style}.png" in said) == (style != own)


def test_training_and_test_views_share_no_angle_scale_or_background():
    train, test = emoji_pictures.VIEWS["train"], emoji_pictures.VIEWS["test"]
    for of in (lambda v: v.angle, lambda v: v.scale, lambda v: v.place, lambda v: (v.background, v.hue)):
        assert not set(map(of, train)) & set(map(of, test))


@pytest.mark.parametrize("view", [v for views in emoji_pictures.VIEWS.values() for v in views], ids=str)
def test_a_drawing_that_fills_its_square_is_never_cut_by_a_view(view):
    whole = emoji_pictures.Drawing("square", '<path fill="red" d="M2 3h32v32H2z"/>', 2, 3, 32, 32)
    alpha = emoji_pictures.rasterise(whole, 128, view)[..., 3] / 255
    assert math.isclose(alpha.sum(), (128 * view.scale) ** 2, rel_tol=0.01)  # its area, to the rounding of edges


def test_building_again_compares_bit_for_bit(folder, packages):
    done = build(folder, packages)
    assert done.returncode == 0
    assert "the same bit for bit" in done.stdout
    assert not folder.with_name("emoji.part").exists()


def test_another_build_is_left_as_it_is(folder, packages, tmp_path):
    before = (folder / "images.npy").read_bytes()
    done = build(folder, packages, "--size", "16")
    assert done.returncode == 1
    assert "holds another build (different: size, sha256" in done.stderr
    assert (folder / "images.npy").read_bytes() == before


def test_a_folder_with_other_things_is_not_touched(packages, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = build(tmp_path, packages)
    assert done.returncode == 1
    assert "holds no data set" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_package_says_to_download(tmp_path):
    done = build(tmp_path / "emoji", tmp_path / "none")
    assert done.returncode == 1
    assert "emojibase-data-17.0.0.tgz is missing: add --download" in done.stderr
    assert not (tmp_path / "emoji").exists()


def damaged(packages: Path, tmp_path: Path, source, change) -> Path:
    for path in packages.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path / source.file)
    return tmp_path


NOTO, WORDS = build_emoji.STYLES["noto"], emoji_packages.WORDS


@pytest.mark.parametrize(
    ("source", "change"),
    [
        (NOTO, lambda path: path.write_bytes(path.read_bytes()[:500])),
        (NOTO, lambda path: path.write_bytes(b"<html>not found</html>")),
        (NOTO, lambda path: path.write_bytes(b"")),
        (NOTO, lambda path: pack(path.parent, NOTO, {"icons.json": []})),
        (NOTO, lambda path: pack(path.parent, NOTO, {"icons.json": {"icons": {"red-apple": "<svg>"}}})),
        (NOTO, lambda path: pack(path.parent, NOTO, {"package.json": {"name": "noto", "version": "9"}})),
        (
            WORDS,
            lambda path: pack(path.parent, WORDS, {"en/data.json": [{"group": 7}], "meta/groups.json": {"groups": 0}}),
        ),
        (WORDS, lambda path: pack(path.parent, WORDS, {})),
    ],
    ids=["cut", "html", "empty", "list", "no-body", "other-package", "no-hexcode", "no-words"],
)
def test_a_damaged_package_is_named(packages, tmp_path, source, change):
    folder = damaged(packages, tmp_path, source, change)
    with pytest.raises(ValueError, match=f"{source.file} is damaged, .*delete it") as error:
        build_emoji.build(folder, tmp_path, 32)
    assert "run again with --download" in str(error.value)


def test_a_drawing_that_comes_out_empty_is_named():
    nothing = emoji_pictures.Drawing("ghost of noto.tgz", "<g/>", 0, 0, 32, 32)
    with pytest.raises(ValueError, match=r"ghost of noto\.tgz comes out empty"):
        emoji_pictures.rasterise(nothing, 32)


def test_missing_npm_says_which_files_to_bring(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm is not installed.*emojibase-data-17\.0\.0\.tgz"):
        emoji_packages.fetch(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script plays npm")
def test_what_npm_says_is_passed_on_and_no_half_file_is_left(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho half > iconify-json-noto-1.2.9.tgz\necho ENOTFOUND >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(ValueError, match=r"npm could not fetch @iconify-json/noto@1\.2\.9(?s:.)*ENOTFOUND"):
        emoji_packages.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["npm"]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script plays npm")
def test_a_download_fetches_only_what_is_missing(packages, tmp_path, monkeypatch, capsys):
    folder = damaged(packages, tmp_path, NOTO, Path.unlink)
    (tmp_path / "npm").write_text(f'#!/bin/sh\necho "$@" > ../asked\ncp {packages / NOTO.file} .\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    emoji_packages.fetch(folder)
    assert (folder / NOTO.file).read_bytes() == (packages / NOTO.file).read_bytes()
    assert (folder / "asked").read_text().startswith("pack @iconify-json/noto@1.2.9 --ignore-scripts")
    assert capsys.readouterr().out == "npm pack @iconify-json/noto@1.2.9\n"


def test_missing_resvg_says_how_to_install_it(tmp_path, monkeypatch):
    def absent(name):
        raise build_emoji.PackageNotFoundError(name)

    monkeypatch.setattr(build_emoji, "version", absent)
    with pytest.raises(ValueError, match=r"pip install resvg_py==0\.5\.0"):
        build_emoji.run(tmp_path / "emoji", download=False, size=32, packages=tmp_path)
    assert not (tmp_path / "emoji.part").exists()


def test_the_shipped_subjects_are_whole_and_small():
    shipped = SCRIPTS.parent / "weights" / "subjects"
    about = json.loads((shipped / "subjects.json").read_text(encoding="utf-8"))
    assert set(about) == set(build_emoji.SUBJECTS)
    assert sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) < 2e6
    for name in about:
        assert (shipped / name / "attribution.txt").is_file()
        for path in (*shipped.glob(f"{name}/train/*.png"), *shipped.glob(f"{name}/test/*.png")):
            mask = shipped / name / "masks" / path.parent.name / path.name
            assert Image.open(path).size == Image.open(mask).size == (128, 128)
        assert len(list(shipped.glob(f"{name}/t*/*.png"))) == 9
        assert len(list(shipped.glob(f"{name}/other/*.png"))) == 2
