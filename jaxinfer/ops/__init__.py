"""Pure maths over arrays, plain and exact: the truth that every kernel is compared with. Remembers nothing."""

from jaxinfer.ops.attention import attend, attend_blockwise
from jaxinfer.ops.linear import embed, linear
from jaxinfer.ops.mlp import mlp
from jaxinfer.ops.norm import norm
from jaxinfer.ops.rope import angles, rotate

__all__ = ["angles", "attend", "attend_blockwise", "embed", "linear", "mlp", "norm", "rotate"]
