"""The tokenizer of a checkpoint: tokenizer.json through the `tokenizers` library, and the files that lie beside it."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxinfer import hub
from jaxinfer.text import files

# Arguments of transformers' apply_chat_template that are no variables of a template: they would silently do nothing.
NOT_CHAT = frozenset(
    ("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict")
    + ("return_assistant_tokens_mask", "continue_final_message", "sanitize_control_tokens", "tokenizer_kwargs")
)


class Tokenizer:
    """Text to ids and back, as transformers does it with the same files (v4's and v5's are both read).

    name: "builtin", a directory or a hub id, as in `hub.locate`. Raises ValueError, in one line, when there is no
    tokenizer.json or a file is broken.

    Where it differs from transformers 5, on purpose:
    - BOS comes once: a text that begins with what the tokenizer would put before it (a rendered chat) gets no second.
    - `add_bos_token: true` in tokenizer_config.json counts where tokenizer.json itself adds nothing (transformers 4 did
      so for Llama's family; 5 no longer reads the flag). `add_eos_token` does not: a prompt that ends in EOS is over.
    - No clean-up of spaces when decoding (transformers 5 ignores that flag for BPE too, 4 did not).
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self.name = os.fspath(name)
        self.directory: Path = hub.locate(name, files.FILES)
        # the tokenizers.Tokenizer, for callers who want offsets or the vocabulary
        self.backend: tokenizers.Tokenizer = files.read_backend(self.directory)
        config = files.read_json(self.directory / "tokenizer_config.json")
        special = files.special_ids(self.backend)
        self.backend.encode_special_tokens = config.get("split_special_tokens") is True
        # what transformers' templates see by name: bos_token, eos_token, image_token, ...
        self.special_tokens: dict[str, str] = files.add_special(self.backend, self.directory, config)
        if not self.special_tokens:
            self.special_tokens = self._named_by_model()
        # flags may change, but the backend goes on skipping a token that was special once
        self.special_ids: frozenset[int] = frozenset(special | files.special_ids(self.backend))
        self.templates: dict[str, str] = files.read_templates(self.directory, config)
        self._bos_by_flag = config.get("add_bos_token") is True and not self.backend.num_special_tokens_to_add(False)

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size})"

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. Special tokens written in the text become their ids, as in transformers.

        special: also add what the tokenizer puts around a text (its post-processor; mostly BOS in front), except where
        the text has it already. So `encode(chat(...))` and `encode("...")` both begin with one BOS. An EOS at the end
        appears only if tokenizer.json itself says so. Raises ValueError for text that is not valid Unicode.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode takes one text, a str, not a {type(text).__name__}: encode each text on its own")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: a lone surrogate {text[error.start]!a} at position {error.start}; "
                "read it with errors='replace', or from a UTF-8 source"
            ) from None
        coded = self.backend.encode(text, add_special_tokens=special)
        added = [place is None for place in coded.sequence_ids]  # None: put there by the post-processor
        start = added.index(False) if False in added else len(added)
        stop = len(added) - added[::-1].index(False) if False in added else len(added)
        before, body, after = coded.ids[:start], coded.ids[start:stop], coded.ids[stop:]
        if special and self._bos_by_flag and self.bos_id is not None:
            before = [self.bos_id]
        rest = body
        if before and body[: len(before)] == before:
            rest = body[len(before) :]  # one token may both open and close a text: it does not count twice
            before = []
        if after and rest[-len(after) :] == after:
            after = []
        return before + body + after

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of the ids of one row (a list, or a 1-D array). Bytes that form no character become U+FFFD.

        Ids past the vocabulary (models pad theirs) give no text, as in transformers. Raises ValueError for an id below
        0: -1 pads generate's rows, so decode `ids[:num]`.
        """
        return self.backend.decode(row(ids), skip_special_tokens=skip_special)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The text of a conversation in the checkpoint's chat template, as transformers renders it; `encode` takes it.

        messages: dicts with "role" and "content". tools: JSON schemas. chat_template: the name of one of `templates`,
        or a template itself; by default "tool_use", where there is one and tools are given, else "default". kwargs are
        variables of the template (enable_thinking=False, ...). Raises ValueError, one line, when there is no template,
        or it refuses these messages, or it has an error.
        """
        from jaxinfer.text import chat  # imported here: jinja2 is for those who chat

        if surplus := sorted(NOT_CHAT & kwargs.keys()):
            raise ValueError(f"chat does not take {', '.join(surplus)}: it gives text, its kwargs go to the template")
        return chat.render(
            self._template(chat_template, tools is not None),
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=documents,
            names={**self.special_tokens, **kwargs},
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self.templates)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. A model's V may be larger: padding."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The tokenizer's own EOS. A chat model may stop at more ids: those of generation_config.json."""
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    def token(self, id: int) -> str:
        """The token with this id as the vocabulary writes it. Raises ValueError where there is none."""
        found = self.backend.id_to_token(id) if id >= 0 else None
        if found is None:
            raise ValueError(f"there is no token {id}: this tokenizer has {self.vocab_size} tokens")
        return found

    def id(self, token: str) -> int:
        """The id of a token as the vocabulary writes it. Raises ValueError where there is none."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"{token!r} is no token of this tokenizer: encode() takes text")
        return found

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def _named_by_model(self) -> dict[str, str]:
        # gpt2's tokenizer files name no special token: transformers knows them by class, we by the model's config
        named = {}
        for file in ("config.json", "generation_config.json"):
            config = files.read_json(self.directory / file)
            for role in ("bos_token", "eos_token"):
                ids = config.get(f"{role}_id")
                first = ids[0] if isinstance(ids, list) and ids else ids
                if isinstance(first, int) and first >= 0 and (token := self.backend.id_to_token(first)) is not None:
                    named[role] = token
        return named

    def _template(self, name: str | None, tools: bool) -> str:
        if name is not None:
            return self.templates.get(name, name)
        if not self.templates:
            raise ValueError(f"{self.name} has no chat template: use a prompt without --chat, or a chat model")
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise ValueError(
                f"{self.name} has no default among its chat templates: pass chat_template=, one of "
                f"{', '.join(sorted(self.templates))}"
            )
        return self.templates["default"]


def row(ids: Iterable[int]) -> list[int]:
    """The ids of one row as ints, checked. Raises ValueError for ids below 0 and for rows of rows."""
    ids = getattr(ids, "tolist", lambda: ids)()  # an array comes over in one step, not an element at a time
    try:
        ints = [operator.index(i) for i in ids]
    except TypeError:
        raise ValueError("ids are the ints of one row, a list or a 1-D array: pass each row on its own") from None
    outside = next((i for i in ints if not 0 <= i < 2**32), None)
    if outside is not None:
        raise ValueError(f"id {outside} is outside any vocabulary: -1 pads a row, so pass ids[:num]")
    return ints
