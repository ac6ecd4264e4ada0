"""A training run to be killed: `killed_run.py DIRECTORY STEPS`. Prints a digest of its end."""

import hashlib
import sys

import jax
import optax
import toy_training as toy

from jopt import train
from jopt.train import _loop


def main(directory, steps):
    """Trains in chunks of 20 steps with a checkpoint after each; `ready` once all is compiled."""
    _loop.next_length = lambda count, seconds: 20
    tx = optax.sgd(0.1, momentum=0.9)
    step = train.make_step(toy.full(), tx)
    state = train.init(toy.params(), tx, collections=toy.collections(), key=jax.random.key(0))
    feed = train.Feed(toy.data(), 16, seed=0)

    class Ready(train.Progress):
        def update(self, done, metrics, rate):
            print("ready", done, flush=True)

    state, _ = train.fit(
        step,
        state,
        feed,
        steps=steps,
        checkpoints=train.Checkpoints(directory, every_s=0.0),
        log=train.MetricLog(directory),
        progress=Ready(),
    )
    digest = hashlib.sha256(b"".join(toy.bits(leaf) for leaf in jax.tree.leaves(state)))
    print("end", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
