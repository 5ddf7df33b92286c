"""THE forward, the registry of families, and one recipe file per family."""

from jaxinfer.models.arrange import arrange, arrange_config, canonical
from jaxinfer.models.decoder import decoder, logits
from jaxinfer.models.head import fingerprint, head, head_config, head_letters, head_logits, head_shapes, init_head
from jaxinfer.models.init import init_params
from jaxinfer.models.params import letters, param_shapes
from jaxinfer.models.quantize import form_of, quantize, quantize_one, repacked
from jaxinfer.models.registry import config_from_hf, family
from jaxinfer.models.widen import widen

__all__ = [
    "arrange",
    "arrange_config",
    "canonical",
    "config_from_hf",
    "decoder",
    "family",
    "fingerprint",
    "form_of",
    "head",
    "head_config",
    "head_letters",
    "head_logits",
    "head_shapes",
    "init_head",
    "init_params",
    "letters",
    "logits",
    "param_shapes",
    "quantize",
    "quantize_one",
    "repacked",
    "widen",
]
