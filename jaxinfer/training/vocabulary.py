"""A byte-level BPE vocabulary for Python source."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"  # id 0: before every file, so it begins a text and ends the one before it
# Words take one character before them along (" return", "_name", ".append", "(self"), digits go by threes, and a line's
# end goes with the blank lines and the indentation after it. It does NOT go with the ":" before it: a prompt that ends
# in ":" must look like the text that was trained on.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*\n *|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains on the texts, in their order: the same texts give the same tokenizer. Every text begins with id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """[V]: how many bytes each id stands for. BPE spells every byte as one character; END_OF_TEXT is no text."""
    words = [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]
    return np.array([0 if word == END_OF_TEXT else len(word) for word in words])


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids of every text, END_OF_TEXT first."""
    return [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(list(texts))]
