"""Small stand-ins for tests: a tiny model, a byte tokenizer, a model whose logits can be worked out by hand;
and emulated devices to test sharding on."""

from jaxinfer.testing.byte import byte_tokenizer
from jaxinfer.testing.sharding import collectives_of, device_bytes, emulate_devices
from jaxinfer.testing.table import Table
from jaxinfer.testing.tiny import tiny_config, tiny_model, tiny_params

__all__ = [
    "Table",
    "byte_tokenizer",
    "collectives_of",
    "device_bytes",
    "emulate_devices",
    "tiny_config",
    "tiny_model",
    "tiny_params",
]
