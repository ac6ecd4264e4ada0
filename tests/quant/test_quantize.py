"""Policies, the leaves they make, bit equality of training and storage, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jopt
from jopt import trees
from jopt.quant import FakeQuant, Int, QArray, Spec, fake_quant, qat, quantize, trainable
from jopt.trace import lift, sites

GROUP = Int(4, granularity="group", group_size=4)


def params_of(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "embed": {"table": jax.random.normal(keys[0], (7, 4), dtype)},
        "dense": {"kernel": jax.random.normal(keys[1], (8, 6), dtype), "bias": jnp.ones(6, dtype)},
        "conv": {"kernel": jax.random.normal(keys[2], (3, 3, 4, 5), dtype)},
        "steps": jnp.int32(3),
    }


FORMATS = [
    Int(8),
    Int(3),
    Int(2),
    Int(8, symmetric=False),
    Int(4, symmetric=False),
    Int(8, granularity="tensor"),
    GROUP,
    Int(5, symmetric=False, granularity="group", group_size=2),
    Int(6, rounding="floor"),
]


DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SEEN = [(format, DTYPES[i % 3]) for i, format in enumerate(FORMATS)]
SEEN += [(Int(8), jnp.bfloat16), (Int(8), jnp.float16), (GROUP, jnp.float32)]


@pytest.mark.parametrize("format, dtype", SEEN, ids=str)
def test_what_training_saw_is_what_is_stored(format, dtype):
    """Bit for bit: op by op, compiled alone, compiled together, and with constant weights."""
    shapes = {"stack": (3, 8, 6), "kernel": (3, 3, 4, 5)}
    weights = {
        name: jax.random.normal(jax.random.key(7), shape, dtype) * jnp.asarray(0.37, dtype)
        for name, shape in shapes.items()
    }
    trained = qat(weights, format)
    stored = quantize(trained)

    def saw(params):
        return {name: leaf.materialise() for name, leaf in params.items()}

    def bits(arrays):
        return {name: np.asarray(array).tobytes() for name, array in arrays.items()}

    expected = bits(saw(stored))
    assert all(isinstance(leaf, QArray) and leaf.dtype == dtype for leaf in stored.values())
    assert bits(jax.jit(saw)(stored)) == expected
    assert bits(saw(trained)) == expected
    assert bits(jax.jit(saw)(trained)) == expected
    assert bits(jax.jit(lambda p: saw(quantize(p)))(trained)) == expected
    if dtype == jnp.float32:
        assert bits(jax.jit(lambda: saw(trained))()) == expected
        assert bits(jax.jit(lambda p: saw(quantize(p, format)))(weights)) == expected
    assert bits({name: fake_quant(w, format) for name, w in weights.items()}) == expected


def test_the_first_match_wins_and_the_rest_stays():
    params = params_of()
    policy = [
        ("conv/**", None),
        ("**/kernel", Spec(Int(4), Int(8))),
        ["*/*", Int(8)],
    ]
    stored = quantize(params, policy[:2])
    assert stored["conv"]["kernel"] is params["conv"]["kernel"]
    assert stored["embed"]["table"] is params["embed"]["table"]
    assert stored["dense"]["kernel"].format == Int(4)
    assert stored["dense"]["kernel"].activation == Int(8)
    everything = quantize(params, policy)
    assert everything["embed"]["table"].format == Int(8)
    assert everything["dense"]["kernel"].format == Int(4)
    assert everything["dense"]["bias"].scale.shape == (1,)


def test_a_bare_format_is_for_matrices_and_a_bare_spec_too():
    stored = quantize(params_of(), Int(8))
    typed = {path for path, leaf in trees.items(stored) if trees.is_typed(leaf)}
    assert typed == {"embed/table", "dense/kernel", "conv/kernel"}
    trained = qat(params_of(), Spec(Int(4), Int(8)))
    assert {type(leaf) for _, leaf in trees.items(trained)} >= {FakeQuant}


def test_layouts_without_sites():
    for shape, expected in [
        ((8, 6), (1, 6)),
        ((3, 8, 6), (3, 1, 6)),
        ((3, 3, 4, 5), (1, 1, 1, 5)),
        ((5,), (1,)),
    ]:
        assert quantize({"w": jnp.ones(shape)}, [("w", Int(8))])["w"].scale.shape == expected
    tensor = Int(8, granularity="tensor")
    for shape, expected in [((8, 6), (1, 1)), ((3, 8, 6), (3, 1, 1)), ((3, 3, 4, 5), (1, 1, 1, 1))]:
        assert quantize({"w": jnp.ones(shape)}, tensor)["w"].scale.shape == expected
    for shape, expected in [((8, 6), (2, 6)), ((3, 8, 6), (3, 2, 6)), ((3, 3, 4, 5), (3, 3, 1, 5))]:
        assert quantize({"w": jnp.ones(shape)}, GROUP)["w"].scale.shape == expected


def test_layouts_from_sites():
    params = {
        "out_in": jnp.ones((6, 8)),
        "heads": jnp.ones((8, 2, 4)),
        "stack": jnp.ones((3, 6, 6)),
        "kernels": jnp.ones((2, 4, 4, 3)),
        "both": jnp.ones((6, 6)),
        "table": jnp.ones((9, 8)),
        "unused": jnp.ones((4, 4)),
    }

    def f(p, x, ids):
        x = x + p["table"][ids]
        y = jnp.einsum("bi,ihk->bhk", x, p["heads"]).reshape(-1, 8) @ p["out_in"].T
        y, _ = jax.lax.scan(lambda c, w: (c @ w.T, None), y, p["stack"])
        y = (y @ p["both"]) @ p["both"].T
        z, _ = jax.lax.scan(
            lambda c, w: (jax.lax.conv(c, w, (1,), "SAME"), None), jnp.ones((1, 4, 6)), p["kernels"]
        )
        return y, x @ p["table"].T, z

    found = sites(f, params, jnp.ones((2, 8)), jnp.array([1, 2]))
    stored = quantize(params, Int(8), sites=found)
    shapes = {name: leaf.scale.shape for name, leaf in stored.items() if trees.is_typed(leaf)}
    assert shapes == {
        "out_in": (6, 1),
        "heads": (1, 2, 4),
        "stack": (3, 6, 1),
        "kernels": (2, 4, 1, 1),  # two kernels (out, in, width), stacked
        "both": (1, 1),  # summed over one axis here and over the other there
        "table": (9, 1),
    }
    assert not trees.is_typed(stored["unused"])
    tensor = quantize(params, Int(8, granularity="tensor"), sites=found)
    assert tensor["kernels"].scale.shape == (2, 1, 1, 1)
    assert tensor["stack"].scale.shape == (3, 1, 1)
    assert tensor["out_in"].scale.shape == (1, 1)
    groups = quantize(params, [("out_in", GROUP)], sites=found)
    assert groups["out_in"].scale.shape == (6, 2)


def test_size_counts_true_bits():
    w = np.ones((8, 6), np.float32)
    w[:3] = 0
    for bits in (3, 4, 8):
        found = jopt.size(quantize({"w": jnp.asarray(w)}, Int(bits)))
        assert found == (48, 30, 48 * bits + 6 * 32)
    affine = quantize({"w": jnp.asarray(w)}, Int(3, symmetric=False))
    assert jopt.size(affine) == (48, 30, 48 * 3 + 6 * 32 + 6 * 3)
    storage = affine["w"].storage()
    assert {name: bits for name, (_, bits) in storage.items()} == {
        "codes": 3,
        "scale": 32,
        "zero_point": 3,
    }
    assert affine["w"].codes.dtype == jnp.int4
    groups = quantize({"w": jnp.asarray(w)}, GROUP)
    assert jopt.size(groups) == (48, 30, 48 * 4 + 12 * 32)
    trained = qat({"w": jnp.asarray(w)}, Int(3))
    assert jopt.size(trained) == (48, 30, 48 * 32)


def test_leaves_are_pytrees_of_their_arrays():
    stored = quantize({"w": jnp.ones((3, 8, 6))}, Int(8, symmetric=False))["w"]
    flat, tree = jax.tree.flatten(stored)
    assert [a.dtype for a in flat] == [jnp.int8, jnp.float32, jnp.int8]
    again = jax.tree.unflatten(tree, flat)
    assert jax.tree.structure(again) == tree
    one = jax.tree.map(lambda a: a[0], stored)
    assert one.shape == (8, 6)
    np.testing.assert_array_equal(one.materialise(), stored.materialise()[0])
    mapped = jax.vmap(lambda leaf: leaf.materialise())(stored)
    np.testing.assert_array_equal(mapped, stored.materialise())
    assert stored.aval.shape == (3, 8, 6) and stored.ndim == 3


def test_masks_act_on_the_weight_that_trains():
    trained = qat({"w": jnp.ones((4, 3))}, Int(8))
    assert trees.weight_of(trained["w"]) is trained["w"].weight
    masked = trees.with_weight(trained["w"], jnp.zeros((4, 3)))
    assert isinstance(masked, FakeQuant) and not masked.weight.any()


def test_stochastic_rounding_of_stored_weights():
    format = Int(3, rounding="stochastic")
    w = {"a": jax.random.normal(jax.random.key(0), (64, 8)), "b": jnp.ones((4, 4))}
    one = quantize(w, format, key=jax.random.key(1))
    same = quantize(w, format, key=jax.random.key(1))
    other = quantize(w, format, key=jax.random.key(2))
    np.testing.assert_array_equal(one["a"].codes, same["a"].codes)
    assert np.any(np.asarray(one["a"].codes) != np.asarray(other["a"].codes))
    nearest = quantize(w, Int(3))["a"]
    away = np.asarray(one["a"].codes, np.int32) - np.asarray(nearest.codes, np.int32)
    assert np.abs(away).max() == 1
    with pytest.raises(ValueError, match=r"`a` rounds stochastically: pass `key=`"):
        quantize(w, format)
    with pytest.raises(ValueError, match=r"no key to round at random"):
        jax.tree.map(lambda leaf: leaf.materialise(), qat(w, format), is_leaf=trees.is_typed)


def test_quantization_works_under_transformations():
    w = jax.random.normal(jax.random.key(0), (3, 8, 6))
    stored = jax.jit(lambda w: quantize({"w": w}, Int(8)))(w)
    plain = quantize({"w": w}, Int(8))
    np.testing.assert_array_equal(stored["w"].codes, plain["w"].codes)
    mapped = jax.vmap(lambda w: quantize({"w": w}, Int(8)))(w)
    np.testing.assert_array_equal(mapped["w"].codes, plain["w"].codes)
    np.testing.assert_array_equal(mapped["w"].scale, plain["w"].scale)


def test_training_lowers_the_loss_and_leaves_ranges_alone():
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 8))
    y = jnp.tanh(x @ jax.random.normal(jax.random.key(1), (8, 4)))
    params = {
        "a": {"kernel": 0.3 * jax.random.normal(jax.random.key(2), (8, 16)), "bias": jnp.zeros(16)},
        "b": {"kernel": 0.3 * jax.random.normal(jax.random.key(3), (16, 4)), "bias": jnp.zeros(4)},
    }

    def apply(p, x):
        x = jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"][None])
        return x @ p["b"]["kernel"] + p["b"]["bias"][None]

    params = qat(params, [("**/kernel", Spec(Int(4), Int(8), static=True))])
    params, _ = jopt.quant.calibrate(apply, params, [(x,)])
    tx = optax.masked(optax.adamw(1e-2, weight_decay=0.1), trainable(params))

    def loss(params):
        return jnp.mean((lift(apply)(params, x) - y) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, first = params, tx.init(params), None
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        for _ in range(60):
            params, state, value = step(params, state)
            first = value if first is None else first
    assert step._cache_size() == 1
    assert value < 0.5 * first
    for name in "ab":
        one, other = before[name]["kernel"], params[name]["kernel"]
        assert np.any(np.asarray(one.weight) != np.asarray(other.weight))
        np.testing.assert_array_equal(one.range.low, other.range.low)
        np.testing.assert_array_equal(one.range.high, other.range.high)
    stored = quantize(params)
    np.testing.assert_allclose(
        jax.jit(lift(apply))(stored, x), jax.jit(lift(apply))(params, x), atol=1e-4
    )


def test_what_may_train():
    marks = trainable(quantize(params_of(), [("dense/kernel", Int(8))]))
    assert marks["dense"]["bias"] is True and marks["steps"] is False
    assert not any(jax.tree.leaves(marks["dense"]["kernel"]))
    marks = trainable(qat(params_of(), [("dense/kernel", Int(8))]))
    assert marks["dense"]["kernel"].weight is True


def refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_what_is_refused():
    params = params_of()
    refused(
        ValueError,
        r'(?s)`quantize\(..., where="dens/\*"\)` matched none of 5',
        lambda: quantize(params, [("dens/*", Int(8))]),
    )
    refused(ValueError, r"`qat\(..., where=", lambda: qat(params, [("nothing", Int(8))]))
    refused(
        TypeError,
        r"`steps` is int32; only floating arrays",
        lambda: quantize(params, [("steps", Int(8))]),
    )
    refused(
        ValueError, r"`s` is a scalar", lambda: quantize({"s": jnp.float32(1)}, [("s", Int(8))])
    )
    refused(
        ValueError,
        r"group_size=3 does not divide the 8 inputs of `dense/kernel`",
        lambda: quantize(params, [("dense/kernel", Int(4, granularity="group", group_size=3))]),
    )
    refused(
        ValueError,
        r"`dense/kernel` is a `QArray` already",
        lambda: quantize(quantize(params, [("dense/kernel", Int(8))]), [("**/kernel", Int(4))]),
    )
    refused(ValueError, r"there are none", lambda: quantize(params))
    refused(TypeError, r"needs a policy", lambda: qat(params, None))
    refused(
        TypeError,
        r"a policy is a format, a `Spec`, or a list",
        lambda: quantize(params, {"**/kernel": Int(8)}),
    )
    refused(
        TypeError, r"a policy is a format, a `Spec`, or a list", lambda: quantize(params, "int8")
    )
    refused(TypeError, r"an entry is `\(where, value\)`", lambda: quantize(params, ["**/kernel"]))
    refused(
        TypeError,
        r"a format, a `Spec` or None, got 8",
        lambda: quantize(params, [("**/kernel", 8)]),
    )
    refused(ValueError, r"found no weight", lambda: quantize({"b": jnp.ones(3)}, Int(8)))
    refused(
        ValueError, r"found no weight: no site has one", lambda: quantize(params, Int(8), sites=())
    )


def test_specs_are_checked():
    refused(ValueError, r"needs an activation format", lambda: Spec(Int(8), static=True))
    refused(ValueError, r"groups are for weights", lambda: Spec(Int(8), GROUP))
    refused(
        ValueError,
        r"activations round to nearest",
        lambda: Spec(Int(8), Int(8, rounding="stochastic")),
    )
    refused(TypeError, r"expected a format", lambda: Spec(8))
    refused(TypeError, r"expected a format", lambda: Spec(Int(8), 8))


def test_a_bare_format_takes_all_weights_that_a_product_is_made_of():
    """As of LSTM cells that concatenate their kernels: one left out would have to meet the rest."""
    linen = pytest.importorskip("flax.linen")
    model, x = linen.RNN(linen.OptimizedLSTMCell(6)), jnp.ones((2, 5, 8))
    params = model.init(jax.random.key(0), x)
    found = sites(model.apply, params, x)
    for spec in (Int(8), Spec(Int(8), Int(8))):
        small = quantize(params, spec, sites=found)
        kernels = [leaf for path, leaf in trees.items(small) if path.endswith("kernel")]
        assert len(kernels) == 8 and all(isinstance(leaf, QArray) for leaf in kernels)
        error = lift(model.apply)(small, x) - model.apply(params, x)
        assert float(jnp.abs(error).max()) < 0.01


def test_what_is_no_array_is_left():
    params = {"kernel": jnp.ones((4, 2)), "activation": jax.nn.relu, "name": "layer", "steps": 3}
    small = quantize(params, Int(8))
    assert isinstance(small["kernel"], QArray) and small["activation"] is jax.nn.relu
    assert small["name"] == "layer" and small["steps"] == 3
