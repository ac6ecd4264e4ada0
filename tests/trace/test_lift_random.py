"""Random programs agree lifted and plain; random layouts of a weight are followed correctly."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from toy_functions import normal
from toy_leaves import Scaled, dense, scaled

from jopt.trace import lift, sites

SIZE = 4
PARAMS = {
    "columns": scaled(normal(0, SIZE, SIZE) / 2),
    "rows": scaled(normal(1, SIZE, SIZE) / 2, (-1,)),
    "plain": normal(2, SIZE, SIZE),
}
INPUT = normal(3, SIZE, SIZE)
ORDERS = jnp.array([[0, 2, 1, 3], [3, 2, 1, 0], [1, 1, 0, 0], [2, 3, 0, 1]])

# Operations on two square matrices; their first operand is what changes type most often.
OPERATIONS = {
    "matmul": lambda a, b: a @ b,
    "left": lambda a, b: b @ a,
    "transpose": lambda a, b: a.T,
    "add": lambda a, b: a + b,
    "scale": lambda a, b: a * 0.5,
    "tanh": lambda a, b: jnp.tanh(a),
    "reshape": lambda a, b: a.reshape(1, SIZE * SIZE).reshape(SIZE, SIZE),
    "concatenate": lambda a, b: jnp.concatenate([a[:1], b[1:]]),
    "fortran": lambda a, b: lax.reshape(a, (2, 8), (1, 0)).reshape(SIZE, SIZE),
    "gather in rows": lambda a, b: jax.vmap(lambda row, i: row[i])(a, ORDERS),
    "gather along": lambda a, b: jnp.take_along_axis(a, ORDERS, 0),
    "gather": lambda a, b: a[jnp.array([0, 2, 1, 3])],
    "broadcast": lambda a, b: jnp.broadcast_to(a[None], (2, SIZE, SIZE))[1],
    "cast": lambda a, b: a.astype(jnp.float16).astype(jnp.float32),
    "relu": lambda a, b: jax.nn.relu(a),
    "softmax": lambda a, b: jax.nn.softmax(a),
    "jit": lambda a, b: jax.jit(lambda a: jnp.tanh(a) @ b)(a),
    "remat": lambda a, b: jax.checkpoint(lambda a, b: a @ jnp.tanh(b))(a, b),
    "scan": lambda a, b: lax.scan(lambda h, row: (jnp.tanh(h @ a), row @ a), b, b)[1],
    "rows": lambda a, b: lax.scan(lambda h, row: (h + row, h), jnp.zeros(SIZE), a)[1],
    "cond": lambda a, b: lax.cond(b[0, 0] > 0, lambda: a @ b, lambda: a),
    "while": lambda a, b: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ a), b),
    "carry": lambda a, b: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ b), a),
    "vmap": lambda a, b: jax.vmap(lambda row: row @ a)(b),
    "grad": lambda a, b: jax.grad(lambda b: jnp.sum(jnp.tanh(b @ a)))(b),
}


@hypothesis.given(
    st.lists(
        st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99)),
        min_size=1,
        max_size=6,
    )
)
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
def test_random_programs(steps):
    def program(params, x):
        values = [*params.values(), x]
        for name, one, other in steps:
            a, b = values[one % len(values)], values[other % len(values)]
            values.append(OPERATIONS[name](a, b))
        return values[4:]

    ours = lift(program, allow_dense=True)(PARAMS, INPUT)
    theirs = program(dense(PARAMS), INPUT)
    # The toy leaf rounds its scale where the dense weight rounds its values.
    tolerance = 5e-3 if any(name == "cast" for name, *_ in steps) else 2e-4
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, tolerance, tolerance * max(1, float(jnp.abs(b).max())))


def _factors(draw, size):
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    one = draw(st.sampled_from(divisors))
    return one, size // one


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_axes_are_followed_through_random_layouts(data):
    """Against indices that are carried through the same layout as numbers."""
    shape = data.draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    order, steps = list(range(len(shape))), []
    current = list(shape)
    for _ in range(data.draw(st.integers(1, 4))):
        match data.draw(st.sampled_from(["transpose", "merge", "split", "slice"])):
            case "transpose":
                order = data.draw(st.permutations(range(len(current))))
                steps.append(lambda w, order=tuple(order): w.transpose(order))
                current = [current[i] for i in order]
            case "merge" if len(current) > 1:
                i = data.draw(st.integers(0, len(current) - 2))
                current[i : i + 2] = [current[i] * current[i + 1]]
                steps.append(lambda w, shape=tuple(current): w.reshape(shape))
            case "split":
                i = data.draw(st.integers(0, len(current) - 1))
                current[i : i + 1] = _factors(data.draw, current[i])
                steps.append(lambda w, shape=tuple(current): w.reshape(shape))
            case "slice" if current[0] > 2 and len(steps) == 0:
                current[0] -= 1
                steps.append(lambda w: w[:-1])

    def layout(w):
        for step in steps:
            w = step(w)
        return w

    summed = data.draw(st.sets(st.integers(0, len(current) - 1), min_size=1))
    kept = [i for i in range(len(current)) if i not in summed]

    def function(p, x):
        numbers = ((tuple(range(len(summed))), tuple(sorted(summed))), ((), ()))
        return lax.dot_general(x, layout(p), numbers)

    x = jnp.zeros([current[i] for i in sorted(summed)])
    (site,) = sites(function, jnp.zeros(shape), x)

    runs = [
        set() for _ in current
    ]  # along each axis of the result: the weight's axes that it walks
    for axis, labels in enumerate(np.indices(shape)):
        labels = np.asarray(layout(labels))
        for i in range(len(current)):
            if (labels != np.take(labels, [0], i)).any():
                runs[i].add(axis - len(shape))
    touched = set(itertools.chain(*(runs[i] for i in summed)))
    left = set(itertools.chain(*(runs[i] for i in kept)))
    # A reshape that mixes axes unevenly is given up; what is said is never wrong.
    assert site.contracted is None or set(site.contracted) == touched
    if site.contracted is None:
        assert touched & left or any(len(run) > 1 for run in runs)


def test_the_programs_do_reach_int8():
    jaxpr = str(jax.make_jaxpr(lift(OPERATIONS["scan"]))(PARAMS["columns"], INPUT))
    assert "i8[4,4]" in jaxpr and isinstance(PARAMS["columns"], Scaled)
