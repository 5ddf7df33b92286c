"""A batch of prompts, ids to ids: time to the first token, time a token, tokens/s, and how far that is from the limit.

What is timed is a dispatch that is waited for: `prefill` alone; `generate` of one token, which is the time to the first
one; and `generate` of all others, going on with its state. So a token's time is that dispatch's over its tokens: the
loop hands out none on the way. Ids are random, draws greedy, and no id ends a row. Batch sizes are measured in turns,
after warm-ups that compile everything.

FLOPs and bytes are counted by `jaxinfer.roofline`. What a phase is bound by is whichever takes longer on this machine:
its FLOPs at the measured rate of products, or its bytes at the measured rate of reads. With --out also a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import ceilings
import measured
from screen import size

PERCENTILES = (10, 25, 50, 75, 90, 99)
PHASES = ("prefill", "decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags, named as `vllm bench latency` and `llama-bench` name them."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="'builtin' (the default), a directory, or a hub id")
    which.add_argument("--shape", type=pathlib.Path, help="instead: random weights of a shape (.toml, .json)")
    add("--input-len", "-p", type=int, default=32, help="tokens of each prompt (default: %(default)s)")
    add("--output-len", "-n", type=int, default=128, help="new tokens of each row (default: %(default)s)")
    add("--batch-size", type=int, nargs="+", default=[1, 8, 32], help="rows (default: 1 8 32)")
    add("--num-iters-warmup", type=int, default=2, help="not counted (default: %(default)s)")
    add("--num-iters", "-r", type=int, default=10, help="counted (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: as stored")
    add("--quantize", metavar="FORM", help="weights in codes, as decode.py --quantize")
    add("--cache", default="auto", metavar="KIND", help="as decode.py --cache")
    add("--seed", type=int, default=0, help="of the ids")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints some lines a batch size."""
    import loading
    import settings

    from jaxinfer.quantization import parse_form

    chosen = settings.Settings(
        model=args.model, random_weights=args.shape and str(args.shape), dtype=args.dtype, quantize=args.quantize,
        cache=args.cache,
    )  # fmt: skip
    settings.check_cache(chosen)
    if args.quantize:
        parse_form(args.quantize)  # what it is not is refused before weights are read
    if args.output_len < 2:
        raise ValueError(f"--output-len is {args.output_len}: it must be at least 2, for a time between tokens")
    model = loading.load(chosen)
    model = dataclasses.replace(model, config=model.config.replace(stop_ids=()))
    check(args, model.config)
    math = ceilings.math_of(model.form, model.config.dtype)
    limits = ceilings.measure(tuple(dict.fromkeys((*ceilings.PRODUCTS, math))))
    took, compiled = iterate(args, model)
    work = Work(model.config, model.form, cache_kind(args, model.config), args.input_len, args.output_len)
    results = [figures(rows, work, times, limits, math) for rows, times in took.items()]
    results = [line | {phase: judged(line[phase], limits, math) for phase in PHASES} for line in results]
    for line in results:
        show(line, math)
    limits.show_raised()
    found = {
        "benchmark": "prompts to tokens, greedy: seconds of each phase, and their share of this machine's limits",
        "model": measured.without_directories(model.name), "dtype": model.config.dtype, "weights": model.form,
        "cache": args.cache, "products": math,
        "input_len": args.input_len, "output_len": args.output_len, "num_iters": args.num_iters,
        "num_iters_warmup": args.num_iters_warmup, "seed": args.seed, "compiled_while_timed": compiled,
        "peak_memory_of": "an iteration" if measured.forget_peak() else "the whole run",
        "ceilings": limits.told(), "results": results,
    }  # fmt: skip
    if args.out:
        measured.draw(args.out.with_suffix(".png"), plot, found)
    return found


