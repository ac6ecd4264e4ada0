"""Teachers: frozen functions, ensembles, averages of the student, peers, lines of models."""

import distill_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt import distill, prune, quant, train


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = normal(0, 5, 4)


def apply(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def params(seed, width=8):
    arrays = {"hidden": normal(seed, 4, width), "out": normal(seed + 100, width, 3)}
    return jax.tree.map(jnp.asarray, arrays)


def test_a_teacher_has_no_gradient_and_is_no_part_of_the_state():
    wise, wanted = distill.teacher(apply), params(1, 32)
    np.testing.assert_allclose(wise(wanted, X), apply(wanted, X), rtol=1e-6)

    def loss(params, batch):
        return distill.kd(apply(params, batch["x"]), wise(batch["teacher"], batch["x"]))

    slope = jax.grad(loss, allow_int=True)(params(2), {"x": X, "teacher": wanted})
    assert any(np.any(x) for x in jax.tree.leaves(slope))
    slope = jax.grad(lambda w: loss(params(2), {"x": X, "teacher": w}))(wanted)
    assert not any(np.any(x) for x in jax.tree.leaves(slope))
    slope = jax.grad(lambda x: jnp.sum(wise(wanted, x)))(X)  # nor through the inputs
    assert not np.any(slope)


def test_a_smaller_or_quantized_teacher_of_a_larger_student_in_one_program():
    tx = optax.sgd(0.1)
    wise = distill.teacher(apply)
    teacher = params(1, 3)

    @jax.jit
    def step(params, state, teacher, x):
        loss = lambda p: distill.kd(apply(p, x), wise(teacher, x), temperature=2.0)  # noqa: E731
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state, value

    small = quant.quantize(teacher, [("**", quant.Int(8))])
    for one in (teacher, small):
        student = params(2, 64)
        state, values = tx.init(student), []
        for _ in range(20):
            student, state, value = step(student, state, one, X)
            values.append(float(value))
        assert values[-1] < 0.5 * values[0]
    assert step._cache_size() == 2  # one for each kind of leaf
    np.testing.assert_allclose(wise(small, X), apply(teacher, X), atol=0.1)


@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.0]])
def test_ensembles(weights):
    models = [params(i) for i in range(3)]
    shares = np.ones(3) / 3 if weights is None else np.array([0.25, 0.75, 0])
    z = [np.float64(apply(p, X)) for p in models]
    mean = distill.ensemble(apply, of="logits", weights=weights)(models, X)
    np.testing.assert_allclose(mean, sum(w * x for w, x in zip(shares, z, strict=True)), rtol=1e-5)
    for T in (1.0, 4.0):
        found = distill.ensemble([apply] * 3, temperature=T, weights=weights)(models, X)
        exact = sum(w * reference.softmax(x / T) for w, x in zip(shares, z, strict=True))
        np.testing.assert_allclose(jax.nn.softmax(found / T, -1), exact, rtol=1e-5)
    slope = jax.grad(lambda m: jnp.sum(distill.ensemble(apply)(m, X) ** 2))(models)
    assert not any(np.any(x) for x in jax.tree.leaves(slope))


def test_ensembles_of_unlike_models_and_errors():
    other = lambda p, x: x @ p  # noqa: E731
    both = distill.ensemble([apply, other])
    assert both([params(0), normal(1, 4, 3)], X).shape == (5, 3)
    with pytest.raises(ValueError, match="2 functions and 1 weights"):
        both([params(0)], X)
    with pytest.raises(ValueError, match=r"\[5, 3\], \[5, 2\]"):
        both([params(0), normal(1, 4, 2)], X)
    with pytest.raises(ValueError, match="of='votes'"):
        distill.ensemble(apply, of="votes")  # pyright: ignore


