"""From stored tensors to sharded arrays: what this process's devices own is read once, and nothing is held twice.

In its file a tensor is a matrix. Each shard of each array that it holds takes some of its rows and columns, in runs:
one run where the shard is a plain slice, several where heads are repeated or padded for the mesh. The file is read by
rows, each of them once, straight into the shard that takes it whole and as it is stored, or else in blocks of bounded
size from which every shard cuts its columns, in its own dtype. Without a mesh there is one shard, the whole array.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer import kernels
from jaxinfer import mesh as meshes
from jaxinfer.config import ModelConfig
from jaxinfer.models import letters, param_shapes, quantize
from jaxinfer.models.arrange import Sources, sources
from jaxinfer.models.names import Part, Path, Tensor
from jaxinfer.weights.safetensors import Checkpoint, aligned_empty

BLOCK = 16 * 2**20  # the most bytes that are read at a time, and held beside the arrays


@dataclasses.dataclass(frozen=True)
class Slot:
    """An array to be: its (arranged) shape and letters, where its heads and widths come from, where its shards go."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    word: str
    table: Sources  # letter -> for each index the canonical one, -1 for zeros; a letter that is not in it is as stored
    sharding: NamedSharding | None  # None: the default device

    def owners(self) -> dict[tuple[tuple[int, int], ...], list[Any]]:
        """Each distinct slice, a (begin, end) for every dimension, with the devices of this process that hold it."""
        if self.sharding is None:
            return {tuple((0, size) for size in self.shape): [None]}
        found: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            ranges = [part.indices(size)[:2] for part, size in zip(index or (), self.shape, strict=True)]
            found.setdefault(tuple(ranges), []).append(device)
        return found


class Run(NamedTuple):
    """Indices of a shard that follow one another in the file too."""

    at: int  # the first of them in the shard
    source: int  # and in the file
    size: int


@dataclasses.dataclass(frozen=True)
class Shard:
    """A slice of an array, in host memory, and what it takes from its tensor."""

    devices: list[Any]
    data: np.ndarray  # as the array has it
    view: np.ndarray  # the same memory as [rows, columns] of the file
    rows: list[Run]
    columns: list[Run]

    def takes(self, block: np.ndarray, at: int) -> None:
        """Cuts its columns from some rows of the file, which go to row `at` of its view, and converts them."""
        for run in self.columns:
            place = self.view[at : at + len(block), run.at : run.at + run.size]
            np.copyto(place, block[:, run.source : run.source + run.size], casting="unsafe")

    def as_stored(self, dtype: np.dtype, width: int) -> bool:
        """Whether its rows are the file's, byte for byte."""
        return self.data.dtype == dtype and self.view.flags.c_contiguous and self.columns == [Run(0, 0, width)]


def slots(config: ModelConfig, mesh: Mesh | None) -> dict[Path, Slot]:
    """The slot of every array of a config, which is arranged for the mesh where there is one."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    words = letters(config)
    homes = [None] * len(leaves) if mesh is None else jax.tree.leaves(meshes.shardings(words, mesh))
    tables = sources(config) if config.canonical is not None else [{}] * (len(config.layers) + 1)
    found: dict[Path, Slot] = {}
    for (keys, leaf), word, home in zip(leaves, jax.tree.leaves(words), homes, strict=True):
        path: Path = tuple(key.key if hasattr(key, "key") else key.idx for key in keys)
        table = tables[int(path[1])] if path[0] == "layers" else tables[-1]
        found[path] = Slot(leaf.shape, leaf.dtype, word, table, home)
    return found


def check_memory(config: ModelConfig, mesh: Mesh | None, form: str | None = None) -> None:
    """Refuses weights of a config, arranged for the mesh, that this process's free memory cannot hold."""
    shapes = param_shapes(config)
    if form is not None:
        shapes = jax.eval_shape(lambda params: quantize(params, form, mesh), shapes)
    needed, free = meshes.local_bytes(shapes, letters(config), mesh), kernels.free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"the weights need {needed / 1e9:.2f} GB of this process's memory, {free / 1e9:.2f} GB are free: "
            "ask for a smaller dtype or a mesh of more devices"
        )


def read_arrays(
    checkpoint: Checkpoint, name: str, tensor: Tensor, found: dict[Path, Slot]
) -> Iterator[tuple[Path, jax.Array]]:
    """The arrays of the tensor that is stored under `name`, on their devices, each with its path."""
    cut: dict[Path, list[Shard]] = {}
    start = 0
    for part in tensor.parts:
        cut[part.path] = list(shards(part, found[part.path], start, tensor.transposed))
        start += part.stored[0]
    fill(checkpoint, name, list(itertools.chain(*cut.values())))
    for path, pieces in cut.items():
        # Waits, so that no more than one tensor is on its way at a time.
        yield path, jax.block_until_ready(place(found[path], pieces))


