"""A draft's ids mean what the target's mean, or it is refused."""

import json

import pytest

from jaxinfer.speculation.vocabulary import shared_vocabulary
from jaxinfer.testing import byte_tokenizer
from jaxinfer.text import Tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    """tokenizer(swap="ab", added=["<end>"]): of bytes, two letters swapped, special tokens added."""
    made = []

    def tokenizer(swap="", added=()):
        directory = tmp_path / str(len(made))
        directory.mkdir()
        made.append(byte_tokenizer(directory))
        raw = json.loads((directory / "tokenizer.json").read_text())
        vocab = raw["model"]["vocab"]
        if swap:
            one, other = swap
            vocab[one], vocab[other] = vocab[other], vocab[one]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        raw["added_tokens"] = [
            {"id": 256 + i, "content": token, "special": True} | flags for i, token in enumerate(added)
        ]
        (directory / "tokenizer.json").write_text(json.dumps(raw))
        return Tokenizer(directory)

    return tokenizer


def test_models_of_one_tokenizer_share_all_ids(tokenizer):
    own = tokenizer(added=["<end>"])
    assert shared_vocabulary(own, own, 257, 257) is None
    assert shared_vocabulary(own, tokenizer(added=["<end>"]), 257, 257) is None
    assert shared_vocabulary(own, own, 320, 320) is None  # both are padded alike


def test_padding_of_different_length_leaves_the_ids_that_both_have(tokenizer):
    own = tokenizer()
    assert shared_vocabulary(own, own, 256, 320) == 256
    assert shared_vocabulary(own, own, 320, 256) == 256
    assert shared_vocabulary(own, own, 384, 320) == 320


def test_tokens_that_no_model_scores_do_not_count(tokenizer):
    assert shared_vocabulary(tokenizer(), tokenizer(added=["<end>"]), 256, 256) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "sizes", "says"),
    [
        ({}, {"swap": "ab"}, (256, 256), "(id 97 is 'a' and 'b'; id 98 is 'b' and 'a'): take a draft with"),
        ({"added": ["<end>"]}, {"added": ["<eos>"]}, (257, 257), "(id 256 is '<end>' and '<eos>'): take"),
        ({"added": ["<end>"]}, {}, (320, 320), "(id 256 is '<end>' and no token): take"),
        ({"added": ["<end>"]}, {"added": ["<end>"]}, (256, 257), "(id 256 is no token and '<end>'): take"),
        ({}, {}, (256, 9), "id 9 is 'ĉ' and no token; id 10 is 'Ċ' and no token; id 11 is"),
        ({}, {}, (256, 9), "; and 244 more): take"),
    ],
)
def test_ids_that_mean_different_things_are_refused_with_both_tokens(tokenizer, ours, theirs, sizes, says):
    with pytest.raises(ValueError) as refusal:
        shared_vocabulary(tokenizer(**ours), tokenizer(**theirs), *sizes)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
