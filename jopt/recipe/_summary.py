"""What a run says of its stages: one record each in `run.json`, and from those the report."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jopt
from jopt import artifact, report, trace
from jopt.recipe import _schema as schema
from jopt.recipe._folder import Folder
from jopt.recipe._model import Model, inference, sparsity_by_path
from jopt.recipe._stages import Outcome
from jopt.recipe._task import Task

TIMED_BATCH = 64
CURVE_POINTS = 500
SLOWER = 1.1  # differences below are noise


def summarise(outcome: Outcome, task: Task) -> dict[str, Any]:
    """The numbers of one model: how well it does on the test data, and what it takes."""
    model = outcome.model
    size = jopt.size(model.variables)
    example = jax.ShapeDtypeStruct((1, *task.inputs.shape), task.inputs.dtype)
    return {
        **task.evaluate(inference(model.module), model.variables),
        "parameters": size.parameters,
        "nonzeros": size.nonzeros,
        "bytes": artifact.weights_bytes(model.variables),
        "flops": trace.flops(model.module.apply, model.variables, example),
        "sparsity": sparsity_by_path(model.params),
        "notes": list(outcome.notes),
    }


def write_report(
    recipe: schema.Recipe, folder: Folder, models: Mapping[str, Model], task: Task
) -> tuple[list[report.Row], report.Metric]:
    """Writes `report.json`, `report.html` and the plots; returns the rows and what they measure."""
    metric = (
        report.Metric()
        if task.kind == "images"
        else report.Metric(name="loss", percent=False, higher=False)
    )
    records = {name: folder.finished(name) or {} for name in models}
    times = _times(models, task)
    notes = {name: [*record["notes"], *_slower(name, times)] for name, record in records.items()}
    rows = [
        report.Row(
            name=name,
            score=record["accuracy" if task.kind == "images" else "loss"],
            parameters=record["parameters"],
            nonzeros=record["nonzeros"],
            bytes=record["bytes"],
            flops=record["flops"],
            latency=times[name],
            notes=tuple(notes[name]),
        )
        for name, record in records.items()
    ]
    last = list(records.values())[-1]
    report.write(
        folder.root,
        rows,
        title=recipe.name,
        metric=metric,
        curves=_curves(recipe, folder),
        sparsity=last["sparsity"] if any(last["sparsity"].values()) else {},
        skipped=[(name, note) for name, record in records.items() for note in record["notes"]],
        recipe=recipe.model_dump(mode="json"),
    )
    return rows, metric


def _times(models: Mapping[str, Model], task: Task) -> dict[str, float]:
    """The time of one call of each model against the first, interleaved."""
    inputs = jnp.zeros((TIMED_BATCH, *task.inputs.shape), task.inputs.dtype)
    calls = {
        name: (jax.jit(inference(model.module)), (model.variables, inputs))
        for name, model in models.items()
    }
    return {name: time.ratio for name, time in report.latency(calls).items()}


def _slower(name: str, times: Mapping[str, float]) -> list[str]:
    """Says so where a stage made its model slower than the stage before it did."""
    names = list(times)
    place = names.index(name)
    if place == 0 or times[name] <= SLOWER * times[names[place - 1]]:
        return []
    before = names[place - 1]
    return [
        f"slower than `{before}` on this machine: {times[name] / times[before]:.2f} times its time "
        f"for {TIMED_BATCH} examples"
    ]


def _curves(recipe: schema.Recipe, folder: Folder) -> dict[str, list[tuple[float, float]]]:
    """The losses of each stage by step, thinned out."""
    curves = {}
    for index, stage in enumerate(recipe.stages):
        path = folder.stage(index, stage.name) / "metrics.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = lines[:: max(1, len(lines) // CURVE_POINTS)]
            curves[stage.name] = [
                (line["step"], line["loss"]) for line in kept if line.get("loss") is not None
            ]
    return curves
