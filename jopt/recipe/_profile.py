"""What the models of a recipe cost, before training: products, FLOPs, bytes, memory, time."""

import math
import pathlib
import time
from typing import Any

import jax
import rich.console
import rich.table

import jopt
from jopt import trace
from jopt.recipe import _schema as schema
from jopt.recipe import _tables as tables
from jopt.recipe._model import Model, inference, initialise

BATCH = 64
ROUNDS = 10


def profile(recipe: schema.Recipe, *, data_dir: pathlib.Path | None = None) -> None:
    """Prints, for each model that the recipe makes, where its FLOPs and bytes are.

    The weights are random: nothing is trained, and nothing is written.
    """
    console = rich.console.Console()
    task = tables.task(recipe.data, data_dir)
    for stage in recipe.stages:
        config = getattr(stage, "model", None)
        if config is None:
            continue
        model = initialise(tables.module(config, task), task.inputs, jax.random.key(recipe.seed))
        example = jax.ShapeDtypeStruct((BATCH, *task.inputs.shape), task.inputs.dtype)
        console.print(_products(stage.name, model, example))
        console.print(_totals(model, example), highlight=False)


def products(
    recipe: schema.Recipe, *, data_dir: pathlib.Path | None = None
) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the matrix products with weights, for one example and a batch."""
    task = tables.task(recipe.data, data_dir)
    found: dict[tuple[int, int, int], None] = {}
    for stage in recipe.stages:
        config = getattr(stage, "model", None)
        if config is None:
            continue
        model = initialise(tables.module(config, task), task.inputs, jax.random.key(recipe.seed))
        for batch in (1, BATCH):
            example = jax.ShapeDtypeStruct((batch, *task.inputs.shape), task.inputs.dtype)
            for site in jopt.sites(model.module.apply, model.variables, example):
                if site.operation == "dot_general" and site.contracted and site.uses:
                    found[_matrices(site)] = None
    return list(found)


def _matrices(site: trace.Site) -> tuple[int, int, int]:
    shape = site.shapes[site.uses[0].operand]
    other = math.prod(site.shapes[1 - site.uses[0].operand])
    inputs = math.prod(shape[axis] for axis in site.contracted or ())
    return max(1, other // inputs), inputs, math.prod(shape) // inputs


def _products(title: str, model: Model, example: Any) -> rich.table.Table:
    found = jopt.sites(model.module.apply, model.variables, example)
    total = max(sum(site.total for site in found), 1)
    table = rich.table.Table(title=f"{title}: products at batch {BATCH}", title_justify="left")
    for name in ("weight", "operands", "times", "MFLOPs", "share"):
        table.add_column(name, justify="left" if name in ("weight", "operands") else "right")
    for site in found:
        left, right, _ = ("×".join(map(str, shape)) for shape in site.shapes)
        table.add_row(
            site.path or "(activations)",
            f"{left} · {right}",
            str(site.trips),
            f"{site.total / 1e6:,.2f}",
            f"{site.total / total:.1%}",
        )
    return table


def _totals(model: Model, example: Any) -> str:
    """Parameters, bytes and FLOPs from the shapes; memory and time from the compiled program."""
    size = jopt.size(model.params)
    flops = trace.flops(model.module.apply, model.variables, example)
    compiled = jax.jit(inference(model.module)).lower(model.variables, example).compile()
    inputs = jax.numpy.zeros(example.shape, example.dtype)
    jax.block_until_ready(compiled(model.variables, inputs))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(model.variables, inputs))
        seconds.append(time.perf_counter() - began)
    memory = compiled.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    lines = [
        f"parameters  {size.parameters:,} in {size.bytes:,} bytes",
        f"FLOPs       {flops / BATCH / 1e6:,.2f} million an example",
        f"time        {min(seconds) * 1e3:,.2f} ms for {BATCH} examples on {_device()}",
    ]
    if temporary is not None:
        lines.insert(2, f"memory      {temporary:,} bytes for intermediate values")
    return "\n".join(lines) + "\n"


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform} ({device.device_kind})"
