"""The feed-forward block."""

from typing import Any

import jax

from jaxinfer import kernels
from jaxinfer.config import LayerSpec
from jaxinfer.ops.linear import fused, linear, linears, unfused
from jaxinfer.ops.norm import norm
from jaxinfer.quantization import Weight

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


FUSED = kernels.ACTIVATIONS  # which a kernel works out after two products


def mlp(
    x: jax.Array, p: dict[str, Any], spec: LayerSpec, scale: dict[str, Any] | None = None, add: jax.Array | None = None
) -> jax.Array:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate. x is [B, T, D].

    scale: of a norm of x before all else. add: what the answer is added to.
    """
    return linear(hidden(x, p, spec, scale), p["down"], "BTF,DF->BTD", p.get("down_bias"), add=add)


def hidden(x: jax.Array, p: dict[str, Any], spec: LayerSpec, scale: dict[str, Any] | None) -> jax.Array:
    """What `down` multiplies: [B, T, F]."""
    activation = ACTIVATION[spec.activation]
    if not spec.gated:
        return activation(linears(x, [p["up"]], ["BTD,FD->BTF"], [p.get("up_bias")], scale, spec.norm)[0])
    weights, biases = [p["gate"], p["up"]], [p.get("gate_bias"), p.get("up_bias")]
    if spec.activation in FUSED and biases == [None, None]:
        once = fused(x, weights, [1, 1], scale, spec.norm, activation)
        if once is not None:
            return once[0].reshape(*x.shape[:-1], -1)
        x, scale = (norm(x, scale, spec.norm), None) if scale else (x, None)
        once = gated(x, weights, spec.activation)
        if once is not None:
            return once
    gate, up = linears(x, weights, ["BTD,FD->BTF"] * 2, biases, scale, spec.norm)
    return activation(gate) * up


def gated(x: jax.Array, weights: list[jax.Array | Weight], name: str) -> jax.Array | None:
    """The activation of x gate, times x up, in one kernel of any number of rows: [..., F]; None where there is none."""
    rows, plain = x.reshape(-1, x.shape[-1]), [w for w in weights if not isinstance(w, Weight)]
    kernel = kernels.choice().gates(rows, *plain) if len(plain) == len(weights) else None  # codes multiply themselves
    if kernel is None:
        return None

    def twin(x: jax.Array, *weights: jax.Array) -> jax.Array:
        return unfused(x, weights, None, None, None, ACTIVATION[name])[0]

    return kernel(twin, name, rows, *plain).reshape(*x.shape[:-1], -1)
