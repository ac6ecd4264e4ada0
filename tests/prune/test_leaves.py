"""Packed leaves: bits of the weight, bits that they take, slices, derivatives, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jopt
from jopt import prune
from jopt.prune import CSR, NM24, BitSparse, PackedLeaf
from jopt.quant import Int, Spec, lora, qat, quantize, trainable
from jopt.trace import lift

FORMS = {"nm24": NM24, "bits": BitSparse, "csr": CSR}
DTYPES = {"float32": np.int32, "bfloat16": np.int16, "float16": np.int16, "float64": np.int64}
DENSE = np.float32([[0, 1.5], [2, 0], [0, 0], [-3, 4]])


def two_of_four(rng, shape, axis, density=1.0):
    """Weights of which at most two of every four along `axis` are not zero."""
    moved = np.moveaxis(np.empty(shape), axis, -1).shape
    order = np.argsort(rng.random((*moved[:-1], moved[-1] // 4, 4)), axis=-1).reshape(moved)
    w = rng.standard_normal(moved) * (order < 2) * (rng.random(moved) < density)
    return np.moveaxis(w + 0.0, -1, axis)


def same_bits(found, weight):
    """Equal in every bit, but that -0 counts as 0."""
    weight = np.where(weight == 0, np.zeros_like(weight), weight)
    found = np.asarray(found)
    assert found.shape == weight.shape and found.dtype == weight.dtype
    ints = DTYPES.get(weight.dtype.name, weight.dtype)
    np.testing.assert_array_equal(found.view(ints), weight.view(ints))


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([*FORMS]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from([(4, 3), (8, 5), (12, 33), (3, 20, 7), (1, 4, 1), (2, 8, 0)]),
    st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.integers(0, 2**31),
)
def test_every_bit_comes_back(form, dtype, shape, density, seed):
    rng = np.random.default_rng(seed)
    w = two_of_four(rng, shape, -2, density).astype(jnp.dtype(dtype))
    odd = [np.nan, np.inf, -np.inf, -0.0, np.finfo(np.float32).tiny / 8, 65504.0]
    strange = (rng.random(w.shape) < 0.2) & (w != 0)
    w[strange] = rng.choice(odd, int(strange.sum())).astype(w.dtype)
    leaf = prune._pack._forms("w", w, [form], None)[0].get(form)
    if leaf is None:  # so dense that it was not tried
        assert form != "nm24" and density > 0.5
        return
    assert isinstance(leaf, FORMS[form]) and leaf.shape == shape and leaf.dtype == w.dtype
    whole = type(leaf).materialise
    same_bits(jax.jit(jax.vmap(whole) if len(shape) == 3 else whole)(leaf), w)


def test_layout_of_the_formats():
    packed = {form: prune.pack(DENSE, form, where="**")[0] for form in ("nm24", "csr")}
    np.testing.assert_array_equal(packed["nm24"].values, [[2, 1.5], [-3, 4]])
    # In the first column inputs 1 and 3, in the second 0 and 3.
    np.testing.assert_array_equal(packed["nm24"].places, [[1 | 3 << 2, 0 | 3 << 2]])
    w = np.zeros((40, 2), np.float32)
    w[3, 1], w[17, 0], w[16, 0] = 7, 8, 9
    bits = prune.pack(w, "bits", where="**")[0]
    np.testing.assert_array_equal(bits.values, [7, 9, 8])
    np.testing.assert_array_equal(bits.words, [1 << 7, 1 << 0 | 1 << 2, 0])
    rows = prune.pack(w, "csr", where="**")[0]
    np.testing.assert_array_equal(rows.counts, [2, 1])
    np.testing.assert_array_equal(rows.inputs[:2].T, [[16, 17], [3, 0]])
    np.testing.assert_array_equal(rows.values[:2].T, [[9, 8], [7, 0]])
    scipy = pytest.importorskip("scipy.sparse").csr_array(w.T)
    np.testing.assert_array_equal(np.diff(scipy.indptr), rows.counts)


def test_sizes_are_those_of_the_formats():
    rng = np.random.default_rng(0)
    w = two_of_four(rng, (64, 32), -2).astype(np.float32)
    leaf = prune.pack(w, "nm24", where="**")[0]
    count = w.size
    assert jopt.size(leaf) == (count, np.count_nonzero(w), count // 4 * (2 * 32 + 4))
    half = prune.pack(w.astype(jnp.bfloat16), "nm24", where="**")[0]
    assert jopt.size(half).bits == count // 4 * (2 * 16 + 4)
    w[rng.random(w.shape) < 0.9] = 0
    nonzeros = np.count_nonzero(w)
    assert jopt.size(prune.pack(w, "bits", where="**")[0]) == (
        *(count, nonzeros, count + 32 * nonzeros),
    )
    w = np.zeros((64, 32), np.float32)
    w[:4] = 1  # four inputs of every output
    assert jopt.size(prune.pack(w, "csr", where="**")[0]).bits == 32 * (4 * (32 + 16) + 32)


def test_the_smallest_is_taken_and_what_stays_dense_is_reported():
    rng = np.random.default_rng(0)
    params = {
        "pairs": two_of_four(rng, (16, 8), -2).astype(np.float32),
        "some": rng.standard_normal((64, 64)) * (rng.random((64, 64)) < 0.6),
        "few": rng.standard_normal((512, 64)) * (np.arange(512) % 128 == 0)[:, None],
        "full": rng.standard_normal((16, 16)),
        "bias": np.zeros(9, np.float32),
        "ids": np.zeros((9, 9), np.int32),
    }
    params = jax.tree.map(lambda x: x if x.dtype == np.int32 else x.astype(np.float32), params)
    packed, report = prune.pack(params)
    kinds = {name: type(leaf) for name, leaf in packed.items()}
    assert kinds == {
        **{"pairs": NM24, "some": BitSparse, "few": CSR},
        **dict.fromkeys(("full", "bias", "ids"), np.ndarray),
    }
    assert set(report) == {"pairs", "some", "few", "full"}
    assert report["full"].form == "dense" and "100.0% of its weights" in report["full"].reason
    for name, row in report.items():
        assert row.bits == jopt.size(packed[name]).bits <= row.bits_before
        assert row.bits_before == jopt.size(params[name]).bits
    jax.tree.map(np.testing.assert_array_equal, prune.unpack(packed), params)
    # What no product has as its weight is left, unless it is named.
    found = jopt.sites(lambda p, x: x @ p["few"], params, np.zeros((1, 512), np.float32))
    packed, rows = prune.pack(params, sites=found)
    assert isinstance(packed["few"], CSR) and packed["some"] is params["some"]
    assert rows["some"].reason == "no product in `sites` has it as its weight"
    # A form that fits but does not pay is no error.
    again, report = prune.pack(params, "csr", where=["some", "few"])
    assert report["some"].reason.startswith("`csr` would take") and isinstance(again["few"], CSR)


def test_errors():
    w = np.ones((8, 8), np.float32)
    params = {
        "good": DENSE,
        "bad": w,
        "odd": np.zeros((6, 8), np.float32),
        "conv": w.reshape(2, 2, 4, 4),
    }
    with pytest.raises(ValueError) as error:
        prune.pack(params, "nm24")
    text = str(error.value)
    assert "`bad`: 16 of 16 groups of 4 along axis -2 have more than 2 weights" in text
    assert "`odd`: shape (6, 8): axis -2 does not divide" in text and "`conv`" in text
    assert "does not fit 3 of 4" in text and "`good`" not in text
    packed, report = prune.pack(params, "nm24", unfit="skip")
    assert isinstance(packed["good"], NM24) and packed["bad"] is w
    assert "16 of 16 groups" in report["bad"].reason
    with pytest.raises(ValueError, match=r"`conv`: shape \(2, 2, 4, 4\) is not of a matrix"):
        prune.pack(params, "csr")
    with pytest.raises(ValueError, match='`form` is "smallest"'):
        prune.pack(params, "coo")
    with pytest.raises(ValueError, match="matched none"):
        prune.pack(params, where="kernel")
    with pytest.raises(TypeError, match="cannot pack `bias`, a ndarray"):
        prune.pack({"bias": np.zeros(3)}, where="bias")
    with pytest.raises(TypeError, match="cannot pack `good`, a NM24"):
        prune.pack(packed, where="good")
    with pytest.raises(TypeError, match="outside `jit`"):
        jax.jit(lambda p: prune.pack(p)[0])({"w": w})
    with pytest.raises(ValueError, match="would make `good` dense"):
        lift(lambda p: p["good"] * 2)(packed)
    rows = prune.pack({"w": np.eye(64, dtype=np.float32)}, "bits")[0]
    with pytest.raises(ValueError, match="met a `BitSparse` that holds"):
        lift(lambda p: jax.lax.map(lambda row: row @ row, p["w"]))(rows)


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_sliced_and_padded_to_the_longest(form):
    rng = np.random.default_rng(1)
    w = two_of_four(rng, (3, 64, 8), -2, 0.1).astype(np.float32)
    w[1] = 0
    leaf = prune.pack(w, form, where="**")[0]
    if form == "bits":
        most = max(np.count_nonzero(layer) for layer in w)
        assert leaf.values.shape == (3, most)
    x = rng.standard_normal((5, 64)).astype(np.float32)

    def scanned(w, x):
        return jax.lax.scan(lambda h, w: ((h @ w) @ w.T, None), x, w)[0]

    wanted = np.float64(x)
    for layer in np.float64(w):
        wanted = wanted @ layer @ layer.T
    np.testing.assert_allclose(jax.jit(lift(scanned))(leaf, x), wanted, atol=1e-5)
    one = jax.jit(lift(lambda w, x, i: x @ w[i] + x @ w[2] + x @ w[0:1][0]))
    wanted = x @ w[1] + x @ w[2] + x @ w[0]
    np.testing.assert_allclose(one(leaf, x, 1), wanted, rtol=1e-4, atol=1e-4)
    many = jax.jit(jax.vmap(lift(lambda w, x: x @ w), in_axes=(0, None)))
    np.testing.assert_allclose(many(leaf, x), x @ w, rtol=1e-4, atol=1e-4)
    kept = {met.operation: met.dense for met in jopt.trace.explain(lambda w, x: x @ w[2], leaf, x)}
    assert not any(kept.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(16, 6), (256, 512)])  # below and above what CSR takes up
def test_derivatives_are_those_of_the_dense_weight(form, shape):
    rng = np.random.default_rng(2)
    w = two_of_four(rng, shape, -2, 0.05).astype(np.float32)
    leaf, x = prune.pack(w, form, where="**")[0], rng.standard_normal((3, shape[0]))
    x = jnp.asarray(x, jnp.float32)

    def loss(values, x, leaf):
        return jnp.sum(jnp.sin(lift(lambda w, x: x @ w)(_with(leaf, values), x)))

    value, (dv, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(leaf.values, x, leaf)
    y = np.float64(x) @ w
    np.testing.assert_allclose(value, np.sin(y).sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, np.cos(y) @ np.float64(w).T, rtol=1e-4, atol=1e-4)
    dw = np.float64(x).T @ np.cos(y)
    # The gradient as a leaf stands for the dense one, at the places that are stored.
    at = np.asarray(_with(leaf, jnp.ones_like(leaf.values)).materialise()) != 0
    assert at.sum() >= np.count_nonzero(w) and np.all(at | (w == 0))
    np.testing.assert_allclose(
        _with(leaf, dv).materialise(), np.where(at, dw, 0), rtol=1e-4, atol=1e-4
    )
    tangent = jax.jvp(lambda v: loss(v, x, leaf), (leaf.values,), (jnp.ones_like(leaf.values),))
    np.testing.assert_allclose(tangent[1], (dw * at).sum(), rtol=1e-3)


def _with(leaf, values):
    return dataclasses.replace(leaf, values=values)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", [Int(8), Int(4), Int(3)], ids=str)
def test_codes_are_packed_and_multiplied_as_ever(form, format):
    rng = np.random.default_rng(3)
    w = two_of_four(rng, (128, 16), -2, 0.1).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((4, 128)), jnp.float32)
    stored = quantize({"w": jnp.asarray(w)}, Spec(format, Int(8)))
    packed, report = prune.pack(stored, form, where="w")
    assert report["w"].form == form and isinstance(packed["w"], PackedLeaf)
    same_bits(packed["w"].materialise(), np.asarray(stored["w"].materialise()))
    apply = lambda p, x: x @ p["w"]  # noqa: E731
    np.testing.assert_array_equal(jax.jit(lift(apply))(packed, x), jax.jit(lift(apply))(stored, x))
    assert "s32" in jax.jit(lift(apply)).lower(packed, x).compile().as_text()
    size = jopt.size(packed)
    assert size[:2] == jopt.size(stored)[:2] and size.bits == report["w"].bits
    if form == "nm24":
        codes = w.size // 4 * (2 * format.bits + 4)
        assert size.bits == codes + 32 * stored["w"].scale.size
    back = prune.unpack(packed)["w"]
    np.testing.assert_array_equal(
        np.asarray(back.codes, np.int8), np.asarray(stored["w"].codes, np.int8)
    )
    assert jax.tree.structure(back) == jax.tree.structure(stored["w"])
    # An adapter on packed codes, and packed codes inside an adapter's base.
    adapted = lora(packed, "w", 2, key=jax.random.key(0))
    np.testing.assert_allclose(lift(apply)(adapted, x), lift(apply)(stored, x), rtol=1e-5)
    inside = prune.pack(lora(stored, "w", 2, key=jax.random.key(0)), form, where="w")[0]
    np.testing.assert_allclose(lift(apply)(inside, x), lift(apply)(stored, x), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_packed_codes_of_stacked_layers_are_scanned(form):
    w = two_of_four(np.random.default_rng(4), (3, 64, 64), -2, 0.1).astype(np.float32)
    stored = quantize(jnp.asarray(w), Spec(Int(8), Int(8)))
    packed = prune.pack(stored, form, where="**")[0]
    scanned = lift(lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0])
    x = jax.random.normal(jax.random.key(0), (2, 64))
    assert isinstance(packed, PackedLeaf)
    np.testing.assert_array_equal(jax.jit(scanned)(packed, x), jax.jit(scanned)(stored, x))


def test_what_trains():
    w = {"w": jnp.eye(64), "bias": jnp.ones(64)}
    leaf = prune.pack(w, "bits")[0]
    assert jax.tree.leaves(trainable(leaf)) == [True, False, True]  # bias, words, values
    grads = jax.grad(lambda p: jnp.sum(lift(lambda p: p["w"] @ p["bias"])(p)), allow_int=True)(leaf)
    np.testing.assert_array_equal(grads["w"].values, np.ones(64))
    codes = prune.pack(quantize(w, Int(8)), "bits")[0]
    assert not any(jax.tree.leaves(trainable(codes["w"])))
    adapted = lora({"w": quantize(w, Int(8))["w"]}, "w", 1, key=jax.random.key(0))
    inside = trainable(prune.pack(adapted, "bits")[0])["w"].leaf
    assert inside.down and inside.up and not any(jax.tree.leaves(inside.base))


def test_zero_points_and_leaves_that_train():
    w = jnp.zeros((64, 8)).at[0].set(1.0)
    asymmetric = quantize({"w": w}, Int(8, symmetric=False))
    assert np.asarray(asymmetric["w"].codes)[1:].all()  # a pruned weight's code is not 0
    packed, report = prune.pack(asymmetric)
    assert packed["w"] is asymmetric["w"] and "% of its weights" in report["w"].reason
    trained = qat({"w": w}, Int(8))
    with pytest.raises(TypeError, match="cannot pack `w`, a FakeQuant"):
        prune.pack(trained, where="w")
    with pytest.raises(ValueError, match="matched none"):
        prune.pack(trained)
