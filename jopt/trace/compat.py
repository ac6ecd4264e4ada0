"""The only file that knows how a JAX version spells its jaxprs.

Runs unchanged on JAX 0.10.2 to 0.12. The rest of the engine asks here for the pieces of an equation
and hands equations back; what JAX renames next is renamed here, once.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.core import pvary_p
from jax._src.lax.lax import optimization_barrier_p
from jax._src.shard_map import shard_map_p
from jax._src.sharding_impls import UNSPECIFIED
from jax._src.source_info_util import user_frames
from jax.core import eval_jaxpr
from jax.extend import core, source_info_util
from jax.extend.core import primitives

Primitive = core.Primitive
Literal = core.Literal
DropVar = core.DropVar

JIT, REMAT = primitives.jit_p, primitives.remat_p
CUSTOM_JVP, CUSTOM_VJP = primitives.custom_jvp_call_p, primitives.custom_vjp_call_p
SHARD_MAP = shard_map_p
SCAN, WHILE, COND = primitives.scan_p, primitives.while_p, primitives.cond_p
INLINE = (primitives.call_p, primitives.closed_call_p)
CALLS = (JIT, REMAT, CUSTOM_JVP, CUSTOM_VJP, *INLINE)  # one body, run once, on the operands
NAME = primitives.name_p
MARKS = (NAME, primitives.copy_p, pvary_p)  # one operand, value unchanged
STOP_GRADIENT, BARRIER = primitives.stop_gradient_p, optimization_barrier_p
SHARDING_CONSTRAINT = primitives.sharding_constraint_p

# Where JAX looks for the user's line, it shall not find ours.
source_info_util.register_exclusion(os.path.join(os.path.dirname(__file__), ""))

_PACKAGES = {"site-packages", "dist-packages"}

Jaxpr = Any  # `ClosedJaxpr` merged into `Jaxpr` in 0.12, so neither name serves both
Equation = Any


def opened(jaxpr: Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """The equations of a jaxpr, closed or not, and the values of its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def body_of(equation: Equation) -> Jaxpr:
    """The body of an equation that runs one, once."""
    params = equation.params
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def bodies(equation: Equation) -> Iterator[Jaxpr]:
    """Every jaxpr among the parameters of an equation, whatever the primitive."""
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield inner


def constant(value: Any, like: Any) -> jax.Array:
    """An array of one value with the type of `like`, within a `shard_map` as well."""
    aval = like if isinstance(like, jax.ShapeDtypeStruct) else jax.typeof(like)
    array = jax.lax.full(aval.shape, value, aval.dtype)
    axes = _varying(aval)
    return jax.lax.pcast(array, tuple(sorted(axes)), to="varying") if axes else array


def varying(value: Any) -> frozenset[Any]:
    """The mesh axes of a `shard_map` along which a value may differ from shard to shard."""
    return _varying(jax.typeof(value))


def _varying(aval: Any) -> frozenset[Any]:
    return getattr(aval.manual_axis_type, "varying", frozenset())


def is_array(value: Any) -> bool:
    """Whether a leaf of the arguments becomes an input of the jaxpr (else it stays Python)."""
    return isinstance(value, jax.Array | np.ndarray)


def run(jaxpr: Jaxpr, equations: Sequence[Equation], names: dict, keep: Sequence[Any]) -> list[Any]:
    """Evaluates consecutive equations of `jaxpr` exactly as JAX does; returns the variables `keep`.

    Binding, contexts, source lines and effects all stay JAX's affair. `names` maps variables to
    values.
    """
    part = part_of(jaxpr, equations, keep)
    return eval_jaxpr(part, (), *(names[variable] for variable in part.invars))


def part_of(jaxpr: Jaxpr, equations: Sequence[Equation], keep: Sequence[Any]) -> Jaxpr:
    """Equations of `jaxpr` as one of its own: its inputs what they need, its results `keep`."""
    made: set[Any] = set()
    needed: dict[Any, None] = {}
    for equation in equations:
        for atom in equation.invars:
            if not isinstance(atom, Literal) and atom not in made:
                needed[atom] = None
        made.update(equation.outvars)
    needed.update(dict.fromkeys(v for v in keep if v not in made))
    return jaxpr.replace(
        constvars=(),
        invars=list(needed),
        outvars=list(keep),
        eqns=list(equations),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )


