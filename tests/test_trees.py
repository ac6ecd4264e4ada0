"""Paths, selectors, and the count of bits."""

import dataclasses
from typing import NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jopt
from jopt import trees


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Doubled:
    """A typed leaf that trains."""

    weight: jax.Array
    factor: jax.Array

    def materialise(self):
        return self.weight * self.factor

    def with_weight(self, weight):
        return dataclasses.replace(self, weight=weight)

    def size(self):
        return trees.Size(self.weight.size, self.weight.size, 2 * self.weight.size + 32)


TREE = {"a": [jnp.zeros(1), Pair(jnp.ones(2), jnp.zeros(3))], "b": {"kernel": jnp.ones((2, 2))}}


def test_paths_of_all_containers():
    assert trees.paths(TREE) == ("a/0", "a/1/first", "a/1/second", "b/kernel")


def test_paths_of_frameworks():
    variables = linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
    assert trees.paths(variables) == ("params/bias", "params/kernel")
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Param)
    assert [path.split("/")[0] for path in trees.paths(state)] == ["bias", "kernel"]


def test_a_typed_leaf_is_one_leaf():
    tree = {"x": Doubled(jnp.ones(3), jnp.ones(1)), "y": jnp.ones(2)}
    assert trees.paths(tree) == ("x", "y")
    names = trees.map_with_path(lambda path, leaf, other: (path, type(other).__name__), tree, tree)
    assert names == {"x": ("x", "Doubled"), "y": ("y", "ArrayImpl")}
    assert trees.weight_of(tree["x"]) is tree["x"].weight
    assert trees.with_weight(tree["x"], jnp.zeros(3)).weight.sum() == 0
    assert trees.weight_of(tree["y"]) is tree["y"]


@pytest.mark.parametrize(
    ("glob", "expected"),
    [
        ("**/kernel", {"kernel", "a/kernel", "a/b/kernel"}),
        ("*/kernel", {"a/kernel"}),
        ("a/**", {"a/kernel", "a/bias", "a/b/kernel"}),
        ("**", {"kernel", "a/kernel", "a/bias", "a/b/kernel", "x.y"}),
        ("a/*", {"a/kernel", "a/bias"}),
        ("a/bia?", {"a/bias"}),
        ("x.y", {"x.y"}),
        (["kernel", "a/bias"], {"kernel", "a/bias"}),
    ],
)
def test_globs(glob, expected):
    tree = {"kernel": 0, "a": {"kernel": 0, "bias": 0, "b": {"kernel": 0}}, "x.y": 0}
    chosen = trees.select(tree, glob, caller="f")
    assert {path for path, mine in trees.items(chosen) if mine} == expected


def test_a_dot_is_a_dot():
    with pytest.raises(ValueError, match=r'`f\(\.\.\., where="x\.y"\)` matched none of 1'):
        trees.select({"xzy": 0}, "x.y", caller="f")


def test_what_matches_nothing_is_named_with_its_neighbours():
    tree = {"params": {f"Dense_{i}": {"kernel": 0} for i in range(12)}}
    with pytest.raises(ValueError) as error:
        trees.select(tree, ["**/kernel", "params/Dens_3/kernel"], caller="quantize")
    message = str(error.value)
    assert '`quantize(..., where="params/Dens_3/kernel")` matched none of 12' in message
    assert "`params/Dense_3/kernel`" in message and "jopt.trees.paths" in message
    with pytest.raises(ValueError, match="<predicate>"):
        trees.select(tree, lambda path, leaf: False, caller="prune")


def test_predicates_see_path_and_leaf():
    chosen = trees.select(TREE, lambda path, leaf: leaf.ndim == 2 or path == "a/0", caller="f")
    assert [path for path, mine in trees.items(chosen) if mine] == ["a/0", "b/kernel"]


@given(st.lists(st.text("abk", min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_path_matches_itself_and_double_star(parts):
    path = "/".join(parts)
    assert trees.matches(path, path, None) and trees.matches("**", path, None)
    assert trees.matches(f"**/{parts[-1]}", path, None)
    assert trees.matches("/".join("*" for _ in parts), path, None)
    assert not trees.matches("/".join("*" for _ in [*parts, 0]), path, None)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float32", 32), ("bfloat16", 16), ("int4", 4), ("uint4", 4), ("int2", 2), ("bool", 1),
     ("int8", 8), ("float8_e4m3fn", 8)],
)  # fmt: skip
def test_bits(dtype, bits):
    assert trees.bits_of(jnp.zeros(3, dtype)) == bits
    expected = trees.Size(3, 0, 3 * bits)
    assert trees.size({"x": jnp.zeros(3, dtype)}) == expected


def test_jitted_takes_functions():
    traced = []

    @trees.jitted
    def run(tree, x):
        traced.append(tree)
        return tree["f"](x) + tree["w"]

    tree = {"f": jnp.negative, "none": None, "w": jnp.ones(2)}
    np.testing.assert_array_equal(run(tree, 3.0), [-2, -2])
    np.testing.assert_array_equal(run(tree, 4.0), [-3, -3])
    np.testing.assert_array_equal(run(tree | {"f": jnp.abs}, 4.0), [5, 5])
    assert len(traced) == 2


def test_size_adds_typed_leaves_in_their_own_formats():
    tree = {"x": Doubled(jnp.ones(8), jnp.ones(1)), "y": jnp.array([0.0, 1.0])}
    assert jopt.size(tree) == trees.Size(10, 9, 2 * 8 + 32 + 64)
    assert jopt.size({}) == trees.Size(0, 0, 0)
    assert jopt.size({"x": jnp.ones(2), "f": jnp.tanh}) == trees.Size(2, 2, 64)
    assert jopt.size(tree).bytes == 14


def test_merged_fills_what_is_absent():
    none = ()
    absent = lambda node: node is none  # noqa: E731
    one, other = {"a": none, "b": [1, none]}, {"a": {"c": 2}, "b": [none, 3]}
    assert trees.merged(one, other, absent, "twice") == {"a": {"c": 2}, "b": [1, 3]}
    with pytest.raises(ValueError, match="twice"):
        trees.merged(one, {"a": none, "b": [1, 3]}, absent, "twice")
