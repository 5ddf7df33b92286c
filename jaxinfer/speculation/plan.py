"""What is static of a way to speculate, and what of it is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.cache import Tree, branching
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
