"""The engine's pages: the first example reaches what it says, and their maps are whole."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = DOCS / "engine.md"


def test_the_example_runs_and_reaches_its_base_by_rule():
    example, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"__name__": "engine_page"}
    exec(compile(example, str(PAGE), "exec"), names)
    assert len(example.splitlines()) < 55
    assert names["thin"].shape == (4, 8)


def test_every_file_is_on_the_map():
    import jopt.trace

    folder = pathlib.Path(jopt.trace.__file__).parent
    text = PAGE.read_text() + (DOCS / "analyses.md").read_text()
    assert all(f"`{f.name}`" in text for f in folder.glob("*.py") if f.name != "__init__.py")
