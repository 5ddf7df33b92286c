"""Attention of one new token a row to a cache, alone: GB/s of what is valid, as a share of what memory can give.

Layers enough to fill 512 MB follow one another in one program, twice, so that no cache of the processor holds them and
what a dispatch takes to begin is next to nothing: after a plain read of memory it begins slowly. All shapes of a dtype,
kernel and XLA's form, are measured in turns, and plain reads with them: other work on a machine slows all of them. So
what room costs that is allocated and not valid is a ratio within rounds (`over_packed`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import ceilings
import measured
from screen import size

DISTINCT = 512 << 20  # bytes, past what a processor keeps
TURNS = 2  # of which a dispatch takes so many


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--rows", type=int, default=8, help="sequences in the batch")
    add("--valid", type=int, nargs="+", default=[512, 2048, 8192], help="tokens that a row has")
    add("--allocated", type=int, nargs="+", help="tokens that there is room for (default: as many as are valid)")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=64)
    add("--dtype", nargs="+", default=["float32", "bfloat16", "int8"], choices=["float32", "bfloat16", "int8"])
    add(
        "--kernel",
        nargs="+",
        default=["auto", "reference"],
        choices=["auto", "reference"],
        help="reference: XLA's form",
    )
    add(
        "--queries",
        default="bfloat16",
        choices=["float32", "bfloat16"],
        help="dtype of those to int8 (default: %(default)s; to other caches they are as these)",
    )
    add("--rounds", type=int, default=7)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints a line a measurement."""
    if args.heads % args.kv_heads:
        raise ValueError(f"--heads is {args.heads}: it must be a multiple of --kv-heads {args.kv_heads}")
    shapes = [(valid, room) for valid in args.valid for room in args.allocated or [valid] if room >= valid]
    if not shapes:
        raise ValueError(f"--allocated is {args.allocated}: there must be room for --valid {min(args.valid)}")
    for dtype in args.dtype:
        check_memory(args, shapes, dtype)
    limits = ceilings.measure()
    results: list[dict[str, Any]] = []
    for dtype in args.dtype:
        for line in measure(args, shapes, dtype):
            limits.reached("read", line["gb_per_second"], f"{line['valid']} of {line['allocated']} {dtype}")
            show(args, line, limits.share("read", line["gb_per_second"]))
            results.append(line)
    limits.show_raised()
    return {
        "benchmark": "attention of a decode step alone; ms are of one layer",
        **{name: getattr(args, name) for name in ("rows", "heads", "kv_heads", "head_dim", "queries", "rounds")},
        "ceilings": limits.told(),
        "results": [
            line | {"share": round(limits.share("read", line["gb_per_second"]), 3)} for line in results
        ],
    }  # fmt: skip


def show(args: argparse.Namespace, line: dict[str, Any], share: float) -> None:
    """Prints it, and what its empty room costs."""
    what = f"{args.rows} x {line['valid']} of {line['allocated']} {line['dtype']:9} {line['kernel']:9}"
    print(
        f"{what} {line['ms']['median']:8.3f} ms, {line['gb_per_second']:5.1f} GB/s, {share:.2f} of the ceiling, "
        f"{line['share_beside']:.2f} of a read beside it",
        flush=True,
    )
    if over := line["over_packed"]:
        print(
            f"{what} {over['ratio']:8.3f} times what {line['valid']} of {line['valid']} take "
            f"({over['min']:.3f} to {over['max']:.3f} round by round)",
            flush=True,
        )


# --- the caches ----------------------------------------------------------------------------------------------------


def bytes_read(args: argparse.Namespace, valid: int, dtype: str) -> int:
    """Of one layer."""
    import jax.numpy as jnp

    vector = args.head_dim + 4 if dtype == "int8" else args.head_dim * jnp.dtype(dtype).itemsize
    return 2 * args.rows * args.kv_heads * valid * vector


def num_layers(args: argparse.Namespace, valid: int, dtype: str) -> int:
    """How many layers hold enough that is valid."""
    return -(-DISTINCT // bytes_read(args, valid, dtype))


def empty(args: argparse.Namespace, valid: int, room: int, dtype: str, paged: bool = False) -> Any:
    """The shapes of a cache, of slots or in pages; nothing is allocated."""
    import jax

    from jaxinfer.cache import init_cache
    from jaxinfer.config import ModelConfig

    spec = layer(args)
    layers = (spec,) * num_layers(args, valid, dtype)
    config = ModelConfig(vocab_size=1, width=1, layers=layers, norm=spec.norm, dtype="float32")
    kind, plain = ("int8", None) if dtype == "int8" else ("dense", dtype)
    if paged:
        kind = "paged+int8" if dtype == "int8" else "paged"
    return jax.eval_shape(lambda: init_cache(config, args.rows, room, kind, dtype=plain))


def layer(args: argparse.Namespace) -> Any:
    """The heads."""
    from jaxinfer.config import LayerSpec, NormSpec

    return LayerSpec(
        num_heads=args.heads, num_kv_heads=args.kv_heads, head_width=args.head_dim, scale=args.head_dim**-0.5,
        rope=None, ffn_width=1, norm=NormSpec(eps=1e-5),
    )  # fmt: skip


def check_memory(args: argparse.Namespace, shapes: list[tuple[int, int]], dtype: str) -> None:
    """Refuses caches that do not fit all at once, beside what is read and one layer as XLA's form widens it."""
    from jaxinfer import kernels

    held = sum(empty(args, valid, room, dtype).bytes for valid, room in shapes)
    widened = max(bytes_read(args, room, "float32") for _, room in shapes)
    need, free = held + widened + measured.READ, kernels.free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"the {dtype} caches of {len(shapes)} shapes, measured in turns, need {size(need)} at once but "
            f"{size(free)} are free: give fewer --valid or --allocated, or fewer --rows"
        )


