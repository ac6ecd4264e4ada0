"""Functions with work on parameters alone, for the tests of `hoist`, and what is left of it."""

import jax
import jax.numpy as jnp
from jax import lax
from toy_functions import normal
from toy_leaves import bodies

from jopt import quant
from jopt.trace import compat, lift, sites

X, WIDE = normal(0, 4, 6), normal(1, 9, 6)
W, V, G, B = normal(2, 6, 6), normal(3, 6, 6), 1 + normal(4, 6) ** 2, normal(5, 6)
STACK = {"g": 1 + normal(6, 3, 6) ** 2, "v": normal(7, 3, 6, 6)}
DEEP = {"g": 1 + normal(8, 2, 3, 6) ** 2, "v": normal(9, 2, 3, 6, 6)}
INT8 = quant.Spec(quant.Int(8), quant.Int(8))


def normed(p):
    return p["g"][None] * p["v"] / jnp.sqrt(jnp.sum(p["v"] ** 2, 0, keepdims=True))


def weight_norm(p, x):
    return x @ normed(p)


def masked(p, x):
    return x @ jnp.where(jnp.tril(jnp.ones((6, 6))) > 0, p["w"], 0.0)


def low_rank(p, x):
    return x @ (p["w"] + 0.5 * p["a"] @ p["b"])


def fused(p, x):
    return jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), 3, -1)


def cast(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def scanned(p, x):
    return lax.scan(lambda h, p: (jnp.tanh(weight_norm(p, h)), h.sum()), x, p, reverse=True)


def scanned_constants(p, x):
    return lax.scan(lambda h, _: (jnp.tanh(weight_norm(p, h)), None), x, None, length=3)[0]


def scanned_twice(p, x):
    def layers(h, p):
        return lax.scan(lambda h, p: (jnp.tanh(weight_norm(p, h)), None), h, p)

    return lax.scan(layers, x, p)[0]


def scanned_inside(p, x):
    """The inner scan slices what the outer scan does not."""
    layer = lambda h, p: (jnp.tanh(weight_norm(p, h)), None)  # noqa: E731
    return lax.scan(lambda h, _: lax.scan(layer, h, p), x, None, length=2)[0]


def stacked(p, x):
    """A scan over inputs as well makes kernels, which another scan slices."""
    prepare = lambda h, p: (h + x.sum(), normed(p))  # noqa: E731
    h, kernels = lax.scan(prepare, x, p)
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, kernels)[0] @ jnp.exp(kernels)[0]


def checkpointed(p, x):
    return jax.checkpoint(weight_norm)(p, x)


def branched(p, x):
    return lax.cond(x.sum() > 0, weight_norm, lambda p, x: x @ p["v"], p, x)


def switched(p, x):
    cases = [weight_norm, lambda p, x: x, lambda p, x: x @ (2.0 * p["v"])]
    return lax.switch(jnp.argmax(x[0]) % 3, cases, p, x)


def nested(p, x):
    step = jax.jit(jax.checkpoint(lambda h, p: (jnp.tanh(weight_norm(p, h)) + B[None], h)))
    return jax.jit(jax.checkpoint(lambda p, x: lax.scan(step, x, p)))(p, x)


def looped(p, x):
    return lax.fori_loop(0, jnp.argmax(x[0]), lambda i, h: jnp.tanh(h @ p["w"]), x @ (p["w"] * 2))


def built(p, x):
    """A scan over parameters alone builds the kernel."""
    return x @ lax.scan(lambda c, w: (c @ w, None), jnp.eye(6), p["v"])[0]


def returned(p, x):
    return {"kernel": normed(p).T, "gain": p["g"], "table": jnp.arange(3.0), "y": weight_norm(p, x)}


def derived(p, x):
    """Custom derivatives stay whole, in the rest and in what is hoisted."""
    return jax.nn.silu(x @ jax.nn.softplus(p["w"])) + _scaled(x, p["w"] * 2)


@jax.custom_vjp
def _scaled(x, w):
    return x @ (w * 2)


_scaled.defvjp(lambda x, w: (x @ (w * 2), (x, w)), lambda s, g: (g @ s[1].T, s[0].T @ g))

FIVE = {
    masked: ({"w": W}, ["w"]),
    weight_norm: ({"g": G, "v": V}, ["g+v"]),
    low_rank: ({"a": normal(10, 6, 2), "b": normal(11, 2, 6), "w": W}, ["a+b+w"]),
    fused: ({"k": W, "q": V, "v": W.T}, ["k+q+v"]),
    cast: ({"w": W}, ["w"]),
}
CELLS = {
    **FIVE,
    scanned: (STACK, ["g+v"]),
    scanned_constants: ({"g": G, "v": V}, ["g+v"]),
    scanned_twice: (DEEP, ["g+v"]),
    scanned_inside: (STACK, ["g+v"]),
    stacked: (STACK, ["g+v", "g+v#1"]),
    checkpointed: ({"g": G, "v": V}, ["g+v"]),
    branched: ({"g": G, "v": V}, ["v", "g+v"]),
    switched: ({"g": G, "v": V}, ["g+v", "v"]),
    nested: (STACK, ["g+v"]),
    looped: ({"w": W}, ["w", "w#1"]),
    built: ({"v": 0.3 * STACK["v"]}, ["v"]),
    returned: ({"g": G, "v": V}, ["g", "g+v"]),
    derived: ({"w": W}, ["w", "w#1"]),
}


def integer_products(jaxpr):
    """How many products of int8 and int8 into int32 a jaxpr has, and how many in all."""
    found = [e for body in bodies(jaxpr) for e in body.eqns if e.primitive is lax.dot_general_p]
    exact = [{v.aval.dtype for v in e.invars} == {jnp.dtype("int8")} for e in found]
    assert all(e.outvars[0].aval.dtype == jnp.int32 for e, i in zip(found, exact, strict=True) if i)
    return sum(exact), len(found)


def quantized(rest, hoisted):
    found = sites(rest, hoisted, X)
    return lambda hoisted, x: lift(rest)(quant.quantize(hoisted, INT8, sites=found), x)


LAYOUTS = {"reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "gather", "rev"}


def left(jaxpr, kinds):
    """What computes from parameters (True) and constants (False) alone, in bodies as well."""
    jaxpr, constants = compat.opened(jaxpr)
    variables, found = [*jaxpr.constvars, *jaxpr.invars], []
    made = dict(zip(variables, [*(False for _ in constants), *kinds], strict=True))
    for e in jaxpr.eqns:
        operands = [False if isinstance(v, compat.Literal) else made[v] for v in e.invars]
        kind = None if None in operands else any(operands)
        name = e.primitive.name
        if name in ("jit", "remat2"):
            found += left(compat.body_of(e), operands)
        elif name == "scan" and kind is None:
            split, carried = compat.scan_counts(e)
            operands[split : split + carried] = [None] * carried
            found += left(e.params["jaxpr"], operands)
        elif name == "cond" and kind is None:
            for branch in e.params["branches"]:
                found += left(branch, operands[1:])
        elif kind and (name not in LAYOUTS or any(operands[1:])):
            found.append(name)
        made.update((v, kind) for v in e.outvars)
    return found


def remaining(rest, hoisted, x):
    return left(jax.make_jaxpr(rest)(hoisted, x), [*[True] * len(hoisted), None])
