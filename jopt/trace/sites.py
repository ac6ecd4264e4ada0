"""Every product in a function: its weight, the axes it sums, and what it costs.

An analysis of shapes: nothing runs, and `jax.ShapeDtypeStruct`s will do for arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jopt import trees

from . import compat, origins
from .axes import axes_of
from .constants import warn_of
from .origins import View
from .program import program
from .visit import Place, visit


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter that feeds one operand of a product."""

    path: str  # such as `params/Dense_0/kernel`
    operand: int  # 0: left, or a convolution's input; 1: right, or its kernel
    contracted: tuple[int, ...] | None  # summed axes of the parameter; None: not whole axes of it
    indexed: bool  # rows of it that the inputs choose, as of an embedding or of experts
    batched: tuple[int, ...] | None = ()  # its axes that the product shares with the other operand
    mixed: bool = False  # computed on together with other parameters before, as by a mask
    features: tuple[int, ...] | None = None  # of `contracted`, what a convolution's inputs fill;
    # None: no convolution's kernel, or an axis that they share with its window


@dataclasses.dataclass(frozen=True)
class Site:
    """One `dot_general`, `ragged_dot_general`, `conv_general_dilated`, or what has an `axes` rule.

    Axes of the weight count from the end, so they hold for one layer and for stacked layers alike.
    """

    name: str  # the module's name stack, such as `MLP/Dense_0`; empty under nnx
    operation: str  # `dot_general` or `conv_general_dilated`
    uses: tuple[Use, ...]  # the weight first; empty for a product of activations
    shapes: tuple[tuple[int, ...], ...]  # left operand, right operand, result
    dtypes: tuple[Any, ...]  # likewise
    trips: int  # executions in one call: lengths of enclosing scans, and shards, multiplied
    exact: bool  # False under a while loop, counted once, and in a branch, counted as taken
    flops: int  # of one execution: twice the multiply-adds
    bytes: int  # of one execution: both operands and the result
    source: str  # the user's line
    groups: int = 1  # of a convolution's features

    @property
    def path(self) -> str | None:
        """The weight's path; None for a product of activations."""
        return self.uses[0].path if self.uses else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all parameters that feed the product."""
        return tuple(dict.fromkeys(use.path for use in self.uses))

    @property
    def weights(self) -> tuple[str, ...]:
        """The paths of all that make up the weight: several where they are put side by side."""
        if not self.uses:
            return ()
        first = self.uses[0]
        others = (
            use.path
            for use in self.uses
            if use.operand == first.operand
            and use.contracted
            and not (use.mixed or first.mixed or use.indexed)
        )
        return tuple(dict.fromkeys((first.path, *others)))

    @property
    def contracted(self) -> tuple[int, ...] | None:
        """The weight's summed axes, counted from its end; None where they cannot be told."""
        return self.uses[0].contracted if self.uses else None

    @property
    def total(self) -> int:
        """FLOPs of one call of the function."""
        return self.flops * self.trips


def sites(apply: Callable[..., Any], params: Any, *inputs: Any) -> tuple[Site, ...]:
    """Lists every product of `apply(params, *inputs)`, in order.

    Parameters are followed through layout operations, through element-wise operations on
    parameters alone, and into `jit`, `scan`, `cond`, `while`, `checkpoint`, `shard_map` and custom
    derivatives. Pallas and FFI calls are opaque: their products are not listed.

    Args:
      apply: any JAX function.
      params: its parameters, typed leaves among them or not; arrays may be `jax.ShapeDtypeStruct`s.
      *inputs: its other arguments, likewise.

    Returns:
      A tuple of `Site`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.trace import sites
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> (site,) = sites(lambda p, x: x @ p["kernel"].T, {"kernel": f32(8, 4)}, f32(2, 4))
      >>> site.path, site.contracted, site.flops
      ('kernel', (-1,), 128)
    """
    collected, traced = Sites(), program(apply, (params, *inputs))
    warn_of(traced.jaxpr, "sites(apply, ...)")
    visit(traced, collected)
    return tuple(collected.found)


def flops(apply: Callable[..., Any], params: Any, *inputs: Any) -> int:
    """FLOPs of all products of `apply(params, *inputs)`; arguments as of `sites`."""
    return sum(site.total for site in sites(apply, params, *inputs))


