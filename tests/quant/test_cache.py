"""Caches of keys and values as codes: written, read, returned and carried."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jopt import trees
from jopt.quant import FP8, Cache, Int, Spec, attend, cached, kv_cache, quantize
from jopt.trace import explain, lift, sites

B, L, H, D = 2, 12, 4, 8
AFFINE = Int(8, symmetric=False)
FORMATS = [Int(8), Int(4), AFFINE, FP8("e4m3")]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


K, V = normal(0, B, L, H, D), normal(1, B, L, H, D)
Q = normal(2, B, 3, H, D)


def rows(x, axes=(-1,), bits=8):
    """Values on symmetric grids in float64, one scale along the axes."""
    x = np.asarray(x, np.float64)
    top = 2 ** (bits - 1) - 1
    scale = np.max(np.abs(x), axis=axes, keepdims=True) / top
    return np.round(x / scale) * scale


def attention(q, k, v, mask=None):
    """In float64; heads of keys are repeated for groups of queries."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    scores = np.einsum("...qhd,...khd->...hqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("...hqk,...khd->...qhd", e / e.sum(-1, keepdims=True), v)


def assert_close(got, expected, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance, rtol=1e-4)


def full(format=None, values=K, **options):
    return kv_cache(values.shape, format, **options).update(values, 0)


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_are_rounded_one_by_one(format):
    cache = jax.jit(lambda v: kv_cache((B, L, H, D), format).update(v, 4))(K[:, :5])
    assert isinstance(cache, Cache) and cache.scale.shape == (B, L, H, 1)
    got = cache.materialise()
    assert not np.any(got[:, :4]) and not np.any(got[:, 9:])
    if format in (Int(8), Int(4)):
        assert_close(got[:, 4:9], rows(K[:, :5], bits=format.bits))
    step = 0.2 if format.bits == 4 else 0.04
    assert_close(got[:, 4:9], K[:, :5], step * np.max(np.abs(K)))


def test_whole_tokens_share_a_scale_and_other_layouts():
    cache = full(axes=(-2, -1))
    assert cache.scale.shape == (B, L, 1, 1)
    assert_close(cache.materialise(), rows(K, (-2, -1)))
    other = kv_cache((B, H, L, D)).update(K.swapaxes(1, 2), 0, axis=-2)
    assert_close(other.materialise(), rows(K).swapaxes(1, 2))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("axes", [(-1,), (-2, -1)])
def test_attention_equals_that_of_what_the_cache_stands_for(format, axes):
    keys, values = full(format, K, axes=axes), full(format, V, axes=axes)
    got = jax.jit(attend)(Q, keys, values)
    assert_close(got, attention(Q, keys.materialise(), values.materialise()))


def test_groups_of_heads_and_masks():
    keys, values = full(None, K[:, :, :2]), full(None, V[:, :, :2])
    mask = jnp.arange(L)[None, :] <= jnp.array([[3], [5], [11]])
    got = attend(Q, keys, values, mask=mask[None, None])
    expected = attention(Q, rows(K[:, :, :2]), rows(V[:, :, :2]), np.asarray(mask))
    assert_close(got, expected)
    assert_close(attend(Q, K[:, :, :2], V[:, :, :2]), attention(Q, K[:, :, :2], V[:, :, :2]))
    with pytest.raises(ValueError, match="heads divide the 4"):
        attend(Q, keys, full(None, V))


def test_products_of_integers():
    keys, values = full(query=Int(8)), full(values=V, query=Int(8))
    text = str(jax.make_jaxpr(attend)(Q, keys, values))
    assert text.count("preferred_element_type=int32") == 2
    assert text.count(f"f32[{B},{L},{H},{D}]") == 0  # never as floats
    q = rows(Q / np.sqrt(D))
    scores = np.einsum("bqhd,bkhd->bhqk", q, rows(K))
    e = np.exp(scores - scores.max(-1, keepdims=True))
    e /= e.sum(-1, keepdims=True)
    scale = np.max(np.abs(np.asarray(V, np.float64)), -1) / 127  # b k h
    weights = rows(e * scale.transpose(0, 2, 1)[:, :, None])
    codes = rows(V) / scale[..., None]
    assert_close(attend(Q, keys, values), np.einsum("bhqk,bkhd->bqhd", weights, codes))


