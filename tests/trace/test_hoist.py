"""`hoist`: what depends on parameters alone leaves the function, which stays the same function."""

import equinox as eqx
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from toy_functions import close, normal
from toy_hoisted import (
    CELLS,
    FIVE,
    INT8,
    STACK,
    WIDE,
    B,
    G,
    V,
    W,
    X,
    branched,
    cast,
    checkpointed,
    derived,
    fused,
    integer_products,
    looped,
    low_rank,
    masked,
    nested,
    normed,
    quantized,
    remaining,
    returned,
    scanned,
    scanned_inside,
    scanned_twice,
    switched,
    weight_norm,
)
from toy_leaves import scaled

from jopt import quant
from jopt.trace import hoist, lift, sites


@pytest.mark.parametrize("function", CELLS)
def test_is_the_same_function_of_any_batch(function):
    params, names = CELLS[function]
    rest, hoisted = hoist(function, params, X)
    assert list(hoisted) == names
    ours, theirs = jax.jit(rest), jax.jit(function)
    for x in (WIDE, -WIDE):  # as either branch
        close(ours(hoisted, x), theirs(params, x), 2e-6)
    assert remaining(rest, hoisted, X) == []


@pytest.mark.parametrize("function", [masked, low_rank, fused, cast])
def test_is_bit_equal_where_the_operations_are_the_same(function):
    params, _ = CELLS[function]
    rest, hoisted = hoist(function, params, X)
    close(rest(hoisted, WIDE), function(params, WIDE), 0)


@pytest.mark.parametrize("function", [*FIVE, scanned, scanned_twice, checkpointed, branched])
def test_what_is_hoisted_runs_on_integers(function):
    params, _ = CELLS[function]
    found = sites(function, params, X)
    before = jax.eval_shape(lambda p: quant.quantize(p, INT8, sites=found), params)
    exact, products = integer_products(jax.make_jaxpr(lift(function, allow_dense=True))(before, X))
    assert exact < products or function in (cast, fused)  # which leaves themselves go through
    rest, hoisted = hoist(function, params, X)
    ours = quantized(rest, hoisted)
    exact, products = integer_products(jax.make_jaxpr(ours)(hoisted, X))
    assert exact == products > 0
    if function in (weight_norm, fused, scanned):
        pairs = jax.tree.leaves(jax.jit(ours)(hoisted, X)), jax.tree.leaves(rest(hoisted, X))
        for a, b in zip(*pairs, strict=True):
            assert 0 < jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)


def total(tree):
    return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(tree))


@pytest.mark.parametrize("function", [low_rank, nested, switched, returned, derived])
def test_gradients_through_the_entries(function):
    params, _ = CELLS[function]

    def loss(params, x):
        rest, hoisted = hoist(function, params, x)
        return total(rest(hoisted, x))

    def plain(params, x):
        return total(function(params, x))

    ours, theirs = (jax.jit(jax.grad(f, (0, 1)))(params, X) for f in (loss, plain))
    close(ours, theirs, 1e-4)


@pytest.mark.parametrize("function", [scanned_inside, checkpointed, switched, looped])
def test_vmap_over_weights_and_inputs(function):
    params, _ = CELLS[function]
    ensemble = jax.tree.map(lambda a: jnp.stack([a, 1.1 * a]), params)
    rest, _ = hoist(function, params, X)
    entries = jax.jit(jax.vmap(lambda p: hoist(function, p, X)[1]))(ensemble)
    ours = jax.jit(jax.vmap(rest))(entries, jnp.stack([X, -X]))
    close(ours, jax.jit(jax.vmap(function))(ensemble, jnp.stack([X, -X])), 1e-4)


@pytest.mark.parametrize("function", [fused, nested, switched])
def test_exports_for_every_platform_and_any_batch(function):
    params, _ = CELLS[function]
    rest, hoisted = hoist(function, params, X)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 6), jnp.float32)
    exported = jax.export.export(jax.jit(rest), platforms=["cpu", "cuda", "tpu"])(hoisted, shape)
    close(exported.call(hoisted, WIDE), function(params, WIDE), 1e-5)


def test_on_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.device_put(normal(12, 16, 6), NamedSharding(mesh, PartitionSpec("data")))
    rest, hoisted = hoist(nested, STACK, X)
    out = jax.jit(rest)(hoisted, rows)
    close(out, nested(STACK, rows), 2e-6)
    assert len(out[0].sharding.device_set) == 8

    kernel = NamedSharding(mesh, PartitionSpec(None, None))
    inner = jax.jit(weight_norm, in_shardings=({"g": None, "v": kernel}, rows.sharding))
    rest, hoisted = hoist(lambda p, x: inner(p, x), {"g": G, "v": V}, rows)
    assert list(hoisted) == ["g+v"]
    (again,) = jax.make_jaxpr(rest)(hoisted, rows).eqns
    assert again.primitive.name == "jit" and rows.sharding in again.params["in_shardings"]
    close(rest(hoisted, rows), inner({"g": G, "v": V}, rows), 2e-6)


