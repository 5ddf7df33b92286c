"""Trains the built-in model from Python's own standard library: data, vocabulary, model, held-out bits per byte.

    python scripts/train.py --out /tmp/builtin
    python scripts/train.py --out /tmp/tiny --tiny --json

The text is the source of one CPython version (jaxinfer/training/stdlib-3.11.7.json names and hashes every file), so run
it under that version, or point --stdlib at its Lib directory. Ctrl-C, or a kill at any moment, loses a few minutes at
most: the same command goes on where the last checkpoint was, bit for bit. In --out it leaves model/ (Hugging Face
format, bfloat16), curve.png and result.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import allocation
import jax
import jax.numpy as jnp
import measured
import numpy as np
import runs
from tokenizers import Tokenizer

from jaxinfer import models, training

TINY = {
    "vocab_size": 512, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64, "files": 12,
    "steps": 8, "warmup": 2, "final_steps": 3, "decay_steps": 4, "eval_every": 4,
    "batch": 512, "micro": 256, "length": 64, "final_length": 128,
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    runs.add_flags(add)
    add("--files", type=int, default=0, help="train on this many files only (0: all)")
    add("--vocab-size", type=int, default=4096)
    add("--width", type=int, default=256, help="D")
    add("--layers", type=int, default=8, help="L")
    add("--heads", type=int, default=4, help="N")
    add("--kv-heads", type=int, default=2, help="K")
    add("--head-dim", type=int, default=64, help="H")
    add("--ffn", type=int, default=768, help="F")
    add("--steps", type=int, default=1150)
    add("--warmup", type=int, default=60, help="steps")
    add("--batch", type=int, default=8192, help="tokens a step")
    add("--micro", type=int, default=1024, help="tokens a pass; the passes of a step are summed")
    add("--length", type=int, default=512, help="tokens a row sees at first")
    add("--final-length", type=int, default=1024, help="tokens a row sees in the last part of the steps")
    add("--final-steps", type=int, default=200, help="how many steps that is")
    add("--decay-steps", type=int, default=450, help="the last steps, in which the learning rate falls to zero")
    add("--rate", type=float, default=0.02, help="peak learning rate of the matrices (Muon)")
    add("--embed-rate", type=float, default=0.004, help="peak learning rate of embedding and norms (Adam)")
    add("--weight-decay", type=float, default=0.1, help="of the matrices")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot be trained, before anything is read."""
    lengths = [args.length, args.final_length]
    runs.check(parser, args, lengths, "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn")
    if args.vocab_size < 257:
        parser.error(f"--vocab-size is {args.vocab_size}: 256 bytes and one special token need at least 257")
    if not 0 <= args.final_steps <= args.steps:
        parser.error(f"--final-steps is {args.final_steps}: it is between 0 and --steps {args.steps}")
    if args.final_length < args.length:
        parser.error(f"--final-length {args.final_length} is less than --length {args.length}: rows only grow")