@pytest.mark.parametrize("query", [None, Int(8)])
def test_the_gradient_to_queries_is_that_of_floats(query):
    keys, values = full(query=query), full(values=V, query=query)

    def loss(q):
        return jnp.sum(attend(q, keys, values) ** 2)

    dense = [c.materialise() for c in (keys, values)]
    expected = jax.grad(lambda q: jnp.sum(attend(q, *dense) ** 2))(Q)
    tolerance = 1e-5 if query is None else 0.03 * float(np.max(np.abs(expected)))
    assert_close(jax.jit(jax.grad(loss))(Q), expected, tolerance)


# A decoder, written for arrays.

WEIGHTS = normal(3, 3, D * 2, 3 * D * 2) * 0.3


def layer(w, caches, x, position):
    """One token `[batch, features]` through a layer of attention over 2 heads."""
    q, k, v = jnp.split((x @ w).reshape(B, 1, 6, D), 3, axis=2)
    keys = lax.dynamic_update_slice(caches["k"], k, (0, position, 0, 0))
    values = caches["v"].at[:, position].set(v[:, 0])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, keys) / np.sqrt(D)
    seen = jnp.arange(keys.shape[1])[None, None, None] <= position
    probs = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    out = jnp.einsum("bhqk,bkhd->bqhd", probs, values).reshape(B, 2 * D)
    return {"k": keys, "v": values}, x + out


def step(params, caches, x, position):
    """Scan over the layers: caches go in and come out stacked."""

    def body(x, slices):
        caches, x = layer(*slices, x, position)
        return x, caches

    x, caches = lax.scan(body, x, (params, caches))
    return x, caches


def decode(params, caches, xs):
    """Scan over the tokens: caches are carried."""

    def body(carry, x):
        caches, position = carry
        out, caches = step(params, caches, x, position)
        return (caches, position + 1), out

    (caches, _), out = lax.scan(body, (caches, jnp.int32(0)), xs)
    return out, caches


def while_decode(params, caches, xs):
    def body(state):
        position, caches, out = state
        y, caches = step(params, caches, xs[position], position)
        return position + 1, caches, out.at[position].set(y)

    state = (jnp.int32(0), caches, jnp.zeros_like(xs))
    _, caches, out = lax.while_loop(lambda s: s[0] < xs.shape[0], body, state)
    return out, caches


def branching(params, caches, xs):
    def body(carry, x):
        caches, position = carry
        y, caches = lax.cond(
            position < 100, lambda c: step(params, c, x, position), lambda c: (x, c), caches
        )
        return (caches, position + 1), y

    (caches, _), out = lax.scan(body, (caches, jnp.int32(0)), xs)
    return out, caches


def checkpointed(params, caches, xs):
    return jax.checkpoint(decode)(params, caches, xs)


def zeros():
    return {name: jnp.zeros((3, B, L, 2, D)) for name in "kv"}


def by_hand(params, xs, rounded=rows):
    """The decoder over whole sequences, keys and values rounded token by token."""
    x = np.asarray(xs, np.float64)  # tokens, batch, features
    for w in np.asarray(params, np.float64):
        q, k, v = np.split((x @ w).reshape(-1, B, 6, D).transpose(1, 0, 2, 3), 3, axis=2)
        mask = np.tril(np.ones((len(x), len(x)), bool))
        out = attention(q, rounded(k), rounded(v), mask)
        x = x + out.transpose(1, 0, 2, 3).reshape(x.shape)
    return x


XS = normal(4, L, B, D * 2)
LOOPS = [decode, while_decode, branching, checkpointed]


@pytest.mark.parametrize("loop", LOOPS)
def test_decoding_equals_full_attention(loop):
    caches = cached(zeros(), "**")
    out, after = jax.jit(lift(loop))(WEIGHTS, caches, XS)
    assert jax.tree.structure(after) == jax.tree.structure(caches)
    assert_close(out, by_hand(WEIGHTS, XS), 1e-4)
    error = np.max(np.abs(np.asarray(out) - by_hand(WEIGHTS, XS, lambda x: x)))
    assert 1e-3 < error < 0.02 * np.max(np.abs(out))
    for before, cache in zip(jax.tree.leaves(caches), jax.tree.leaves(after), strict=True):
        assert (before.shape, before.dtype) == (cache.shape, cache.dtype)


