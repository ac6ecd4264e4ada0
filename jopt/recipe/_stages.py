"""The stages: each takes a model and gives a model; `run` puts them in order."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jopt import quant
from jopt.recipe import _pruning as pruning
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._fit import Place, fit
from jopt.recipe._model import Model, initialise
from jopt.recipe._task import Task

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage gives."""

    model: Model
    notes: tuple[str, ...] = ()  # what was asked for and not done, with the reason


def run(
    stage: schema.Fit,
    start: Model | None,
    teachers: Sequence[Model],
    task: Task,
    place: Place,
    *,
    earlier: Model | None = None,
) -> Outcome:
    """Runs one stage that makes a model, or goes on with it from its newest checkpoint.

    Args:
      stage: its part of the recipe.
      start: the model it starts from; None where it makes its own.
      teachers: the models it learns from.
      task: the data.
      place: where it keeps its files.
      earlier: the model it goes back to.
    """
    model = _begin(stage, start, task, place)
    if earlier is not None:
        model = pruning.rewound(model, earlier)
    notes: tuple[str, ...] = ()
    if isinstance(stage, schema.Quantize):
        model, notes = _calibrated(stage, model, task)
    if stage.sparsity is not None and stage.sparsity.method in schema.CALIBRATED:
        model = pruning.on_data(stage.sparsity, stage.batch_size, model, task)
    if stage.epochs > 0:
        model = fit(stage, model, teachers, task, place)
    rounds = isinstance(stage, schema.Quantize) and stage.method == "rtn"
    if rounds or model.fake is not None:
        fake = model.params
        model = dataclasses.replace(model, params=quant.quantize(fake), fake=fake)
    return Outcome(model, notes)


def _begin(stage: schema.Fit, start: Model | None, task: Task, place: Place) -> Model:
    """The model that the stage starts from: a fresh one, or the earlier stage's."""
    config = getattr(stage, "model", None)
    if config is not None:
        return initialise(tables.module(config, task), task.inputs, jax.random.key(place.seed))
    assert start is not None  # the schema asks the first stage for a model
    return start if start.fake is None else dataclasses.replace(start, params=start.fake)


def _calibrated(stage: schema.Quantize, model: Model, task: Task) -> tuple[Model, tuple[str, ...]]:
    """The model with its leaves quantized, or fake-quantized, and ranges from training inputs."""
    policy = tables.policy(stage.policy)
    nearest = stage.method == "rtn"
    params = quant.qat(model.params, policy) if nearest else model.params
    if nearest and not any(rule.static for rule in stage.policy):
        return dataclasses.replace(model, params=params), ()

    def apply(params: PyTree, inputs: jax.Array) -> jax.Array:
        return model.module.apply({"params": params, **model.collections}, inputs)

    batches = task.train_inputs(stage.calibration_batches, stage.batch_size)
    how: dict[str, Any] = {"observer": stage.observer}
    if not nearest:
        how |= {"policy": policy, "method": stage.method}
    params, rows = quant.calibrate(apply, params, batches, **how)
    notes = tuple(f"{stage.name}: `{row.path}`: {row.undone}" for row in rows if row.undone)
    return dataclasses.replace(model, params=params), notes
