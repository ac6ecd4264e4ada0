"""Activations with parameters of their own; those without are in `jax.nn`."""

import jax
import jax.numpy as jnp
from flax import linen


class Swish(linen.Module):
    """`x · σ(βx)` with a learnable β, one for the layer.

    At β = 1, where it starts, it is `jax.nn.silu`; as β grows it nears `jax.nn.relu`, and at 0 it
    is x / 2.

    Attributes:
      beta: where β starts.
      param_dtype: dtype of the parameter.

    References:
      Prajit Ramachandran, Barret Zoph, Quoc V. Le: Searching for Activation Functions, 2017,
      arXiv:1710.05941.
    """

    beta: float = 1.0
    param_dtype: jax.typing.DTypeLike = jnp.float32

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the activation of `x`, elementwise, in the dtype of `x`."""
        initial = jax.nn.initializers.constant(self.beta)
        beta = self.param("beta", initial, (), self.param_dtype)
        return x * jax.nn.sigmoid(beta.astype(x.dtype) * x)
