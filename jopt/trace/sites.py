"""Every product in a function: its weight, the axes it sums, and what it costs.

An analysis of shapes: nothing runs, and `jax.ShapeDtypeStruct`s will do for arrays.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jopt import trees

from . import compat, origins
from .leaf import aval_of
from .origins import View


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter that feeds one operand of a product."""

    path: str  # such as `params/Dense_0/kernel`
    operand: int  # 0: left, or a convolution's input; 1: right, or its kernel
    contracted: tuple[int, ...] | None  # summed axes of the parameter; None: not whole axes of it
    indexed: bool  # rows of it that the inputs choose, as of an embedding or of experts


@dataclasses.dataclass(frozen=True)
class Site:
    """One `dot_general` or `conv_general_dilated` of a function.

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

    @property
    def path(self) -> str | None:
        """The weight's path; None for a product of activations."""
        return self.uses[0].path if self.uses else None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all parameters that feed the product."""
        return tuple(dict.fromkeys(use.path for use in self.uses))

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
    args = (params, *inputs)
    flat, treedef = jax.tree_util.tree_flatten_with_path(args, is_leaf=trees.is_typed)
    filled = [leaf for _, leaf in flat]
    avals: dict[int, Any] = {}
    for i, leaf in enumerate(filled):
        if trees.is_typed(leaf):
            avals[i] = aval_of(leaf)
        elif compat.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            avals[i] = leaf

    def flat_apply(*arrays: jax.Array) -> Any:
        for i, array in zip(avals, arrays, strict=True):
            filled[i] = array
        return apply(*jax.tree.unflatten(treedef, filled))

    jaxpr = jax.make_jaxpr(flat_apply)(*avals.values())
    views = []
    for i, aval in avals.items():
        key, *rest = flat[i][0]
        path = jax.tree_util.keystr(tuple(rest), simple=True, separator="/")
        views.append(origins.parameter(path, aval) if key.idx == 0 else origins.NOTHING)
    found: list[Site] = []
    _visit(jaxpr, views, _Place(), found)
    return tuple(found)


def flops(apply: Callable[..., Any], params: Any, *inputs: Any) -> int:
    """FLOPs of all products of `apply(params, *inputs)`; arguments as of `sites`."""
    return sum(site.total for site in sites(apply, params, *inputs))


class _Place(NamedTuple):
    """Where in the program a body runs."""

    name: str = ""
    trips: int = 1
    exact: bool = True


def _visit(jaxpr: Any, views: Sequence[View], place: _Place, found: list[Site]) -> list[View]:
    """Lists the sites of a body in `found`; returns the views of its results."""
    jaxpr, constants = compat.opened(jaxpr)
    known = dict(zip(jaxpr.constvars, [origins.CONSTANT] * len(constants), strict=False))
    known.update(zip(jaxpr.invars, views, strict=True))

    def read(atom: Any) -> View:
        return origins.CONSTANT if isinstance(atom, compat.Literal) else known[atom]

    live = _live(jaxpr)
    for equation, wanted in zip(jaxpr.eqns, live, strict=True):
        operands = [read(v) for v in equation.invars]
        if not wanted:
            results = [origins.NOTHING] * len(equation.outvars)
        elif equation.primitive.name in _COSTS:
            found.append(_site(equation, operands, place))
            results = origins.follow(equation, operands)
        elif equation.primitive.name in _BODIES:
            inner = place._replace(name=_name(place, equation))
            results = _BODIES[equation.primitive.name](equation, operands, inner, found)
        else:
            results = origins.follow(equation, operands)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _live(jaxpr: Any) -> list[bool]:
    """Whether each equation's results are used; XLA drops the others."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, compat.Literal)}
    live = []
    for equation in reversed(jaxpr.eqns):
        live.append(bool(equation.effects) or any(v in needed for v in equation.outvars))
        if live[-1]:
            needed.update(v for v in equation.invars if not isinstance(v, compat.Literal))
    return live[::-1]


def _name(place: _Place, equation: Any) -> str:
    return "/".join(part for part in (place.name, compat.name_of(equation)) if part)


