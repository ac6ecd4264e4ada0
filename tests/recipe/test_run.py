"""A whole run on real digits: what it leaves behind, and that killing it changes nothing."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

from jopt import artifact, data, prune, quant, recipe, trees
from jopt.recipe import _tables as tables
from jopt.recipe._load import find
from jopt.recipe._rehearse import rehearse

RECIPE = """\
name: tiny
data: {kind: digits}
stages:
  - stage: train
    name: teacher
    model: {kind: convnet, widths: [8], dropout: 0.1}
    epochs: 3
    batch_size: 32
    augment: {shift: 1}
    optimizer: {kind: adamw, learning_rate: 0.01, weight_decay: 0.01}
  - stage: sparsify
    name: sparse
    sparsity: {target: 0.8, end: 0.5, every: 5}
    distill: {teacher: teacher, temperature: 2, weight: 0.5}
    epochs: 2
  - stage: quantize
    name: int8
    policy:
      - {where: "**/kernel", weight: {bits: 8}, activation: {symmetric: false}, static: true}
    epochs: 1
    calibration_batches: 2
  - stage: export
"""


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's own Adam needs it: it raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ["digits", "digits_distill"])
def test_what_comes_with_jopt_can_be_gone_through_on_shapes(name):
    found = recipe.load(find(name))
    rehearse(found, tables.task(found.data, None))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory) -> pathlib.Path:
    """A run that was not cut, in a process of its own."""
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        _command(path, out), env=_environment(path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_stage_is_recorded(whole):
    out = whole
    run = json.loads((out / "run.json").read_text())
    assert list(run["stages"]) == ["teacher", "sparse", "int8", "export"]
    teacher, sparse, small, _ = run["stages"].values()
    assert teacher["accuracy"] > 0.8
    assert teacher["bytes"] > 2 * sparse["bytes"] > 2 * small["bytes"]
    assert all(share == 0 for share in teacher["sparsity"].values())
    for layer, share in sparse["sparsity"].items():
        assert small["sparsity"][layer] >= share > 0  # rounding may add zeros, never lose them


@pytest.fixture(scope="module")
def again(path, whole) -> recipe.Result:
    """The models of that run, in this process: everything is finished, so nothing trains."""
    with jax.numpy_dtype_promotion("standard"):
        return recipe.run(recipe.load(path), whole, resume=True, quiet=True)


def test_another_process_gets_the_same_logits_from_the_artifact(again, whole):
    images = data.digits().test[0]
    model = again.models["int8"]
    expected = jax.jit(model.apply)(model.variables, images)
    found = artifact.load(whole / "artifact")(images)
    np.testing.assert_array_equal(found, expected)


def test_pruned_weights_stay_zero_through_quantization(again):
    result = again
    sparse, small = result.models["sparse"], result.models["int8"]
    kept = prune.report(sparse.masks).values()
    share = sum(row.kept for row in kept) / sum(row.total for row in kept)
    assert share == pytest.approx(0.2, abs=1e-3)
    before, after = dict(trees.items(sparse.params)), dict(trees.items(small.params))
    kernels = [name for name in after if name.endswith("kernel")]
    assert kernels
    for name in kernels:
        assert isinstance(after[name], quant.QArray) and after[name].static
        assert not np.asarray(after[name].materialise())[np.asarray(before[name]) == 0].any()


def test_the_artifact_runs_and_does_as_well(whole):
    out = whole
    model = artifact.load(out / "artifact")
    images, labels = data.digits().test
    accuracy = float(np.mean(np.argmax(model(images), -1) == labels))
    record = json.loads((out / "run.json").read_text())["stages"]["int8"]
    assert accuracy == pytest.approx(record["accuracy"], abs=1e-6)
    assert (out / "artifact" / "weights.safetensors").stat().st_size == record["bytes"]


def test_the_report_is_written(whole):
    out = whole
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "sparse", "int8"]
    assert rows[0]["latency"] == 1.0 and all(row["flops"] > 0 for row in rows)
    assert "<table" in (out / "report.html").read_text()
    assert {p.name for p in out.glob("*.png")} == {"losses.png", "sparsity.png", "tradeoff.png"}


@pytest.mark.parametrize("attempt", range(2))
def test_killed_and_resumed_ends_with_the_same_bits(whole, path, tmp_path, attempt):
    generator = random.Random(seed := random.SystemRandom().randrange(1000))
    print(f"seed {seed}")  # shown when the test fails
    command = [*_command(path, tmp_path), "--resume"]
    for stage in (1, 2, 3):
        _kill_during(command, _environment(path), tmp_path, stage, generator.uniform(0.0, 2.5))
    done = subprocess.run(command, env=_environment(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _assert_same(whole, tmp_path)


def test_a_disk_that_is_full_loses_nothing(whole, path, tmp_path):
    # A limit on the size of a file stands in for the disk: writes beyond it fail like those on a
    # full one. Under larger and larger limits the run gets further and further.
    command = [*_command(path, tmp_path), "--resume"]
    for limit, words in [
        (500, r"could not write `\S*run\.json`: File too large"),
        (10_000, r"the checkpoint of step 132 was not written to `\S*checkpoints`: File too large"),
        (40_000, r"could not write the report's `\S*`: File too large"),
    ]:
        # By a program of its own: forking this process, with JAX's threads in it, is not safe.
        program = f"""
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = {command[2:]!r}
runpy.run_module("jopt.cli", run_name="__main__", alter_sys=True)
"""
        limited = subprocess.run(
            [sys.executable, "-c", program], env=_environment(path), capture_output=True, text=True
        )
        assert limited.returncode == 1
        assert re.search(words, limited.stderr.replace("\n", "")), limited.stderr
    done = subprocess.run(command, env=_environment(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _assert_same(whole, tmp_path)


def test_a_folder_that_is_taken(whole, path, tmp_path):
    config = recipe.load(path)
    with pytest.raises(recipe.RecipeError, match="already holds a run: add `--resume`"):
        recipe.run(config, whole)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(recipe.RecipeError, match="not empty and holds no run"):
        recipe.run(config, tmp_path)
    with pytest.raises(recipe.RecipeError, match="is a file, not a folder"):
        recipe.run(config, tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_another_recipe_is_refused(whole, path):
    config = recipe.load(path, ["stages.sparse.sparsity.target=0.7"])
    with pytest.raises(recipe.RecipeError, match=r"different: `stages\.1\.sparsity\.target`"):
        recipe.run(config, whole, resume=True)


def test_two_processes_in_one_folder_are_refused(path, whole):
    from jopt.recipe._folder import Folder

    folder = Folder.open(whole, recipe.load(path), resume=True)
    with folder.locked(), pytest.raises(recipe.RecipeError, match="another process"):
        recipe.run(recipe.load(path), whole, resume=True, quiet=True)


def test_a_broken_journal_is_named(path, tmp_path):
    (tmp_path / "run.json").write_text('{"format": 1, "reci')
    with pytest.raises(recipe.RecipeError, match=r"run\.json: not readable"):
        recipe.run(recipe.load(path), tmp_path, resume=True)
    for damage in ('{"format": 1}', '{"format": 1, "recipe": {}, "stages": {"teacher": {}}}'):
        (tmp_path / "run.json").write_text(damage)
        with pytest.raises(recipe.RecipeError, match=r"run\.json: damaged"):
            recipe.run(recipe.load(path), tmp_path, resume=True)


def test_a_diverging_run_stops_and_names_the_step(path, tmp_path):
    config = recipe.load(path, ["stages.teacher.optimizer={kind: sgd, learning_rate: 1e30}"])
    with pytest.raises(recipe.TrainingDiverged, match=r"step [0-9]+"):
        recipe.run(config, tmp_path / "out", quiet=True)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["stages"] == {}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "stages.sparse.sparsity.where=**/kernels",
            r"stage `sparse`: .*matched none of 5 parameters",
        ),
        ("stages.sparse.sparsity={pattern: {n: 2, m: 7}}", r"stage `sparse`: .*does not fit"),
        ("stages.int8.policy.0.where=**/bias", r"stage `int8`: .*would make .* dense"),
        ("stages.teacher.batch_size=5000", r"stage `teacher`: .*more than there is: 1437"),
        (
            "stages.sparse.sparsity={at: [{epoch: 5, sparsity: 0.5}]}",
            r"stage `sparse`: .*names epoch 5, but the stage ends at epoch 2",
        ),
        ("stages.int8.policy.0.where=conv/*", r"stage `int8`: .*matched none of 5 parameters"),
        (
            "stages.int8.policy.0.weight={bits: 4, granularity: group, group_size: 5}",
            r"stage `int8`: .*group_size=5",
        ),
    ],
)
def test_a_late_stage_that_cannot_work_is_said_at_once(path, tmp_path, override, words):
    with pytest.raises(recipe.RecipeError, match=words):
        recipe.run(recipe.load(path, [override]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integers_do_not_train(path, tmp_path):
    config = recipe.load(path)
    teacher, sparse, int8, export = config.stages
    config = config.model_copy(update={"stages": (teacher, int8, sparse, export)})
    with pytest.raises(recipe.RecipeError, match="stage `sparse`: it starts from integers"):
        recipe.run(config, tmp_path / "out")


def test_pruning_twice_keeps_what_was_pruned(path, tmp_path):
    few = {"epochs": 0.3, "distill": None}  # 13 steps: fewer than `every` would look at twice
    config = recipe.load(path)
    teacher, sparse, _, _ = (stage.model_copy(update=few) for stage in config.stages[:2] * 2)
    # A smaller target the second time: what went before must stay away.
    less = sparse.sparsity.model_copy(update={"target": 0.5, "scope": "layer", "every": 100})
    again = sparse.model_copy(update={"name": "again", "sparsity": less})
    config = config.model_copy(update={"stages": (teacher, sparse, again)})
    models = recipe.run(config, tmp_path / "[out]", quiet=True).models
    first, second = (dict(trees.items(models[name].masks)) for name in ("sparse", "again"))
    for name, mask in first.items():
        if np.ndim(mask):
            assert not (second[name] & ~mask).any()
            assert (
                np.asarray(dict(trees.items(models["again"].params))[name])[~second[name]] == 0
            ).all()
    kept = prune.report(models["sparse"].masks).values()
    share = sum(row.kept for row in kept) / sum(row.total for row in kept)
    assert share == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("by", "code", "words"),
    [(signal.SIGINT, 130, "saved. Add `--resume`"), (signal.SIGTERM, -signal.SIGTERM, "")],
)
def test_an_interrupted_run_saves_where_it_is(path, tmp_path, by, code, words):
    # So long that only a checkpoint written because of the signal can be there.
    command = [*_command(path, tmp_path), "--set", "stages.teacher.epochs=3000"]
    # Not before it has taken steps: until then there is nothing to save.
    ended, said = _kill_during(command, _environment(path), tmp_path, 1, 0.5, by, "metrics.jsonl")
    assert ended == code and words in said
    kept = [p for p in (tmp_path / "stages" / "1-teacher" / "checkpoints").iterdir() if p.is_dir()]
    assert kept and json.loads((tmp_path / "run.json").read_text())["stages"] == {}


def test_a_lost_artifact_is_written_again(whole, path, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "artifact" / "weights.safetensors").write_bytes(b"x")
    with jax.numpy_dtype_promotion("standard"):
        recipe.run(recipe.load(path), out, resume=True, quiet=True)
    for name in ("weights.safetensors", "model.stablehlo"):
        assert (out / "artifact" / name).read_bytes() == (whole / "artifact" / name).read_bytes()


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    result = recipe.run(recipe.load(recipe.find("digits")), tmp_path / "out", quiet=True)
    rows = {row.name: row for row in result.rows}
    assert rows["teacher"].score >= 0.985
    assert rows["int8"].score >= rows["teacher"].score - 0.01
    assert rows["int8"].bytes <= rows["teacher"].bytes / 40


def _assert_same(whole: pathlib.Path, out: pathlib.Path) -> None:
    """That two runs ended with the same bits, and recorded the same."""
    for name in ("artifact/weights.safetensors", "artifact/model.stablehlo"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    for log in sorted(whole.glob("stages/*/metrics.jsonl")):
        assert (out / log.relative_to(whole)).read_text() == log.read_text(), log
    records = [json.loads((folder / "run.json").read_text())["stages"] for folder in (whole, out)]
    for record in records:
        for stage in record.values():
            del stage["seconds"]
    assert records[0] == records[1]


def _kill_during(
    command, environment, out: pathlib.Path, stage: int, delay: float, by=signal.SIGKILL, sign=""
) -> tuple[int, str]:
    """Starts a run and signals it so many seconds after the stage's folder, or `sign` in it."""
    # A shell takes Ctrl-C away from what it starts in the background, and a child inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    while process.poll() is None and not any(out.glob(f"stages/{stage}-*/{sign}")):
        time.sleep(0.02)
    assert process.poll() is None, f"it ended before stage {stage}, by {process.returncode}"
    time.sleep(delay)
    process.send_signal(by)  # to a process that has ended it does nothing
    said = process.communicate()[1]
    return process.returncode, said


