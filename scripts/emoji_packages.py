"""The npm packages of scripts/build_emoji.py: which, whose, under what licence; fetching, reading, matching them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from emoji_pictures import Drawing


@dataclass(frozen=True)
class Source:
    """One npm package, and what its licence asks to be said of it."""

    package: str
    version: str
    title: str
    owner: str
    licence: str
    url: str

    @property
    def file(self) -> str:
        return f"{self.package.replace('@', '').replace('/', '-')}-{self.version}.tgz"


def _fluent(package: str, version: str) -> Source:
    owner, url = "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"
    return Source(f"@iconify-json/{package}", version, "Fluent Emoji", owner, "MIT", url)


def _noto(package: str, version: str, title: str) -> Source:
    url = "https://github.com/googlefonts/noto-emoji"
    return Source(f"@iconify-json/{package}", version, title, "Google Inc.", "Apache-2.0", url)


STYLES = {  # the style's name in captions.jsonl; a concept is one that every COMPLETE style draws
    "noto": _noto("noto", "1.2.9", "Noto Emoji"),
    "blob": _noto("noto-v1", "1.2.5", "Noto Emoji of 2013 to 2017, the blobs"),
    "fluent": _fluent("fluent-emoji", "1.2.7"),
    "flat": _fluent("fluent-emoji-flat", "1.2.6"),
    "emojione": Source(
        "@iconify-json/emojione",
        "1.2.3",
        "EmojiOne 2",
        "Ranks.com Inc.",
        "CC-BY-4.0",
        "https://github.com/joypixels/emojione",
    ),
    "fxemoji": Source(
        "@iconify-json/fxemoji",
        "1.2.2",
        "FxEmojis",
        "Mozilla Foundation",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
    ),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "Twemoji",
        "Twitter, Inc. and other contributors",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
    "openmoji": Source(
        "@iconify-json/openmoji",
        "1.2.29",
        "OpenMoji",
        "the OpenMoji contributors",
        "CC-BY-SA-4.0",
        "https://github.com/hfg-gmuend/openmoji",
    ),
}
COMPLETE = ("noto", "fluent", "flat", "twemoji", "openmoji")
WORDS = Source(
    "emojibase-data", "17.0.0", "Emojibase", "Miles Johnson", "MIT", "https://github.com/milesj/emojibase"
)  # labels, tags and groups
SOURCES = (*STYLES.values(), WORDS)
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}
MIT_TEXT = """
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def fetch(packages: Path) -> None:
    """`npm pack` of whatever is not in the folder yet. npm checks each file against the registry's integrity."""
    missing = [source for source in SOURCES if not (packages / source.file).is_file()]
    npm = shutil.which("npm")
    if missing and npm is None:
        raise ValueError(
            "npm is not installed, and --download needs it (https://nodejs.org); without it, put these files "
            f"into {packages}: {', '.join(source.file for source in missing)}"
        )
    for source in missing:
        spec = f"{source.package}@{source.version}"
        print(f"npm pack {spec}", flush=True)
        with tempfile.TemporaryDirectory(dir=packages) as beside:  # a stopped download leaves no half file
            command = [npm, "pack", spec, "--ignore-scripts", "--fetch-retries=1", "--loglevel=error"]
            done = subprocess.run(command, cwd=beside, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(
                    f"npm could not fetch {spec} (is there a network?); what is there already stays in {packages}.\n"
                    f"npm says: {done.stderr.strip()[:400] or done.returncode}"
                )
            (Path(beside) / source.file).replace(packages / source.file)


def read_drawings(packages: Path, style: str, codes: dict[str, str]) -> dict[str, Drawing]:
    """The drawings of one style by code point; codes: those of `read_emoji`, by name.

    A package that tells its code points is believed. The others are matched by name: their own, then their aliases.
    """
    source = STYLES[style]
    with _package(packages, source) as read:
        icons, chars = read("icons.json"), read("chars.json")
        box = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
        box |= {key: icons[key] for key in box if key in icons}
        names = {name: _bare(code) for code, name in chars.items()} or _matched(icons, codes)
        return {
            names[name]: Drawing(f"{name} of {source.file}", icon["body"], *(float(icon.get(k, box[k])) for k in box))
            for name, icon in reversed(icons["icons"].items())  # of two with one code point the first stays
            if name in names
        }


def _matched(icons: dict, codes: dict[str, str]) -> dict[str, str]:
    """{icon: code point} where its name or an alias is known. Names are compared without hyphens: alienmonster."""
    names = {name: [name] for name in icons["icons"]}
    for alias, other in icons.get("aliases", {}).items():
        names.setdefault(other["parent"], []).append(alias)
    known = {name: [codes[_joined(n)] for n in some if _joined(n) in codes] for name, some in names.items()}
    return {name: found[0] for name, found in known.items() if found}


def read_emoji(packages: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Emojibase's words for every emoji that has a group, by code point, and the code points by name.

    words: {code: dict(code, concept, label, tags, group, kind)}; concept: the name that the first style which tells one
    has for it; kind: the group within the group, such as "animal-bird". Names, without hyphens: what the packages that
    tell their code points call them, Emojibase's labels, Unicode's own.
    """
    with _package(packages, WORDS) as read:
        groups = read("meta/groups.json")
        words = {
            _bare(entry["hexcode"]): {
                "label": entry["label"],
                "tags": list(entry.get("tags", ())),
                "group": groups["groups"][str(entry["group"])],
                "kind": groups["subgroups"][str(entry["subgroup"])],
            }
            for entry in read("en/data.json")
            if "group" in entry
        }
    codes: dict[str, str] = {}
    for source in STYLES.values():
        with _package(packages, source) as read:
            for hexcode, name in read("chars.json").items():
                if (code := _bare(hexcode)) in words:
                    words[code].setdefault("concept", name)
                    codes.setdefault(_joined(name), code)
    for code, entry in words.items():
        codes.setdefault(_joined(entry["label"]), code)
        if "-" not in code and (name := unicodedata.name(chr(int(code, 16)), "")):
            codes.setdefault(_joined(name), code)
    named = {
        code: {"code": code, "concept": entry["concept"], **entry}
        for code, entry in words.items()
        if "concept" in entry
    }
    return named, codes


def _joined(name: str) -> str:
    """Letters and digits of a name: "Alien Monster", "alien-monster" and "alienmonster" are one."""
    return "".join(c for c in name.lower() if c.isalnum())


def _bare(hexcode: str) -> str:
    """Code points without variation selectors, which the packages write or leave out as they like."""
    return "-".join(point for point in hexcode.upper().split("-") if point != "FE0F")


@contextmanager
def _package(packages: Path, source: Source) -> Iterator:
    """A function that reads JSON members of the package. Whatever goes wrong meanwhile is told in words."""
    path = packages / source.file
    if not path.is_file():
        spec = f"{source.package}@{source.version}"
        raise ValueError(f"{path} is missing: add --download, or put it there (npm pack {spec})")
    try:
        with tarfile.open(path, "r:gz") as tar:
            about = json.load(tar.extractfile("package/package.json"))
            if (about["name"], about["version"]) != (source.package, source.version):
                raise KeyError(f"it is {about['name']} {about['version']}")
            yield lambda member: json.load(tar.extractfile(f"package/{member}"))
    except (tarfile.TarError, EOFError, zlib.error, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or not what it should be ({type(error).__name__}: {error}): "
            "delete it, and run again with --download"
        ) from error


def attribution() -> str:
    """What the licences ask to be said wherever the data set is passed on."""
    lines = ["The pictures and words of this data set, whose they are, and under which licence:", ""]
    for name, source in (*STYLES.items(), ("labels and tags", WORDS)):
        lines.append(f"{name}: {source.title}, © {source.owner}, {source.url}")
        lines.append(f"    {source.licence}, {LICENCES[source.licence]}; from npm's {source.package} {source.version}")
    lines += [
        "",
        "Changed: SVG drawings were rasterised; those in subjects/ also scaled, most turned, put on backgrounds.",
    ]
    return "\n".join(lines) + "\n"


def other_vendors(style: str) -> list[str]:
    """A style of each other owner than this one's: two of one owner show nearly the same.

    Of those that draw everything; OpenMoji's share-alike licence would ask the same of what it is shipped with.
    """
    able = {name: STYLES[name] for name in COMPLETE if "SA" not in STYLES[name].licence}
    first = {source.owner: name for name, source in reversed(able.items())}
    return [name for owner, name in reversed(first.items()) if owner != STYLES[style].owner]


def subject_attribution(label: str, style: str) -> str:
    """The same for the folder of one subject: a drawing in this style, and other vendors' beside it."""
    shown = {style: "These views show", **{other: f"other/{other}.png shows" for other in other_vendors(style)}}
    text = "\n".join(
        f"{words} the {label} of {source.title} ({source.url}), © {source.owner},\n"
        f"used under {source.licence} ({LICENCES[source.licence]}); from npm's {source.package} {source.version}."
        for source, words in ((STYLES[name], words) for name, words in shown.items())
    )
    owners = dict.fromkeys(STYLES[name].owner for name in shown if STYLES[name].licence == "MIT")
    mit = "".join(f"\nCopyright (c) {owner}\n{MIT_TEXT}" for owner in owners)
    changed = "Changed: all were rasterised, scaled and put on backgrounds; the views were also turned and moved."
    return f"{text}\n{changed}\n{mit}"
