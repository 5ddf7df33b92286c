"""Speculation on text that was held out: what each draft of the built-in model is accepted, and what that gains.

    python benchmarks/speculation/builtin.py acceptance --out benchmarks/speculation/acceptance
    python benchmarks/speculation/builtin.py speed --out benchmarks/speculation/speed

Prompts are the first tokens of the first held-out files (see training/corpus.py). `acceptance` runs the built-in model
itself in float32, all files a batch, with every kind of draft. `speed` widens it, without changing what it says, until
its weights take a gigabyte in bfloat16, so that a pass costs what reading them costs, and decodes file by file, plainly
and with a draft of its own size in turn. Writes OUT.json, and OUT.png of `acceptance`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.append(str(pathlib.Path(__file__).parents[2] / "scripts"))
import measured

DRAFTS = {  # what is drafted with: (kind, how many tokens, or the children of each level of a tree)
    "n-gram": ("ngram", 4),
    "first 2 layers": ("layers:2", 4),
    "first 4 layers": ("layers:4", 4),
    "model": ("model", 4),
    "model, 8 tokens": ("model", 8),
    "model, a tree": ("model", (3, 2, 1, 1)),
    "head": ("head", 4),
    "head, a tree": ("head", (3, 2, 1, 1)),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["acceptance", "speed"])
    add = parser.add_argument
    add("--files", type=int, default=32)
    add("--prompt-length", type=int, default=64)
    add("--new-tokens", type=int, default=256)
    add("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    add("--ffn-width", type=int, default=57344, help="F of the widened model")
    add("--layers", type=int, default=12, help="L of the widened model")
    add("--draft", nargs="+", default=["head:4:shared"], help="of speed: KIND:TOKENS:RULE, such as model:4:token")
    add("--out", type=pathlib.Path, help="file name without its suffix")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Runs one of the two, prints a table, writes what was found."""
    result = (acceptance if args.what == "acceptance" else speed)(args)
    result |= {"files": args.files, "prompt_length": args.prompt_length, "new_tokens": args.new_tokens}
    result |= {"hardware": measured.hardware(), "versions": measured.versions(), "date": measured.date()}
    result |= {"command": measured.command("benchmarks/speculation/builtin.py")}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        if args.what == "acceptance":
            plot(args.out.with_suffix(".png"), result["results"])


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """The first ids of the first held-out files."""
    import jaxinfer
    from jaxinfer import training

    tokenizer = jaxinfer.Tokenizer("builtin")
    texts = list(training.read_corpus().held_out.values())[: args.files]
    rows = [tokenizer.encode(text[: 20 * args.prompt_length])[: args.prompt_length] for text in texts]
    short = [row for row in rows if len(row) < args.prompt_length]
    if len(rows) < args.files or short:
        raise ValueError(f"there are {len(rows) - len(short)} long enough files, not {args.files}: ask for fewer")
    return rows


def drafts(params: Any, config: Any, dtype: str) -> Any:
    """From the name of a kind to a draft for the target."""
    import jaxinfer
    from jaxinfer import models, weights
    from jaxinfer.speculation import HeadDraft, LayersDraft, ModelDraft, NGram

    home = jaxinfer.hub.locate("builtin")

    def make(kind: str) -> Any:
        if kind == "ngram":
            return NGram()
        if kind.startswith("layers:"):
            return LayersDraft(params, config, int(kind.removeprefix("layers:")))
        if kind == "model":
            return ModelDraft(*jaxinfer.load(home / "draft", dtype))
        own, own_config, target = weights.load_head(home / "head", dtype)
        same = {name.rpartition("-")[2] for name in (target, models.fingerprint(params, config))}  # the digest alone
        if len(same) > 1:
            raise ValueError(f"the head was trained for {target}, and that is not the built-in model: distil it again")
        return HeadDraft(own, params, own_config, config)

    return make


# --- acceptance ----------------------------------------------------------------------------------------------------


def acceptance(args: argparse.Namespace) -> dict[str, Any]:
    """Every draft, by every rule that it has."""
    import jax.numpy as jnp

    import jaxinfer

    params, config = jaxinfer.load("builtin", jnp.float32)
    config = config.replace(stop_ids=())  # every row makes all its tokens
    ids, make = prompts(args), drafts(params, config, "float32")
    print(f"{'draft':18} {'rule':7} {'temp':>4} {'accepted':>8} {'tokens a pass':>13} {'predicted':>9}   by position")
    found = []
    for temperature in args.temperature:
        sampling = jaxinfer.Sampling(temperature=temperature, seed=list(range(len(ids))))
        for name, (kind, shape) in DRAFTS.items():
            tree = None if isinstance(shape, int) else shape
            for rule in ("shared", "token") if tree else ("shared", "token", "block"):
                result = jaxinfer.speculate(
                    params, config, ids, draft=make(kind), num_draft_tokens=shape if tree is None else 1, tree=tree,
                    rule=rule, sampling=sampling, max_new_tokens=args.new_tokens,
                )  # fmt: skip
                found.append(facts(name, rule, temperature, result))
                row = found[-1]
                print(
                    f"{name:18} {rule:7} {temperature:4} {row['acceptance']:8.3f} {row['tokens_per_round']:13.3f}"
                    f" {row['predicted_tokens_per_round']:9.3f}   "
                    + " ".join(f"{x:.3f}" for x in row["accepted_per_position"]),
                    flush=True,
                )
    return {"benchmark": "acceptance of every draft of the built-in model, float32, held-out prompts", "results": found}


