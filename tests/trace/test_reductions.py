"""Largest and smallest values against NumPy, above all where a NaN has to show."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jopt.trace import reductions

SHAPES = [(8, 512), (64, 64), (1, 4096), (4096,), (2, 64, 48), (3, 5), (0, 4)]
BAD = [None, np.nan, -np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_numpy_has_them_with_nan_in_any_place(shape):
    """Shapes of 4,096 values among them, where XLA:CPU's own `max` loses NaN."""
    rng = np.random.default_rng(0)
    every = {(0,), (len(shape) - 1,), tuple(range(len(shape))), ()}
    for axes, keep in itertools.product(every, (False, True)):
        run = jax.jit(
            lambda x, a=axes, k=keep: (
                *reductions.ends(x, a, keepdims=k),
                reductions.largest(x, a, keepdims=k),
            )
        )
        for bad, place in itertools.product(BAD, (0, -1)):
            x = rng.standard_normal(shape).astype(np.float32)
            if bad is not None and x.size:
                x.reshape(-1)[place] = bad
            options = {"axis": axes, "keepdims": keep, "initial": np.float32(0)}
            low, high, most = x.min(**options), x.max(**options), np.abs(x).max(**options)
            found = run(x)
            np.testing.assert_array_equal(found[0], np.where(np.isnan(low), -np.inf, low))
            np.testing.assert_array_equal(found[1], np.where(np.isnan(high), np.inf, high))
            np.testing.assert_array_equal(found[2], np.where(np.isnan(most), np.inf, most))


@pytest.mark.parametrize("shape", [(64, 1024), (5, 7, 1024), (1, 32771), (40000,), (3, 131, 97)])
def test_many_values_are_laid_over_each_other(shape, monkeypatch):
    """On one device; the largest value, the smallest one and a NaN may be in any of the slices."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    axes = tuple(range(len(shape)))

    def both(x):
        return *reductions.ends(x, axes), reductions.largest(x, axes, keepdims=True)

    for devices in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda: devices)  # noqa: B023
        program = str(jax.make_jaxpr(lambda x: both(x))(x))
        assert (" slice[" in program) == (devices == 1)
    run = jax.jit(both)
    places = [*rng.integers(x.size, size=6), 0, x.size - 1]
    for place, value in itertools.product(places, (9, -9, np.nan, -np.nan, np.inf)):
        new = x.copy()
        new.reshape(-1)[place] = value
        low, high, most = new.min(), new.max(), np.abs(new).max(keepdims=True)
        found = run(new)
        np.testing.assert_array_equal(found[0], np.where(np.isnan(low), -np.inf, low))
        np.testing.assert_array_equal(found[1], np.where(np.isnan(high), np.inf, high))
        np.testing.assert_array_equal(found[2], np.where(np.isnan(most), np.inf, most))
    batch = jax.vmap(both)(jnp.stack([x, 2 * x]))
    np.testing.assert_array_equal(batch[1], np.stack([x.max(), 2 * x.max()]))


def test_sizes_that_are_not_known_and_meshes_of_other_hosts(monkeypatch):
    """One device here says nothing of the devices of a mesh that a program is made for."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for shape, axes in itertools.product(("b, 640", "b, c", "64, b"), ((0, 1), (1,))):
        x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(shape), jnp.float32)
        program = jax.export.export(jax.jit(lambda x, a=axes: reductions.ends(x, a)))(x)
        x = np.random.default_rng(0).standard_normal((64, 640)).astype(np.float32)
        np.testing.assert_array_equal(program.call(x)[1], x.max(axes))
    mesh = jax.sharding.AbstractMesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
        x = jax.ShapeDtypeStruct((8, 8248), jnp.float32, sharding=place)
        traced = jax.jit(lambda x: reductions.largest(x, (0, 1))).trace(x)
        assert "reduce" in traced.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(ValueError, match="out of bounds"):
        reductions.largest(jnp.float32(3), 0)


def test_no_values_leave_what_there_was_initially():
    low, high = reductions.ends(jnp.zeros((0, 3)), 0, initial=(np.inf, -np.inf))
    np.testing.assert_array_equal(low, np.full(3, np.inf))
    np.testing.assert_array_equal(high, np.full(3, -np.inf))


def test_they_run_under_vmap_and_lower_for_every_platform():
    x = jax.random.normal(jax.random.key(0), (3, 8, 16))
    both = jax.vmap(lambda x: reductions.ends(x, (0, 1)))(x)
    np.testing.assert_array_equal(both[0], np.minimum(np.min(x, (1, 2)), 0))
    np.testing.assert_array_equal(both[1], np.maximum(np.max(x, (1, 2)), 0))
    lower = jax.export.export(
        jax.jit(lambda x: reductions.largest(x, 0)), platforms=("cuda", "tpu")
    )
    assert lower(x).out_avals[0].shape == (8, 16)
