"""Convolution of images, lowered as each platform runs it fastest."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype

from jopt.nn._lowering import by_platform
from jopt.nn._pooling import max_pool

Initializer = jax.nn.initializers.Initializer
Pads = tuple[tuple[int, int], tuple[int, int]]
Padding = str | Sequence[tuple[int, int]]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
) -> jax.Array:
    """Convolves images with a kernel, as `jax.lax.conv_general_dilated` does, faster on XLA:CPU.

    `y[b, i, j, o] = Σ x[b, i·s + u, j·s + v, c] · kernel[u, v, c, o]`, the image padded with zeros.

    On CPU the image's patches, laid out as a matrix `[pixels, h·w·in]`, meet the kernel, reshaped
    to `[h·w·in, out]`, in one product. Its derivatives are products too, and unlike XLA:CPU's own
    convolution it keeps its speed inside a compiled loop (jax-ml/jax#12868). It takes memory for
    h·w copies of the image. Elsewhere it is XLA's convolution. `jopt.backends` holds the choice.

    Args:
      x: images `[batch, height, width, in]`.
      kernel: `[h, w, in, out]`, of the dtype of `x`.
      strides: pixels from one window to the next, the same or `(down, across)`.
      padding: `"SAME"`, `"VALID"`, or `((top, bottom), (left, right))`.

    Returns:
      `[batch, height', width', out]`, of the dtype of `x`.

    Raises:
      ValueError: if the shapes do not fit, or no window fits into the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import nn
      >>> nn.conv(jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4)), strides=2).shape
      (1, 3, 3, 4)
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[3] != kernel.shape[2]:
        raise ValueError(
            "`conv(x, kernel)` expects images `[batch, height, width, in]` and a kernel "
            f"`[h, w, in, out]` with the same `in`; got shapes {x.shape} and {kernel.shape}."
        )
    steps = (strides, strides) if isinstance(strides, int) else (strides[0], strides[1])
    pads = _pads(x, kernel, steps, padding)
    implementations = {
        "lax": functools.partial(_by_lax, strides=steps, pads=pads),
        "slices": functools.partial(_by_slices, strides=steps, pads=pads),
    }
    return by_platform(lambda choices: choices.convolution, implementations, x, kernel)


class Conv(linen.Module):
    """`conv` with its weights: parameters `kernel` `[h, w, in, out]` and `bias` `[out]`.

    Takes the place of `flax.linen.Conv` for images, with the same parameters and the same defaults.

    Attributes:
      features: output channels.
      kernel_size: `(h, w)`.
      strides: as of `conv`.
      padding: as of `conv`.
      use_bias: whether a bias is added.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      dtype: what inputs and weights are cast to for the product; None for what they promote to.
      param_dtype: dtype of the parameters.
      pool: window of a `max_pool` before the bias is added. Since max(y) + b = max(y + b), and
        max(f(y)) = f(max(y)) for an f that never falls, such as ReLU, the values are those of
        pooling last, with less to add, to activate and to keep for the derivative.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    use_bias: bool = True
    kernel_init: Initializer = jax.nn.initializers.lecun_normal()
    bias_init: Initializer = jax.nn.initializers.zeros
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    pool: int | tuple[int, int] = 1

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `max_pool(conv(x, kernel), pool) + bias`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv(x, kernel, strides=self.strides, padding=self.padding)
        if self.pool != 1:
            y = max_pool(y, self.pool)
        return y if bias is None else y + jnp.reshape(bias, (1, 1, 1, -1))


def _pads(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> Pads:
    image, window = x.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f'`conv(..., padding="{padding}")` expects "SAME", "VALID", or '
                "((top, bottom), (left, right))."
            )
        down, across = jax.lax.padtype_to_pads(image, window, strides, padding)
    else:
        down, across = padding
    pads = ((int(down[0]), int(down[1])), (int(across[0]), int(across[1])))
    if any(n + sum(p) < k for n, k, p in zip(image, window, pads, strict=True)):
        raise ValueError(
            f"`conv(..., padding={padding!r})`: no window of {window} fits into an image of "
            f'{image}. Pad more (`padding="SAME"`) or use a smaller kernel.'
        )
    return pads


def _by_lax(x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], pads: Pads) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _by_slices(
    x: jax.Array, kernel: jax.Array, *, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    h, w, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    batch, height, width, _ = x.shape
    rows, columns = (height - h) // strides[0] + 1, (width - w) // strides[1] + 1

    def shifted(x: jax.Array, by: int, axis: int, count: int) -> jax.Array:
        step = strides[axis - 1]
        return jax.lax.slice_in_dim(x, by, by + (count - 1) * step + 1, step, axis)

    # First the windows of each row, then those rows under one another: longer runs to copy, and
    # h + w copies to add up in the derivative instead of h · w.
    across = [shifted(x, v, 2, columns)[:, :, :, None] for v in range(w)]
    strips = jnp.concatenate(across, axis=3).reshape(batch, height, columns, w * channels)
    down = [shifted(strips, u, 1, rows).reshape(-1, 1, w * channels) for u in range(h)]
    patches = jnp.concatenate(down, axis=1).reshape(-1, h * w * channels)
    # Matrices, since XLA:CPU copies the operands of a product of more axes into an order of its
    # own; and the kernel on the left and transposed, so that its derivative is computed as
    # [out, h·w·in], in two thirds of the time of the other order. Without the barrier XLA would
    # merge the transpositions and choose that other order.
    flat = jax.lax.optimization_barrier(kernel.reshape(-1, features).T)
    product = jax.lax.dot_general(flat, patches, (((1,), (1,)), ((), ())))
    return product.T.reshape(batch, rows, columns, features)
