"""What recipes prune by: the keys of each method, and stages that do what they say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

import jopt
from jopt import nn, prune, recipe, trees
from jopt.recipe import _fit, _pruning, _schema, _tables
from jopt.recipe._model import initialise

leaves = jax.tree.leaves

RECIPE = """\
name: sparse
data: {kind: digits}
stages:
  - stage: train
    name: dense
    model: {kind: convnet, widths: [8]}
    epochs: 1
    batch_size: 32
    optimizer: {kind: adam, learning_rate: 0.01}
"""

STAGE = """\
  - stage: sparsify
    name: %s
    start: %s
    epochs: %s
    sparsity: {method: %s, target: 0.75%s}
"""


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's own Adam needs it: it raises a float to an integer power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(tmp_path, *stages):
    path = tmp_path / "sparse.yaml"
    path.write_text(RECIPE + "".join(STAGE % stage for stage in stages))
    return recipe.load(path)


def share(model):
    kernels = [np.asarray(w) for path, w in trees.items(model.params) if path.endswith("kernel")]
    return sum((w == 0).sum() for w in kernels) / sum(w.size for w in kernels)


def run(tmp_path, *stages):
    models = recipe.run(load(tmp_path, *stages), tmp_path / "out", quiet=True).models
    for name, *_ in stages:
        masks = dict(trees.items(models[name].masks))
        for path, w in trees.items(models[name].params):
            if np.ndim(masks[path]):
                assert not np.asarray(w)[~np.asarray(masks[path])].any()
        assert share(models[name]) == pytest.approx(0.75, abs=5e-3)
    return models


def test_before_around_and_in_the_loss(tmp_path):
    models = run(
        tmp_path,
        ("wanda", "dense", 0, "wanda", ", calibration_batches: 2"),
        ("rigl", "dense", 0.3, "rigl", ", every: 3"),
        ("top", "dense", 0.3, "top_kast", ", backward: 0.5"),
        ("tuned", "wanda", 0.3, "magnitude", ", every: 2"),
    )
    masks = [dict(trees.items(models[name].masks)) for name in ("wanda", "tuned")]
    for path, mask in masks[0].items():  # what was pruned on data stays so
        assert not (masks[1][path] & ~mask).any()


def test_in_the_loss_of_a_lesson(tmp_path):
    taught = "}\n    distill: {teacher: dense"
    found = run(tmp_path, ("through", "dense", 0.3, "straight_through", taught))["through"]
    assert share(found) > 0.7  # zeros of the weights themselves, not of the loss alone


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", ""),
        ("movement", ", scope: layer"),
        ("taylor", ", scope: layer"),
        ("snip", ""),
        ("fisher", ", pattern: {block: [1, 4]}"),
        ("ac_dc", ", end: 0.8, scope: erk"),
        ("set", ", every: 3"),
        ("static", ", pattern: {channel: -1}, scope: layer"),
        ("magnitude", ", pattern: {tree: [{channel: -1}, {block: [1, 4]}, unstructured]}"),
        ("straight_through", ""),
        ("sparsegpt", ", calibration_batches: 2, block_size: 64"),
        ("least_squares", ", calibration_batches: 2, pattern: {block: [1, 2]}"),
    ],
)
def test_every_method(tmp_path, method, options):
    config = load(tmp_path, ("sparse", "dense", 0.5, method, options))
    model = recipe.run(config, tmp_path / "out", quiet=True).models["sparse"]
    assert model.masks is not None
    found = share(model)
    # Blocks, channels and dense ends leave the count of weights to what fits.
    assert found == pytest.approx(0.75, abs=0.15 if ":" in options and "scope" in options else 0.03)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("static", ", every: 3", r"`every` is for magnitude, .*, not for `static`"),
        ("magnitude", ", drop: 0.1", r"`drop` is for rigl, set, not for `magnitude`"),
        ("wanda", ", damping: 0.1", r"`damping` is for sparsegpt, least_squares, not for `wanda`"),
        ("wanda", ", scope: global", r"`wanda` settles each layer by itself"),
        ("top_kast", ", backward: 0.9", r"`backward` \(0.9\) is at most `target` \(0.75\)"),
        ("magic", "", r"Input should be 'magnitude', 'random'"),
        ("magnitude", ", pattern: {channel: 0}", r"channel.*less than 0"),
        ("wanda", ", pattern: {block: [4, 4]}", r"`wanda` takes `unstructured` and n:m patterns"),
        ("magnitude", ", unfit: leave", r"'error' or 'skip'"),
        ("magnitude", ", pattern: {tree: [unstructured]}", r"tree.*at least 2 items"),
        ("magnitude", ", pattern: {tree: [{n: 2, m: 4}, unstructured]}", r"the last level"),
        ("magnitude", ", pattern: {tree: [{channel: -1}, unstructured], parts: [1]}", r"2 levels"),
        ("rigl", ", pattern: {tree: [{channel: -1}, unstructured]}", r"whole units: no tree"),
    ],
)
def test_keys_belong_to_methods(tmp_path, method, options, words):
    with pytest.raises(recipe.RecipeError, match=words):
        load(tmp_path, ("sparse", "dense", 1, method, options))


def test_what_looks_at_data_needs_a_trained_model(tmp_path):
    path = tmp_path / "sparse.yaml"
    path.write_text(RECIPE + "    sparsity: {method: wanda, target: 0.5}\n")
    with pytest.raises(recipe.RecipeError, match=r"an earlier stage has trained"):
        recipe.load(path)


def test_a_default_written_out_is_no_mistake(tmp_path):
    config = load(tmp_path, ("sparse", "dense", 1, "rigl", ""))
    assert recipe.Recipe.model_validate(config.model_dump(mode="json")) == config


HALF = """\
  - stage: sparsify
    name: sparse
    epochs: %s
    sparsity: {method: %s, pattern: {n: 2, m: 4}%s}
