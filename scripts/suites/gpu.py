"""One GPU, meant for ten minutes: what it copies, decoding of one row as a share of that, attention by our kernel.

Decoding reads every weight and what the cache holds once a token: that, a second, is told as a share of the fastest
copy of the same minute. Attention of one new token a row, alone, over slots and over pages that lie anywhere, by the
kernel and in its plain form, in turns. The weights are random, of any shape. With --peer transformers, its compiled
step over a static cache decodes as many tokens of the same shape in bfloat16, in turns with ours: both get ready first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import measured

from suites import attention, latency, peers
from suites.sides import PEERS
from suites.worker import Worker

SHAPE = pathlib.Path(__file__).parents[2] / "configs" / "models" / "llama-3-8b.toml"
KERNELS = {"ours": "auto", "plain": "reference"}
WHERE = {"slots": False, "pages": True}
COPIES = 3
TURNS = 8  # of layers in one dispatch, which is then next to nothing of their time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    add("--shape", type=pathlib.Path, default=SHAPE, help="of the random weights (default: llama-3-8b)")
    add("--weights", nargs="+", default=["bfloat16", "int8"], help="bfloat16, or codes as decode.py --quantize")
    add("--input-len", "-p", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    add("--output-len", "-n", type=int, default=128, help="new tokens (default: %(default)s)")
    add("--rows", type=int, default=8, help="of attention alone (default: %(default)s)")
    add("--valid", type=int, nargs="+", default=[512, 4096, 16384], help="tokens that a row has, of attention alone")
    add("--heads", type=int, default=32)
    add("--kv-heads", type=int, default=8)
    add("--head-dim", type=int, default=128)
    add("--dtype", nargs="*", default=["bfloat16", "int8"], choices=["float32", "bfloat16", "int8"], help="of caches")
    add("--rounds", type=int, default=7)
    add("--peer", type=peers.peer, metavar="transformers[=PYTHON]", help="and the interpreter that has it")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints a line a measurement."""
    if args.peer:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it shares the GPU
    import jax

    if jax.default_backend() != "gpu":
        raise ValueError(
            f"the default backend is {jax.default_backend()}, and this suite measures a GPU: "
            "install jaxinfer[cuda] where there is one, or take the suites latency and attention"
        )
    return measure(args)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What `run` gives, on any device."""
    import jax

    if args.heads % args.kv_heads:
        raise ValueError(f"--heads is {args.heads}: it must be a multiple of --kv-heads {args.kv_heads}")
    if args.output_len < 2:
        raise ValueError(f"--output-len is {args.output_len}: it must be at least 2, for a time between tokens")
    for dtype in args.dtype:
        attention.check_memory(args, [(valid, valid) for valid in args.valid for _ in WHERE], dtype)
    decoded = list(shown(map(functools.partial(decoding, args), args.weights), told_of_decoding))
    looked = [line for dtype in args.dtype for line in shown(looking(args, dtype), told_of_looking)]
    return {
        "benchmark": "one GPU: decoding of one row, and attention of a decode step alone (ms are of one layer)",
        "device": jax.devices()[0].device_kind,
        "shape": args.shape.stem,
        **{name: getattr(args, name) for name in ("input_len", "output_len", "rows", "heads", "kv_heads", "head_dim")},
        "rounds": args.rounds,
        "copy": max(line["plain_read"] for line in (*decoded, *looked)),
        "decode": decoded,
        "attention": looked,
    }


def shown(lines: Any, told: Callable[[dict[str, Any]], str]) -> Iterator[dict[str, Any]]:
    """The lines, each printed as it comes."""
    for line in lines:
        print(told(line), flush=True)
        yield line


# --- decoding ------------------------------------------------------------------------------------------------------


def decoding(args: argparse.Namespace, weights: str) -> dict[str, Any]:
    """Decoding of one row with weights in a form, beside copies of memory, and beside a peer that is asked for."""
    with contextlib.ExitStack() as running:
        peer = running.enter_context(rival(args)) if args.peer and weights == "bfloat16" else None
        model, batch, ids = ready(args, weights)
        reads = measured.reads(measured.READ)
        took: dict[Any, list[float]] = {name: [] for name in (*reads.ways, "ours", "peer")}
        for turn in range(args.rounds + 1):
            one = {"ours": [latency.once(batch, model, ids)["decode"]], "peer": [peer()] if peer else []}
            one |= measured.seconds(reads.ways, COPIES)
            for name in took if turn else ():  # the first is for compilers
                took[name] += one[name]
    steps, times = args.output_len - 1, took["ours"]
    work = latency.Work(model.config, model.form, latency.cache_kind(batch, model.config), args.input_len, steps + 1)
    moved = work.counts(1)["decode"][1]
    line = {
        "weights": weights,
        "ms_per_token": {key: round(value / steps * 1e3, 4) for key, value in measured.spread(times).items()},
        "tokens_per_second": round(steps / statistics.median(times), 2),
        "bytes_per_token": round(moved / steps),
        "gb_per_second": round(moved / statistics.median(times) / 1e9, 2),
    }
    if peer:
        ratios = [theirs / ours for ours, theirs in zip(times, took["peer"], strict=True)]
        line["peer"] = {
            "name": args.peer[0],
            "tokens_per_second": round(steps / statistics.median(took["peer"]), 2),
            "ratio": measured.spread(ratios),
        }
    return reads.beside([line], took)[0]


def ready(args: argparse.Namespace, weights: str) -> tuple[Any, argparse.Namespace, Any]:
    """Our model, what it is to do, and a prompt; compiled."""
    import loading
    import numpy as np
    import settings

    form = None if weights == "bfloat16" else weights
    chosen = settings.Settings(random_weights=str(args.shape), dtype="bfloat16", quantize=form)
    model = loading.load(chosen)
    model = dataclasses.replace(model, config=model.config.replace(stop_ids=()))
    batch = argparse.Namespace(input_len=args.input_len, output_len=args.output_len, batch_size=[1], cache="auto")
    latency.check(batch, model.config)
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=(1, args.input_len), dtype=np.int32)
    latency.once(batch, model, ids)
    return model, batch, ids


@contextlib.contextmanager
def rival(args: argparse.Namespace) -> Iterator[Callable[[], float]]:
    """A peer's process that gets ready meanwhile; called, it gives the seconds of as many steps, when it is."""
    import planning

    name, interpreter = args.peer
    with (
        tempfile.TemporaryDirectory(prefix="jaxinfer-gpu-") as made,
        Worker(interpreter, PEERS[name].script, timeout=600) as worker,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        raw = planning.read_raw(str(args.shape))
        (pathlib.Path(made) / "config.json").write_text(json.dumps(raw))

        def begin() -> None:
            worker.ask("load", model=made, dtype="bfloat16", threads=os.cpu_count() or 1)
            prompt = [[i % raw["vocab_size"] for i in range(args.input_len)]]
            worker.ask("prepare", work="decode", ids=prompt, new_tokens=args.output_len - 1)
            worker.ask("turn")

        begun = pool.submit(begin)

        def turn() -> float:
            begun.result()
            return worker.ask("turn")["seconds"]

        yield turn


def told_of_decoding(line: dict[str, Any]) -> str:
    """For the screen."""
    return (
        f"decode, 1 row, {line['weights']:9} {line['ms_per_token']['median']:8.3f} ms a token, "
        f"{line['tokens_per_second']:.1f} tokens/s, {line['gb_per_second']:.0f} GB/s, "
        f"{line['share_beside']:.2f} of a copy ({line['plain_read']:.0f} GB/s)"
        + (f"; {line['peer']['name']} {line['peer']['tokens_per_second']:.1f} tokens/s" if "peer" in line else "")
    )


# --- attention -----------------------------------------------------------------------------------------------------


def looking(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """Attention to caches of a dtype: every length, over slots and pages, by the kernel and plainly, in turns."""
    runs: dict[Any, Callable[[], object]] = {}
    for valid in args.valid:
        for where, paged in WHERE.items():
            attend = attention.attention(args, valid, valid, dtype, paged, "bfloat16", TURNS)
            runs |= {(valid, where, kernel): functools.partial(attend, name) for kernel, name in KERNELS.items()}
    reads = measured.reads(measured.READ)
    took = measured.seconds(runs | reads.ways, args.rounds)
    lines = []
    for valid, where, kernel in runs:
        num, times = attention.num_layers(args, valid, dtype) * TURNS, took[valid, where, kernel]
        lines.append({
            "valid": valid, "where": where, "dtype": dtype, "kernel": kernel,
            "ms": {key: round(value / num * 1e3, 4) for key, value in measured.spread(times).items()},
            "gb_per_second": round(attention.bytes_read(args, valid, dtype) * num / statistics.median(times) / 1e9, 2),
            "over_plain": None if kernel == "plain" else measured.ratio(times, took[valid, where, "plain"]),
        })  # fmt: skip
    return reads.beside(lines, took)


def told_of_looking(line: dict[str, Any]) -> str:
    """For the screen."""
    over = line["over_plain"]
    beside = f", {over['ratio']:.2f} of the plain form's time" if over else ""
    return (
        f"attention, {line['valid']:6} valid, {line['where']} {line['dtype']:9} {line['kernel']:5} "
        f"{line['ms']['median']:8.4f} ms, {line['gb_per_second']:.0f} GB/s, "
        f"{line['share_beside']:.2f} of a copy{beside}"
    )
