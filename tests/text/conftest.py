import pathlib

import pytest
from small_tokenizers import KINDS, write


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A directory for each kind of tokenizer."""
    roles = {
        "byte_level": {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"},
        "word_pieces": {"unk_token": "[UNK]"},
        "no_decoder": {"unk_token": "[UNK]"},
        "word_ends": {"unk_token": "<unk>"},
    }
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name, make(), roles.get(name, llama)) for name, make in KINDS.items()}
