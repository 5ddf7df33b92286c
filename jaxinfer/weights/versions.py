"""A directory whose content changes in one step, so that whoever is killed at any moment leaves the old one or the new.

    DIRECTORY/save-2/...                            a version, written once, named by nothing until it is whole
    DIRECTORY/current -> save-2                     the version that counts: replacing this link is the step
    DIRECTORY/tokenizer.json -> current/tokenizer.json

The links beside `current` show a version's files where others look for them. They go through `current`, so they change
with it; one whose file a version lacks dangles, which is to say that there is no such file.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil

CURRENT = "current"
FRESH = "current.next"
VERSION = re.compile(r"save-\d+")


def current(directory: pathlib.Path) -> pathlib.Path | None:
    """The version that counts, None where there is none. A copy made without links is read too."""
    link = directory / CURRENT
    if not link.is_symlink():
        return link if link.is_dir() else None
    target = os.readlink(link)
    return directory / target if VERSION.fullmatch(target) else None


def drafts(directory: pathlib.Path) -> list[pathlib.Path]:
    """Versions that do not count: cut short, or replaced."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in found if VERSION.fullmatch(path.name) and path != current(directory))


def begin(directory: pathlib.Path) -> pathlib.Path:
    """A fresh version to write into; what earlier ones left behind is removed.

    Raises ValueError or OSError for a directory that is a file, holds something else, or is a copy without links.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file: a checkpoint is a directory")
    directory.mkdir(parents=True, exist_ok=True)
    old = current(directory)
    others = sorted(path.name for path in directory.iterdir() if not ours(path))
    if old is None and others:
        raise ValueError(f"{directory} holds {others[0]} and no sharded checkpoint: save into an empty directory")
    if old is not None and not (directory / CURRENT).is_symlink():
        raise ValueError(f"{directory} is a copy in which {CURRENT} is no link: save into an empty directory")
    for draft in drafts(directory):
        shutil.rmtree(draft)
    version = directory / f"save-{int(old.name.removeprefix('save-')) + 1 if old is not None else 1}"
    version.mkdir()
    return version


def ours(path: pathlib.Path) -> bool:
    """Whether an entry of the directory is a version or one of the links that are made here."""
    if not path.is_symlink():
        return VERSION.fullmatch(path.name) is not None
    target = os.readlink(path)
    return path.name == FRESH or target == f"{CURRENT}/{path.name}"


def show(version: pathlib.Path) -> None:
    """Links, in the directory, to the files that the version has so far. Raises ValueError for one in the way."""
    for path in version.iterdir():
        link, target = version.parent / path.name, f"{CURRENT}/{path.name}"
        if link.is_symlink() and os.readlink(link) == target:
            continue
        if os.path.lexists(link):
            raise ValueError(f"{link} is in the way of a file of the checkpoint: move it elsewhere")
        link.symlink_to(target)


def switch(version: pathlib.Path) -> None:
    """Makes the version the one that counts, then drops the others and the links that have nothing to show."""
    directory = version.parent
    link, fresh = directory / CURRENT, directory / FRESH
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(version.name)
    os.replace(fresh, link)
    sync(directory)
    for draft in drafts(directory):
        shutil.rmtree(draft)
    for path in directory.iterdir():
        if ours(path) and path.is_symlink() and not path.exists():
            path.unlink()


def sync(path: pathlib.Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
