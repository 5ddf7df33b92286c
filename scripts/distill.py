"""Distils a draft from a model: a small model, or a head on the model's own features, that says what the model would.

    python scripts/distill.py --target builtin --text stdlib --kind model --out /tmp/draft
    python scripts/distill.py --target builtin --text stdlib --kind head --tiny --out /tmp/head --json

--target is whatever `jaxinfer.load` reads. --text is `stdlib` (the text of the built-in model: its held-out files stay
held out), or files and directories of UTF-8 text, of which the last twentieth is held out. Ctrl-C, or a kill at any
moment, loses --save-every seconds at most: the same command goes on from there, bit for bit. In --out it leaves model/
(Hugging Face format, with the target's tokenizer) or head/, both bfloat16; curve.png; and result.json with the expected
acceptance on the held-out text: how likely a drafted token is kept, drawn at temperature 1 and greedily. With --start
a draft goes on learning, on other text or with another --seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import allocation
import jax
import jax.numpy as jnp
import measured
import numpy as np
import runs

import jaxinfer
from jaxinfer import hub, models, training, weights
from jaxinfer.config import ModelConfig
from jaxinfer.text import Tokenizer

KINDS = {  # what differs between them, where nobody says otherwise
    "model": {"steps": 2350, "rate": 0.02, "embed_rate": 0.004},
    "head": {"steps": 1200, "rate": 0.02, "embed_rate": 0.002},
}
TINY = {
    "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn": 24, "files": 2, "steps": 4, "warmup": 1,
    "decay_steps": 2, "eval_every": 2, "batch": 128, "micro": 64, "length": 32, "depths": 2, "most": 1024,
}  # fmt: skip
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.j*")
SHAPE = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn")  # of a model
CURVES = ("train_loss", "held_out_sample")  # of a result
UNROLLED = ("depths", "fade", "feature_weight")  # of a head


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    runs.add_flags(add)
    add("--target", default="builtin", help="builtin, a directory or a hub id")
    add("--text", nargs="+", default=["stdlib"], help="stdlib, or files and directories of text")
    add("--files", type=int, default=0, help="read this many files of each part only (0: all)")
    add("--kind", choices=KINDS, default="model", help="a small model, or a head on the target's features")
    add("--start", help="a draft of this kind and shape to go on from: one of your own, or builtin's for your own text")
    add("--width", type=int, default=128, help="D of a model")
    add("--layers", type=int, default=2, help="L of a model")
    add("--heads", type=int, default=2, help="N of a model")
    add("--kv-heads", type=int, default=1, help="K of a model")
    add("--head-dim", type=int, default=64, help="H of a model")
    add("--ffn", type=int, default=384, help="F of a model")
    add("--depths", type=int, default=3, help="tokens ahead that a head is trained for, on its own guesses")
    add("--fade", type=float, default=0.5, help="what each depth weighs of the one before")
    add("--feature-weight", type=float, default=0.1, help="of the distance between a head's guesses and the features")
    add("--overlap-weight", type=float, default=1.0, help="of -log acceptance, beside the divergence")
    add("--steps", type=int, help=", ".join(f"{kind}: {of['steps']}" for kind, of in KINDS.items()))
    add("--warmup", type=int, default=40, help="steps")
    add("--decay-steps", type=int, help="the last steps, in which the learning rate falls to zero (default: half)")
    add("--batch", type=int, default=1024, help="tokens a step")
    add("--micro", type=int, default=1024, help="tokens a pass; the passes of a step are summed")
    add("--length", type=int, default=512, help="tokens a row")
    add("--rate", type=float, help="peak learning rate of the matrices (Muon)")
    add("--embed-rate", type=float, help="peak learning rate of embedding and norms (Adam)")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    add("--most", type=int, default=0, help="judge on this many tokens of each held-out file only (0: all)")
    if "--tiny" in words:
        parser.set_defaults(**TINY)
    args = parser.parse_args(words)
    for name, value in KINDS[args.kind].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.decay_steps is None:
        args.decay_steps = max(args.steps // 2, 1)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot be trained, before anything is read."""
    runs.check(parser, args, [args.length], *SHAPE, "depths")
    if args.length <= args.depths:
        parser.error(f"--length {args.length} leaves nothing to predict at --depths {args.depths}: lengthen the rows")
    if "stdlib" in args.text and len(args.text) > 1:
        parser.error("--text stdlib stands alone: give it, or files and directories")


