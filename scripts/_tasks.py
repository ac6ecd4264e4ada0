"""What the benchmarks of quality share: their two tasks, and rows that are kept as they come."""

import functools
import json
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jopt
from jopt import data, nn, quant, train, trees

CONTEXT = 128


def normalised(x):
    """Bytes to floats with about zero mean and unit deviation."""
    mean, deviation = (
        jnp.asarray(v).reshape(1, 1, 1, 3) for v in (data.CIFAR10_MEAN, data.CIFAR10_STD)
    )
    return (x.astype(jnp.float32) / 255.0 - mean) / deviation


def augmented(batch, key):
    """Shifts and flips, the same wherever a batch is drawn with the same key."""
    first, second = jax.random.split(key)
    images = data.random_flip(data.random_shift(batch["inputs"], first, 4), second)
    return {**batch, "inputs": images}


def cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


class Cifar:
    """CIFAR-10 and a recipe: SGD with momentum, a rate that warms up and falls as a cosine."""

    batch_size, momentum, decay = 64, 0.9, 5e-4

    def __init__(self, data_dir, *, epochs, rate, held_out=0):
        dataset = data.cifar10(data_dir)
        dataset = dataset.hold_out(held_out) if held_out else dataset
        (images, labels), (self.images, self.labels) = dataset.train, dataset.test
        self.arrays = {"inputs": jnp.asarray(images), "labels": jnp.asarray(labels)}
        self.steps = int(epochs * len(labels) / self.batch_size)
        self.rate = rate

    def chain(self):
        schedule = optax.warmup_cosine_decay_schedule(0, self.rate, self.steps // 10, self.steps)
        return optax.chain(
            optax.add_decayed_weights(self.decay),
            optax.sgd(schedule, momentum=self.momentum, nesterov=True),
        )

    def init(self, model, seed):
        """Variables of a network: `params` and `batch_stats`."""
        return _compiled(model)[0](jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))

    def fit(self, loss, params, tx, *, collections, seed, title, folder=None):
        """Trains; `loss(params, batch, collections=...)` sees normalised images."""
        feed = train.Feed(self.arrays, self.batch_size, seed=seed, transform=augmented)
        state, _ = train.fit(
            train.make_step(loss, tx),
            train.init(params, tx, collections=collections),
            feed,
            steps=self.steps,
            checkpoints=None if folder is None else train.Checkpoints(folder),
            progress=train.Progress(title, every_s=15),
        )
        return state

    def accuracy(self, model, variables):
        """Percent of the images not trained on, with running statistics."""
        right = _compiled(model)[1]
        size = 1000
        cuts = [slice(i, i + size) for i in range(0, len(self.labels), size)]
        found = sum(int(right(variables, self.images[c], self.labels[c])) for c in cuts)
        return 100 * found / len(self.labels)


@functools.cache
def _compiled(model):
    """Compiled once for all runs: how a network begins, and how many images it gets right."""

    @jax.jit
    def right(variables, x, y):
        return jnp.sum(jnp.argmax(jopt.lift(model.apply)(variables, normalised(x)), -1) == y)

    return jax.jit(model.init), right


