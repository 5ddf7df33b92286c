"""Logits split over the devices of a mesh: each device does its part, and few small collectives join them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh


def split(f: Callable, words: tuple[Any, ...], out: Any, *arguments: Any) -> Any:
    """f(*arguments), run by each device on its rows (B) and its ids (V); f itself without a mesh.

    words, out: trees of letters congruent with the arguments and the result. Rows and ids that the devices do not
    divide are padded, ids with -inf, and cut off again.
    """
    if mesh.ambient() is None or mesh.inside():
        return f(*arguments)
    sizes: dict[str, int] = {}

    def pad(x: Any, word: str) -> jax.Array:
        x = jnp.asarray(x)
        for axis, letter in enumerate(word):
            if letter in "BV":
                sizes[letter] = x.shape[axis]
                more = [(0, 0)] * x.ndim
                more[axis] = (0, mesh.round_up(x.shape[axis], letter) - x.shape[axis])
                if more[axis][1]:
                    x = jnp.pad(x, more, constant_values=-jnp.inf if letter == "V" else 0)
        return x

    def cut(x: jax.Array, word: str) -> jax.Array:
        for axis, letter in enumerate(word):
            if letter in "BV" and x.shape[axis] != sizes[letter]:
                x = jax.lax.slice_in_dim(x, 0, sizes[letter], axis=axis)
        return x

    padded = tuple(jax.tree.map(pad, x, word) for x, word in zip(arguments, words, strict=True))
    return jax.tree.map(cut, mesh.shard_map(f, words, out)(*padded), out)
