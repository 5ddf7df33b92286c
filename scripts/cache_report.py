"""What each kind of cache costs and what it loses, side by side: bytes, bits per byte of a text, tokens per second.

    python scripts/cache_report.py
    python scripts/cache_report.py --text notes.txt --kinds dense int8 streaming:sinks=4,recent=124 --json
    python scripts/cache_report.py --out benchmarks/cache/builtin
    python scripts/cache_report.py --shape configs/models/llama-1.1b-bench.toml --kinds int8 --speed-rows 8

Rows of a text are read up to --prompt-length, then token by token up to --length, as in decoding; what each token costs
the model there is counted, and how far its law is from the one over a dense cache. Evicting kinds get --budget of the
length by default, beside a window of the same size. Speed is of decoding at --speed-length, all kinds in turn, round
after round. The text is the held-out part of the built-in model's by default. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import allocation
import losses
import measured
from flags import Parser, Refusal, doors
from screen import size

NUMBERS = ("int8", "float8", "int4", "int4:group=64")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("cache_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="builtin", help="'builtin', a directory, or a hub id")
    add("--shape", type=pathlib.Path, help="a file of configs/models: random weights, of which the speed is measured")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32; of a shape, its own")
    add("--text", type=pathlib.Path, nargs="+", help="files to read; each is a row, or several")
    add("--kinds", nargs="+", metavar="KIND", help="as decode.py --cache has them; dense is always among them")
    add("--rows", type=int, default=16)
    add("--prompt-length", type=int, default=512)
    add("--length", type=int, default=1024)
    add("--budget", type=float, default=0.2, help="of the length, for the default evicting kinds")
    add("--speed-length", type=int, default=4096, help="0: do not measure the speed")
    add("--speed-rows", type=int, default=4)
    add("--steps", type=int, default=32, help="of decoding, each time it is measured")
    add("--rounds", type=int, default=5)
    add("--out", type=pathlib.Path, help="file name without its suffix")
    add("--json", action="store_true", help="the result on the last line of stdout")
    args = parser.parse_args(argv)
    for name in ("rows", "prompt_length", "steps", "rounds", "speed_rows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.length <= args.prompt_length:
        parser.error(f"--length {args.length} leaves nothing to count after --prompt-length {args.prompt_length}")
    if not 0 < args.budget <= 1:
        parser.error(f"--budget is {args.budget}: give a share of the length, such as 0.2")
    if args.shape and args.text:
        parser.error("--shape has random weights, which lose nothing on a --text: give a --model with it")
    if args.shape and not args.speed_length:
        parser.error("--shape without a --speed-length leaves nothing to measure")
    return args


def main(args: argparse.Namespace) -> int:
    """Measures every kind, prints a table, writes what was found."""
    try:
        with doors():
            result = compare(args)
    except Refusal as refusal:
        print(f"cache_report.py: {refusal}", file=sys.stderr)
        return 1
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        out = args.out.with_suffix("") if args.out.suffix in (".json", ".png") else args.out
        pathlib.Path(f"{out}.json").write_text(json.dumps(result, indent=1) + "\n")
        plot(pathlib.Path(f"{out}.png"), result)
    if args.json:
        print(json.dumps(result))
    return 0


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of every kind."""
    import jaxinfer

    kinds = chosen(args)
    params, config = read_model(args)
    for kind in kinds:  # what cannot be is refused before anything is measured
        jaxinfer.cache.cache_bytes(config, args.rows, args.length, kind)
        if args.shape and jaxinfer.cache.Kind.read(kind).layout in jaxinfer.cache.EVICTING:
            raise ValueError(f"{kind} keeps what a text says it should, and --shape has none: measure it with --model")
    found: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in kinds}
    rows = None if args.shape else lose(args, params, config, found)
    if args.speed_length:
        for kind, speed in speeds(args, params, config, rows, kinds).items():
            found[kind] |= speed
            print(
                f"{kind:36} {size(speed['bytes_at_speed_length']):>13} {speed['tokens_per_second']:9.1f} tokens/s, "
                f"{speed['over_dense']:.2f} of dense ({speed['least']:.2f} to {speed['most']:.2f})"
            )
    what = vars(args) | {"text": [path.name for path in args.text] if args.text else "held-out", "out": None}
    if args.shape:
        what |= {"text": None, "shape": args.shape.stem, "model": None}
    return {
        "benchmark": "every kind of cache: what it keeps, what it loses on a text, how fast it decodes",
        "settings": what, "kinds": list(found.values()), "hardware": measured.hardware(),
        "versions": measured.versions(), "date": measured.date(),
        "command": measured.command("scripts/cache_report.py"),
    }  # fmt: skip


