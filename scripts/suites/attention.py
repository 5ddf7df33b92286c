"""Attention of one new token a row to a cache, alone: GB/s of what is valid, as a share of a plain read.

Layers enough to fill 256 MB follow one another in one program, so that no cache of the processor holds them. Kernel and
XLA's form are measured in turns, with a plain read of memory before each shape.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import measured

DISTINCT = 256 << 20  # bytes, past what a processor keeps


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
    add("--rounds", type=int, default=7)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints a line a measurement."""
    if args.heads % args.kv_heads:
        raise ValueError(f"--heads is {args.heads}: it must be a multiple of --kv-heads {args.kv_heads}")
    shapes = [(valid, room) for valid in args.valid for room in args.allocated or [valid] if room >= valid]
    if not shapes:
        raise ValueError(f"--allocated is {args.allocated}: there must be room for --valid {min(args.valid)}")
    results = []
    for valid, room in shapes:
        for dtype in args.dtype:
            ceiling = measured.plain_read()
            for line in measure(args, valid, room, dtype):
                line |= {"plain_read": round(ceiling, 1), "share": round(line["gb_per_second"] / ceiling, 3)}
                results.append(line)
                print(
                    f"{args.rows} x {valid} of {room} {dtype:9} {line['kernel']:9} {line['ms']['median']:8.3f} ms, "
                    f"{line['gb_per_second']:5.1f} GB/s, {line['share']:.2f} of a plain read",
                    flush=True,
                )
    shape = {name: getattr(args, name) for name in ("rows", "heads", "kv_heads", "head_dim", "rounds")}
    return {"benchmark": "attention of a decode step alone; ms are of one layer", **shape, "results": results}


def measure(args: argparse.Namespace, valid: int, room: int, dtype: str) -> list[dict[str, Any]]:
    """Every kernel in turn over the same layers."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import kernels
    from jaxinfer.cache import init_cache
    from jaxinfer.cache.slots import look
    from jaxinfer.config import LayerSpec, ModelConfig, NormSpec

    scalars = 2 * args.rows * args.kv_heads * valid
    bytes_read = scalars * (args.head_dim + 4 if dtype == "int8" else args.head_dim * jnp.dtype(dtype).itemsize)
    num = -(-DISTINCT // bytes_read)
    norm = NormSpec(eps=1e-5)
    spec = LayerSpec(
        num_heads=args.heads, num_kv_heads=args.kv_heads, head_width=args.head_dim, scale=args.head_dim**-0.5,
        rope=None, ffn_width=1, norm=norm,
    )  # fmt: skip
    config = ModelConfig(vocab_size=1, width=1, layers=(spec,) * num, norm=norm, dtype="float32")
    kind, plain = ("int8", None) if dtype == "int8" else ("dense", dtype)
    cache = init_cache(config, args.rows, room, kind, dtype=plain)
    cache = cache.replace(layers=jax.tree.map(filled, cache.layers), length=jnp.full(args.rows, valid - 1, jnp.int32))
    q = jax.random.normal(jax.random.key(0), (args.rows, 1, args.heads, args.head_dim))

    @functools.partial(jax.jit, static_argnames="kernel")
    def program(q: Any, layers: Any, length: Any, kernel: str) -> Any:
        held = cache.replace(layers=layers, length=length)
        step = held.step(jnp.ones(args.rows, jnp.int32), 1)
        with kernels.use(kernels.KernelChoice(attention=kernel)):
            for layer in layers:
                q = look(q, [layer.source(step.end, step.pages)], spec, step)
        return q

    runs = {name: functools.partial(program, q, cache.layers, cache.length, name) for name in args.kernel}
    return [
        {
            "valid": valid, "allocated": room, "dtype": dtype, "kernel": name,
            "ms": {key: round(value / num * 1e3, 4) for key, value in measured.spread(times).items()},
            "gb_per_second": round(bytes_read * num / statistics.median(times) / 1e9, 2),
        }
        for name, times in measured.seconds(runs, args.rounds).items()
    ]  # fmt: skip


def filled(x: Any) -> Any:
    """An array of numbers that no product is quick with."""
    import jax
    import jax.numpy as jnp

    if x.dtype == jnp.int8:
        return jax.random.randint(jax.random.key(1), x.shape, -127, 128, x.dtype)
    return (0.02 * (1 + jax.random.uniform(jax.random.key(2), x.shape))).astype(x.dtype)
