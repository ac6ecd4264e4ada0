"""Features of a student beside a teacher's: linen, haiku, equinox, plain, nnx, scanned layers."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jopt import distill, quant, train

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nn.relu(nn.Dense(self.width, name=f"layer_{i}")(x))
        return nn.Dense(3, name="head")(x)


class Unit(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8)(x)), None


class Deep(nn.Module):
    """Scanned and checkpointed layers."""

    length: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first")(x)
        layers = nn.scan(
            nn.remat(Unit),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.length,
        )
        return nn.Dense(3, name="head")(layers(name="layers")(x, None)[0])


def linen(width):
    model = Net(width)
    return model.apply, model.init(KEY, X)


def deep(length):
    model = Deep(length)
    return model.apply, model.init(KEY, X)


def haiku(width):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([width, width, 3])(x)))
    return model.apply, model.init(KEY, X)


def equinox(width):
    model = eqx.nn.MLP(6, 3, width, 2, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params


def flax_nnx(width):
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    graph, state = nnx.split(Pair(nnx.Rngs(0)))
    return lambda p, x: nnx.merge(graph, p)(x), state


def plain(width):
    keys = jax.random.split(KEY, 2)
    params = {
        "hidden": jax.random.normal(keys[0], (6, width)) / 3,
        "out": jax.random.normal(keys[1], (width, 3)) / 3,
    }
    return lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["out"], params


def scanned(length):
    params = {
        "in": jax.random.normal(KEY, (6, 8)) / 3,
        "layers": jax.random.normal(KEY, (length, 8, 8)) / 3,
        "out": jax.random.normal(KEY, (8, 3)) / 3,
    }

    def apply(p, x):
        body = lambda h, kernel: (h + jnp.tanh(h @ kernel), None)  # noqa: E731
        return jax.lax.scan(body, x @ p["in"], p["layers"])[0] @ p["out"]

    return apply, params


MODELS = {
    "linen": (linen(8), "Net/layer_1"),
    "haiku": (haiku(8), "mlp/linear_1"),
    "equinox": (equinox(8), "eqx.nn.MLP/eqx.nn.Linear#1"),
    "nnx": (flax_nnx(8), "one/bias/value"),
    "plain": (plain(8), "hidden"),
    "scanned linen": (deep(2), "Deep/layers[-1]"),
    "scanned plain": (scanned(2), "layers[0]"),
}
TEACHERS = {
    "linen": (linen(16), "Net/layer_0"),
    "haiku": (haiku(16), "mlp/linear_0"),
    "equinox": (equinox(16), "eqx.nn.MLP/eqx.nn.Linear"),
    "nnx": (flax_nnx(16), "one/bias/value"),
    "plain": (plain(16), "hidden"),
    "scanned linen": (deep(4), "Deep/layers[3]"),
    "scanned plain": (scanned(4), "layers[-2]"),
}


def name_of(apply, params, name):
    """nnx versions spell the last part of a path in two ways."""
    from jopt.trace import tappable

    names = [tap.name for tap in tappable(apply, params, X)]
    bare = name.split("[")[0]
    return name if bare in names else next(n for n in names if n.startswith("one/bias"))


# Each student with two teachers, each teacher with one student.
CASES = [(student, teacher) for student in MODELS for teacher in ("linen", "scanned linen")]
CASES += [("plain", teacher) for teacher in ("haiku", "equinox", "nnx", "scanned plain")]
CASES += [("scanned plain", "plain")]


@pytest.mark.parametrize(("student", "teacher"), CASES)
def test_any_student_and_any_teacher_and_one_program(student, teacher):
    (apply, params), name = MODELS[student]
    (wise, wanted), other = TEACHERS[teacher]
    name, other = name_of(apply, params, name), name_of(wise, wanted, other)
    both = distill.pairs(apply, wise, {name: other})
    shapes = jax.eval_shape(both, params, wanted, X)
    maps = distill.projections(KEY, shapes.features)
    learned = (params, maps)
    tx = optax.sgd(0.1)

    @jax.jit
    def step(learned, state, wanted, x):
        def loss(learned):
            out = both(learned[0], wanted, x)
            soft = distill.kd(out.student, out.teacher, temperature=2.0)
            (pair,) = out.features.values()
            return soft + distill.hints(*pair, learned[1][name])

        value, slope = jax.value_and_grad(loss)(learned)
        updates, state = tx.update(slope, state, learned)
        return optax.apply_updates(learned, updates), state, value

    state, values = tx.init(learned), []
    for _ in range(15):
        learned, state, value = step(learned, state, wanted, X)
        values.append(float(value))
    assert step._cache_size() == 1
    assert values[-1] < 0.9 * values[0]
    out = both(params, wanted, X)
    np.testing.assert_allclose(out.student, apply(params, X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.teacher, wise(wanted, X), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda w: jnp.sum(both(params, w, X).features[name][1]))(wanted)
    assert not any(np.any(x) for x in jax.tree.leaves(slope))


def test_the_train_step_with_a_tapped_teacher_is_compiled_once():
    (apply, params), (wise, wanted) = deep(2), haiku(16)
    names = {"Deep/layers[0]": "mlp/linear_0", "Deep/layers[-1]": "mlp/linear_1"}
    both = distill.pairs(apply, wise, names)
    maps = distill.projections(KEY, jax.eval_shape(both, params, wanted, X).features)
    traced = []

    def loss(learned, batch):
        traced.append(1)
        out = both(learned["model"], batch["teacher"], batch["x"])
        hints = [distill.hints(*out.features[name], learned["maps"][name]) for name in names]
        return distill.kd(out.student, out.teacher) + sum(hints)

    tx = optax.sgd(0.1)
    step = train.make_step(loss, tx)
    state = train.init({"model": params, "maps": maps}, tx)
    values, begun = [], 0
    for i in range(6):
        wanted = jax.tree.map(lambda x: 1.01 * x, wanted)  # another teacher is no other program
        state, metrics = step(state, {"x": X + i, "teacher": wanted})
        values.append(float(metrics["loss"]))
        begun = begun or len(traced)
    assert len(traced) == begun and np.all(np.isfinite(values))


def test_values_are_those_of_the_layers():
    apply, params = linen(8)
    deep_apply, wanted = deep(4)
    both = distill.pairs(
        apply, deep_apply, {"Net/layer_0": "Deep/layers[1]", "Net/layer_1": "Deep/layers[-1]"}
    )
    features = both(params, wanted, X).features
    layer = params["params"]["layer_0"]
    np.testing.assert_allclose(
        features["Net/layer_0"][0], X @ layer["kernel"] + layer["bias"][None], rtol=1e-5, atol=1e-6
    )
    first, layers = wanted["params"]["first"], wanted["params"]["layers"]["Dense_0"]
    x, seen = X @ first["kernel"] + first["bias"][None], []
    for i in range(4):
        x = x + jnp.tanh(x @ layers["kernel"][i] + layers["bias"][i][None])
        seen.append(x)
    np.testing.assert_allclose(features["Net/layer_0"][1], seen[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features["Net/layer_1"][1], seen[3], rtol=1e-5, atol=1e-6)


def test_every_second_layer_of_a_deeper_stack():
    apply, params = scanned(2)
    wise, wanted = scanned(4)
    both = distill.pairs(apply, wise, {"layers": "layers[1::2]"})
    ours, theirs = both(params, wanted, X).features["layers"]
    whole = distill.pairs(apply, wise, {"layers": "layers"}, alike="nothing")
    assert ours.shape == theirs.shape == (2, 4, 8)
    np.testing.assert_array_equal(theirs, whole(params, wanted, X).features["layers"][1][1::2])


def test_a_quantized_teacher_and_a_quantized_student():
    apply, params = linen(8)
    wise, wanted = linen(16)
    both = distill.pairs(apply, wise, {"Net/layer_1": "Net/layer_1"})
    int8 = [("**/kernel", quant.Int(8))]
    found = both(params, quant.quantize(wanted, int8), X)
    exact = both(params, wanted, X)
    for a, b in ((found.teacher, exact.teacher), (found.features, exact.features)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), a, b)
    trained = quant.qat(params, int8)
    slope = jax.grad(lambda p: distill.kd(*both(p, wanted, X)[:2]))(trained)
    assert any(np.any(x) for x in jax.tree.leaves(slope))


def test_errors():
    apply, params = linen(8)
    wise, wanted = deep(4)
    pairs = distill.pairs

    def call(mapping, **options):
        return pairs(apply, wise, mapping, **options)(params, wanted, X)

    cases = [
        (lambda: pairs(apply, wise, {}), "names no tap"),
        (lambda: pairs(apply, wise, {"Net/*": "Deep/first"}), r"pattern `Net/\*`"),
        (lambda: pairs(apply, wise, {"a": "b"}, alike="some"), "alike='some'"),  # pyright: ignore
        (lambda: call({"Net/layer_1": "Deep/frist"}), "Did you mean `Deep/first`"),
        (lambda: call({"Net/layer_1": "Deep/layers[4]"}), r"`Deep/layers\[4\]` is out of range"),
        (
            lambda: call({"Net/layer_1": "Deep/layers"}),
            r"`Net/layer_1` .* \[4, 8\] and \[4, 4, 8\]",
        ),
        (lambda: call({"Net/head": "Deep/first"}, alike="all"), r"all axes: they are \[4, 3\]"),
    ]
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()
