"""The export stage: write the artifact, load it again, hold it against the model it came from."""

from typing import Any

import jax
import numpy as np

import jopt
from jopt import artifact, prune
from jopt.recipe import _schema as schema
from jopt.recipe._folder import Folder
from jopt.recipe._model import Model, inference
from jopt.recipe._task import Task

CHECKED = 64  # test examples whose logits are compared


def export(
    stage: schema.Export, model: Model, task: Task, folder: Folder, recipe: schema.Recipe
) -> dict[str, Any]:
    """Writes `artifact/` and returns what the report says of it.

    Raises:
      artifact.ArtifactError: if what was written does not compute what the model computes.
    """
    path = folder.root / "artifact"
    apply = inference(model.module)
    metrics = task.evaluate(apply, model.variables)
    example = jax.ShapeDtypeStruct((1, *task.inputs.shape), task.inputs.dtype)
    variables, notes = model.variables, []
    if stage.pack is not None:
        sites = jopt.sites(apply, variables, example)
        variables, rows = prune.pack(variables, stage.pack, sites=sites, unfit="skip")
        notes = [
            f"`{path}` is not packed: {row.reason}" for path, row in rows.items() if row.reason
        ]
    manifest = artifact.save(
        path,
        apply,
        variables,
        example,
        platforms=stage.platforms,
        metrics=metrics,
        recipe=recipe.model_dump(mode="json"),
        overwrite=True,  # of what a run that was cut here may have left
    )
    difference = 0.0
    if jax.default_backend() in _runnable(stage.platforms):
        difference = _difference(path, model, task)
    return {
        **metrics,
        "notes": notes,
        "bytes": manifest["sizes"]["weights_bytes"],
        "module_bytes": manifest["sizes"]["model_bytes"],
        "largest_difference": difference,
    }


def is_whole(folder: Folder) -> bool:
    """Whether the artifact of a finished run is still there, as it was written."""
    try:
        artifact.load(folder.root / "artifact")
    except (artifact.ArtifactError, OSError):
        return False
    return True


def _difference(path: Any, model: Model, task: Task) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    inputs = task.test_inputs(CHECKED)
    expected = np.asarray(jax.jit(inference(model.module))(model.variables, inputs), np.float64)
    found = np.asarray(artifact.load(path)(inputs), np.float64)
    difference = float(np.max(np.abs(found - expected)) / max(np.max(np.abs(expected)), 1e-30))
    if not difference <= 1e-3:
        raise artifact.ArtifactError(
            f"{path}: the logits of the artifact differ from the model's by {difference:.2g} of "
            "the largest; this is a defect of jopt, please report it with the recipe."
        )
    return difference


def _runnable(platforms: tuple[str, ...]) -> set[str]:
    return {*platforms, *(["gpu"] if "cuda" in platforms else [])}
