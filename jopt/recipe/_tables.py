"""From the names that recipes use to functions: data sets, models, schedules, optimizers, formats.

The one place where a string stands for code. A new kind is a block in `_schema` and a case here.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from jopt import data, nn, optim, quant, schedules, trees
from jopt.recipe import _schema as schema
from jopt.recipe._task import Task


def task(config: schema.Data, data_dir: pathlib.Path | None) -> Task:
    """Loads the data set that a recipe names."""
    match config:
        case schema.Digits():
            return Task.images(_held_out(data.digits(), config.validation), scale=None)
        case schema.Cifar10():
            dataset = data.cifar10(data_dir)
            if config.train_examples is not None:
                dataset = dataset.take(config.train_examples)
            dataset = _held_out(dataset, config.validation)
            return Task.images(dataset, scale=(data.CIFAR10_MEAN, data.CIFAR10_STD))
        case schema.Text():
            return Task.text(data.text(config.file, data_dir), context=config.context)


def _held_out(dataset: data.Dataset, count: int) -> data.Dataset:
    return dataset.hold_out(count) if count else dataset


def module(config: schema.Model, task: Task) -> Any:
    """The linen module that a recipe names, sized for the task."""
    match config:
        case schema.ConvNet():
            return nn.ConvNet(
                widths=config.widths,
                classes=task.classes,
                depth=config.depth,
                hidden=config.hidden,
                dropout=config.dropout,
            )
        case schema.SimpleCNN():
            return nn.SimpleCNN(
                classes=task.classes, dropout=config.dropout, initialization=config.initialization
            )
        case schema.CharTransformer():
            return nn.CharTransformer(
                vocab=task.classes,
                layers=config.layers,
                width=config.width,
                heads=config.heads,
                context=task.inputs.shape[-1],
                dropout=config.dropout,
                gated=config.gated,
            )


def learning_rate(
    config: schema.LearningRate | float, *, epoch: float, steps: int
) -> float | optax.Schedule:
    """The schedule in steps: `epoch` is the steps in one epoch, `steps` those of the stage."""
    match config:
        case schema.Constant():
            return config.value
        case schema.Cosine():
            warmup = round(config.warmup * steps)
            return optax.warmup_cosine_decay_schedule(
                init_value=config.peak if warmup == 0 else 0.0,
                peak_value=config.peak,
                warmup_steps=warmup,
                decay_steps=max(steps, warmup + 1),
                end_value=config.peak * config.end,
            )
        case schema.Multistep():
            milestones = [round(milestone * epoch) for milestone in config.milestones]
            return schedules.multistep(config.init, milestones, config.gamma)
        case schema.Exponential():
            return optax.exponential_decay(
                config.init,
                transition_steps=max(1, round(config.every * epoch)),
                decay_rate=config.rate,
                staircase=config.staircase,
            )
        case schema.Natural():
            return schedules.natural_decay(config.init, config.decay / epoch)
        case schema.WarmupStableDecay():
            return schedules.warmup_stable_decay(
                config.peak,
                steps,
                warmup=round(config.warmup * steps),
                decay=round(config.decay * steps),
                shape=config.shape,
            )
        case _:
            return float(config)


def optimizer(
    config: schema.Optimizer, *, epoch: float, steps: int
) -> optax.GradientTransformationExtraArgs:
    """The gradient transformation that a recipe describes."""
    rate = learning_rate(config.learning_rate, epoch=epoch, steps=steps)
    decay = config.weight_decay
    match config.kind:
        case "sgd":
            rule = optax.sgd(rate, momentum=config.momentum or None, nesterov=config.nesterov)
        case "adam":
            rule = optax.adam(rate)
        case "adagrad":
            rule = optax.adagrad(rate)
        case "adamw":
            rule = optax.adamw(rate, weight_decay=decay, mask=_matrices)
        case "lion":
            rule = optax.lion(rate, weight_decay=decay, mask=_matrices)
    links = [] if config.clip is None else [optax.clip_by_global_norm(config.clip)]
    if decay and config.kind in ("sgd", "adam", "adagrad"):
        links.append(optax.add_decayed_weights(decay, mask=_matrices))
    return optax.chain(*links, rule)


def regularizer(
    config: schema.Regularizer, rule: schema.Optimizer, *, epoch: float, steps: int
) -> optax.GradientTransformation:
    """The proximal step behind the optimizer `rule`, whose learning rate scales it."""
    rate = learning_rate(rule.learning_rate, epoch=epoch, steps=steps)
    where = listed(config.where)
    match config.kind:
        case "l1":
            return optim.proximal_l1(config.strength, rate, where=where)
        case "group_lasso":
            axis = config.axis
            return optim.proximal_group_lasso(config.strength, rate, axis=axis, where=where)
        case "nuclear_norm":
            every = config.every
            return optim.proximal_nuclear_norm(config.strength, rate, every=every, where=where)


def policy(rules: tuple[schema.Rule, ...]) -> list[tuple[Any, quant.Spec | None]]:
    """The quantization policy that a recipe writes as rules."""
    return [(listed(rule.where), _spec(rule)) for rule in rules]


def augmentation(config: schema.Augment) -> Callable[[Any, jax.Array], Any] | None:
    """Random changes of a batch of images inside the step, or `None` where there are none."""
    if not config.shift and not config.flip:
        return None

    def transform(batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        images = batch["inputs"]
        shift_key, flip_key = jax.random.split(key)
        if config.shift:
            images = data.random_shift(images, shift_key, config.shift)
        if config.flip:
            images = data.random_flip(images, flip_key)
        return {**batch, "inputs": images}

    return transform


def _spec(rule: schema.Rule) -> quant.Spec | None:
    if rule.weight is None:
        return None
    weight = quant.Int(
        rule.weight.bits,
        symmetric=rule.weight.symmetric,
        granularity=rule.weight.granularity,
        group_size=rule.weight.group_size,
    )
    activation = None
    if rule.activation is not None:
        activation = quant.Int(
            rule.activation.bits, symmetric=rule.activation.symmetric, granularity="tensor"
        )
    return quant.Spec(weight, activation, static=rule.static)


def listed(where: schema.Where) -> str | list[str]:
    """The glob or globs as selectors take them."""
    return where if isinstance(where, str) else list(where)


def _matrices(params: Any) -> Any:
    """Marks what weight decay acts on: kernels and embeddings, not biases or normalization."""
    names = ("kernel", "embedding")
    return trees.map_with_path(lambda path, leaf: path.rpartition("/")[2] in names, params)
