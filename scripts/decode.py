"""Continues text with a language model, or chats with it: the main program.

    python scripts/decode.py --prompt "def fibonacci(n):" --max-new-tokens 64
    python scripts/decode.py --prompt "import os" "class Stack:" --temperature 0.8 --num-samples 2 --json
    python scripts/decode.py --prompt "import os" --draft builtin --compare
    python scripts/decode.py --prompt "import os" --cache paged:page=16+int8
    python scripts/decode.py --plan --cache int4 --max-length 32768 --num-samples 8
    python scripts/decode.py --prompt "import os" --cpu-devices 8 --mesh data=2,tensor=4
    python scripts/decode.py --prompt "import os" --aot programs

Draws depend on --seed, which is 0 unless given: the same command says the same again. --temperature 0 is greedy. The
text goes to stdout as it is made, then a short report to stderr; with --json the last line of stdout is one JSON object
instead. Several prompts are the rows of one batch. Compiled programs are kept for the next run, in
$JAX_COMPILATION_CACHE_DIR or in jaxinfer/programs in the user's cache directory.

--draft guesses some tokens ahead, which the model verifies in one pass: the text is the same (see --rule), only sooner
where enough guesses are right. The report says how many were; --compare measures what that is worth.

--aot DIR keeps the executables themselves, so that the same command, started again, compiles nothing and traces no
model. A file fits one version and one kind of machine; where another is found, one line says what differs, and the
program is compiled anew beside it. Trust DIR like a program: what lies there is unpickled and run. Without --aot
compiled programs are found in the compilation cache once they are traced. Either way they are made while the weights
are read.

--cache says what is kept of keys and values, and in which numbers; --plan says what a cache would take, before it does.

--mesh lays model and cache over several devices, --coordinator over several processes, each started with the same flags
but its own --process-id; process 0 prints. Neither changes what is said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import allocation
import flags
import runtime
from flags import Refusal, doors, one_line
from loading import Model, load, outline, read_tokenizer
from processes import Group, say
from screen import Screen, report, write
from settings import FLOATS, NEW_TOKENS, SAMPLING, SOURCES, TEMPERATURE, TRACED, Settings, biases, check

import jaxinfer  # its rooms, and jax with them, are imported when they are first used: a wrong flag need not wait

START = time.perf_counter()
CHAT_LENGTH = 4096  # positions of an interactive chat's cache, where the model has as many
CHUNK = 32  # tokens a dispatch, at most


def parse_args(argv: list[str] | None = None) -> Settings:
    """The settings; a prompt on the line takes the place of the preset's, whatever its form."""
    one_of = [SOURCES, ("model", "random_weights"), ("num_draft_tokens", "draft_tree")]
    return flags.parse(Settings, "decode.py", __doc__, check, one_of, argv)


# --- what to run ---------------------------------------------------------------------------------------------------


def files(args: Settings) -> dict[str, str]:
    """What all processes must find alike: each file's size with a digest of it, of a tensor file's header."""
    if args.random_weights:
        return {args.random_weights: digest(pathlib.Path(args.random_weights).read_bytes())}
    found = listed(jaxinfer.hub.locate(args.name))
    if args.draft:
        import drafting

        place = drafting.directory(args.draft)
        found |= {f"the draft's {name}": told for name, told in listed(place).items()} if place else {}
    return found


