"""Masks: exact counts, PyTorch's masks bit for bit, patterns, scopes, selection, errors."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jopt
from jopt import prune, trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A typed leaf that trains, with an array beside its weight."""

    weight: jax.Array
    scale: jax.Array

    def materialise(self):
        return self.weight * self.scale

    def with_weight(self, weight):
        return dataclasses.replace(self, weight=weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A typed leaf that does not train."""

    codes: jax.Array

    def materialise(self):
        return self.codes.astype(jnp.float32)


def random_params(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    return {"a": {"kernel": draw(16, 24), "bias": draw(24)}, "b": (draw(3, 3, 4, 8), draw(8, 12))}


def weights_of(tree):
    return [tree["a"]["kernel"], tree["b"][0], tree["b"][1]]


def brute(scores, k):
    """Masks that lose the k lowest of all scores."""
    flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores])
    kept = np.ones(flat.size, bool)
    kept[np.argsort(flat, kind="stable")[:k]] = False
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [m.reshape(s.shape) for m, s in zip(np.split(kept, ends), scores, strict=True)]


def equal(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.3, 0.5, 0.9, 0.999])
def test_global_and_layer(sparsity):
    params = random_params()
    sizes = [np.abs(w) for w in weights_of(params)]
    found = prune.masks(params, sparsity)
    equal(weights_of(found), brute(sizes, round(sparsity * sum(s.size for s in sizes))))
    assert found["a"]["bias"].shape == () and bool(found["a"]["bias"])
    found = weights_of(prune.masks(params, sparsity, scope="layer"))
    equal(found, [brute([s], round(sparsity * s.size))[0] for s in sizes])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_ties_and_exact_counts(dtype):
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_params())
    sizes = [np.abs(np.asarray(w, np.float64)) for w in weights_of(params)]
    equal(weights_of(prune.masks(params, 0.37)), brute(sizes, round(0.37 * 768)))


def test_mixed_dtypes_are_ranked_together():
    params = random_params()
    params["a"]["kernel"] = jnp.asarray(params["a"]["kernel"], jnp.bfloat16)
    sizes = [np.abs(np.asarray(w, np.float64)) for w in weights_of(params)]
    equal(weights_of(prune.masks(params, 0.5)), brute(sizes, 384))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.999), st.integers(1, 4))
def test_counts_are_exact_under_ties(seed, sparsity, levels):
    rng = np.random.default_rng(seed)
    params = [rng.integers(-levels, levels + 1, (6, 8)).astype(np.float32) for _ in range(2)]
    found = prune.masks(params, sparsity)
    equal(found, brute([np.abs(p) for p in params], round(sparsity * 96)))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.95])
def test_torch(sparsity):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as peer

    params = random_params(3)
    weights = [np.ascontiguousarray(w) for w in weights_of(params)]
    modules = []
    for weight in weights:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.tensor(weight))
        modules.append(module)
    for module in modules:
        peer.l1_unstructured(module, "weight", sparsity)
    found = weights_of(prune.masks(params, sparsity, scope="layer"))
    equal(found, [m.weight_mask.numpy().astype(bool) for m in modules])
    for module in modules:
        peer.remove(module, "weight")
        module.weight.data = torch.tensor(weights[modules.index(module)])
    peer.global_unstructured([(m, "weight") for m in modules], peer.L1Unstructured, amount=sparsity)
    found = weights_of(prune.masks(params, sparsity))
    equal(found, [m.weight_mask.numpy().astype(bool) for m in modules])


def test_traced_sparsity_under_jit_and_vmap():
    params = random_params()
    jitted = jax.jit(prune.masks)
    for sparsity in (0.25, 0.8):
        exact = prune.masks(params, float(np.float32(sparsity)))
        equal(jax.tree.leaves(jitted(params, jnp.float32(sparsity))), jax.tree.leaves(exact))
    levels = jnp.array([0.0, 0.5, 0.75, 2.0, -1.0, jnp.nan])
    batched = jax.vmap(lambda s: prune.masks(params, s, scope="layer"))(levels)
    kept = np.mean(batched["a"]["kernel"], axis=(1, 2))
    np.testing.assert_allclose(kept, [1, 0.5, 0.25, 0, 1, 1])


def test_stacked_models_under_vmap():
    models = [random_params(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *models)
    batched = jax.vmap(lambda p: prune.masks(p, 0.6))(stacked)
    for i, model in enumerate(models):
        own = jax.tree.leaves(jax.tree.map(lambda x: x[i], batched))  # noqa: B023
        equal(own, jax.tree.leaves(prune.masks(model, 0.6)))


def test_gradients_pass_masks_by():
    params = {"kernel": jnp.array([[3.0, -1.0], [2.0, 0.5]])}

    def loss(params):
        masked = prune.apply_masks(params, prune.masks(params, 0.5))
        return jnp.sum(masked["kernel"] ** 2)

    np.testing.assert_array_equal(jax.grad(loss)(params)["kernel"], [[6, 0], [4, 0]])


def test_nan_is_kept_to_be_seen():
    params = np.array([[1.0, np.nan, 0.1, -np.nan]], np.float32)
    np.testing.assert_array_equal(prune.masks(params, 0.5), [[False, True, False, True]])


def test_random_scores():
    params, key = random_params(), jax.random.key(1)
    low, high = (prune.masks(params, s, score=prune.random(key)) for s in (0.3, 0.6))
    assert sum(int(np.sum(~m)) for m in weights_of(low)) == round(0.3 * 768)
    for few, many in zip(weights_of(low), weights_of(high), strict=True):
        assert not np.any(~few & many)  # nested: what goes first stays gone
    again = prune.masks(params, 0.3, score=prune.random(key))
    equal(weights_of(again), weights_of(low))
    other = prune.masks(params, 0.3, score=prune.random(jax.random.key(2)))
    assert any(np.any(x != y) for x, y in zip(weights_of(low), weights_of(other), strict=True))
    # Leaves of one shape get scores of their own.
    twins = prune.masks({"x": params["a"]["kernel"], "y": params["a"]["kernel"]}, 0.5,
                        score=prune.random(key))  # fmt: skip
    assert np.any(twins["x"] != twins["y"])


def nm_reference(weight, n, m, axis):
    """N:M masks by sorting each group in NumPy."""
    moved = np.moveaxis(np.abs(np.asarray(weight, np.float64)), axis, -1)
    groups = moved.reshape(-1, m)
    mask = np.ones_like(groups, bool)
    lost = np.argsort(groups, axis=1, kind="stable")[:, : m - n]
    np.put_along_axis(mask, lost, False, axis=1)
    return np.moveaxis(mask.reshape(moved.shape), -1, axis)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_nm(n, m):
    rng = np.random.default_rng(0)
    params = [
        rng.normal(size=(16, 6)),
        rng.integers(-2, 3, (2, 8, 5)),
        rng.normal(size=(3, 3, 8, 4)),
    ]
    params = [p.astype(np.float32) for p in params]
    expected = [nm_reference(p, n, m, -2) for p in params]
    for scope in ("global", "layer"):
        traced = jax.jit(
            lambda p, s: prune.masks(p, s, pattern=prune.NM(n, m), scope=scope)  # noqa: B023
        )
        equal(traced(params, 1 - n / m), expected)
    equal(prune.masks(params[:1], 1 - n / m, pattern=prune.NM(n, m)), expected[:1])


def test_nm_below_its_sparsity_takes_the_groups_that_lose_least():
    rng = np.random.default_rng(0)
    params = rng.normal(size=(16, 6)).astype(np.float32)
    found = np.asarray(prune.masks(params, 0.25, pattern=prune.NM(2, 4)))
    full = nm_reference(params, 2, 4, -2)
    lost = np.where(full, 0, np.abs(params)).reshape(4, 4, 6).sum(1)
    chosen = brute([lost], 12)[0]  # 12 of 24 groups
    expected = np.where(np.repeat(chosen, 4, axis=0), True, full)
    np.testing.assert_array_equal(found, expected)
    # L2 weighs the groups otherwise than L1.
    squares = np.where(full, 0, params.astype(np.float64) ** 2).reshape(4, 4, 6).sum(1)
    chosen = brute([squares], 12)[0]
    expected = np.where(np.repeat(chosen, 4, axis=0), True, full)
    by_l2 = prune.masks(params, 0.25, pattern=prune.NM(2, 4), score=prune.magnitude(2))
    np.testing.assert_array_equal(by_l2, expected)


def test_nm_groups_lie_along_the_inputs_that_sites_name():
    rng = np.random.default_rng(0)
    params = {
        "out_in": rng.normal(size=(6, 8)).astype(np.float32),
        "heads": rng.normal(size=(6, 2, 8)).astype(np.float32),
        "conv": rng.normal(size=(3, 3, 4, 2)).astype(np.float32),
        "oihw": rng.normal(size=(2, 8, 3, 3)).astype(np.float32),
    }

    def apply(p, x, image):
        h = x @ p["out_in"].T
        h = jnp.einsum("bi,ihd->bhd", h, p["heads"].astype(jnp.float32))
        numbers = ("NHWC", "HWIO", "NHWC")
        image = jax.lax.conv_general_dilated(
            image, p["conv"], (1, 1), "SAME", dimension_numbers=numbers
        )
        wide = jnp.concatenate([image] * 4, axis=-1)
        numbers = ("NHWC", "OIHW", "NHWC")
        return h, jax.lax.conv_general_dilated(
            wide, p["oihw"], (1, 1), "SAME", dimension_numbers=numbers
        )

    sites = jopt.sites(apply, params, jnp.ones((2, 8)), jnp.ones((1, 5, 5, 4)))
    pattern = prune.NM(1, 2)
    found = prune.masks(params, 0.5, pattern=pattern, sites=sites)
    axes = {"out_in": -1, "heads": -3, "conv": -2, "oihw": -3}
    for name, axis in axes.items():
        np.testing.assert_array_equal(found[name], nm_reference(params[name], 1, 2, axis))


def test_nm_errors_list_every_path():
    params = {"a": np.ones((6, 4)), "b": np.ones((8, 4)), "c": np.ones((3, 10, 2))}
    params = jax.tree.map(jnp.float32, params)
    with pytest.raises(ValueError) as error:
        prune.masks(params, 0.5, pattern=prune.NM(2, 4))
    message = str(error.value)
    assert "does not fit 2 of 3 weights" in message and "`where=`" in message
    assert "`a`: shape (6, 4): 6 inputs (axis -2) are not a multiple of 4" in message
    assert "`c`: shape (3, 10, 2): 10 inputs" in message and "`b`" not in message
    with pytest.raises(ValueError, match=r"`1 <= n < m`"):
        prune.NM(4, 4)
    with pytest.raises(ValueError, match=r"at most a fraction of 0.5"):
        prune.masks(params, 0.6, pattern=prune.NM(2, 4), where="b")


def test_nm_with_sites_that_cannot_tell():
    params = {"table": jnp.ones((8, 4)), "other": jnp.ones((4, 4))}

    def both_ways(p, x):
        return (x @ p["table"]) @ p["table"].T

    sites = jopt.sites(both_ways, params, jnp.ones((2, 8)))
    with pytest.raises(ValueError) as error:
        prune.masks(params, 0.5, pattern=prune.NM(2, 4), sites=sites)
    assert "`table`: its products sum over different axes: [-2, -1]" in str(error.value)
    assert "`other`: no product in `sites` has it as its weight" in str(error.value)


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array | None


def test_trees_of_all_kinds():
    rng = np.random.default_rng(0)
    w = lambda: jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)  # noqa: E731
    params = {"x": Pair(w(), None), "y": [w(), Scaled(w(), jnp.ones(1))], "z": Frozen(w())}
    found = prune.masks(params, 0.5)
    assert found["x"].second is None and found["z"].shape == ()
    masks = [found["x"].first, *found["y"]]
    sizes = [np.abs(params["x"].first), np.abs(params["y"][0]), np.abs(params["y"][1].weight)]
    equal(masks, brute(sizes, 48))
    applied = prune.apply_masks(params, found)
    assert jax.tree.structure(applied) == jax.tree.structure(params)
    np.testing.assert_array_equal(applied["y"][1].weight != 0, masks[2])
    np.testing.assert_array_equal(applied["z"].codes, params["z"].codes)


def test_frameworks():
    equinox = pytest.importorskip("equinox")
    from flax import linen, nnx

    mlp = equinox.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    arrays = equinox.filter(mlp, equinox.is_array)
    linear = nnx.state(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
    variables = linen.Dense(8).init(jax.random.key(0), jnp.ones((1, 4)))
    for params in (arrays, linear, variables):
        masks = prune.masks(params, 0.5)
        assert jax.tree.structure(masks) == jax.tree.structure(params)
        applied = prune.apply_masks(params, masks)
        kept = prune.report(masks)
        assert sum(k.kept for k in kept.values()) == sum(k.total for k in kept.values()) // 2
        for path, leaf in trees.items(applied):
            if path in kept:
                assert int(jnp.sum(leaf != 0)) == kept[path].kept


def test_where_and_report():
    params = random_params()
    found = prune.masks(params, 0.5, where=["a/**", "b/1"], scope="layer")
    assert found["b"][0].shape == ()
    report = prune.report(found)
    assert report == {
        "a/bias": prune.Kept(12, 24), "a/kernel": prune.Kept(192, 384), "b/1": prune.Kept(48, 96)
    }  # fmt: skip
    assert report["b/1"].sparsity == 0.5


def test_apply_masks():
    params = {"a": jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]]), "b": {"c": jnp.ones(2)}}
    row = jnp.array([[True, False]])
    applied = jax.jit(prune.apply_masks)(params, {"a": row, "b": True})
    np.testing.assert_array_equal(applied["a"], [[1, 0], [np.inf, 0]])
    np.testing.assert_array_equal(applied["b"]["c"], [1, 1])
    gone = prune.apply_masks(params, {"a": jnp.array(False), "b": True})
    np.testing.assert_array_equal(gone["a"], np.zeros((2, 2)))


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (ValueError, lambda p: prune.masks(p, 1.0), r"sparsity=1.0.*in \[0, 1\)"),
        (ValueError, lambda p: prune.masks(p, -0.1), r"sparsity=-0.1.*in \[0, 1\)"),
        (ValueError, lambda p: prune.masks(p, float("nan")), r"sparsity=nan"),
        (ValueError, lambda p: prune.masks(p, np.ones(2)), r"in \[0, 1\)"),
        (ValueError, lambda p: prune.masks(p, 0.5, scope="all"), r"scope='all'.*\"layer\""),
        (ValueError, lambda p: prune.masks(p, 0.5, where="**/kernl"), "matched none of 4"),
        (TypeError, lambda p: prune.masks(p, 0.5, pattern="2:4"), "expects a pattern"),
        (TypeError, lambda p: prune.masks(p, 0.5, score=abs), "expects a score"),
        (
            ValueError,
            lambda p: prune.masks(p, 0.5, score=prune.Score(lambda state, params: 1.0)),
            "an array of floats for each weight",
        ),
        (
            TypeError,
            lambda p: prune.masks({**p, "n": np.ones((2, 2), int)}, 0.5, where="n"),
            r"cannot prune `n`, a ndarray of dtype int64",
        ),
        (
            TypeError,
            lambda p: prune.masks({"q": Frozen(jnp.ones((2, 2)))}, 0.5, where="q"),
            "cannot prune `q`, a typed leaf Frozen",
        ),
        (ValueError, lambda p: prune.magnitude(0), r"`magnitude\(0\)` expects a positive"),
        (ValueError, lambda p: prune.apply_masks(p, {"a": True}), "another structure"),
        (
            ValueError,
            lambda p: prune.apply_masks(p, {"a": True, "b": (np.ones((3, 3), bool), True)}),
            r"the mask of `b/0` is bool\[3, 3\], and its weight has shape \[3, 3, 4, 8\]",
        ),
        (
            ValueError,
            lambda p: prune.apply_masks(p, {"a": True, "b": (np.ones((4, 8)), True)}),
            "the mask of `b/0` is float",
        ),
    ],
)
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call(random_params())


def test_exports():
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_params())
    sparsity = jax.ShapeDtypeStruct((), jnp.float32)
    for pattern, scope in ((prune.Unstructured(), "global"), (prune.NM(2, 4), "layer")):
        where = None if scope == "global" else "a/kernel"
        call = jax.jit(
            lambda p, s: prune.masks(p, s, pattern=pattern, scope=scope, where=where)  # noqa: B023
        )
        jax.export.export(call, platforms=("cpu", "cuda", "tpu"))(params, sparsity)


def test_leaves_without_weights():
    params = {"e": jnp.zeros((0, 5)), "w": jnp.arange(1.0, 65).reshape(8, 8), "v": jnp.ones((4, 4))}
    for scope in ("erk", "layer", "global"):
        masks = prune.masks(params, 0.5, scope=scope)
        rows = prune.report(masks)
        assert rows["e"] == (0, 0, "") and rows["e"].sparsity == 0
        assert rows["w"].kept + rows["v"].kept == 40
        full = {name: params[name] for name in ("w", "v")}
        np.testing.assert_array_equal(masks["w"], prune.masks(full, 0.5, scope=scope)["w"])
    assert prune.report(prune.masks({"e": params["e"]}, 0.5, scope="erk"))["e"].total == 0
    traced = jax.jit(lambda s: prune.masks(params, s, scope="erk"))(0.5)
    np.testing.assert_array_equal(traced["w"], prune.masks(params, 0.5, scope="erk")["w"])


def test_a_schedule_is_no_sparsity():
    with pytest.raises(ValueError, match=r"`prune.masks\(params, <schedule>\)` prunes once"):
        prune.masks({"w": jnp.ones((4, 4))}, lambda step: 0.5)
