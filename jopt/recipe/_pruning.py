"""How a stage prunes: on data beforehand, in the chain around the optimizer, or in the loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jopt
from jopt import prune, schedules
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._model import Model
from jopt.recipe._task import Task
from jopt.trace import Site, target_of

PyTree = Any


def on_data(config: schema.Sparsity, batch_size: int, model: Model, task: Task) -> Model:
    """The model pruned by a method that looks at data, without training."""
    batches = task.train_inputs(config.calibration_batches, batch_size)

    def apply(params: PyTree, inputs: jax.Array) -> jax.Array:
        return model.module.apply({"params": params, **model.collections}, inputs)

    how = _options(config)
    damping: dict[str, Any] = {} if config.damping is None else {"damping": config.damping}
    match config.method:
        case "wanda":
            params = prune.wanda(apply, model.params, batches, config.final, **how)
        case "sparsegpt":
            how |= damping | {"block_size": config.block_size}
            params = prune.sparsegpt(apply, model.params, batches, config.final, **how)
        case _:
            masks = largest(config, model.params, sites_of(model, task))
            if model.masks is not None:  # of leaves that this stage leaves alone, zeros stay anyway
                masks = jax.tree.map(lambda a, b: a & b if a.ndim else a, masks, model.masks)
            params = prune.reconstruct(apply, model.params, batches, masks, **damping)
    model = dataclasses.replace(model, params=params)
    return _with_zeros_kept(model, how["where"], caller="sparsify")


def chained(
    config: schema.Sparsity,
    links: Sequence[optax.GradientTransformation],
    model: Model,
    task: Task,
    *,
    epoch: float,
    steps: int,
    key: jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """The chain of `links`, with what prunes around it."""
    if config.method in (*schema.CALIBRATED, *schema.THROUGH):
        return optax.chain(*links)
    how: dict[str, Any] = _options(config) | {"sites": sites_of(model, task)}
    inner, final = optax.chain(*links), config.final
    begin, end = (round(share * steps) for share in (config.begin, config.end))
    match config.method:
        case "rigl" | "set":
            every = _every(config, steps)
            how |= {"until": max(1, end), "every": every, "drop": config.drop, "key": key}
            moving = prune.rigl if config.method == "rigl" else prune.set
            return optax.chain(moving(final, inner=inner, **how))
        case "static":
            return optax.chain(prune.static(final, inner=inner, key=key, **how))
        case "ac_dc":
            period = max(1, round(config.period * steps))
            how |= {"begin": max(1, begin or period), "period": period, "end": end}
            return optax.chain(prune.ac_dc(final, inner=inner, **how))
        case _:
            return _scheduled(config, links, how, epoch=epoch, steps=steps, key=key)


def forward(
    config: schema.Sparsity | None, params: PyTree, sites: Sequence[Site]
) -> tuple[PyTree, jax.Array]:
    """The parameters that the loss computes with, and what is added to it."""
    nothing = jnp.zeros((), jnp.float32)
    if config is None or config.method not in schema.THROUGH:
        return params, nothing
    if config.method == "straight_through":
        return prune.straight_through(params, largest(config, params, sites)), nothing
    how: dict[str, Any] = _options(config) | {"sites": sites}
    used, penalty = prune.top_kast(params, config.final, config.backward, **how)
    return used, config.penalty * penalty


def finished(
    config: schema.Sparsity | None, model: Model, opt_state: PyTree, sites: Sequence[Site]
) -> Model:
    """The trained model with its masks, and zeros where these only came before the loss."""
    if config is None or config.method in schema.CALIBRATED:
        return model
    if config.method in schema.THROUGH:
        masks = _both(largest(config, model.params, sites), model.masks)
        return dataclasses.replace(
            model, params=prune.apply_masks(model.params, masks), masks=masks
        )
    own = opt_state[-1]._replace(inner=())  # inside may be another, which holds earlier masks
    return dataclasses.replace(model, masks=_both(prune.masks_of(own), model.masks))


def settled(penalties: Sequence[schema.Regularizer], model: Model) -> Model:
    """The trained model with masks for the zeros that penalties have landed on."""
    for penalty in penalties:
        if penalty.kind == "nuclear_norm":
            continue
        where = tables.listed(penalty.where)
        model = _with_zeros_kept(model, where, caller="regularize")
    return model


def largest(config: schema.Sparsity, params: PyTree, sites: Sequence[Site]) -> PyTree:
    """The masks of the largest weights as they are."""
    return prune.masks(params, config.final, sites=sites, **_options(config))


def sites_of(model: Model, task: Task) -> tuple[Site, ...]:
    """The products of the model, of which scopes and patterns want to know."""
    example = jax.ShapeDtypeStruct((1, *task.inputs.shape), task.inputs.dtype)

    def apply(params: PyTree, collections: PyTree, inputs: Any) -> Any:
        return model.module.apply({"params": params, **collections}, inputs)

    return jopt.sites(apply, model.params, model.collections, example)


def rewound(model: Model, earlier: Model) -> Model:
    """The earlier model with the masks of this one, and its own."""
    masks = model.masks if earlier.masks is None else _both(earlier.masks, model.masks)
    params = earlier.params if masks is None else prune.apply_masks(earlier.params, masks)
    return dataclasses.replace(earlier, params=params, masks=masks)


def check(config: schema.Sparsity, model: Model, task: Task) -> None:
    """Says on shapes alone what of a method cannot work, where its chain does not."""
    if config.method not in (*schema.THROUGH, *schema.CALIBRATED):
        return
    chosen = jopt.trees.select(model.params, tables.listed(config.where), caller="sparsify")
    on_data = config.method in schema.CALIBRATED
    if on_data and any(jopt.trees.is_typed(leaf) for _, leaf in jopt.trees.items(model.params)):
        raise ValueError(
            f"`method: {config.method}` prunes plain weights, and these are quantized: prune "
            "before the `quantize` stage"
        )
    sites = sites_of(model, task)
    jax.eval_shape(lambda params: largest(config, params, sites), model.params)
    if not on_data:
        return
    found = {p: target_of(p, sites) for p, mine in jopt.trees.items(chosen) if mine}
    if unmet := {path: why for path, why in found.items() if isinstance(why, str)}:
        raise ValueError(
            f"`method: {config.method}` cannot tell what weights meet:\n"
            + "\n".join(f"  `{path}`: {why}" for path, why in unmet.items())
            + "\nLeave them out with `where`."
        )


# Helpers, in order of use.


def _pattern(pattern: schema.Level | schema.Tree) -> prune.Pattern:
    match pattern:
        case schema.NM(n=n, m=m):
            return prune.NM(n, m)
        case schema.Tiles(block=shape):
            return prune.Block(shape)
        case schema.Channels(channel=axis):
            return prune.Channel(axis)
        case schema.Tree(tree=levels, parts=parts):
            return prune.Tree(tuple(map(_pattern, levels)), parts)
        case _:
            return prune.Unstructured()


def _options(config: schema.Sparsity) -> dict[str, Any]:
    """What all methods take."""
    where = tables.listed(config.where)
    return {
        "pattern": _pattern(config.pattern),
        "scope": config.scope,
        "where": where,
        "unfit": config.unfit,
    }


def _every(config: schema.Sparsity, steps: int) -> int:
    """Steps between two looks, of which even a short stage has some."""
    return min(config.every, max(1, steps // 10))


def _with_zeros_kept(model: Model, where: Any, *, caller: str) -> Model:
    """The model with masks for the weights at `where` that are zero now."""
    chosen = jax.tree.leaves(jopt.trees.select(model.params, where, caller=caller))
    masks = [
        jopt.trees.weight_of(leaf) != 0 if mine else jnp.ones((), bool)
        for (_, leaf), mine in zip(jopt.trees.items(model.params), chosen, strict=True)
    ]
    treedef = jax.tree.structure(model.params, is_leaf=jopt.trees.is_typed)
    masks = _both(treedef.unflatten(masks), model.masks)
    return dataclasses.replace(model, masks=masks)


def _both(masks: PyTree, before: PyTree | None) -> PyTree:
    """What was pruned before stays so."""
    return masks if before is None else jax.tree.map(jnp.logical_and, masks, before)


def _scheduled(
    config: schema.Sparsity,
    links: Sequence[optax.GradientTransformation],
    how: dict[str, Any],
    *,
    epoch: float,
    steps: int,
    key: jax.Array,
) -> optax.GradientTransformationExtraArgs:
    """A score on a schedule in steps."""
    scores = {
        "magnitude": prune.magnitude,
        "random": lambda: prune.random(key),
        "movement": prune.movement,
        "taylor": lambda: prune.taylor(decay=0.9),
        "snip": prune.snip,
        "fisher": lambda: prune.fisher(decay=0.99),
    }
    how = {**how, "score": scores[config.method]()}
    if isinstance(config.pattern, schema.NM):
        # All at once, when scores that add up have seen the steps before.
        begin = min(round(config.begin * steps), max(steps - 1, 0))
        sparsity: Any = schedules.steps_sparsity([(begin, config.final)])
    elif config.target is None:
        points = {round(point.epoch * epoch): point.sparsity for point in config.at}
        late = [point.epoch for point in config.at if round(point.epoch * epoch) >= steps]
        if late:
            raise ValueError(
                f"`sparsity.at` names epoch {late[0]:g}, but the stage ends at epoch "
                f"{steps / epoch:g}: make `epochs` longer or the epochs of `at` earlier"
            )
        sparsity = schedules.steps_sparsity(sorted(points.items()))
    else:
        # The masks are looked at every so many steps: the schedule ends at such a step, or before.
        every = _every(config, steps)
        last = (steps - 1) // every * every
        if last < 1:
            raise ValueError(f"`sparsity.target` needs two steps or more; the stage has {steps}")
        end = min(max(1, round(config.end * steps)), last)
        begin = min(round(config.begin * steps), end - 1)
        sparsity = schedules.cubic_sparsity(config.target, begin=begin, end=end)
        how["every"] = every
    return optax.chain(prune.sparsify(sparsity, inner=optax.chain(*links), **how))
