"""Draft, verify, accept, round after round, in one `lax.while_loop`.

A round drafts up to J tokens a row, or a tree of them, and lets the target score the newest token and all of them in
one pass. Every row keeps its own number of them. What was not kept is rolled back by not advancing: it stays pending,
and is overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import mesh
from jaxinfer.cache import Tree
from jaxinfer.decoding.generate import Process, active, begin
from jaxinfer.decoding.model import Adapted, Decoder
from jaxinfer.decoding.state import LENGTH, RUNNING, STOP, State, read
from jaxinfer.sampling import Sampling
from jaxinfer.speculation.drafts import Draft, Round
from jaxinfer.speculation.drawing import Draw, Shared
from jaxinfer.speculation.length import BEGIN, chosen, learned
from jaxinfer.speculation.plan import Plan
from jaxinfer.speculation.result import Memory, Speculated
from jaxinfer.speculation.verify import verify


@functools.partial(
    jax.jit, static_argnames=("model", "process", "buffer", "plan", "fresh"), donate_argnames=("state", "memory")
)
def run(
    params: Any,
    draft: Draft,
    state: State,
    memory: Memory | None,
    ids: jax.Array | None,
    num: jax.Array | None,
    sampling: Sampling,
    budget: jax.Array,
    key: jax.Array,
    cost: jax.Array,
    *,
    model: Decoder | Adapted,
    process: Process | None,
    buffer: int,
    plan: Plan,
    fresh: bool,
) -> Speculated:
    """The program: takes in ids, if any, then goes round until every row is done.

    fresh: nothing came before ids. memory: of an earlier run, None to begin.
    """
    state, memory = prepared(params, draft, state, memory, ids, num, model, plan, fresh)
    state = state.replace(cache=state.cache.compress(buffer))
    budget, tree = jnp.minimum(budget, buffer), plan.tree
    plain, none = begin(state, buffer), jnp.zeros((len(budget), tree.height), jnp.int32)
    start = Speculated(
        plain.ids, plain.num, plain.logprobs, plain.state,
        rounds=none[:, 0], drafted=none, accepted=none, memory=memory,
    )  # fmt: skip
    shared = Shared(tree, sampling, key, process, plan.rule, model.vocab, draft.known, model.columns)
    loop = Loop(params, model, draft, shared, budget, cost if plan.adaptive else None)
    going = functools.partial(active, budget=budget)
    return jax.lax.while_loop(lambda result: going(result).any(), loop.round, start.placed()).placed()


@dataclasses.dataclass(frozen=True)
class Loop:
    """What stays the same from round to round."""

    params: Any
    model: Decoder | Adapted
    draft: Draft
    shared: Shared
    budget: jax.Array  # [B]
    cost: jax.Array | None  # of a draft's pass, where rows draft as much as pays

    def round(self, result: Speculated) -> Speculated:
        """Drafts, verifies, accepts."""
        before, now, tree = result.state, active(result, self.budget), self.shared.tree
        slots = (
            before.cache.limits + 1 - before.length
        )  # free ones: every node needs its own, though levels share positions
        levels = jnp.searchsorted(jnp.asarray(tree.within), slots, side="right") - 1
        room = jnp.minimum(self.budget - result.num - 1, levels)
        most = jnp.where(now, jnp.clip(room, 0, tree.height), 0)
        if self.cost is not None:
            most = jnp.minimum(most, chosen(result.memory.rate, self.cost, tree.height))
        ids, logits, num, told, state = self.propose(result.memory.draft, before, now, most)
        num = jnp.clip(num, 0, most)
        known = result.replace(state=state, memory=Memory(told, result.memory.rate))

        def verdict(tree: Tree, result: Speculated) -> Speculated:
            M = tree.num_nodes - 1
            used = None if self.shared.rule == "shared" or logits is None else logits[:, :M]
            return self.verdict(result, before, now, tree, ids[:, :M], used, num)

        if self.cost is None and not self.draft.abstains:
            return verdict(tree, known)
        some = (num > 0).any()
        known = when(some, functools.partial(verdict, tree), known)
        return when(~some, functools.partial(verdict, Tree.chain(0)), known)

    def propose(self, told: Any, state: State, now: jax.Array, most: jax.Array) -> Any:
        """The draft's proposal; where no row asks for one and that may be often, the draft does nothing."""

        def propose(held: Any) -> Any:
            *_, told, state = held
            return self.draft.propose(told, state, now, most, Draw(self.shared, state))

        held = (told, state)
        if self.cost is None:
            return propose(held)
        ids, logits, *_ = (empty(x) for x in jax.eval_shape(propose, held))
        return when((most > 0).any(), propose, (ids, logits, most, *held))

    def verdict(
        self,
        result: Speculated,
        before: State,
        now: jax.Array,
        tree: Tree,
        ids: jax.Array,
        logits: jax.Array | None,
        num: jax.Array,
    ) -> Speculated:
        """The target's pass over drafts ids [B, M], what of them is emitted, and what follows from it for all."""
        shared, cache = dataclasses.replace(self.shared, tree=tree), result.state.cache
        block = jnp.concatenate([before.newest[:, None], ids], 1)
        count = jnp.where(now, jnp.asarray(tree.within)[jnp.minimum(num, tree.height)], 0)
        step = cache.step(count, tree.num_nodes) if tree.is_chain else cache.branch(count, tree, 0, tree.num_nodes)
        scores, hidden, cache = self.model.look(self.params, block, cache, step)
        processed = shared.processed(scores, before, ids, np.arange(tree.num_nodes))
        kept, path, tokens, logprobs = verify(
            shared.rule, tree, processed, scores, ids, logits, num, shared.sampling, shared.key, before.length
        )
        result = result.replace(state=before.replace(cache=cache))
        result = self.emit(result, now, tree, path, tokens, logprobs, kept, num)
        told = self.draft.commit(result.memory.draft, result.state, Round(before, tree, num, path, hidden))
        rate = jnp.where(now, learned(result.memory.rate, num, kept), result.memory.rate)
        return result.replace(memory=Memory(told, rate))

    def emit(
        self,
        result: Speculated,
        now: jax.Array,
        tree: Tree,
        path: jax.Array,
        tokens: jax.Array,
        logprobs: jax.Array,
        kept: jax.Array,
        num: jax.Array,
    ) -> Speculated:
        """Writes the first kept + 1 tokens [B, D + 1] of the rows at work `now`, up to a stop id or their end."""
        state, cache, offset = result.state, result.state.cache, jnp.arange(tokens.shape[1])
        stops = (tokens[..., None] == self.shared.sampling.stop_ids[:, None]).any(-1)
        until = jnp.where(stops.any(1), jnp.argmax(stops, 1), tokens.shape[1])  # the first stop id
        left = jnp.minimum(self.budget - result.num, cache.limits + 1 - state.length)
        count = jnp.where(now, jnp.minimum(jnp.minimum(kept, until) + 1, left), 0)
        at = jnp.where(offset < count[:, None], result.num[:, None] + offset, result.ids.shape[1])
        put = jax.vmap(lambda row, p, new: row.at[p].set(new, mode="drop"))
        cache = cache.advance(count) if tree.is_chain else cache.commit(path, count)
        state, total = state.replace(cache=cache).append(tokens, count), result.num + count
        full = (total >= self.budget) | (state.length > cache.limits)
        finish = jnp.where(until < count, STOP, jnp.where(full, LENGTH, RUNNING))
        place = jnp.arange(result.drafted.shape[1])
        return result.replace(
            ids=put(result.ids, at, tokens),
            num=total,
            logprobs=put(result.logprobs, at, logprobs),
            state=state.replace(finish=jnp.where(now, finish, state.finish)),
            rounds=result.rounds + now,
            drafted=result.drafted + (place < num[:, None]),
            accepted=result.accepted + (place < jnp.minimum(kept, count)[:, None]),
        )


