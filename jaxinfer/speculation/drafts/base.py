"""What the loop asks of a draft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax

from jaxinfer.decoding.state import State

# (logits [B, V], ids [B, J] so far, how many of them) -> (drawn ids [B], the logits [B, V] that they were drawn from)
Draw = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]


class Draft(Protocol):
    """A way of guessing the next tokens: a pytree (params are leaves, the rest is static) with three pure functions.

    `memory` is any pytree of its own, carried through the loop: keys and values of a second model, or nothing at all.
    A whole draft that repeats the newest token, which is right more often than one would think:

        @struct.dataclass
        class Again:
            def begin(self, state, width, J):
                return ()

            def propose(self, memory, state, active, num, J, draw):
                return jnp.repeat(state.newest[:, None], J, 1), None, num, memory, state

            def commit(self, memory, before, state, num):
                return memory
    """

    def begin(self, state: State, width: int, J: int) -> Any:
        """The memory of rows whose tokens [B, S] are known; `width`: how many at most; J: tokens a round."""
        ...

    def propose(
        self, memory: Any, state: State, active: jax.Array, num: jax.Array, J: int, draw: Draw
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, Any, State]:
        """(ids [B, J], logits [B, J, V] they were drawn from, num [B], memory, state) of at most `num` [B] tokens.

        The loop's `draw` makes every draw: it applies the processors and the noise. Logits are None where ids were not
        drawn (a point mass). num may come back smaller, not larger. The state comes back as it was, but for what is
        pending in its cache. Of rows that are not `active` [B] nothing may change; an active row with num 0 goes on
        without a draft.
        """
        ...

    def commit(self, memory: Any, before: State, state: State, num: jax.Array) -> Any:
        """The memory after the round that led from one state to the other, with `num` [B] tokens drafted."""
        ...
