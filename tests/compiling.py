"""Programs for laws, which hold however a program is compiled: made in less than half of the time.

    with quickly(): ...  # or the fixture `quickly_compiled`
    subprocess.run(..., env=os.environ | QUICKLY)

Not for a test of bits that only the program which users run may change. A test that reads a compiled program takes
`quickly(read=True)`, the fixture `compiled_to_be_read`: its text is that of the users' program, only the machine code
is made in a hurry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
from jax._src import compiler

# Fusions as they were emitted before XLA:CPU did it through MLIR. XLA ends a process that names an option it lacks, so
# this is asked of the versions that are known to have it.
EMITTERS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
QUICKLY = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": " ".join(f"--{name}={str(value).lower()}" for name, value in EMITTERS.items()),
}


@contextlib.contextmanager
def quickly(wanted: bool = True, read: bool = False) -> Iterator[None]:
    """What is compiled meanwhile is compiled quickly; as users compile it where that is not wanted."""
    before, usual = jax.config.read("jax_disable_most_optimizations"), compiler.get_compile_options

    def quick(*arguments, env_options_overrides=None, **options):
        return usual(*arguments, env_options_overrides=EMITTERS | (env_options_overrides or {}), **options)

    hurried = quick if wanted and not read else usual

    jax.config.update("jax_disable_most_optimizations", wanted)
    compiler.get_compile_options = hurried
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
        compiler.get_compile_options = usual
