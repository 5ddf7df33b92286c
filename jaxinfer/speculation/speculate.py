"""Draft, verify, accept: whole generations with speculation, one dispatch, one `lax.while_loop`.

A round drafts up to J tokens a row and lets the target score the newest token and all of them in one pass. Every row
keeps its own number of them. What was not kept is rolled back by not advancing: it stays pending, and is overwritten.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh
from jaxinfer import sampling as draws
from jaxinfer.cache import Cache
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.generate import Process, Result, active, ask, begin, edited
from jaxinfer.decoding.model import Adapted, Decoder, Model
from jaxinfer.decoding.state import LENGTH, RUNNING, STOP, State
from jaxinfer.sampling import Sampling
from jaxinfer.speculation.acceptance import RULES, Rule
from jaxinfer.speculation.drafts import Draft
from jaxinfer.speculation.verify import MAX_DRAFT, place, purpose, repeat, verify


class Speculated(Result):
    """What `generate` gives, and how the drafts fared."""

    rounds: jax.Array  # [B] int32: passes of the target
    drafted: jax.Array  # [B, J] int32: how often a token was drafted at each place of a round
    accepted: jax.Array  # [B, J] int32: how often it was emitted

    @property
    def tokens_per_round(self) -> jax.Array:
        """Tokens a row emits with one pass of the target, over all rows."""
        return self.num.sum() / jnp.maximum(self.rounds.sum(), 1)

    def placed(self) -> Speculated:
        """Itself, rows over the devices of a mesh."""
        words = {"rounds": "B", "drafted": "B_", "accepted": "B_"}
        own = {name: mesh.constrain(getattr(self, name), word) for name, word in words.items()}
        return super().placed().replace(**own)  # type: ignore[return-value]


def speculate(
    params: Any,
    config: ModelConfig,
    ids: Any = None,
    *,
    draft: Draft,
    num_draft_tokens: int = 4,
    rule: Rule = "shared",
    num: Any = None,
    state: State | None = None,
    cache: Cache | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: Any = 128,
    buffer: int | None = None,
    key: jax.Array | None = None,
    model: Model | None = None,
    process: Process | None = None,
) -> Speculated:
    """`generate`, with a draft that guesses up to `num_draft_tokens` (J, static) tokens a round.

    draft: see `Draft`; `NGram()`, `ModelDraft(params, config)` and `LayersDraft(params, config, layers)` are drafts.
    rule: "shared" emits the very ids of `generate`, greedy and sampled, whatever the draft; "token" and "block" accept
        more when sampling, and emit other ids of the same law (see `acceptance`).
    The rest is as in `generate`; a cache that is given must have max_pending of at least J + 1.

    Raises ValueError as `generate` does, for a rule that is not known, a cache that cannot hold J + 1 tokens pending,
    and a draft with another vocabulary.
    """
    J = num_draft_tokens
    if not 1 <= J < MAX_DRAFT:
        raise ValueError(f"num_draft_tokens is {J}: it must be from 1 to {MAX_DRAFT - 1}; `generate` drafts nothing")
    if rule not in RULES:
        raise ValueError(f"the rule {rule!r} is not known: take one of {', '.join(RULES)}")
    held = state.cache if state is not None else cache
    if held is not None and model is None and held.max_pending < J + 1:
        raise ValueError(
            f"the cache holds {held.max_pending} tokens pending but num_draft_tokens {J} needs {J + 1}: "
            f"make it with init_cache(..., max_pending={J + 1})"
        )
    other = getattr(draft, "config", None)
    if other is not None and (other.vocab_size, other.padded_vocab) != (config.vocab_size, config.padded_vocab):
        raise ValueError(
            f"the draft has {other.vocab_size} ids but the target {config.vocab_size}: take a draft with its tokenizer"
        )
    fresh = state is None and cache is None
    asked = ask(config, ids, num, state, cache, sampling, max_new_tokens, buffer, key, model, max_pending=J + 1)
    begun, ids, *rest = asked.arguments
    width = ids.shape[1] if fresh else begun.tokens.shape[1]  # of what the draft has to read first
    static = {"model": asked.model, "process": process, "buffer": asked.buffer, "rule": rule, "J": J, "width": width}
    return asked.cut(run(params, draft, begun, ids, *rest, **static))


@functools.partial(
    jax.jit, static_argnames=("model", "process", "buffer", "rule", "J", "width"), donate_argnames=("state",)
)
def run(
    params: Any,
    draft: Draft,
    state: State,
    ids: jax.Array | None,
    num: jax.Array | None,
    sampling: Sampling,
    budget: jax.Array,
    key: jax.Array,
    *,
    model: Decoder | Adapted,
    process: Process | None,
    buffer: int,
    rule: Rule,
    J: int,
    width: int,
) -> Speculated:
    """The program: takes in ids, if any, then goes round until every row is done."""
    budget = jnp.minimum(budget, buffer)
    plain = begin(model, params, state, ids, num, buffer)
    none = jnp.zeros((len(plain.num), J), jnp.int32)
    start = Speculated(
        plain.ids, plain.num, plain.logprobs, plain.state, rounds=none[:, 0], drafted=none, accepted=none
    ).placed()

    def body(carry: tuple[Speculated, Any]) -> tuple[Speculated, Any]:
        result, memory = carry
        before, now = result.state, active(result, budget)
        room = jnp.minimum(budget - result.num - 1, before.cache.size - before.length)
        most = jnp.where(now, jnp.clip(room, 0, J), 0)
        draw = functools.partial(drawn, before, sampling, key, process, rule, model.vocab)
        ids, logits, num, memory, state = draft.propose(memory, before, now, most, J, draw)
        num = jnp.clip(num, 0, most)
        step = state.cache.step(jnp.where(now, num + 1, 0), J + 1)
        scores, cache = model.step(params, jnp.concatenate([before.newest[:, None], ids], 1), state.cache, step)
        processed = process_block(scores, before, ids, num, sampling, process, model.vocab)
        kept, tokens, logprobs = verify(
            rule, processed, scores, ids, logits if J and rule != "shared" else None, num, sampling, key, before.length
        )
        result = emit(result, cache, tokens, logprobs, kept, num, sampling, budget, now)
        return result, draft.commit(memory, before, result.state, num)

    memory = draft.begin(start.state, width, J)
    result, _ = jax.lax.while_loop(lambda carry: active(carry[0], budget).any(), body, (start, memory))
    return result.placed()


def drawn(
    state: State,
    sampling: Sampling,
    key: jax.Array,
    process: Process | None,
    rule: Rule,
    vocab: int | None,
    scores: jax.Array,
    ids: jax.Array,
    count: Any,
) -> tuple[jax.Array, jax.Array]:
    """A draft's draw (see `Draw`): the processors see its own tokens so far; the noise is that of the position."""
    so_far = state.append(ids, jnp.broadcast_to(count, state.length.shape))
    scores = edited(process, scores, so_far, vocab)
    processed = draws.process(scores, sampling, so_far.tokens, so_far.length, so_far.prompt)
    token = draws.sample(processed, sampling, key, place(rule, state.length, count), purpose(rule))
    return token, processed if rule != "shared" else processed[:, :0]  # who needs no probabilities keeps none


