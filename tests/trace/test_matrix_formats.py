"""The matrix again, on weights in groups of 4 bits and in NF4: values are those of the dequantized.

All frameworks in two operations that they write themselves, by hand in all of them; the rest of the
frameworks are `slow`, since by hand and lifted their programs are the same.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from matrix_cells import OPERATIONS, WEIGHTS
from test_matrix import FRAMEWORKS, QUICK, close, derivatives, lifted, made
from toy_leaves import dense

from jopt import quant, trees
from jopt.trace import explain, sites


def group(size):
    return quant.Int(4, symmetric=False, granularity="group", group_size=size)


FORMATS = {"int4 in groups": group, "nf4": lambda size: quant.NF4(group_size=size)}
OWN = ("dense", "stacked_layers")  # written by each framework itself
CELLS = [
    pytest.param(
        framework,
        operation,
        marks=() if framework == "plain" or operation in OWN else pytest.mark.slow,
    )
    for framework in FRAMEWORKS
    for operation in OPERATIONS
]


def policy(cell, format):
    """The format for each weight, in groups as large as divide its inputs."""
    found = sites(cell.apply, cell.params, cell.x)
    axes = {use.path: use.contracted for site in found for use in site.uses if use.contracted}
    entries = []
    for path, leaf in trees.items(cell.params):
        if jnp.ndim(leaf) < 2 or re.fullmatch(WEIGHTS, path) is None:
            continue
        inputs = leaf.shape[max(axes.get(path, (-2,)))]
        size = next(n for n in (4, 3, 2, 1) if inputs % n == 0)
        entries.append((path, format(size)))
    return entries, found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("framework", "operation"), CELLS)
def test_weights_in_groups_and_tables(framework, operation, format):
    cell = made(framework, operation)[0]
    entries, found = policy(cell, FORMATS[format])
    stored = quant.quantize(cell.params, entries, sites=found)
    f = lifted(cell)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def answers(stored, x):
        ours = derivatives(f, cell, stored, x)
        return ours, derivatives(lambda p, x: cell.apply(dense(p), x), cell, stored, x)

    ours, dequantized = answers(stored, cell.x)
    close(ours[0], dequantized[0])
    close(ours[1], dequantized[1], 5e-4)
    weights = {path for path, leaf in trees.items(stored) if isinstance(leaf, quant.QArray)}
    assert {met.path for met in explain(cell.apply, stored, cell.x)} == weights
