"""Speculation: a draft guesses, the target verifies, and the output is what the target alone would have said."""

from jaxinfer.cache import Tree
from jaxinfer.speculation.acceptance import RULES, agree, law, siblings, walk
from jaxinfer.speculation.drafts import Draft, HeadDraft, LayersDraft, ModelDraft, NGram, Round
from jaxinfer.speculation.length import emitted, speedup
from jaxinfer.speculation.result import Memory, Speculated
from jaxinfer.speculation.speculate import speculate
from jaxinfer.speculation.stream import stream
from jaxinfer.speculation.vocabulary import shared_vocabulary

__all__ = [
    "RULES",
    "Draft",
    "HeadDraft",
    "LayersDraft",
    "Memory",
    "ModelDraft",
    "NGram",
    "Round",
    "Speculated",
    "Tree",
    "agree",
    "emitted",
    "law",
    "shared_vocabulary",
    "siblings",
    "speculate",
    "speedup",
    "stream",
    "walk",
]
