"""Numbers in fewer bits: how vectors and weights are coded, and read again."""

from jaxinfer.quantization.codes import Bits, Codes, Grouped, Plain, Scaled
from jaxinfer.quantization.weights import Form, Int4, Int8, Weight, parse_form, rounded

__all__ = ["Bits", "Codes", "Form", "Grouped", "Int4", "Int8", "Plain", "Scaled", "Weight", "parse_form", "rounded"]
