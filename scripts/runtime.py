"""What a script runs on: its devices, their mesh, the processes beside it, and the programs that are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import flags
import processes
from flags import setting
from processes import say

import jaxinfer

OWN = frozenset({"process_id", "coordinator", "join_timeout", "json", "compile_cache"})  # each process has its own
JOB = "jaxinfer-job"  # the name of its threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The settings of every script that runs programs."""

    mesh: str | None = setting(None, "devices by axis, such as data=2,tensor=4; -1 is what is left", metavar="AXES")
    cpu_devices: int | None = setting(None, "emulate so many devices on the CPU (of each process)", metavar="N")
    coordinator: str | None = setting(None, "several processes: where process 0 listens", metavar="HOST:PORT")
    num_processes: int | None = setting(None, "how many there are", metavar="N")
    process_id: int | None = setting(None, "which one this is: 0 to N - 1, and 0 prints", metavar="I")
    distributed: bool = setting(False, "the same from the environment: TPU pods, Slurm, Kubernetes, Open MPI")
    join_timeout: float = setting(300.0, "to wait for the other processes (default 300)", metavar="SECONDS")
    compile_cache: bool = setting(True, "keep compiled programs, and take those that were kept")

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.distributed or (self.num_processes or 1) > 1

    @property
    def kept(self) -> str | None:
        """Where JAX keeps programs; by default in the user's cache."""
        return None

    @property
    def who(self) -> str:
        """How a line of this process begins, before it has met the others."""
        return f"process {self.process_id}: " if self.several and not self.distributed else ""


def check(args: Machine) -> None:
    """Refuses what contradicts itself, before anything heavy is imported."""
    three = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    given = [f"--{flags.dashed(name)}" for name, value in three.items() if value is not None]
    missing = [f"--{flags.dashed(name)}" for name, value in three.items() if value is None]
    if args.distributed and given:
        raise ValueError(f"--distributed and {given[0]} contradict each other: leave one of them out")
    if given and missing:
        raise ValueError(f"{' and '.join(given)} without {' and '.join(missing)}: several processes need all three")
    if args.mesh is not None:
        jaxinfer.mesh.parse_axes(args.mesh)
    if args.cpu_devices is not None:
        if args.cpu_devices < 1:
            raise ValueError(f"--cpu-devices is {args.cpu_devices}: it must be at least 1")
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms and "cpu" not in platforms.split(","):
            raise ValueError(
                f"--cpu-devices {args.cpu_devices} emulates devices on the CPU but JAX_PLATFORMS is {platforms}: "
                "leave one of them out"
            )
    if args.coordinator is not None and args.num_processes is not None and args.process_id is not None:
        processes.split(args.coordinator)
        if args.num_processes < 1:
            raise ValueError(f"--num-processes is {args.num_processes}: it must be at least 1")
        if not 0 <= args.process_id < args.num_processes:
            raise ValueError(
                f"--process-id is {args.process_id} but --num-processes is {args.num_processes}: "
                f"give 0 to {args.num_processes - 1}"
            )
    if args.join_timeout <= 0:
        raise ValueError(f"--join-timeout is {args.join_timeout:g}: give more than 0 seconds")


def join(args: Machine) -> processes.Group:
    """Waits for the other processes, if there are any: ValueError says who does not come."""
    if not args.several:
        return processes.Group()
    given: Any = (args.coordinator, args.num_processes, args.process_id)
    address, num, id = cluster() if args.distributed else given
    if num == 1:
        return processes.Group()
    own_stdout(shown=id == 0)
    return processes.meet(address, num, id, args.join_timeout)


def cluster() -> tuple[str, int, int]:
    """Where process 0 listens, how many processes there are and which this is, as JAX reads it from the environment."""
    from jax._src.clusters import ClusterEnv

    address, num, id, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    if address is None or num is None or id is None:
        raise ValueError(
            "--distributed finds no TPU pod, Slurm, Kubernetes or Open MPI job in the environment: "
            "give --coordinator, --num-processes and --process-id"
        )
    return address, num, id


