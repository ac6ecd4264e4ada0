"""Wanda, and what all pruning on data shares: layouts, frameworks, errors, devices."""

import calibrated_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jopt
from jopt import prune, quant, trees
from jopt.prune import _wanda

RNG = np.random.default_rng(0)


def f32(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def product(weight, x):
    return x @ weight


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 24), st.integers(1, 5), st.floats(0, 0.95), st.booleans(), st.integers(0, 10**6)
)
def test_wanda_prunes_the_lowest_of_each_output(inputs, outputs, sparsity, ties, seed):
    rng = np.random.default_rng(seed)
    weight, x = rng.normal(size=(inputs, outputs)), rng.normal(size=(7, inputs))
    if ties:  # of equal scores the first go
        weight, x = np.sign(weight), np.ones_like(x)
    mask = reference.wanda(weight, x, sparsity)
    new = _wanda._pruned(
        jnp.asarray(weight, jnp.float32)[None],
        jnp.asarray((x * x).sum(0), jnp.float32)[None],
        jnp.arange(inputs),
        pattern=prune.Unstructured(),
        lowest=round(sparsity * inputs),
    )
    np.testing.assert_array_equal(new[0] != 0, mask)
    np.testing.assert_array_equal(new[0], np.where(mask, weight, 0).astype(np.float32))


@pytest.mark.parametrize("nm", [None, (2, 4), (4, 8)])
def test_wanda_of_a_network(nm):
    pattern = prune.Unstructured() if nm is None else prune.NM(*nm)
    params = {"layers": f32(3, 16, 16) / 3, "last": f32(16, 5)}
    batches = [f32(12, 16) * jnp.exp(f32(1, 16)) for _ in range(3)]

    def apply(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["last"]

    found = prune.wanda(apply, params, batches, 0.5, pattern=pattern)
    h = np.concatenate(batches).astype(np.float64)
    for i in range(3):
        new = np.where(reference.wanda(params["layers"][i], h, 0.5, nm), params["layers"][i], 0)
        np.testing.assert_array_equal(found["layers"][i], new)
        h = np.tanh(h @ new)
    mask = reference.wanda(params["last"], h, 0.5, nm)
    np.testing.assert_array_equal(found["last"], np.where(mask, params["last"], 0))


def convolution(numbers, groups=1):
    def run(w, x):
        options = {"dimension_numbers": numbers, "feature_group_count": groups}
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", **options)

    return run


HWIO, OIHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
LAYOUTS = {  # function, shape of the weight, of the data, axis of the groups
    "transposed": (lambda w, x: x @ w.T, (6, 8), (20, 8), 1),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (8, 2, 3), (20, 8), 0),
    "heads summed": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 4, 6), (20, 2, 4), 1),
    "experts": (lambda w, x: jnp.einsum("bei,eio->beo", x, w), (3, 8, 5), (20, 3, 8), 1),
    "vmapped experts": (jax.vmap(lambda w, x: x @ w, (0, None)), (3, 8, 5), (20, 8), 1),
    "convolution": (convolution(HWIO), (3, 3, 4, 6), (4, 6, 6, 4), 2),
    "convolution of torch": (convolution(OIHW), (6, 4, 3, 3), (4, 4, 6, 6), 1),
    "grouped convolution": (convolution(HWIO, 2), (3, 3, 4, 6), (4, 6, 6, 8), 2),
    "long window": (convolution(HWIO), (8, 8, 4, 6), (4, 9, 9, 4), 2),
    "long window of torch": (convolution(OIHW), (6, 4, 8, 8), (4, 4, 9, 9), 1),
    "long window of a sequence": (
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (16, 8, 6),
        (4, 20, 8),
        1,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_lie_along_the_inputs_in_any_layout(name):
    function, shape, data, axis = LAYOUTS[name]
    params, batches = {"w": f32(*shape)}, [f32(*data) for _ in range(2)]
    f = lambda p, x: function(p["w"], x)  # noqa: E731
    for method in (prune.wanda, prune.sparsegpt):
        new = method(f, params, batches, 0.5, pattern=prune.NM(2, 4))["w"]
        assert new.shape == shape and new.dtype == jnp.float32
        kept = np.moveaxis(np.asarray(new) != 0, axis, -1)
        np.testing.assert_array_equal(kept.reshape(*kept.shape[:-1], -1, 4).sum(-1), 2)


def test_a_window_is_no_group_of_inputs():
    """DQN's first layer, RGB under a window of 12, and a depthwise kernel."""
    shapes = {"dqn": (8, 8, 4, 8), "rgb": (12, 12, 3, 16), "depthwise": (4, 4, 1, 8)}
    params = {name: f32(*shape) for name, shape in shapes.items()}

    def f(p, x):
        wide = jnp.concatenate([x, x], -1)
        once, all_of_it = convolution(HWIO), convolution(HWIO, 8)
        return once(p["dqn"], x), once(p["rgb"], x[..., :3]), all_of_it(p["depthwise"], wide)

    x, pattern = f32(2, 12, 12, 4), prune.NM(2, 4)
    sites = jopt.sites(f, params, x)
    found = prune.misfits(params, pattern, sites=sites)
    assert set(found) == {"rgb", "depthwise"} and "3 inputs (axis -2)" in found["rgb"]
    for method in (prune.wanda, prune.sparsegpt):
        with pytest.raises(ValueError, match=r"2 of 3(.|\n)*`depthwise`(.|\n)*1 inputs"):
            method(f, params, [x], 0.5, pattern=pattern)
    masks = prune.masks(params, 0.5, pattern=pattern, sites=sites, where="dqn")
    _, report = prune.pack(prune.apply_masks(params, masks), "nm24", sites=sites, where="dqn")
    assert report["dqn"].form == "nm24"
    flat = {"w": f32(8 * 8 * 4, 6)}
    sites = jopt.sites(lambda p, x: convolution(HWIO)(p["w"].reshape(8, 8, 4, 6), x), flat, x)
    found = prune.misfits(flat, pattern, sites=sites)
    assert "no axis of it is of the input features alone" in found["w"]


def linen():
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.relu(nn.Dense(8)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2))
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 2}
            x, _ = nn.scan(nn.remat(Block, prevent_cse=False), **options)()(x, None)
            return nn.Dense(3)(x)

    x = f32(6, 5, 5, 4)
    return Net().apply, Net().init(jax.random.key(0), x), x


