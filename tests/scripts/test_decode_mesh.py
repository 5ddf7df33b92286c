"""decode.py on a mesh of emulated devices: the same text, and a report that says what the mesh costs."""

import re

import pytest
from covering import in_full

EIGHT = ("--cpu-devices", "8", "--mesh")


WORDS = ("--prompt", "def f(x):", "import os", "a longer prompt than the others", "--max-new-tokens", "12")
# where the report speaks of the compiled program
AS_USERS_DO = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}


def told(alone, model, *words):
    return alone("--model", model, *WORDS, *words, **({} if "1" in words else AS_USERS_DO))[1]


@pytest.mark.parametrize("temperature", [in_full("0"), "1"])
def test_a_mesh_changes_where_arrays_live_and_nothing_else(alone, tiny, temperature):
    plain, sharded = (
        told(alone, tiny, "--temperature", temperature, *words) for words in ((), (*EIGHT, "data=2,tensor=4"))
    )
    assert (plain["ids"], plain["text"], plain["finish"]) == (sharded["ids"], sharded["text"], sharded["finish"])
    assert (plain["mesh"], plain["devices"], plain["collectives"]) == ({}, 1, [])
    assert (sharded["mesh"], sharded["devices"]) == ({"data": 2, "tensor": 4}, 8)


def test_the_report_says_what_each_device_holds_and_sends(alone, tiny):
    plain = told(alone, tiny, "--temperature", "0")
    assert plain["per_device"] == {"weight_bytes": plain["weight_bytes"], "cache_bytes": plain["cache"]["bytes"]}
    sharded = told(alone, tiny, "--temperature", "0", *EIGHT, "data=2,tensor=4")
    held, cache = sharded["per_device"], sharded["cache"]
    # 4 rows of 3, 12 KV heads of 3: a device has 2 rows, and 3 heads; then its rows' lengths
    assert held["cache_bytes"] == 2 * 2 * 2 * cache["size"] * 3 * 8 * 4 + 2 * 4
    assert sharded["weight_bytes"] / 4 <= held["weight_bytes"] < sharded["weight_bytes"] / 3
    sent = {row["kind"]: row for row in sharded["collectives"]}
    assert all(set(row) == {"kind", "count", "bytes"} for row in sharded["collectives"])
    assert 2 * 2 <= sent["all-reduce"]["count"] <= 2 * 2 + 4  # two a layer; embedding, draw and end
    assert sum(row["bytes"] for row in sharded["collectives"]) < 10_000  # no weight and no cache


def test_people_see_the_mesh_in_one_line(start, tiny):
    words = ("--model", tiny, "--prompt", "def f(x):", "--max-new-tokens", "12", *EIGHT, "data=2,tensor=4")
    out, err = start(*words).communicate(timeout=120)
    assert out.startswith("def f(x):")
    assert re.search(r"on 8 x cpu", err)
    line = r"mesh data=2 tensor=4: [\d.]+ kB of weights and [\d.]+ kB of cache a device; a step: \d+ all-reduces \("
    assert re.match(line, err.splitlines()[-1])


def test_random_weights_are_those_of_one_device(alone, shape):
    words = ("--random-weights", shape, "--prompt-length", "9", "--max-new-tokens", "12")
    plain, sharded = (alone(*words, *more)[1] for more in ((), (*EIGHT, "tensor=-1")))
    assert plain["ids"] == sharded["ids"]
    assert sharded["mesh"] == {"tensor": 8}


# --- presets and refusals ------------------------------------------------------------------------------------------


def test_a_preset_may_hold_the_mesh(decode, tmp_path):
    preset = tmp_path / "preset.toml"
    preset.write_text('mesh = "data=2,tensor=4"\ncpu_devices = 8\nnum_processes = 2\ncoordinator = "localhost:9000"\n')
    args = decode.parse_args(["--config", str(preset), "--prompt", "a", "--process-id", "1", "--mesh", "tensor=8"])
    assert (args.mesh, args.cpu_devices, args.num_processes, args.coordinator) == ("tensor=8", 8, 2, "localhost:9000")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--mesh tensor", "cannot be read at 'tensor'"),
        ("--mesh tensor=2,tensor=4", "cannot be read at 'tensor=4'"),
        ("--cpu-devices 0", "--cpu-devices is 0: it must be at least 1"),
        ("--num-processes 2", "--num-processes without --coordinator and --process-id"),
        ("--num-processes 2 --process-id 1", "--num-processes and --process-id without --coordinator"),
        ("--coordinator localhost:1234", "--coordinator without --num-processes and --process-id"),
        ("--coordinator localhost --num-processes 2 --process-id 1", "coordinator 'localhost' is no address"),
        ("--coordinator a:99999 --num-processes 2 --process-id 1", "coordinator 'a:99999' is no address"),
        ("--coordinator a:9000 --num-processes 2 --process-id 2", "--process-id is 2 but --num-processes is 2: give 0"),
        ("--coordinator a:9000 --num-processes 0 --process-id 0", "--num-processes is 0"),
        ("--coordinator a:9000 --distributed", "--distributed and --coordinator contradict"),
        ("--join-timeout 0 --mesh tensor=1", "--join-timeout is 0"),
        ("--distributed --prompt-file -", "--prompt-file - reads one process's stdin"),
        ("--distributed --chat", "--chat without a prompt reads one process's stdin"),
    ],
)
def test_flags_of_meshes_and_processes_that_make_no_sense_are_refused(refused, words, says):
    source = [] if {"--chat", "--prompt-file"} & set(words.split()) else ["--prompt", "a"]
    refused([*source, *words.split()], says, 2)


def test_emulated_devices_are_refused_where_another_platform_is_asked_for(refused, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    says = "--cpu-devices 8 emulates devices on the CPU but JAX_PLATFORMS is cuda"
    refused(["--prompt", "a", "--cpu-devices", "8"], says, 2)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--mesh tensr=2", "mesh axis 'tensr' is not known"),
        ("--mesh tensor=0", "mesh tensor=0: sizes must be at least 1"),
        ("--distributed", "--distributed finds no TPU pod, Slurm, Kubernetes or Open MPI job"),
    ],
)
def test_what_is_no_mesh_is_refused(refused, words, says):
    refused(["--prompt", "a", "--no-compile-cache", *words.split()], says, 1)


def test_a_mesh_must_fit_the_devices(start):
    asked = {"tensor=16": "needs 16 devices but there are 8", "data=-1,tensor=3": "3 does not divide the 8 devices"}
    runs = {mesh: start("--prompt", "a", *EIGHT, mesh) for mesh in asked}
    for mesh, says in asked.items():
        out, err = runs[mesh].communicate(timeout=60)
        assert (runs[mesh].returncode, out, err.count("\n")) == (1, "", 1), err
        assert says in err
