"""The five npm packages of scripts/build_emoji.py: which, whose, under what licence; fetching and reading them."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
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


STYLES = {  # the style's name in captions.jsonl
    "noto": Source(
        "@iconify-json/noto",
        "1.2.9",
        "Noto Emoji",
        "Google Inc.",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
    ),
    "fluent": _fluent("fluent-emoji", "1.2.7"),
    "flat": _fluent("fluent-emoji-flat", "1.2.6"),
    "twemoji": Source(
        "@iconify-json/twemoji",
        "1.2.5",
        "Twemoji",
        "Twitter, Inc. and other contributors",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
    ),
}
WORDS = Source(
    "emojibase-data", "17.0.0", "Emojibase", "Miles Johnson", "MIT", "https://github.com/milesj/emojibase"
)  # labels, tags and groups
SOURCES = (*STYLES.values(), WORDS)
LICENCES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "MIT": "https://opensource.org/license/mit",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
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


def read_drawings(packages: Path, style: str) -> dict[str, Drawing]:
    """The drawings of one style by name. Aliases, which are no drawings of their own, are left out."""
    source = STYLES[style]
    with _package(packages, source) as read:
        icons = read("icons.json")
        box = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
        box |= {key: icons[key] for key in box if key in icons}
        return {
            name: Drawing(f"{name} of {source.file}", icon["body"], *(float(icon.get(key, box[key])) for key in box))
            for name, icon in icons["icons"].items()
        }


def read_words(packages: Path) -> dict[str, dict]:
    """{name: dict(label, tags, group)}: Emojibase's words for every emoji whose name a style tells."""
    with _package(packages, WORDS) as read:
        groups = read("meta/groups.json")["groups"]
        entries = {_bare(entry["hexcode"]): entry for entry in read("en/data.json") if "group" in entry}
    words = {}
    for source in STYLES.values():  # no style tells all of them
        with _package(packages, source) as read:
            for hexcode, name in read("chars.json").items():
                if name not in words and (entry := entries.get(_bare(hexcode))):
                    group = groups[str(entry["group"])]
                    words[name] = {"label": entry["label"], "tags": list(entry.get("tags", ())), "group": group}
    return words


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
    """A style of each other owner than this one's: two of one owner show nearly the same."""
    first = {source.owner: name for name, source in reversed(STYLES.items())}
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
