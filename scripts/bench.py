"""Measures this machine: single programs beside its ceilings, and whole decoding beside what people would use instead.

    python scripts/bench.py attention --valid 512 4096 --allocated 8192 --dtype float32 int8
    python scripts/bench.py matmul --rows 1 8 512 --form bfloat16 int8 int4:group=32
    python scripts/bench.py latency --model builtin --input-len 32 --output-len 128 --batch-size 1 8 32
    python scripts/bench.py startup --model builtin
    python scripts/bench.py gpu --shape configs/models/llama-3-8b.toml --out gpu.json
    python scripts/bench.py peers --shape configs/models/llama-1.1b-bench.toml --peer llama.cpp=ENV/bin/python
    python scripts/bench.py techniques --widen --dtype bfloat16 --out techniques.json

What is compared is measured in turns within one run: timings of a shared machine mean little alone.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

import allocation
import measured
from flags import one_line
from suites import attention, gpu, latency, matmul, peers, startup, techniques

SUITES = {
    "attention": attention, "gpu": gpu, "latency": latency, "matmul": matmul, "peers": peers, "startup": startup,
    "techniques": techniques,
}  # fmt: skip
ALONE = ("attention", "matmul")  # they measure single programs
COUNTS = (
    "prompt_length", "new_tokens", "rounds", "timeout", "rows", "prefill_rows", "valid", "allocated", "heads",
    "kv_heads", "head_dim", "input_len", "output_len", "batch_size", "num_iters", "num_iters_warmup",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, suite in SUITES.items():
        what = (suite.__doc__ or "").split("\n\n")[0]
        own = parsers.add_parser(
            name, help=what, description=suite.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        suite.add_arguments(own)
        own.add_argument("--out", type=pathlib.Path, help="write the result here too")
        own.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    args = parser.parse_args(argv)
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if name in COUNTS and value is not None and value < 1:
                parser.error(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    return args


def main(args: argparse.Namespace) -> None:
    """Runs a suite and writes what it found."""
    result: dict[str, Any] = {"suite": args.suite} | SUITES[args.suite].run(args)
    result = {"versions": measured.versions()} | result
    result |= {
        "hardware": measured.hardware(),
        "command": measured.command("scripts/bench.py"),
        "date": measured.date(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    arguments = parse_args()
    # Those that it starts have its environment.
    allocation.begin_anew(allocation.ALONE if arguments.suite in ALONE else allocation.HUGE)
    try:
        main(arguments)
    except (ValueError, OSError, ImportError) as refusal:
        sys.exit(f"bench.py: {one_line(refusal)}")
    except KeyboardInterrupt:
        sys.exit("bench.py: stopped")
