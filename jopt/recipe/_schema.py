"""What a recipe may say, as pydantic models: its stages, and how they hang together.

`jopt recipes --schema` prints them, with what is said of each field. Lengths of time are in epochs;
fractions are of the stage they stand in.
"""

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field

from jopt.recipe._blocks import Activation as Activation
from jopt.recipe._blocks import Augment as Augment
from jopt.recipe._blocks import Block as Block
from jopt.recipe._blocks import CharTransformer as CharTransformer
from jopt.recipe._blocks import Cifar10 as Cifar10
from jopt.recipe._blocks import Constant as Constant
from jopt.recipe._blocks import ConvNet as ConvNet
from jopt.recipe._blocks import Cosine as Cosine
from jopt.recipe._blocks import Count as Count
from jopt.recipe._blocks import Data as Data
from jopt.recipe._blocks import Digits as Digits
from jopt.recipe._blocks import Exponential as Exponential
from jopt.recipe._blocks import IntFormat as IntFormat
from jopt.recipe._blocks import LearningRate as LearningRate
from jopt.recipe._blocks import Model as Model
from jopt.recipe._blocks import Multistep as Multistep
from jopt.recipe._blocks import Natural as Natural
from jopt.recipe._blocks import Optimizer as Optimizer
from jopt.recipe._blocks import Probability as Probability
from jopt.recipe._blocks import Regularizer as Regularizer
from jopt.recipe._blocks import Rule as Rule
from jopt.recipe._blocks import SimpleCNN as SimpleCNN
from jopt.recipe._blocks import Text as Text
from jopt.recipe._blocks import WarmupStableDecay as WarmupStableDecay
from jopt.recipe._blocks import Where as Where
from jopt.recipe._lessons import Average as Average
from jopt.recipe._lessons import Distillation as Distillation
from jopt.recipe._lessons import Reconstruction as Reconstruction
from jopt.recipe._sparsity import CALIBRATED as CALIBRATED
from jopt.recipe._sparsity import DYNAMIC as DYNAMIC
from jopt.recipe._sparsity import NM as NM
from jopt.recipe._sparsity import THROUGH as THROUGH
from jopt.recipe._sparsity import Channels as Channels
from jopt.recipe._sparsity import Level as Level
from jopt.recipe._sparsity import Milestone as Milestone
from jopt.recipe._sparsity import Sparsity as Sparsity
from jopt.recipe._sparsity import Tiles as Tiles
from jopt.recipe._sparsity import Tree as Tree


class Stage(Block):
    """What all stages share."""

    name: str = Field(
        default="", pattern=r"^[A-Za-z0-9_-]*$", description="default: the stage's kind"
    )
    start: str | None = Field(
        default=None, description="stage to start from; default: the one before"
    )


class Fit(Stage):
    """A stage that trains."""

    rewind: str | None = Field(
        default=None,
        min_length=1,
        description="earlier stage to whose weights it goes back first, keeping its masks",
    )
    epochs: Annotated[float, Field(ge=0.0)] = 10
    batch_size: Count = 64
    optimizer: Optimizer = Optimizer()
    augment: Augment = Augment()
    smoothing: Probability = Field(default=0.0, description="of the labels, in the cross-entropy")
    regularize: tuple[Regularizer, ...] = Field(
        default=(), description="penalties that end on zeros, which later stages keep"
    )
    sparsity: Sparsity | None = None
    distill: Distillation | None = None

    @pydantic.model_validator(mode="after")
    def _does_what_it_says(self) -> Self:
        trains = self.sparsity is not None and self.sparsity.method not in CALIBRATED
        if self.epochs == 0 and (trains or self.regularize or self.distill is not None):
            raise ValueError(
                "with `epochs: 0` nothing trains, so it can neither prune, regularize nor distill"
            )
        if getattr(self, "model", None) is not None and self.start is not None:
            raise ValueError("`model` begins from random weights, `start` does not: leave one out")
        if getattr(self, "model", None) is not None and self.rewind is not None:
            raise ValueError("`model` begins from random weights: there is nothing to `rewind`")
        unfit = getattr(self, "model", None) is not None or isinstance(self, Quantize)
        if unfit and self.sparsity is not None and self.sparsity.method in CALIBRATED:
            raise ValueError(
                f"`method: {self.sparsity.method}` prunes a model that an earlier stage has "
                "trained: give it a `sparsify` stage"
            )
        return self


