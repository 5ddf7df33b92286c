"""Cross entropy, and the bits per byte that it comes to on text that was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import models
from jaxinfer.cache import init_cache
from jaxinfer.config import ModelConfig

Nats = Callable[[Any, jax.Array], jax.Array]  # (params, ids [B, T + 1]) -> [B, T]


def token_nats(params: Any, config: ModelConfig, ids: jax.Array) -> jax.Array:
    """-log p of every token of ids [B, T + 1] but the first, given those before it: [B, T] float32."""
    score = models.logits(params, config, features(params, config, ids[:, :-1])).astype(jnp.float32)
    chosen = jnp.take_along_axis(score, ids[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(score, axis=-1) - chosen


def features(params: Any, config: ModelConfig, ids: jax.Array) -> jax.Array:
    """The hidden states [B, T, D] of ids [B, T] behind the last layer, before the last norm. Differentiable."""
    B, T = ids.shape
    cache = init_cache(config, rows=B, size=T, kind="none")
    (hidden, _), _ = models.decoder(params, config, ids, cache, cache.step(jnp.full(B, T, jnp.int32), T))
    return hidden


def loss(params: Any, config: ModelConfig, ids: jax.Array) -> jax.Array:
    """Mean of `token_nats`."""
    return token_nats(params, config, ids).mean()


def held_out_bits(
    nats: Nats, params: Any, documents: list[np.ndarray], num_bytes: int, length: int, stride: int, rows: int = 4
) -> tuple[float, int]:
    """Bits per byte over whole documents, each with its own first token (which is not counted): (bits, tokens counted).

    Windows of `length` move on by `stride`, and only what is new in a window counts: every token is counted once, with
    at least length - stride tokens before it or else its whole document.
    """
    windows = [window for document in documents for window in document_windows(document, length, stride)]
    total, tokens = 0.0, 0
    for ids, counted in stacked(windows, length, rows):
        total += float(np.where(counted, np.asarray(nats(params, jnp.asarray(ids))), 0).sum(dtype=np.float64))
        tokens += int(counted.sum())
    return total / math.log(2) / num_bytes, tokens


def document_windows(document: np.ndarray, length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """(at most length + 1 ids, how many of its first predictions were counted before)."""
    last = len(document) - 1  # predictions to make
    start, done = 0, 0
    while done < last:
        yield document[start : start + length + 1], done - start
        done = min(start + length, last)
        start += stride


def stacked(windows: list[tuple[np.ndarray, int]], length: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows padded to [rows, length + 1], with a mask [rows, length] of the predictions that count."""
    for first in range(0, len(windows), rows):
        ids, counted = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), bool)
        for row, (window, seen) in enumerate(windows[first : first + rows]):
            ids[row, : len(window)] = window
            counted[row, seen : len(window) - 1] = True
        yield ids, counted


def position_bits(
    nats: Nats, params: Any, documents: list[np.ndarray], token_bytes: np.ndarray, length: int, rows: int = 4
) -> list[dict[str, float]]:
    """Bits per byte by position in the window, over the joined documents cut into windows that do not overlap.

    token_bytes [V] is how many bytes each id stands for (0 for the special one, whose nats are not counted either). A
    window starts anywhere in a file, so a bucket differs from the next in how much context it has and in nothing else.
    """
    joined = np.concatenate(documents)
    windows = [(joined[i : i + length + 1], 0) for i in range(0, len(joined) - length, length)]
    spent, covered = np.zeros(length), np.zeros(length)
    for ids, counted in stacked(windows, length, rows):
        size = np.where(counted, token_bytes[ids[:, 1:]], 0)
        spent += np.where(size > 0, np.asarray(nats(params, jnp.asarray(ids))), 0).sum(0, dtype=np.float64)
        covered += size.sum(0)
    edges = [0, *(edge for edge in (64, 128, 256, 512, 1024) if edge < length), length]
    return [
        {"from": a, "to": b, "bits_per_byte": float(spent[a:b].sum() / math.log(2) / covered[a:b].sum())}
        for a, b in zip(edges, edges[1:], strict=False)
    ]
