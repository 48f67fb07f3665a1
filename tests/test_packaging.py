"""The built wheel holds all that the checkout does, and works where it is alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from a copy of the sources (building writes beside them) and unpacked as pip would."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "weights").mkdir()
    shutil.copy(ROOT / "tests" / "data" / "tiny.safetensors", source / "weights" / "mini.safetensors")  # in its place
    shutil.copytree(ROOT / "minisd", source / "minisd", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(wheels)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(source), *options], check=True)
    (wheel,) = wheels.glob("minisd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_every_file_of_the_package_is_in_the_wheel(installed):
    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for path in (root / "minisd").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }

    assert files(installed) == files(ROOT) | {"minisd/weights/mini.safetensors"}


def test_the_wheel_reads_prompts_without_the_checkout(installed, tmp_path):
    code = "import minisd.text.tokenizer as t; print(t.__file__, t.Tokenizer()('a cat').sum())"
    env = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert str(installed) in done.stdout


def test_the_wheel_draws_with_the_mini_model_that_it_carries(installed, tmp_path):
    command = [sys.executable, "-m", "minisd", "txt2img", "a red apple", "--steps", "2", "--out", "apple.png"]
    env = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(installed / "minisd" / "weights" / "mini.safetensors") in done.stderr
    assert (tmp_path / "apple.png").is_file()
