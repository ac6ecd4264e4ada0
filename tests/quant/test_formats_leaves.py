"""Leaves of every format: products, views, activations, artifacts, sizes, lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formats_reference import FORMATS, faked, stored

import jopt
from jopt import artifact
from jopt.quant import MX, Codebook, Int, Piecewise, Spec, fake_quant, quantize

everywhere = pytest.mark.parametrize("format", FORMATS, ids=str)
W = np.random.default_rng(0).normal(size=(3, 64, 6)).astype(np.float32)


def bits(x):
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("format", [FORMATS[i] for i in (3, 4, 7, 11, 13, 17)], ids=str)
def test_products_and_views_of_leaves(format):
    x = jax.random.normal(jax.random.key(1), (4, 64))
    params = {"w": stored(jnp.asarray(W[0]), format), "v": stored(jnp.asarray(W[1]), format)}
    dense = {name: leaf.materialise() for name, leaf in params.items()}

    def apply(p, x):
        both = jnp.concatenate([p["w"], p["v"]], axis=1)
        heads = p["w"].reshape(4, 16, 6).transpose(0, 2, 1)
        rows = p["v"][jnp.array([3, 60, -1])]
        first, second = jnp.split(both, 2, axis=0)
        part = jax.lax.dynamic_slice(p["w"], (16, 0), (32, 6))
        stack = jnp.stack([p["w"], p["v"]])
        scanned = jax.lax.scan(lambda c, w: (c + jnp.sum(x @ w), x @ w), 0.0, stack)
        return (
            *(x @ p["w"], x @ both, jnp.einsum("bhi,hoi->bho", x.reshape(4, 4, 16), heads)),
            *(rows, x[:, :32] @ first, x[:, 32:] @ second, x[:, :32] @ part, scanned),
            *(p["w"].T[:, 5:37] @ x[:, :32].T, p["v"][::2] * 2.0),
        )

    got = jax.jit(jopt.lift(apply, allow_dense=True))(params, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(apply(dense, x)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_activations_in_these_formats():
    x = jax.random.normal(jax.random.key(1), (5, 64))
    for activation in [format for format in FORMATS if format.granularity != "group"]:
        if activation.needs_values:
            continue
        spec = Spec(Int(8), activation)
        params = quantize({"w": jnp.asarray(W[0])}, spec)

        def product(x, params=params):
            return jopt.lift(lambda p, x: x @ p["w"])(params, x)

        got = jax.jit(product)(x)
        rounded = faked(x, activation, axes=(-2, -1))
        expected = np.asarray(rounded, np.float64) @ np.asarray(
            params["w"].materialise(), np.float64
        )
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        gradient = jax.jit(jax.grad(lambda x, product=product: jnp.sum(product(x))))(x)
        assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


def test_one_artifact_of_all_formats_has_their_true_bits(tmp_path):
    kept = [FORMATS[i] for i in (0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 17, 18)]
    params = {f"w{i:02}": stored(jnp.asarray(W[:2]), format) for i, format in enumerate(kept)}

    def apply(params, x):
        outputs = [x @ w[0] + x @ w[1] for w in params.values()]
        return jnp.stack(outputs)

    x = jax.random.normal(jax.random.key(1), (3, 64))
    manifest = artifact.save(tmp_path / "model", apply, params, x)
    loaded = artifact.load(tmp_path / "model")
    expected = jax.jit(jopt.lift(apply))(params, x)
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-5)
    held = dict(zip(loaded.arrays, jax.tree.leaves(params), strict=True))
    for name, array in loaded.arrays.items():
        assert bits(array) == bits(held[name]) and array.dtype == held[name].dtype
    count = W[:2].size
    for leaf, format in zip(manifest["leaves"], kept, strict=True):
        codes = leaf["arrays"][0]
        assert codes["name"].endswith("/codes") and codes["bits"] == format.bits
        assert codes["bytes"] <= -(-count * format.bits // 8)
        size = jopt.size({"w": params[leaf["path"]]})
        assert leaf["bits"] == size.bits and leaf["parameters"] == count
        values = np.asarray(params[leaf["path"]].materialise())
        assert leaf["nonzeros"] == np.count_nonzero(values)


def test_sizes_count_scales_and_tables():
    w = jnp.asarray(W[0])  # 64 x 6
    expected = {
        MX("mxfp4"): 384 * 4 + 12 * 8,
        Codebook(5, granularity="channel"): 384 * 3 + 6 * 5 * 32 + 6 * 32,
        Piecewise(4): 384 * 4 + 6 * (32 + 8),
    }
    for format, count in expected.items():
        assert jopt.size(stored(w, format)).bits == count


def test_all_lower_everywhere():
    leaves = {
        str(i): jax.eval_shape(lambda w, f=format: quantize({"w": w}, f)["w"], jnp.asarray(W[0]))
        for i, format in enumerate(FORMATS)
    }
    arrays, structure = jax.tree.flatten(leaves)
    x = jax.ShapeDtypeStruct((5, 64), jnp.float32)
    w = jax.ShapeDtypeStruct((64, 6), jnp.bfloat16)

    def f(arrays, w, x):
        params = jax.tree.unflatten(structure, arrays)
        products = jopt.lift(lambda p, x: [x @ leaf for leaf in p.values()])(params, x)
        return products, [fake_quant(w, format) for format in FORMATS]

    exported = jax.export.export(jax.jit(f), platforms=["cpu", "cuda", "tpu"])(arrays, w, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
