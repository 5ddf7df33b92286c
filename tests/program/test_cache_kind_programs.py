"""What the compiled loops do with each kind of cache: it is updated in place, never held twice, never gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from compiling import quickly

from jaxinfer import cache as caches
from jaxinfer import program
from jaxinfer.decoding import Decoder, State
from jaxinfer.decoding.generate import run
from jaxinfer.models import param_shapes
from jaxinfer.sampling import Sampling
from jaxinfer.testing import tiny_config

pytestmark = pytest.mark.usefixtures("compiled_to_be_read")
ROWS, SIZE = 3, 4096
PLAIN = tiny_config(num_layers=2, vocab_size=509, width=64, ffn_width=96, num_heads=6, num_kv_heads=3, head_width=64)
LOCAL = PLAIN.replace(layers=(PLAIN.layers[0].replace(window=1024), PLAIN.layers[1]))
KINDS = (
    "dense", "auto", "int8", "float8", "int4", "paged", "paged+int8", "paged:page=32+int4", "ring:window=1024+int8",
    "streaming:sinks=4,recent=1020", "h2o:budget=1024",
)  # fmt: skip


@functools.cache
def loop(kind, hurried=True):
    """The compiled loop of `generate`, and the cache that it carries."""
    config = LOCAL if kind == "auto" else PLAIN
    cache = jax.eval_shape(lambda: caches.init_cache(config, ROWS, SIZE, kind))
    state = jax.eval_shape(State.init, cache)
    sampling = Sampling(temperature=0.0).rows(ROWS, config.vocab_size, (2,))
    budget = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    static = {"model": Decoder(config), "process": None, "buffer": 64}
    arguments = (param_shapes(config), state, None, None, sampling, budget, jax.random.key(0))
    return run.lower(*arguments, **static).compile(), cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_holds_one_cache_of_any_kind_and_a_tenth_of_it_beside(kind):
    compiled, cache = loop(kind)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    memory = program.temporaries(compiled)
    assert memory["alias"] >= held
    assert memory["temp"] < 0.1 * held + 1_500_000, "scores, logits and a block of what is read"


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_writes_no_array_of_the_cache_anew(kind):
    compiled, cache = loop(kind)
    large = {leaf.shape for leaf in jax.tree.leaves(cache.layers) if leaf.size > 100_000}
    assert large
    assert not program.writes(compiled, large)
    assert not program.copies(compiled, large)


@pytest.mark.parametrize("kind", ["int8", "float8", "int4", "paged", "paged+int8", "paged:page=32+int4"])
def test_what_is_read_is_never_made_whole(kind):
    compiled, cache = loop(kind)
    whole = {(ROWS, 3, SIZE, 64), (ROWS, 3, SIZE // 32, 32, 64), (ROWS, SIZE // 16, 3, 16, 64)}
    assert not program.writes(compiled, whole - {leaf.shape for leaf in jax.tree.leaves(cache.layers)})
    assert not program.copies(compiled, whole)


def test_a_program_that_is_compiled_to_be_read_is_the_one_that_users_run():
    read, _ = loop("paged+int8")
    jax.clear_caches()
    with quickly(False):
        usual, _ = loop("paged+int8", hurried=False)
    # but for the lines of the source, which differ with who asked
    texts = [re.sub(r", metadata={[^}]*}", "", one.as_text().partition("\n%")[2]) for one in (read, usual)]
    assert read is not usual and texts[0] == texts[1]
    assert program.temporaries(read) == program.temporaries(usual)
