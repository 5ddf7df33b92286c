"""What the tests of the GPU's attention kernel share: where it is interpreted, and where it runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import ops
from jaxinfer.cache.paged import Read
from jaxinfer.kernels import Rule
from jaxinfer.ops import Held
from jaxinfer.quantization import Plain, Scaled
from jaxinfer.testing import tiny_config

CASES = [  # B, T, N, K, S, H; of the cache; of the queries; of the layer; tokens of a page
    ((2, 1, 4, 2, 50, 10), "float32", "float32", {"window": 9}, None),
    ((3, 5, 6, 3, 130, 24), "bfloat16", "bfloat16", {"softcap": 5.0}, None),
    ((1, 40, 6, 2, 100, 16), "float32", "float32", {}, None),  # tiles of tokens
    ((2, 1, 71, 1, 90, 8), "float16", "float16", {}, None),
    ((2, 2, 8, 2, 90, 16), "int8", "float32", {"window": 40, "softcap": 2.0}, None),
    ((2, 1, 4, 4, 60, 32), "int8", "float16", {}, None),
    ((4, 1, 4, 2, 70, 20), "float32", "float32", {}, 8),
    ((2, 3, 6, 2, 90, 16), "int8", "bfloat16", {"window": 50}, 4),
    ((2, 40, 4, 2, 90, 16), "bfloat16", "bfloat16", {"window": 30}, 64),
]


def spec_of(shape, **rule):
    _, _, N, K, _, H = shape
    return tiny_config(num_heads=N, num_kv_heads=K, head_width=H, scale=H**-0.5, **rule).layers[0]


def rule_of(spec, sinks=0):
    return Rule(spec.scale, spec.softcap, spec.window, sinks)


def arrays(shape, form="float32", seed=0):
    """(q, position, source): rows of different lengths."""
    B, T, N, K, S, H = shape
    draw = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(draw.standard_normal(s), jnp.float32) for s in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    position = draw.integers(0, max(1, S - T + 1), B)[:, None] + np.arange(T)
    if form == "int8":
        codes = Scaled.empty((B, K, S), H, jnp.float32)
        return q, jnp.asarray(position, jnp.int32), Held(codes.encode(k), codes.encode(v))
    return q, jnp.asarray(position, jnp.int32), Held(Plain(k.astype(form)), Plain(v.astype(form)))


def in_pages(source, page, groups=1, spare=3, seed=1):
    """The same in a pool whose pages lie anywhere; rows with the same numbers in a page have it in common."""
    B, K, S = jax.tree.leaves(source.k)[0].shape[:3]
    draw, M, each = np.random.default_rng(seed), -(-S // page), B // groups
    P = each * M + spare
    order = np.stack([draw.permutation(P) for _ in range(groups)])
    table = np.stack([order[b // each, b % each * M : (b % each + 1) * M] for b in range(B)]).astype(np.int32)

    def pooled(x):
        x = np.asarray(jnp.pad(x, [(0, 0), (0, 0), (0, M * page - S), *[(0, 0)] * (x.ndim - 3)]))
        pool = np.full((groups, P, K, page, *x.shape[3:]), 77, x.dtype)
        for b in range(B):
            pool[b // each, table[b]] = x[b].reshape(K, M, page, *x.shape[3:]).swapaxes(0, 1)
        return jnp.asarray(pool)

    return Read(jax.tree.map(pooled, source.k), jax.tree.map(pooled, source.v), jnp.asarray(table), page)


@functools.partial(jax.jit, static_argnames=("spec", "sinks"))
def plain(q, position, source, spec, sinks=0):
    """(reference, the same of values without signs), in float32, of what the source's numbers say."""
    q, k, v = (x.astype(jnp.float32) for x in (q, source.k.decode(), source.v.decode()))
    return [ops.attend(q, k, x, position, spec, slot=source.slot, sinks=sinks) for x in (v, jnp.abs(v))]


def is_the_twin(got, q, position, source, spec, sinks=0):
    """Off by what rounds: in float32 next to nothing; in fewer bits the weights, and the answer."""
    expected, weighed = plain(q, position, source, spec, sinks)
    codes = source.kept.scales is not None
    bits = {"float32": 18, "float16": 7 if codes else 10, "bfloat16": 7}[q.dtype.name]
    assert (np.abs(got.astype(jnp.float32) - expected) <= 2.0**-bits * weighed + 2e-6).all()
