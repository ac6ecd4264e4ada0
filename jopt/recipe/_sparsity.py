"""The block that says how a stage prunes: by what method, what together, how much, when."""

import itertools
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import Discriminator, Field, Tag

from jopt.recipe._blocks import Block, Count, Fraction, Positive, Probability, Where

# Scores on a schedule; wrapped optimizers; the loss on masked weights; after training, on data.
SCORED = ("magnitude", "random", "movement", "taylor", "snip", "fisher")
DYNAMIC = ("rigl", "set", "static")
THROUGH = ("straight_through", "top_kast")
CALIBRATED = ("wanda", "sparsegpt", "least_squares")

# The methods that each key is for.
_KEYS = {
    "at": SCORED,
    "begin": (*SCORED, "ac_dc"),
    "end": (*SCORED, "ac_dc", "rigl", "set"),
    "every": (*SCORED, "rigl", "set"),
    "drop": ("rigl", "set"),
    "period": ("ac_dc",),
    "backward": ("top_kast",),
    "penalty": ("top_kast",),
    "calibration_batches": CALIBRATED,
    "block_size": ("sparsegpt",),
    "damping": ("sparsegpt", "least_squares"),
}


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


class Tiles(Block):
    """Tiles of the last axes go together."""

    block: tuple[Count, ...] = Field(min_length=1, description="such as [4, 4]")


class Channels(Block):
    """Whole channels go, their shapes staying as they are."""

    channel: Annotated[int, Field(lt=0)] = Field(description="their axis; -1 are the outputs")


def _kind(pattern: Any) -> str:
    """Which pattern is meant: told by its keys."""
    if isinstance(pattern, Block):
        pattern = pattern.model_dump()
    if not isinstance(pattern, dict):
        return "unstructured"
    return next((key for key in ("tree", "block", "channel") if key in pattern), "n:m")


Level = Annotated[
    Annotated[Literal["unstructured"], Tag("unstructured")]
    | Annotated[NM, Tag("n:m")]
    | Annotated[Tiles, Tag("block")]
    | Annotated[Channels, Tag("channel")],
    Discriminator(_kind),
]


class Tree(Block):
    """Patterns within patterns: channels go, then tiles, then weights."""

    tree: tuple[Level, ...] = Field(min_length=2, description="from coarse to fine")
    parts: tuple[Positive, ...] = Field(
        default=(), description="each level's part of what goes, with sum 1; equal by default"
    )

    @pydantic.model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if any(isinstance(level, NM) for level in self.tree[:-1]):
            raise ValueError("only the last level of a tree may be n:m; others take whole units")
        if self.parts and (len(self.parts) != len(self.tree) or abs(sum(self.parts) - 1) > 1e-6):
            raise ValueError(f"`parts` has one for each of {len(self.tree)} levels, with sum 1")
        return self


Units = Annotated[
    Annotated[Literal["unstructured"], Tag("unstructured")]
    | Annotated[NM, Tag("n:m")]
    | Annotated[Tiles, Tag("block")]
    | Annotated[Channels, Tag("channel")]
    | Annotated[Tree, Tag("tree")],
    Discriminator(_kind),
]


class Sparsity(Block):
    """Pruning inside the training step, or before it on calibration data."""

    method: Literal[
        "magnitude",
        "random",
        "movement",
        "taylor",
        "snip",
        "fisher",
        "ac_dc",
        "rigl",
        "set",
        "static",
        "straight_through",
        "top_kast",
        "wanda",
        "sparsegpt",
        "least_squares",
    ] = Field(
        default="magnitude",
        description="by which score weights go on a schedule; or a way to train sparsely; or "
        "(wanda, sparsegpt, least_squares) before the stage trains, on calibration data",
    )
    target: Probability | None = Field(default=None, description="final fraction of zeros")
    at: tuple[Milestone, ...] = Field(
        default=(), description="fractions at given epochs, for `target`"
    )
    begin: Fraction = Field(
        default=0.0,
        description="where the cubic schedule to `target` begins, or an n:m pattern is pruned",
    )
    end: Fraction = Field(default=0.7, description="where it ends, and masks no longer move")
    every: Count = Field(default=10, description="steps between two choices of what is pruned")
    drop: Fraction = Field(default=0.3, description="rigl, set: share that moves at a time")
    period: Fraction = Field(default=0.1, description="ac_dc: length of each phase")
    backward: Probability = Field(
        default=0.0, description="top_kast: fraction without gradients, at most `target`"
    )
    penalty: Positive = Field(default=1e-4, description="top_kast: weight of its penalty")
    calibration_batches: Count = Field(default=16, description="wanda, sparsegpt, least_squares")
    block_size: Count | None = Field(
        default=None, description="sparsegpt: inputs chosen among at a time; null: by the layer"
    )
    damping: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None, description="sparsegpt (null: 0.01), least_squares (null: 0.0001)"
    )
    pattern: Units = "unstructured"
    scope: Literal["global", "layer", "uniform", "erk"] = Field(
        default="global",
        description="default: erk for rigl, set, static; layer for what looks at data and n:m",
    )
    where: Where = "**/kernel"
    unfit: Literal["error", "skip"] = Field(
        default="error", description="skip: leave dense what the pattern does not fit"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _scope_of_the_method(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "scope" in data:
            return data
        method = data.get("method")
        if method in DYNAMIC:
            return {**data, "scope": "erk"}
        alone = method in CALIBRATED or _kind(data.get("pattern")) == "n:m"
        return {**data, "scope": "layer"} if alone else data

    @pydantic.model_validator(mode="after")
    def _one_schedule(self) -> Self:
        if (self.target is None) == (not self.at) and not isinstance(self.pattern, NM):
            raise ValueError("say either `target` or `at`")
        if isinstance(self.pattern, NM) and (self.target is not None or self.at):
            raise ValueError("an n:m pattern is its own target: leave out `target` and `at`")
        if any(
            b.epoch < a.epoch or b.sparsity < a.sparsity for a, b in itertools.pairwise(self.at)
        ):
            raise ValueError("`at` must go forward: later epochs, and no fewer zeros")
        if self.target is not None and self.begin >= self.end:
            raise ValueError(f"`begin` ({self.begin}) must come before `end` ({self.end})")
        return self

    @pydantic.model_validator(mode="after")
    def _keys_of_the_method(self) -> Self:
        for key, methods in _KEYS.items():
            given = getattr(self, key) != type(self).model_fields[key].default
            if given and self.method not in methods:
                raise ValueError(f"`{key}` is for {', '.join(methods)}, not for `{self.method}`")
        if self.method in ("wanda", "sparsegpt") and isinstance(
            self.pattern, Tiles | Channels | Tree
        ):
            raise ValueError(f"`{self.method}` takes `unstructured` and n:m patterns")
        if self.method in DYNAMIC and isinstance(self.pattern, NM | Tree):
            kind = "n:m pattern" if isinstance(self.pattern, NM) else "tree"
            raise ValueError(f"`{self.method}` moves whole units: no {kind}")
        if self.method in (*DYNAMIC, *CALIBRATED) and self.scope == "global":
            raise ValueError(f"`{self.method}` settles each layer by itself: no `scope: global`")
        if self.method == "top_kast" and self.backward > self.final:
            raise ValueError(f"`backward` ({self.backward}) is at most `target` ({self.final})")
        return self

    @property
    def final(self) -> float:
        """The fraction of zeros in the end."""
        if isinstance(self.pattern, NM):
            return 1 - self.pattern.n / self.pattern.m
        return self.at[-1].sparsity if self.target is None else self.target
