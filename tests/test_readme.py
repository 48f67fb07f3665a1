"""The README is true: its Python runs as it stands, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisd.cli import app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[f"snippet{i}" for i in range(len(SNIPPETS))])
@pytest.mark.filterwarnings("ignore:.*holds float16")
def test_python_snippets_run_as_they_stand(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_a_sampler_of_ones_own_takes_at_most_20_lines():
    sampler = next(s for s in SNIPPETS if "last_two_averaged" in s)
    body = re.search(r"def last_two_averaged.*?(?=\n\n\n)", sampler, re.DOTALL)[0]
    assert len(body.splitlines()) <= 20


def test_every_command_of_the_readme_exists():
    commands = set(re.findall(r"^minisd (\w+)", README, re.MULTILINE)) | set(re.findall(r"&& minisd (\w+)", README))
    assert {"inspect", "txt2img"} <= commands
    for command in commands:
        assert command in set(app), command


def test_the_first_command_draws_a_red_apple(tmp_path, monkeypatch):
    command = re.search(r"<!-- main command -->\n```bash\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command.rpartition("&& minisd ")[2])) == 0
    picture = Image.open("apple.png").convert("RGB")
    assert picture.size == (128, 128)
    red, green, blue = np.asarray(picture, float)[32:96, 32:96].mean((0, 1))
    assert red > 1.5 * max(green, blue)


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_place_on_the_map_exists():
    table = README[README.index("| row | place") : README.index("A prompt's way")]
    rows = [line.split("|") for line in table.splitlines()[2:] if "|" in line]
    for _, _, place, what, _ in rows:
        folder = (re.findall(r"`([\w./]+/)`", place) or [""])[0]
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", place):
            assert (ROOT / "minisd" / name).exists(), name
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", what):
            assert (ROOT / "minisd" / folder / name).exists() or (ROOT / "minisd" / name).exists(), name
