"""`lift` under `grad`, `vmap` and the lowering for each platform, over a table of functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_functions import CELLS, close
from toy_leaves import dense

from jopt.trace import lift


def _total(function):
    return lambda p, x: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(function(p, x)))


@pytest.mark.parametrize("name", [n for n in CELLS if n not in ("tied_embedding", "kernel_cast")])
def test_gradients_of_inputs_and_scales(name):
    function, params, x, _, allow_dense = CELLS[name]
    lifted = lift(function, allow_dense=allow_dense)

    def plain(params, x):
        return _total(function)(dense(params), x)

    ours = jax.jit(jax.grad(_total(lifted), (0, 1), allow_int=True))(params, x)
    theirs = jax.jit(jax.grad(plain, (0, 1), allow_int=True))(params, x)

    def floats(tree):
        return [a for a in jax.tree.leaves(tree) if a.dtype != jax.dtypes.float0]

    close(floats(ours), floats(theirs), 1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_vmap_over_inputs_and_over_an_ensemble_of_weights(name):
    function, params, x, _, allow_dense = CELLS[name]
    xs = jnp.stack([x, x[::-1]])
    ensemble = jax.tree.map(lambda a: np.stack([a, a[::-1]]), params)
    lifted = lift(function, allow_dense=allow_dense)

    def both(function, params, ensemble):
        rows = jax.vmap(function, (None, 0))(params, xs)
        return rows, jax.vmap(function, (0, None))(ensemble, x)

    ours = jax.jit(lambda p, e: both(lifted, p, e))(params, ensemble)
    theirs = jax.jit(lambda p, e: both(function, dense(p), jax.vmap(dense)(e)))(params, ensemble)
    close(ours, theirs, 2e-2 if name == "kernel_cast" else 2e-5)


@pytest.mark.parametrize("name", ["scan_remat", "branches", "custom_jvp_of_weight", "convolution"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(name, platform):
    function, params, x, _, allow_dense = CELLS[name]
    loss = jax.grad(_total(lift(function, allow_dense=allow_dense)), 1)
    jax.export.export(jax.jit(loss), platforms=[platform])(params, x)