def check(args: argparse.Namespace, config: Any) -> None:
    """Refuses rows that are too long for the model, or too many for the memory."""
    from jaxinfer import cache, kernels

    whole, rows = args.input_len + args.output_len, max(args.batch_size)
    if config.max_length and whole - 1 > config.max_length:
        raise ValueError(
            f"--input-len {args.input_len} and --output-len {args.output_len} make rows of {whole} tokens but the "
            f"model was made for {config.max_length}: shorten one of them"
        )
    need, free = cache.cache_bytes(config, rows, room(args, config), args.cache), kernels.free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"--batch-size {rows} needs a cache of {size(need)} but {size(free)} are free: take fewer rows or tokens"
        )


def room(args: argparse.Namespace, config: Any) -> int:
    """Positions of the cache."""
    import jaxinfer

    rung = jaxinfer.decoding.bucket(args.input_len + args.output_len, least=64)
    return min(rung, config.num_positions or rung)


# --- measuring -----------------------------------------------------------------------------------------------------


def iterate(args: argparse.Namespace, model: Any) -> tuple[dict[int, list[dict[str, Any]]], int]:
    """What each iteration took, by batch size, all of these in turn; and how many programs were compiled meanwhile."""
    import numpy as np
    import runtime

    draw = np.random.default_rng(args.seed)
    shape = (max(args.batch_size), args.input_len)
    ids = draw.integers(model.config.vocab_size, size=shape, dtype=np.int32)
    took: dict[int, list[dict[str, Any]]] = {rows: [] for rows in sorted(set(args.batch_size))}
    compiled = runtime.count_programs()
    before = 0
    for turn in range(args.num_iters_warmup + args.num_iters):
        if turn == args.num_iters_warmup:
            before = compiled()
        for rows, times in took.items():
            times.append(once(args, model, ids[:rows]))
    return {rows: times[args.num_iters_warmup :] for rows, times in took.items()}, compiled() - before


def once(args: argparse.Namespace, model: Any, ids: Any) -> dict[str, Any]:
    """Seconds of one iteration, and the most memory that the process held meanwhile."""
    import jax

    import jaxinfer

    params, config = model.params, model.config
    rows, num, buffer = len(ids), args.output_len - 1, jaxinfer.decoding.bucket(args.output_len)

    def cache() -> Any:
        return jax.block_until_ready(jaxinfer.init_cache(config, rows, room(args, config), args.cache))

    def generate(num: int, **more: Any) -> Any:
        return jaxinfer.generate(params, config, max_new_tokens=num, buffer=buffer, **more)

    measured.forget_peak()
    fresh, on_device = cache(), jax.device_put(ids)
    prefill, _ = timed(lambda: jaxinfer.prefill(params, config, on_device, fresh))
    fresh = cache()
    first_token, result = timed(lambda: generate(1, ids=ids, cache=fresh))
    state = result.state
    decode, result = timed(lambda: generate(num, state=state))
    if int(result.num.min()) != num:
        raise RuntimeError(f"{num} tokens were to be timed but a row made {int(result.num.min())}")
    return {"prefill": prefill, "first_token": first_token, "decode": decode, "peak_memory": measured.peak_memory()}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until its result is there, and the result."""
    import jax

    began = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - began, result


# --- what came of it -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What a batch has to do, by `roofline`."""

    config: Any
    form: str | None
    cache: Any  # a roofline.CacheKind
    input_len: int
    output_len: int

    def counts(self, rows: int) -> dict[str, tuple[int, int]]:
        """(FLOPs, bytes) of the prefill, and of the steps after the first token: each reads all that came before."""
        from jaxinfer import roofline

        packed = roofline.weights_of(self.form)
        num = self.output_len - 1
        prompt, lengths = [0] * rows, [self.input_len + i for i in range(num)]
        return {
            "prefill": (
                roofline.forward_flops(self.config, self.input_len, prompt, 1, self.cache),
                roofline.forward_bytes(self.config, self.input_len, prompt, packed, self.cache),
            ),
            "decode": (
                sum(roofline.forward_flops(self.config, 1, [n] * rows, 1, self.cache) for n in lengths),
                sum(roofline.forward_bytes(self.config, 1, [n] * rows, packed, self.cache) for n in lengths),
            ),
        }


