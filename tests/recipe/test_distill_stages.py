"""The stages `distill` and `reconstruct`: what they say is wrong, do, leave, and survive."""

import json
import pathlib
import random
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

from test_run import _assert_same, _command, _environment, _kill_during

from jopt import prune, quant, recipe, trees
from jopt.recipe import _distilling as distilling
from jopt.recipe import _lessons as lessons
from jopt.recipe import _losses as losses
from jopt.recipe import _model as models
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables

TEACHER = """\
name: tiny
data: {kind: digits}
stages:
  - stage: train
    name: teacher
    model: {kind: convnet, widths: [6, 8], dropout: 0.1}
    epochs: 1
    batch_size: 64
    optimizer: {kind: adamw, learning_rate: 0.01}
"""
STUDENT = """\
  - stage: distill
    name: student
    model: {kind: convnet, widths: [4, 4]}
    epochs: 1
    batch_size: 64
    smoothing: 0.1
    distill:
      teacher: teacher
      loss: {kind: dkd, beta: {begin: 0, end: 2, over: 0.5}}
      temperature: {begin: 6, end: 2, shape: cosine}
      weight: {begin: 0.9, end: 0.5}
      taps: {ConvNet/Conv_*: ConvNet/Conv_*}
      features:
        - {kind: hints, weight: 0.1}
        - {kind: crd, width: 8, negatives: 16, weight: 0.01}
"""
REST = """\
  - stage: sparsify
    name: sparse
    sparsity: {target: 0.8, end: 0.5}
    epochs: 0.5
  - stage: reconstruct
    epochs: 1
  - stage: quantize
    name: int4
    policy: [{weight: {bits: 4}}]
  - stage: reconstruct
    name: again
    epochs: 0.5
  - stage: export
"""


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's own Adam needs it: it raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def write(tmp_path: pathlib.Path):
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


# What the file may say -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("kind: dkd", "kind: dkk", 18, ["distill.loss.kind", "did you mean `dkd`?"]),
        ("beta: {begin", "beta: {begn", 18, ["distill.loss.beta.begn", "did you mean `begin`?"]),
        ("teacher: teacher\n", "teecher: teacher\n", 17, ["did you mean `teacher`?"]),
        ("teacher: teacher\n", "teacher: tutor\n", 1, ["`teacher: tutor`", "those are: teacher"]),
        ("teacher: teacher\n", "teacher: [teacher, teacher]\n", 16, ["from one teacher"]),
        ("teacher: teacher\n", "teacher: {average: 2}\n", 17, ["distill.teacher.average", "2"]),
        ("begin: 6", "begin: 0", 16, ["`temperature` must stay above 0"]),
        ("begin: 0.9", "begin: 1.9", 16, ["`weight` must stay from 0 to 1"]),
        ("{begin: 0.9, end: 0.5}", "1.5", 20, ["distill.weight", "less than or equal to 1"]),
        ("kind: hints", "kind: hintz", 23, ["did you mean `hints`?"]),
        (
            "kind: hints,",
            "kind: hints, taps: [ConvNet/Conv],",
            16,
            ["did you mean `ConvNet/Conv_*`"],
        ),
        ("taps: {ConvNet/Conv_*: ConvNet/Conv_*}", "taps: {}", 16, ["say `taps`"]),
        ("smoothing: 0.1", "smoothing: 1.0", 15, ["smoothing", "less than 1"]),
    ],
)
def test_mistakes_name_line_key_and_the_nearest(write, old, new, line, words):
    assert old in STUDENT
    path = write(TEACHER + STUDENT.replace(old, new))
    with pytest.raises(recipe.RecipeError) as error:
        recipe.load(path)
    message = str(error.value)
    assert f"{path}:{line}: " in message and len(message.splitlines()) == 1, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("taps={ConvNet/Con_0: ConvNet/Conv_0}", "student has no `ConvNet/Con_0`; did you mean `C"),
        ("taps={ConvNet/Conv_0: ConvNet/Conv_9}", "teacher has no `ConvNet/Conv_9`; did you mean"),
        ("taps={ConvNet/Conv_*: ConvNet/Conv_0}", r"is 2 of the student's, `ConvNet/Conv_0` 1"),
        (
            "taps={ConvNet/Conv_0: ConvNet/Conv_1}",
            r"`ConvNet/Conv_0`: `hints\(.*\[64, 8, 8, 4\], teacher is \[64, 4, 4, 8\]",
        ),
        ("features=[fsp]", "the same channels"),
        ("features=[{kind: fsp}, hints]", "same channels"),
    ],
)
def test_taps_that_do_not_fit_are_said_before_anything_trains(write, tmp_path, override, words):
    config = recipe.load(write(TEACHER + STUDENT), [f"stages.student.distill.{override}"])
    with pytest.raises(recipe.RecipeError, match=f"stage `student`: .*{words}"):
        recipe.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dense_self_of_a_reconstruction(write):
    config = recipe.load(write(TEACHER + STUDENT + REST))
    stages = {stage.name: stage for stage in config.stages}
    assert config.teachers(stages["student"]) == ("teacher",)
    assert config.teachers(stages["reconstruct"]) == ("student",)
    assert config.teachers(stages["again"]) == ("student",)
    assert stages["again"].distill.weight == 1.0
    assert isinstance(stages["again"].distill.loss, lessons.L1)
    tuned = "  - {stage: sparsify, sparsity: {target: 0.5}}\n  - {stage: train, name: tuned}\n"
    config = recipe.load(write(TEACHER + tuned + "  - {stage: reconstruct}\n"))
    assert config.teachers(config.stages[-1]) == ("teacher",)  # not `tuned`, which is sparse
    sparse = TEACHER + "    sparsity: {target: 0.5}\n  - {stage: reconstruct}\n"
    config = recipe.load(write(sparse))
    with pytest.raises(ValueError, match="never was dense: name the `teacher`"):
        config.teachers(config.stages[1])


