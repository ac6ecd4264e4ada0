"""Products without a weight, such as attention scores: found by name, both operands quantized."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jopt import trees
from jopt.trace import Site
from jopt.trace.program import program
from jopt.trace.swaps import Product as Found
from jopt.trace.swaps import products as found_in
from jopt.trace.swaps import swapped, weighs

from .._formats.base import Format
from .pairs import Pair, Ranges, compute

PyTree = Any


Value = Format | Pair | None
ProductPolicy = Format | Pair | Sequence[tuple[str, Value]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "ranges"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Products:
    """Parameters, and the ranges of products without a weight; made by `calibrate_products`.

    Functions made by `products` take it in place of the parameters.
    """

    params: PyTree
    ranges: dict[str, Ranges]  # by name; arrays have one axis for each scan around the product

    def trainable(self, mark: Callable[[Any], Any]) -> "Products":
        """What of this trains: parameters as ever, ranges not."""
        return Products(mark(self.params), jax.tree.map(lambda _: False, self.ranges))


def products(
    apply: Callable[..., Any], policy: ProductPolicy, *, allow_dense: bool = False
) -> Callable[..., Any]:
    """Makes a function quantize products of activations, such as attention's scores and values.

        y = x_l · x_r   becomes   q(x_l) · q(x_r),   on integers where both formats are `Int`

    Names are those of `jopt.quant.weightless`: the module's name stack, where linen, haiku and
    equinox leave one, and an einsum's formula; further ones of the same name end in `#1`, `#2`.
    Products with a weight are never chosen: `quantize` is for them. The function is traced anew at
    each call, as by `lift`; typed leaves among its arguments are served, those that feed a product
    themselves (a quantized cache, say) by their own rules. Gradients pass straight through and are
    zero beyond static ranges. Each example under `vmap` and each shard of a `shard_map` has its own
    dynamic range.

    Args:
      apply: any function `apply(params, *inputs)`.
      policy: an ordered list of `(glob of names, value)`, the first match wins, a value being a
        `Pair`, a format (for both operands) or None. In place of the list: one for all.
      allow_dense: as in `lift`.

    Returns:
      A function with the arguments of `apply`, the first of them its parameters or
      `Products(params, ranges)`, which static ranges need.

    Raises:
      ValueError: when it is called: if a glob matches no product without a weight, if a static
        range is missing, or if ranges are given for a product that does not take them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt import quant
      >>> apply = lambda p, x: jnp.einsum("qd,kd->qk", x @ p, x)
      >>> x = jnp.array([[1.0, -0.5]])
      >>> quant.products(apply, [("qd,kd->qk", quant.Int(8))])(jnp.eye(2), x)
      Array([[1.2539525]], dtype=float32)
    """
    entries = entries_of(policy)

    @functools.wraps(apply)
    def quantized(params: Any, *inputs: Any, **kwargs: Any) -> Any:
        given = params.ranges if isinstance(params, Products) else {}
        params = params.params if isinstance(params, Products) else params

        def choose(found: Sequence[Found]) -> Mapping[str, Any]:
            chosen = chosen_of(found, entries)
            _check_ranges(chosen, given)
            return {name: functools.partial(compute, pair) for name, pair in chosen.items()}

        fixed = jax.tree.map(jax.lax.stop_gradient, given)
        return swapped(
            apply, (params, *inputs), kwargs, choose, given=fixed, allow_dense=allow_dense
        )[0]

    return quantized


def weightless(apply: Callable[..., Any], params: PyTree, *inputs: Any) -> tuple[Site, ...]:
    """Lists the products without a weight that `products` can name, in the order of the function.

    Args:
      apply: any function `apply(params, *inputs)`.
      params: its parameters; arrays may be `jax.ShapeDtypeStruct`s.
      *inputs: its other arguments, likewise.

    Returns:
      The `Site` of each, its name unique among them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jopt.quant import weightless
      >>> apply = lambda p, x: jnp.einsum("qd,kd->qk", x @ p, x)
      >>> [(site.name, site.shapes[0]) for site in weightless(apply, jnp.eye(2), jnp.ones((3, 2)))]
      [('qd,kd->qk', (3, 2))]
    """
    found = found_in(program(apply, (params, *inputs)))
    return tuple(one.site for one in found if not weighs(one.site))


# Which products, and how.


def entries_of(policy: ProductPolicy) -> list[tuple[str, Pair | None]]:
    """The policy as a list of globs and pairs."""
    if isinstance(policy, Format | Pair):
        policy = [("**", policy)]
    if isinstance(policy, str | dict) or not isinstance(policy, Sequence):
        raise TypeError(
            f"`products(apply, {policy!r})`: a policy is a format, a `Pair`, or a list of "
            '`(glob, value)` such as `[("**/scores", Int(8))]`.'
        )
    entries = []
    for glob, value in policy:
        if isinstance(value, Format):
            value = Pair(value, value)
        if not isinstance(glob, str) or not (value is None or isinstance(value, Pair)):
            raise TypeError(
                f"`products(apply, policy)`: an entry is `(glob, value)`, value a `Pair`, a format "
                f"or None, got {(glob, value)!r}."
            )
        entries.append((glob, value))
    return entries


def chosen_of(found: Sequence[Found], entries: list[tuple[str, Pair | None]]) -> dict[str, Pair]:
    """The pair of each product that the policy quantizes."""
    free = [one for one in found if not weighs(one.site) and _floating(one.site)]
    chosen: dict[str, Pair | None] = {}
    for glob, pair in entries:
        hits = [one for one in free if trees.matches(glob, one.site.name, None)]
        if not hits:
            raise ValueError(_nothing(glob, found, free))
        for one in hits:
            if pair is not None and one.site.name not in chosen and one.closed:
                raise ValueError(
                    f"`products(...)` cannot quantize `{one.site.name}`: it is inside {one.closed} "
                    f'({one.site.source}).\nPut `("{one.site.name}", None)` first in the policy.'
                )
            chosen.setdefault(one.site.name, pair)
    return {name: pair for name, pair in chosen.items() if pair is not None}


def _floating(site: Site) -> bool:
    return all(jnp.issubdtype(dtype, jnp.floating) for dtype in site.dtypes)


def _nothing(glob: str, found: Sequence[Found], free: Sequence[Found]) -> str:
    names = ", ".join(f"`{one.site.name}`" for one in free[:12]) or "none"
    more = f", and {len(free) - 12} more" if len(free) > 12 else ""
    message = (
        f'`products(apply, [("{glob}", ...)])` matched no product without a weight.\n'
        f"There are: {names}{more}; `jopt.quant.weightless(apply, params, *inputs)` lists all."
    )
    for one in found:
        if weighs(one.site) and trees.matches(glob, one.site.name, None):
            message += (
                f"\n`{one.site.name}` has the weight `{one.site.path}`: give `quantize` a policy "
                "for that path, such as `Spec(Int(8), Int(8))`."
            )
            break
    return message


def _check_ranges(chosen: Mapping[str, Pair], given: Mapping[str, Ranges]) -> None:
    for name, pair in chosen.items():
        if pair.static and name not in given:
            raise ValueError(
                f"`products(...)`: `{name}` is static, and its ranges were never measured.\n"
                "Call `params = calibrate_products(apply, params, batches, policy)` first."
            )
    for name in given:
        if name not in chosen or not chosen[name].static:
            raise ValueError(
                f"`products(...)`: there are ranges for `{name}`, which the policy does not take "
                "as static.\nUse the policy that `calibrate_products` was given."
            )
