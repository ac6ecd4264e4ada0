"""Every framework and every kind of operation, on int8 weights and int8 activations.

Products run on integers or `explain` says why not; values and derivatives are those of the
dequantized function under `jit`, `vmap` and on eight devices; the float function stays as it was.
"""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec
from matrix_cells import OPERATIONS, WEIGHTS, Cell, X, normal
from toy_leaves import bodies, dense

from jopt import quant, trees
from jopt.trace import explain, lift, sites

FRAMEWORKS = {
    "linen": "flax.linen",
    "nnx": "flax.nnx",
    "equinox": "equinox",
    "haiku": "haiku",
    "plain": "jax",
}
OMITTED: dict[tuple[str, str], str] = {}
MATRIX = [(f, o) for f in FRAMEWORKS for o in OPERATIONS if (f, o) not in OMITTED]

W8 = quant.Int(8)
W8A8 = quant.Spec(W8, W8)
# Hundreds of small programs, each run a few times.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.lru_cache
def made(framework, operation):
    """A cell; its weights as integers, as integers that meet integers, and the latter in floats."""
    pytest.importorskip(FRAMEWORKS[framework])
    cell = importlib.import_module(f"matrix_{framework}").MAKERS[operation]()

    def where(path, leaf):
        return jnp.ndim(leaf) >= 2 and re.fullmatch(WEIGHTS, path) is not None

    found = sites(cell.apply, cell.params, cell.x)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def integers(params):
        return quant.quantize(params, [(where, W8)], sites=found)

    stored = integers(cell.params)
    met = trees.map_with_path(with_activations, stored)
    return cell, stored, met, quant.qat(cell.params, [(where, W8A8)], sites=found)


def with_activations(_, leaf):
    return dataclasses.replace(leaf, activation=W8) if isinstance(leaf, quant.QArray) else leaf


@pytest.fixture(params=MATRIX, ids=lambda pair: "-".join(pair))
def cell(request):
    return made(*request.param)


def lifted(cell):
    return lift(cell.apply, allow_dense=bool(cell.dense))


def text(function, params, x):
    """The jaxpr of a function that is traced again, whatever is cached of its parts."""
    jaxpr = jax.make_jaxpr(lambda params, x: function(params, x))(params, x)
    return re.sub(r"0x[0-9a-f]+", "", str(jaxpr))


