"""What each technique of inference is worth on this machine: the table that every guide prints, measured.

No cache, cache, heads grouped or not, a window, weights in int8 and int4, an int8 cache, speculation, batches: of each
the latency of a token, tokens/s, memory, the ratio to the baseline, the share of what this machine reads at most, and
the bits per byte that it loses. The baseline is `cache`: one row, plain weights, every key and value kept. Prompts are
read before, untimed; then a technique and the baseline make their tokens in turn, round after round, and only times of
one round are compared. Where a technique is exact its ids are compared with the baseline's, in the same run.

Bits per byte are counted on text that the built-in model never saw. Its weights are so few that they stay in the
processor: --widen makes it larger and leaves what it says as it is. The random weights of --shape have nothing to lose
that could be told, and little of what is guessed for them is right.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import pathlib
import platform
import re
import sys
from typing import TYPE_CHECKING, Any

import ceilings
import losses
from screen import size

if TYPE_CHECKING:
    from contenders import Contender, Technique, Work

WIDE = "57344x12"  # of the built-in model: a gigabyte in bfloat16
SETTINGS = (
    "dtype", "widen", "prompt_length", "new_tokens", "uncached_tokens", "rounds", "batch_size", "check_rows",
    "num_draft_tokens", "temperature", "text_rows", "text_length", "seed",
)  # fmt: skip
POSITIVE = ("uncached_tokens", "check_rows", "window", "num_draft_tokens", "text_rows")
COLUMNS = (
    "technique", "ms a token", "tokens/s", "times `cache`", "weights", "cache", "peak above", "of read bandwidth",
    "bits a byte lost", "ids",
)  # fmt: skip
PARTS = (  # of the memory
    ("weight_bytes", "weights", "tab:blue"), ("cache_bytes", "cache", "tab:orange"),
    ("draft_bytes", "draft", "tab:purple"), ("peak_bytes", "above these, at most", "silver"),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    add, model = parser.add_argument, parser.add_mutually_exclusive_group()
    model.add_argument("--model", default="builtin", help="'builtin' (the default), a directory, or a hub id")
    model.add_argument("--shape", type=pathlib.Path, help="instead: random weights of a shape (.toml, .json)")
    add("--widen", nargs="?", const=WIDE, metavar="FxL", help=f"the model made larger, to this F and L ({WIDE})")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--only", nargs="+", metavar="NAME", help="rows of the table, as it names them; cache is always one")
    add("--prompt-length", type=int, default=512)
    add("--new-tokens", type=int, default=64, help="of each row in a turn")
    add("--uncached-tokens", type=int, default=8, help="of no-cache's: each is a forward over the whole length")
    add("--rounds", type=int, default=5)
    add("--batch-size", type=int, nargs="+", default=[8, 32], help="rows of the batches")
    add("--check-rows", type=int, default=4, help="of a batch, decoded alone too, to compare the ids")
    add("--window", type=int, help="tokens that window keeps (default: a quarter of the length)")
    add("--draft", help="what guesses, as decode.py --draft has it (default head:builtin, of other models ngram)")
    add("--num-draft-tokens", type=int, default=4, help="it guesses a round")
    add("--temperature", type=float, default=0.0, help="of the draws; 0, the default, is greedy")
    add("--text", type=pathlib.Path, nargs="+", help="files to read, instead of those that were held out")
    add("--text-rows", type=int, default=16, help="of text, whose bits per byte are counted")
    add("--text-length", type=int, default=1024, help="tokens of such a row; the second half counts. 0: none is")
    add("--seed", type=int, default=0, help="of random weights and ids")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs it; prints a line on stderr a technique, and then the table."""
    check(args)
    import contenders
    import runtime

    runtime.keep_programs(True)
    if unknown := set(args.only or ()) - set(techniques(args)):
        raise ValueError(f"--only has {', '.join(sorted(unknown))}: take some of {', '.join(techniques(args))}")
    model, (documents, text) = load(args), documented(args)
    wanted, skipped = chosen(args, model["config"])
    num_rows = max(technique.rows for technique in wanted.values())
    work = contenders.Work(
        **model, prompts=prompted(documents, model["tokenizer"], model["config"], num_rows, args),
        new_tokens=args.new_tokens, uncached_tokens=args.uncached_tokens, num_draft_tokens=args.num_draft_tokens,
        temperature=args.temperature,
    )  # fmt: skip
    for technique in wanted.values():
        if technique.draft:  # one that cannot be used is refused now, not after the rest
            contenders.plan_of(technique, contenders.read_draft(technique.draft, work), work)
    lost = counted(args, wanted, documents)
    limits = ceilings.measure(())
    rows = measure(args, wanted, skipped, work)
    for row in rows:
        limits.reached("read", row["gb_per_second"], row["technique"])
    limits.show_raised()
    rows = [row | {"share": limits.share("read", row["gb_per_second"])} for row in rows]
    result = {
        "benchmark": "techniques of inference, each beside one row over a dense cache in turns",
        "model": work.name, "settings": {name: getattr(args, name) for name in SETTINGS}, "text": text,
        "ceilings": limits.told(), "results": [row | losing(row, lost) for row in rows],
        "skipped": skipped,
    }  # fmt: skip
    print(table(result), flush=True)
    if args.out:
        plot(args.out.with_suffix(".png"), result)
    return result


