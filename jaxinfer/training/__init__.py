"""Losses, data and optimizers: what makes the built-in model (`scripts/train.py`) and distils drafts from it."""

from jaxinfer.training.batches import Batches
from jaxinfer.training.checkpoint import read_notes, restore, save
from jaxinfer.training.corpus import Corpus, read_corpus, read_texts, xz_bits_per_byte
from jaxinfer.training.distill import (
    begin_head,
    begin_model,
    compare_head,
    compare_model,
    head_loss,
    held_out_acceptance,
    model_loss,
)
from jaxinfer.training.export import save_huggingface
from jaxinfer.training.losses import features, held_out_bits, loss, position_bits, token_nats
from jaxinfer.training.optimizers import muon
from jaxinfer.training.steps import make_step
from jaxinfer.training.vocabulary import END_OF_TEXT, encode, token_bytes, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "Batches",
    "Corpus",
    "begin_head",
    "begin_model",
    "compare_head",
    "compare_model",
    "encode",
    "features",
    "head_loss",
    "held_out_acceptance",
    "held_out_bits",
    "loss",
    "make_step",
    "model_loss",
    "muon",
    "position_bits",
    "read_corpus",
    "read_notes",
    "read_texts",
    "restore",
    "save",
    "save_huggingface",
    "token_bytes",
    "token_nats",
    "train_tokenizer",
    "xz_bits_per_byte",
]