class Shakespeare:
    """A transformer over characters, 8 layers scanned, and the loss in nats on the test text.

    With `gated` it has the parts of LLaMA's layers, and what is no matrix between hidden layers
    learns faster, which the maximal update parametrization (Yang et al., 2022, arXiv:2203.03466)
    calls for: by Adam at 200 (gains) and 100 times (embeddings) the rate of the matrices. They
    were looked for at half the width and depth, the matrices' twice as high, as ones that train
    well and leave inputs of uneven sizes; `docs/benchmarks.md` has what was tried.
    """

    peak = 1e-3

    def __init__(self, data_dir, *, steps=1500, seed=0, windows=None, gated=False):
        self.gated = gated
        self.dataset = data.shakespeare(data_dir)
        self.model = self.network(layers=8)
        self.apply = self.model.apply
        self.windows = data.windows(self.dataset.train, 2 * CONTEXT, stride=CONTEXT)
        self.test = data.windows(self.dataset.test, CONTEXT + 1)[:windows]
        self.steps = steps
        self.feed = train.Feed({"tokens": self.windows}, 16, seed=seed, transform=cut)
        self.batches = self.calibration(seed)

    def network(self, *, layers):
        return nn.CharTransformer(
            self.dataset.classes,
            layers=layers,
            width=256,
            heads=4,
            context=CONTEXT,
            gated=self.gated,
        )

    def calibration(self, seed):
        """Sixteen batches of sixteen windows of the training text."""
        rng = np.random.default_rng(seed)
        rows = rng.choice(len(self.windows), (16, 16), replace=False)
        return [jnp.asarray(self.windows[r, :CONTEXT], jnp.int32) for r in rows]

    def init(self, seed):
        return self.model.init(jax.random.key(seed), self.batches[0])

    def float(self, seed, folder):
        """The trained parameters, as `folder` has them, or trained now."""
        return fitted(self, self.init(seed), self.steps, self.chain(self.peak, self.steps), folder)

    def loss(self, params, batch):
        tokens = batch["tokens"].astype(jnp.int32)
        return cross_entropy(jopt.lift(self.apply)(params, tokens[:, :-1]), tokens[:, 1:])

    def chain(self, peak, steps):
        def rate(peak):
            return optax.warmup_cosine_decay_schedule(0, peak, steps // 15, steps, peak / 100)

        chain = optax.adamw(rate(peak), weight_decay=0.3 if self.gated else 0.1)
        if self.gated:
            rules = {
                "kernel": chain,
                "scale": optax.adam(rate(200 * peak)),
                "embedding": optax.adam(rate(100 * peak)),
                "positions": optax.adam(rate(100 * peak)),
            }
            chain = optax.multi_transform(rules, last_names)
        return optax.chain(optax.clip_by_global_norm(1.0), chain)

    def evaluate(self, params):
        total = jax.jit(lambda p, t: self.loss(p, {"tokens": t}) * len(t))
        cuts = range(0, len(self.test), 64)
        return sum(float(total(params, self.test[i : i + 64])) for i in cuts) / len(self.test)


def last_names(params):
    return trees.map_with_path(lambda path, _: path.rsplit("/", 1)[-1], params)


def cut(batch, key):
    """A window of `CONTEXT + 1` characters somewhere in each of twice that."""
    tokens = batch["tokens"]
    starts = jax.random.randint(key, (tokens.shape[0],), 0, tokens.shape[1] - CONTEXT)
    window = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (CONTEXT + 1,)))
    return {"tokens": window(tokens, starts)}


def fitted(task, params, steps, chain, folder):
    """Trains, going on from what `folder` holds."""
    links = [chain]
    frozen = jax.tree.map(lambda leaf: not leaf, quant.trainable(params))
    if "batch_stats" in params:  # folded: what is left of them stays
        frozen["batch_stats"] = jax.tree.map(lambda leaf: True, frozen["batch_stats"])
    if any(jax.tree.leaves(frozen)):
        links.append(optax.transforms.freeze(frozen))
    tx = optax.chain(*links)
    step = train.make_step(task.loss, tx)
    state, _ = train.fit(
        step,
        train.init(params, tx),
        task.feed,
        steps=steps,
        checkpoints=None if folder is None else train.Checkpoints(folder),
        progress=train.Progress(f"{steps} steps"),
    )
    return state.params


class Rows:
    """One JSON file a finished run, in a folder named by what all runs have in common."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name, seed):
        path = self._path(name, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, name, seed, row):
        """Written whole or not at all."""
        path = self._path(name, seed)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"name": name, "seed": seed, **row}, indent=2))
        partial.replace(path)

    def run(self, names, seeds, make):
        """Makes what is missing, seed by seed, so that a cut leaves whole seeds."""
        for seed in seeds:
            for name in names:
                if self.get(name, seed) is None:
                    row = make(name, seed)
                    self.put(name, seed, row)
                    print(f"seed {seed}  {name:32} {row}", flush=True)

    def values(self, name, key):
        """Of every seed there is, in the order of the seeds."""
        found = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        mine = sorted((row["seed"], row[key]) for row in found if row["name"] == name)
        return [value for _, value in mine]

    def _path(self, name, seed):
        word = "".join(c if c.isalnum() else "-" for c in name)
        return self.folder / f"{word}-{seed}.json"


def spread(values, digits=2):
    """Mean ± deviation and how many there are."""
    if not values:
        return "–"
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f} (1)"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"
