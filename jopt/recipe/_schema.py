"""What a recipe may say, as pydantic models: one class a block of the YAML file.

`jopt recipes --schema` prints them, with what is said of each field. Lengths of time are in epochs;
 fractions are of the stage they stand in.
"""

import difflib
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Where = str | list[str]


class Block(pydantic.BaseModel):
    """A mapping of the recipe; an unknown key is an error that names the nearest known one."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key in data:
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                hint = (
                    f"did you mean `{near[0]}`?"
                    if near
                    else "known keys: " + ", ".join(f"`{name}`" for name in cls.model_fields)
                )
                raise PydanticCustomError(
                    "unknown_key", "unknown key `{key}`; {hint}", {"key": str(key), "hint": hint}
                )
        return data


# Data ------------------------------------------------------------------------------------------


class Digits(Block):
    """The 1,797 handwritten digits that scikit-learn carries: 8 × 8 images, ten classes."""

    kind: Literal["digits"] = "digits"


class Cifar10(Block):
    """CIFAR-10 in its official binary layout, found by `--data-dir` or `JOPT_DATA`."""

    kind: Literal["cifar10"] = "cifar10"
    train_examples: Count | None = Field(
        default=None, description="use only the first so many images"
    )


class Text(Block):
    """Characters of a plain text file; the last tenth is for validation."""

    kind: Literal["text"] = "text"
    file: str = Field(
        default="tinyshakespeare.txt", description="name below the data folder, or a path"
    )
    context: Count = Field(default=128, description="characters a window")


Data = Annotated[Digits | Cifar10 | Text, Field(discriminator="kind")]


# Models ----------------------------------------------------------------------------------------


class ConvNet(Block):
    """Convolution, batch normalization and ReLU, a pooling after each stage, one dense layer."""

    kind: Literal["convnet"] = "convnet"
    widths: tuple[Count, ...] = Field(
        default=(32, 64), min_length=1, description="channels of each stage"
    )
    depth: Count = Field(default=1, description="convolutions a stage")
    hidden: Annotated[int, Field(ge=0)] = Field(
        default=0, description="width of a dense layer; 0: none"
    )
    dropout: Probability = 0.0


class SimpleCNN(Block):
    """The classic small CIFAR-10 network: 16 and 32 channels, dense 64, dense 10."""

    kind: Literal["simple_cnn"] = "simple_cnn"
    dropout: Probability = 0.5
    initialization: Literal["flax", "torch"] = Field(
        default="flax", description="whose default initialization"
    )


class CharTransformer(Block):
    """A causal pre-normalized transformer over characters, its layers scanned."""

    kind: Literal["char_transformer"] = "char_transformer"
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    dropout: Probability = 0.0


Model = Annotated[ConvNet | SimpleCNN | CharTransformer, Field(discriminator="kind")]


# Optimization ----------------------------------------------------------------------------------


class Constant(Block):
    """The same learning rate throughout."""

    kind: Literal["constant"] = "constant"
    value: Positive


class Cosine(Block):
    """Linear warm-up, then half a cosine down to `end` times the peak."""

    kind: Literal["cosine"] = "cosine"
    peak: Positive
    warmup: Fraction = 0.0
    end: Fraction = 0.0


class Multistep(Block):
    """Times `gamma` at each milestone, in epochs."""

    kind: Literal["multistep"] = "multistep"
    init: Positive
    milestones: tuple[Positive, ...]
    gamma: Positive = 0.1


class Exponential(Block):
    """`init · rate^(epoch / every)`, in steps where `staircase`."""

    kind: Literal["exponential"] = "exponential"
    init: Positive
    rate: Positive
    every: Positive = 1.0
    staircase: bool = False


class Natural(Block):
    """`init · e^(-decay · epoch)`."""

    kind: Literal["natural"] = "natural"
    init: Positive
    decay: Positive


class WarmupStableDecay(Block):
    """Linear warm-up, a plateau, then a cooldown over the last fraction."""

    kind: Literal["wsd"] = "wsd"
    peak: Positive
    warmup: Fraction = 0.05
    decay: Fraction = 0.2
    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"


LearningRate = Annotated[
    Constant | Cosine | Multistep | Exponential | Natural | WarmupStableDecay,
    Field(discriminator="kind"),
]


class Optimizer(Block):
    """Which rule turns gradients into updates."""

    kind: Literal["sgd", "adam", "adamw", "adagrad", "lion"] = "adamw"
    learning_rate: LearningRate | Positive = Field(
        default=1e-3, description="a number, or a schedule such as {kind: cosine, peak: 0.003}"
    )
    momentum: Probability = Field(default=0.0, description="sgd only")
    nesterov: bool = Field(default=False, description="sgd only")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="decoupled (adamw, lion) or added to the gradient (others)"
    )
    clip: Positive | None = Field(default=None, description="largest global norm of the gradient")

    @pydantic.model_validator(mode="after")
    def _momentum_is_sgd(self) -> Self:
        if self.kind != "sgd" and (self.momentum or self.nesterov):
            raise ValueError(f"`momentum` and `nesterov` are for kind `sgd`, not `{self.kind}`")
        return self


class Augment(Block):
    """Random changes of the training images, drawn anew at every step."""

    shift: Annotated[int, Field(ge=0)] = Field(default=0, description="largest shift, in pixels")
    flip: bool = Field(default=False, description="mirror half of the images")


# Compression -----------------------------------------------------------------------------------


class Milestone(Block):
    """From `epoch` on, this fraction of the weights is zero."""

    epoch: Annotated[float, Field(ge=0.0)]
    sparsity: Probability


class NM(Block):
    """Of every `m` weights along the contracted axis, the `n` largest are kept."""

    n: Count
    m: Count

    @pydantic.model_validator(mode="after")
    def _n_below_m(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"n:m keeps n of m, so n < m; found {self.n}:{self.m}")
        return self


class Sparsity(Block):
    """Magnitude pruning inside the training step."""

    target: Probability | None = Field(default=None, description="final fraction of zeros")
    at: tuple[Milestone, ...] = Field(
        default=(), description="fractions at given epochs, for `target`"
    )
    begin: Fraction = Field(default=0.0, description="where the cubic schedule to `target` begins")
    end: Fraction = Field(default=0.7, description="where it ends")
    every: Count = Field(default=10, description="steps between two choices of what is pruned")
    pattern: Literal["unstructured"] | NM = "unstructured"
    scope: Literal["global", "layer"] = "global"
    where: Where = "**/kernel"

    @pydantic.model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if (self.target is None) == (not self.at) and not isinstance(self.pattern, NM):
            raise ValueError("say either `target` or `at`")
        if isinstance(self.pattern, NM) and (self.target is not None or self.at):
            raise ValueError("an n:m pattern is its own target: leave out `target` and `at`")
        if self.target is not None and self.begin >= self.end:
            raise ValueError(f"`begin` ({self.begin}) must come before `end` ({self.end})")
        return self


class Distillation(Block):
    """Soft labels: (1 - weight) · cross-entropy + weight · T² · KL(teacher ‖ student)."""

    teacher: str = Field(description="name of an earlier stage")
    temperature: Positive = 4.0
    weight: Fraction = 0.9


class IntFormat(Block):
    """Integers of `bits` bits."""

    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: Count | None = None


class Activation(Block):
    """Integers for the activations: one range a tensor."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    symmetric: bool = True


