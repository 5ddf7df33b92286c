"""Continues text with a language model, or chats with it: the main program.

    python scripts/decode.py --prompt "def fibonacci(n):" --max-new-tokens 64
    python scripts/decode.py --prompt "import os" "class Stack:" --temperature 0.8 --num-samples 2 --json

Draws depend on --seed, which is 0 unless given: the same command says the same again. --temperature 0 is greedy. The
text goes to stdout as it is made, then a short report to stderr; with --json the last line of stdout is one JSON object
instead. Several prompts are the rows of one batch. Compiled programs are kept for the next run, in
$JAX_COMPILATION_CACHE_DIR or in jaxinfer/programs in the user's cache directory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import signal
import sys
import time
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import jaxinfer  # its rooms, and jax with them, are imported when they are first used: a wrong flag need not wait

START = time.perf_counter()
FLOATS = ("float32", "bfloat16", "float16")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SOURCES = ("prompt", "prompt_file", "prompt_length")
NEW_TOKENS = 128
TEMPERATURE = 0.7  # small models, the built-in one too, say the same words over and over when they are greedy
CHAT_LENGTH = 4096  # positions of an interactive chat's cache, where the model has as many
CHUNK = 32  # tokens a dispatch, at most
TRACED = 8  # tokens of the dispatch that --profile looks at


def setting(default: Any, text: str, **more: Any) -> Any:
    """A setting with its help; `more` goes to argparse."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run: each is a flag, and may stand in a preset (--config FILE) under its name here."""

    model: str | None = setting(None, "'builtin' (the default), a directory, or a hub id")
    random_weights: str | None = setting(None, "instead: random weights of a shape (.toml, .json)", metavar="CONFIG")
    dtype: str = setting("auto", "of the weights (default: as stored)", choices=("auto", *FLOATS))
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
    cache: str = setting("dense", "kind of KV cache (default: dense)", metavar="KIND")
    cache_dtype: str = setting("auto", "of keys and values (default: the model's)", choices=("auto", *FLOATS))
    max_length: int | None = setting(None, "positions of the cache (default: what is needed)", metavar="S")
    prefill_chunk: int = setting(512, "prompt tokens a dispatch (default 512)", metavar="T")
    compile_cache: bool = setting(True, "keep compiled programs, and take those that were kept")
    profile: str | None = setting(None, "write a jax.profiler trace of a few warm steps", metavar="DIR")
    stream: bool = setting(True, "show the text as it is made; otherwise it is made in one dispatch")
    json: bool = setting(False, "the report as JSON, on the last line of stdout")

    @property
    def interactive(self) -> bool:
        """Whether the user's turns come from stdin."""
        return self.chat and not (self.prompt or self.prompt_file)

    @property
    def name(self) -> str:
        """The checkpoint's."""
        return self.model or "builtin"