def bind(equation: Equation, operands: Sequence[Any]) -> list[Any]:
    """Runs one equation on other operands; their shapes may differ from the traced ones."""
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    result = primitive.bind(*operands, **params)
    return list(result) if primitive.multiple_results else [result]


@contextlib.contextmanager
def context(equation: Equation) -> Iterator[None]:
    """Operations bound inside carry the equation's name, source line and context."""
    info = equation.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), equation.ctx.manager:
        yield


def scope(name: str) -> contextlib.AbstractContextManager[Any]:
    """Operations bound inside have `name` at the end of their name stack."""
    return source_info_util.extend_name_stack(name)


def current_scope() -> str:
    """The name stack of what is being bound now."""
    return str(source_info_util.current_name_stack())


def name_of(equation: Equation) -> str:
    """The name stack of an equation, such as `MLP/Dense_0`, within its own jaxpr."""
    return str(equation.source_info.name_stack)


def source_of(equation: Equation) -> str:
    """The user's source line, such as `model.py:12:4 (f)`; of an operation in a framework, both.

    A construct whose own line JAX does not know, such as `shard_map`, has that of its first
    operation that has one.
    """
    frames = user_frames(equation.source_info.traceback)
    inner = next(frames, None)
    if inner is None:
        inside = (source_of(e) for body in bodies(equation) for e in opened(body)[0].eqns)
        return next(filter(None, inside), "")
    outer = inner if _own(inner) else next(filter(_own, frames), inner)
    if outer is inner:
        return _line(inner)
    return f"{_line(outer)}, in {_line(inner)}"


def _own(frame: Any) -> bool:
    """Whether a line is in the user's files, not in an installed package."""
    return _PACKAGES.isdisjoint(frame.file_name.replace(os.sep, "/").split("/"))


def _line(frame: Any) -> str:
    column = f":{frame.start_column}" if frame.start_column else ""
    return f"{frame.file_name}:{frame.start_line}{column} ({frame.function_name})"


def scan_counts(equation: Equation) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are the carry."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carry, _ = params["ft_in"].elts  # 0.11 and newer
    return len(constants), len(carry)


def shard_count(equation: Equation) -> int:
    """Over how many shards a `shard_map` runs its body."""
    mesh, axes = equation.params["mesh"], equation.params["newly_manual_axes"]
    return math.prod(mesh.shape[axis] for axis in axes)


def branch_platforms(equation: Equation) -> tuple[tuple[str, ...] | None, ...] | None:
    """What chooses the branches of a cond: platforms (None: the default), or None for an index."""
    return equation.params.get("branches_platforms")


def branches_on(equation: Equation, platform: str) -> Sequence[Jaxpr]:
    """The branches of a cond that may run on a platform: of those chosen by platform, the one."""
    branches, platforms = equation.params["branches"], branch_platforms(equation)
    if platforms is None:
        return branches
    here = {"gpu": ("cuda", "rocm", "gpu")}.get(platform, (platform,))
    for branch, names in zip(branches, platforms, strict=True):
        if names is not None and any(name in here for name in names):
            return (branch,)
    default = [branch for branch, names in zip(branches, platforms, strict=True) if names is None]
    return default or branches


def jit_options(equation: Equation) -> dict[str, Any]:
    """What an inner `jit` says that inlining it would lose, as arguments of `jax.jit`.

    Shardings are tuples, one entry for each operand or result; `UNSPECIFIED` where nothing is said.
    """
    params = equation.params
    options: dict[str, Any] = {}
    for key in ("in_shardings", "out_shardings"):
        if any(sharding is not UNSPECIFIED for sharding in params[key]):
            options[key] = params[key]
    if any(params["donated_invars"]):
        options["donate_argnums"] = tuple(i for i, d in enumerate(params["donated_invars"]) if d)
    return options
