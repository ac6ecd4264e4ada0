"""What one step sees otherwise: keys, quantization noise, bits of a schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jopt.quant import (
    LSQ,
    FakeQuant,
    Int,
    LSQPlus,
    Spec,
    deterministic,
    noise,
    qat,
    quantize,
    trainable,
    with_bits,
    with_key,
)
from jopt.trace import lift

KEY = jax.random.key(3)
RANDOM = Int(3, rounding="stochastic")


def params_of(shape=(16, 8)):
    return {"w": jax.random.normal(jax.random.key(1), shape), "bias": jnp.ones(shape[-1])}


def seen(params):
    return params["w"].materialise()


def test_noise_quantizes_a_random_part():
    params = qat(params_of((64, 32)), Int(3))
    full, rounded = params["w"].weight, seen(params)
    np.testing.assert_array_equal(seen(noise(params, KEY, 0.0)), full)
    np.testing.assert_array_equal(seen(noise(params, KEY, 1.0)), rounded)
    half = np.asarray(seen(noise(params, KEY, 0.3)))
    is_rounded, is_full = half == np.asarray(rounded), half == np.asarray(full)
    assert np.all(is_rounded | is_full)
    assert abs(is_rounded.mean() - 0.3) < 0.05  # 2048 weights: five standard deviations
    other = np.asarray(seen(noise(params, jax.random.key(4), 0.3)))
    assert np.any(half != other)
    np.testing.assert_array_equal(half, seen(noise(params, KEY, 0.3)))


def test_noise_in_blocks():
    params = qat(params_of((64, 32)), Int(3))
    seen_now = np.asarray(seen(noise(params, KEY, 0.5, block=8)))
    kept = (seen_now == np.asarray(params["w"].weight)).reshape(8, 8, 32)
    share = kept.mean(1)
    assert np.all((share < 0.2) | (share > 0.8)) and 0.3 < (share > 0.8).mean() < 0.7
    with pytest.raises(ValueError, match=r"block=7.* does not divide the 64 inputs"):
        noise(params, KEY, 0.5, block=7)
    with pytest.raises(ValueError, match=r"a rate is from 0 to 1"):
        noise(params, KEY, 1.5)
    with pytest.raises(ValueError, match=r"there are none"):
        noise(params_of(), KEY, 0.5)


def test_gradients_have_the_structure_of_what_trains():
    """And noise, bits and keys go together, through products with activations and scans."""
    stack = {"w": 0.3 * jax.random.normal(jax.random.key(1), (3, 8, 8)), "bias": jnp.ones(8)}
    params = qat(stack, [("w", Spec(Int(4, rounding="stochastic"), Int(8)))])
    x = jax.random.normal(jax.random.key(2), (5, 8))

    def apply(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0] + p["bias"][None]

    @jax.jit
    def loss(params, key, rate, bits):
        one, two = jax.random.split(key)
        params = with_bits(noise(with_key(params, one), two, rate), bits)
        return jnp.sum(lift(apply)(params, x) ** 2)

    grads = jax.grad(loss)(params, KEY, jnp.float32(0.5), jnp.float32(5))
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert np.all(np.any(np.asarray(grads["w"].weight), (1, 2)))
    tx = optax.masked(optax.adam(0.1), trainable(params))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.structure(optax.apply_updates(params, updates)) == jax.tree.structure(params)
    values = [loss(params, KEY, jnp.float32(0.5), jnp.float32(b)) for b in (2, 3, 8)]
    assert len({float(v) for v in values}) == 3 and loss._cache_size() == 1


def test_keys_round_without_bias_and_layer_by_layer():
    params = qat(params_of((2, 8, 4)), RANDOM)
    keys = jax.random.split(KEY, 2000)
    draws = jax.jit(jax.vmap(lambda k: seen(with_key(params, k))))(keys)
    nearest = np.asarray(seen(deterministic(params)))
    step = np.abs(np.asarray(params["w"].weight)).max(1, keepdims=True) / 3
    error = np.asarray(draws).mean(0) - np.asarray(params["w"].weight)
    assert np.abs(error / step).max() < 5 * 0.5 / np.sqrt(2000)
    assert np.abs((nearest - np.asarray(params["w"].weight)) / step).max() > 0.3  # which has a bias
    # Slices with their keys are slices of the whole, and layers do not share random bits.
    given = with_key(params, KEY)["w"]
    layers = jax.lax.map(lambda leaf: leaf.materialise(), given)
    np.testing.assert_array_equal(layers, given.materialise())
    same = qat({"w": jnp.stack([params["w"].weight[0]] * 2)}, RANDOM)
    both = seen(with_key(same, KEY))
    assert np.any(np.asarray(both[0]) != np.asarray(both[1]))


def test_stored_with_a_key_is_what_that_step_saw():
    for spec in (RANDOM, Spec(RANDOM, weight_step=LSQ())):
        params = qat(params_of((3, 8, 4)), spec)
        stored = quantize(params, key=KEY)
        np.testing.assert_array_equal(seen(stored), jax.jit(seen)(with_key(params, KEY)))
        np.testing.assert_array_equal(seen(stored), seen(quantize(with_key(params, KEY))))
        np.testing.assert_array_equal(
            seen(quantize(deterministic(params))), seen(deterministic(params))
        )
        with pytest.raises(ValueError, match=r"`w` rounds stochastically: pass `key=`"):
            quantize(params)
        with pytest.raises(ValueError, match=r"no key to round at random"):
            lift(lambda p: p["w"] * 2)(params)
    raw = jax.random.key_data(KEY)
    np.testing.assert_array_equal(seen(with_key(params, raw)), seen(with_key(params, KEY)))
    with pytest.raises(ValueError, match=r"found no leaf that rounds at random"):
        with_key(qat(params_of(), Int(4)), KEY)


FORMATS = [
    Int(4),
    Int(2),
    Int(8),
    Int(3, symmetric=False),
    Int(8, symmetric=False, granularity="tensor"),
    Int(4, granularity="group", group_size=4),
    Int(5, rounding="floor"),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_formats_own_bits_are_the_format(format):
    params = qat(params_of((3, 16, 8)), format)

    @jax.jit
    def at(bits):
        return seen(with_bits(params, bits))

    np.testing.assert_array_equal(at(jnp.float32(format.bits)), jax.jit(seen)(params))
    if format.rounding == "nearest":  # and those of other formats at their bits
        for bits in (2, 3, 6, 8):
            other = qat(params_of((3, 16, 8)), type(format)(**{**vars(format), "bits": bits}))
            np.testing.assert_array_equal(at(jnp.float32(bits)), seen(other))
    error = [float(jnp.abs(at(jnp.float32(b)) - params["w"].weight).max()) for b in (2, 6, 12)]
    assert error[0] > 4 * error[1] > 16 * error[2]
    assert at._cache_size() == 1
    np.testing.assert_array_equal(at(jnp.float32(40)), at(jnp.float32(16)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_that_are_no_number_give_none(symmetric):
    params = qat({"w": jnp.array([[0.3], [1.0]])}, Int(2, symmetric=symmetric))
    values = jax.jit(lambda b: with_bits(params, b)["w"].materialise())(jnp.nan)
    assert np.all(np.isnan(values))


def test_bits_with_learned_steps_and_keys():
    for spec in (
        Spec(Int(3), weight_step=LSQ()),
        Spec(Int(3, symmetric=False), weight_step=LSQPlus()),
        RANDOM,
    ):
        params = qat(params_of(), spec)
        if not isinstance(spec, Spec):
            params = with_key(params, KEY)
        whole = jax.jit(seen)(params)
        np.testing.assert_allclose(seen(with_bits(params, 3)), whole, rtol=1e-6, atol=1e-7)
        assert len(np.unique(np.asarray(seen(with_bits(params, 6))))) > len(np.unique(whole))


def test_a_schedule_of_bits_in_one_program():
    x = jax.random.normal(jax.random.key(2), (32, 16))
    target = x @ params_of()["w"] * 0.5
    params = qat(params_of(), [("w", Int(3))])
    schedule = optax.linear_schedule(8, 3, 20)
    tx = optax.sgd(0.05)

    @jax.jit
    def step(params, state, count):
        def loss(params):
            now = with_bits(params, schedule(count))
            return jnp.mean((lift(lambda p: x @ p["w"] + 0 * p["bias"][None])(now) - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for count in range(30):
        params, state, value = step(params, state, jnp.int32(count))
        losses.append(float(value))
    assert step._cache_size() == 1 and losses[15] < losses[0]
    assert isinstance(params["w"], FakeQuant) and params["w"].bits is None
    np.testing.assert_array_equal(seen(with_bits(params, schedule(30))), seen(quantize(params)))
    with pytest.raises(ValueError, match=r"made it for one step"):
        quantize(with_bits(params, 4))
    with pytest.raises(ValueError, match=r"bits is a scalar"):
        with_bits(params, jnp.ones(2))


def test_they_lower_for_all_platforms():
    params = qat(params_of((2, 8, 8)), Spec(RANDOM, Int(8)))

    def f(w, seed, bits):
        key = jax.random.key(seed)
        now = {"w": params["w"].with_weight(w), "bias": params["bias"]}
        now = with_bits(noise(with_key(now, key), key, 0.5), bits)
        x = jnp.ones((3, 8))
        return jax.lax.scan(lambda x, w: (x @ w, None), x, lift(lambda w: w * 1)(now["w"]))[0]

    shapes = [
        jax.ShapeDtypeStruct((2, 8, 8), jnp.float32),
        *[jax.ShapeDtypeStruct((), jnp.int32)] * 2,
    ]
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=r"dense"):
        f(*(jnp.zeros(s.shape, s.dtype) for s in shapes))  # `w * 1` has no rule

    def g(w, seed, bits):
        key = jax.random.key(seed)
        now = {"w": params["w"].with_weight(w)}
        now = with_bits(noise(with_key(now, key), key, 0.5), bits)
        layers = lift(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0])
        return jnp.sum(layers(now, jnp.ones((3, 8))))

    exported = jax.export.export(jax.jit(jax.grad(g)), platforms=("cpu", "cuda", "tpu"))(*shapes)
    assert len(exported.platforms) == 3