def read_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Params and config of the checkpoint, or of the shape."""
    import jaxinfer

    if not args.shape:
        return jaxinfer.load(args.model, args.dtype or "float32")
    import loading
    from settings import Settings

    model = loading.load(Settings(random_weights=str(args.shape), dtype=args.dtype or "auto"))
    return model.params, model.config


def lose(args: argparse.Namespace, params: Any, config: Any, found: dict[str, dict[str, Any]]) -> Any:
    """Adds to what was found of every kind what it loses on the text, whose ids [rows, length] it gives."""
    import jaxinfer

    documents = losses.read(args.text) if args.text else losses.held_out()
    tokenizer = jaxinfer.Tokenizer(args.model)
    rows, num_bytes = losses.texts(documents, tokenizer, args.rows, args.prompt_length, args.length)
    print(f"{'kind':36} {'bytes a token':>13} {'bits a byte':>11} {'lost':>7} {'KL':>9}", flush=True)
    laws = None
    for kind in found:
        facts, own = losses.of(params, config, rows, num_bytes, args.prompt_length, kind, laws)
        laws = own if laws is None else laws
        facts["lost"] = facts["bits_per_byte"] / found["dense"].get("bits_per_byte", facts["bits_per_byte"]) - 1
        found[kind] |= facts
        print(
            f"{kind:36} {facts['bytes_per_token']:13.0f} {facts['bits_per_byte']:11.4f} {facts['lost']:7.2%}"
            f" {facts['kl_to_dense']:9.2e}",
            flush=True,
        )
    return rows


def chosen(args: argparse.Namespace) -> list[str]:
    """Dense first, then what was asked for."""
    budget = round(args.budget * args.length)
    evicting = [
        f"ring:window={budget}", f"streaming:sinks=4,recent={budget - 4}", f"h2o:budget={budget},recent={budget // 2}",
        f"snapkv:budget={max(round(args.budget * args.prompt_length), 40)},window=32",
    ]  # fmt: skip
    kinds = args.kinds or ["paged", *NUMBERS, "paged+int8"]
    if not args.kinds and not args.shape:
        kinds += [*evicting, f"{evicting[1]}+int8"]
    return ["dense", *(kind for kind in dict.fromkeys(kinds) if kind != "dense")]


# --- speed ---------------------------------------------------------------------------------------------------------


def speeds(args: argparse.Namespace, params: Any, config: Any, ids: Any, kinds: list[str]) -> dict[str, dict[str, Any]]:
    """Decoding at a length, every kind in turn; dense in the dtype that is fastest here."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxinfer

    num = args.speed_length - args.steps - 1
    names = [f"dense in {dtype}" for dtype in ("float32", "bfloat16", "float16")] + kinds[1:]

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(params, cache, newest):
        def one(_, held):
            newest, cache = held
            score, cache = jaxinfer.decode_step(params, config, newest, cache)
            return score.argmax(-1).astype(jnp.int32), cache

        start = cache.length  # the same tokens again and again: each time is measured at the same length
        newest, cache = jax.lax.fori_loop(0, args.steps, one, (newest, cache))
        return newest, cache.rewind(start)

    state: dict[str, Any] = {}
    for name in names:
        kind, _, dtype = name.partition(" in ")
        cache = jaxinfer.init_cache(config, args.speed_rows, args.speed_length, kind, dtype=dtype or None)
        if ids is None:
            cache = filled(cache, num)
        else:
            text = np.random.default_rng(0).choice(ids.reshape(-1), (args.speed_rows, num)).astype(np.int32)
            for first in range(0, num, 512):
                _, cache = jaxinfer.prefill(params, config, text[:, first : first + 512], cache)
        if cache.compresses:
            cache = cache.compress(args.steps + 1)
        state[name] = [jnp.zeros(args.speed_rows, jnp.int32), cache]
        state[name][1] = jax.block_until_ready(steps(params, state[name][1], state[name][0])[1])
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name, held in state.items():
            began = time.perf_counter()
            held[1] = jax.block_until_ready(steps(params, held[1], held[0])[1])
            seconds[name].append(time.perf_counter() - began)
    best = min(names[:3], key=lambda name: statistics.median(seconds[name]))
    found = {}
    for name in (best, *names[3:]):
        ratios = [a / b for a, b in zip(seconds[best], seconds[name], strict=True)]
        found[name.partition(" in ")[0]] = {
            "dtype": name.partition(" in ")[2] or config.dtype,
            "bytes_at_speed_length": state[name][1].bytes,
            "tokens_per_second": args.steps * args.speed_rows / statistics.median(seconds[name]),
            "over_dense": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
        }  # fmt: skip
    return found


