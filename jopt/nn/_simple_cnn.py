"""The classic small network for CIFAR-10, with either framework's initialization."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import linen

from jopt.nn._convolution import Conv, Initializer


class SimpleCNN(linen.Module):
    """Two 3×3 convolutions, each with ReLU and 2×2 pooling, dropout, and two dense layers.

    Images of `[batch, height, width, channels]`, floating, become logits `[batch, classes]`. For
    32×32×3 images and ten classes, 136,874 parameters. In training (`train=True`) dropout needs a
    key: `rngs={"dropout": key}`.

    Attributes:
      classes: logits.
      widths: channels of the two convolutions.
      hidden: width of the first dense layer.
      dropout: fraction of the flattened features dropped.
      initialization: `"flax"`, kernels LeCun normal and biases zero; or `"torch"`, both uniform
        within ±1/√fan_in, as PyTorch's convolutions and linear layers start.

    References:
      Yann LeCun, Léon Bottou, Genevieve B. Orr, Klaus-Robert Müller: Efficient BackProp, 1998.
      Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Delving Deep into Rectifiers, 2015,
      arXiv:1502.01852. (PyTorch passes a = √5 to this paper's initialization, which makes the bound
      1/√fan_in.)
    """

    classes: int = 10
    widths: tuple[int, int] = (16, 32)
    hidden: int = 64
    dropout: float = 0.5
    initialization: Literal["flax", "torch"] = "flax"

    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits of a batch of images."""
        if self.initialization not in ("flax", "torch"):
            raise ValueError(
                f'`SimpleCNN(initialization="{self.initialization}")` expects "flax" or "torch".'
            )
        for width in self.widths:
            kernel_init, bias_init = self._initializers(9 * x.shape[-1])
            x = Conv(width, kernel_init=kernel_init, bias_init=bias_init, pool=2)(x)
            x = jax.nn.relu(x)  # after the pooling: the same values, and a quarter to compute
        x = x.reshape(x.shape[0], -1)
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        x = jax.nn.relu(self._dense(self.hidden, x))
        return self._dense(self.classes, x)

    def _dense(self, features: int, x: jax.Array) -> jax.Array:
        kernel_init, bias_init = self._initializers(x.shape[-1])
        return linen.Dense(features, kernel_init=kernel_init, bias_init=bias_init)(x)

    def _initializers(self, fan_in: int) -> tuple[Initializer, Initializer]:
        if self.initialization == "flax":
            return jax.nn.initializers.lecun_normal(), jax.nn.initializers.zeros
        bound = 1 / math.sqrt(fan_in)

        def within(
            key: jax.Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None
        ) -> jax.Array:
            shape = tuple(shape)
            return jax.random.uniform(key, shape, dtype, -bound, bound, out_sharding=out_sharding)

        return within, within