@pytest.mark.parametrize("ramp", [True, False])
def test_the_mean_teacher_is_the_average_of_float64(ramp):
    tx = optax.chain(optax.sgd(0.1), distill.mean_teacher(0.8, ramp=ramp))
    student = params(0)
    state = tx.init(student)
    jax.tree.map(np.testing.assert_array_equal, distill.teacher_of(state), student)
    exact = jax.tree.map(np.float64, student)
    update = jax.jit(tx.update)
    for t in range(8):
        slope = jax.tree.map(lambda p, t=t: normal(t, *p.shape), student)
        updates, state = update(slope, state, student)
        student = optax.apply_updates(student, updates)
        d = min(0.8, t / (t + 1)) if ramp else 0.8
        exact = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * np.float64(p), exact, student)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, distill.teacher_of(state), exact)
    assert update._cache_size() == 1


def test_the_mean_teacher_of_low_precision_and_of_integers():
    student = {"w": jnp.ones((2, 2), jnp.bfloat16), "count": jnp.zeros((), jnp.int32)}
    tx = distill.mean_teacher(optax.constant_schedule(0.999), ramp=False)
    state = tx.init(student)
    updates = {"w": jnp.full((2, 2), 1.0, jnp.bfloat16), "count": jnp.ones((), jnp.int32)}
    updates, state = tx.update(updates, state, student)
    average = distill.teacher_of(state)
    assert average["w"].dtype == jnp.float32 and average["count"] == 0
    np.testing.assert_allclose(average["w"], 1.001, rtol=1e-6)  # bfloat16 would stay at 1
    assert distill.teacher_of(state, student)["w"].dtype == jnp.bfloat16


def test_the_mean_teacher_in_the_train_step_after_pruning():
    def loss(params, batch):
        return jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2)

    tx = optax.chain(optax.sgd(0.1), prune.sparsify(0.5), distill.mean_teacher(0.5, ramp=False))
    student = params(0)
    step = train.make_step(loss, tx)
    state = train.init(student, tx)
    for _ in range(12):
        state, _ = step(state, {"x": X, "y": normal(1, 5, 3)})
    average = distill.teacher_of(state.opt_state)
    for path in ("hidden", "out"):
        gone = np.asarray(state.params[path]) == 0
        assert gone.mean() > 0.2
        # What was pruned at the first step has halved ever since.
        assert np.max(np.abs(np.asarray(average[path])[gone])) < 1e-3 * np.max(
            np.abs(student[path])
        )
    with pytest.raises(ValueError, match="found 0 averages"):
        distill.teacher_of(optax.sgd(0.1).init(student))
    with pytest.raises(ValueError, match="needs `params`"):
        average = distill.mean_teacher(0.5)
        average.update(student, average.init(student))
    with pytest.raises(ValueError, match="from 0 to 1"):
        distill.mean_teacher(1.5)


def test_a_consistency_loss_against_the_average_is_one_program():
    tx = optax.chain(optax.sgd(0.1), distill.mean_teacher(0.9))
    student = params(0)

    @jax.jit
    def step(params, state, x, noise):
        wise = distill.teacher(apply)(distill.teacher_of(state), x)
        slope = jax.grad(lambda p: distill.mse(apply(p, x + noise), wise))(params)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(student)
    for i in range(3):
        student, state = step(student, state, X, 0.1 * normal(i, 5, 4))
    assert step._cache_size() == 1
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(student))


def test_a_teacher_with_a_sharding_of_its_own():
    axes = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axes, axes))
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    teacher, student, x = params(1, 32), params(2), normal(3, 8, 4)
    sharded = {
        "hidden": place(teacher["hidden"], None, "model"),
        "out": place(teacher["out"], "model", None),
    }
    wise = distill.teacher(apply)

    @jax.jit
    def loss(student, teacher, x):
        z, t = apply(student, x), wise(teacher, x)
        heads = student["out"], teacher["out"]
        hidden = jnp.tanh(x @ student["hidden"]), jnp.tanh(x @ teacher["hidden"])
        fused = distill.fused_kd(hidden[0], heads[0], hidden[1], heads[1], chunk=3)
        return distill.kd(z, t) + distill.dist(z, t) + distill.relational(z, t) + fused

    whole = jax.value_and_grad(loss)(student, teacher, x)
    spread = jax.tree.map(place, student)
    split = jax.value_and_grad(loss)(spread, sharded, place(x, "data", None))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, split, whole)


