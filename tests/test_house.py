"""The layers of the house: a file imports only from its own row or from rows above it; importing is quick."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "minisd"
CORE = [  # first match wins; a row may import from itself and from those before it
    ("minisd.config",),
    ("minisd.nn",),
    ("minisd.text",),
    ("minisd.models",),
    ("minisd.diffusion",),
    ("minisd.pipeline",),
    ("minisd.tasks",),
]
ROWS = [
    *CORE,
    ("minisd.files", "minisd.schema"),
    ("minisd.runtime",),
    ("minisd.family",),
    ("minisd.checkpoints",),
    ("minisd.adapters",),
    ("minisd.stable_diffusion",),
    ("minisd.provenance",),
    ("minisd.training",),
    ("minisd.eval",),
    ("minisd.augment",),
    ("minisd.plots", "minisd.bench", "minisd.lab"),
    ("minisd.cli", "minisd.__main__"),
]
BUDGET = 4500  # lines of the core: code, docstrings and comments
ALONE = ("minisd.diffusion",)  # imports nothing else of minisd
HEAVY = {"torch", "torchvision", "numpy", "matplotlib", "PIL", "einops", "safetensors", "ftfy", "regex"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def row_of(module: str) -> int:
    for row, places in enumerate(ROWS):
        if any(module == place or module.startswith(place + ".") for place in places):
            return row
    raise AssertionError(f"{module} stands in no row of the house")


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (name if module_exists(name) else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def module_exists(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


FILES = sorted(p for p in PACKAGE.rglob("*.py") if module_of(p) != "minisd")


@pytest.mark.parametrize("path", FILES, ids=[module_of(p) for p in FILES])
def test_imports_point_down(path):
    module = module_of(path)
    for imported in imports_of(path):
        if not imported.startswith("minisd."):
            continue
        assert row_of(imported) <= row_of(module), f"{module} imports {imported}, from a row below it"
        if module.startswith(ALONE):
            assert imported.startswith(ALONE), f"{module} must not import {imported}"


def test_no_circle_exists():
    """TYPE_CHECKING counts: what only names a type names a dependency too."""
    graph = {module_of(p): {i for i in imports_of(p) if i.startswith("minisd.")} for p in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_the_core_is_read_in_an_evening():
    core = tuple(place for row in CORE for place in row)
    lines = {
        module_of(p): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES if module_of(p).startswith(core)
    }
    assert sum(lines.values()) <= BUDGET, lines


@pytest.mark.parametrize("path", [p for p in FILES if row_of(module_of(p)) < len(CORE)], ids=module_of)
def test_the_core_touches_no_allocator_and_no_private_part_of_torch(path):
    text = path.read_text(encoding="utf-8")
    for word in ("ctypes", "/proc", "torch._", "mallopt", "madvise", "malloc"):
        assert word not in text, word


@pytest.mark.parametrize("statement", ["import minisd", "import minisd.config", "import minisd.cli"])
def test_importing_does_not_import_anything_heavy(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_promised_name_is_there():
    import minisd

    for name in minisd.__all__:
        assert getattr(minisd, name) is not None
    assert set(minisd.__all__) <= set(dir(minisd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        minisd.nothing  # noqa: B018
