"""What a stage that distills adds to training: its teachers, its loss, and what learns beside.

The state of such a stage holds, next to the student's parameters, the projections between features
(`maps`); and next to the student's collections the step, the student's average where that teaches,
and the banks of contrastive losses. All of it is in the checkpoints; only the student leaves.
"""

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import distill, trace, train, trees
from jopt.recipe import _lessons as lessons
from jopt.recipe import _losses as losses
from jopt.recipe._model import Model, forward, inference, training
from jopt.recipe._task import Task

PyTree = Any
Rows = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Lesson:
    """A student, its teachers, and what it learns from them."""

    config: lessons.Distillation
    student: Model
    teachers: tuple[Model, ...]
    task: Task
    steps: int
    batch_size: int
    smoothing: float = 0.0

    def arrays(self) -> dict[str, np.ndarray]:
        """The training data, numbered where a loss remembers examples."""
        if not self._contrasts():
            return self.task.train
        return {**self.task.train, "index": np.arange(self.task.train_size, dtype=np.int32)}

    def variables(self) -> tuple[PyTree, ...]:
        """Those of the teachers, for `loss`."""
        return tuple(teacher.variables for teacher in self.teachers)

    def begin(self, params: PyTree, collections: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        """What trains, and what else a step carries along, at step 0."""
        beside = {"model": collections, "step": jnp.zeros((), jnp.int32)}
        if isinstance(self.config.teacher, lessons.Average):
            beside["average"] = self._mean().init(params)
        maps, banks = {}, {}
        features = self._shapes() if self.config.features else {}
        for i, loss in enumerate(self.config.features):
            name = f"{i}-{loss.kind}"
            own = jax.random.fold_in(key, i)
            chosen = {tap: features[tap] for tap in self._taps(loss)}
            if isinstance(loss, lessons.CRD):
                keys = jax.random.split(own, 3 * len(chosen)).reshape(len(chosen), 3)
                maps[name], banks[name] = {}, {}
                for (tap, pair), (*sides, row) in zip(chosen.items(), keys, strict=True):
                    maps[name][tap] = [
                        distill.projection(k, x.shape[-1], loss.width)
                        for k, x in zip(sides, pair, strict=True)
                    ]
                    banks[name][tap] = distill.crd_bank(row, self.task.train_size, loss.width)
            elif isinstance(loss, lessons.Hints):
                maps[name] = distill.projections(own, chosen)
        return {"model": params, "maps": maps}, beside | ({"banks": banks} if banks else {})

    def chain(
        self, model: optax.GradientTransformation, maps: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """One transformation for the student, so that its paths are its own, and one for `maps`."""
        sides = {
            "model": optax.with_extra_args_support(model),
            "maps": optax.with_extra_args_support(maps),
        }

        def init(params: PyTree) -> PyTree:
            return {name: tx.init(params[name]) for name, tx in sides.items()}

        def update(
            updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
        ) -> tuple[PyTree, PyTree]:
            assert params is not None  # the train step gives them
            both = {
                name: tx.update(updates[name], state[name], params[name], **extra)
                for name, tx in sides.items()
            }
            return {k: u for k, (u, _) in both.items()}, {k: s for k, (_, s) in both.items()}

        return optax.GradientTransformationExtraArgs(init, update)

    def finish(self, state: train.State) -> train.State:
        """The state of the student alone."""
        assert state.collections is not None
        return state._replace(
            params=state.params["model"],
            opt_state=state.opt_state["model"],
            collections=state.collections["model"],
        )

    def loss(
        self,
        variables: tuple[PyTree, ...],
        params: PyTree,
        batch: dict[str, jax.Array],
        *,
        collections: PyTree,
        key: jax.Array,
    ) -> tuple[jax.Array, train.Aux]:
        """The loss of a batch, given the variables of the teachers."""
        config, step = self.config, collections["step"]
        value = lambda number: losses.at(number, step, self.steps)  # noqa: E731
        temperature = value(config.temperature)
        inputs, labels = self.task.examples(batch)
        beside = dict(collections)
        if "average" in beside:
            beside["average"] = self._averaged(beside["average"], params["model"])
            average = distill.teacher_of(beside["average"], params["model"])
            variables = ({"params": average, **collections["model"]},)
        told = self._told(variables, params["model"], collections["model"], inputs, key)
        logits, beside["model"] = told.student
        logits = logits.astype(jnp.float32)
        wanted = self._wanted(told.teacher, temperature)
        hard = distill.hard(logits, labels, smoothing=self.smoothing)
        soft = losses.soft(
            config.loss,
            logits,
            wanted,
            labels,
            temperature=temperature,
            step=step,
            steps=self.steps,
        )
        total = distill.mixed(hard, soft, weight=value(config.weight))
        if config.features:
            more, beside = self._featured(told.features, params["maps"], batch, beside, key)
            total = total + more
        beside["step"] = step + 1
        accuracy = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
        metrics = {"accuracy": accuracy, "hard": hard, "soft": soft}
        return total, train.Aux(collections=beside, metrics=metrics)

    # What both models say --------------------------------------------------------------------

    def _told(
        self,
        variables: tuple[PyTree, ...],
        params: PyTree,
        collections: PyTree,
        inputs: Any,
        key: jax.Array,
    ) -> distill.Paired:
        """The student's logits and new collections, the teachers' logits, and the features."""
        if not self.config.features:
            out = training(self.student.module)(params, collections, inputs, key)
            taught = [
                distill.teacher(inference(module))(own, inputs)
                for module, own in zip(self._modules(), variables, strict=True)
            ]
            return distill.Paired(out, taught, {})
        theirs = {name: part for name, part in variables[0].items() if name != "params"}
        mapping = {ours: other for pairs in self._table.values() for ours, other in pairs.items()}
        named = distill.pairs(self._student, self._teacher, mapping, alike="nothing")
        out = named(params, variables[0]["params"], (collections, theirs), inputs, key)
        return out._replace(teacher=[out.teacher])

    def _wanted(self, logits: list[jax.Array], temperature: jax.Array) -> jax.Array:
        """The logits that the student is held against: the teacher's, or the ensemble's."""
        if len(logits) == 1:
            return logits[0].astype(jnp.float32)
        said = lambda own, inputs: own.astype(jnp.float32)  # noqa: E731
        return distill.ensemble(said, of=self.config.of, temperature=temperature)(logits, None)

    def _student(self, params: PyTree, both: Any, inputs: Any, key: jax.Array) -> Any:
        return forward(self.student.module)(params, both[0], inputs, key)

    def _teacher(self, params: PyTree, both: Any, inputs: Any, key: jax.Array) -> Any:
        del key
        return self._modules()[0].apply({"params": params, **both[1]}, inputs)

    def _modules(self) -> list[Any]:
        return [model.module for model in self.teachers or (self.student,)]

    @functools.cached_property
    def _table(self) -> dict[str, dict[str, str]]:
        """The table `taps`, for each of its keys the taps that it pairs."""
        teacher = (self.teachers or (self.student,))[0]
        collections = self.student.collections, teacher.collections
        rest = (collections, self._example(), jax.eval_shape(lambda: jax.random.key(0)))
        ours, theirs = (
            [tap.name for tap in trace.tappable(apply, params, *rest)]
            for apply, params in (
                (self._student, self.student.params),
                (self._teacher, teacher.params),
            )
        )
        table = {}
        for left, right in self.config.taps.items():
            names = _matching("student", left, ours), _matching("teacher", right, theirs)
            if len(names[0]) != len(names[1]):
                raise ValueError(
                    f"`taps`: `{left}` is {len(names[0])} of the student's, `{right}` "
                    f"{len(names[1])} of the teacher's: {', '.join(names[0])}; "
                    f"{', '.join(names[1])}"
                )
            table[left] = dict(zip(*names, strict=True))
        return table

    def _taps(self, loss: lessons.FeatureLoss) -> list[str]:
        """The student's taps of a loss, globs written out."""
        return [tap for key in loss.taps or self._table for tap in self._table[key]]

    def _example(self) -> jax.ShapeDtypeStruct:
        inputs = self.task.inputs
        return jax.ShapeDtypeStruct((self.batch_size, *inputs.shape), inputs.dtype)

    def _shapes(self) -> dict[str, Any]:
        """The features of a batch, as shapes."""
        model = self.student
        variables = self.variables() or (model.variables,)
        key = jax.random.key(0)
        return jax.eval_shape(
            self._told, variables, model.params, model.collections, self._example(), key
        ).features

    # What goes on beside ---------------------------------------------------------------------

    def _mean(self) -> optax.GradientTransformationExtraArgs:
        assert isinstance(self.config.teacher, lessons.Average)
        return distill.mean_teacher(self.config.teacher.average)

    def _averaged(self, state: PyTree, params: PyTree) -> PyTree:
        """The student's average with its parameters of now in it."""
        params = jax.lax.stop_gradient(params)
        still = jax.tree.map(jnp.zeros_like, params)
        return self._mean().update(still, state, params)[1]

    def _featured(
        self,
        features: Mapping[str, Any],
        maps: PyTree,
        batch: dict[str, jax.Array],
        beside: dict[str, Any],
        key: jax.Array,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The weighted losses on features, and the banks after them."""
        total, banks = jnp.float32(0), {}
        for i, loss in enumerate(self.config.features):
            name = f"{i}-{loss.kind}"
            chosen = {tap: features[tap] for tap in self._taps(loss)}
            if isinstance(loss, lessons.CRD):
                rows = self._rows(batch, loss.negatives, jax.random.fold_in(key, i))
                value, banks[name] = jnp.float32(0), {}
                for tap, pair in chosen.items():
                    more, banks[name][tap] = losses.contrasted(
                        loss, pair, maps[name][tap], beside["banks"][name][tap], rows
                    )
                    value = value + more
            else:
                value = losses.on_features(loss, chosen, maps.get(name, {}))
            total = total + losses.at(loss.weight, beside["step"], self.steps) * value
        return total, beside | ({"banks": banks} if banks else {})

    def _rows(self, batch: dict[str, jax.Array], count: int, key: jax.Array) -> Rows:
        """The numbers of the batch's images, and for each those of `count` of other classes."""
        labels = np.asarray(self.task.train["labels"])
        sizes = np.bincount(labels, minlength=self.task.classes)
        order = jnp.asarray(np.argsort(labels, kind="stable").astype(np.int32))
        starts = jnp.asarray((np.cumsum(sizes) - sizes).astype(np.int32))
        mine = jnp.asarray(batch["labels"], jnp.int32)
        own, start = jnp.asarray(sizes.astype(np.int32))[mine][:, None], starts[mine][:, None]
        drawn = jax.random.randint(key, (len(mine), count), 0, len(labels) - own)
        return batch["index"], order[drawn + jnp.where(drawn >= start, own, 0)]

    def _contrasts(self) -> bool:
        return any(isinstance(loss, lessons.CRD) for loss in self.config.features)

    def check(self) -> None:
        """Says what cannot work, before anything trains; the models may be of shapes alone.

        Raises:
          ValueError, TypeError: with the key of the recipe, and what there is.
        """
        if self._contrasts() and self.task.kind != "images":
            raise ValueError("`features`: `crd` contrasts images of several classes, not text")
        key = jax.random.key(0)
        model = self.student
        params, beside = jax.eval_shape(self.begin, model.params, model.collections, key)
        batch = {
            name: jax.ShapeDtypeStruct((self.batch_size, *array.shape[1:]), array.dtype)
            for name, array in self.arrays().items()
        }
        if self.task.kind == "text":
            batch = {
                "tokens": jax.ShapeDtypeStruct(
                    (self.batch_size, self.task.inputs.shape[0] + 1), jnp.int32
                )
            }
        jax.eval_shape(
            lambda *given: self.loss(*given[:3], collections=given[3], key=given[4]),
            self.variables(),
            params,
            batch,
            beside,
            key,
        )


# Helpers, in order of use.


def _matching(who: str, name: str, names: Sequence[str]) -> list[str]:
    """What a tap of the table is: itself, or all that its glob matches, `[i]` kept."""
    bare, bracket, index = name.partition("[")
    if "*" in bare or "?" in bare:
        found = [known for known in names if trees.matches(bare, known, None)]
    else:
        found = [bare] if bare in names or name in names else []
    if not found:
        near = difflib.get_close_matches(bare, names, n=1, cutoff=0.5)
        known = ", ".join(f"`{one}`" for one in names[:12])
        hint = f"did you mean `{near[0]}`?" if near else f"there are: {known}"
        raise ValueError(f"`taps`: the {who} has no `{name}`; {hint}")
    return [f"{one}{bracket}{index}" for one in found]
