"""Residual networks for small images, whose size is a few numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jopt.nn._convolution import Conv

_he = jax.nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class ResNet(linen.Module):
    """A 3×3 convolution, stages of residual blocks, the mean over places, and a dense layer.

    A block is two 3×3 convolutions, each batch-normalized, whose result is added to what came in.
    The first block of every stage but the first halves height and width; where the shape changes,
    what came in goes through a 1×1 convolution. `widths=(16, 32, 64), blocks=3` is ResNet-20 with
    these convolutions (option B of the paper, whose own networks for CIFAR pad with zeros).

    Images of `[batch, height, width, channels]`, floating, become logits `[batch, classes]`. In
    training (`train=True`) statistics are taken from the batch, and the running ones are updated in
    the collection `batch_stats`, to be passed as `mutable=["batch_stats"]`. What a block gives can
    be tapped as `ResNet/stage0_block0`.

    Attributes:
      widths: channels of each stage.
      blocks: residual blocks of each stage; one number for all, or one for each, of which 0 in the
        first place leaves that stage the first convolution alone.
      classes: logits.
      strides: of the first convolution; 2 makes all that follows four times as cheap.
      momentum: how much of the running statistics a step keeps.
      axis_name: the axis of `jax.pmap` or `jax.shard_map` over which batch statistics are averaged.

    References:
      Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning for Image
      Recognition, 2015, arXiv:1512.03385.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int | tuple[int, ...] = 3
    classes: int = 10
    strides: int = 1
    momentum: float = 0.9
    axis_name: str | None = None

    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits of a batch of images."""
        blocks = self.blocks
        counts = (blocks,) * len(self.widths) if isinstance(blocks, int) else blocks
        if len(counts) != len(self.widths):
            raise ValueError(
                f"`ResNet(widths={self.widths}, blocks={blocks})` expects one number of blocks, or "
                "one for each width."
            )
        options: dict[str, Any] = {
            "train": train,
            "momentum": self.momentum,
            "axis_name": self.axis_name,
        }
        x = jax.nn.relu(_Normed(self.widths[0], 3, self.strides, **options, name="stem")(x))
        for stage, (width, count) in enumerate(zip(self.widths, counts, strict=True)):
            for block in range(count):
                strides = 2 if stage and not block else 1
                x = _Block(width, strides, options, name=f"stage{stage}_block{block}")(x)
        return linen.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))


class _Block(linen.Module):
    """Two convolutions, added to what came in."""

    width: int
    strides: int
    options: dict[str, Any]  # of `_Normed`

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(_Normed(self.width, 3, self.strides, **self.options, name="first")(x))
        y = _Normed(self.width, 3, 1, **self.options, name="second")(y)
        if x.shape != y.shape:
            x = _Normed(self.width, 1, self.strides, **self.options, name="shortcut")(x)
        return jax.nn.relu(x + y)


class _Normed(linen.Module):
    """A convolution and batch normalization."""

    width: int
    size: int
    strides: int
    train: bool
    momentum: float
    axis_name: str | None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (self.size, self.size)
        x = Conv(self.width, size, self.strides, use_bias=False, kernel_init=_he, name="conv")(x)
        return linen.BatchNorm(
            use_running_average=not self.train,
            momentum=self.momentum,
            axis_name=self.axis_name,
            name="norm",
        )(x)
