"""Cached teachers: the loss on top-k and tail, keys by content, the folder on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_reference import kl, slope, softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from jopt import distill

pytest.importorskip("safetensors")


def logits(seed, *shape, scale=2.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(student, teacher, k, T):
    """KL between the distributions over the teacher's k best classes and one for all others."""
    loss = []
    for s, t in zip(np.float64(student), np.float64(teacher), strict=True):
        p, q, best = softmax(t / T), softmax(s / T), np.argsort(-t)[:k]
        rest = np.setdiff1d(np.arange(len(t)), best)
        loss.append(T**2 * kl(*(np.append(x[best], x[rest].sum()) for x in (p, q))))
    return np.array(loss)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 3, 9])
def test_values_and_gradients_are_those_of_float64(k, temperature):
    student, teacher = logits(0, 4, 9), logits(1, 4, 9)
    cached = distill.top_k(teacher, k, temperature=temperature)
    each = distill.cached_kd(student, cached, reduction=None)
    np.testing.assert_allclose(each, reference(student, teacher, k, temperature), rtol=3e-5)
    gradient = jax.jit(jax.grad(distill.cached_kd))(student, cached)
    exact = slope(lambda s: reference(s, teacher, k, temperature).mean(), student)
    np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=2e-6)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 8]))
def test_it_grows_with_k_up_to_kd(seed, k):
    student, teacher = logits(seed, 3, 8), logits(seed + 1, 3, 8)

    def loss(k):
        return distill.cached_kd(student, distill.top_k(teacher, k), reduction=None)

    whole = distill.kd(student, teacher, reduction=None)
    assert np.all(loss(k) <= whole + 1e-5) and np.all(loss(max(k - 1, 1)) <= loss(k) + 1e-5)
    np.testing.assert_allclose(loss(8), whole, rtol=1e-4, atol=1e-6)
    assert np.all(distill.cached_kd(teacher, distill.top_k(teacher, k)) < 1e-5)


def test_the_tail_keeps_the_student_from_being_too_sure():
    # A teacher with 60 % on its best class: top 1 alone, scaled up to 1, would teach certainty.
    teacher = jnp.log(jnp.array([[0.6, 0.2, 0.1, 0.1]]))
    cached, student = distill.top_k(teacher, 1), jnp.zeros((1, 4))
    step = jax.jit(lambda s: s - 0.5 * jax.grad(distill.cached_kd)(s, cached))
    for _ in range(300):
        student = step(student)
    np.testing.assert_allclose(
        jax.nn.softmax(student)[0], [0.6, 0.4 / 3, 0.4 / 3, 0.4 / 3], rtol=1e-3
    )


