"""Packed leaves in models of every framework, on many devices, in shard_map, exported."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

import jopt
from jopt import prune, trees
from jopt.prune import CSR, NM24, BitSparse
from jopt.trace import lift, sites

X = jax.random.normal(jax.random.key(9), (4, 8))
IMAGES = jax.random.normal(jax.random.key(9), (2, 6, 6, 4))
IDS = jnp.array([[1, 2, 3], [4, 5, 10]])


def linen_net(*layers, x):
    linen = pytest.importorskip("flax.linen")
    model = linen.Sequential([layer(linen) for layer in layers])
    return model.apply, model.init(jax.random.key(0), x), x


linen_mlp = functools.partial(
    linen_net, lambda n: n.Dense(16), lambda n: n.relu, lambda n: n.Dense(3), x=X
)
linen_conv = functools.partial(
    linen_net,
    *(lambda n: n.Conv(8, (3, 3)), lambda n: n.relu, lambda n: n.ConvTranspose(4, (3, 3))),
    lambda n: n.DenseGeneral(3, axis=(-2, -1)),
    x=IMAGES,
)


def linen_scan():
    linen = pytest.importorskip("flax.linen")

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return x + linen.Dense(8)(linen.relu(linen.Dense(16)(x))), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                linen.remat(Block, prevent_cse=False),
                **{"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 3},
            )
            return layers()(x, None)[0]

    return Net().apply, Net().init(jax.random.key(0), X), X


def linen_tied():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, ids):
            embed = linen.Embed(12, 8)
            return embed.attend(linen.Dense(8)(embed(ids)))

    return Net().apply, Net().init(jax.random.key(0), IDS), IDS


def nnx_mlp():
    nnx = pytest.importorskip("flax.nnx")

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state = nnx.split(MLP(nnx.Rngs(0)))
    apply = lambda params, x: nnx.merge(graph, nnx.State(params))(x)  # noqa: E731
    return apply, nnx.to_pure_dict(state), X


def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    arrays, static = eqx.partition(eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), arrays, X


def haiku_mlp():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 3])(x)))
    return model.apply, model.init(jax.random.key(0), X), X


def mixed_precision():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
    return lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), params, X


MODELS = {
    f.__name__: f
    for f in (linen_scan, linen_tied, nnx_mlp, equinox_mlp, haiku_mlp, mixed_precision)
} | {"linen_mlp": linen_mlp, "linen_conv": linen_conv}
PATTERNS = {"nm24": prune.NM(2, 4), "bits": prune.Unstructured(), "csr": prune.Unstructured()}


@pytest.mark.parametrize("form", PATTERNS)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_framework(name, form):
    apply, params, x = MODELS[name]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = sites(apply, params, x)
        where = [*dict.fromkeys(site.path for site in found if site.path)]
        if form == "nm24" and name == "linen_tied":
            where = ["**/kernel"]  # the table's inputs lie along its rows and along its columns
        sparsity = {"nm24": 0.5, "bits": 0.6, "csr": 0.9}[form]
        options = {"where": where, "sites": found}

        @jax.jit
        def prune_all(params):
            pattern = PATTERNS[form]
            masks = prune.masks(params, sparsity, pattern=pattern, scope="layer", **options)
            return prune.apply_masks(params, masks)

        pruned = prune_all(params)
        packed, report = prune.pack(pruned, form, **options, unfit="skip")
        rows = [row.form for row in report.values()]
        if form != "csr":  # whose rows are long for such small matrices
            assert rows == [form] * len(where)
        wanted = jax.jit(apply)(pruned, x)
        np.testing.assert_allclose(jax.jit(lift(apply))(packed, x), wanted, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(prune.unpack)(packed), pruned)
        assert jopt.size(packed).bits < jopt.size(pruned).bits or form == "csr"


def test_tied_tables_and_transposed_kernels():
    table = prune.apply_masks(*_masked((64, 32), 0.95))
    for form in ("bits", "csr"):
        packed = prune.pack({"table": table}, form)[0]
        apply = lambda p, ids: p["table"][ids] @ p["table"].T  # noqa: E731
        np.testing.assert_allclose(
            jax.jit(lift(apply))(packed, IDS), apply({"table": table}, IDS), rtol=1e-5, atol=1e-6
        )
    pairs = prune.apply_masks(*_masked((64, 32), 0.5, prune.NM(2, 4)))
    turned = prune.pack(pairs, "nm24", where="**")[0].transposed((1, 0))
    assert isinstance(turned, NM24) and turned.axis == -1
    np.testing.assert_array_equal(turned.materialise(), pairs.T)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_csr_product_skips_zeros_in_any_layout(side, axis, dtype):
    w = prune.apply_masks(*_masked((320, 256), 0.95)).astype(dtype)
    w = w if axis == -2 else w.T
    found = sites(lambda w, x: jax.lax.dot_general(w, x, (((axis + 2,), (2,)), ((), ()))), w,
                  jnp.zeros((2, 3, 320), dtype))  # fmt: skip
    leaf = prune.pack(w, "csr", where="**", sites=found)[0]
    assert isinstance(leaf, CSR) and leaf.axis == axis
    x = jax.random.normal(jax.random.key(1), (2, 3, 320)).astype(dtype)

    def apply(w, x):
        pair, summed = (w, x), ((axis + 2,), (2,))
        if side == 1:
            pair, summed = pair[::-1], summed[::-1]
        return jax.lax.dot_general(*pair, (summed, ((), ())), preferred_element_type=jnp.float32)

    (met,) = jopt.trace.explain(apply, leaf, x)
    assert "the weights that are left" in met.how
    text = jax.jit(lift(apply)).lower(leaf, x).compile().as_text()
    assert " dot(" not in text and "gather" in text
    wanted = apply(w.astype(jnp.float32), x.astype(jnp.float32))
    np.testing.assert_allclose(jax.jit(lift(apply))(leaf, x), wanted, rtol=1e-4, atol=1e-4)
    batched = jax.vmap(lift(apply), in_axes=(None, 0))(leaf, x[:, None])
    assert batched.shape[0] == 2


def test_a_denser_csr_multiplies_as_a_dense_weight():
    leaf = prune.pack(prune.apply_masks(*_masked((256, 256), 0.7)), "csr", where="**")[0]
    (met,) = jopt.trace.explain(lambda w, x: x @ w, leaf, jnp.ones((2, 256)))
    assert met.how == "a dense product of the unpacked weight"


@pytest.mark.parametrize("form", PATTERNS)
def test_exports_for_three_platforms_and_any_batch(form):
    w, packed = _large(form)
    arrays, structure = jax.tree.flatten(packed)
    apply = lambda arrays, x: lift(lambda w, x: x @ w)(structure.unflatten(arrays), x)  # noqa: E731
    batch = jax.ShapeDtypeStruct((export.symbolic_shape("b")[0], w.shape[0]), jnp.float32)
    made = export.export(jax.jit(apply), platforms=("cpu", "cuda", "tpu"))(arrays, batch)
    x = jax.random.normal(jax.random.key(1), (3, w.shape[0]))
    np.testing.assert_allclose(made.call(arrays, x), x @ w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", PATTERNS)
def test_eight_devices(form):
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
    w, packed = _large(form)
    x = jax.random.normal(jax.random.key(1), (8, w.shape[0]))
    spec = PartitionSpec(None, "model") if form != "bits" else PartitionSpec()
    placed = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, spec if a.ndim == 2 else PartitionSpec())),
        packed,
    )
    f = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(lift(lambda w, x: x @ w)(w, x) ** 2)))
    put = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    value, dx = f(put, placed)
    assert len(dx.sharding.device_set) == 8
    y = np.float64(x) @ w
    np.testing.assert_allclose(value, (y**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(dx, 2 * y @ np.float64(w).T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", PATTERNS)
@pytest.mark.parametrize("check", [False, True])
def test_shard_map_and_shardings_in_types(form, check):
    mesh, (w, packed) = jax.make_mesh((8,), ("data",)), _large(form)
    x = jax.random.normal(jax.random.key(1), (8, w.shape[0]))
    data, apply = PartitionSpec("data"), lift(lambda w, x: x @ w)
    mapped = jax.shard_map(
        apply, mesh=mesh, in_specs=(PartitionSpec(), data), out_specs=data, check_vma=check
    )
    put = jax.device_put(x, NamedSharding(mesh, data))
    np.testing.assert_allclose(jax.jit(mapped)(packed, put), x @ w, rtol=1e-4, atol=1e-4)
    with jax.set_mesh(mesh):
        y = jax.jit(apply)(packed, jax.device_put(x, data))
    assert y.sharding.spec[0] == "data"
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-4)


def test_pruned_training_ends_in_packed_leaves():
    """What `sparsify` lands on packs at once, and trains on as values."""
    w = prune.apply_masks(*_masked((64, 32), 0.9))
    leaf = prune.pack(w, "bits", where="**")[0]
    x, y = jax.random.normal(jax.random.key(1), (16, 64)), jnp.ones((16, 32))

    @jax.jit
    def step(values, leaf):
        def loss(values):
            packed = BitSparse(leaf.words, values, leaf.matrix)
            return jnp.mean((lift(lambda w, x: x @ w)(packed, x) - y) ** 2)

        value, grad = jax.value_and_grad(loss)(values)
        return values - 0.1 * grad, value

    values, losses = leaf.values, []
    for _ in range(5):
        values, loss = step(values, leaf)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    trained = BitSparse(leaf.words, values, leaf.matrix).materialise()
    np.testing.assert_array_equal(np.asarray(trained) != 0, np.asarray(w) != 0)
    assert trees.is_typed(leaf)


def _masked(shape, sparsity, pattern=PATTERNS["bits"]):
    w = jax.random.normal(jax.random.key(0), shape)
    return w, jax.jit(lambda w: prune.masks(w, sparsity, pattern=pattern))(w)


@functools.cache
def _large(form):
    """A weight that CSR takes up, and packed."""
    w = prune.apply_masks(*_masked((512, 256), 0.5 if form == "nm24" else 0.95, PATTERNS[form]))
    return w, prune.pack(w, form, where="**")[0]


@pytest.mark.parametrize("form", ["bits", "csr"])
def test_a_product_of_no_rows(form):
    weight = jnp.where(jax.random.uniform(jax.random.key(0), (4096, 64)) < 0.02, 1.0, 0.0)
    leaf = prune.pack(weight, form)[0]
    found = jopt.lift(lambda w, x: x @ w)(leaf, jnp.ones((0, 4096)))
    assert found.shape == (0, 64)
