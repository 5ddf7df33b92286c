"""Whole generations with speculation: one dispatch, one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.cache import Cache, Tree
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.generate import Process, ask, shrinking
from jaxinfer.decoding.model import Model
from jaxinfer.decoding.state import State
from jaxinfer.sampling import Sampling
from jaxinfer.speculation.acceptance import Rule
from jaxinfer.speculation.drafts import Draft
from jaxinfer.speculation.loop import run
from jaxinfer.speculation.plan import planned
from jaxinfer.speculation.result import Memory, Speculated


def speculate(
    params: Any,
    config: ModelConfig,
    ids: Any = None,
    *,
    draft: Draft,
    num_draft_tokens: int = 4,
    tree: Tree | Sequence[int] | str | None = None,
    rule: Rule = "shared",
    cost: Any = None,
    num: Any = None,
    state: State | None = None,
    memory: Memory | None = None,
    cache: Cache | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: Any = 128,
    buffer: int | None = None,
    key: jax.Array | None = None,
    model: Model | None = None,
    process: Process | None = None,
) -> Speculated:
    """`generate`, with a draft that guesses up to `num_draft_tokens` (J, static) tokens a round.

    draft: see `Draft`; `NGram()`, `ModelDraft(params, config)`, `LayersDraft(params, config, layers)` and
        `HeadDraft(...)` are drafts.
    tree: several guesses at a place, instead of J: a `Tree`, or how many follow each node of a level, as in (4, 2, 1).
    rule: "shared" emits the very ids of `generate`, greedy and sampled, whatever the draft; "token" and "block" accept
        more when sampling, and emit other ids of the same law (see `acceptance`).
    cost: time of a draft's pass over that of the target's (traced). With it every row drafts as many tokens as pays,
        by what was accepted of late, up to J; where no row drafts, the target makes a pass over one token.
    memory: of the earlier result whose state is given; without it the draft reads the tokens of the state again.
    The rest is as in `generate`; a cache that is given must have max_pending of at least J + 1, or the tree's nodes
    and one. A process sees the rows that the drafts would make, one node at a time.

    Raises ValueError as `generate` does, for a rule that is not known, a cache that cannot hold J + 1 tokens pending,
    and a draft that does not fit the target.
    """
    plan = planned(draft, config, num_draft_tokens, tree, rule, cost is not None)
    held = state.cache if state is not None else cache
    if held is not None and model is None:
        plan.check(held)
    fresh = state is None and cache is None
    asked = ask(
        config, ids, num, state, cache, sampling, max_new_tokens, buffer, key, model, max_pending=plan.max_pending
    )
    begun, ids, *rest = asked.arguments
    cost = jnp.float32(0 if cost is None else cost)
    static = {"model": asked.model, "process": process, "buffer": asked.buffer, "plan": plan, "fresh": fresh}
    with shrinking(begun.cache):
        return asked.cut(run(params, draft, begun, memory, ids, *rest, cost, **static))
