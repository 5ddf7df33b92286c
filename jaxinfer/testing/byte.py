"""A tokenizer whose ids are the bytes of UTF-8: every character beyond ASCII is cut across tokens."""

from __future__ import annotations

import json
import os
import pathlib

from jaxinfer.text import Tokenizer


def byte_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Writes it into a directory, and reads it back. Ids 0 to 255 are the bytes; nothing is added around a text."""
    from tokenizers.pre_tokenizers import ByteLevel

    shown = [
        c for c in map(chr, range(0x100)) if c in set(ByteLevel.alphabet()) and c.isprintable() and c not in " \xa0\xad"
    ]
    rest = sorted(
        set(ByteLevel.alphabet()) - set(shown)
    )  # bytes that print as nothing stand for U+0100 and up, in order
    hidden = [n for n in range(256) if chr(n) not in shown]
    vocab = {c: ord(c) for c in shown} | dict(zip(rest, hidden, strict=True))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    raw = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    path = pathlib.Path(directory) / "tokenizer.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return Tokenizer(path.parent)