def process_block(
    scores: jax.Array,
    state: State,
    ids: jax.Array,
    num: jax.Array,
    sampling: Sampling,
    process: Process | None,
    vocab: int | None,
) -> jax.Array:
    """The target's scores [B, J + 1, V] through all processors, each place with the drafts before it."""
    B, T, V = scores.shape
    so_far = state.append(ids, num)
    if process is not None:
        places = [edited(process, scores[:, i], so_far.replace(length=state.length + i), vocab) for i in range(T)]
        scores = jnp.stack(places, 1)
    length = (state.length[:, None] + jnp.arange(T)).reshape(-1)
    controls, tokens, prompt = repeat((sampling, so_far.tokens, state.prompt), T)
    return draws.process(scores.reshape(B * T, V), controls, tokens, length, prompt).reshape(B, T, V)


def emit(
    result: Speculated,
    cache: Cache,
    tokens: jax.Array,
    logprobs: jax.Array,
    kept: jax.Array,
    num: jax.Array,
    sampling: Sampling,
    budget: jax.Array,
    now: jax.Array,
) -> Speculated:
    """Writes the first kept + 1 tokens [B, J + 1] of the rows that are `now` at work, up to a stop id or their end."""
    state, offset = result.state, jnp.arange(tokens.shape[1])
    stops = (tokens[..., None] == sampling.stop_ids[:, None]).any(-1)
    until = jnp.where(stops.any(1), jnp.argmax(stops, 1), tokens.shape[1])  # the first stop id
    count = jnp.minimum(jnp.minimum(kept, until) + 1, jnp.minimum(budget - result.num, cache.size + 1 - state.length))
    count = jnp.where(now, count, 0)
    at = jnp.where(offset < count[:, None], result.num[:, None] + offset, result.ids.shape[1])
    put = jax.vmap(lambda row, p, new: row.at[p].set(new, mode="drop"))
    state, total = state.replace(cache=cache.advance(count)).append(tokens, count), result.num + count
    full = (total >= budget) | (state.length > cache.size)
    finish = jnp.where(until < count, STOP, jnp.where(full, LENGTH, RUNNING))
    return result.replace(
        ids=put(result.ids, at, tokens),
        num=total,
        logprobs=put(result.logprobs, at, logprobs),
        state=state.replace(finish=jnp.where(now, finish, state.finish)),
        rounds=result.rounds + now,
        drafted=result.drafted + (offset[:-1] < num[:, None]),
        accepted=result.accepted + (offset[:-1] < jnp.minimum(kept, count)[:, None]),
    )
