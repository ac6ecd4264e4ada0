"""What a stage takes and gives: a function, its variables, and what later stages must keep zero."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

import jopt
from jopt import trees

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A linen module with its variables, some leaves of which may be typed."""

    module: Any
    params: PyTree
    collections: PyTree  # what is not trained: {"batch_stats": ...}, or {} where there is none
    masks: PyTree | None = None  # bool, like params: what pruning kept; None before pruning
    fake: PyTree | None = None  # what `params` were before they were rounded to integers

    @property
    def variables(self) -> PyTree:
        """All that `apply` takes: `{"params": ..., **collections}`."""
        return {"params": self.params, **self.collections}

    def apply(self, variables: PyTree, inputs: jax.Array) -> jax.Array:
        """The logits at inference, typed leaves or not."""
        return inference(self.module)(variables, inputs)


def initialise(module: Any, inputs: jax.ShapeDtypeStruct, key: jax.Array) -> Model:
    """A model with fresh variables for one example of the shape and dtype of `inputs`."""
    example = jax.numpy.zeros((1, *inputs.shape), inputs.dtype)
    variables = dict(jax.jit(module.init)(key, example))
    params = variables.pop("params")
    return Model(module, params, variables)


def inference(module: Any) -> Callable[[PyTree, jax.Array], jax.Array]:
    """The function `(variables, inputs) -> logits`; it takes typed leaves."""

    def apply(variables: PyTree, inputs: jax.Array) -> jax.Array:
        return module.apply(variables, inputs)

    return jopt.lift(apply)


def training(module: Any) -> Callable[..., tuple[jax.Array, PyTree]]:
    """`forward`, which takes typed leaves."""
    return jopt.lift(forward(module))


def forward(module: Any) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The function `(params, collections, inputs, key) -> (logits, collections)` for training."""

    def apply(
        params: PyTree, collections: PyTree, inputs: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        logits, changed = module.apply(
            {"params": params, **collections},
            inputs,
            train=True,
            mutable=list(collections),
            rngs={"dropout": key},
        )
        return logits, {**collections, **changed}

    return apply


def sparsity_by_path(params: PyTree) -> dict[str, float]:
    """The fraction of zeros in every leaf of two or more axes."""
    found = {}
    for path, leaf in trees.items(params):
        if leaf.ndim >= 2:
            size = trees.size(leaf)
            found[path] = 1 - size.nonzeros / max(size.parameters, 1)
    return found
