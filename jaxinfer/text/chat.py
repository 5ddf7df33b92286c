"""Chat templates, rendered as transformers renders them (transformers 5.23, utils/chat_template_utils.py).

A template comes with a checkpoint, from strangers: it runs in jinja2's immutable sandbox and sees JSON values only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Where a message may carry its reasoning; the first is the name that templates read today.
REASONING = ("reasoning_content", "thinking", "reasoning")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    names: Mapping[str, Any],
) -> str:
    """The text of a conversation: `template` over messages (dicts with "role" and "content"; a key whose value is None
    counts as absent), tools (JSON schemas), documents, and `names`, the special tokens and whatever else it asks for.

    Raises ValueError, one line, when an argument is not of this form, or the template has an error or refuses.
    """
    messages = [_message(message) for message in _dicts("messages", messages)]
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message, {'role': 'user', 'content': '...'}")
    values = {
        **_plain("the template's arguments", names),
        "messages": messages,
        "tools": None if tools is None else _dicts("tools", tools),
        "documents": None if documents is None else _dicts("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compiled(template).render(values)
    except jinja2.TemplateSyntaxError as error:
        line = f"the chat template has a syntax error in line {error.lineno}: {_line(error.message)}"
    except jinja2.TemplateError as error:
        line = f"the chat template refuses these messages: {_line(error)}"
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        # what a template's own expressions raise, "a" + None and the like
        line = f"the chat template fails on these messages: {type(error).__name__}: {_line(error)}"
    raise ValueError(f"{line}; change the messages, or pass chat_template=")


def _dicts(what: str, values: Any) -> list[dict[str, Any]]:
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise ValueError(f"{what} is a {type(values).__name__}: it must be a list of dicts")
    for value in values:
        if not isinstance(value, Mapping):
            raise ValueError(f"{what} holds a {type(value).__name__}: it must be a list of dicts, for one conversation")
    return _plain(what, values)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    # OpenAI's clients send content=None beside tool_calls; templates expect such keys to be missing
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}  # gpt-oss reads `thinking`


def _plain(what: str, value: Any) -> Any:
    """A copy made of plain JSON types. Other objects have methods, and the sandbox cannot know their harm."""
    if value is None or isinstance(value, bool):
        return value
    # subclasses, enum members say, go back to their base
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(what, key): _plain(what, item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(what, item) for item in value)
    if isinstance(value, list):
        return [_plain(what, item) for item in value]
    raise ValueError(f"{what} holds a {type(value).__name__}: a chat template takes text, numbers, lists and dicts")


def _line(error: object) -> str:
    return " ".join(str(error).split())


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training masks; here it just prints."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # a call block, as in transformers, so that variables set inside stay inside
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(lineno)

    def _print(self, caller: Any) -> str:
        return caller()


class _Dict:
    """`dict` inside a template: makes dicts, and shows no type to climb out by."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` inside a template, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # self in args, so that namespace(self=1) works
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_underscore(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}, which begins with an underscore")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own tojson escapes <, > and & for HTML; a model has never seen a tool description like that
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)
