"""From a kind's name to a cache.

    ring:window=1024+int8      what is kept, with its options, then in which numbers, with theirs

What is kept, by layer: "auto" (by default: a ring where the layer has a window, everything elsewhere), "dense"
(everything everywhere), "ring", "paged", "streaming", "h2o", "snapkv", and "none". Layers with a window of their own
keep it under every kind. In which numbers: 16-bit (the model's own, whatever its width), int8, float8, int4.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxinfer import kernels, mesh
from jaxinfer.cache.base import Cache, LayerCache
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.none import Nothing
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.ring import Ring
from jaxinfer.cache.sinks import Sinks
from jaxinfer.cache.slots import Slots
from jaxinfer.cache.snap import Snap
from jaxinfer.config import LayerSpec, ModelConfig
from jaxinfer.quantization import Bits, Codes, Grouped, Plain, Scaled

LAYOUTS: dict[str, dict[str, int | None]] = {  # what is kept: options, and what they are unless given
    "auto": {},
    "dense": {},
    "ring": {"window": None, "sinks": 0},
    "paged": {"page": 16, "pages": None},  # vLLM's page; as many as all rows can want
    "streaming": {"sinks": 4, "recent": 252},
    "h2o": {"budget": 256, "recent": None},  # half of the budget
    "snapkv": {"budget": 256, "window": 32, "kernel": 5},
    "none": {},
}
NUMBERS: dict[str, dict[str, int | None]] = {
    "16-bit": {},
    "int8": {},
    "float8": {},
    "int4": {"group": 32, "residual": 128},  # KIVI's
}
EVICTING = ("streaming", "h2o", "snapkv")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of cache, spelled out; `Kind.read("paged+int8")` reads a name."""

    layout: str = "auto"
    numbers: str = "16-bit"
    options: tuple[tuple[str, int | None], ...] = ()  # of both

    @classmethod
    @functools.cache
    def read(cls, name: str) -> Kind:
        """The kind of a name; ValueError for one that is not known, or whose parts do not go together."""
        layout, numbers, options = None, None, {}
        for part in name.split("+"):
            word, _, rest = part.strip().partition(":")
            if word in LAYOUTS and layout is None:
                layout, known = word, LAYOUTS[word]
            elif word in NUMBERS and numbers is None:
                numbers, known = word, NUMBERS[word]
            elif word in LAYOUTS or word in NUMBERS:
                raise ValueError(f"cache kind {name!r} says twice how or in what numbers: join one of each with +")
            else:
                raise ValueError(
                    f"cache kind {word!r} is not known: take one of {', '.join(LAYOUTS)}, with +{', +'.join(NUMBERS)}"
                )
            options |= known | given(word, rest, known)
        kind = cls(layout or "auto", numbers or "16-bit", tuple(options.items()))
        kind.check()
        return kind

    def __getitem__(self, option: str) -> Any:
        return dict(self.options)[option]

    def check(self) -> None:
        """Refuses what does not go together."""
        name = f"{self.layout}+{self.numbers}"
        if self.layout == "none" and self.numbers != "16-bit":
            raise ValueError(f"cache kind {name}: none keeps nothing, in whatever numbers: take none alone")
        if self.layout in EVICTING and self.numbers not in ("16-bit", "int8"):
            raise ValueError(f"cache kind {name} is not to be had: take {self.layout} or {self.layout}+int8")
        if self.numbers == "int4":
            if self["group"] % 2:
                raise ValueError(f"int4 has group={self['group']}: two codes share a byte, so make it even")
            if self.layout == "paged" and self["page"] % self["group"]:
                raise ValueError(
                    f"a page of {self['page']} tokens holds no whole number of int4 groups of {self['group']}: "
                    f"set page to a multiple, such as paged:page={self['group']}"
                )
            if self.layout == "ring" and self["sinks"]:
                raise ValueError("a ring with sinks is kept in 16-bit, int8 or float8, not in int4: leave out one")
        if self.layout == "ring" and self["sinks"] and not self["window"]:
            raise ValueError("ring:sinks goes with a window of its own: give ring:window=W,sinks=n")
        if self.layout == "h2o" and not 0 < (self["recent"] or 1) <= self["budget"]:
            raise ValueError(f"h2o has recent={self['recent']} of budget={self['budget']}: at most all can be recent")
        if self.layout == "snapkv":
            if self["window"] >= self["budget"]:
                raise ValueError(
                    f"snapkv has window={self['window']} of budget={self['budget']}: the last `window` tokens are "
                    "kept as they are, so set a larger budget"
                )
            if self["kernel"] % 2 == 0:
                raise ValueError(f"snapkv has kernel={self['kernel']}: an average about a token takes an odd number")


