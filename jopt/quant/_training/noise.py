"""What one training step sees otherwise: fresh keys, quantization noise, a number of bits.

Each takes parameters with the leaves that `qat` made, inside the loss, and returns parameters for
that step alone; the gradient with respect to what went in has its structure.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees

from .._formats.base import Format, Int
from .._formats.bits import bits_for
from .._leaves.weights import FakeQuant
from .learned import TrainedQuant

PyTree = Any


def with_key(params: PyTree, key: jax.Array) -> PyTree:
    """Gives this step's keys to the leaves that round at random: call it in the loss.

    Those are weights whose format has `rounding="stochastic"`, rounded up with the probability of
    the fraction, so that their mean over keys is the weight; and those with `Spec(...,
    backward=...)` of such a format. Each leaf gets a key of its own, each of stacked layers too. A
    leaf used in several products, or in every iteration of a loop, rounds them by one key: each has
    the right mean, but they are not independent.

    Args:
      params: with leaves that `qat` made.
      key: a new one in each step.

    Returns:
      `params` with keys in these leaves.

    Raises:
      ValueError: if no leaf rounds at random.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import Int, qat, with_key
      >>> params = qat({"kernel": jnp.ones((4, 2))}, Int(4, rounding="stochastic"))
      >>> with_key(params, jax.random.key(0))["kernel"].materialise().shape
      (4, 2)

    References:
      Suyog Gupta, Ankur Agrawal, Kailash Gopalakrishnan, Pritish Narayanan, Deep learning with
      limited numerical precision, 2015, arXiv:1502.02551.
    """
    key = _typed(key)

    def give(index: int, leaf: FakeQuant) -> FakeQuant:
        if not _random(leaf):
            return leaf
        matrices = leaf.weight.shape[:-2]
        keys = jax.random.split(jax.random.fold_in(key, index), matrices)
        return dataclasses.replace(
            leaf, key=keys.reshape(matrices + (1,) * min(leaf.weight.ndim, 2))
        )

    if not any(_random(leaf) for _, leaf in trees.items(params)):
        raise ValueError(
            "`with_key(params, key)` found no leaf that rounds at random: no format in training "
            'has `rounding="stochastic"`.'
        )
    return _mapped("with_key", params, give)


def deterministic(params: PyTree) -> PyTree:
    """Rounds to nearest what `qat` was told to round at random: to evaluate, and to store.

    Args:
      params: with leaves that `qat` made.

    Returns:
      `params` whose formats round to nearest, without keys, noise or bits of a step.
    """

    def calm(index: int, leaf: FakeQuant) -> FakeQuant:
        del index
        leaf = dataclasses.replace(leaf.nearest(), key=None, keep=None, bits=None)
        if isinstance(leaf, TrainedQuant) and leaf.backward is not None:
            return dataclasses.replace(leaf, backward=_nearest(leaf.backward))
        return leaf

    return _mapped("deterministic", params, calm)


def noise(params: PyTree, key: jax.Array, rate: jax.Array | float, *, block: int = 1) -> PyTree:
    """Quantizes a random part of the weights in this step, and leaves the others as they are.

        w_i ← fake_quant(w)_i  with probability `rate`,  else w_i

    The gradient is exact for weights that are left and straight-through for the others, so that at
    moderate rates most of it has no error of rounding. Scales are those of the whole weight.

    Args:
      params: with leaves that `qat` made.
      key: a new one in each step.
      rate: from 0, nothing quantized, to 1, plain QAT; an array or a schedule's value will do.
      block: how many consecutive inputs of one output are chosen together.

    Returns:
      `params` for this step.

    Raises:
      ValueError: if nothing is in training, the block divides the inputs of no weight, or the rate
        is a number outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt.quant import Int, noise, qat
      >>> params = qat({"kernel": jnp.full((4, 2), 0.3).at[0].set(1.0)}, Int(2))
      >>> seen = noise(params, jax.random.key(0), 0.5)["kernel"].materialise()
      >>> bool(jnp.any(seen[1:] == 0)), bool(jnp.any(seen[1:] == 0.3))
      (True, True)

    References:
      Angela Fan, Pierre Stock, Benjamin Graham, Edouard Grave, Rémi Gribonval, Hervé Jégou, Armand
      Joulin, Training with quantization noise for extreme model compression, 2020,
      arXiv:2004.07320.
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"`noise(params, key, {rate})`: a rate is from 0 to 1.")
    key = _typed(key)

    def choose(index: int, leaf: FakeQuant) -> FakeQuant:
        shape, axis = list(leaf.weight.shape), max(leaf.axes)
        if block < 1 or shape[axis] % block:
            raise ValueError(
                f"`noise(..., block={block})` does not divide the {shape[axis]} inputs (axis "
                f"{axis}) of a weight of shape {leaf.weight.shape}."
            )
        shape[axis] //= block
        left = jax.random.uniform(jax.random.fold_in(key, index), shape) >= rate
        return dataclasses.replace(leaf, keep=left)

    return _mapped("noise", params, choose)


