"""The models: shapes, parameters, training behaviour, exports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jopt
from jopt import nn, quant

TRANSFORMER = nn.CharTransformer(vocab=11, layers=3, width=16, heads=4, context=8)
MODELS = {
    "convnet": (nn.ConvNet((4, 8), classes=5), (8, 8, 1)),
    "deep convnet": (nn.ConvNet((4,), classes=5, depth=2, hidden=6, dropout=0.2), (9, 7, 3)),
    "simple": (nn.SimpleCNN(classes=3, initialization="torch"), (8, 8, 3)),
    "resnet": (nn.ResNet((4, 8), blocks=1, classes=5), (8, 7, 3)),
    "short resnet": (nn.ResNet((4, 8), blocks=(0, 1), classes=5, strides=2), (9, 8, 1)),
    "transformer": (TRANSFORMER, (8,)),
    "gated transformer": (TRANSFORMER.clone(gated=True), (8,)),
}


def example(shape, batch=2):
    rng = np.random.default_rng(0)
    if len(shape) == 1:
        return rng.integers(0, 11, (batch, *shape), dtype=np.int32)
    return rng.standard_normal((batch, *shape)).astype(np.float32)


def start(model, key, x):
    """Fresh variables; compiled, since one compilation is cheaper than one an operation."""
    return jax.jit(model.init)(key, x)


def run(model, variables, x):
    return jax.jit(model.apply)(variables, x)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize("name", ["deep convnet", "simple", "transformer"])
def test_models_export_for_every_platform_with_a_symbolic_batch(name, key):
    model, shape = MODELS[name]
    x = example(shape)
    variables = start(model, key, x)
    (batch,) = export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((batch, *shape), x.dtype)
    exporter = export.export(jax.jit(model.apply), platforms=("cpu", "cuda", "tpu"))
    logits = exporter(variables, spec).call(variables, x)
    np.testing.assert_allclose(logits, run(model, variables, x), rtol=1e-4, atol=1e-5)
    one = run(model, variables, x[:1])
    np.testing.assert_allclose(logits[:1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_a_batch_by_heart(name, key):
    model, shape = MODELS[name]
    x = example(shape, batch=8)
    labels = x if len(shape) == 1 else np.arange(8) % 3
    variables = dict(start(model, key, x))
    params = variables.pop("params")
    tx = optax.sgd(0.05, momentum=0.9)

    def loss(params, variables, key):
        logits, variables = model.apply(
            {"params": params, **variables},
            x,
            train=True,
            mutable=list(variables),
            rngs={"dropout": key},
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), variables

    @jax.jit
    def step(carry, key):
        params, variables, opt_state = carry
        (value, variables), gradient = jax.value_and_grad(loss, has_aux=True)(
            params, variables, key
        )
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), variables, opt_state), value

    carry = (params, variables, tx.init(params))
    _, losses = jax.lax.scan(step, carry, jax.random.split(key, 60))
    assert losses[-1] < 0.5 * losses[0]


def test_convnet_has_these_parameters(key):
    variables = start(nn.ConvNet((4, 8), classes=5, hidden=6), key, example((8, 8, 1)))
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes["params"]["Conv_0"] == {"kernel": (3, 3, 1, 4)}
    assert shapes["params"]["Dense_0"] == {"kernel": (2 * 2 * 8, 6)}
    assert set(shapes["batch_stats"]) == {"BatchNorm_0", "BatchNorm_1", "BatchNorm_2"}
    assert count(variables) == 36 + 8 + 288 + 16 + 192 + 12 + 35


def test_convnet_statistics_follow_the_batch_only_in_training(key):
    model = nn.ConvNet((4,), classes=3, momentum=0.9)
    x = example((8, 8, 1), batch=16)
    variables = start(model, key, x)
    _, unchanged = jax.jit(lambda v: model.apply(v, x, mutable=["batch_stats"]))(variables)
    same = jax.tree.map(np.array_equal, unchanged["batch_stats"], variables["batch_stats"])
    assert jax.tree.all(same)
    train = jax.jit(lambda v: model.apply(v, x, train=True, mutable=["batch_stats"]))
    _, changed = train(variables)
    kernel = variables["params"]["Conv_0"]["kernel"]
    mean = np.asarray(nn.conv(x, kernel), np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(changed["batch_stats"]["BatchNorm_0"]["mean"], 0.1 * mean, atol=1e-6)


def test_convnet_statistics_over_devices_are_those_of_the_whole_batch(key):
    x = example((8, 8, 1), batch=16)
    alone, together = (nn.ConvNet((4,), classes=3, axis_name=name) for name in (None, "batch"))
    variables = start(alone, key, x)

    def train(model, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    logits, expected = jax.jit(lambda x: train(alone, x))(x)
    parts, changed = jax.pmap(lambda x: train(together, x), "batch")(x.reshape(8, 2, 8, 8, 1))
    np.testing.assert_allclose(parts.reshape(16, 3), logits, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(changed), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-5, atol=1e-6)


def test_resnet_20_has_the_parameters_of_the_paper_and_its_shortcuts(key):
    shapes = jax.eval_shape(nn.ResNet().init, key, jnp.zeros((1, 32, 32, 3)))
    convolutions = 432 + 6 * 2304 + 4608 + 5 * 9216 + 18_432 + 5 * 36_864
    norms, shortcuts = 2 * (7 * 16 + 6 * 32 + 6 * 64), 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert count(shapes) == convolutions + norms + shortcuts + 650
    blocks = shapes["params"]
    assert "shortcut" not in blocks["stage0_block0"] and "shortcut" in blocks["stage1_block0"]


def test_resnet_block_adds_what_came_in(key):
    """Against the same network written with plain operations, with running statistics."""
    model = nn.ResNet((4, 6), blocks=(1, 1), classes=3, strides=2)
    x = example((8, 9, 2))
    variables = start(model, key, x)
    rng = np.random.default_rng(1)
    random = {  # so that norms at the beginning are not the identity
        "params": jax.tree.map(
            lambda a: a + 0.3 * rng.random(a.shape, np.float32), variables["params"]
        ),
        "batch_stats": jax.tree.map(
            lambda a: a + rng.random(a.shape, np.float32), variables["batch_stats"]
        ),
    }
    params, stats = random["params"], random["batch_stats"]

    def normed(x, strides, *path):
        own, seen = params, stats
        for name in path:
            own, seen = own[name], seen[name]
        y = jax.lax.conv_general_dilated(
            x, own["conv"]["kernel"], (strides, strides), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        scale = own["norm"]["scale"] / np.sqrt(seen["norm"]["var"] + 1e-5)
        return (y - seen["norm"]["mean"][None, None, None]) * scale[None, None, None] + own["norm"][
            "bias"
        ][None, None, None]

    y = np.maximum(normed(x, 2, "stem"), 0)
    for block, strides in (("stage0_block0", 1), ("stage1_block0", 2)):
        inner = np.maximum(normed(y, strides, block, "first"), 0)
        inner = normed(inner, 1, block, "second")
        through = normed(y, strides, block, "shortcut") if "shortcut" in params[block] else y
        y = np.maximum(inner + through, 0)
    head = params["head"]
    expected = np.asarray(y).mean((1, 2)) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(run(model, random, x), expected, rtol=1e-4, atol=1e-5)


def test_resnet_wants_a_number_of_blocks_for_each_width(key):
    with pytest.raises(ValueError, match="one number of blocks, or one for each width"):
        start(nn.ResNet((4, 8), blocks=(1,)), key, example((8, 8, 1)))


def test_simple_cnn_is_the_classic(key):
    variables = start(nn.SimpleCNN(), key, example((32, 32, 3)))
    assert count(variables) == 448 + 4640 + 131_136 + 650
    assert jax.tree.map(jnp.shape, variables["params"]["Dense_0"]) == {
        "bias": (64,),
        "kernel": (2048, 64),
    }
    assert not np.any(variables["params"]["Conv_0"]["bias"])


def test_simple_cnn_equals_the_same_network_in_pytorch(key):
    torch = pytest.importorskip("torch")
    x = example((8, 8, 3), batch=4)
    model = nn.SimpleCNN(classes=3, initialization="torch")
    params = start(model, key, x)["params"]
    # Flattening is by height, width, channel here and by channel, height, width there.
    dense = np.asarray(params["Dense_0"]["kernel"]).reshape(2, 2, 32, 64).transpose(2, 0, 1, 3)
    weights = [
        np.asarray(params[name]["kernel"]).transpose(3, 2, 0, 1) for name in ("Conv_0", "Conv_1")
    ]
    weights += [dense.reshape(-1, 64).T, np.asarray(params["Dense_1"]["kernel"]).T]
    biases = [params[name]["bias"] for name in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")]
    y = torch.tensor(x.transpose(0, 3, 1, 2).copy())
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        weight, bias = torch.tensor(weight.copy()), torch.tensor(np.array(bias))
        if i < 2:
            y = torch.nn.functional.conv2d(y, weight, bias, padding=1).relu()
            y = torch.nn.functional.max_pool2d(y, 2)
        else:
            y = torch.nn.functional.linear(y.flatten(1), weight, bias)
            y = y.relu() if i == 2 else y
    np.testing.assert_allclose(run(model, {"params": params}, x), y.numpy(), rtol=1e-4, atol=1e-5)


def test_simple_cnn_starts_as_pytorch_does(key):
    model = nn.SimpleCNN(initialization="torch")
    params = start(model, key, example((32, 32, 3)))["params"]
    for name, fan_in in {"Conv_0": 27, "Conv_1": 144, "Dense_0": 2048, "Dense_1": 64}.items():
        bound = fan_in**-0.5
        kernel, bias = np.asarray(params[name]["kernel"]), np.asarray(params[name]["bias"])
        assert np.abs(kernel).max() <= bound and np.abs(bias).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.1)
        assert bias.std() > 0.2 * bound
    with pytest.raises(ValueError, match='`SimpleCNN\\(initialization="keras"\\)` expects'):
        start(nn.SimpleCNN(initialization="keras"), key, example((8, 8, 3)))  # pyright: ignore


def test_dropout_acts_in_training_only_and_by_its_key(key):
    model = nn.SimpleCNN()
    x = example((8, 8, 3))
    variables = start(model, key, x)

    @jax.jit
    def train(seed):
        return model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(seed)})

    assert np.array_equal(run(model, variables, x), run(model, variables, x))
    assert np.array_equal(train(1), train(1)) and not np.array_equal(train(1), train(2))


def test_transformer_stacks_its_layers_and_scans_them(key):
    tokens = example((8,))
    variables = start(TRANSFORMER, key, tokens)
    layers = variables["params"]["layers"]
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(layers))
    assert layers["up"]["kernel"].shape == (3, 16, 64)
    assert not np.array_equal(layers["query"]["kernel"][0], layers["query"]["kernel"][1])
    text = str(jax.make_jaxpr(TRANSFORMER.apply)(variables, tokens))
    assert text.count("scan[") == 1
    attention, perceptron = 4 * 16 * 16 + 16, 2 * 16 * 64 + 64 + 16
    norms, ends = 2 * 2 * 16, 11 * 16 + 8 * 16 + 2 * 16 + 16 * 11 + 11
    assert count(variables) == 3 * (attention + perceptron + norms) + ends


def test_transformer_is_causal(key):
    tokens = example((8,))
    variables = start(TRANSFORMER, key, tokens)
    logits = run(TRANSFORMER, variables, tokens)
    other = np.concatenate([tokens[:, :5], 10 - tokens[:, 5:]], axis=1)
    changed = run(TRANSFORMER, variables, other)
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], atol=1e-5)
    assert np.abs(changed[:, 5:] - logits[:, 5:]).max() > 1e-3
    shorter = run(TRANSFORMER, variables, tokens[:, :5])
    np.testing.assert_allclose(shorter, logits[:, :5], atol=1e-5)


def reference_transformer(params, tokens, heads):
    """The forward pass from the papers' formulas, in float64."""

    def norm(x, p):
        if "bias" not in p:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    batch, time = tokens.shape
    x = p["tokens"]["embedding"][tokens] + p["positions"][:time]
    for i in range(p["layers"]["query"]["kernel"].shape[0]):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"])
        h = norm(x, layer["attention_norm"])
        q, k, v = (
            dense(h, layer[n]).reshape(batch, time, heads, -1) for n in ("query", "key", "value")
        )
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(time, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
        x = x + dense(mixed.reshape(batch, time, -1), layer["out"])
        h = norm(x, layer["mlp_norm"])
        up = dense(h, layer["up"])
        if "gate" in layer:
            gate = dense(h, layer["gate"])
            h = gate / (1 + np.exp(-gate)) * up
        else:
            h = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + dense(h, layer["down"])
    return dense(norm(x, p["norm"]), p["head"])


@pytest.mark.parametrize("gated", [False, True])
def test_transformer_equals_its_formulas_in_float64(gated, key):
    tokens, model = example((8,)), TRANSFORMER.clone(gated=gated)
    variables = start(model, key, tokens)
    # Larger embeddings than it starts with, so that every part counts.
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), variables
    )
    expected = reference_transformer(variables["params"], tokens, model.heads)
    np.testing.assert_allclose(run(model, variables, tokens), expected, rtol=1e-3, atol=1e-4)


