"""Distillation of large vocabularies: head, loss and gradients in one go, a few tokens at a time.

The naive loss holds the logits of all tokens several times over. Here each chunk of tokens has its
logits, its loss and its gradients computed together in the forward pass, and only the gradients
with respect to hidden states and head are kept: no product is done twice, and nothing as large as
the logits ever exists.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jopt import trees
from jopt.trace import lift

from ._cached import TopK, check_cached, log_rest, safe
from ._examples import (
    check_floats,
    check_labels,
    check_temperature,
    check_weight,
    check_where,
    count,
    dtype_of,
)
from ._logits import divergence

_BLOCK = 1 << 22  # entries of the head's gradient that are added to at a time


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["tied"]
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The last layer of a model: logits = hidden · kernel + bias."""

    kernel: Any  # [width, classes], or an embedding [classes, width] where tied
    bias: Any = None  # [classes]
    tied: bool = False  # the kernel is the embedding of the tokens, used the other way round


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
    chunk: int = 128,
) -> jax.Array:
    """`kd` (and cross-entropy) from hidden states and heads, without ever holding all logits.

        mean over tokens of  w · kd(z, z_teacher; T) + (1 - w) · hard(z, labels),   z = h · W + b

    Loss and gradients are those of `mixed(hard(...), kd(...))` on the logits, to rounding. They are
    computed together, `chunk` tokens at a time, whenever a gradient is asked for; without one only
    the loss is. Temporary memory is a few arrays of `[chunk, classes]`. Products are accumulated in
    float32; logits and what follows are float32.

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
      chunk: tokens at a time. Fewer take less memory; less than about 100 are slower.

    Returns:
      A float32 scalar. Gradients flow to `student` and `head` alone, not to `temperature` or
      `weight`. A label that counts and names no class makes it NaN.

    Raises:
      ValueError: if shapes or numbers of classes disagree, or options make no sense.
      TypeError: if hidden states are not floats, labels not integers, or `where` not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> hidden, kernel = jnp.ones((2, 3)), jnp.ones((3, 5))
      >>> print(f"{distill.fused_kd(hidden, kernel, jnp.ones((2, 4)), jnp.ones((4, 5))):.1f}")
      0.0

    References:
      Hsu, Dai, Kothapalli, Song, Tang, Zhu, Shimizu, Sahni, Ning, Chen, "Liger Kernel: Efficient
      Triton Kernels for LLM Training", 2024, arXiv 2410.10989 (gradients in the forward pass).
    """
    head = _as_head(head)
    given = None if teacher_head is None else _as_head(teacher_head)
    _check(student, head, teacher, given, labels, weight, where)
    if isinstance(teacher, TopK):
        temperature = teacher.temperature
    check_temperature("fused_kd", temperature)
    if chunk < 1:
        raise ValueError(f"`fused_kd(..., chunk={chunk})` expects 1 token or more.")
    leading = jnp.ndim(student) - 1
    flat = lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[leading:]))  # noqa: E731
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
    return _fused(tokens, (hidden, head), task)


# Helpers, in order of use.


def _as_head(head: Any) -> Head:
    return head if isinstance(head, Head) else Head(head)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(tokens: int, learned: tuple[jax.Array, Head], task: _Task) -> jax.Array:
    return _pass(tokens, learned, task, gradients=False)[0]


def _forward(tokens: int, learned: tuple[jax.Array, Head], task: _Task) -> tuple[jax.Array, Any]:
    return _pass(tokens, learned, task, gradients=True)


def _backward(tokens: int, kept: Any, cotangent: jax.Array) -> tuple[Any, None]:
    del tokens
    scaled = lambda g: (cotangent * g.astype(cotangent.dtype)).astype(g.dtype)  # noqa: E731
    return jax.tree.map(scaled, kept), None


_fused.defvjp(_forward, _backward)