def with_bits(params: PyTree, bits: jax.Array | float) -> PyTree:
    """Rounds weights to another number of bits in this step, such as a schedule's: 8, 6, …, 4.

    The grid covers what it covered, the extreme values or a learned range, with another number of
    steps. The number is an array, so one compiled step serves all of them; it is rounded to a whole
    one from 2 to 16, and NaN gives NaN. With the format's own bits, values are those of the format
    to the last bit.

    Args:
      params: with leaves that `qat` made, of `Int` formats; others stay as they are.
      bits: a scalar, such as `schedule(state.step)`.

    Returns:
      `params` for this step.

    Raises:
      ValueError: if no leaf in training has an `Int` format, or `bits` is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import Int, qat, with_bits
      >>> params = qat({"kernel": jnp.array([[0.3], [1.0]])}, Int(2))
      >>> [with_bits(params, b)["kernel"].materialise()[0, 0].item() for b in (2, 3)]
      [0.0, 0.3333333432674408]

    References:
      Yiren Zhou, Seyed-Mohsen Moosavi-Dezfooli, Ngai-Man Cheung, Pascal Frossard, Adaptive
      quantization for deep neural network, 2017, arXiv:1712.01048 (bits as a resource to divide).
    """
    if jnp.ndim(bits) != 0:
        raise ValueError(f"`with_bits(params, bits)`: bits is a scalar, got {jnp.shape(bits)}.")
    leaves = [leaf for _, leaf in trees.items(params)]
    if not any(isinstance(leaf, FakeQuant) and isinstance(leaf.format, Int) for leaf in leaves):
        raise ValueError("`with_bits(params, bits)` found no leaf in training of an `Int` format.")

    def give(index: int, leaf: FakeQuant) -> FakeQuant:
        del index
        if not isinstance(leaf.format, Int):
            return leaf
        return dataclasses.replace(
            leaf, bits=bits_for(jnp.asarray(bits), leaf.format, leaf.weight.ndim)
        )

    return _mapped("with_bits", params, give)


# Helpers, in order of use.


def _typed(key: jax.Array) -> jax.Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _random(leaf: Any) -> bool:
    formats = (getattr(leaf, "format", None), getattr(leaf, "backward", None))
    return isinstance(leaf, FakeQuant) and any(
        format is not None and format.rounding == "stochastic" for format in formats
    )


def _mapped(caller: str, params: PyTree, function: Any) -> PyTree:
    """Maps over leaves in training, each with its number in the tree's order."""
    order = {path: index for index, path in enumerate(trees.paths(params))}
    if not any(isinstance(leaf, FakeQuant) for _, leaf in trees.items(params)):
        raise ValueError(
            f"`{caller}(params, ...)` is for the leaves that `qat` made, and there are none."
        )

    def replace(path: str, leaf: Any) -> Any:
        return function(order[path], leaf) if isinstance(leaf, FakeQuant) else leaf

    return trees.map_with_path(replace, params)


def _nearest(format: Format) -> Format:
    if format.rounding != "stochastic":
        return format
    options: Any = format
    return dataclasses.replace(options, rounding="nearest")
