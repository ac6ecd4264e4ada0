"""`conv` and `Conv`: both lowerings against a float64 loop, XLA's convolution and PyTorch."""

import functools

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jopt import nn
from jopt.nn import _convolution

# image (height, width, in), kernel (h, w, out), strides, padding
CASES = [
    ((8, 8, 3), (3, 3, 4), 1, "SAME"),
    ((8, 8, 3), (3, 3, 4), 1, "VALID"),
    ((7, 9, 2), (3, 3, 5), 2, "SAME"),
    ((7, 9, 2), (3, 3, 5), 2, "VALID"),
    ((6, 5, 1), (1, 1, 3), 1, "SAME"),
    ((6, 5, 2), (2, 4, 3), (3, 1), "SAME"),
    ((6, 5, 2), (2, 4, 3), (1, 2), ((2, 0), (1, 3))),
    ((5, 5, 1), (5, 5, 1), 1, "VALID"),
    ((2, 3, 2), (3, 3, 2), 1, "SAME"),
]


def arrays(image, kernel, batch=2, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *image)).astype(dtype)
    return x, rng.standard_normal((*kernel[:2], image[2], kernel[2])).astype(dtype)


def loop(x, kernel, strides, padding):
    """The formula, one output at a time, in float64."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    down, across = (strides, strides) if isinstance(strides, int) else strides
    h, w = kernel.shape[:2]
    if padding == "VALID":
        pads = ((0, 0), (0, 0))
    elif padding == "SAME":
        pads = []
        for size, window, step in zip(x.shape[1:3], (h, w), (down, across), strict=True):
            total = max((-(-size // step) - 1) * step + window - size, 0)
            pads.append((total // 2, total - total // 2))
    else:
        pads = padding
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = (x.shape[1] - h) // down + 1, (x.shape[2] - w) // across + 1
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * down : i * down + h, j * across : j * across + w]
            y[:, i, j] = np.tensordot(window, kernel, 3)
    return y


@pytest.mark.parametrize(("image", "kernel", "strides", "padding"), CASES)
def test_conv_equals_a_loop_in_float64(image, kernel, strides, padding):
    x, k = arrays(image, kernel)
    y = jax.jit(functools.partial(nn.conv, strides=strides, padding=padding))(x, k)
    expected = loop(x, k, strides, padding)
    assert y.shape == expected.shape and y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("image", "kernel", "strides", "padding"), CASES)
def test_both_lowerings_have_the_derivatives_of_xlas_convolution(image, kernel, strides, padding):
    x, k = arrays(image, kernel)
    steps = (strides, strides) if isinstance(strides, int) else strides
    pads = _convolution._pads(x, k, steps, padding)

    numbers = ("NHWC", "HWIO", "NHWC")

    def reference(x, k):
        return jax.lax.conv_general_dilated(x, k, steps, pads, dimension_numbers=numbers)

    @jax.jit
    def all_of(x, k, g):
        found = []
        for f in (reference, *lowerings):
            y, pullback = jax.vjp(f, x, k)
            found.append((y, *pullback(g)))
        return found

    lowerings = [
        functools.partial(f, strides=steps, pads=pads)
        for f in (_convolution._by_lax, _convolution._by_slices)
    ]
    g = np.random.default_rng(1).standard_normal(jax.eval_shape(reference, x, k).shape)
    expected, *found = all_of(x, k, g.astype(np.float32))
    for results in found:
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_conv_equals_pytorch_with_its_derivatives():
    torch = pytest.importorskip("torch")
    x, k = arrays((9, 7, 3), (3, 3, 4))
    their_x = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    their_k = torch.tensor(k.transpose(3, 2, 0, 1).copy(), requires_grad=True)
    theirs = torch.nn.functional.conv2d(their_x, their_k, stride=2, padding=1)
    theirs.square().sum().backward()

    def loss(x, k):
        return jnp.sum(nn.conv(x, k, strides=2, padding=((1, 1), (1, 1))) ** 2)

    value, (dx, dk) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, k)
    np.testing.assert_allclose(value, theirs.square().sum().item(), rtol=1e-5)
    np.testing.assert_allclose(dx, their_x.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dk, their_k.grad.numpy().transpose(2, 3, 1, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_conv_keeps_the_dtype(dtype):
    x, k = arrays((6, 6, 2), (3, 3, 4))
    y = jax.jit(nn.conv)(jnp.asarray(x, dtype), jnp.asarray(k, dtype))
    assert y.dtype == dtype
    tolerance = 30 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(y.astype(np.float32), nn.conv(x, k), rtol=tolerance, atol=tolerance)


def test_conv_under_vmap_over_images_and_kernels():
    x, _ = arrays((6, 6, 2), (3, 3, 4))
    kernels = np.stack([arrays((6, 6, 2), (3, 3, 4))[1] * scale for scale in (1, 2, 3)])
    many = jax.jit(jax.vmap(nn.conv, (None, 0)))(x, kernels)
    for y, kernel in zip(many, kernels, strict=True):
        np.testing.assert_allclose(y, loop(x, kernel, 1, "SAME"), rtol=1e-4, atol=1e-4)


def test_cpu_has_a_product_and_cuda_and_tpu_a_convolution_in_one_export():
    (batch,) = export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((batch, 6, 6, 2), jnp.float32)
    x, k = arrays((6, 6, 2), (3, 3, 4), batch=5)

    def text(platform):
        return export.export(jax.jit(nn.conv), platforms=[platform])(spec, k).mlir_module()

    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in text(platform)
        assert "stablehlo.dot_general" not in text(platform)
    assert "stablehlo.convolution" not in text("cpu")
    whole = export.export(jax.jit(nn.conv), platforms=("cpu", "cuda", "tpu"))(spec, k)
    np.testing.assert_allclose(whole.call(x, k), loop(x, k, 1, "SAME"), rtol=1e-5, atol=1e-5)


def test_choosing_by_platform_costs_the_compiled_cpu_program_nothing():
    x, k = arrays((8, 8, 3), (3, 3, 4))
    direct = functools.partial(_convolution._by_slices, strides=(1, 1), pads=((1, 1), (1, 1)))

    def loss(conv, x, k):
        def body(total, image):
            return total + jnp.sum(conv(image[None], k) ** 2), None

        return jax.lax.scan(body, jnp.zeros(()), x)[0]

    def compiled(conv):
        step = jax.jit(jax.value_and_grad(functools.partial(loss, conv), argnums=1))
        return step.lower(x, k).compile()

    chosen, plain = compiled(nn.conv), compiled(direct)
    assert " convolution(" not in chosen.as_text()
    assert chosen.cost_analysis()["flops"] == plain.cost_analysis()["flops"]
    memory = chosen.memory_analysis(), plain.memory_analysis()
    assert memory[0].temp_size_in_bytes <= memory[1].temp_size_in_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": (3, 3, 4, 2)}, r"the same `in`; got shapes \(1, 6, 6, 3\) and \(3, 3, 4, 2\)"),
        ({"kernel": (3, 3, 3)}, "expects images"),
        ({"padding": "same"}, r'`conv\(..., padding="same"\)` expects "SAME", "VALID"'),
        ({"kernel": (7, 7, 3, 2), "padding": "VALID"}, r"no window of \(7, 7\) fits"),
    ],
)
def test_conv_says_what_does_not_fit(options, message):
    kernel = jnp.zeros(options.pop("kernel", (3, 3, 3, 2)))
    with pytest.raises(ValueError, match=message):
        nn.conv(jnp.zeros((1, 6, 6, 3)), kernel, **options)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_conv_module_takes_the_place_of_flaxs(key, padding):
    x = jax.random.normal(key, (2, 9, 7, 3))
    options = {"strides": 2, "padding": padding, "bias_init": jax.nn.initializers.normal(1.0)}
    theirs, ours = linen.Conv(5, (3, 3), **options), nn.Conv(5, (3, 3), **options)
    variables = theirs.init(key, x)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), variables, ours.init(key, x))
    assert jax.tree.all(same)
    np.testing.assert_allclose(
        ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def test_conv_module_without_bias_and_in_bfloat16(key):
    x = jax.random.normal(key, (1, 4, 4, 2))
    layer = nn.Conv(3, (3, 3), use_bias=False, dtype=jnp.bfloat16)
    variables = layer.init(key, x)
    assert list(variables["params"]) == ["kernel"]
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert layer.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("pool", [2, (1, 2), (2, 1)])
def test_conv_module_that_pools_before_the_bias_equals_pooling_last(key, pool):
    x = jax.random.normal(key, (2, 6, 8, 3))
    whole = nn.Conv(5, bias_init=jax.nn.initializers.normal(1.0))
    variables = whole.init(key, x)

    def last(variables):
        return nn.max_pool(jax.nn.relu(whole.apply(variables, x)), pool)

    def early(variables):
        return jax.nn.relu(nn.Conv(5, pool=pool).apply(variables, x))

    np.testing.assert_array_equal(jax.jit(early)(variables), jax.jit(last)(variables))
    slopes = [
        jax.jit(jax.grad(lambda v, f=f: jnp.sum(f(v) ** 2)))(variables) for f in (early, last)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