def test_mutual_learning():
    students = [normal(i, 6, 5) for i in range(3)]
    losses = distill.mutual(students, temperature=2.0)
    exact = [
        np.mean([reference.kd(a, b, 2.0).mean() for j, b in enumerate(students) if j != i])
        for i, a in enumerate(students)
    ]
    np.testing.assert_allclose(losses, exact, rtol=1e-4)
    slopes = jax.jacobian(lambda z: distill.mutual(z))(students)
    for j, slope in enumerate(slopes):
        for i in range(3):
            assert np.any(slope[i]) == (i == j)
    with pytest.raises(ValueError, match="two students"):
        distill.mutual(students[:1])


def test_the_virtual_teacher():
    labels = jnp.array([1, 0])
    found = distill.virtual_teacher(labels, 4, correct=0.7)
    exact = np.array([[0.1, 0.7, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1]])
    np.testing.assert_allclose(jax.nn.softmax(found, -1), exact, rtol=1e-5)
    with pytest.raises(ValueError, match=r"correct=0.1"):
        distill.virtual_teacher(labels, 4, correct=0.1)


def test_a_line_of_models():
    seen = []

    def train(student, teacher):
        seen.append((student, teacher))
        return f"{student} of {teacher}"

    found = distill.succession(train, "large", ["middle", "small"])
    assert found == ["middle of large", "small of middle of large"]
    assert seen == [("middle", "large"), ("small", "middle of large")]
    assert distill.succession(train, "large", []) == []


def test_a_quantized_teacher_spread_over_devices_of_a_student_spread_otherwise():
    axes = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axes, axes))
    place = lambda x, *spec: jax.device_put(  # noqa: E731
        x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    )
    student, x = params(2, 4), normal(3, 8, 4)
    wanted = quant.quantize(params(1, 32), [("hidden", quant.Int(8)), ("out", quant.Int(4))])
    columns = {"hidden": (None, "model"), "out": ("model", None)}
    sharded = {
        name: jax.tree.map(
            lambda x, spec=columns[name]: place(
                x, *(axis if size > 1 else None for axis, size in zip(spec, x.shape, strict=True))
            ),
            leaf,
        )
        for name, leaf in wanted.items()
    }
    codes = sharded["hidden"].codes
    assert len({str(shard.index) for shard in codes.addressable_shards}) == 4
    wise = distill.teacher(apply)

    @jax.jit
    def slope(student, teacher, x):
        return jax.value_and_grad(lambda p: distill.kd(apply(p, x), wise(teacher, x)))(student)

    whole = slope(student, wanted, x)
    split = slope(jax.tree.map(place, student), sharded, place(x, "data", None))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, split, whole)


def test_a_teacher_of_another_precision():
    wanted = params(1, 16)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted)
    wise, low = distill.teacher(apply), X.astype(jnp.bfloat16)
    student = params(2)

    def loss(student, teacher, x):
        return distill.kd(apply(student, X), wise(teacher, x))

    assert wise(half, low).dtype == jnp.bfloat16
    exact, slope = jax.value_and_grad(loss)(student, wanted, X)
    found, rough = jax.value_and_grad(loss)(student, half, low)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=0.1)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rough))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), rough, slope)


def test_self_distillation_by_exits_of_one_network():
    """The deepest exit teaches the others; its own weights learn from labels alone."""
    exits = params(0) | {"exit": jnp.asarray(normal(5, 8, 3))}
    labels = jnp.array([0, 2, 1, 1, 0])

    def loss(exits, soft):
        hidden = jnp.tanh(X @ exits["hidden"])
        early, last = hidden @ exits["exit"], hidden @ exits["out"]
        taught = distill.kd(early, last, temperature=2.0)
        return distill.hard(last, labels) + distill.hard(early, labels) + soft * taught

    with_it, without = (jax.grad(loss)(exits, soft) for soft in (1.0, 0.0))
    np.testing.assert_allclose(with_it["out"], without["out"], rtol=1e-6)
    assert np.any(np.abs(with_it["exit"] - without["exit"]) > 1e-3)
