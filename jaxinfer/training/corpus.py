"""The text: the standard library of one CPython version, every file named and hashed in stdlib-3.11.7.json.

What is not in the list, and why: tests (idlelib's, unittest's, ... too), which say the same thing over and over; tables
that a program wrote (code pages, HTML entities, pydoc topics); what a build of Python writes about itself; and files
under 1024 bytes, which say next to nothing. Whole modules are held out, so that no line of theirs is trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import pathlib
import sysconfig
from collections.abc import Iterable
from typing import Any

LIST = pathlib.Path(__file__).with_name("stdlib-3.11.7.json")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text of every file by its path below the library, in sorted order, in its two parts."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_list() -> dict[str, Any]:
    """{"python": version, "held_out": [modules], "files": {path: sha256}}."""
    return json.loads(LIST.read_text(encoding="utf-8"))


def is_held_out(path: str, modules: list[str]) -> bool:
    """Whether a file belongs to one of the held-out modules ("json" is a package, "textwrap" a file)."""
    return any(path == f"{module}.py" or path.startswith(f"{module}/") for module in modules)


def read_corpus(stdlib: str | os.PathLike[str] | None = None) -> Corpus:
    """Reads every file of the list from `stdlib` (by default this Python's own library) and checks its hash.

    Raises ValueError, in one line, where a file is missing or differs: another text is another model.
    """
    wanted = read_list()
    root = pathlib.Path(sysconfig.get_path("stdlib") if stdlib is None else stdlib)
    remedy = f"run under CPython {wanted['python']}, or give --stdlib its Lib directory"
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for path, sha256 in sorted(wanted["files"].items()):
        try:
            data = (root / path).read_bytes()
        except OSError:
            raise ValueError(f"{root} lacks {path}, which CPython {wanted['python']} has: {remedy}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{root / path} has sha256 {found[:12]}..., CPython {wanted['python']} has {sha256[:12]}...: {remedy}"
            )
        parts[is_held_out(path, wanted["held_out"])][path] = data.decode("utf-8")
    return Corpus(*parts)


def read_texts(places: Iterable[str | os.PathLike[str]], held_out: float = 0.05) -> Corpus:
    """UTF-8 text of files, and of every file below directories (hidden ones aside), by path and in sorted order.

    The last part of all their characters is held out: whole files, and the end of one, cut at a line. Raises ValueError
    or OSError, in one line, for a file that is not UTF-8, and where there is no text.
    """
    found = [path for place in places for path in files_below(pathlib.Path(place))]
    texts = {str(path): read_text(path) for path in sorted(set(found))}
    texts = {path: text for path, text in texts.items() if text}
    total = sum(map(len, texts.values()))
    if not total:
        raise ValueError(f"there is no text in {', '.join(map(str, places))}: give files, or directories of them")
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    left = total - int(total * held_out)  # characters that are trained on
    for path, text in texts.items():
        cut = max(min(left, len(text)), 0)
        if cut < len(text):
            cut = text.rfind("\n", 0, cut) + 1 or cut
        left -= len(text)
        for part, piece in zip(parts, (text[:cut], text[cut:]), strict=True):
            part.update({path: piece} if piece else {})
    return Corpus(*parts)


def files_below(place: pathlib.Path) -> list[pathlib.Path]:
    """A file itself, or what lies below a directory, without what is hidden in it."""
    if not place.is_dir():
        return [place]
    inside = (path for path in place.rglob("*") if path.is_file())
    return [path for path in inside if not any(part.startswith(".") for part in path.relative_to(place).parts)]


def read_text(path: pathlib.Path) -> str:
    """A file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): leave it out") from None


def xz_bits_per_byte(texts: dict[str, str]) -> float:
    """What `xz -9` needs for the files concatenated in sorted order: the figure that a model has to beat."""
    data = "".join(texts[path] for path in sorted(texts)).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)
