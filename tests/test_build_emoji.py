"""The emoji data set: what is in it, what is held out, and what is said when a package is missing or damaged.

The five packages are made here, tiny, in the layout of the real ones: one coloured shape per concept and style.
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
import emoji_packages  # noqa: E402
import emoji_pictures  # noqa: E402

pytest.importorskip("resvg_py", reason="the data set is rasterised by resvg")

CONCEPTS = [*build_emoji.SUBJECTS, "red-apple", "green-apple", "knot"]
SHAPES = {
    "noto": '<circle cx="64" cy="64" r="50" fill="{fill}"/>',
    "fluent": '<path fill="{fill}" d="M4 4h24v24H4z"/>',
    "flat": '<path fill="{fill}" d="M16 4L28 28H4z"/>',
    "twemoji": '<path fill="{fill}" fill-opacity=".5" d="M0 0h36v18H0z"/>',  # touches the edge, half transparent
}
SIDES = {"noto": 128, "fluent": 32, "flat": 32, "twemoji": 36}


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
    codes = {name: f"1F{n:03X}" for n, name in enumerate([*CONCEPTS, "flag-zz", "wave"])}
    for n, (style, source) in enumerate(build_emoji.STYLES.items()):
        icons = {
            name: {"body": SHAPES[style].format(fill=f"#{(37 * i + 90 * n) % 256:02x}8040")}
            for i, name in enumerate([*CONCEPTS, "flag-zz"])
        }
        icons["knot"] |= {"hidden": True}  # set aside by Iconify, and a drawing like any other
        icons[f"wave-{style}"] = icons["knot"]  # in one style only
        if style != "noto":
            icons["wave"] = icons["knot"]  # in three
        if style == "twemoji":
            icons["red-apple"]["height"] = 18  # not square: to be fitted in, centred
        side = SIDES[style]
        chars = {code: name for name, code in codes.items() if name in icons and (style, name) != ("noto", "knot")}
        aliases = {"scarlet-apple": {"parent": "red-apple"}}
        pack(
            folder,
            source,
            {"icons.json": {"icons": icons, "aliases": aliases, "width": side, "height": side}, "chars.json": chars},
        )
    entries = [
        {"label": name.replace("-", " "), "hexcode": f"{code}-FE0F", "tags": ["thing", name[:3]], "group": 7}
        for name, code in codes.items()
    ]
    pack(folder, emoji_packages.WORDS, {"en/data.json": entries, "meta/groups.json": {"groups": {"7": "objects"}}})
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
        filled = {"noto": 0.48, "fluent": 0.56, "flat": 0.28, "twemoji": 0.25}[record["style"]]
        assert abs(alpha.mean() / 255 - filled) < 0.02, record  # the shape's area (times .5 in twemoji)


def test_each_record_has_the_words_of_its_emoji(records):
    assert all(list(r) == ["concept", "style", "label", "tags", "group", "split"] for r in records)
    apple = next(r for r in records if r["concept"] == "red-apple")
    assert (apple["label"], apple["tags"], apple["group"]) == ("red apple", ["thing", "red"], "objects")


def test_only_concepts_drawn_in_every_style_are_in_and_no_flags_or_aliases(records):
    assert {r["concept"] for r in records} == set(CONCEPTS)
    assert len(records) == 4 * len(CONCEPTS)


def test_twemoji_and_the_subjects_are_held_out_of_training(records):
    for r in records:
        held_out = "subject" if r["concept"] in build_emoji.SUBJECTS else "train"
        assert r["split"] == ("unseen" if r["style"] == "twemoji" else held_out)


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
    cells = [sheet[6 + 84 * (i // 6) :, 12 + 268 * (i % 6) :][:64, :256] for i in range(len(CONCEPTS))]
    for cell in cells:
        assert all((cell[:, s * 64 : s * 64 + 64] != 255).any() for s in range(4))


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
    assert "iconify-json-noto-1.2.9.tgz is missing: add --download" in done.stderr
    assert not (tmp_path / "emoji").exists()


def damaged(packages: Path, tmp_path: Path, source, change) -> Path:
    for path in packages.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    change(tmp_path / source.file)
    return tmp_path


NOTO, WORDS = build_emoji.STYLES["noto"], emoji_packages.WORDS
NO_HEXCODE = {"en/data.json": [{"group": 7}], "meta/groups.json": {"groups": {"7": "objects"}}}


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
