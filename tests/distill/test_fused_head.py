"""The fused head against the losses on whole logits: values, gradients, memory, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt import distill, quant

TOKENS, CLASSES, WIDTH, WIDER = 37, 50, 16, 24


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


HIDDEN, THEIRS = normal(0, TOKENS, WIDTH), normal(1, TOKENS, WIDER)
KERNEL, THEIR_KERNEL = normal(2, WIDTH, CLASSES) / 3, normal(3, WIDER, CLASSES) / 3
BIAS, THEIR_BIAS = normal(4, CLASSES), normal(5, CLASSES)
LABELS = np.random.default_rng(6).integers(0, CLASSES, TOKENS).astype(np.int32)
WHERE = np.random.default_rng(7).random(TOKENS) > 0.3


def logits(hidden, head):
    kernel = head.kernel.T if head.tied else head.kernel
    z = hidden @ kernel
    return z if head.bias is None else z + head.bias[None]


def naive(hidden, head, teacher, labels=None, weight=1.0, temperature=1.0, where=None, k=None):
    z = logits(hidden, head)
    if k is None:
        soft = distill.kd(z, teacher, temperature=temperature, where=where)
    else:
        cached = distill.top_k(teacher, k, temperature=temperature)
        soft = distill.cached_kd(z, cached, where=where)
    if labels is None:
        return weight * soft
    return distill.mixed(distill.hard(z, labels, where=where), soft, weight=weight)


def close(found, expected, tolerance=1e-5):
    """Gradients agree to `tolerance` of the largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = max(float(np.max(np.abs(b))), 1e-8)
        np.testing.assert_allclose(np.float32(a) / scale, np.float32(b) / scale, atol=tolerance)


HEADS = {
    "plain": distill.Head(KERNEL),
    "bias": distill.Head(KERNEL, BIAS),
    "tied": distill.Head(np.ascontiguousarray(KERNEL.T), tied=True),
    "tied with bias": distill.Head(np.ascontiguousarray(KERNEL.T), BIAS, tied=True),
}
OPTIONS = {
    "soft": {},
    "warm": {"temperature": 3.0},
    "padded": {"where": WHERE, "temperature": 2.0},
    "both": {"labels": LABELS, "weight": 0.7, "temperature": 2.0, "where": WHERE},
    "hard": {"labels": LABELS, "weight": 0.0},
}


CASES = [(head, options, 8) for head in HEADS for options in OPTIONS]
CASES += [("tied with bias", "both", chunk) for chunk in (1, 37, 1000)]


@pytest.mark.parametrize(("head", "options", "chunk"), CASES)
def test_values_and_gradients_are_those_of_whole_logits(head, options, chunk):
    head, options = HEADS[head], OPTIONS[options]
    teacher = distill.Head(THEIR_KERNEL, THEIR_BIAS)

    def fused(hidden, head):
        return distill.fused_kd(hidden, head, THEIRS, teacher, chunk=chunk, **options)

    def whole(hidden, head):
        return naive(hidden, head, logits(THEIRS, teacher), **options)

    expected, slopes = jax.value_and_grad(whole, argnums=(0, 1))(HIDDEN, head)
    found, gradients = jax.jit(jax.value_and_grad(fused, argnums=(0, 1)))(HIDDEN, head)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(fused(HIDDEN, head), expected, rtol=1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure((HIDDEN, head))
    close(gradients, slopes)


@pytest.mark.parametrize("source", ["hidden", "logits", "top 5", "top of all"])
def test_what_the_teacher_gives(source):
    theirs = THEIRS @ THEIR_KERNEL
    k = {"top 5": 5, "top of all": CLASSES}.get(source)
    options = {"labels": LABELS, "weight": 0.6, "where": WHERE}
    teacher = {"hidden": (THEIRS, THEIR_KERNEL), "logits": (theirs,)}.get(source)
    if k is not None:
        teacher = (distill.top_k(theirs, k, temperature=2.0),)
    run = lambda h, w: distill.fused_kd(h, w, *teacher, temperature=2.0, chunk=10, **options)  # noqa: E731
    expected = jax.value_and_grad(
        lambda h, w: naive(h, distill.Head(w), theirs, temperature=2.0, k=k, **options),
        argnums=(0, 1),
    )(HIDDEN, KERNEL)
    found = jax.value_and_grad(run, argnums=(0, 1))(HIDDEN, KERNEL)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    close(found[1], expected[1])


def test_padding_does_not_matter_and_nothing_to_count_is_zero():
    broken = [np.where(WHERE[:, None], x, np.nan) for x in (HIDDEN, THEIRS)]
    labels = np.where(WHERE, LABELS, -100)

    def loss(hidden, kernel, where=WHERE):
        return distill.fused_kd(
            hidden, kernel, broken[1], THEIR_KERNEL, labels=labels, weight=0.5, where=where, chunk=8
        )

    few = [x[WHERE] for x in (HIDDEN, THEIRS, LABELS)]
    expected = naive(few[0], distill.Head(KERNEL), few[1] @ THEIR_KERNEL, few[2], 0.5)
    found, slopes = jax.value_and_grad(loss, argnums=(0, 1))(broken[0], KERNEL)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(x)) for x in slopes) and not np.any(slopes[0][~WHERE])
    assert loss(*broken[:1], KERNEL, np.zeros(TOKENS, bool)) == 0
    assert np.isnan(
        distill.fused_kd(HIDDEN, KERNEL, THEIRS, THEIR_KERNEL, labels=labels, weight=0.5)
    )


