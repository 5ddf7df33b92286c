"""Vocabulary and batches: the same text and seed give the same tokens in the same order."""

import numpy as np
import pytest

from jaxinfer.training import END_OF_TEXT, Batches, encode, token_bytes, train_tokenizer

TEXT = [
    "def f(n):\n    return n + 1024\n" * 40,
    "class A:\n\n    x = 'é'\n" * 40,
    "for i in range(10):\n    print(i)\n" * 40,
]


def test_the_same_text_gives_the_same_vocabulary():
    assert train_tokenizer(TEXT, 300).to_str() == train_tokenizer(TEXT, 300).to_str()


def test_every_text_comes_back_and_begins_with_the_end_of_the_one_before():
    tokenizer = train_tokenizer(TEXT, 300)
    for text in [*TEXT, "Größe 日本\t\r\n \n", ""]:
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.token_to_id(END_OF_TEXT) == 0 and 0 not in ids[1:]
        assert tokenizer.decode(ids) == text


def test_a_colon_does_not_swallow_the_end_of_its_line():
    """A prompt that ends in ":" must be cut as the training text was."""
    tokenizer = train_tokenizer(TEXT, 400)
    whole, prompt = (tokenizer.encode(text).ids for text in ("def f(n):\n    return n", "def f(n):"))
    assert whole[: len(prompt)] == prompt


def test_token_bytes_add_up_to_the_bytes_of_the_text():
    tokenizer = train_tokenizer(TEXT, 300)
    size = token_bytes(tokenizer)
    for text, ids in zip(TEXT, encode(tokenizer, TEXT), strict=True):
        assert size[ids].sum() == len(text.encode())


DOCUMENTS = [np.arange(start, start + 97, dtype=np.int32) for start in range(0, 1000, 100)]


def test_a_batch_depends_on_seed_and_row_only():
    first, second = Batches(DOCUMENTS, 16, seed=3), Batches(DOCUMENTS, 16, seed=3)
    ahead = second(200, 4)
    assert np.array_equal(first(0, 8), np.concatenate([second(0, 3), second(3, 5)]))
    assert np.array_equal(first(200, 4), ahead)
    assert not np.array_equal(first(0, 8), Batches(DOCUMENTS, 16, seed=4)(0, 8))


def test_an_epoch_shows_every_token_once_and_the_next_in_another_order():
    batches = Batches(DOCUMENTS, 16, seed=0)
    one, two = batches(0, batches.per_epoch), batches(batches.per_epoch, batches.per_epoch)
    for epoch in (one, two):
        inputs = epoch[:, :-1].ravel()
        assert len(set(inputs)) == inputs.size > 970 - 3 * 16
    assert not np.array_equal(one, two)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="97 tokens make no epoch of windows of 64"):
        Batches(DOCUMENTS[:1], 64, seed=0)
