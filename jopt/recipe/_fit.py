"""One training stage: the loss, the chain, the step, and the loop over device-resident data."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jopt import distill, prune, quant, train
from jopt.recipe import _pruning as pruning
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._distilling import Lesson
from jopt.recipe._model import Model, training
from jopt.recipe._task import Task
from jopt.trace import Site

PyTree = Any
LOGGED = 10  # steps from one line of metrics to the next


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stage keeps its files, and how it shows what it does."""

    folder: pathlib.Path
    title: str
    seed: int
    progress: bool


def fit(
    config: schema.Fit, model: Model, teachers: Sequence[Model], task: Task, place: Place
) -> Model:
    """Trains `model` as the stage says, going on from its newest checkpoint."""
    lesson = _lesson(config, model, teachers, task)
    feed = train.Feed(
        task.train if lesson is None else lesson.arrays(),
        config.batch_size,
        seed=place.seed,
        transform=task.transform(tables.augmentation(config.augment)),
    )
    steps = stage_steps(config, task)
    tx = chain(config, model, task, epoch=feed.steps_per_epoch, steps=steps, seed=place.seed)
    sites = () if config.sparsity is None else pruning.sites_of(model, task)
    loss, params, collections = _loss(config, model, task, sites), model.params, model.collections
    key = jax.random.key(place.seed)
    if lesson is not None:
        rule = tables.optimizer(config.optimizer, epoch=feed.steps_per_epoch, steps=steps)
        tx, loss = lesson.chain(tx, rule), _taught(config, lesson, sites)
        params, collections = lesson.begin(params, collections, jax.random.fold_in(key, 1))
    state, _ = train.fit(
        train.make_step(loss, tx),
        train.init(params, tx, collections=collections, key=key),
        feed,
        steps=steps,
        checkpoints=train.Checkpoints(place.folder / "checkpoints"),
        log=train.MetricLog(place.folder, every=LOGGED, tensorboard=True),
        progress=train.Progress(place.title) if place.progress else None,
    )
    state = state if lesson is None else lesson.finish(state)
    model = dataclasses.replace(model, params=state.params, collections=state.collections)
    model = pruning.settled(config.regularize, model)
    return pruning.finished(config.sparsity, model, state.opt_state, sites)


def stage_steps(config: schema.Fit, task: Task) -> int:
    """The steps of a stage."""
    return round(config.epochs * (task.train_size // config.batch_size))


def check_lesson(config: schema.Fit, model: Model, teachers: Sequence[Model], task: Task) -> None:
    """Says what of a distilling stage cannot work; models may be of shapes alone."""
    lesson = _lesson(config, model, teachers, task)
    if lesson is not None:
        lesson.check()


def chain(
    config: schema.Fit, model: Model, task: Task, *, epoch: float, steps: int, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Optimizer, penalties and what keeps ranges still, in order; around them masks and pruning.

    So pruned weights count in no norm of gradients that is clipped, and in no moment.
    """
    links: list[optax.GradientTransformation] = [
        tables.optimizer(config.optimizer, epoch=epoch, steps=steps),
        *(
            tables.regularizer(penalty, config.optimizer, epoch=epoch, steps=steps)
            for penalty in config.regularize
        ),
    ]
    frozen = jax.tree.map(lambda leaf: not leaf, quant.trainable(model.params))
    if any(jax.tree.leaves(frozen)):
        links.append(optax.transforms.freeze(frozen))
    if model.masks is not None:
        links = [prune.hold(model.masks, inner=optax.chain(*links))]
    if config.sparsity is None:
        return optax.chain(*links)
    key = jax.random.key(seed)
    return pruning.chained(config.sparsity, links, model, task, epoch=epoch, steps=steps, key=key)


def _lesson(
    config: schema.Fit, model: Model, teachers: Sequence[Model], task: Task
) -> Lesson | None:
    if config.distill is None:
        return None
    return Lesson(
        config.distill,
        model,
        tuple(teachers),
        task,
        steps=stage_steps(config, task),
        batch_size=config.batch_size,
        smoothing=config.smoothing,
    )


def _taught(
    config: schema.Fit, lesson: Lesson, sites: Sequence[Site]
) -> Callable[..., tuple[jax.Array, train.Aux]]:
    """The loss of a lesson, on what the student's pruning lets it see."""
    variables = lesson.variables()

    def loss(params: PyTree, *args: Any, **kwargs: Any) -> tuple[jax.Array, train.Aux]:
        student, penalty = pruning.forward(config.sparsity, params["model"], sites)
        value, aux = lesson.loss(variables, {**params, "model": student}, *args, **kwargs)
        return value + penalty, aux

    return loss


def _loss(
    config: schema.Fit, model: Model, task: Task, sites: Sequence[Site]
) -> Callable[..., tuple[jax.Array, train.Aux]]:
    """Cross-entropy."""
    forward = training(model.module)

    def loss(
        params: PyTree, batch: dict[str, jax.Array], *, collections: PyTree, key: jax.Array
    ) -> tuple[jax.Array, train.Aux]:
        inputs, labels = task.examples(batch)
        params, penalty = pruning.forward(config.sparsity, params, sites)
        logits, collections = forward(params, collections, inputs, key)
        logits = logits.astype(jnp.float32)
        value = distill.hard(logits, labels, smoothing=config.smoothing)
        accuracy = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
        return value + penalty, train.Aux(collections=collections, metrics={"accuracy": accuracy})

    return loss
