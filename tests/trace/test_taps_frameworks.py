"""`taps` by module name over flax linen, equinox and haiku, and what it says of flax nnx."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy_functions import close, normal

from jopt.trace import taps

KEY = jax.random.key(0)
X = normal(0, 2, 5, 8)


class Block(nn.Module):
    """A residual unit, to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8)(nn.silu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Model(nn.Module):
    """Scanned and checkpointed blocks between two layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x)


def test_linen_modules_inside_a_scan_equal_flaxs_own_intermediates():
    model = Model()
    params = jax.jit(model.init)(KEY, X)
    tapped = taps(model.apply, ["Model/first", "Model/blocks", "Model/blocks/*", "Model/head"])
    out, found = jax.jit(tapped)(params, X)
    theirs, state = model.apply(params, X, capture_intermediates=True)
    kept = state["intermediates"]
    close(out, theirs, 1e-5)
    close(found["Model/first"], kept["first"]["__call__"][0], 1e-5)
    close(found["Model/head"], out, 1e-5)
    # Flax does not capture inside its scan; the block is done by hand there.
    x, block = found["Model/first"], params["params"]["blocks"]
    for i in range(3):
        layer = jax.tree.map(lambda a, i=i: a[i], block)
        (x, _), state = Block().apply({"params": layer}, x, None, capture_intermediates=True)
        for name in ("LayerNorm_0", "Dense_0", "Dense_1"):
            value = state["intermediates"][name]["__call__"][0]
            close(found[f"Model/blocks/{name}"][i], value, 1e-4)
        close(found["Model/blocks"][i], x, 1e-4)


def test_haiku_modules():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
    params = model.init(KEY, X)
    out, found = jax.jit(taps(model.apply, "mlp/linear_*"))(params, X)
    first = params["mlp/~/linear_0"]
    close(found["mlp/linear_0"], X @ first["w"] + first["b"][None, None], 1e-5)
    close(found["mlp/linear_1"], out)


def test_equinox_layers_are_numbered():
    model = eqx.nn.MLP(8, 4, 16, 2, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)

    def apply(p, x):
        return jax.vmap(jax.vmap(eqx.combine(p, static)))(x)

    out, found = jax.jit(taps(apply, "eqx.nn.MLP/eqx.nn.Linear*"))(params, X)
    assert list(found) == [f"eqx.nn.MLP/eqx.nn.Linear{n}" for n in ("", "#1", "#2")]
    close(found["eqx.nn.MLP/eqx.nn.Linear"], jax.vmap(jax.vmap(model.layers[0]))(X), 1e-5)
    np.testing.assert_array_equal(found["eqx.nn.MLP/eqx.nn.Linear#2"], out)


def test_nnx_leaves_no_names_but_has_paths():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    model = Pair(nnx.Rngs(0))
    graph, state = nnx.split(model)

    def apply(p, x):
        return nnx.merge(graph, p)(x)

    with pytest.raises(ValueError, match=r"module: none \(flax\.nnx and plain functions leave no"):
        taps(apply, "Pair/one")(state, X)
    _, found = jax.jit(taps(apply, "one/bias/*"))(state, X)
    close(list(found.values()), [model.one(X)], 1e-5)


def test_a_student_learns_from_taps_of_a_teacher():
    teacher, student = nn.Dense(8), nn.Dense(8)
    wanted, params = teacher.init(KEY, X), student.init(jax.random.key(1), X)

    @jax.jit
    def step(params):
        def loss(params):
            ours = taps(student.apply, "Dense")(params, X)[1]["Dense"]
            theirs = taps(teacher.apply, "Dense")(wanted, X)[1]["Dense"]
            return jnp.mean((ours - jax.lax.stop_gradient(theirs)) ** 2)

        value, slope = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, slope)

    values = []
    for _ in range(20):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < 0.2 * values[0] and step._cache_size() == 1