class Sites:
    """Collects them while a program is visited."""

    def __init__(self) -> None:
        self.found: list[Site] = []

    def equation(self, equation: Any, operands: Sequence[View], place: Place) -> None:
        product = _product(equation)
        if product is not None:
            self.found.append(_site(equation, operands, place, product))

    def body(self, jaxpr: Any, known: dict[Any, View], place: Place) -> None:
        pass


class _Product(NamedTuple):
    """What an equation multiplies and sums."""

    cost: int  # multiply-adds
    summed: Sequence[Sequence[int] | None]  # axes of each operand; None: no whole axes
    shared: Sequence[Sequence[int]] = ((), ())  # batch axes of each operand
    features: int | None = None  # of a convolution's kernel, the axis of the input features


def _product(equation: Any) -> _Product | None:
    """What is known of an equation as a product, if it is one."""
    if (known := _PRODUCTS.get(equation.primitive.name)) is not None:
        return known(equation)
    along = axes_of(equation)
    if along is None or not along.summed:
        return None
    shapes = [variable.aval.shape for variable in equation.invars]
    cost = math.prod(equation.outvars[0].aval.shape)
    cost *= math.prod(shapes[group[0][0]][group[0][1]] for group in along.summed)
    sums = [
        tuple(axis for group in along.summed for operand, axis in group if operand == i)
        for i in range(len(shapes))
    ]
    return _Product(cost, sums)


def _site(equation: Any, views: Sequence[View], place: Place, product: _Product) -> Site:
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    fed = [(i, origin) for i in reversed(range(len(views))) for origin in views[i].origins]
    fed.sort(key=lambda pair: (pair[1].indexed, -pair[1].bits))  # the weight first
    return Site(
        name=place.of(equation),
        operation=equation.primitive.name,
        uses=tuple(
            Use(
                o.path,
                i,
                origins.contracted(o.axes, product.summed[i]),
                o.indexed,
                origins.contracted(o.axes, product.shared[i] if i < 2 else ()),
                o.mixed,
                _features(o, product) if i == 1 else None,
            )
            for i, o in fed
        ),
        shapes=tuple(tuple(aval.shape) for aval in avals),
        dtypes=tuple(aval.dtype for aval in avals),
        trips=place.trips,
        exact=place.exact,
        flops=2 * product.cost,
        bytes=sum(-(-math.prod(a.shape) * trees.bits_of(a) // 8) for a in avals),
        source=compat.source_of(equation),
        groups=equation.params.get("feature_group_count", 1),
    )


def _features(origin: origins.Origin, product: _Product) -> tuple[int, ...] | None:
    if product.features is None:
        return None
    return origins.contracted(origin.axes, (product.features,))


def _dot(equation: Any) -> _Product:
    (left, right), shared = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    cost = math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in left)
    return _Product(cost, (tuple(left), tuple(right)), shared)


def _ragged(equation: Any) -> _Product:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (left, right), (lefts, rights) = numbers.dot_dimension_numbers
    shapes = [variable.aval.shape for variable in equation.invars]
    # Each row meets the weight of one group, so groups cost nothing.
    cost = math.prod(shapes[0])
    free = (set(range(len(shapes[1]))) - {*right, *rights}) - {*numbers.rhs_group_dimensions}
    cost *= math.prod(shapes[1][axis] for axis in free)
    shared = (tuple(lefts), (*rights, *numbers.rhs_group_dimensions))
    return _Product(cost, (tuple(left), tuple(right), None), shared)


def _conv(equation: Any) -> _Product:
    _, *summed = equation.params["dimension_numbers"].rhs_spec
    # Of the input, windows are summed: no whole axes.
    return _Product(_conv_cost(equation), (None, tuple(summed)), features=summed[0])


def _conv_cost(equation: Any) -> int:
    """Counts the multiply-adds that meet data, not padding or holes, as XLA does."""
    params = equation.params
    image, kernel = (v.aval.shape for v in equation.invars)
    numbers = params["dimension_numbers"]
    result = equation.outvars[0].aval.shape
    cost = result[numbers.out_spec[0]] * result[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        at = np.arange(result[numbers.out_spec[2 + i]]) * params["window_strides"][i] - low
        step, hole = params["rhs_dilation"][i], params["lhs_dilation"][i]
        end = (image[numbers.lhs_spec[2 + i]] - 1) * hole
        taps = 0
        for tap in range(kernel[numbers.rhs_spec[2 + i]]):
            where = at + tap * step
            taps += int(np.sum((where >= 0) & (where <= end) & (where % hole == 0)))
        cost *= taps
    return cost


_PRODUCTS: dict[str, Callable[[Any], _Product]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
}
