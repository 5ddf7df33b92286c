"""Text as it is made, with a draft: the loop of `speculate`, a few tokens a dispatch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import decoding
from jaxinfer.cache import Tree
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.model import Adapted, Decoder
from jaxinfer.decoding.state import State, idle
from jaxinfer.decoding.stream import Call, Program
from jaxinfer.speculation.acceptance import Rule
from jaxinfer.speculation.drafts import Draft
from jaxinfer.speculation.loop import prepared, run
from jaxinfer.speculation.plan import Plan, planned
from jaxinfer.speculation.result import Memory, Speculated
from jaxinfer.text import Tokenizer


@functools.partial(jax.jit, static_argnames=("model", "plan", "fresh"), donate_argnames=("state", "memory"))
def read_chunk(
    params: Any,
    draft: Draft,
    state: State,
    memory: Memory | None,
    ids: jax.Array,
    num: jax.Array,
    *,
    model: Decoder | Adapted,
    plan: Plan,
    fresh: bool,
) -> tuple[State, Memory]:
    """Takes in a chunk of the prompts, target and draft."""
    return prepared(params, draft, state, memory, ids, num, model, plan, fresh)


@dataclasses.dataclass(frozen=True)
class DraftProgram(Program):
    """The programs of a stream that drafts."""

    draft: Draft
    plan: Plan
    cost: Any  # as in `speculate`
    fresh: bool  # whether the stream begins with rows that hold nothing

    def reader(self, state: State, memory: Any, ids: np.ndarray, num: np.ndarray) -> Call:
        """See `Program`."""
        arguments = (self.params, self.draft, state, memory, *idle(state.cache, ids, num))
        return read_chunk, arguments, {"model": self.model, "plan": self.plan, "fresh": self.fresh}

    def runner(self, state: State, memory: Any, budget: np.ndarray) -> Call:
        """See `Program`."""
        rest = (self.sampling, *idle(state.cache, budget), self.key, jnp.float32(self.cost or 0))
        static = {"model": self.model, "process": self.process, "buffer": self.buffer, "plan": self.plan}
        return run, (self.params, self.draft, state, memory, None, None, *rest), static | {"fresh": self.fresh}

    def told(self, read: Any) -> tuple[State, Any]:
        """See `Program`."""
        return read

    def kept(self, result: Speculated) -> Memory:
        """See `Program`."""
        return result.memory

    def counted(self, result: Speculated) -> dict[str, jax.Array]:
        """See `Program`."""
        return {"rounds": result.rounds, "drafted": result.drafted, "accepted": result.accepted}


def stream(
    params: Any,
    config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    draft: Draft,
    num_draft_tokens: int = 4,
    tree: Tree | Sequence[int] | str | None = None,
    rule: Rule = "shared",
    cost: Any = None,
    state: State | None = None,
    **how: Any,
) -> decoding.Stream:
    """`jaxinfer.stream`, with a draft: its text, by the loop of `speculate`, whose arguments these are.

    The stream's `counts` have rounds [B], drafted [B, J], accepted [B, J]. Raises ValueError for what either refuses.
    """
    plan = planned(draft, config, num_draft_tokens, tree, rule, cost is not None)
    if state is None:
        how = {"max_pending": plan.max_pending} | how
        plan.check_kind(how.get("kind", "auto"))
    else:
        plan.check(state.cache)
    drafting = functools.partial(DraftProgram, draft=draft, plan=plan, cost=cost, fresh=state is None)
    return decoding.stream(params, config, tokenizer, prompts, state=state, program=drafting, **how)
