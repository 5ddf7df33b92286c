"""Building on first use: in the cache and nowhere else, by many at once, and never a failure."""

import functools
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import kernels, ops
from jaxinfer.kernels import build, native

ROOT = pathlib.Path(__file__).parents[2]
MULTIPLY = """
import jax, jax.numpy as jnp
from jaxinfer import ops
from jaxinfer.kernels import build, native
{before}
y = jax.jit(lambda x, w: ops.linear(x, w, "BTD,FD->BTF"))(jnp.ones((2, 1, 300)), jnp.ones((5, 300)))
assert (y == 300).all(), y
print(native.unavailable(), {after})
"""


def start(before="", after="", **environment):
    code = MULTIPLY.format(before=before, after=after)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    cwd = environment.get("PWD", str(ROOT))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cwd)


def finish(process):
    printed, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors == ""
    return printed.strip()


@pytest.mark.parametrize(
    ("cpuinfo", "wide", "tiles"),
    [
        ("flags : sse2 avx2 fma\n", False, False),
        ("flags : avx2 avx512f avx512bw\n", True, False),
        ("flags : avx2 avx512f amx_bf16 amx_tile amx_int8\n", True, True),
        ("Features : asimd\n", True, False),
    ],
)
def test_files_for_wide_instructions_are_compiled_where_the_processor_may_have_them(
    cpuinfo, wide, tiles, tmp_path, monkeypatch
):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    units = build.units()
    assert ("avx512.cc" in units) == ("avx512vnni.cc" in units) == wide and "avx2.cc" in units
    assert all(("-DJAXINFER_AVX512" in flags) == wide for flags in units.values())
    assert ("amx.cc" in units) == tiles and all(("-DJAXINFER_AMX" in flags) == tiles for flags in units.values())
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.units() == {name: () for name, flags in build.UNITS.items() if not flags}


@pytest.mark.usefixtures("kernels_are_built")
def test_a_library_without_avx512_runs_on_any_machine(tmp_path):
    before = "build.listed = lambda: {'avx2'}; build.FLAGS = (*build.FLAGS, '-O0')"
    assert finish(
        start(before, "max(native.ISAS[name] for name in native.isas()) < 2", XDG_CACHE_HOME=str(tmp_path))
    ) == ("None True")


@pytest.mark.usefixtures("kernels_are_built")
def test_two_processes_build_at_once_and_leave_one_library_and_nothing_else(tmp_path):
    folders = {"HOME": "home", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp", "PWD": "work"}
    for folder in folders.values():
        (tmp_path / folder).mkdir()
    environment = {name: str(tmp_path / folder) for name, folder in folders.items()}
    quick = "build.FLAGS = (*build.FLAGS, '-O0')"
    both = [start(quick, **environment) for _ in range(2)]
    assert [finish(process) for process in both] == ["None", "None"]
    (library,) = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert library.parent == tmp_path / "cache" / "jaxinfer" / "kernels" and library.suffix == ".so"
    again = start(quick + "; build.build = None", **environment)  # what is there is not built again
    assert finish(again) == "None"


@pytest.mark.usefixtures("kernels_are_built")
def test_a_program_from_the_persistent_cache_finds_its_kernel(tmp_path):
    before = f"""
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)"""
    assert finish(start(before, "len(hits)")) == "None 0"
    reason, hits = finish(start(before, "len(hits)")).split()
    assert reason == "None" and int(hits) >= 1


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """As in a process that has not looked for the kernels yet, with an empty cache."""
    monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def multiplies_plainly(caplog):
    """The one line that was said while two products were traced; they went through XLA."""
    with caplog.at_level(logging.WARNING):
        for rows in (1, 2):
            function = jax.jit(lambda x, w: ops.linear(x, w, "BTD,FD->BTF"))
            x, w = jnp.ones((rows, 1, 30)), jnp.ones((5, 30))
            assert native.LINEAR not in function.lower(x, w).as_text()
            np.testing.assert_array_equal(function(x, w), np.full((rows, 1, 5), 30))
    (record,) = caplog.records
    line = record.getMessage()
    assert "\n" not in line and "Products and attention go through XLA, at about half the speed" in line
    return line


def test_without_a_compiler_one_line_says_so(unbuilt, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(unbuilt))
    assert "no C++ compiler was found (c++, g++, clang++)" in multiplies_plainly(caplog)
    assert kernels.choice().product(jnp.ones((1, 3)), jnp.ones((2, 3))) is None


def test_a_compiler_that_fails_leaves_a_log_and_one_line_that_names_it(unbuilt, monkeypatch, caplog):
    broken = unbuilt / "c++"
    broken.write_text("#!/bin/sh\necho this machine has no flags >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(unbuilt), prepend=os.pathsep)
    line = multiplies_plainly(caplog)
    (log,) = unbuilt.rglob("*.log")
    assert str(log) in line and "this machine has no flags" in log.read_text()
    assert not list(unbuilt.rglob("build-*"))


@pytest.mark.usefixtures("kernels_are_built")
def test_a_cache_that_cannot_be_written_is_one_line(unbuilt, monkeypatch, caplog):
    (unbuilt / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(unbuilt / "file"))
    assert "could not be built" in multiplies_plainly(caplog)


def test_the_library_is_named_by_all_that_it_depends_on(monkeypatch):
    compiler = sys.executable  # any program that knows --version
    names = {build.key(compiler)}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.add(build.key(compiler))
    monkeypatch.setattr(build.jaxlib.version, "__version__", "0.0.1")
    names.add(build.key(compiler))
    assert len(names) == 3