class Refusal(Exception):
    """What was asked for cannot be done; the message is one line: what came, what fits, what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def parse_args(argv: list[str] | None = None) -> Settings:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("decode.py", description=__doc__, formatter_class=style, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="preset: a TOML file with settings, which flags override")
    hints = typing.get_type_hints(Settings)
    for field in dataclasses.fields(Settings):
        kind = kinds(hints[field.name])[0]
        how: dict[str, Any] = {"type": kind}
        if kind in (bool, tuple):
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"action": "extend", "nargs": "+"}
        parser.add_argument(f"--{dashed(field.name)}", **how, **field.metadata)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        base = preset(given.pop("config")) if "config" in given else {}
        for one_of in (SOURCES, ("model", "random_weights")):
            if given.keys() & set(one_of):  # a prompt on the line takes the place of the preset's, whatever its form
                base = {name: value for name, value in base.items() if name not in one_of}
        settings = Settings(**base | given)
        check(settings)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")
    return settings


def preset(path: str) -> dict[str, Any]:
    """The settings in a TOML file, each of the type that it has in `Settings`."""
    with open(path, "rb") as file:
        try:
            raw: dict[str, Any] = tomllib.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not TOML ({error}): configs/decode has examples") from None
    hints = typing.get_type_hints(Settings)
    choices = {field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(Settings)}
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"{path} has the unknown key {key!r}: a preset may hold {', '.join(hints)}")
        raw[key] = fitted(value, kinds(hints[key]))
        if raw[key] is None:
            kind = "list of strings" if tuple in kinds(hints[key]) else kinds(hints[key])[0].__name__
            raise ValueError(f"{path} has {key} = {value!r}: it must be of type {kind}")
        if choices[key] and value not in choices[key]:
            raise ValueError(f"{path} has {key} = {value!r}: it must be one of {', '.join(choices[key])}")
    return raw


def fitted(value: Any, fits: tuple[type, ...]) -> Any:
    """A value from TOML as one of these types, or None."""
    if tuple in fits:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if float in fits and type(value) is int:
        return float(value)
    return value if type(value) in fits else None  # isinstance would take true for 1


def kinds(hint: Any) -> tuple[type, ...]:
    """The types that a field may have: (float, NoneType) of `float | None`, (tuple,) of `tuple[str, ...]`."""
    if typing.get_origin(hint) is tuple:
        return (tuple,)
    return typing.get_args(hint) or (hint,)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def check(args: Settings) -> None:
    """Refuses what contradicts itself, before anything heavy is imported."""
    given = [name for name in SOURCES if getattr(args, name) not in ((), None)]
    if len(given) > 1:
        raise ValueError(f"--{' and --'.join(map(dashed, given))} contradict each other: give one of them")
    if not (given or args.chat or args.random_weights):
        raise ValueError("there is nothing to continue: give --prompt, --prompt-file, --prompt-length or --chat")
    if "" in args.prompt:
        raise ValueError(f"prompt {args.prompt.index('') + 1} is empty: give it some text")
    apart: dict[str, tuple[str, ...]] = {}
    if args.random_weights:
        apart["random_weights"] = ("model", "prompt", "prompt_file", "chat", "stop", "sampling_defaults")
    if args.interactive:
        apart["chat (without a prompt)"] = ("num_samples", "stream", "json", "profile")
    if args.chat:
        apart["chat"] = ("prompt_length",)
    for flag, others in apart.items():
        for name in others:
            usual = getattr(Settings(), name)
            if getattr(args, name) != usual:
                other = f"--{'no-' if usual is True else ''}{dashed(name)}"
                raise ValueError(f"--{dashed(flag)} and {other} contradict each other: leave one of them out")
    for name in ("num_samples", "max_new_tokens", "prompt_length", "max_length", "prefill_chunk"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{dashed(name)} is {value}: it must be at least 1")
    most = args.max_new_tokens or (sys.maxsize if args.interactive else NEW_TOKENS)
    if args.min_new_tokens > most:
        raise ValueError(f"--min-new-tokens {args.min_new_tokens} is more than --max-new-tokens {most}: lower it")
    if args.profile and most < 1 + 2 * TRACED:
        raise ValueError(f"--profile needs --max-new-tokens of at least {1 + 2 * TRACED} to get warm, not {most}")
    biases(args)


def biases(args: Settings) -> dict[int, float]:
    """--logit-bias, as `Sampling` takes it."""
    try:
        return {int(i): float(x) for i, x in (item.split("=") for item in args.logit_bias)}
    except ValueError:
        raise ValueError(f"--logit-bias is {' '.join(args.logit_bias)}: write ID=VALUE, such as 13=-2.5") from None


def one_line(error: BaseException) -> str:
    """What an error says; an OSError does not say its file by itself."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def doors(*more: type[Exception]) -> Iterator[None]:
    """Doors refuse with a ValueError or OSError of one line. One that is raised elsewhere is a bug, and must show."""
    try:
        yield
    except (ValueError, OSError, MemoryError, *more) as error:
        raise Refusal(one_line(error)) from error


# --- what to run ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run."""

    name: str
    params: Any
    config: Any
    tokenizer: Any


class Numbers:
    """Stands in for a tokenizer where there is none: the text of an id is its number."""

    special_ids: frozenset[int] = frozenset()
    decoder = None

    @property
    def backend(self) -> Numbers:
        return self

    def id_to_token(self, i: int) -> str:
        return str(i)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


