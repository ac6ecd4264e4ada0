"""SparseGPT against its paper in float64, alone and through a network, and its edges."""

import calibrated_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jopt
from jopt import prune, quant, trees
from jopt.prune import _sparsegpt

PATTERNS = {
    "unstructured": (prune.Unstructured(), None),
    "2:4": (prune.NM(2, 4), (2, 4)),
    "4:8": (prune.NM(4, 8), (4, 8)),
}


def layer(inputs, outputs, seed=0):
    """A weight, and correlated inputs of different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    x *= np.exp(0.5 * rng.normal(size=inputs))
    weight = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x, jnp.float32)


def product(weight, x):
    return x @ weight


def gram(x):
    x = np.asarray(x, np.float64)
    return x.T @ x


@pytest.mark.parametrize("bits", [None, 4], ids=["", "4 bits"])
@pytest.mark.parametrize("name", PATTERNS)
def test_weights_are_those_of_the_paper(name, bits):
    pattern, nm = PATTERNS[name]
    weight, x = layer(80, 24)
    format = None if bits is None else quant.Int(bits)
    found = prune.sparsegpt(
        product,
        weight,
        [x[:100], x[100:200]],
        0.5,
        pattern=pattern,
        block_size=32,
        format=format,
    )
    found = np.asarray(found if bits is None else found.materialise())
    new, mask = reference.sparsegpt(weight, gram(x[:200]), 0.5, nm=nm, block=32, bits=bits)
    np.testing.assert_allclose(found, new, atol=2e-6)
    np.testing.assert_array_equal(found == 0, new == 0)
    assert not found[~mask].any() and (~mask).sum() == mask.size // 2


def test_blocks_follow_the_inputs():
    some, groups = prune.Unstructured(), prune.NM(2, 4)
    assert [_sparsegpt.fitting(None, some, n) for n in (7, 256, 1024, 4096)] == [7, 16, 64, 128]
    assert [_sparsegpt.fitting(None, groups, n) for n in (8, 256)] == [8, 128]
    weight, x = layer(48, 8)
    found = np.asarray(prune.sparsegpt(product, weight, [x], 0.5))
    new, _ = reference.sparsegpt(weight, gram(x), 0.5, block=16)
    np.testing.assert_allclose(found, new, atol=2e-6)
    assert np.any(np.abs(found - reference.sparsegpt(weight, gram(x), 0.5)[0]) > 1e-3)


def test_other_sparsities_dampings_and_a_rest_of_a_block():
    weight, x = layer(50, 7)
    found = prune.sparsegpt(product, weight, [x], 0.73, block_size=16, damping=0.1)
    new, mask = reference.sparsegpt(weight, gram(x), 0.73, block=16, damping=0.1)
    np.testing.assert_allclose(found, new, atol=2e-6)
    assert np.sum(np.asarray(found) == 0) == round(0.73 * 350) == np.sum(~mask)
    stronger = prune.NM(1, 5)
    found = prune.sparsegpt(product, weight, [x], 0.8, pattern=stronger, block_size=16)
    new, _ = reference.sparsegpt(weight, gram(x), 0.8, nm=(1, 5), block=20)
    np.testing.assert_allclose(found, new, atol=2e-6)


@pytest.mark.parametrize("before", [0.0, 0.3, 0.5, 0.6])
@pytest.mark.parametrize("place", ["first", "last", "among"])
def test_zeros_beforehand_count_wherever_they_are(before, place):
    weight, x = layer(96, 10)
    rows = round(before * 96)
    chosen = {"first": np.arange(rows), "last": 96 - 1 - np.arange(rows)}
    chosen["among"] = np.random.default_rng(0).permutation(96)[:rows]
    weight = weight.at[chosen[place]].set(0)
    found = prune.sparsegpt(product, weight, [x], 0.5, block_size=20)
    zeros = np.asarray(found) == 0
    assert zeros[chosen[place]].all() and zeros.sum() == max(480, rows * 10)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.floats(0, 1), st.integers(1, 40), st.integers(0))
def test_shares_add_up(rows, outputs, sparsity, block, seed):
    rng = np.random.default_rng(seed)
    zeros = rng.integers(0, outputs + 1, (2, rows)) * rng.integers(0, 2, (2, rows))
    block = min(block, rows)
    found = _sparsegpt.shares(zeros, outputs, sparsity, block)
    ends = range(0, rows, block)
    gone = np.stack([zeros[:, end : end + block].sum(1) for end in ends], 1)
    sizes = np.array([min(block, rows - end) * outputs for end in ends])
    goal = round(sparsity * rows * outputs)
    np.testing.assert_array_equal(found.sum(1), np.maximum(goal, gone.sum(1)))
    assert np.all(found >= gone) and np.all(found <= sizes)


def network(params, x):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])
    return h @ params["last"]


def parameters(width=32, depth=3, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    scale = 1.2 / width**0.5
    return {
        "layers": jax.random.normal(keys[0], (depth, width, width)) * scale,
        "last": jax.random.normal(keys[1], (width, width)) * scale,
    }


def correlated(count, width=32):
    keys = jax.random.split(jax.random.key(9), count + 1)
    mix = jax.random.normal(keys[0], (width // 4, width)) / 2
    few = [jax.random.normal(key, (64, width // 4)) @ mix for key in keys[1:]]
    return [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys[1:], few, strict=True)]


@pytest.mark.parametrize("name", PATTERNS)
def test_each_layer_meets_what_the_pruned_ones_before_it_give(name):
    pattern, nm = PATTERNS[name]
    params, batches = parameters(), correlated(3)
    _sparsegpt.pruned.clear_cache()
    found = prune.sparsegpt(network, params, batches, 0.5, pattern=pattern, block_size=128)
    assert _sparsegpt.pruned._cache_size() == 1  # one program for all layers
    h = np.concatenate([np.asarray(x, np.float64) for x in batches])
    for i in range(3):
        new, _ = reference.sparsegpt(params["layers"][i], gram(h), 0.5, nm=nm)
        np.testing.assert_array_equal(found["layers"][i] == 0, new == 0)
        np.testing.assert_allclose(found["layers"][i], new, atol=1e-4)
        h = np.tanh(h @ new)
    new, _ = reference.sparsegpt(params["last"], gram(h), 0.5, nm=nm)
    np.testing.assert_allclose(found["last"], new, atol=1e-4)


def test_the_published_order():
    weight, x = layer(64, 32)
    errors = {}
    for name, (pattern, _) in PATTERNS.items():
        masks = prune.masks(weight, 0.5, pattern=pattern, scope="layer")
        found = (
            prune.sparsegpt(product, weight, [x], 0.5, pattern=pattern),
            prune.wanda(product, weight, [x], 0.5, pattern=pattern),
            prune.apply_masks(weight, masks),
        )
        errors[name] = [reference.error(weight, np.asarray(new), x) for new in found]
        assert errors[name][0] < 0.8 * errors[name][1] and errors[name][1] < errors[name][2]
    assert errors["unstructured"][0] < errors["4:8"][0] < errors["2:4"][0]


@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_zero_stays_zero_and_counts_as_gone(name):
    pattern, _ = PATTERNS[name]
    weight, x = layer(32, 32)
    first = prune.apply_masks(weight, prune.masks(weight, 0.25, pattern=prune.NM(3, 4)))
    found = prune.sparsegpt(product, first, [x], 0.5, pattern=pattern)
    assert not np.asarray(found)[np.asarray(first) == 0].any()
    assert np.sum(np.asarray(found) == 0) == 512
    # More zeros than asked for: none comes back, none goes.
    again = prune.sparsegpt(product, found, [x], 0.5, pattern=pattern)
    np.testing.assert_array_equal(again == 0, found == 0)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_nan_stays_and_moves_nothing_else(name):
    pattern, _ = PATTERNS[name]
    weight, x = layer(32, 32)
    found = prune.sparsegpt(product, weight.at[4, 2].set(jnp.nan), [x], 0.5, pattern=pattern)
    assert np.argwhere(np.isnan(found)).tolist() == [[4, 2]]
    # Pruned beforehand it is a zero like any other.
    masks = jnp.ones((32, 32), bool).at[4, 2].set(False)
    clean = prune.apply_masks(weight.at[4, 2].set(jnp.nan), masks)
    assert np.isfinite(prune.sparsegpt(product, clean, [x], 0.5, pattern=pattern)).all()


def test_weights_of_inputs_that_were_always_zero_go_first():
    weight, x = layer(32, 32)
    dead = x.at[:, jnp.array([3, 9, 20])].set(0)
    found = np.asarray(prune.sparsegpt(product, weight, [dead], 0.25))
    assert not found[[3, 9, 20]].any() and np.sum(found == 0) == 256
    found = np.asarray(prune.sparsegpt(product, weight, [dead], 0.5, pattern=prune.NM(2, 4)))
    assert not found[[3, 9, 20]].any()
    # An expert that got nothing is pruned by magnitude, and changed by nothing.
    experts = jnp.stack([weight, weight])
    inputs = jnp.stack([x, jnp.zeros_like(x)])
    apply = lambda w, x: jnp.einsum("eio,ebi->ebo", w, x)  # noqa: E731
    found = prune.sparsegpt(apply, experts, [inputs], 0.5, block_size=32)
    np.testing.assert_array_equal(
        found[1], prune.apply_masks(weight, prune.masks(weight, 0.5, scope="layer"))
    )
    np.testing.assert_array_equal(
        found[0], prune.sparsegpt(product, weight, [x], 0.5, block_size=32)
    )


JOINT = [
    ("unstructured", quant.Int(4, symmetric=False)),
    ("unstructured", quant.Int(4, granularity="tensor")),
    ("2:4", quant.Int(4, granularity="group", group_size=8)),
    ("2:4", quant.FP8("e4m3")),
    ("2:4", quant.NF4(group_size=32)),
]


@pytest.mark.parametrize(("name", "format"), JOINT, ids=str)
def test_joint_with_any_format(name, format):
    pattern, _ = PATTERNS[name]
    weight, x = layer(32, 32)
    joint = prune.sparsegpt(product, weight, [x], 0.5, pattern=pattern, format=format)
    plain = quant.quantize(weight, format)
    assert jax.tree.structure(joint) == jax.tree.structure(plain)
    assert trees.size(joint).bits == trees.size(plain).bits
    np.testing.assert_allclose(joint.scale, plain.scale, 1e-6)
    values = np.asarray(joint.materialise())
    if name == "2:4":
        assert ((values != 0).reshape(8, 4, 32).sum(1) <= 2).all()
    assert np.mean(values == 0) >= 0.5
    # Better than rounding to the same grid what was pruned without regard to it.
    sparse = prune.sparsegpt(product, weight, [x], 0.5, pattern=pattern)
    after = np.asarray(format.decode(format.encode(sparse, joint.grid), joint.grid))
    margin = 0.95 if format.bits == 4 else 1.02  # eight bits leave little to make good
    assert reference.error(weight, values, x) < margin * reference.error(weight, after, x)


def test_joint_leaves_of_stacked_layers():
    params, batches = parameters(), correlated(2)
    joint = prune.sparsegpt(network, params, batches, 0.5, format=quant.Int(4))
    assert jax.tree.structure(joint) == jax.tree.structure(quant.quantize(params, quant.Int(4)))
    first = prune.sparsegpt(product, params["layers"][0], batches, 0.5, format=quant.Int(4))
    np.testing.assert_array_equal(joint["layers"].codes[0], first.codes)
    np.testing.assert_array_equal(joint["layers"].scale[0], first.scale)
    assert np.isfinite(jax.jit(jopt.lift(network))(joint, batches[0])).all()


def test_low_precision_and_policies():
    params, batches = parameters(), correlated(2)
    small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

    def run(params, x):
        def step(h, w):
            return jnp.tanh(h @ w.astype(jnp.float32)), None

        return jax.lax.scan(step, x, params["layers"])[0] @ params["last"].astype(jnp.float32)

    found = prune.sparsegpt(run, small, batches, [("layers", 0.75), ("last", None)])
    assert found["layers"].dtype == jnp.bfloat16
    assert np.mean(np.asarray(found["layers"].astype(jnp.float32)) == 0) == 0.75
    np.testing.assert_array_equal(found["last"], small["last"])


@pytest.mark.parametrize(("name", "format"), [("unstructured", None), ("4:8", quant.Int(4))])
def test_the_inner_function_exports_and_maps(name, format):
    pattern, _ = PATTERNS[name]
    weight, x = layer(32, 32)
    hessian = (x.T @ x)[None]

    def run(weight, hessian):
        options = {"pattern": pattern, "format": format, "block": 16}
        counts = jnp.full((1, 2), 256, jnp.uint32)
        return _sparsegpt.pruned(weight, hessian, jnp.arange(32), 0.01, counts, **options).values

    values = jax.jit(jax.vmap(run))(weight[None, None], hessian[None])[0]
    np.testing.assert_allclose(values, run(weight[None], hessian), atol=1e-5)
    exported = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(
        weight[None], hessian
    )
    np.testing.assert_allclose(exported.call(weight[None], hessian), values, atol=1e-5)


def test_errors():
    weight, x = layer(32, 32)
    with pytest.raises(ValueError, match="block_size=0"):
        prune.sparsegpt(product, weight, [x], 0.5, block_size=0)
    zeros = quant.Codebook(values=(-1.0, 1.0))
    with pytest.raises(ValueError, match="cannot hold the zeros"):
        prune.sparsegpt(product, weight, [x], 0.5, format=zeros)
    with pytest.raises(ValueError, match=r"damping=0.* is not positive definite"):
        prune.sparsegpt(product, weight, [x[:3]], 0.5, damping=0.0)
