"""The command: what it prints, what it refuses, and how."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("yaml")

from typer.testing import CliRunner

import jopt
from jopt import cli

RUNNER = CliRunner()


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "jopt.cli", *arguments],
        capture_output=True,
        text=True,
        env={name: x for name, x in os.environ.items() if name != "JOPT_DATA"} | environment,
    )


def test_the_package_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "jopt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"jopt {jopt.__version__}"


def test_version():
    assert RUNNER.invoke(cli.app, ["--version"]).output.strip() == f"jopt {jopt.__version__}"


@pytest.mark.parametrize("command", ["run", "recipes", "inspect", "profile"])
def test_help_has_an_example(command):
    result = RUNNER.invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and f"jopt {command}" in result.output
    assert "Example" in result.output


def test_recipes_are_listed_with_what_they_show():
    output = RUNNER.invoke(cli.app, ["recipes"], env={"COLUMNS": "200"}).output
    for name in ("digits", "cifar10_simple_cnn", "cifar10_simple_cnn_tuned", "shakespeare_char"):
        assert name in output


def test_a_shown_recipe_is_a_recipe(tmp_path):
    from jopt import recipe

    text = RUNNER.invoke(cli.app, ["recipes", "--show", "digits"]).output
    (tmp_path / "mine.yaml").write_text(text)
    shown, built_in = recipe.load(tmp_path / "mine.yaml"), recipe.load(recipe.find("digits"))
    assert shown == built_in


def test_schema_is_json():
    document = json.loads(RUNNER.invoke(cli.app, ["recipes", "--schema"]).output)
    assert document["title"] == "Recipe"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digitz"], "neither a file nor a built-in recipe"),
        (["run", "digits", "--set", "sead=1"], "did you mean `seed`"),
        (["run", "cifar10_simple_cnn"], "JOPT_DATA"),
        (["run", "shakespeare_char", "--data-dir", "nowhere"], "tinyshakespeare.txt"),
        (["inspect", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = _run(*arguments, PYTHONPATH=str(os.path.dirname(os.path.dirname(jopt.__file__))))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert words in done.stderr.replace("\n", " ")
    assert not any(tmp_path.iterdir())


def test_profile_says_where_the_work_is():
    result = RUNNER.invoke(cli.app, ["profile", "digits"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "params/Conv_0/kernel" in result.output and "FLOPs" in result.output
    # Each convolution is one product on this machine, whatever other platforms would run.
    assert result.output.count("params/Conv_1/kernel") == 2  # teacher and student
