"""Small stand-ins for tests: a tiny model, a byte tokenizer, and a model whose logits can be worked out by hand."""

from jaxinfer.testing.byte import byte_tokenizer
from jaxinfer.testing.table import Table
from jaxinfer.testing.tiny import tiny_config, tiny_model, tiny_params

__all__ = ["Table", "byte_tokenizer", "tiny_config", "tiny_model", "tiny_params"]
