"""Where arrays live: a mesh of devices, and the one table that says which letter is split over which of its axes.

    with jax.set_mesh(make_mesh({"data": 2, "tensor": 4})):
        params, config = jaxinfer.load("builtin")  # every later call runs on eight devices

The mesh is ambient, and its axes are Auto: the compiler partitions each program from where its arguments lie and from
what `constrain` says on the way. No other room names a mesh axis: they say letters. Without a mesh everything here
does nothing. Layout: Megatron's for attention and MLP (Shoeybi et al. 2019, section 3), vocabulary-parallel embedding
and logits, rows over `data`, the cache's positions over `seq`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "stage", "expert", "seq", "tensor")  # outermost first: what talks most lies on neighbours
RULES: dict[str, str] = {
    "B": "data",
    "E": "expert",
    "S": "seq",
    "N": "tensor",
    "K": "tensor",
    "F": "tensor",
    "V": "tensor",
}
OVERRIDES: dict[str, dict[str, str | None]] = {  # by the last name of a leaf's path
    "positions": {"S": None},  # a learned position table: its S is no cache's
}


def parse_axes(text: str) -> dict[str, int]:
    """ "data=2,tensor=4" -> {"data": 2, "tensor": 4}; ValueError for anything else."""
    axes: dict[str, int] = {}
    for item in text.split(","):
        name, equals, size = (part.strip() for part in item.partition("="))
        if not equals or not size.removeprefix("-").isdigit() or name in axes:
            raise ValueError(f"mesh {text!r} cannot be read at {item!r}: write axis=size, such as data=2,tensor=4")
        axes[name] = int(size)
    return axes


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with these axes, any subset of `AXES`, over the first devices (all of them by default are taken).

    One size may be -1: what is left of the devices. In a program of several processes every device must be in the mesh.
    Raises ValueError for an unknown axis, a size that cannot be, and more devices than there are.
    """
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is not known: take some of {', '.join(AXES)}")
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: int(axes[name]) for name in AXES if name in axes} or {"data": 1}
    asked = ",".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 for name, size in sizes.items() if name not in rest):
        raise ValueError(f"mesh {asked}: sizes must be at least 1, and at most one of them -1 (what is left)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        if len(devices) % fixed:
            raise ValueError(f"mesh {asked}: {fixed} does not divide the {len(devices)} devices: give {rest[0]} a size")
        sizes[rest[0]] = len(devices) // fixed
    count = math.prod(sizes.values())
    if count > len(devices):
        more = "; --cpu-devices emulates more" if devices[0].platform == "cpu" else ""
        raise ValueError(f"mesh {asked} needs {count} devices but there are {len(devices)}: make it smaller{more}")
    processes = {device.process_index for device in devices}
    if len(processes) > 1 and count < len(devices):
        raise ValueError(
            f"mesh {asked} takes {count} of the {len(devices)} devices of {len(processes)} processes: "
            "every process must have its part, so take all devices"
        )
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


def ambient() -> Any:
    """The mesh that `jax.set_mesh` has set, abstract inside a trace; None without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def concrete() -> Mesh | None:
    """The ambient mesh with its devices, outside a trace; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def size_of(letter: str, mesh: Any = None) -> int:
    """Over how many devices a letter is split: 1 without a mesh, or without its axis."""
    mesh = mesh if mesh is not None else ambient()
    return 1 if mesh is None else dict(mesh.shape).get(RULES.get(letter, ""), 1)


def round_up(size: int, letter: str) -> int:
    """The next size that its letter's devices divide."""
    return -(-size // size_of(letter)) * size_of(letter)


def spec(word: str, path: str = "", mesh: Any = None) -> PartitionSpec:
    """The axes of an array with these letters ("BKSH"; "_" for a dimension without one), on `mesh` or the ambient one.

    path: names the leaf ("layers/0/q"), for overrides.
    """
    mesh = mesh if mesh is not None else ambient()
    rules = RULES | OVERRIDES.get(path.rpartition("/")[2], {})
    names = () if mesh is None else mesh.axis_names
    axes = (rules.get(letter) for letter in word)
    return PartitionSpec(*(axis if axis in names else None for axis in axes))


def check(shape: Sequence[int], word: str, path: str, mesh: Any) -> None:
    """Refuses a dimension that its devices do not divide."""
    if len(shape) != len(word):
        raise ValueError(f"{path or 'an array'} of shape {list(shape)} has the letters {word!r}: one a dimension")
    for size, letter, axis in zip(shape, word, spec(word, path, mesh), strict=True):
        if axis is not None and size % mesh.shape[axis]:
            remedy = {"B": "add inactive rows", "S": "round it up"}.get(letter, "`arrange` the params first")
            what = f"{path}: {letter}" if path else letter
            raise ValueError(f"{what} = {size} does not divide over {axis} = {mesh.shape[axis]}: {remedy}")


def constrain(x: jax.Array, word: str, path: str = "") -> jax.Array:
    """x, said to lie as its letters do on the ambient mesh. Does nothing without one, and inside `shard_map`."""
    mesh = ambient()
    if mesh is None or mesh.manual_axes:
        return x
    check(x.shape, word, path, mesh)
    return jax.lax.with_sharding_constraint(x, spec(word, path, mesh))


def constrain_tree(tree: Any, letters: Any) -> Any:
    """Every array of a tree, as the congruent tree of letters says."""
    return tree if ambient() is None else _map(lambda path, x, word: constrain(x, word, path), tree, letters)


def shardings(letters: Any, mesh: Mesh) -> Any:
    """The tree of letters as a tree of `NamedSharding`."""
    return _map(lambda path, word, _: NamedSharding(mesh, spec(word, path, mesh)), letters, letters)


def shapes(tree: Any, letters: Any, mesh: Mesh | None = None) -> Any:
    """Arrays as `jax.ShapeDtypeStruct`s that lie as their letters say on `mesh` (the ambient one unless given).

    Without a mesh they say nothing of where they lie.
    """
    mesh = mesh if mesh is not None else concrete()

    def shape(path: str, x: Any, word: str) -> jax.ShapeDtypeStruct:
        home = None if mesh is None else NamedSharding(mesh, spec(word, path, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home)

    return _map(shape, tree, letters)


def shard(tree: Any, letters: Any = None, mesh: Mesh | None = None) -> Any:
    """The arrays of a tree, put where their letters say on `mesh` (the ambient one unless given).

    letters: a congruent tree of strings (`models.letters(config)`); what `tree.letters()` says unless given.
    Raises ValueError without a mesh, and for a dimension that its devices do not divide.
    """
    mesh = mesh if mesh is not None else concrete()
    if mesh is None:
        raise ValueError("shard needs a mesh: give mesh=make_mesh({...}), or call it inside `with jax.set_mesh(...)`")
    if letters is None:
        if not hasattr(tree, "letters"):
            raise ValueError(f"shard does not know the letters of a {type(tree).__name__}: give letters=")
        letters = tree.letters()

    def put(path: str, x: Any, word: str) -> jax.Array:
        check(np.shape(x), word, path, mesh)
        return jax.device_put(x, NamedSharding(mesh, spec(word, path, mesh)))

    return _map(put, tree, letters)


class Parts(abc.ABC):
    """What several arrays make up together, and a tree of letters knows by one word: a quantized weight."""

    @abc.abstractmethod
    def letters(self, word: str) -> Any:
        """The letters of the arrays, congruent with them."""


def spelled(tree: Any, letters: Any) -> Any:
    """Letters congruent with the arrays of a tree, where some of its leaves are `Parts`."""

    def one(x: Any, word: Any) -> Any:
        return x.letters(word) if isinstance(x, Parts) and isinstance(word, str) else word

    return jax.tree.map(one, tree, letters, is_leaf=lambda x: isinstance(x, Parts))


def _map(f: Callable[[str, Any, str], Any], tree: Any, letters: Any) -> Any:
    """f(path, leaf, word) over two congruent trees; None leaves stay."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, x, word: f(jax.tree_util.keystr(keys, simple=True, separator="/"), x, word),
        tree,
        spelled(tree, letters),
    )


def local_bytes(shapes: Any, letters: Any, mesh: Mesh | None = None) -> int:
    """Bytes that this process's devices hold of arrays with these shapes, on `mesh` (the ambient one unless given).

    A device that holds a copy counts like one that holds a part. Without a mesh there is one device, which holds all.
    """
    mesh = mesh if mesh is not None else concrete()

    def held(path: str, x: Any, word: str) -> int:
        if mesh is None:
            return math.prod(x.shape) * x.dtype.itemsize
        home = NamedSharding(mesh, spec(word, path, mesh))
        return math.prod(home.shard_shape(x.shape)) * x.dtype.itemsize * len(home.addressable_devices)

    return sum(jax.tree.leaves(_map(held, shapes, letters)))


def fetch(tree: Any) -> Any:
    """The arrays of a tree as numpy, whole, on every process: all of them call this, in the same order."""

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


# --- inside shard_map --------------------------------------------------------------------------------------------


def shard_map(f: Callable, words: Any, out: Any) -> Callable:
    """f run by each device on its own part: arguments and results split as their letters say. f itself without a mesh.

    Inside, `total`, `largest`, `gather` and `start` speak of the other parts; without a mesh they are identities.
    """
    mesh = ambient()
    if mesh is None or mesh.manual_axes:
        return f

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda word: spec(word, mesh=mesh), tree)

    return jax.shard_map(f, in_specs=specs(words), out_specs=specs(out), check_vma=False)


def inside() -> bool:
    """Whether this is traced inside a `shard_map`."""
    mesh = ambient()
    return mesh is not None and bool(mesh.manual_axes)


def parts(letter: str) -> int:
    """Over how many devices a letter is split here, inside `shard_map`; 1 elsewhere."""
    return size_of(letter) if axes_of(letter) else 1


def axes_of(letter: str) -> tuple[str, ...]:
    """The axes that a letter is split over here, where each device runs its own part; () elsewhere."""
    mesh = ambient()
    axis = RULES.get(letter)
    return (axis,) if axis is not None and mesh is not None and axis in mesh.manual_axes else ()


def total(x: Any, letter: str) -> Any:
    """The sum of all parts' x (an array or a tree), in one collective."""
    axes = axes_of(letter)
    return jax.lax.psum(x, axes) if axes else x


def largest(x: jax.Array, letter: str) -> jax.Array:
    """The elementwise maximum of all parts' x."""
    axes = axes_of(letter)
    return jax.lax.pmax(x, axes) if axes else x


def gather(x: jax.Array, letter: str) -> jax.Array:
    """All parts' x, side by side along the last axis."""
    axes = axes_of(letter)
    return jax.lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True) if axes else x


def start(letter: str, size: int) -> jax.Array | int:
    """Where this part begins, `size` being its length."""
    axes = axes_of(letter)
    return jax.lax.axis_index(axes) * size if axes else jnp.zeros((), jnp.int32)


# --- several processes -------------------------------------------------------------------------------------------


def hear(*numbers: float) -> np.ndarray:
    """What every process says, [processes, numbers]: all of them call this, in the same order, and get the same.

    A decision of the host that rests on a clock or a key press must be made from what all have heard: processes that
    then dispatch different programs wait for each other for ever.
    """
    said = np.array(numbers, np.float32)
    if jax.process_count() == 1:
        return said[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(said)
