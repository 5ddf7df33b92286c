"""Sharded checkpoints: arrays as Orbax stores them (OCDBT, uncompressed), beside our own config and a model's files.

    DIRECTORY/current/jaxinfer.json    format version, config, names in the Hugging Face files, every file's size
    DIRECTORY/current/arrays/          canonical params, written and read by many processes
    DIRECTORY/current/tokenizer.json   copied, as are config.json, chat templates, ...; seen as DIRECTORY/tokenizer.json

jaxinfer.json is written last and lists what must be there, so a copy or a save that was cut short is known before an
array is read. How the directory changes in one step is told in `versions`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxinfer import kernels, models
from jaxinfer import mesh as meshes
from jaxinfer.config import ModelConfig
from jaxinfer.models.arrange import resting, settle, sources
from jaxinfer.models.names import Path
from jaxinfer.weights import versions
from jaxinfer.weights.config_json import config_from_json, config_to_json
from jaxinfer.weights.export import Later
from jaxinfer.weights.files import copy_files, origin
from jaxinfer.weights.huggingface import FLOATS
from jaxinfer.weights.safetensors import read_json
from jaxinfer.weights.shards import check_memory

NOTES, ARRAYS = "jaxinfer.json", "arrays"
FORMAT, VERSION = "jaxinfer sharded checkpoint", 1
KEYS = ("format", "version", "written_by", "config", "huggingface", "weights", "files")
CHUNK = 16 * 2**20  # bytes of a stored piece, at most: what a device reads beside its own part is less than this
BUFFER = 2**28  # bytes of arrays on their way between disk and devices, at least


def library() -> Any:
    """orbax.checkpoint, or a ValueError that says how to get it."""
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sharded checkpoints need orbax-checkpoint ({error}): pip install 'jaxinfer[checkpoint]'"
        ) from None
    return orbax.checkpoint


# --- saving ------------------------------------------------------------------------------------------------------


def save(directory: str | os.PathLike[str], params: Any, config: ModelConfig, tokenizer: Any = None) -> None:
    """Writes a sharded checkpoint that `load` restores onto any mesh, in place of the one that is there.

    params, config: as they are, on a mesh or one device; what `arrange` did is undone on the way (heads that do not
    divide the mesh are gathered leaf by leaf). In a program of several processes all call this, with a directory that
    all of them see, and each writes its own part.
    tokenizer: a `Tokenizer`, or the directory or hub id of a model: its small files (tokenizer, chat templates,
    config.json, generation_config.json, licence) are copied along, and what its config.json and safetensors say is
    remembered for `scripts/convert.py`, which writes a Hugging Face directory again. Without it nothing is copied, and
    `load` needs nothing more.

    Whoever is killed on the way leaves the previous checkpoint whole. Raises ValueError or OSError, in one line, for a
    directory that holds something else, files that cannot be read, and params that do not fit the config.
    """
    library()
    form = models.form_of(params)
    if form is None:
        params, config = models.canonical(params, config)
    elif config.canonical is not None:
        raise ValueError("weights in codes are saved as they are, and these are arranged for a mesh: save them without")
    params = models.repacked(params, packed=True)
    check_params(params, config, form)
    write(directory, params, config, tokenizer, form)


def write(
    directory: str | os.PathLike[str],
    params: Any,
    config: ModelConfig,
    files: Any,
    form: str | None = None,
    **more: Any,
) -> None:
    """What `save` does with canonical params, whose leaves may be `Later`, or in codes of some form.

    more: to remember of where they are from.
    """
    where = pathlib.Path(directory).expanduser().absolute()
    version, notes = pathlib.Path(), {}

    def prepare() -> int:
        nonlocal version, notes
        notes = {"config": config_to_json(config), "huggingface": origin(files, config) | more}
        notes |= {"weights": form} if form else {}
        version = versions.begin(where)
        copy_files(files, version)
        versions.show(version)
        return int(version.name.removeprefix("save-"))

    def finish() -> int:
        sizes = {path.relative_to(version).as_posix(): path.stat().st_size for path in files_in(version)}
        from jaxinfer import __version__

        head = {"format": FORMAT, "version": VERSION, "written_by": f"jaxinfer {__version__}"}
        text = json.dumps(head | notes | {"files": sizes}, indent=1)
        (version / NOTES).write_text(text + "\n", encoding="utf-8")
        versions.sync(version / NOTES)
        versions.switch(version)
        return 0

    version = where / f"save-{first(prepare)}"
    if not version.is_dir():
        raise ValueError(
            f"process {jax.process_index()} does not see {version}: all processes must share the directory"
        )
    ocp = library()
    how = ocp.SaveArgs(chunk_byte_size=CHUNK)
    with checkpointer(params) as writer:
        writer.save(version / ARRAYS, args=ocp.args.PyTreeSave(params, jax.tree.map(lambda _: how, params)))
    first(finish)


def first(f: Callable[[], int]) -> int:
    """What f gives on process 0, on every process; where it refuses, all of them raise."""
    if jax.process_count() == 1:
        return f()
    from jax.experimental import multihost_utils

    number, refusal = -1, None
    if jax.process_index() == 0:
        try:
            number = f()
        except (ValueError, OSError) as error:
            refusal = error
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if refusal is not None:
        raise refusal
    if number < 0:
        raise ValueError("the checkpoint was not saved: process 0 says why")
    return number


def files_in(directory: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a directory."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def shapes_of(config: ModelConfig, form: str | None, mesh: Mesh | None = None) -> Any:
    """The shapes of the arrays in a file, for a mesh: of weights in codes, those with groups that lie on one device."""
    shapes = models.param_shapes(config)
    if form is None:
        return shapes
    return jax.eval_shape(lambda params: models.quantize(params, form, mesh, packed=True), shapes)


def check_params(params: Any, config: ModelConfig, form: str | None = None) -> None:
    """Refuses params that are not those of the config, or not on all processes."""
    want, have = flat(shapes_of(config, form)), flat(params)
    if want.keys() != have.keys():
        odd = sorted(want.keys() ^ have.keys())[0]
        raise ValueError(f"the params {'lack' if odd in want else 'hold'} {odd}, and their config does not: save both")
    for path, leaf in have.items():
        if np.shape(leaf) != want[path].shape:
            raise ValueError(f"{path} has shape {list(np.shape(leaf))}, but the config says {list(want[path].shape)}")
        if jax.process_count() > 1 and getattr(leaf, "is_fully_addressable", True):
            raise ValueError(
                f"{path} lies on one of {jax.process_count()} processes: shard the params on a mesh of all"
            )


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as layers/0/q."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


# --- loading -----------------------------------------------------------------------------------------------------


def holds(directory: pathlib.Path) -> bool:
    """Whether a directory is, or was to become, a sharded checkpoint."""
    found = versions.current(directory)
    if (directory / NOTES).is_file() or (
        found is not None and any((found / name).exists() for name in (NOTES, ARRAYS))
    ):
        return True
    return bool(versions.drafts(directory)) and not (directory / "config.json").is_file()


def is_version(directory: pathlib.Path) -> bool:
    """Whether this is what `current` leads to."""
    return (directory / NOTES).is_file() and (directory / ARRAYS).is_dir()


class Sharded:
    """An opened checkpoint: its config and notes, and its arrays when they are asked for.

    Raises ValueError or FileNotFoundError, in one line, for one that is half-written, damaged or of another format.
    """

    def __init__(self, directory: pathlib.Path):
        self.name = directory
        found = directory.absolute() if is_version(directory) else versions.current(directory.absolute())
        if found is None or not (found / NOTES).is_file():
            raise ValueError(f"{directory} is half-written: a save was interrupted, save it again")
        self.directory = found
        notes = read_json(found / NOTES)
        what = f"{notes.get('format')!r}, version {notes.get('version')!r}"
        if (notes.get("format"), notes.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{directory} is of format {what}, not {VERSION}: a newer jaxinfer may read it")
        if unknown := sorted(notes.keys() - set(KEYS)):
            raise ValueError(f"{found / NOTES} has the unknown key {unknown[0]!r}: a newer jaxinfer may understand it")
        self.config = config_from_json(notes.get("config"), str(found / NOTES))
        self.huggingface: dict[str, Any] = notes.get("huggingface") or {}
        self.form: str | None = notes.get("weights")  # that its weights are in
        self.check_files(notes.get("files") or {})
        self.stored = self.read_metadata()

    def check_files(self, sizes: dict[str, int]) -> None:
        """Refuses a checkpoint of which a file is missing or has another size."""
        bad = [name for name, size in sizes.items() if not self.has(name, size)]
        if bad or not sizes:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            what = f"{bad[0]}{more} missing or cut short" if bad else "it lists no files"
            raise ValueError(f"{self.name} is half-written ({what}): copy or save it again")

    def has(self, name: str, size: int) -> bool:
        path = self.directory / name
        return path.is_file() and path.stat().st_size == size

    def read_metadata(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shape and dtype of every array, which must be what the config asks for."""
        with checkpointer(None) as reader, self.refused():
            found = reader.metadata(self.directory / ARRAYS).item_metadata
            if found is None:
                raise ValueError("the metadata of its arrays is damaged")
            tree = found.tree
        stored = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat(tree).items()}
        want = flat(shapes_of(self.config, self.form))
        wrong = [path for path in want.keys() | stored.keys() if not same_shape(want.get(path), stored.get(path))]
        if wrong:
            raise ValueError(f"{self.name} does not hold {sorted(wrong)[0]} as its config asks for: save it again")
        return stored

    def read(self, wanted: Any) -> Any:
        """The params, each as its `jax.ShapeDtypeStruct` says: a jax array where that has a sharding, else numpy.

        A leaf that is `...` is not read.
        """
        ocp = library()
        how = jax.tree.map(restore_args, wanted)
        with checkpointer(wanted) as reader, self.refused():
            return reader.restore(self.directory / ARRAYS, args=ocp.args.PyTreeRestore(wanted, how))

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Makes one line of what Orbax and TensorStore say about files that they cannot read."""
        try:
            yield
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())[:160]
            raise ValueError(f"{self.name} cannot be read ({line}): copy or save it again") from None

    def read_one(self, path: Path, dtype: Any = None) -> np.ndarray:
        """One array on the host, whole."""
        key = "/".join(map(str, path))
        leaf = jax.ShapeDtypeStruct(self.stored[key].shape, dtype or self.stored[key].dtype)
        tree = models.param_shapes(self.config)
        places = jax.tree.structure(tree)
        tree = self.read(jax.tree.unflatten(places, [leaf if name == key else ... for name in flat(tree)]))
        return next(x for x in jax.tree.leaves(tree) if x is not ...)


def same_shape(a: Any, b: Any) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def restore_args(leaf: Any) -> Any:
    """How Orbax is to give an array."""
    ocp = library()
    if leaf is ...:
        return ocp.RestoreArgs()
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


@contextlib.contextmanager
def checkpointer(tree: Any) -> Iterator[Any]:
    """Orbax's reader and writer of such a tree, without its warnings."""
    ocp = library()
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf is not ...]
    # Orbax refuses an array, as it is stored, that its buffer cannot hold with a byte to spare.
    most = max((math.prod(leaf.shape) * max(leaf.dtype.itemsize, 4) for leaf in leaves), default=0)
    room: Any = max(BUFFER, most + 4096) / 10**9
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,  # takes a fifth of the bytes of bfloat16 weights away, and three times as long
        save_concurrent_gb=room,
        save_device_host_concurrent_gb=room,
        restore_concurrent_gb=room,
        type_handler_registry=registry(),
    )
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(handler) as both:
            yield both
    finally:
        log.setLevel(level)


