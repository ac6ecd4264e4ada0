"""Adapters on arrays and on codes, against the merged weight in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jopt import trees
from jopt.quant import (
    NF4,
    Int,
    LoRA,
    QArray,
    Spec,
    adapters,
    combine,
    lora,
    merge,
    partition,
    quantize,
    trainable,
)
from jopt.trace import explain, lift, sites

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (5, 8))
BASES = {
    "array": lambda w: w,
    "w8": lambda w: quantize(w, Int(8)),
    "w4 groups": lambda w: quantize(w, Int(4, granularity="group", group_size=4)),
    "affine": lambda w: quantize(w, Int(8, symmetric=False)),
    "nf4": lambda w: quantize(w, NF4(group_size=4)),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def filled(params):
    """The same with adapters that are not zero."""

    def fill(path, leaf):
        if not isinstance(leaf, LoRA):
            return leaf
        return LoRA(leaf.base, leaf.down, normal(len(path), *leaf.up.shape) * 0.3, leaf.scaling)

    return trees.map_with_path(fill, params)


def merged(params):
    """Every leaf as a float64 array, W + s Σ_r A B by einsum."""

    def dense(path, leaf):
        if not isinstance(leaf, LoRA):
            return np.asarray(leaf, np.float64)
        base = leaf.base.materialise() if isinstance(leaf.base, QArray) else leaf.base
        down, up = (np.asarray(factor, np.float64) for factor in (leaf.down, leaf.up))
        return np.asarray(base, np.float64) + leaf.scaling * np.einsum("...r,...r->...", down, up)

    return trees.map_with_path(dense, params)


def assert_close(got, expected, tolerance=3e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance, rtol=1e-4
        ),
        got,
        expected,
    )


def forms():
    """A function of a weight and an input, the weight's shape, summed axes, the input's shape."""
    conv = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    first = lax.ConvDimensionNumbers((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3))

    def convolve(numbers, **options):
        return lambda w, x: lax.conv_general_dilated(
            x, w, (1, 2), "SAME", dimension_numbers=numbers, **options
        )

    return {
        "in out": (lambda w, x: x @ w, (8, 6), (-2,), (5, 8)),
        "out in": (lambda w, x: x @ w.T, (6, 8), (-1,), (5, 8)),
        "left": (lambda w, x: w @ x, (6, 8), (-1,), (8, 5)),
        "a vector": (lambda w, x: x @ w, (8, 6), (-2,), (8,)),
        "query": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (8, 2, 3), (-3,), (5, 8)),
        "heads out": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 3, 8), (-3, -2), (5, 2, 3)),
        "heads swapped": (
            lambda w, x: jnp.einsum("bdh,hdo->ob", x, w),
            (2, 3, 8),
            (-3, -2),
            (5, 3, 2),
        ),
        "batched": (lambda w, x: jnp.einsum("ebi,eio->ebo", x, w), (3, 8, 6), (-2,), (3, 5, 8)),
        "batched left": (
            lambda w, x: jnp.einsum("eio,ebi->eob", w, x),
            (3, 8, 6),
            (-2,),
            (3, 5, 8),
        ),
        "reshaped": (lambda w, x: x @ w.reshape(8, 6), (8, 2, 3), (-3,), (5, 8)),
        "split": (lambda w, x: (x @ w[:, :2]) @ w[:2, 2:] @ w[:4], (8, 6), (-2,), (5, 8)),
        "cast": (lambda w, x: x.astype(jnp.float32) @ w.astype(jnp.float32), (8, 6), (-2,), (5, 8)),
        "conv": (convolve(conv), (3, 3, 4, 6), (-4, -3, -2), (2, 5, 6, 4)),
        "conv oihw": (convolve(first), (6, 4, 3, 3), (-3, -2, -1), (2, 4, 5, 6)),
        "grouped conv": (
            convolve(conv, feature_group_count=2),
            (3, 3, 2, 6),
            (-4, -3, -2),
            (2, 5, 6, 4),
        ),
        "rows": (lambda w, x: w[jnp.array([3, 0, 3])] * jnp.sum(x), (8, 6), (-2,), (5, 8)),
    }


def adapted(base, shape, summed, rank=2):
    """A LoRA leaf of any layout, made from the definition."""
    one = [n if i - len(shape) in summed else 1 for i, n in enumerate(shape)]
    other = [1 if i - len(shape) in summed else n for i, n in enumerate(shape)]
    if len(shape) == 3 and shape[0] == 3 and summed == (-2,):  # experts, each with its own
        one[0] = shape[0]
    return LoRA(base, normal(2, *one, rank), normal(3, *other, rank) * 0.5, 0.5)


FORMS = [("w8", form) for form in forms()]
BASED = [(base, form) for base in BASES if base != "w8" for form in ("in out", "conv")]


@pytest.mark.parametrize(("base", "form"), [*FORMS, *BASED])
def test_products_equal_those_of_the_merged_weight(base, form):
    function, shape, summed, inputs = forms()[form]
    leaf, x = adapted(BASES[base](normal(4, *shape)), shape, summed), normal(5, *inputs)
    assert_close(
        jax.jit(lift(function))(leaf, x), function(jnp.asarray(merged(leaf), jnp.float32), x), 1e-4
    )


THIN = [name for name in forms() if name not in ("grouped conv", "rows", "split", "cast")]


@pytest.mark.parametrize("form", THIN)
def test_products_are_thin(form):
    function, shape, summed, inputs = forms()[form]
    leaf = adapted(BASES["w8"](normal(4, *shape)), shape, summed)
    x = normal(5, *inputs)
    assert not any(met.dense for met in explain(function, leaf, x))
    text = str(jax.make_jaxpr(lift(function))(leaf, x))
    assert text.count("dot_general[") + text.count("conv_general_dilated[") == 3


def model(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w["kernel"] + w["bias"][None]), None

    return lax.scan(layer, x, p["layers"])[0] @ p["head"]


PARAMS = {
    "layers": {"kernel": normal(6, 3, 8, 8), "bias": normal(7, 3, 8)},
    "head": normal(8, 8, 4),
}
WHERE = ["**/kernel", "head"]


W8 = Int(8)


def qlora(policy=W8, rank=2, **options):
    params = quantize(PARAMS, [(WHERE, policy)]) if policy is not None else PARAMS
    return lora(params, WHERE, rank, key=KEY, **options)


def test_the_function_is_unchanged_at_first():
    assert_close(lift(model)(qlora(None), X), model(PARAMS, X))
    down = qlora(rank=64)["layers"]["kernel"].down
    assert down.shape == (3, 8, 1, 64)
    assert np.std(np.asarray(down)) == pytest.approx(8**-0.5, rel=0.05)


@pytest.mark.parametrize(
    "base", [None, Int(8), Int(4, granularity="group", group_size=4), Int(8, symmetric=False)]
)
def test_stacked_layers(base):
    params = filled(qlora(base, alpha=3.0))
    assert_close(
        jax.jit(jax.checkpoint(lift(model)))(params, X), model(merged_arrays(params), X), 1e-4
    )


def merged_arrays(params):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), merged(params))


def test_scaling():
    assert qlora(alpha=6.0)["head"].scaling == 3.0
    assert qlora(None, 4, alpha=6.0, rank_stabilized=True)["head"].scaling == 3.0
    assert qlora()["head"].scaling == 1.0


def loss(apply, x=X):
    return lambda p: jnp.sum(apply(p, x) ** 2)


@pytest.mark.parametrize("base", [None, Int(4)])
def test_the_gradient_is_that_of_the_merged_function(base):
    params = filled(qlora(base, alpha=3.0))
    trained, rest = partition(params, adapters(params))
    got = jax.jit(jax.grad(lambda t: loss(lift(model))(combine(t, rest))))(trained)

    def by_hand(factors):
        def weight(path):
            leaf = dict(trees.items(params))[path]
            base = leaf.base.materialise() if isinstance(leaf.base, QArray) else leaf.base
            down, up = factors[path]
            return base + leaf.scaling * jnp.einsum("...r,...r->...", down, up)

        arrays = {
            "layers": {"kernel": weight("layers/kernel"), "bias": PARAMS["layers"]["bias"]},
            "head": weight("head"),
        }
        return loss(model)(arrays)

    leaves = {path: leaf for path, leaf in trees.items(params) if isinstance(leaf, LoRA)}
    expected = jax.grad(by_hand)({path: (leaf.down, leaf.up) for path, leaf in leaves.items()})
    for path, leaf in ((p, leaf) for p, leaf in trees.items(got) if isinstance(leaf, LoRA)):
        assert jax.tree.leaves(leaf.base) == []
        assert_close((leaf.down, leaf.up), expected[path], 1e-3)


def test_the_base_stays_integers():
    params = qlora(Spec(Int(8), Int(8)))
    text = str(jax.make_jaxpr(lift(model))(params, X))
    assert text.count("preferred_element_type=int32") == 2  # in the scan, and the head
    assert isinstance(params["head"].base, QArray)
    assert text.count("dot_general[") == 6


def test_trainable_marks_adapters_and_what_else_floats():
    marks = trainable(
        {"bias": jnp.ones(2), "kernel": qlora()["head"], "plain": qlora(None)["head"]}
    )
    assert marks["bias"] is True
    for name in ("kernel", "plain"):
        assert marks[name].down is True and marks[name].up is True
        assert not any(jax.tree.leaves(marks[name].base))


def test_only_adapters_train_with_optax():
    params = qlora()
    trained, rest = partition(params, adapters(params))
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, 0.9))

    @jax.jit
    def step(trained, state):
        value, gradient = jax.value_and_grad(lambda t: loss(lift(model))(combine(t, rest)))(trained)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, values = tx.init(trained), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        values.append(value.item())
    after = combine(trained, rest)
    assert values[-1] < 0.9 * values[0]
    assert jax.tree.structure(after) == jax.tree.structure(params)
    marks = adapters(params)
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), params, after)
    for marked, equal in zip(jax.tree.leaves(marks), jax.tree.leaves(same), strict=True):
        assert equal is not marked


def test_masked_optimizers_leave_the_base_of_floats_alone():
    params = qlora(None)
    tx = optax.chain(
        optax.masked(
            optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3, 0.9)), adapters(params)
        ),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, adapters(params))),
    )
    gradient = jax.grad(loss(lift(model)))(params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert_close(after["head"].base, params["head"].base, 0.0)
    assert jnp.any(after["head"].up != params["head"].up)


@pytest.mark.parametrize("base", [None, Int(4)])
def test_merge(base):
    params = filled(qlora(base))
    dense = merge(params)
    assert not any(isinstance(leaf, LoRA) for _, leaf in trees.items(dense))
    assert_close(dense, merged(params))
    requantized = quantize(dense, [(WHERE, Int(8))])
    assert_close(lift(model)(requantized, X), model(dense, X), 0.5)


def test_vmap_over_adapters():
    many = [filled(qlora())["head"] for _ in range(2)]
    many[1] = LoRA(many[1].base, many[1].down * 2, many[1].up, many[1].scaling)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *many)
    got = jax.vmap(lift(lambda w, x: x @ w), (0, None))(stacked, X)
    assert_close(got, [np.asarray(X, np.float64) @ merged({"w": leaf})["w"] for leaf in many], 1e-4)
    axes = LoRA(None, 0, None, 1.0)  # the base is shared
    shared = LoRA(many[0].base, stacked.down, many[0].up, 1.0)
    axes = jax.tree.unflatten(
        jax.tree.structure(shared),
        [0 if a is stacked.down else None for a in jax.tree.leaves(shared)],
    )
    assert_close(jax.vmap(lift(lambda w, x: x @ w), (axes, None))(shared, X), got)


def test_eight_devices_and_export():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    params, x = filled(qlora()), normal(9, 16, 8)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    assert_close(jax.jit(lift(model))(params, spread), lift(model)(params, x))
    exported = export.export(jax.jit(lift(model)), platforms=("cpu", "cuda", "tpu"))(params, X)
    assert_close(exported.call(params, X), lift(model)(params, X))


def test_sizes():
    params = qlora(Int(4))
    head = params["head"]
    assert trees.size(head).bits == 8 * 4 * 4 + 4 * 32 + (8 + 4) * 2 * 32
    assert trees.size(head).parameters == 8 * 4 + (8 + 4) * 2
    assert set(head.storage()) == {"down", "up", "base/codes", "base/scale"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    half = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
    params = filled(lora(quantize(half, [(WHERE, Int(8))]), WHERE, 2, key=KEY))
    assert params["head"].dtype == dtype
    got = jax.jit(lift(model))(params, X.astype(dtype))
    assert got.dtype == dtype
    expected = model(merged_arrays(params), X)
    assert_close(got, expected, 0.15 * np.max(np.abs(expected)))


def test_what_cannot_be_done_says_why():
    with pytest.raises(ValueError, match="matched none of"):
        lora(PARAMS, "kernel/*", 2, key=KEY)
    with pytest.raises(ValueError, match="rank is a positive integer"):
        lora(PARAMS, WHERE, 0, key=KEY)
    with pytest.raises(ValueError, match="alpha is a finite number"):
        lora(PARAMS, WHERE, 2, alpha=float("nan"), key=KEY)
    with pytest.raises(ValueError, match="`bias` has shape"):
        lora({"bias": jnp.ones(3)}, "bias", 1, key=KEY)
    with pytest.raises(TypeError, match="only floating weights"):
        lora({"ids": jnp.ones((3, 2), jnp.int32)}, "ids", 1, key=KEY)
    with pytest.raises(ValueError, match="adapters already"):
        lora(qlora(), WHERE, 1, key=KEY)
    with pytest.raises(ValueError, match="there are none"):
        adapters(PARAMS)
    with pytest.raises(ValueError, match="would make"):
        lift(lambda w, x: jnp.tanh(w) @ x)(qlora()["head"], normal(1, 4, 2))


def linen_model():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = x + linen.MultiHeadDotProductAttention(num_heads=2)(x)
            return linen.Dense(3)(x)

    return Net().apply, Net().init(KEY, X[None]), X[None], 5


def nnx_model():
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(nnx.Linear(8, 3, rngs=nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), state, X, 1


def equinox_model():
    eqx = pytest.importorskip("equinox")
    params, static = eqx.partition(eqx.nn.MLP(8, 3, 6, 1, key=KEY), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, X, 2


@pytest.mark.parametrize("make", [linen_model, nnx_model, equinox_model])
def test_frameworks(make):
    apply, params, x, count = make()
    found = sites(apply, params, x)
    paths = [path for path, leaf in trees.items(params) if path in {s.path for s in found}]
    base = quantize(params, [(paths, Int(8))], sites=found)
    adapted = filled(lora(base, paths, 2, key=KEY, sites=found))
    assert sum(isinstance(leaf, LoRA) for _, leaf in trees.items(adapted)) == count
    assert_close(jax.jit(lift(apply))(adapted, x), apply(merged_like(adapted, params), x), 1e-4)
    products = [
        str(jax.make_jaxpr(f)(p, x)).count("dot_general[")
        for f, p in ((apply, params), (lift(apply), adapted))
    ]
    assert products[1] == products[0] + 2 * count


def merged_like(adapted, params):
    arrays = jax.tree.leaves(merged_arrays(adapted))
    return jax.tree.unflatten(jax.tree.structure(params), arrays)


def test_a_tied_embedding():
    def function(p, ids):
        return jnp.tanh(p["e"][ids]) @ p["e"].T

    params, ids = {"e": normal(1, 11, 8)}, jnp.array([[1, 10], [0, 3]])
    found = sites(function, params, ids)
    adapted = filled(
        lora(quantize(params, [("e", Int(8))], sites=found), "e", 2, key=KEY, sites=found)
    )
    assert_close(jax.jit(lift(function))(adapted, ids), function(merged_arrays(adapted), ids), 1e-4)
