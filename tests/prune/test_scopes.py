"""Scopes and policies, against RigL's published procedure in float64; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jopt
from jopt import prune, schedules
from jopt.prune import _scopes


def erk_reference(shapes, sparsity):
    """Erdős–Rényi-Kernel as the paper describes it: layers above 1 become dense, one at a time."""
    dense = set()
    while True:
        raw = [sum(s) / np.prod(s) for s in shapes]
        sizes = [float(np.prod(s)) for s in shapes]
        room = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        eps = room / sum(raw[i] * sizes[i] for i in range(len(shapes)) if i not in dense)
        over = [i for i in range(len(shapes)) if i not in dense and raw[i] * eps > 1 + 1e-12]
        if not over:
            return [0.0 if i in dense else 1 - eps * raw[i] for i in range(len(shapes))]
        dense.add(max(over, key=lambda i: raw[i]))


SHAPES = st.lists(
    st.lists(st.integers(1, 64), min_size=2, max_size=4).map(tuple), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=150)
@given(SHAPES, st.floats(0.0, 0.99))
def test_erk(shapes, sparsity):
    found = _scopes.fractions(sparsity, "erk", shapes, [False] * len(shapes))
    np.testing.assert_allclose(found, erk_reference(shapes, sparsity), atol=1e-9)
    sizes = [np.prod(s) for s in shapes]
    assert np.dot(found, sizes) == pytest.approx(sparsity * sum(sizes), abs=1e-6 * sum(sizes))
    assert all(0 <= level < 1 for level in found)


def test_erk_of_a_traced_sparsity():
    shapes = [(3, 3, 3, 16), (3, 3, 16, 32), (3, 3, 32, 64), (64, 10)]

    @jax.jit
    def levels(sparsity):
        return jnp.stack(_scopes.fractions(sparsity, "erk", shapes, [False] * 4))

    for sparsity in (0.0, 0.5, 0.8, 0.9, 0.98):
        expected = erk_reference(shapes, sparsity)
        np.testing.assert_allclose(levels(jnp.float32(sparsity)), expected, atol=1e-5)


def random_params():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "c": {"kernel": draw(8, 64), "bias": draw(64)},
        "a": {"kernel": draw(64, 64), "bias": draw(64)},
        "b": {"kernel": draw(64, 4), "bias": draw(4)},
    }


def apply(params, x):
    for name in "cab":
        x = jnp.tanh(x @ params[name]["kernel"] + jnp.expand_dims(params[name]["bias"], 0))
    return x


def sparsities(masks):
    return {path.split("/")[0]: kept.sparsity for path, kept in prune.report(masks).items()}


def test_erk_masks_have_these_densities_in_training_too():
    params = random_params()
    shapes = [params[n]["kernel"].shape for n in "abc"]
    expected = erk_reference(shapes, 0.8)
    found = sparsities(prune.masks(params, 0.8, scope="erk"))
    assert found == {
        n: round(level * np.prod(s)) / np.prod(s)
        for n, level, s in zip("abc", expected, shapes, strict=True)
    }
    assert found["b"] < found["c"] < found["a"]
    ramp = schedules.cubic_sparsity(0.8, begin=0, end=2)
    tx = optax.chain(optax.sgd(0.1), prune.sparsify(ramp, scope="erk"))
    state = tx.init(params)
    for _ in range(4):
        updates, state = jax.jit(tx.update)(params, state, params)
        params = optax.apply_updates(params, updates)
    trained = sparsities(prune.masks_of(state))
    assert trained == pytest.approx(found, abs=2 / 256)


def test_erk_tells_stacked_layers_apart_with_sites():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    stacked = {"first": draw(16, 32), "layers": draw(5, 32, 32)}
    single = {"first": stacked["first"]} | {f"l{i}": stacked["layers"][i] for i in range(5)}

    def run(params, x):
        step = lambda h, kernel: (jnp.tanh(h @ kernel), None)  # noqa: E731
        return jax.lax.scan(step, x @ params["first"], params["layers"])[0]

    sites = jopt.sites(run, stacked, jnp.ones((2, 16)))
    found = prune.report(prune.masks(stacked, 0.8, scope="erk", sites=sites))
    apart = prune.report(prune.masks(single, 0.8, scope="erk"))
    assert found["first"] == apart["first"]
    assert abs(found["layers"].kept - sum(apart[f"l{i}"].kept for i in range(5))) <= 3
    assert prune.report(prune.masks(stacked, 0.8, scope="erk"))["first"] != apart["first"]


def test_erk_asks_no_more_of_a_leaf_than_its_pattern_prunes():
    params = {"a": random_params()["a"]["kernel"], "b": random_params()["b"]["kernel"]}
    options = {"pattern": prune.NM(2, 4), "scope": "erk"}
    message = r"prunes at most a fraction of 0\.5, .* 1 of 2 weights:\n  `a`: 0\.53.*\nLower"
    for caller, make in (
        ("masks", lambda: prune.masks(params, 0.5, **options)),
        ("sparsify", lambda: prune.sparsify(0.5, **options).init(params)),
    ):
        with pytest.raises(ValueError, match=rf"`prune\.{caller}\(.*scope=\"erk\".*" + message):
            make()
    assert sparsities(prune.masks(params, 0.4, **options))["a"] < 0.5
    prune.masks(params, 0.5, pattern=prune.NM(2, 4), scope="layer")


def test_uniform_keeps_the_ends_as_they_are_used():
    params = random_params()
    sites = jopt.sites(apply, params, jnp.ones((2, 8)))
    found = sparsities(prune.masks(params, 0.5, scope="uniform", sites=sites))
    assert found == {"a": 0.5, "b": 0.0, "c": 0.0}
    traced = jax.jit(lambda p, s: prune.masks(p, s, scope="uniform", sites=sites))
    assert sparsities(traced(params, jnp.float32(0.5))) == found
    with pytest.raises(ValueError, match=r"the order of a tree's leaves is not that of their use"):
        prune.masks(params, 0.5, scope="uniform")
    with pytest.raises(ValueError, match="hold no product of a chosen weight"):
        prune.masks({"x": jnp.ones((4, 4))}, 0.5, scope="uniform", sites=sites)


def test_policies():
    params = random_params()
    policy = [("a/*", 0.9), ("**/bias", None), ("**", 0.5)]
    found = prune.masks(params, policy, scope="layer")
    assert sparsities(found) == {"a": round(0.9 * 4096) / 4096, "b": 0.5, "c": 0.5}
    # Ranked together within a row.
    found = prune.masks(params, policy)
    rest = {"b": params["b"], "c": params["c"]}
    together = prune.masks(rest, 0.5)
    for name in rest:
        np.testing.assert_array_equal(found[name]["kernel"], together[name]["kernel"])
    # A row with `None` leaves dense what it names.
    found = prune.masks(params, [("a/**", None), ("**", 0.5)])
    assert found["a"]["kernel"].shape == () and set(sparsities(found)) == {"b", "c"}
    # A numerical row may be traced.
    traced = jax.jit(lambda p, s: prune.masks(p, [("a/**", s), ("**", 0.5)], scope="layer"))
    assert sparsities(traced(params, jnp.float32(0.75)))["a"] == 0.75


def test_policies_of_schedules():
    params = random_params()
    policy = [
        ("a/**", schedules.steps_sparsity([(0, 0.25), (2, 0.75)])),
        ("b/**", 0.5),
        ("**", None),
    ]
    tx = prune.sparsify(policy)
    state, step = tx.init(params), jax.jit(tx.update)
    seen = []
    for _ in range(3):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(sparsities(prune.masks_of(state)))
    assert seen == [{"a": 0.25, "b": 0.5}] * 2 + [{"a": 0.75, "b": 0.5}]
    np.testing.assert_array_equal(state.sparsity, [0.75, 0.5])


def test_policy_errors():
    params = random_params()
    with pytest.raises(ValueError, match="matched none of 6"):
        prune.masks(params, [("z/**", 0.5), ("**", 0.1)])
    with pytest.raises(TypeError, match=r"a list of `\(where, sparsity\)`"):
        prune.masks(params, [0.5, 0.6])
    with pytest.raises(ValueError, match=r"sparsity=1.5.*in \[0, 1\)"):
        prune.masks(params, [("**", 1.5)])
    with pytest.raises(ValueError, match="leaves all weights dense"):
        prune.masks(params, [("**", None)])
    with pytest.raises(ValueError, match=r"at most a fraction of 0\.5"):
        prune.sparsify([("a/**", 0.4), ("**", 0.6)], pattern=prune.NM(2, 4))
