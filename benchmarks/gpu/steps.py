"""Where a decode step's time goes on a device: milliseconds a token of one row, and of each kernel, by JAX's profiler.

    python benchmarks/gpu/steps.py configs/models/llama-3-8b.toml --weights bfloat16 --out steps.json

The weights are random. Steps are timed in one dispatch after the prompt, without the profiler; the kernels in another.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

sys.path[:0] = [str(pathlib.Path(__file__).parents[2] / "scripts"), str(pathlib.Path(__file__).parents[2])]
PROFILED = 16  # steps


def main(args: argparse.Namespace) -> None:
    """Measures, prints a line a kernel."""
    import jax
    import loading
    import measured
    import numpy as np
    import settings

    import jaxinfer

    form = None if args.weights == "bfloat16" else args.weights
    model = loading.load(settings.Settings(random_weights=args.shape, dtype="bfloat16", quantize=form))
    config = model.config.replace(stop_ids=())
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(1, args.input_len), dtype=np.int32)
    buffer = jaxinfer.decoding.bucket(max(args.steps, PROFILED))

    def decode(num: int) -> float:
        """Seconds of so many steps after the prompt and its first token."""
        cache = jaxinfer.init_cache(config, 1, args.input_len + buffer)
        first = jaxinfer.generate(model.params, config, ids, cache=cache, max_new_tokens=1, buffer=buffer)
        state = jax.block_until_ready(first.state)
        began = time.perf_counter()
        jax.block_until_ready(
            jaxinfer.generate(model.params, config, state=state, max_new_tokens=num, buffer=buffer).ids
        )
        return time.perf_counter() - began

    decode(args.steps)  # for compilers
    times = [decode(args.steps) / args.steps * 1e3 for _ in range(args.rounds)]
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            decode(PROFILED)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        kernels = launched(jax.profiler.ProfileData.from_file(str(path)))
    told: dict[str, Any] = {
        "benchmark": "decode steps of one row in one dispatch; of kernels all launches, the prompt's too, a step",
        "device": jax.devices()[0].device_kind,
        "shape": pathlib.Path(args.shape).stem,
        "weights": args.weights,
        "input_len": args.input_len,
        "steps": args.steps,
        "ms_per_token": {name: round(value, 3) for name, value in measured.spread(times).items()},
        "tokens_per_second": round(1e3 / statistics.median(times), 1),
        "kernels": kernels,
        "hardware": measured.hardware(),
        "versions": measured.versions(),
        "command": measured.command("benchmarks/gpu/steps.py"),
        "date": measured.date(),
    }
    print(f"{told['weights']}: {told['ms_per_token']} ms a token")
    for kernel in kernels[:20]:
        print(f"{kernel['us']:10.1f} us a token in {kernel['launches']:6.1f} launches: {kernel['name']}")
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


def launched(profile: Any) -> list[dict[str, Any]]:
    """What ran on the device, or in this process where that is the device: the longest first."""
    took: dict[str, list[float]] = collections.defaultdict(list)
    planes = list(profile.planes)
    for plane in [p for p in planes if p.name.startswith("/device:")] or planes:
        for line in plane.lines:
            for event in line.events:
                took[event.name].append(event.duration_ns / 1e3)
    rows = [
        {"name": name, "us": round(sum(us) / PROFILED, 1), "launches": round(len(us) / PROFILED, 1)}
        for name, us in took.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])[:40]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="a file with the keys of a config.json")
    parser.add_argument("--weights", default="bfloat16", help="bfloat16, or codes as decode.py --quantize")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    main(parser.parse_args())
