"""scripts/bench.py gpu: its arithmetic, on tiny shapes and this CPU; without a GPU it says so in one line."""

import json
import os
import pathlib
import subprocess
import sys

import bench
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import QUICKLY
from suites import attention, gpu

from jaxinfer import ops

pytestmark = pytest.mark.usefixtures("quickly_compiled")
HERE = pathlib.Path(__file__).parents[1]
WORDS = (
    *("--input-len", "8", "--output-len", "5", "--rows", "2", "--valid", "40", "--rounds", "2"),
    *("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--weights", "int8", "--dtype", "bfloat16"),
)


@pytest.fixture(autouse=True)
def few_layers(monkeypatch):
    monkeypatch.setattr(attention, "DISTINCT", 1 << 12)
    monkeypatch.setattr(gpu, "COPIES", 2)
    monkeypatch.setattr(gpu, "TURNS", 3)


def test_without_a_gpu_it_is_one_line():
    script = HERE.parent / "scripts" / "bench.py"
    environment = os.environ | QUICKLY | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run([sys.executable, script, "gpu"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "bench.py: the default backend is cpu, and this suite measures a GPU: install jaxinfer[cuda] where there is "
        "one, or take the suites latency and attention\n"
    )


def test_what_it_tells_adds_up(little, shape, capsys):
    args = bench.parse_args(["gpu", "--shape", str(shape), *WORDS])
    told = gpu.measure(args)
    assert len(capsys.readouterr().out.splitlines()) == len(told["decode"]) + len(told["attention"]) == 1 + 4
    assert told["shape"] == shape.stem
    D, F, V, N, K, H = 32, 50, 256, 6, 3, 8  # of the shape, one layer
    (line,) = told["decode"]
    weights = D * (2 * N * H + 2 * K * H) + 3 * D * F + V * D
    assert line["bytes_per_token"] == pytest.approx(weights, rel=0.25), "and scales, norms and the cache"
    seconds = line["ms_per_token"]["median"] / 1e3
    assert line["tokens_per_second"] == pytest.approx(1 / seconds, rel=0.01)
    assert line["gb_per_second"] == pytest.approx(line["bytes_per_token"] / seconds / 1e9, abs=0.006)
    ways = [(line["valid"], line["where"], line["kernel"]) for line in told["attention"]]
    assert ways == [(40, where, k) for where in ("slots", "pages") for k in ("ours", "plain")]
    for line in told["attention"]:
        moved = 2 * 2 * 2 * line["valid"] * 16 * 2
        assert line["gb_per_second"] == pytest.approx(moved / line["ms"]["median"] / 1e6, rel=0.1, abs=0.006)
        assert 0 <= line["share_beside"] <= 1 and told["copy"] >= line["plain_read"]
        assert (line["over_plain"] is None) == (line["kernel"] == "plain")


def test_a_peer_decodes_as_many_tokens_of_the_same_shape_in_turns(shape, tmp_path, capsys):
    raw = json.loads(shape.read_text()) | {"hidden_size": 48}  # transformers wants a multiple of the heads
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(raw))
    words = [*WORDS, "--weights", "bfloat16", "--dtype", "--peer", "transformers"]
    (line,) = gpu.measure(bench.parse_args(["gpu", "--shape", str(shape), *words]))["decode"]
    told, ratio = line["peer"], line["peer"]["ratio"]
    assert told["name"] == "transformers" and told["tokens_per_second"] > 0
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert f"transformers {told['tokens_per_second']:.1f} tokens/s" in capsys.readouterr().out


def test_pages_that_lie_anywhere_hold_what_slots_do():
    """Each row has pages of its own, and what is looked at is what they hold."""
    args = bench.parse_args(["gpu", *WORDS])
    pages = attention.scattered(attention.empty(args, 40, 40, "float32", True).pages)
    table = np.asarray(pages.table)
    assert len(set(table.reshape(-1).tolist())) == table.size and table.max() < pages.num
    assert (np.diff(table) != 1).any() and np.asarray(pages.holders).max() == 1
    cut = attention.empty(args, 40, 40, "float32", True).layers[0]
    layer = jax.tree.map(lambda x: jax.random.normal(jax.random.key(5), x.shape), cut)
    source = layer.source(jnp.array([40, 40]), pages)
    k, v = (x.x[0][table].transpose(0, 2, 1, 3, 4).reshape(2, 2, -1, 16) for x in (layer.k, layer.v))
    q, position = jnp.ones((2, 1, 4, 16)), jnp.array([[39], [20]])
    expected = ops.attend(q, k, v, position, attention.layer(args))
    got = ops.attend_looks([ops.Look(q, source)], position, attention.layer(args))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_it_refuses_what_it_cannot_measure():
    for words, says in (
        (["--heads", "5"], "--heads is 5: it must be a multiple of --kv-heads 8"),
        (["--output-len", "1"], "--output-len is 1: it must be at least 2"),
        (["--valid", "100000000"], "caches of 2 shapes, measured in turns, need"),
    ):
        with pytest.raises(ValueError, match=says):
            gpu.measure(bench.parse_args(["gpu", *words]))