def _command(path: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [sys.executable, "-m", "jopt.cli", "run", str(path), "--out", str(out), "--quiet"]


def _environment(path: pathlib.Path) -> dict[str, str]:
    """Processes of their own share what they compile, which is most of what they do."""
    return os.environ | {
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(path.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


ROUNDED = """\
name: rounded
data: {kind: digits}
stages:
  - stage: train
    name: float
    model: {kind: convnet, widths: [8]}
    epochs: 2
    batch_size: 32
    optimizer: {kind: adamw, learning_rate: 0.01}
"""


@pytest.mark.parametrize("method", ["gptq", "smoothquant", "hqq"])
def test_methods_of_rounding_end_in_an_artifact(method, tmp_path):
    path = tmp_path / "rounded.yaml"
    stage = (
        "  - {stage: quantize, name: small, method: METHOD, observer: mse, batch_size: 32, policy: "
        "[{weight: {bits: 4, granularity: group, group_size: 8}, where: '**/Dense*/kernel'},"
        " {weight: {bits: 8}, activation: {bits: 8}, static: true}]}\n  - {stage: export}\n"
    )
    path.write_text(ROUNDED + stage.replace("METHOD", method))
    result = recipe.run(recipe.load(path), tmp_path / "out", quiet=True)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    first, small, _ = run["stages"].values()
    assert small["bytes"] < first["bytes"] / 2
    assert small["accuracy"] > first["accuracy"] - 0.05
    images = data.digits().test[0]
    expected = jax.jit(result.models["small"].apply)(result.models["small"].variables, images)
    np.testing.assert_array_equal(artifact.load(tmp_path / "out" / "artifact")(images), expected)
