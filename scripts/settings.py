"""The settings of decode.py, and which of them contradict each other."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import sys

import runtime
from flags import dashed, setting

import jaxinfer

FLOATS = ("float32", "bfloat16", "float16")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SOURCES = ("prompt", "prompt_file", "prompt_length")
NEW_TOKENS = 128
TEMPERATURE = 0.7  # small models, the built-in one too, say the same words over and over when they are greedy
TRACED = 8  # tokens of the dispatch that --profile looks at
DRAFTING = ("num_draft_tokens", "draft_tree", "rule", "adaptive", "compare")  # settings of a draft
DRAFT_TOKENS = 4
RULES = ("shared", "token", "block")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(runtime.Machine):
    """All settings of a run: each is a flag, and may stand in a preset (--config FILE) under its name here."""

    model: str | None = setting(None, "'builtin' (the default), a directory, or a hub id")
    random_weights: str | None = setting(None, "instead: random weights of a shape (.toml, .json)", metavar="CONFIG")
    dtype: str = setting("auto", "of the weights (default: as stored)", choices=("auto", *FLOATS))
    quantize: str | None = setting(
        None,
        "weights in codes: int8, or int4:group=32 (then logits' matrix is int8); int8:dynamic and int4:dynamic round "
        "what they are multiplied with too, which is faster on some CPUs",
        metavar="FORM",
    )
    prompt: tuple[str, ...] = setting((), "text to continue; several are several rows", metavar="TEXT")
    prompt_file: str | None = setting(None, "a prompt from a file (- is stdin), less its last newline", metavar="FILE")
    prompt_length: int | None = setting(None, "a prompt of N random ids", metavar="N")
    chat: bool = setting(False, "prompts are a user's first words; without any, turns are read from stdin")
    num_samples: int = setting(1, "of each prompt, with the seeds seed, seed + 1, ...", metavar="N")
    max_new_tokens: int | None = setting(None, f"of each row (default {NEW_TOKENS}; in a chat what fits)", metavar="N")
    min_new_tokens: int = setting(0, "no stop id before so many", metavar="N")
    sampling_defaults: bool = setting(False, "sample as the checkpoint recommends")
    temperature: float | None = setting(None, f"of the draws; 0 is greedy (default {TEMPERATURE})")
    top_k: int | None = setting(None, "only the k best ids")
    top_p: float | None = setting(None, "only the best ids that hold this mass")
    min_p: float | None = setting(None, "only ids at least so many times as probable as the best")
    repetition_penalty: float | None = setting(None, "divides logits of ids seen in prompt or output")
    presence_penalty: float | None = setting(None, "taken from logits of ids seen in the output")
    frequency_penalty: float | None = setting(None, "the same, for each time they were seen")
    logit_bias: tuple[str, ...] = setting((), "added to the logit of an id", metavar="ID=VALUE")
    stop: tuple[str, ...] = setting((), "end a row before this text", metavar="TEXT")
    seed: int = setting(0, "of the draws (default 0)")
    cache: str = setting(
        "auto",
        "kind of KV cache: auto (default: rings where layers have windows), dense, ring:window=W,sinks=n, "
        "paged:page=16, streaming:sinks=4,recent=252, h2o:budget=256,recent=128, snapkv:budget=256; and in which "
        "numbers: +int8, +float8, +int4:group=32,residual=128",
        metavar="KIND",
    )
    cache_dtype: str = setting("auto", "of keys and values (default: the model's)", choices=("auto", *FLOATS))
    max_length: int | None = setting(None, "positions of the cache (default: what is needed)", metavar="S")
    prefill_chunk: int = setting(512, "prompt tokens a dispatch (default 512)", metavar="T")
    draft: str | None = setting(
        None,
        "guesses tokens, which the model verifies: ngram, layers:N (the model's own first), head:builtin, "
        "head:DIRECTORY, builtin, or another model's directory or hub id",
        metavar="DRAFT",
    )
    num_draft_tokens: int | None = setting(None, f"it guesses a round (default {DRAFT_TOKENS})", metavar="J")
    draft_tree: str | None = setting(None, "instead: guesses after each of a level, such as 4,2,1", metavar="WIDTHS")
    rule: str | None = setting(
        None,
        "of accepting a guess: shared (default) says what the model alone would; token and block accept more of what "
        "is sampled, and say something else of the same law",
        choices=RULES,
    )
    adaptive: bool = setting(False, "guess as many tokens as pays, by what was accepted of late")
    compare: bool = setting(False, "afterwards measure the speed-up: the same prompts, with the draft and without")
    plan: bool = setting(False, "only say what memory weights and cache take, and how much more would fit")
    memory: str | None = setting(None, "of --plan: instead of what is free here, such as 80GB", metavar="SIZE")
    aot: str | None = setting(
        None,
        "keep compiled programs in DIR, so that a restart with these settings compiles nothing and traces no model; "
        "trust DIR like a program, for what lies there is unpickled and run",
        metavar="DIR",
    )
    profile: str | None = setting(None, "write a jax.profiler trace of a few warm steps", metavar="DIR")
    stream: bool = setting(True, "show the text as it is made; otherwise it is made in one dispatch")
    json: bool = setting(False, "the report as JSON, on the last line of stdout")

    @property
    def interactive(self) -> bool:
        """Whether the user's turns come from stdin."""
        return self.chat and not (self.prompt or self.prompt_file)

    @property
    def title(self) -> str:
        """What the model is called."""
        return pathlib.Path(self.random_weights).stem if self.random_weights else self.name

    @property
    def stored(self) -> str | None:
        """The dtype of the weights; None: as stored."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def kept(self) -> str | None:
        """Where JAX keeps programs: of --aot the small ones, which are traced at every start."""
        return self.aot and os.path.join(os.path.expanduser(self.aot), "jax")

    @property
    def name(self) -> str:
        """The checkpoint's."""
        return self.model or "builtin"


