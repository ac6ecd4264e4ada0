"""Losses on logits: float64 references with gradients, PyTorch's formulas, properties, errors."""

import functools

import distill_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import distill


def logits(seed, *shape, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LABELS = np.array([0, 6, 3, 3, 1])
# name: our loss, the reference; both of (student, teacher) and for each example.
LOSSES = {
    "kd": (
        lambda s, t, **k: distill.kd(s, t, temperature=3.0, **k),
        lambda s, t: reference.kd(s, t, 3.0),
    ),
    "reverse_kl": (
        lambda s, t, **k: distill.reverse_kl(s, t, temperature=0.7, **k),
        lambda s, t: reference.reverse_kl(s, t, 0.7),
    ),
    "js": (distill.js, reference.js),
    "js weighted": (
        lambda s, t, **k: distill.js(s, t, weight=0.1, temperature=2.0, **k),
        lambda s, t: reference.js(s, t, 0.1, 2.0),
    ),
    "js at 0": (lambda s, t, **k: distill.js(s, t, weight=0, **k), reference.kd),
    "js at 1": (lambda s, t, **k: distill.js(s, t, weight=1, **k), reference.reverse_kl),
    "standardized_kd": (distill.standardized_kd, reference.standardized_kd),
    "l1": (
        lambda s, t, **k: distill.l1(s, t, temperature=2.0, **k),
        lambda s, t: reference.l1(s, t, T=2.0),
    ),
    "l1 of logits": (
        lambda s, t, **k: distill.l1(s, t, of="logits", **k),
        lambda s, t: reference.l1(s, t, "logits"),
    ),
    "mse": (
        lambda s, t, **k: distill.mse(s, t, temperature=2.0, **k),
        lambda s, t: reference.mse(s, t, T=2.0),
    ),
    "mse of probabilities": (
        lambda s, t, **k: distill.mse(s, t, of="probabilities", **k),
        lambda s, t: reference.mse(s, t, "probabilities"),
    ),
    "dkd": (
        lambda s, t, **k: distill.dkd(s, t, LABELS, **k),
        lambda s, t: reference.dkd(s, t, LABELS),
    ),
    "dkd weighted": (
        lambda s, t, **k: distill.dkd(s, t, LABELS, alpha=0.5, beta=2.0, temperature=1.0, **k),
        lambda s, t: reference.dkd(s, t, LABELS, 0.5, 2.0, 1.0),
    ),
    "dist": (distill.dist, reference.dist),
    "dist weighted": (
        lambda s, t, **k: distill.dist(s, t, inter=2.0, intra=0.5, temperature=4.0, **k),
        lambda s, t: reference.dist(s, t, 2.0, 0.5, 4.0),
    ),
    "hard": (
        lambda s, t, **k: distill.hard(s, LABELS, **k),
        lambda s, t: reference.hard(s, LABELS),
    ),
    "hard smoothed": (
        lambda s, t, **k: distill.hard(s, LABELS, smoothing=0.2, **k),
        lambda s, t: reference.hard(s, LABELS, 0.2),
    ),
}
every = pytest.mark.parametrize("name", LOSSES)
SHIFTS = [name for name in LOSSES if "of logits" not in name and name != "mse"]


@every
def test_values_and_gradients_are_those_of_float64(name):
    ours, theirs = LOSSES[name]
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    each = ours(student, teacher, reduction=None)
    exact = theirs(np.float64(student), np.float64(teacher))
    assert each.shape == (5,) and each.dtype == jnp.float32
    np.testing.assert_allclose(each, exact, rtol=3e-5, atol=1e-6)
    mean, gradient = jax.jit(jax.value_and_grad(ours))(student, teacher)
    np.testing.assert_allclose(mean, exact.mean(), rtol=3e-5)
    expected = reference.slope(lambda s: theirs(s, np.float64(teacher)).mean(), student)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)


@every
def test_the_teacher_has_no_gradient(name):
    ours, _ = LOSSES[name]
    assert not np.any(jax.grad(ours, argnums=1)(logits(0, 5, 7), logits(1, 5, 7)))


@every
def test_padding_does_not_matter(name):
    ours, _ = LOSSES[name]
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    where = np.array([True, True, False, True, False])
    broken = [np.where(where[:, None], x, np.nan) for x in (student, teacher)]
    other = [np.where(where[:, None], x, 1e9) for x in (student, teacher)]
    each = ours(student, teacher, reduction=None, where=where)
    assert not np.any(each[~where]) and np.all(each[where] != 0)
    np.testing.assert_array_equal(ours(*broken, reduction=None, where=where), each)
    mean, gradient = jax.value_and_grad(ours)(*broken, where=where)
    np.testing.assert_allclose(mean, each[where].mean(), rtol=1e-5)
    np.testing.assert_array_equal(gradient, jax.grad(ours)(*other, where=where))
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~where])
    assert ours(*broken, where=np.zeros(5, bool)) == 0