@pytest.mark.parametrize("loop", [while_decode, branching])
def test_nothing_of_the_cache_is_ever_an_array(loop):
    caches = cached(zeros(), "**")
    met = explain(loop, WEIGHTS, caches, XS)
    assert met and not any(m.dense for m in met), [m for m in met if m.dense]


def test_with_quantized_weights_and_typed_leaves_that_do_not_travel():
    params = quantize(WEIGHTS, Spec(Int(8), Int(8)))
    caches = cached(zeros(), "**")
    out, after = jax.jit(lift(decode))(params, caches, XS)
    assert isinstance(after["k"], Cache)
    assert_close(out, by_hand(WEIGHTS, XS), 0.1 * float(np.max(np.abs(out))))
    (same,) = lift(lambda w: (w,))(params)
    assert isinstance(same, jax.Array)


def test_where_a_loop_gives_back_an_array_the_cache_becomes_one():
    def shifted(cache, n):
        return lax.scan(lambda c, _: (c + 1.0, None), cache, None, length=n)[0]

    cache = full()
    got = lift(shifted, allow_dense=True)(cache, 2)
    assert isinstance(got, jax.Array)
    assert_close(got, np.asarray(cache.materialise()) + 2.0)

    def either(cache, x):
        return lax.cond(x > 0, lambda c: c, lambda c: jnp.zeros_like(c), cache)

    got = lift(either)(cache, jnp.float32(1))
    assert isinstance(got, jax.Array)
    assert_close(got, cache.materialise())


def test_vmap_devices_and_export():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Auto,))
    values = normal(5, 8, B, L, H, D)
    caches = jax.vmap(lambda v: full(None, v))(values)
    assert_close(caches.materialise(), rows(values))
    queries = normal(6, 8, B, 3, H, D)
    got = jax.vmap(attend)(queries, caches, caches)
    expected = np.stack(
        [attention(q, rows(v), rows(v)) for q, v in zip(queries, values, strict=True)]
    )
    assert_close(got, expected)
    spread = jax.device_put((queries, caches), NamedSharding(mesh, PartitionSpec("d")))
    assert_close(jax.jit(jax.vmap(attend))(spread[0], spread[1], spread[1]), expected)

    arrays, structure = jax.tree.flatten(cached(zeros(), "**"))

    def flat(params, arrays, x):
        caches = jax.tree.unflatten(structure, arrays)
        return jax.tree.leaves(lift(step)(params, caches, x, jnp.int32(3)))

    compiled = jax.jit(flat)
    exported = export.export(compiled, platforms=("cpu", "cuda", "tpu"))(WEIGHTS, arrays, XS[0])
    assert_close(exported.call(WEIGHTS, arrays, XS[0])[0], compiled(WEIGHTS, arrays, XS[0])[0])


