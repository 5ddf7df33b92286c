"""A dataclass of settings as the flags of a script and the keys of its presets (TOML files), and how it refuses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

S = TypeVar("S")


def setting(default: Any, text: str, **more: Any) -> Any:
    """A setting with its help; `more` goes to argparse."""
    return dataclasses.field(default=default, metadata={"help": text, **more})


class Refusal(Exception):
    """What was asked for cannot be done; the message is one line: what came, what fits, what to do."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def parse(
    settings: type[S],
    program: str,
    story: str | None,
    check: Callable[[S], None],
    one_of: Sequence[Sequence[str]] = (),
    argv: list[str] | None = None,
) -> S:
    """The settings (a dataclass of `setting`s) from flags, over those of a preset; what `check` refuses ends it.

    one_of: names that stand for one another: a flag of such a group takes the place of whichever the preset has.
    """
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(program, description=story, formatter_class=style, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="preset: a TOML file with settings, which flags override")
    hints = typing.get_type_hints(settings)
    own = vars(settings).get("__annotations__", {})
    for field in sorted(dataclasses.fields(settings), key=lambda field: field.name not in own):  # type: ignore[arg-type]
        kind = kinds(hints[field.name])[0]
        how: dict[str, Any] = {"type": kind}
        if kind in (bool, tuple):
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"action": "extend", "nargs": "+"}
        parser.add_argument(f"--{dashed(field.name)}", **how, **field.metadata)
    given: dict[str, Any] = vars(parser.parse_args(argv))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    try:
        base = preset(settings, given.pop("config")) if "config" in given else {}
        for group in one_of:
            if given.keys() & set(group):
                base = {name: value for name, value in base.items() if name not in group}
        found = settings(**base | given)
        check(found)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")
    return found


def preset(settings: type, path: str) -> dict[str, Any]:
    """The settings in a TOML file, each of the type that it has in the dataclass."""
    with open(path, "rb") as file:
        try:
            raw: dict[str, Any] = tomllib.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not TOML ({error}): configs/decode has examples") from None
    hints = typing.get_type_hints(settings)
    choices = {field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(settings)}
    for key, value in raw.items():
        if key not in hints:
            raise ValueError(f"{path} has the unknown key {key!r}: a preset may hold {', '.join(hints)}")
        raw[key] = fitted(value, kinds(hints[key]))
        if raw[key] is None:
            kind = "list of strings" if tuple in kinds(hints[key]) else kinds(hints[key])[0].__name__
            raise ValueError(f"{path} has {key} = {value!r}: it must be of type {kind}")
        if choices[key] and value not in choices[key]:
            raise ValueError(f"{path} has {key} = {value!r}: it must be one of {', '.join(choices[key])}")
    return raw


def fitted(value: Any, fits: tuple[type, ...]) -> Any:
    """A value from TOML as one of these types, or None."""
    if tuple in fits:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if float in fits and type(value) is int:
        return float(value)
    return value if type(value) in fits else None  # isinstance would take true for 1


def kinds(hint: Any) -> tuple[type, ...]:
    """The types that a field may have: (float, NoneType) of `float | None`, (tuple,) of `tuple[str, ...]`."""
    if typing.get_origin(hint) is tuple:
        return (tuple,)
    return typing.get_args(hint) or (hint,)


def dashed(name: str) -> str:
    """A setting's name as a flag has it, without the leading dashes."""
    return name.replace("_", "-")


def one_line(error: BaseException) -> str:
    """What an error says; an OSError does not say its file by itself."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def doors(*more: type[Exception]) -> Iterator[None]:
    """Doors refuse with a ValueError or OSError of one line. One that is raised elsewhere is a bug, and must show."""
    try:
        yield
    except (ValueError, OSError, MemoryError, *more) as error:
        raise Refusal(one_line(error)) from error
