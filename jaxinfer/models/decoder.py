"""THE forward: one function for any T. Prefill is decode with T tokens, verify is decode with T = J + 1.

The layers are a Python loop over a tuple: `lax.scan` over stacked weights copies every layer's weights at every step
(1.1B parameters on CPU: 2.6 against 6.5 tokens/s, and an H200 compile shows the same copies).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import mesh, ops
from jaxinfer.cache import Cache, Step
from jaxinfer.config import LayerSpec, ModelConfig, RopeSpec

Params = dict[str, Any]
Angles = dict[RopeSpec | None, tuple[jax.Array, jax.Array]]


def decoder(
    params: Params,
    config: ModelConfig,
    ids: jax.Array,
    cache: Cache,
    step: Step,
    layers: tuple[int, int | None] = (0, None),
    hidden: jax.Array | None = None,
    taps: tuple[int, ...] = (),
) -> tuple[tuple[jax.Array, tuple[jax.Array, ...]], Cache]:
    """Runs ids [B, T] through the layers [layers[0], layers[1]) and leaves their keys and values pending in the cache.

    Gives ((hidden [B, T, D], tapped), cache): `tapped` holds the hidden state after each layer of `taps`. A later range
    starts from `hidden=`, what an earlier range gave; ids are then not looked at. `logits` turns hidden into scores.
    """
    first, last = layers[0], len(config.layers) if layers[1] is None else layers[1]
    x = embed(params, config, ids, step) if hidden is None else hidden
    turns, cache = angles(config, cache, step), cache.reserve(step)
    tapped = []
    for index in range(first, last):
        spec, p = config.layers[index], params["layers"][index]
        x, cache = block(p, spec, x, turns[spec.rope], cache, index, step)
        if index in taps:
            tapped.append(x)
    return (x, tuple(tapped)), cache


def embed(params: Params, config: ModelConfig, ids: jax.Array, step: Step) -> jax.Array:
    """Token (and learned position) embeddings [B, T, D]; a pad is token 0, whatever its id."""
    x = ops.embed(params["embed"], jnp.where(step.valid, ids, 0)).astype(config.dtype)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)  # rounded to the dtype first, as Gemma was trained
    if config.num_positions:
        position = jnp.where(step.valid, step.position, 0)
        x = x + ops.embed(params["positions"], position).astype(x.dtype)
    return mesh.constrain(x, "BTD")


def angles(config: ModelConfig, cache: Cache, step: Step) -> Angles:
    """cos and sin of each kind of rope in the model, once for all its layers."""
    kinds = dict.fromkeys(spec.rope for spec in config.layers)
    return {rope: ops.angles(step.position, rope, cache.size) if rope else () for rope in kinds}  # type: ignore


def block(
    p: Params, spec: LayerSpec, x: jax.Array, turn: tuple, cache: Cache, index: int, step: Step
) -> tuple[jax.Array, Cache]:
    """Attention and feed-forward, each added to x [B, T, D]: by its last product, unless a norm follows that."""
    y, cache = attention(p, spec, x, turn, cache, index, step)
    x = x + ops.norm(y, p["attention_post_norm"], spec.norm) if spec.post_norm else y
    y = ops.mlp(x, p, spec, p["ffn_norm"] if spec.pre_norm else None, None if spec.post_norm else x)
    return x + ops.norm(y, p["ffn_post_norm"], spec.norm) if spec.post_norm else y, cache


def attention(
    p: Params, spec: LayerSpec, x: jax.Array, turn: tuple, cache: Cache, index: int, step: Step
) -> tuple[jax.Array, Cache]:
    """The attention block of x [B, T, D], added to it where no norm follows; only the cache knows rows of tokens."""
    weights, biases = [p[name] for name in "qkv"], [p.get(f"{name}_bias") for name in "qkv"]
    scale = p["attention_norm"] if spec.pre_norm else None
    q, k, v = ops.linears(x, weights, ["BTD,NHD->BTNH", *["BTD,KHD->BTKH"] * 2], biases, scale, spec.norm)
    if spec.qk_norm != "none":
        axes, (heads, kv_heads) = 1 if spec.qk_norm == "head" else 2, spec.normed_heads or (q.shape[2], k.shape[2])
        q = ops.norm(q, p["q_norm"], spec.norm, axes, heads / q.shape[2] if axes == 2 else 1.0)
        k = ops.norm(k, p["k_norm"], spec.norm, axes, kv_heads / k.shape[2] if axes == 2 else 1.0)
    if turn:
        q, k = ops.rotate(q, *turn), ops.rotate(k, *turn)
    out, cache = cache.attend(index, q, k, v, spec, step)
    add = None if spec.post_norm else x
    return ops.linear(out, p["o"], "BTNH,DNH->BTD", p.get("o_bias"), add=add), cache


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Scores of the next token [B, T, V] float32 from the last layer's hidden [B, T, D].

    V counts the rows of the embedding: ids with which a mesh has padded it score -inf.
    """
    w = params["embed"] if config.tied else params["head"]
    (score,) = ops.linears(hidden, [w], ["BTD,VD->BTV"], [None], params["norm"], config.norm, dtype=jnp.float32)
    score = score if config.softcap is None else config.softcap * jnp.tanh(score / config.softcap)
    if config.padded_vocab == config.vocab_size:
        return score
    return jnp.where(jnp.arange(config.padded_vocab) < config.vocab_size, score, -jnp.inf)
