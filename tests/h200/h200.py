"""Compiles programs for an NVIDIA H200 on a machine without one: for lower().compile(), not for running.

Import it before jax: it sets what the compile needs. It runs in the environment that setup.sh makes. Autotuning is off
(it needs the device), so the choices of cuBLASLt and cuDNN are not visible; copies, converts, fusions, temporaries and
collectives are.
"""

import functools
import math
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DEVICE = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")  # for what asks which device it is lowered for
TARGET = pathlib.Path(__file__).with_name("target_config.txtpb").read_text()


@functools.cache  # every array of a program must lie on the same devices, and each topology makes new ones
def h200_mesh(shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("tensor",)) -> Mesh:
    """A mesh of H200s that are not there."""
    devices = f"1x1x{math.prod(shape)}"
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology=devices)
    return topologies.make_mesh(topo=topology, mesh_shape=shape, axis_names=names)


def abstract(tree, mesh: Mesh | None = None):
    """Every array of a tree (or its ShapeDtypeStruct) as one that lies whole on each H200; nothing is allocated."""
    sharding = NamedSharding(mesh or h200_mesh(), PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_for_h200(function, *args, mesh: Mesh | None = None, **options) -> jax.stages.Compiled:
    """The program of a function (jitted, or jitted here with no options) for abstract `args` and keyword `options`.

    Arrays among them become abstract and lie on the mesh; static arguments are passed as they are.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function)

    def place(value):
        return abstract(value, mesh) if is_arrays(value) else value

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=DEVICE)):
        lowered = jitted.lower(*map(place, args), **{name: place(value) for name, value in options.items()})
    return lowered.compile()


def is_arrays(value) -> bool:
    """Whether a value is a tree of arrays, with at least one."""
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves)
