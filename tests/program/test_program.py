"""What `program` says of compiled programs: planted copies are found, clean programs are clean, counts are exact."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import program

TEXTS = pathlib.Path(__file__).parent / "texts"
D, F = 512, 1024
WEIGHT = (F, D)
CACHE = (2, 4, 256, 16)


def compiled(function, *shapes, **options):
    """The program for arguments of these (shape, dtype), never allocated."""
    specs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function, **options).lower(*specs).compile()


def product(x, w):
    return jnp.einsum("BD,FD->BF", x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def write(cache, new, position):
    return jax.vmap(lambda c, n, p: c.at[:, p].set(n, mode="drop"))(cache, new, position)


WRITE = ((CACHE, jnp.float32), ((2, 4, 1, 16), jnp.float32), ((2, 1), jnp.int32))


# --- copies ------------------------------------------------------------------------------------------------------


def test_a_weight_converted_for_one_row_is_found():
    found = program.copies(compiled(product, ((1, D), jnp.bfloat16), (WEIGHT, jnp.bfloat16)), [WEIGHT])
    assert [(w.opcode, w.shape.dtype, w.bytes, w.times) for w in found] == [("convert", "f32", 4 * D * F, 1)]
    assert "convert to f32" in str(found[0])


def test_a_product_of_two_rows_copies_no_weight():
    two = compiled(product, ((2, D), jnp.bfloat16), (WEIGHT, jnp.bfloat16))
    assert not program.copies(two, [WEIGHT], fused=True)
    assert not program.writes(two, [WEIGHT])


def test_a_transposed_copy_of_a_weight_is_found():
    found = program.copies(compiled(lambda w: w.T + 0, (WEIGHT, jnp.float32)), [WEIGHT])
    assert [(w.opcode, w.shape.dims) for w in found] == [("copy", (D, F))]


def test_a_weight_sliced_from_a_stack_is_found_in_each_trip():
    def stacked(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    found = program.copies(compiled(stacked, ((4, 64), jnp.float32), ((7, 64, 64), jnp.float32)), [(64, 64)])
    assert [(w.opcode, w.times, w.loop) for w in found] == [("dynamic-slice", 7, None)]


def test_a_convert_inside_a_fusion_is_listed_only_when_asked_for():
    # XLA:CPU reads this weight through a transposed convert, element by element, and stores neither.
    hidden = compiled(lambda x, w: x @ w.T, ((1, D), jnp.bfloat16), (WEIGHT, jnp.bfloat16))
    assert not program.copies(hidden, [WEIGHT])
    assert {w.opcode for w in program.copies(hidden, [WEIGHT], fused=True)} >= {"convert"}
    assert not any(w.written for w in program.copies(hidden, [WEIGHT], fused=True))


@pytest.mark.parametrize("shape", [WEIGHT, (D, F), (F // 64, 64, D), (1, D, F), D * F])
def test_a_shape_is_known_however_its_axes_are_split_and_ordered(shape):
    assert program.copies(compiled(lambda w: w.T + 0, (WEIGHT, jnp.float32)), [shape])


def test_a_table_converted_for_a_few_of_its_rows_is_found_only_where_the_whole_is():
    def look_up(table, ids):
        return table[ids].astype(jnp.float32)

    def loop(table, ids):
        def body(state):
            seen, ids = state
            rows = look_up(table, ids)
            return seen + rows, (ids + rows[:, 0].astype(jnp.int32)) % F

        return jax.lax.while_loop(lambda s: s[0][0, 0] < 9, body, (jnp.zeros((3, D)), ids))[0]

    table = ((WEIGHT, jnp.bfloat16), ((3,), jnp.int32))
    assert not program.copies(compiled(look_up, *table), [WEIGHT], fused=True)
    ahead = program.copies(compiled(loop, *table), [WEIGHT])  # what jax before 0.11.2 does on a CPU
    assert all((copy.opcode, copy.times, copy.loop) == ("convert", 1, None) for copy in ahead)
    assert bool(ahead) == (jax.__version_info__ < (0, 11, 2))


def test_copies_can_be_asked_for_by_size():
    transposed = compiled(lambda w: w.T + 0, (WEIGHT, jnp.float32))
    assert program.copies(transposed, at_least=D * F)
    assert not program.copies(transposed, at_least=D * F + 1)
    assert not program.copies(transposed, [(D, F + 1)])


def test_a_dequantized_weight_is_a_write():
    def dequantized(x, w, scale):
        return x @ (w.astype(jnp.float32) * scale[:, None]).T

    found = program.writes(
        compiled(dequantized, ((8, D), jnp.float32), (WEIGHT, jnp.int8), ((F,), jnp.float32)), [WEIGHT]
    )
    assert found and found[0].shape.dtype == "f32"


# --- caches ------------------------------------------------------------------------------------------------------


def test_a_cache_that_is_not_donated_is_copied():
    kept = compiled(write, *WRITE)
    assert [w.opcode for w in program.copies(kept, [CACHE])] == ["copy"]
    assert program.temporaries(kept)["alias"] == 0


def test_a_donated_cache_is_written_in_place():
    spent = compiled(write, *WRITE, donate_argnums=0)
    assert not program.copies(spent, [CACHE], fused=True)
    assert not program.writes(spent, [CACHE])
    memory = program.temporaries(spent)
    cache_bytes = 4 * 2 * 4 * 256 * 16
    assert memory["alias"] == cache_bytes
    assert memory["temp"] < cache_bytes / 2
    assert memory["total"] == memory["temp"] + memory["argument"] + memory["output"] - memory["alias"]


def test_a_second_cache_in_a_loop_is_found():
    def loop(cache, new):
        def body(_, carry):
            old, _ = carry
            return jax.lax.dynamic_update_slice(old, new, (0, 0, 3, 0)), old + 1

        return jax.lax.fori_loop(0, 5, body, (cache, cache))

    spent = compiled(loop, (CACHE, jnp.float32), ((2, 4, 1, 16), jnp.float32), donate_argnums=0)
    assert program.writes(spent, [CACHE])


# --- loops -------------------------------------------------------------------------------------------------------


def nested(x):
    def inner(_, x):
        return jnp.sin(x) @ x

    def outer(x, _):
        return jax.lax.fori_loop(0, 3, inner, x), None

    return jax.lax.scan(outer, x, None, length=5)[0]


def until(x):
    return jax.lax.while_loop(lambda s: (s[0] < 9) & (s[1][0, 0] < 1), lambda s: (s[0] + 1, s[1] @ s[1]), (0, x))[1]


def test_trip_counts_multiply_through_nested_loops():
    both = compiled(nested, ((64, 64), jnp.float32))
    (loop,) = program.while_loops(both)
    assert loop.trip_count == 5
    text = both.as_text()
    (dots,) = {ran.times for ran in dots_of(text)}
    assert dots == 15


def dots_of(text):
    parsed = program.parse(text)
    return [
        ran
        for ran in program.runs(parsed)
        for _, inner in program.unfused(parsed, ran.computation, ran.instruction)
        if inner.opcode == "dot"
    ]


def test_trip_counts_are_found_where_xla_does_not_write_them():
    text = compiled(nested, ((64, 64), jnp.float32)).as_text()
    plain = program.re.sub(r", backend_config=\{.*\}$", "", text, flags=program.re.MULTILINE)
    assert "known_trip_count" in text and "known_trip_count" not in plain
    assert [loop.trip_count for loop in program.while_loops(plain)] == [5]
    assert [ran.times for ran in dots_of(plain)] == [15]


def test_a_loop_that_may_stop_early_counts_once_and_says_so():
    early = compiled(until, ((64, 64), jnp.float32))
    (loop,) = program.while_loops(early)
    assert loop.trip_count is None
    assert {"f32[64,64]", "s32[]"} <= set(map(str, loop.state))
    assert {(ran.times, ran.loop) for ran in dots_of(early.as_text())} == {(1, loop.name)}


def test_loops_in_calls_and_branches_are_listed_and_loops_in_loops_are_not():
    def branches(flag, x):
        return jax.lax.cond(flag, nested, until, x)

    found = program.while_loops(compiled(branches, ((), jnp.bool_), ((64, 64), jnp.float32)))
    assert sorted(str(loop.trip_count) for loop in found) == ["5", "None"]


# --- bytes -------------------------------------------------------------------------------------------------------


def test_bytes_moved_are_operands_and_results():
    moved = program.bytes_moved(compiled(product, ((2, D), jnp.float32), (WEIGHT, jnp.float32)))
    assert moved == 4 * (2 * D + D * F + 2 * F)


def test_bytes_moved_count_the_part_of_a_cache_that_is_written():
    moved = program.bytes_moved(compiled(write, *WRITE, donate_argnums=0))
    assert moved < 4 * 2 * 4 * 16 * 8  # a few times the new keys, and nowhere near the cache
    assert program.bytes_moved(compiled(write, *WRITE)) > 2 * 4 * 2 * 4 * 256 * 16


def test_bytes_moved_of_a_loop_are_those_of_one_trip():
    early = compiled(until, ((256, 256), jnp.float32))
    (loop,) = program.while_loops(early)
    square = 4 * 256 * 256
    assert program.bytes_moved(early, loop) == pytest.approx(3 * square, rel=0.4)  # a copy of the carry may come on top


def test_a_scan_reads_its_stack_once():
    def stacked(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    stack = 4 * 7 * 256 * 256
    moved = program.bytes_moved(compiled(stacked, ((4, 256), jnp.float32), ((7, 256, 256), jnp.float32)))
    assert 3 * stack <= moved < 3.2 * stack  # each slice is read, written, and read again; never 7 times the stack


# --- collectives -------------------------------------------------------------------------------------------------

EMULATED = """
import json, jax, jax.numpy as jnp
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType, PartitionSpec as P
from jaxinfer import program

mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
S = jax.ShapeDtypeStruct((8, 64), jnp.float32)

def report(function, out=P(), shape=S):
    shared = jax.shard_map(function, mesh=mesh, in_specs=P(None, "tensor"), out_specs=out, check_vma=False)
    compiled = jax.jit(shared).lower(shape).compile()
    return [program.collectives(compiled), program.collectives(compiled, cheapest=True)]

lax = jax.lax
psum = lambda x: lax.psum(x, "tensor")
print(json.dumps({
    "psum": report(psum),
    "all_gather": report(lambda x: lax.all_gather(x, "tensor", axis=1, tiled=True)),
    "reduce_scatter": report(lambda x: lax.psum_scatter(x, "tensor", scatter_dimension=0, tiled=True), P("tensor")),
    "all_to_all": report(lambda x: lax.all_to_all(x, "tensor", 0, 1, tiled=True), P("tensor")),
    "permute": report(lambda x: lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)]), P(None, "tensor")),
    "scan": report(lambda x: lax.scan(lambda c, _: (psum(jnp.sin(c)), None), x, None, length=6)[0]),
    "while": report(lambda x: lax.while_loop(lambda s: s[0, 0] < 1, lambda s: psum(jnp.sin(s)), x)),
    "cond": report(lambda x: lax.cond(psum(x.sum()) > 0, lambda: psum(psum(jnp.sin(x)) * x), lambda: x)),
    "nothing": report(lambda x: x * 2, P(None, "tensor")),
}))
"""


@pytest.fixture(scope="module")
def emulated():
    """What four emulated devices exchange, by program; in a process of its own, since devices are counted once."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", EMULATED], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOCAL = 4 * 8 * 16  # bytes of a device's [8, 16] float32