def integer_products(function, *args):
    """How many products have two int8 operands and an int32 result, in all bodies."""
    found = 0
    for body in bodies(jax.make_jaxpr(lambda *args: function(*args))(*args)):
        for equation in body.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                types = [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
                found += types == [jnp.int8, jnp.int8, jnp.int32]
    return found


def near(one, other, tolerance):
    """Agreement in the mean: an activation that falls next to a rounding boundary may flip."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    assert one.shape == other.shape and np.linalg.norm(other) > 0
    assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


def close(one, other, tolerance=2e-5):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(1.0, np.abs(b).max(initial=0)))


def test_every_cell_is_there_or_omitted_for_a_reason():
    for framework, package in FRAMEWORKS.items():
        pytest.importorskip(package)
        made = set(importlib.import_module(f"matrix_{framework}").MAKERS)
        assert made == {o for o in OPERATIONS if (framework, o) not in OMITTED}


def test_int8_runs_as_int8_or_the_report_says_why_not(cell):
    cell, _, met, _ = cell
    assert integer_products(lifted(cell), met, cell.x) == cell.int8
    assert integer_products(cell.apply, cell.params, cell.x) == 0
    report = explain(cell.apply, met, cell.x)
    weights = {path for path, leaf in trees.items(met) if isinstance(leaf, quant.QArray)}
    assert {entry.path for entry in report} == weights
    served = {entry.path for entry in report if entry.how == "a product of integers"}
    joined = {entry.path for entry in report if entry.operation == "concatenate"}  # with another
    refused = [entry for entry in report if entry.refused]
    assert weights == served | joined | {entry.path for entry in refused}
    assert bool(refused) == bool(cell.dense)
    if not refused:
        return
    first = refused[0]
    assert first.operation == cell.dense and first.path not in served
    assert cell.dense in first.how or "custom_vjp" in first.how
    with pytest.raises(ValueError) as caught:
        lift(cell.apply)(met, cell.x)
    message = str(caught.value)
    assert f"make `{first.path}` dense: {first.how} (" in message
    assert f"({first.source})" in message
    assert re.search(r"/(matrix_\w+|equinox/.*|flax/.*)\.py:\d+", first.source)


def derivatives(function, cell, params, x):
    """The result, and its derivatives with respect to all floats of `params` and to `x`."""
    flat, structure = jax.tree.flatten((params, x))
    moving = [jnp.issubdtype(a.dtype, jnp.floating) for a in flat]
    floats = [a for a, moves in zip(flat, moving, strict=True) if moves]

    def of_floats(floats):
        rest = iter(floats)
        filled = [next(rest) if moves else a for a, moves in zip(flat, moving, strict=True)]
        return function(*jax.tree.unflatten(structure, filled))

    if cell.forward:
        tangents = [normal(i, *a.shape) for i, a in enumerate(floats)]
        return jax.jvp(of_floats, (floats,), (tangents,))

    def loss(floats):
        y = of_floats(floats)
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(loss, has_aux=True)(floats)
    return y, gradients


CHECKED: set[str] = set()  # programs; by hand they are the same in all frameworks


def test_values_and_derivatives_are_those_of_the_dequantized_function(cell):
    cell, stored, met, trained = cell
    f = lifted(cell)
    program = text(f, met, cell.x)
    if program in CHECKED:
        return

    @functools.partial(jax.jit, compiler_options=QUICK)
    def answers(stored, met, trained, x):
        ours = derivatives(f, cell, stored, x)
        dequantized = derivatives(lambda p, x: cell.apply(dense(p), x), cell, stored, x)
        return ours, dequantized, f(met, x), f(trained, x)

    other = cell.x[::-1] if cell.x.dtype == jnp.int32 else -cell.x[::-1]
    results = []
    for x in (cell.x, other):
        ours, dequantized, integers, rounded = answers(stored, met, trained, x)
        close(ours[0], dequantized[0])
        close(ours[1], dequantized[1], 5e-4)  # of scales: sums over codes
        near(integers, rounded, 0.01)  # the same codes, in floats
        near(integers, dequantized[0], 0.05)
        results.append(integers)

    # Under `vmap`, on eight devices.
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    batches = NamedSharding(mesh, PartitionSpec(None, "data"))
    mapped = jax.jit(jax.vmap(f, (None, 0)), compiler_options=QUICK)
    both = mapped(met, jax.device_put(jnp.stack([cell.x, other]), batches))
    assert len(both.sharding.device_set) == 8
    near(both, jnp.stack(results), 0.01)
    CHECKED.add(program)


def test_the_float_function_is_untouched(request, cell):
    cell, _, met, _ = cell

    def seen():
        f = jax.jit(lambda params, x: cell.apply(params, x))
        return text(cell.apply, cell.params, cell.x), f.lower(cell.params, cell.x).as_text()

    eager = "plain" in request.node.callspec.id  # slow: every operation is a program
    value = cell.apply(cell.params, cell.x) if eager else None
    before, ours = seen(), text(lifted(cell), met, cell.x)
    assert seen() == before
    if eager:
        np.testing.assert_array_equal(cell.apply(cell.params, cell.x), value)
    jax.jit(cell.apply).trace(cell.params, cell.x)
    assert text(lifted(cell), met, cell.x) == ours  # nor do its caches reach ours


@pytest.mark.parametrize("operation", ["dense", "grouped_conv", "jitted", "stacked_layers"])
def test_eager_equals_jit(operation):
    cell, _, met, _ = made("plain", operation)
    near(lifted(cell)(met, cell.x), jax.jit(lifted(cell))(met, cell.x), 0.01)


# Constructs inside one another.


def quantized(function, params, x=X, **options):
    """A function, its weights as integers that meet integers, and these weights alone."""
    stored = quant.quantize(params, W8, sites=sites(function, params, x))
    return lift(function, **options), trees.map_with_path(with_activations, stored), stored


def check_derivatives(function, params, **options):
    f, _, stored = quantized(function, params, **options)
    cell = Cell(function, params, X)
    ours = jax.jit(lambda p, x: derivatives(f, cell, p, x))(stored, X)
    plain = functools.partial(derivatives, lambda p, x: function(dense(p), x), cell)
    close(ours, jax.jit(plain)(stored, X), 5e-4)


POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("hidden"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_scan_in_checkpoint_in_cond(policy):
    params = {"layers": normal(0, 3, 8, 8), "other": normal(1, 8, 8)}

    def body(h, w):
        return jnp.tanh(checkpoint_name(h @ w, "hidden")), None

    def blocks(wrap):
        def function(p, x):
            layers = wrap(lambda x, w: lax.scan(body, x, w)[0])
            return lax.cond(
                x.sum() > 0, lambda x: layers(x, p["layers"]), lambda x: x @ p["other"], x
            )

        return function

    checkpointed = blocks(functools.partial(jax.checkpoint, policy=POLICIES[policy]))
    check_derivatives(checkpointed, params)
    f, met, _ = quantized(checkpointed, params)
    assert integer_products(f, met, X) == 2
    # With integers, the derivative of the recomputed layers is that of the layers kept.
    kept, _, _ = quantized(blocks(lambda f: f), params)
    for x in (jnp.abs(X), -jnp.abs(X)):
        ours, wanted = (
            jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(met, x)))))(x) for f in (f, kept)
        )
        near(ours, wanted, 1e-4)


def sharded(f):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(f, mesh=mesh, in_specs=(whole, rows), out_specs=rows)


def in_layers(p, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0]


def test_shards_around():
    f, met, stored = quantized(in_layers, {"layers": normal(0, 3, 8, 8)})
    assert integer_products(sharded(f), met, X) == 1
    close(jax.jit(sharded(f))(stored, X), in_layers(dense(stored), X))

    def gradient(f, p):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(p, x)))))(X)

    close(gradient(sharded(f), stored), gradient(in_layers, dense(stored)), 5e-4)


def test_shards_inside():
    params = {"layers": normal(0, 3, 8, 8)}
    f, met, _ = quantized(sharded(in_layers), params)
    assert integer_products(f, met, X) == 1
    check_derivatives(sharded(in_layers), params)


def test_a_random_key_among_the_parameters():
    params = {"w": normal(0, 8, 6), "key": jax.random.key(0)}
    (site,) = sites(lambda p, x: x @ p["w"], params, X)
    assert site.path == "w"
