"""Logits to ids: every control per row and traced, so that a changed value never compiles anything.

    sampling = Sampling(temperature=0.8, top_p=0.95).rows(B, vocab, stop_ids)   # on the host: checked, [B] arrays
    logits = process(logits, sampling, tokens, length, prompt)                  # [B, V] float32, what is drawn from
    ids = sample(logits, sampling, key, position)                               # [B], position = index of this token

Everything here works row by row: a row gives the same bits alone and in any batch, and `[B, J, V]` logits (several
draft positions of a row) are handled by flattening them to `[B * J, V]`, with `tokens`, `length`, `prompt` and the
controls repeated (`jax.tree.map(lambda x: jnp.repeat(x, J, 0), sampling)`). Flatten rather than vmap: under vmap a
`lax.cond` becomes a select, and then every skipped branch runs.
"""

from jaxinfer.sampling.controls import GREEDY, Bias, Sampling
from jaxinfer.sampling.draws import (
    ACCEPT,
    DRAFT,
    RESIDUAL,
    TOKEN,
    best_ids,
    candidates,
    choose,
    logprobs,
    noise,
    sample,
    uniform,
)
from jaxinfer.sampling.processors import process
from jaxinfer.sampling.split import split

__all__ = [
    "ACCEPT",
    "DRAFT",
    "GREEDY",
    "RESIDUAL",
    "TOKEN",
    "Bias",
    "Sampling",
    "best_ids",
    "candidates",
    "choose",
    "logprobs",
    "noise",
    "process",
    "sample",
    "split",
    "uniform",
]
