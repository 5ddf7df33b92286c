"""Ways of drafting, behind one small protocol."""

from jaxinfer.speculation.drafts.base import Draft, Round
from jaxinfer.speculation.drafts.head import HeadDraft
from jaxinfer.speculation.drafts.model import LayersDraft, ModelDraft
from jaxinfer.speculation.drafts.ngram import NGram

__all__ = ["Draft", "HeadDraft", "LayersDraft", "ModelDraft", "NGram", "Round"]
