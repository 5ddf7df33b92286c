"""Facts about decode programs compiled for an H200 without one, as one JSON object on the last line.

    PYTHONPATH=. ~/.cache/h200-compile/bin/python tests/h200/facts.py --out benchmarks/h200/decode_compile.json
    ... tests/h200/facts.py --model llama-3-70b --mesh tensor=8 --out benchmarks/h200/llama-3-70b_tensor8.json
    ... tests/h200/facts.py --weights int8 --out benchmarks/h200/weights_int8.json
    ... tests/h200/facts.py --draft model --out benchmarks/h200/speculate_model.json

Runs in the environment that setup.sh makes, with the repository on the path; compiles, and runs nothing.
"""

import h200  # isort: skip  (before jax: it sets what the compile needs)

import argparse
import json
import math
import pathlib
import platform
import time
from typing import Any

import jax

from jaxinfer import kernels, mesh, models, program, roofline
from jaxinfer.cache import init_cache
from jaxinfer.config import LayerSpec, ModelConfig, RopeSpec
from jaxinfer.decoding import Decoder, State, decode_step
from jaxinfer.decoding.generate import run
from jaxinfer.models import param_shapes
from jaxinfer.sampling import Sampling
from jaxinfer.speculation import HeadDraft, ModelDraft, NGram, Tree
from jaxinfer.speculation.loop import run as speculate_run
from jaxinfer.speculation.plan import Plan