def test_leading_axes_chains_and_vmap():
    shaped = [x[:36].reshape(4, 9, -1) for x in (HIDDEN, THEIRS)]

    def loss(hidden, kernel, theirs):
        return distill.fused_kd(jnp.tanh(hidden), kernel, theirs, THEIR_KERNEL, chunk=5)

    def whole(hidden, kernel, theirs):
        return distill.kd(jnp.tanh(hidden) @ kernel, theirs @ THEIR_KERNEL)

    # Behind other operations, and multiplied: the cotangent is not one.
    scaled = lambda f: jax.grad(lambda *a: 3 * f(*a) ** 2, argnums=(0, 1))  # noqa: E731
    arguments = (shaped[0], KERNEL, shaped[1])
    close(scaled(loss)(*arguments), scaled(whole)(*arguments))
    each = jax.vmap(jax.grad(loss, argnums=1), (0, None, 0))(*arguments)
    for i in range(4):
        expected = jax.grad(whole, argnums=1)(shaped[0][i], KERNEL, shaped[1][i])
        close(each[i], expected)
    slope = jax.grad(loss, argnums=2)(*arguments)
    assert not np.any(slope)


def test_a_schedule_of_temperature_and_weight_is_one_program():
    @jax.jit
    def loss(kernel, temperature, weight):
        return distill.fused_kd(
            HIDDEN, kernel, THEIRS, THEIR_KERNEL,
            labels=LABELS, temperature=temperature, weight=weight, chunk=16,
        )  # fmt: skip

    for T, w in ((1.0, 0.2), (4.0, 0.9)):
        expected = naive(HIDDEN, distill.Head(KERNEL), THEIRS @ THEIR_KERNEL, LABELS, w, T)
        np.testing.assert_allclose(loss(KERNEL, T, w), expected, rtol=1e-5)
    assert loss._cache_size() == 1
    assert np.all(np.isfinite(jax.grad(loss)(KERNEL, 2.0, 0.5)))


def test_low_precision():
    hidden, kernel = (jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN, KERNEL))
    loss = lambda h, w: distill.fused_kd(h, w, THEIRS, THEIR_KERNEL, chunk=16)  # noqa: E731
    found, slopes = jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel)
    exact = [x.astype(jnp.float32) for x in (hidden, kernel)]
    expected, wide = jax.value_and_grad(loss, argnums=(0, 1))(*exact)
    assert found.dtype == jnp.float32 and {x.dtype for x in slopes} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    close(slopes, wide, 0.02)


def test_mixed_and_double_precision():
    mixed = jax.jit(jax.value_and_grad(distill.fused_kd, argnums=(0, 1)))
    found, slopes = mixed(jnp.asarray(HIDDEN, jnp.bfloat16), KERNEL, THEIRS, THEIR_KERNEL)
    assert [x.dtype for x in slopes] == [jnp.bfloat16, jnp.float32] and found.dtype == jnp.float32
    with jax.enable_x64(True):
        h, w, t, k = (jnp.asarray(x, jnp.float64) for x in (HIDDEN, KERNEL, THEIRS, THEIR_KERNEL))
        found, slopes = jax.value_and_grad(
            lambda h, w: distill.fused_kd(h, w, t, k, where=WHERE, chunk=8), argnums=(0, 1)
        )(h, w)
        expected, exact = jax.value_and_grad(
            lambda h, w: distill.kd(h @ w, t @ k, where=WHERE), argnums=(0, 1)
        )(h, w)
        assert found.dtype == slopes[1].dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-10)
        close(slopes, exact, 1e-7)  # compared in float32


def test_a_quantized_teacher_head():
    kernel = quant.quantize({"kernel": THEIR_KERNEL}, [("kernel", quant.Int(8))])["kernel"]
    found = distill.fused_kd(HIDDEN, KERNEL, THEIRS, distill.Head(kernel), chunk=16)
    expected = distill.kd(HIDDEN @ KERNEL, THEIRS @ kernel.materialise())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(TypeError, match="materialise"):
        distill.fused_kd(THEIRS, distill.Head(kernel), HIDDEN, KERNEL)