def when(flag: jax.Array, f: Callable[[Any], Any], carry: Any) -> Any:
    """f(carry) where the flag [] is set, carry itself otherwise: a loop of one turn or none.

    Not lax.cond: XLA's conditional writes what it passes on into buffers of its own, and so copies a whole cache.
    """
    return jax.lax.while_loop(lambda held: held[0], lambda held: (jnp.zeros((), bool), f(held[1])), (flag, carry))[1]


def empty(shapes: Any) -> Any:
    """Zeros."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def prepared(
    params: Any,
    draft: Draft,
    state: State,
    memory: Memory | None,
    ids: jax.Array | None,
    num: jax.Array | None,
    model: Decoder | Adapted,
    plan: Plan,
    fresh: bool,
) -> tuple[State, Memory]:
    """Takes in ids, if there are any, and lets the draft know of them."""
    if memory is None:
        told, rate = draft.begin(state, plan.tree), jnp.full(len(state.length), BEGIN, jnp.float32)
    else:
        told, rate = memory.draft, memory.rate
    start, hidden, taken = state.cache.length, None, None
    if ids is not None and num is not None:
        state, taken, hidden = read(model, params, state, ids, num)
    if memory is None and not fresh:  # what came before was told to nobody
        told = draft.read(told, state, state.tokens, jnp.zeros_like(start), None)
    elif taken is not None:
        told = draft.read(told, state, taken, start, hidden)
    return state, Memory(told, mesh.constrain(rate, "B"))  # as the loop gives it back: one program takes either