def scattered(pages: Any) -> Any:
    """Pages of a pool as rows have them that came and went: each row has all it can, anywhere."""
    import jax

    table = jax.random.permutation(jax.random.key(3), pages.num)[: pages.table.size].reshape(pages.table.shape)
    return pages.replace(table=table.astype(pages.table.dtype), lacking=jax.numpy.zeros(len(table), bool)).counted()


def filled(seed: int, x: Any) -> Any:
    """An array of numbers that no product is quick with."""
    import jax
    import jax.numpy as jnp

    key = jax.random.key(seed)
    if x.dtype == jnp.int8:
        return jax.random.randint(key, x.shape, -127, 128, x.dtype)
    numbers = 0.02 * (1 + jax.random.uniform(key, x.shape))
    if x.dtype == jnp.uint16:  # the bits of bfloat16
        return jax.lax.bitcast_convert_type(numbers.astype(jnp.bfloat16), x.dtype)
    return numbers.astype(x.dtype)


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, shapes: list[tuple[int, int]], dtype: str) -> list[dict[str, Any]]:
    """Every shape with every kernel in turn, and the reads."""
    runs: dict[Any, Callable[[], object]] = {}
    for valid, room in shapes:
        attend = attention(args, valid, room, dtype, codes=args.queries, turns=TURNS)
        runs |= {(valid, room, kernel): functools.partial(attend, kernel) for kernel in args.kernel}
    reads = measured.reads(measured.READ)
    took = measured.seconds(runs | reads.ways, args.rounds)
    lines = []
    for valid, room, kernel in runs:
        num, times = TURNS * num_layers(args, valid, dtype), took[valid, room, kernel]
        lines.append({
            "valid": valid, "allocated": room, "dtype": dtype, "kernel": kernel,
            "ms": {key: round(value / num * 1e3, 4) for key, value in measured.spread(times).items()},
            "gb_per_second": round(bytes_read(args, valid, dtype) * num / statistics.median(times) / 1e9, 2),
            "over_packed": None if room == valid else measured.ratio(times, took.get((valid, valid, kernel))),
        })  # fmt: skip
    return reads.beside(lines, took)


def attention(
    args: argparse.Namespace,
    valid: int,
    room: int,
    dtype: str,
    paged: bool = False,
    codes: str = "float32",
    turns: int = 1,
) -> Callable[[str], Any]:
    """A program that looks at a filled cache, layer by layer, with the kernel that it is given, so many times.

    Queries are of the cache's dtype, or of `codes` where it is int8.
    """
    import jax
    import jax.numpy as jnp

    from jaxinfer import kernels
    from jaxinfer.cache.slots import look

    shape, spec = empty(args, valid, room, dtype, paged), layer(args)
    pages = shape.pages and scattered(shape.pages)
    leaves, form = jax.tree.flatten(shape.layers[0])
    drawn = jax.tree.unflatten(form, [filled(seed, x) for seed, x in enumerate(leaves)])
    layers = tuple(jax.tree.map(jnp.copy, drawn) for _ in shape.layers)  # sooner than to draw each
    length = jnp.full(args.rows, valid - 1, jnp.int32)
    queries = codes if dtype == "int8" else dtype
    q = jax.random.normal(jax.random.key(0), (args.rows, 1, args.heads, args.head_dim), queries)

    @functools.partial(jax.jit, static_argnames="kernel")
    def program(q: Any, layers: Any, length: Any, pages: Any, kernel: str) -> Any:
        held = shape.replace(layers=layers, length=length, pages=pages)
        step = held.step(jnp.ones(args.rows, jnp.int32), 1)

        def once(_: Any, q: Any) -> Any:
            for each in layers:
                q = look(q, [each.source(step.end, pages)], spec, step)
            return q

        with kernels.use(kernels.KernelChoice(attention=kernel)):
            return once(0, q) if turns == 1 else jax.lax.fori_loop(0, turns, once, q)

    return functools.partial(program, q, layers, length, pages)