def facts(name: str, rule: str, temperature: float, result: Any) -> dict[str, Any]:
    """What a generation says of its draft; predicted: what a round emits if every position is accepted at its rate."""
    import numpy as np

    rounds, drafted, accepted = (np.asarray(x).sum(0) for x in (result.rounds, result.drafted, result.accepted))
    per_position = accepted / np.maximum(drafted, 1)
    return {
        "draft": name,
        "rule": rule,
        "temperature": temperature,
        "rounds": int(rounds),
        "drafted": drafted.tolist(),
        "accepted": accepted.tolist(),
        "acceptance": float(accepted.sum() / tried(drafted, accepted).sum()),
        "tokens_per_round": float(result.tokens_per_round),
        "accepted_per_position": [round(float(x), 4) for x in per_position],
        "predicted_tokens_per_round": float(1 + drafted[0] / rounds * per_position.sum()),
    }


def tried(drafted: Any, accepted: Any) -> Any:
    """How often each place was looked at: where all before it were accepted."""
    import numpy as np

    return np.minimum(drafted, np.append(drafted[0], accepted[:-1]))


def plot(path: pathlib.Path, found: list[dict[str, Any]]) -> None:
    """Tokens a pass, of every draft and rule, greedy and sampled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    temperatures = sorted({row["temperature"] for row in found})
    figure, axes = plt.subplots(1, len(temperatures), figsize=(12, 5), sharex=True, sharey=True, squeeze=False)
    names, rules = list(DRAFTS), ("shared", "token", "block")
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for i, rule in enumerate(rules):
            rows = {row["draft"]: row for row in found if (row["rule"], row["temperature"]) == (rule, temperature)}
            spots = [(n, rows[name]["tokens_per_round"]) for n, name in enumerate(names) if name in rows]
            where, value = np.array(spots).T
            axis.barh(where + 0.25 * (i - 1), value, 0.25, label=rule)
        axis.set(title=f"temperature {temperature:g}", yticks=range(len(names)), yticklabels=names)
        axis.set_xlabel("tokens a pass of the target")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
    axes[0][-1].legend(title="rule")
    figure.suptitle("Drafts of the built-in model, on held-out files")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- speed -----------------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Plain decoding and each draft in turn, file by file, on the widened model."""
    import jax
    import jax.numpy as jnp

    import jaxinfer
    from jaxinfer import models, roofline

    small, config = jaxinfer.load("builtin", jnp.bfloat16)
    params, config = models.widen(small, config.replace(stop_ids=()), args.ffn_width, args.layers, jax.random.key(0))
    params = jax.block_until_ready(params)
    ids, make = prompts(args), drafts(params, config, "bfloat16")
    size = args.prompt_length + args.new_tokens
    bytes_ = roofline.decode_bytes(config, 1, size, "bfloat16")
    print(f"weights of {roofline.weight_bytes(config) / 1e9:.2f} GB; a plain read: {measured.plain_read():.1f} GB/s")
    found = []
    for temperature in args.temperature:
        sides = {"plain": None} | {name: name.split(":") for name in args.draft}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        facts_: dict[str, list[Any]] = {name: [] for name in args.draft}
        for number, row in enumerate([ids[0], *ids]):  # the first is for the compiler
            for name, how in sides.items():
                sampling = jaxinfer.Sampling(temperature=temperature, seed=number)
                options = {"sampling": sampling, "max_new_tokens": args.new_tokens}
                began = time.perf_counter()
                if how is None:
                    result = jaxinfer.generate(params, config, [row], **options)
                else:
                    kind, J, rule = ":".join(how[:-2]), int(how[-2]), how[-1]
                    result = jaxinfer.speculate(
                        params, config, [row], draft=make(kind), num_draft_tokens=J, rule=rule, **options
                    )
                jax.block_until_ready(result.ids)
                if number:
                    seconds[name].append(time.perf_counter() - began)
                    if how is not None:
                        facts_[name].append((int(result.num.sum()), int(result.rounds.sum())))
        rate = args.new_tokens * len(ids) / sum(seconds["plain"])
        plain = {
            "tokens_per_second": rate,
            "gb_per_second": rate * bytes_ / 1e9,
            "plain_read_gb_per_second": measured.plain_read(),
        }
        print(f"temperature {temperature}: plain {rate:.2f} tokens/s, {rate * bytes_ / 1e9:.1f} GB/s", flush=True)
        for name in args.draft:
            ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
            tokens, rounds = (sum(x) for x in zip(*facts_[name], strict=True))
            found.append({
                "draft": name, "temperature": temperature, "speedup": sum(seconds["plain"]) / sum(seconds[name]),
                "speedup_of_files": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
                "each_file": [round(x, 3) for x in ratios], "tokens_per_round": tokens / rounds, "plain": plain,
            })  # fmt: skip
            row = found[-1]
            print(f"  {name}: {row['speedup']:.2f} times ({min(ratios):.2f} to {max(ratios):.2f}), "
                  f"{row['tokens_per_round']:.2f} tokens a pass", flush=True)  # fmt: skip
    what = "the built-in model widened to a gigabyte of bfloat16, one row, plainly and with a draft in turn"
    weights = {"weight_bytes": roofline.weight_bytes(config), "ffn_width": args.ffn_width, "layers": args.layers}
    return {"benchmark": what, **weights, "results": found}


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(arguments)
    except (ValueError, OSError) as refusal:
        sys.exit(f"builtin.py: {refusal}")
