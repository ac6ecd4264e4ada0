"""Random changes of images, for use inside the train step: pure functions of images and a key."""

import jax
import jax.numpy as jnp


def random_shift(images: jax.Array, key: jax.Array, pixels: int) -> jax.Array:
    """Shifts each image by up to `pixels` in both directions; what comes in from outside is zero.

    Args:
      images: `[batch, height, width, channels]`, any dtype.
      key: draws a shift for each image, all equally likely.
      pixels: the largest shift.

    Returns:
      Images of the same shape and dtype.
    """
    around = (pixels, pixels)
    padded = jnp.pad(images, ((0, 0), around, around, (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * pixels + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros_like(corner[0]))
        return jax.lax.dynamic_slice(image, start, images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image left to right, or not, equally likely.

    Args:
      images: `[batch, height, width, channels]`, any dtype.
      key: draws for each image.

    Returns:
      Images of the same shape and dtype.
    """
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, jnp.flip(images, axis=2), images)
