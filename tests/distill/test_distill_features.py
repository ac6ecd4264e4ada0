"""Losses on features: float64 references with gradients, PyTorch's formulas, masks, errors."""

import features_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_reference import slope

from jopt import distill


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LEARNED = {"kernel": normal(8, 3, 5), "bias": normal(9, 5)}
INDICES, NEGATIVES = np.array([7, 2, 5]), np.array([[0, 1, 9, 4], [3, 8, 9, 1], [6, 0, 1, 2]])
BANK = distill.crd_bank(jax.random.key(0), 10, 4)
ROWS = [np.float64(x) for x in (BANK.student, BANK.teacher)]
EARLY = normal(3, 3, 4, 4, 2)

# name: our loss and the reference, both of (student, teacher), and the shapes of these.
MAPS, WIDE = (3, 2, 2, 3), (3, 2, 2, 5)
LOSSES = {
    "hints": (
        lambda s, t, **k: distill.hints(s, t, LEARNED, **k),
        lambda s, t: reference.hints(s, t, LEARNED["kernel"], LEARNED["bias"]).mean(),
        MAPS,
        WIDE,
    ),
    "hints without a projection": (
        distill.hints,
        lambda s, t: np.mean((s - t) ** 2),
        (3, 4),
        (3, 4),
    ),
    "attention_transfer": (
        distill.attention_transfer,
        lambda s, t: reference.attention_transfer(s, t).mean(),
        MAPS,
        WIDE,
    ),
    "attention_transfer, cubed": (
        lambda s, t, **k: distill.attention_transfer(s, t, power=3.0, **k),
        lambda s, t: reference.attention_transfer(s, t, 3.0).mean(),
        MAPS,
        WIDE,
    ),
    "fsp": (
        lambda s, t, **k: distill.fsp((EARLY[:, ::2, ::2], s), (EARLY[:, 1::2, 1::2], t), **k),
        lambda s, t: reference.fsp((EARLY[:, ::2, ::2], s), (EARLY[:, 1::2, 1::2], t)).mean(),
        MAPS,
        MAPS,
    ),
    "similarity": (distill.similarity, reference.similarity, MAPS, (3, 7)),
    "relational": (distill.relational, reference.relational, (5, 3), (5, 4)),
    "relational, distances": (
        lambda s, t, **k: distill.relational(s, t, angle=0, **k),
        lambda s, t: reference.relational(s, t, 1.0, 0.0),
        (5, 3),
        (5, 4),
    ),
    "crd": (
        lambda s, t, **k: distill.crd(s, t, BANK, INDICES, NEGATIVES, **k),
        lambda s, t: reference.crd(s, t, *ROWS, None, INDICES, NEGATIVES)[0].mean(),
        (3, 4),
        (3, 4),
    ),
}
every = pytest.mark.parametrize("name", LOSSES)


def pair(name):
    *_, ours, theirs = LOSSES[name]
    return normal(0, *ours), normal(1, *theirs)


@every
def test_values_and_gradients_are_those_of_float64(name):
    ours, theirs, *_ = LOSSES[name]
    student, teacher = pair(name)
    value, gradient = jax.jit(jax.value_and_grad(ours))(student, teacher)
    assert value.shape == () and value.dtype == jnp.float32
    np.testing.assert_allclose(value, theirs(np.float64(student), np.float64(teacher)), rtol=3e-5)
    if name != "crd":  # its Z is a constant to the gradient, not to a difference
        expected = slope(lambda s: theirs(s, np.float64(teacher)), student)
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-6)
        assert not np.any(jax.grad(ours, argnums=1)(student, teacher))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("crd", "fsp")])
def test_examples_that_do_not_count_are_as_if_left_out(name):
    ours, theirs, *_ = LOSSES[name]
    student, teacher = pair(name)
    where = np.arange(len(student)) != 1
    broken = [x.copy() for x in (student, teacher)]
    for x in broken:
        x[1] = np.nan
    given = where
    if name == "hints":
        given = np.broadcast_to(where[:, None, None], student.shape[:-1])
    value, gradient = jax.value_and_grad(ours)(*broken, where=given)
    exact = theirs(*(np.float64(x[where]) for x in (student, teacher)))
    np.testing.assert_allclose(value, exact, rtol=3e-5)
    expected = slope(lambda s: theirs(s, np.float64(teacher[where])), student[where])
    np.testing.assert_allclose(gradient[where], expected, rtol=2e-4, atol=2e-6)
    assert not np.any(gradient[1])
    assert ours(*broken, where=np.zeros_like(given)) == 0


