"""One step of training: the gradient of a batch, summed over passes that fit the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

State = tuple[Any, Any]  # params in float32, and what the optimizer remembers


def make_step(
    loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[State, jax.Array]]:
    """A jitted (state, batch, *fixed) -> (state, loss) that spends its state.

    `loss(params, part, *fixed)` is the mean over a part; what is fixed (a teacher's params) is the same for every part.

    The arrays of a batch have the passes first: one part of a thousand tokens or two at a time keeps its activations in
    the processor's cache (2 rows of 512 tokens: 4376 tokens/s, 16 rows: 2939, on 2 cores).
    """

    def step(state: State, batch: Any, *fixed: Any) -> tuple[State, jax.Array]:
        params, moments = state
        passes = jax.tree.leaves(batch)[0].shape[0]

        def one_pass(total, part):
            new = jax.value_and_grad(loss)(params, part, *fixed)
            return jax.tree.map(lambda a, b: a + b / passes, total, new), None

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        (mean, grads), _ = jax.lax.scan(one_pass, nothing, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), mean

    return jax.jit(step, donate_argnums=0)