@dataclasses.dataclass
class Target:
    """The model that is drafted for, computing in float32 on the weights as they are stored."""

    params: Any
    config: ModelConfig
    tokenizer: Tokenizer
    name: str  # its fingerprint


@dataclasses.dataclass
class Draft:
    """A kind of draft: what it starts from, what it minimises, what is measured."""

    config: ModelConfig
    fresh: Callable[[], Any]  # () -> params
    loss: Callable[..., jax.Array]  # (params, ids, target's params)
    compare: Callable[..., tuple[jax.Array, jax.Array]]  # (params, target's params, ids), see training.Compare
    save: Callable[[Any], pathlib.Path]  # bfloat16 params -> where they are


def main(args: argparse.Namespace) -> int:
    target = read_target(args)
    text, ids = read_text(args, target)
    args.out.mkdir(parents=True, exist_ok=True)
    draft = KIND[args.kind](args, target)
    sizes = {"draft": count(jax.eval_shape(draft.fresh)), "target": count(target.params)}
    tokens = {name: sum(map(len, documents)) for name, documents in ids.items()}
    runs.say(args, f"{tokens['train']} tokens, {tokens['held_out']} held out; "
        f"{sizes['draft']} parameters draft for {sizes['target']}")  # fmt: skip

    unread = runs.FREE | {"most"} | set(UNROLLED if args.kind == "model" else SHAPE)
    settings = {key: value for key, value in vars(args).items() if key not in unread | {"target", "text", "start"}}
    settings |= {"target": target.name, "start": digest(args.start), "jax": jax.__version__, "tokens": tokens}
    params, log = train(args, target, draft, ids, settings)

    # What ships is bfloat16, so that is what is judged: rounded weights, float32 products.
    shipped = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    place = draft.save(shipped)
    figures = judge(args, target, draft, jax.tree.map(lambda a: a.astype(jnp.float32), shipped), ids["held_out"])
    draw_curve(args, log, figures)
    summary = figures | {
        "kind": args.kind,
        "target": args.target if args.target == "builtin" else pathlib.Path(args.target).name,
        "fingerprint": target.name,
        "parameters": sizes,
        "files": {name: len(part) for name, part in text.items()},
        "tokens": tokens,
        "tokens_seen": args.steps * args.batch,
        "epochs": args.steps * args.batch / tokens["train"],
        "seconds": log["seconds"],
        "tokens_per_second": float(np.median(log["rates"])),
        "settings": settings,
        "hardware": measured.hardware(),
        "versions": measured.versions("optax"),
        "command": measured.command("scripts/distill.py"),
        "date": measured.date(),
        "before": result_of(args.start),
    }
    curves = dict(zip(CURVES, ([round(x, 4) for x in log["train"]], log["held_out"]), strict=True))
    (args.out / "result.json").write_text(runs.dumps(summary | curves), encoding="utf-8")
    by_depth = enumerate(zip(figures["acceptance"], figures["greedy_agreement"], strict=True), 1)
    lines = [f"depth {depth}: {kept:.3f} and {same:.3f}" for depth, (kept, same) in by_depth]
    runs.say(args, f"kept of the held-out text's tokens, drawn and greedy: {'; '.join(lines)}")
    runs.say(args, f"wrote {place}, {args.out / 'curve.png'} and {args.out / 'result.json'}")
    if args.json:
        print(json.dumps(summary))
    return 0


def digest(start: str | None) -> str | None:
    """A few characters that name the weights of a draft."""
    if start is None:
        return None
    return hashlib.sha256((hub.locate(start) / "model.safetensors").read_bytes()).hexdigest()[:12]


def result_of(start: str | None) -> dict[str, Any] | None:
    """What the run that left a draft said of itself, where it is a run of this script, without its curves."""
    result = pathlib.Path(start).parent / "result.json" if start else pathlib.Path()
    if not result.is_file():
        return None
    return {key: value for key, value in json.loads(result.read_text()).items() if key not in CURVES}


