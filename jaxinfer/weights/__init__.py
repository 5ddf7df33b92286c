"""The only room that opens checkpoints."""

from jaxinfer.weights import convert
from jaxinfer.weights.export import stored_tensors
from jaxinfer.weights.heads import is_head, load_head, save_head
from jaxinfer.weights.huggingface import load, sampling_defaults, shapes
from jaxinfer.weights.orbax import save
from jaxinfer.weights.safetensors import Checkpoint, read_json, write_safetensors

__all__ = [
    "Checkpoint",
    "convert",
    "is_head",
    "load",
    "load_head",
    "read_json",
    "sampling_defaults",
    "save",
    "save_head",
    "shapes",
    "stored_tensors",
    "write_safetensors",
]
