"""One training stage: the loss, the chain, the step, and the loop over device-resident data."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt import distill, prune, quant, train
from jopt.recipe import _pruning as pruning
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._model import Model, inference, training
from jopt.recipe._task import Task

PyTree = Any
LOGGED = 10  # steps from one line of metrics to the next


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stage keeps its files, and how it shows what it does."""

    folder: pathlib.Path
    title: str
    seed: int
    progress: bool


def fit(config: schema.Fit, model: Model, teacher: Model | None, task: Task, place: Place) -> Model:
    """Trains `model` as the stage says, going on from its newest checkpoint."""
    feed = train.Feed(
        task.train,
        config.batch_size,
        seed=place.seed,
        transform=task.transform(tables.augmentation(config.augment)),
    )
    steps = round(config.epochs * feed.steps_per_epoch)
    tx = chain(config, model, task, epoch=feed.steps_per_epoch, steps=steps, seed=place.seed)
    step = train.make_step(_loss(config, model, teacher, task), tx)
    key = jax.random.key(place.seed)
    state = train.init(model.params, tx, collections=model.collections, key=key)
    log = train.MetricLog(place.folder, every=LOGGED, tensorboard=True)
    state, _ = train.fit(
        step,
        state,
        feed,
        steps=steps,
        checkpoints=train.Checkpoints(place.folder / "checkpoints"),
        log=log,
        progress=train.Progress(place.title) if place.progress else None,
    )
    model = dataclasses.replace(model, params=state.params, collections=state.collections)
    return pruning.finished(config.sparsity, model, state.opt_state)


def chain(
    config: schema.Fit, model: Model, task: Task, *, epoch: float, steps: int, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Optimizer, then what keeps ranges still and pruned weights zero, in that order; pruning."""
    links: list[optax.GradientTransformation] = [
        tables.optimizer(config.optimizer, epoch=epoch, steps=steps)
    ]
    frozen = jax.tree.map(lambda leaf: not leaf, quant.trainable(model.params))
    if any(jax.tree.leaves(frozen)):
        links.append(optax.transforms.freeze(frozen))
    if model.masks is not None:
        links.append(prune.hold(model.masks))
    if config.sparsity is None:
        return optax.chain(*links)
    key = jax.random.key(seed)
    return pruning.chained(config.sparsity, links, model, task, epoch=epoch, steps=steps, key=key)


def _loss(
    config: schema.Fit, model: Model, teacher: Model | None, task: Task
) -> Callable[..., tuple[jax.Array, train.Aux]]:
    """Cross-entropy, mixed with the teacher's soft labels where the stage distills."""
    forward = training(model.module)
    soft = config.distill

    def loss(
        params: PyTree, batch: dict[str, jax.Array], *, collections: PyTree, key: jax.Array
    ) -> tuple[jax.Array, train.Aux]:
        inputs, labels = task.examples(batch)
        params, penalty = pruning.forward(config.sparsity, params)
        logits, collections = forward(params, collections, inputs, key)
        logits = logits.astype(jnp.float32)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        if soft is not None and teacher is not None:
            target = inference(teacher.module)(teacher.variables, inputs)
            kd = distill.kd(logits, target, temperature=soft.temperature)
            value = (1 - soft.weight) * value + soft.weight * kd
        accuracy = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
        return value + penalty, train.Aux(collections=collections, metrics={"accuracy": accuracy})

    return loss