class Rule(Block):
    """What happens to the leaves that `where` matches; the first rule that matches counts."""

    where: Where = "**/kernel"
    weight: IntFormat | None = Field(
        default=None, description="null: leave these leaves as they are"
    )
    activation: Activation | None = None
    static: bool = Field(
        default=False, description="activation ranges from calibration, not from each batch"
    )


# Stages ----------------------------------------------------------------------------------------


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

    epochs: Annotated[float, Field(ge=0.0)] = 10
    batch_size: Count = 64
    optimizer: Optimizer = Optimizer()
    augment: Augment = Augment()
    sparsity: Sparsity | None = None
    distill: Distillation | None = None


class Train(Fit):
    """Train a model from scratch (or go on training, where no model is given)."""

    stage: Literal["train"]
    model: Model | None = None


class Distill(Fit):
    """Train a student on a teacher's soft labels."""

    stage: Literal["distill"]
    model: Model | None = None
    distill: Distillation  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]


class Sparsify(Fit):
    """Prune while training on."""

    stage: Literal["sparsify"]
    sparsity: Sparsity  # pyright: ignore[reportGeneralTypeIssues, reportIncompatibleVariableOverride]


class Quantize(Fit):
    """Calibrate, train with fake quantization where `epochs` is not 0, then store integers."""

    stage: Literal["quantize"]
    policy: tuple[Rule, ...] = Field(min_length=1)
    epochs: Annotated[float, Field(ge=0.0)] = 0
    calibration_batches: Count = 8


class Export(Stage):
    """Write the artifact, load it again, and check it against the model it came from."""

    stage: Literal["export"]
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = ("cpu", "cuda", "tpu")


AnyStage = Annotated[Train | Distill | Sparsify | Quantize | Export, Field(discriminator="stage")]


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
        seen: list[str] = []
        for stage in self.stages:
            if stage.name in seen:
                raise ValueError(f"two stages are called `{stage.name}`: give one a `name`")
            for role, name in _references_of(stage):
                if name not in seen:
                    raise ValueError(
                        f"`{role}: {name}` in stage `{stage.name}` is not an earlier stage; "
                        f"earlier stages: {', '.join(seen) or 'none'}"
                    )
            if not seen and getattr(stage, "model", None) is None:
                raise ValueError(f"stage `{stage.name}` comes first, so it needs a `model`")
            seen.append(stage.name)
        return self


def _references_of(stage: Stage) -> list[tuple[str, str]]:
    found = [("start", stage.start)] if stage.start else []
    if isinstance(stage, Fit) and stage.distill is not None:
        found.append(("teacher", stage.distill.teacher))
    return found
