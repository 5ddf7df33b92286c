"""Which kernel is taken: by name, and part of what a program is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxinfer import kernels, ops
from jaxinfer.kernels import KernelChoice, native

X, W = jnp.ones((2, 1, 8)), jnp.ones((4, 8))


def product(x, w):
    return ops.linear(x, w, "BTD,FD->BTF")


def uses_the_kernel(function=product, x=X, w=W):
    return native.LINEAR in jax.jit(lambda *args: function(*args)).lower(x, w).as_text()  # a new function: traced anew


@pytest.mark.usefixtures("kernels_are_built")
def test_another_choice_traces_a_program_anew():
    traced = []

    @jax.jit
    def inner(x, w):
        traced.append(kernels.choice().linear)
        return product(x, w)

    outer = jax.jit(lambda x, w: inner(x, w))
    for name in ("auto", "reference", "auto", "cpu", "reference"):
        with kernels.use(KernelChoice(linear=name)):
            np.testing.assert_array_equal(outer(X, W), np.full((2, 1, 4), 8))
            assert (native.LINEAR in outer.lower(X, W).as_text()) == (name != "reference")
    assert traced == ["auto", "reference", "cpu"]
    assert kernels.choice() == KernelChoice()


def test_a_kernel_that_is_not_there_is_an_error_only_when_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert not uses_the_kernel()
    asked = kernels.use(KernelChoice(linear="cpu"))
    with asked, pytest.raises(RuntimeError, match=r"^linear='cpu' is not to be had: no compiler: install g\+\+ .*"):
        product(X, W)


@pytest.mark.usefixtures("kernels_are_built")
def test_dtypes_that_no_kernel_multiplies_take_the_plain_product():
    half, brief = X.astype(jnp.float16), X.astype(jnp.bfloat16)
    assert not uses_the_kernel(x=half, w=W.astype(jnp.float16))
    assert not uses_the_kernel(x=brief)
    asked = kernels.use(KernelChoice(linear="cpu"))
    with asked, pytest.raises(RuntimeError, match="it multiplies no bfloat16 with float32"):
        product(brief, W)


def test_an_unknown_choice_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="linear='fast' names no kernel: the choices are auto, cpu, gpu, reference"):
        KernelChoice(linear="fast")


@pytest.mark.usefixtures("kernels_are_built")
def test_under_a_mesh_the_product_stays_xlas_to_split_except_in_a_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert not uses_the_kernel()
        for checked in (False, True):
            mapped = jax.shard_map(product, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=checked)
            assert uses_the_kernel(mapped) != checked
            np.testing.assert_array_equal(jax.jit(mapped)(X, W), product(X, W))
        with kernels.use(KernelChoice(linear="cpu")), pytest.raises(RuntimeError, match="a mesh is set"):
            product(X, W)
    assert uses_the_kernel()
