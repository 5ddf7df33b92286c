"""What the tests of the kernels share: a machine without a compiler says so, loudly, and any other must have them."""

import pytest

from jaxinfer.kernels import build, native


@pytest.fixture(scope="session")
def kernels_are_built():
    """The kernels are there. Skipped only where no compiler is; a compiler that fails is a failure."""
    if build.find_compiler() is None:
        pytest.skip("NO C++ COMPILER ON THIS MACHINE: the CPU kernels were not tested at all (install g++ or clang++)")
    reason = native.unavailable()
    assert reason is None, reason
