"""Distillation of large vocabularies: head, loss and gradients in one go, a few tokens at a time.

The naive loss holds the logits of all tokens several times over. Here each chunk of tokens has its
logits, its loss and its gradients computed together in the forward pass, and only the gradients
with respect to hidden states and head are kept: no product is done twice, and nothing as large as
the logits ever exists.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt.trace import lift

from ._cached import TopK, log_rest, safe
from ._divergence import divergence
from ._examples import check_temperature, count, dtype_of, numbers
from ._heads import Head, as_head, check_heads

_BLOCK = 1 << 21  # entries of the head's gradient that are added to at a time


class _Task(NamedTuple):
    """What the loss is made of besides what learns."""

    teacher: Any  # hidden states [tokens, width], logits [tokens, classes] or a TopK [tokens]
    head: Any  # the teacher's, or None where `teacher` is not hidden states
    labels: Any  # integers [tokens] or None
    where: Any  # booleans [tokens] or None
    temperature: jax.Array
    weight: jax.Array  # of the soft loss


def fused_kd(
    student: jax.Array,
    head: Head | jax.Array,
    teacher: jax.Array | TopK,
    teacher_head: Head | jax.Array | None = None,
    *,
    labels: jax.Array | None = None,
    weight: jax.typing.ArrayLike = 1.0,
    temperature: jax.typing.ArrayLike = 1.0,
    where: jax.Array | None = None,
    chunk: int = 256,
) -> jax.Array:
    """`kd` (and cross-entropy) from hidden states and heads, without ever holding all logits.

        mean over tokens of  w · kd(z, z_teacher; T) + (1 - w) · hard(z, labels),   z = h · W + b

    Loss and gradients are those of `mixed(hard(...), kd(...))` on the logits, to rounding. They are
    computed together, `chunk` tokens at a time, whenever a gradient is asked for; without one only
    the loss is. Temporary memory is three float32 arrays of `[chunk, classes]`; and, where hidden
    states or head are of less than float32, their gradients in float32, which they stay in until
    they are multiplied by what comes from outside, so that scaling the loss saves small ones. (On
    CPUs XLA widens float16 operands as well.) Products are accumulated in float32; logits and what
    follows are float32. Where student and teacher nearly agree, rounding shows at high temperatures
    (at T = 100 and logits 0.005 apart: 3e-4 of the value, 0.6 % of the gradients); not in `kd`.

    Inside `jax.shard_map` it is the loss of the device's own tokens; `pmean` it.

    Args:
      student: hidden states before the head, `[..., width]`.
      head: a `Head`, or a kernel `[width, classes]`.
      teacher: the teacher's hidden states `[..., its width]` where `teacher_head` is given; or its
        logits `[..., classes]`; or what `top_k` kept of them, for the loss of `cached_kd`.
      teacher_head: the teacher's `Head` or kernel, quantized ones too.
      labels: integers `[...]`; needed unless `weight` is 1.
      weight: w, of the soft loss, from 0 to 1; a number or a scalar array. Without labels it is a
        factor of the soft loss.
      temperature: T, above 0; a number or a scalar array. A `TopK` brings its own.
      where: booleans `[...]`, False for tokens that do not count.
      chunk: tokens at a time. Fewer take less memory and, below 256 or so, more time.

    Returns:
      A float32 scalar, zero of no tokens. Gradients flow to `student` and `head` alone, not to
      `temperature` or `weight`. A label that counts and names no class makes it NaN.

    Raises:
      ValueError: if shapes or numbers of classes disagree, options make no sense, or a `TopK`
        comes with a teacher's head.
      TypeError: if hidden states are not floats, labels not integers, or `where` not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.ones((3, 5))
      >>> loss = distill.fused_kd(hidden, kernel, jnp.ones((2, 4)), jnp.ones((4, 5)))
      >>> bool(abs(loss) < 1e-6)  # both say that all classes are alike
      True

    References:
      Hsu, Dai, Kothapalli, Song, Tang, Zhu, Shimizu, Sahni, Ning, Chen, "Liger Kernel: Efficient
      Triton Kernels for LLM Training", 2024, arXiv 2410.10989 (gradients in the forward pass).
    """
    head = as_head(head)
    given = None if teacher_head is None else as_head(teacher_head)
    check_heads(student, head, teacher, given, labels, weight, where)
    if isinstance(teacher, TopK):
        temperature = teacher.temperature
    check_temperature("fused_kd", temperature)
    if chunk < 1:
        raise ValueError(f"`fused_kd(..., chunk={chunk})` expects 1 token or more.")
    leading = jnp.ndim(student) - 1
    size = math.prod(jnp.shape(student)[:-1])
    flat = lambda x: jnp.reshape(x, (size, *jnp.shape(x)[leading:]))  # noqa: E731
    dtype = dtype_of(student, *jax.tree.leaves(head))
    task = _Task(
        jax.tree.map(flat, teacher),
        given,
        None if labels is None else flat(labels),
        None if where is None else flat(where),
        jnp.asarray(temperature, dtype),
        jnp.asarray(weight, dtype),
    )
    task = lax.stop_gradient(task)
    hidden = flat(student)
    tokens = min(chunk, max(len(hidden), 1))
    learned = hidden, jax.tree.map(jnp.asarray, head)
    # Inside `shard_map` all must vary over the same axes: the gradient of what did not is then
    # summed over the devices, outside of the derivative that is written by hand.
    axes = frozenset().union(*map(_axes, jax.tree.leaves((learned, task))))
    return _fused(tokens, *jax.tree.map(lambda x: _varying(x, axes), (learned, task)))


# Helpers, in order of use.


def _axes(x: Any) -> frozenset[str]:
    """The mesh axes of an enclosing `shard_map` over which an array differs."""
    return jax.typeof(x).manual_axis_type.varying


def _varying(x: Any, axes: frozenset[str]) -> Any:
    missing = axes - _axes(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(tokens: int, learned: tuple[jax.Array, Head], task: _Task) -> jax.Array:
    return _pass(tokens, learned, task, gradients=False)[0]


def _forward(tokens: int, learned: tuple[jax.Array, Head], task: _Task) -> tuple[jax.Array, Any]:
    loss, slopes = _pass(tokens, learned, task, gradients=True)
    # The gradients stay in float32 until the cotangent is known: it may be the factor that keeps
    # them above what float16 can hold. Empty arrays say what dtypes they will have.
    return loss, (slopes, jax.tree.map(lambda x: jnp.zeros((0,), x.dtype), learned))


def _backward(tokens: int, kept: Any, cotangent: jax.Array) -> tuple[Any, None]:
    del tokens
    slopes, like = kept
    scaled = lambda g, x: (cotangent.astype(g.dtype) * g).astype(x.dtype)  # noqa: E731
    return jax.tree.map(scaled, slopes, like), None


_fused.defvjp(_forward, _backward)


def _pass(
    tokens: int, learned: tuple[jax.Array, Head], task: _Task, *, gradients: bool
) -> tuple[jax.Array, Any]:
    """The loss, and its gradients with respect to what learns or None, chunk by chunk."""
    hidden, head = learned
    total, dtype = len(hidden), task.temperature.dtype
    counted = jnp.asarray(max(total, 1), dtype) if task.where is None else count(task.where, dtype)
    share = 1 / counted
    # Inside `shard_map` zeros must vary over the devices as what is added to them does.
    zeros = lambda x: _varying(jnp.zeros(jnp.shape(x), dtype), _axes(hidden))  # noqa: E731
    start = zeros(0.0), jax.tree.map(zeros, learned) if gradients else None

    def step(carry: Any, begin: Any, size: int) -> Any:
        loss, slopes = carry
        cut = lambda x: lax.dynamic_slice_in_dim(x, begin, size)  # noqa: E731
        part = _Task(
            jax.tree.map(cut, task.teacher),
            task.head,
            None if task.labels is None else cut(task.labels),
            None if task.where is None else cut(task.where),
            task.temperature,
            task.weight,
        )
        h = _counted(cut(hidden), part.where)
        more, slope = _chunk(_logits(head, h, task.temperature), part)
        if slopes is not None:
            slopes = _added(slopes, slope, share, h, head, begin)
        return loss + more * share, slopes

    whole, carry = total // tokens, start
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, carry: step(carry, i * tokens, tokens), start)
    if rest := total - whole * tokens:
        carry = step(carry, whole * tokens, rest)
    return carry


def _counted(x: jax.Array, where: jax.Array | None) -> jax.Array:
    return x if where is None else jnp.where(where[:, None], x, jnp.zeros((), x.dtype))


def _logits(head: Head, hidden: jax.Array, temperature: jax.Array) -> jax.Array:
    """`[tokens, classes]` over the temperature, whose dtype they have.

    A typed kernel multiplies by its own rule.
    """
    wide = temperature.dtype
    early = hidden.dtype == wide  # dividing a low precision would round once more

    def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return _product(x, kernel, 1, 1 if head.tied else 0)

    hidden = hidden / temperature if early else hidden
    logits = lift(product, allow_dense=True)(head.kernel, hidden).astype(wide)
    logits = logits if early else logits / temperature
    if head.bias is None:
        return logits
    return _bounded(logits + (head.bias.astype(wide) / temperature)[None])


def _bounded(logits: jax.Array) -> jax.Array:
    """Minus infinity, of a class ruled out, becomes the least number: 0 · infinity is none."""
    return jnp.maximum(logits, jnp.finfo(logits.dtype).min)


def _unbounded(loss: jax.Array) -> jax.Array:
    """The loss, infinite again where a class ruled out has made it."""
    return jnp.where(loss > 1e30, jnp.inf, loss)


def _chunk(z: jax.Array, task: _Task) -> tuple[jax.Array, jax.Array]:
    """The sum of a chunk's losses, and its gradient with respect to the logits; `z` is these / T.

    Written so that XLA keeps no array of this size but the student's logits, the teacher's, and the
    gradient; distributions are computed where they are used, and again where they are used again.
    """
    temperature, weight = task.temperature, task.weight
    z, top, total = _exponents(z)
    named = None if task.labels is None else _named(z, top, task)
    if isinstance(task.teacher, TopK):
        log_q = z - top - total
        soft, target = _target(log_q, task)
        slope = jnp.exp(log_q) - target
    else:
        teacher = _counted(task.teacher, task.where)
        t = _bounded(teacher.astype(z.dtype) / temperature)
        if task.head is not None:
            t = _logits(task.head, teacher, temperature)
        t, best, mass = _exponents(t)
        shift = best + mass  # which is rounded, so that exp(t - shift) do not quite sum to 1
        soft = jnp.sum(jnp.exp(t - shift) * (t - z), axis=-1) / jnp.exp(best - shift + mass)[:, 0]
        soft = soft + (top - best + total - mass)[:, 0]
        # Behind this p is computed again rather than kept from one use to the next.
        z, t, soft = lax.optimization_barrier((z, t, soft))
        slope = jnp.exp(z - top - total) - jnp.exp(t - best - mass)
    loss = weight * temperature**2 * _unbounded(soft)
    slope = (weight * temperature) * slope
    if named is not None:
        own, hard, sure = named
        loss = loss + (1 - weight) * _unbounded(hard)
        q = jnp.exp((z - top) * temperature - sure)
        slope = slope + (1 - weight) * jnp.where(own, q - 1, q)
    if task.where is not None:
        loss = jnp.where(task.where, loss, 0.0)
        slope = jnp.where(task.where[:, None], slope, 0.0)
    return jnp.sum(loss), slope


def _exponents(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`z`; the largest of each row, and the logarithm of its sum of exp(z - largest), `[rows, 1]`.

    Behind the barrier the difference is computed again rather than kept.
    """
    top = jnp.max(z, axis=-1, keepdims=True)
    total = jnp.log(jnp.sum(jnp.exp(z - top), axis=-1, keepdims=True))
    return lax.optimization_barrier((z, top, total))