def tied():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(12, 8)
            return embed.attend(nn.Dense(8)(embed(ids)))

    ids = jnp.asarray(RNG.integers(0, 12, (6, 5)))
    return Net().apply, Net().init(jax.random.key(0), ids), ids


def nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), state, f32(10, 8)


def equinox():
    eqx = pytest.importorskip("equinox")
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    return lambda m, x: jax.vmap(m)(x), mlp, f32(10, 8)


def haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
    x = f32(10, 8)
    return net.apply, net.init(jax.random.key(0), x), x


@pytest.mark.parametrize("make", [linen, tied, nnx, equinox, haiku])
def test_frameworks(make):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        apply, params, x = make()
        fed = {site.path for site in jopt.sites(apply, params, x)}
        old, wanted = dict(trees.items(params)), apply(params, x)
        found = prune.wanda(apply, params, [x, x], 0.5)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        for path, leaf in trees.items(found):
            if path in fed:
                assert np.mean(np.asarray(leaf) == 0) == 0.5
            else:
                assert leaf is old[path]
        if make is not linen:  # the others compile the same programs for other shapes
            return
        masks = trees.map_with_path(
            lambda path, w: jnp.asarray(w) != 0 if path in fed else jnp.array(True), found
        )
        again = prune.reconstruct(apply, params, [x], masks)
        errors = [float(jnp.sum((apply(p, x) - wanted) ** 2)) for p in (again, found)]
        assert errors[0] < errors[1]
        found = prune.sparsegpt(apply, params, [x, x], 0.5)
        assert all(np.mean(np.asarray(w) == 0) == 0.5 for p, w in trees.items(found) if p in fed)


def test_scopes_policies_and_what_is_left_alone():
    params = {"a": f32(8, 16), "b": f32(16, 16), "c": f32(16, 4), "bias": f32(4)}
    frozen = {**params, "b": quant.quantize(params["b"], quant.Int(8))}

    def apply(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] + p["bias"][None]

    def share(found):
        return {path: float(np.mean(np.asarray(leaf) == 0)) for path, leaf in trees.items(found)}

    batch = [f32(9, 8)]
    uniform = share(prune.wanda(apply, params, batch, 0.5, scope="uniform"))
    assert uniform == {"a": 0, "b": 0.5, "bias": 0, "c": 0}
    erk = share(prune.wanda(apply, params, batch, 0.5, scope="erk"))
    assert erk["c"] < erk["a"] < erk["b"]
    total = sum(erk[path] * params[path].size for path in "abc")
    assert total == pytest.approx(0.5 * 448, abs=18)  # each output rounds
    policy = [("a", 0.25), ("c", 0.75)]
    assert share(prune.wanda(apply, params, batch, policy)) == {
        "a": 0.25,
        "b": 0,
        "bias": 0,
        "c": 0.75,
    }
    found = prune.wanda(jopt.lift(apply, allow_dense=True), frozen, batch, 0.5, where=["a", "c"])
    assert found["b"] is frozen["b"] and np.mean(np.asarray(found["c"]) == 0) == 0.5
    with pytest.raises(TypeError, match=r"`b` is a `QArray`|cannot prune `b`"):
        prune.wanda(jopt.lift(apply), frozen, batch, 0.5, where="b")


def test_a_nan_is_kept_and_a_pruned_one_is_gone():
    weight = f32(8, 3).at[2, 1].set(jnp.nan)
    found = prune.wanda(product, weight, [f32(5, 8)], 0.5)
    assert np.argwhere(np.isnan(found)).tolist() == [[2, 1]]
    assert (np.sum(np.asarray(found) == 0, 0) == 4).all()


