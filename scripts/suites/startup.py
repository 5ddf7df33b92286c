"""From nothing to the first token: imports, loading, compiling with and without what earlier runs left, side by side.

Each measurement is a process of its own: `scripts/decode.py` makes one token of a prompt of random ids, and says how
long its parts took; all cases in turn, round after round. Runs before them, which are not counted, built the kernels,
kept the programs and left the model's files in the system's memory. Loading and compiling go on side by side: compiling
has the seconds that it took longer.

    cold            an empty cache directory: kernels are built, programs compiled
    cold, kernels   kernels lie ready, as after an installation; programs are compiled
    warm            both lie ready; programs are traced, and found
    aot             programs lie ready as decode.py --aot keeps them; no model is traced

A --shape is first saved as a checkpoint of random weights, in a temporary directory. This process starts no device, so
the others find all of its memory free; no ceilings are measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import measured
from screen import size

SCRIPTS = pathlib.Path(__file__).parents[1]
IMPORTS = {
    "python": "pass",
    "import jax": "import jax",
    "import jaxinfer": "import jaxinfer",
    "every name of jaxinfer": "from jaxinfer import *",
}
CASES = ("cold", "cold, kernels", "warm", "aot")
PARTS = ("import", "load", "compile", "prefill", "decode")
SAVE = "import sys; from suites import startup; startup.save(*sys.argv[1:])"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="builtin", help="'builtin' (the default), a directory, or a hub id")
    which.add_argument("--shape", type=pathlib.Path, help="instead: random weights of a shape (.toml, .json)")
    add("--input-len", "-p", type=int, default=32, help="tokens of the prompt (default: %(default)s)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: as stored")
    add("--quantize", metavar="FORM", help="weights in codes, as decode.py --quantize")
    add("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it, prints a line an import and a case."""
    from jaxinfer import hub
    from jaxinfer.kernels import build

    with tempfile.TemporaryDirectory(prefix="jaxinfer-startup-") as scratch:
        folder = pathlib.Path(scratch)
        model = saved(args, folder / "model") if args.shape else hub.locate(args.model)
        words = ["--model", str(model), "--prompt-length", str(args.input_len), "--max-new-tokens", "1", "--json"]
        words += ["--dtype", args.dtype, *(["--quantize", args.quantize] if args.quantize else [])]
        imports, starts = rounds(args.rounds, words, folder)
    if build.find_compiler() is None:
        print("no C++ compiler is here, so no kernels are built: 'cold' and 'cold, kernels' are the same")
    results = [{"case": case, **summary(told)} for case, told in starts.items()]
    loaded = {name: measured.spread(times) for name, times in imports.items()}
    show(loaded, results)
    first = starts["warm"][0]
    return {
        "benchmark": "start-up: seconds of imports, and of decode.py from its start to the first token and to its end",
        "model": args.shape.stem if args.shape else measured.without_directories(args.model),
        "dtype": first["dtype"], "weights": first["weights"],
        "weight_bytes": first["weight_bytes"], "input_len": args.input_len, "rounds": args.rounds,
        "imports": loaded, "results": results,
    }  # fmt: skip


# --- a checkpoint to start from ------------------------------------------------------------------------------------


def saved(args: argparse.Namespace, directory: pathlib.Path) -> pathlib.Path:
    """A shape as a checkpoint of random weights, written by a process of its own."""
    import planning

    from jaxinfer import roofline

    config = planning.read_shape(str(args.shape), args.dtype)
    need, free = roofline.weight_bytes(config), shutil.disk_usage(directory.parent).free
    if need > free:
        raise ValueError(
            f"{args.shape} needs {size(need)} on disk but {size(free)} are free in {directory.parent.parent}: set "
            "TMPDIR to a larger disk, or take fewer layers or a smaller --dtype"
        )
    child([sys.executable, "-c", SAVE, str(args.shape), config.dtype, str(directory)], {})
    return directory


