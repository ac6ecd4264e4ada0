"""The blocks that a recipe's stages are made of: data, models, optimization, compression."""

import difflib
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Where = str | Annotated[list[str], Field(min_length=1)]


class Block(pydantic.BaseModel):
    """A mapping of the recipe; an unknown key is an error that names the nearest known one."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        unknown = [str(key) for key in data if key not in cls.model_fields]
        if unknown:
            known = ", ".join(f"`{name}`" for name in cls.model_fields)
            near = [
                difflib.get_close_matches(key, cls.model_fields, n=1, cutoff=0.5) for key in unknown
            ]
            hints = [f"did you mean `{n[0]}`?" if n else f"known keys: {known}" for n in near]
            raise PydanticCustomError(
                "unknown_key", "unknown key", {"keys": dict(zip(unknown, hints, strict=True))}
            )
        return data


# Data ------------------------------------------------------------------------------------------


Validation = Annotated[
    int,
    Field(
        ge=0,
        description="training images to hold out and to report on instead of the test images: "
        "to choose by",
    ),
]


class Digits(Block):
    """The 1,797 handwritten digits that scikit-learn carries: 8 × 8 images, ten classes."""

    kind: Literal["digits"] = "digits"
    validation: Validation = 0


class Cifar10(Block):
    """CIFAR-10 in its official binary layout, found by `--data-dir` or `JOPT_DATA`."""

    kind: Literal["cifar10"] = "cifar10"
    train_examples: Count | None = Field(
        default=None, description="use only the first so many images"
    )
    validation: Validation = 0


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
    gated: bool = Field(default=False, description="norms and perceptrons of LLaMA, not of GPT")


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


class Regularizer(Block):
    """A penalty on weights that lands on zeros: a proximal step after each of the optimizer's."""

    kind: Literal["l1", "group_lasso", "nuclear_norm"] = Field(
        default="l1", description="zeros one by one; whole channels of zeros; a lower rank"
    )
    strength: Positive = Field(description="of the penalty, beside the loss")
    where: Where = "**/kernel"
    axis: int = Field(default=-1, description="group_lasso: of the channels; -1 are the outputs")
    every: Count = Field(default=1, description="nuclear_norm: steps between two decompositions")

    @pydantic.model_validator(mode="after")
    def _keys_of_the_kind(self) -> Self:
        for key, kind, default in (("axis", "group_lasso", -1), ("every", "nuclear_norm", 1)):
            if getattr(self, key) != default and self.kind != kind:
                raise ValueError(f"`{key}` is for kind `{kind}`, not `{self.kind}`")
        return self


class Augment(Block):
    """Random changes of the training images, drawn anew at every step."""

    shift: Annotated[int, Field(ge=0)] = Field(default=0, description="largest shift, in pixels")
    flip: bool = Field(default=False, description="mirror half of the images")


# Compression -----------------------------------------------------------------------------------


class IntFormat(Block):
    """Integers of `bits` bits."""

    bits: Annotated[int, Field(ge=2, le=8)]
    symmetric: bool = True
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: Count | None = None

    @pydantic.model_validator(mode="after")
    def _groups_have_a_size(self) -> Self:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("`granularity: group` and `group_size` go together")
        return self


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

    @pydantic.model_validator(mode="after")
    def _complete(self) -> Self:
        if self.static and self.activation is None:
            raise ValueError("`static` is about the activations: say `activation` too")
        if self.weight is None and self.activation is not None:
            raise ValueError("activations are quantized where a weight is: say `weight` too")
        return self
