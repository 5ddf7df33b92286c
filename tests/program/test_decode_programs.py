"""What the compiled decode programs do with weights and cache: nothing is copied, and there is one cache, not two.

Nothing runs: parameters and caches are shapes. The sizes are such that no activation has as many numbers as a weight.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import cache as caches
from jaxinfer import kernels, ops, program, roofline
from jaxinfer.decoding import Decoder, State, decode_step
from jaxinfer.decoding.generate import run
from jaxinfer.models import param_shapes
from jaxinfer.sampling import Sampling
from jaxinfer.testing import tiny_config

pytestmark = pytest.mark.usefixtures("compiled_to_be_read")
SIZE = 4096
CONFIG = tiny_config(
    num_layers=2, vocab_size=1009, width=352, ffn_width=832, num_heads=6, num_kv_heads=3, head_width=64
)
BFLOAT16 = CONFIG.replace(dtype="bfloat16")
CONFIGS = pytest.mark.parametrize("config", [CONFIG, BFLOAT16], ids=["float32", "bfloat16"])
LOOPS = pytest.mark.parametrize(("rows", "prompt"), [(1, 4), (3, 0)], ids=["1 row and a prompt", "3 rows"])


def shapes(config, rows, size=SIZE):
    """(params, cache, one id a row), abstract."""
    cache = jax.eval_shape(lambda: caches.init_cache(config, rows, size))
    return param_shapes(config), cache, jax.ShapeDtypeStruct((rows,), jnp.int32)


@pytest.fixture(autouse=True, params=["auto", "reference"])
def products(request):
    """Every law holds with the platform's kernel and with XLA's own products, on which GPUs and meshes live."""
    with kernels.use(kernels.KernelChoice(linear=request.param)):
        yield


def step_program(config, rows, step=decode_step):
    return compiled_step(kernels.choice(), config, rows, step)


def loop_program(config, rows, prompt=0, loop=run):
    """The program of `generate`, which first takes in a prompt of so many tokens."""
    return compiled_loop(kernels.choice(), config, rows, prompt, loop)


@functools.cache
def compiled_step(_, config, rows, step):
    params, cache, ids = shapes(config, rows)
    return step.lower(params, config, ids, cache).compile()


@functools.cache
def compiled_loop(_, config, rows, prompt, loop):
    params, cache, budget = shapes(config, rows)
    state = jax.eval_shape(State.init, cache)
    sampling = Sampling(temperature=0.8, top_p=0.9, top_k=40).rows(rows, config.vocab_size, (2,))
    ids = jax.ShapeDtypeStruct((rows, prompt), jnp.int32) if prompt else None
    static = {"model": Decoder(config), "process": None, "buffer": 64}
    num = budget if prompt else None
    return loop.lower(params, state, ids, num, sampling, budget, jax.random.key(0), **static).compile()


def weights(config):
    """The shapes of all that a token is multiplied with."""
    return {leaf.shape for leaf in jax.tree.leaves(param_shapes(config)) if len(leaf.shape) > 1}


def cache_shapes(config, rows):
    return {leaf.shape for leaf in jax.tree.leaves(shapes(config, rows)[1].layers)}


def undonated(function, *static):
    """The same function, jitted as if whoever wrote it had forgotten to donate; traced anew each time."""

    @functools.wraps(function.__wrapped__)
    def anew(*args, **options):
        return function.__wrapped__(*args, **options)

    return jax.jit(anew, static_argnames=static)


# --- the laws ----------------------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_decode_step_copies_no_weight_and_no_cache(config, rows):
    compiled = step_program(config, rows)
    # fused=True: nor may a product read its weight through a convert that is never stored (slow on CPU)
    assert not program.copies(compiled, weights(config), fused=True)
    assert not program.writes(compiled, weights(config) | cache_shapes(config, rows))


@CONFIGS
@LOOPS
def test_the_generate_loop_copies_no_weight_and_no_cache(config, rows, prompt):
    compiled = loop_program(config, rows, prompt)
    assert not program.copies(compiled, weights(config), fused=True)
    assert not program.writes(compiled, weights(config) | cache_shapes(config, rows))


@CONFIGS
@LOOPS
def test_the_generate_loop_holds_one_cache_and_not_two(config, rows, prompt):
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes(config, rows)[1].layers))
    memory = program.temporaries(loop_program(config, rows, prompt))
    assert memory["alias"] >= cache_bytes
    assert memory["temp"] < cache_bytes / 2


@pytest.mark.parametrize("rows", [1, 4])
def test_a_decode_step_moves_the_bytes_of_weights_and_cache(rows):
    moved = program.bytes_moved(step_program(CONFIG, rows))
    assert 1 <= moved / roofline.decode_bytes(CONFIG, rows, SIZE) < 1.2


# --- the laws can be broken --------------------------------------------------------------------------------------


def test_a_loop_whose_cache_is_not_donated_is_found():
    rows = 3
    compiled = loop_program(CONFIG, rows, loop=undonated(run, "model", "process", "buffer"))
    assert program.temporaries(compiled)["alias"] == 0
    assert program.writes(compiled, cache_shapes(CONFIG, rows))


def test_a_step_whose_cache_is_not_donated_is_found():
    compiled = step_program(CONFIG, 2, undonated(decode_step, "config"))
    assert len(program.copies(compiled, cache_shapes(CONFIG, 2))) == 2 * len(CONFIG.layers)


def test_a_plain_product_of_one_bfloat16_row_is_found(monkeypatch):
    def plain(x, w, equation, bias=None, dtype=None, add=0):
        return add + jnp.einsum(equation, x, w)

    monkeypatch.setattr(ops, "linear", plain)
    compiled = step_program(BFLOAT16, 1, undonated(decode_step, "config"))
    found = program.copies(compiled, weights(BFLOAT16), fused=True)
    assert ("convert", "f32") in {(copy.opcode, copy.shape.dtype) for copy in found}


def test_a_cache_in_the_layout_of_most_libraries_is_found():
    # [B, S, K, H], as jax.nn.dot_product_attention takes it, is transposed at every step
    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v)

    shape = (2, SIZE, 3, 64)
    kv = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(attend).lower(jax.ShapeDtypeStruct((2, 1, 6, 64), jnp.float32), kv, kv).compile()
    assert program.copies(compiled, [shape], fused=True)
