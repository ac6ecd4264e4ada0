"""What a typed leaf must say of itself.

A typed leaf stands in a parameter tree where an array stood. It is a registered frozen dataclass,
so `jit`, `scan`, `vmap`, sharding, optax and checkpoints see only the arrays inside it. Two things
keep that true and every subclass must heed them: no static field may hold a shape (scan and vmap
slice the arrays), and every array inside has the rank of the value, each axis as long as the
value's or 1, so that slicing a leading axis slices all.
"""

import abc
import functools
from typing import Any, ClassVar

import jax
import numpy as np

from jopt import trees


class Leaf(abc.ABC):
    """A pytree node that stands for one array.

    Subclasses are frozen dataclasses registered by `jax.tree_util.register_dataclass`, implement
    `materialise`, and teach `jopt.lift` with `jopt.trace.rule` the operations that can do without
    it.
    """

    always_dense: ClassVar[bool] = False
    """Whether `lift` may materialise this leaf without being told so.

    True suits a leaf that stores its weight in full anyway (masked, fake-quantized, observed), so
    that an operation without a rule loses nothing.
    """

    travels: ClassVar[bool] = False
    """Whether this leaf may leave a body as a leaf: as a result, a carry, out of a branch.

    True suits state that a function updates and returns, such as a cache. Other leaves become
    arrays there, and travelling ones where iterations or branches do not agree on one.
    """

    @abc.abstractmethod
    def materialise(self) -> jax.Array:
        """The array that this leaf stands for."""

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the array, found by tracing `materialise`."""
        return aval_of(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the leaf stands for."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the array that the leaf stands for."""
        return self.aval.dtype

    @property
    def ndim(self) -> int:
        """Rank of the array that the leaf stands for."""
        return len(self.shape)

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The arrays to keep on disk, by field name, each with the bits that one element needs."""
        fields = trees.items(dict(vars(self)))
        return {
            path: (value, trees.bits_of(value))
            for path, value in fields
            if isinstance(value, (jax.Array, np.ndarray))
        }

    def size(self) -> trees.Size:
        """Parameters, nonzeros and bits of this leaf."""
        dense = np.asarray(self.materialise())
        bits = sum(array.size * width for array, width in self.storage().values())
        return trees.Size(dense.size, int(np.count_nonzero(dense)), bits)


def aval_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the array that a typed leaf stands for.

    Raises:
      TypeError: if its class is no pytree node.
    """
    if jax.tree_util.all_leaves((leaf,)):
        raise TypeError(
            f"`{type(leaf).__name__}` is a `Leaf`, but JAX does not know its arrays: register the "
            "class, as with `jax.tree_util.register_dataclass`."
        )
    return _jitted(type(leaf)).trace(leaf).out_info


@functools.lru_cache(maxsize=256)
def _jitted(leaf_type: type) -> Any:
    """`materialise` as one function a type, so that JAX traces each kind of leaf once, ever."""
    return jax.jit(leaf_type.materialise)
