"""Where losses on logits break in other hands: near equals, constants, small integers."""

import functools

import distill_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import distill


def logits(seed, *shape, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact_kd(s, t, T):
    """At a high temperature float64 itself keeps too few digits of logarithms so near."""
    s, t = (np.longdouble(x) / T for x in (s, t))
    log_q, log_p = (
        x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))[:, None]
        for x in (s, t)
    )
    return T**2 * np.sum(np.exp(log_q) - np.exp(log_p) + np.exp(log_p) * (log_p - log_q), -1)


def exact_js(s, t, T):
    p, q = (reference.softmax(np.float64(x) / T) for x in (t, s))
    m = (p + q) / 2
    return T**2 / 2 * sum(np.sum(x * np.log1p((x - m) / m) - (x - m), -1) for x in (p, q))


LOSSES = {
    "kd": (distill.kd, exact_kd),
    "reverse_kl": (distill.reverse_kl, lambda s, t, T: exact_kd(t, s, T)),
    "js": (distill.js, exact_js),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("change", [0.01, 3.0])
def test_near_equals_and_high_temperatures_do_not_cancel(name, change):
    loss, exact = LOSSES[name]
    teacher = logits(0, 16, 100, scale=3.0)
    student = teacher + change * logits(1, 16, 100, scale=1.0)

    @jax.jit
    def both(s, T):
        each = loss(s, teacher, temperature=T, reduction=None)
        return each, jax.grad(lambda s: loss(s, teacher, temperature=T))(s)

    for T in (1.0, 4.0, 20.0, 100.0, 1e4):
        found, slope = both(student, T)
        np.testing.assert_allclose(found, np.float64(exact(student, teacher, T)), rtol=1e-5)
        assert np.all(found >= 0)
        q, p = (reference.softmax(np.float64(x) / T) for x in (student, teacher))
        if name == "kd":
            np.testing.assert_allclose(slope, T * (q - p) / 16, rtol=2e-3, atol=2e-8)


def test_the_second_derivative_is_that_of_softmax():
    student, teacher = logits(0, 6), logits(1, 6)
    q = reference.softmax(np.float64(student))
    found = jax.hessian(distill.kd)(student, teacher)
    np.testing.assert_allclose(found, np.diag(q) - np.outer(q, q), atol=1e-6)
    near = jax.hessian(distill.kd)(jnp.asarray(teacher) * 1.0001, teacher)
    p = reference.softmax(np.float64(teacher))
    np.testing.assert_allclose(near, np.diag(p) - np.outer(p, p), atol=1e-4)


def test_dkd_of_near_equals_at_a_high_temperature():
    teacher, labels = logits(0, 4, 9), np.array([0, 8, 3, 3])
    student = teacher + logits(1, 4, 9, scale=0.01)
    found = distill.dkd(student, teacher, labels, alpha=0.0, temperature=100.0, reduction=None)
    others = [
        np.stack([np.delete(r, k) for r, k in zip(x, labels, strict=True)])
        for x in (student, teacher)
    ]
    np.testing.assert_allclose(found, 8 * exact_kd(*others, 100.0), rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1e-7, 0.3, 1.0])
def test_a_traced_weight_beside_classes_that_the_teacher_rules_out(weight):
    student, teacher = logits(0, 4, 5), logits(1, 4, 5)
    teacher[:, 2] = -np.inf
    if weight == 1:  # there the student must rule them out as well
        student[:, 2] = -np.inf
    fixed = jax.value_and_grad(lambda s: distill.js(s, teacher, weight=weight))(student)
    traced = jax.jit(jax.value_and_grad(lambda s, w: distill.js(s, teacher, weight=w)))
    found = traced(student, weight)
    assert np.isfinite(fixed[0]) and np.all(np.isfinite(fixed[1]))
    for a, b in zip(found, fixed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    batched = jax.jit(jax.vmap(traced, in_axes=(None, 0)))(student, jnp.full(2, weight))
    np.testing.assert_allclose(batched[1][1], fixed[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mask", [-np.inf, np.finfo(np.float32).min])
def test_standardized_logits_leave_out_what_is_ruled_out(mask):
    student, teacher = logits(0, 4, 6), logits(1, 4, 6)
    rest = np.arange(6) != 2
    masked = [np.where(rest, x, np.float32(mask)) for x in (student, teacher)]
    found, slope = jax.value_and_grad(distill.standardized_kd)(*masked)
    expected, wanted = jax.value_and_grad(distill.standardized_kd)(
        student[:, rest], teacher[:, rest]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(slope[:, rest], wanted, rtol=1e-4, atol=1e-7)
    assert not np.any(slope[:, 2])


def test_dist_of_what_does_not_vary():
    teacher = logits(0, 64, 10)
    # A head that begins at zero: no row and no column varies.
    value, slope = jax.jit(jax.value_and_grad(distill.dist))(jnp.zeros((64, 10)), teacher)
    assert value == 2 and not np.any(slope)
    # Examples alike: no column varies, though sums of equals are rounded; rows do.
    for examples in (7, 1000):
        same = jnp.broadcast_to(logits(1, 10), (examples, 10))
        other = logits(2, examples, 10)
        for where in (None, np.arange(examples) != 3):
            intra = jax.jit(jax.value_and_grad(functools.partial(distill.dist, inter=0.0)))
            value, slope = intra(same, other, where=where)
            assert value == 1 and not np.any(slope)
    assert abs(distill.dist(same, same, intra=0.0)) < 1e-6
    # What varies little does vary: a temperature of 1000.
    student = logits(3, 64, 10)
    found = distill.dist(student, teacher, temperature=1e3) / 1e6
    exact = reference.dist(np.float64(student), np.float64(teacher), T=1e3).mean() / 1e6
    np.testing.assert_allclose(found, exact, rtol=1e-3)


SMALL = [(256, "uint8"), (300, "uint8"), (200, "int8"), (300, "uint32"), (300, "int16")]


@pytest.mark.parametrize(("classes", "dtype"), SMALL)
def test_labels_of_small_integers_do_not_wrap(classes, dtype):
    student, teacher = logits(0, 4, classes), logits(1, 4, classes)
    hidden, kernel = logits(2, 4, 6), logits(3, 6, classes)
    wide = np.array([0, 3, 44, 1 if dtype == "uint8" else 100], np.int32)

    def losses(s, y):
        return jnp.stack([
            distill.hard(s, y),
            distill.sequence(s, y),
            distill.dkd(s, teacher, y),
            distill.fused_kd(hidden, kernel + s[:1, :1], teacher, labels=y, weight=0.3),
            distill.kd(s, distill.virtual_teacher(y, classes)),
        ])  # fmt: skip

    run = jax.jit(lambda s, y: (losses(s, y), jax.jacrev(losses)(s, y)))
    found, expected = run(student, jnp.asarray(wide, dtype)), run(student, wide)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.isfinite(b))


def test_labels_of_64_bits_do_not_wrap():
    with jax.enable_x64(True):
        for dtype in (jnp.int64, jnp.uint64):
            labels = jnp.array([2, 2**32 + 1], dtype)
            found = distill.hard(logits(0, 2, 5), labels, reduction=None)
            assert np.isfinite(found[0]) and np.isnan(found[1])
