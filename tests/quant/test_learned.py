"""Learned steps against the papers' formulas, PyTorch, and what `quantize` stores afterwards."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import prune, trees
from jopt.quant import (
    LSQ,
    PACT,
    Fixed,
    Int,
    LSQPlus,
    QArray,
    Range,
    Spec,
    Step,
    TrainedQuant,
    calibrate,
    fake_quant,
    init_steps,
    qat,
    quantize,
    steps,
    trainable,
)
from jopt.quant._training.steps import stepped
from jopt.trace import lift, sites

SIGNED = Int(3, symmetric=False)
GROUP = Int(4, granularity="group", group_size=4)
SPEC = Spec(Int(4), Int(6), weight_step=LSQ(), activation_step=LSQ())


def values(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# References, in float64, from the papers.


def lsq(x, s, cotangent, low, high):
    """Value, derivative by x, and by s unscaled, elementwise."""
    place = x / s
    inside = (place > low) & (place < high)
    q = np.clip(np.round(place), low, high)
    slope = np.where(place <= low, low, np.where(place >= high, high, np.round(place) - place))
    return q * s, cotangent * inside, cotangent * slope


def far_from_ties(x, s, edge=1e-3):
    """Where rounding is the same for any order of operations."""
    part = np.abs(x / s - np.floor(x / s) - 0.5)
    whole = np.abs(x / s - np.round(x / s))
    return (part > edge) & (whole > edge)


def spread(coarse, shape):
    for axis, size in enumerate(shape):
        if coarse.shape[axis] != 1:
            coarse = np.repeat(coarse, size // coarse.shape[axis], axis=axis)
    return np.broadcast_to(coarse, shape)


def folded(dense, coarse_shape):
    """Sums over what shares an entry."""
    out = np.zeros(coarse_shape)
    for index in np.ndindex(dense.shape):
        own = tuple(i * c // n for i, n, c in zip(index, dense.shape, coarse_shape, strict=True))
        out[own] += dense[index]
    return out


@pytest.mark.parametrize(
    "format, method, ends",
    [
        (Int(4), LSQ(), (-7, 7)),
        (Int(2), LSQ(), (-1, 1)),
        (SIGNED, LSQ(), (-4, 3)),
        (Int(3, symmetric=False), LSQ(signed=False), (0, 7)),
        (Int(4, granularity="tensor"), LSQ(), (-7, 7)),
        (GROUP, LSQ(gradient_scale=1.0), (-7, 7)),
    ],
    ids=str,
)
def test_lsq_is_the_papers(format, method, ends):
    w = np.asarray(values((8, 6)))
    leaf = qat({"w": jnp.asarray(w)}, Spec(format, weight_step=method))["w"]
    shape = {"channel": (1, 6), "tensor": (1, 1), "group": (2, 6)}[format.granularity]
    share = w.size // math.prod(shape)
    wide = np.asarray(w, np.float64)
    first = 2 * folded(np.abs(wide), shape) / share / math.sqrt(ends[1])
    np.testing.assert_allclose(leaf.step.size, first, rtol=1e-5)

    leaf, wide = leaf.with_weight(jnp.asarray(3 * w)), 3 * wide  # so that some are clipped
    s = spread(np.asarray(leaf.step.size, np.float64), w.shape)
    cotangent = np.asarray(values((8, 6), 1), np.float64)
    value, dx, ds = lsq(wide, s, cotangent, *ends)
    sure = far_from_ties(wide, s)
    assert sure.sum() > 40 and (dx == 0).sum() > 0
    scale = 1.0 if method.gradient_scale else 1 / math.sqrt(share * ends[1])

    def loss(leaf):
        return jnp.sum(leaf.materialise() * jnp.asarray(cotangent * sure, jnp.float32))

    np.testing.assert_allclose(np.asarray(leaf.materialise())[sure], value[sure], rtol=2e-5)
    grad = jax.jit(jax.grad(loss))(leaf)
    np.testing.assert_allclose(grad.weight, dx * sure, rtol=1e-6)
    np.testing.assert_allclose(
        grad.step.size, scale * folded(ds * sure, shape), rtol=1e-3, atol=1e-5
    )


def test_lsq_agrees_with_pytorch():
    torch = pytest.importorskip("torch")
    x = np.asarray(values((64, 8))) * 2
    s, low, high = 0.25, -8, 7
    tensor = torch.tensor(x, requires_grad=True)
    size = torch.tensor([s], requires_grad=True)
    zero = torch.tensor([0.0], requires_grad=True)
    theirs = torch._fake_quantize_learnable_per_tensor_affine(tensor, size, zero, low, high, 0.5)
    cotangent = np.asarray(values((64, 8), 1))
    # Beyond the last code but within half a step of it they take the value for unclipped.
    sure = (
        far_from_ties(x, s)
        & ((x / s > high + 0.5) | (x / s < high))
        & ((x / s < low - 0.5) | (x / s > low))
    )
    cotangent = np.where(sure, cotangent, 0).astype(np.float32)
    theirs.backward(torch.tensor(cotangent))

    def ours(x, s):
        step = Step(s.reshape(1, 1), None)
        y = stepped(x, Int(4, symmetric=False), LSQ(gradient_scale=0.5), step, 1)
        return jnp.sum(y * cotangent), y

    (dx, ds), y = jax.grad(ours, (0, 1), has_aux=True)(jnp.asarray(x), jnp.float32(s))
    np.testing.assert_allclose(np.asarray(y)[sure], theirs.detach().numpy()[sure], rtol=1e-6)
    np.testing.assert_allclose(dx, tensor.grad.numpy())
    np.testing.assert_allclose(ds, size.grad.numpy()[0], rtol=1e-4)


def test_lsq_plus_is_the_papers():
    """On offsets of whole steps, which is where ours lie."""
    x, cotangent = np.asarray(values((9, 7), 2), np.float64), np.asarray(values((9, 7), 3))
    s, b, top, count = 0.25, -0.75, 7, 7
    place = (x - b) / s
    y = np.clip(np.round(place), 0, top) * s + b
    inside = (place > 0) & (place < top)
    slope = np.where(place <= 0, 0, np.where(place >= top, top, np.round(place) - place))
    sure, scale = far_from_ties(x, s), 1 / math.sqrt(count * top)
    cotangent = np.where(sure, cotangent, 0)

    def ours(x, s, b):
        step = Step(s.reshape(1, 1), b.reshape(1, 1))
        y = stepped(x, Int(3, symmetric=False), LSQPlus(), step, count)
        return jnp.sum(y * cotangent.astype(np.float32)), y

    arguments = jnp.asarray(x, jnp.float32), jnp.float32(s), jnp.float32(b)
    (dx, ds, db), found = jax.grad(ours, (0, 1, 2), has_aux=True)(*arguments)
    np.testing.assert_allclose(np.asarray(found)[sure], y[sure], atol=1e-6)
    np.testing.assert_allclose(dx, cotangent * inside, rtol=1e-6)
    np.testing.assert_allclose(ds, scale * np.sum(cotangent * slope), rtol=1e-4)
    np.testing.assert_allclose(db, scale * np.sum(cotangent * ~inside), rtol=1e-4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_pact_is_the_papers(symmetric):
    torch = pytest.importorskip("torch")
    x, cotangent, a = np.asarray(values((16, 8), 4)), np.asarray(values((16, 8), 5)), 0.8
    tensor = torch.tensor(x, requires_grad=True)
    clip = torch.tensor(a, requires_grad=True)
    if symmetric:
        cut = torch.maximum(torch.minimum(tensor, clip), -clip)
    else:
        cut = 0.5 * (tensor.abs() - (tensor - clip).abs() + clip)  # the paper's equation 1
    cut.backward(torch.tensor(cotangent))
    format = Int(4, symmetric=symmetric)
    count = 7 if symmetric else 15

    def ours(x, a):
        y = stepped(x, format, PACT(), Step(a.reshape(1, 1), None), 1)
        return jnp.sum(y * cotangent), y

    (dx, da), y = jax.grad(ours, (0, 1), has_aux=True)(jnp.asarray(x), jnp.float32(a))
    wanted = np.round(cut.detach().numpy().astype(np.float64) * count / a) * a / count
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    np.testing.assert_allclose(dx, tensor.grad.numpy(), rtol=1e-5)
    np.testing.assert_allclose(da, clip.grad.numpy(), rtol=1e-4)


def test_given_ranges_clip_the_gradient():
    x = jnp.array([[-3.0, -0.9, 0.2, 1.4, jnp.nan]])

    def f(x):
        return fake_quant(x, Int(8), range=(jnp.float32(-1), jnp.float32(1)))

    y, back = jax.vjp(f, x)
    np.testing.assert_allclose(y, [[-1, -0.9, 0.2, 1, np.nan]], atol=0.005)
    np.testing.assert_array_equal(back(jnp.ones_like(x))[0][0, :4], [0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"an end of the range has shape \(3,\)"):
        fake_quant(x, Int(8), range=(jnp.ones(3), jnp.ones(3)))
    leaf = qat({"w": values((8, 6))}, Spec(Int(4), weight_step=Fixed(0.5)))["w"]
    grad = jax.grad(lambda leaf: jnp.sum(leaf.materialise()))(leaf)
    largest = np.abs(np.asarray(leaf.weight)).max(0, keepdims=True)
    beyond = np.abs(np.asarray(leaf.weight)) > 0.5 * largest * (1 + 0.5 / 7)
    np.testing.assert_array_equal(np.asarray(grad.weight) == 0, beyond)
    assert not np.any(np.asarray(grad.step.size))
    same = qat({"w": leaf.weight}, Spec(Int(4), weight_step=Fixed()))["w"]
    np.testing.assert_array_equal(same.materialise(), fake_quant(leaf.weight, Int(4)))


# What is stored is what training saw.


def network(p, x):
    x = jax.nn.silu(x @ p["a"])
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])
    return x @ p["b"].T


def network_params(dtype=jnp.float32):
    return {
        "a": values((8, 12), 1, dtype),
        "stack": values((3, 12, 12), 2, dtype) * jnp.asarray(0.3, dtype),
        "b": values((5, 12), 3, dtype),
    }


ALL = [
    SPEC,
    Spec(SIGNED, Int(4, symmetric=False), weight_step=LSQ(), activation_step=LSQPlus()),
    Spec(GROUP, Int(4), weight_step=LSQ(), activation_step=PACT()),
    Spec(Int(5), Int(8), weight_step=PACT(), activation_step=PACT(2.0)),
    Spec(SIGNED, Int(8), weight_step=LSQPlus()),
    Spec(Int(4), Int(8, symmetric=False), static=True, weight_step=LSQ()),
    Spec(Int(8), Int(8), weight_step=Fixed(0.9)),
    Spec(Int(2, symmetric=False), weight_step=LSQ()),
]


def trained(spec, dtype=jnp.float32, seed=0):
    """Parameters in training whose steps and weights have moved."""
    params, x = network_params(dtype), values((6, 8), 9, dtype)
    params = qat(params, spec, sites=sites(network, params, x))
    if spec.activation_step is not None:
        params = init_steps(network, params, [x])
    if spec.static:
        params, _ = calibrate(network, params, [x])
    keys = iter(jax.random.split(jax.random.key(seed), 50))
    move = lambda a: a * (1 + 0.1 * jax.random.normal(next(keys), a.shape, a.dtype))  # noqa: E731
    return jax.tree.map(move, params), x


@pytest.mark.parametrize(
    "number, dtype", [*((i, jnp.float32) for i in range(len(ALL))), (0, jnp.bfloat16)]
)
def test_what_training_saw_is_stored(number, dtype):
    spec = ALL[number]
    params, x = trained(spec, dtype)
    stored = quantize(params)
    for name, leaf in stored.items():
        assert isinstance(leaf, QArray)
        assert leaf.static == (params[name].activation_range() is not None)
        seen = jax.jit(lambda leaf: leaf.materialise())(params[name])
        np.testing.assert_array_equal(
            np.asarray(leaf.materialise(), np.float32), np.asarray(seen, np.float32)
        )
    again = jax.jit(quantize)(params)
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    if number > 1:
        return
    one, other = jax.jit(lambda *ps: [lift(network)(p, x) for p in ps])(params, stored)
    spread = np.abs(np.asarray(one, np.float32)).max()
    tight = 2e-6 if dtype == jnp.float32 else 0.05
    assert np.abs(np.asarray(one - other, np.float32)).max() <= tight * spread


def test_dense_products_of_what_is_stored_are_bit_equal():
    """Groups and weights alone are float products in training and afterwards.

    Operation by operation: a compiler may sum the products of two programs in two orders, as XLA
    for CPU does since JAX 0.11, and then equal operands give results equal to rounding.
    """
    for spec in (ALL[2], ALL[7]):
        params, x = trained(spec)
        stored = quantize(params)
        with jax.disable_jit():
            one, other = (lift(network)(p, x) for p in (params, stored))
        np.testing.assert_array_equal(one, other)
        one, other = (jax.jit(lift(network))(p, x) for p in (params, stored))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(one).max())


# Around it.


def test_steps_begin_from_batches_layer_by_layer():
    params, x = network_params(), values((6, 8), 9)
    inputs, y = [], jax.nn.silu(x @ params["a"])
    for w in params["stack"]:
        inputs.append(np.asarray(y, np.float64))
        y = jnp.tanh(y @ w)
    for method, format in (
        (LSQ(), Int(6)),
        (LSQPlus(), SIGNED),
        (PACT(), SIGNED),
        (PACT(3.0), SIGNED),
    ):
        spec = Spec(Int(8), format, activation_step=method)
        begun = init_steps(network, qat(params, spec), [(x[:3],), (x[3:],)])
        step = begun["stack"].activation_step
        assert step.size.shape == (3, 1, 1) and begun["a"].activation_step.size.shape == (1, 1)
        wanted = {
            LSQ(): [2 * np.abs(v).mean() / math.sqrt(31) for v in inputs],
            LSQPlus(): [(v.max() - min(v.min(), 0)) / 7 for v in inputs],
            PACT(): [v.max() for v in inputs],
            PACT(3.0): [3.0] * 3,
        }[method]
        # Weights are rounded while activations are measured, so these are about right.
        np.testing.assert_allclose(step.size[:, 0, 0], wanted, rtol=0.05)
        if method == LSQPlus():
            lows = [min(v.min(), 0) for v in inputs]
            np.testing.assert_allclose(step.offset[:, 0, 0], lows, rtol=0.05)


def test_masks_decay_and_labels():
    params, _ = trained(SPEC)
    marks = trainable(params)["a"]
    assert marks.weight is True and marks.step.size is True and marks.activation_step.size is True
    fixed = qat({"w": values((4, 4))}, Spec(Int(4), Int(4), static=True, weight_step=Fixed()))
    fixed = {"w": dataclasses.replace(fixed["w"], range=Range(jnp.ones((1, 1)), jnp.ones((1, 1))))}
    assert jax.tree.leaves(trainable(fixed)) == [True, False, False, False, False]
    masks = prune.masks(params, 0.5)
    assert 0 < int(masks["a"].sum()) < masks["a"].size

    label = jax.tree.map(lambda s: "step" if s else "weight", steps(params))
    tx = optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), steps(params)),
        optax.multi_transform({"step": optax.sgd(1.0), "weight": optax.set_to_zero()}, label),
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["a"].weight, params["a"].weight)
    np.testing.assert_allclose(moved["a"].step.size, 0.9 * params["a"].step.size, rtol=1e-6)


@pytest.mark.parametrize("spec", [ALL[0], ALL[1], ALL[3]], ids=["lsq", "lsq+", "pact"])
def test_training_lowers_the_loss(spec):
    params, x = network_params(), values((64, 8), 9)
    wanted = network(params, x)
    params = qat(jax.tree.map(lambda w: 0.7 * w, params), spec)
    params = init_steps(network, params, [x])
    tx = optax.chain(optax.masked(optax.adam(3e-3), trainable(params)))

    def loss(params):
        return jnp.mean((lift(network)(params, x) - wanted) ** 2)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, seen = params, tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            params, state, value = step(params, state)
            seen.append(float(value))
    assert step._cache_size() == 1 and seen[-1] < 0.5 * seen[0]
    for name in params:
        one, other = before[name], params[name]
        assert np.any(np.asarray(one.step.size) != np.asarray(other.step.size))
    moved = [np.any(before[n].activation_step.size != params[n].activation_step.size) for n in "ab"]
    assert any(moved)


def test_transformations_agree():
    params, x = trained(SPEC)
    plain = jax.jit(lift(network))
    each = jax.jit(jax.vmap(lift(network), in_axes=(None, 0)))(params, x)
    np.testing.assert_allclose(each, plain(params, x), rtol=1e-5, atol=1e-5)
    two = jax.tree.map(lambda a: jnp.stack([a, a * 1.01]), params)
    both = jax.jit(jax.vmap(lift(network), in_axes=(0, None)))(two, x)
    np.testing.assert_allclose(both[0], plain(params, x), rtol=1e-4, atol=1e-4)
    assert np.any(np.asarray(both[0]) != np.asarray(both[1]))

    def loss(params, x):
        return jnp.sum(lift(network)(params, x) ** 2)

    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    flat, tree = jax.tree.flatten(abstract)
    exported = jax.export.export(
        jax.jit(lambda *flat: jax.tree.leaves(jax.grad(loss)(*tree.unflatten(flat)))),
        platforms=("cpu", "cuda", "tpu"),
    )(*flat)
    assert len(exported.platforms) == 3


def test_eight_devices_agree_with_one():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params, x = trained(SPEC)
    x = jnp.concatenate([x, x[:2]])

    def put(a, *spec):
        spec = jax.sharding.PartitionSpec(*spec)
        return jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

    def loss(params, x):
        return jnp.sum(lift(network)(params, x) ** 2)

    one = jax.jit(jax.grad(loss))(params, x)
    spread = {
        name: jax.tree.map(
            lambda a: put(a, *((None,) * (a.ndim - 1)), "model" if a.shape[-1] % 2 == 0 else None),
            leaf,
        )
        for name, leaf in params.items()
    }
    many = jax.jit(jax.grad(loss))(spread, put(x, "data"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(a).max()))


def linen_case():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, lambda x: x.reshape(2, -1), nn.Dense(3)])
    x = values((2, 4, 4, 2))
    return model.apply, model.init(jax.random.key(0), x), x, "**/kernel"


def nnx_case():
    nnx = pytest.importorskip("flax.nnx")
    graph, params = nnx.split(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), nnx.to_pure_dict(params), values((2, 8)), "kernel"


def equinox_case():
    eqx = pytest.importorskip("equinox")
    params, rest = eqx.partition(eqx.nn.MLP(8, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, rest))(x), params, values((2, 8)), "**/weight"


@pytest.mark.parametrize("case", [linen_case, nnx_case, equinox_case])
def test_frameworks(case):
    with jax.numpy_rank_promotion("allow"):
        apply, params, x, where = case()
        if case is nnx_case:
            apply_pure = apply
            from flax import nnx

            state = nnx.State(params)
            apply = lambda p, x: apply_pure(nnx.State(p), x)  # noqa: E731
            del state
        spec = Spec(Int(8), Int(8), weight_step=LSQ(), activation_step=LSQ())
        learned = qat(params, [(where, spec)], sites=sites(apply, params, x))
        learned = init_steps(apply, learned, [x])
        grads = jax.jit(jax.grad(lambda p: jnp.sum(lift(apply)(p, x) ** 2)))(learned)
        found = [leaf for _, leaf in trees.items(grads) if isinstance(leaf, TrainedQuant)]
        assert found
        for leaf in found:
            assert np.any(leaf.weight) and np.any(leaf.step.size)
            assert np.any(leaf.activation_step.size)
        one, other = jax.jit(lift(apply))(learned, x), jax.jit(lift(apply))(quantize(learned), x)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_zero_constant_and_broken_weights():
    spec = Spec(Int(4), weight_step=LSQ())
    leaf = qat({"w": jnp.zeros((4, 2))}, spec)["w"]
    np.testing.assert_array_equal(leaf.step.size, [[1, 1]])
    np.testing.assert_array_equal(leaf.materialise(), 0)
    broken = qat({"w": jnp.ones((4, 2)).at[1, 0].set(jnp.inf)}, spec)["w"].materialise()
    assert np.all(np.isnan(broken[:, 0])) and np.all(np.isfinite(broken[:, 1]))
    empty = qat({"w": jnp.zeros((4, 0))}, spec)["w"]
    assert empty.materialise().shape == (4, 0)
    turned = dataclasses.replace(
        leaf, weight=jnp.ones((4, 2)), step=Step(jnp.full((1, 2), -0.5), None)
    )
    np.testing.assert_array_equal(turned.materialise(), 1)  # the sign of a step is ignored


def refused(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_what_is_refused():
    refused(r"a symmetric format has negative codes", lambda: Spec(Int(4), weight_step=LSQ(False)))
    refused(r"has no offset", lambda: Spec(Int(4), weight_step=LSQPlus()))
    refused(r"keeps no negative weights", lambda: Spec(SIGNED, weight_step=PACT()))
    refused(r"static=True", lambda: Spec(Int(4), Int(4), activation_step=Fixed()))
    refused(r"learned of `Int` formats", lambda: Spec(Int(4), activation_step=LSQ()))
    refused(
        r"measured or learned, not both",
        lambda: Spec(Int(4), Int(4), static=True, activation_step=LSQ()),
    )
    refused(r"the clip must be positive", lambda: PACT(0.0))
    refused(r"above 0 and at most 1", lambda: Fixed(1.5))
    params, x = network_params(), values((6, 8), 9)
    refused(r"part of which is for training", lambda: quantize(params, SPEC))
    learned = qat(params, SPEC)
    refused(
        r"`a` has a learned activation step that was never begun", lambda: lift(network)(learned, x)
    )
    refused(r"never begun", lambda: quantize(learned))
    refused(r"got no batch", lambda: init_steps(network, learned, []))
    refused(r"and there are none", lambda: init_steps(network, qat(params, Int(4)), [x]))
    refused(r"has a NaN", lambda: init_steps(network, learned, [x * jnp.nan]))
    begun = init_steps(network, learned, [x])
    refused(
        r"`b` is joined|`a` is joined",
        lambda: lift(lambda p, x: x @ jnp.concatenate([p["b"].T, p["b"].T], 1))(
            begun, values((2, 12))
        ),
    )
