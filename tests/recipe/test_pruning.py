"""What recipes prune by: the keys of each method, and stages that do what they say."""

import jax
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")
pytest.importorskip("sklearn")

from jopt import recipe, trees

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
    run(tmp_path, ("through", "dense", 0.3, "straight_through", taught))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("random", ""),
        ("movement", ", scope: layer"),
        ("taylor", ", scope: uniform"),
        ("snip", ""),
        ("fisher", ", pattern: {block: [1, 4]}"),
        ("ac_dc", ", end: 0.8, scope: erk"),
        ("set", ", every: 3"),
        ("static", ", pattern: {channel: -1}, scope: layer"),
        ("straight_through", ""),
        ("sparsegpt", ", calibration_batches: 2, block_size: 64"),
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
        ("wanda", ", damping: 0.1", r"`damping` is for sparsegpt, not for `wanda`"),
        ("wanda", ", scope: global", r"`wanda` settles each layer by itself"),
        ("top_kast", ", backward: 0.9", r"`backward` \(0.9\) is at most `target` \(0.75\)"),
        ("magic", "", r"Input should be 'magnitude', 'random'"),
        ("magnitude", ", pattern: {channel: 0}", r"channel.*less than 0"),
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
