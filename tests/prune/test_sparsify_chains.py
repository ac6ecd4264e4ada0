"""`sparsify` at the end of every chain and inside every wrapper of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_sparse import RAMP, Pair, Scaled, check_zeros, random_params, train

from jopt import prune


@pytest.fixture(autouse=True)
def standard_promotion():
    # optax's own transformations promote implicitly.
    with jax.numpy_dtype_promotion("standard"):
        yield


# The battery: every row is a chain that ends in `sparsify`.

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_composes_with_optimizers(name):
    tx = optax.chain(OPTIMIZERS[name](), prune.sparsify(RAMP))
    params, state = train(tx, random_params())
    check_zeros(params, state)


MARKS = {"a": {"kernel": True, "bias": False}, "b": Pair(True, False), "c": True}
LABELS = {"a": {"kernel": "x", "bias": "z"}, "b": Pair("y", "z"), "c": "x"}
WRAPPERS = {
    "masked": lambda: optax.chain(optax.adam(0.1), optax.masked(prune.sparsify(RAMP), MARKS)),
    "inject": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(optax.adam(rate), prune.sparsify(RAMP))
    )(rate=0.1),
    "injected": lambda: optax.chain(
        optax.adam(0.1), optax.inject_hyperparams(prune.sparsify)(sparsity=RAMP, every=1)
    ),
    "multisteps": lambda: optax.MultiSteps(
        optax.chain(optax.adam(0.1), prune.sparsify(RAMP)), 2
    ).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(
        optax.chain(optax.adam(0.1), prune.sparsify(RAMP)), 3
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_composes_with_wrappers(name):
    params, state = train(WRAPPERS[name](), random_params(), steps=12)
    check_zeros(params, state)


def test_multi_transform_with_two_sparsities():
    tx = optax.multi_transform(
        {
            "x": optax.chain(optax.adam(0.1), prune.sparsify(0.5)),
            "y": optax.chain(optax.sgd(0.1), prune.sparsify(0.9)),
            "z": optax.sgd(0.1),
        },
        LABELS,
    )
    params, state = train(tx, random_params())
    masks = prune.masks_of(state)
    assert jax.tree.structure(masks, is_leaf=lambda x: isinstance(x, Scaled)).num_leaves == 5
    counts = {path: kept.total - kept.kept for path, kept in prune.report(masks).items()}
    assert counts["b/first"] == 216
    assert counts["a/kernel"] + counts["c/0"] == round(0.5 * (384 + 21))
    assert masks["a"]["bias"].shape == ()
    np.testing.assert_array_equal(np.asarray(params["b"].first) == 0, ~masks["b"].first)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *WRAPPERS])
def test_tree_map_params(name):
    tx = WRAPPERS[name]() if name in WRAPPERS else optax.chain(
        OPTIMIZERS[name](), prune.sparsify(RAMP)
    )  # fmt: skip
    params = random_params()
    state = tx.init(params)
    same = optax.tree_map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    if name not in ("masked", "adafactor", "muon"):  # which leave out parameters
        ranks = jax.tree.map(jnp.ndim, params)
        specs = optax.tree_map_params(
            tx, lambda x, rank: x.ndim == rank, state, ranks, transform_non_params=lambda x: True
        )
        assert all(jax.tree.leaves(specs))
