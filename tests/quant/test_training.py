"""Products in few bits forward and backward: their numbers, their mean, their count, their keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import quant, trees
from jopt.quant import (
    FP8,
    LSQ,
    Int,
    Spec,
    TrainedQuant,
    deterministic,
    init_steps,
    qat,
    quantize,
    with_key,
)
from jopt.trace import explain, lift, sites

KEY = jax.random.key(5)
BACK = Int(8, rounding="stochastic")
SPEC = Spec(Int(8), Int(8), backward=BACK)
FLOAT = Spec(FP8(), FP8(), backward=FP8("e5m2", rounding="stochastic"))
TOKENS = Spec(Int(8), Int(8, granularity="token"), backward=BACK)
NEAREST = Spec(Int(8), Int(8), backward=Int(8))


def values(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def code_dots(jaxpr):
    """The products of codes in a jaxpr, at any depth: of int8 in int32, of float8 in float32."""
    found = 0
    for equation in jaxpr.eqns:
        if equation.primitive is jax.lax.dot_general_p:
            operands = {str(v.aval.dtype)[:6] for v in equation.invars}
            out = equation.outvars[0].aval.dtype
            found += (operands, out) in (({"int8"}, jnp.int32), ({"float8"}, jnp.float32))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += code_dots(inner) if hasattr(inner, "eqns") else 0
    return found


def codes(x, axes):
    """Symmetric int8 codes and scales over `axes`, to nearest, in float64."""
    scale = np.abs(x).max(axis=axes, keepdims=True) / 127
    return np.round(x / scale), scale


CASES = {
    "x @ w": ("bi,io->bo", (6, 8), (8, 5)),
    "x @ w.T": ("bi,oi->bo", (6, 8), (5, 8)),
    "w first": ("oi,ib->ob", (8, 6), (5, 8)),
    "heads": ("bti,ihk->bthk", (2, 3, 8), (8, 2, 4)),
    "heads out": ("bthk,hko->bto", (2, 3, 2, 4), (2, 4, 6)),
    "turned": ("bthk,kho->bto", (2, 3, 2, 4), (4, 2, 6)),
    "batch": ("ebi,eio->ebo", (3, 6, 8), (3, 8, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_products_of_codes(name):
    """Against the same in float64: every product of rounded operands, nothing else rounded."""
    spelled, x_shape, w_shape = CASES[name]
    left, right, out = spelled.replace("->", ",").split(",")
    w_letters, x_letters = (left, right) if name == "w first" else (right, left)
    x, w = values(x_shape, 1), values(w_shape, 2)

    def apply(p, x):
        return jnp.einsum(spelled, *((p["w"], x) if name == "w first" else (x, p["w"])))

    cotangent = values(jax.eval_shape(apply, {"w": w}, x).shape, 3)
    params = qat({"w": w}, NEAREST, sites=sites(apply, {"w": w}, x))
    y, back = jax.vjp(jax.jit(lift(apply)), params, x)
    dw, dx = back(cotangent)

    summed = set(x_letters) & set(w_letters) - set(out)
    wide_x, wide_w, dy = (np.asarray(a, np.float64) for a in (x, w, cotangent))
    qx, sx = codes(wide_x, None)
    qw, sw = codes(wide_w, tuple(w_letters.index(c) for c in w_letters if c in summed))
    order = f"{x_letters},{w_letters}->{out}"
    np.testing.assert_allclose(y, np.einsum(order, qx * sx, qw * sw), rtol=1e-4, atol=1e-4)
    # The scales of the weight go into dy before it is rounded, row by row.
    own = np.broadcast_to(sw, w_shape)
    own = own.max(axis=tuple(w_letters.index(c) for c in summed))
    kept = "".join(c for c in w_letters if c not in summed)
    scaled = np.einsum(f"{out},{kept}->{out}", dy, own)
    q1, s1 = codes(scaled, tuple(out.index(c) for c in kept if c not in x_letters))
    wanted = np.einsum(f"{out},{w_letters}->{x_letters}", q1 * s1, qw)
    np.testing.assert_allclose(dx, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    rows = tuple(out.index(c) for c in x_letters if c in out and c not in w_letters)
    q2, s2 = codes(dy, rows)
    wanted = np.einsum(f"{x_letters},{out}->{w_letters}", qx * sx, q2 * s2)
    np.testing.assert_allclose(dw["w"].weight, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())

    def loss(params, x):
        return jnp.sum(lift(apply)(params, x))

    assert code_dots(jax.make_jaxpr(lift(apply))(params, x).jaxpr) == 1
    assert code_dots(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x).jaxpr) == 3
    assert [met.how for met in explain(lambda p, x: apply(p, x), params, x)][-1] == (
        "products of codes, forward and backward"
    )


@pytest.mark.parametrize("spec", [SPEC, FLOAT, TOKENS], ids=["int8", "fp8", "tokens"])
def test_stochastic_gradients_have_the_mean_of_float_products(spec):
    x, w, cotangent = values((4, 6), 1), values((6, 3), 2), values((4, 3), 3)
    params = qat({"w": w}, spec)

    def both(key):
        f = lambda p, x: lift(lambda p, x: x @ p["w"])(with_key(p, key), x)  # noqa: E731
        grads, dx = jax.vjp(f, params, x)[1](cotangent)
        return grads["w"].weight, dx

    count = 4000
    dw, dx = jax.jit(jax.vmap(both))(jax.random.split(KEY, count))
    seen = params["w"].materialise()
    shared = (-1,) if spec is TOKENS else (-2, -1)
    rounded = quant.fake_quant(x, spec.activation, axes=shared)
    assert code_dots(jax.make_jaxpr(both)(KEY).jaxpr) == 3
    for found, wanted in ((dw, rounded.T @ cotangent), (dx, cotangent @ seen.T)):
        found = np.asarray(found, np.float64)
        mean, deviation = found.mean(0), found.std(0)
        assert np.all(deviation > 0)
        assert np.all(np.abs(mean - wanted) < 5 * deviation / np.sqrt(count) + 1e-5)


def network(p, x):
    x = jax.nn.relu(x @ p["a"] + p["bias"][None])
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])
    return x @ p["b"]


def network_params(dtype=jnp.float32):
    small = jnp.asarray(0.3, dtype)
    return {
        "a": values((8, 12), 1, dtype) * small,
        "bias": jnp.zeros(12, dtype),
        "stack": values((2, 12, 12), 2, dtype) * small,
        "b": values((12, 4), 3, dtype) * small,
    }


SPECS = {
    "int8": SPEC,
    "int4 weights, tensor": Spec(
        Int(4), Int(8), backward=Int(8, rounding="stochastic", granularity="tensor")
    ),
    "learned": Spec(Int(4), Int(8), weight_step=LSQ(), activation_step=LSQ(), backward=BACK),
    "fp8": FLOAT,
    "tokens": TOKENS,
    "affine": Spec(Int(8), Int(8, symmetric=False), backward=BACK),
    "groups": Spec(Int(4, granularity="group", group_size=4), Int(8), backward=BACK),
}


@pytest.mark.parametrize("name", SPECS)
def test_training_lowers_the_loss(name):
    x = values((64, 8), 9)
    wanted = network(network_params(), x)
    params = jax.tree.map(lambda w: 0.5 * w, network_params())
    params = qat(params, SPECS[name], sites=sites(network, params, x))
    if name == "learned":
        params = init_steps(network, params, [x])
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            return jnp.mean((lift(network)(with_key(params, key), x) - wanted) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for key in jax.random.split(KEY, 40):
            params, state, value = step(params, state, key)
            losses.append(float(value))
    assert step._cache_size() == 1 and losses[-1] < 0.4 * losses[0]
    how = {met.path: met.how for met in explain(network, with_key(params, KEY), x)}
    on_codes = name not in ("affine", "groups")
    assert ("products of codes, forward and backward" in how["stack"]) == on_codes
    calm = deterministic(params)
    both = jax.jit(lambda *ps: [lift(network)(p, x) for p in ps])(calm, quantize(params))
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)


def test_layers_have_keys_of_their_own():
    params = qat({"stack": jnp.ones((2, 8, 8))}, SPEC)
    keys = with_key(params, KEY)["stack"].key
    assert keys.shape == (2, 1, 1)
    data = np.asarray(jax.random.key_data(keys)).reshape(2, -1)
    assert np.any(data[0] != data[1])


def test_dtypes_and_transformations():
    x, params = values((6, 8), 9), qat({"a": values((8, 4), 1)}, SPEC)

    def layer(p, x):
        return jnp.tanh(x @ p["a"])

    def loss(params, x, key):
        return jnp.sum(lift(layer)(with_key(params, key), x) ** 2)

    gradient = jax.jit(jax.grad(loss))
    whole = np.asarray(gradient(params, x, KEY)["a"].weight)
    keys = jnp.stack([KEY, jax.random.key(6)])
    two = jax.jit(jax.vmap(jax.grad(loss), (None, None, 0)))(params, x, keys)["a"].weight
    np.testing.assert_allclose(two[0], whole, rtol=1e-5, atol=1e-5)
    assert np.any(np.asarray(two[1]) != whole)
    half = qat({"a": values((8, 4), 1, jnp.bfloat16)}, SPEC)
    found = gradient(half, x.astype(jnp.bfloat16), KEY)["a"].weight
    assert found.dtype == jnp.bfloat16
    assert np.corrcoef(np.asarray(found, np.float32).ravel(), whole.ravel())[0, 1] > 0.99
    saved = lift(jax.checkpoint(layer))
    remat = jax.jit(jax.grad(lambda p: jnp.sum(saved(with_key(p, KEY), x) ** 2)))(params)
    np.testing.assert_allclose(remat["a"].weight, whole, rtol=1e-4, atol=1e-4)


def test_it_lowers_for_all_platforms_and_runs_on_eight_devices():
    x = values((8, 8), 9)
    params = qat(network_params(), SPEC)

    def grads(weights, x, seed):
        now = {
            n: p.with_weight(weights[n]) if n != "bias" else weights[n] for n, p in params.items()
        }
        now = with_key(now, jax.random.key(seed))
        return jnp.sum(lift(network)(now, x) ** 2)

    weights = {n: trees.weight_of(p) for n, p in params.items()}
    f = jax.jit(jax.grad(grads))
    abstract = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, x, jnp.int32(0))
    )
    assert len(jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(*abstract).platforms) == 3

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one, many = f(weights, x, 0), f(weights, jax.device_put(x, place), 0)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * float(jnp.abs(a).max()))


def test_convolutions_and_frameworks():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(2, -1), nn.Dense(3)])
    x = values((2, 4, 4, 2))
    params = model.init(jax.random.key(0), x)
    with jax.numpy_rank_promotion("allow"):
        trained = qat(params, [("**/kernel", SPEC)], sites=sites(model.apply, params, x))

        def loss(p, apply):
            return jnp.sum(apply(p, x) ** 2)

        given = with_key(trained, KEY)
        found = jax.jit(jax.grad(lambda p: loss(with_key(p, KEY), lift(model.apply))))(trained)
        wanted = jax.grad(loss)(params, model.apply)
    for (_, a), (_, b) in zip(trees.items(found), trees.items(wanted), strict=True):
        a = a.weight if isinstance(a, TrainedQuant) else a
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)
    how = [met.how for met in explain(model.apply, given, x)]
    assert any("a convolution" in h for h in how) and any("products of codes" in h for h in how)


def test_embeddings_and_views_of_leaves_with_keys():
    params = with_key(qat({"w": values((6, 2, 4))}, SPEC), KEY)

    def f(p, x):
        table = p["w"].reshape(12, 4)
        return table[jnp.array([1, 2])], x @ p["w"].reshape(6, 8), p["w"][1].T @ x[0, :2]

    rows, wide, part = jax.jit(lift(f))(params, values((3, 6), 1))
    w = np.asarray(params["w"].materialise())
    np.testing.assert_allclose(rows, w.reshape(12, 4)[[1, 2]])
    assert np.abs(wide - np.asarray(values((3, 6), 1)) @ w.reshape(6, 8)).max() < 0.1
    assert part.shape == (4,)


def test_not_finite_gradients_show():
    params = qat({"w": values((6, 3))}, SPEC)
    f = lambda p: lift(lambda p: values((4, 6), 1) @ p["w"])(with_key(p, KEY))  # noqa: E731
    back = jax.vjp(f, params)[1](jnp.ones((4, 3)).at[1, 1].set(jnp.inf))[0]["w"].weight
    assert np.all(np.isnan(back[:, 1])) and np.all(np.isfinite(back[:, 0]))


def test_what_is_refused():
    params, x = qat(network_params(), SPEC), values((6, 8))
    with pytest.raises(ValueError, match=r"`a` has `Spec\(..., backward=.*and no key"):
        lift(network)(params, x)
    with pytest.raises(ValueError, match=r"needs a format, and an activation format"):
        Spec(Int(8), backward=BACK)
    with pytest.raises(ValueError, match=r"a gradient has a scale for each row"):
        Spec(Int(8), Int(8), backward=Int(8, granularity="group", group_size=4))
    joined = lift(lambda p, x: x @ jnp.concatenate([p["a"], p["a"]], 1))
    with pytest.raises(ValueError, match=r"is joined with another weight"):
        joined(with_key(params, KEY), x)
