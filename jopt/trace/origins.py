"""Which parameter a value comes from, and which of its axes each axis of the value runs along.

Layout operations (reshape, transpose, slice, broadcast, gather, ...) keep that knowledge; so do
element-wise operations on parameters alone. Everything else loses it, which is never wrong.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jopt import trees

from .axes import Along, axes_of


class Part(NamedTuple):
    """A factor of an axis: a stretch of one axis of the parameter, or none of it (broadcast)."""

    axis: int | None  # counted from the end
    size: int


Axes = tuple[tuple[Part, ...], ...]  # for each axis of a value, its parts, slowest first


class Origin(NamedTuple):
    """A parameter that a value is made of."""

    path: str
    axes: Axes | None  # None: the axes can no longer be told
    bits: int  # of the whole parameter
    indexed: bool = False  # picked by an index that the inputs choose, such as an embedding's rows
    mixed: bool = False  # computed on together with other parameters, as by a mask


class View(NamedTuple):
    """What is known of a value."""

    origins: tuple[Origin, ...] = ()
    constant: bool = False  # depends on parameters and constants alone

    def map(self, f: Callable[[Axes], Axes | None]) -> "View":
        """The view with `f` applied to the axes of every origin."""
        origins = (o if o.axes is None else o._replace(axes=f(o.axes)) for o in self.origins)
        return self._replace(origins=tuple(origins))


NOTHING = View()
CONSTANT = View((), True)


def parameter(path: str, aval: Any) -> View:
    """The view of a parameter itself."""
    axes = tuple((Part(i - aval.ndim, size),) for i, size in enumerate(aval.shape))
    return View((Origin(path, axes, aval.size * trees.bits_of(aval)),), True)


def resized(view: View, shape: Sequence[int]) -> View:
    """The view of a part of the value, of the given shape, such as one shard."""
    return view.map(lambda axes: _resized(axes, shape))


def sliced(view: View) -> View:
    """The view of one slice along the leading axis, as a scan takes it."""
    return view.map(lambda axes: axes[1:])


def joined(views: Sequence[View]) -> View:
    """The view of a value that is one of several, such as a branch's result."""
    origins = dict.fromkeys(origin for view in views for origin in view.origins)
    return View(tuple(origins), all(view.constant for view in views))


def contracted(axes: Axes | None, summed: Sequence[int] | None) -> tuple[int, ...] | None:
    """The parameter's axes that a sum over the axes `summed` of a value runs over.

    None where an axis is summed in part only: split, and one of its parts kept.
    """
    if axes is None or summed is None:
        return None
    touched = {part.axis for i in summed for part in axes[i]} - {None}
    kept = {part.axis for i, parts in enumerate(axes) if i not in summed for part in parts}
    return None if touched & kept else tuple(sorted(a for a in touched if a is not None))


def follow(equation: Any, views: Sequence[View]) -> list[View]:
    """The views of an equation's results, from those of its operands."""
    name = equation.primitive.name
    if name in _IDENTITIES:
        return list(views[: len(equation.outvars)])
    constant = all(view.constant for view in views)
    if name in _LAYOUTS:
        return [_LAYOUTS[name](equation, views)._replace(constant=constant)]
    if name in _PARTS:
        return [view._replace(constant=constant) for view in _PARTS[name](equation, views[0])]
    if (known := axes_of(equation)) is not None and constant:
        return [_along(equation, views, known, k) for k in range(len(equation.outvars))]
    if name in _ELEMENTWISE and constant:
        return [_element_wise(views)]
    return [CONSTANT if constant else NOTHING for _ in equation.outvars]


def _mixed(view: View) -> View:
    return view._replace(origins=tuple(o._replace(mixed=True) for o in view.origins))


def _reshape(equation: Any, views: Sequence[View]) -> View:
    shape, order = equation.params["new_sizes"], equation.params.get("dimensions")

    def moved(axes: Axes) -> Axes | None:
        return refactored(axes if order is None else tuple(axes[i] for i in order), shape)

    return views[0].map(moved)


def refactored(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The parts of each axis after a reshape; None where an axis would be cut unevenly.

    Example:
      >>> refactored(((Part(-2, 6),), (Part(-1, 4),)), (2, 12))
      ((Part(axis=-2, size=2),), (Part(axis=-2, size=3), Part(axis=-1, size=4)))
    """
    queue = collections.deque(part for parts in axes for part in parts if part.size != 1)
    result = []
    for needed in shape:
        got = []
        while needed != 1:
            if not queue or needed == 0:
                return None
            part = queue.popleft()
            if needed % part.size == 0:
                got.append(part)
                needed //= part.size
            elif part.size % needed == 0:
                got.append(Part(part.axis, needed))
                queue.appendleft(Part(part.axis, part.size // needed))
                needed = 1
            else:
                return None
        result.append(tuple(got))
    return tuple(result)


def _resized(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The parts after each axis keeps some of its entries, or gets more of the same kind."""
    result = []
    for parts, size in zip(axes, shape, strict=True):
        if _size(parts) == size:
            result.append(parts)
        elif len(parts) == 1:
            result.append((Part(parts[0].axis, size),))
        else:
            return None
    return tuple(result)


def _size(parts: Sequence[Part]) -> int:
    size = 1
    for part in parts:
        size *= part.size
    return size


def _transpose(equation: Any, views: Sequence[View]) -> View:
    order = equation.params["permutation"]
    return views[0].map(lambda axes: tuple(axes[i] for i in order))


def _squeeze(equation: Any, views: Sequence[View]) -> View:
    gone = equation.params["dimensions"]
    return views[0].map(lambda axes: tuple(p for i, p in enumerate(axes) if i not in gone))


def _slice(equation: Any, views: Sequence[View]) -> View:
    return resized(views[0], equation.outvars[0].aval.shape)


def _broadcast(equation: Any, views: Sequence[View]) -> View:
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]

    def spread(axes: Axes) -> Axes:
        result: list[tuple[Part, ...]] = [(Part(None, size),) for size in shape]
        for parts, place in zip(axes, places, strict=True):
            if _size(parts) == shape[place]:
                result[place] = parts
        return tuple(result)

    return views[0].map(spread)