"""


def half(tmp_path, *stage):
    path = tmp_path / "half.yaml"
    path.write_text(RECIPE + HALF % stage)
    return recipe.load(path)


@pytest.mark.parametrize(
    ("epochs", "method"),
    [(0, "wanda"), (0, "sparsegpt"), (1, "straight_through"), (1, "top_kast"), (1, "magnitude")],
)
def test_what_does_not_fit_is_said_before_anything_runs(tmp_path, epochs, method):
    config = half(tmp_path, epochs, method, "")
    with pytest.raises(recipe.RecipeError, match=r"stage `sparse`(.|\n)*\d inputs \(axis"):
        recipe.run(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_nm_pattern_waits_for_begin():
    config = _schema.Sparsity(method="movement", pattern={"n": 2, "m": 4}, begin=0.3, where="w")
    how = {**_pruning._options(config), "sites": None}
    key = jax.random.key(0)
    tx = _pruning._scheduled(config, [optax.sgd(0.1)], how, epoch=5.0, steps=10, key=key)
    params = {"w": jax.random.normal(key, (8, 4))}
    state, moved, zeros = tx.init(params), jnp.zeros((8, 4)), []
    for step in range(5):
        grads = {"w": jnp.sin(params["w"] + step)}
        if step <= 3:
            moved -= params["w"] * grads["w"]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        zeros.append(int(jnp.sum(params["w"] == 0)))
    assert zeros == [0, 0, 0, 16, 16]
    best = prune.masks({"w": moved}, 0.5, score=prune.Score(lambda _, p: p), pattern=prune.NM(2, 4))
    np.testing.assert_array_equal(params["w"] != 0, best["w"])


def test_what_does_not_fit_may_stay_dense(tmp_path):
    for stage in ((0, "wanda"), (0.3, "straight_through")):
        config = half(tmp_path, *stage, ", unfit: skip")
        out = tmp_path / stage[1]
        model = recipe.run(config, out, quiet=True).models["sparse"]
        rows = {path: np.asarray(w) for path, w in trees.items(model.params)}
        shares = {p: np.mean(w == 0) for p, w in rows.items() if p.endswith("kernel")}
        first = next(path for path in shares if rows[path].shape[-2] == 1)
        assert shares.pop(first) == 0 and set(shares.values()) == {0.5}


@pytest.mark.parametrize("method", ["straight_through", "top_kast", "taylor"])
def test_uniform_leaves_the_ends_dense(tmp_path, method):
    load(tmp_path, ("sparse", "dense", 0.3, method, ", scope: uniform"))
    config = recipe.load(tmp_path / "sparse.yaml", ["stages.dense.model.widths=[4, 8]"])
    model = recipe.run(config, tmp_path / "out", quiet=True).models["sparse"]
    rows = [np.asarray(w) for path, w in trees.items(model.params) if path.endswith("kernel")]
    assert [float(np.mean(w == 0)) for w in rows] == [0, 0.75, 0]


def test_scopes_of_the_loss_know_of_stacked_layers():
    """As `magnitude` in the same recipe: layers that one leaf stacks count one by one."""
    module = nn.CharTransformer(vocab=65, context=16, width=32, layers=4, heads=4)
    tokens = np.zeros((1, 16), np.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    drawn = [jax.random.normal(jax.random.key(i), s.shape) for i, s in enumerate(leaves(params))]
    params = jax.tree.unflatten(jax.tree.structure(params), drawn)
    sites = jopt.sites(lambda p, t: module.apply({"params": p}, t), params, tokens)
    want = prune.masks(params, 0.8, scope="erk", where="**/kernel", sites=sites)
    for method in ("straight_through", "top_kast"):
        config = _schema.Sparsity(method=method, target=0.8, scope="erk")
        found = jax.jit(lambda p, config=config: _pruning.forward(config, p, sites)[0])(params)
        for (path, w), mask in zip(trees.items(found), leaves(want), strict=True):
            if path.endswith("kernel"):
                np.testing.assert_array_equal(w != 0, mask)


def test_moves_of_a_short_stage(tmp_path):
    """`every` is at most a tenth of the stage, as it is for scores."""
    config = load(tmp_path, ("sparse", "dense", 0.5, "rigl", ", every: 1000"))
    model = recipe.run(config, tmp_path / "out", quiet=True).models["sparse"]
    still = load(tmp_path, ("sparse", "dense", 0.5, "rigl", ", every: 1000, drop: 0.0"))
    other = recipe.run(still, tmp_path / "still", quiet=True).models["sparse"]
    pairs = zip(leaves(model.masks), leaves(other.masks), strict=True)
    assert any(bool((one != two).any()) for one, two in pairs)


PENALTY = """\
  - stage: train
    name: %s
    start: %s
    epochs: %s
    optimizer: {kind: sgd, learning_rate: 0.05}
    regularize: [%s]