ROWS = 8  # on a mesh
SIZE = 4096  # positions of the cache
BUFFER = 128  # new tokens that the loop can give
OURS = 'custom_call_target="__gpu$xla.gpu.triton"'  # what kernels/gpu compiles to
SHAPES = {  # D, F, N, K, H, L, V
    "llama-3-8b": (4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3-70b": (8192, 28672, 64, 8, 128, 80, 128256),
    "llama-3-1b": (2048, 8192, 32, 8, 64, 16, 128256),
    "tiny-draft": (224, 544, 5, 5, 32, 2, 1009),
    "tiny": (352, 832, 6, 3, 64, 4, 1009),  # sizes of which no activation has as many numbers as a weight
}


def main(args: argparse.Namespace) -> None:
    """Compiles the loop for 1 and 8 rows and a step for 2, and prints what they would do."""
    config = llama(*SHAPES[args.model])
    if args.mesh:
        facts = on_mesh(config, args)
    elif args.draft:
        facts = speculating(config, args)
    elif args.cache:
        facts = keeping(config, args)
    else:
        facts = on_one(config, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


def on_one(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The programs of one H200."""
    return {
        "model": args.model,
        "dtype": config.dtype,
        "cache_size": SIZE,
        "hardware": "NVIDIA H200, compiled without one",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": f"python tests/h200/facts.py --model {args.model}"
        + " --keep-cache" * args.keep_cache
        + (f" --weights {args.weights}" if args.weights else ""),
        "weights": args.weights,
        "params": roofline.params_count(config),
        "programs": [
            describe("generate", config, 1, args.keep_cache, args.weights),
            describe("generate", config, 8, args.keep_cache, args.weights),
            describe("decode_step", config, 2, args.keep_cache, args.weights),
        ],
    }


def shapes_of(config: ModelConfig, form: str | None) -> Any:
    """The params, in codes as a GPU has them where a form is named."""
    kernels.packs_int4 = lambda platform=None: False
    return (
        jax.eval_shape(lambda params: models.quantize(params, form), param_shapes(config))
        if form
        else param_shapes(config)
    )


def speculating(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The loop of `speculate` for one row that begins with a prompt, on one H200."""
    small, own = llama(*SHAPES["tiny-draft" if args.model == "tiny" else "llama-3-1b"]), models.head_config(config)
    draft, drafts = {
        "model": (ModelDraft(param_shapes(small), small), small),
        "head": (HeadDraft(models.head_shapes(own), param_shapes(config), own, config), own),
        "ngram": (NGram(), None),
    }[args.draft]
    plan = Plan(Tree.branching(3, 2) if args.tree else Tree.chain(4), "shared", args.adaptive)
    rows = 1
    cache = jax.eval_shape(lambda: init_cache(config, rows, SIZE, dtype=config.dtype, max_pending=plan.max_pending))
    sampling = jax.eval_shape(lambda: Sampling().rows(rows, config.vocab_size, config.stop_ids))
    key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((rows,), "int32")
    ids, cost = jax.ShapeDtypeStruct((rows, 64), "int32"), jax.ShapeDtypeStruct((), "float32")
    static = {"model": Decoder(config), "process": None, "buffer": BUFFER, "plan": plan, "fresh": True}
    began = time.perf_counter()
    state = jax.eval_shape(State.init, cache)
    arguments = (param_shapes(config), draft, state, None, ids, number, sampling, number, key, cost)
    compiled = h200.compile_for_h200(speculate_run, *arguments, **static)
    seconds = time.perf_counter() - began
    target, held = jax.tree.leaves(cache.layers), []
    if drafts is not None:
        held = jax.tree.leaves(jax.eval_shape(lambda: init_cache(drafts, rows, SIZE, dtype=drafts.dtype)).layers)
    params = jax.tree.leaves((param_shapes(config), param_shapes(small) if args.draft == "model" else ()))
    shapes = {leaf.shape for leaf in (*params, *target, *held) if len(leaf.shape) > 1}
    flags = f"--model {args.model} --draft {args.draft}" + " --tree" * args.tree + " --adaptive" * args.adaptive
    return {
        "model": args.model,
        "draft": args.draft,
        "nodes": plan.tree.num_nodes,
        "adaptive": plan.adaptive,
        "rows": rows,
        "cache_size": SIZE,
        "hardware": "NVIDIA H200, compiled without one",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": f"python tests/h200/facts.py {flags}",
        "compile_seconds": round(seconds, 1),
        "memory": program.temporaries(compiled),
        "cache_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in target),
        "draft_cache_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in held),
        "attention_kernels": ours(compiled, "attention"),
        "loops_at_the_top": [loop.trip_count for loop in program.while_loops(compiled)],
        "copies_in_the_loop": [str(copy) for copy in program.copies(compiled, shapes) if copy.loop],
        "writes_in_the_loop": [str(write) for write in program.writes(compiled, shapes) if write.loop],
        "host_callbacks": compiled.as_text().count("callback"),
    }


def keeping(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The decode loop of 8 rows over a kind of cache, on one H200."""
    rows = 8
    cache = jax.eval_shape(lambda: init_cache(config, rows, SIZE, args.cache, dtype=config.dtype))
    state = jax.eval_shape(State.init, cache)
    sampling = jax.eval_shape(lambda: Sampling().rows(rows, config.vocab_size, config.stop_ids))
    budget, key = jax.ShapeDtypeStruct((rows,), "int32"), jax.eval_shape(lambda: jax.random.key(0))
    static = {"model": Decoder(config), "process": None, "buffer": BUFFER}
    began = time.perf_counter()
    compiled = h200.compile_for_h200(run, param_shapes(config), state, None, None, sampling, budget, key, **static)
    seconds = time.perf_counter() - began
    spec, held = config.layers[0], jax.tree.leaves(cache.layers)
    large = {leaf.shape for leaf in held if math.prod(leaf.shape) > 1e6}
    whole = {(rows, spec.num_kv_heads, SIZE, spec.head_width)}  # as many numbers as all keys of a layer
    loop = decode_loop(compiled)
    return {
        "model": args.model,
        "cache": args.cache,
        "rows": rows,
        "cache_size": SIZE,
        "hardware": "NVIDIA H200, compiled without one",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": f"python tests/h200/facts.py --model {args.model} --cache {args.cache}",
        "compile_seconds": round(seconds, 1),
        "cache_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in held),
        "dense_cache_bytes": roofline.cache_bytes(config, rows, SIZE),
        "memory": program.temporaries(compiled),
        "copies_of_the_cache": [str(copy) for copy in program.copies(compiled, large | whole) if copy.loop],
        "writes_of_the_cache": [str(write) for write in program.writes(compiled, large | whole) if write.loop],
        "largest_write": max((write.bytes for write in program.writes(compiled) if write.loop), default=0),
        "kernels_per_step": sum(launched(compiled).values()),
        "attention_kernels": ours(compiled, "attention"),
        "bytes_moved_per_step": program.bytes_moved(compiled, loop, cheapest=True),
        "host_callbacks": compiled.as_text().count("callback"),
    }


def on_mesh(config: ModelConfig, args: argparse.Namespace) -> dict[str, Any]:
    """The decode loop of 8 rows on a mesh of H200s: what a device holds, and what one step sends."""
    axes = mesh.parse_axes(args.mesh)
    devices = h200.h200_mesh(tuple(axes.values()), tuple(axes))
    with jax.set_mesh(devices):
        return described(config, args, devices)


def described(config: ModelConfig, args: argparse.Namespace, devices: Any) -> dict[str, Any]:
    """The facts of `on_mesh`, inside it."""
    config = models.arrange_config(config)

    def lying(tree: Any, letters: Any) -> Any:
        places = mesh.shardings(letters, devices)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)

    def held(tree: Any) -> int:
        sizes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * size for shape, size in sizes)

    letters = models.letters(config)
    if args.mistake:
        letters = letters | {"layers": tuple(layer | {"down": "D_"} for layer in letters["layers"])}
    params = lying(param_shapes(config), letters)
    state = jax.eval_shape(lambda: State.init(init_cache(config, ROWS, SIZE, dtype=config.dtype)))
    state = lying(state, state.letters())
    sampling = jax.eval_shape(lambda: Sampling().rows(ROWS, config.vocab_size, config.stop_ids))
    budget, key = jax.ShapeDtypeStruct((ROWS,), "int32"), jax.eval_shape(lambda: jax.random.key(0))
    began = time.perf_counter()
    compiled = run.lower(
        params, state, None, None, sampling, budget, key, model=Decoder(config), process=None, buffer=BUFFER
    ).compile()
    seconds = time.perf_counter() - began
    shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((params, state.cache.layers))}
    shards = {shape for shape in shards if len(shape) > 1}
    memory = program.temporaries(compiled)
    return {
        "model": args.model,
        "dtype": config.dtype,
        "mesh": args.mesh,
        "rows": ROWS,
        "cache_size": SIZE,
        "layers": len(config.layers),
        "hardware": "NVIDIA H200, compiled without one",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "command": f"python tests/h200/facts.py --model {args.model} --mesh {args.mesh}" + " --mistake" * args.mistake,
        "compile_seconds": round(seconds, 1),
        "weight_bytes": roofline.weight_bytes(config),
        "weight_bytes_per_device": held(params),
        "cache_bytes_per_device": held(state.cache.layers),
        "memory_per_device": memory,
        "copies_of_weights_or_cache": [str(copy) for copy in program.copies(compiled, shards)],
        "collectives_per_step": [row for row in program.collectives(compiled, cheapest=True) if row["loop"]],
        "collectives_before_and_after": [row for row in program.collectives(compiled, True) if not row["loop"]],
        "kernels_per_step": sum(launched(compiled).values()),
        "attention_kernels": ours(compiled, "attention"),
    }


def llama(D: int, F: int, N: int, K: int, H: int, L: int, V: int) -> ModelConfig:
    """The shape of a llama."""
    rope = RopeSpec(frequency=tuple(500000.0 ** (-2 * i / H) for i in range(H // 2)))
    layer = LayerSpec(num_heads=N, num_kv_heads=K, head_width=H, scale=H**-0.5, rope=rope, ffn_width=F)
    return ModelConfig(vocab_size=V, width=D, layers=(layer,) * L, dtype="bfloat16", stop_ids=(2,))


def describe(kind: str, config: ModelConfig, rows: int, keep_cache: bool, form: str | None = None) -> dict[str, Any]:
    """What one program would do."""
    began = time.perf_counter()
    compiled = build(kind, config, rows, keep_cache, form)
    seconds = time.perf_counter() - began
    half = config.replace(layers=config.layers[: len(config.layers) // 2])
    fewer = build(kind, half, rows, keep_cache, form)
    cache_bytes = roofline.cache_bytes(config, rows, SIZE)
    memory = program.temporaries(compiled)
    weights = jax.tree.leaves(param_shapes(config))
    cache = jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, rows, SIZE, dtype=config.dtype)).layers)
    weights += [leaf for leaf in jax.tree.leaves(shapes_of(config, form)) if form and leaf.size > 1 << 20]
    matrices = {leaf.shape for leaf in weights if len(leaf.shape) > 1} | {leaf.shape for leaf in cache}
    moved, limit = per_step(compiled), roofline.decode_bytes(config, rows, SIZE, roofline.weights_of(form))
    return {
        "program": kind,
        "rows": rows,
        "compile_seconds": round(seconds, 1),
        "weight_bytes": roofline.weight_bytes(config, roofline.weights_of(form)),
        "cache_bytes": cache_bytes,
        "memory": memory,
        "copies_of_weights_or_cache": [str(copy) for copy in program.copies(compiled, matrices)],
        "largest_copy": max((copy.bytes for copy in program.copies(compiled)), default=0),
        "writes_of_weights_or_cache": [str(write) for write in program.writes(compiled, matrices)],
        "loops": [{"trip_count": loop.trip_count, "state_bytes": loop.bytes} for loop in program.while_loops(compiled)],
        "kernels_per_step": sum(launched(compiled).values()),
        "attention_kernels": ours(compiled, "attention"),
        "product_kernels": ours(compiled, "product"),
        "kernels_by_opcode": launched(compiled),
        "kernels_per_layer": (sum(launched(compiled).values()) - sum(launched(fewer).values())) / len(half.layers),
        "bytes_moved_per_step": moved,
        "bytes_that_must_move_per_step": limit,
        "bytes_moved_over_limit": round(moved / limit, 4),
    }


def build(kind: str, config: ModelConfig, rows: int, keep_cache: bool, form: str | None = None) -> jax.stages.Compiled:
    """Compiles the loop, or one step, for rows whose caches hold SIZE tokens; keep_cache: as if it were not donated."""
    params = shapes_of(config, form)
    cache = jax.eval_shape(lambda: init_cache(config, rows, SIZE, dtype=config.dtype))
    ids = jax.ShapeDtypeStruct((rows,), "int32")
    if kind == "decode_step":
        step = jax.jit(decode_step.__wrapped__, static_argnames="config") if keep_cache else decode_step
        return h200.compile_for_h200(step, params, config, ids, cache)
    loop = jax.jit(run.__wrapped__, static_argnames=("model", "process", "buffer")) if keep_cache else run
    state = jax.eval_shape(State.init, cache)
    sampling = jax.eval_shape(lambda: Sampling().rows(rows, config.vocab_size, config.stop_ids))
    key = jax.eval_shape(lambda: jax.random.key(0))
    static = {"model": Decoder(config), "process": None, "buffer": BUFFER}
    return h200.compile_for_h200(loop, params, state, None, None, sampling, ids, key, **static)


def per_step(compiled: jax.stages.Compiled) -> int:
    """Bytes moved by one step: by a trip of the loop, where the program is one; rare branches not taken."""
    return program.bytes_moved(compiled, decode_loop(compiled), cheapest=True)


def launched(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Kernels of one step; rare branches not taken."""
    return program.kernels(compiled, decode_loop(compiled), cheapest=True)


def ours(compiled: jax.stages.Compiled, name: str) -> int:
    """How many of its kernels are of ours with a name."""
    return sum(OURS in line and f"/{name}/pallas_call" in line for line in compiled.as_text().splitlines())


def decode_loop(compiled: jax.stages.Compiled) -> program.Loop | None:
    """The loop that stops when every row is done, if the program has one."""
    return next((loop for loop in program.while_loops(compiled) if loop.trip_count is None), None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3-8b")
    parser.add_argument("--weights", help="quantized so: int8, or int4:group=32")
    parser.add_argument("--cache", help="instead: the decode loop over this kind of cache")
    parser.add_argument("--out", type=pathlib.Path, help="write the facts to this file too")
    parser.add_argument("--keep-cache", action="store_true", help="plant a mistake: the cache is not donated")
    parser.add_argument("--mesh", help="of H200s, such as tensor=8 or data=2,tensor=4")
    parser.add_argument("--draft", choices=["model", "head", "ngram"], help="the loop of speculation, with this draft")
    parser.add_argument("--tree", action="store_true", help="of --draft: three tokens, and two after each")
    parser.add_argument("--adaptive", action="store_true", help="of --draft: as many tokens as pays")
    parser.add_argument("--mistake", action="store_true", help="plant a mistake: `down` lies whole on every device")
    main(parser.parse_args())
