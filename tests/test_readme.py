"""The README is true: its Python runs as it stands, its commands exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from minisd.cli import app, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(word, tmp_path, monkeypatch):
    """The names that the snippet which holds this word leaves behind."""
    (snippet,) = (snippet for snippet in SNIPPETS if word in snippet)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def middle(image):
    """Mean RGB of the middle quarter, where the mini model draws its subject."""
    return np.asarray(image.convert("RGB"), float)[32:96, 32:96].mean((0, 1))


def is_red_on_white(image):
    (red, green, blue), corner = middle(image), np.asarray(image, float)[:8, :8].mean()
    return red > 1.5 * max(green, blue) and corner > 200


def test_every_snippet_has_a_test_of_its_result():
    words = ("apple-model.safetensors", "sd.denoiser", "last_two_averaged", "ColourHint")
    assert [sum(word in snippet for snippet in SNIPPETS) for word in words] == [1] * len(SNIPPETS)


def test_the_first_snippet_draws_a_red_apple_turns_it_green_and_saves_the_model(tmp_path, monkeypatch):
    names = run("apple-model.safetensors", tmp_path, monkeypatch)
    assert is_red_on_white(names["image"])
    red, green, _ = middle(names["again"])
    assert green / red > 1.2 * middle(names["image"])[1] / middle(names["image"])[0]
    assert Path("apple-model.safetensors").stat().st_size > 30e6


def test_the_loop_by_hand_draws_the_apple_of_txt2img(tmp_path, monkeypatch):
    assert is_red_on_white(run("sd.denoiser", tmp_path, monkeypatch)["image"])


def test_the_sampler_of_ones_own_draws_a_red_apple(tmp_path, monkeypatch):
    assert is_red_on_white(run("last_two_averaged", tmp_path, monkeypatch)["image"])


def test_the_conditioning_of_ones_own_turns_the_image_blue(tmp_path, monkeypatch):
    names = run("ColourHint", tmp_path, monkeypatch)
    plain, blue = (np.asarray(names[name], float).mean((0, 1)) for name in ("plain", "blue"))
    assert blue[2] - blue[0] > plain[2] - plain[0] + 40


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
    assert is_red_on_white(picture)


def test_every_link_leads_to_a_file():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_place_on_the_map_exists():
    table = README[README.index("| row | place") : README.index("A prompt's way")]
    rows = [line.split("|") for line in table.splitlines()[2:] if "|" in line]
    assert {p.name for p in (ROOT / "minisd").iterdir() if p.name[0] != "_"} <= set(re.findall(r"[\w.]+", table))
    for _, _, place, what, _ in rows:
        folder = (re.findall(r"`([\w./]+/)`", place) or [""])[0]
        for name in re.findall(r"`([\w./]+(?:\.py|/))`", place):
            assert (ROOT / "minisd" / name).exists(), name
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", what):
            assert (ROOT / "minisd" / folder / name).exists() or (ROOT / "minisd" / name).exists(), name