class Train(Fit):
    """Train a model from scratch (or go on training, where no model is given)."""

    stage: Literal["train"]
    model: Model | None = None


class Distill(Fit):
    """Train a student on what a teacher says, and on features of it."""

    stage: Literal["distill"]
    model: Model | None = None
    distill: Distillation  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]


class Sparsify(Fit):
    """Prune while training on, or by a method that looks at data, before."""

    stage: Literal["sparsify"]
    sparsity: Sparsity  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]


class Reconstruct(Fit):
    """Train a pruned or quantized model to say what its dense self says, zeros and grids kept."""

    stage: Literal["reconstruct"]
    distill: Reconstruction = Reconstruction()  # pyright: ignore[reportIncompatibleVariableOverride]


class Quantize(Fit):
    """Calibrate, train with fake quantization where `epochs` is not 0, then store integers."""

    stage: Literal["quantize"]
    policy: tuple[Rule, ...] = Field(min_length=1)
    epochs: Annotated[float, Field(ge=0.0)] = 0
    calibration_batches: Count = 8
    method: Literal["rtn", "gptq", "awq", "smoothquant", "adaround", "hqq"] = Field(
        default="rtn", description="how weights are rounded after training; rtn is to nearest"
    )
    observer: Literal["minmax", "moving_average", "percentile", "mse", "entropy", "histogram"] = (
        Field(default="minmax", description="how static ranges are found")
    )

    @pydantic.model_validator(mode="after")
    def _quantizes_something(self) -> Self:
        if self.method != "rtn" and self.epochs > 0:
            raise ValueError(
                f"`method: {self.method}` rounds after training: say `epochs: 0`, or leave it out"
            )
        if all(rule.weight is None for rule in self.policy):
            raise ValueError("no rule of `policy` has a `weight`: nothing would be quantized")
        return self


class Export(Stage):
    """Write the artifact, load it again, and check it against the model it came from."""

    stage: Literal["export"]
    platforms: Annotated[tuple[Literal["cpu", "cuda", "tpu"], ...], Field(min_length=1)] = (
        "cpu",
        "cuda",
        "tpu",
    )
    pack: Literal["smallest", "nm24", "bits", "csr"] | None = Field(
        default=None,
        description="keep pruned weights without their zeros in memory, too; csr may be faster",
    )


AnyStage = Annotated[
    Train | Distill | Sparsify | Reconstruct | Quantize | Export, Field(discriminator="stage")
]