def _named(z: jax.Array, top: jax.Array, task: _Task) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which class each label names, its cross-entropy, and the logarithm of the sum it needs."""
    columns = lax.broadcasted_iota(jnp.int32, z.shape, 1)
    sharp = (z - top) * task.temperature
    sure = jnp.log(jnp.sum(jnp.exp(sharp), axis=-1, keepdims=True))
    index, named = numbers(task.labels, z.shape[-1])
    index = index[:, None]
    given = jnp.take_along_axis(sharp, jnp.where(named[:, None], index, 0), axis=-1)
    hard = jnp.where(named, (sure - given)[:, 0], jnp.nan)
    return columns == index, hard, sure


def _target(log_q: jax.Array, task: _Task) -> tuple[jax.Array, jax.Array]:
    """The soft loss of each token over T², and the distribution that its gradient leads to."""
    best, indices, tail = safe(task.teacher, task.where, log_q.dtype)
    rest = log_rest(log_q, indices)
    log_p = jnp.concatenate([best, tail[:, None]], axis=-1)
    ours = jnp.concatenate([jnp.take_along_axis(log_q, indices, axis=-1), rest[:, None]], axis=-1)
    # The teacher's odds among the other classes are not known: the student keeps its own.
    odds = jnp.where(rest > -jnp.inf, tail - rest, -jnp.inf)
    others = jnp.exp(log_q + odds[:, None])
    target = jnp.put_along_axis(others, indices, jnp.exp(best), axis=-1, inplace=False)
    return divergence(log_p, ours), target


def _added(
    slopes: tuple[jax.Array, Head],
    slope: jax.Array,
    share: jax.Array,
    h: jax.Array,
    head: Head,
    begin: Any,
) -> tuple[jax.Array, Head]:
    """The gradients, with `share` of those of one chunk of tokens put in or added."""
    hidden, sums = slopes
    bias = None if sums.bias is None else sums.bias + jnp.sum(slope, axis=0) * share
    # As in the derivative of a product of low precision, operands have its precision.
    dtype = _common(head.kernel, h)
    if dtype == jnp.float16:
        # Which has no exponent for small differences: the largest of the chunk becomes 1024.
        top = jnp.max(jnp.abs(slope))
        factor = jnp.where((top > 0) & (top < jnp.inf), 1024 / jnp.where(top > 0, top, 1.0), 1.0)
        slope, share = slope * factor, share / factor
    narrow = slope.astype(dtype)
    back = _product(narrow, head.kernel, 1, 0 if head.tied else 1).astype(hidden.dtype) * share
    hidden = lax.dynamic_update_slice_in_dim(hidden, back, begin, 0)
    kernel = _accumulated(sums.kernel, narrow, share, h, head.tied)
    return hidden, Head(kernel, bias, head.tied)


def _accumulated(
    kernel: jax.Array, slope: jax.Array, share: jax.Array, h: jax.Array, tied: bool
) -> jax.Array:
    """kernel + share · hᵀ · slope, some classes at a time: no second array of that size exists."""
    axis = 0 if tied else 1
    classes = kernel.shape[axis]
    size = min(classes, max(1, _BLOCK // h.shape[1]))

    def add(kernel: jax.Array, begin: Any, size: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(slope, begin, size, 1)
        sides = (part, h) if tied else (h, part)
        more = _product(*sides, 0, 0).astype(kernel.dtype) * share
        old = lax.dynamic_slice_in_dim(kernel, begin, size, axis)
        return lax.dynamic_update_slice_in_dim(kernel, old + more, begin, axis)

    whole = classes // size
    kernel = lax.fori_loop(0, whole, lambda i, k: add(k, i * size, size), kernel)
    rest = classes - whole * size
    return add(kernel, whole * size, rest) if rest else kernel


def _common(a: Any, b: Any) -> Any:
    """What two operands are multiplied in."""
    return a.dtype if a.dtype == b.dtype else dtype_of(a, b)


def _product(a: jax.Array, b: jax.Array, left: int, right: int) -> jax.Array:
    """Sums over axis `left` of `a` and `right` of `b`, in float32 or wider."""
    dtype = _common(a, b)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((left,), (right,)), ((), ())),
        preferred_element_type=dtype_of(a, b),
    )