def test_integers_without_their_floats_are_not_reconstructed(write, tmp_path):
    text = TEACHER + "  - {stage: quantize, method: hqq, policy: [{weight: {bits: 4}}]}\n"
    config = recipe.load(write(text + "  - {stage: reconstruct}\n"))
    with pytest.raises(recipe.RecipeError, match="`reconstruct`: it starts from integers"):
        recipe.run(config, tmp_path / "out")


def test_ramps():
    step, ramp = jnp.arange(11), lessons.Ramp(begin=1.0, end=3.0, over=0.5)
    found = losses.at(ramp, step, 10)
    np.testing.assert_allclose(found, np.minimum(1 + 2 * np.arange(11) / 5, 3), rtol=1e-6)
    cosine = losses.at(lessons.Ramp(begin=4.0, end=0.0, shape="cosine"), step, 10)
    exact = 2 * (1 + np.cos(np.pi * np.arange(11) / 10))
    np.testing.assert_allclose(cosine, exact, rtol=1e-5, atol=1e-6)
    assert losses.at(0.25, step[0], 10) == 0.25


# One step of every kind ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task():
    return tables.task(schema.Digits(), None)


def net(task, seed, *widths):
    module = tables.module(schema.ConvNet(widths=widths), task)
    return models.initialise(module, task.inputs, jax.random.key(seed))


LESSONS = {
    **{kind: {"loss": kind} for kind in ("kd", "reverse_kl", "standardized_kd", "l1", "mse")},
    "js": {"loss": {"kind": "js", "balance": 0.3}},
    "dkd": {"loss": {"kind": "dkd", "alpha": {"begin": 0, "end": 1}}},
    "dist": {"loss": {"kind": "dist", "intra": 0.5}},
    "ensemble": {"teacher": ["a", "b"], "temperature": {"begin": 4, "end": 1}},
    "logits of an ensemble": {"teacher": ["a", "b"], "of": "logits"},
    "average": {"teacher": {"average": 0.9}, "loss": "mse"},
    "average, features": {
        "teacher": {"average": 0.9},
        "taps": {"ConvNet/Conv_*": "ConvNet/Conv_*"},
        "features": ["hints"],
    },
    **{
        kind: {"taps": {"ConvNet/Conv_*": "ConvNet/Conv_*"}, "features": [kind]}
        for kind in ("hints", "attention_transfer", "similarity", "relational")
    },
    "fsp": {
        "teacher": {"average": 0.9},
        "taps": {"ConvNet/Conv_0": "ConvNet/Conv_0", "ConvNet/BatchNorm_1": "ConvNet/BatchNorm_1"},
        "features": ["fsp"],
    },
    "crd": {"taps": {"ConvNet/Dense_0": "ConvNet/Dense_0"}, "features": ["crd"]},
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_step_of_every_lesson(task, name):
    config = lessons.Distillation.model_validate({"teacher": "a", **LESSONS[name]})
    student, teachers = net(task, 0, 4, 4), [net(task, i + 1, 6, 8) for i in range(2)]
    lesson = distilling.Lesson(config, student, tuple(teachers[: len(config.stages)]), task, 10, 8)
    lesson.check()
    key = jax.random.key(0)
    params, beside = lesson.begin(student.params, student.collections, key)
    batch = {name: jnp.asarray(array[:8]) for name, array in lesson.arrays().items()}

    @jax.jit
    def slope(params, variables, beside):
        loss = lambda p: lesson.loss(variables, p, batch, collections=beside, key=key)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, aux), gradient = slope(params, lesson.variables(), beside)
    assert np.isfinite(value)
    assert all(np.any(x) for x in jax.tree.leaves(gradient["model"]["Conv_0"]))
    assert jax.tree.structure(aux.collections) == jax.tree.structure(beside)
    assert aux.collections["step"] == 1
    for leaf in jax.tree.leaves(gradient["maps"]):
        assert np.any(leaf)
    (again, _), _ = slope(params, lesson.variables(), aux.collections)
    assert np.isfinite(again) and slope._cache_size() == 1


