"""Products of rows with a weight, alone: GB/s of the weight as a share of a plain read, and GFLOP/s.

Weights enough to fill 256 MB follow one another in one program, so that no cache of the processor holds them; rows that
come in bfloat16 meet weights in bfloat16, and float32 rows all others.
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
    add("--rows", type=int, nargs="+", default=[1, 8, 32, 512])
    add("--shape", default="2048x8192", help="of the weight: inputs x outputs (default: %(default)s)")
    add("--form", nargs="+", default=["float32", "bfloat16", "int8", "int4:group=32"], help="dtypes, or forms of codes")
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
    inner, _, outer = args.shape.partition("x")
    if not (inner.isdecimal() and outer.isdecimal() and int(inner) and int(outer)):
        raise ValueError(f"--shape is {args.shape}: write inputs x outputs, such as 2048x8192")
    results = []
    for form in args.form:
        for rows in args.rows:
            ceiling = measured.plain_read()
            for line in measure(rows, int(inner), int(outer), form, args):
                line |= {"plain_read": round(ceiling, 1), "share": round(line["gb_per_second"] / ceiling, 3)}
                results.append(line)
                print(
                    f"{rows:4} rows {form:14} {line['kernel']:9} {line['ms']['median']:8.3f} ms, "
                    f"{line['gb_per_second']:5.1f} GB/s, {line['share']:.2f} of a plain read, "
                    f"{line['gflops_per_second']:7.1f} GFLOP/s",
                    flush=True,
                )
    return {
        "benchmark": "products alone; ms are of one",
        "shape": args.shape,
        "rounds": args.rounds,
        "results": results,
    }


def measure(rows: int, inner: int, outer: int, form: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every kernel in turn over the same weights."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import kernels, ops
    from jaxinfer.models import quantize_one
    from jaxinfer.quantization import parse_form

    plain = form in ("float32", "bfloat16")
    dtype = form if plain else "float32"

    def weight(key: Any) -> Any:
        w = jax.random.normal(key, (outer, inner), dtype)
        return w if plain else quantize_one("up", w, parse_form(form), tied=False)

    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(weight, jax.random.key(0))))
    num = -(-DISTINCT // size)
    weights = [weight(jax.random.key(i)) for i in range(num)]
    x = jax.random.normal(jax.random.key(0), (rows, inner), dtype)

    @functools.partial(jax.jit, static_argnames="kernel")
    def program(x: Any, weights: Any, kernel: str) -> Any:
        total = jnp.zeros((rows, outer), jnp.float32)
        with kernels.use(kernels.KernelChoice(linear=kernel)):
            for w in weights:
                total += ops.linear(x, w, "BD,FD->BF", dtype=jnp.float32)
        return total

    runs = {name: functools.partial(program, x, weights, name) for name in args.kernel}
    return [
        {
            "rows": rows, "form": form, "kernel": name,
            "ms": {key: round(value / num * 1e3, 4) for key, value in measured.spread(times).items()},
            "gb_per_second": round(size * num / statistics.median(times) / 1e9, 2),
            "gflops_per_second": round(2 * rows * inner * outer * num / statistics.median(times) / 1e9, 1),
        }
        for name, times in measured.seconds(runs, args.rounds).items()
    ]  # fmt: skip
