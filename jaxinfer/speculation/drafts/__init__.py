"""Ways of drafting, behind one small protocol."""

from jaxinfer.speculation.drafts.base import Draft, Draw
from jaxinfer.speculation.drafts.model import LayersDraft, ModelDraft
from jaxinfer.speculation.drafts.ngram import NGram

__all__ = ["Draft", "Draw", "LayersDraft", "ModelDraft", "NGram"]
