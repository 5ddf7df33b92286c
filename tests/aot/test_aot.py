"""Compiled programs in a directory: a restart finds them, compiles nothing; what does not fit is said and replaced."""

import concurrent.futures
import errno
import functools
import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxinfer import aot, kernels, mesh
from jaxinfer.kernels import KernelChoice

EVENTS: list[str] = []
WORK = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: EVENTS.append(name.rpartition("/")[2]))


@functools.partial(jax.jit, static_argnames=("times",), donate_argnums=1)
def grow(x, y, *, times):
    """Has a loop, a reduction and a donated argument."""
    return {"y": jax.lax.fori_loop(0, times, lambda i, y: y * 1.5 + jnp.argmax(x).astype(y.dtype), y), "x": x.sum()}


def some(rows=3):
    return jnp.arange(rows * 8.0).reshape(rows, 8), jnp.ones((rows, 8))


def plain(rows=3, times=2):
    x = np.arange(rows * 8.0)
    y = np.ones((rows, 8))
    for _ in range(times):
        y = y * 1.5 + x.argmax()
    return {"y": y, "x": x.sum()}


def right(got, **how):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, plain(**how))


def work():
    """What was traced, lowered and compiled since this was asked last."""
    done = [name for name in EVENTS if name in WORK]
    EVENTS.clear()
    return done


def files(folder):
    return sorted(folder.glob("*.program"))


def lines(caplog):
    said = [record.getMessage() for record in caplog.records if record.name == "jaxinfer"]
    caplog.clear()
    assert all("\n" not in line for line in said)
    return said


# --- a restart -----------------------------------------------------------------------------------------------------


def test_what_one_start_has_compiled_the_next_one_loads_and_neither_traces_nor_compiles(tmp_path, caplog):
    right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    x, y = some()
    jax.clear_caches()
    work()
    program = aot.load_or_compile(grow, x, y, directory=tmp_path, times=2)
    right(program(x, y))
    assert work() == []
    assert y.is_deleted(), "what is donated is spent by a program that was loaded too"
    assert len(files(tmp_path)) == 1
    assert lines(caplog) == []


def test_shapes_stand_for_arrays(tmp_path):
    programs = aot.Programs(tmp_path)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), some())
    assert programs.take(grow, *shapes, times=2) is programs.take(grow, *some(), times=2)
    assert jax.tree.map(lambda x: x.shape, aot.result(programs.take(grow, *shapes, times=2))) == {"y": (3, 8), "x": ()}


@pytest.mark.parametrize("axes", ["data=4", "data=2,tensor=2"])
def test_a_program_on_a_mesh_is_found_by_its_mesh(axes, tmp_path, caplog):
    def placed():
        return mesh.shard(some(4), ("B_", "BF"))

    with jax.set_mesh(mesh.make_mesh(mesh.parse_axes(axes))):
        before = aot.Programs(tmp_path).run(grow, *placed(), times=2)
        x, y = placed()
        work()
        got = aot.Programs(tmp_path).run(grow, x, y, times=2)
        assert "backend_compile_duration" not in work()
        assert got["y"].sharding.is_equivalent_to(before["y"].sharding, 2)
        right(got, rows=4)
    aot.Programs(tmp_path).run(grow, *some(4), times=2)
    assert len(files(tmp_path)) == 2, "without the mesh it is another program"
    assert lines(caplog) == []


def test_whatever_a_program_depends_on_tells_it_from_others(tmp_path, caplog):
    programs = aot.Programs(tmp_path)
    x, y = some()
    programs.take(grow, x, y, times=2)
    programs.take(grow, x, y, times=3)
    programs.take(grow, *some(4), times=2)
    programs.take(grow, x.astype(jnp.bfloat16), y, times=2)
    programs.take(grow, x, jax.device_put(y, jax.devices()[0]), times=2)  # where it would lie anyway: no other
    with kernels.use(KernelChoice(linear="reference")):
        programs.take(grow, x, y, times=2)
    with jax.default_matmul_precision("float32"):
        programs.take(grow, x, y, times=2)
    assert programs.num == len(files(tmp_path)) == 6
    assert lines(caplog) == []


def test_what_jax_itself_has_kept_is_written_whole(tmp_path):
    """XLA:CPU would write a program that it has read without the functions of its loops."""
    before = {name: jax.config.values[name] for name in jax.config.values if "persistent" in name}
    before |= {"jax_compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"]}
    before |= {"jax_enable_compilation_cache": jax.config.values["jax_enable_compilation_cache"]}
    try:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()
        for _ in range(2):  # the second time it is read
            grow(*some(), times=2)
            jax.clear_caches()
        aot.Programs(tmp_path).take(grow, *some(), times=2)
        jax.clear_caches()
        right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# --- what does not fit ---------------------------------------------------------------------------------------------


