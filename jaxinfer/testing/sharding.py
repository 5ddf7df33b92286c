"""To test how your own functions shard, on a machine with one CPU: emulated devices, meshes, and what a program sends.

In conftest.py, before anything uses jax:

    from jaxinfer.testing import emulate_devices

    pytest_plugins = ["jaxinfer.testing.fixtures"]
    emulate_devices(8)

and in a test:

    def test_my_layer_reduces_once(on_mesh):
        with on_mesh("data=2,tensor=4"):
            w = jaxinfer.shard(jnp.ones((64, 32)), "FD")
            sent = collectives_of(my_layer, jnp.ones((8, 32)), w)
        assert sent == {"all-reduce": 1}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer import program


def emulate_devices(count: int) -> None:
    """Makes this process see `count` CPU devices. Raises ValueError where jax has started with fewer already."""
    try:
        jax.config.update("jax_num_cpu_devices", count)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # jax has started
        if len(jax.devices()) < count:
            raise ValueError(
                f"jax already runs on {len(jax.devices())} devices, too late for {count}: ask before it is used"
            ) from None


def collectives_of(f: Callable, *args: Any, cheapest: bool = False, **kwargs: Any) -> dict[str, int]:
    """How many collectives of each kind one call of f executes, loops multiplied in (of unknown length: one trip).

    f may be jitted or not; args may be arrays or `jax.ShapeDtypeStruct`s with shardings. Of a `lax.cond` the branch
    that moves most counts, with `cheapest` the one that moves least.
    """
    lowered = f.lower(*args, **kwargs) if hasattr(f, "lower") else jax.jit(f).lower(*args, **kwargs)
    count: Counter[str] = Counter()
    for row in program.collectives(lowered.compile(), cheapest):
        count[row["kind"]] += row["count"]
    return dict(count)


def device_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on the device that holds most of them."""
    held: Counter[Any] = Counter()
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return max(held.values(), default=0)