def test_jit_keeps_donation_and_the_shardings_of_results():
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("data"))
    inner = jax.jit(lambda p, x: (weight_norm(p, x), normed(p)), out_shardings=(place, None))
    rest, hoisted = hoist(lambda p, x: inner(p, x)[0], {"g": G, "v": V}, X)
    out = jax.jit(rest)(hoisted, X)
    close(out, weight_norm({"g": G, "v": V}, X), 2e-6)
    assert out.sharding.is_equivalent_to(place, 2) and remaining(rest, hoisted, X) == []

    inner = jax.jit(weight_norm, donate_argnums=1)
    rest, hoisted = hoist(lambda p, x: inner(p, x + 0), {"g": G, "v": V}, X)
    again = jax.make_jaxpr(rest)(hoisted, X).eqns[-1]
    assert again.params["donated_invars"] == (False, True)
    close(rest(hoisted, X), weight_norm({"g": G, "v": V}, X), 2e-6)


# What is hoisted, and under which name.


def test_the_cut_is_before_trailing_layouts_and_after_the_last_computation():
    def function(p, x):
        kernel = jnp.tanh(p["w"]).T.reshape(6, 2, 3)
        bias = jnp.broadcast_to(p["b"][None], x.shape) + x
        return jnp.einsum("bi,ihd->bhd", bias, kernel) + jnp.exp(p["b"])[None].reshape(1, 2, 3)

    rest, hoisted = hoist(function, {"w": W, "b": B, "unused": W}, X)
    assert {name: a.shape for name, a in hoisted.items()} == {"b": (6,), "w": (6, 6), "b#1": (6,)}
    close(hoisted["w"], jnp.tanh(W), 0)
    close(rest(hoisted, WIDE), function({"w": W, "b": B}, WIDE), 1e-6)


def test_layouts_of_one_parameter_and_constants_stay():
    def function(p, x):
        angles = jnp.cos(jnp.arange(6.0))[None]
        kernel = lax.stop_gradient(p["w"][jnp.array([1, 0, 2, 5, 4, 3])]).T[::-1][:, :6]
        return (x * angles) @ kernel

    rest, hoisted = hoist(function, {"w": W}, X)
    assert hoisted == {"w": W} or hoisted["w"] is W
    close(rest(hoisted, X), function({"w": W}, X), 0)


def test_a_value_computed_twice_is_one_entry_and_further_ones_are_numbered():
    def function(p, x):
        kernel = lambda: jnp.tanh(p["w"] + p["v"])  # noqa: E731
        return x @ kernel() + x @ kernel().T + x @ (p["w"] - p["v"]) + x @ (p["v"] @ p["w"])

    _, hoisted = hoist(function, {"w": W, "v": V}, X)
    assert list(hoisted) == ["v+w", "v+w#1", "v+w#2"]
    close(hoisted["v+w"], jnp.tanh(W + V), 0)
    close(hoisted["v+w#2"], V @ W, 0)


def test_layers_that_are_scanned_twice_are_one_entry():
    rest, hoisted = hoist(lambda p, x: scanned(p, scanned(p, x)[0])[0], STACK, X)
    assert {name: a.shape for name, a in hoisted.items()} == {"g+v": (3, 6, 6)}
    close(rest(hoisted, X), scanned(STACK, scanned(STACK, X)[0])[0], 2e-6)


def test_a_parameter_list_a_bare_array_and_python_values():
    rest, hoisted = hoist(lambda p, x: x @ (p[0] * p[1]) if p[2] else x, [W, 2.0, True], X)
    assert list(hoisted) == ["0"] and type(rest).__name__ == "function"
    close(rest(hoisted, X), X @ (2 * W), 0)
    rest, hoisted = hoist(lambda w, x, train: x @ jnp.tanh(w) if train else x, W, X, True)
    close(rest(hoisted, X, True), X @ jnp.tanh(W), 0)
    close(rest({}, X, False), X, 0)


def test_nothing_to_hoist():
    rest, hoisted = hoist(lambda p, x: x @ p["a"]["w"], {"a": {"w": W}, "b": B}, X)
    assert list(hoisted) == ["a/w"] and hoisted["a/w"] is W
    close(rest(hoisted, X), X @ W, 0)


