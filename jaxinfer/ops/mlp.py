"""The feed-forward block."""

from typing import Any

import jax

from jaxinfer.config import LayerSpec
from jaxinfer.ops.linear import linear

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def mlp(x: jax.Array, p: dict[str, Any], spec: LayerSpec) -> jax.Array:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate. x is [B, T, D]."""
    activation = ACTIVATION[spec.activation]
    up = linear(x, p["up"], "BTD,FD->BTF", p.get("up_bias"))
    hidden = activation(linear(x, p["gate"], "BTD,FD->BTF", p.get("gate_bias"))) * up if spec.gated else activation(up)
    return linear(hidden, p["down"], "BTF,DF->BTD", p.get("down_bias"))