class Recipe(Block):
    """One run: data, then stages from top to bottom."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    about: str = Field(default="", description="one sentence on what the recipe shows")
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data
    stages: tuple[AnyStage, ...] = Field(min_length=1)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_stages(cls, data: Any) -> Any:
        """Gives a stage without a name its kind as name."""
        if isinstance(data, dict) and isinstance(data.get("stages"), (list, tuple)):
            stages = [
                {**stage, "name": stage.get("name") or str(stage.get("stage", ""))}
                if isinstance(stage, dict)
                else stage
                for stage in data["stages"]
            ]
            return {**data, "stages": stages}
        return data

    @pydantic.model_validator(mode="after")
    def _references(self) -> Self:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called `{name}`: give one a `name`")
        if sum(isinstance(stage, Export) for stage in self.stages) > 1:
            raise ValueError("a recipe has one `export`: it writes the folder `artifact`")
        if getattr(self.stages[0], "model", None) is None:
            raise ValueError(
                f"stage `{names[0]}` comes first, so it must be a `train` stage with a `model`"
            )
        models: list[str] = []  # of the stages so far that make one
        for stage in self.stages:
            for role, name in _references_of(stage):
                if name not in models:
                    raise ValueError(
                        f"`{role}: {name}` in stage `{stage.name}` is not an earlier stage that "
                        f"makes a model; those are: {', '.join(models) or 'none'}"
                    )
            if not isinstance(stage, Export):
                models.append(stage.name)
        return self

    def teachers(self, stage: Fit) -> tuple[str, ...]:
        """The stages whose models teach in this one; for `reconstruct`, by default its dense self.

        Raises:
          ValueError: if the model of a `reconstruct` stage never was dense.
        """
        if stage.distill is None or isinstance(stage.distill.teacher, Average):
            return ()
        if stage.distill.teacher is not None:
            return stage.distill.stages
        fits: list[Fit] = [other for other in self.stages if isinstance(other, Fit)]
        places = {other.name: place for place, other in enumerate(fits)}
        line = [stage]  # backwards, to the stage that made the network
        while getattr(line[-1], "model", None) is None:
            last = line[-1]
            line.append(fits[places[last.start] if last.start else places[last.name] - 1])
        if any(other.rewind for other in line):
            raise ValueError("its line goes back to earlier weights: name the `teacher`")
        dense = None
        for before in reversed(line[1:]):
            if isinstance(before, Sparsify | Quantize) or before.sparsity:
                break
            dense = before.name
        if dense is None:
            raise ValueError("its model never was dense: name the `teacher`")
        return (dense,)

    @pydantic.model_validator(mode="after")
    def _rewinds_its_own(self) -> Self:
        """Masks go back to earlier weights of the same network, and there are masks."""
        origin: dict[str, str] = {}  # the stage that made its network
        kinds: dict[str, tuple[bool, bool]] = {}  # whether it has masks, whether integers
        previous = ""
        for stage in self.stages:
            if not isinstance(stage, Fit):
                continue
            start = stage.start or previous
            fresh = getattr(stage, "model", None) is not None
            origin[stage.name] = stage.name if fresh else origin[start]
            masked, rounded = (False, False) if fresh else kinds[start]
            if stage.rewind is not None:
                words = f"`rewind: {stage.rewind}` in stage `{stage.name}`"
                if origin[stage.rewind] != origin[start]:
                    raise ValueError(f"{words} is another network than `{start}`")
                if rounded or kinds[stage.rewind][1]:
                    raise ValueError(f"{words}: integers do not train; rewind before `quantize`")
                if not masked:
                    raise ValueError(f"{words}: `{start}` is not pruned, so there are no masks")
            lands = any(penalty.kind != "nuclear_norm" for penalty in stage.regularize)
            masked |= stage.sparsity is not None or lands
            kinds[stage.name] = masked, rounded or isinstance(stage, Quantize)
            previous = stage.name
        return self

    @pydantic.model_validator(mode="after")
    def _keeps_zeros(self) -> Self:
        """Whatever rounds a weight to another than its nearest value would move pruned ones."""
        pruned: dict[str, bool] = {}
        previous = ""
        for stage in self.stages:
            if not isinstance(stage, Fit):
                continue
            start = pruned.get(stage.start or previous, False)
            fresh = getattr(stage, "model", None) is not None
            pruned[stage.name] = stage.sparsity is not None or (start and not fresh)
            previous = stage.name
            if isinstance(stage, Quantize) and stage.method != "rtn" and pruned[stage.name]:
                raise ValueError(
                    f"`method: {stage.method}` in stage `{stage.name}` would move weights that an "
                    "earlier stage has pruned: leave it out, and each is rounded to nearest"
                )
        return self


def _references_of(stage: Stage) -> list[tuple[str, str]]:
    found = [("start", stage.start)] if stage.start else []
    if isinstance(stage, Fit) and stage.rewind:
        found.append(("rewind", stage.rewind))
    if isinstance(stage, Fit) and stage.distill is not None:
        found += [("teacher", name) for name in stage.distill.stages]
    return found