def test_another_version_or_machine_is_named_and_compiled_for_beside_it(tmp_path, caplog, monkeypatch):
    here = aot.ground()
    monkeypatch.setattr(aot, "ground", lambda: here | {"jax": "0.0.1", "processor": "a slide rule"})
    aot.Programs(tmp_path).take(grow, *some(), times=2)
    monkeypatch.setattr(aot, "ground", lambda: here)
    programs = aot.Programs(tmp_path)
    right(programs.run(grow, *some(), times=2))
    said = lines(caplog)
    assert len(said) == 1
    assert f"jax 0.0.1 there, {jax.__version__} here; processor a slide rule there" in said[0]
    assert len(files(tmp_path)) == 2
    right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    assert lines(caplog) == [], "each finds its own"


def test_the_ground_says_versions_devices_and_machine():
    facts = aot.ground()
    assert {"jaxinfer", "jax", "jaxlib", "platform", "devices", "processor", "CPU kernels", "XLA_FLAGS"} <= set(facts)
    assert facts["devices"] == f"{len(jax.devices())} x {jax.devices()[0].device_kind}"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def headless(path):
    path.write_text('{"format": "jaxinfer program 1"}')


def another(path):
    """Whole, but no program."""
    head = json.loads(path.read_bytes().partition(b"\n")[0]) | {"sha256": hashlib.sha256(b"else").hexdigest()}
    path.write_bytes(json.dumps(head).encode() + b"\nelse")


@pytest.mark.parametrize("damage", [cut, emptied, headless, another])
def test_a_damaged_file_is_named_and_replaced(damage, tmp_path, caplog):
    aot.Programs(tmp_path).take(grow, *some(), times=2)
    (path,) = files(tmp_path)
    damage(path)
    right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    (said,) = lines(caplog)
    assert said.startswith(f"{path} cannot be loaded (")
    work()
    right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    assert "backend_compile_duration" not in work() and lines(caplog) == []


def test_a_full_disk_is_said_and_leaves_no_half_of_a_file(tmp_path, caplog, monkeypatch):
    write = pathlib.Path.write_bytes

    def half(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pathlib.Path, "write_bytes", half)
    right(aot.Programs(tmp_path).run(grow, *some(), times=2))
    (said,) = lines(caplog)
    assert "cannot be written (No space left on device): the next start compiles it again" in said
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    old, new = tmp_path / ".run.1.partial", tmp_path / ".run.2.partial"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    aot.Programs(tmp_path)
    assert list(tmp_path.iterdir()) == [new], "another process may be writing that one"


class Nameless:
    """Hashable, with an address for a repr."""


def test_what_has_no_name_that_lasts_is_said_and_not_kept(tmp_path, caplog):
    programs = aot.Programs(tmp_path)
    local = jax.jit(lambda x: x + 1)
    assert programs.run(local, jnp.ones(3))[0] == 2
    assert "<lambda> cannot be kept" in lines(caplog)[0]
    with_static = functools.partial(programs.run, jax.jit(stated, static_argnames="what"), jnp.ones(3))
    assert with_static(what=Nameless())[0] == 3
    assert "stated cannot be kept" in lines(caplog)[0]
    assert files(tmp_path) == []


def stated(x, *, what):
    return x + 2


def test_a_directory_that_somebody_else_may_have_written_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is no directory"):
        aot.Programs(tmp_path / "file")
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"everybody may write to .*: chmod o-w"):
        aot.Programs(tmp_path)
    tmp_path.chmod(0o755)
    os.chown(tmp_path, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match=r"belongs to another user \(uid \d+\)"):
        aot.Programs(tmp_path)


# --- several at once -----------------------------------------------------------------------------------------------


def test_two_who_ask_at_once_get_one_program_and_two_processes_one_file(tmp_path):
    first, second, arrays = aot.Programs(tmp_path), aot.Programs(tmp_path), some(5)
    work()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(programs.take, grow, *arrays, times=2) for programs in (first, first, second, second)]
    found = [each.result() for each in asked]
    assert found[0] is found[1] and found[2] is found[3]
    assert work().count("backend_compile_duration") <= 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".program"]
    right(aot.Programs(tmp_path).run(grow, *some(5), times=2), rows=5)