def shards(part: Part, slot: Slot, start: int, transposed: bool) -> Iterator[Shard]:
    """The slices of an array that this process's devices own, not yet filled but for their zeros.

    start: the tensor's row (its column, if it is transposed) at which the array begins.
    """
    # the leading dimensions that are the file's `out`: N and H of q [N, H, D], D of o [D, N, H]
    out = next(i for i in range(1, len(part.shape) + 1) if math.prod(part.shape[:i]) == part.stored[0])
    for ranges, devices in slot.owners().items():
        picked = [
            slot.table.get(letter, np.arange(size))[begin:end]
            for letter, size, (begin, end) in zip(slot.word, part.shape, ranges, strict=True)
        ]
        rows, columns = flat(picked[:out], part.shape[:out]), flat(picked[out:], part.shape[out:])
        data = aligned_empty(tuple(map(len, picked)), slot.dtype)
        if min(rows.min(), columns.min()) < 0:
            data.fill(0)
        view = data.reshape(len(rows), len(columns))
        if transposed:
            yield Shard(devices, data, view.T, runs(columns), runs(rows, start))
        else:
            yield Shard(devices, data, view, runs(rows, start), runs(columns))


def flat(picked: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """The row-major index, in an array of this shape, of every combination of these indices; -1 where one is -1."""
    index = np.zeros(1, np.int64)
    for inner, size in zip(picked, shape, strict=True):
        index = np.where((index[:, None] < 0) | (inner < 0), -1, index[:, None] * size + inner).reshape(-1)
    return index


def runs(indices: np.ndarray, start: int = 0) -> list[Run]:
    """The runs of these indices of the file, which count from `start`, without those of -1."""
    step = np.where(indices < 0, -1 - len(indices), indices - np.arange(len(indices)))
    edges = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist(), len(indices)]
    return [Run(a, start + int(indices[a]), b - a) for a, b in itertools.pairwise(edges) if indices[a] >= 0]


def fill(checkpoint: Checkpoint, name: str, wanted: list[Shard]) -> None:
    """Reads the rows that the shards take, each row once.

    Rows are read whole: a shard's part of one (of o [D, N, H] and down [D, F], and of transposed files) is a few
    kilobytes, and a disk reads what lies between as fast as it skips it.
    """
    entry = checkpoint.entries[name]
    width = math.prod(entry.shape[1:])
    most = max(1, BLOCK // (width * entry.dtype.itemsize))
    straight = [shard.as_stored(entry.dtype, width) for shard in wanted]
    scratch = None if all(straight) else aligned_empty((min(most, entry.shape[0]), width), entry.dtype)
    with checkpoint.open(name) as read:
        for start, stop in pieces(wanted, most):
            takers = [
                (index, run.at + start - run.source)
                for index, shard in enumerate(wanted)
                for run in shard.rows
                if run.source <= start < run.source + run.size
            ]
            first = next((i for i, (index, _) in enumerate(takers) if straight[index]), None)
            if first is None:
                assert scratch is not None
                block = scratch[: stop - start]
            else:
                index, at = takers.pop(first)
                block = wanted[index].view[at : at + stop - start]
            read(start, block)
            for index, at in takers:
                wanted[index].takes(block, at)


def pieces(wanted: list[Shard], most: int) -> Iterator[tuple[int, int]]:
    """The rows that the shards take, as (start, stop) of at most so many: none lies half in a run."""
    taken = [(run.source, run.source + run.size) for shard in wanted for run in shard.rows]
    for begin, end in itertools.pairwise(sorted({edge for ends in taken for edge in ends})):
        if any(low <= begin < high for low, high in taken):
            yield from ((start, min(start + most, end)) for start in range(begin, end, most))


def place(slot: Slot, pieces: list[Shard]) -> jax.Array:
    """The array, each shard put on every device of this process that holds it.

    A CPU device takes the host's memory over, and emulated ones share it; nobody writes to it any more.
    """
    if slot.sharding is None:
        return jax.device_put(pieces[0].data, may_alias=True)
    arrays = [jax.device_put(shard.data, device, may_alias=True) for shard in pieces for device in shard.devices]
    return jax.make_array_from_single_device_arrays(slot.shape, slot.sharding, arrays)
