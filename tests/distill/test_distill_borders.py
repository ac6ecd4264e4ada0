"""What others hand over: empty batches, numbers out of range, damaged files, other wrappers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jopt import distill


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


EMPTY, LABELS, KERNEL = np.zeros((0, 5), np.float32), np.zeros(0, np.int32), np.ones((6, 5), "f4")
OF_NOTHING = {
    "kd": lambda x: distill.kd(x, EMPTY),
    "js": lambda x: distill.js(x, EMPTY),
    "dkd": lambda x: distill.dkd(x, EMPTY, LABELS),
    "dist": lambda x: distill.dist(x, EMPTY),
    "hard": lambda x: distill.hard(x, LABELS),
    "sequence": lambda x: distill.sequence(x, LABELS),
    "l1": lambda x: distill.l1(x, EMPTY),
    "mse": lambda x: distill.mse(x, EMPTY),
    "hints": lambda x: distill.hints(x, EMPTY),
    "similarity": lambda x: distill.similarity(x, EMPTY),
    "relational": lambda x: distill.relational(x, EMPTY),
    "attention_transfer": lambda x: distill.attention_transfer(x[:, None], EMPTY[:, None]),
    "fsp": lambda x: distill.fsp((x[:, None],) * 2, (EMPTY[:, None],) * 2),
    "cached_kd": lambda x: distill.cached_kd(x, distill.top_k(EMPTY, 2)),
    "fused_kd": lambda x: distill.fused_kd(np.zeros((0, 6), "f4"), KERNEL + jnp.sum(x), EMPTY),
}


@pytest.mark.parametrize("name", OF_NOTHING)
def test_the_loss_of_no_examples_is_zero(name):
    value, slope = jax.jit(jax.value_and_grad(OF_NOTHING[name]))(EMPTY)
    assert value == 0 and slope.shape == EMPTY.shape


def test_parameters_get_no_gradient_from_no_examples():
    run = lambda w: distill.fused_kd(np.zeros((0, 6), "f4"), w, EMPTY)  # noqa: E731
    np.testing.assert_array_equal(jax.grad(run)(KERNEL), 0)
    with pytest.raises(ValueError, match=r"expects positions; student is \[2, 0, 3\]"):
        distill.attention_transfer(jnp.ones((2, 0, 3)), jnp.ones((2, 0, 3)))


def test_crd_refuses_numbers_that_are_none_of_the_banks():
    student, teacher = normal(0, 3, 4), normal(1, 3, 4)
    bank = distill.crd_bank(jax.random.key(0), 300, 4)
    mine, others = np.array([0, 1, 298]), np.array([[3, 4], [5, 6], [7, 8]])
    crd = jax.jit(lambda i, n, **k: distill.crd(student, teacher, bank, i, n, **k))
    update = jax.jit(lambda i, n, **k: distill.crd_update(bank, student, teacher, i, n, **k))
    expected = crd(mine, others)
    np.testing.assert_array_equal(crd(mine, others.astype(np.uint8)), expected)
    first = np.array([True, True, False])
    for broken in (300, 10**6, -1):
        i, n = np.array([0, 1, broken]), np.array([[3, 4], [5, 6], [7, broken]])
        for args in ((i, others), (mine, n)):
            assert np.isnan(crd(*args))
            np.testing.assert_array_equal(crd(*args, where=first), crd(mine, others, where=first))
            new = update(*args)
            moved = np.flatnonzero(np.any(np.asarray(new.student != bank.student), axis=-1))
            assert list(moved) == [0, 1]
            np.testing.assert_array_equal(new.scale, update(mine, others, where=first).scale)
    for options, message in (
        ({"temperature": 0.0}, "above 0"),
        ({"momentum": 3.0}, "momentum=3.0"),
        ({"where": np.array([False])}, r"\[3\]; it is \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.crd_update(bank, student, teacher, mine, others, **options)


def test_fused_float16_keeps_what_loss_scaling_saves():
    tokens, classes, width, scaling = 1024, 256, 16, 2.0**15
    hidden = jnp.asarray(normal(0, tokens, width), jnp.float16)
    kernel = jnp.asarray(0.3 * normal(1, width, classes), jnp.float16)
    bias = jnp.zeros(classes, jnp.float16)
    wide = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel, bias)]
    teacher = wide[0] @ wide[1] + 0.02 * normal(2, tokens, classes)

    def loss(hidden, kernel, bias):
        return scaling * distill.fused_kd(hidden, distill.Head(kernel, bias), teacher, chunk=100)

    step = jax.jit(jax.grad(loss, (0, 1, 2)))
    for found, exact in zip(step(hidden, kernel, bias), step(*wide), strict=True):
        assert found.dtype == jnp.float16
        error = np.linalg.norm(np.float32(found) - exact) / np.linalg.norm(exact)
        assert error < 2e-3


@pytest.mark.parametrize("chunk", [3, 256])
def test_fused_inside_shard_map(chunk):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    hidden, kernel, teacher = normal(0, 40, 8), normal(1, 8, 30), normal(2, 40, 30)

    def loss(h, k, t):
        return jax.lax.pmean(distill.fused_kd(h, k, t, chunk=chunk), "d")

    spread = jax.shard_map(loss, mesh=mesh, in_specs=(P("d"), P(), P("d")), out_specs=P())
    found = jax.jit(jax.value_and_grad(spread, (0, 1)))(hidden, kernel, teacher)
    exact = jax.value_and_grad(lambda h, k: distill.kd(h @ k, teacher), (0, 1))(hidden, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_fused_refuses_a_head_beside_a_top_k():
    cached = distill.top_k(jnp.ones((3, 5)), 2)
    with pytest.raises(ValueError, match="leave the teacher's head out"):
        distill.fused_kd(jnp.ones((3, 6)), KERNEL, cached, KERNEL)


def test_mean_teacher_under_inject_hyperparams():
    params = {"w": jnp.ones(3)}
    tx = optax.inject_hyperparams(distill.mean_teacher)(decay=0.9, ramp=False)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(distill.teacher_of(state)["w"], 1.1, rtol=1e-6)
    with pytest.raises(ValueError, match="from 0 to 1"):
        distill.mean_teacher(1.5)


def test_teacher_of_parts_of_the_parameters():
    params = {"w": jnp.ones(3), "v": jnp.full(2, 5.0, jnp.bfloat16)}
    labels = {"w": "a", "v": "b"}
    mine = lambda rate: optax.chain(optax.sgd(rate), distill.mean_teacher(0.9))  # noqa: E731
    both = optax.multi_transform({"a": mine(0.1), "b": mine(0.2)}, labels).init(params)
    found = distill.teacher_of(both)
    assert found["w"].shape == (3,) and found["v"].dtype == jnp.float32
    one = optax.multi_transform({"a": mine(0.1), "b": optax.set_to_zero()}, labels)
    masked = optax.masked(distill.mean_teacher(), {"w": True, "v": False})
    for state in (one.init(params), masked.init(params)):
        with pytest.raises(ValueError, match=r"teacher_of\(opt_state, params\)"):
            distill.teacher_of(state)
        found = distill.teacher_of(state, params)
        assert found["v"] is params["v"] and found["w"].dtype == jnp.float32
    twice = optax.chain(distill.mean_teacher(), distill.mean_teacher()).init(params)
    with pytest.raises(ValueError, match="more than one"):
        distill.teacher_of(twice)


def test_a_damaged_cache_is_an_error_with_its_path(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    x = normal(0, 20, 3)
    with distill.CacheWriter(tmp_path) as writer:
        writer.add(x, distill.top_k(normal(1, 20, 50), 4))
    path = next(tmp_path.glob("*.safetensors"))
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:start])
    for name in ("keys", "log_p", "indices", "tail"):
        broken = bytearray(raw)
        broken[start + head[name]["data_offsets"][0]] ^= 0x40
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{path.name}.*checksum"):
            distill.Cache(tmp_path)
    # Files of before there was a checksum are read without.
    tensors, known = numpy.load(raw), head["__metadata__"]
    old = {key: value for key, value in known.items() if key != "crc32"}
    path.write_bytes(numpy.save(tensors, metadata=old))
    assert len(distill.Cache(tmp_path)) == 20
    for change in ({"shape": "x"}, {"classes": "many"}, {"temperature": "0"}, {"teacher": None}):
        meta = {k: v for k, v in {**old, **change}.items() if v is not None}
        path.write_bytes(numpy.save(tensors, metadata=meta))
        with pytest.raises(ValueError, match=f"{path.name}.* is damaged"):
            distill.Cache(tmp_path)


def test_an_iteration_of_what_is_not_inside_a_scan_is_an_error():
    apply = lambda p, x: jnp.tanh(x @ p["a"]) @ p["o"]  # noqa: E731
    params, x = {"a": normal(0, 3, 4), "o": normal(1, 4, 2)}, normal(2, 5, 7, 3)
    for mapping in ({"a[0]": "a"}, {"a": "a[1:]"}):
        with pytest.raises(ValueError, match="`a`, which is not inside a scan"):
            distill.pairs(apply, apply, mapping, alike="nothing")(params, params, x)


def test_teachers_refuse_what_makes_no_sense():
    virtual = distill.virtual_teacher(jnp.array([-1, 7, 2]), 3)
    assert np.all(np.isnan(virtual[:2])) and np.all(np.isfinite(virtual[2]))
    student = jnp.zeros((3, 3))
    found = distill.kd(student, virtual, where=jnp.array([False, False, True]))
    np.testing.assert_allclose(found, distill.kd(student[2:], virtual[2:]), rtol=1e-6)
    with pytest.raises(TypeError, match="not integers"):
        distill.virtual_teacher(jnp.array([1.0]), 3)
    for weights in ([0, 0], [-1, 2], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="not all of them 0"):
            distill.ensemble(lambda p, x: x * p, weights=weights)
    ruled = jnp.array([1.0, -jnp.inf, 0.0])
    two = lambda of: distill.ensemble(lambda p, x: x + p, of=of, weights=[1, 0])  # noqa: E731
    np.testing.assert_array_equal(two("logits")([0.0, 1.0], ruled), ruled)
    found = two("probabilities")([jnp.zeros(3), ruled], jnp.array([1.0, 2.0, 0.0]))
    np.testing.assert_allclose(found, jax.nn.log_softmax(jnp.array([1.0, 2.0, 0.0])), rtol=1e-6)


def test_an_nnx_model_with_dropout_as_the_tutorial_says():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.drop = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.drop(self.dense(x))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    apply = lambda p, x: nnx.merge(graph, p, rest, copy=True)(x)  # noqa: E731
    x, teacher = normal(0, 5, 3), normal(1, 5, 4)
    slopes = jax.jit(jax.grad(lambda p: distill.kd(apply(p, x), teacher)))(params)
    leaves = jax.tree.leaves(slopes)
    assert len(leaves) == 2 and all(np.any(leaf) and np.all(np.isfinite(leaf)) for leaf in leaves)
