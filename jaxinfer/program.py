"""Reads compiled programs: copies and converts by shape, collectives as executed, temporaries, bytes moved.

Everything is asked of `jax.stages.Compiled` (what `jax.jit(f).lower(...).compile()` gives), or of its `as_text()`:

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache).compile()
    assert not program.copies(compiled, shapes=[params["up"].shape])
    assert program.temporaries(compiled)["temp"] < cache.bytes / 2

The text is XLA's optimised HLO. Read here: CPU (jax 0.10 and 0.11) and NVIDIA GPUs (0.11); nothing is run.
Counts are *as executed*: what a loop's body does is multiplied by its trip count, through loops in loops, calls and
fusions. A loop whose trip count no compiler can know (a decode loop that stops early) counts once, and what is counted
so says which loop it was.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.stages import Compiled

# What has no cost: a name for bytes that are there already, or a handle.
VIEWS = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier")
    + ("add-dependency", "domain", "partition-id", "replica-id")
)
# What gives out numbers that it was given, in another place, order or type.
MOVES = frozenset(
    (
        "copy",
        "convert",
        "bitcast-convert",
        "transpose",
        "reshape",
        "reverse",
        "slice",
        "dynamic-slice",
        "gather",
        "concatenate",
        "pad",
    )
)
# What writes a part of its first operand, in place when that operand's buffer may be spent.
UPDATES = frozenset({"dynamic-update-slice", "scatter"})
READS_PART = frozenset({"dynamic-slice", "slice", "gather"})
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip


# --- what a program is -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array as the program holds it: `bits` each element takes there (an int4 may be packed, or not)."""

    dtype: str
    dims: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """How many bytes."""
        return -(-self.elements * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shapes opcode(operands), attributes`. `inner` is the text between the parentheses."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # leaves, if the result is a tuple
    operands: tuple[str, ...]
    inner: str
    attributes: str

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def called(self, *roles: str) -> tuple[str, ...]:
        """The computations that an attribute of one of these names points to: called("body") of a while."""
        found: list[str] = []
        for role in roles:
            for many, one in re.findall(rf"\b{role}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes):
                found += re.findall(r"[\w.\-]+", many or one)
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order they run; the last one named `root` is its result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def parameter(self, index: int) -> Instruction:
        """The parameter with that number."""
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.inner == str(index))

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read `name`."""
        return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a compiled program; it starts at `entry`."""

    computations: dict[str, Computation]
    entry: str


def parse(compiled: Compiled | Program | str) -> Program:
    """The program of a `jax.stages.Compiled`, or of its text. ValueError if it is no HLO module with one entry."""
    if isinstance(compiled, Program):
        return compiled
    return parse_text(compiled if isinstance(compiled, str) else compiled.as_text())


HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
LINE = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?")


@functools.lru_cache(maxsize=16)  # a decode loop's text is megabytes, and one test asks several questions of it
def parse_text(text: str) -> Program:
    """The program in an HLO module's text."""
    computations: dict[str, Computation] = {}
    entries: list[str] = []
    name, root, instructions = "", "", {}
    for line in text.splitlines():
        if not name:
            header = HEADER.match(line)
            if header:
                name, root, instructions = header[2], "", {}
                entries += [name] if header[1] else []
        elif line.startswith("}"):
            root = root or next(reversed(instructions), "")
            computations[name] = Computation(name, {i: finish(i, instructions) for i in instructions}, root)
            name = ""
        else:
            match = LINE.match(line)
            if match:
                instructions[match[2]] = parse_instruction(match[2], match[3])
                root = match[2] if match[1] else root
    if len(entries) != 1:
        raise ValueError(f"this text has {len(entries)} ENTRY computations, and a compiled HLO module has one")
    return Program(computations, entries[0])


def parse_instruction(name: str, rest: str) -> Instruction:
    """What stands right of `name =`: shape, opcode, operands, attributes."""
    rest = re.sub(r"/\*.*?\*/", "", rest)  # /*index=5*/
    end = closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(parse_shape(*found) for found in ARRAY.findall(rest[:end]))
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    stop = closing(rest, start)
    inner = rest[start + 1 : stop]
    operands = () if opcode in ("constant", "parameter", "iota") else tuple(parse_operands(inner))
    return Instruction(name, opcode, shapes, operands, inner, rest[stop + 1 :])


def finish(name: str, instructions: dict[str, Instruction]) -> Instruction:
    """An asynchronous X-start as the X that it begins, with the result of its X-done; any other as it is."""
    start = last = instructions[name]
    if not start.opcode.endswith("-start"):
        return start
    while True:
        following = [i for i in instructions.values() if last.name in i.operands]
        last = next((i for i in following if i.opcode.endswith(("-update", "-done"))), last)
        if not last.opcode.endswith("-update"):
            break
    opcode = "call" if start.opcode == "async-start" else start.opcode.removesuffix("-start")
    return dataclasses.replace(start, opcode=opcode, shapes=last.shapes)


def parse_shape(dtype: str, dims: str, layout: str) -> Shape:
    """One array: `bf16`, `2,<=8` and `1,0:E(4)`."""
    width = re.search(r"\d+", dtype)
    bits = int(width[0]) if width else {"pred": 8}.get(dtype, 0)  # token and opaque take nothing
    if 0 < bits < 8 and f"E({bits})" not in layout:
        bits = 8
    return Shape(dtype, tuple(int(d) for d in re.findall(r"\d+", dims)), bits)


def parse_operands(inner: str) -> Iterator[str]:
    """The names in `f32[2,3]{1,0} %x, %y`."""
    depth, word = 0, ""
    for letter in inner + ",":
        if letter == "," and depth == 0:
            if word.strip():
                yield word.split()[-1].lstrip("%")
            word = ""
            continue
        depth += (letter in "([{") - (letter in ")]}")
        word += letter


def closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed; strings are skipped."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        letter = text[index]
        if letter == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return index
    return len(text)


# --- what it runs ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ran:
    """An instruction that runs `times` times; with `loop`: in each trip of that loop, whose trip count is unknown."""

    instruction: Instruction
    computation: Computation
    times: int
    loop: str | None


Pick = Callable[[list[list[Ran]]], list[Ran]]


def runs(
    program: Program, computation: str | None = None, times: int = 1, loop: str | None = None, pick: Pick | None = None
) -> list[Ran]:
    """What a computation (by default the entry) runs, in order, loops and calls entered, fusions whole.

    Of a conditional's branches `pick` chooses one; without it all are listed.
    """
    here = program.computations[computation or program.entry]
    ran: list[Ran] = []
    for instruction in here.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(program, here, instruction)
            inner = loop if trips is not None else instruction.name
            (condition,), (body,) = instruction.called("condition"), instruction.called("body")
            ran += runs(program, condition, times * (1 if trips is None else trips + 1), inner, pick)
            ran += runs(program, body, times * (1 if trips is None else trips), inner, pick)
        elif instruction.opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            branches = [runs(program, name, times, loop, pick) for name in names]
            ran += pick(branches) if pick else [one for branch in branches for one in branch]
        elif instruction.opcode == "call":
            for name in instruction.called("to_apply", "calls", "called_computations"):
                ran += runs(program, name, times, loop, pick)
        elif instruction.opcode not in VIEWS and not instruction.opcode.endswith(("-done", "-update")):
            ran.append(Ran(instruction, here, times, loop))
    return ran


def trip_count(program: Program, where: Computation, loop: Instruction) -> int | None:
    """How often a while loop's body runs; None when it is not known before it runs.

    XLA's own count where it stands in the text, else `i < constant` with a constant start and step.
    """
    known = re.search(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition, body = (program.computations[loop.called(role)[0]] for role in ("condition", "body"))
    compare, (left, limit) = peek(program, condition, condition.root, 2)
    index = re.search(r"index=(\d+)", left.attributes)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes or not index:
        return None
    state = where.instructions[loop.operands[0]]
    after = body.instructions[body.root]
    if state.opcode != "tuple" or after.opcode != "tuple":
        return None
    start = resolve(where, state.operands[int(index[1])])
    add, (before, step) = peek(program, body, after.operands[int(index[1])], 2)
    if add.opcode != "add" or f"index={index[1]}" not in before.attributes:
        return None
    numbers = [constant(instruction) for instruction in (start, limit, step)]
    if None in numbers or numbers[2] <= 0:  # type: ignore[operator]
        return None
    return max(0, -(-(numbers[1] - numbers[0]) // numbers[2]))  # type: ignore[operator]


def constant(instruction: Instruction) -> int | None:
    """The integer that an instruction is, if it is one."""
    number = re.fullmatch(r"-?\d+", instruction.inner) if instruction.opcode == "constant" else None
    return int(number[0]) if number else None


def resolve(where: Computation, name: str) -> Instruction:
    """The instruction behind copies, views of one array and changes of its shape."""
    instruction = where.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "reshape") and instruction.operands:
        instruction = where.instructions[instruction.operands[0]]
    return instruction


NOTHING = Instruction("", "", (), (), "", "")


def peek(program: Program, where: Computation, name: str, count: int) -> tuple[Instruction, list[Instruction]]:
    """An instruction and what its first `count` operands are in `where`, looked for through a fusion's parameters."""
    instruction = resolve(where, name)
    if instruction.opcode != "fusion":
        operands = [resolve(where, operand) for operand in instruction.operands[:count]]
        return instruction, operands + [NOTHING] * (count - len(operands))
    fused = program.computations[instruction.called("calls")[0]]
    inner = resolve(fused, fused.root)
    operands = []
    for operand in inner.operands[:count]:
        found = resolve(fused, operand)
        outer = found.opcode == "parameter"
        operands.append(resolve(where, instruction.operands[int(found.inner)]) if outer else found)
    return inner, operands + [NOTHING] * (count - len(operands))


# --- what is asked of it -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Write:
    """An array that is written: by `opcode` (of a fusion: of what makes that output), `times` times in `loop`."""

    name: str
    opcode: str
    shape: Shape
    bytes: int
    times: int
    loop: str | None
    written: bool = True  # False: inside a fusion, worked out element by element and never stored

    def __str__(self) -> str:
        where = f" in each trip of {self.loop}" if self.loop else ""
        return f"{self.name}: {self.opcode} to {self.shape}, {self.bytes:,} bytes, {self.times} times{where}"


Sizes = Iterable[int | Sequence[int]]


def copies(
    compiled: Compiled | Program | str, shapes: Sizes | None = None, at_least: int = 0, fused: bool = False
) -> list[Write]:
    """Arrays that the program writes only to have the same numbers elsewhere, in another order or dtype.

    That is copy, convert, transpose, slice, gather, concatenate, pad, reverse and (unless free) reshape, as
    instructions of their own or as the last step of a fusion's output; a bitcast is free and not listed. A fusion that
    computes something else and then converts it is listed too: only its size tells it from a copied weight.

    shapes: only arrays of as many elements as one of these shapes (or numbers of elements), whatever the dtype, the
        layout and the split of axes: [N, H, D], [N * H, D] and [D, N * H] are one shape here.
    at_least: only arrays of at least so many elements.
    fused: also what a fusion does inside without storing it. There it is free on a GPU, but XLA:CPU may so hide a
        product that reads its weight through a transposed convert, one element at a time.
    """
    program = parse(compiled)
    found = [write for write in all_writes(program, fused) if write.opcode in MOVES]
    return select(found, shapes, at_least)


def writes(compiled: Compiled | Program | str, shapes: Sizes | None = None, at_least: int = 0) -> list[Write]:
    """Every array that the program writes, by whatever means, except updates in place. Filters as for `copies`."""
    return select(all_writes(parse(compiled), fused=False), shapes, at_least)


def select(found: list[Write], shapes: Sizes | None, at_least: int) -> list[Write]:
    """Those with the number of elements asked for."""
    wanted = None if shapes is None else {s if isinstance(s, int) else math.prod(s) for s in shapes}
    return [w for w in found if w.shape.elements >= at_least and (wanted is None or w.shape.elements in wanted)]


def all_writes(program: Program, fused: bool) -> list[Write]:
    """The outputs of all that runs, updates in place left out; with `fused` also what is inside fusions."""
    found = []
    for ran in runs(program):
        made = outputs(program, ran.instruction)
        made += [(maker, shape, False) for maker, shape in inside(program, ran.instruction)] if fused else []
        for maker, shape, written in made:
            found.append(Write(ran.instruction.name, maker.opcode, shape, shape.bytes, ran.times, ran.loop, written))
    return found


def outputs(program: Program, instruction: Instruction) -> list[tuple[Instruction, Shape, bool]]:
    """(what makes it, its shape, True) of each array that an instruction writes, updates in place left out."""
    if instruction.opcode != "fusion":
        return [] if instruction.opcode in UPDATES else [(instruction, s, True) for s in instruction.shapes]
    fused = program.computations[instruction.called("calls")[0]]
    made = []
    for name in output_names(fused):
        maker = resolve_views(fused, name)
        if updated(fused, maker) is None:
            made += [(maker, shape, True) for shape in fused.instructions[name].shapes]
    return made


def inside(program: Program, instruction: Instruction) -> list[tuple[Instruction, Shape]]:
    """What a fusion works out on the way to its outputs."""
    if instruction.opcode != "fusion":
        return []
    fused = program.computations[instruction.called("calls")[0]]
    ends = {resolve_views(fused, name).name for name in output_names(fused)}
    moves = [i for i in fused.instructions.values() if i.opcode in MOVES and i.name not in ends]
    found = [(i, shape) for i in moves if not read_in_part(fused, i) for shape in i.shapes]
    return found + [deep for i in fused.instructions.values() for deep in inside(program, i)]


def read_in_part(fused: Computation, instruction: Instruction) -> bool:
    """Whether all that becomes of it is sliced or gathered, so that a fusion works out these elements alone."""
    users = fused.users(instruction.name)
    return bool(users) and all(
        (user.opcode in READS_PART and user.operands[0] == instruction.name)
        or (user.opcode in MOVES | {"bitcast"} and read_in_part(fused, user))
        for user in users
    )


def output_names(computation: Computation) -> tuple[str, ...]:
    """The instructions that are a computation's results."""
    root = computation.instructions[computation.root]
    return root.operands if root.opcode == "tuple" else (root.name,)


def resolve_views(where: Computation, name: str) -> Instruction:
    """The instruction behind views and, in a fusion, free changes of shape."""
    instruction = where.instructions[name]
    while instruction.opcode in ("bitcast", "reshape", "get-tuple-element") and instruction.operands:
        instruction = where.instructions[instruction.operands[0]]
    return instruction


def updated(fused: Computation, maker: Instruction) -> Instruction | None:
    """The fusion's parameter that `maker` updates in place, if that is what it does."""
    if maker.opcode not in UPDATES:
        return None
    target = resolve_views(fused, maker.operands[0])
    return target if target.opcode == "parameter" else None


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop; `trip_count` is None when it is not known before it runs."""

    name: str
    body: str
    condition: str
    trip_count: int | None
    state: tuple[Shape, ...]  # what it carries, and what it only reads

    @property
    def bytes(self) -> int:
        """Bytes of the state."""
        return sum(shape.bytes for shape in self.state)


def while_loops(compiled: Compiled | Program | str) -> list[Loop]:
    """The loops that are inside no other loop, in the order in which they run."""
    program = parse(compiled)

    def look(name: str) -> Iterator[Loop]:
        here = program.computations[name]
        for i in here.instructions.values():
            if i.opcode == "while":
                (body,), (condition,) = i.called("body"), i.called("condition")
                yield Loop(i.name, body, condition, trip_count(program, here, i), i.shapes)
            elif i.opcode in ("call", "conditional"):
                roles = "to_apply calls called_computations branch_computations true_computation false_computation"
                for inner in i.called(*roles.split()):
                    yield from look(inner)

    return list(look(program.entry))


def temporaries(compiled: Compiled) -> dict[str, int]:
    """Bytes per device: `temp`oraries, `argument`s, `output`s, `alias` (outputs that lie in a donated argument), and
    their `total`, each byte once. From XLA's own account, so `compiled` must be a Compiled and not its text."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend gives no memory analysis of its programs")
    found = {kind: int(getattr(stats, f"{kind}_size_in_bytes")) for kind in ("temp", "argument", "output", "alias")}
    return found | {"total": found["temp"] + found["argument"] + found["output"] - found["alias"]}


def collectives(compiled: Compiled | Program | str, cheapest: bool = False) -> list[dict]:
    """The collectives that one device takes part in, as executed: [{kind, count, bytes, loop}].

    kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute. An asynchronous pair counts once.
    bytes: of all `count`, each with the larger of what a device gives and gets: an all-gather's whole result.
    loop: None, or the loop of unknown trip count of one trip of which these were counted.
    Of a conditional's branches the one that moves most is counted; with `cheapest` the one that moves least, which is
    the usual case where a `lax.cond` guards a rare one.
    """
    program = parse(compiled)
    extreme = min if cheapest else max

    def pick(branches: list[list[Ran]]) -> list[Ran]:
        return extreme(branches, key=lambda branch: sum(bytes for *_, bytes in found(branch)))

    def found(ran: list[Ran]) -> Iterator[tuple[str, str | None, int, int]]:
        for one in ran:
            for where, instruction in unfused(program, one.computation, one.instruction):
                if instruction.opcode in COLLECTIVES:
                    yield instruction.opcode, one.loop, one.times, one.times * payload(where, instruction)

    rows: dict[tuple[str, str | None], list[int]] = {}
    for kind, loop, times, size in found(runs(program, pick=pick)):
        row = rows.setdefault((kind, loop), [0, 0])
        row[0] += times
        row[1] += size
    return [{"kind": kind, "count": count, "bytes": size, "loop": loop} for (kind, loop), (count, size) in rows.items()]


def unfused(program: Program, where: Computation, one: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or what a fusion holds (XLA:GPU fuses a collective with the slice that it reads or writes)."""
    if one.opcode != "fusion":
        yield where, one
        return
    fused = program.computations[one.called("calls")[0]]
    for inner in fused.instructions.values():
        yield from unfused(program, fused, inner)


def payload(where: Computation, instruction: Instruction) -> int:
    """The larger of what a collective is given and gives, in bytes on one device."""
    return max(sum(where.instructions[name].bytes for name in set(instruction.operands)), instruction.bytes)


def bytes_moved(compiled: Compiled | Program | str, loop: Loop | None = None, cheapest: bool = False) -> int:
    """Bytes that the program reads and writes: operands and results of all it runs, kernel by kernel, as executed.

    With `loop` (from `while_loops`): of one trip of its body. A slice counts what it takes, an update in place what it
    puts; inside a fusion too. A loop of unknown trip count counts once, and of a conditional's branches the one that
    moves most, or with `cheapest` the one that moves least. What the chip's own caches hold between two kernels is
    counted as if they did not, so small arrays count too much; a custom call counts all of its operands, even where it
    reads but the valid part of a cache.
    """
    program, extreme = parse(compiled), min if cheapest else max

    def cost(ran: list[Ran]) -> int:
        return sum(one.times * traffic(program, one.computation, one.instruction) for one in ran)

    return cost(runs(program, loop and loop.body, pick=lambda branches: extreme(branches, key=cost)))


def traffic(program: Program, where: Computation, instruction: Instruction) -> int:
    """Bytes that one instruction reads and writes."""
    if instruction.opcode == "fusion":
        return fusion_traffic(program, instruction)
    operand = {name: where.instructions[name].bytes for name in instruction.operands}  # a name given twice is read once
    if instruction.opcode in READS_PART:
        return 2 * instruction.bytes + sum(operand.values()) - operand[instruction.operands[0]]
    if instruction.opcode in UPDATES:
        return sum(operand.values()) - operand[instruction.operands[0]] + update_bytes(where, instruction)
    spent = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.attributes)
    indices = re.findall(r"\((\d+), \{", spent[1]) if spent else []  # results that lie where these operands lay
    return sum(operand.values()) + instruction.bytes - sum(operand[instruction.operands[int(i)]] for i in indices)


def fusion_traffic(program: Program, instruction: Instruction) -> int:
    """Bytes that a fusion reads and writes: parameters that it only slices or updates count in part."""
    fused = program.computations[instruction.called("calls")[0]]
    makers = {maker.name: maker for name in output_names(fused) for maker in [resolve_views(fused, name)]}
    total = 0
    for name in output_names(fused):
        maker = resolve_views(fused, name)
        whole = fused.instructions[name].bytes
        total += whole if updated(fused, maker) is None else update_bytes(fused, maker)
    for index, name in enumerate(instruction.operands):
        if name in instruction.operands[:index]:
            continue
        total += read_bytes(fused, fused.parameter(index), makers)
    return total


def read_bytes(fused: Computation, instruction: Instruction, makers: dict[str, Instruction]) -> int:
    """How many bytes of a fusion's parameter (or of a view of it) the fusion reads."""
    part = 0
    for user in fused.users(instruction.name):
        first = user.operands[0] == instruction.name and user.operands.count(instruction.name) == 1
        if user.opcode in READS_PART and first:
            part += user.bytes
        elif user.opcode in ("bitcast", "reshape"):
            part += read_bytes(fused, user, makers)
        elif not (user.opcode in UPDATES and user.name in makers and first):
            return instruction.bytes
    return min(part, instruction.bytes)


def update_bytes(where: Computation, update: Instruction) -> int:
    """Bytes that a dynamic-update-slice (its second operand) or a scatter (its last third) writes."""
    third = len(update.operands) // 3
    names = update.operands[1:2] if update.opcode == "dynamic-update-slice" else update.operands[-third:]
    return sum(where.instructions[name].bytes for name in names)


def kernels(compiled: Compiled | Program | str, loop: Loop | None = None, cheapest: bool = False) -> dict[str, int]:
    """How many instructions are launched, by opcode, as executed; with `loop` in one trip of its body.

    Of a conditional's branches the one that launches most is counted, or with `cheapest` the one that launches least.
    """
    extreme = min if cheapest else max

    def size(branch: list[Ran]) -> int:
        return sum(one.times for one in branch)

    count: dict[str, int] = {}
    for ran in runs(parse(compiled), loop and loop.body, pick=lambda branches: extreme(branches, key=size)):
        count[ran.instruction.opcode] = count.get(ran.instruction.opcode, 0) + ran.times
    return count