@every
def test_low_precision_vmap_and_export(name):
    ours, theirs, *_ = LOSSES[name]
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in pair(name))
    value, gradient = jax.value_and_grad(ours)(student, teacher)
    exact = theirs(*(np.asarray(x, np.float64) for x in (student, teacher)))
    np.testing.assert_allclose(value, exact, rtol=3e-5)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    both = jax.vmap(ours)(*(jnp.stack([x, 2 * x]) for x in (student, teacher)))
    np.testing.assert_allclose(both[0], value, rtol=1e-5)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (student, teacher)]
    step = jax.jit(jax.value_and_grad(ours))
    jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*shapes)


@pytest.mark.parametrize("name", ["similarity", "relational", "attention_transfer", "crd"])
def test_dead_features_have_a_gradient(name):
    ours, *_ = LOSSES[name]
    student, teacher = pair(name)
    for dead in (np.zeros_like(student), np.stack([student[0]] * len(student))):
        value, gradient = jax.value_and_grad(ours)(dead, teacher)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_the_projection_is_learned_with_the_student():
    student, teacher = normal(0, 6, 3), normal(1, 6, 5)
    learned = distill.projection(jax.random.key(0), 3, 5)
    loss = lambda p: distill.hints(student, teacher, p)  # noqa: E731
    exact = slope(
        lambda kernel: reference.hints(student, teacher, kernel, np.zeros(5)).mean(),
        learned["kernel"],
    )
    np.testing.assert_allclose(jax.grad(loss)(learned)["kernel"], exact, rtol=1e-4, atol=1e-6)
    wide = distill.projection(jax.random.key(1), 400, 300, dtype=jnp.bfloat16)
    assert wide["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(wide["kernel"]).std(), 1 / 20, rtol=0.05)


def test_positions_that_do_not_count_of_attention_transfer():
    student, teacher = normal(0, 2, 4, 3), normal(1, 2, 4, 5)
    where = np.array([[True, True, True, False], [True, True, False, False]])
    broken = [np.where(where[..., None], x, np.nan) for x in (student, teacher)]
    each = distill.attention_transfer(*broken, where=where, reduction=None)
    for row, length in enumerate((3, 2)):
        pair = [np.float64(x[row : row + 1, :length]) for x in (student, teacher)]
        np.testing.assert_allclose(each[row], reference.attention_transfer(*pair)[0], rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(distill.attention_transfer)(*broken, where=where)))


