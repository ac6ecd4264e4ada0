"""The last layer of a model, as an argument: what a head is, and which fit together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import lift

from ._cached import TopK, check_cached
from ._examples import check_floats, check_labels, check_weight, check_where, dtype_of


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["kernel", "bias"], meta_fields=["tied"]
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The last layer of a model: logits = hidden · kernel + bias."""

    kernel: Any  # [width, classes], or an embedding [classes, width] where tied
    bias: Any = None  # [classes]
    tied: bool = False  # the kernel is the embedding of the tokens, used the other way round


def as_head(head: Any) -> Head:
    """A head, also of a bare kernel."""
    return head if isinstance(head, Head) else Head(head)


def check_heads(
    student: Any, head: Head, teacher: Any, given: Head | None, labels: Any, weight: Any, where: Any
) -> None:
    """Refuses what does not fit together."""
    check_floats("fused_kd", {"student": student}, "hidden states")
    if trees.is_typed(head.kernel):
        raise TypeError(
            "`fused_kd(student, head, ...)` learns the head's kernel, which is a typed leaf "
            f"({type(head.kernel).__name__}): pass `head.kernel.materialise()`."
        )
    if isinstance(teacher, TopK) and given is not None:
        raise ValueError(
            "`fused_kd(student, head, <TopK>, teacher_head)`: a `TopK` holds classes, "
            "not hidden states; leave the teacher's head out."
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