@pytest.mark.parametrize(
    ("name", "kind", "count", "bytes"),
    [
        ("psum", "all-reduce", 1, LOCAL),
        ("all_gather", "all-gather", 1, 4 * LOCAL),
        ("reduce_scatter", "reduce-scatter", 1, LOCAL),
        ("all_to_all", "all-to-all", 1, LOCAL),
        ("permute", "collective-permute", 1, LOCAL),
        ("scan", "all-reduce", 6, 6 * LOCAL),
    ],
)
def test_collectives_are_counted_as_executed(emulated, name, kind, count, bytes):
    expected = [{"kind": kind, "count": count, "bytes": bytes, "loop": None}]
    assert emulated[name] == [expected, expected]


def test_a_program_without_collectives_has_none(emulated):
    assert emulated["nothing"] == [[], []]


def test_collectives_of_a_loop_of_unknown_length_name_it(emulated):
    (row,) = emulated["while"][0]
    assert (row["kind"], row["count"], row["bytes"]) == ("all-reduce", 1, LOCAL)
    assert row["loop"].startswith("while")


def test_collectives_count_one_branch_of_a_conditional(emulated):
    (dearest,), (cheapest,) = emulated["cond"]
    assert (dearest["count"], cheapest["count"]) == (3, 1)  # the flag's own sum, and two in the branch taken rarely