def measure(
    args: argparse.Namespace, wanted: dict[str, Technique], skipped: dict[str, str], work: Work
) -> list[dict[str, Any]]:
    """What was found of every technique, in turn with the baseline; adds to `skipped`."""
    from contenders import Contender, in_turns, unfit

    if why := unfit(wanted["cache"], work):
        raise ValueError(f"there is no room for a cache of {work.size} tokens, {why}: lower --prompt-length")
    plain = Contender(wanted["cache"], work)
    found = {}
    alone: dict[int, list[int]] = {}  # what each prompt gives by itself
    for name, technique in wanted.items():
        if name == "cache":
            continue
        if why := unfit(technique, work):
            skipped[name] = why
            tell(f"{name} is left out: {why}")
            continue
        side = Contender(technique, work)
        in_turns([plain, side], args.rounds)
        found[name] = side.facts(plain) | compared(side, plain, alone, args.check_rows)
        ms, ratio = found[name]["ms_per_token"], found[name]["ratio"]
        tell(f"{name}: {digits(ms['median'])} ms a token, {spread(ratio)} times the tokens/s of cache")
        del side
        gc.collect()
    if not found:
        in_turns([plain], args.rounds)
    found["cache"] = plain.facts(plain) | {"same_ids": None, "differs_at": None, "rows_compared": 0}
    return [{"technique": name, "says": wanted[name].says} | found[name] for name in wanted if name in found]


def check(args: argparse.Namespace) -> None:
    """Refuses what makes no sense, before anything heavy is imported."""
    from settings import spelled

    for name in POSITIVE:
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    length = args.prompt_length + args.new_tokens
    if args.window is not None and args.window >= length:
        raise ValueError(f"--window is {args.window} but rows have {length} tokens: a window of fewer leaves some out")
    if args.text_length and args.text_length < 4:
        raise ValueError(f"--text-length is {args.text_length}: give at least 4, or 0 to count no bits per byte")
    if args.temperature < 0:
        raise ValueError(f"--temperature is {args.temperature}: it must be at least 0")
    if args.shape and args.text:
        raise ValueError("--text is for a model that reads: with --shape, whose ids are random, leave it out")
    if args.draft and spelled(args.draft)[0] in ("head", "model") and args.shape:
        raise ValueError(
            f"--draft {args.draft} was trained for some model, and --shape is random: take ngram or layers:N"
        )
    if args.shape and args.widen:
        raise ValueError("--widen makes a model larger that says something: with --shape, give a larger one")
    if args.widen and not re.fullmatch(r"\d+x\d+", args.widen):
        raise ValueError(f"--widen is {args.widen}: write the width of the feed-forward x layers, such as {WIDE}")
    if args.out and args.out.suffix == ".png":
        raise ValueError(f"--out is {args.out}: name the JSON file, the picture lies beside it")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out and importlib.util.find_spec("matplotlib") is None:
        tell("there will be no picture, for there is no matplotlib: pip install -e '.[train]'")


# --- what is measured ----------------------------------------------------------------------------------------------


