"""Ids to text as they come: never half a character, never text that a stop string might still take back."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxinfer.text.tokenizer import Tokenizer, row

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # byte fallback writes a byte like this


class Detokenizer:
    """The text of one row's new tokens, piece by piece.

    The law: what `push` and `finish` return, put together, is `tokenizer.decode(all the ids)` cut before the first stop
    string, however the ids are split over the calls. "First" is the one that is completed first; of several completed
    by the same character, the longest. The cost is linear in the number of ids.

    Text is held back while it is half a character, while later tokens can still change it (with byte fallback one
    invalid byte turns its whole run of bytes into U+FFFD, so a run comes out when it ends), or while it is the
    beginning of a stop string.

    stopped: a stop string is complete; stop_string says which. num: the pushed ids so far, special ones included; once
    stopped, the ids up to and including the one that completed the stop string, which is where to end the row.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] = (),
        skip_special: bool = True,
        prompt: Iterable[int] = (),
    ) -> None:
        """stop: stop strings, none of them empty (ValueError).

        prompt: ids that the new ones go on from. Their text is not given out; with them the text is what
        `decode(prompt + ids)` has after `decode(prompt)`. Without them a decoder that trims the space at the start of a
        text (Llama 2's) trims that of the first new word.
        """
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError("a stop string is empty, and every text contains that: leave it out")
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._writer = _writer(tokenizer)
        self._writer.follow([i for i in row(prompt) if i not in self._skip])
        self._held = ""  # may be the beginning of a stop string
        self._finished = False
        self.num = 0
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        return self.stop_string is not None

    def push(self, ids: Iterable[int]) -> str:
        """New text, now that these ids have come. Ids after a completed stop string are ignored."""
        if self._finished:
            raise ValueError("push after finish: a row's text is finished once, so make a Detokenizer for the next")
        text = []
        for i in row(ids):
            if self.stopped:
                break
            self.num += 1
            if i not in self._skip:
                text.append(self._pass(self._writer.write(i, self.num)))
        return "".join(text)

    def finish(self) -> str:
        """What was held back, now that no more ids come; bytes without their character become U+FFFD."""
        if self.stopped or self._finished:
            return ""
        self._finished = True
        text = self._pass(self._writer.close())
        return text if self.stopped else text + self._held

    def _pass(self, new: str) -> str:
        """Adds new text to what is held, and gives back what no stop string can reach any more."""
        if not self._stop:
            return new
        text = self._held + new
        hits = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if hits:
            end, start, self.stop_string = min(hits)
            self.num = self._writer.tokens_for(end - len(self._held), self.num)
            return text[:start]
        self._held = text[len(text) - self._at_risk(text) :]
        return text[: len(text) - len(self._held)]

    def _at_risk(self, text: str) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


def _writer(tokenizer: Tokenizer) -> _Bytes | _Window:
    decoder = tokenizer.backend.decoder
    steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
        return _Bytes(tokenizer)
    return _Window(tokenizer, local=_is_local(kinds), fallback="ByteFallback" in kinds)


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _steps(step)


def _is_local(kinds: list[str]) -> bool:
    """Whether a decoder treats each token by itself, save that it may trim the first: nothing but Strip after Fuse."""
    head = kinds[: kinds.index("Fuse")] if "Fuse" in kinds else kinds
    tail = kinds[len(head) :]
    known = {"Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece", "BPEDecoder"}
    return set(head) <= known and set(tail) <= {"Fuse", "Strip"}


class _Bytes:
    """Byte-level BPE: every token is a string of bytes, and UTF-8 itself says where characters end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._pieces: dict[int, bytes] = {}
        # "replace" writes one U+FFFD for each maximal broken part, as Rust's from_utf8_lossy does in `tokenizers`
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def follow(self, ids: list[int]) -> None:
        """Nothing to do: the bytes of a prompt end with a character, and no byte after them depends on them."""

    def write(self, i: int, num: int) -> str:
        piece = self._pieces.get(i)
        if piece is None:
            token = self._backend.id_to_token(i) or ""  # ids of a padded vocabulary have no token, and no text
            piece = self._pieces[i] = _bytes(token)
        return self._utf8.decode(piece)

    def close(self) -> str:
        return self._utf8.decode(b"", final=True)

    def tokens_for(self, length: int, num: int) -> int:
        return num  # each write is of one token


def _bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token with other characters stands for itself."""
    if all(c in BYTE_OF for c in token):
        return bytes(BYTE_OF[c] for c in token)
    return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's (bytes_to_unicode in its encoder.py): printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()


class _Window:
    """Any other decoder: decodes the new tokens behind the last ones already shown, and takes what is new.

    The tokens before (at least one that shows text) are there because decoders trim the start of a text and join
    tokens with spaces: they take that on themselves. Between `settled` tokens a decoder's work is independent; one that
    is not `local` is decoded whole, at the end.
    """

    def __init__(self, tokenizer: Tokenizer, local: bool, fallback: bool) -> None:
        self._backend = tokenizer.backend
        self._local = local
        self._fallback = fallback
        self._before: list[list[int]] = []  # chunks, each settled at its end, already shown
        self._shown = ""  # what `before` decodes to
        self._new: list[int] = []
        self._nums: list[int] = []
        self._last: tuple[list[int], int, list[int], list[int]] = ([], 0, [], [])  # for tokens_for

    def follow(self, ids: list[int]) -> None:
        """Stands the text behind these ids. Only the last of them matter, back to where text stands on its own."""
        start = len(ids)
        while start and not self._shown:
            start -= 1
            if not start or self._settled(ids[start - 1]):
                self._shown = self._decode(ids[start:])
        self._new = ids[start:]
        self._nums = [0] * len(self._new)

    def write(self, i: int, num: int) -> str:
        self._new.append(i)
        self._nums.append(num)
        return self._show() if self._settled(i) else ""

    def close(self) -> str:
        return self._show() if self._new else ""

    def tokens_for(self, length: int, num: int) -> int:
        """How many pushed ids the first `length` characters of the text just written needed."""
        context, shown, new, nums = self._last
        whole = self._decode(context + new)[: shown + length]
        for n, at in enumerate(nums, start=1):
            if self._decode(context + new[:n])[: shown + length] == whole:
                return at
        return num

    def _settled(self, i: int) -> bool:
        if not self._local:
            return False
        token = self._backend.id_to_token(i)
        # an id without a token (a padded vocabulary) has no text, and does not end a run of bytes either
        return token is not None and not (self._fallback and BYTE.fullmatch(token))

    def _show(self) -> str:
        context = [i for chunk in self._before for i in chunk]
        text = self._decode(context + self._new)[len(self._shown) :]
        self._last = (context, len(self._shown), self._new, self._nums)
        self._before.append(self._new)
        self._new, self._nums = [], []
        self._forget()
        return text

    def _forget(self) -> None:
        """Keeps the fewest chunks that still show text, so that they have been trimmed and what follows is not."""
        for n in range(1, len(self._before) + 1):
            tail = self._before[-n:]
            self._shown = self._decode([i for chunk in tail for i in chunk])
            if self._shown:
                self._before = tail
                return

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)