def _site(equation: Any, views: Sequence[View], place: _Place) -> Site:
    avals = [v.aval for v in (*equation.invars, *equation.outvars)]
    operation = equation.primitive.name
    cost, summed = _COSTS[operation]
    fed = [(i, origin) for i in (1, 0) for origin in views[i].origins]
    fed.sort(key=lambda pair: (pair[1].indexed, -pair[1].bits))  # the weight first
    return Site(
        name=_name(place, equation),
        operation=operation,
        uses=tuple(
            Use(o.path, i, origins.contracted(o.axes, summed(equation)[i]), o.indexed)
            for i, o in fed
        ),
        shapes=tuple(tuple(aval.shape) for aval in avals),
        dtypes=tuple(aval.dtype for aval in avals),
        trips=place.trips,
        exact=place.exact,
        flops=2 * cost(equation),
        bytes=sum(-(-math.prod(a.shape) * trees.bits_of(a) // 8) for a in avals),
        source=compat.source_of(equation),
    )


# Costs in multiply-adds, and the axes of either operand that are summed.


def _dot_cost(equation: Any) -> int:
    (left, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in left)


def _dot_summed(equation: Any) -> tuple[Sequence[int] | None, ...]:
    (left, right), _ = equation.params["dimension_numbers"]
    return tuple(left), tuple(right)


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


def _conv_summed(equation: Any) -> tuple[Sequence[int] | None, ...]:
    _, *summed = equation.params["dimension_numbers"].rhs_spec
    return None, tuple(summed)  # of the input, windows are summed: no whole axes


_COSTS = {
    "dot_general": (_dot_cost, _dot_summed),
    "conv_general_dilated": (_conv_cost, _conv_summed),
}

# Constructs with bodies.


def _visit_call(equation: Any, views: Sequence[View], place: _Place, found: list) -> list[View]:
    return _visit(compat.body_of(equation), views, place, found)


def _visit_scan(equation: Any, views: Sequence[View], place: _Place, found: list) -> list[View]:
    split, carried = compat.scan_counts(equation)
    inside = [*views[:split], *[origins.NOTHING] * carried]
    inside += [origins.sliced(view) for view in views[split + carried :]]
    place = place._replace(trips=place.trips * equation.params["length"])
    _visit(equation.params["jaxpr"], inside, place, found)
    return [origins.NOTHING] * len(equation.outvars)


def _visit_while(equation: Any, views: Sequence[View], place: _Place, found: list) -> list[View]:
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    carry = [origins.NOTHING] * len(views[second:])
    place = place._replace(exact=False)
    _visit(params["cond_jaxpr"], [*views[:first], *carry], place, found)
    _visit(params["body_jaxpr"], [*views[first:second], *carry], place, found)
    return [origins.NOTHING] * len(equation.outvars)


def _visit_cond(equation: Any, views: Sequence[View], place: _Place, found: list) -> list[View]:
    bodies = compat.branches_on(equation, jax.default_backend())
    place = place._replace(exact=place.exact and len(bodies) == 1)
    branches = [_visit(branch, views[1:], place, found) for branch in bodies]
    constant = views[0].constant
    return [
        view._replace(constant=view.constant and constant)
        for view in map(origins.joined, zip(*branches, strict=True))
    ]


def _visit_shards(equation: Any, views: Sequence[View], place: _Place, found: list) -> list[View]:
    body = compat.body_of(equation)
    place = place._replace(trips=place.trips * compat.shard_count(equation))
    inside = [
        origins.resized(view, variable.aval.shape)
        for view, variable in zip(views, body.invars, strict=True)
    ]
    _visit(body, inside, place, found)
    return [origins.NOTHING] * len(equation.outvars)


_BODIES: dict[str, Callable[..., list[View]]] = {
    **{primitive.name: _visit_call for primitive in compat.CALLS},
    compat.SCAN.name: _visit_scan,
    compat.WHILE.name: _visit_while,
    compat.COND.name: _visit_cond,
    "shard_map": _visit_shards,
}