def chosen(args: argparse.Namespace, config: Any) -> tuple[dict[str, Technique], dict[str, str]]:
    """The techniques by name, and why some are left out."""
    groups = max(spec.num_heads // spec.num_kv_heads for spec in config.layers)
    wanted, skipped = techniques(args, groups), {}
    if groups == 1:
        why = "every query head has keys and values of its own, there are no groups"
        skipped |= dict.fromkeys(("all-heads", "grouped-heads"), why)
    if not (args.only or rounds_quickly()):
        why = "no AVX-512 VNNI here, without which it gains nothing"
        skipped |= dict.fromkeys(("int8:dynamic", "int4:dynamic"), why)
    named = [name for name in wanted if name == "cache" or not args.only or name in args.only]
    skipped = {name: why for name, why in skipped.items() if name in named}
    for name, why in skipped.items():
        tell(f"{name} is left out: {why}")
    return {name: wanted[name] for name in named if name not in skipped}, skipped


def techniques(args: argparse.Namespace, groups: int = 1) -> dict[str, Technique]:
    """All that there are, by name, in the order of the table; groups: G, query heads that share keys and values."""
    from contenders import Technique

    length = args.prompt_length + args.new_tokens
    window = args.window or max(length // 4, 1)
    draft = args.draft or ("head:builtin" if args.model == "builtin" and not args.shape else "ngram")
    int8, int4 = "weights in eight bits, a scale an output", "weights in four bits, a scale for 32 inputs"
    rounded = "what they are multiplied with is rounded to eight bits too"
    found = {
        "no-cache": Technique(f"a forward over all {length} positions a token", kind="none"),
        "cache": Technique("the baseline: one row, plain weights, every key and value kept"),
        "all-heads": Technique(
            f"keys and values repeated for every query head: {groups} times the cache", grouped=False
        ),
        "grouped-heads": Technique(f"{groups} query heads share theirs: the baseline once more, so it tells the noise"),
        "window": Technique(f"the newest {window} tokens alone are kept", kind=f"ring:window={window}", exact=False),
        "int8": Technique(int8, form="int8", exact=False),
        "int8:dynamic": Technique(f"{int8}; {rounded}", form="int8:dynamic", exact=False),
        "int4": Technique(int4, form="int4:group=32", exact=False),
        "int4:dynamic": Technique(f"{int4}; {rounded}", form="int4:group=32,dynamic", exact=False),
        "int8-cache": Technique("keys and values in eight bits, a scale a token and head", kind="int8", exact=False),
        "speculation": Technique(f"{draft} guesses {args.num_draft_tokens} tokens a round", draft=draft),
    }
    return found | {f"batch-{n}": Technique(f"{n} rows at once", rows=n) for n in dict.fromkeys(args.batch_size)}


def rounds_quickly() -> bool:
    """Whether this machine multiplies codes with codes sooner than with numbers."""
    import jax

    info = pathlib.Path("/proc/cpuinfo")
    return jax.default_backend() == "cpu" and info.is_file() and "avx512_vnni" in info.read_text()


# --- the model and its text ----------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> dict[str, Any]:
    """The model, as `Work` has it."""
    import jax
    import planning

    import jaxinfer
    from jaxinfer import models

    if args.shape:
        if not args.shape.is_file():
            raise FileNotFoundError(f"{args.shape} is no file: give a shape such as configs/models/llama-3.2-1b.toml")
        config = planning.read_shape(str(args.shape), args.dtype)
        fits(models.param_shapes(config), args.shape)
        params = jax.block_until_ready(models.init_params(config, jax.random.key(args.seed), args.dtype))
        model = {"params": params, "config": config, "small": (params, config)}
        return model | {"name": args.shape.stem, "tokenizer": None}
    tokenizer = jaxinfer.Tokenizer(args.model)
    params, config = jaxinfer.load(args.model, args.dtype)
    config = config.replace(stop_ids=())  # every row makes all its tokens
    small, name = (params, config), args.model
    if args.widen:
        F, L = map(int, args.widen.split("x"))
        key, name = jax.random.key(args.seed), f"{args.model}, widened to {args.widen}"
        fits(jax.eval_shape(lambda params: models.widen(params, config, F, L, key)[0], params), name)
        params, config = models.widen(params, config, F, L, key)
    params = jax.block_until_ready(params)
    return {"name": name, "params": params, "config": config, "small": small, "tokenizer": tokenizer}


def fits(shapes: Any, name: Any) -> None:
    """Refuses weights that there is no memory for."""
    from contenders import num_bytes

    from jaxinfer import kernels

    needed, free = num_bytes(shapes), kernels.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{name} needs {size(needed)} for its weights but {size(free)} are free: take fewer layers or a smaller "
            "--dtype"
        )


def documented(args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """The text that is read, by file (nothing: random ids are), and what it is."""
    if args.shape:
        return {}, "random ids"
    if args.text:
        return losses.read(args.text), ", ".join(path.name for path in args.text)
    try:
        return losses.held_out(), "files that the built-in model never saw"
    except ImportError as error:
        tell(f"prompts are random, and no bits per byte are counted ({error}): pip install -e '.[train]', or --text")
        return {}, "random ids"
    except ValueError:
        version = platform.python_version()
        return losses.unseen(), f"modules that the built-in model never saw, as Python {version} has them"


def prompted(documents: dict[str, str], tokenizer: Any, config: Any, rows: int, args: argparse.Namespace) -> Any:
    """Prompts [B, T]: of each text the first ids, then of each the next ones; random where there is no text."""
    import numpy as np

    T = args.prompt_length
    if not documents:
        return np.random.default_rng(args.seed).integers(config.vocab_size, size=(rows, T)).astype(np.int32)
    texts = [tokenizer.encode(text) for text in documents.values()]
    first = range(0, max(map(len, texts)) - T + 1, T)
    found = [ids[at : at + T] for at in first for ids in texts if len(ids) >= at + T][:rows]
    if len(found) < rows:
        raise ValueError(
            f"the text has {len(found)} pieces of {T} tokens for {rows} rows: give more of it, or lower "
            "--prompt-length or --batch-size"
        )
    return np.array(found, np.int32)


# --- what is lost --------------------------------------------------------------------------------------------------


def counted(
    args: argparse.Namespace, wanted: dict[str, Technique], documents: dict[str, str]
) -> dict[str, dict[str, float]]:
    """Bits per byte of the baseline and of what is not exact, on the built-in model in float32, by name.

    Widened, it says the same, in codes too: what is new is zero or meets zeros.
    """
    import jaxinfer

    if args.shape or args.model != "builtin" or not (documents and args.text_length):
        return {}
    prompt_length = args.text_length // 2
    params, config = jaxinfer.load("builtin", "float32")
    ids, num_bytes = losses.texts(
        documents, jaxinfer.Tokenizer("builtin"), args.text_rows, prompt_length, args.text_length
    )
    found: dict[str, dict[str, float]] = {}
    for name in sorted(wanted, key=lambda name: name != "cache"):  # the baseline first
        technique = wanted[name]
        if technique.exact and name != "cache":
            continue
        coded = jaxinfer.quantize(params, technique.form) if technique.form else params
        facts, _ = losses.of(coded, config, ids, num_bytes, prompt_length, technique.kind)
        bits = facts["bits_per_byte"]
        found[name] = {"bits_per_byte": bits, "lost": bits / found.get("cache", facts)["bits_per_byte"] - 1}
        tell(f"{name}: {bits:.4f} bits a byte ({found[name]['lost']:+.2%})")
    return found


def losing(row: dict[str, Any], lost: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a row loses: what was counted; nothing where it is exact and its ids are the same; None: not known."""
    if row["technique"] == "cache" or row["same_ids"]:
        return {"bits_per_byte": lost.get("cache", {}).get("bits_per_byte"), "lost": 0.0}
    return lost.get(row["technique"], {"bits_per_byte": None, "lost": None})


def compared(side: Contender, plain: Contender, alone: dict[int, list[int]], most: int) -> dict[str, Any]:
    """Whether what should be exact says, in up to `most` rows, what each prompt gives by itself by the baseline."""
    import drafting
    from contenders import Contender

    if not side.technique.exact:
        return {"same_ids": None, "differs_at": None, "rows_compared": 0}
    rows = min(side.technique.rows, most)
    alone[0] = plain.ids[0]
    for row in range(len(alone), rows):
        other = Contender(plain.technique, plain.work, first=row)
        other.keep(other.decode(*other.begun))
        alone[row] = other.ids[0]
    differs = drafting.first_difference(side.ids[:rows], [alone[row][: side.num] for row in range(rows)])
    return {"same_ids": differs is None, "differs_at": differs, "rows_compared": rows}


# --- what is shown -------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    what, read = result["settings"], result["ceilings"]["read"]["rate"]
    told = [
        f"{what['new_tokens']} tokens after prompts of {what['prompt_length']} ({result['text']})",
        f"medians of {what['rounds']} rounds",
        f"memory is read at {read:.1f} GB/s",
    ]
    if result["results"][0]["bits_per_byte"] is not None:
        told.append(f"bits a byte in float32 on {what['text_rows']} rows of {what['text_length']}")
    lines = [
        f"{result['model']} in {what['dtype']}: {'; '.join(told)}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|---{'|---:' * (len(COLUMNS) - 2)}|---|",
        *(f"| {' | '.join(cells(row))} |" for row in result["results"]),
        "",
        *(f"- `{row['technique']}`: {row['says']}{fared(row)}." for row in result["results"]),
        *(f"- `{name}` is left out: {why}." for name, why in result["skipped"].items()),
    ]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table, by `COLUMNS`."""
    peak, bits, lost = row["peak_bytes"], row["bits_per_byte"], row["lost"]
    told = "" if lost is None else "0" if lost == 0 else f"{lost:+.2%}"
    return [
        f"`{row['technique']}`",
        digits(row["ms_per_token"]["median"]),
        digits(row["tokens_per_second"]["median"]),
        "1" if row["technique"] == "cache" else spread(row["ratio"]),
        size(row["weight_bytes"]),
        size(row["cache_bytes"]),
        "" if peak is None else size(peak),
        f"{row['share']:.2f}",
        told if bits is None else f"{told} ({bits:.4f})",
        agreed(row),
    ]


def agreed(row: dict[str, Any]) -> str:
    """Whether the ids are the baseline's."""
    if row["same_ids"] is None:
        return "the baseline" if row["technique"] == "cache" else "may differ"
    if row["same_ids"]:
        return "the same" if row["rows_compared"] == row["rows"] else f"the same in {row['rows_compared']} rows"
    at = row["differs_at"]
    return f"differ from token {at['token']}" + (f" of row {at['row']} on" if row["rows"] > 1 else " on")


def fared(row: dict[str, Any]) -> str:
    """How a draft did."""
    told = row["speculation"]
    if told is None:
        return ""
    if told["acceptance_rate"] is None:
        return ", and found nothing to guess"
    own = f", in {size(row['draft_bytes'])} of its own" if row["draft_bytes"] else ""
    return (
        f"{own}: {told['acceptance_rate']:.0%} of what was tried is right, {told['tokens_per_round']:.2f} tokens a pass"
    )


def digits(x: float) -> str:
    """Three digits that count."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def spread(x: dict[str, float]) -> str:
    """A median, and from what to what."""
    return f"{x['median']:.2f} ({x['min']:.2f} to {x['max']:.2f})"


def tell(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)


def plot(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Tokens/s of every technique, and the memory that it takes."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, what = result["results"], result["settings"]
    figure, (speed, held) = plt.subplots(1, 2, figsize=(13, 0.4 * len(rows) + 2), sharey=True, layout="constrained")
    rates = [row["tokens_per_second"]["median"] for row in rows]
    colours = ["tab:gray" if row["technique"] == "cache" else "tab:green" for row in rows]
    ends = [[rate - row["tokens_per_second"]["min"] for rate, row in zip(rates, rows, strict=True)],
            [row["tokens_per_second"]["max"] - rate for rate, row in zip(rates, rows, strict=True)]]  # fmt: skip
    speed.barh(range(len(rows)), rates, xerr=ends, color=colours, error_kw={"linewidth": 0.8, "capsize": 2})
    most = max(row["tokens_per_second"]["max"] for row in rows)
    for i, row in enumerate(rows):
        lost = "" if not row["lost"] else f", {row['lost']:+.2%} bits a byte"
        told = f"{digits(rates[i])} ({row['ratio']['median']:.2f} times{lost})"
        speed.text(row["tokens_per_second"]["max"] + 0.01 * most, i, told, va="center", fontsize=8)
    speed.set(xlim=(0, 1.75 * most), xlabel="tokens/s over all rows", yticks=range(len(rows)))
    speed.set_yticklabels([row["technique"] for row in rows])
    speed.invert_yaxis()
    begin = [0.0] * len(rows)
    for name, label, colour in PARTS:
        width = [(row[name] or 0) / 1e6 for row in rows]
        held.barh(range(len(rows)), width, left=begin, label=label, color=colour)
        begin = [a + b for a, b in zip(begin, width, strict=True)]
    for i, total in enumerate(begin):
        held.text(total + 0.01 * max(begin), i, size(1e6 * total), va="center", fontsize=8)
    held.set(xlim=(0, 1.2 * max(begin)), xlabel="MB")
    held.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8, frameon=False)
    figure.suptitle(
        f"{result['model']} in {what['dtype']}, {what['new_tokens']} tokens after {what['prompt_length']}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
