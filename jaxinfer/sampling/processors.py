"""What happens to logits before the draw, and in which order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer import mesh
from jaxinfer.sampling.controls import GREEDY, Sampling
from jaxinfer.sampling.filters import threshold
from jaxinfer.sampling.split import split


def process(
    logits: jax.Array, sampling: Sampling, tokens: jax.Array, length: jax.Array, prompt: jax.Array
) -> jax.Array:
    """Logits after all controls; their softmax is what a row with a temperature draws from. Row by row.

    logits [B, V], any float; sampling as `rows` gives it; tokens [B, S], of which the first length[b] are row b's ids,
    those before prompt[b] its prompt and the others its output; an id of -1 is unknown and ignored. -> [B, V] float32

    The order:
    1. logit bias: it stands for what the model should have said, so penalties and filters see it;
    2. repetition penalty (ids of prompt and output): before 3, because it depends on the sign of the model's logit;
    3. frequency and presence penalty (ids of the output);
    4. min_new_tokens: stop ids get -inf while length - prompt < min_new_tokens, and nothing later undoes that;
    5. temperature;
    6. top-k; 7. top-p, of the mass that top-k leaves; 8. min-p, relative to the best id: after 5, since mass and ratio
       only mean something under the distribution that is drawn from.
    It is the order of transformers, whose users bring their settings along, with 3 where vLLM has it. vLLM forbids stop
    ids first (the same result), and takes min-p before top-k and top-p (whose mass is then that of fewer ids).

    A greedy row (temperature under 1e-5) is neither divided nor filtered: its largest logit wins anyway.
    Ids that tie with the last one kept are kept too (in transformers' top-k as well; its top-p keeps some of them).
    A row whose ids are all forbidden comes back as -inf throughout, not as NaN. NaN in is NaN out, not a hidden id.
    """
    B, V = logits.shape
    if not sampling.laid_out:
        sampling = sampling.rows(B, V)
    words = ("BV", Sampling.letters(), "B_", "B", "B")
    return split(_process, words, "BV", logits, sampling, tokens, length, prompt)


def _process(
    logits: jax.Array, sampling: Sampling, tokens: jax.Array, length: jax.Array, prompt: jax.Array
) -> jax.Array:
    """`process` of a device's part of the logits."""
    B = logits.shape[0]
    logits = logits.astype(jnp.float32)
    biased = jnp.any(sampling.logit_bias.ids >= 0)
    penalized = jnp.any(
        (sampling.repetition_penalty != 1) | (sampling.presence_penalty != 0) | (sampling.frequency_penalty != 0)
    )
    early = length - prompt < sampling.min_new_tokens  # [B]

    # A [B, V] scatter is not free, a conditional is not either: the usual step takes one, and finds nothing to do.
    def edit() -> jax.Array:
        x = lax.cond(biased, lambda x: _add_bias(x, sampling), lambda x: x, logits)
        x = lax.cond(penalized, lambda x: _penalize(x, sampling, tokens, length, prompt), lambda x: x, x)
        return lax.cond(jnp.any(early), lambda x: _forbid(x, sampling.stop_ids, early), lambda x: x, x)

    logits = lax.cond(biased | penalized | jnp.any(early), edit, lambda: logits)

    greedy = sampling.temperature < GREEDY
    z = logits / jnp.where(greedy, 1.0, sampling.temperature)[:, None]
    top_k = jnp.where(greedy, 0, sampling.top_k)
    top_p = jnp.where(greedy, 1.0, sampling.top_p)
    min_p = jnp.where(greedy, 0.0, sampling.min_p)
    filtered = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))
    edge = lax.cond(filtered, lambda: threshold(z, top_k, top_p, min_p), lambda: jnp.full(B, -jnp.inf, jnp.float32))
    return jnp.where(z < edge[:, None], -jnp.inf, z)  # not z >= edge: NaN must stay NaN


def _add_bias(logits: jax.Array, sampling: Sampling) -> jax.Array:
    ids, values = sampling.logit_bias
    return jax.vmap(lambda row, i, v: row.at[i].add(v, mode="drop"))(logits, _dropped(ids, ids >= 0, logits), values)


def _penalize(
    logits: jax.Array, sampling: Sampling, tokens: jax.Array, length: jax.Array, prompt: jax.Array
) -> jax.Array:
    position = jnp.arange(tokens.shape[1])
    known = (position < length[:, None]) & (tokens >= 0)  # [B, S]
    ids = _dropped(tokens, known, logits)
    output = known & (position >= prompt[:, None])

    def count(i: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.zeros(logits.shape[-1], jnp.int32).at[i].add(x.astype(jnp.int32), mode="drop")

    seen = jax.vmap(count)(ids, known) > 0  # [B, V]
    times = jax.vmap(count)(ids, output)
    repetition = sampling.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits < 0, logits * repetition, logits / repetition), logits)
    logits = logits - sampling.frequency_penalty[:, None] * times
    return logits - jnp.where(times > 0, sampling.presence_penalty[:, None], 0.0)


def _forbid(logits: jax.Array, stop_ids: jax.Array, early: jax.Array) -> jax.Array:
    ids = _dropped(stop_ids, early[:, None] & (stop_ids >= 0), logits)
    return jax.vmap(lambda row, i: row.at[i].set(-jnp.inf, mode="drop"))(logits, ids)


def _dropped(ids: jax.Array, wanted: jax.Array, logits: jax.Array) -> jax.Array:
    """ids, with those not wanted past the vocabulary, where a scatter drops them (-1 would be the last id)."""
    V = logits.shape[-1]
    own = ids - mesh.start("V", V)  # on a mesh: counted from the device's first id
    return jnp.where(wanted & (own >= 0) & (own < V), own, V)