def _pass(
    tokens: int, learned: tuple[jax.Array, Head], task: _Task, *, gradients: bool
) -> tuple[jax.Array, Any]:
    """The loss, and its gradients with respect to what learns or None, chunk by chunk."""
    hidden, head = learned
    total, dtype = len(hidden), task.temperature.dtype
    counted = jnp.asarray(max(total, 1), dtype) if task.where is None else count(task.where, dtype)
    share = 1 / counted
    zeros = lambda x: jnp.zeros(jnp.shape(x), dtype)  # noqa: E731
    start = jnp.zeros((), dtype), jax.tree.map(zeros, learned) if gradients else None

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
        more, slope = _chunk(_logits(head, h, dtype), part)
        if slopes is not None:
            slopes = _added(slopes, slope * share, h, head, begin)
        return loss + more * share, slopes

    whole = total // tokens
    carry = lax.fori_loop(0, whole, lambda i, carry: step(carry, i * tokens, tokens), start)
    if rest := total - whole * tokens:
        carry = step(carry, whole * tokens, rest)
    loss, slopes = carry
    return loss, jax.tree.map(
        lambda g, x: g.astype(x.dtype), slopes, learned
    ) if gradients else None


def _counted(x: jax.Array, where: jax.Array | None) -> jax.Array:
    return x if where is None else jnp.where(where[:, None], x, jnp.zeros((), x.dtype))


