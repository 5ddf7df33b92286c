"""What is remembered between steps, on the device: one struct per kind, behind one contract (`Cache`)."""

from jaxinfer.cache.base import Cache, LayerCache, Step
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.heavy import Heavy
from jaxinfer.cache.kinds import EVICTING, Kind, cache_bytes, init_cache, max_rows, max_size
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.none import Nothing
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.pages import Pages
from jaxinfer.cache.ring import Ring
from jaxinfer.cache.sinks import Sinks
from jaxinfer.cache.snap import Picked, Snap
from jaxinfer.cache.tree import Tree, branching

__all__ = [
    "EVICTING", "Cache", "Dense", "Heavy", "Kind", "Kivi", "LayerCache", "Nothing", "Paged", "Pages", "Picked", "Ring",
    "Sinks", "Snap", "Step", "Tree", "branching", "cache_bytes", "init_cache", "max_rows", "max_size",
]  # fmt: skip