def load(args: Settings) -> Model:
    """The checkpoint with its tokenizer, or random weights of a shape."""
    if args.random_weights:
        return random_weights(args.random_weights, args.dtype)
    tokenizer = jaxinfer.Tokenizer(args.name)
    if args.chat and not tokenizer.has_chat_template:
        raise ValueError(f"{args.name} has no chat template: use --prompt without --chat, or a --model that has one")
    params, config = jaxinfer.load(args.name, None if args.dtype == "auto" else args.dtype)
    return Model(args.name, params, config, tokenizer)


def random_weights(path: str, dtype: str) -> Model:
    """The shape in a file with the keys of a config.json, as TOML or JSON, with random weights."""
    import jax

    text = pathlib.Path(path).read_text(encoding="utf-8")
    try:
        raw = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {'JSON' if path.endswith('.json') else 'TOML'} ({error})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}: it must hold the keys of a config.json")
    dtype = (raw.get("dtype") or raw.get("torch_dtype") or "float32") if dtype == "auto" else dtype
    if dtype not in FLOATS:
        raise ValueError(f"{path} has dtype {dtype!r}: set --dtype to one of {', '.join(FLOATS)}")
    # a number is no text, so no id ends it
    config = jaxinfer.models.config_from_hf(raw).replace(dtype=dtype, stop_ids=())
    need, free = jaxinfer.roofline.weight_bytes(config), jaxinfer.kernels.free_memory()
    if free is not None and need > free:
        raise ValueError(
            f"{path} needs {size(need)} for its weights but {size(free)} are free: take fewer layers or a smaller dtype"
        )
    params = jaxinfer.models.init_params(config, jax.random.key(0), dtype)
    return Model(pathlib.Path(path).stem, jax.block_until_ready(params), config, Numbers())


def prompts(args: Settings, model: Model) -> tuple[list[list[int]], list[str]]:
    """The ids of each prompt, and how it is shown."""
    import numpy as np

    if args.prompt_length or args.random_weights:
        n = args.prompt_length or NEW_TOKENS
        ids = np.random.default_rng(args.seed).integers(model.config.vocab_size, size=n).tolist()
        return [ids], [f"<{n} random ids>"]
    texts = list(args.prompt) or [read_text(args.prompt_file or "-")]
    if not args.chat:
        return [model.tokenizer.encode(text) for text in texts], texts
    said = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    return [model.tokenizer.encode(text) for text in said], [f"{text}\n" for text in texts]


def read_text(name: str) -> str:
    """A file, or stdin, without the newline at its end."""
    try:
        text = sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {name} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    text = text.removesuffix("\n")
    if not text:
        raise ValueError(f"prompt file {name} is empty: give it some text")
    return text


def sampling(args: Settings, rows: int) -> Any:
    """The controls of every row: what the checkpoint recommends where that is wanted, then what the flags say."""
    chosen = jaxinfer.weights.sampling_defaults(args.name) if args.sampling_defaults else {"temperature": TEMPERATURE}
    if not chosen:
        raise ValueError(f"{args.name} recommends no sampling: leave --sampling-defaults out, and set --temperature")
    chosen |= {key: getattr(args, key) for key in SAMPLING if getattr(args, key) is not None}
    seeds = [args.seed + row % args.num_samples for row in range(rows)]
    return jaxinfer.Sampling(**chosen, logit_bias=biases(args), min_new_tokens=args.min_new_tokens, seed=seeds)


def room(args: Settings, config: Any, lengths: list[int]) -> tuple[int, list[int]]:
    """The size of the cache and how many tokens each row may make; refuses a prompt that leaves room for none."""
    longest, most = max(lengths), args.max_new_tokens or NEW_TOKENS
    needed = jaxinfer.decoding.bucket(longest + most, least=64)
    S = args.max_length or min(needed, config.max_length or needed)
    if longest > S:
        remedy = "raise --max-length, or" if args.max_length else "that is all the model was made for, so"
        raise ValueError(f"the prompt has {longest} tokens but the cache holds {S}: {remedy} shorten the prompt")
    if args.max_length and args.max_new_tokens and longest + most - 1 > S:
        raise ValueError(
            f"a prompt of {longest} tokens and {most} new ones need {longest + most - 1} positions but --max-length is "
            f"{S}: raise it, or lower --max-new-tokens"
        )
    return S, [min(most, S + 1 - length) for length in lengths]


