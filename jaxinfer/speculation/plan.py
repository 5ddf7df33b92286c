"""What is static of a way to speculate, and what of it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxinfer.cache import Cache, Kind, Tree, branching
from jaxinfer.config import ModelConfig
from jaxinfer.speculation.acceptance import RULES, Rule
from jaxinfer.speculation.drafts import Draft
from jaxinfer.speculation.verify import MAX_DRAFT


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a way to speculate."""

    tree: Tree
    rule: Rule
    adaptive: bool  # a row drafts as many tokens as pays, by what was accepted of late

    @property
    def max_pending(self) -> int:
        """Tokens that the target's cache must hold pending."""
        return self.tree.num_nodes

    def needs(self, pending: int) -> str:
        """What is wrong with a cache that holds so many tokens pending."""
        what = f"num_draft_tokens {self.tree.height}" if self.tree.is_chain else "the draft tree"
        return (
            f"the cache holds {pending} tokens pending but {what} needs {self.max_pending}: "
            f"make it with init_cache(..., max_pending={self.max_pending})"
        )

    def check(self, cache: Cache) -> None:
        """Refuses a cache that cannot hold a round pending."""
        if cache.max_pending < self.max_pending:
            raise ValueError(self.needs(cache.max_pending))
        self.check_layers(type(layer).__name__ for layer in cache.layers if not layer.trees)

    def check_kind(self, kind: str) -> None:
        """The same, of a cache that is yet to be made."""
        self.check_layers(["Heavy"] if Kind.read(kind).layout == "h2o" else [])

    def check_layers(self, without: Iterable[str]) -> None:
        """Refuses a draft tree where some kinds of layers hold none."""
        found = next(iter(without), None)
        if found and not self.tree.is_chain:
            raise ValueError(
                f"a cache with {found} layers drops tokens one after the other, so it holds no draft tree: take "
                "num_draft_tokens, or another kind of cache"
            )


def planned(draft: Draft, config: ModelConfig, J: int, tree: Any, rule: str, adaptive: bool) -> Plan:
    """The checked plan. tree: a `Tree`, or the children of each level as in (4, 2, 1) or "4,2,1"; None for a chain."""
    if tree is None:
        if not 1 <= J < MAX_DRAFT:
            raise ValueError(
                f"num_draft_tokens is {J}: it must be from 1 to {MAX_DRAFT - 1}; `generate` drafts nothing"
            )
        tree = Tree.chain(J)
    elif not isinstance(tree, Tree):
        tree = branching(tree)
    if rule not in RULES:
        raise ValueError(f"the rule {rule!r} is not known: take one of {', '.join(RULES)}")
    if not 2 <= tree.num_nodes <= MAX_DRAFT:
        raise ValueError(f"the draft tree has {tree.num_nodes - 1} nodes: it must have from 1 to {MAX_DRAFT - 1}")
    if not tree.is_chain and rule == "block":
        raise ValueError("the block rule decides about a chain of drafts: take token or shared for a draft tree")
    if not tree.is_chain and not draft.forks:
        raise ValueError(
            f"{type(draft).__name__} guesses one token at a place: take a model or a head for a draft tree"
        )
    draft.check(config)
    return Plan(tree, rule, adaptive)  # type: ignore[arg-type]