def listed(directory: pathlib.Path) -> dict[str, str]:
    """The files of a checkpoint, see `files`."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".jinja", ".safetensors", ".model"):
            with open(path, "rb") as file:
                length = 8 + int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 2**26
                file.seek(0)
                found[path.name] = f"{path.stat().st_size} bytes, {digest(file.read(min(length, 2**26)))}"
    return found


def digest(data: bytes) -> str:
    """A few letters that other data would not have."""
    return hashlib.sha256(data).hexdigest()[:16]


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
    per_device: dict[str, int]
    collectives: list[dict[str, Any]]  # of one step
    first_token: float | None = None  # seconds from the start of the program

    def __iter__(self) -> Iterator[Any]:
        for delta in self.stream:
            self.first_token = self.first_token or time.perf_counter() - START
            yield delta


def flow(args: Settings, model: Model, ids: list[list[int]], budget: list[int], **how: Any) -> Any:
    """The stream."""
    how.setdefault("chunk", CHUNK)
    if "state" not in how:
        how |= {"kind": args.cache, "dtype": None if args.cache_dtype == "auto" else args.cache_dtype}
    whole = not args.stream and not args.stop  # a stop string must be seen while the text is made
    if args.profile or whole:
        how |= {"chunk": TRACED if args.profile else max(budget), "pace": math.inf}
    with doors():
        controls, start = sampling(args, len(ids)), jaxinfer.stream
        if model.drafting is not None:
            start = functools.partial(
                jaxinfer.speculation.stream, **model.drafting.ready(model, controls, len(ids), how)
            )
        return start(
            model.params, model.config, model.tokenizer, ids, sampling=controls, stop=args.stop,
            max_new_tokens=budget, prefill_chunk=args.prefill_chunk, programs=model.programs, **how,
        )  # fmt: skip


def begin(args: Settings, model: Model, ids: list[list[int]], held: list[int], budget: list[int], **how: Any) -> Work:
    """Makes the stream and compiles what it will run, where that is not done yet."""
    now = time.perf_counter()
    stream = flow(args, model, ids, budget, **how)
    decode = stream.compile()[-1]
    held_by = stream.state.cache
    cache = {"kind": args.cache, "bytes": held_by.bytes, "rows": held_by.rows, "size": held_by.size}
    cache["dtype"] = held_by.form
    cache["bytes_per_token"] = held_by.bytes / held_by.rows / held_by.size
    spent = time.perf_counter() - now
    collectives = runtime.collectives(decode) if jaxinfer.mesh.concrete() is not None else []
    weights, kept = runtime.per_device(model.params, held_by)
    per_device = {"weight_bytes": weights, "cache_bytes": kept}
    return Work(stream, [len(row) for row in ids], held, cache, spent, per_device, collectives)


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to continue, all in one batch."""

    ids: list[list[int]]
    shown: list[str]
    size: int  # of the cache
    budget: list[int]  # new tokens of each row


def read_task(args: Settings, model: Model, group: Group) -> Task:
    """The prompts, one a row."""
    ids, shown = prompts(args, model)
    ids = [row for row in ids for _ in range(args.num_samples)]
    shown = [text for text in shown for _ in range(args.num_samples)]
    S, budget = room(args, model.config, [len(row) for row in ids])
    group.agree({"the prompts' ids": digest(repr(ids).encode())})
    return Task(ids, shown, S, budget)


def prepare(args: Settings, programs: Any, group: Group) -> tuple[Model, Task | None, dict[str, float]]:
    """The model, loaded, what it is to continue (in a chat nothing yet), and the seconds of loading and compiling.

    What the prompts need is compiled while the weights are read; compiling has the seconds that it took longer. Several
    processes do one after the other, since all must dispatch in the same order.
    """
    now = time.perf_counter()
    with doors():
        tokenizer = read_tokenizer(args)
        sketch = None if args.interactive or group.num > 1 else outline(args, tokenizer, programs)
        task = None if sketch is None else read_task(args, sketch, group)

    def read() -> tuple[Model, float]:
        with doors():
            return load(args, tokenizer, programs), time.perf_counter() - now

    def compile() -> None:
        if sketch is not None and task is not None:
            flow(args, sketch, task.ids, task.budget, size=task.size).compile()

    if task is None:
        model, loaded = read()
        with doors():
            task = None if args.interactive else read_task(args, model, group)
        return model, task, {"load": loaded, "compile": 0.0}
    (model, loaded), _ = runtime.together(read, compile)
    return model, task, {"load": loaded, "compile": time.perf_counter() - now - loaded}


