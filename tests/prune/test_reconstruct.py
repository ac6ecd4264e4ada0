"""Least squares of what masks leave, against NumPy's in float64; never worse than the masks."""

import calibrated_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jopt import prune, trees
from jopt.prune import _reconstruct


def layer(inputs, outputs, examples, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, inputs)) + 2 * rng.normal(size=(examples, 1))
    weight = rng.normal(size=(inputs, outputs))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x, jnp.float32)


def product(weight, x):
    return x @ weight


@pytest.mark.parametrize("room", [2**24, 3 * 400])
def test_each_output_is_numpys_least_squares(room, monkeypatch):
    monkeypatch.setattr(_reconstruct, "_ROOM", room)  # three outputs at once
    _reconstruct.solved.clear_cache()
    weight, x = layer(20, 10, 80)
    masks = prune.masks(weight, 0.5).at[:, 4].set(False).at[:, 5].set(True)
    new = prune.reconstruct(product, weight, [x[:40], x[40:]], masks, damping=0.0)
    np.testing.assert_allclose(
        new, reference.least_squares(weight, x, np.asarray(masks)), rtol=1e-4, atol=1e-4
    )
    assert not np.asarray(new)[~np.asarray(masks)].any()
    np.testing.assert_allclose(new[:, 5], weight[:, 5], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 30),
    st.floats(0, 0.95),
    st.sampled_from([1e-4, 0.01, 1.0]),
    st.integers(0, 10**6),
)
def test_it_is_never_worse_than_the_masks_alone(examples, sparsity, damping, seed):
    weight, x = layer(12, 6, examples, seed)
    masks = jax.random.uniform(jax.random.key(seed), weight.shape) >= sparsity
    new, fine = _reconstruct.solved(weight[None], masks[None], (x.T @ x)[None], damping)
    before = reference.error(weight, np.where(masks, weight, 0), x)
    assert np.all(fine)
    assert reference.error(weight, np.asarray(new[0]), x) <= before * (1 + 1e-4) + 1e-6


def test_masks_of_any_kind_through_a_network():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "conv": jax.random.normal(keys[0], (3, 3, 2, 8)) / 4,
        "layers": jax.random.normal(keys[1], (2, 8, 8)) / 2,
        "bias": jnp.ones(4),
        "out": jax.random.normal(keys[2], (8, 4)),
    }
    batches = list(jax.random.normal(keys[3], (3, 8, 6, 6, 2)) + 0.5)

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        h = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=numbers)
        h = jax.nn.relu(h).mean((1, 2))
        h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])
        return h @ p["out"] + p["bias"][None]

    def error(changed):
        return sum(float(jnp.sum((apply(changed, x) - apply(params, x)) ** 2)) for x in batches)

    dense = {path: jnp.array(True) for path in params}
    for masks in (
        prune.masks(params, 0.6, scope="layer"),
        prune.masks(params, 0.5, pattern=prune.Block((2, 2)), scope="layer"),
        dense | {"layers": jnp.ones((8, 1), bool).at[2:5].set(False)},  # broadcasts
        dense | {"conv": prune.masks(params["conv"], 0.5, pattern=prune.Channel(-2))},
    ):
        new = prune.reconstruct(apply, params, batches, masks)
        assert error(new) < 0.9 * error(prune.apply_masks(params, masks))
        for path, leaf in trees.items(new):
            gone = ~np.broadcast_to(masks[path], leaf.shape)
            assert not np.asarray(leaf)[gone].any()
            if not gone.any():
                assert leaf is params[path]


def test_later_layers_meet_what_earlier_ones_became():
    weight, x = layer(8, 8, 60)
    params = {"a": weight / 4, "b": weight.T}
    masks = {"a": prune.masks(weight, 0.5), "b": prune.masks(weight, 0.3).T}
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    new = prune.reconstruct(apply, params, [x], masks, damping=0.0)
    a = reference.least_squares(params["a"], x, np.asarray(masks["a"]))
    h = np.tanh(np.asarray(x, np.float64) @ a)
    b = reference.least_squares(params["b"], h, np.asarray(masks["b"]))
    np.testing.assert_allclose(new["a"], a, atol=1e-4)
    np.testing.assert_allclose(new["b"], b, atol=2e-3)


def test_nan_dead_inputs_and_low_precision():
    weight, x = layer(10, 4, 50)
    masks = prune.masks(weight, 0.5)
    (i, j), (k, m) = np.argwhere(np.asarray(masks))[0], np.argwhere(~np.asarray(masks))[0]
    bad = weight.at[i, j].set(jnp.nan).at[k, m].set(jnp.nan)
    new = prune.reconstruct(product, bad, [x], masks)
    assert np.argwhere(np.isnan(new)).tolist() == [[i, j]]
    dead = x.at[:, 3].set(0)
    new = prune.reconstruct(product, weight, [dead], masks, damping=0.0)
    np.testing.assert_allclose(new[3], jnp.where(masks[3], weight[3], 0), atol=1e-6)
    small = weight.astype(jnp.bfloat16)
    new = prune.reconstruct(lambda w, x: x @ w.astype(jnp.float32), small, [x], masks)
    assert new.dtype == jnp.bfloat16
    assert not np.asarray(new.astype(jnp.float32))[~np.asarray(masks)].any()


def test_the_inner_function_exports():
    weight, x = layer(10, 4, 50)
    arguments = weight[None], prune.masks(weight, 0.5)[None], (x.T @ x)[None], 0.01
    exported = jax.export.export(_reconstruct.solved, platforms=["cpu", "cuda", "tpu"])(*arguments)
    wanted = _reconstruct.solved(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), exported.call(*arguments), wanted
    )


def test_errors():
    weight, x = layer(10, 4, 3)
    with pytest.raises(ValueError, match="the masks keep all"):
        prune.reconstruct(product, weight, [x], jnp.array(True))
    with pytest.raises(ValueError, match=r"damping=-1"):
        prune.reconstruct(product, weight, [x], prune.masks(weight, 0.5), damping=-1)
    with pytest.raises(ValueError, match="its weight has shape"):
        prune.reconstruct(product, weight, [x], jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"damping=0.0\s*have no one solution"):
        prune.reconstruct(product, weight, [x], prune.masks(weight, 0.2), damping=0.0)
