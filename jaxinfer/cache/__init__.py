"""What is remembered between steps, on the device: one struct per kind, behind one contract (`Cache`)."""

from jaxinfer.cache.base import Cache, LayerCache, Step
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.kinds import cache_bytes, init_cache
from jaxinfer.cache.none import Nothing
from jaxinfer.cache.tree import Tree, branching

__all__ = ["Cache", "Dense", "LayerCache", "Nothing", "Step", "Tree", "branching", "cache_bytes", "init_cache"]