# The labels of others are fixed; the test above says the same of them.
@pytest.mark.parametrize("name", [n for n in LOSSES if "dkd" not in n and "hard" not in n])
def test_padding_equals_leaving_out(name):
    ours, theirs = LOSSES[name]
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    where = np.array([True, True, False, True, True])
    exact = theirs(np.float64(student[where]), np.float64(teacher[where])).mean()
    np.testing.assert_allclose(ours(student, teacher, where=where), exact, rtol=3e-5)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_of_logits_changes_nothing(name):
    ours, _ = LOSSES[name]
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    shifted = ours(student + 30, teacher - 20, reduction=None)
    np.testing.assert_allclose(shifted, ours(student, teacher, reduction=None), rtol=2e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if "hard" not in name])
def test_a_vocabulary_mismatch_is_an_error(name):
    ours, _ = LOSSES[name]
    with pytest.raises(ValueError, match=r"the same classes: student is \[5, 7\], .* \[5, 8\]"):
        ours(logits(0, 5, 7), logits(1, 5, 8))


@every
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_only_on_the_way_in(name, dtype):
    ours, theirs = LOSSES[name]
    student, teacher = (jnp.asarray(logits(i, 5, 7), dtype) for i in (0, 1))
    value, gradient = jax.value_and_grad(ours)(student, teacher)
    exact = theirs(*(np.asarray(x, np.float64) for x in (student, teacher))).mean()
    np.testing.assert_allclose(value, exact, rtol=3e-5)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype


@every
def test_vmap_and_export(name):
    ours, _ = LOSSES[name]
    student, teacher = logits(0, 3, 5, 7), logits(1, 3, 5, 7)
    expected = [ours(s, t) for s, t in zip(student, teacher, strict=True)]
    np.testing.assert_allclose(jax.vmap(ours)(student, teacher), expected, rtol=1e-5)
    shape = jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)
    step = jax.jit(jax.value_and_grad(ours))
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(shape, shape)


DIVERGENCES = ["kd", "reverse_kl", "js", "js weighted", "js at 0", "js at 1"]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(DIVERGENCES), st.integers(0, 2**32 - 1))
def test_divergences_are_zero_of_equals_and_not_negative(name, seed):
    student, teacher = logits(seed, 3, 6), logits(seed + 1, 3, 6)
    same, gradient, each = compiled(name)(student, teacher)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    assert np.all(each >= -1e-6)


@functools.cache
def compiled(name):
    ours, _ = LOSSES[name]
    return jax.jit(lambda s, t: (*jax.value_and_grad(ours)(t, t), ours(s, t, reduction=None)))


@jax.jit
def traced_js(s, t, w, T):
    return distill.js(s, t, weight=w, temperature=T, reduction=None)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 0.99), st.floats(0.5, 5))
def test_js(seed, weight, temperature):
    student, teacher = logits(seed, 3, 6), logits(seed + 1, 3, 6)
    found = traced_js(student, teacher, weight, temperature)
    assert np.all(found <= temperature**2 * np.log(2) * 1.001)
    turned = traced_js(teacher, student, 1 - weight, temperature)
    np.testing.assert_allclose(found, turned, rtol=1e-3, atol=1e-5)
    exact = reference.js(np.float64(student), np.float64(teacher), weight, temperature)
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-6)
    for end, loss in ((0.0, reference.kd), (1.0, reference.reverse_kl)):
        exact = loss(np.float64(student), np.float64(teacher), temperature)
        at_end = traced_js(student, teacher, end, temperature)
        np.testing.assert_allclose(at_end, exact, rtol=1e-4, atol=1e-6)


def test_js_tends_to_the_divergences():
    student, teacher = logits(0, 4, 6, scale=0.5), logits(1, 4, 6, scale=0.5)
    for near, loss in ((1e-3, distill.kd), (1 - 1e-3, distill.reverse_kl)):
        found = distill.js(student, teacher, weight=near, reduction=None) / 1e-3
        np.testing.assert_allclose(found, loss(student, teacher, reduction=None), rtol=0.02)


@pytest.mark.parametrize("name", ["kd", "reverse_kl", "js"])
def test_the_gradient_keeps_its_scale_with_temperature(name):
    # Both divergences tend to half the squared distance of centered logits over n; JS to a quarter.
    student, teacher = logits(0, 1, 8, scale=1.0), logits(1, 1, 8, scale=1.0)
    expected = (student - student.mean() - teacher + teacher.mean()) / 8
    loss = getattr(distill, name)
    share = 0.25 if name == "js" else 1.0
    for temperature in (50.0, 200.0):
        gradient = jax.grad(loss)(student, teacher, temperature=temperature)
        np.testing.assert_allclose(gradient, share * expected, rtol=0.1, atol=3e-3)


def test_one_program_serves_a_schedule():
    temperature = jnp.linspace(8.0, 1.0, 4)

    @jax.jit
    def loss(s, t, step):
        soft = distill.js(s, t, temperature=temperature[step], weight=step.astype(jnp.float32) / 3)
        return distill.mixed(distill.hard(s, LABELS), soft, weight=1 - temperature[step] / 8)

    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    for step in range(4):
        T, w = float(temperature[step]), step / 3
        soft = (
            distill.js(student, teacher, temperature=T, weight=w)
            if 0 < w < 1
            else [distill.kd, distill.reverse_kl][round(w)](student, teacher, temperature=T)
        )
        expected = T / 8 * distill.hard(student, LABELS) + (1 - T / 8) * soft
        np.testing.assert_allclose(loss(student, teacher, jnp.int32(step)), expected, rtol=1e-4)
    assert loss._cache_size() == 1


