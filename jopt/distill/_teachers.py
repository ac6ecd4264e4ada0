"""Teachers: any function with its parameters, several of them, or the student's own average.

A teacher's parameters are an argument of the train step, never part of the student's state, and no
gradient flows to them. They keep their own precision and sharding, and may be quantized.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jopt.trace import lift

from ._examples import check_labels, check_temperature, dtype_of, numbers
from ._logits import kd

Apply = Callable[..., Any]


def teacher(apply: Apply, *, allow_dense: bool = False) -> Apply:
    """Makes any function a teacher: the same outputs, no gradient, typed leaves welcome.

    Pass its parameters as an argument of the jitted step: closed over, they would be compiled into
    the program.

    Args:
      apply: any function `apply(params, *inputs)`, in inference mode.
      allow_dense: as of `jopt.lift`, where a quantized leaf meets an operation without a rule.

    Returns:
      A function with the arguments of `apply`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import distill
      >>> wise = distill.teacher(lambda params, x: x @ params)
      >>> jax.grad(lambda params: jnp.sum(wise(params, jnp.ones((1, 2)))))(jnp.ones((2, 1)))
      Array([[0.],
             [0.]], dtype=float32)
    """
    lifted = lift(apply, allow_dense=allow_dense)

    @functools.wraps(apply)
    def frozen(params: Any, *inputs: Any, **options: Any) -> Any:
        out = lifted(jax.lax.stop_gradient(params), *inputs, **options)
        return jax.lax.stop_gradient(out)

    return frozen


def ensemble(
    applies: Apply | Sequence[Apply],
    *,
    of: Literal["probabilities", "logits"] = "probabilities",
    temperature: jax.typing.ArrayLike = 1.0,
    weights: Sequence[float] | None = None,
    allow_dense: bool = False,
) -> Apply:
    """Makes several models one teacher, by the mean of their probabilities or of their logits.

        T · log sum_k w_k · softmax(z_k / T),   or   sum_k w_k · z_k

    The first are the logits whose distribution at the temperature T is the mean of the models' own:
    give the loss the same T.

    Args:
      applies: one function for all, or one for each model.
      of: what is averaged.
      temperature: T, above 0; of no consequence to logits.
      weights: one for each model, at least 0, which are divided by their sum; alike by default.
      allow_dense: as of `teacher`.

    Returns:
      A function `(params, *inputs)`, `params` a sequence of as many parameters as there are models,
      returning float32 logits.

    Raises:
      ValueError: for unknown options or weights, and when called if numbers of models disagree or
        they return logits of several shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> wise = distill.ensemble(lambda params, x: params * x, of="logits")
      >>> wise([1.0, 3.0], jnp.array([1.0, 2.0]))
      Array([2., 4.], dtype=float32)
    """
    if of not in ("probabilities", "logits"):
        raise ValueError(f'`ensemble(..., of={of!r})` expects "probabilities" or "logits".')
    check_temperature("ensemble", temperature)

    given = None if weights is None else np.asarray(weights, np.float64)
    if given is not None and not (np.all(given >= 0) and 0 < given.sum() < np.inf):
        raise ValueError(
            f"`ensemble(..., weights={weights})` expects numbers of at least 0, not all of them 0."
        )

    def together(params: Sequence[Any], *inputs: Any, **options: Any) -> jax.Array:
        models = [applies] * len(params) if callable(applies) else list(applies)
        shares = np.ones(len(params)) if given is None else given
        if not len(models) == len(params) == len(shares) > 0:
            raise ValueError(
                f"`ensemble(...)` of {len(models)} functions and {len(shares)} weights expects as "
                f"many parameters, and at least one; it got {len(params)}."
            )
        logits = [
            teacher(apply, allow_dense=allow_dense)(own, *inputs, **options)
            for apply, own in zip(models, params, strict=True)
        ]
        if len({x.shape for x in logits}) > 1:
            shapes = ", ".join(str(list(x.shape)) for x in logits)
            raise ValueError(f"`ensemble(...)` expects logits of one shape; they are {shapes}.")
        dtype = dtype_of(*logits)
        stacked = jnp.stack([x.astype(dtype) for x in logits])
        portions = jnp.asarray(shares / shares.sum(), dtype).reshape(-1, *(1,) * (stacked.ndim - 1))
        if of == "logits":
            # A class that a model of no weight rules out is not ruled out: 0 · infinity is none.
            return jnp.sum(jnp.where(portions > 0, portions * stacked, 0.0), axis=0)
        scale = jnp.asarray(temperature, dtype)
        log_p = jax.nn.log_softmax(stacked / scale, axis=-1)
        log_p = jnp.where(portions > 0, log_p + jnp.log(portions), -jnp.inf)
        return scale * jax.nn.logsumexp(log_p, axis=0)

    return together


def virtual_teacher(labels: jax.Array, classes: int, *, correct: float = 0.99) -> jax.Array:
    """Logits of a teacher that is sure of the label and indifferent to the rest: no model at all.

        log p,   p_i = correct for the label, (1 - correct) / (classes - 1) for each other class

    Args:
      labels: integers `[...]`.
      classes: how many there are, two or more.
      correct: the label's probability, between 1 / classes and 1.

    Returns:
      Float32 logits `[..., classes]`, for `kd` at a high temperature; NaN where a label names no
      class, so say `where=` to the loss for those that do not count.

    Raises:
      ValueError: if `classes` or `correct` is out of range.
      TypeError: if labels are not integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import distill
      >>> p = jax.nn.softmax(distill.virtual_teacher(jnp.array([1]), 3, correct=0.9))
      >>> [round(float(x), 2) for x in p[0]]
      [0.05, 0.9, 0.05]

    References:
      Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing
      Regularization", 2019, arXiv 1909.11723.
    """
    if classes < 2 or not 1 / classes < correct < 1:
        raise ValueError(
            f"`virtual_teacher(labels, {classes}, correct={correct})` expects two classes or more "
            "and a probability between 1 / classes and 1."
        )
    sure, rest = np.log(correct), np.log((1 - correct) / (classes - 1))
    check_labels("virtual_teacher", labels, jnp.shape(labels))
    index, named = numbers(labels, classes)
    own = jax.nn.one_hot(index, classes) > 0
    logits = jnp.where(own, jnp.float32(sure), jnp.float32(rest))
    return jnp.where(named[..., None], logits, jnp.nan)


def mutual(
    logits: Sequence[jax.Array],
    *,
    temperature: jax.typing.ArrayLike = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Mutual learning: each of several students is taught by the others.

        loss_k = mean over l ≠ k of kd(logits_k, logits_l)

    The gradient of loss_k reaches student k alone, so all can be summed, each with the loss of its
    labels, and trained in one step. An exit of a network taught by its later ones (self-
    distillation) is `kd` itself.

    Args:
      logits: of two students or more, each `[..., classes]`.
      temperature: as of `kd`.
      where: as of `kd`.

    Returns:
      Float32 losses `[students]`.

    Raises:
      ValueError: for less than two students, and as `kd` does.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> distill.mutual([jnp.zeros((1, 2)), jnp.zeros((1, 2))])
      Array([0., 0.], dtype=float32)

    References:
      Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", 2017, arXiv 1706.00384.
    """
    if len(logits) < 2:
        raise ValueError(f"`mutual(logits)` expects two students or more; it got {len(logits)}.")
    losses = [
        [
            kd(own, other, temperature=temperature, where=where)
            for j, other in enumerate(logits)
            if j != i
        ]
        for i, own in enumerate(logits)
    ]
    return jnp.stack([jnp.mean(jnp.stack(row)) for row in losses])


def succession(train: Callable[[Any, Any], Any], first: Any, students: Iterable[Any]) -> list[Any]:
    """Trains a line of models, each taught by the one before it.

    With ever smaller students it is distillation by *teacher assistants*, with students alike
    *born-again networks*, whose `ensemble` is a teacher again.

    Args:
      train: `train(student, teacher)` returns the trained student.
      first: the first teacher.
      students: what `train` starts from, in order.

    Returns:
      The trained students, in order.

    Example:
      >>> from jopt import distill
      >>> distill.succession(lambda student, teacher: teacher + student, 8, [-2, -3])
      [6, 3]

    References:
      Mirzadeh, Farajtabar, Li, Levine, Matsukawa, Ghasemzadeh, "Improved Knowledge Distillation via
      Teacher Assistant", 2019, arXiv 1902.03393. Furlanello, Lipton, Tschannen, Itti, Anandkumar,
      "Born Again Neural Networks", 2018, arXiv 1805.04770.
    """
    trained = []
    for student in students:
        trained.append(train(student, trained[-1] if trained else first))
    return trained
