"""How a script's memory is allocated: it begins anew once, and what XLA makes lies in huge pages."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"
BEGIN = f"import os, sys; sys.path.insert(0, {str(SCRIPTS)!r}); import allocation; "
HUGE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is about glibc")


def says(code, **environment):
    known = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, "a word"], env=known | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_script_begins_anew_once_with_its_words():
    code = "print(os.getpid(), flush=True); allocation.begin_anew(allocation.HUGE); "
    first, again, *words = says(code + "print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])")
    assert first == again and words == ["glibc.malloc.hugetlb=1", "a", "word"]


def test_settings_of_ones_own_are_left_alone():
    own = "glibc.malloc.arena_max=2"
    code = "allocation.begin_anew(allocation.HUGE); print(os.environ['GLIBC_TUNABLES'])"
    assert says(code, GLIBC_TUNABLES=own) == [own]


@pytest.mark.skipif(not HUGE.is_file() or "[never]" in HUGE.read_text(), reason="this Linux has no huge pages")
@pytest.mark.parametrize(("tunables", "num", "size"), [("HUGE", 1, 64), ("ALONE", 1, 64), ("ALONE", 16, 4)])
def test_what_xla_makes_lies_in_huge_pages(tunables, num, size):
    code = (
        f"allocation.begin_anew(allocation.{tunables}); import jax, jax.numpy as jnp; "
        f"more = jax.jit(lambda: [jnp.full(({size}, 1 << 20), i, jnp.uint8) for i in range({num})]); "
        "kept = [jax.block_until_ready(more()) for _ in range(2)]; print(open('/proc/self/smaps_rollup').read())"
    )
    told = says(code)
    assert int(told[told.index("AnonHugePages:") + 1]) > 96 * 1024  # kB, of 128 MB