@pytest.mark.parametrize("name", ["kd", "js", "js weighted", "l1", "dkd"])
def test_classes_that_both_rule_out(name):
    ours, _ = LOSSES[name]
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    wider = [np.pad(x, ((0, 0), (0, 2)), constant_values=-np.inf) for x in (student, teacher)]
    value, gradient = jax.value_and_grad(ours)(*wider)
    plain = jax.value_and_grad(ours)(student, teacher)
    np.testing.assert_allclose(value, plain[0], rtol=1e-5)
    np.testing.assert_allclose(gradient[:, :7], plain[1], rtol=1e-4, atol=1e-7)
    assert not np.any(gradient[:, 7:])


def test_a_teacher_that_knows_nothing_but_the_target():
    teacher = jnp.where(jnp.arange(7) == 3, 0.0, -jnp.inf)[None]
    value, gradient = jax.value_and_grad(distill.dkd)(logits(0, 1, 7), teacher, jnp.array([3]))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_dist_of_examples_that_do_not_vary():
    student, teacher = logits(0, 5, 7), logits(1, 5, 7)
    value, gradient = jax.value_and_grad(distill.dist)(np.zeros_like(student), teacher)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    # Rare classes count as much as others: correlation has no scale.
    rare = teacher.copy()
    rare[:, 0] -= 12
    each = distill.dist(rare, rare, intra=1.0, inter=0.0, reduction=None)
    np.testing.assert_allclose(each, 0, atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_sequences(normalize):
    student, tokens = logits(0, 3, 4, 7), np.random.default_rng(0).integers(0, 7, (3, 4))
    loss = lambda s, **k: distill.sequence(s, tokens, normalize=normalize, **k)  # noqa: E731
    exact = reference.sequence(np.float64(student), tokens, normalize)
    np.testing.assert_allclose(loss(student, reduction=None), exact, rtol=1e-5)
    gradient = jax.grad(loss)(student)
    np.testing.assert_allclose(
        gradient,
        reference.slope(lambda s: reference.sequence(s, tokens, normalize).mean(), student),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    # Padding: the same as shorter sequences, whatever token stands there.
    where = np.arange(4) < 3
    padded = np.where(where, tokens, -100)
    broken = np.where(where[:, None], student, np.nan)
    found, gradient = jax.value_and_grad(
        lambda s: distill.sequence(
            s, padded, normalize=normalize, where=np.broadcast_to(where, (3, 4))
        )
    )(broken)
    short = reference.sequence(np.float64(student[:, :3]), tokens[:, :3], normalize).mean()
    np.testing.assert_allclose(found, short, rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 3])


def test_labels_that_name_no_class_are_nan_unless_they_do_not_count():
    student, teacher, labels = logits(0, 2, 7), logits(1, 2, 7), np.array([-100, 2])
    for loss in (
        lambda **k: distill.hard(student, labels, reduction=None, **k),
        lambda **k: distill.dkd(student, teacher, labels, reduction=None, **k),
    ):
        assert np.isnan(loss()[0]) and np.isfinite(loss()[1])
        assert loss(where=np.array([False, True]))[0] == 0
        slope = jax.grad(lambda s: distill.hard(s, labels, where=np.array([False, True])))(student)
        assert np.all(np.isfinite(slope))


def test_errors():
    x = jnp.ones((2, 5))
    labels = jnp.zeros(2, jnp.int32)
    cases = [
        (ValueError, lambda: distill.js(x, x, weight=1.5), "weight=1.5.*from 0 to 1"),
        (ValueError, lambda: distill.l1(x, x, of="odds"), '"probabilities" or "logits"'),  # pyright: ignore
        (ValueError, lambda: distill.mse(x, x, temperature=0), "scalar above 0"),
        (TypeError, lambda: distill.dkd(x, x, jnp.ones(2)), "labels that number classes"),
        (ValueError, lambda: distill.dkd(x, x, labels[:1]), r"labels \[2\].*they are \[1\]"),
        (ValueError, lambda: distill.dkd(x[:, :1], x[:, :1], labels), "two classes or more"),
        (ValueError, lambda: distill.hard(x, labels, smoothing=-1), "smoothing=-1"),
        (ValueError, lambda: distill.hard(x, labels, reduction="sum"), "reduction='sum'"),
        (ValueError, lambda: distill.sequence(x, labels[:1]), r"tokens \[2\]"),
        (ValueError, lambda: distill.mixed(jnp.ones(2), jnp.ones(3), weight=0.5), r"\[2\].*\[3\]"),
        (ValueError, lambda: distill.mixed(x, x, weight=2), "weight=2"),
        (TypeError, lambda: distill.dist(x, x, where=labels), "expects booleans"),
    ]
    for error, call, message in cases:
        with pytest.raises(error, match=message):
            call()
