"""Kinds of cache on meshes: what a step sends between devices, and positions that are split over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer import mesh, models, program
from jaxinfer.cache import init_cache
from jaxinfer.testing import device_bytes, tiny_config, tiny_params

ROWS, SIZE = 4, 64
CONFIG = tiny_config(num_layers=2, num_heads=4, num_kv_heads=2, width=32, ffn_width=64, vocab_size=64)
KINDS = ("paged:page=8", "paged:page=8+int8", "int8", "int4:group=8,residual=8", "ring:window=12",
         "streaming:sinks=2,recent=8", "h2o:budget=12,recent=4", "snapkv:budget=16,window=4")  # fmt: skip
PROMPTS = [list(range(1, 25)), [30, 31], [40, 41, 42, 43, 44, 45, 46], [9]]


def lying(tree, words):
    """A tree of shapes that lie as their letters say on the ambient mesh."""
    places = mesh.shardings(words, mesh.concrete())
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places)


@functools.cache
def sent(kind, axes, on_mesh):
    """[(kind, count, bytes)] of a decode step."""
    with on_mesh(axes):
        cache = jax.eval_shape(lambda: init_cache(CONFIG, ROWS, SIZE, kind))
        params = lying(models.param_shapes(CONFIG), models.letters(CONFIG))
        ids = jnp.arange(ROWS)
        compiled = jaxinfer.decode_step.lower(params, CONFIG, ids, lying(cache, cache.letters())).compile()
    return [(row["kind"], row["count"], row["bytes"]) for row in program.collectives(compiled, True)]


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_their_pages_stay_on_their_devices(kind, on_mesh):
    for name, count, size in sent(kind, "data=2", on_mesh):
        # one byte or number a row at most: how far the longest row goes, say
        assert name == "all-reduce" and size <= 64 * count, (name, count, size)


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_heads_stay_on_their_devices(kind, on_mesh):
    plain = {name: (count, size) for name, count, size in sent("dense", "tensor=2", on_mesh)}
    own = {name: (count, size) for name, count, size in sent(kind, "tensor=2", on_mesh)}
    assert set(own) <= set(plain)
    more = own["all-reduce"][1] - plain["all-reduce"][1]
    assert 0 <= more <= 64 * len(CONFIG.layers), "beside what the products send, a number a row"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", ["data=2", "tensor=2", "data=2,tensor=2"])
def test_a_device_holds_its_part_of_every_kind(kind, axes, on_mesh):
    with on_mesh(axes) as devices:
        cache = init_cache(CONFIG, ROWS, SIZE, kind)
        held = device_bytes(cache.layers)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert held == pytest.approx(whole / devices.size, rel=0.01)


SPLIT = ("auto", "dense+int8", "dense+float8", "int4:group=8,residual=16", "ring:window=12", "paged:page=8")
WHERE = (("seq=2", ""), ("data=2,seq=2", "ngram"))


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    ("kind", "axes", "draft"),
    [(kind, *where) for kind in SPLIT for where in WHERE if where[0] == "data=2,seq=2" or kind in ("auto", SPLIT[3])],
)
def test_positions_that_are_split_over_devices_say_what_one_device_says(kind, axes, draft, on_mesh):
    def say(axes):
        with on_mesh(axes):
            config = CONFIG
            params = tiny_params(CONFIG)
            if axes:
                params = mesh.shard(params, models.letters(CONFIG))
            cache = init_cache(config, ROWS, SIZE, kind, max_pending=5)
            if not draft:
                return np.asarray(jaxinfer.generate(params, config, PROMPTS, cache=cache, max_new_tokens=32).ids)
            ngram = jaxinfer.speculation.NGram()
            return np.asarray(
                jaxinfer.speculate(params, config, PROMPTS, draft=ngram, cache=cache, max_new_tokens=32).ids
            )

    np.testing.assert_array_equal(say(axes), say(""))
