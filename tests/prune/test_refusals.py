"""What is refused, and in which words."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import optim, prune

SGD = optax.sgd(0.1)
KEY = jax.random.key(0)
MOVES = {"inner": SGD, "until": 4, "key": KEY}
PHASES = {"inner": SGD, "begin": 1, "period": 2, "end": 9}
WEIGHT = jnp.arange(1.0, 33.0).reshape(8, 4)
CHAINS = {
    "sparsify": lambda **more: prune.sparsify(0.5, **more),
    "hold": lambda **more: prune.hold({"a": WEIGHT > 9, "b": jnp.ones((), bool)}, **more),
    "rigl": lambda **more: prune.rigl(0.5, **MOVES, **more),
}


def params():
    return {"a": WEIGHT, "b": jnp.ones(3)}


@pytest.mark.parametrize(
    "act",
    [
        lambda: prune.masks(params(), 0.5, where=[]),
        lambda: prune.sparsify(0.5, where=[]).init(params()),
        lambda: prune.rigl(0.5, where=[], **MOVES).init(params()),
        lambda: optim.proximal_l1(1.0, 0.1, where=[]).init(params()),
    ],
)
def test_no_leaves_at_all(act):
    with pytest.raises(ValueError, match=r"where=\[\]"):
        act()


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_state_of_other_parameters(name, pooled):
    tx = CHAINS[name](pooled=pooled)
    state = tx.init(params())
    tx.update(params(), state, params())
    if name != "hold":  # whose masks say which parameters they are of
        other = {"a": jnp.ones((40, 4)), "b": jnp.ones(3)}
        with pytest.raises(ValueError, match=r"in the state .* Give the state that `init` made"):
            tx.update(other, state, other)
        more = {**params(), "c": jnp.ones((8, 8))}
        with pytest.raises(ValueError, match="in the state"):
            tx.update(more, state, more)
    with pytest.raises(ValueError, match=f"pooled={not pooled}.*made with `pooled={pooled}`"):
        CHAINS[name](pooled=not pooled).update(params(), state, params())


@pytest.mark.parametrize("name", CHAINS)
def test_updates_of_another_shape(name):
    tx = CHAINS[name]()
    updates = {"a": jnp.ones((8, 1)), "b": jnp.ones(3)}
    with pytest.raises(
        ValueError, match=r"update of `a` has shape \[8, 1\], and the weight \[8, 4"
    ):
        tx.update(updates, tx.init(params()), params())


@pytest.mark.parametrize(
    "score", [prune.snip, prune.taylor, prune.movement, prune.fisher, prune.activation_norm]
)
def test_statistics_of_another_shape(score):
    with pytest.raises(ValueError, match=r"for `a` has shape \[3, 4\], and the weight \[8, 4\]"):
        prune.masks(params(), 0.5, score=score({"a": jnp.ones((3, 4)), "b": jnp.ones(3)}))
    with pytest.raises(ValueError, match="another structure"):
        prune.masks(params(), 0.5, score=score({"b": jnp.ones(3)}))
    row = {"a": jnp.ones((1, 4)), "b": jnp.ones(3)}
    if score is prune.activation_norm:  # inputs broadcast to the weight they meet
        prune.masks(params(), 0.5, score=score(row))
        return
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        prune.masks(params(), 0.5, score=score(row))


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: prune.sparsify(0.5, every=jnp.array([1, 2])), ValueError, "number of steps"),
        (lambda: prune.rigl(0.5, drop="x", **MOVES), ValueError, r"a share in \[0, 1\]"),
        (lambda: prune.rigl(0.5, drop=np.ones(2), **MOVES), ValueError, r"a share in \[0, 1\]"),
        (lambda: prune.magnitude("2"), ValueError, "positive finite exponent"),
        (
            lambda: prune.Tree([prune.Channel(-1), prune.Unstructured()], (float("nan"), 0.5)),
            ValueError,
            "a positive part",
        ),
        (lambda: prune.ac_dc([("a", 0.5)], **PHASES), TypeError, "a number"),
        (lambda: prune.ac_dc(lambda step: 0.5, **PHASES), TypeError, "a number"),
        (lambda: prune.report(params()), TypeError, "`a` is float32, and a mask is of booleans"),
        (
            lambda: prune.masks({"a": jnp.ones((6, 3))}, 0.5, pattern=prune.NM(2, 4), unfit="skip"),
            ValueError,
            "Nothing would be pruned: choose another pattern",
        ),
        (
            lambda: prune.masks({"a": WEIGHT.astype(jnp.float8_e8m0fnu)}, 0.5, where="a"),
            TypeError,
            "cannot prune `a`, an array of dtype float8_e8m0fnu",
        ),
        (lambda: optim.proximal_l1("a", 0.1), ValueError, "a number of 0 or more"),
        (lambda: optim.proximal_nuclear_norm(1.0, 0.1, every=1.5), ValueError, "number of steps"),
        (
            lambda: optim.proximal_nuclear_norm(1.0, 0.1, where="**").init(params()),
            ValueError,
            r"`b` has shape \[3\], which is no matrix",
        ),
        (lambda: optim.growing_l2({}, delta=0.1, every=1.5), ValueError, "number of steps"),
        (lambda: optim.growing_l2({}, delta=float("nan")), ValueError, "delta > 0"),
    ],
)
def test_options(act, error, words):
    with pytest.raises(error, match=words):
        act()


def test_scores_of_complex_numbers_are_named():
    weight = jnp.ones((1, 4), jnp.complex64)
    with pytest.raises(ValueError, match=r"complex64\[1, 4\]"):
        prune.masks(weight, 0.5, score=prune.movement(weight))


def test_what_was_skipped_counts_no_weights():
    tree = {"a": jnp.ones((6, 3)), "b": jnp.ones((8, 4))}
    pattern = prune.NM(2, 4)
    masks = prune.masks(tree, 0.5, pattern=pattern, unfit="skip")
    found = prune.report(masks, skipped=prune.misfits(tree, pattern))
    assert found["a"][:2] == (0, 0) and "not a multiple of 4" in found["a"].reason
    assert sum(row.total for row in found.values()) == 32


@pytest.mark.parametrize("given", ["a half", None, True, jnp.zeros(2), float("nan")])
def test_schedules_that_give_no_number(given):
    tx = prune.sparsify(lambda step: given)
    with pytest.raises(ValueError, match=r"a schedule gives the fraction .* one number in"):
        tx.update(params(), tx.init(params()), params())


@pytest.mark.parametrize("name", CHAINS)
def test_updates_that_are_missing(name):
    tx = CHAINS[name]()
    with pytest.raises(ValueError, match="the updates have none for `a`"):
        tx.update({"a": None, "b": jnp.ones(3)}, tx.init(params()), params())


@pytest.mark.parametrize("levels", [3, [], [prune.Unstructured()], prune.NM(2, 4)])
def test_trees_without_levels(levels):
    with pytest.raises(ValueError, match="expects two patterns or more"):
        prune.Tree(levels)
    both = [prune.Channel(-1), prune.Unstructured()]
    for parts in (0.5, "ab", (0.5, "b")):
        with pytest.raises(ValueError, match="expects a positive part for each of 2"):
            prune.Tree(both, parts)


@pytest.mark.parametrize("kind", [iter, np.float32, list])
def test_trees_take_parts_of_any_kind(kind):
    both = [prune.Channel(-1), prune.Unstructured()]
    assert prune.Tree(iter(both), kind([0.25, 0.75])) == prune.Tree(both, (0.25, 0.75))