def filled(cache: Any, num: int) -> Any:
    """A cache as if `num` tokens had been read: its slots are those of a long text, what they hold is zeros."""
    import jax.numpy as jnp

    rows = jnp.full(cache.rows, num, jnp.int32)
    return cache.reserve(cache.step(rows, num)).advance(rows)


def plot(path: pathlib.Path, result: dict[str, Any]) -> None:
    """What is lost over what is kept, and how fast each kind decodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = [
        draw
        for fact, draw in (("bytes_per_token", draw_kept), ("over_dense", draw_speed))
        if fact in result["kinds"][0]
    ]
    names = [row["kind"] for row in result["kinds"]]
    size = 6.5 * len(sides), 0.36 * len(names) + 2
    figure, axes = plt.subplots(1, len(sides), figsize=size, sharey=True, squeeze=False)
    for draw, axis in zip(sides, axes[0], strict=True):
        draw(axis, result)
    axes[0][0].set(yticks=range(len(names)), yticklabels=names)
    axes[0][0].invert_yaxis()
    figure.suptitle(f"Kinds of KV cache, {result['settings']['shape'] or 'on held-out text'}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_kept(axis: Any, result: dict[str, Any]) -> None:
    """Bytes a token, and what the text loses."""
    rows = result["kinds"]
    axis.barh(range(len(rows)), [row["bytes_per_token"] for row in rows], color="tab:blue")
    for i, row in enumerate(rows):
        said = f" {row['bits_per_byte']:.4f} bits a byte ({row['lost']:+.2%})"
        axis.text(row["bytes_per_token"], i, said, va="center", fontsize=8)
    most = max(row["bytes_per_token"] for row in rows)
    axis.set(xlabel="bytes a token at the end of the text", xlim=(0, 1.6 * most))


def draw_speed(axis: Any, result: dict[str, Any]) -> None:
    """Tokens a second beside dense, and how far rounds differ."""
    rows = result["kinds"]
    found = [row["over_dense"] for row in rows]
    spread = [[row["over_dense"] - row["least"] for row in rows], [row["most"] - row["over_dense"] for row in rows]]
    axis.barh(range(len(rows)), found, xerr=spread, color="tab:green", error_kw={"linewidth": 0.8})
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel(f"decoding at {result['settings']['speed_length']} tokens, times dense")


if __name__ == "__main__":
    allocation.begin_anew(allocation.HUGE)
    sys.exit(main(parse_args()))
