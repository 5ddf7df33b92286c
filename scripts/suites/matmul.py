"""Products of rows with a weight, alone: GB/s of the weight and GFLOP/s, as shares of what this machine can do.

Weights enough to fill 512 MB follow one another in one program, twice, so that no cache of the processor holds them and
what a dispatch takes to begin is next to nothing: after a plain read of memory it begins slowly. Rows that come in
bfloat16 meet weights in bfloat16, and float32 rows all others. Kernel and XLA's form are measured in turns, and plain
reads with them: other work on a machine slows all of them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import ceilings
import measured

DISTINCT = 512 << 20  # bytes, past what a processor keeps
TURNS = 2  # of which a dispatch takes so many


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
    maths = {form: ceilings.math_of(form, ceilings.rows_of(form)) for form in args.form}
    limits = ceilings.measure()
    reads = measured.reads(measured.READ)
    results = []
    for form in args.form:
        for rows in args.rows:
            for line in measure(rows, int(inner), int(outer), form, args, reads):
                by = f"{rows} rows of {form} ({line['kernel']})"
                limits.reached("read", line["gb_per_second"], by)
                limits.reached(maths[form], line["gflops_per_second"], by)
                results.append(line | shares(line, limits, maths[form]))
                show(results[-1])
    limits.show_raised()
    return {
        "benchmark": "products alone; ms are of one",
        "shape": args.shape,
        "rounds": args.rounds,
        "ceilings": limits.told(),
        "results": [line | shares(line, limits, maths[line["form"]]) for line in results],
    }


def shares(line: dict[str, Any], limits: ceilings.Ceilings, math: str) -> dict[str, Any]:
    """Of what memory and products reach here."""
    return {
        "share": round(limits.share("read", line["gb_per_second"]), 3),
        "share_of_products": round(limits.share(math, line["gflops_per_second"]), 3),
    }


def show(line: dict[str, Any]) -> None:
    """Prints it."""
    print(
        f"{line['rows']:4} rows {line['form']:14} {line['kernel']:9} {line['ms']['median']:8.3f} ms, "
        f"{line['gb_per_second']:5.1f} GB/s, {line['share']:.2f} of the ceiling, {line['share_beside']:.2f} of a read "
        f"beside it, {line['gflops_per_second']:7.1f} GFLOP/s, {line['share_of_products']:.2f}",
        flush=True,
    )


def measure(
    rows: int, inner: int, outer: int, form: str, args: argparse.Namespace, reads: measured.Reads
) -> list[dict[str, Any]]:
    """Every kernel in turn over the same weights, and the reads."""
    import jax
    import jax.numpy as jnp

    weight = functools.partial(ceilings.weight, outer=outer, inner=inner, form=form)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(weight, jax.random.key(0))))
    distinct = -(-DISTINCT // size)
    weights = [weight(jax.random.key(i)) for i in range(distinct)]
    num = TURNS * distinct
    x = jax.random.normal(jax.random.key(0), (rows, inner), ceilings.rows_of(form))

    @functools.partial(jax.jit, static_argnames="kernel")
    def program(x: Any, weights: Any, kernel: str) -> Any:
        def once(_: Any, found: Any) -> Any:
            x, total = jax.lax.optimization_barrier(found)  # or a product would be made once for all turns
            for w in weights:
                total += ceilings.multiply(x, w, kernel)
            return x, total

        return jax.lax.fori_loop(0, TURNS, once, (x, jnp.zeros((rows, outer), jnp.float32)))[1]

    runs = {name: functools.partial(program, x, weights, name) for name in args.kernel}
    took = measured.seconds(runs | reads.ways, args.rounds)
    lines = [
        {
            "rows": rows, "form": form, "kernel": name,
            "ms": {key: round(value / num * 1e3, 4) for key, value in measured.spread(took[name]).items()},
            "gb_per_second": round(size * num / statistics.median(took[name]) / 1e9, 2),
            "gflops_per_second": round(2 * rows * inner * outer * num / statistics.median(took[name]) / 1e9, 1),
        }
        for name in runs
    ]  # fmt: skip
    return reads.beside(lines, took)