"""


def test_penalties_land_on_zeros_that_stay(tmp_path):
    path = tmp_path / "penalized.yaml"
    int8 = "  - {stage: quantize, start: tuned, epochs: 0.2, policy: [{weight: {bits: 8}}],\n"
    int8 += "     regularize: [{strength: 0.01}]}\n"
    path.write_text(
        RECIPE
        + PENALTY % ("ones", "dense", 1, "{strength: 0.02}")
        + PENALTY % ("channels", "dense", 1, "{kind: group_lasso, strength: 0.15, axis: -2}")
        + PENALTY % ("tuned", "ones", 0.2, "{kind: nuclear_norm, strength: 1e-4, every: 5}")
        + int8
        + "  - {stage: export, start: tuned, pack: bits}\n"
    )
    config = recipe.load(path)
    assert recipe.Recipe.model_validate(config.model_dump(mode="json")) == config
    result = recipe.run(config, tmp_path / "out", quiet=True)
    models = result.models
    assert share(models["dense"]) == 0 < share(models["ones"]) <= share(models["tuned"])
    before, after = (dict(trees.items(models[name].params)) for name in ("ones", "tuned"))
    for name, weight in before.items():
        if name.endswith("kernel"):
            assert not np.asarray(after[name])[np.asarray(weight) == 0].any()
            small = np.asarray(dict(trees.items(models["quantize"].params))[name].materialise())
            assert not small[np.asarray(weight) == 0].any()
    kernels = [w for n, w in trees.items(models["channels"].params) if n.endswith("kernel")]
    gone = [
        np.asarray((w == 0).all(axis=tuple(i for i in range(w.ndim) if i != w.ndim - 2)))
        for w in kernels
    ]
    assert any(each.any() and not each.all() for each in gone)
    loaded = jopt.artifact.load(tmp_path / "out" / "artifact")
    text = str(loaded)
    assert "BitSparse" in text


def test_penalties_in_the_chain_are_those_of_optim():
    """One step of the recipe's chain, against soft thresholding in float64."""
    rule = _schema.Optimizer(kind="sgd", learning_rate=0.5)
    penalty = _schema.Regularizer(strength=0.25, where="kernel")
    w, g = np.array([[1.0, -0.1, 0.05]], np.float32), np.array([[0.5, 0.5, -0.5]], np.float32)
    tx = optax.chain(
        _tables.optimizer(rule, epoch=1, steps=1),
        _tables.regularizer(penalty, rule, epoch=1, steps=1),
    )
    params = {"kernel": w, "bias": w}
    updates, _ = tx.update({"kernel": g, "bias": g}, tx.init(params), params)
    found = optax.apply_updates(params, updates)
    z = w.astype(np.float64) - 0.5 * g
    np.testing.assert_allclose(found["bias"], z, rtol=1e-6)
    np.testing.assert_allclose(
        found["kernel"], np.sign(z) * np.maximum(abs(z) - 0.125, 0), rtol=1e-6
    )