def given(word: str, text: str, known: dict[str, int | None]) -> dict[str, int]:
    """The options "a=1,b=2" of a part of a kind's name."""
    found: dict[str, int] = {}
    for item in text.split(",") if text else ():
        name, equals, value = (piece.strip() for piece in item.partition("="))
        if name not in known:
            choices = f"it knows {', '.join(known)}" if known else "it has none"
            raise ValueError(f"cache kind {word} has no option {name!r}: {choices}")
        if not equals or not value.isdigit() or (int(value) < 1 and name != "sinks"):
            raise ValueError(f"cache kind {word} has {item!r}: give {name} a whole number of at least 1")
        found[name] = int(value)
    return found


# --- the public functions ------------------------------------------------------------------------------------------


def init_cache(
    config: ModelConfig,
    rows: int,
    size: int,
    kind: str = "auto",
    *,
    dtype=None,
    max_rewind: int = 0,
    max_pending: int = 1,
) -> Cache:
    """An empty cache of `rows` rows (B) that hold up to `size` tokens (S) each.

    On a mesh it lies as its letters say, with inactive rows added until the devices of `data` divide B.

    kind: what is kept, "+" in which numbers, with options after a colon:
        auto        a ring in layers with a window, everything in the others; the output is that of "dense"
        dense       every key and value, preallocated
        ring        :window=W forces a window on layers that have none, :sinks=n shows the first n tokens to all
        paged       :page=16 tokens a page, :pages=P a pool (of each data group) smaller than all rows could want
        streaming   :sinks=4,recent=252, positions counted inside the cache (StreamingLLM), also in layers whose own
                    window is larger than both
        h2o         :budget=256,recent=128 tokens, most looked at and newest (H2O)
        snapkv      :budget=256,window=32,kernel=5 of a prompt, chosen once it is read (SnapKV; `Cache.compress`)
        none        nothing: training, scoring
        int8, float8 a scale per token and head; int4:group=32,residual=128 (KIVI)
    dtype: of keys and values in 16-bit (and of what codes are read as); by default that of the model, float32 where a
        platform writes bfloat16 slowly.
    max_rewind, max_pending: how many committed tokens `rewind` may take back, and how many tokens may be pending.
    Raises ValueError for an unknown kind or option, parts that do not go together, a size that no token fits in, and a
    cache that the free memory cannot hold.
    """
    options = {"dtype": dtype, "max_rewind": max_rewind, "max_pending": max_pending}
    if not isinstance(jax.device_put(np.float32(0)), Tracer):  # unlike jnp.zeros, it compiles nothing to find out
        check_memory(config, rows, size, kind, **options)
    return empty_cache(config, rows, size, kind, **options)


def check_memory(config: ModelConfig, rows: int, size: int, kind: str, **options) -> None:
    """Refuses a cache of which this process's free memory cannot hold its part."""
    shapes = jax.eval_shape(lambda: empty_cache(config, rows, size, kind, **options))
    needed, free = mesh.local_bytes(shapes, shapes.letters()), kernels.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"a cache of {rows} x {size} tokens needs {needed / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free: "
            "ask for fewer rows, a smaller size or a smaller dtype"
        )


def cache_bytes(config: ModelConfig, rows: int, size: int, kind: str = "auto", **options) -> int:
    """The bytes that `init_cache` would allocate, without allocating them."""
    shapes = jax.eval_shape(lambda: empty_cache(config, rows, size, kind, **options))
    return shapes.bytes


def max_rows(config: ModelConfig, size: int, memory: int, kind: str = "auto", **options) -> int:
    """How many rows of up to `size` tokens fit in so many bytes; 0 where none does."""
    return most(lambda rows: cache_bytes(config, rows, size, kind, **options), memory)


def max_size(config: ModelConfig, rows: int, memory: int, kind: str = "auto", **options) -> int:
    """How many tokens each of `rows` rows may have in so many bytes; 0 where none. At most what the model was made for.

    A kind that keeps no more of long rows than of short ones ends there, too.
    """
    top = config.num_positions or config.max_length or 1 << 24
    return most(lambda size: cache_bytes(config, rows, size, kind, **options), memory, top)


