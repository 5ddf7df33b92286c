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
import os
import pathlib
import platform
import shlex
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

from jaxinfer import models, training

# XLA allocates what a step needs at every step. glibc gives such large blocks back to the kernel at once, which then
# clears them again page by page: 2508 tokens/s; kept, and in huge pages, 4332 (2 cores, Zen 5). Read at exec only.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
TINY = {
    "vocab_size": 512, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 64, "files": 12,
    "steps": 8, "warmup": 2, "final_steps": 3, "decay_steps": 4, "eval_every": 4,
    "batch": 512, "micro": 256, "length": 64, "final_length": 128,
}  # fmt: skip
FREE = {"out", "stdlib", "save_every", "eval_every", "stop_after", "no_progress", "json", "tiny"}  # change no result


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="directory of the run; an interrupted run in it goes on")
    add("--stdlib", help="standard library to read (default: this Python's own)")
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
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=50, help="steps between looks at some of the held-out text")
    add("--save-every", type=float, default=180, help="seconds between checkpoints")
    add("--stop-after", type=int, default=0, help="save and leave after this step, as Ctrl-C does (0: do not)")
    add("--tiny", action="store_true", help="a toy that is done in seconds")
    add("--no-progress", action="store_true")
    add("--json", action="store_true", help="the last line of stdout is one JSON object")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses what cannot be trained, before anything is read."""
    for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "ffn", "steps", "batch", "micro"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.vocab_size < 257:
        parser.error(f"--vocab-size is {args.vocab_size}: 256 bytes and one special token need at least 257")
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is no multiple of --kv-heads {args.kv_heads}: choose one that divides it")
    if args.head_dim % 2:
        parser.error(f"--head-dim is {args.head_dim}: rope turns pairs, so it must be even")
    for length in (args.length, args.final_length):
        if length < 1 or args.micro % length:
            parser.error(f"--micro {args.micro} is no multiple of {length} tokens a row: choose one that is")
    if args.batch % args.micro:
        parser.error(f"--batch {args.batch} is no multiple of --micro {args.micro}: choose one that is")
    if args.warmup < 0 or args.decay_steps < 1 or args.warmup + args.decay_steps > args.steps:
        parser.error(f"--warmup {args.warmup} and --decay-steps {args.decay_steps} exceed --steps {args.steps}")
    if not 0 <= args.final_steps <= args.steps:
        parser.error(f"--final-steps is {args.final_steps}: it is between 0 and --steps {args.steps}")
    if args.final_length < args.length:
        parser.error(f"--final-length {args.final_length} is less than --length {args.length}: rows only grow")


def keep_memory() -> None:
    """Starts this process anew with the malloc settings above, where glibc reads them and nobody set others."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": MALLOC})


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
    say(args, f"{text.files['train']} files, {text.tokens['train']} tokens of {text.bytes_per_token:.2f} bytes; "
        f"held out {text.files['held_out']} files, {text.bytes['held_out']} bytes, xz -9 {text.xz:.3f} bits/byte; "
        f"{num_params} parameters")  # fmt: skip

    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings |= {"jax": jax.__version__, "tokens": text.tokens}
    nats = jax.jit(lambda params, ids: training.token_nats(params, config, ids))
    params, log = train(args, text, config, settings, nats)

    # What ships is bfloat16, so that is what is judged: rounded weights, float32 products.
    shipped = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    training.save_huggingface(args.out / "model", shipped, raw, text.tokenizer)
    figures = judge(args, text, nats, jax.tree.map(lambda a: a.astype(jnp.float32), shipped))
    draw_curve(args.out / "curve.png", args, log, text.xz, figures["bits_per_byte"])
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
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "command": "python scripts/train.py " + shlex.join(own_words(sys.argv[1:])),
    }
    curves = {
        "train_bits_per_byte": [round(x, 4) for x in log["train"]],
        "held_out_sample_bits_per_byte": [[step, round(x, 4)] for step, x in log["held_out"]],
    }
    (args.out / "result.json").write_text(dumps(summary | curves), encoding="utf-8")
    say(args, f"held out: {summary['bits_per_byte']:.4f} bits/byte (xz -9: {text.xz:.4f}); by position "
        + ", ".join(f"{p['from']}-{p['to']}: {p['bits_per_byte']:.3f}" for p in summary["by_position"]))  # fmt: skip
    say(args, f"wrote {args.out / 'model'}, {args.out / 'curve.png'} and {args.out / 'result.json'}")
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
    train_step = training.make_step(lambda params, ids: training.loss(params, config, ids), optimizer)
    batches = {n: training.Batches(text.train, n, args.seed) for n in {args.length, args.final_length}}
    look = held_out_sample(args, text, nats)
    file = args.out / "checkpoint.npz"
    state, log = start(args, file, settings, config, optimizer)
    step, before = log["step"], log["seconds"]
    asked: list[int] = []
    # a step is seconds long: a signal waits for its end, a second one does not
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (asked.append(number), signal.signal(number, signal.SIG_DFL)))
    show = tqdm(total=args.steps, initial=step, disable=args.no_progress, unit="step", mininterval=1)
    saved = began = time.monotonic()
    while step < args.steps:
        tick = time.monotonic()
        state, loss = train_step(state, jnp.asarray(draw(args, batches, step)))
        loss = float(loss)
        step += 1
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} after step {step}: lower --rate and --embed-rate, in a fresh --out")
        log["train"].append(loss / math.log(2) / text.bytes_per_token)
        log["rates"].append(round(args.batch / (time.monotonic() - tick), 1))
        if step % args.eval_every == 0 or step == args.steps:
            log["held_out"].append([step, look(state[0])])
        log |= {"step": step, "seconds": before + time.monotonic() - began}
        shown = {"loss": f"{loss:.3f}", "bpb": f"{log['train'][-1]:.3f}", "tokens/s": f"{log['rates'][-1]:.0f}"}
        shown |= {"held_out": f"{log['held_out'][-1][1]:.3f}"} if log["held_out"] else {}
        show.set_postfix(shown, refresh=False)
        show.update()
        leaving = asked or step == args.stop_after
        if leaving or step == args.steps or time.monotonic() - saved > args.save_every:
            training.save(file, state, log | {"settings": settings})
            draw_curve(args.out / "curve.png", args, log, text.xz)
            saved = time.monotonic()
        if leaving and step < args.steps:
            raise KeyboardInterrupt(f"saved after step {step} of {args.steps}: the same command goes on from there")
    show.close()
    return state[0], log


