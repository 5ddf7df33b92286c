"""Which tensor of a checkpoint is which array of the params."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jaxinfer.config import ModelConfig
from jaxinfer.models.params import param_shapes

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """An array of the params, and the shape [out, in] or [out] that it has in a file."""

    path: Path
    shape: tuple[int, ...]
    stored: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: the arrays whose rows it holds, one after the other."""

    name: str
    parts: tuple[Part, ...]
    transposed: bool = False  # stored as [in, out] (Conv1D)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the file."""
        out = sum(part.stored[0] for part in self.parts)
        shape = (out, *self.parts[0].stored[1:])
        return shape[::-1] if self.transposed else shape


@dataclasses.dataclass(frozen=True)
class Names:
    """How a family's checkpoints name the params. Arrays with one name are fused in the file, in the order given here.

    top: "embed" -> "embed_tokens.weight". layer: "q" -> "layers.{}.self_attn.q_proj.weight"; a norm's entry stands for
    its scale, and a `_bias` that is not listed is found beside its weight.
    """

    top: dict[str, str]
    layer: dict[str, str]
    prefixes: tuple[str, ...] = ("model.",)  # the first is written; any of them, or none, is read
    bare: tuple[str, ...] = ("lm_head.weight",)  # names that never have the prefix
    ignored: tuple[str, ...] = ()  # regular expressions of stored buffers that are no parameters
    transposed: frozenset[str] = frozenset()  # keys whose matrices lie [in, out]


LLAMA = Names(
    top={"embed": "embed_tokens.weight", "norm": "norm.weight", "head": "lm_head.weight"},
    layer={
        "attention_norm": "layers.{}.input_layernorm.weight",
        "q": "layers.{}.self_attn.q_proj.weight",
        "k": "layers.{}.self_attn.k_proj.weight",
        "v": "layers.{}.self_attn.v_proj.weight",
        "q_norm": "layers.{}.self_attn.q_norm.weight",
        "k_norm": "layers.{}.self_attn.k_norm.weight",
        "o": "layers.{}.self_attn.o_proj.weight",
        "ffn_norm": "layers.{}.post_attention_layernorm.weight",
        "gate": "layers.{}.mlp.gate_proj.weight",
        "up": "layers.{}.mlp.up_proj.weight",
        "down": "layers.{}.mlp.down_proj.weight",
    },
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

FOUR_NORMS = {  # where a norm also stands behind each block, its names say so (Gemma 2 and 3)
    "attention_post_norm": "layers.{}.post_attention_layernorm.weight",
    "ffn_norm": "layers.{}.pre_feedforward_layernorm.weight",
    "ffn_post_norm": "layers.{}.post_feedforward_layernorm.weight",
}


def tensors(config: ModelConfig, names: Names) -> list[Tensor]:
    """Every tensor that a checkpoint of this config must hold, without prefix, in the order of the params."""
    groups: dict[str, list[tuple[int, Part]]] = {}
    crosswise: dict[str, bool] = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    for keys, leaf in leaves:
        path = tuple(key.key if hasattr(key, "key") else key.idx for key in keys)
        layer = path[1] if path[0] == "layers" else None
        local = path if layer is None else path[2:]
        name, rank, key = stored_name(local, names.top if layer is None else names.layer)
        name = name.format(layer)
        part = Part(path, leaf.shape, stored_shape(local, leaf.shape))
        groups.setdefault(name, []).append((rank, part))
        crosswise[name] = key in names.transposed and len(part.stored) == 2
    return [
        Tensor(name, tuple(part for _, part in sorted(parts, key=lambda pair: pair[0])), crosswise[name])
        for name, parts in groups.items()
    ]


def stored_name(local: Path, table: dict[str, str]) -> tuple[str, int, str]:
    """The name of an array's tensor, its rank in the table, and the key that it was found under."""
    key, suffix = str(local[0]), "weight"
    if local[-1] == "bias" or key.endswith("_bias"):
        key, suffix = key.removesuffix("_bias"), "bias"
    name = table[key]
    return name.removesuffix("weight") + suffix, list(table).index(key), key


def stored_shape(local: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[out] of a norm or bias, [out, in] of a matrix."""
    if local[-1] in ("scale", "bias") or str(local[0]).endswith("_bias"):
        return (math.prod(shape),)
    inner = math.prod(shape[1:]) if local[0] == "o" else shape[-1]
    return (math.prod(shape) // inner, inner)


def set_leaf(tree: dict[Any, Any], path: Path, value: Any) -> None:
    """Puts a value into nested dicts (layers keyed by number), making them as needed."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