def test_temporary_memory_is_a_small_part_of_the_naive_losss():
    tokens, width, classes = 512, 64, 4096
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((tokens, width), (width, classes), (tokens, width), (width, classes))
    ]

    def whole(h, w, theirs, kernel):
        return distill.kd(h @ w, theirs @ kernel)

    def fused(*args):
        return distill.fused_kd(*args, chunk=64)

    used = [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
        .lower(*shapes)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for f in (whole, fused)
    ]
    assert used[1] < 0.2 * used[0], used


@pytest.mark.parametrize("labels", [None, np.array([0, 1])])
def test_classes_ruled_out(labels):
    hidden, kernel = jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 0.5, 0.0]])
    both, mine = jnp.array([0.0, 0, -jnp.inf, 0]), jnp.array([0.0, 0, -jnp.inf, -jnp.inf])
    options = {"labels": labels, "weight": 1.0 if labels is None else 0.5, "temperature": 2.0}

    def fused(kernel, ours, theirs):
        heads = distill.Head(kernel, ours), distill.Head(2 * kernel, theirs)
        return distill.fused_kd(hidden, heads[0], hidden, heads[1], chunk=1, **options)

    # What neither allows counts nothing; what only the student rules out is infinite.
    found, slope = jax.value_and_grad(fused)(kernel, both, mine)
    z, t = hidden @ kernel, hidden @ (2 * kernel)
    exact = distill.kd(z + both[None], t + mine[None], temperature=2.0)
    if labels is not None:
        exact = 0.5 * exact + 0.5 * distill.hard(z + both[None], labels)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    assert np.all(np.isfinite(slope))
    assert fused(kernel, mine, both) == jnp.inf
    logits = jnp.array([[0.0, -jnp.inf, 1.0, 2.0]] * 2)
    found = distill.fused_kd(hidden, kernel, logits, chunk=1)
    np.testing.assert_allclose(found, distill.kd(z, logits), rtol=1e-5)


def test_logits_far_from_zero():
    hidden = jnp.ones((3, 1))
    kernel, theirs = jnp.array([[500.0, 501.5, 499.0]]), jnp.array([[-900.0, -902.0, -901.0]])
    found, slope = jax.value_and_grad(distill.fused_kd, argnums=1)(hidden, kernel, hidden, theirs)
    exact = [np.float64(x) + shift for x, shift in ((kernel, -500.0), (theirs, 900.0))]
    log_q, log_p = (x - np.log(np.sum(np.exp(x))) for x in exact)
    np.testing.assert_allclose(found, np.sum(np.exp(log_p) * (log_p - log_q)), rtol=1e-3)
    np.testing.assert_allclose(slope, np.exp(log_q) - np.exp(log_p), rtol=1e-5, atol=1e-6)


def test_exports():
    shapes = [
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (HIDDEN, KERNEL, THEIRS, THEIR_KERNEL)
    ]
    step = jax.jit(jax.value_and_grad(lambda *a: distill.fused_kd(*a, chunk=8), argnums=(0, 1)))
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*shapes)


def test_errors():
    fused = distill.fused_kd
    cases = [
        (ValueError, lambda: fused(HIDDEN, KERNEL, THEIRS, THEIR_KERNEL[:, :9]), "has 50.* 9"),
        (ValueError, lambda: fused(HIDDEN, KERNEL.T, THEIRS, THEIR_KERNEL), r"\[50, 16\]"),
        (ValueError, lambda: fused(HIDDEN, KERNEL, THEIRS[:5], THEIR_KERNEL), r"\[37\].*\[5\]"),
        (ValueError, lambda: fused(HIDDEN, KERNEL, THEIRS, THEIR_KERNEL, weight=0.5), "labels="),
        (
            ValueError,
            lambda: fused(HIDDEN, distill.Head(KERNEL, BIAS[:3]), THEIRS, THEIR_KERNEL),
            r"bias \[50\]",
        ),
        (ValueError, lambda: fused(HIDDEN, KERNEL, THEIRS, THEIR_KERNEL, chunk=0), "chunk=0"),
        (
            ValueError,
            lambda: fused(HIDDEN, KERNEL, THEIRS, THEIR_KERNEL, temperature=0),
            "scalar above 0",
        ),
        (
            ValueError,
            lambda: fused(HIDDEN, KERNEL, distill.top_k(jnp.ones((TOKENS, 9)), 2)),
            "9 classes",
        ),
        (TypeError, lambda: fused(LABELS[:, None], KERNEL, THEIRS, THEIR_KERNEL), "int32"),
    ]
    for error, call, message in cases:
        with pytest.raises(error, match=message):
            call()
