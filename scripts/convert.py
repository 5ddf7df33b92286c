"""Turns a Hugging Face directory into a sharded (Orbax) checkpoint, or back, bit for bit.

    python scripts/convert.py builtin /tmp/sharded --to orbax
    python scripts/convert.py /tmp/sharded /tmp/model --to huggingface --max-shard-size 5GB

Tensor by tensor: the host holds two of them at a time, however large the model. Tokenizer, config.json, chat templates
and licence go along, byte for byte. With --mesh the model is loaded onto that mesh and saved from there instead, so
that it is stored in the pieces that the mesh reads. DESTINATION appears whole or not at all. A short report goes to
stderr; with --json the last line of stdout is one JSON object instead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import sys
import time
from typing import Any, NoReturn

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
FLOATS = ("float32", "bfloat16", "float16")
KINDS = {"orbax": "a sharded checkpoint", "huggingface": "a Hugging Face directory"}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="'builtin', a directory of either kind, or a hub id")
    add("destination", type=pathlib.Path, help="a directory that is new or empty")
    add("--to", choices=KINDS, required=True, help="what is to be made")
    add("--dtype", choices=FLOATS, help="convert every tensor to it (default: each keeps its own)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="bytes of a safetensors file (default 5GB)")
    add("--mesh", metavar="AXES", help="load onto this mesh and save from there, such as tensor=8 (--to orbax)")
    add("--cpu-devices", type=int, metavar="N", help="emulate N devices on the CPU")
    add("--overwrite", action="store_true", help="put it in the place of what is there")
    add("--json", action="store_true", help="the report as JSON, on the last line of stdout")
    args = parser.parse_args(argv)
    try:
        args.max_bytes = parse_size(args.max_shard_size)
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def parse_size(text: str) -> int:
    """ "5GB" -> 5000000000, "512MiB" -> 536870912."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise ValueError(f"--max-shard-size is {text}: write a number and a unit, such as 5GB or 512MiB")
    return size


def check(args: argparse.Namespace) -> None:
    """Refuses what contradicts itself, before anything heavy is imported."""
    if args.to == "huggingface" and (args.mesh or args.cpu_devices):
        raise ValueError("--mesh and --cpu-devices say how a sharded checkpoint is made: leave them out")
    if args.cpu_devices is not None and args.cpu_devices < 1:
        raise ValueError(f"--cpu-devices is {args.cpu_devices}: it must be at least 1")
    if args.cpu_devices and not args.mesh:
        raise ValueError("--cpu-devices needs --mesh, such as --mesh tensor=8")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The story: find the source, see that the destination is free, convert, tell."""
    import jax

    import jaxinfer

    if args.cpu_devices or not args.mesh:  # tensor by tensor, no accelerator has anything to do
        jax.config.update("jax_platforms", "cpu")
    if args.cpu_devices:
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    start = time.perf_counter()
    weights = jaxinfer.weights
    source = jaxinfer.hub.locate(args.source)
    kind = "orbax" if weights.orbax.holds(source) else "huggingface"
    if kind == args.to:
        raise ValueError(f"{args.source} is {KINDS[kind]} already: --to takes {', '.join(KINDS.keys() - {kind})}")
    destination = args.destination.expanduser().absolute()
    free(destination, source, args)
    mesh = jaxinfer.mesh.make_mesh(jaxinfer.mesh.parse_axes(args.mesh)) if args.mesh else None
    # a sharded checkpoint is replaced in one step by `save` itself; everything else is made beside the destination
    replaced = args.to == "orbax" and weights.orbax.holds(destination)
    with contextlib.nullcontext(destination) if replaced else weights.convert.in_place_of(destination) as draft:
        if args.to == "orbax":
            told = weights.convert.to_sharded(source, draft, args.dtype, mesh)
        else:
            told = weights.convert.to_huggingface(source, draft, args.dtype, args.max_bytes)
    seconds = time.perf_counter() - start
    return {"source": args.source, "destination": str(args.destination), "to": args.to, **told, "seconds": seconds}


def free(destination: pathlib.Path, source: pathlib.Path, args: argparse.Namespace) -> None:
    """Refuses a destination that is not free."""
    if destination.resolve() == source.resolve() or source.resolve() in destination.resolve().parents:
        raise ValueError(f"{args.destination} is the source or lies in it: name another directory")
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"{args.destination} is a file: name a directory")
    if destination.is_dir() and any(destination.iterdir()) and not args.overwrite:
        raise ValueError(f"{args.destination} is not empty: name another directory, or give --overwrite")
    if args.overwrite and destination.is_dir() and any(destination.iterdir()) and not is_model(destination):
        raise ValueError(f"{args.destination} holds files and no model: --overwrite replaces models only")


def is_model(directory: pathlib.Path) -> bool:
    """Whether a directory is one that this script may have written."""
    import jaxinfer

    return jaxinfer.weights.orbax.holds(directory) or (directory / "config.json").is_file()


def one_line(error: BaseException) -> str:
    """What an error says; an OSError does not say its file by itself."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def report(told: dict[str, Any]) -> str:
    """One line for people."""
    files = f" in {len(told['files'])} files" if "files" in told else ""
    left = f"; {told['left_out']} tensors that are no part of the text model were left out" if told["left_out"] else ""
    return (
        f"{told['source']} -> {told['destination']} ({KINDS[told['to']]}): {told['tensors']} tensors{files}, "
        f"{told['bytes'] / 1e6:.2f} MB of {' and '.join(told['dtypes'])}, {told['seconds']:.2f} s{left}"
    )


def main(args: argparse.Namespace) -> int:
    """Runs it, and says in one line what cannot be done."""
    try:
        told = run(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"convert.py: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nconvert.py: stopped, and nothing was left behind", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(told))
    else:
        print(report(told), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
