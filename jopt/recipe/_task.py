"""What a model is trained for: the arrays, the loss, and how well a function does it."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jopt import data

PyTree = Any
Apply = Callable[[PyTree, jax.Array], jax.Array]
Transform = Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]
EVALUATION_BATCH = 500


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Examples with labels, and what the logits of a model are compared with.

    Images have one label each. Text is windows of `context + 1` characters: the inputs are all but
    the last, the labels all but the first.
    """

    kind: Literal["images", "text"]
    train: dict[str, np.ndarray]  # arrays with leading axis examples
    test: dict[str, np.ndarray]
    inputs: jax.ShapeDtypeStruct  # one example as the model takes it, without the batch axis
    classes: int
    normalise: tuple[np.ndarray, np.ndarray] | None  # mean and deviation of pixels in [0, 1]
    about: str

    @classmethod
    def images(cls, dataset: Any, *, scale: tuple[Any, Any] | None) -> "Task":
        """Classification of images; `scale` is the mean and deviation to normalize bytes with."""
        (train_x, train_y), (test_x, test_y) = dataset.train, dataset.test
        return cls(
            kind="images",
            train={"inputs": train_x, "labels": train_y},
            test={"inputs": test_x, "labels": test_y},
            inputs=jax.ShapeDtypeStruct(train_x.shape[1:], jnp.float32),
            classes=dataset.classes,
            normalise=None
            if scale is None
            else (np.asarray(scale[0], np.float32), np.asarray(scale[1], np.float32)),
            about=dataset.info,
        )

    @classmethod
    def text(cls, dataset: Any, *, context: int) -> "Task":
        """Prediction of the next character from those before it."""
        return cls(
            kind="text",
            train={"tokens": data.windows(dataset.train, 2 * context, stride=context)},
            test={"tokens": data.windows(dataset.test, context + 1)},
            inputs=jax.ShapeDtypeStruct((context,), jnp.int32),
            classes=dataset.classes,
            normalise=None,
            about=dataset.info,
        )

    def examples(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """The model's inputs and the labels of a raw batch."""
        if self.kind == "text":
            tokens = jnp.asarray(batch["tokens"], jnp.int32)
            return tokens[:, :-1], tokens[:, 1:]
        inputs, labels = batch["inputs"], jnp.asarray(batch["labels"], jnp.int32)
        if self.normalise is not None:
            mean, deviation = (jnp.asarray(part).reshape(1, 1, 1, -1) for part in self.normalise)
            inputs = (inputs.astype(jnp.float32) / 255.0 - mean) / deviation
        return inputs, labels

    @property
    def train_size(self) -> int:
        """The number of training examples."""
        return len(next(iter(self.train.values())))

    def transform(self, augment: Transform | None) -> Transform | None:
        """What happens to a raw batch inside the step: for text, each window is cut at random."""
        if self.kind == "images":
            return augment
        width = self.inputs.shape[0] + 1

        def cut(batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
            tokens = batch["tokens"]
            starts = jax.random.randint(key, (tokens.shape[0],), 0, tokens.shape[1] - width + 1)
            rows = jax.vmap(lambda row, start: jax.lax.dynamic_slice(row, (start,), (width,)))
            return {**batch, "tokens": rows(tokens, starts)}

        return cut

    def evaluate(self, apply: Apply, variables: PyTree) -> dict[str, float]:
        """Mean loss and accuracy over all test examples (for text: over all characters).

        One compilation, whatever the number of examples: the last batch is padded and its padding
        does not count.
        """
        total = len(next(iter(self.test.values())))
        size = min(EVALUATION_BATCH if self.kind == "images" else 64, total)

        @jax.jit
        def sums(variables: PyTree, batch: dict[str, jax.Array], valid: jax.Array) -> jax.Array:
            inputs, labels = self.examples(batch)
            logits = apply(variables, inputs).astype(jnp.float32)
            weight = jnp.broadcast_to(valid.reshape(-1, *(1,) * (labels.ndim - 1)), labels.shape)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            right = jnp.argmax(logits, -1) == labels
            return jnp.stack([jnp.sum(x * weight) for x in (losses, right.astype(jnp.float32))])

        found = np.zeros(2)
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            batch = {name: array[rows] for name, array in self.test.items()}
            valid = (np.arange(start, start + size) < total).astype(np.float32)
            found += np.asarray(sums(variables, batch, valid), np.float64)
        labels = total * (self.inputs.shape[-1] if self.kind == "text" else 1)
        return {"loss": float(found[0] / labels), "accuracy": float(found[1] / labels)}

    def test_inputs(self, count: int) -> np.ndarray:
        """The first `count` test examples as the model takes them."""
        return np.asarray(
            self.examples({k: jnp.asarray(v[:count]) for k, v in self.test.items()})[0]
        )

    def train_inputs(self, count: int, size: int) -> list[jax.Array]:
        """`count` batches of `size` training examples, from the start, for calibration."""
        cut = self.inputs.shape[0] + 1 if self.kind == "text" else None
        rows = [np.arange(i * size, (i + 1) * size) % self.train_size for i in range(count)]
        batches = [{name: array[r] for name, array in self.train.items()} for r in rows]
        if cut is not None:
            batches = [{"tokens": batch["tokens"][:, :cut]} for batch in batches]
        return [self.examples(jax.tree.map(jnp.asarray, batch))[0] for batch in batches]
