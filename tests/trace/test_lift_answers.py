"""`lift` over a table of functions: right answers, int8 in the products, floats left alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from toy_functions import CELLS, STACK, W, X, close, linear
from toy_leaves import Leaf, Scaled, dense, products

from jopt.trace import lift, rule


@pytest.mark.parametrize("name", CELLS)
def test_equals_the_function_of_the_dense_weights(name):
    function, params, x, _, allow_dense = CELLS[name]
    lifted = lift(function, allow_dense=allow_dense)
    tolerance = 2e-2 if name == "kernel_cast" else 2e-5
    close(jax.jit(lifted)(params, x), jax.jit(function)(dense(params), x), tolerance)


@pytest.mark.parametrize("name", CELLS)
def test_int8_reaches_the_products_and_no_others(name):
    function, params, x, expected, allow_dense = CELLS[name]
    before = str(jax.make_jaxpr(function)(dense(params), x))
    lifted = lift(function, allow_dense=allow_dense)
    found = products(jax.make_jaxpr(lifted)(params, x))
    assert (sum(found), len(found)) == expected
    assert not any(products(jax.make_jaxpr(function)(dense(params), x)))
    assert str(jax.make_jaxpr(function)(dense(params), x)) == before


def test_warm_caches_do_not_leak_either_way():
    function, params, x, _, _ = CELLS["jitted_helper"]

    def count(f, p):
        return sum(products(jax.make_jaxpr(f)(p, x)))

    jax.jit(function)(dense(params), x)
    assert count(lift(function), params) == 2
    assert count(function, dense(params)) == 0
    assert count(lift(function), params) == 2


def test_python_arguments_stay_python():
    def function(p, x, *, train, rate=0.5):
        assert train is True and isinstance(rate, float)
        return x @ p["w"] * rate if train else x

    ours = jax.jit(lift(function), static_argnames=("train", "rate"))({"w": W}, X, train=True)
    close(ours, function(dense({"w": W}), X, train=True))
    lift(function)({"w": W}, X, train=True, rate=2.0)


def test_a_returned_leaf_is_materialised():
    out = lift(lambda p: {"same": p["w"], "one": 1.0, "none": None})({"w": W})
    np.testing.assert_array_equal(out["same"], W.materialise())
    assert out["none"] is None and out["one"] == 1.0


def test_without_typed_leaves_the_program_is_the_same():
    function, params, x, _, _ = CELLS["scan_remat"]

    def compiled(f):
        text = jax.jit(f).lower(dense(params), x).compile().as_text()
        text = re.sub(r", metadata={[^}]*}", "", text)
        return re.sub(r"(?s)\nFileNames.*?\n\n\n", "\n", text)  # the tables of source lines

    assert "FileNames" not in compiled(function)
    assert compiled(lift(function)) == compiled(function)


def test_shapes_without_values():
    shapes = jax.eval_shape(lambda: {"w": W})
    out = jax.eval_shape(lift(linear), {**shapes, "b": X[0]}, X)
    assert (out.shape, out.dtype) == ((4, 6), jnp.float32)


def test_eager_equals_jit():
    function, params, x, _, _ = CELLS["scan_remat"]
    close(lift(function)(params, x), jax.jit(lift(function))(params, x))


def test_a_leaf_of_the_model_can_be_any_argument():
    ours = lift(lambda x, *, kernel: x @ kernel)(X, kernel=W)
    close(ours, X @ W.materialise())


def test_most_derived_rule_goes_first():
    class Louder(Scaled):
        pass

    jax.tree_util.register_dataclass(Louder, data_fields=["codes", "scale"], meta_fields=[])

    @rule(lax.dot_general_p, Louder)
    def _(call, x, w):
        return call.bind(x, Scaled(w.codes, w.scale)) + 1.0

    leaf = Louder(W.codes, W.scale)
    close(lift(lambda w, x: x @ w)(leaf, X), X @ W.materialise() + 1.0)
    close(lift(lambda w, x: x @ w[:, :2])(leaf, X), X @ W.materialise()[:, :2])  # of `Scaled`


def test_leaf_says_its_shape():
    assert (STACK.shape, STACK.ndim, STACK.dtype) == ((3, 6, 6), 3, jnp.float32)
    assert jax.vmap(lambda w: jnp.zeros(w.shape))(STACK).shape == (3, 6, 6)
    assert isinstance(STACK, Leaf) and functools.reduce(lambda a, b: a * b, STACK.shape) == 108