def test_negatives_are_of_other_classes(task):
    config = lessons.Distillation.model_validate(
        {"teacher": "a", "taps": {"ConvNet/Conv_0": "ConvNet/Conv_0"}, "features": ["crd"]}
    )
    lesson = distilling.Lesson(config, net(task, 0, 4), (net(task, 1, 4),), task, 10, 8)
    batch = {name: jnp.asarray(array[:8]) for name, array in lesson.arrays().items()}
    own, others = lesson._rows(batch, 200, jax.random.key(0))
    labels = task.train["labels"]
    np.testing.assert_array_equal(own, np.arange(8))
    assert np.all(labels[np.asarray(others)] != labels[:8, None])
    assert all(
        set(labels[row]) == set(range(10)) - {y} for row, y in zip(others, labels, strict=False)
    )


# Whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TEACHER + STUDENT + REST)
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


def test_what_a_run_leaves(path, whole, task):
    found = recipe.run(recipe.load(path), whole, resume=True, quiet=True).models
    alone = jax.tree.structure(net(task, 0, 4, 4).params)
    assert jax.tree.structure(found["student"].params) == alone  # no projection is saved with it
    sparse, repaired = found["sparse"], found["reconstruct"]
    kept = prune.report(sparse.masks).values()
    assert sum(row.kept for row in kept) < 0.25 * sum(row.total for row in kept)
    first, second = (dict(trees.items(model.params)) for model in (found["int4"], found["again"]))
    for path_, leaf in trees.items(repaired.params):
        gone = np.asarray(dict(trees.items(sparse.params))[path_]) == 0
        if leaf.ndim >= 2:
            assert not np.asarray(leaf)[gone].any()
            assert isinstance(second[path_], quant.QArray) and second[path_].format.bits == 4
            assert not np.asarray(second[path_].materialise())[gone].any()
            assert np.any(np.asarray(first[path_].codes) != np.asarray(second[path_].codes))
    lines = (whole / "stages" / "4-reconstruct" / "metrics.jsonl").read_text().splitlines()
    soft = [json.loads(line)["soft"] for line in lines]
    assert np.mean(soft[-1:]) < soft[0]


@pytest.mark.parametrize("stages", [(2, 4), (2, 6)])
def test_killed_in_either_stage_it_ends_with_the_same_bits(whole, path, tmp_path, stages):
    generator = random.Random(seed := random.SystemRandom().randrange(1000))
    print(f"seed {seed}")  # shown when the test fails
    command = [*_command(path, tmp_path), "--resume"]
    for stage in stages:
        _kill_during(command, _environment(path), tmp_path, stage, generator.uniform(0.0, 2.0))
    done = subprocess.run(command, env=_environment(path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _assert_same(whole, tmp_path)


def test_the_built_in_recipe_runs_for_a_few_steps(tmp_path):
    names = ("teacher", "assistant", "student", "sparse", "reconstructed")
    short = [f"stages.{name}.epochs=0.14" for name in names]  # three steps each
    config = recipe.load(recipe.find("digits_distill"), short)
    found = recipe.run(config, tmp_path / "out", quiet=True)
    assert [row.name for row in found.rows] == list(names)
    assert (tmp_path / "out" / "artifact" / "weights.safetensors").is_file()
