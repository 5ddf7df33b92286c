"""A pytest plugin: `pytest_plugins = ["jaxinfer.testing.fixtures"]`. See `jaxinfer.testing.sharding`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

from jaxinfer.mesh import make_mesh, parse_axes


@pytest.fixture
def on_mesh() -> Callable[[str], contextlib.AbstractContextManager[Any]]:
    """on_mesh("data=2,tensor=4") is a context in which that mesh is ambient; on_mesh("") one without a mesh."""

    @contextlib.contextmanager
    def enter(axes: str) -> Iterator[Any]:
        if not axes:
            yield None
            return
        mesh = make_mesh(parse_axes(axes))
        with jax.set_mesh(mesh):
            yield mesh

    return enter
