"""Speculation: a draft guesses, the target verifies, and the output is what the target alone would have said."""

from jaxinfer.speculation.acceptance import RULES, agree, law
from jaxinfer.speculation.drafts import Draft, LayersDraft, ModelDraft, NGram
from jaxinfer.speculation.speculate import Speculated, speculate

__all__ = ["RULES", "Draft", "LayersDraft", "ModelDraft", "NGram", "Speculated", "agree", "law", "speculate"]