def save(shape: str, dtype: str, directory: str) -> None:
    """Random weights of a shape, with a tokenizer whose tokens are numbers."""
    import loading
    import planning
    import settings
    from tokenizers import Tokenizer, models

    from jaxinfer.training import export

    model = loading.load(settings.Settings(random_weights=shape, dtype=dtype))
    export.save_huggingface(directory, model.params, planning.read_raw(shape))
    vocab = {str(i): i for i in range(model.config.vocab_size)}
    Tokenizer(models.WordLevel(vocab, unk_token="0")).save(f"{directory}/tokenizer.json")


# --- processes -----------------------------------------------------------------------------------------------------


def rounds(num: int, words: list[str], folder: pathlib.Path) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Seconds of each import, and what decode.py said of each start, turn by turn."""
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    starts: dict[str, list[Any]] = {case: [] for case in CASES}
    warm = folder / "warm"
    kept = [*words, "--aot", str(folder / "aot")]
    for each in (words, kept):
        start(each, warm)  # what earlier runs leave, and files in the system's memory
    for turn in range(num):
        for name, code in IMPORTS.items():
            imports[name].append(child([sys.executable, "-c", code], {})[0])
        fresh, programs = folder / f"cold-{turn}", folder / f"programs-{turn}"
        starts["cold"].append(start(words, fresh))
        starts["cold, kernels"].append(start(words, warm, JAX_COMPILATION_CACHE_DIR=str(programs)))
        starts["warm"].append(start(words, warm))
        starts["aot"].append(start(kept, warm))
        for left in (fresh, programs):
            shutil.rmtree(left, ignore_errors=True)
    return imports, starts


def start(words: list[str], cache: pathlib.Path, **environment: str) -> dict[str, Any]:
    """What decode.py says of itself, with the seconds that its process took; `cache` takes the place of ~/.cache."""
    command = [sys.executable, str(SCRIPTS / "decode.py"), *words]
    took, out = child(command, {"XDG_CACHE_HOME": str(cache), **environment})
    return json.loads(out.splitlines()[-1]) | {"process": took}


def child(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds that a process took, and what it printed. ValueError with its last line where it fails."""
    import jaxinfer

    known = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    paths = [str(pathlib.Path(jaxinfer.__file__).parents[1]), str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    known |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    began = time.perf_counter()
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"a process that was to be measured failed: {said[-1]}")
    return took, done.stdout


# --- what came of it -----------------------------------------------------------------------------------------------


def parts(told: dict[str, Any]) -> dict[str, float]:
    """Seconds of one start. What decode.py does not name, before the first token, is importing its rooms."""
    seconds = told["seconds"]
    named = {name: seconds[name] for name in PARTS if name != "import"}
    return {
        "import": seconds["first_token"] - sum(named.values()),
        **named,
        "first_token": seconds["first_token"],
        "process": told["process"],
    }


def summary(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spread of a case, and how many programs it compiled."""
    found = [parts(each) for each in told]
    return {
        "seconds": {name: measured.spread([each[name] for each in found]) for name in found[0]},
        "compiled_programs": round(statistics.median(each["compiled_programs"] for each in told)),
    }


def show(imports: dict[str, dict[str, float]], results: list[dict[str, Any]]) -> None:
    """Prints both tables."""
    for name, took in imports.items():
        print(f"{name:24} {took['median']:7.2f} s ({took['min']:.2f} to {took['max']:.2f})")
    for line in results:
        first, whole = line["seconds"]["first_token"], line["seconds"]["process"]
        named = ", ".join(f"{name} {line['seconds'][name]['median']:.2f}" for name in PARTS)
        print(
            f"{line['case']:14} first token after {first['median']:6.2f} s ({first['min']:.2f} to {first['max']:.2f}): "
            f"{named}; programs compiled: {line['compiled_programs']}; the whole process {whole['median']:.2f} s "
            f"({whole['min']:.2f} to {whole['max']:.2f})"
        )