def most(cost: Callable[[int], int], memory: int, top: int = 1 << 24) -> int:
    """The largest n up to `top` whose cost is at most `memory`."""
    low, high = 0, 1
    while high < top and cost(high) <= memory:
        low, high = high, min(2 * high, top)
    if high == top and cost(top) <= memory:
        return top
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= memory else (low, middle)
    return low


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), static_argnames=("dtype", "max_rewind", "max_pending"))
def empty_cache(
    config: ModelConfig, rows: int, size: int, kind: str, *, dtype=None, max_rewind: int = 0, max_pending: int = 1
) -> Cache:
    """`init_cache` as one program, and without a look at the memory."""
    asked = Kind.read(kind)
    if rows < 1 or size < 1:
        raise ValueError(f"a cache of {rows} rows of {size} tokens holds nothing: rows and size must be at least 1")
    if config.num_positions and size > config.num_positions:
        raise ValueError(
            f"the cache would hold {size} tokens but the model has {config.num_positions} learned positions: "
            f"ask for a size of at most {config.num_positions}"
        )
    maker = Maker(
        asked,
        mesh.round_up(rows, "B"),
        size,
        jnp.dtype(dtype) if dtype is not None else kernels.cache_dtype(config.dtype),
        max_pending,
        max_rewind,
    )
    maker.check(config)
    cache = Cache(
        tuple(maker.layer(spec) for spec in config.layers),
        jnp.zeros(maker.rows, jnp.int32),
        size=size,
        max_rewind=max_rewind,
        max_pending=max_pending,
        padding=maker.rows - rows,
        pages=maker.pages(config),
    )
    return mesh.constrain_tree(cache, cache.letters())