def test_fsp_reduces_the_larger_map_and_skips_examples():
    early, late = normal(0, 3, 4, 6, 2), normal(1, 3, 2, 3, 5)
    other, later = normal(2, 3, 2, 2, 2), normal(3, 3, 2, 2, 5)
    smaller = early.reshape(3, 2, 2, 3, 2, 2).max((2, 4))
    exact = reference.fsp((smaller, late), (other, later))
    each = distill.fsp((early, late), (other, later), reduction=None)
    np.testing.assert_allclose(each, exact, rtol=1e-5)
    where = np.array([True, False, True])
    broken = early.copy()
    broken[1] = np.nan
    found, gradient = jax.value_and_grad(
        lambda x: distill.fsp((x, late), (other, later), where=where)
    )(broken)
    np.testing.assert_allclose(found, exact[where].mean(), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_crd_both_embeddings_learn_and_the_bank_follows():
    s, t = pair("crd")
    exact, scale = reference.crd(s, t, *ROWS, None, INDICES, NEGATIVES)
    bank = jax.jit(distill.crd_update)(BANK, s, t, INDICES, NEGATIVES)
    np.testing.assert_allclose(bank.scale, scale, rtol=1e-5)
    for rows, old, f in zip(bank[:2], ROWS, (s, t), strict=True):
        for i, x in zip(INDICES, f, strict=True):
            expected = reference.unit(0.5 * old[i] + 0.5 * reference.unit(np.float64(x)))
            np.testing.assert_allclose(rows[i], expected, rtol=1e-5, atol=1e-7)
        rest = np.setdiff1d(np.arange(10), INDICES)
        np.testing.assert_array_equal(rows[rest], np.float32(old[rest]))
    # From now on Z is fixed, and the gradient is that of the formula, on both sides.
    rows = [np.float64(x) for x in bank[:2]]

    def formula(a, b):
        return reference.crd(a, b, *rows, np.float64(bank.scale), INDICES, NEGATIVES)[0].mean()

    ours = lambda a, b: distill.crd(a, b, bank, INDICES, NEGATIVES)  # noqa: E731
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(s, t)
    np.testing.assert_allclose(value, formula(np.float64(s), np.float64(t)), rtol=1e-5)
    np.testing.assert_allclose(
        gradients[0], slope(lambda a: formula(a, t), s), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        gradients[1], slope(lambda b: formula(s, b), t), rtol=1e-3, atol=1e-5
    )
    again = distill.crd_update(bank, s, t, INDICES, NEGATIVES)
    np.testing.assert_array_equal(again.scale, bank.scale)
    assert exact.shape == (3,)


def test_crd_examples_that_do_not_count():
    s, t = pair("crd")
    where = np.array([True, False, True])
    few = (s[where], t[where], BANK, INDICES[where], NEGATIVES[where])
    broken = [np.where(where[:, None], x, np.nan) for x in (s, t)]
    value, gradient = jax.value_and_grad(distill.crd)(
        *broken, BANK, INDICES, NEGATIVES, where=where
    )
    np.testing.assert_allclose(value, distill.crd(*few), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[1])
    bank = distill.crd_update(BANK, *broken, INDICES, NEGATIVES, where=where)
    expected = distill.crd_update(BANK, *few[:2], *few[3:])
    for a, b in zip(bank, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    none = distill.crd_update(BANK, *broken, INDICES, NEGATIVES, where=np.zeros(3, bool))
    for a, b in zip(none, BANK, strict=True):
        np.testing.assert_array_equal(a, b)


def test_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    student, teacher = normal(0, 4, 3, 2, 5), normal(1, 4, 3, 2, 5)

    def attention(f):  # theirs is [batch, channels, height, width]
        return F.normalize(f.movedim(-1, 1).pow(2).mean(1).reshape(f.shape[0], -1))

    def gram(f):
        f = f.reshape(f.shape[0], -1)
        return F.normalize(f @ f.T)

    def angles(f):
        f = f.reshape(f.shape[0], -1)
        td = F.normalize(f.unsqueeze(0) - f.unsqueeze(1), p=2, dim=2)
        return torch.bmm(td, td.transpose(1, 2)).reshape(-1)

    def spread(f):
        f = f.reshape(f.shape[0], -1)
        d = (f.unsqueeze(0) - f.unsqueeze(1)).pow(2).sum(-1).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(f), dtype=f.dtype))
        return d / d[d > 0].mean()

    pairs = [
        (lambda s, t: (attention(s) - attention(t)).pow(2).mean(), distill.attention_transfer),
        (lambda s, t: (gram(s) - gram(t)).pow(2).sum() / 16, distill.similarity),
        (
            lambda s, t: (
                F.smooth_l1_loss(spread(s), spread(t)) + 2 * F.smooth_l1_loss(angles(s), angles(t))
            ),
            distill.relational,
        ),
        (F.mse_loss, distill.hints),
    ]
    for theirs, ours in pairs:
        s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
        loss = theirs(s, torch.tensor(teacher, dtype=torch.float64))
        loss.backward()
        value, gradient = jax.value_and_grad(ours)(student, teacher)
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
        np.testing.assert_allclose(gradient, s.grad.numpy(), rtol=1e-3, atol=1e-6)


def test_errors():
    x, images = jnp.ones((2, 5)), jnp.ones((2, 4, 4, 5))
    bank, indices = distill.crd_bank(jax.random.key(0), 9, 5), jnp.zeros(2, jnp.int32)
    cases = [
        (ValueError, lambda: distill.hints(x, x[:, :3]), r"projection\(key, 5, 3\)"),
        (ValueError, lambda: distill.hints(x, x, LEARNED), r"kernel \[5, 5\].*\[3, 5\]"),
        (ValueError, lambda: distill.hints(images, images[:, ::2]), "the same positions"),
        (ValueError, lambda: distill.attention_transfer(x, x), r"\[batch, positions"),
        (ValueError, lambda: distill.attention_transfer(images, images, power=0.5), "1 or more"),
        (ValueError, lambda: distill.similarity(x, x[:1]), "the same examples"),
        (TypeError, lambda: distill.similarity(x, indices), "teacher is int32"),
        (ValueError, lambda: distill.relational(x, x[:1]), r"one batch.*\[1, 5\]"),
        (ValueError, lambda: distill.fsp((images, images), (images, images[..., :2])), "channels"),
        (
            ValueError,
            lambda: distill.fsp((images, images[:, :3]), (images, images)),
            "multiples of one another",
        ),
        (ValueError, lambda: distill.crd(x[:, :2], x[:, :2], bank, indices, x), "as wide as"),
        (TypeError, lambda: distill.crd(x, x, bank, indices, x), "negatives.*float32"),
        (
            ValueError,
            lambda: distill.crd(x, x, bank, indices[:1], indices[:, None]),
            r"indices.*\[2\].*\[1\]",
        ),
    ]
    for error, call, message in cases:
        with pytest.raises(error, match=message):
            call()