def test_effects_stay_where_they_are(capfd):
    def function(p, x):
        kernel = p["w"] * 2
        jax.debug.print("kernel {}", kernel[0, 0])
        return x @ kernel

    rest, hoisted = hoist(function, {"w": jnp.ones((6, 6))}, X)
    jax.effects_barrier()
    assert "kernel" not in capfd.readouterr().out and list(hoisted) == ["w"]
    rest(hoisted, X)
    jax.effects_barrier()
    assert "kernel 2.0" in capfd.readouterr().out


def test_remat_keeps_its_policy_and_its_barrier():
    policy = jax.checkpoint_policies.dots_saveable
    block = jax.checkpoint(
        lambda p, x: jnp.sin(weight_norm(p, x)), policy=policy, prevent_cse=(False, True)
    )
    rest, hoisted = hoist(lambda p, x: block(p, x), {"g": G, "v": V}, X)
    (remat,) = jax.make_jaxpr(rest)(hoisted, X).eqns
    assert remat.params["policy"] is policy and remat.params["prevent_cse"] == (False, True)

    differentiated = lambda p, x: jax.grad(lambda x: jnp.sin(block(p, x)).sum())(x)  # noqa: E731
    rest, hoisted = hoist(differentiated, {"g": G, "v": V}, X)
    close(rest(hoisted, X), differentiated({"g": G, "v": V}, X), 2e-6)
    text = jax.jit(rest).lower(hoisted, X).as_text()
    plain = jax.jit(differentiated).lower({"g": G, "v": V}, X).as_text()
    assert text.count("optimization_barrier") == plain.count("optimization_barrier") == 1


# Inputs that change what the parameters alone determine.


def positions(p, x):
    table = p["table"][: x.shape[1]].astype(jnp.bfloat16).astype(jnp.float32)
    return x @ jnp.tanh(p["w"]) + table[None] / x.shape[0]


def test_sizes_that_vary_are_told_by_symbols():
    params, text = {"w": W, "table": normal(13, 9, 6)}, normal(14, 2, 5, 6)
    rest, hoisted = hoist(positions, params, text)
    assert hoisted["table"].shape == (1, 5, 6)
    with pytest.raises(ValueError, match=r"from `table` what it did not when hoisted.*\n.*symbols"):
        rest(hoisted, normal(15, 3, 7, 6))

    batch, length = jax.export.symbolic_shape("b, t", constraints=["t <= 9"])
    shape = jax.ShapeDtypeStruct((batch, length, 6), jnp.float32)
    rest, hoisted = hoist(positions, params, shape)
    assert {name: a.shape for name, a in hoisted.items()} == {"table": (9, 6), "w": (6, 6)}
    for x in (text, normal(15, 3, 9, 6)):
        close(rest(hoisted, x), positions(params, x), 1e-6)


def test_inputs_of_another_dtype():
    def function(p, x):
        return x @ p["w"].astype(x.dtype)

    rest, hoisted = hoist(function, {"w": W}, X)
    close(rest(hoisted, X.astype(jnp.bfloat16)), function({"w": W}, X.astype(jnp.bfloat16)), 0)
    rest, hoisted = hoist(function, {"w": W}, X.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="from `w` what it did not when hoisted"):
        rest(hoisted, X)


def test_errors():
    with pytest.raises(ValueError, match=r"`a/w` is a `Scaled` already.\nHoist first"):
        hoist(lambda p, x: x, {"a": {"w": scaled(W)}}, X)
    rest, hoisted = hoist(masked, {"w": W}, X)
    with pytest.raises(ValueError, match=r"`w` is a `Scaled`.\nCall `lift\(rest\)"):
        rest({"w": scaled(W)}, X)
    with pytest.raises(ValueError, match="an input has a `Scaled`"):
        rest(hoisted, scaled(W))
    with pytest.raises(ValueError, match="`w` is missing"):
        rest({"v": W}, X)
    with pytest.raises(ValueError, match=r"`w` is float32\[3, 6\]; expected float32\[6, 6\]"):
        rest({"w": W[:3]}, X)


# Frameworks.