def registry() -> Any:
    """How leaves of each type are written and read.

    Arrays that several devices hold are written by the first of them: Orbax would have each write a part of its own,
    and cut all of these out on the devices before it writes any (1.5 GB more memory for 1.5 GB of weights on
    data=2,tensor=2). Leaves on the host are made and written one after the other.
    """
    kinds = library().type_handlers

    class Handler(kinds.NumpyHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            under_way: list[Any] = []
            for value, info, arg in zip(values, infos, args, strict=True):
                started = await super().serialize([np.asarray(value)], [info], [arg])
                for future in under_way:
                    future.result()
                under_way = list(started)
            return under_way

    arrays = kinds.ArrayHandler(use_replica_parallel=False)
    return kinds.create_type_handler_registry(
        (jax.Array, arrays),
        (np.ndarray, Handler(deepcopy_host_arrays=False)),
        (Later, Handler(deepcopy_host_arrays=False)),
    )


def restore(directory: pathlib.Path, dtype: Any = None, mesh: Mesh | None = None) -> tuple[dict[str, Any], ModelConfig]:
    """The params and config of a sharded checkpoint, arranged for the mesh and on it; see `load`.

    Each device reads its own part. Where a canonical dimension does not divide (heads that are repeated or padded),
    the array is first restored split along another dimension, then arranged on the mesh, one array at a time.
    """
    checkpoint = Sharded(directory)
    if dtype is not None and jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype {jnp.dtype(dtype).name} cannot be computed in: take one of {', '.join(FLOATS)}")
    if dtype is None and checkpoint.huggingface.get("mixed"):  # as `load` does with such a directory itself
        dtype = checkpoint.config.dtype
    config = checkpoint.config if dtype is None else checkpoint.config.replace(dtype=jnp.dtype(dtype).name)
    mesh = mesh if mesh is not None else meshes.concrete()
    tree = shapes_of(config, checkpoint.form)
    keys = jax.tree.unflatten(jax.tree.structure(tree), list(flat(tree)))
    check_memory(config if mesh is None else models.arrange_config(config, mesh), mesh, checkpoint.form)
    if mesh is None:
        home = SingleDeviceSharding(jnp.zeros(()).device)
        wanted = jax.tree.map(lambda key, leaf: ask(checkpoint, key, leaf, dtype, home), keys, tree)
        return models.repacked(checkpoint.read(wanted), kernels.packs_int4()), config
    arranged = models.arrange_config(config, mesh)
    words = meshes.spelled(tree, models.letters(config))

    def wish(key: str, leaf: Any, word: str) -> jax.ShapeDtypeStruct:
        return ask(checkpoint, key, leaf, dtype, resting(leaf.shape, word, key, mesh))

    wanted = jax.tree.map(wish, keys, tree, words)
    if checkpoint.form is not None:
        there = shapes_of(config, checkpoint.form, mesh)
        if arranged is not config or jax.tree.structure(there) != jax.tree.structure(tree):
            raise ValueError(
                f"the weights of {directory} are in codes ({checkpoint.form}), which are not cut: take a mesh that "
                "divides heads, widths, vocabulary and groups, or quantize what they were made from"
            )
        return models.repacked(checkpoint.read(wanted), kernels.packs_int4()), config
    homes = meshes.shardings(words, mesh)
    tables = sources(arranged) if arranged.canonical is not None else None
    return settle(checkpoint.read(wanted), words, homes, tables), arranged


def ask(checkpoint: Sharded, key: str, leaf: Any, dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array as it is wanted."""
    stored = checkpoint.stored[key].dtype
    own = dtype is None or f"{key.rpartition('/')[0]}/codes" in checkpoint.stored  # codes and their scales stay
    return jax.ShapeDtypeStruct(leaf.shape, stored if own else dtype, sharding=sharding)
