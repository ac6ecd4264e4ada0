"""What `lift` keeps of control flow, derivatives, names, platforms and effects."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core.primitives import custom_vjp_call_p
from toy_functions import STACK, W, X, close
from toy_leaves import Scaled, bodies, dense, products

from jopt.trace import lift, rule


def equations(jaxpr, name):
    return [e for body in bodies(jaxpr) for e in body.eqns if e.primitive.name == name]


def test_scan_keeps_length_direction_and_unroll():
    def function(p, x):
        return lax.scan(lambda h, w: (h @ w, h), x, p, reverse=True, unroll=3)

    (scan,) = equations(jax.make_jaxpr(lift(function))(STACK, X), "scan")
    assert [scan.params[k] for k in ("length", "reverse", "unroll")] == [3, True, 3]
    assert [a.aval.dtype for a in scan.invars].count(jnp.int8) == 1


def test_remat_keeps_policy_and_cse():
    policy = jax.checkpoint_policies.dots_saveable

    def function(p, x):
        block = jax.checkpoint(lambda x: jnp.tanh(x @ p), policy=policy, prevent_cse=False)
        return block(x)

    (remat,) = equations(jax.make_jaxpr(lift(function))(W, X), "remat2")
    assert remat.params["policy"] is policy and remat.params["prevent_cse"] is False


def test_what_a_while_loop_carries_unchanged_stays_typed():
    def function(p, x):
        def body(carry):
            i, h, p = carry
            return i + 1, h @ p, p

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x, p))[1]

    assert products(jax.make_jaxpr(lift(function))(W, X)) == [True]
    close(jax.jit(lift(function))(W, X), function(dense(W), X))


@pytest.mark.parametrize("prevent_cse", [True, False, (True, False)])
def test_differentiated_remat_stays_behind_its_barrier(prevent_cse):
    def function(p, x):
        block = jax.checkpoint(lambda x, w: jnp.sin(x @ w).sum(), prevent_cse=prevent_cse)
        return jax.grad(block)(x, p)

    def barriers(f, p):
        text = jax.jit(f).lower(p, X).as_text()
        return [line.count("tensor<4x6xf32>") for line in text.splitlines() if "barrier" in line]

    lifted = lift(function, allow_dense=True)
    assert len(barriers(lifted, W)) == len(barriers(function, dense(W))) == bool(prevent_cse)
    close(lifted(W, X), function(dense(W), X))


def test_jit_with_donation_is_jitted_again():
    inner = jax.jit(lambda x, w: x @ w, donate_argnums=0)
    jaxpr = jax.make_jaxpr(lift(lambda w, x: inner(x, w)))(W, X)
    (again,) = equations(jaxpr, "jit")
    assert again.params["donated_invars"] == (True, False, False)
    assert again.params["name"] == "<lambda>" and products(jaxpr) == [True]


def test_plain_jit_is_inlined_under_its_name():
    def model(p, x):
        with jax.named_scope("block"):
            return jax.jit(lambda x: lax.scan(lambda h, w: (h @ w, None), x, p)[0])(x)

    def names(function, p):
        @jax.jit
        def program(p, x):
            with jax.named_scope("outside"):
                return function(p, x)

        text = program.lower(p, X).compile().as_text()
        return set(re.findall(r'op_name="(jit\([^"]*dot_general)"', text))

    (name,) = names(lift(model), STACK)
    assert name.startswith("jit(program)/outside/block/jit(<lambda>)/while/body/")
    assert {name} == names(model, dense(STACK))


@pytest.mark.parametrize("platforms", [["cpu"], ["cuda"], ["cpu", "cuda", "tpu"]])
def test_platform_dependent_stays_so(platforms):
    def function(p, x):
        return lax.platform_dependent(
            x,
            cpu=lambda x: jnp.sin(x @ p),
            tpu=lambda x: jnp.cos(x @ p),
            cuda=lambda x: jnp.tanh(x @ p),
        )

    close(jax.jit(lift(function))(W, X), jnp.sin(X @ dense(W)))
    close(lift(function)(W, X), jnp.sin(X @ dense(W)))
    text = jax.export.export(jax.jit(lift(function)), platforms=platforms)(W, X).mlir_module()
    lowered = [op for op in ("sine", "cosine", "tanh") if f"stablehlo.{op}" in text]
    expected = {"cpu": "sine", "tpu": "cosine", "cuda": "tanh"}
    assert sorted(lowered) == sorted(expected[p] for p in platforms)


def test_platform_dependent_default():
    def function(p, x):
        return lax.platform_dependent(x, tpu=lambda x: x, default=lambda x: x @ p)

    close(jax.jit(lift(function))(W, X), X @ dense(W))


def test_effects_happen_once_and_in_order():
    seen = []

    def function(p, x):
        jax.debug.callback(lambda y: seen.append(("before", float(y))), x[0, 0], ordered=True)
        x = x @ p
        jax.debug.callback(lambda y: seen.append(("after", float(y))), x[0, 0], ordered=True)

        def body(i, h):
            jax.debug.callback(lambda i: seen.append(("loop", int(i))), i, ordered=True)
            return h @ p

        return lax.fori_loop(0, 2, body, x)

    jax.jit(lift(function))(W, X).block_until_ready()
    jax.effects_barrier()
    after = float((X @ dense(W))[0, 0])
    assert [name for name, _ in seen] == ["before", "after", "loop", "loop"]
    np.testing.assert_allclose([v for _, v in seen], [float(X[0, 0]), after, 0, 1], 1e-5)


def test_random_keys_are_arrays():
    def function(p, x, key):
        return x @ p + jax.random.normal(key, (4, 6))

    key = jax.random.key(0)
    close(jax.jit(lift(function))(W, X, key), function(dense(W), X, key))


def test_disable_jit():
    def function(p, x):
        return lax.fori_loop(0, 2, lambda i, h: jax.nn.silu(h @ p), x)

    with jax.disable_jit():
        close(lift(function)(W, X), function(dense(W), X))


# Custom derivatives.


@jax.custom_jvp
def rounded(x, w):
    return jnp.round(x @ w)


@rounded.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return rounded(x, w), dx @ w + x @ dw


def test_custom_jvp_runs_rules_and_keeps_its_derivative():
    def plain(x):
        return rounded(x, dense(W))

    def lifted(x):
        return lift(lambda w, x: rounded(x, w))(W, x)

    assert products(jax.make_jaxpr(lifted)(X)) == [True]
    close(jax.jit(lifted)(X), plain(X))
    tangent = jnp.ones_like(X)
    close(jax.jvp(lifted, (X,), (tangent,)), jax.jvp(plain, (X,), (tangent,)))
    close(jax.jacobian(lifted)(X), jax.jacobian(plain)(X))
    rows = jax.vmap(jax.grad(lambda row: lifted(row[None]).sum()))(X)
    close(rows, jnp.broadcast_to(dense(W).sum(1), (4, 6)))


def test_custom_jvp_second_derivative():
    def total(f):
        return lambda x: jnp.sum(jnp.sin(f(x)))

    ours = jax.hessian(total(lambda x: lift(lambda w, x: rounded(x, w))(W, x)))(X[:1])
    close(ours, jax.hessian(total(lambda x: rounded(x, dense(W))))(X[:1]))


@jax.custom_vjp
def doubled(x, w):
    return x @ w


doubled.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (2 * g @ saved[1].T, 2 * saved[0].T @ g)
)


def test_custom_vjp_keeps_its_derivative_on_dense_weights():
    lifted = lift(lambda w, x: doubled(x, w).sum(), allow_dense=True)
    close(jax.grad(lifted, 1)(W, X), 2 * jnp.ones((4, 6)) @ dense(W).T)


def test_a_rule_may_serve_a_custom_vjp():
    class Doubled(Scaled):
        pass

    jax.tree_util.register_dataclass(Doubled, data_fields=["codes", "scale"], meta_fields=[])

    @rule(custom_vjp_call_p, Doubled)
    def _(call, x, w):
        return [x @ w.codes.astype(x.dtype) * w.scale]

    leaf = Doubled(W.codes, W.scale)
    jaxpr = jax.make_jaxpr(lift(lambda w, x: doubled(x, w)))(leaf, X)
    assert products(jaxpr) == [True]


def test_untyped_custom_derivatives_are_untouched():
    jaxpr = jax.make_jaxpr(lift(lambda w, x: jax.nn.relu(doubled(x, X.T) @ x @ w)))(W, X)
    assert len(equations(jaxpr, "custom_vjp_call")) == len(equations(jaxpr, "custom_jvp_call")) == 1


@pytest.mark.parametrize("kind", ["cond", "while", "scan", "remat", "jit", "custom_jvp"])
def test_allow_dense_reaches_every_body(kind):
    def odd(x, w):
        return x @ jnp.sin(w)

    authored = jax.custom_jvp(odd)
    authored.defjvp(lambda primals, tangents: jax.jvp(odd, primals, tangents))

    functions = {
        "cond": lambda w, x: lax.cond(x.sum() > 0, odd, lambda x, w: x, x, w),
        "while": lambda w, x: lax.while_loop(
            lambda h: jnp.sum(h * h) > 9, lambda h: odd(h, w) / 9, x
        ),
        "scan": lambda w, x: lax.scan(lambda h, _: (odd(h, w), None), x, None, length=2)[0],
        "remat": lambda w, x: jax.checkpoint(odd)(x, w),
        "jit": lambda w, x: jax.jit(odd)(x, w),
        "custom_jvp": lambda w, x: authored(x, w),
    }
    function = functions[kind]
    close(jax.jit(lift(function, allow_dense=True))(W, X), function(dense(W), X))
    with pytest.raises(ValueError, match="`sin` has no rule for `Scaled`"):
        lift(function)(W, X)