def _logits(head: Head, hidden: jax.Array, wide: Any) -> jax.Array:
    """`[tokens, classes]` in the dtype `wide`; a typed kernel multiplies by its own rule."""

    def product(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return _product(x, kernel, 1, 1 if head.tied else 0)

    logits = lift(product, allow_dense=True)(head.kernel, hidden)
    logits = logits.astype(wide)
    return logits if head.bias is None else logits + head.bias.astype(wide)[None]


def _chunk(z: jax.Array, task: _Task) -> tuple[jax.Array, jax.Array]:
    """The sum of a chunk's losses, and its gradient with respect to the logits `z`."""
    temperature, weight = task.temperature, task.weight
    log_q = jax.nn.log_softmax(z / temperature, axis=-1)
    soft, target = _target(log_q, task)
    loss = weight * temperature**2 * soft
    slope = (weight * temperature) * (jnp.exp(log_q) - target)
    if task.labels is not None:
        log_s = jax.nn.log_softmax(z, axis=-1)
        columns = lax.broadcasted_iota(task.labels.dtype, z.shape, 1)
        own = columns == task.labels[:, None]
        hard = -jnp.sum(jnp.where(own, log_s, 0.0), axis=-1)
        named = (task.labels >= 0) & (task.labels < z.shape[-1])
        loss = loss + (1 - weight) * jnp.where(named, hard, jnp.nan)
        slope = slope + (1 - weight) * jnp.where(own, jnp.exp(log_s) - 1, jnp.exp(log_s))
    if task.where is not None:
        loss = jnp.where(task.where, loss, 0.0)
        slope = jnp.where(task.where[:, None], slope, 0.0)
    return jnp.sum(loss), slope


def _target(log_q: jax.Array, task: _Task) -> tuple[jax.Array, jax.Array]:
    """The soft loss of each token over T², and the distribution that its gradient leads to."""
    teacher, dtype = task.teacher, task.temperature.dtype
    if not isinstance(teacher, TopK):
        teacher = _counted(teacher, task.where)
        logits = teacher if task.head is None else _logits(task.head, teacher, dtype)
        logits = logits.astype(dtype)
        log_p = jax.nn.log_softmax(logits / task.temperature, axis=-1)
        return divergence(log_p, log_q), jnp.exp(log_p)
    best, indices, tail = safe(teacher, task.where, dtype)
    rest = log_rest(log_q, indices)
    log_p = jnp.concatenate([best, tail[:, None]], axis=-1)
    ours = jnp.concatenate([jnp.take_along_axis(log_q, indices, axis=-1), rest[:, None]], axis=-1)
    # The teacher's odds among the other classes are not known: the student keeps its own.
    odds = jnp.where(rest > -jnp.inf, tail - rest, -jnp.inf)
    others = jnp.exp(log_q + odds[:, None])
    target = jnp.put_along_axis(others, indices, jnp.exp(best), axis=-1, inplace=False)
    return divergence(log_p, ours), target


def _added(
    slopes: tuple[jax.Array, Head], slope: jax.Array, h: jax.Array, head: Head, begin: Any
) -> tuple[jax.Array, Head]:
    """The gradients, with those of one chunk of tokens put in or added."""
    hidden, sums = slopes
    # As in the derivative of a product of low precision, operands have its precision.
    narrow = slope.astype(_common(head.kernel, h))
    back = _product(narrow, head.kernel, 1, 0 if head.tied else 1).astype(hidden.dtype)
    hidden = lax.dynamic_update_slice_in_dim(hidden, back, begin, 0)
    bias = None if sums.bias is None else sums.bias + jnp.sum(slope, axis=0)
    return hidden, Head(_accumulated(sums.kernel, narrow, h, head.tied), bias, head.tied)


def _accumulated(kernel: jax.Array, slope: jax.Array, h: jax.Array, tied: bool) -> jax.Array:
    """kernel + hᵀ · slope, some classes at a time, so that no second array of that size exists."""
    axis = 0 if tied else 1
    classes = kernel.shape[axis]
    size = min(classes, max(1, _BLOCK // h.shape[1]))

    def add(kernel: jax.Array, begin: Any, size: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(slope, begin, size, 1)
        sides = (part, h) if tied else (h, part)
        more = _product(*sides, 0, 0).astype(kernel.dtype)
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


def _check(
    student: Any, head: Head, teacher: Any, given: Head | None, labels: Any, weight: Any, where: Any
) -> None:
    """Refuses what does not fit together."""
    check_floats("fused_kd", {"student": student}, "hidden states")
    if trees.is_typed(head.kernel):
        raise TypeError(
            "`fused_kd(student, head, ...)` learns the head's kernel, which is a typed leaf "
            f"({type(head.kernel).__name__}): pass `head.kernel.materialise()`."
        )
    leading = jnp.shape(student)[:-1]
    classes = _classes("head", head, jnp.shape(student))
    if isinstance(teacher, TopK):
        shape = jax.ShapeDtypeStruct((*leading, classes), dtype_of(student))
        check_cached("fused_kd", shape, teacher)
        theirs, found = classes, leading
    else:
        check_floats("fused_kd", {"student": student, "teacher": teacher}, "floats")
        shape = jnp.shape(teacher)
        theirs = shape[-1] if given is None else _classes("teacher_head", given, shape)
        found = shape[:-1]
    if found != leading:
        raise ValueError(
            f"`fused_kd(student, head, teacher, ...)` expects the same tokens: student has "
            f"{list(leading)}, teacher {list(found)}."
        )
    if theirs != classes:
        raise ValueError(
            f"`fused_kd(...)` expects the same classes: the student's head has {classes}, the "
            f"teacher {theirs}."
        )
    check_weight("fused_kd", "weight", weight)
    check_where("fused_kd", where, leading)
    if labels is not None:
        check_labels("fused_kd", labels, leading)
    elif isinstance(weight, int | float) and weight != 1:
        raise ValueError(f"`fused_kd(..., weight={weight})` weighs against labels: pass `labels=`.")


def _classes(name: str, head: Head, hidden: tuple[int, ...]) -> int:
    width, classes = 0, 0
    kernel = jax.eval_shape(lift(lambda kernel: kernel, allow_dense=True), head.kernel)
    if kernel.ndim == 2 and hidden:
        width, classes = kernel.shape[::-1] if head.tied else kernel.shape
    if not hidden or width != hidden[-1]:
        layout = "[classes, width] (tied)" if head.tied else "[width, classes]"
        raise ValueError(
            f"`fused_kd(..., {name})` expects a kernel {layout} for hidden states "
            f"{list(hidden)}; it is {list(kernel.shape)}."
        )
    if head.bias is not None and jnp.shape(head.bias) != (classes,):
        raise ValueError(
            f"`fused_kd(..., {name})` expects a bias [{classes}]; it is "
            f"{list(jnp.shape(head.bias))}."
        )
    return classes
