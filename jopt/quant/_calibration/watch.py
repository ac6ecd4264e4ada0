"""A dense weight that notes what the activations are like that it meets, while batches pass."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from jopt import trees
from jopt.trace import Stat, rule

from .._leaves.weights import DenseWeight, Range
from .histogram import count
from .observers import extremes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "range", "ends"],
    meta_fields=["activation", "static", "observed", "bins"],
)
@dataclasses.dataclass(frozen=True)
class Watched(DenseWeight):
    """A dense weight whose products record, under the names `observed`, what they meet.

    Without `ends` that is the smallest and the largest value, else a histogram between them.
    """

    observed: tuple[str, ...]
    ends: tuple[Range, ...] | None  # for each name, of the weight's rank, as `QArray.range`
    bins: int  # of each histogram

    def split(self) -> tuple[jax.Array, Any]:
        """The weight, and where histograms begin and end."""
        return self.value, (self.range, self.ends)

    def joined(self, array: jax.Array, coarse: Any) -> "Watched":
        """This leaf with other arrays."""
        range, ends = coarse
        return dataclasses.replace(self, value=array, range=range, ends=ends)


@rule(jax.lax.dot_general_p, Watched)
@rule(jax.lax.conv_general_dilated_p, Watched)
def _product(call: Any, *operands: Any) -> Any:
    """The float product, and a record of the operand that is no weight."""
    leaves = [x for x in operands if isinstance(x, Watched)]
    others = [x for x in operands if not trees.is_typed(x)]
    if len(leaves) != 1 or len(others) != 1:
        return NotImplemented
    (leaf,), (x,) = leaves, others
    for i, name in enumerate(leaf.observed):
        flat = x.reshape(-1)
        if leaf.ends is None:
            low, high = extremes(flat)
            call.record(name, (Stat(low, "min"), Stat(high, "max")))
        elif all(end.size == 1 for end in leaf.ends[i]):
            low, high = (end.reshape(()) for end in leaf.ends[i])
            call.record(name, Stat(count(flat, low, high, leaf.bins), "sum"))
        else:
            return NotImplemented  # the range differs within what one activation meets
    return call.bind(*(x.materialise() if isinstance(x, Watched) else x for x in operands))


@rule(jax.lax.concatenate_p, Watched)
@rule(jax.lax.stack_p, Watched)
def _together(call: Any, *leaves: Any) -> Any:
    """Weights that meet one activation together: it is recorded for each."""
    if not all(isinstance(leaf, Watched) for leaf in leaves):
        return NotImplemented
    names = tuple(name for leaf in leaves for name in leaf.observed)
    ends = None
    if leaves[0].ends is not None:
        rank = call.out[0].ndim
        ends = tuple(_of_rank(pair, rank) for leaf in leaves for pair in leaf.ends)
    value = call.bind(*(leaf.value for leaf in leaves))
    return dataclasses.replace(leaves[0], value=value, observed=names, ends=ends)


def _of_rank(ends: Range, rank: int) -> Range:
    """Ends that are the same for the whole weight, or for each of the layers stacked in front."""
    return Range(*(end.reshape(_shape(end.shape, rank)) for end in ends))


def _shape(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    return (*shape, 1)[:rank] if len(shape) < rank else tuple(shape)
