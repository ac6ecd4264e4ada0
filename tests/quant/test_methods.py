"""Rounding layer by layer: any layout of a weight, and errors handed on from layer to layer.

The reference is a NumPy walk through the same network that rounds each matrix by the method's own
function, tested against its paper elsewhere, on Gram matrices taken in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jopt
from jopt import quant, trees
from jopt.quant import Int, Spec
from jopt.quant._policy import resolve
from jopt.quant._rounding.methods import AWQ, GPTQ, HQQ, AdaRound, rounded

RNG = np.random.default_rng(0)


def f32(*shape):
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1), "f4")


MIX = f32(8, 8)  # makes the inputs of every layer correlated, which GPTQ lives on


def by(method, apply, params, batches, format, **options):
    sites = jopt.sites(apply, params, batches[0])
    specs = resolve(params, format, sites=sites, caller="test")
    return rounded(apply, params, batches, specs, method, sites=sites, **options)


def error(apply, params, changed, batches):
    found = [jnp.sum((jopt.lift(apply)(changed, x) - apply(params, x)) ** 2) for x in batches]
    return float(sum(found))


PARAMS = {"layers": f32(3, 8, 8), "last": f32(8, 4)}
BATCHES = [f32(16, 8) @ MIX for _ in range(3)]


def apply(p, x):
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return h @ p["last"]


@pytest.mark.parametrize(
    "format", [Int(3), Int(3, symmetric=False), Int(3, granularity="group", group_size=4)]
)
@pytest.mark.parametrize("order", [False, True])
def test_gptq_of_a_network_is_gptq_of_each_layer_on_what_the_rounded_ones_give(format, order):
    found, missed = by(GPTQ(order=order), apply, PARAMS, BATCHES, format)
    assert not missed
    hs = [np.asarray(x, np.float64) for x in BATCHES]
    for i in range(3):
        gram = sum(h.T @ h for h in hs)
        layer = quant.gptq(PARAMS["layers"][i], jnp.asarray(gram, jnp.float32), format, order=order)
        np.testing.assert_array_equal(found["layers"].codes[i], layer.codes)
        weight = np.asarray(format.decode(layer.codes, layer.grid), np.float64)
        np.testing.assert_allclose(found["layers"].materialise()[i], weight, 1e-5)
        hs = [np.tanh(h @ weight) for h in hs]


@pytest.mark.parametrize("method", [GPTQ(), AdaRound(steps=300), AWQ(), HQQ()], ids=str)
def test_methods_do_not_hang_on_the_unit(method):
    params, x, codes = {"w": PARAMS["layers"][0]}, BATCHES[0], []
    for of_weights, of_inputs in [(0, 0), (-66, 0), (66, 0), (0, 63), (0, -55)]:
        scaled = {"w": params["w"] * np.float32(2.0**of_weights)}
        batches = [x * np.float32(2.0**of_inputs)]
        found, missed = by(method, lambda p, x: x @ p["w"], scaled, batches, Int(3))
        assert not missed
        codes.append(found["w"].codes)
    assert not np.array_equal(codes[0], quant.quantize(params, Int(3))["w"].codes)
    for other in codes[1:]:
        np.testing.assert_array_equal(other, codes[0])


@pytest.mark.parametrize("method", [GPTQ(), AdaRound(steps=5), AWQ()], ids=str)
def test_batches_that_tell_nothing_are_not_passed_over(method):
    policy, params = [("*", Int(3))], {"w": PARAMS["layers"][0], "v": PARAMS["last"]}
    x = BATCHES[0]

    def apply(p, x):
        return jax.nn.relu(x @ p["w"] - 99.0) @ p["v"]  # whose input is dead

    with pytest.raises(ValueError, match=r"the activation that meets `w` is empty in every batch"):
        quant.calibrate(apply, params, [x[:0]] * 2, policy, method=method)
    cases = [([x], "v"), ([x * 1e-20], "wv")]
    for batches, silent in cases:
        found, report = quant.calibrate(apply, params, batches, policy, method=method)
        for row in report:
            why = "rounded to nearest: what meets it was zero in every batch"
            assert (why in row.undone) == (row.path in silent)
        nearest = quant.quantize(params, policy)["v"]
        np.testing.assert_array_equal(found["v"].codes, nearest.codes)


@pytest.mark.parametrize("method", [GPTQ(), GPTQ(order=True), AdaRound(steps=600)])
def test_methods_beat_rounding_to_nearest_on_the_outputs(method):
    format = Int(3)
    nearest = quant.quantize(PARAMS, format)
    found, _ = by(method, apply, PARAMS, BATCHES, format)
    ours, theirs = (error(apply, PARAMS, p, BATCHES) for p in (found, nearest))
    assert ours < 0.8 * theirs
    assert jax.tree.structure(found) == jax.tree.structure(nearest)


def test_hqq_needs_no_data_and_keeps_the_layout():
    found, missed = by(HQQ(), apply, PARAMS, BATCHES, Int(3, symmetric=False))
    assert not missed
    for path, leaf in trees.items(found):
        weights = PARAMS[path].reshape(-1, *PARAMS[path].shape[-2:])
        each = [quant.hqq(w, Int(3, symmetric=False)) for w in weights]
        codes = jnp.stack([r.codes for r in each]).reshape(leaf.codes.shape)
        np.testing.assert_array_equal(leaf.codes, codes)


LAYOUTS = {
    "transposed": (lambda w, x: x @ w.T, (6, 8), (40, 8)),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (8, 2, 3), (40, 8)),
    "heads summed": (lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 4, 6), (40, 2, 4)),
    "experts": (lambda w, x: jnp.einsum("bei,eio->beo", x, w), (3, 8, 5), (40, 3, 8)),
}


def convolution(groups):
    def run(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return run


LAYOUTS["convolution"] = (convolution(1), (3, 3, 4, 6), (4, 6, 6, 4))
LAYOUTS["grouped convolution"] = (convolution(2), (3, 3, 4, 6), (4, 6, 6, 8))
LAYOUTS["depthwise convolution"] = (convolution(8), (3, 3, 1, 8), (4, 6, 6, 8))
FORMATS = {
    "channel": Int(3),
    "tensor": Int(3, symmetric=False, granularity="tensor"),
    "group": Int(3, granularity="group", group_size=4),
}


@pytest.mark.parametrize("granularity", FORMATS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_has_the_leaf_that_quantize_makes_with_other_codes(name, granularity):
    function, shape, data = LAYOUTS[name]
    format, batches = FORMATS[granularity], [f32(*data)]
    f = lambda p, x: function(p["w"], x)  # noqa: E731
    params = {"w": f32(*shape)}
    if granularity == "group" and name == "depthwise convolution":
        with pytest.raises(ValueError, match="group_size=4 does not divide"):
            by(GPTQ(), f, params, batches, format)
        return
    sites = jopt.sites(f, params, batches[0])
    nearest = quant.quantize(params, format, sites=sites)
    found, missed = by(GPTQ(), f, params, batches, format)
    assert not missed and jax.tree.structure(found) == jax.tree.structure(nearest)
    one, other = found["w"], nearest["w"]
    assert one.codes.dtype == other.codes.dtype and one.codes.shape == other.codes.shape
    if granularity == "channel":  # the same scales: fitted beforehand, to the weight alone
        np.testing.assert_allclose(one.scale, other.scale, 1e-6)
    ours, theirs = (error(f, params, p, batches) for p in (found, nearest))
    assert ours <= 1.05 * theirs
    assert jnp.abs(one.codes.astype(jnp.int8) - other.codes.astype(jnp.int8)).max() <= 7


def test_integers_of_a_method_run_as_integers():
    spec = Spec(Int(4), Int(8))
    found, _ = by(GPTQ(), apply, PARAMS, BATCHES, spec)
    report = jopt.trace.explain(apply, found, BATCHES[0])
    assert {met.how for met in report} == {"a product of integers"}


def test_what_is_missed_is_rounded_to_nearest_and_said():
    params = {"w": f32(8, 8), "mask": jnp.ones((8, 8)), "v": f32(8, 4)}
    f = lambda p, x: x @ (p["w"] * p["mask"]) @ p["v"]  # noqa: E731
    sites = jopt.sites(f, params, BATCHES[0])
    specs = {path: Spec(Int(4)) for path in ("w", "v")}
    found, missed = rounded(f, params, BATCHES, specs, GPTQ(), sites=sites)
    assert list(missed) == ["w"] and "hoist" in missed["w"]
    np.testing.assert_array_equal(found["w"].codes, quant.quantize(params["w"], Int(4)).codes)


def test_progress_names_each_layer():
    seen = []
    by(HQQ(), apply, PARAMS, BATCHES, Int(4), shown=seen.append)
    assert seen == ["last", "layers/0", "layers/1", "layers/2"]
    seen.clear()
    by(GPTQ(), apply, PARAMS, BATCHES, Int(4), shown=seen.append)
    assert seen == ["layers/0", "layers/1", "layers/2", "last"]


def test_a_method_of_ones_own():
    class Zeros(quant.Method):
        def matrix(self, weight, stats, format):
            grid = format.fit(weight, (-2,))
            return quant.Rounded(jnp.zeros_like(weight, format.container), grid)

    found, _ = by(Zeros(), apply, PARAMS, BATCHES, Int(4))
    assert not jnp.any(found["last"].materialise())
