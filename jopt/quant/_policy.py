"""Policies: which weights are quantized, how, and which of their axes share a scale."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site

from ._formats.base import Format, Int
from ._formats.layout import shared_axes
from ._training.steps import StepMethod

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """How a weight is quantized, and the activation that meets it in products.

    An activation has one range for the whole tensor: the smallest and largest value of the operand
    in each call (dynamic), or those that `calibrate` has seen (static). With
    `granularity="token"` each row has its own, found in each call: one scale for what a product
    sums over (in a convolution, for an example).

    Under `vmap` of a lifted function each mapped example has a range of its own.

    A NaN in an activation makes results NaN; but static integers look at no value, and it has the
    code 0 there.

    The last three are for `qat` alone. Formats stay formats everywhere else, so what a step method
    learns is stored as any other scale or range.

    Args:
      weight: format of the weight.
      activation: format of the activation; None quantizes the weight alone.
      static: take the activation's range from `calibrate`.
      weight_step: how the weight's scale is found in training: `LSQ()`, `LSQPlus()`, `PACT()` or
        `Fixed()`; None takes it from the extreme values in each step.
      activation_step: likewise of the activation, begun by `init_steps`.
      backward: format of the gradients that come back through products. Products then run on the
        codes, forward and backward, such as `Int(8, rounding="stochastic")`.

    Raises:
      ValueError: if the activation's format has groups or rounds stochastically, if there is none
        to be static, or if formats and step methods do not fit.
    """

    weight: Format
    activation: Format | None = None
    static: bool = False
    _: dataclasses.KW_ONLY
    weight_step: StepMethod | None = None
    activation_step: StepMethod | None = None
    backward: Format | None = None

    def __post_init__(self) -> None:
        """Checks that the parts fit together."""
        self._check_activation()
        self._check_training()

    @property
    def trains(self) -> bool:
        """Whether something in it is for training alone."""
        return (self.weight_step, self.activation_step, self.backward) != (None, None, None)

    def _check_training(self) -> None:
        parts = (
            ("weight", self.weight, self.weight_step),
            ("activation", self.activation, self.activation_step),
        )
        for name, format, method in parts:
            if method is None:
                continue
            why = "a step is learned of `Int` formats"
            if isinstance(format, Int):
                why = method.check(format, name)
                if format.granularity == "token":
                    why = "the scales of tokens are found in each call"
            if why:
                raise ValueError(f"`Spec({name}={format}, {name}_step={method})`: {why}.")
        if self.activation_step is not None and self.static:
            raise ValueError(
                "`Spec(..., static=True, activation_step=...)`: a range is measured or learned, "
                "not both; leave `static` away."
            )
        if self.backward is None:
            return
        if not isinstance(self.backward, Format) or self.activation is None:
            raise ValueError(
                f"`Spec(..., backward={self.backward!r})` needs a format, and an activation format "
                "for the product forward."
            )
        if self.backward.granularity == "group":
            raise ValueError(
                f"`Spec(backward={self.backward})`: a gradient has a scale for each row, or one "
                'for all (granularity="tensor"); groups are for weights.'
            )

    def _check_activation(self) -> None:
        for name, format in (("weight", self.weight), ("activation", self.activation)):
            if not isinstance(format, Format) and (name == "weight" or format is not None):
                raise TypeError(f"`Spec({name}={format!r})`: expected a format, such as `Int(8)`.")
        if self.weight.granularity == "token":
            raise ValueError(
                f"`Spec(weight={self.weight})`: tokens are rows of an activation; a weight has "
                '`granularity="channel"`, "tensor" or "group".'
            )
        if self.activation is None:
            if self.static:
                raise ValueError(
                    "`Spec(static=True)` needs an activation format: "
                    "`Spec(Int(8), Int(8), static=True)`."
                )
            return
        if self.activation.granularity == "group":
            raise ValueError(
                f"`Spec(activation={self.activation})`: an activation has one range for the whole "
                "tensor; groups are for weights."
            )
        if self.activation.granularity == "token" and self.static:
            raise ValueError(
                f"`Spec(activation={self.activation}, static=True)`: the scales of tokens are "
                "found in each call; leave `static=False`."
            )
        if self.activation.rounding == "stochastic":
            raise ValueError(
                f"`Spec(activation={self.activation})`: activations round to nearest or down; "
                "there is no key where they are rounded."
            )


Value = Format | Spec | None
Policy = Value | Sequence[tuple[trees.Where, Value]]


def resolve(
    params: PyTree, policy: Policy, *, sites: Sequence[Site] | None, caller: str
) -> dict[str, Spec]:
    """The `Spec` of each path that the policy quantizes."""
    if isinstance(policy, Format | Spec):
        paths = _weights(params, sites)
        if not paths:
            raise ValueError(
                f"`{caller}(params, {type(policy).__name__}(...))` found no weight: "
                + ("no floating leaf of rank 2 or more." if sites is None else "no site has one.")
            )
        return dict.fromkeys(paths, _spec(policy))
    if isinstance(policy, str | dict) or not isinstance(policy, Sequence):
        raise TypeError(
            f"`{caller}(params, {policy!r})`: a policy is a format, a `Spec`, or a list of "
            '`(where, value)` such as `[("**/kernel", Int(8))]`.'
        )
    chosen: dict[str, Value] = {}
    for entry in policy:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise TypeError(
                f"`{caller}(params, policy)`: an entry is `(where, value)`, got {entry!r}."
            )
        where, value = entry
        marked = trees.select(params, where, caller=caller)
        for path, hit in zip(trees.paths(params), jax.tree.leaves(marked), strict=True):
            if hit:
                chosen.setdefault(path, value)
    return {path: _spec(value) for path, value in chosen.items() if value is not None}


def axes_of(
    path: str, leaf: Any, spec: Spec, sites: Sequence[Site] | None, caller: str
) -> tuple[int, ...]:
    """Checks that a leaf can be quantized, and finds the axes that share a scale."""
    if trees.is_typed(leaf):
        raise ValueError(
            f"`{caller}(...)`: `{path}` is a `{type(leaf).__name__}` already.\n"
            "Exclude it from the policy, or start from the arrays."
        )
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise TypeError(
            f"`{caller}(...)`: `{path}` is {jnp.result_type(leaf)}; only floating arrays are "
            "quantized.\n"
            f'Put `("{path}", None)` first in the policy to leave it.'
        )
    if jnp.ndim(leaf) == 0:
        raise ValueError(
            f"`{caller}(...)`: `{path}` is a scalar, which has no axes to scale.\n"
            f'Put `("{path}", None)` first in the policy to leave it.'
        )
    shape = jnp.shape(leaf)
    contract, stacked = _layout(path, len(shape), sites)
    axes = shared_axes(spec.weight.granularity, len(shape), contract, stacked)
    size = spec.weight.group_size
    if size is not None and shape[axes[0]] % size:
        raise ValueError(
            f"`{caller}(...)`: group_size={size} does not divide the {shape[axes[0]]} inputs of "
            f"`{path}` (axis {axes[0]} of shape {shape}).\n"
            "Choose a divisor, or exclude this weight from the policy."
        )
    return axes


# Helpers, in order of use.


def _spec(value: Any) -> Spec:
    if isinstance(value, Format):
        return Spec(value)
    if isinstance(value, Spec):
        return value
    raise TypeError(f"The value of a policy is a format, a `Spec` or None, got {value!r}.")


def _weights(params: PyTree, sites: Sequence[Site] | None) -> list[str]:
    plain = {
        path: leaf
        for path, leaf in trees.items(params)
        if hasattr(leaf, "dtype")  # not the functions in a module
        and not trees.is_typed(leaf)
        and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    if sites is None:
        return [path for path, leaf in plain.items() if jnp.ndim(leaf) >= 2]
    fed = {path for site in sites for path in site.weights}
    return [path for path in plain if path in fed]


def _layout(
    path: str, ndim: int, sites: Sequence[Site] | None
) -> tuple[tuple[int, ...] | None, int | None]:
    """The axes that any product of a weight sums over, and how many leading ones count layers."""
    axes: set[int] = set()
    stacked = None
    for site in sites or ():
        for use in site.uses:
            if use.path == path and use.contracted:
                axes.update(use.contracted)
                spare = ndim - len(site.shapes[use.operand])
                lead = max(0, min(spare, ndim + min(use.contracted)))
                stacked = lead if stacked is None else min(stacked, lead)
    return (tuple(sorted(axes)) or None), stacked
