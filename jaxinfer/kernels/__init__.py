"""The only room that says cpu, gpu or tpu: what each platform does best, decided once and by name.

Every kernel here has a plain twin above, in `ops`, which is the truth it is compared with. `KernelChoice` says which of
the two is taken:

    with kernels.use(KernelChoice(linear="reference")):  # XLA's product, everywhere
        logits, cache = forward(params, config, ids, cache)
"""

from jaxinfer.kernels.attention import attended
from jaxinfer.kernels.choice import KernelChoice, choice, use
from jaxinfer.kernels.gpu.products import Around, project
from jaxinfer.kernels.kept import PAST, Kept, Rule
from jaxinfer.kernels.machine import machine
from jaxinfer.kernels.memory import cache_dtype, free_memory, host_memory, keeps_bits, packs_int4
from jaxinfer.kernels.products import ACTIVATIONS, BLOCK, UNIT

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "PAST",
    "UNIT",
    "Around",
    "Kept",
    "KernelChoice",
    "Rule",
    "attended",
    "cache_dtype",
    "choice",
    "free_memory",
    "host_memory",
    "keeps_bits",
    "machine",
    "packs_int4",
    "project",
    "use",
]