# --- running it ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Work:
    """A stream, with what the report wants to know of it."""

    stream: Any
    fed: list[int]  # tokens read in, one number a row
    held: list[int]  # tokens before the output, those of earlier turns included
    cache: dict[str, Any]
    compile_seconds: float
    first_token: float | None = None  # seconds from the start of the program

    def __iter__(self) -> Iterator[Any]:
        for delta in self.stream:
            self.first_token = self.first_token or time.perf_counter() - START
            yield delta


def begin(args: Settings, model: Model, ids: list[list[int]], held: list[int], budget: list[int], **how: Any) -> Work:
    """Makes the stream and compiles what it will run."""
    import jax

    now = time.perf_counter()
    how.setdefault("chunk", CHUNK)
    if "state" not in how:
        if args.cache == "none":
            raise Refusal("--cache none keeps nothing to go on from: it is for training and scoring, so take dense")
        how |= {"kind": args.cache, "dtype": None if args.cache_dtype == "auto" else args.cache_dtype}
    whole = not args.stream and not args.stop  # a stop string must be seen while the text is made
    if args.profile or whole:
        how |= {"chunk": TRACED if args.profile else max(budget), "pace": math.inf}
    with doors():
        stream = jaxinfer.stream(
            model.params, model.config, model.tokenizer, ids, sampling=sampling(args, len(ids)), stop=args.stop,
            max_new_tokens=budget, prefill_chunk=args.prefill_chunk, **how,
        )  # fmt: skip
    stream.compile()
    held_by = stream.state.cache
    cache = {"kind": args.cache, "bytes": held_by.bytes, "rows": held_by.rows, "size": held_by.size}
    cache["dtype"] = jax.tree.leaves(held_by.layers)[0].dtype.name
    return Work(stream, [len(row) for row in ids], held, cache, time.perf_counter() - now)


def complete(args: Settings, model: Model) -> tuple[list[Work], bool]:
    """Continues the prompts, all in one batch; also whether Ctrl-C ended it."""
    with doors():
        ids, shown = prompts(args, model)
        ids = [row for row in ids for _ in range(args.num_samples)]
        shown = [text for text in shown for _ in range(args.num_samples)]
        lengths = [len(row) for row in ids]
        S, budget = room(args, model.config, lengths)
    work = begin(args, model, ids, lengths, budget, size=S)
    screen = Screen(shown, work.stream)
    with ctrl_c() as pressed:
        for _ in profiled(work, args.profile) if args.profile else work:
            if args.stream:
                screen.show()
            if pressed:
                break
    screen.show(everything=True)
    return [work], bool(pressed)


def converse(args: Settings, model: Model) -> list[Work]:
    """A chat: turns from stdin, answers on stdout, one cache for all of them."""
    S = args.max_length or min(model.config.max_length or CHAT_LENGTH, CHAT_LENGTH)
    messages: list[dict[str, str]] = []
    done: list[Work] = []
    known: list[int] = []  # the ids that the state stands for
    how: dict[str, Any] = {"size": S, "max_rewind": S}
    for turn in turns():
        messages.append({"role": "user", "content": turn})
        with doors():
            ids = model.tokenizer.encode(model.tokenizer.chat(messages))
        budget = min(args.max_new_tokens or S, S + 1 - len(ids))
        if budget < 1:
            say(f"the cache of {S} tokens is full: begin again, with a larger --max-length if the model has it")
            break
        # a template may write earlier answers otherwise than the model did, without their thoughts say
        shared = len(os.path.commonprefix([known, ids[:-1]]))
        if shared < len(known):
            how = {"state": cut_back(how["state"], shared)}
        work = begin(args, model, [ids[shared:]], [len(ids)], [budget], **how)
        with ctrl_c() as pressed:
            for delta in work:
                write(delta.text)
                if pressed:
                    break
        write("\n")
        done.append(work)
        messages.append({"role": "assistant", "content": work.stream.text[0]})
        known, how = ids + work.stream.ids[0], {"state": work.stream.state}
    return done


def cut_back(state: Any, length: int) -> Any:
    """The state of one row without the tokens from `length` on."""
    import jax
    import numpy as np

    return jax.jit(jaxinfer.decoding.State.cut, donate_argnums=0)(state, np.array([length], np.int32))