class Block(nn.Module):
    """A normed layer and one in bfloat16, to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        h = nn.WeightNorm(nn.Dense(6))(x)
        return x + nn.Dense(6, dtype=jnp.bfloat16)(jnp.tanh(h)).astype(x.dtype), None


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return nn.WeightNorm(nn.Dense(4))(layers()(x, None)[0])


def test_linen():
    model = Linen()
    params = jax.jit(model.init)(jax.random.key(0), X)
    rest, hoisted = hoist(model.apply, params, X)
    kernels = {name: a.shape for name, a in hoisted.items() if a.ndim > 1 and "kernel" in name}
    assert sorted(kernels.values()) == [(3, 6, 6), (3, 6, 6), (6, 4)]
    assert remaining(rest, hoisted, X) == []
    close(jax.jit(rest)(hoisted, WIDE), jax.jit(model.apply)(params, WIDE), 2e-2)
    assert integer_products(jax.make_jaxpr(quantized(rest, hoisted))(hoisted, X)) == (3, 3)


def test_equinox():
    model = eqx.nn.MLP(6, 4, 8, 1, key=jax.random.key(0))
    masks = jax.tree.map(lambda a: jnp.abs(a) > 0.1, eqx.filter(model, eqx.is_array))

    def function(params, x):
        model, masks = params
        kept = jax.tree.map(
            lambda m, a: jnp.where(m, a, 0.0), masks, eqx.filter(model, eqx.is_array)
        )
        return jax.vmap(eqx.combine(kept, model))(x)

    rest, hoisted = hoist(function, (model, masks), X)
    assert len(hoisted) == 4
    close(jax.jit(rest)(hoisted, WIDE), function((model, masks), WIDE), 2e-6)
    assert integer_products(jax.make_jaxpr(quantized(rest, hoisted))(hoisted, X)) == (2, 2)


# Random programs.

SIZE = 3
OPERATIONS = {
    "matmul": lambda a, b: a @ b,
    "transpose": lambda a, b: a.T,
    "add": lambda a, b: a + b,
    "tanh": lambda a, b: jnp.tanh(a),
    "reshape": lambda a, b: a.reshape(1, SIZE * SIZE).reshape(SIZE, SIZE),
    "concatenate": lambda a, b: jnp.concatenate([a[:1], b[1:]]),
    "gather": lambda a, b: a[jnp.array([0, 2, 1])],
    "rows": lambda a, b: jnp.broadcast_to(a[0][None], (SIZE, SIZE)),
    "cast": lambda a, b: a.astype(jnp.float16).astype(jnp.float32),
    "constant": lambda a, b: a * jnp.cos(jnp.arange(3.0))[None],
    "softplus": lambda a, b: jax.nn.softplus(a),
    "jit": lambda a, b: jax.jit(lambda a, b: (jnp.sin(a), jnp.sin(a) @ b))(a, b)[1],
    "remat": lambda a, b: jax.checkpoint(lambda a, b: jnp.sin(a) @ jnp.cos(b))(a, b),
    "scan": lambda a, b: lax.scan(lambda h, r: (jnp.tanh(h @ jnp.sin(a)), r * 2), b, b)[1],
    "slices": lambda a, b: lax.scan(lambda h, r: (h + jnp.sin(r) * 2, jnp.sin(r)), b[0], a)[1],
    "carry": lambda a, b: lax.scan(lambda h, r: (h @ a, jnp.sin(r) @ h), b, a)[0],
    "cond": lambda a, b: lax.cond(b[0, 0] > 0, lambda: jnp.sin(a) @ b, lambda: jnp.cos(a)),
    "while": lambda a, b: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ jnp.sin(a)), b),
    "vmap": lambda a, b: jax.vmap(lambda row: row @ jnp.sin(a))(b),
}


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=6,
    )
)
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
def test_random_programs(steps):
    params = {"v": normal(20, SIZE, SIZE) / 2, "w": normal(21, SIZE, SIZE) / 2}

    def program(params, x):
        values = [*params.values(), x]
        for name, one, other in steps:
            a, b = values[one % len(values)], values[other % len(values)]
            values.append(OPERATIONS[name](a, b))
        return values[3:]

    x = normal(22, SIZE, SIZE)
    rest, hoisted = hoist(program, params, x)
    assert remaining(rest, hoisted, x) == []
    tolerance = 2e-3 if any(name == "cast" for name, *_ in steps) else 2e-5
    close(rest(hoisted, x), program(params, x), tolerance)


def _by_constant(p, x):
    return x @ (p * jnp.asarray(np.array([1.0, x.shape[0], 1.0, 1.0], np.float32))[:, None])


def _by_literal_in_a_body(p, x):
    def body(carry, _):
        return carry * (1.0 + x.shape[0]), None

    return x @ lax.scan(body, p, None, length=2)[0]


def _by_wiring_of_a_body(p, x):
    def body(carry, _):
        a, b = carry
        return ((a - b, b) if x.shape[0] == 3 else (b - a, b)), None

    return x @ lax.scan(body, (p, 2.0 * p), None, length=1)[0][0]


@pytest.mark.parametrize("function", [_by_constant, _by_literal_in_a_body, _by_wiring_of_a_body])
def test_inputs_that_change_what_parameters_become_are_refused(function):
    p, x = jnp.eye(4) + 1.0, jnp.ones((3, 4))
    rest, hoisted = hoist(function, p, x)
    np.testing.assert_allclose(rest(hoisted, 2 * x), function(p, 2 * x), rtol=1e-6)
    with pytest.raises(ValueError, match="what it did not when hoisted"):
        rest(hoisted, x[:2])
