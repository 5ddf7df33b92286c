"""The shape of a draft: what may follow what among the tokens that are pending."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tree:
    """Node 0 is a row's newest token; node i > 0 is a guess at what follows node parents[i - 1].

    Level by level, and the children of one node in the order in which they are tried. `chain(J)` is the plain draft of
    J tokens, `branching(4, 2, 1)` has four first tokens, two after each of them, and one after each of these.
    Static: the arrays here are numpy and hold for every row.
    """

    parents: tuple[int, ...]  # of the nodes 1 .. M

    def __post_init__(self) -> None:
        depths = [0]
        for node, parent in enumerate(self.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(f"node {node} of a draft tree follows node {parent}: it must follow an earlier one")
            depths.append(depths[parent] + 1)
        if depths != sorted(depths):
            raise ValueError(f"a draft tree has nodes of depths {depths}: list it level by level")

    @classmethod
    def chain(cls, J: int) -> Tree:
        """Each token follows the one before."""
        return cls(tuple(range(J)))

    @classmethod
    def branching(cls, *widths: int) -> Tree:
        """Every node of a level has so many children."""
        if not widths or min(widths) < 1:
            raise ValueError(f"a draft tree of widths {widths} has no end: give at least one number, all at least 1")
        parents: list[int] = []
        level = [0]
        for width in widths:
            parents += [node for node in level for _ in range(width)]
            level = list(range(len(parents) + 1 - len(level) * width, len(parents) + 1))
        return cls(tuple(parents))

    @functools.cached_property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.parents == tuple(range(len(self.parents)))

    @property
    def num_nodes(self) -> int:
        """M + 1, the newest token included."""
        return len(self.parents) + 1

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """[M + 1]: how many guesses lead to each node, itself included."""
        depth = np.zeros(self.num_nodes, np.int32)
        for node, parent in enumerate(self.parents, 1):
            depth[node] = depth[parent] + 1
        return depth

    @property
    def height(self) -> int:
        """D: the most tokens that one round can accept. J of a chain."""
        return int(self.depth[-1])

    @functools.cached_property
    def sees(self) -> np.ndarray:
        """[M + 1, M + 1] bool: whether a node follows another one, or is it."""
        sees = np.eye(self.num_nodes, dtype=bool)
        for node, parent in enumerate(self.parents, 1):
            sees[node] |= sees[parent]
        return sees

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """[M + 1]: how many children of its parent come before a node."""
        rank = np.zeros(self.num_nodes, np.int32)
        for node, parent in enumerate(self.parents, 1):
            rank[node] = self.parents[: node - 1].count(parent)
        return rank

    @functools.cached_property
    def within(self) -> np.ndarray:
        """[D + 1]: how many nodes are at most so deep."""
        return np.searchsorted(self.depth, np.arange(self.height + 1), side="right").astype(np.int32)

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """[M + 1, D]: the nodes from the first guess to each node, itself included; past its depth itself again."""
        paths = np.zeros((self.num_nodes, self.height), np.int32)
        for node in range(self.num_nodes):
            steps = np.flatnonzero(self.sees[node])[1:]
            paths[node] = np.append(steps, [node] * (self.height - len(steps)))
        return paths

    def level(self, depth: int) -> tuple[int, int]:
        """The nodes of a depth, as a range [first, last)."""
        return int(self.within[depth - 1]) if depth else 0, int(self.within[depth])


def branching(text: str | Sequence[int]) -> Tree:
    """ "4,2,1" as `Tree.branching(4, 2, 1)`."""
    try:
        widths = [int(part) for part in text.split(",")] if isinstance(text, str) else list(text)
    except ValueError:
        raise ValueError(f"draft tree {text!r} cannot be read: write the children of each level, as in 4,2,1") from None
    return Tree.branching(*widths)
