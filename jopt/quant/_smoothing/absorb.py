"""Which parameters can take a factor for each channel out of an activation, exactly.

An activation shall be divided by s along its channels, and the weights that it meets multiplied by
s. The search starts from that wish and follows what it entails, through every operation that makes
a value or reads it, until all ends in parameters: a layer norm's scale and bias, the outputs of the
product before, the weights of all products that read the activation. What an operation entails is
one rule for each; one that would not keep its results ends the search with the reason.
"""

from typing import NamedTuple

from .dataflow import SLICE, Node, Value
from .follow import RULES
from .wishes import Search, Stuck, Wish


class Edit(NamedTuple):
    """A parameter to be multiplied by s to a power."""

    path: str
    axes: tuple[int, ...]  # the channels, counted from the end
    power: int
    stack: int  # how many leading axes s has as well


def absorbed(weight: Value, axes: tuple[int, ...]) -> tuple[Edit, ...]:
    """What must change with `weight`, multiplied by s along axes that products sum over.

    Raises `Stuck`.
    """
    depth = stacked(weight)
    search = Search({weight: Wish(axes, 1, depth)}, [weight])
    edits = tuple(
        Edit(value.path, *wish)
        for value, wish in settled(search).wishes.items()
        if value.path is not None and value.maker is None
    )
    if any(edit.stack != depth for edit in edits):
        raise Stuck("layers share a parameter that would need a factor for each of them")
    return edits


def stacked(weight: Value) -> int:
    """How many scans slice a weight on its way to a product."""
    slices = [node for node in weight.readers if node.name == SLICE]
    return 1 + stacked(slices[0].outputs[0]) if slices else 0


def settled(search: Search) -> Search:
    """Follows all wishes to their ends; raises `Stuck` if there is no way."""
    while search.waiting:
        value = search.waiting.pop()
        if value.result:
            raise Stuck("the function, or a loop in it, returns the activation")
        if value.maker is None and value.path is None:
            raise Stuck(value.unmade)
        for node in ([] if value.maker is None else [value.maker]) + value.readers:
            if node.name == "mul":
                chosen = _product(search, node)
                if chosen is not search:
                    return chosen
                continue
            rule = RULES.get(node.name)
            if rule is None:
                raise Stuck(f"`{node.name}` ({node.source})")
            rule(search, node)
    return search


def _product(search: Search, node: Node) -> Search:
    """One factor goes with the result; if the choice is open, that with parameters in it first."""
    (out,) = node.outputs
    wished = [x for x in node.inputs if isinstance(x, Value) and x in search.wishes]
    if len(wished) == 2 or (len(wished) == 1 and node.inputs[0] is node.inputs[1]):
        raise Stuck(f"`mul` of two values that both have the channels ({node.source})")
    if wished:
        search.wish(node, out, search.wishes[wished[0]])
        return search
    if out not in search.wishes:
        return search
    why = Stuck(f"`mul` ({node.source})")
    choices = [x for x in node.inputs if isinstance(x, Value)]
    for choice in sorted(choices, key=lambda x: not _of_parameters(x)):
        attempt = search.copy()
        attempt.waiting.append(out)  # its other readers have yet to be looked at
        try:
            attempt.wish(node, choice, search.wishes[out])
            return settled(attempt)
        except Stuck as stuck:
            why = stuck
    raise why


def _of_parameters(value: Value, steps: int = 3) -> bool:
    """Whether a parameter comes in within a few operations."""
    if value.maker is None or not steps:
        return value.path is not None
    inputs = [x for x in value.maker.inputs if isinstance(x, Value)]
    return any(_of_parameters(x, steps - 1) for x in inputs)