def _concatenate(equation: Any, views: Sequence[View]) -> View:
    if not all(view.constant for view in views):
        return NOTHING
    shape = equation.outvars[0].aval.shape
    return joined([resized(view, shape) for view in views])


def _pad(equation: Any, views: Sequence[View]) -> View:
    if not views[1].constant:
        return NOTHING
    return resized(views[0], equation.outvars[0].aval.shape)


def _all_gather(equation: Any, views: Sequence[View]) -> View:
    params = equation.params
    if params["tiled"]:
        return resized(views[0], equation.outvars[0].aval.shape)
    axis, shards = params["all_gather_dimension"], (Part(None, params["axis_size"]),)
    return views[0].map(lambda axes: (*axes[:axis], shards, *axes[axis:]))


def _stack(equation: Any, views: Sequence[View]) -> View:
    axis = equation.params["axis"]
    alone = (Part(None, len(views)),)
    return joined(views).map(lambda axes: (*axes[:axis], alone, *axes[axis:]))


def _tile(equation: Any, views: Sequence[View]) -> View:
    times = [(Part(None, n),) if n != 1 else () for n in equation.params["reps"]]
    return views[0].map(
        lambda axes: tuple((*new, *parts) for new, parts in zip(times, axes, strict=True))
    )


def _split(equation: Any, view: View) -> list[View]:
    return [resized(view, variable.aval.shape) for variable in equation.outvars]


def _unstack(equation: Any, view: View) -> list[View]:
    axis = equation.params["axis"]
    part = view.map(lambda axes: (*axes[:axis], *axes[axis + 1 :]))
    return [part] * len(equation.outvars)


def _along(equation: Any, views: Sequence[View], known: Along, k: int) -> View:
    """The view of a result whose axes run along those of the operands."""
    shape, found = equation.outvars[k].aval.shape, []
    for operand, view in enumerate(views):
        for origin in view.origins:
            axes = (
                None
                if origin.axes is None
                else tuple(
                    next((origin.axes[a] for o, a in sources if o == operand), (Part(None, size),))
                    for sources, size in zip(known.results[k], shape, strict=True)
                )
            )
            found.append(origin._replace(axes=axes))
    return View(tuple(found), True)


def _select(equation: Any, views: Sequence[View]) -> View:
    """Element by element where the choice is given; else one of them, as a `cond` under vmap."""
    if all(view.constant for view in views):
        return _element_wise(views)
    made = all(view.constant or view.origins for view in views[1:])  # of parameters, no data
    return joined(views[1:]) if made else NOTHING


def _element_wise(views: Sequence[View]) -> View:
    found = [view for view in views if view.origins]
    one = joined(found or [CONSTANT])
    return _mixed(one) if len(found) > 1 else one


def _gather(equation: Any, views: Sequence[View]) -> View:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape, constant = equation.outvars[0].aval.shape, views[1].constant
    batching = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    places = [place for place in range(len(shape)) if place not in numbers.offset_dims]

    def rows(axes: Axes, place: int, which: int) -> tuple[Part, ...] | None:
        """What an axis of the indices runs along: the rows that they choose, if they are given."""
        if which in batching:
            return axes[batching[which]]
        if not constant:
            return (Part(None, shape[place]),)
        if len(numbers.collapsed_slice_dims) != 1:
            return None
        (row,) = (axes[axis] for axis in numbers.collapsed_slice_dims)
        return (Part(row[0].axis, shape[place]),) if len(row) == 1 else None

    def picked(axes: Axes) -> Axes | None:
        kept = [i for i in range(len(axes)) if i not in gone]
        taken = _resized(tuple(axes[i] for i in kept), [sizes[i] for i in kept])
        if taken is None:
            return None
        result: dict[int, tuple[Part, ...]] = dict(zip(numbers.offset_dims, taken, strict=True))
        for which, place in enumerate(places):
            if (parts := rows(axes, place, which)) is None:
                return None
            result[place] = parts
        return tuple(result[place] for place in range(len(shape)))

    view = views[0].map(picked)
    if not constant:
        view = view._replace(origins=tuple(o._replace(indexed=True) for o in view.origins))
    return view


_LAYOUTS: dict[str, Callable[[Any, Sequence[View]], View]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _slice,
    "rev": lambda equation, views: views[0],
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "gather": _gather,
    "stack": _stack,
    "pad": _pad,
    "all_gather": _all_gather,
    "all_gather_invariant": _all_gather,
    "select_n": _select,
    "tile": _tile,
}

_PARTS: dict[str, Callable[[Any, View], list[View]]] = {"split": _split, "unstack": _unstack}

_IDENTITIES = {
    *("convert_element_type", "copy", "copy_p", "device_put", "name", "optimization_barrier"),
    *("pvary", "reduce_precision", "sharding_constraint", "stop_gradient"),
}

_ELEMENTWISE = {
    *("abs", "add", "and", "ceil", "clamp", "cos", "div", "eq", "erf", "exp", "exp2", "expm1"),
    *("floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt"),
    *("max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt"),
    *("sign", "sin", "sqrt", "square", "sub", "tanh", "xor"),
}
