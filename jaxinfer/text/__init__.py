"""Text and ids: the tokenizer, chat templates, the incremental detokenizer. Strings and ints, never arrays."""

from jaxinfer.text.detokenizer import Detokenizer as Detokenizer
from jaxinfer.text.tokenizer import Tokenizer as Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
