"""A run on shapes alone, before the first step: what a late stage cannot do is said at once."""

from typing import Any

import jax

from jopt import quant
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._load import RecipeError
from jopt.recipe._task import Task

PyTree = Any


def rehearse(recipe: schema.Recipe, task: Task) -> None:
    """Goes through all stages on the shapes of their parameters, training nothing.

    Raises:
      RecipeError: if a `where` matches no parameter, a pattern or a group size does not fit one, or
        a stage would train integers; names the stage.
    """
    shapes: dict[str, PyTree] = {}
    previous: PyTree = None
    for stage in recipe.stages:
        if isinstance(stage, schema.Fit):
            start = shapes[stage.start] if stage.start else previous
            try:
                previous = shapes[stage.name] = _after(stage, start, task)
            except (ValueError, TypeError) as error:
                raise RecipeError(f"stage `{stage.name}`: {error}") from error


def _after(stage: schema.Fit, start: PyTree, task: Task) -> PyTree:
    """The shapes of the parameters that the stage makes from those it starts from."""
    config = getattr(stage, "model", None)
    if config is not None:
        module = tables.module(config, task)
        example = jax.ShapeDtypeStruct((1, *task.inputs.shape), task.inputs.dtype)
        start = jax.eval_shape(module.init, jax.random.key(0), example)["params"]
    elif has_integers(start):
        raise RecipeError(
            "it starts from integers, which do not train: put it before the `quantize` stage, or "
            "`start` it from an earlier one."
        )
    if isinstance(stage, schema.Quantize):
        policy = tables.policy(stage.policy)
        trained = jax.eval_shape(lambda params: quant.qat(params, policy), start)
        return jax.eval_shape(quant.quantize, trained)
    if stage.sparsity is not None:
        jax.eval_shape(tables.pruning(stage.sparsity, epoch=1, steps=10).init, start)
    return start


def has_integers(params: PyTree) -> bool:
    """Whether some leaves are quantized for good."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, quant.QArray))
    return any(isinstance(leaf, quant.QArray) for leaf in leaves)
