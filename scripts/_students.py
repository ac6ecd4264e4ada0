"""Students of the text task: a transformer of four layers taught by one of eight."""

import pathlib
import time

import jax
import jax.numpy as jnp
from _tasks import Shakespeare, cross_entropy, cut, spread

from jopt import distill, train

DIVERGENCES = {"forward": distill.kd, "reverse": distill.reverse_kl, "js": distill.js}


class Text:
    """One teacher, and students of half its layers that differ in their loss alone."""

    names = ("alone", *DIVERGENCES)

    def __init__(self, args, folder):
        self.steps, self.folder = args.steps, folder
        self.task = Shakespeare(args.data_dir, steps=args.teacher_steps, windows=args.windows)
        models = pathlib.Path(args.models)
        self.known = self.task.float(0, models / f"text-{args.teacher_steps}-0")
        self.student = self.task.network(layers=4)

    def make(self, name, seed):
        began = time.perf_counter()
        if name == "teacher":
            return self.row(self.task.model, self.known, began)
        tx = self.task.chain(self.task.peak, self.steps)
        params = self.student.init(jax.random.key(1 + seed), self.task.batches[0])
        state, _ = train.fit(
            train.make_step(self.loss(name), tx),
            train.init(params, tx, collections={} if name == "alone" else {"teacher": self.known}),
            train.Feed({"tokens": self.task.windows}, 16, seed=1 + seed, transform=cut),
            steps=self.steps,
            checkpoints=train.Checkpoints(self.folder / f"{name}-{seed}", keep=1, every_s=120),
            progress=train.Progress(f"{name}, seed {seed}", every_s=60),
        )
        return self.row(self.student, state.params, began)

    def loss(self, name):
        def loss(params, batch, *, collections=None):
            tokens = batch["tokens"].astype(jnp.int32)
            logits = self.student.apply(params, tokens[:, :-1])
            if name == "alone":
                return cross_entropy(logits, tokens[:, 1:])
            known = self.task.apply(collections["teacher"], tokens[:, :-1])
            return DIVERGENCES[name](logits, known), train.Aux(collections)

        return loss

    def row(self, model, params, began):
        """Loss and divergences on the test text."""

        @jax.jit
        def totals(params, known, tokens):
            tokens = tokens.astype(jnp.int32)
            logits = model.apply(params, tokens[:, :-1])
            wise = self.task.apply(known, tokens[:, :-1])
            values = {
                "loss": cross_entropy(logits, tokens[:, 1:]),
                "forward": distill.kd(logits, wise),
                "reverse": distill.reverse_kl(logits, wise),
            }
            return jax.tree.map(lambda value: value * len(tokens), values)

        seconds, test = round(time.perf_counter() - began, 1), self.task.test
        found = [totals(params, self.known, test[i : i + 64]) for i in range(0, len(test), 64)]
        means = jax.tree.map(lambda *values: float(sum(values)) / len(test), *found)
        return {**means, "seconds": seconds}


def text_table(args, rows):
    print(f"{args.steps} steps\n")
    print("| student | loss, nats | KL(teacher ‖ student) | KL(student ‖ teacher) |")
    print("|---|---:|---:|---:|")
    for name in ("teacher", *Text.names):
        cells = [rows.values(name, key) for key in ("loss", "forward", "reverse")]
        print(f"| {name} | " + " | ".join(spread(cell, 4) for cell in cells) + " |")