def cache_kind(args: argparse.Namespace, config: Any) -> Any:
    """The kind of cache for `roofline`, with the dtype that its plain numbers have on this machine."""
    from jaxinfer import kernels, roofline

    plain = kernels.cache_dtype(config.dtype).name
    return dataclasses.replace(roofline.kind_of(args.cache), dtype=plain)


def figures(rows: int, work: Work, times: list[dict[str, Any]], limits: ceilings.Ceilings, math: str) -> dict[str, Any]:
    """All that is told of a batch size; raises the ceilings that it was above."""
    num = work.output_len - 1
    took = {name: [each[name] for each in times] for name in times[0]}
    whole = [first + rest for first, rest in zip(took["first_token"], took["decode"], strict=True)]
    medians = {phase: statistics.median(took[phase]) for phase in PHASES}
    line: dict[str, Any] = {
        "batch_size": rows,
        "seconds": {
            "prefill": percentiles(took["prefill"]),
            "first_token": percentiles(took["first_token"]),
            "token": percentiles([rest / num for rest in took["decode"]]),
            "latency": percentiles(whole),
        },
        "tokens_per_second": {
            "prefill": rows * work.input_len / medians["prefill"],
            "decode": rows * num / medians["decode"],
            "output": rows * work.output_len / statistics.median(whole),
        },
        "peak_memory": None if None in took["peak_memory"] else max(took["peak_memory"]),
    }
    for phase, (flops, moved) in work.counts(rows).items():
        seconds = medians[phase]
        line[phase] = {
            "seconds": seconds, "flops": flops, "bytes": moved, "intensity": flops / moved,
            "gflops_per_second": flops / seconds / 1e9, "gb_per_second": moved / seconds / 1e9,
        }  # fmt: skip
        by = f"{phase} of {rows} rows"
        limits.reached("read", line[phase]["gb_per_second"], by)
        limits.reached(math, line[phase]["gflops_per_second"], by)
    return line


def percentiles(values: list[float]) -> dict[str, float]:
    """Their average, and what such a part of them (in percent) is not above."""
    import numpy as np

    at = np.percentile(values, PERCENTILES)
    return {"avg": statistics.fmean(values)} | {str(p): float(x) for p, x in zip(PERCENTILES, at, strict=True)}


def judged(phase: dict[str, Any], limits: ceilings.Ceilings, math: str) -> dict[str, Any]:
    """A phase with its shares of the ceilings, and of the limit that both make together."""
    from jaxinfer import roofline

    chip = limits.chip(math)
    limit = roofline.limit_seconds(phase["bytes"], phase["flops"], chip)
    return phase | {
        "share_of_products": limits.share(math, phase["gflops_per_second"]),
        "share_of_read": limits.share("read", phase["gb_per_second"]),
        "bound": "memory" if phase["intensity"] < chip.ridge else "compute",
        "share": limit / phase["seconds"],
    }


def show(line: dict[str, Any], math: str) -> None:
    """Prints it."""
    seconds, rate = line["seconds"], line["tokens_per_second"]
    peak = f"; peak memory {size(line['peak_memory'])}" if line["peak_memory"] else ""
    print(
        f"{counted(line['batch_size'])}: first token {seconds['first_token']['50'] * 1e3:.1f} ms, then "
        f"{seconds['token']['50'] * 1e3:.2f} ms a token, {seconds['latency']['50']:.3f} s in all, "
        f"{rate['output']:.1f} tokens/s{peak}"
    )
    for name in PHASES:
        phase = line[name]
        print(
            f"  {name:8} {rate[name]:9.1f} tokens/s, {phase['gflops_per_second']:8.1f} GFLOP/s "
            f"({phase['share_of_products']:.2f} of products in {math}), {phase['gb_per_second']:6.1f} GB/s "
            f"({phase['share_of_read']:.2f} of the read); bound by {phase['bound']}: {phase['share']:.2f} of the limit"
        )
    print("  " + " " * 20 + "".join(f"{head:>10}" for head in ("avg", *(f"p{p}" for p in PERCENTILES))))
    names = (("prefill", "ms"), ("first_token", "ms"), ("token", "ms"), ("latency", "s"))
    for name, unit in names:
        values = seconds[name].values()
        print(f"  {name.replace('_', ' ')}, {unit}".ljust(22) + "".join(
            f"{value * (1e3 if unit == 'ms' else 1):10.3f}" for value in values
        ), flush=True)  # fmt: skip


