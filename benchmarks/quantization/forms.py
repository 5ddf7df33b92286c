"""Decoding with weights in every form, side by side: tokens/s, bytes, share of a plain read, bits per byte.

    python benchmarks/quantization/forms.py --out benchmarks/quantization/forms.json

Speed is of a shape with random weights, for one row and for several, one dispatch a measurement, all forms in turn,
round after round: only ratios within a round are compared. What a form loses is counted on the held-out text of the
built-in model, as scripts/cache_report.py does.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import statistics
import sys
import time
import tomllib
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))
import losses
import measured

FORMS = ("plain", "int8", "int8:dynamic", "int4:group=32", "int4:group=32,dynamic")
TEXT = (16, 512, 1024)  # rows, tokens that are read before any counts, tokens of a row


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=pathlib.Path, default=pathlib.Path("configs/models/llama-1.1b-bench.toml"))
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--rows", type=int, nargs="+", default=[1, 8])
    add("--prompt-length", type=int, default=64)
    add("--new-tokens", type=int, default=16)
    add("--rounds", type=int, default=5)
    add("--out", type=pathlib.Path)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measures, prints a table, writes what was found."""
    lost = lose()
    speeds, read = speed(args)
    for line in speeds:
        print(
            f"{line['rows']} x {line['form']:24} {line['tokens_per_second']:8.2f} tokens/s, {line['over_plain']:.2f} "
            f"of plain ({line['least']:.2f} to {line['most']:.2f}), {line['gb_per_second']:.1f} GB/s"
        )
    result = {
        "benchmark": "decoding with weights in every form: a shape with random weights; losses of the built-in model",
        "shape": args.shape.stem, "dtype": args.dtype, "prompt_length": args.prompt_length,
        "new_tokens": args.new_tokens, "rounds": args.rounds, "plain_read_gb_per_second": read, "speed": speeds,
        "loss": lost, "hardware": measured.hardware(), "versions": measured.versions(), "date": measured.date(),
        "command": measured.command("benchmarks/quantization/forms.py"),
    }  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def lose() -> list[dict[str, Any]]:
    """Bits per byte of the built-in model's held-out text, and KL to the plain weights, by form."""
    import jaxinfer

    params, config = jaxinfer.load("builtin", "float32")
    ids, num_bytes = losses.texts(losses.held_out(), jaxinfer.Tokenizer("builtin"), *TEXT)
    found, laws = [], None
    for form in FORMS:
        coded = params if form == "plain" else jaxinfer.quantize(params, form)
        facts, own = losses.of(coded, config, ids, num_bytes, TEXT[1], laws=laws)
        laws = own if laws is None else laws
        row = {"form": form, "bits_per_byte": facts["bits_per_byte"], "kl_to_plain": facts["kl_to_dense"]}
        found.append(row | {"lost": facts["bits_per_byte"] / (found or [row])[0]["bits_per_byte"] - 1})
        print(f"{form:24} {row['bits_per_byte']:.4f} bits a byte ({found[-1]['lost']:+.2%})", flush=True)
    return found


def speed(args: argparse.Namespace) -> tuple[list[dict[str, Any]], float]:
    """Every form in turn, and how fast a plain read is beside them."""
    import jax
    import jax.numpy as jnp

    import jaxinfer
    from jaxinfer import models, roofline

    config = models.config_from_hf(tomllib.loads(args.shape.read_text())).replace(dtype=args.dtype, stop_ids=())
    plain = models.init_params(config, jax.random.key(0), args.dtype)
    params = {form: plain if form == "plain" else jaxinfer.quantize(plain, form.removesuffix(",dynamic"))
              for form in ("plain", "int8", "int4:group=32")}  # fmt: skip
    params |= {"int8:dynamic": rounding(params["int8"]), "int4:group=32,dynamic": rounding(params["int4:group=32"])}
    found, size = [], args.prompt_length + args.new_tokens
    reads = [measured.plain_read()]
    for rows in args.rows:
        ids = jax.random.randint(jax.random.key(1), (rows, args.prompt_length), 0, config.vocab_size)
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for turn in range(args.rounds + 1):  # the first is for the compiler
            for form in FORMS:
                cache = jaxinfer.init_cache(config, rows, size)
                _, cache = jaxinfer.prefill(params[form], config, ids[:, :-1], cache)
                jax.block_until_ready(cache.length)
                began = time.perf_counter()
                out = jaxinfer.generate(
                    params[form], config, ids[:, -1:], num=jnp.ones(rows, jnp.int32), cache=cache,
                    max_new_tokens=args.new_tokens,
                )  # fmt: skip
                jax.block_until_ready(out.ids)
                if turn:
                    seconds[form].append(time.perf_counter() - began)
                del out, cache
                gc.collect()
        reads.append(measured.plain_read())
        for form in FORMS:
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[form], strict=True)]
            rate = args.new_tokens / statistics.median(seconds[form])
            packed = None if form == "plain" else roofline.weights_of(form)
            moved = roofline.decode_bytes(config, rows, args.prompt_length + args.new_tokens // 2, packed)
            found.append({
                "rows": rows, "form": form, "tokens_per_second": rate * rows,
                "weight_bytes": roofline.weight_bytes(config, packed), "gb_per_second": rate * moved / 1e9,
                "over_plain": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            })  # fmt: skip
    return found, max(reads)


def rounding(params: Any) -> Any:
    """The same codes, which round what they are multiplied with."""
    import jax

    from jaxinfer.quantization import Weight

    def leaf(x: Any) -> bool:
        return isinstance(x, Weight)

    return jax.tree.map(lambda x: x.replace(dynamic=True) if leaf(x) else x, params, is_leaf=leaf)


if __name__ == "__main__":
    main(parse_args())
