"""The engine's page: its first example reaches what it says, and its map is whole."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "engine.md"


def test_the_example_runs_and_reaches_its_base_by_rule():
    example, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"__name__": "engine_page"}
    exec(compile(example, str(PAGE), "exec"), names)
    assert len(example.splitlines()) < 55
    assert names["thin"].shape == (4, 8)


def test_every_file_is_on_the_map():
    import jopt.trace

    folder = pathlib.Path(jopt.trace.__file__).parent
    text = PAGE.read_text()
    assert all(f"`{f.name}`" in text for f in folder.glob("*.py") if f.name != "__init__.py")
