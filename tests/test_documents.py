"""The pages beside the README are true: their links lead somewhere, their commands and test files exist."""

import re
from pathlib import Path

import pytest

from minisd.cli import BENCHES

ROOT = Path(__file__).parent.parent
PAGES = ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "minisd/runtime/kernels/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_benchmark_that_a_page_names_exists():
    commands = {path.partition("bench_")[2] for path in BENCHES}
    for page in ("BENCHMARKS.md", "README.md"):
        named = set(re.findall(r"minisd bench (\w+)", (ROOT / page).read_text(encoding="utf-8")))
        assert named
        assert named <= commands, named - commands


def test_the_fast_tests_exist():
    files = (ROOT / "tests" / "fast.txt").read_text().split()
    assert len(files) == len(set(files)) > 10
    for file in files:
        assert (ROOT / file).is_file(), file