# --- programs for an H200 ----------------------------------------------------------------------------------------


def test_a_slice_fetched_asynchronously_on_an_h200_is_a_copy():
    text = (TEXTS / "h200_scan.txt").read_text()
    (found,) = program.copies(text, [(64, 64)])
    assert (found.opcode, found.times) == ("dynamic-slice", 7)
    assert [loop.trip_count for loop in program.while_loops(text)] == [7]


def test_asynchronous_collectives_on_an_h200_count_once():
    rows = {row["kind"]: row for row in program.collectives((TEXTS / "h200_collectives.txt").read_text())}
    assert {kind: row["count"] for kind, row in rows.items()} == {
        "all-to-all": 6,
        "all-gather": 3,
        "collective-permute": 15,
        "reduce-scatter": 3,
    }
    assert rows["all-gather"]["bytes"] == 3 * 2 * 8 * 1024  # the whole result, not the tuple that its start gives
    assert rows["reduce-scatter"]["bytes"] == 3 * 2 * (8 * 4096 + 8 * 1024)


def test_kernels_are_counted_as_launched():
    launched = program.kernels((TEXTS / "h200_scan.txt").read_text())
    (loop,) = program.while_loops((TEXTS / "h200_scan.txt").read_text())
    assert launched["fusion"] == 7 * program.kernels((TEXTS / "h200_scan.txt").read_text(), loop)["fusion"] + 8


# --- the text ----------------------------------------------------------------------------------------------------

ODD = """HloModule odd

%body (p: (s32[], bf16[2,<=8])) -> (s32[], bf16[2,<=8]) {
  ROOT %p = (s32[], bf16[2,<=8]{1,0:T(8,128)(2,1)}) parameter(0)
}

ENTRY main {
  a = s4[4,3]{1,0:E(4)} parameter(0), metadata={op_name="not ) an \\"end"}
  b = s4[4,3]{1,0} copy(s4[4,3]{1,0:E(4)} a)
  t = (s4[4,3]{1,0}, /*index=1*/token[], pred[], f8e4m3fn[5]) custom-call(%b, /*index=1*/%a), custom_call_target="x=(y"
  ROOT g = pred[] get-tuple-element(t), index=2
}
"""


def test_the_text_is_read_as_it_is_written():
    parsed = program.parse(ODD)
    entry = parsed.computations["main"]
    assert (parsed.entry, entry.root) == ("main", "g")
    assert [entry.instructions[name].bytes for name in "abtg"] == [6, 12, 12 + 0 + 1 + 5, 1]
    assert entry.instructions["b"].operands == ("a",)
    assert entry.instructions["t"].operands == ("b", "a")
    assert str(parsed.computations["body"].instructions["p"].shapes[1]) == "bf16[2,8]"


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="0 ENTRY computations"):
        program.copies("module @jit_f {}")
