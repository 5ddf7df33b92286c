"""How many parameters a model has, and how many bytes they take in any format."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxinfer.config import LayerSpec, ModelConfig, NormSpec
from jaxinfer.quantization import parse_form


def itemsize(dtype) -> float:
    """Bytes of a number: 2 of "bfloat16" or jnp.bfloat16, 0.5 of "int4". ValueError where the name has no width."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    width = re.match(r"(?:float|bfloat|int|uint)(\d+)", name)
    if not width:
        raise ValueError(f"dtype {name!r} has no width: give one such as float32, bfloat16, float8_e4m3fn or int4")
    return int(width[1]) / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Weights as codes of a few bits, in groups along their inputs that share a scale and perhaps a zero.

    Of layers' products; embeddings, head, norms and biases stay as they are, as GPTQ, AWQ and bitsandbytes leave them.
    int8 a channel: Packed(bits=8). GPTQ: Packed(bits=4, group=128, zero_bits=4). Q4_0: Packed(bits=4, group=32).
    NF4 with double quantization: Packed(bits=4, group=64, scale_bits=8 + 32 / 256).
    """

    bits: float
    group: int = 0  # weights of a group; 0: all inputs of an output
    scale_bits: float = 16
    zero_bits: float = 0
    head: bool | Packed = False  # the matrix that makes logits is packed too, or in another way

    @property
    def of_head(self) -> Packed | None:
        """How the matrix that makes logits is packed."""
        return self.head if isinstance(self.head, Packed) else self if self.head else None

    def bytes(self, outputs: int, inputs: int) -> float:
        """Bytes of a matrix [outputs, inputs]; a group that is not full has a scale all the same."""
        groups = -(-inputs // (self.group or inputs))
        return outputs * (inputs * self.bits + groups * (self.scale_bits + self.zero_bits)) / 8


def weights_of(form: str | None) -> Packed | None:
    """What `quantize` makes of weights, by its name ("int8", "int4:group=32"); None for None: as they are.

    Where a group does not divide a weight's inputs that weight has int8, which is not counted here.
    """
    if form is None:
        return None
    wanted = parse_form(form)
    int8 = Packed(bits=8, scale_bits=32, head=True)
    return int8 if wanted.bits == 8 else Packed(bits=4, group=wanted.group, scale_bits=16, head=int8)


def params_count(config: ModelConfig) -> int:
    """How many parameters the model has; tied embeddings count once, the padding that a mesh asked for counts."""
    tables = config.padded_vocab * config.width * (1 if config.tied else 2) + config.num_positions * config.width
    return tables + norm_params(config.norm, config.width) + sum(layer_params(config, spec) for spec in config.layers)


def layer_params(config: ModelConfig, spec: LayerSpec) -> int:
    """The parameters of one layer: products, biases, norms."""
    D, F, N, K, H = config.width, spec.ffn_width, spec.num_heads, spec.num_kv_heads, spec.head_width
    count = product_params(config, spec)
    count += (N + 2 * K) * H if spec.qkv_bias else 0
    count += D if spec.out_bias else 0
    count += (2 if spec.gated else 1) * F + D if spec.ffn_bias else 0
    widths = {"none": (), "head": (H, H), "projection": (N * H, K * H)}[spec.qk_norm]
    widths += (D, D) * (spec.pre_norm + spec.post_norm)
    return count + sum(norm_params(spec.norm, width) for width in widths)


def products(config: ModelConfig, spec: LayerSpec) -> tuple[tuple[int, int], ...]:
    """(outputs, inputs) of each matrix of one layer: q, k, v, o, up, down and, where gated, gate."""
    D, F, N, K, H = config.width, spec.ffn_width, spec.num_heads, spec.num_kv_heads, spec.head_width
    matrices = ((N * H, D), (K * H, D), (K * H, D), (D, N * H), (F, D), (D, F))
    return (*matrices, (F, D)) if spec.gated else matrices


def product_params(config: ModelConfig, spec: LayerSpec) -> int:
    """The parameters of one layer that a token is multiplied with."""
    return sum(outputs * inputs for outputs, inputs in products(config, spec))


def norm_params(spec: NormSpec, width: int) -> int:
    """A norm's scale, and LayerNorm's bias."""
    return width * (2 if spec.kind == "layer" else 1)


def weight_bytes(config: ModelConfig, dtype=None) -> int:
    """Bytes of all parameters: in `dtype` (by default the config's), or `Packed` beside the config's."""
    return round(exact_bytes(config, dtype))


def exact_bytes(config: ModelConfig, dtype=None) -> float:
    """`weight_bytes` before a last half byte is rounded."""
    if not isinstance(dtype, Packed):
        return params_count(config) * itemsize(dtype or config.dtype)
    matrices = [matrix for spec in config.layers for matrix in products(config, spec)]
    head = (config.padded_vocab, config.width)
    plain = params_count(config) - sum(outputs * inputs for outputs, inputs in matrices)
    total = sum(dtype.bytes(*matrix) for matrix in matrices)
    if dtype.of_head:
        plain, total = plain - head[0] * head[1], total + dtype.of_head.bytes(*head)
    return plain * itemsize(config.dtype) + total


def read_bytes(config: ModelConfig, tokens: int, dtype: Any = None) -> float:
    """Bytes of weights that one pass of so many tokens reads: every weight once, but of an embedding that is not also
    the head, and of learned positions, the tokens' own vectors."""
    packed = isinstance(dtype, Packed) and config.tied and dtype.of_head  # so is the embedding
    size = itemsize(config.dtype if isinstance(dtype, Packed) else dtype or config.dtype)
    vector = packed.bytes(1, config.width) if packed else config.width * size
    unread = (0 if config.tied else config.padded_vocab) + config.num_positions
    positions = tokens * bool(config.num_positions)
    return exact_bytes(config, dtype) + (positions - unread) * config.width * size + tokens * vector


def multiplied_bytes(config: ModelConfig, dtype=None) -> float:
    """Bytes of the matrices that every token meets: `products` of all layers, and the head."""
    layers = [matrix for spec in config.layers for matrix in products(config, spec)]
    head = (config.padded_vocab, config.width)
    if not isinstance(dtype, Packed):
        return sum(outputs * inputs for outputs, inputs in (*layers, head)) * itemsize(dtype or config.dtype)
    last = dtype.of_head.bytes(*head) if dtype.of_head else head[0] * head[1] * itemsize(config.dtype)
    return sum(dtype.bytes(*matrix) for matrix in layers) + last
