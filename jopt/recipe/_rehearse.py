"""A run on shapes alone, before the first step: what a late stage cannot do is said at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jopt import quant
from jopt.recipe import _pruning as pruning
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._fit import chain, check_lesson
from jopt.recipe._load import RecipeError
from jopt.recipe._model import Model, inference
from jopt.recipe._task import Task

PyTree = Any


def rehearse(recipe: schema.Recipe, task: Task) -> None:
    """Goes through all stages on the shapes of their parameters, training nothing.

    Raises:
      RecipeError: if a `where` matches no parameter, a pattern, a group size or a batch does not
        fit, the model cannot run with what is quantized, or a stage would train integers; names the
        stage.
    """
    models: dict[str, Model] = {}
    previous: Model | None = None
    for stage in recipe.stages:
        if isinstance(stage, schema.Fit):
            start = models[stage.start] if stage.start else previous
            try:
                teachers = [models[name] for name in recipe.teachers(stage)]
                previous = models[stage.name] = _after(stage, start, teachers, task)
            except (ValueError, TypeError) as error:
                raise RecipeError(f"stage `{stage.name}`: {error}") from error


def _after(stage: schema.Fit, start: Model | None, teachers: Sequence[Model], task: Task) -> Model:
    """The shapes of the model that the stage makes from the one it starts from."""
    model = _begin(stage, start, task)
    if stage.batch_size > task.train_size:
        raise RecipeError(
            f"`batch_size: {stage.batch_size}` is more than there is: {task.train_size} examples."
        )
    if task.kind == "text" and (stage.augment.shift or stage.augment.flip):
        raise RecipeError("`augment` is for images; windows of text are cut at random anyway.")
    if isinstance(stage, schema.Quantize):
        policy = _dynamic(tables.policy(stage.policy))
        _run(model, policy, task)
        params = jax.eval_shape(lambda params: quant.qat(params, policy), model.params)
        model = dataclasses.replace(model, params=params)
    if stage.sparsity is not None:
        pruning.check(stage.sparsity, model, task)
    if stage.epochs > 0:
        epoch = task.train_size // stage.batch_size
        steps = round(stage.epochs * epoch)
        held = dataclasses.replace(model, masks=None)  # masks have values, and here are only shapes
        jax.eval_shape(chain(stage, held, task, epoch=epoch, steps=steps).init, model.params)
        check_lesson(stage, model, teachers, task)
    if isinstance(stage, schema.Quantize) or model.fake is not None:
        params = jax.eval_shape(quant.quantize, model.params)
        nearest = not isinstance(stage, schema.Quantize) or stage.method == "rtn"
        model = dataclasses.replace(model, params=params, fake=model.params if nearest else None)
    return model


def _begin(stage: schema.Fit, start: Model | None, task: Task) -> Model:
    config = getattr(stage, "model", None)
    if config is not None:
        module = tables.module(config, task)
        variables = dict(jax.eval_shape(module.init, jax.random.key(0), _example(task)))
        return Model(module, variables.pop("params"), variables)
    assert start is not None  # the schema asks the first stage for a model
    if isinstance(stage, schema.Reconstruct) and start.fake is not None:
        return dataclasses.replace(start, params=start.fake)
    leaves = jax.tree.leaves(start.params, is_leaf=lambda leaf: isinstance(leaf, quant.QArray))
    if any(isinstance(leaf, quant.QArray) for leaf in leaves):
        raise RecipeError(
            "it starts from integers, which do not train: put it before the `quantize` stage, or "
            "`start` it from an earlier one. (A `reconstruct` stage goes on from integers that "
            "`method: rtn` has made.)"
        )
    return start


def _dynamic(policy: list[tuple[Any, quant.Spec | None]]) -> list[tuple[Any, quant.Spec | None]]:
    """The policy with all ranges dynamic: static ones come from data, and here are only shapes."""
    return [
        (where, None if spec is None else dataclasses.replace(spec, static=False))
        for where, spec in policy
    ]


def _run(model: Model, policy: list[tuple[Any, quant.Spec | None]], task: Task) -> None:
    """Traces the quantized model."""
    params = jax.eval_shape(lambda params: quant.quantize(params, policy), model.params)
    jax.eval_shape(inference(model.module), {"params": params, **model.collections}, _example(task))


def _example(task: Task) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *task.inputs.shape), task.inputs.dtype)
