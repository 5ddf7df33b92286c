"""Measures loading onto a mesh of emulated CPU devices: what is read, and what the host holds beside the arrays.

    python benchmarks/loading/tensor8.py --shape configs/models/llama-1.1b-bench.toml
    python benchmarks/loading/tensor8.py --shape configs/models/qwen3-0.6b.toml --mesh data=2,tensor=4 --json

Writes a checkpoint of random bfloat16 weights, several safetensors files and their index, into a temporary folder, and
loads it in a process of its own for each dtype. Read are the bytes by the reader's own count and by the kernel's
(rchar of /proc/self/io, of which what the watching itself reads is taken off), and RssAnon every half millisecond.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))
import measured

SMALL = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=pathlib.Path, help="config.json keys as .toml; the weights are random")
    add("--mesh", default="tensor=8", help="of 8 emulated devices; empty: none")
    add("--dtype", nargs="+", default=["bfloat16", "float32"], help="what the weights are loaded as")
    add("--files", type=int, default=4, help="files of the checkpoint")
    add("--out", type=pathlib.Path, help="write the result here too")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    add("--measure", nargs=2, metavar=("DIRECTORY", "WARM_UP"), help=argparse.SUPPRESS)  # in the process of its own
    args = parser.parse_args(argv)
    if not args.shape and not args.measure:
        parser.error("--shape is missing: give the .toml of a model")
    return args


def main(args: argparse.Namespace) -> None:
    """Makes the checkpoint, measures it, prints and writes what was found."""
    with tempfile.TemporaryDirectory() as folder:
        big, small = pathlib.Path(folder, "big"), pathlib.Path(folder, "small")
        write_checkpoint(small, SMALL, 1)
        tensor_bytes = write_checkpoint(big, tomllib.loads(args.shape.read_text()), args.files)
        result: dict[str, Any] = {
            "benchmark": "loading a checkpoint of random weights onto a mesh of 8 emulated CPU devices",
            "shape": args.shape.stem,
            "mesh": args.mesh,
            "stored": {
                "dtype": "bfloat16",
                "files": args.files,
                "tensor_bytes": tensor_bytes,
                "file_bytes": sum(path.stat().st_size for path in big.glob("*.safetensors")),
            },
            "results": [in_own_process(big, small, args.mesh, dtype) for dtype in args.dtype],
            "note": "bytes; seconds are with the files in the page cache, and of whatever else the machine was doing",
            "hardware": measured.hardware(),
            "versions": measured.versions("numpy"),
            "command": measured.command("benchmarks/loading/tensor8.py"),
            "date": measured.date(),
        }
    for row in result["results"]:
        arrays, device, read, kernel = (
            f"{row[name] / 1e9:.3f} GB"
            for name in ("array_bytes", "largest_device_bytes", "bytes_read", "kernel_bytes_read")
        )
        print(
            f"{row['dtype']}: arrays {arrays}, {device} on a device; read {read} (kernel: {kernel}) of "
            f"{tensor_bytes / 1e9:.3f} GB in {row['seconds']} s; peak RssAnon {row['peak_above_arrays'] / 1e6:.1f} MB "
            f"above the arrays ({row['peak_above_arrays'] / row['array_bytes']:.1%})"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))


def write_checkpoint(directory: pathlib.Path, raw: dict[str, Any], files: int) -> int:
    """config.json, `files` safetensors files of random weights and their index; the bytes of all tensors."""
    import ml_dtypes
    import numpy as np

    from jaxinfer import models
    from jaxinfer.models.names import tensors
    from jaxinfer.weights import write_safetensors

    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw))
    family = models.family(raw)
    wanted = tensors(family.config(raw), family.NAMES)
    draw = np.random.default_rng(0)
    index: dict[str, str] = {}
    total = 0
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        arrays = {}
        for tensor in wanted[number * len(wanted) // files : (number + 1) * len(wanted) // files]:
            prefix = "" if tensor.name in family.NAMES.bare else family.NAMES.prefixes[0]
            noise = draw.standard_normal(tensor.shape, dtype=np.float32)
            arrays[prefix + tensor.name] = noise.astype(ml_dtypes.bfloat16)
        write_safetensors(directory / file, arrays)
        index |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def in_own_process(big: pathlib.Path, small: pathlib.Path, mesh: str, dtype: str) -> dict[str, Any]:
    """What `measure` finds in a fresh interpreter."""
    command = [sys.executable, __file__, "--measure", str(big), str(small), "--mesh", mesh, "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: str, warm_up: str, axes: str, dtype: str) -> dict[str, Any]:
    """Loads once to have all libraries in place, then once more under watch."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    from jaxinfer.mesh import make_mesh, parse_axes
    from jaxinfer.weights.huggingface import read_model

    mesh = make_mesh(parse_axes(axes)) if axes else None
    read_model(pathlib.Path(warm_up), dtype, mesh)
    done, watched = threading.Event(), Watch()

    def watch() -> None:
        while not done.is_set():
            watched.look()
            time.sleep(0.0005)

    before = watched.look()
    rchar = kernel_bytes() - watched.read
    thread = threading.Thread(target=watch)
    thread.start()
    begin = time.perf_counter()
    params, config, bytes_read = read_model(pathlib.Path(directory), dtype, mesh)
    seconds = time.perf_counter() - begin
    done.set()
    thread.join()
    rchar = kernel_bytes() - watched.read - rchar
    after = watched.look()
    leaves = jax.tree.leaves(params)
    on_device: dict[Any, int] = {}
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            on_device[shard.device] = on_device.get(shard.device, 0) + shard.data.nbytes
    arrays = sum(leaf.nbytes for leaf in leaves)
    return {
        "dtype": config.dtype,
        "array_bytes": arrays,
        "largest_device_bytes": max(on_device.values()),
        "bytes_read": bytes_read,
        "kernel_bytes_read": rchar,  # headers, the index and config.json too
        "peak_above_arrays": watched.peak - before - arrays,
        "after_above_arrays": after - before - arrays,
        "largest_array_bytes": max(leaf.nbytes for leaf in leaves),
        "seconds": round(seconds, 2),
    }


class Watch:
    """The anonymous memory of this process, its peak, and how many bytes were read to know them."""

    def __init__(self):
        self.peak = self.read = 0

    def look(self) -> int:
        """RssAnon now, in bytes."""
        text = pathlib.Path("/proc/self/status").read_text()
        self.read += len(text.encode())
        now = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))
        self.peak = max(self.peak, now)
        return now


def kernel_bytes() -> int:
    """What this process has read so far, as the kernel counts it."""
    return int(pathlib.Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    options = parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.mesh, options.dtype[0])))
    else:
        main(options)
