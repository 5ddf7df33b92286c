"""Compiled programs that outlive their process: the next one loads them, and traces, lowers and compiles nothing.

    step = aot.load_or_compile(jaxinfer.decode_step, params, config, ids, cache, directory="programs")
    logits, cache = step(params, ids, cache)  # the config, which is static, is part of the program

Kept are executables, as `jax.experimental.serialize_executable` gives them. `jax.export` would keep StableHLO, which
runs elsewhere too but must be lowered and compiled at every start, as must what JAX's persistent cache keeps be traced
and lowered before it is found there. The price is that an executable fits one version and one kind of machine: a file
says which, and where something differs the program is compiled anew, beside the other one.

A directory of programs must be trusted like a program: whoever can write there can run code as you, since what lies
there is machine code, and is unpickled. One that belongs to another user, or that everybody may write to, is refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import pickle
import stat
import sys
import threading
import time
import uuid
from typing import Any

import jax
import jaxlib.version
from jax.experimental import serialize_executable
from jax.stages import Compiled

from jaxinfer import kernels

FORMAT = "jaxinfer program 1"
LEFT = 86400  # seconds after which a file that is only half written is nobody's any more
SETTINGS = (  # of JAX, that programs depend on
    "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion", "jax_default_device",
)  # fmt: skip
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def load_or_compile(f: Any, *arguments: Any, directory: str | os.PathLike[str], **static: Any) -> Compiled:
    """The program of a jitted function for such arguments, from a directory, or compiled and written there.

    arguments, static: as f takes them; arrays or `jax.ShapeDtypeStruct`s, of which shape, dtype and sharding count and
    not the values. A number of Python counts by its value, and so does all that is static: its repr must say all of it,
    and no address. The program takes the arguments that are not static; donated ones are spent.

    A program is found again by the function's name, these arguments, the ambient mesh and `KernelChoice`, the sources
    of jaxinfer and of the file where f stands, the versions of jax and jaxlib, the devices, the processor and XLA's
    flags. What else f reads (another file of yours) is for you to remember: take another directory when it changes.

    Where the file is damaged, of another version or machine, or cannot be written, one line says so (a warning of the
    logger `jaxinfer`, which is stderr unless configured), and the program is compiled. Raises OSError or ValueError for
    a directory that is none or not to be trusted, and what compiling raises.
    """
    return Programs(directory).take(f, *arguments, **static)


class Programs:
    """Compiled programs by what they are of: each is compiled once in a process, or loaded from a directory.

    directory: where they are kept for the next process, see `load_or_compile`; None: nowhere. Any number of threads and
    processes may use it at a time: a file appears whole or not at all, and of two equal ones the last stays.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None):
        self.directory = None if directory is None else trusted(pathlib.Path(directory).expanduser())
        self._held: dict[Any, Compiled] = {}
        self._lock = threading.Lock()
        self._said: set[str] = set()

    @property
    def num(self) -> int:
        """How many programs were asked for."""
        return len(self._held)

    def take(self, f: Any, *arguments: Any, **static: Any) -> Compiled:
        """The program of a jitted function for such arguments; of two who ask at a time the second waits for it."""
        key = asked(f, arguments, static)
        with self._lock:
            if key not in self._held:
                self._held[key] = self._make(key, arguments, static)
            return self._held[key]

    def run(self, f: Any, *arguments: Any, **static: Any) -> Any:
        """What that program gives; none of the arguments may be static."""
        return self.take(f, *arguments, **static)(*arguments)

    def _make(self, key: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> Compiled:
        if self.directory is None:
            return key[0].lower(*arguments, **static).compile()
        f, *rest = key
        told = f"{f.__module__}.{f.__qualname__} {source(f.__module__)} {rest!r}"
        nameless = " at 0x" in told or "<" in f.__qualname__
        if nameless or jax.process_count() > 1:
            why = "it, or what is static of it, has no name that lasts" if nameless else "it runs in several processes"
            self._say(f"{f.__qualname__} cannot be kept: {why}")
            return f.lower(*arguments, **static).compile()
        facts, name = ground(), f"{f.__name__}-{digest(told)}"
        path = self.directory / f"{name}-{digest(repr(facts))}.program"
        try:
            return read(path)
        except FileNotFoundError:
            self._compare(name, facts)
        except (OSError, ValueError) as error:
            self._say(f"{path} cannot be loaded ({line(error)}): it is compiled anew")
        program = compiled_apart(f.lower(*arguments, **static))
        try:
            write(path, facts, program)
        except OSError as error:
            self._say(f"{path} cannot be written ({line(error)}): the next start compiles it again")
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            self._say(f"{f.__qualname__} cannot be kept ({line(error)}): the next start compiles it again")
        return program

    def _compare(self, name: str, facts: dict[str, str]) -> None:
        """Says how the newest program of this name differs, which was made elsewhere."""
        assert self.directory is not None
        with contextlib.suppress(OSError, ValueError):  # one that is damaged or gone by now says nothing
            others = sorted(self.directory.glob(f"{name}-*.program"), key=lambda path: path.stat().st_mtime)
            if not others:
                return
            before = parts(others[-1])[0].get("ground", {})
            differs = [key for key in facts | before if facts.get(key) != before.get(key)]
            what = "; ".join(f"{key} {before.get(key)} there, {facts.get(key)} here" for key in differs)
            self._say(f"the programs in {self.directory} are of another version or machine ({what}): compiled anew")

    def _say(self, text: str) -> None:
        """Says a line, once."""
        if text not in self._said:
            self._said.add(text)
            logging.getLogger("jaxinfer").warning("%s", text)


# --- what a program is of ------------------------------------------------------------------------------------------


def asked(f: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> tuple[Any, ...]:
    """What a program is of; equal, and with an equal repr in another process, where the program is the same."""
    leaves, tree = jax.tree.flatten(arguments)
    mesh = jax.sharding.get_mesh()
    where = () if mesh.empty else (mesh.axis_names, mesh.devices.shape, tuple(d.id for d in mesh.devices.flat))
    settings = [str(getattr(jax.config, name)) for name in SETTINGS]
    ambient = (where, kernels.choice(), *settings, jax.config.read("jax_disable_most_optimizations"))
    return f, tree, tuple(map(kind, leaves)), tuple(sorted(static.items())), ambient


def kind(x: Any) -> Any:
    """What a program knows of an argument."""
    if not hasattr(x, "shape"):  # a number, or a config
        return x
    weak = getattr(x, "weak_type", False)
    sharding = getattr(x, "sharding", None) if getattr(x, "committed", True) else None
    return str(x.dtype), tuple(x.shape), weak, None if sharding is None else place(sharding, tuple(x.shape))


@functools.lru_cache(4096)
def place(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Any:
    """Which part of an array lies where, however its sharding says it; None where it lies on the first device."""
    if sharding.device_set == {jax.devices()[0]}:
        return None
    parts = sharding.devices_indices_map(shape)
    return tuple((device.id, str(index)) for device, index in parts.items())


def result(program: Compiled) -> Any:
    """What a program gives, as `jax.ShapeDtypeStruct`s that say where it lies: to ask for a program that goes on."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), program.out_info)


def ground() -> dict[str, str]:
    """What every program depends on, in words."""
    from jaxinfer import __version__

    devices = jax.devices()
    client = devices[0].client
    return {
        "jaxinfer": f"{__version__} ({sources()})",
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": " ".join(f"{client.platform} {client.platform_version}".split()),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        **kernels.machine(),
        **{name: os.environ.get(name, "") for name in FLAGS},
    }


@functools.cache
def sources() -> str:
    """A digest of this package's sources."""
    home = pathlib.Path(__file__).parent
    files = sorted(path for path in home.rglob("*") if path.suffix in (".py", ".cc", ".h"))
    return digest("".join(f"{path.relative_to(home)} {digest(path.read_bytes())}" for path in files))


@functools.cache
def source(module: str) -> str:
    """A digest of the file in which a module stands; nothing where it is typed in."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return digest(pathlib.Path(path).read_bytes()) if path else ""


def digest(data: str | bytes) -> str:
    """A few letters that other data would not have."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]


# --- files ---------------------------------------------------------------------------------------------------------


def trusted(directory: pathlib.Path) -> pathlib.Path:
    """A directory, made if there is none. ValueError where somebody else might have put something into it."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is no directory: programs need one of their own")
    directory.mkdir(parents=True, exist_ok=True)
    facts = directory.stat()
    if hasattr(os, "getuid") and facts.st_uid not in (0, os.getuid()):
        raise ValueError(
            f"{directory} belongs to another user (uid {facts.st_uid}), and the programs in it are run: take a "
            "directory of your own"
        )
    if facts.st_mode & stat.S_IWOTH:
        raise ValueError(f"everybody may write to {directory}, and the programs in it are run: chmod o-w {directory}")
    for path in directory.glob(".*.partial"):  # of a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT:
                path.unlink()
    return directory


def parts(path: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """What a file says of its program, and the program. ValueError where it is not whole."""
    first, _, data = path.read_bytes().partition(b"\n")
    head = json.loads(first) if first.startswith(b"{") else {}
    if head.get("format") != FORMAT:
        raise ValueError("it does not begin as a program does")
    if head.get("sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError("it is cut short, or damaged")
    return head, data


def read(path: pathlib.Path) -> Compiled:
    """The program in a file, ready to run. FileNotFoundError, or ValueError for a file that cannot be used."""
    head, data = parts(path)
    known = {device.id: device for device in jax.devices()}
    try:
        devices = [known[i] for i in head["devices"]]
        return serialize_executable.deserialize_and_load(*pickle.loads(data), execution_devices=devices)
    except Exception as error:  # pickles, and what runtimes say of executables, fail in any way
        raise ValueError(line(error)) from error


def write(path: pathlib.Path, facts: dict[str, str], program: Compiled) -> None:
    """A program as a file, which appears whole or not at all."""
    data = pickle.dumps(serialize_executable.serialize(program))
    runs: Any = program.runtime_executable()
    devices = [device.id for device in runs.local_devices()]
    head = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), "devices": devices, "ground": facts}
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        draft.write_bytes(json.dumps(head).encode() + b"\n" + data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def compiled_apart(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles what is to be written, never taking it from JAX's persistent cache.

    XLA:CPU writes a program that was itself read without some of its functions, which nobody notices before it runs.
    An option without a meaning here, of a value that was never there, gives the program a key of its own.
    """
    return lowered.compile({"xla_dump_emitter_re": uuid.uuid4().hex})


def line(error: BaseException) -> str:
    """What an error says, in one line of a reasonable length."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (" ".join(said.split()) or type(error).__name__)[:160]
