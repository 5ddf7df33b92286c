"""C++ that ships as source: built on first use, into the user's cache, by whatever compiler there is."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile

import jax
import jaxlib.version

SOURCES = pathlib.Path(__file__).parent / "csrc"
COMPILERS = ("c++", "g++", "clang++")
# No contraction: where a product and a sum become one rounding is the source's to say, and not to differ by compiler.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl")
AMX = ("-mamx-tile", "-mamx-bf16")
UNITS = {  # each instruction set is a file with flags of its own; which one runs is chosen at run time
    "linear.cc": (),
    "attention.cc": (),
    "read.cc": (),
    "portable.cc": (),
    "avx2.cc": AVX2,
    "avx512.cc": AVX512,
    "avx512bf16.cc": (*AVX512, "-mavx512bf16"),
    "avx512vnni.cc": (*AVX512, "-mavx512vnni"),
    "amx.cc": (*AVX512, "-mavx512bf16", *AMX),
    "amxattend.cc": (*AVX512, "-mavx512bf16", *AMX),
    "amxbytes.cc": (*AVX512, "-mavx512bf16", *AMX, "-mamx-int8"),
    "amxfew.cc": (*AVX512, "-mavx512bf16", *AMX, "-mamx-int8", "-mavx512vbmi"),
}
X86 = ("x86_64", "AMD64")
CPUINFO = pathlib.Path("/proc/cpuinfo")
TIMEOUT = 300  # seconds


class BuildError(Exception):
    """Why there is no library, in one line."""


def library() -> pathlib.Path:
    """The shared library of this version's sources, built if it is not in the cache yet. BuildError if it cannot be.

    The cache is $XDG_CACHE_HOME/jaxinfer/kernels (~/.cache/...); the name is a hash of the sources, the compiler and
    its version, the flags and jaxlib's version (whose headers are compiled in), so nothing stale is ever found. Many
    processes may build at once: each builds apart, and the last to finish replaces the file in one step.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(f"no C++ compiler was found ({', '.join(COMPILERS)})")
    try:
        folder = cache_folder()
        path = folder / f"{key(compiler)}.so"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            build(compiler, path)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise BuildError(f"it could not be built: {error}") from error
    return path


def find_compiler() -> str | None:
    """The path of the first C++ compiler on the PATH."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def cache_folder() -> pathlib.Path:
    """Where libraries are kept. RuntimeError where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "jaxinfer" / "kernels"


def key(compiler: str) -> str:
    """Names everything that the library depends on."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    parts = (done.stdout, platform.machine(), jaxlib.version.__version__, FLAGS, units())
    digest = hashlib.sha256(repr(parts).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"kernels-{digest.hexdigest()[:20]}"


def units() -> dict[str, tuple[str, ...]]:
    """The files to compile on this machine, with the flags of each: those for AVX-512 take longest, if it has it."""
    x86, known = platform.machine() in X86, listed()
    wide = x86 and (known is None or "avx512f" in known)  # what is not known is decided when it runs
    tiles = wide and {"amx_bf16", "amx_int8"} <= (known or set())  # for where there are none a compiler may be too old
    there = [f"-DJAXINFER_{name}" for name, has in (("AVX512", wide), ("AMX", tiles)) if has]
    lacking = {flag for flag, has in (("-mavx2", x86), ("-mavx512f", wide), ("-mamx-tile", tiles)) if not has}
    return {name: (*flags, *there) for name, flags in UNITS.items() if not lacking & set(flags)}


def listed() -> set[str] | None:
    """The names of what the processor has, as Linux gives them, or None where it does not."""
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    found = re.search(r"^flags\s*:(.*)", text, re.M)
    return set(found[1].split()) if found else None


def build(compiler: str, path: pathlib.Path) -> None:
    """Compiles the units side by side, links them, and puts the library at `path` in one step."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
        folder = pathlib.Path(scratch)
        include = f"-I{jax.ffi.include_dir()}"
        commands = [
            [compiler, *FLAGS, *flags, include, "-c", str(SOURCES / name), "-o", str(folder / f"{name}.o")]
            for name, flags in units().items()
        ]
        made = folder / path.name
        link = [compiler, "-shared", "-pthread", *(command[-1] for command in commands), "-o", str(made)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            done = list(pool.map(run, commands))
        done += [run(link)] if all(code == 0 for code, _ in done) else []
        if any(code != 0 for code, _ in done):
            log = path.with_suffix(".log")
            log.write_text("\n".join(text for _, text in done))
            raise BuildError(f"{compiler} failed (see {log})")
        os.replace(made, path)


def run(command: list[str]) -> tuple[int, str]:
    """(exit code, the command and what it printed)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"{' '.join(command)}\ntook more than {TIMEOUT} s"
    return done.returncode, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