def counted(rows: int) -> str:
    """So many rows."""
    return f"{rows} row{'s' * (rows > 1)}"


# --- the plot ------------------------------------------------------------------------------------------------------


def plot(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Tokens/s over batch size, percentiles of the latencies, and the roofline with our points on it."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 8), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    rates, roofline = above.subplots(1, 2)
    plot_rates(rates, found)
    plot_roofline(roofline, found)
    latencies = (("first_token", "ms"), ("token", "ms"), ("latency", "s"))
    lower = below.subplots(1, 3)
    for axes, (name, unit) in zip(lower, latencies, strict=True):
        plot_percentiles(axes, found, name, unit)
    below.legend(*lower[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(
        f"{found['model']} in {found['weights'] or found['dtype']}: {found['input_len']} tokens in, "
        f"{found['output_len']} out"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_rates(axes: Any, found: dict[str, Any]) -> None:
    """Tokens/s over batch size."""
    rows = [line["batch_size"] for line in found["results"]]
    for name, label in (("decode", "after the first token"), ("output", "prompt included")):
        rates = [line["tokens_per_second"][name] for line in found["results"]]
        axes.plot(rows, rates, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(n) for n in rows])
    axes.set(xlabel="rows", ylabel="new tokens a second", ylim=(0, None), title="Tokens/s over batch size")
    axes.legend()


def plot_percentiles(axes: Any, found: dict[str, Any], name: str, unit: str) -> None:
    """What such a part of the iterations is not above."""
    for line in found["results"]:
        values = [line["seconds"][name][str(p)] * (1e3 if unit == "ms" else 1) for p in PERCENTILES]
        axes.plot(range(len(PERCENTILES)), values, marker="o", label=counted(line["batch_size"]))
    axes.set_xticks(range(len(PERCENTILES)), [str(p) for p in PERCENTILES])
    what = {"first_token": "Time to the first token", "token": "Time a token", "latency": "Whole latency"}[name]
    axes.set(xlabel="percentile", ylabel=unit, ylim=(0, None), title=what)


def plot_roofline(axes: Any, found: dict[str, Any]) -> None:
    """FLOP/s over FLOPs a byte: what memory and products allow here, and what was reached."""
    import numpy as np

    read = found["ceilings"]["read"]["rate"]
    roofs = {math: ceiling["rate"] for math, ceiling in found["ceilings"]["products"].items()}
    points = [(line["batch_size"], name, line[name]) for line in found["results"] for name in PHASES]
    ends = [point["intensity"] for *_, point in points] + [rate / read for rate in roofs.values()]
    x = np.geomspace(min(ends) / 3, max(ends) * 3, 200)
    for math, rate in roofs.items():
        own = math == found["products"]
        axes.plot(
            x, np.minimum(rate, read * x), color="black" if own else "silver", linewidth=1.5 if own else 1,
            zorder=1 + own, label=f"{math}: {rate:.0f} GFLOP/s",
        )  # fmt: skip
    for index, (rows, name, point) in enumerate(points):
        axes.plot(
            point["intensity"], point["gflops_per_second"], marker="os"[PHASES.index(name)], linestyle="",
            color=f"C{index // len(PHASES)}", zorder=3, label=f"{name}, {counted(rows)}",
        )  # fmt: skip
    low = min(read * x[0], *(point["gflops_per_second"] for *_, point in points))
    axes.set(xscale="log", yscale="log", ylim=(low / 2, max(roofs.values()) * 2), title="Roofline of this machine")
    axes.set(xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.legend(title=f"read: {read:.1f} GB/s", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