def count(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def read_target(args: argparse.Namespace) -> Target:
    """The model and its tokenizer. Raises ValueError where they do not fit each other, or the rows."""
    params, config = jaxinfer.load(args.target, dtype=jnp.float32)
    tokenizer = Tokenizer(args.target)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{args.target} has a tokenizer of {tokenizer.vocab_size} tokens and a model of {config.vocab_size}: "
            "take the tokenizer that belongs to it"
        )
    limit = config.num_positions or config.max_length
    if limit and args.length > limit:
        raise ValueError(f"--length is {args.length} but {args.target} has {limit} positions: shorten the rows")
    return Target(params, config, tokenizer, models.fingerprint(params, config))


def read_text(args: argparse.Namespace, target: Target) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """The texts of both parts by their paths, and their ids, each text with what the tokenizer puts around it."""
    corpus = training.read_corpus(args.stdlib) if args.text == ["stdlib"] else training.read_texts(args.text)
    text = {"train": corpus.train, "held_out": corpus.held_out}
    if args.files:
        text = {name: dict(list(part.items())[: args.files]) for name, part in text.items()}
    ids = {
        name: [np.array(target.tokenizer.encode(document), np.int32) for document in part.values()]
        for name, part in text.items()
    }
    most = max((len(document) for document in ids["held_out"]), default=0)
    if most <= args.depths + 1:
        raise ValueError(f"the held-out text has {most} tokens: give more --text")
    return text, ids


# --- the two kinds ------------------------------------------------------------------------------------------------


def draft_model(args: argparse.Namespace, target: Target) -> Draft:
    """A model of Qwen 3's shape with the target's vocabulary."""
    raw = model_config(args, target.config)
    config = models.config_from_hf(raw)

    def save(params: Any) -> pathlib.Path:
        training.save_huggingface(args.out / "model", params, raw)
        for path in (path for pattern in TOKENIZER for path in target.tokenizer.directory.glob(pattern)):
            shutil.copyfile(path, args.out / "model" / path.name)
        return args.out / "model"

    start = read_start(args.start, config) if args.start else None

    def fresh() -> Any:
        if start is not None:
            return jax.tree.map(jnp.copy, start)  # a step spends what it is given
        return training.begin_model(config, target.params, target.config, jax.random.key(args.seed))

    return Draft(
        config,
        fresh,
        lambda params, ids, teacher: training.model_loss(
            params, config, teacher, target.config, ids, args.overlap_weight
        ),
        lambda params, teacher, ids: training.compare_model(params, config, teacher, target.config, ids),
        save,
    )


def read_start(name: str, config: ModelConfig) -> Any:
    """float32 params of a draft model of this shape. Raises ValueError for one of another."""
    params, found = jaxinfer.load(name, dtype=jnp.float32)
    wrong = [key for key in ("vocab_size", "width", "layers", "tied") if getattr(found, key) != getattr(config, key)]
    if wrong:
        raise ValueError(f"--start {name} has another shape (its {wrong[0]} differs): give the flags it was made with")
    return params


def model_config(args: argparse.Namespace, target: ModelConfig) -> dict[str, Any]:
    """config.json of a draft model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": target.vocab_size,
        "hidden_size": args.width,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": target.max_length or args.length,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": target.bos_id,
        "eos_token_id": target.stop_ids[0] if len(target.stop_ids) == 1 else list(target.stop_ids),
        "torch_dtype": "bfloat16",
    }


def draft_head(args: argparse.Namespace, target: Target) -> Draft:
    """A head on the target's features."""
    config = models.head_config(target.config)
    start = read_start_head(args.start, target) if args.start else None
    unrolled = {name: getattr(args, name) for name in UNROLLED}

    def save(params: Any) -> pathlib.Path:
        weights.save_head(args.out / "head", params, config, target.name)
        return args.out / "head"

    return Draft(
        config,
        lambda: training.begin_head(target.params, target.config) if start is None else jax.tree.map(jnp.copy, start),
        lambda params, ids, teacher: training.head_loss(
            params, config, teacher, target.config, ids, **unrolled, overlap_weight=args.overlap_weight
        ),
        lambda params, teacher, ids: training.compare_head(
            params, config, teacher, target.config, ids, depths=args.depths
        ),
        save,
    )


def read_start_head(name: str, target: Target) -> Any:
    """float32 params of a head for this target. Raises ValueError for one that was trained for another."""
    params, _, other = weights.load_head(name, jnp.float32)
    if other != target.name:
        raise ValueError(f"--start {name} was trained for {other}, not for {target.name}: start from a head of its own")
    return params