@pytest.mark.parametrize("earlier", [True, False], ids=["earlier masks", "own masks"])
def test_pruned_weights_count_in_no_clipped_norm(tmp_path, earlier):
    """The dense weight's step is as if the pruned one had no gradient."""
    path = tmp_path / "clipped.yaml"
    kind = "quantize" if earlier else "sparsify"
    how = "sparsity: {target: 0.5, begin: 0}"
    if earlier:
        how = "policy: [{where: '**/kernel', weight: {bits: 8}}]"
    path.write_text(
        RECIPE
        + f"""\
  - stage: {kind}
    name: clipped
    start: dense
    epochs: 1
    optimizer: {{kind: sgd, learning_rate: 1.0, clip: 1.0}}
    {how}
"""
    )
    config = recipe.load(path)
    task = _tables.task(config.data, None)
    model = initialise(nn.ConvNet(widths=(8,), classes=10), task.inputs, jax.random.key(0))
    if earlier:
        masks = prune.masks(model.params, 0.5, where="**/kernel")
        model = dataclasses.replace(model, masks=masks)
    tx = _fit.chain(config.stages[-1], model, task, epoch=4, steps=4)
    state = tx.init(model.params)
    for _ in range(4):
        masks = dict(trees.items(prune.masks_of(state)))
        gradient = trees.map_with_path(
            lambda path, w, masks=masks: jnp.where(masks[path], 1e-4, 1e3) * jnp.ones_like(w),
            model.params,
        )
        updates, state = tx.update(gradient, state, model.params)
    masks = dict(trees.items(prune.masks_of(state)))  # with what this step pruned
    for path, update in trees.items(updates):
        mask = np.broadcast_to(masks[path], update.shape)
        np.testing.assert_allclose(np.asarray(update)[mask], -1e-4, rtol=1e-5)
    kernels = [mask for path, mask in masks.items() if path.endswith("kernel")]
    assert 0.4 < 1 - sum(m.sum() for m in kernels) / sum(m.size for m in kernels) < 0.6


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ("{strength: 0.1, axis: -2}", "`axis` is for kind `group_lasso`, not `l1`"),
        ("{kind: group_lasso, strength: 0.1, every: 2}", "`every` is for kind `nuclear_norm`"),
        ("{strength: 0}", "greater than 0"),
        ("{strength: 0.1, where: '**/nothing'}", "nothing"),
    ],
)
def test_penalties_that_make_no_sense(tmp_path, block, words):
    path = tmp_path / "penalized.yaml"
    path.write_text(RECIPE + PENALTY % ("more", "dense", 1, block))
    with pytest.raises(recipe.RecipeError, match=words):
        recipe.run(recipe.load(path), tmp_path / "out", quiet=True)
    path.write_text(RECIPE + PENALTY % ("more", "dense", 0, "{strength: 0.1}"))
    with pytest.raises(recipe.RecipeError, match="neither prune, regularize nor distill"):
        recipe.load(path)


def test_what_does_not_pack_is_noted(tmp_path):
    path = tmp_path / "packed.yaml"
    path.write_text(RECIPE + "  - {stage: export, pack: nm24}\n")
    recipe.run(recipe.load(path), tmp_path / "out", quiet=True)
    record = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]["export"]
    assert any("kernel` is not packed: " in note for note in record["notes"])


def test_least_squares_is_that_of_prune(tmp_path):
    config = load(tmp_path, ("fitted", "dense", 0, "least_squares", ", calibration_batches: 2"))
    found = recipe.run(config, tmp_path / "out", quiet=True).models
    dense, fitted = found["dense"], found["fitted"]
    task = _tables.task(config.data, None)

    def apply(params, inputs):
        return dense.module.apply({"params": params, **dense.collections}, inputs)

    masks = prune.masks(dense.params, 0.75, scope="layer", where="**/kernel")
    batches = task.train_inputs(2, config.stages[1].batch_size)
    wanted = prune.reconstruct(apply, dense.params, batches, masks)
    for (path, one), (_, other) in zip(
        trees.items(fitted.params), trees.items(wanted), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=path)


