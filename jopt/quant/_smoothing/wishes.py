"""What a search for neighbours wishes of values, and why it may come to nothing."""

import dataclasses
from typing import NamedTuple

from .dataflow import Literal, Node, Value


class Stuck(Exception):
    """Why a factor cannot be moved."""


class Wish(NamedTuple):
    """That a value shall be multiplied by s to a power, along axes."""

    axes: tuple[int, ...]  # counted from the end, the channels' major one first
    power: int  # 1 or -1
    stack: int = 0  # how many leading axes s has as well: layers that a scan slices


@dataclasses.dataclass
class Search:
    """What is wished of which value; what has yet to be looked at."""

    wishes: dict[Value, Wish] = dataclasses.field(default_factory=dict)
    waiting: list[Value] = dataclasses.field(default_factory=list)

    def copy(self) -> "Search":
        """To try one of several ways."""
        return Search(dict(self.wishes), list(self.waiting))

    def wish(self, node: Node, atom: Value | Literal, wish: Wish) -> None:
        """Adds a wish, or checks it against one that is there."""
        if isinstance(atom, Literal):
            if not atom.zero:
                raise Stuck(f"`{node.name}` with a number ({node.source})")
            return
        sizes = [atom.shape[axis] for axis in wish.axes if -axis <= len(atom.shape)]
        if len(sizes) < len(wish.axes):
            raise Stuck(f"`{node.name}` broadcasts the channels ({node.source})")
        wish = wish._replace(
            axes=tuple(a for a, size in zip(wish.axes, sizes, strict=True) if size != 1)
        )
        if (old := self.wishes.get(atom)) is None:
            self.wishes[atom] = wish
            self.waiting.append(atom)
        elif old != wish:
            raise Stuck(f"`{node.name}` would need two different factors ({node.source})")
