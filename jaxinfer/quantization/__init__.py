"""Numbers in fewer bits: how vectors are coded, and read again."""

from jaxinfer.quantization.codes import Codes, Grouped, Plain, Scaled

__all__ = ["Codes", "Grouped", "Plain", "Scaled"]