def test_sharded_weights_and_batches_give_the_same():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": f32(16, 16) / 4, "out": f32(16, 8)}
    batches = [f32(16, 16), f32(16, 16)]

    def apply(p, x):
        return jnp.tanh(x @ p["w"]) @ p["out"]

    specs = {"w": PartitionSpec(None, "model"), "out": PartitionSpec("model", None)}
    placed = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params.items()}
    rows = NamedSharding(mesh, PartitionSpec("data"))
    one = prune.sparsegpt(apply, params, batches, 0.5)
    many = prune.sparsegpt(apply, placed, [jax.device_put(x, rows) for x in batches], 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)


def test_wanda_exports():
    def run(weight, squares):
        options = {"pattern": prune.Unstructured(), "lowest": 4}
        return _wanda._pruned(weight, squares, jnp.arange(8), **options)

    arguments = f32(1, 8, 3), jnp.abs(f32(1, 8))
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(*arguments)
    np.testing.assert_array_equal(exported.call(*arguments), run(*arguments))


def test_errors():
    params = {"w": f32(8, 8), "mask": jnp.ones((8, 8)), "v": f32(8, 6), "table": f32(5, 8)}
    x = f32(3, 8)

    def apply(p, x):
        return x @ (p["w"] * p["mask"]) @ p["v"]

    for method in (prune.wanda, prune.sparsegpt):
        name = method.__name__

        def wrong(match, *args, kind=ValueError, method=method, **options):
            with pytest.raises(kind, match=match):
                method(apply, params, *args, **options)

        wrong(rf"`prune.{name}\(apply, params, batches, ...\)` got no batch", [], 0.5)
        wrong(r"sparsity=1.5", [x], 1.5)
        wrong(r"prunes at most", [x], 0.6, pattern=prune.NM(2, 4))
        wrong(
            r"`w` to exactly 0.5, and was asked for 0.25",
            [x],
            0.25,
            pattern=prune.NM(2, 4),
            where="w",
        )
        wrong(r'scope="global"', [x], 0.5, scope="global")
        wrong(r"takes `Unstructured\(\)` and `NM\(n, m\)`", [x], 0.5, pattern=prune.Channel())
        wrong(r"is a number, no schedule", [x], lambda step: 0.5)
        wrong(r"8 inputs .* not a multiple of 3", [x], 1 / 3, pattern=prune.NM(2, 3), where="v")
        wrong(r"`table`: no product reads it", [x], 0.5, where=["v", "table"])
        wrong(r"`w`: no product met this weight(.|\n)*`where=`", [x], 0.5, where="w")
        wrong(r"meet `v` have a NaN", [x.at[0, 0].set(jnp.nan)], 0.5, where="v")
        wrong(r"meet `v` .* squares is beyond float32", [x * 1e25], 0.5, where="v")
        wrong(r"batch 1 has", [x, x[:2]], 0.5, where="v")


def methods(f, params, batches):
    masks = jax.tree.map(lambda w: jnp.arange(w.size).reshape(w.shape) % 2 == 0, params)
    return {
        "wanda": lambda: prune.wanda(f, params, batches, 0.5),
        "sparsegpt": lambda: prune.sparsegpt(f, params, batches, 0.5),
        "reconstruct": lambda: prune.reconstruct(f, params, batches, masks),
    }


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "reconstruct"])
def test_under_jit_and_without_rows(name):
    params, x = {"w": f32(8, 4)}, f32(6, 8)
    f = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(TypeError, match=rf"`prune.{name}\(.*looks at values.*outside `jit`"):
        jax.jit(lambda p: methods(f, p, [x])[name]())(params)
    with pytest.raises(ValueError, match=rf"`prune.{name}\(.*batch 1 holds no rows, \[0, 8\]"):
        methods(f, params, [x, x[:0]])[name]()


def test_what_does_not_fit_may_stay_dense():
    params, x = {"a": f32(6, 8), "b": f32(8, 4)}, f32(20, 6)
    f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    for method in (prune.wanda, prune.sparsegpt):
        with pytest.raises(ValueError, match=r"1 of 2(.|\n)*`a`"):
            method(f, params, [x], 0.5, pattern=prune.NM(2, 4))
        found = method(f, params, [x], 0.5, pattern=prune.NM(2, 4), unfit="skip")
        np.testing.assert_array_equal(found["a"], params["a"])
        assert int((found["b"] == 0).sum()) == 16


def test_a_nan_stays_where_it_is():
    params, x = {"a": f32(6, 8), "b": f32(8, 4).at[3, 2].set(jnp.nan)}, f32(20, 6)
    f = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    clean = {**params, "b": jnp.nan_to_num(params["b"])}
    for method in (prune.wanda, prune.sparsegpt):
        found, same = method(f, params, [x], 0.5), method(f, clean, [x], 0.5)
        np.testing.assert_array_equal(np.isnan(found["b"]), np.isnan(params["b"]))
        np.testing.assert_array_equal(found["a"], same["a"])
        swapped = {"a": f32(6, 8).at[0, 0].set(jnp.nan), "b": clean["b"]}
        with pytest.raises(ValueError, match="activations that meet `b` have a NaN"):
            method(f, swapped, [x], 0.5)