KIND = {"model": draft_model, "head": draft_head}


# --- the run ------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, target: Target, draft: Draft, ids: dict[str, list[np.ndarray]], settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Takes the run to its last step: (params in float32, log)."""
    optimizer = training.muon(args.rate, args.embed_rate, args.steps, args.warmup, args.decay_steps, args.weight_decay)
    step_of = training.make_step(draft.loss, optimizer)
    batches = training.Batches(ids["train"], args.length, args.seed)
    look = held_out_sample(args, target, draft, ids["held_out"])

    def fresh() -> Any:
        params = draft.fresh()
        return params, optimizer.init(params)

    def advance(state: Any, step: int) -> Any:
        batch = runs.rows(batches, step * (args.batch // args.length), args)
        return step_of(state, jnp.asarray(batch), target.params)

    def shown(log: dict[str, Any]) -> dict[str, str]:
        kept = {"acceptance": f"{log['held_out'][-1][1][0][0]:.3f}"} if log["held_out"] else {}
        return {"kl": f"{log['train'][-1]:.3f}"} | kept

    return runs.go(args, settings, fresh, advance, look, float, shown, lambda log: draw_curve(args, log))


def held_out_sample(
    args: argparse.Namespace, target: Target, draft: Draft, documents: list[np.ndarray]
) -> Callable[[Any], tuple[list[float], list[float]]]:
    """A function params -> (acceptance, agreement) by depth, of some windows that lie evenly over the held-out text."""
    joined = np.concatenate(documents)
    first = np.linspace(0, max(len(joined) - args.length - 1, 0), 2 if args.tiny else 16).astype(int)
    windows = [joined[i : i + args.length + 1] for i in first]
    compare = jax.jit(draft.compare)

    def look(params: Any) -> tuple[list[float], list[float]]:
        kept, same, _ = training.held_out_acceptance(
            lambda ids: compare(params, target.params, ids), windows, args.length, 2
        )
        return [round(x, 4) for x in kept], [round(x, 4) for x in same]

    return look


def judge(
    args: argparse.Namespace, target: Target, draft: Draft, params: Any, documents: list[np.ndarray]
) -> dict[str, Any]:
    """Expected acceptance and greedy agreement on the held-out text, by depth."""
    compare = jax.jit(draft.compare)
    if args.most:
        documents = [document[: args.most] for document in documents]
    kept, same, counted = training.held_out_acceptance(
        lambda ids: compare(params, target.params, ids), documents, args.length, 2
    )
    return {
        "acceptance": kept,
        "greedy_agreement": same,
        "context": f"windows of {args.length} tokens that do not overlap, each file from its start; acceptance is the "
        "mean of sum_x min(p(x), q(x)), by depth: a head's depth d is fed its own guesses and the text's tokens",
        "predictions": counted,
    }


def draw_curve(args: argparse.Namespace, log: dict[str, Any], figures: dict[str, Any] | None = None) -> None:
    """Acceptance by depth, and the loss, over the tokens seen."""
    millions = args.batch / 1e6
    with runs.picture(args.out / "curve.png") as axes:
        loss = axes.twinx()
        loss.plot([millions * (i + 1) for i in range(len(log["train"]))], log["train"], lw=0.5, color="lightgray")
        loss.set(ylim=(0, None), ylabel="training loss, nats (gray, each step)")
        loss.set_zorder(-1)
        axes.patch.set_visible(False)
        points = [(millions * step, kept) for step, (kept, _) in log["held_out"]]
        for depth in range(len(points[0][1]) if points else 0):
            seen, kept = zip(*((x, kept[depth]) for x, kept in points), strict=True)
            (line,) = axes.plot(seen, kept, "o-", ms=3, label=f"depth {depth + 1}")
            if figures is not None:
                axes.plot([millions * args.steps], [figures["acceptance"][depth]], "*", ms=11, color=line.get_color())
        title = f"a draft {args.kind}: a sample of the held-out text (* all of it, in bfloat16)"
        axes.set(xlabel="million tokens seen", ylabel="acceptance", ylim=(0, 1), title=title)


if __name__ == "__main__":
    arguments = parse_args()
    allocation.begin_anew(allocation.KEPT)
    runs.tell("distill.py", lambda: main(arguments))
