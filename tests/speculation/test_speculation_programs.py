"""What the compiled loop of speculation does: one loop, one cache of each model, nothing copied, no way to the host.

Nothing runs: parameters and caches are shapes. The sizes are such that no activation has as many numbers as a weight.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from covering import in_full

from jaxinfer import cache as caches
from jaxinfer import models, program
from jaxinfer.decoding import Decoder, State
from jaxinfer.models import param_shapes
from jaxinfer.sampling import Sampling
from jaxinfer.speculation import HeadDraft, LayersDraft, ModelDraft, NGram, Tree
from jaxinfer.speculation.loop import run
from jaxinfer.speculation.plan import Plan
from jaxinfer.testing import tiny_config

pytestmark = pytest.mark.usefixtures("compiled_to_be_read")
SIZE, ROWS = 4096, 2
CONFIG = tiny_config(
    num_layers=2, vocab_size=1009, width=352, ffn_width=832, num_heads=6, num_kv_heads=3, head_width=64
)
SMALL = tiny_config(num_layers=1, vocab_size=1009, width=224, ffn_width=544, num_heads=5, num_kv_heads=5, head_width=32)
USUAL = {"model": "adaptive", "head": "tree", "layers": "chain", "ngram": "chain"}
CASES = [
    (draft, shape) if shape == usual else in_full(draft, shape)
    for draft, usual in USUAL.items()
    for shape in ("chain", "tree", "adaptive")
    if draft != "ngram" or shape != "tree"
]


def draft_of(kind):
    """A draft, its arrays abstract."""
    match kind:
        case "model":
            return ModelDraft(param_shapes(SMALL), SMALL)
        case "head":
            own = models.head_config(CONFIG)
            return HeadDraft(models.head_shapes(own), param_shapes(CONFIG), own, CONFIG)
        case "layers":
            return LayersDraft(param_shapes(CONFIG), CONFIG, 1)
    return NGram()


@functools.cache
def compiled(kind, shape, prompt=16):
    """The program for rows that begin with a prompt."""
    plan = Plan(Tree.branching(3, 2) if shape == "tree" else Tree.chain(4), "shared", shape == "adaptive")
    cache = jax.eval_shape(lambda: caches.init_cache(CONFIG, ROWS, SIZE, max_pending=plan.max_pending))
    sampling = Sampling(temperature=0.8).rows(ROWS, CONFIG.vocab_size, (2,))
    ids, num = jax.ShapeDtypeStruct((ROWS, prompt), jnp.int32), jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    return run.lower(
        param_shapes(CONFIG), draft_of(kind), jax.eval_shape(State.init, cache), None, ids, num, sampling, num,
        jax.random.key(0), jnp.float32(0.2), model=Decoder(CONFIG), process=None, buffer=64, plan=plan, fresh=True,
    ).compile()  # fmt: skip


def matrices(*configs):
    return {leaf.shape for config in configs for leaf in jax.tree.leaves(param_shapes(config)) if len(leaf.shape) > 1}


def cache_of(config):
    """Shapes and bytes."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda: caches.init_cache(config, ROWS, SIZE)).layers)
    return {x.shape for x in arrays}, sum(x.size * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_loop_is_one_and_copies_no_weight_and_no_cache(kind, shape):
    made = compiled(kind, shape)
    loops = [loop for loop in program.while_loops(made) if loop.trip_count is None]
    assert len(loops) == 1
    shapes, _ = cache_of(CONFIG)
    found = program.writes(made, matrices(CONFIG, SMALL) | shapes | cache_of(SMALL)[0])
    assert not [write for write in found if write.loop]  # before it, the draft's cache is made
    assert "callback" not in made.as_text()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_the_loop_holds_one_cache_of_the_target_and_one_of_the_draft(kind, shape):
    memory = program.temporaries(compiled(kind, shape))
    own = {"model": cache_of(SMALL)[1], "head": cache_of(CONFIG)[1] // 2}.get(kind, 0)
    target = cache_of(CONFIG)[1]
    assert memory["alias"] >= target
    assert memory["temp"] < own * 1.1 + target / 2
