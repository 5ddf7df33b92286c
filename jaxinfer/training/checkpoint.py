"""A training run on disk: one file that appears whole or not at all, so that a kill at any moment costs minutes."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np


def save(path: str | os.PathLike[str], tree: Any, notes: dict[str, Any]) -> None:
    """Writes the arrays of a tree, and notes (JSON), in place of what was there."""
    arrays: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    arrays["notes"] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
    draft = pathlib.Path(f"{os.fspath(path)}.partial")
    with open(draft, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def restore(path: str | os.PathLike[str], tree: Any) -> tuple[Any, dict[str, Any]]:
    """The arrays, in the structure of `tree` (arrays or shapes), and the notes, bit for bit as they were saved."""
    old, treedef = jax.tree.flatten(tree)
    with np.load(path) as file:
        notes = json.loads(bytes(file["notes"]))
        new = [file[f"leaf{i}"] for i in range(len(old))] if len(file.files) == len(old) + 1 else []
    if [(leaf.shape, leaf.dtype) for leaf in new] != [(leaf.shape, leaf.dtype) for leaf in old]:
        raise ValueError(f"{path} holds {len(new)} other arrays than this run's {len(old)}: take a fresh --out")
    return jax.tree.unflatten(treedef, [jax.numpy.asarray(leaf) for leaf in new]), notes


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes alone."""
    with np.load(path) as file:
        return json.loads(bytes(file["notes"]))
