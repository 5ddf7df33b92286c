"""THE forward, the registry of families, and one recipe file per family."""

from jaxinfer.models.decoder import decoder, logits
from jaxinfer.models.params import init_params, letters, param_shapes
from jaxinfer.models.registry import config_from_hf, family

__all__ = ["config_from_hf", "decoder", "family", "init_params", "letters", "logits", "param_shapes"]