def turns() -> Iterator[str]:
    """The user's lines, until Ctrl-D; Ctrl-C takes a line back."""
    tty = sys.stdin.isatty()
    if tty:
        import readline  # noqa: F401  (line editing for input)
    while True:
        try:
            line = input("> " if tty else "")
        except KeyboardInterrupt:
            write("\n")
            continue
        except EOFError:
            return
        if line.strip():
            yield line


@contextlib.contextmanager
def ctrl_c() -> Iterator[list[int]]:
    """Notes the first Ctrl-C, so that a dispatch ends and the state stays whole; a second one interrupts at once."""
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def profiled(work: Work, directory: str) -> Iterator[Any]:
    """The stream, with a trace of its third dispatch: the first that is as warm as all later ones."""
    import jax

    since = 0
    with contextlib.ExitStack() as trace:
        for delta in work:
            if not since and work.stream.steps > TRACED:
                since = work.stream.steps
                trace.enter_context(jax.profiler.trace(directory))
            elif since and work.stream.steps > since:
                trace.close()
            yield delta
    if not since:
        say(f"all rows ended before step {TRACED + 1}, where the trace was to begin: {directory} got none")


# --- showing it ----------------------------------------------------------------------------------------------------


class Screen:
    """Shows rows one after the other: the first that is not done as it is made, the others when their turn comes."""

    def __init__(self, shown: list[str], stream: Any):
        self.shown, self.stream = shown, stream
        self.row, self.written = 0, 0
        self.head()

    def head(self) -> None:
        """A row begins with its prompt."""
        if self.row < len(self.shown):
            write(dim(f"--- {self.row + 1} of {len(self.shown)} ---\n" if len(self.shown) > 1 else ""))
            write(dim(self.shown[self.row]))

    def show(self, everything: bool = False) -> None:
        """What is new of the row that is shown, and of the rows behind it that may be."""
        while self.row < len(self.shown):
            text = self.stream.text[self.row]
            write(text[self.written :])
            self.written = len(text)
            if self.stream.finish[self.row] == "running" and not everything:
                return
            write("\n")
            self.row, self.written = self.row + 1, 0
            self.head()


def write(text: str) -> None:
    if text:
        print(text, end="", flush=True)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if text and sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def facts(model: Model, done: list[Work], load_seconds: float, compiled: int) -> dict[str, Any]:
    """The report: what ran where, what came out, how fast. Rows of a batch and turns of a chat look the same here."""
    import jax

    leaves = jax.tree.leaves(model.params)
    devices = sorted(leaves[0].devices(), key=lambda device: device.id)
    streams = [work.stream for work in done]
    fed = [n for work in done for n in work.fed]
    ids = [row for stream in streams for row in stream.ids]
    prefill, decode = sum(s.prefill_seconds for s in streams), sum(s.decode_seconds for s in streams)
    # rates are of the steps after a stream's first, which finds nothing warm and takes in the last token of the prompt
    later = decode - sum(s.first_seconds for s in streams)
    tokens = sum(max(len(row) - 1, 0) for row in ids)
    moved = sum(bytes_moved(model.config, work) for work in done)
    warm = tokens > 0 and later > 0
    rate = moved / later if warm else None
    chip = jaxinfer.roofline.chip(devices[0].device_kind)
    return {
        "model": model.name,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "dtype": model.config.dtype,
        "cache": done[-1].cache,
        "weight_bytes": sum(leaf.nbytes for leaf in leaves),
        "prompt_tokens": fed,
        "new_tokens": [len(row) for row in ids],
        "ids": ids,
        "text": [text for stream in streams for text in stream.text],
        "finish": ["interrupted" if why == "running" else why for stream in streams for why in stream.finish],
        "seconds": {
            "load": load_seconds,
            "compile": sum(work.compile_seconds for work in done),
            "prefill": prefill,
            "decode": decode,
            "first_token": done[0].first_token,
        },
        "tokens_per_second": {
            "prefill": (sum(fed) - len(fed)) / prefill if prefill and sum(fed) > len(fed) else None,
            "decode": tokens / later if warm else None,
        },
        "bytes_per_token": moved / tokens if warm else None,
        "gb_per_second": rate / 1e9 if rate else None,
        "share_of_bandwidth": rate / chip.bandwidth / len(devices) if rate and chip else None,
        "compiled_programs": compiled,
    }


