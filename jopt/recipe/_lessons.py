"""The blocks of a recipe that say what a student learns, from which teacher, and how."""

import difflib
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Discriminator, Field, Tag

from jopt.recipe._blocks import Block, Count, Fraction, Positive, Probability

NonNegative = Annotated[float, Field(ge=0.0)]


class Ramp(Block):
    """A number that goes from `begin` to `end` over the first part of a stage, and stays there."""

    begin: NonNegative
    end: NonNegative
    over: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="the part of the stage"
    )
    shape: Literal["linear", "cosine"] = "linear"


def _shape_of(value: Any) -> str:
    """Which member of a union a value is meant to be, so that its mistakes are told once."""
    if isinstance(value, dict | Block):
        return "block"
    return "list" if isinstance(value, list | tuple) else "plain"


Temperature = Annotated[
    Annotated[Positive, Tag("plain")] | Annotated[Ramp, Tag("block")], Discriminator(_shape_of)
]
Share = Annotated[
    Annotated[Fraction, Tag("plain")] | Annotated[Ramp, Tag("block")], Discriminator(_shape_of)
]
Weight = Annotated[
    Annotated[NonNegative, Tag("plain")] | Annotated[Ramp, Tag("block")], Discriminator(_shape_of)
]


def _kind(value: Any) -> Any:
    """`kd` is short for `{kind: kd}`."""
    return {"kind": value} if isinstance(value, str) else value


# Losses on what both models say -----------------------------------------------------------------


class KD(Block):
    """T² · KL(teacher ‖ student): the student covers all that the teacher allows."""

    kind: Literal["kd"] = "kd"


class ReverseKL(Block):
    """T² · KL(student ‖ teacher): the student keeps to what the teacher prefers."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JS(Block):
    """The generalised Jensen–Shannon divergence; `balance` 0 is `kd`, 1 is `reverse_kl`."""

    kind: Literal["js"] = "js"
    balance: Fraction = 0.5


class Standardized(Block):
    """`kd` on logits with zero mean and unit deviation."""

    kind: Literal["standardized_kd"] = "standardized_kd"


class L1(Block):
    """The absolute difference, summed over the classes."""

    kind: Literal["l1"] = "l1"
    of: Literal["probabilities", "logits"] = "probabilities"


class MSE(Block):
    """The squared difference, averaged over the classes."""

    kind: Literal["mse"] = "mse"
    of: Literal["probabilities", "logits"] = "logits"


class DKD(Block):
    """Decoupled: the target against the rest (`alpha`), and the rest among itself (`beta`)."""

    kind: Literal["dkd"] = "dkd"
    alpha: Weight = 1.0
    beta: Weight = 8.0


class Dist(Block):
    """Correlations between the classes (`inter`) and between the examples (`intra`)."""

    kind: Literal["dist"] = "dist"
    inter: Weight = 1.0
    intra: Weight = 1.0


Soft = Annotated[
    Annotated[
        KD | ReverseKL | JS | Standardized | L1 | MSE | DKD | Dist, Field(discriminator="kind")
    ],
    pydantic.BeforeValidator(_kind),
]


# Losses on features -----------------------------------------------------------------------------


class FeatureLoss(Block):
    """What all losses on features share."""

    weight: Weight = 1.0
    taps: tuple[str, ...] = Field(
        default=(), description="student's names in the table `taps`; default: all"
    )


class Hints(FeatureLoss):
    """The squared difference; where channels differ, a projection is learned with the student."""

    kind: Literal["hints"] = "hints"


class AttentionTransfer(FeatureLoss):
    """Where both look: normalized sums over the channels."""

    kind: Literal["attention_transfer"] = "attention_transfer"
    power: Annotated[float, Field(ge=1.0)] = 2.0


class FSP(FeatureLoss):
    """The flow between two layers: two taps, the earlier first."""

    kind: Literal["fsp"] = "fsp"


class Similarity(FeatureLoss):
    """Which examples of a batch are alike."""

    kind: Literal["similarity"] = "similarity"


class Relational(FeatureLoss):
    """Distances between the examples of a batch, and angles."""

    kind: Literal["relational"] = "relational"
    distance: NonNegative = 1.0
    angle: NonNegative = 2.0


class CRD(FeatureLoss):
    """Contrastive: an image's embedding against those of images of other classes. Images only."""

    kind: Literal["crd"] = "crd"
    width: Count = Field(default=128, description="of the embeddings, which are learned")
    negatives: Count = Field(default=1024, description="other images each is held against")
    temperature: Positive = 0.07
    momentum: Probability = 0.5


Feature = Annotated[
    Annotated[
        Hints | AttentionTransfer | FSP | Similarity | Relational | CRD, Field(discriminator="kind")
    ],
    pydantic.BeforeValidator(_kind),
]


# Teachers and stages ----------------------------------------------------------------------------


class Average(Block):
    """The student's own moving average as its teacher."""

    average: Fraction = Field(description="how much of the average a step keeps, such as 0.999")


Teacher = Annotated[
    Annotated[str, Tag("plain")]
    | Annotated[Annotated[tuple[str, ...], Field(min_length=1)], Tag("list")]
    | Annotated[Average, Tag("block")],
    Discriminator(_shape_of),
]


class Distillation(Block):
    """(1 - weight) · cross-entropy + weight · soft loss + sum of weighted feature losses."""

    teacher: Teacher = Field(
        description="name of an earlier stage, several for an ensemble, or {average: 0.999}"
    )
    of: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="what an ensemble averages"
    )
    loss: Soft = KD()
    temperature: Temperature = 4.0
    weight: Share = 0.9
    taps: dict[str, str] = Field(
        default={}, description="the student's features to the teacher's, by name or by glob"
    )
    features: tuple[Feature, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        """The earlier stages that teach."""
        if isinstance(self.teacher, Average) or self.teacher is None:
            return ()
        return (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @pydantic.model_validator(mode="after")
    def _ranges(self) -> Self:
        if isinstance(self.temperature, Ramp) and not min(
            self.temperature.begin, self.temperature.end
        ):
            raise ValueError("`temperature` must stay above 0")
        if isinstance(self.weight, Ramp) and max(self.weight.begin, self.weight.end) > 1:
            raise ValueError("`weight` must stay from 0 to 1")
        return self

    @pydantic.model_validator(mode="after")
    def _features_have_taps(self) -> Self:
        if self.features and not self.taps:
            raise ValueError(
                "`features` compares values from inside: say `taps`, the student's names to the "
                "teacher's, such as {ConvNet/Conv_1: ConvNet/Conv_3}"
            )
        if self.taps and not self.features:
            raise ValueError("`taps` are for losses on features: say `features: [hints]`, or so")
        if self.features and len(self.stages) > 1:
            raise ValueError("`features` come from one teacher, not from several")
        for loss in self.features:
            for name in loss.taps:
                if name not in self.taps:
                    near = difflib.get_close_matches(name, self.taps, n=1, cutoff=0.5)
                    known = ", ".join(f"`{tap}`" for tap in self.taps)
                    hint = f"did you mean `{near[0]}`?" if near else f"there are: {known}"
                    raise ValueError(f"`{loss.kind}`: `{name}` is not in the table `taps`; {hint}")
        return self


class Reconstruction(Distillation):
    """The outputs of the model's dense self, learned again; labels only if `weight` is below 1."""

    teacher: Teacher | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        description="default: what the model was before it was pruned or quantized",
    )
    loss: Soft = L1()
    temperature: Temperature = 1.0
    weight: Share = 1.0