def own_stdout(shown: bool) -> None:
    """Keeps stdout for this script, or for nobody: gloo prints there, whenever it connects."""
    sys.stdout.flush()
    real, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.stdout = os.fdopen(real if shown else null, "w", encoding=sys.stdout.encoding)


def start(args: Machine, group: processes.Group) -> Any:
    """Compares the settings of all processes, starts the devices, and makes the mesh; None where none is asked for."""
    import jax
    from jaxlib.version import __version__ as jaxlib

    settings = {f"--{flags.dashed(name)}": value for name, value in vars(args).items() if name not in OWN}
    versions = {"jaxinfer": jaxinfer.__version__, "jax": jax.__version__, "jaxlib": jaxlib}
    group.agree(versions | settings)
    if args.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    keep_programs(args.compile_cache, args.kept)
    if isinstance(group, processes.Together):
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, and go on
        jax.distributed.initialize(
            group.address, group.num, group.id, coordinator_bind_address=group.address, initialization_timeout=60
        )
    jax.devices()
    axes = jaxinfer.mesh.parse_axes(args.mesh) if args.mesh else {"tensor": -1} if group.num > 1 else None
    return None if axes is None else jaxinfer.mesh.make_mesh(axes)


def keep_programs(wanted: bool, directory: str | None = None) -> None:
    """Turns the persistent compilation cache on, for programs of any size."""
    import jax

    jax.config.update("jax_enable_compilation_cache", wanted)
    if not wanted:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    directory = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or os.path.join(home, "jaxinfer", "programs")
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        why = flags.one_line(error)
        say(f"compiled programs are not kept ({why}): set JAX_COMPILATION_CACHE_DIR to a directory")
        return
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def count_programs() -> Callable[[], int]:
    """Counts, from now on, the programs that were compiled and not found in the persistent cache."""
    import jax

    wanted, found = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
    seen = {wanted: 0, found: 0}

    def note(event: str, *_: Any, **__: Any) -> None:
        if event in seen:
            seen[event] += 1

    jax.monitoring.register_event_listener(note)
    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: seen[wanted] - seen[found]


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs give, which are done side by side. The first that fails is raised at once, as is Ctrl-C.

    The others are then left behind: see `leave`.
    """
    import jax

    mesh, done = jaxinfer.mesh.concrete(), queue.SimpleQueue()

    def do(place: int, job: Callable[[], Any]) -> None:
        try:
            with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                done.put((place, job(), None))
        except BaseException as error:
            done.put((place, None, error))

    for place, job in enumerate(jobs):
        threading.Thread(target=do, args=(place, job), name=JOB, daemon=True).start()
    results: dict[int, Any] = {}
    while len(results) < len(jobs):
        place, result, error = done.get()
        if error is not None:
            raise error
        results[place] = result
    return [results[place] for place in range(len(jobs))]


def leave(code: int) -> NoReturn:
    """Exits, at once where a job was left behind: XLA does not stop compiling, and must not be torn down meanwhile."""
    if any(thread.name == JOB for thread in threading.enumerate()):
        processes.quit_now(code)
    sys.exit(code)


# --- what the report says of it ------------------------------------------------------------------------------------


def per_device(*trees: Any) -> list[int]:
    """The bytes of each tree on that local device which holds most of them all."""
    import jax

    held: dict[Any, list[int]] = {}
    for index, tree in enumerate(trees):
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                held.setdefault(shard.device, [0] * len(trees))[index] += shard.data.nbytes
    return max(held.values(), key=sum)


def collectives(compiled: Any) -> list[dict[str, Any]]:
    """The collectives of one step of a compiled decode loop, as one device sees them: [{kind, count, bytes}].

    A step is one trip of the loop, its condition included. Of a conditional's branches the one that moves least is
    counted: that is the usual case of a draw, whose other branch searches where the best candidates do not suffice.
    """
    parsed = jaxinfer.program.parse(compiled)
    loops = [loop.name for loop in jaxinfer.program.while_loops(parsed) if loop.trip_count is None]
    rows = jaxinfer.program.collectives(parsed, cheapest=True)
    return [{key: row[key] for key in ("kind", "count", "bytes")} for row in rows if row["loop"] in loops]
