"""What the loop asks of a draft."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax

from jaxinfer.cache import Tree
from jaxinfer.config import ModelConfig
from jaxinfer.decoding.state import State
from jaxinfer.speculation.drawing import Draw


@dataclasses.dataclass(frozen=True)
class Round:
    """What happened in a round."""

    before: State  # the rows before it
    tree: Tree  # what was drafted; the newest token alone in a round without drafts
    num: jax.Array  # [B] how many tokens (of a tree, levels) were drafted
    path: jax.Array  # [B, D + 1] the nodes that were kept, node 0 first; behind the end of a row they mean nothing
    hidden: jax.Array | None  # [B, M + 1, D] the target's last hidden state at every node, None of a research model

    def emitted(self, state: State) -> jax.Array:
        """[B]: how many tokens the rows have gained."""
        return state.length - self.before.length


class Draft(abc.ABC):
    """A way of guessing the next tokens: a pytree (params are leaves, the rest is static) of pure functions.

    A whole draft that repeats the newest token, which is right more often than one would think:

        @struct.dataclass
        class Again(Draft):
            def propose(self, memory, state, active, num, draw):
                return jnp.repeat(state.newest[:, None], draw.tree.height, 1), None, num, memory, state

    One that remembers has a `memory`, any pytree of its own, which the loop carries: keys and values of a second
    model, say. `begin` makes it, `read` and `commit` keep it up with the tokens.
    """

    forks = False  # whether it can draft a tree; it is then asked for every node at once
    abstains = False  # whether it may leave a row without a draft that could have one

    @property
    def known(self) -> int | None:
        """How many ids, from 0 on, it shares with the target, where not all."""
        return None

    def check(self, config: ModelConfig) -> None:
        """Refuses, with a ValueError, a target that it cannot draft for."""
        return None

    def begin(self, state: State, tree: Tree) -> Any:
        """The memory of rows [B] of which nothing has been told yet."""
        return ()

    def read(self, memory: Any, state: State, ids: jax.Array, start: jax.Array, hidden: jax.Array | None) -> Any:
        """The memory after the target has taken in ids [B, T] at positions `start` [B] and on; state: after that.

        hidden [B, T, D]: the target's last hidden states there; None where they are not known any more.
        """
        return memory

    @abc.abstractmethod
    def propose(
        self, memory: Any, state: State, active: jax.Array, num: jax.Array, draw: Draw
    ) -> tuple[jax.Array, jax.Array | None, jax.Array, Any, State]:
        """(ids [B, M], logits [B, M, V] they were drawn from, num [B], memory, state) of at most `num` [B] tokens.

        `draw` makes every draw: it applies the processors and the noise. Logits are None where ids were not drawn (a
        point mass). num may come back smaller, not larger. The state comes back as it was, but for what is pending in
        its cache. Of rows that are not `active` [B] nothing may change; an active row with num 0 goes on without a
        draft. On a tree num counts levels, and M nodes.
        """

    def commit(self, memory: Any, state: State, round: Round) -> Any:
        """The memory after a round, which has led to `state`."""
        return memory
