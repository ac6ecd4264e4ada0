"""Features of a student beside those of a teacher: which goes with which, of what shapes."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from jopt.trace import lift, tappable, taps

from ._features import Projection, projection

Alike = Literal["all", "positions", "batch", "nothing"]


class Paired(NamedTuple):
    """What both models say, and the features that go together."""

    student: Any  # the student's output
    teacher: Any  # the teacher's output, its gradient stopped
    features: dict[
        str, tuple[jax.Array, jax.Array]
    ]  # by the student's name: (student's, teacher's)


def pairs(
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    mapping: Mapping[str, str],
    *,
    alike: Alike = "positions",
    allow_dense: bool = False,
) -> Callable[..., Paired]:
    """Runs a student and a teacher together and pairs values from their inside, by name.

    Neither is edited: the values are tapped as by `jopt.taps`, under the names that
    `jopt.trace.tappable(apply, params, *inputs)` lists. A value inside a scan is stacked over its
    iterations; `NAME[i]` is that of iteration i, and `NAME[1::2]` that of every second; of a value
    outside of scans that is an error. No gradient
    flows to the teacher, and either model may have typed leaves, such as quantized ones.

    Args:
      student: any function `apply(params, *inputs)`.
      teacher: another of the same inputs.
      mapping: the student's names to the teacher's, one tap each.
      alike: which axes must agree: `"positions"`, all but the last, as `hints` needs; `"batch"`,
        the first; `"all"`; or `"nothing"`.
      allow_dense: as of `jopt.lift`, where typed leaves meet operations without a rule.

    Returns:
      A function `(student_params, teacher_params, *inputs)` that returns a `Paired`.

    Raises:
      ValueError: if the mapping is empty or has a wildcard; when called, if a name is not there, an
        index is out of range, or shapes disagree. The message names both taps.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import distill
      >>> apply = lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["out"]
      >>> small = {"hidden": jnp.ones((3, 2)), "out": jnp.ones((2, 1))}
      >>> large = {"hidden": jnp.ones((3, 8)), "out": jnp.ones((8, 1))}
      >>> both = distill.pairs(apply, apply, {"hidden": "hidden"})
      >>> out = both(small, large, jnp.ones((5, 3)))
      >>> [x.shape for x in out.features["hidden"]]
      [(5, 2), (5, 8)]
    """
    if not mapping:
        raise ValueError("`pairs(..., mapping)` is empty: it names no tap.")
    ours = {name: _parse(name) for name in mapping}
    theirs = {name: _parse(mapping[name]) for name in mapping}
    if alike not in ("all", "positions", "batch", "nothing"):
        raise ValueError(
            f'`pairs(..., alike={alike!r})` expects "all", "positions", "batch" or "nothing".'
        )
    run_student = lift(taps(student, _names(ours)), allow_dense=allow_dense)
    run_teacher = lift(taps(teacher, _names(theirs)), allow_dense=allow_dense)

    @functools.wraps(student)
    def both(student_params: Any, teacher_params: Any, *inputs: Any) -> Paired:
        stop = jax.lax.stop_gradient
        out, found = run_student(student_params, *inputs)
        wanted, known = stop(run_teacher(stop(teacher_params), *inputs))
        _check_stacked(student, student_params, inputs, ours)
        _check_stacked(teacher, teacher_params, inputs, theirs)
        features = {}
        for name, other in mapping.items():
            pair = _taken(found, name, ours[name]), _taken(known, other, theirs[name])
            _check(name, other, *pair, alike)
            features[name] = pair
        return Paired(out, wanted, features)

    return both


def projections(
    key: jax.Array, features: Mapping[str, tuple[Any, Any]]
) -> dict[str, Projection | None]:
    """A projection for each pair of features that differ in channels, to be learned by the student.

    Args:
      key: for the kernels.
      features: of a `Paired`; shapes are enough, as from `jax.eval_shape`.

    Returns:
      For each name what `hints` takes: a projection, or None where the channels are the same. A
      value that is stacked over layers gets one for all of them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jopt import distill
      >>> features = {"block": (jnp.ones((5, 2)), jnp.ones((5, 8)))}
      >>> distill.projections(jax.random.key(0), features)["block"]["kernel"].shape
      (2, 8)
    """
    keys = jax.random.split(key, max(len(features), 1))
    return {
        name: None if s.shape[-1] == t.shape[-1] else projection(k, s.shape[-1], t.shape[-1])
        for k, (name, (s, t)) in zip(keys, features.items(), strict=False)
    }


# Helpers, in order of use.


def _parse(name: str) -> tuple[str, int | slice | None]:
    """A tap's name, and which iterations of it are meant."""
    if "*" in name or "?" in name:
        raise ValueError(
            f"`pairs(..., mapping)` has the pattern `{name}`; it pairs single taps, by their names."
        )
    match = re.fullmatch(r"(.+)\[(-?\d*(?::-?\d*){0,2})\]", name)
    if match is None or not match[2]:
        return name, None
    parts = [int(part) if part else None for part in match[2].split(":")]
    return match[1], slice(*parts) if len(parts) > 1 else parts[0]


def _names(parsed: Mapping[str, tuple[str, Any]]) -> list[str]:
    return list(dict.fromkeys(tap for tap, _ in parsed.values()))


def _check_stacked(
    apply: Callable[..., Any], params: Any, inputs: Any, parsed: Mapping[str, tuple[str, Any]]
) -> None:
    """Refuses an iteration of a value that is not inside a scan: it would be an example."""
    indexed = {tap for tap, index in parsed.values() if index is not None}
    if not indexed:
        return
    stacked: dict[str, int] = {}
    found = tappable(apply, params, *inputs)
    for kind in ("checkpoint", "module", "parameter"):  # as `taps` prefers them
        for tap in found:
            if tap.kind == kind:
                stacked.setdefault(tap.name, tap.scans)
    for name in indexed:
        if stacked.get(name, 1) == 0:
            raise ValueError(
                f"`pairs(..., mapping)` asks for an iteration of `{name}`, which is not inside a "
                f"scan: say `{name}`, and index the features afterwards if examples are meant."
            )


def _taken(found: dict[str, jax.Array], name: str, parsed: tuple[str, Any]) -> jax.Array:
    tap, index = parsed
    value = found[tap]
    if index is None:
        return value
    size = value.shape[0] if value.ndim else 0
    inside = len(range(size)[index]) if isinstance(index, slice) else -size <= index < size
    if not inside:
        raise ValueError(f"`{name}` is out of range: `{tap}` is {list(value.shape)}.")
    return value[index]


def _check(name: str, other: str, student: jax.Array, teacher: jax.Array, alike: Alike) -> None:
    ours, theirs = student.shape, teacher.shape
    end = {"all": None, "positions": -1, "batch": 1, "nothing": 0}[alike]
    if ours[:end] != theirs[:end]:
        what = {"all": "all axes", "positions": "all axes but the last", "batch": "the first axis"}
        raise ValueError(
            f"`pairs(...)` expects `{name}` of the student and `{other}` of the teacher to agree "
            f"in {what[alike]}: they are {list(ours)} and {list(theirs)}. Tap other layers, take "
            "some iterations (`NAME[i]`), or say what need agree with `alike=`."
        )
