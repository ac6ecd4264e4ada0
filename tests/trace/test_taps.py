"""`taps`: values from the inside of functions against the same values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from toy_functions import close, normal
from toy_leaves import dense, scaled

import jopt
from jopt.trace import lift, tappable, taps

W, B, V = normal(0, 6, 5), normal(1, 5), normal(2, 5, 6)
STACK = normal(3, 3, 6, 6)
X = normal(4, 4, 6)
PARAMS = {"one": {"kernel": W, "bias": B}, "two": V}


def network(p, x):
    h = jnp.tanh(checkpoint_name(x @ p["one"]["kernel"] + p["one"]["bias"][None], "hidden"))
    return h @ p["two"]


def layers(p, x):
    def layer(h, w):
        return checkpoint_name(jnp.tanh(h @ w), "layer"), None

    return lax.scan(layer, x, p)[0]


def by_hand(p, x):
    """The products and the outputs of `layers`, stacked."""
    made = []
    for w in p:
        made.append((x @ w, jnp.tanh(x @ w)))
        x = made[-1][1]
    return [jnp.stack(column) for column in zip(*made, strict=True)]


def test_parameter_paths_name_where_a_parameter_first_meets_data():
    out, found = jax.jit(taps(network, ["one/*", "two"]))(PARAMS, X)
    product = X @ W
    close(out, network(PARAMS, X))
    close(found, {"one/bias": product + B[None], "one/kernel": product, "two": network(PARAMS, X)})


def test_a_parameter_is_followed_through_operations_on_parameters():
    def function(p, x):
        return x @ jnp.concatenate([p["a"].T * p["mask"], p["b"]], axis=1)

    p = {"a": normal(5, 2, 6), "mask": jnp.ones((6, 2)), "b": normal(6, 6, 3)}
    out, found = taps(function, "*")(p, X)
    assert set(found) == {"a", "mask", "b"}
    for value in found.values():
        close(value, out)


def test_checkpoint_names_and_the_function_is_the_same():
    out, found = taps(network, "hidden")(PARAMS, X)
    np.testing.assert_array_equal(out, network(PARAMS, X))
    np.testing.assert_array_equal(found["hidden"], X @ W + B[None])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_values_inside_a_scan_come_stacked(wrap):
    def function(p, x):
        return wrap(layers)(p["stack"], x)

    out, found = jax.jit(taps(function, ["stack", "layer"]))({"stack": STACK}, X)
    close(out, layers(STACK, X))
    close([found["stack"], found["layer"]], by_hand(STACK, X))


def test_reversed_and_nested_scans():
    def function(p, x):
        def outer(h, w):
            return layers(w, h), None

        return lax.scan(outer, x, p, reverse=True)[0]

    stack = jnp.stack([STACK, STACK[::-1]])
    out, found = jax.jit(taps(function, "layer"))(stack, X)
    close(out, function(stack, X))
    second = by_hand(stack[1], X)[1]
    close(found["layer"], jnp.stack([by_hand(stack[0], second[-1])[1], second]))


def test_another_use_has_a_number():
    def function(p, tokens):
        return jnp.tanh(p["e"][tokens]) @ p["e"].T

    p, tokens = {"e": normal(7, 5, 6)}, jnp.array([3, 0])
    out, found = taps(function, "e*")(p, tokens)
    close(found, {"e": p["e"][tokens], "e#1": out})


def test_under_grad_vmap_jit_and_on_eight_devices(eight_devices):
    tapped = taps(network, ["hidden", "two"])

    def loss(p, x):
        out, found = tapped(p, x)
        return jnp.sum(out) + jnp.sum(found["hidden"] ** 2)

    def expected(p, x):
        return jnp.sum(network(p, x)) + jnp.sum(
            (x @ p["one"]["kernel"] + p["one"]["bias"][None]) ** 2
        )

    close(jax.jit(jax.grad(loss))(PARAMS, X), jax.grad(expected)(PARAMS, X))
    batches = normal(8, 3, 4, 6)
    mapped = jax.vmap(tapped, (None, 0))(PARAMS, batches)
    close(mapped, jax.tree.map(lambda *a: jnp.stack(a), *(tapped(PARAMS, x) for x in batches)))
    spread = jax.device_put(normal(9, 8, 6), NamedSharding(eight_devices, PartitionSpec("d")))
    close(jax.jit(tapped)(PARAMS, spread), tapped(PARAMS, np.asarray(spread)))


@pytest.fixture
def eight_devices():
    assert jax.device_count() == 8
    return jax.make_mesh((8,), ("d",), (AxisType.Auto,))


def test_is_exported_for_all_platforms():
    exported = export.export(jax.jit(taps(layers, "layer")), platforms=("cpu", "cuda", "tpu"))
    out, found = exported(STACK, X).call(STACK, X)
    close([out, found["layer"]], [layers(STACK, X), by_hand(STACK, X)[1]])


def test_a_recomputed_body_stays_recomputed():
    remat = jax.checkpoint(layers, policy=jax.checkpoint_policies.nothing_saveable)
    text = str(jax.make_jaxpr(taps(lambda p, x: remat(p, x), "layer"))(STACK, X))
    assert "nothing_saveable" in text
    gradient = jax.grad(lambda p: jnp.sum(taps(lambda p, x: remat(p, x), "layer")(p, X)[0]))
    close(gradient(STACK), jax.grad(lambda p: jnp.sum(layers(p, X)))(STACK))


def test_is_compiled_once():
    count = 0

    def function(p, x):
        nonlocal count
        count += 1
        return network(p, x)

    step = jax.jit(taps(function, "hidden"))
    for i in range(3):
        step(PARAMS, X + i)
    assert count == 1


def test_taps_of_typed_leaves():
    typed = {"one": {"kernel": scaled(W), "bias": B}, "two": scaled(V)}
    lifted = jax.jit(lift(taps(network, ["one/kernel", "hidden"])))(typed, X)
    close(lifted, taps(network, ["one/kernel", "hidden"])(dense(typed), X), 1e-4)
    close(jax.jit(taps(lift(network), "hidden"))(typed, X)[1]["hidden"], lifted[1]["hidden"])
    with pytest.raises(ValueError, match=r"`two`: it is inside a typed leaf's own operations"):
        taps(lift(network), "two")(typed, X)


def test_the_convolution_of_a_platform_is_one_value():
    from jopt import nn

    kernel, image = normal(10, 3, 3, 2, 4), normal(11, 1, 5, 5, 2)
    out, found = taps(lambda p, x: nn.conv(x, p) + 1.0, "**")(kernel, image)
    close(out, found[""] + 1.0)


@jax.custom_vjp
def halved(x, w):
    return checkpoint_name(x @ w, "inside")


halved.defvjp(lambda x, w: (x @ w, (x, w)), lambda s, g: (0.5 * g @ s[1].T, s[0].T @ g))


def test_a_function_with_its_own_derivative_is_one_operation():
    function = taps(lambda p, x: halved(x, p["w"]), "w")
    close(function({"w": W}, X)[1]["w"], X @ W)
    close(jax.grad(lambda x: jnp.sum(function({"w": W}, x)[0]))(X), 0.5 * jnp.ones((4, 5)) @ W.T)
    with pytest.raises(ValueError, match="`inside`: it is inside a function with a derivative"):
        taps(lambda p, x: halved(x, p["w"]), "inside")({"w": W}, X)


def in_while(p, x):
    return lax.while_loop(lambda h: jnp.sum(h) < 0, lambda h: h @ p["w"], x)


def in_branch(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ p["w"], lambda x: x, x)


def in_shard(p, x):
    spec, mesh = PartitionSpec("d"), jax.make_mesh((2,), ("d",), (AxisType.Auto,))
    return jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
    )(p["w"], x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (in_while, "a `while` loop, whose iterations nobody counts"),
        (in_branch, "one branch of a `cond`"),
        (in_shard, "a `shard_map`, which sees one shard only"),
    ],
)
def test_what_cannot_leave_is_said(function, words):
    with pytest.raises(ValueError, match=rf"cannot bring out `w`: it is inside {words}"):
        taps(function, "w")({"w": STACK[0]}, X)
    assert all(tap.closed for tap in tappable(function, {"w": STACK[0]}, X))


def test_what_is_not_there_is_listed_with_the_nearest():
    with pytest.raises(ValueError, match=r"(?s)matched no value\. Did you mean `one/kernel`\?"):
        taps(network, "one/kernels")(PARAMS, X)
    with pytest.raises(ValueError, match=r"(?s)checkpoint: `hidden`\n  module: none \(flax\.nnx"):
        taps(network, lambda tap: False)(PARAMS, X)


def test_a_predicate_sees_shapes_and_python_values_stay_python():
    def function(p, x, *, train):
        assert train is True
        return network(p, x)

    _, found = jopt.taps(function, lambda tap: tap.shape == (4, 5))(PARAMS, X, train=True)
    assert list(found) == ["one/kernel", "one/bias", "hidden"]
    listed = tappable(network, jax.eval_shape(lambda: PARAMS), jax.ShapeDtypeStruct((4, 6), "f4"))
    assert [(tap.name, tap.kind) for tap in listed if tap.shape == (4, 5)] == [
        ("one/kernel", "parameter"),
        ("one/bias", "parameter"),
        ("hidden", "checkpoint"),
    ]


def test_an_operation_without_results_has_no_value_to_name():
    def function(p, x):
        jax.debug.callback(lambda *values: None, p, x)
        return x @ p

    _, found = taps(function, "**")(W, X)
    close(found, {"": X @ W})


def test_a_number_is_not_another_parameters_name():
    p = {"d": W, "d#1": normal(12, 6, 3)}

    def function(p, x):
        return (x @ p["d"]) @ p["d"].T @ p["d#1"]

    out, found = taps(function, "d*")(p, X)
    close(found, {"d": X @ W, "d#2": X @ W @ W.T, "d#1": out})


def test_a_predicate_reaches_each_kind_of_a_name():
    def function(p, x):
        with jax.named_scope("hidden"):
            return jnp.tanh(x @ p["hidden"])

    for kind, value in [("parameter", X @ W), ("module", jnp.tanh(X @ W))]:
        _, found = taps(function, lambda tap, kind=kind: tap.kind == kind)({"hidden": W}, X)
        close(found, {"hidden": value})
