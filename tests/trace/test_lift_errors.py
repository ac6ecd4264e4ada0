"""What `lift` says when it refuses, and that it refuses."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from toy_functions import STACK, W, X, close
from toy_leaves import Scaled, Watched, dense

from jopt.trace import Leaf, explain, lift, rule


def refusal(function, *args):
    with pytest.raises(ValueError) as caught:
        lift(function)(*args)
    return str(caught.value)


def test_an_operation_without_a_rule_is_named_with_path_and_line():
    def model(p, x):
        return x @ jnp.sin(p["params"]["Dense_0"]["kernel"])  # the line

    message = refusal(model, {"params": {"Dense_0": {"kernel": W}}}, X)
    line = model.__code__.co_firstlineno + 1
    assert re.fullmatch(
        r"`lift\(apply\)` would make `params/Dense_0/kernel` dense: `sin` has no rule for `Scaled` "
        rf"\(.*test_lift_errors\.py:{line}:\d+ \(.*model\)\)\.\n"
        r"Pass `lift\(apply, allow_dense=True\)` to allow it, register a rule with "
        r"`jopt\.trace\.rule\(sin_p, Scaled\)`, or keep this weight an array\.",
        message,
    )


def test_the_path_follows_the_leaf_into_bodies_and_through_rules():
    def model(p, x):
        def layer(h, w):
            return jax.checkpoint(lambda h: jax.jit(lambda h: h @ jnp.cos(w.T))(h))(h), None

        return lax.scan(layer, x, p["layers"])[0]

    message = refusal(model, {"layers": STACK}, X)
    assert "`layers` dense: `cos` has no rule" in message


def test_the_right_one_of_two_leaves_is_named():
    message = refusal(lambda p, x: x @ p["a"] @ (p["b"] + 1.0), {"a": W, "b": W}, X)
    assert "make `b` dense" in message


def test_a_rule_that_declines_is_named():
    message = refusal(lambda p, x: x @ p["w"].T, {"w": W}, X)
    assert "the rule `_dot` for `dot_general` cannot serve these operands" in message


def test_custom_vjp_says_why():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, None), lambda _, g: (g, g))
    message = refusal(lambda p, x: product(x, p["w"]), {"w": W}, X)
    assert "make `w` dense: a `jax.custom_vjp` function is called on dense weights" in message
    assert "so that its derivative is kept" in message


def test_a_leaf_that_is_dense_anyway_needs_no_permission():
    leaf = Watched(jnp.ones((6, 6)), "w")
    close(lift(lambda p, x: x @ jnp.sin(p))(leaf, X), X @ jnp.sin(jnp.ones((6, 6))))


def test_errors_of_the_function_are_its_own():
    with pytest.raises(TypeError, match="contracting dimensions"):
        lift(lambda p, x: x[:, :3] @ p)(W, X)


def test_a_rule_of_the_wrong_shape_or_dtype_is_caught():
    class Wrong(Scaled):
        pass

    jax.tree_util.register_dataclass(Wrong, data_fields=["codes", "scale"], meta_fields=[])

    @rule(lax.tanh_p, Wrong)
    def wrong_shape(call, w):
        return w.scale

    @rule(lax.exp_p, Wrong)
    def wrong_dtype(call, w):
        return w.codes

    leaf = Wrong(W.codes, W.scale)
    with pytest.raises(
        TypeError, match=r"wrong_shape` for `tanh` returned float32\[1, 6\]; the fu"
    ):
        lift(jnp.tanh)(leaf)
    with pytest.raises(TypeError, match=r"wrong_dtype` for `exp` returned int8\[6, 6\]; the func"):
        lift(jnp.exp)(leaf)


def test_a_pair_is_registered_once():
    with pytest.raises(ValueError, match=r"`rule\(transpose, Scaled\)` is taken by `_transpose`"):

        @rule(lax.transpose_p, Scaled)
        def another(call, w):
            return NotImplemented


def test_a_leaf_whose_arrays_cannot_be_scanned():
    leaf = Scaled(jnp.ones((3, 6, 6), jnp.int8), jnp.ones((2, 1, 6)))

    class Odd(Scaled):
        def materialise(self):
            return self.codes * self.scale[:1]

    jax.tree_util.register_dataclass(Odd, data_fields=["codes", "scale"], meta_fields=[])
    odd = Odd(leaf.codes.astype(jnp.float32), leaf.scale)
    message = refusal(
        lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0], {"w": odd}, X
    )
    assert "a scan over 3 slices (`w`, " in message and "of shape (2, 1, 6)" in message


def test_a_scale_common_to_all_layers_is_scanned():
    leaf = Scaled(STACK.codes, jnp.full((1, 1, 1), 0.01))

    def function(p, x):
        return lax.scan(lambda h, w: (h @ w, None), x, p)[0]

    close(lift(function)(leaf, X), function(dense(leaf), X))


def test_leaf_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Leaf()  # pyright: ignore


def test_a_leaf_that_becomes_an_array_on_its_way_is_in_the_report():
    def function(p, x):
        out = lax.fori_loop(0, 2, lambda i, c: (c[0] @ c[1], c[1] * 1.5), (x, p["w"]))[0]
        return out, p["w"]

    found = explain(function, {"w": W}, X)
    assert [(met.path, met.operation, met.dense) for met in found] == [
        ("w", "scan", True),
        ("w", "return", True),
    ]
    assert "carried from iteration to iteration" in found[0].how
    assert not any(met.refused for met in found)
    assert lift(function)({"w": W}, X)[1].shape == W.shape


@pytest.mark.parametrize(
    "function", [lambda w: jnp.clip(w, -1, 1), jax.nn.relu, jnp.tril, lambda w: jnp.pad(w, 1)]
)
def test_operations_inside_jaxs_own_functions_name_the_users_line(function):
    def model(w, x):
        return x @ function(w)[: x.shape[1]]

    with pytest.raises(ValueError, match=r"dense: .*\(.*test_lift_errors\.py:\d+"):
        lift(model)(W, X)


def test_a_class_that_was_not_registered_is_named():
    class Forgotten(Leaf):
        def materialise(self):
            return jnp.ones((4, 2))

    with pytest.raises(TypeError, match=r"`Forgotten` is a `Leaf`, but .*register_dataclass"):
        lift(lambda w, x: x @ w)(Forgotten(), jnp.ones((3, 4)))
