"""Pure maths over arrays, plain and exact: the truth that every kernel is compared with. Remembers nothing."""

from jaxinfer.ops.attention import (
    MASKED,
    PAST,
    Held,
    Look,
    Source,
    attend,
    attend_blockwise,
    attend_kernel,
    attend_looks,
    kept_of,
    kernel_for,
    spread,
    unfold,
)
from jaxinfer.ops.linear import dot, embed, linear, linears, unfused
from jaxinfer.ops.mlp import ACTIVATION, FUSED, mlp
from jaxinfer.ops.norm import norm
from jaxinfer.ops.rope import angles, rotate, turn_back

__all__ = [
    "ACTIVATION", "FUSED", "MASKED", "PAST", "Held", "Look", "Source", "angles", "attend", "attend_blockwise",
    "attend_kernel", "attend_looks", "dot", "embed", "kept_of", "kernel_for", "linear", "linears", "mlp", "norm",
    "rotate", "spread", "turn_back", "unfold", "unfused",
]  # fmt: skip
