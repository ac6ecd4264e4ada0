"""Axis rules for primitives of one's own, layouts that `sites` follows, and baked-in constants."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir
from toy_functions import normal
from toy_leaves import scaled

from jopt.trace import Along, axes, constants, lift, sites

X = normal(0, 4, 6)


def primitive(name, function):
    """A custom primitive that computes `function`."""
    made = Primitive(name)
    made.def_impl(function)
    made.def_abstract_eval(
        lambda *avals, **params: jax.core.ShapedArray(
            *(lambda o: (o.shape, o.dtype))(
                jax.eval_shape(
                    lambda *a: function(*a, **params),
                    *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals),
                )
            )
        )
    )
    mlir.register_lowering(made, mlir.lower_fun(function, multiple_results=False))
    return made


MATMUL = primitive("my_matmul", lambda x, w: x @ w.T)
TURN = primitive("my_turn", lambda w, *, by: jnp.roll(w, by, 1).T)


@axes(MATMUL)
def _(params, operands):
    return Along(results=[[[(0, 0)], [(1, 0)]]], summed=[[(0, 1), (1, 1)]])


@axes(TURN)
def _(params, operands):
    assert params["by"] == 2
    return Along(results=[[[(0, 1)], [(0, 0)]]])


def test_a_custom_product_is_a_site():
    (site,) = sites(lambda p, x: MATMUL.bind(x, p["w"]), {"w": normal(1, 5, 6)}, X)
    assert (site.operation, site.path, site.contracted) == ("my_matmul", "w", (-1,))
    assert site.flops == 2 * 4 * 6 * 5 and site.shapes == ((4, 6), (5, 6), (4, 5))


def test_a_parameter_is_followed_through_a_custom_primitive():
    def apply(p, x):
        return x @ TURN.bind(p["w"], by=2)

    p = {"w": normal(1, 5, 6)}
    (site,) = sites(apply, p, X)
    assert (site.path, site.contracted) == ("w", (-1,))
    unknown = primitive("my_unknown", lambda w: w.T)
    (site,) = sites(lambda p, x: x @ unknown.bind(p["w"]), p, X)
    assert site.path is None


@pytest.mark.parametrize(
    ("along", "words"),
    [
        (Along([[[(0, 0)]]]), r"describes 1 results of ranks \[1\]; the operation's shapes are"),
        (Along([[[(0, 1)], [(1, 0)]]]), "joins axes of different lengths"),
        (Along([[[(0, 0)], [(1, 2)]]]), "names axis 2 of operand 1"),
        (Along([[[(0, 0)], [(1, 0)]]], [[(0, 0), (1, 1)]]), "joins axes of different lengths"),
    ],
)
def test_a_wrong_rule_is_told(along, words):
    wrong = primitive("my_wrong", lambda x, w: x @ w.T)
    axes(wrong)(lambda params, operands: along)
    with pytest.raises(ValueError, match=words):
        sites(lambda p, x: wrong.bind(x, p), normal(1, 5, 6), X)


def test_two_rules_for_one_primitive_are_refused():
    with pytest.raises(ValueError, match=r"`axes\(my_matmul\)` is taken by"):
        axes(MATMUL)(lambda params, operands: Along([]))


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda w, x: x @ jnp.split(w, 2, axis=1)[1], (6, 8), (-2,)),
        (lambda w, x: x @ jnp.unstack(w)[1], (3, 6, 5), (-2,)),
        (lambda w, x: x @ jnp.unstack(w, axis=1)[0], (6, 2, 5), (-3,)),
        (lambda w, x: jnp.einsum("bi,kio->bko", x, jnp.stack([w, w])), (6, 5), (-2,)),
        (lambda w, x: x @ jnp.tile(w, (1, 3)), (6, 5), (-2,)),
        (lambda w, x: x @ jnp.tile(w, (2, 1)), (3, 5), (-2,)),
        (lambda w, x: x @ jnp.concatenate([w.T, w.T], 1), (5, 6), (-1,)),
        (lambda w, x: x @ jax.lax.reshape(w, (6, 5), (1, 0)), (5, 6), (-1,)),
        (lambda w, x: x @ jax.lax.reshape(w, (6, 6), (1, 0)), (6, 6), (-1,)),
        (lambda w, x: x @ jax.lax.reshape(w, (6, 10), (1, 2, 0)), (5, 6, 2), (-2,)),
    ],
)
def test_layouts_that_are_followed(function, shape, expected):
    found = sites(lambda p, x: function(p["w"], x), {"w": normal(1, *shape)}, X)
    assert {(site.path, site.contracted) for site in found} == {("w", expected)}


def test_constants_are_listed_and_large_ones_warned_of():
    weights, small = jnp.ones((512, 600)), jnp.ones((6, 512))

    @jax.jit
    def helper(x):
        return x @ weights

    def apply(p, x):
        return jax.lax.scan(lambda h, _: (h, helper(h @ small)), x @ p, None, length=2)

    p = jnp.eye(6)
    found = constants(apply, p, X)
    assert [(c.shape, c.bytes) for c in found] == [((512, 600), 1_228_800), ((6, 512), 12_288)]
    assert all("test_axes.py" in constant.source for constant in found)
    words = r"1\.2 MB of constants are baked into the function, the largest float32\[512, 600\]"
    with pytest.warns(UserWarning, match=rf"`sites\(apply, \.\.\.\)`: {words} \(.*test_axes\.py"):
        sites(apply, p, X)
    with pytest.warns(UserWarning, match=rf"`lift\(apply\)`: {words}"):
        lift(apply)(scaled(p), X)
    assert constants(lambda p, x: x @ p, p, X) == ()
    (returned,) = constants(lambda p, x: (x @ p, weights), p, X)
    assert (returned.shape, returned.source) == ((512, 600), "returned as it is")