# --- by layer ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Maker:
    """Makes the memory of each layer of a cache."""

    kind: Kind
    rows: int
    size: int
    dtype: jnp.dtype
    pending: int
    rewind: int

    def check(self, config: ModelConfig) -> None:
        """Refuses a kind that this model has no layer for."""
        kind, windows = self.kind, [spec.window for spec in config.layers]
        if kind.layout == "ring" and not kind["window"] and not any(windows):
            raise ValueError("no layer of this model has a window: force one with ring:window=W, or take auto")
        if kind.layout in ("h2o", "snapkv", "paged") and all(windows):
            raise ValueError(
                f"every layer of this model has a window, and keeps no more than that: {kind.layout} has nothing to "
                "do, take auto"
            )
        if kind.numbers == "int4" and kind["residual"] < self.pending:
            raise ValueError(
                f"int4 keeps the newest {kind['residual']} tokens plain but {self.pending} may be pending: "
                f"set int4:residual to at least {self.pending}"
            )

    def layer(self, spec: LayerSpec) -> LayerCache:
        """One layer's memory, empty."""
        kind = self.kind
        if kind.layout == "none":
            return Nothing()
        if kind.layout == "streaming" and not (spec.window and spec.window <= kind["sinks"] + kind["recent"]):
            return self.sinks(spec, kind["recent"], kind["sinks"], turned=True)
        if spec.window is not None and kind.layout != "dense" and self.ring_size(spec.window) < self.size:
            return self.ring(spec, spec.window)
        if spec.window is not None:
            return self.dense(spec)
        if kind.layout == "ring" and kind["window"]:
            make = functools.partial(self.sinks, sinks=kind["sinks"]) if kind["sinks"] else self.ring
            return make(spec, kind["window"])
        if kind.layout == "paged":
            return self.paged(spec)
        if kind.layout == "h2o":
            shape = (self.rows, spec.num_kv_heads, kind["budget"] + self.pending)
            recent = kind["recent"] or -(-kind["budget"] // 2)
            return Heavy.empty(*self.vectors(shape, spec), self.pending, kind["budget"], recent)
        if kind.layout == "snapkv":
            queries = jnp.zeros((self.rows, kind["window"], spec.num_heads, spec.head_width), self.dtype)
            return Snap(self.plain_dense(spec), queries, kind["budget"], kind["kernel"], spec)
        return self.dense(spec)

    def vectors(self, shape: tuple[int, ...], spec: LayerSpec) -> tuple[Codes, Codes]:
        """Keys and values of these first axes, each token by itself."""
        H, numbers = spec.head_width, self.kind.numbers
        if numbers in ("int8", "float8"):
            return tuple(Scaled.empty(shape, H, self.dtype, numbers == "float8") for _ in range(2))  # type: ignore
        return self.plain(shape, spec)

    def groups(self, shape: tuple[int, ...], spec: LayerSpec) -> tuple[Codes, Codes]:
        """Keys and values of these first axes, in int4 groups of tokens."""
        H, g = spec.head_width, self.kind["group"]
        return tuple(Grouped.empty(shape, H, self.dtype, g, by) for by in ("channel", "token"))  # type: ignore

    def dense(self, spec: LayerSpec) -> LayerCache:
        """Everything, in one slot a position."""
        if self.kind.numbers != "int4":
            return self.plain_dense(spec)
        units = mesh.round_up(-(-self.size // self.kind["group"]), "S")
        return self.kivi(Dense(*self.groups((self.rows, spec.num_kv_heads, units), spec)), spec)

    def plain_dense(self, spec: LayerSpec) -> Dense:
        """Everything, token by token."""
        return Dense(*self.vectors((self.rows, spec.num_kv_heads, mesh.round_up(self.size, "S")), spec))

    def ring_size(self, window: int) -> int:
        """R: never more than there are positions."""
        return min(window - 1 + self.pending + self.rewind, self.size)

    def ring(self, spec: LayerSpec, window: int) -> LayerCache:
        """A window's worth."""
        kind, shape = self.kind, (self.rows, spec.num_kv_heads)
        if kind.numbers == "int4" and window > kind["residual"] + kind["group"]:
            # what is coded lies `residual` behind the newest; a group may be cut at either end
            units = -(-(window + self.pending + self.rewind - kind["residual"]) // kind["group"]) + 2
            return self.kivi(Ring(*self.groups((*shape, units), spec), window, 0), spec)
        if kind.numbers == "int4":
            return Ring(*self.plain((*shape, self.ring_size(window)), spec), window, self.pending)
        return Ring(*self.vectors((*shape, self.ring_size(window)), spec), window, self.pending)

    def plain(self, shape: tuple[int, ...], spec: LayerSpec) -> tuple[Codes, Codes]:
        """Keys and values as they are."""
        H = spec.head_width
        if kernels.keeps_bits(self.dtype):
            return Bits.empty(shape, H), Bits.empty(shape, H)
        return Plain.empty(shape, H, self.dtype), Plain.empty(shape, H, self.dtype)

    def kivi(self, old: Slots, spec: LayerSpec) -> Kivi:
        """Old groups with a ring of plain numbers."""
        kind = self.kind
        slots = min(kind["residual"] + kind["group"] + self.pending + self.rewind, self.size)
        plain = self.plain((self.rows, spec.num_kv_heads, slots), spec)
        return Kivi(old, Ring(*plain, slots, self.pending), kind["residual"])

    def sinks(self, spec: LayerSpec, window: int, sinks: int, turned: bool = False) -> LayerCache:
        """The first tokens and a window's worth."""
        shape = (self.rows, spec.num_kv_heads)
        ring = Ring(*self.vectors((*shape, self.ring_size(window)), spec), window, self.pending)
        if not sinks:
            return ring
        return Sinks(Dense(*self.vectors((*shape, sinks), spec), whole=True), ring, turned, self.size)

    def paged(self, spec: LayerSpec) -> LayerCache:
        """A pool."""
        shape, page = (*self.pool, spec.num_kv_heads), self.kind["page"]
        if self.kind.numbers != "int4":
            return Paged(*self.vectors((*shape, page), spec))
        return self.kivi(Paged(*self.groups((*shape, page // self.kind["group"]), spec)), spec)

    @property
    def pool(self) -> tuple[int, int]:
        """(D, P)."""
        groups = mesh.size_of("B")
        all_of_them = self.rows // groups * -(-self.size // self.kind["page"])
        return groups, self.kind["pages"] or all_of_them

    def pages(self, config: ModelConfig) -> Pages | None:
        """The table of a paged cache."""
        if self.kind.layout != "paged":
            return None
        groups, pages = self.pool
        late = self.kind["residual"] + 1 if self.kind.numbers == "int4" else 0
        return Pages.empty(self.rows, self.size, self.kind["page"], pages, groups, late)