TICKET = """\
  - {stage: sparsify, name: found, epochs: 1, sparsity: {target: 0.75}}
  - {stage: train, name: begun, rewind: dense, epochs: 0}
  - {stage: train, name: ticket, start: found, rewind: dense, epochs: 0.3}
"""


def test_tickets_go_back_to_earlier_weights(tmp_path):
    path = tmp_path / "ticket.yaml"
    path.write_text(RECIPE + TICKET)
    models = recipe.run(recipe.load(path), tmp_path / "out", quiet=True).models
    dense, found = (dict(trees.items(models[name].params)) for name in ("dense", "found"))
    masks = dict(trees.items(models["found"].masks))
    for path, w in trees.items(models["begun"].params):
        np.testing.assert_array_equal(w, np.where(masks[path], dense[path], 0))
        assert np.asarray(found[path] != dense[path]).any()
    assert share(models["ticket"]) == pytest.approx(0.75, abs=5e-3)
    for path, w in trees.items(models["ticket"].params):
        assert not np.asarray(w)[~np.broadcast_to(masks[path], w.shape)].any()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{stage: train, rewind: nobody}", "`rewind: nobody` in stage `train` is not an earlier"),
        ("{stage: train, rewind: dense}", "`dense` is not pruned, so there are no masks"),
        (
            "{stage: train, name: other, model: {kind: convnet}, rewind: dense}",
            "there is nothing to `rewind`",
        ),
        (
            "{stage: train, name: other, model: {kind: convnet}}\n"
            "  - {stage: sparsify, sparsity: {target: 0.5}}\n"
            "  - {stage: train, rewind: dense}",
            "`rewind: dense` in stage `train` is another network than `sparsify`",
        ),
        (
            "{stage: sparsify, sparsity: {target: 0.5}}\n"
            "  - {stage: quantize, policy: [{weight: {bits: 8}}]}\n"
            "  - {stage: reconstruct, rewind: dense}",
            "integers do not train; rewind before `quantize`",
        ),
        ("{stage: train, rewind: ''}", "at least 1 character"),
        (
            "{stage: sparsify, sparsity: {target: 0.5}}\n"
            "  - {stage: train, rewind: dense}\n"
            "  - {stage: reconstruct}",
            "its line goes back to earlier weights: name the `teacher`",
        ),
    ],
)
def test_tickets_that_make_no_sense(tmp_path, stage, words):
    path = tmp_path / "ticket.yaml"
    path.write_text(RECIPE + f"  - {stage}\n")
    with pytest.raises(recipe.RecipeError, match=words):
        config = recipe.load(path)
        recipe.run(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_least_squares_leaves_alone_what_it_was_not_given(tmp_path):
    first = "\n  - {stage: sparsify, name: scales, sparsity: {target: 0.5, where: '**/scale'}}\n"
    last = "{method: least_squares, target: 0.5, calibration_batches: 2}"
    path = tmp_path / "both.yaml"
    text = RECIPE + first + f"  - {{stage: sparsify, name: last, epochs: 0, sparsity: {last}}}\n"
    path.write_text(text)
    models = recipe.run(recipe.load(path), tmp_path / "out", quiet=True).models
    before, after = (dict(trees.items(models[name].params)) for name in ("scales", "last"))
    scales = [path for path in after if path.endswith("scale")]
    assert scales
    for path in scales:
        np.testing.assert_array_equal(after[path], before[path])
        assert not np.asarray(after[path]).all()
    assert share(models["last"]) == pytest.approx(0.5, abs=5e-3)


def test_what_looks_at_data_prunes_before_integers(tmp_path):
    path = tmp_path / "late.yaml"
    quantized = "  - {stage: quantize, policy: [{weight: {bits: 8}}]}\n"
    late = "{method: wanda, target: 0.5}"
    path.write_text(RECIPE + quantized + f"  - {{stage: reconstruct, sparsity: {late}}}\n")
    with pytest.raises(recipe.RecipeError, match="prune before the `quantize` stage"):
        recipe.run(recipe.load(path), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
