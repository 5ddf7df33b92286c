"""What lies in a tokenizer's directory, read: tokenizer.json, the special tokens beside it, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.j*",
    "additional_chat_templates/*.jinja",
    "config.json",
    "generation_config.json",
)
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """tokenizer.json as the `tokenizers` library reads it, ready for texts of any length."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [file for file in OTHER_FORMATS if (directory / file).is_file()]
        if others:
            raise ValueError(
                f"{directory} has {' and '.join(others)} but no tokenizer.json: convert it once with transformers, "
                "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
            )
        raise ValueError(f"{directory} has no tokenizer.json: pass a directory or a hub id that has one")
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
        raise ValueError(f"{path} is truncated or no tokenizer ({reason}): copy or download it again") from None
    # a tokenizer.json may have been saved with a training run's settings
    backend.no_truncation()
    backend.no_padding()
    return backend


def add_special(backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Adds the special tokens that the files beside tokenizer.json declare, and gives the named ones by name.

    v5 writes named tokens as strings and the others as `extra_special_tokens`; v4 wrote `added_tokens_decoder`,
    `additional_special_tokens` and special_tokens_map.json, with tokens as strings or as dicts. Tokens and their order
    are those of transformers 5.23 (_from_pretrained and TokenizersBackend), so new ones get the same ids.
    """
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, Mapping) or not all(key.isdecimal() for key in decoder):
        raise ValueError(f"{directory}: added_tokens_decoder must be a dict from ids to tokens: copy the file again")
    if "added_tokens_decoder" not in config:  # only then does transformers ask the older file
        config = {**config, **read_json(directory / "special_tokens_map.json")}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    roles = [*ROLES, *(key for key in config if key.endswith("_token") and key not in ROLES)]
    named = {role: config[role] for role in roles if isinstance(config.get(role), str | dict)}
    if isinstance(extra, Mapping):  # named ones of the model's own: image_token, ...
        named, extra = {**named, **extra}, []
    added = [_token(directory, decoder[key]) for key in sorted(decoder, key=int)]
    tokens = {role: _token(directory, token) for role, token in named.items()}
    for token in tokens.values():
        token.special = True
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *added)}
    others = [*tokens.values(), *(_token(directory, token) for token in extra)]
    backend.add_tokens([*added, *(token for token in others if token.content not in known)])
    return {role: token.content for role, token in tokens.items()}


def special_ids(backend: tokenizers.Tokenizer) -> set[int]:
    return {i for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _token(directory: Path, token: Any) -> tokenizers.AddedToken:
    if isinstance(token, str):
        return tokenizers.AddedToken(token, special=True)
    if not isinstance(token, Mapping) or not isinstance(token.get("content"), str):
        raise ValueError(
            f"{directory} declares {token!r} as a special token: it must be text, or a dict with 'content'"
        )
    flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in token}
    return tokenizers.AddedToken(token["content"], special=token.get("special", True), **flags)


def read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files come first and replace the config's; chat_template.json is a processor's, v4."""
    found = {path.stem: _read_text(path) for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        found["default"] = _read_text(directory / "chat_template.jinja")
    if found:
        return found
    template = config.get("chat_template") or read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    elif isinstance(template, str):
        template = {"default": template}
    template = template or {}
    if not isinstance(template, dict) or not all(isinstance(text, str) for pair in template.items() for text in pair):
        raise ValueError(f"{directory}: chat_template must be a text, or a list of dicts with 'name' and 'template'")
    return template


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is truncated or no JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: copy or download it again")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): copy it again") from None