def complete(args: Settings, model: Model, task: Task) -> tuple[list[Work], bool]:
    """Continues the prompts; also whether Ctrl-C ended it."""
    ids, budget, S, lengths = task.ids, task.budget, task.size, [len(row) for row in task.ids]
    work = begin(args, model, ids, lengths, budget, size=S)
    screen = Screen(task.shown, work.stream)
    with ctrl_c() as pressed:
        for _ in profiled(work, args.profile) if args.profile else work:
            if args.stream:
                screen.show()
            if pressed:
                work.stream.stop()
    screen.show(everything=True)
    ended = "running" not in work.stream.finish  # otherwise some process was asked to stop
    if model.drafting is not None and ended:
        weigh(args, model, work)
        if args.compare:
            again = functools.partial(begin, args, ids=ids, held=lengths, budget=budget, size=S)
            plain = dataclasses.replace(model, drafting=None)
            model.drafting.compare(lambda: again(plain).stream, lambda: again(model).stream, work.stream.ids)
    return [work], bool(pressed) or not ended


def weigh(args: Settings, model: Model, work: Work) -> None:
    """Measures what a pass of the draft costs, where it was not measured before; spends the state."""
    model.drafting.weigh(model, sampling(args, len(work.fed)), work.stream.state)


def converse(args: Settings, model: Model) -> list[Work]:
    """A chat: turns from stdin, answers on stdout, one cache for all of them."""
    S = args.max_length or min(model.config.max_length or CHAT_LENGTH, CHAT_LENGTH)
    messages: list[dict[str, str]] = []
    done: list[Work] = []
    known: list[int] = []  # the ids that the state stands for
    back = rewinds(args, model.config, S)
    anew: dict[str, Any] = {"size": S, "max_rewind": back}
    how = anew
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
        if len(known) - shared > max(back - CHUNK, 0):  # what the cache may have forgotten by now is read again
            how, shared = anew, 0
        elif shared < len(known):
            how = {"state": cut_back(how["state"], shared)}
        work = begin(args, model, [ids[shared:]], [len(ids)], [budget], **how)
        with ctrl_c() as pressed:
            for delta in work:
                write(delta.text)
                if pressed:
                    work.stream.stop()
        write("\n")
        done.append(work)
        messages.append({"role": "assistant", "content": work.stream.text[0]})
        known, how = ids + work.stream.ids[0], {"state": work.stream.state}
    if model.drafting is not None and done:
        weigh(args, model, done[-1])
    return done


def rewinds(args: Settings, config: Any, S: int) -> int:
    """How many tokens a chat can take back: all, where the cache keeps all anyway, or what two dispatches make."""
    kind = jaxinfer.cache.Kind.read(args.cache)
    if kind.layout in jaxinfer.cache.EVICTING:
        return 0
    keeps = kind.layout in ("dense", "paged", "auto") and not any(layer.window for layer in config.layers)
    return S if keeps or kind.layout == "dense" else 2 * CHUNK


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

    dispatches = steps = 0
    with contextlib.ExitStack() as trace:
        for delta in work:
            if work.stream.steps > steps:
                dispatches, steps = dispatches + 1, work.stream.steps
                if dispatches == 2:
                    trace.enter_context(jax.profiler.trace(directory))
                elif dispatches == 3:
                    trace.close()
            yield delta
    if dispatches < 2:
        say(f"all rows ended before step {TRACED + 1}, where the trace was to begin: {directory} got none")


# --- what came of it -----------------------------------------------------------------------------------------------