def check(args: Settings) -> None:
    """Refuses what contradicts itself, before anything heavy is imported."""
    given = [name for name in SOURCES if getattr(args, name) not in ((), None)]
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(map(dashed, given))} contradict each other: give one of them")
    if not (given or args.chat or args.random_weights or args.plan):
        raise ValueError("there is nothing to continue: give --prompt, --prompt-file, --prompt-length or --chat")
    if "" in args.prompt:
        raise ValueError(f"prompt {args.prompt.index('') + 1} is empty: give it some text")
    apart: dict[str, tuple[str, ...]] = {}
    if args.random_weights:
        apart["random_weights"] = ("model", "prompt", "prompt_file", "chat", "stop", "sampling_defaults")
    if args.interactive:
        apart["chat (without a prompt)"] = ("num_samples", "stream", "json", "profile", "compare")
    if args.chat:
        apart["chat"] = ("prompt_length",)
    for flag, others in apart.items():
        for name in others:
            usual = getattr(Settings(), name)
            if getattr(args, name) != usual:
                other = f"--{'no-' if usual is True else ''}{dashed(name)}"
                raise ValueError(f"--{dashed(flag)} and {other} contradict each other: leave one of them out")
    for name in ("num_samples", "max_new_tokens", "prompt_length", "max_length", "prefill_chunk", "num_draft_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{dashed(name)} is {value}: it must be at least 1")
    most = args.max_new_tokens or (sys.maxsize if args.interactive else NEW_TOKENS)
    if args.min_new_tokens > most:
        raise ValueError(f"--min-new-tokens {args.min_new_tokens} is more than --max-new-tokens {most}: lower it")
    if args.several and args.interactive:
        raise ValueError("--chat without a prompt reads one process's stdin: give --prompt, or run it in one process")
    if args.several and args.prompt_file == "-":
        raise ValueError("--prompt-file - reads one process's stdin: give --prompt, or a file that every process has")
    if args.profile and most < 1 + 2 * TRACED:
        raise ValueError(f"--profile needs --max-new-tokens of at least {1 + 2 * TRACED} to get warm, not {most}")
    if args.aot == "":
        raise ValueError("--aot is empty: give it a directory")
    if args.aot and not args.compile_cache:
        raise ValueError("--aot and --no-compile-cache contradict each other: leave one of them out")
    if args.aot and args.several:
        raise ValueError(
            "--aot keeps programs of one process: leave it out, and several find theirs in the compilation cache"
        )
    check_cache(args)
    biases(args)
    check_draft(args)
    runtime.check(args)