def test_memory():
    cache = full()
    n = B * L * H
    assert trees.size(cache).bits == n * D * 8 + n * 32
    assert trees.size(full(Int(4))).bits == n * D * 4 + n * 32
    assert trees.size(full(AFFINE)).bits == n * D * 8 + n * (32 + 8)
    assert trees.size({"k": K}).bits / trees.size(cache).bits == pytest.approx(32 / 12)
    empty = trees.size(kv_cache((B, L, H, D)))
    assert (empty.parameters, empty.nonzeros) == (n * D, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    keys, values, q = (x.astype(dtype) for x in (K, V, Q))
    caches = [kv_cache(K.shape, dtype=dtype).update(x, 0) for x in (keys, values)]
    got = jax.jit(attend)(q, *caches)
    assert got.dtype == dtype and caches[0].dtype == dtype
    assert_close(got, attention(q, rows(keys), rows(values)), 0.05)


def test_scatters_of_positions_that_differ_from_sequence_to_sequence():
    positions = jnp.array([3, 7])

    def write(cache, new):
        return cache.at[jnp.arange(B), positions].set(new)

    cache = lift(write)(full(), V[:, 0])
    expected = rows(K)
    expected[0, 3], expected[1, 7] = rows(V)[:, 0]
    assert_close(cache.materialise(), expected)
    several = lift(lambda cache, new: cache.at[:, jnp.array([5, 1])].set(new))(full(), V[:, :2])
    expected = rows(K)
    expected[:, 5], expected[:, 1] = rows(V)[:, 0], rows(V)[:, 1]
    assert_close(several.materialise(), expected)


def test_what_is_seen_otherwise_stays_codes():
    def function(cache, q):
        heads = jnp.repeat(cache, 2, axis=2).astype(jnp.float32)
        return jnp.einsum("bqhd,bhdk->bhqk", q, jnp.transpose(heads, (0, 2, 3, 1)))

    cache = full(None, K[:, :, :2])
    assert not any(met.dense for met in explain(function, cache, Q))
    expected = np.einsum(
        "bqhd,bkhd->bhqk", np.asarray(Q, np.float64), np.repeat(rows(K[:, :, :2]), 2, 2)
    )
    assert_close(lift(function)(cache, Q), expected, 1e-4)


def test_what_cannot_be_done_says_why():
    with pytest.raises(TypeError, match="holds `Int` or `FP8` codes"):
        kv_cache((1, 2, 3), "int8")
    with pytest.raises(ValueError, match="neither groups nor stochastic"):
        kv_cache((1, 2, 4), Int(4, granularity="group", group_size=2))
    with pytest.raises(ValueError, match="two symmetric `Int` formats"):
        kv_cache((1, 2, 3), AFFINE, query=Int(8))
    with pytest.raises(ValueError, match="matched none of"):
        cached(zeros(), "keys")
    with pytest.raises(TypeError, match="`i` is int32"):
        cached({"i": jnp.int32(3)}, "i")
    with pytest.raises(TypeError, match="`k` is Cache"):
        cached({"k": full()}, "k")
    with pytest.raises(ValueError, match="would make"):
        lift(lambda c, x: lax.dynamic_update_slice(c, x, (0, 0, 0, 2)))(full(), K[..., :2])
    with pytest.raises(ValueError, match="would make"):
        lift(lambda c, x: c.at[..., 2].set(x))(full(), K[..., 0])
    with pytest.raises(ValueError, match="would make"):
        lift(lambda c: jnp.tanh(c))(full())
    with pytest.raises(ValueError, match="the shape has 4 axes"):
        kv_cache((1, 8, 2, 4), axes=(7,))
    with pytest.raises(TypeError, match="stands for floats"):
        kv_cache((1, 8, 2, 4), dtype=jnp.int32)
    for shape in ((1, 3, 1, 4), (1, 3, 2, 3), (2, 3, 2, 4), (1, 9, 2, 4), (3, 2, 4)):
        with pytest.raises(ValueError, match=r"do not fit into a cache of shape \(1, 8, 2, 4\)"):
            kv_cache((1, 8, 2, 4)).update(jnp.ones(shape), 0)
    with pytest.raises(ValueError, match="the cache has 4 axes"):
        kv_cache((1, 8, 2, 4)).update(jnp.ones((1, 8, 2, 4)), 0, axis=4)
    with pytest.raises(ValueError, match="must be alike"):
        attend(Q, K[:, :, :0], V[:, :, :0])


def linen_decoder():
    linen = pytest.importorskip("flax.linen")
    model = linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
    variables = model.init(jax.random.key(0), jnp.zeros((B, L, 8)))

    def apply(cache, x):
        out, state = model.apply(
            {"params": variables["params"], "cache": cache}, x, mutable="cache"
        )
        return out, state["cache"]

    return apply, variables["cache"], ["cached_key", "cached_value"]


def nnx_decoder():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((B, L, 8))
    graph, cache, rest = nnx.split(model, nnx.Cache, ...)

    def apply(cache, x):
        model = nnx.merge(graph, cache, rest)
        out = model(x)
        return out, nnx.state(model, nnx.Cache)

    return apply, cache, ["cached_key/*", "cached_value/*"]


@pytest.mark.parametrize("make", [linen_decoder, nnx_decoder])
def test_decoders_of_the_frameworks_untouched(make):
    apply, plain, where = make()
    quantized = cached(plain, where)
    assert sum(isinstance(leaf, Cache) for _, leaf in trees.items(quantized)) == 2
    lifted = jax.jit(lift(apply))
    for x in normal(7, L, B, 1, 8):
        expected, plain = apply(plain, x)
        got, quantized = lifted(quantized, x)
        assert_close(got, expected, 0.03 * float(np.max(np.abs(expected))))
    assert sum(isinstance(leaf, Cache) for _, leaf in trees.items(quantized)) == 2


def test_embeddings_by_rows_tied():
    table, ids = normal(8, 11, 8), jnp.array([[1, 10, 3], [4, 5, 0]])

    def function(p, ids):
        return jnp.tanh(p[ids]) @ p.T

    params = quantize(table, Int(8), sites=sites(function, table, ids))
    assert params.scale.shape == (11, 1)
    codes = rows(table)
    assert_close(jax.jit(lift(function))(params, ids), np.tanh(codes[np.asarray(ids)]) @ codes.T)
    assert not any(met.dense for met in explain(function, params, ids))
    assert trees.size(params).bits == 11 * 8 * 8 + 11 * 32


def test_loops_that_count_beside_a_cache():
    new = jnp.asarray(np.random.default_rng(5).normal(size=(1, 1, 2, 4)), jnp.float32)

    def write(cache):
        def body(i, cache):
            return lax.dynamic_update_slice_in_dim(cache, new, i, 1)

        return lax.fori_loop(0, 3, body, cache)

    empty = kv_cache((1, 8, 2, 4))
    for function in (lift(write), jax.jit(lift(write))):
        found = function(empty)
        assert isinstance(found, Cache)
        np.testing.assert_allclose(found.materialise()[:, 2:3], new, atol=0.05)
        assert not jnp.any(found.materialise()[:, 3:])


def test_a_cache_into_one_whose_scales_lie_otherwise_is_refused():
    part = kv_cache((1, 3, 2, 4), axes=(-2, -1)).update(jnp.ones((1, 3, 2, 4)), 0)

    def write(cache, part):
        return lax.dynamic_update_slice_in_dim(cache, part, 2, 1)

    with pytest.raises(ValueError, match="dynamic_update_slice"):
        lift(write)(kv_cache((1, 8, 2, 4)), part)


def test_a_donating_step_gives_back_a_cache():
    def step(cache, x, i):
        return lax.dynamic_update_slice_in_dim(cache, x, i, 1)

    inner = jax.jit(step, donate_argnums=0)
    found = lift(lambda c, x, i: inner(c, x, i))(
        kv_cache((1, 8, 2, 4)), jnp.ones((1, 1, 2, 4)), jnp.int32(3)
    )
    assert isinstance(found, Cache) and jnp.all(found.materialise()[:, 3] == 1)


def test_a_query_that_sees_nothing_gets_zeros():
    mask = jnp.arange(L)[None, :] < jnp.array([[L], [0], [5]])  # of the second query nothing

    def loss(q):
        out = attend(q, full(), full(values=V), mask=mask[None, None])
        return jnp.sum(out * out), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(Q)
    live = np.array([0, 2])
    expected = attention(Q[:, live], rows(K), rows(V), np.asarray(mask)[live])
    assert_close(out[:, live], expected)
    assert not np.any(out[:, 1]) and np.all(np.isfinite(gradient)) and not np.any(gradient[:, 1])


def test_a_cache_of_no_tokens_gives_zeros():
    empty = kv_cache((B, 0, H, D))
    np.testing.assert_array_equal(attend(Q, empty, empty), jnp.zeros_like(Q))
    np.testing.assert_array_equal(attend(Q, K[:, :0], V[:, :0], mask=jnp.ones(0, bool)), 0 * Q)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize(
    "options",
    [{}, {"format": AFFINE}, {"format": FP8("e4m3")}, {"axes": (-2, -1)}, {"query": Int(8)}],
)
def test_a_token_that_nobody_sees_may_hold_anything(options, bad):
    cache = kv_cache((B, L, 2, D), **options).update(K[:, :, :2], 0)
    broken = cache.update(jnp.full((B, 1, 2, D), bad), L - 1)
    seen = jnp.arange(L) < L - 1
    for mask in (seen, seen[None, None], jnp.broadcast_to(seen, (B, H, 3, L))):
        expected = attend(Q, cache, cache, mask=mask)
        assert_close(jax.jit(attend)(Q, broken, broken, mask=mask), expected)
        slope = jax.grad(lambda q, m=mask: jnp.sum(attend(q, broken, broken, mask=m)))(Q)
        assert np.all(np.isfinite(slope))


def test_positions_beyond_the_ends_are_those_of_dynamic_update_slice():
    late = full().update(2 * K[:, :3], L - 1)
    assert_close(late.materialise()[:, -3:], rows(2 * K[:, :3]))
    early = full().update(2 * K[:, :3], -3)
    np.testing.assert_array_equal(early.materialise(), late.materialise())