def facts(model: Model, done: list[Work], before: dict[str, float], compiled: int) -> dict[str, Any]:
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
    moved = sum(bytes_moved(model.config, model.form, work) for work in done)
    warm = tokens > 0 and later > 0
    rate = moved / later if warm else None
    chip = jaxinfer.roofline.chip(devices[0].device_kind)
    busy = sum(busiest(model.config, model.form, work, chip) for work in done) if chip else 0
    mesh = jaxinfer.mesh.concrete()
    return {
        "model": model.name,
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "mesh": {} if mesh is None else dict(mesh.shape),
        "dtype": model.config.dtype,
        "weights": model.form,
        "cache": done[-1].cache | {"bytes_at_the_end": streams[-1].cache_bytes},
        "weight_bytes": sum(leaf.nbytes for leaf in leaves),
        "per_device": done[-1].per_device,
        "collectives": done[-1].collectives,
        "prompt_tokens": fed,
        "new_tokens": [len(row) for row in ids],
        "ids": ids,
        "text": [text for stream in streams for text in stream.text],
        "finish": ["interrupted" if why == "running" else why for stream in streams for why in stream.finish],
        "seconds": {
            "load": before["load"],
            "compile": before["compile"] + sum(work.compile_seconds for work in done),
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
        "share_of_bandwidth": busy / later if warm and chip else None,
        "speculation": model.drafting and model.drafting.facts(streams),
        "compiled_programs": compiled,
    }


def half_way(work: Work) -> list[int]:
    """The lengths of the rows half way through."""
    return [n + len(ids) // 2 for n, ids in zip(work.held, work.stream.ids, strict=True)]


def busiest(config: Any, form: str | None, work: Work, chip: Any) -> float:
    """Seconds that the busiest chip of the mesh has to read for, in the steps after the first one."""
    mesh, lengths = jaxinfer.mesh.concrete(), half_way(work)
    axes = {} if mesh is None else dict(mesh.shape)
    on = dataclasses.replace(chip, interconnect=chip.interconnect or 1.0)  # what is sent is not asked for
    packed = jaxinfer.roofline.weights_of(form)
    limit = jaxinfer.roofline.decode(config, len(lengths), lengths, on, axes, weights=packed, cache=work.cache["kind"])
    return limit.memory_seconds * max(work.stream.steps - 1, 0)


def bytes_moved(config: Any, form: str | None, work: Work) -> float:
    """Weights and valid cache that the steps after the first one had to read; lengths are those half way through.

    What a draft reads beside them does not count.
    """
    lengths = half_way(work)
    dtype = work.cache["dtype"] if work.cache["dtype"] in FLOATS else None
    packed = jaxinfer.roofline.weights_of(form)
    step = jaxinfer.roofline.decode_bytes(
        config, len(lengths), lengths, packed, cache_dtype=dtype, cache=work.cache["kind"]
    )
    return step * max(work.stream.steps - 1, 0)


# --- the program ---------------------------------------------------------------------------------------------------


def run(args: Settings, group: Group) -> int:
    """The story: load, go on from the prompts or talk, report. Refusals and interruptions are still raised."""
    import jax

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a model writes
    compiled = runtime.count_programs()
    now = time.perf_counter()
    with doors(RuntimeError):
        programs = jaxinfer.aot.Programs(args.aot)
        mesh = runtime.start(args, group)
    started = time.perf_counter() - now
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        if args.plan:
            return tell_plan(args, group)
        if args.several:
            with doors():
                group.agree(files(args))
        model, task, seconds = prepare(args, programs, group)
        seconds["load"] += started
        done, interrupted = (converse(args, model), False) if task is None else complete(args, model, task)
        if done and group.id == 0:
            told = facts(model, done, seconds, compiled())
            print(json.dumps(told), flush=True) if args.json else report(told)
    return 130 if interrupted else 0


def tell_plan(args: Settings, group: Group) -> int:
    """What memory a run would take; none of it is."""
    import planning

    with doors():
        told = planning.plan(args)
    if group.id == 0:
        print(json.dumps(told) if args.json else planning.show(told), flush=True)
    return 0


def main(args: Settings) -> int:
    """Runs it, and says in one line what cannot be done. Whatever else goes wrong is a bug, and shows where."""
    group = Group(args.who)
    try:
        with doors():
            group = runtime.join(args)
        return group.leave(run(args, group))
    except Refusal as refusal:
        return group.fail(1, f"decode.py: {refusal}")
    except KeyboardInterrupt:
        return group.fail(130, "\ndecode.py: stopped")
    except BrokenPipeError:
        # nobody reads any more, `| head` for one: what is still buffered has nowhere to go when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return group.fail(141, "")
    except Exception as error:
        if why := group.lost():
            return group.fail(1, why)
        if "RESOURCE_EXHAUSTED" in str(error):
            remedy = "take fewer rows, a smaller --max-length or --dtype"
            return group.fail(1, f"decode.py: memory ran out ({one_line(error)[:120]}): {remedy}")
        if group.num > 1:
            return group.fail(1, traceback.format_exc())
        raise


if __name__ == "__main__":
    allocation.begin_anew(allocation.HUGE)
    runtime.leave(main(parse_args()))
