"""A batch-normalized convolutional network whose size is a few numbers."""

import jax
from flax import linen

from jopt.nn._convolution import Conv
from jopt.nn._pooling import max_pool


class ConvNet(linen.Module):
    """Stages of 3×3 convolution, batch normalization and ReLU, each pooled 2×2, then dense layers.

    Images of `[batch, height, width, channels]`, floating, become logits `[batch, classes]`. Height
    and width must be at least `2 ** len(widths)`.

    In training (`train=True`) statistics are taken from the batch, and the running ones are updated
    in the collection `batch_stats`, to be passed as `mutable=["batch_stats"]`; with `dropout` a key
    is needed as `rngs={"dropout": key}`.

    Attributes:
      widths: channels of each stage.
      classes: logits.
      depth: convolutions a stage.
      hidden: width of a dense layer before the last; 0 for none.
      dropout: fraction of the features dropped before the last layer.
      momentum: how much of the running statistics a step keeps.
      axis_name: the axis of `jax.pmap` or `jax.shard_map` over which batch statistics are averaged.

    References:
      Sergey Ioffe, Christian Szegedy: Batch Normalization: Accelerating Deep Network Training by
      Reducing Internal Covariate Shift, 2015, arXiv:1502.03167.
    """

    widths: tuple[int, ...] = (32, 64)
    classes: int = 10
    depth: int = 1
    hidden: int = 0
    dropout: float = 0.0
    momentum: float = 0.9
    axis_name: str | None = None

    @linen.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits of a batch of images."""

        def normalised(x: jax.Array) -> jax.Array:
            norm = linen.BatchNorm(
                use_running_average=not train, momentum=self.momentum, axis_name=self.axis_name
            )
            return jax.nn.relu(norm(x))

        for width in self.widths:
            for _ in range(self.depth):
                x = normalised(Conv(width, use_bias=False)(x))
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        if self.hidden:
            x = normalised(linen.Dense(self.hidden, use_bias=False)(x))
        x = linen.Dropout(self.dropout, deterministic=not train)(x)
        return linen.Dense(self.classes)(x)
