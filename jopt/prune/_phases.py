"""AC/DC: dense and sparse phases in turn."""

from collections.abc import Sequence

import optax

from jopt import schedules, trees
from jopt.trace import Site

from ._choice import MAGNITUDE, UNSTRUCTURED, Choice
from ._patterns import Pattern
from ._scopes import is_policy
from ._scores import Score
from ._sparsify import gradual


def ac_dc(
    sparsity: float,
    *,
    inner: optax.GradientTransformation,
    begin: int,
    period: int,
    end: int,
    score: Score = MAGNITUDE,
    pattern: Pattern = UNSTRUCTURED,
    scope: str = "global",
    where: trees.Where | None = None,
    sites: Sequence[Site] | None = None,
    unfit: str = "error",
    pooled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Trains in turn with all weights and with the largest ones, ending with the latter.

    At the start of each sparse phase the masks are chosen by magnitude from the weights as they
    are, and held for the phase; in a dense phase all weights train, the pruned ones from zero and
    with fresh moments. Phases are those of `jopt.schedules.alternating_sparsity`. The weights of
    the last dense phase, just before a sparse one, are a dense network of their own.

    Args:
      sparsity: the fraction of weights to prune in sparse phases, in [0, 1).
      inner: the optimizer.
      begin: the length of the first, dense phase.
      period: the length of each other phase.
      end: the step from which masks stay.
      score, pattern, scope, where, sites, unfit, pooled: as of `sparsify`.

    Returns:
      A gradient transformation with state `SparsifyState`; `masks_of` reads the masks.

    Raises:
      ValueError: as `sparsify` and `alternating_sparsity` do.
      TypeError: if the sparsity is no number.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jopt import prune
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, -2.0]])}
      >>> tx = prune.ac_dc(0.5, inner=optax.sgd(0.1), begin=1, period=2, end=9)
      >>> state, zeros = tx.init(params), []
      >>> for step in range(6):
      ...   updates, state = tx.update(params, state, params)
      ...   params = optax.apply_updates(params, updates)
      ...   zeros.append(int((~prune.masks_of(state)["kernel"]).sum()))
      >>> zeros
      [0, 2, 2, 0, 0, 2]

    References:
      Peste, Iofinova, Vladu, Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep
      Neural Networks", 2021, arXiv 2106.12379.
    """
    choice = Choice(pattern, scope, where, sites, unfit, "prune.ac_dc", pooled)
    choice.check(sparsity, score)
    if callable(sparsity) or is_policy(sparsity):
        raise TypeError(
            f"`prune.ac_dc({sparsity!r:.60}, ...)` makes its own schedule of sparse and dense "
            "phases: give the sparsity of sparse ones, a number."
        )
    schedule = schedules.alternating_sparsity(sparsity, begin=begin, period=period, end=end)
    return gradual(choice, schedule, score, 1, inner, "phases")