def test_gated_layers_have_no_biases_and_a_third_matrix(key):
    model = nn.CharTransformer(vocab=11, layers=2, width=16, heads=4, context=8, gated=True)
    params = start(model, key, example((8,)))["params"]
    assert not any(
        "bias" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    )
    shapes = {name: params["layers"][name]["kernel"].shape for name in ("gate", "up", "down")}
    assert shapes == {"gate": (2, 16, 48), "up": (2, 16, 48), "down": (2, 48, 16)}


def test_transformer_may_tie_its_embedding(key):
    tied = nn.CharTransformer(vocab=11, layers=1, width=16, heads=4, context=8, tied=True)
    variables = start(tied, key, example((8,)))
    assert "head" not in variables["params"]
    assert run(tied, variables, example((8,))).shape == (2, 8, 11)


def test_transformer_says_what_does_not_fit(key):
    with pytest.raises(ValueError, match="Choose a multiple of `heads`"):
        start(nn.CharTransformer(vocab=3, width=10, heads=4), key, jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(ValueError, match="`time` at most 8; got shape \\(1, 9\\)"):
        start(TRANSFORMER, key, jnp.zeros((1, 9), jnp.int32))


@pytest.mark.parametrize("name", ["convnet", "simple", "transformer"])
def test_models_run_on_quantized_kernels(name, key):
    model, shape = MODELS[name]
    x = example(shape)
    variables = start(model, key, x)
    policy = [("params/**/kernel", quant.Int(8))]
    quantized = jax.jit(lambda variables: quant.quantize(variables, policy))(variables)
    expected = jax.jit(lambda variables, x: model.apply(dense(variables), x))(quantized, x)
    logits = jax.jit(jopt.lift(model.apply))(quantized, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - run(model, variables, x)).max() > 0


def dense(tree):
    return jopt.trees.map_with_path(
        lambda _, leaf: leaf.materialise() if jopt.trees.is_typed(leaf) else leaf, tree
    )


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_swish_is_its_formula_with_a_learned_beta(key, beta):
    x = np.linspace(-4, 4, 9, dtype=np.float32)
    layer = nn.Swish(beta=beta)
    variables = start(layer, key, x)
    assert variables["params"]["beta"] == beta
    z = x.astype(np.float64)
    np.testing.assert_allclose(
        run(layer, variables, x), z / (1 + np.exp(-beta * z)), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(lambda v: jnp.sum(run(layer, v, x)))(variables)["params"]["beta"]
    sigmoid = 1 / (1 + np.exp(-beta * z))
    np.testing.assert_allclose(gradient, np.sum(z * z * sigmoid * (1 - sigmoid)), rtol=1e-5)
    assert layer.apply(variables, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    if beta == 1.0:
        np.testing.assert_allclose(run(layer, variables, x), jax.nn.silu(x), rtol=1e-5, atol=1e-6)
