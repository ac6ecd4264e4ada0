"""A whole run: data, stages, artifact, report; what is finished is recorded, to go on from."""

import dataclasses
import pathlib
import time
import zlib
from typing import Any

import rich.console

from jopt import report
from jopt.recipe import _schema as schema
from jopt.recipe import _stages as stages
from jopt.recipe import _tables as tables
from jopt.recipe._export import export, is_whole
from jopt.recipe._fit import Place
from jopt.recipe._folder import Folder
from jopt.recipe._model import Model
from jopt.recipe._rehearse import rehearse
from jopt.recipe._summary import summarise, write_report


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run leaves: the rows of its table, its models by stage, and where its files are."""

    rows: tuple[report.Row, ...]
    models: dict[str, Model]
    folder: pathlib.Path


def run(
    recipe: schema.Recipe,
    out: pathlib.Path,
    *,
    data_dir: pathlib.Path | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Runs a recipe to its end, or goes on with a run that was cut.

    Args:
      recipe: what `load` returned.
      out: a new or empty folder; with `resume`, that of the run to go on with.
      data_dir: the folder of the data sets, for data that jopt does not carry.
      resume: go on from the newest checkpoint; the end has the same bits as an uncut run's.
      quiet: show nothing but the table at the end.

    Returns:
      Rows, models and the folder.

    Raises:
      RecipeError: if the folder is not free, or holds another recipe's run, or a stage cannot work.
      FileNotFoundError: if the data are not there; says where to get them.
      jopt.train.TrainingDiverged: if a loss is not finite.
    """
    console = rich.console.Console(quiet=quiet)
    # Before the folder is made: what cannot work leaves no trace.
    task = tables.task(recipe.data, data_dir)
    rehearse(recipe, task)
    folder = Folder.open(out, recipe, resume=resume)
    with folder.locked():
        console.print(f"{recipe.name} · {task.about} → {out}", highlight=False, markup=False)
        if resume and not any(map(folder.finished, (stage.name for stage in recipe.stages))):
            console.print("  nothing is finished here: beginning, or going on with the first stage")
        models: dict[str, Model] = {}
        previous: Model | None = None
        for index, stage in enumerate(recipe.stages):
            started = time.monotonic()
            place = Place(
                folder.stage(index, stage.name), stage.name, _seed(recipe, stage), not quiet
            )
            start = models[stage.start] if stage.start else previous
            if isinstance(stage, schema.Export):
                assert start is not None  # the schema wants a stage that makes a model first
                record = folder.finished(stage.name) if is_whole(folder) else None
                record = record or export(stage, start, task, folder, recipe)
            else:
                teachers = [models[name] for name in recipe.teachers(stage)]
                earlier = models[stage.rewind] if stage.rewind else None
                outcome = stages.run(stage, start, teachers, task, place, earlier=earlier)
                models[stage.name] = previous = outcome.model
                record = folder.finished(stage.name) or summarise(outcome, task)
            if folder.finished(stage.name) is None:
                folder.finish(stage.name, record | {"seconds": time.monotonic() - started})
            _say(console, stage, record)
        rows, metric = write_report(recipe, folder, models, task)
        rich.console.Console().print(report.rich_table(rows, metric=metric))
        console.print(f"report: {out / 'report.html'}", highlight=False, markup=False)
    return Result(tuple(rows), models, out)


def _seed(recipe: schema.Recipe, stage: schema.Stage) -> int:
    """A seed of the stage's own: inserting a stage leaves the others' as they were."""
    return zlib.crc32(f"{recipe.seed}/{stage.name}".encode())


def _say(console: rich.console.Console, stage: schema.Stage, record: dict[str, Any]) -> None:
    words = [f"accuracy {record['accuracy']:.2%}", f"loss {record['loss']:.4f}"]
    if "largest_difference" in record:
        words.append(f"logits within {record['largest_difference']:.1g} of the model's")
    elif record["nonzeros"] < record["parameters"]:
        words.append(f"{1 - record['nonzeros'] / record['parameters']:.1%} zeros")
    words.append(f"{record['bytes']:,} bytes")
    console.print(f"  {stage.name}: {', '.join(words)}", highlight=False, soft_wrap=True)
