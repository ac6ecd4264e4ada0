"""Packed leaves in artifacts: the same bits, in the bytes that the formats promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import artifact, prune
from jopt.quant import Int, Spec, quantize
from jopt.trace import lift

pytest.importorskip("safetensors")
pytest.importorskip("flatbuffers")

HEADER = 600  # bytes of names, shapes and padding


def model(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def pruned(form, dtype=np.float32):
    """Weights of one density, each output's inputs as many as any other's."""
    rng = np.random.default_rng(0)

    def one(inputs, outputs):
        kept = {"nm24": 2, "bits": 0.4, "csr": 0.05}[form]
        if form == "nm24":
            ranks = np.argsort(rng.random((inputs // 4, 4, outputs)), axis=1)
            mask = (ranks < kept).reshape(inputs, outputs)
        else:
            ranks = np.argsort(np.argsort(rng.random((inputs, outputs)), axis=0), axis=0)
            mask = ranks < round(kept * inputs)
        return jnp.asarray(np.where(mask, rng.standard_normal(mask.shape), 0), dtype)

    return {"a": one(320, 640), "b": one(640, 80)}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("form", ["nm24", "bits", "csr"])
def test_round_trip_and_bytes(tmp_path, form, dtype):
    params = pruned(form, dtype)
    packed, report = prune.pack(params, form)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 320)), dtype)
    manifest = artifact.save(tmp_path / "m", model, packed, x)
    loaded = artifact.load(tmp_path / "m")
    expected = jax.tree.leaves(packed)
    for array, kept in zip(loaded.arrays.values(), expected, strict=True):
        assert array.dtype == kept.dtype and array.tobytes() == np.asarray(kept).tobytes()
    found, wanted = (np.float64(y) for y in (loaded(x), jax.jit(lift(model))(packed, x)))
    # Between programs XLA may or may not round what lies between two operations to bfloat16.
    slack = 0.0 if dtype == np.float32 else 0.02
    np.testing.assert_allclose(found, wanted, rtol=0, atol=slack * np.abs(wanted).max())

    count = sum(w.size for w in params.values())
    nonzeros = sum(np.count_nonzero(w) for w in params.values())
    width = params["a"].dtype.itemsize * 8
    bits = {
        "nm24": count // 4 * (2 * width + 2 * 2),
        "bits": count + width * nonzeros,
        "csr": (width + 16) * nonzeros + 32 * (640 + 80),
    }[form]
    assert manifest["sizes"]["bits"] == bits == sum(row.bits for row in report.values())
    found = (tmp_path / "m" / "weights.safetensors").stat().st_size
    assert found == manifest["sizes"]["weights_bytes"] == artifact.weights_bytes(packed)
    assert found <= bits // 8 + HEADER
    if form != "csr":  # of which inputs and counts, numbers below 320 and 640, take less on disk
        assert found >= 0.98 * bits // 8
    assert {leaf["type"] for leaf in manifest["leaves"]} == {type(packed["a"]).__name__}
    rebuilt = _filled(packed, loaded.arrays)
    jax.tree.map(np.testing.assert_array_equal, prune.unpack(rebuilt), params)


def test_codes_within(tmp_path):
    params = pruned("nm24")
    stored = quantize(params, Spec(Int(4), Int(8)))
    packed, _ = prune.pack(stored, "nm24")
    x = jax.random.normal(jax.random.key(0), (3, 320))
    manifest = artifact.save(tmp_path / "m", model, packed, x)
    loaded = artifact.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded(x), jax.jit(lift(model))(packed, x))
    np.testing.assert_array_equal(loaded(x), jax.jit(lift(model))(stored, x))
    count = sum(w.size for w in params.values())
    bits = count // 4 * (2 * 4 + 2 * 2) + 32 * (640 + 80)
    assert manifest["sizes"]["bits"] == bits
    assert manifest["sizes"]["weights_bytes"] <= bits // 8 + 1200
    names = [entry["name"] for entry in manifest["leaves"][0]["arrays"]]
    assert names == ["a/leaf/codes/values", "a/leaf/codes/places", "a/leaf/scale"]


def test_layers_that_differ_cost_little_on_disk(tmp_path):
    """Padding is zeros, which an artifact leaves out."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2, 128, 128)) * (rng.random((2, 128, 128)) < 0.5)
    w[1] *= rng.random((128, 128)) < 0.2
    packed, _ = prune.pack({"w": jnp.asarray(w, jnp.float32)}, "bits")
    leaf = packed["w"]
    assert leaf.values.shape[-1] == np.count_nonzero(w[0])
    bits = w.size + 32 * np.count_nonzero(w) + leaf.values.size  # and a bitmap of the values
    x = jnp.ones((2, 128))
    apply = lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]  # noqa: E731
    artifact.save(tmp_path / "m", apply, packed, x)
    assert (tmp_path / "m" / "weights.safetensors").stat().st_size <= bits / 8 + HEADER


def _filled(packed, arrays):
    structure = jax.tree.structure(packed)
    assert structure.num_leaves == len(arrays)
    assert all(dataclasses.is_dataclass(leaf) for leaf in packed.values())
    return structure.unflatten(map(jnp.asarray, arrays.values()))
