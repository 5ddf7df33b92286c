"""What the mesh's tests share."""

import pytest

MESHES = ("tensor=1", "tensor=2", "tensor=8", "data=2,tensor=4", "seq=4", "seq=2,tensor=2")


@pytest.fixture(params=MESHES)
def axes(request):
    """The meshes of the promise, one after the other."""
    return request.param