def model_config(args: argparse.Namespace) -> dict:
    """config.json of the model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": args.vocab_size,
        "hidden_size": args.width,
        "intermediate_size": args.ffn,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": max(args.length, args.final_length),
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


@dataclasses.dataclass
class Text:
    """The corpus as ids, and what it is measured by."""

    tokenizer: Tokenizer
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    files: dict[str, int]
    bytes: dict[str, int]
    tokens: dict[str, int]
    xz: float  # bits per byte of the held-out text

    @property
    def bytes_per_token(self) -> float:
        """Of the training text."""
        return self.bytes["train"] / self.tokens["train"]


def main(args: argparse.Namespace) -> int:
    args.out.mkdir(parents=True, exist_ok=True)
    text = read_text(args)
    raw = model_config(args)
    config = models.config_from_hf(raw)  # computes in float32: bfloat16 has a slower backward pass on this CPU
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(models.param_shapes(config)))
    runs.say(args, f"{text.files['train']} files, {text.tokens['train']} tokens of {text.bytes_per_token:.2f} bytes; "
        f"held out {text.files['held_out']} files, {text.bytes['held_out']} bytes, xz -9 {text.xz:.3f} bits/byte; "
        f"{num_params} parameters")  # fmt: skip

    settings = {key: value for key, value in vars(args).items() if key not in runs.FREE}
    settings |= {"jax": jax.__version__, "tokens": text.tokens}
    nats = jax.jit(lambda params, ids: training.token_nats(params, config, ids))
    params, log = train(args, text, config, settings, nats)

    # What ships is bfloat16, so that is what is judged: rounded weights, float32 products.
    shipped = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    training.save_huggingface(args.out / "model", shipped, raw, text.tokenizer)
    figures = judge(args, text, nats, jax.tree.map(lambda a: a.astype(jnp.float32), shipped))
    draw_curve(args, log, text.xz, figures["bits_per_byte"])
    summary = figures | {
        "parameters": num_params,
        "files": text.files,
        "bytes": text.bytes,
        "tokens": text.tokens,
        "tokens_seen": args.steps * args.batch,
        "epochs": args.steps * args.batch / text.tokens["train"],
        "seconds": log["seconds"],
        "tokens_per_second": rates(args, log["rates"]),
        "settings": settings,
        "hardware": measured.hardware(),
        "versions": measured.versions("optax"),
        "command": measured.command("scripts/train.py"),
    }
    curves = {
        "train_bits_per_byte": [round(x, 4) for x in log["train"]],
        "held_out_sample_bits_per_byte": [[step, round(x, 4)] for step, x in log["held_out"]],
    }
    (args.out / "result.json").write_text(runs.dumps(summary | curves), encoding="utf-8")
    runs.say(args, f"held out: {summary['bits_per_byte']:.4f} bits/byte (xz -9: {text.xz:.4f}); by position "
        + ", ".join(f"{p['from']}-{p['to']}: {p['bits_per_byte']:.3f}" for p in summary["by_position"]))  # fmt: skip
    runs.say(args, f"wrote {args.out / 'model'}, {args.out / 'curve.png'} and {args.out / 'result.json'}")
    if args.json:
        print(json.dumps(summary))
    return 0


def read_text(args: argparse.Namespace) -> Text:
    """Reads and checks the library, trains the vocabulary on the training part, and encodes both parts."""
    corpus = training.read_corpus(args.stdlib)
    parts = {"train": corpus.train, "held_out": corpus.held_out}
    if args.files:
        parts = {name: dict(list(files.items())[: args.files]) for name, files in parts.items()}
    tokenizer = training.train_tokenizer(parts["train"].values(), args.vocab_size)
    size = tokenizer.get_vocab_size()
    if size != args.vocab_size:
        raise ValueError(f"the text gives a vocabulary of {size}, not {args.vocab_size}: lower --vocab-size")
    ids = {name: training.encode(tokenizer, files.values()) for name, files in parts.items()}
    return Text(
        tokenizer,
        **ids,
        files={name: len(files) for name, files in parts.items()},
        bytes={name: sum(len(file.encode()) for file in files.values()) for name, files in parts.items()},
        tokens={name: sum(map(len, documents)) for name, documents in ids.items()},
        xz=training.xz_bits_per_byte(parts["held_out"]),
    )


def train(args: argparse.Namespace, text: Text, config: Any, settings: dict, nats: Any) -> tuple[Any, dict]:
    """Takes the run to its last step: (params in float32, log). KeyboardInterrupt when it is asked to leave before."""
    optimizer = training.muon(args.rate, args.embed_rate, args.steps, args.warmup, args.decay_steps, args.weight_decay)
    step_of = training.make_step(lambda params, ids: training.loss(params, config, ids), optimizer)
    batches = {n: training.Batches(text.train, n, args.seed) for n in {args.length, args.final_length}}

    def fresh() -> Any:
        params = models.init_params(config, jax.random.key(args.seed), jnp.float32)
        # A block that adds nothing at first: depth costs nothing then, and Muon fills it in a few steps.
        layers = tuple(p | {"o": jnp.zeros_like(p["o"]), "down": jnp.zeros_like(p["down"])} for p in params["layers"])
        # The embedding is the head too: at its usual size every token would first predict itself, sixteen to nothing.
        params = params | {"layers": layers, "embed": params["embed"] * 0.3}
        return params, optimizer.init(params)

    def shown(log: dict) -> dict[str, str]:
        held_out = {"held_out": f"{log['held_out'][-1][1]:.3f}"} if log["held_out"] else {}
        loss = log["train"][-1] * math.log(2) * text.bytes_per_token
        return {"loss": f"{loss:.3f}", "bpb": f"{log['train'][-1]:.3f}"} | held_out

    return runs.go(
        args,
        settings,
        fresh,
        lambda state, step: step_of(state, jnp.asarray(draw(args, batches, step))),
        held_out_sample(args, text, nats),
        lambda loss: loss / math.log(2) / text.bytes_per_token,
        shown,
        lambda log: draw_curve(args, log, text.xz),
    )


def draw(args: argparse.Namespace, batches: dict[int, Any], step: int) -> np.ndarray:
    """The batch of a step: [passes, rows of a pass, length + 1]."""
    turn = args.steps - args.final_steps
    length, since = (args.length, step) if step < turn else (args.final_length, step - turn)
    return runs.rows(batches[length], since * (args.batch // length), args)


def held_out_sample(args: argparse.Namespace, text: Text, nats: Any) -> Callable[[Any], float]:
    """A function params -> bits per byte of some windows that lie evenly over the held-out text."""
    window = max(args.length, args.final_length)
    joined = np.concatenate(text.held_out)
    first = np.linspace(0, len(joined) - window - 1, 2 if args.tiny else 16).astype(int)
    ids = np.stack([joined[i : i + window + 1] for i in first])
    size = training.token_bytes(text.tokenizer)[ids[:, 1:]].sum()

    def look(params: Any) -> float:
        spent = sum(float(nats(params, jnp.asarray(ids[i : i + 2])).sum()) for i in range(0, len(ids), 2))
        return spent / math.log(2) / float(size)

    return look


def judge(args: argparse.Namespace, text: Text, nats: Any, params: Any) -> dict[str, Any]:
    """Bits per byte over all of the held-out text, and by position."""
    window = max(args.length, args.final_length)
    bits, counted = training.held_out_bits(nats, params, text.held_out, text.bytes["held_out"], window, window // 2)
    sizes = training.token_bytes(text.tokenizer)
    return {
        "bits_per_byte": bits,
        "xz_bits_per_byte": text.xz,
        "context": f"windows of {window} tokens that move on by {window // 2}, what is new in each is counted: every "
        f"token once, with at least {window // 2} tokens before it or else all that its file has",
        "tokens_counted": counted,
        "by_position": training.position_bits(nats, params, text.held_out, sizes, window),
    }


def rates(args: argparse.Namespace, every: list[float]) -> dict[str, float]:
    """Median tokens/s of the steps, by the length of their rows."""
    turn = args.steps - args.final_steps
    parts = {args.length: every[:turn], args.final_length: every[turn:]}
    return {str(length): float(np.median(part)) for length, part in parts.items() if part}


def draw_curve(args: argparse.Namespace, log: dict, xz: float, final: float | None = None) -> None:
    """Bits per byte over the tokens seen: training, held out, and what xz needs."""
    millions = args.batch / 1e6
    with runs.picture(args.out / "curve.png") as axes:
        axes.plot(
            [millions * (i + 1) for i in range(len(log["train"]))], log["train"], lw=0.7, label="train (each step)"
        )
        if log["held_out"]:
            seen, bits = zip(*((millions * step, value) for step, value in log["held_out"]), strict=True)
            axes.plot(seen, bits, "o-", ms=3, label="held out (a sample)")
        axes.axhline(xz, color="gray", ls="--", label=f"xz -9 on held out: {xz:.3f}")
        if final is not None:
            axes.plot([millions * args.steps], [final], "k*", ms=11, label=f"all of held out, bfloat16: {final:.3f}")
        title = "jaxinfer's built-in model"
        axes.set(xlabel="million tokens seen", ylabel="bits per byte", ylim=(0.6, 3.0), title=title)


if __name__ == "__main__":
    arguments = parse_args()
    allocation.begin_anew(allocation.KEPT)
    runs.tell("train.py", lambda: main(arguments))