def bytes_moved(config: Any, work: Work) -> float:
    """Weights and valid cache that the steps after the first one had to read; lengths are those half way through."""
    lengths = [n + len(ids) // 2 for n, ids in zip(work.held, work.stream.ids, strict=True)]
    step = jaxinfer.roofline.decode_bytes(config, len(lengths), lengths, cache_dtype=work.cache["dtype"])
    return step * max(work.stream.steps - 1, 0)


def report(told: dict[str, Any]) -> None:
    """The same for people, on stderr."""
    seconds, cache = told["seconds"], told["cache"]
    rate = {phase: f" ({value:.1f} tokens/s)" if value else "" for phase, value in told["tokens_per_second"].items()}
    rows = list(zip(told["prompt_tokens"], told["new_tokens"], told["finish"], strict=True))
    tokens = ", ".join(f"{prompt} + {new} ({why})" for prompt, new, why in rows[:4])
    tokens += f" and {len(rows) - 4} more rows" if len(rows) > 4 else ""
    speed = share = ""
    if told["gb_per_second"]:
        speed = f"; {size(told['bytes_per_token'])} a token, {told['gb_per_second']:.2f} GB/s"
    if told["share_of_bandwidth"]:
        share = f" ({told['share_of_bandwidth']:.0%} of the chip's)"
    say(
        f"\n{told['model']} in {told['dtype']} on {told['devices']} x {told['device']}: tokens {tokens}; "
        f"the first after {seconds['first_token'] or 0:.2f} s\n"
        f"load {seconds['load']:.2f} s, compile {seconds['compile']:.2f} s (programs: {told['compiled_programs']}), "
        f"prefill {seconds['prefill']:.2f} s{rate['prefill']}, decode {seconds['decode']:.2f} s{rate['decode']}\n"
        f"weights {size(told['weight_bytes'])}, {cache['kind']} cache {size(cache['bytes'])} ({cache['rows']} x "
        f"{cache['size']} tokens, {cache['dtype']}){speed}{share}"
    )


# --- the program ---------------------------------------------------------------------------------------------------


def keep_programs(args: Settings) -> None:
    """Turns the persistent compilation cache on, for programs of any size."""
    import jax

    jax.config.update("jax_enable_compilation_cache", args.compile_cache)
    if not args.compile_cache:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "jaxinfer", "programs")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        say(f"compiled programs are not kept ({one_line(error)}): set JAX_COMPILATION_CACHE_DIR to a directory")
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def count_programs() -> Callable[[], int]:
    """Counts, from now on, the programs that were compiled and not found in the persistent cache."""
    import jax

    wanted, found = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
    seen = {wanted: 0, found: 0}

    def note(event: str, *_: Any, **__: Any) -> None:
        if event in seen:
            seen[event] += 1

    jax.monitoring.register_event_listener(note)
    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: seen[wanted] - seen[found]


def run(args: Settings) -> int:
    """The story: load, go on from the prompts or talk, report. Refusals and interruptions are still raised."""
    import jax

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a model writes
    keep_programs(args)
    compiled = count_programs()
    now = time.perf_counter()
    with doors(RuntimeError):
        jax.devices()
    with doors():
        model = load(args)
    load_seconds = time.perf_counter() - now
    done, interrupted = (converse(args, model), False) if args.interactive else complete(args, model)
    if done:
        told = facts(model, done, load_seconds, compiled())
        print(json.dumps(told), flush=True) if args.json else report(told)
    return 130 if interrupted else 0


def main(args: Settings) -> int:
    """Runs it, and says in one line what cannot be done. Whatever else goes wrong is a bug, and shows where."""
    try:
        return run(args)
    except Refusal as refusal:
        say(f"decode.py: {refusal}")
        return 1
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        say(f"decode.py: memory ran out ({one_line(error)[:120]}): take fewer rows, a smaller --max-length or --dtype")
        return 1
    except KeyboardInterrupt:
        say("\ndecode.py: stopped")
        return 130
    except BrokenPipeError:
        # nobody reads any more, `| head` for one: what is still buffered has nowhere to go when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main(parse_args()))
