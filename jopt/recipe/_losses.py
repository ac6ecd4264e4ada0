"""From the losses that recipes name to functions of `jopt.distill`; a new kind is a case here."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jopt import distill
from jopt.recipe import _lessons as lessons

PyTree = Any
Pair = tuple[jax.Array, jax.Array]  # a feature of the student, and the teacher's


def at(number: float | lessons.Ramp, step: jax.Array, steps: int) -> jax.Array:
    """A number of a recipe at a step of its stage."""
    if not isinstance(number, lessons.Ramp):
        return jnp.float32(number)
    done = jnp.clip(step.astype(jnp.float32) / max(1, round(number.over * steps)), 0.0, 1.0)
    if number.shape == "cosine":
        done = (1 - jnp.cos(jnp.pi * done)) / 2
    return number.begin + (number.end - number.begin) * done


def soft(
    config: Any,
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    temperature: jax.Array,
    step: jax.Array,
    steps: int,
) -> jax.Array:
    """The loss between two logits that a recipe names."""
    pair = (student, teacher)
    match config:
        case lessons.KD():
            return distill.kd(*pair, temperature=temperature)
        case lessons.ReverseKL():
            return distill.reverse_kl(*pair, temperature=temperature)
        case lessons.JS():
            return distill.js(*pair, weight=config.balance, temperature=temperature)
        case lessons.Standardized():
            return distill.standardized_kd(*pair, temperature=temperature)
        case lessons.L1():
            return distill.l1(*pair, of=config.of, temperature=temperature)
        case lessons.MSE():
            return distill.mse(*pair, of=config.of, temperature=temperature)
        case lessons.DKD():
            alpha, beta = (at(share, step, steps) for share in (config.alpha, config.beta))
            return distill.dkd(*pair, labels, alpha=alpha, beta=beta, temperature=temperature)
        case lessons.Dist():
            inter, intra = (at(share, step, steps) for share in (config.inter, config.intra))
            return distill.dist(*pair, inter=inter, intra=intra, temperature=temperature)
    raise AssertionError(config)


def on_features(
    config: lessons.FeatureLoss, pairs: Mapping[str, Pair], maps: Mapping[str, Any]
) -> jax.Array:
    """The sum over its taps of a loss on features; `maps` are projections, by tap."""
    match config:
        case lessons.FSP():
            if len(pairs) != 2:
                raise ValueError(f"`fsp` needs two taps, the earlier first; it has {len(pairs)}")
            (s1, t1), (s2, t2) = pairs.values()
            return distill.fsp((s1, s2), (t1, t2))
        case lessons.Hints():
            losses = [_named(name, distill.hints, *pairs[name], maps[name]) for name in pairs]
        case lessons.AttentionTransfer():
            losses = [
                _named(name, distill.attention_transfer, *pair, power=config.power)
                for name, pair in pairs.items()
            ]
        case lessons.Similarity():
            losses = [_named(name, distill.similarity, *pair) for name, pair in pairs.items()]
        case lessons.Relational():
            weights = {"distance": config.distance, "angle": config.angle}
            losses = [
                _named(name, distill.relational, *pair, **weights) for name, pair in pairs.items()
            ]
        case _:
            raise AssertionError(config)
    return sum(losses, start=jnp.float32(0))


def contrasted(
    config: lessons.CRD, pair: Pair, maps: Any, bank: distill.Bank, rows: tuple[Any, Any]
) -> tuple[jax.Array, distill.Bank]:
    """The contrastive loss of one tap, and the bank after the step; `rows` are (own, others)."""
    (student, teacher), (own, others) = pair, rows
    student, teacher = _embedded(student, maps[0]), _embedded(teacher, maps[1])
    given = (student, teacher, own, others)
    loss = distill.crd(student, teacher, bank, own, others, temperature=config.temperature)
    bank = distill.crd_update(
        bank, *given, temperature=config.temperature, momentum=config.momentum
    )
    return loss, bank


# Helpers, in order of use.


def _named(name: str, loss: Any, *arguments: Any, **options: Any) -> jax.Array:
    try:
        return loss(*arguments, **options)
    except ValueError as error:
        raise ValueError(f"`taps`, `{name}`: {error}") from error


def _embedded(features: jax.Array, projection: PyTree) -> jax.Array:
    """`[batch, width]`: the mean over the positions, mapped."""
    pooled = jnp.mean(features.reshape(len(features), -1, features.shape[-1]), axis=1)
    return pooled @ projection["kernel"] + projection["bias"][None]