def check_cache(args: Settings) -> None:
    """Refuses a kind of cache that nothing can go on from, and a memory that cannot be read."""
    if args.cache.startswith("none"):
        raise ValueError("--cache none keeps nothing to go on from: it is for training and scoring, so take auto")
    if args.memory is not None:
        if not args.plan:
            raise ValueError(f"--memory {args.memory} says what --plan is to count with: add --plan")
        amount(args.memory)


def amount(text: str) -> int:
    """Bytes, from "80GB" and the like."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT])?(i)?B?", text)
    if not found:
        raise ValueError(f"--memory is {text}: write a number with kB, MB, GB or TB, such as 80GB")
    base, power = (1024 if found[3] else 1000), " kMGT".index(found[2] or " ")
    return int(float(found[1]) * base**power)


def check_draft(args: Settings) -> None:
    """Refuses a draft that is not understood, and settings of one that contradict each other."""
    if args.draft is None:
        for name in DRAFTING:
            if getattr(args, name) != getattr(Settings(), name):
                raise ValueError(f"--{dashed(name)} says how a draft is used: give --draft, such as --draft ngram")
        return
    kind, _ = spelled(args.draft)
    if args.random_weights and kind not in ("ngram", "layers"):
        raise ValueError(
            f"--random-weights and --draft {args.draft} contradict each other: nothing was trained for random weights, "
            "so take ngram or layers:N"
        )
    if args.draft_tree is None:
        return
    if args.num_draft_tokens is not None:
        raise ValueError("--num-draft-tokens and --draft-tree contradict each other: leave one of them out")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", args.draft_tree):
        raise ValueError(f"--draft-tree is {args.draft_tree}: write the guesses after each of a level, such as 4,2,1")
    if kind == "ngram":
        raise ValueError(
            "--draft-tree and --draft ngram contradict each other: ngram guesses one token at a place, so take "
            "layers:N, a head or a model"
        )
    if args.rule == "block":
        raise ValueError("--draft-tree and --rule block contradict each other: block is for chains, so take another")


def spelled(draft: str) -> tuple[str, str]:
    """What --draft means: ("ngram", ""), ("layers", N), ("head", "builtin" or a directory) or ("model", a name)."""
    kind, _, rest = draft.partition(":")
    if draft == "ngram" or (kind == "head" and rest) or (kind == "layers" and re.fullmatch(r"\d{1,4}", rest)):
        return kind, rest
    if draft == "builtin" or os.path.isdir(os.path.expanduser(draft)) or jaxinfer.hub.HUB_ID.fullmatch(draft):
        return "model", draft
    raise ValueError(
        f"--draft {draft} is not understood, and no directory: give ngram, layers:N, head:builtin, head:DIRECTORY, "
        "builtin, or another model's directory or hub id"
    )


def biases(args: Settings) -> dict[int, float]:
    """--logit-bias, as `Sampling` takes it."""
    try:
        return {int(i): float(x) for i, x in (item.split("=") for item in args.logit_bias)}
    except ValueError:
        raise ValueError(f"--logit-bias is {' '.join(args.logit_bias)}: write ID=VALUE, such as 13=-2.5") from None
