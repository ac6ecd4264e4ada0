"""A typed leaf whose array is packed in turn: the codes of a pruned and quantized weight."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from jopt import trees
from jopt.trace import Leaf, rule

from .sparse import Sparse


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaf"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class PackedLeaf(Leaf):
    """Another typed leaf, such as int8 codes and scales, whose largest arrays are packed.

    Made by `jopt.prune.pack`. An operation unpacks the codes and then does what the leaf itself
    does, by its own rules: a product of integers stays one.
    """

    leaf: Any  # a typed leaf with `Sparse` leaves in place of arrays of its shape

    def unpacked(self) -> Any:
        """The typed leaf with its arrays whole."""
        unpack = lambda x: x.materialise() if isinstance(x, Sparse) else x  # noqa: E731
        return jax.tree.map(unpack, self.leaf, is_leaf=lambda x: isinstance(x, Sparse))

    def materialise(self) -> jax.Array:
        """What the typed leaf stands for."""
        return self.unpacked().materialise()

    def trainable(self, mark: Callable[[Any], Any]) -> "PackedLeaf":
        """What of this trains: what the typed leaf says itself, such as adapters."""
        if hasattr(type(self.leaf), "trainable"):
            return PackedLeaf(self.leaf.trainable(mark))
        return PackedLeaf(jax.tree.map(lambda array: False, self.leaf))

    def storage(self) -> dict[str, tuple[Any, int]]:
        """The arrays to keep; values of packed codes take the bits that the codes do."""
        packed = dict(_sparse(self.leaf))
        kept: dict[str, tuple[Any, int]] = {}
        for name, (array, width) in self.unpacked().storage().items():
            if name not in packed:
                kept[f"leaf/{name}"] = (array, width)
                continue
            for field, (part, bits) in packed[name].storage().items():
                bits = width if field == "values" else bits
                kept[f"leaf/{name}/{field}"] = (part, bits)
        return kept

    def size(self) -> trees.Size:
        """Parameters and nonzeros of the typed leaf, and the bits that it takes packed."""
        bits = sum(array.size * width for array, width in self.storage().values())
        return self.unpacked().size()._replace(bits=bits)


def _by_its_own(call: Any, *operands: Any) -> Any:
    call.say("unpacked, then by the rules of what was packed")
    return call.bind(*(x.unpacked() if isinstance(x, PackedLeaf) else x for x in operands))


for _primitive in (
    *(jax.lax.dot_general_p, jax.lax.conv_general_dilated_p, jax.lax.gather_p),
    *(jax.lax.transpose_p, jax.lax.reshape_p, jax.lax.squeeze_p, jax.lax.broadcast_in_dim_p),
    *(jax.lax.slice_p, jax.lax.dynamic_slice_p, jax.lax.rev_p, jax.lax.tile_p),
    *(jax.lax.split_p, jax.lax.unstack_p, jax.lax.concatenate_p, jax.lax.stack_p),
    *(jax.lax.convert_element_type_p, jax.lax.add_p, jax.lax.sub_p),
):
    rule(_primitive, PackedLeaf)(_by_its_own)


def _sparse(leaf: Any) -> list[tuple[str, Sparse]]:
    """Packed arrays within a leaf, by the names that its `storage` has for them."""
    flat, _ = jax.tree_util.tree_flatten_with_path(leaf, is_leaf=lambda x: isinstance(x, Sparse))
    spell = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return [(spell(path), x) for path, x in flat if isinstance(x, Sparse)]
