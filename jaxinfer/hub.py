"""A name becomes a directory: "builtin", a path, or a hub id. What lies in the directory is for others to open."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

BUILTIN = Path(__file__).parent / "builtin"

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*")
# A checkpoint is the top folder and its additional_chat_templates. Folders with any other name (original/, onnx/, ...)
# and consolidated* hold the same weights a second time. fnmatch has no "not this word": any first letters but "add".
SKIPPED = ("consolidated*", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*")

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@\S+)?", re.ASCII)
FITS = "a model is 'builtin', a directory, or a hub id owner/name (owner/name@revision)"


class LocateError(ValueError):
    """No directory belongs to this name. The message is one line: what came, what fits, what to do."""


def locate(name: str | os.PathLike[str], files: Sequence[str] | None = None) -> Path:
    """The directory that belongs to a name; a hub id is downloaded into the hub's cache first, or found there.

    name: "builtin" (the model inside the package; a directory of that name is ./builtin), an existing directory, or a
    hub id "owner/name" or "owner/name@revision". files: the patterns to download, by default config, tokenizer, chat
    template and safetensors files; never pickled weights. HF_HUB_OFFLINE=1, HF_TOKEN and HF_HOME mean what they mean to
    huggingface_hub. Raises LocateError (a ValueError) for whatever goes wrong.
    """
    name = os.fspath(name)
    if name == "builtin":
        return _builtin()
    if not name.strip():
        raise LocateError(f"the model's name is empty: {FITS}")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise LocateError(f"{name} is a file: {FITS}; pass the directory that holds the file")
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a ~user who is not here
        raise LocateError(f"{name} cannot be looked at ({_line(error)}): {FITS}") from None
    if not HUB_ID.fullmatch(name):
        raise LocateError(f"there is no directory {name}, and it is not a hub id: {FITS}")
    return _download(name, FILES if files is None else files)


def _builtin() -> Path:
    if not BUILTIN.is_dir():
        raise LocateError("this installation lacks the built-in model: install jaxinfer again, or name another model")
    return BUILTIN


def _download(name: str, files: Sequence[str]) -> Path:
    # imported here: 0.2 s that only hub ids need
    import huggingface_hub
    from huggingface_hub import constants, errors

    # httpx's, or httpx2's: whichever this version of huggingface_hub speaks
    network_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    repo, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(files), ignore_patterns=list(SKIPPED)
        )
    except errors.GatedRepoError:
        line = f"{repo} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        line = f"{repo} is on the hub, its revision {revision} is not: name a branch, a tag or a commit"
    except errors.RepositoryNotFoundError:
        line = f"there is no directory {name}, and the hub shows no model {repo}: check the spelling"
        line += ", or `hf auth login` if it is private"
    except errors.LocalEntryNotFoundError:
        line = _not_cached(name, constants.HF_HUB_OFFLINE)
    except errors.HFValidationError:
        line = f"there is no directory {name}, and the hub does not take it as an id: {FITS}"
    except (network_error, errors.XetDownloadError, OSError) as error:
        line = f"{name} could not be downloaded ({_line(error)}): try again, or pass a directory that holds it"
    else:
        return Path(found)
    raise LocateError(line)


def _not_cached(name: str, offline: bool) -> str:
    where = f"there is no directory {name}, and as a hub id it is not (completely) in the cache"
    if offline:
        return f"{where} while HF_HUB_OFFLINE is set: download it once with it unset, or pass a directory"
    return f"{where} and the hub cannot be reached: check the network, or pass a directory"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
