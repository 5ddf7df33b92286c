"""What every test shares."""

import gc
import itertools
import os
import pathlib
import sys

import jax
import pytest
from compiling import quickly

from jaxinfer.testing import emulate_devices

pytest_plugins = ["jaxinfer.testing.fixtures"]
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "scripts")]  # what tests share; and scripts, as modules
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network would not be a law
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MAPS = pathlib.Path("/proc/self/maps")
TESTS = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Eight devices; `-m gpu` runs on those that there are."""
    if config.option.markexpr != "gpu":
        emulate_devices(8)


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look through it again, nor after every few allocations."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True)
def few_mappings():
    """Every program that XLA:CPU compiles maps memory, and a process may have 65530 maps: past that XLA crashes.

    They are counted after every fourth test, as the system takes a while to list them.
    """
    yield
    if next(TESTS) % 4 == 0 and MAPS.is_file() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def quickly_compiled():
    """For laws, which hold in any program; not for facts of programs."""
    with quickly():
        yield


@pytest.fixture
def compiled_to_be_read():
    """For facts of programs, whose text this leaves as it is."""
    with quickly(read=True):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default run leaves out what its marker says to ask for."""
    if config.option.markexpr:
        return
    asked = {"full", "gpu", "h200"}
    keep = [item for item in items if not asked & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(keep)])
    items[:] = keep
