"""What each kind of cache costs, to the byte, and what fits in a memory."""

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.cache import cache_bytes, init_cache, max_rows, max_size
from jaxinfer.testing import tiny_config

B, K, H, L = 3, 2, 64, 2
CONFIG = tiny_config(num_layers=L, num_kv_heads=K, head_width=H, dtype="bfloat16")


def held(kind, size=8192, rows=B, config=CONFIG, **options):
    """Bytes of keys and values in 16 bits, and whatever goes with them, without lengths and tables."""
    cache = jax.eval_shape(lambda: init_cache(config, rows, size, kind, dtype=jnp.bfloat16, **options))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))


@pytest.mark.parametrize("size", [100, 8192])
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_eight_bits_cost_a_byte_a_number_and_a_scale_a_token_and_head(kind, size):
    assert held(kind, size) == 2 * L * B * K * size * (H + 4)


@pytest.mark.parametrize(("group", "residual"), [(32, 128), (64, 128), (16, 32)])
@pytest.mark.parametrize("pending", [1, 9])
def test_int4_costs_its_codes_scales_and_residual(group, residual, pending):
    size = 8192
    codes = 2 * size * H // 2
    keys, values = (size // group) * H * 4, size * (H // group) * 4  # scale and zero, 16 bits each
    plain = 2 * (residual + group + pending + 2) * H * 2
    kind = f"int4:group={group},residual={residual}"
    assert held(kind, size, max_pending=pending, max_rewind=2) == L * B * K * (codes + keys + values + plain)


def test_int4_in_groups_of_64_takes_29_percent_of_16_bits_at_8k_tokens():
    share = held("int4:group=64") / held("dense")
    print(f"int4 in groups of 64 takes {share:.1%} of bfloat16")
    assert 0.28 < share < 0.31
    assert held("paged:page=64+int4:group=64") / held("paged:page=64") == pytest.approx(share, rel=0.01)


def test_five_local_layers_to_a_global_one_need_at_most_22_percent_at_32k_tokens():
    # Gemma 3 1B: 26 layers, every sixth sees everything, the others 512 tokens
    layer = CONFIG.layers[0]
    layers = tuple(layer if (i + 1) % 6 == 0 else layer.replace(window=512) for i in range(26))
    config = CONFIG.replace(layers=layers)
    share = held("auto", 32768, config=config) / held("dense", 32768, config=config)
    print(f"gemma3's pattern takes {share:.1%} of the dense bytes at 32768 tokens")
    assert share <= 0.22
    assert held("auto", 32768, config=config, max_pending=9, max_rewind=8) / held("dense", 32768, config=config) <= 0.22


def test_a_ring_holds_its_window_and_what_may_be_pending_or_taken_back():
    config = CONFIG.replace(layers=(CONFIG.layers[0].replace(window=100),))
    assert held("auto", config=config) == 2 * B * K * 100 * H * 2
    assert held("auto", config=config, max_pending=9, max_rewind=7) == 2 * B * K * (99 + 9 + 7) * H * 2


@pytest.mark.parametrize("kind", ["streaming:sinks=4,recent=96", "ring:window=96,sinks=4"])
def test_a_budget_is_what_is_kept(kind):
    assert held(kind) == 2 * L * B * K * 100 * H * 2


def test_pages_are_what_is_asked_for():
    assert held("paged:page=16,pages=40") == 2 * L * 40 * 16 * K * H * 2
    assert held("paged:page=16") == held("dense")


@pytest.mark.parametrize("kind", ["auto", "int8", "int4", "paged:page=32", "streaming", "h2o", "snapkv"])
def test_as_many_rows_and_tokens_fit_as_there_is_memory_for(kind):
    memory = 50_000_000
    config = CONFIG.replace(max_length=1 << 20)
    rows = max_rows(config, 1000, memory, kind)
    assert cache_bytes(config, rows, 1000, kind) <= memory < cache_bytes(config, rows + 1, 1000, kind)
    size = max_size(config, B, memory, kind)
    assert cache_bytes(config, B, size, kind) <= memory
    assert size == 1 << 20 or memory < cache_bytes(config, B, size + 1, kind)
    assert max_rows(config, 1000, 10, kind) == 0 == max_size(config, B, 10, kind)