def start(
    args: argparse.Namespace, file: pathlib.Path, settings: dict, config: Any, optimizer: Any
) -> tuple[tuple[Any, Any], dict]:
    """The state at step 0, or where a checkpoint of the same settings left off: (state, log)."""

    def fresh():
        params = models.init_params(config, jax.random.key(args.seed), jnp.float32)
        # A block that adds nothing at first: depth costs nothing then, and Muon fills it in a few steps.
        layers = tuple(p | {"o": jnp.zeros_like(p["o"]), "down": jnp.zeros_like(p["down"])} for p in params["layers"])
        # The embedding is the head too: at its usual size every token would first predict itself, sixteen to nothing.
        params = params | {"layers": layers, "embed": params["embed"] * 0.3}
        return params, optimizer.init(params)

    if not file.exists():
        return fresh(), {"step": 0, "seconds": 0.0, "train": [], "rates": [], "held_out": []}
    notes = training.read_notes(file)
    old = notes["settings"]
    # Until the rows grow or the rate falls, a run does not know how long it will be.
    level = min(s["steps"] - max(s["final_steps"], s["decay_steps"]) for s in (old, settings))
    free = {"steps", "final_steps", "decay_steps"} if notes["step"] <= level else set()
    wrong = [key for key, value in settings.items() if old.get(key) != value and key not in free]
    if wrong:
        changes = ", ".join(f"{key} {old.get(key)!r} (now {settings[key]!r})" for key in wrong)
        raise ValueError(f"{file} was made with {changes}: give the same settings, or a fresh --out")
    state, log = training.restore(file, jax.eval_shape(fresh))
    del log["settings"]
    say(args, f"going on after step {log['step']} of {args.steps}")
    return state, log


def draw(args: argparse.Namespace, batches: dict[int, Any], step: int) -> np.ndarray:
    """The batch of a step: [passes, rows of a pass, length + 1]."""
    turn = args.steps - args.final_steps
    length, since = (args.length, step) if step < turn else (args.final_length, step - turn)
    rows = args.batch // length
    return batches[length](since * rows, rows).reshape(-1, args.micro // length, length + 1)


def held_out_sample(args: argparse.Namespace, text: Text, nats: Any) -> Any:
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


def say(args: argparse.Namespace, line: str) -> None:
    """Progress goes to stderr, so that stdout ends with the JSON."""
    if not args.no_progress:
        print(line, file=sys.stderr, flush=True)


def rates(args: argparse.Namespace, every: list[float]) -> dict[str, float]:
    """Median tokens/s of the steps, by the length of their rows."""
    turn = args.steps - args.final_steps
    parts = {args.length: every[:turn], args.final_length: every[turn:]}
    return {str(length): float(np.median(part)) for length, part in parts.items() if part}


def dumps(value: dict[str, Any]) -> str:
    """JSON with one line to a key."""
    return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n}\n"


def hardware() -> str:
    """The processor, in words."""
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0] if names else name
    return f"{os.cpu_count()} cores, {name}"


def own_words(words: list[str]) -> list[str]:
    """The command line without this machine's directories."""
    return [pathlib.Path(word).name if os.path.isabs(word) else word for word in words]


def draw_curve(path: pathlib.Path, args: argparse.Namespace, log: dict, xz: float, final: float | None = None) -> None:
    """Bits per byte over the tokens seen: training, held out, and what xz needs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=110)
    millions = args.batch / 1e6
    axes.plot([millions * (i + 1) for i in range(len(log["train"]))], log["train"], lw=0.7, label="train (each step)")
    if log["held_out"]:
        seen, bits = zip(*((millions * step, value) for step, value in log["held_out"]), strict=True)
        axes.plot(seen, bits, "o-", ms=3, label="held out (a sample)")
    axes.axhline(xz, color="gray", ls="--", label=f"xz -9 on held out: {xz:.3f}")
    if final is not None:
        axes.plot([millions * args.steps], [final], "k*", ms=11, label=f"all of held out, bfloat16: {final:.3f}")
    axes.set(xlabel="million tokens seen", ylabel="bits per byte", ylim=(0.6, 3.0), title="jaxinfer's built-in model")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    draft = path.with_suffix(".partial.png")
    figure.savefig(draft)
    plt.close(figure)
    os.replace(draft, path)


if __name__ == "__main__":
    arguments = parse_args()
    keep_memory()
    try:
        sys.exit(main(arguments))
    except KeyboardInterrupt as stop:
        sys.exit(f"\n{stop}" if stop.args else "\nstopped: the same command goes on from the last checkpoint")
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
