"""Safetensors files: eight bytes of header length, a JSON header, then the tensors' bytes (safetensors format, v1).

Read with pread, not mmap: the pages of a mapping come and go as the kernel likes, while what
pread fills can be counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER = 100_000_000  # of the format


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    bytes: int


class Checkpoint:
    """The tensors of a directory: model.safetensors, or the shards that model.safetensors.index.json names.

    Only headers are read until a tensor is asked for. `bytes_read` counts what was read of tensors.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self.bytes_read = 0
        self.entries: dict[str, Entry] = {}
        for file, names in self.files():
            header = read_header(file)
            for name in header if names is None else names:
                if name not in header:
                    raise ValueError(f"{file.name} does not hold the tensor {name!r} that the index says it holds")
                self.entries[name] = header[name]

    def files(self) -> Iterator[tuple[pathlib.Path, list[str] | None]]:
        """The files to open, each with the names to take from it (None: all)."""
        single, index = self.directory / "model.safetensors", self.directory / "model.safetensors.index.json"
        if single.is_file():
            yield single, None
            return
        if not index.is_file():
            other = sorted(path.name for path in self.directory.glob("*.bin"))
            hint = f"; {other[0]} must be saved as safetensors first" if other else ""
            raise FileNotFoundError(
                f"{self.directory} holds neither model.safetensors nor model.safetensors.index.json{hint}"
            )
        wanted: dict[str, list[str]] = {}
        for name, file in read_json(index).get("weight_map", {}).items():
            wanted.setdefault(file, []).append(name)
        if not wanted:
            raise ValueError(f"{index} has no weight_map: the index is damaged, fetch it again")
        for file, names in wanted.items():
            if not (self.directory / file).is_file():
                raise FileNotFoundError(f"{self.directory} lacks {file}, which the index names: fetch it again")
            yield self.directory / file, names

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        entry = self.entries[name]
        data = aligned_empty(entry.shape, entry.dtype)
        with self.open(name) as read:
            read(0, data)
        return data

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[int, np.ndarray], None]]:
        """A function that reads a tensor's rows, from `start` on, into a contiguous array [rows, ...] of its dtype."""
        entry = self.entries[name]

        def read(start: int, into: np.ndarray) -> None:
            row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            assert into.flags.c_contiguous
            data = into.reshape(-1).view(np.uint8)
            done = 0
            while done < len(data):  # the kernel gives at most 2 GB a call
                rest: Any = data[done:]
                got = os.preadv(file.fileno(), [rest], entry.start + start * row + done)
                if not got:
                    raise ValueError(
                        f"{entry.file} ended inside tensor {name!r}: the file is truncated, fetch it again"
                    )
                done += got
                self.bytes_read += got

        with open(entry.file, "rb", buffering=0) as file:
            yield read


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array on a 64-byte boundary: what a CPU device takes over without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file, or a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: a model directory needs it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): the file is damaged, fetch it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object: the file is damaged")
    return value


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The entries of a file, after checking that all of them lie inside it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file, or is truncated: {size} bytes, a header of {length}")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} has a header that is not JSON ({error}): fetch the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is not an object: fetch the file again")
    items = [(name, item) for name, item in header.items() if name != "__metadata__"]
    entries = {name: entry_from_header(path, name, item, 8 + length) for name, item in items}
    end = max((entry.start + entry.bytes for entry in entries.values()), default=8 + length)
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise ValueError(f"{path} is {state}: {size} bytes, its header describes {end}: fetch the file again")
    return entries


def entry_from_header(path: pathlib.Path, name: str, item: Any, base: int) -> Entry:
    """One tensor's entry."""
    match item:
        case {"dtype": str(kind), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            whole = all(isinstance(size, int) and size >= 0 for size in shape) and 0 <= begin <= end
        case _:
            kind, shape, begin, end, whole = "", [], 0, 0, False
    if not whole:
        raise ValueError(f"{path}: tensor {name!r} is described by {str(item)[:80]}: the header is damaged")
    if kind not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {kind}: only {', '.join(DTYPES)} are handled")
    dtype = DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} has {end - begin} bytes: the header is damaged")
    return Entry(path, dtype, tuple(shape), base + begin, end - begin)


def write_safetensors(path: str | os.PathLike[str], tensors: dict[str, np.ndarray]) -> None:
    """Writes the tensors into one file, which appears whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    draft = pathlib.Path(f"{os.fspath(path)}.partial")
    with open(draft, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