def test_padding_extremes_and_low_precision():
    student, teacher = logits(0, 2, 3, 9), logits(1, 2, 3, 9)
    where = np.array([[True, True, False], [True, False, False]])
    cached = distill.top_k(teacher, 2)
    broken = distill.TopK(
        np.where(where[..., None], cached.log_p, np.nan),
        np.where(where[..., None], cached.indices, -7),
        np.where(where, cached.tail, np.nan), 1.0, 9,
    )  # fmt: skip
    bad = np.where(where[..., None], student, np.nan)
    found, gradient = jax.value_and_grad(distill.cached_kd)(bad, broken, where=where)
    exact = np.stack([reference(s, t, 2, 1.0) for s, t in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(found, exact[where].mean(), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[~where])
    # A teacher that is certain, a student that is wildly wrong.
    sure = distill.top_k(jnp.array([[300.0, 0, 0]]), 1)
    value, gradient = jax.value_and_grad(distill.cached_kd)(jnp.array([[-300.0, 0, 0]]), sure)
    np.testing.assert_allclose(value, 300 + np.log(2), rtol=1e-4)
    assert np.all(np.isfinite(gradient))
    low = distill.cached_kd(jnp.asarray(student, jnp.bfloat16), cached)
    assert low.dtype == jnp.float32


def test_top_k_and_its_errors():
    found = jax.jit(lambda x: distill.top_k(x, 2, temperature=2.0))(logits(0, 4, 9))
    assert (found.temperature, found.classes) == (2.0, 9)
    p = softmax(np.float64(logits(0, 4, 9)) / 2)
    best = -np.sort(-p)[:, :2]
    np.testing.assert_allclose(np.exp(found.log_p), best, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.tail), 1 - best.sum(-1), rtol=1e-5)
    cases = [
        (lambda: distill.top_k(jnp.ones(5), 6), "1 to 5"),
        (lambda: distill.top_k(jnp.ones(5), 2, temperature=0), "above 0"),
        (lambda: distill.cached_kd(jnp.ones((4, 8)), found), "9 classes.*4, 8"),
        (lambda: distill.cached_kd(jnp.ones((3, 9)), found), r"\[3\] examples: it is \[4\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_keys_are_of_the_content():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    keys = distill.content_keys(x)
    assert keys.shape == (3, 16) and keys.dtype == np.uint8
    np.testing.assert_array_equal(distill.content_keys(x[::-1]), keys[::-1])
    np.testing.assert_array_equal(distill.content_keys(x.astype(">f4")), keys)
    np.testing.assert_array_equal(distill.content_keys(jnp.asarray(x)), keys)
    np.testing.assert_array_equal(distill.content_keys(np.asfortranarray(x)), keys)
    others = [x + 1e-6, x.view(np.int32), x.reshape(3, 2, 2), x[:, ::-1], {"x": x}, (x, x[:, 0])]
    for other in others:
        assert not np.any(np.all(distill.content_keys(other) == keys, axis=-1)), other
    with pytest.raises(ValueError, match=r"\(3, 4\), \(2,\)"):
        distill.content_keys((x, np.zeros(2)))


def wise(x):
    return np.asarray(x, np.float32).reshape(len(x), -1) @ logits(9, 12, 7)


IMAGES = logits(3, 10, 3, 4, scale=1.0)


def filled(folder, **options):
    with distill.CacheWriter(folder, teacher="wise", shard=4, **options) as writer:
        writer.add(IMAGES[:6], distill.top_k(wise(IMAGES[:6]), 3, temperature=2.0))
        writer.add(IMAGES[4:], distill.top_k(wise(IMAGES[4:]), 3, temperature=2.0))
    return distill.Cache(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_written_is_found_in_any_order(tmp_path, dtype):
    cache = filled(tmp_path, dtype=dtype)
    assert len(cache) == 10 and cache.teacher == "wise"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".safetensors"] * 3
    order = np.random.default_rng(0).permutation(10)[:7]
    found = cache(IMAGES[order])
    expected = distill.top_k(wise(IMAGES[order]), 3, temperature=2.0)
    assert (found.temperature, found.classes) == (2.0, 7)
    np.testing.assert_array_equal(found.indices, expected.indices)
    tolerance = 0 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(found.log_p, expected.log_p, rtol=tolerance)
    np.testing.assert_array_equal(found.tail, expected.tail)
    student = logits(5, 7, 7)
    np.testing.assert_allclose(
        distill.cached_kd(student, found), distill.cached_kd(student, expected), rtol=5e-3
    )


def test_an_augmented_example_is_not_mistaken_for_its_original(tmp_path):
    cache = filled(tmp_path)
    batch = np.concatenate([IMAGES[:2], IMAGES[2:4, :, ::-1]])
    cached, found = cache.find(batch)
    np.testing.assert_array_equal(found, [True, True, False, False])
    with pytest.raises(ValueError, match="2 of 4 examples: the teacher never saw these bytes"):
        cache(batch)
    student = logits(5, 4, 7)
    loss = distill.cached_kd(student, cached, where=found)
    np.testing.assert_allclose(loss, distill.cached_kd(student[:2], cache(IMAGES[:2])), rtol=1e-6)


def test_sequences_and_a_teacher_that_is_absent(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 11, (6, 5)).astype(np.int32)
    table = logits(1, 11, 11)
    with distill.CacheWriter(tmp_path) as writer:
        writer.add(tokens, distill.top_k(table[tokens], 4))
    del table
    cache, student = distill.Cache(tmp_path), jnp.zeros((11, 11))

    @jax.jit
    def step(student, tokens, cached):
        loss, gradient = jax.value_and_grad(lambda s: distill.cached_kd(s[tokens], cached))(student)
        return student - 20.0 * gradient, loss

    losses = []
    for i in range(40):
        batch = tokens[(i % 3) * 2 : (i % 3) * 2 + 2]
        student, loss = step(student, batch, cache(batch))
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0] and step._cache_size() == 1


def test_grain_streams_it(tmp_path):
    grain = pytest.importorskip("grain")
    cache = filled(tmp_path)
    source = grain.MapDataset.source(list(range(10))).map(lambda i: IMAGES[i])
    data = source.batch(4, drop_remainder=True).map(lambda x: (x, cache(x)))
    x, cached = data[1]
    np.testing.assert_array_equal(cached.indices, distill.top_k(wise(x), 3).indices)


def test_a_writer_goes_on_where_another_stopped(tmp_path):
    filled(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    writer = distill.CacheWriter(tmp_path, teacher="wise")
    new = np.concatenate([IMAGES[:2], IMAGES[:2] + 1])
    np.testing.assert_array_equal(writer.missing(new), [False, False, True, True])
    writer.add(new, distill.top_k(wise(new), 3, temperature=2.0))
    writer.flush()
    assert len(distill.Cache(tmp_path)) == 12
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}.items()
    with pytest.raises(ValueError, match="holds the outputs of 'wise'"):
        distill.CacheWriter(tmp_path, teacher="foolish")
    with pytest.raises(ValueError, match=r"'temperature': '2\.0'.*'temperature': '1\.0'"):
        writer.add(new, distill.top_k(wise(new), 3))
    with pytest.raises(ValueError, match="4 examples and outputs for 2"):
        writer.add(new, distill.top_k(wise(new[:2]), 3, temperature=2.0))


def test_a_killed_writer_leaves_nothing_half(tmp_path, monkeypatch):
    def die(*args):
        raise OSError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", die)
        with pytest.raises(OSError, match="killed"):
            filled(tmp_path)
    assert not list(tmp_path.iterdir())
    # What a kill leaves behind is not read.
    (tmp_path / ".ab.safetensors.1.partial").write_bytes(b"half")
    assert len(filled(tmp_path)) == 10
    with pytest.raises(RuntimeError), distill.CacheWriter(tmp_path / "new") as writer:
        writer.add(IMAGES, distill.top_k(wise(IMAGES), 3))
        raise RuntimeError
    assert not list((tmp_path / "new").iterdir())


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="found no outputs"):
        distill.Cache(tmp_path)
    filled(tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    whole = path.read_bytes()
    for broken in (whole[:40], whole[:-5], b"", whole.replace(b"topk/1", b"topk/2")):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"`{path}` is damaged, or holds no teacher's outputs"):
            distill.Cache(tmp_path)
