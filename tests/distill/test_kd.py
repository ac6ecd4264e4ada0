"""`kd` against its formula in float64, against PyTorch, and by its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import distill


def reference(student, teacher, temperature=1.0):
    """T² KL(teacher ‖ student) for each example, in float64."""
    s, t = (np.asarray(x, np.float64) / temperature for x in (student, teacher))
    s, t = (x - x.max(-1, keepdims=True) for x in (s, t))
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (s, t))
    p = np.exp(log_p)
    terms = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - np.where(p > 0, log_q, 0)), 0)
    return temperature**2 * terms.sum(-1)


def logits(seed, *shape, scale=3.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)])
def test_values(shape, temperature):
    student, teacher = logits(0, *shape), logits(1, *shape)
    expected = reference(student, teacher, temperature)
    each = distill.kd(student, teacher, temperature=temperature, reduction=None)
    assert each.shape == shape[:-1] and each.dtype == jnp.float32
    np.testing.assert_allclose(each, expected, rtol=2e-5, atol=1e-6)
    mean = jax.jit(distill.kd)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(mean, expected.mean(), rtol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pytorch(temperature):
    torch = pytest.importorskip("torch")
    student, teacher = logits(0, 6, 11), logits(1, 6, 11)
    s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(teacher, dtype=torch.float64)
    log_q, p = torch.log_softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
    loss = torch.nn.functional.kl_div(log_q, p, reduction="batchmean") * temperature**2
    loss.backward()
    found, gradient = jax.value_and_grad(distill.kd)(student, teacher, temperature=temperature)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, s.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_direction_is_teacher_to_student():
    student, teacher = logits(0, 4, 5), logits(1, 4, 5)
    forward, backward = reference(student, teacher).mean(), reference(teacher, student).mean()
    assert abs(forward - backward) > 0.1
    np.testing.assert_allclose(distill.kd(student, teacher), forward, rtol=1e-5)
    # Covering a mode of the teacher costs little; missing one costs much.
    two, wide, one = jnp.array([4.0, 4.0, -4.0]), jnp.zeros(3), jnp.array([4.0, -4.0, -4.0])
    assert distill.kd(wide, two) < distill.kd(one, two)


def test_no_gradient_reaches_the_teacher():
    gradient = jax.grad(distill.kd, argnums=1)(logits(0, 4, 5), logits(1, 4, 5))
    assert not np.any(gradient)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(0.3, 10))
def test_properties(seed, classes, temperature):
    student, teacher = logits(seed, 3, classes), logits(seed + 1, 3, classes)

    def kd(a, b):
        return distill.kd(a, b, temperature=temperature, reduction=None)

    np.testing.assert_array_equal(kd(teacher, teacher), 0)
    assert np.all(kd(student, teacher) >= -1e-5)
    np.testing.assert_allclose(kd(student, teacher), kd(student + 5, teacher - 3), atol=2e-3)


def test_gradient_keeps_its_scale_with_temperature():
    # For a high T the gradient is that of half the squared distance of centered logits, over n.
    student, teacher = logits(0, 1, 8, scale=1.0), logits(1, 1, 8, scale=1.0)
    centered = [x - x.mean() for x in (student, teacher)]
    gradient = jax.grad(distill.kd)(student, teacher, temperature=100.0)
    np.testing.assert_allclose(gradient, (centered[0] - centered[1]) / 8, rtol=0.05, atol=2e-3)


def test_classes_that_are_ruled_out():
    student, teacher = logits(0, 3, 6), logits(1, 3, 6)
    masked = [np.where(np.arange(6) < 4, x, -np.inf) for x in (student, teacher)]
    expected = reference(student[:, :4], teacher[:, :4])
    loss, gradient = jax.value_and_grad(distill.kd)(*masked)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, 4:])
    # The teacher may rule out more than the student, not the other way round.
    found = distill.kd(student, masked[1], reduction=None)
    np.testing.assert_allclose(found, reference(student, masked[1]), rtol=1e-5)
    assert np.all(np.isposinf(distill.kd(masked[0], teacher, reduction=None)))


def test_padding_does_not_matter():
    student, teacher = logits(0, 2, 5, 7), logits(1, 2, 5, 7)
    where = np.array([[True, True, False, True, False], [False] * 5])
    broken = [np.where(where[..., None], x, np.nan) for x in (student, teacher)]
    expected = reference(student, teacher)[where].mean()
    loss, gradient = jax.value_and_grad(distill.kd)(*broken, where=where)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~where])
    each = distill.kd(*broken, where=where, reduction=None)
    np.testing.assert_allclose(each, np.where(where, reference(student, teacher), 0), rtol=1e-5)
    assert distill.kd(*broken, where=np.zeros_like(where)) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_only_on_the_way_in(dtype):
    student, teacher = (jnp.asarray(logits(i, 4, 9), dtype) for i in (0, 1))
    loss = distill.kd(student, teacher, temperature=2.0)
    assert loss.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) for x in (student, teacher)]
    np.testing.assert_allclose(loss, reference(*exact, 2.0).mean(), rtol=1e-5)
    assert jax.grad(distill.kd)(student, teacher).dtype == dtype
    mixed = distill.kd(student.astype(jnp.float32), teacher, temperature=2.0)
    np.testing.assert_allclose(mixed, loss, rtol=1e-6)


def test_large_logits():
    student, teacher = logits(0, 4, 9, scale=1e4), logits(1, 4, 9, scale=1e4)
    found = distill.kd(student, teacher, reduction=None)
    np.testing.assert_allclose(found, reference(student, teacher), rtol=1e-5)


def test_vmap_and_a_schedule_of_the_temperature():
    student, teacher = logits(0, 3, 4, 9), logits(1, 3, 4, 9)
    temperatures = jnp.array([1.0, 2.0, 4.0])
    batched = jax.vmap(lambda s, t, T: distill.kd(s, t, temperature=T))
    expected = [
        reference(s, t, float(T)).mean()
        for s, t, T in zip(student, teacher, temperatures, strict=True)
    ]
    np.testing.assert_allclose(batched(student, teacher, temperatures), expected, rtol=1e-5)


def test_exports():
    shape = jax.ShapeDtypeStruct((4, 9), jnp.bfloat16)
    step = jax.jit(jax.value_and_grad(lambda s, t: distill.kd(s, t, temperature=2.0)))
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(shape, shape)


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (
            ValueError,
            lambda: distill.kd(jnp.ones((2, 5)), jnp.ones((2, 6))),
            r"the same classes: student is \[2, 5\], teacher is \[2, 6\]",
        ),
        (ValueError, lambda: distill.kd(jnp.ones((2, 5)), jnp.ones((3, 5))), "the same shape"),
        (ValueError, lambda: distill.kd(jnp.ones(()), jnp.ones(())), "[..., classes]"),
        (
            ValueError,
            lambda: distill.kd(jnp.ones(5), jnp.ones(5), temperature=0),
            "temperature=0.*scalar above 0",
        ),
        (
            ValueError,
            lambda: distill.kd(jnp.ones(5), jnp.ones(5), temperature=jnp.ones(2)),
            "scalar above 0",
        ),
        (
            ValueError,
            lambda: distill.kd(jnp.ones(5), jnp.ones(5), reduction="sum"),
            "reduction='sum'",
        ),
        (TypeError, lambda: distill.kd(jnp.ones(5, int), jnp.ones(5)), "student is int32"),
        (
            ValueError,
            lambda: distill.kd(jnp.ones((2, 5)), jnp.ones((2, 5)), where=jnp.ones(5, bool)),
            r"one boolean an example, \[2\]; it is \[5\]",
        ),
        (
            TypeError,
            lambda: distill.kd(jnp.ones((2, 5)), jnp.ones((2, 5)), where=jnp.ones(2)),
            "expects booleans, not float32",
        ),
    ],
)
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call()
