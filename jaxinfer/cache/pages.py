"""Pages: which part of a pool each row's tokens lie in (PagedAttention, Kwon et al. 2023), on the device.

A pool has P pages of Z tokens for each group of rows that a device of `data` has, so that no row reads another device's
memory. A page may belong to several rows; one that is to be written and is shared is copied first. Nothing here loops
over pages: the n-th row that asks is given the n-th page that is free.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from jaxinfer import mesh


@struct.dataclass
class Pages:
    """Of one pool: D groups of B / D rows with P pages each."""

    table: jax.Array  # [B, M] int32: the page, in its group, of each Z positions; P: none
    holders: jax.Array  # [D, P] int32: how many rows have each page
    lacking: jax.Array  # [B] bool: rows that wanted a page when there was none; what they write is dropped
    page: int = struct.field(pytree_node=False)  # Z
    late: int = struct.field(pytree_node=False, default=0)  # of a row's newest tokens, so many lie elsewhere

    @classmethod
    def empty(cls, rows: int, size: int, page: int, pages: int, groups: int, late: int = 0) -> Pages:
        """All pages are free. Rows have up to `size` tokens; `pages` is P."""
        table = jnp.full((rows, -(-size // page)), pages, jnp.int32)
        return cls(table, jnp.zeros((groups, pages), jnp.int32), jnp.zeros(rows, bool), page, late)

    def letters(self) -> Pages:
        """The letters of the arrays, congruent with them."""
        return self.replace(table="B_", holders="B_", lacking="B")  # type: ignore[attr-defined]

    @property
    def num(self) -> int:
        """P."""
        return self.holders.shape[1]

    @property
    def groups(self) -> int:
        """D."""
        return self.holders.shape[0]

    @property
    def free(self) -> jax.Array:
        """[D] int32: pages that no row has."""
        return (self.holders == 0).sum(1)

    @property
    def held(self) -> jax.Array:
        """[B] int32: pages of each row."""
        return (self.table < self.num).sum(1)

    def count(self, length: jax.Array) -> jax.Array:
        """How many pages `length` tokens take."""
        return -(-jnp.maximum(length - self.late, 0) // self.page)

    def grouped(self, x: jax.Array) -> jax.Array:
        """x [B, ...] as [D, B / D, ...]."""
        return x.reshape(self.groups, -1, *x.shape[1:])

    def reserve(self, length: jax.Array, end: jax.Array) -> tuple[Pages, jax.Array, jax.Array]:
        """Pages for tokens up to `end` [B] of rows with `length` [B]; a shared page that is to be written becomes two.

        end 0: nothing is asked for. Gives also which pages are to be copied, source and target [B]; P for none.
        """
        given = jax.vmap(functools.partial(reserve, self.num))
        want = jnp.minimum(self.count(end), self.table.shape[1])
        first = jnp.maximum(length - self.late, 0) // self.page  # the page of the next token
        first = jnp.where(end > 0, first, self.table.shape[1])
        table, holders, source, target, short = given(
            self.grouped(self.table), self.grouped(want), self.grouped(first), self.holders
        )
        flat = [x.reshape(-1, *x.shape[2:]) for x in (table, source, target, short)]
        pages = self.replace(table=flat[0], holders=holders, lacking=self.lacking | flat[3])  # type: ignore[attr-defined]
        return pages.placed(), flat[1], flat[2]

    def release(self, length: jax.Array) -> Pages:
        """Rows keep the pages of their first `length` [B] tokens and give back the others."""
        entry = jnp.arange(self.table.shape[1])
        kept = jnp.where(entry < self.count(length)[:, None], self.table, self.num)
        lacking = self.lacking & (length > 0)
        return self.replace(table=kept, lacking=lacking).counted()  # type: ignore[attr-defined]

    def share(self, rows: jax.Array, sources: jax.Array, length: jax.Array) -> Pages:
        """Rows [n] give back what they have and take part in the pages of the first `length` [n] tokens of others.

        Rows and sources are of the same group: of two groups, a row shares nothing and lacks its pages.
        """
        width, each = self.table.shape[1], self.table.shape[0] // self.groups
        taken = jnp.where(jnp.arange(width) < self.count(length)[:, None], self.table[sources], self.num)
        apart = rows // each != sources // each
        table = self.table.at[rows].set(jnp.where(apart[:, None], self.num, taken), mode="drop")
        lacking = self.lacking.at[rows].set(apart | self.lacking[sources], mode="drop")
        return self.replace(table=table, lacking=lacking).counted()  # type: ignore[attr-defined]

    def like(self, rows: int) -> Pages:
        """An empty one for so many rows, with a page for each that they can want."""
        groups = mesh.size_of("B") if rows % mesh.size_of("B") == 0 else 1
        width = self.table.shape[1]
        return Pages.empty(rows, width * self.page, self.page, rows // groups * width, groups, self.late)

    def everywhere(self, rows: jax.Array) -> jax.Array:
        """[n, M]: the pages of rows [n] counted over all groups; past all of them for none."""
        each, table = self.table.shape[0] // self.groups, self.table[rows]
        return jnp.where(table < self.num, table + (rows // each * self.num)[:, None], self.groups * self.num)

    def counted(self) -> Pages:
        """With the holders counted from the table."""
        holders = jax.vmap(lambda table: jnp.zeros(self.num, jnp.int32).at[table.reshape(-1)].add(1, mode="drop"))
        return self.replace(holders=holders(self.grouped(self.table))).placed()  # type: ignore[attr-defined]

    def placed(self) -> Pages:
        """Itself, lying as its letters say on a mesh."""
        return mesh.constrain_tree(self, self.letters())

    def find(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(page, offset) [B, n] of slots [B, n]; page P where a slot has none."""
        entry = slot // self.page
        page = jnp.take_along_axis(self.table, jnp.minimum(entry, self.table.shape[1] - 1), 1)
        known = (entry < self.table.shape[1]) & ~self.lacking[:, None]
        return jnp.where(known, page, self.num), slot % self.page


def reserve(
    P: int, table: jax.Array, want: jax.Array, first: jax.Array, holders: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """`Pages.reserve` of one group: (table [b, M], holders [P], source [b], target [b], short [b])."""
    entry, free = jnp.arange(table.shape[1]), holders == 0
    ranked = jnp.full(P, P, jnp.int32).at[jnp.where(free, jnp.cumsum(free) - 1, P)].set(jnp.arange(P), mode="drop")
    have = (table < P).sum(1)
    own = jnp.take_along_axis(table, jnp.minimum(first, len(entry) - 1)[:, None], 1)[:, 0]
    shared = (first < have) & (holders.at[own].get(mode="fill", fill_value=0) > 1)
    need = jnp.maximum(want - have, 0) + shared
    begin = jnp.cumsum(need) - need
    given = ranked.at[begin[:, None] + shared[:, None] + entry - have[:, None]].get(mode="fill", fill_value=P)
    copied = jnp.where(shared, ranked.at[begin].get(mode="fill", fill_value=P), P)
    grown = jnp.where((entry >= have[:, None]) & (entry < want[:, None]), given, table)
    swapped = (entry == first[:, None]) & (copied < P)[:, None]
    new = jnp.where(swapped, copied[:, None], grown)
    holders = jnp.zeros(P, jnp.int32).at[new.reshape(-1)].add(1, mode="drop")
    return new, holders, jnp.where(copied < P, own, P), copied, (need > 0) & (begin + need > free.sum())
