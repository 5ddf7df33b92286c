"""A cache in bfloat16, kept as numbers or by their bits: the same to all who read it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import in_full

import jaxinfer
from jaxinfer import kernels
from jaxinfer.cache import kinds
from jaxinfer.kernels import KernelChoice, native
from jaxinfer.quantization import Bits, Codes, Plain
from jaxinfer.testing import tiny_model

pytestmark = pytest.mark.usefixtures("quickly_compiled")
PROMPTS = [[5, 6, 7, 8, 9, 5, 6, 7, 8, 20, 21, 22, 5, 6, 7, 8, 9, 1, 2, 3], [11, 12, 13], [20]]


def codes_of(cache):
    leaves = jax.tree.leaves(cache.layers, is_leaf=lambda x: isinstance(x, Codes))
    return [x for x in leaves if isinstance(x, Codes)]


KINDS = (
    "dense", "ring:window=6", "ring:window=6,sinks=2", "paged:page=8", "streaming:sinks=2,recent=8",
    "h2o:budget=12,recent=4", "int4:group=4,residual=8",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        *((kind, "") for kind in KINDS),
        ("dense", "seq=2"),
        ("dense", "tensor=2"),
        ("paged:page=8", "tensor=2"),
        *(in_full(kind, "tensor=2") for kind in KINDS if kind not in ("dense", "paged:page=8")),
    ],
)  # seq splits the dense cache alone
def test_bits_say_what_numbers_say(kind, axes, on_mesh, monkeypatch):
    params, config = tiny_model(num_heads=4, num_kv_heads=2, width=32, ffn_width=64, vocab_size=64)
    config = config.replace(dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    def said(bits):
        monkeypatch.setattr(kernels, "keeps_bits", lambda dtype: bits and dtype == jnp.bfloat16)
        with on_mesh(axes), kernels.use(KernelChoice(attention="reference")):
            placed = jaxinfer.mesh.shard(params, jaxinfer.models.letters(config)) if axes else params
            cache = jax.jit(lambda: kinds.empty_cache.__wrapped__(config, 3, 64, kind, dtype=jnp.bfloat16))()
            own = [x for x in codes_of(cache) if x.form == "bfloat16"]
            assert own and all(isinstance(x, Bits if bits else Plain) for x in own)
            return jaxinfer.generate(placed, config, PROMPTS, cache=cache, max_new_tokens=24)

    got, expected = said(True), said(False)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_array_equal(got.logprobs, expected.logprobs)
    assert got.cache.bytes == expected.cache.bytes


def test_a_model_in_bfloat16_is_remembered_in_bfloat16_where_a_kernel_reads_it():
    if native.unavailable() is not None:
        pytest.skip("there is no kernel on this machine")
    config = tiny_model()[1].replace(dtype="bfloat16")
    assert jaxinfer.init_cache(config, 1, 16).form == "bfloat16"
    with kernels.use(KernelChoice(attention="reference")):
        assert jaxinfer.init_cache(config, 1, 16).form == "float32"
    assert kernels.cache_dtype("bfloat16", "gpu") == jnp.bfloat16 and not kernels.keeps_bits(jnp.bfloat16, "gpu")
    assert kernels.cache_dtype("float32") == jnp.float32 and not kernels.keeps_bits(jnp.float32)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("dense", "float32"), ("int8", "int8"), ("float8", "float8"), ("int4", "int4"), ("none", "none")],
)
def test_a_cache_says_in_which_form_its_numbers_are(kind, form):
    assert jaxinfer.init_cache(tiny_model()[1], 1, 256, kind).form == form
