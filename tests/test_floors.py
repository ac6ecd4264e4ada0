"""Who may import whom: each floor only the floors below it; and `import jopt` stays light."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "jopt"
FLOORS = [
    {"trees", "schedules", "backends"},
    {"trace"},
    {"optim", "prune", "quant", "distill", "search"},
    {"nn", "data", "train", "artifact", "report"},
    {"recipe"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = [
    "flax", "grain", "matplotlib", "optuna", "orbax", "pydantic", "rich", "safetensors", "sklearn",
    "tensorboardX", "torch", "typer", "yaml",
]  # fmt: skip


def _room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: pathlib.Path) -> set[str]:
    """The rooms that a file imports, wherever in it, absolutely or relatively."""
    package = ("jopt", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("jopt.")}
    return found & FLOOR.keys()


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_floors_below(path):
    room = _room(path)
    assert room in FLOOR, f"`{room}` has no floor: add it to DESIGN's map and to this test"
    wrong = {other for other in _imports(path) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not wrong, f"`{room}` imports {sorted(wrong)}, which stand no lower"


def test_the_test_sees_imports_of_all_kinds(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    (tmp_path / "trace").mkdir()
    path = tmp_path / "trace" / "x.py"
    path.write_text(
        "import jopt.prune\nfrom jopt import quant\nfrom jopt.data import digits\n"
        "def f():\n    from .. import report\n    from ..train import fit\n    from . import nn\n"
    )
    assert _imports(path) == {"prune", "quant", "data", "report", "train", "trace"}


def test_importing_jopt_is_light():
    code = (
        "import json, sys, jopt; before = sorted(sys.modules);"
        "print(json.dumps([name for name in before if '.' not in name]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert {"jax", "optax"} <= loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("room", sorted(FLOORS[3] | {"recipe"}))
def test_the_rooms_above_load_when_first_used(room):
    code = f"import jopt; print(jopt.{room}.__name__, {room!r} in dir(jopt))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [f"jopt.{room}", "True"], done.stderr


def test_an_unknown_name_is_an_attribute_error():
    import jopt

    with pytest.raises(AttributeError, match="no attribute `prunes`"):
        jopt.prunes  # noqa: B018


def test_the_list_of_slow_tests_names_tests(gone, pytestconfig):
    if any("::" in str(arg) for arg in pytestconfig.args):
        pytest.skip("single tests were asked for")
    assert not gone
