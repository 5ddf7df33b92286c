"""The only room that opens checkpoints."""

from jaxinfer.weights.huggingface import load, sampling_defaults
from jaxinfer.weights.safetensors import Checkpoint, write_safetensors

__all__ = ["Checkpoint", "load", "sampling_defaults", "write_safetensors"]
