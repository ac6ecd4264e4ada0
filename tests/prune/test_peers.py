"""The peers' own numbers: PyTorch's masks from given scores, tfmot's sparsity schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import prune, schedules


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.7, 0.95])
def test_random_unstructured_by_given_scores(amount):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as peer

    weight = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(weight))
    torch.manual_seed(3)
    scores = torch.rand_like(module.weight).numpy()
    torch.manual_seed(3)
    peer.random_unstructured(module, "weight", amount)
    # PyTorch takes away what it drew highest.
    given = prune.Score(lambda state, params: -jnp.asarray(scores))
    found = prune.masks(weight, amount, score=given)
    np.testing.assert_array_equal(found, module.weight_mask.numpy().astype(bool))


@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_ln_structured(amount, n):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune as peer

    weight = np.random.default_rng(1).normal(size=(12, 16)).astype(np.float32)
    for dim in (0, 1):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.tensor(weight))
        peer.ln_structured(module, "weight", amount, n=n, dim=dim)
        pattern, score = prune.Channel(dim - 2), prune.magnitude(n)
        found = prune.masks(weight, amount, pattern=pattern, score=score)
        np.testing.assert_array_equal(found, module.weight_mask.numpy().astype(bool))


def polynomial_decay(step, initial, final, begin, end, power=3):
    """tfmot's PolynomialDecay, in float64: (initial - final) (1 - p)^power + final."""
    p = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return (initial - final) * (1 - p) ** power + final


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_cubic_schedule_has_the_values_of_tfmot(initial):
    schedule = schedules.cubic_sparsity(0.9, begin=20, end=220, initial=initial)
    steps = np.arange(0, 300)
    expected = [polynomial_decay(int(t), initial, 0.9, 20, 220) for t in steps]
    np.testing.assert_allclose(schedule(jnp.asarray(steps)), expected, atol=3e-7)


def test_masks_follow_the_schedule_at_its_frequency():
    # tfmot updates where begin <= t <= end and (t - begin) % frequency is 0; here begin is 4.
    params = {"k": jax.random.normal(jax.random.key(0), (40, 50))}
    ramp = schedules.cubic_sparsity(0.8, begin=4, end=16, initial=0.2)
    late = lambda step: jnp.where(step >= 4, ramp(step), 0.0)  # noqa: E731
    tx = optax.chain(optax.sgd(0.01), prune.sparsify(late, every=4))
    state, step, counts = tx.init(params), jax.jit(tx.update), []
    for _ in range(22):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int(jnp.sum(params["k"] == 0)))
    expected, level = [], 0.0
    for t in range(22):
        if 4 <= t <= 16 and (t - 4) % 4 == 0:
            level = polynomial_decay(t, 0.2, 0.8, 4, 16)
        expected.append(round(level * 2000))
    assert counts == expected


def test_exact_counts_with_ties_at_every_scope():
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.integers(-1, 2, (30, 17)), jnp.float32) for n in "ab"}
    for sparsity in (0.1, 0.33, 0.5, 0.77, 0.99):
        found = prune.masks(params, sparsity)
        assert sum(int(jnp.sum(~m)) for m in found.values()) == round(sparsity * 1020)
        for scope in ("layer", "erk"):
            found = prune.masks(params, sparsity, scope=scope)
            assert all(int(jnp.sum(~m)) == round(sparsity * 510) for m in found.values())
